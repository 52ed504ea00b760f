"""BERT and what has its layers, among it most small sentence encoders."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, EncoderSpec, encoder_spec

ARCHITECTURES = ("BertModel", "BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining")
CHECKPOINT = CheckpointLayout(
    prefixes=("bert.", ""),
    aliases=(("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")),
    ignored=(r".*embeddings\.position_ids",),
)


def spec(config: dict[str, Any]) -> EncoderSpec:
    return encoder_spec(config, head="bert")


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": 229,
        "hidden_size": 60,
        "intermediate_size": 94,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "max_position_embeddings": 320,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
