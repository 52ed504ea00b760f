"""What may differ between model families, as data. Imported by families, plan and costs; needs no torch.

A family module (one file in this folder) declares:

    ARCHITECTURES: tuple[str, ...]           the names in config.json's "architectures"
    spec(config: dict) -> DecoderSpec | EncoderSpec
    CHECKPOINT: CheckpointLayout             how the checkpoint's tensor names lead to the model's parameters
    tiny_config() -> dict                    a config.json of awkward small sizes, for tests

Field names are those of Hugging Face's config.json where it has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (arXiv 2104.09864) and its scalings, as transformers' modeling_rope_utils defines."""

    theta: float = 10000.0
    rotary_dim: int = 0
    """Leading dimensions of each head that rotate; 0: all."""
    kind: Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class DecoderSpec:
    """A causal decoder: token embedding, layers of attention and MLP around a residual, norm, head."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeSpec
    rms_norm_eps: float = 1e-6
    hidden_act: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    norm_weight_offset: float = 0.0
    """1 where the checkpoint stores weight - 1 (Gemma)."""
    sandwich_norm: bool = False
    """Norms after attention and MLP as well as before (Gemma 2 and 3)."""
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    softmax_scale: float | None = None
    """None: head_dim ** -0.5."""
    windows: tuple[int, ...] = ()
    """Per layer: a token attends to itself and the window - 1 tokens before it; 0: all. Empty: 0 for every layer."""
    rope_local: RopeSpec | None = None
    """Used instead of `rope` in the layers that have a window (Gemma 3)."""
    attn_softcap: float = 0.0
    """softcap * tanh(score / softcap); 0: off."""
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    """Rounded to the model's dtype before it multiplies, as the reference implementations do."""
    tie_word_embeddings: bool = False
    num_labels: int = 0
    """For sequence-classification heads: outputs of the `score` layer, which has no bias; 0: a language-model head."""

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0


@dataclass(frozen=True)
class EncoderSpec:
    """A bidirectional encoder of the BERT kind, post-norm, learned positions."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    """Longest input in tokens: what is left of the position table after `position_offset`."""
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-12
    hidden_act: Literal["gelu", "gelu_tanh", "relu"] = "gelu"
    position_offset: int = 0
    """First row of the position table in use (padding_idx + 1 in the RoBERTa line)."""
    num_labels: int = 0
    """For sequence-classification heads; 0: hidden states are the result."""
    head: Literal["none", "bert", "roberta"] = "none"
    """bert: pooler, then classifier. roberta: dense, tanh, out_proj on the first token."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


ModelSpec = DecoderSpec | EncoderSpec
