"""Gemma 3, its text model: norms on queries and keys, five layers with a window for each without, two ropes."""

from __future__ import annotations

from typing import Any

from engines.models.spec import (
    CheckpointLayout,
    DecoderSpec,
    RopeSpec,
    causal_only,
    decoder_spec,
    num_labels,
    rope_spec,
    windows,
)

ARCHITECTURES = (
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Gemma3TextForSequenceClassification",
    "Gemma3TextModel",
)
CHECKPOINT = CheckpointLayout(
    prefixes=("model.", "language_model.model.", "model.language_model.", ""),
    ignored=(r"(model\.)?(vision_tower|multi_modal_projector)\..*", r"language_model\.lm_head\.weight"),
)
DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


def spec(config: dict[str, Any]) -> DecoderSpec:
    text = {**DEFAULTS, **causal_only(config.get("text_config") or config)}
    bias = bool(text.get("attention_bias", False))
    sliding = tuple((i + 1) % text["sliding_window_pattern"] != 0 for i in range(text["num_hidden_layers"]))
    return decoder_spec(
        {**text, "hidden_act": text["hidden_activation"]},
        norm_weight_offset=1.0,
        embedding_scale=text["hidden_size"] ** 0.5,
        sandwich_norm=True,
        qk_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        softmax_scale=text["query_pre_attn_scalar"] ** -0.5,
        windows=windows(text, sliding),
        rope=rope_spec(text, text["head_dim"], "full_attention", theta=1e6),
        rope_local=_local_rope(text),
        logit_softcap=text.get("final_logit_softcapping") or 0.0,
        num_labels=num_labels(config),
    )


def _local_rope(text: dict[str, Any]) -> RopeSpec:
    """Of the layers with a window: never scaled in the old spelling of the config."""
    if isinstance((text.get("rope_parameters") or {}).get("sliding_attention"), dict):
        return rope_spec(text, text["head_dim"], "sliding_attention")
    return RopeSpec(theta=float(text.get("rope_local_base_freq", 10000.0)))


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 239,
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rope_theta": 100000.0,
        "rope_local_base_freq": 1000.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "query_pre_attn_scalar": 20,
        "sliding_window": 31,
        "sliding_window_pattern": 3,
    }
