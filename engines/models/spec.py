"""What may differ between model families, as data. Imported by families, plan and costs; needs no torch.

A family module (one file in this folder) declares:

    ARCHITECTURES: tuple[str, ...]           the names in config.json's "architectures"
    spec(config: dict) -> DecoderSpec | EncoderSpec
    CHECKPOINT: CheckpointLayout             how the checkpoint's tensor names lead to the model's parameters
    tiny_config() -> dict                    a config.json of awkward small sizes, for tests

Field names are those of Hugging Face's config.json where it has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from engines.api import Kind, Requirement


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


@dataclass(frozen=True)
class PackedModules:
    """Projections that a checkpoint stores as one tensor."""

    parts: tuple[str, ...]
    """The modules' own names, in the order in which they are asked for: ("q_proj", "k_proj", "v_proj")."""
    stored: str
    """The name of the module that holds them."""
    grouped: bool = False
    """False: rows of the first part, then of the second ... True: for each group (KV head) its rows of every part."""


@dataclass(frozen=True)
class CheckpointLayout:
    """Where a family's checkpoints keep what a model asks for. Models ask by the names of Llama's and BERT's modules."""

    prefixes: tuple[str, ...] = ("model.", "")
    """Text before all names but the heads'; the first that fits the checkpoint's embedding table is taken."""
    renames: tuple[tuple[str, str], ...] = ()
    """(asked, stored): dotted parts of a name and what stands for them in the checkpoint."""
    packed: tuple[PackedModules, ...] = ()
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    """Regular expressions, matched whole, of tensors that no result depends on."""


ModelSpec = DecoderSpec | EncoderSpec


def requirements(
    spec: ModelSpec,
    dtype: str,
    kind: Kind,
    quantization: Mapping[str, int | str | bool] | None = None,
    adapters: bool = False,
) -> list[Requirement]:
    """What an op set must offer to run a model, from its sizes and variants alone.

    quantization: attributes of the linear layers' format (engines.capability.quantization_attributes); empty: dense.
    """
    linear = Requirement("linear", {"dtype": dtype, **(quantization or {})})
    needed = [Requirement("embedding", {"dtype": dtype}), linear]
    needed += _encoder(spec, dtype) if isinstance(spec, EncoderSpec) else _decoder(spec, dtype)
    if adapters:
        needed.append(Requirement("lora", {"dtype": dtype}))
    if kind == "generate":
        needed += [Requirement("sample"), Requirement("apply_penalties"), Requirement("top_logprobs")]
    if kind in ("generate", "score"):
        needed.append(Requirement("log_softmax_gather", in_decode_step=False))
    return needed


def _decoder(spec: DecoderSpec, dtype: str) -> list[Requirement]:
    heads: dict[str, int | str | bool] = {"dtype": dtype, "head_dim": spec.head_dim}
    norm: dict[str, int | str | bool] = {"dtype": dtype}
    if spec.norm_weight_offset:
        norm["weight_offset"] = True
    attention = {**heads, "group": spec.num_attention_heads // spec.num_key_value_heads}
    if any(spec.windows):
        attention["window"] = True
    if spec.attn_softcap:
        attention["softcap"] = True
    needed = [Requirement("rms_norm", norm), Requirement("add_rms_norm", norm)]
    for rope in filter(None, (spec.rope, spec.rope_local)):
        rotary = {**heads, "kind": rope.kind}
        if rope.rotary_dim:
            rotary["rotary_dim"] = rope.rotary_dim
        needed.append(Requirement("rope", rotary))
    needed += [Requirement("write_kv", heads), Requirement("paged_attention", attention)]
    needed.append(Requirement("act_and_mul", {"dtype": dtype, "activation": spec.hidden_act}))
    if spec.logit_softcap:
        needed.append(Requirement("softcap"))
    return needed


def _encoder(spec: EncoderSpec, dtype: str) -> list[Requirement]:
    return [
        Requirement("layer_norm", {"dtype": dtype}),
        Requirement("encoder_attention", {"dtype": dtype, "head_dim": spec.head_dim}),
        Requirement("act", {"dtype": dtype, "activation": spec.hidden_act}),
    ]
