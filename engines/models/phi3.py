"""Phi 3, 3.5 and 4-mini: packed projections, longrope, rotary over part of a head."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, PackedModules, decoder_spec, windows

ARCHITECTURES = ("Phi3ForCausalLM", "Phi3ForSequenceClassification", "Phi3Model")
CHECKPOINT = CheckpointLayout(
    packed=(
        PackedModules(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
        PackedModules(("gate_proj", "up_proj"), "gate_up_proj"),
    ),
)
DEFAULTS = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **config, "layer_types": None}
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key) or {}
        if scaling.get("rope_type", scaling.get("type")) == "yarn":
            # The first releases call their longrope so.
            config[key] = {**scaling, "rope_type": "longrope"}
    return decoder_spec(config, windows=windows(config, (True,) * config["num_hidden_layers"]))


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": 257,
        "hidden_size": 96,
        "intermediate_size": 110,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "partial_rotary_factor": 0.75,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.2, 2.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0],
        },
        "sliding_window": 61,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
