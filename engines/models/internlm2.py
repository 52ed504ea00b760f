"""InternLM 2: Llama's layers under other names, with queries, keys and values interleaved by KV head in `wqkv`."""

from __future__ import annotations

from typing import Any

from engines.models.spec import CheckpointLayout, DecoderSpec, PackedModules, decoder_spec

ARCHITECTURES = ("InternLM2ForCausalLM",)
CHECKPOINT = CheckpointLayout(
    renames=(
        ("embed_tokens", "tok_embeddings"),
        ("self_attn", "attention"),
        ("o_proj", "wo"),
        ("mlp", "feed_forward"),
        ("gate_proj", "w1"),
        ("up_proj", "w3"),
        ("down_proj", "w2"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("lm_head", "output"),
    ),
    packed=(PackedModules(("q_proj", "k_proj", "v_proj"), "wqkv", grouped=True),),
)


def spec(config: dict[str, Any]) -> DecoderSpec:
    bias = bool(config.get("bias", True))
    return decoder_spec(config, qkv_bias=bias, o_bias=bias)


def tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "vocab_size": 211,
        "hidden_size": 96,
        "intermediate_size": 118,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 20000.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "bias": False,
        "tie_word_embeddings": False,
    }
