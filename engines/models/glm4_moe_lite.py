"""GLM 4.7 Flash: the layers of DeepSeek V3 in one group of experts."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, deepseek_spec

ARCHITECTURES = ("Glm4MoeLiteForCausalLM",)
CHECKPOINT = CheckpointLayout(
    renames=(("shared_expert", "shared_experts"),),
    # The layer after the last predicts a second token; generation does without.
    ignored=(r".*rotary_emb\.inv_freq", r"model\.layers\.47\..*"),
)
DEFAULTS = {
    "n_routed_experts": 64, "n_shared_experts": 1, "q_lora_rank": 768, "moe_intermediate_size": 1536,
    "rms_norm_eps": 1e-5, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4,
    "norm_topk_prob": True, "routed_scaling_factor": 1.8, "kv_lora_rank": 512, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "v_head_dim": 256, "max_position_embeddings": 202752,
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
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "vocab_size": 239,
        "hidden_size": 60,
        "intermediate_size": 90,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "kv_lora_rank": 36,
        "q_lora_rank": 30,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 28,
        "moe_intermediate_size": 22,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
