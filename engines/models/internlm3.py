"""InternLM 3: Llama's layers, with its own names for the biases."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, decoder_spec

ARCHITECTURES = ("InternLM3ForCausalLM", "InternLM3Model")
CHECKPOINT = CheckpointLayout()
DEFAULTS = {"head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}


def spec(config: dict[str, Any]) -> DecoderSpec:
    qkv_bias = bool(config.get("qkv_bias", config.get("attention_bias", False)))
    bias = bool(config.get("bias", config.get("mlp_bias", False)))
    return decoder_spec({**DEFAULTS, **config}, qkv_bias=qkv_bias, o_bias=bias, mlp_bias=bias)


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "vocab_size": 227,
        "hidden_size": 80,
        "intermediate_size": 90,
        "num_hidden_layers": 3,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "qkv_bias": True,
        "bias": True,
        "tie_word_embeddings": False,
    }
