"""Qwen 1.5 and 2 with a mixture of experts, and an expert that all tokens share behind a gate."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, decoder_spec, qwen_experts, windows

ARCHITECTURES = ("Qwen2MoeForCausalLM",)
CHECKPOINT = CheckpointLayout()
DEFAULTS = {
    "max_position_embeddings": 32768, "max_window_layers": 28, "sliding_window": 4096, "num_experts": 60,
    "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
}  # fmt: skip


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **config}
    shared = config["shared_expert_intermediate_size"]
    sliding = tuple(i % 2 == 0 and i < config["max_window_layers"] for i in range(config["num_hidden_layers"]))
    return decoder_spec(
        config,
        qkv_bias=bool(config.get("qkv_bias", True)),
        windows=windows(config, sliding) if config.get("use_sliding_window") else (),
        moe=qwen_experts(config, shared_intermediate_size=shared, shared_gate=True),
    )


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "vocab_size": 223,
        "hidden_size": 70,
        "intermediate_size": 90,
        "num_hidden_layers": 4,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "moe_intermediate_size": 26,
        "shared_expert_intermediate_size": 44,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "rope_theta": 100000.0,
        "tie_word_embeddings": False,
    }
