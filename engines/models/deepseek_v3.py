"""DeepSeek V3 and R1: latent attention, experts chosen by sigmoid scores with a correction (arXiv 2412.19437)."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, deepseek_spec

ARCHITECTURES = ("DeepseekV3ForCausalLM",)
CHECKPOINT = CheckpointLayout(
    renames=(("shared_expert", "shared_experts"),),
    # The layer after the last predicts a second token (arXiv 2412.19437 section 2.2); generation does without.
    ignored=(r".*rotary_emb\.inv_freq", r"model\.layers\.61\..*"),
)
DEFAULTS = {
    "n_routed_experts": 256, "n_shared_experts": 1, "q_lora_rank": 1536, "moe_intermediate_size": 2048,
    "rms_norm_eps": 1e-6, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "routed_scaling_factor": 2.5,
}  # fmt: skip


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **config}
    return deepseek_spec(
        config,
        scoring="sigmoid",
        correction_bias=True,
        norm_topk_prob=bool(config["norm_topk_prob"]),
        n_group=config["n_group"] or 1,
        topk_group=config["topk_group"] or 1,
    )


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 233,
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "max_position_embeddings": 512,
        "kv_lora_rank": 32,
        "q_lora_rank": 28,
        "qk_nope_head_dim": 20,
        "qk_rope_head_dim": 12,
        "v_head_dim": 24,
        "moe_intermediate_size": 26,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "tie_word_embeddings": False,
    }
