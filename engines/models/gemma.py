"""Gemma 1: scaled embeddings, norm weights stored less one."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, causal_only, decoder_spec

ARCHITECTURES = ("GemmaForCausalLM", "GemmaForSequenceClassification", "GemmaModel")
CHECKPOINT = CheckpointLayout()
DEFAULTS = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **causal_only(config)}
    # The first releases say "gelu" and mean the tanh approximation.
    act = "gelu_pytorch_tanh" if config.get("hidden_act", "gelu") == "gelu" else config["hidden_act"]
    bias = bool(config.get("attention_bias", False))
    return decoder_spec(
        {**config, "hidden_act": act},
        norm_weight_offset=1.0,
        embedding_scale=config["hidden_size"] ** 0.5,
        qkv_bias=bias,
        o_bias=bias,
    )


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": 241,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "hidden_act": "gelu",
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
    }
