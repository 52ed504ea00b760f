"""Qwen 2 and 2.5: biases on the query, key and value projections."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, decoder_spec, upper_windows

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification", "Qwen2Model")
CHECKPOINT = CheckpointLayout()
DEFAULTS = {"max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096}


def spec(config: dict[str, Any]) -> DecoderSpec:
    return decoder_spec({**DEFAULTS, **config}, qkv_bias=True, windows=upper_windows({**DEFAULTS, **config}))


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 307,
        "hidden_size": 98,
        "intermediate_size": 130,
        "num_hidden_layers": 3,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_theta": 100000.0,
        "use_sliding_window": True,
        "sliding_window": 29,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    }
