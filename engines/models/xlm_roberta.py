"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's layers, positions counted from the padding id on."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, EncoderSpec, encoder_spec

ARCHITECTURES = tuple(
    line + kind
    for line in ("Roberta", "XLMRoberta", "Camembert")
    for kind in ("Model", "ForSequenceClassification", "ForMaskedLM")
)
CHECKPOINT = CheckpointLayout(prefixes=("roberta.", ""), ignored=(r".*embeddings\.position_ids",))


def spec(config: dict[str, Any]) -> EncoderSpec:
    pad = config.get("pad_token_id")
    return encoder_spec(config, head="roberta", position_offset=(1 if pad is None else pad) + 1)


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "model_type": "xlm-roberta",
        "vocab_size": 223,
        "hidden_size": 56,
        "intermediate_size": 90,
        "num_hidden_layers": 3,
        "num_attention_heads": 7,
        "max_position_embeddings": 322,
        "type_vocab_size": 1,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
        "id2label": {"0": "a", "1": "b", "2": "c"},
        "label2id": {"a": 0, "b": 1, "c": 2},
    }
