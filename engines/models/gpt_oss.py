"""gpt-oss: attention sinks, windows in every other layer, experts with biases in MXFP4 (arXiv 2508.10925)."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, MoESpec, decoder_spec, expect, size, windows

ARCHITECTURES = ("GptOssForCausalLM",)
CHECKPOINT = CheckpointLayout(renames=(("gate", "router"),))
DEFAULTS = {
    "head_dim": 64, "max_position_embeddings": 131072, "sliding_window": 128, "rms_norm_eps": 1e-5,
    "num_local_experts": 128, "attention_bias": True,
    "rope_theta": 150000.0,
}  # fmt: skip
ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096, "rope_theta": 150000.0,
}  # fmt: skip


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **config}
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config["rope_scaling"] = ROPE
    expect("swiglu_alpha", config.get("swiglu_alpha", 1.702), (1.702,))
    expect("swiglu_limit", config.get("swiglu_limit", 7.0), (7.0,))
    bias = bool(config["attention_bias"])
    experts = MoESpec(
        num_experts=config["num_local_experts"],
        num_experts_per_tok=config.get("num_experts_per_tok") or config.get("experts_per_token") or 4,
        moe_intermediate_size=size(config, "intermediate_size"),
        scoring="softmax_of_chosen",
        router_bias=True,
        stacked=True,
    )
    sliding = tuple(i % 2 == 0 for i in range(config["num_hidden_layers"]))
    return decoder_spec(
        config,
        hidden_act="swiglu_oai",
        qkv_bias=bias,
        o_bias=bias,
        attn_sinks=True,
        moe=experts,
        windows=windows(config, sliding),
    )


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": 227,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 35,
        "rope_theta": 150000.0,
        "rope_scaling": {**ROPE, "factor": 4.0, "original_max_position_embeddings": 128},
        "tie_word_embeddings": False,
    }
