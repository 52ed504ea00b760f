"""Qwen 3 with a mixture of experts."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, decoder_spec, qwen_experts, windows

ARCHITECTURES = ("Qwen3MoeForCausalLM",)
CHECKPOINT = CheckpointLayout()
DEFAULTS = {
    "max_position_embeddings": 32768, "sliding_window": 4096, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}  # fmt: skip


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **config}
    bias = bool(config.get("attention_bias", False))
    everywhere = (True,) * config["num_hidden_layers"]
    return decoder_spec(
        config,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        windows=windows(config, everywhere) if config.get("use_sliding_window") else (),
        moe=qwen_experts(config),
    )


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 241,
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "max_position_embeddings": 512,
        "moe_intermediate_size": 30,
        "num_experts": 9,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    }
