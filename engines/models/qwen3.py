"""Qwen 3, dense: norms on the heads of queries and keys."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, decoder_spec, upper_windows

ARCHITECTURES = ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification", "Qwen3Model")
CHECKPOINT = CheckpointLayout()
DEFAULTS = {"head_dim": 128, "max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096}


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **config}
    bias = bool(config.get("attention_bias", False))
    return decoder_spec(config, qk_norm=True, qkv_bias=bias, o_bias=bias, windows=upper_windows(config))


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 263,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    }
