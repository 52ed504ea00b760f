"""Mixtral: Mistral with a mixture of experts in every layer (arXiv 2401.04088)."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, MoESpec, decoder_spec, size, windows

ARCHITECTURES = ("MixtralForCausalLM",)
CHECKPOINT = CheckpointLayout(
    renames=(("mlp", "block_sparse_moe"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
)
DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **config}
    experts = MoESpec(
        num_experts=config.get("num_local_experts", 8),
        num_experts_per_tok=config.get("num_experts_per_tok", 2),
        moe_intermediate_size=size(config, "intermediate_size"),
        norm_topk_prob=True,
    )
    return decoder_spec(config, moe=experts, windows=windows(config, (True,) * config["num_hidden_layers"]))


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 211,
        "hidden_size": 72,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 512,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "rope_theta": 10000.0,
        "sliding_window": 43,
        "tie_word_embeddings": False,
    }
