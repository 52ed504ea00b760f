"""DeepSeek V2: latent attention, and experts beside some that all tokens share (arXiv 2405.04434)."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, deepseek_spec, expect

ARCHITECTURES = ("DeepseekV2ForCausalLM",)
CHECKPOINT = CheckpointLayout(renames=(("shared_expert", "shared_experts"),))
DEFAULTS = {
    "n_routed_experts": 64, "n_shared_experts": 2, "q_lora_rank": 1536, "moe_intermediate_size": 1407,
    "rms_norm_eps": 1e-6, "topk_method": "greedy", "first_k_dense_replace": 0,
}  # fmt: skip


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **config}
    method = expect("topk_method", config["topk_method"], ("greedy", "group_limited_greedy"))
    groups = method == "group_limited_greedy"
    return deepseek_spec(
        config,
        scoring="softmax",
        n_group=(config.get("n_group") or 1) if groups else 1,
        topk_group=(config.get("topk_group") or 1) if groups else 1,
    )


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "vocab_size": 229,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 512,
        "kv_lora_rank": 40,
        "q_lora_rank": None,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
        "moe_intermediate_size": 30,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
