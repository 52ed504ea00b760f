"""Mistral: Llama's layers, with a sliding window in the first release."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, decoder_spec, windows

ARCHITECTURES = ("MistralForCausalLM", "MistralForSequenceClassification", "MistralModel")
CHECKPOINT = CheckpointLayout()
DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **config, "layer_types": None}
    return decoder_spec(config, windows=windows(config, (True,) * config["num_hidden_layers"]))


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 199,
        "hidden_size": 72,
        "intermediate_size": 104,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 20,
        "max_position_embeddings": 512,
        "sliding_window": 37,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
        "tie_word_embeddings": False,
    }
