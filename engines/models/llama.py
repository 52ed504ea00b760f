"""Llama 1 to 3, and what has its layers."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, decoder_spec

ARCHITECTURES = ("LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaModel")
CHECKPOINT = CheckpointLayout()


def spec(config: dict[str, Any]) -> DecoderSpec:
    bias = bool(config.get("attention_bias", False))
    return decoder_spec(config, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 251,
        "hidden_size": 70,
        "intermediate_size": 122,
        "num_hidden_layers": 3,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "max_position_embeddings": 512,
        "rope_theta": 5000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    }
