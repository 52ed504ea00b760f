"""Gemma 2: norms around both blocks, soft caps, a window in every other layer."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, causal_only, decoder_spec, windows

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification", "Gemma2Model")
CHECKPOINT = CheckpointLayout()
DEFAULTS = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


def spec(config: dict[str, Any]) -> DecoderSpec:
    config = {**DEFAULTS, **causal_only(config)}
    bias = bool(config.get("attention_bias", False))
    sliding = tuple(i % 2 == 0 for i in range(config["num_hidden_layers"]))
    return decoder_spec(
        {**config, "hidden_act": config["hidden_activation"]},
        norm_weight_offset=1.0,
        embedding_scale=config["hidden_size"] ** 0.5,
        sandwich_norm=True,
        qkv_bias=bias,
        o_bias=bias,
        softmax_scale=config["query_pre_attn_scalar"] ** -0.5,
        windows=windows(config, sliding),
        attn_softcap=config["attn_logit_softcapping"] or 0.0,
        logit_softcap=config["final_logit_softcapping"] or 0.0,
    )


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": 233,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "query_pre_attn_scalar": 12,
        "sliding_window": 33,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 7.0,
    }
