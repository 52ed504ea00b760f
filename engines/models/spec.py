"""What may differ between model families, as data. Imported by families, plan and costs; needs no torch.

A family module (one file in this folder) declares:

    ARCHITECTURES: tuple[str, ...]           the names in config.json's "architectures"
    spec(config: dict) -> DecoderSpec | EncoderSpec
    CHECKPOINT: CheckpointLayout             how the checkpoint's tensor names lead to the model's parameters
    tiny_config() -> dict                    a config.json of awkward small sizes, for tests

Field names are those of Hugging Face's config.json where it has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from engines.api import CheckpointError, Kind, Requirement, UnsupportedModelError


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

    def __post_init__(self) -> None:
        _check_numbers(self)


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

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads is {self.num_attention_heads}; expected a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}; download it again"
            )

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

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"config.json: hidden_size is {self.hidden_size}; expected a multiple of num_attention_heads, "
                f"{self.num_attention_heads}; download it again"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def _check_numbers(spec: RopeSpec | DecoderSpec | EncoderSpec) -> None:
    """Raises CheckpointError for a size that is no number, or not positive where there is no default."""
    for f in fields(spec):
        value = getattr(spec, f.name)
        if f.type == "int":
            least = 1 if f.default is MISSING else 0
            sound = type(value) is int and least <= value < 1 << 40
            expected = f"a whole number of at least {least}"
        elif f.type == "float":
            sound = type(value) in (int, float) and math.isfinite(value)
            expected = "a number"
        else:
            continue
        if not sound:
            raise CheckpointError(f"config.json: {f.name} is {value!r}; expected {expected}; download it again")


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
    """Where a family's checkpoints keep what a model asks for: by the names that Llama's and BERT's modules have."""

    prefixes: tuple[str, ...] = ("model.", "")
    """Text before all names but the heads'; the first that fits the checkpoint's embedding table is taken."""
    renames: tuple[tuple[str, str], ...] = ()
    """(asked, stored): dotted parts of a name and what stands for them in the checkpoint."""
    packed: tuple[PackedModules, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    """(ending asked, ending stored): tried for names that the checkpoint lacks, as old files have LayerNorm.gamma."""
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
    """Regular expressions, matched whole, of tensors that no result depends on."""


ModelSpec = DecoderSpec | EncoderSpec


def decoder_spec(config: Mapping[str, Any], **differences: Any) -> DecoderSpec:
    """The spec of a Llama-shaped config.json, in the old or the new spelling; `differences` are the family's own.

    Raises CheckpointError for a config without its sizes, UnsupportedModelError for a value this code cannot run.
    """
    heads = size(config, "num_attention_heads")
    head_dim = config.get("head_dim") or size(config, "hidden_size") // heads
    fields: dict[str, Any] = {
        "vocab_size": size(config, "vocab_size"),
        "hidden_size": size(config, "hidden_size"),
        "intermediate_size": size(config, "intermediate_size"),
        "num_hidden_layers": size(config, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "max_position_embeddings": config.get("max_position_embeddings", 2048),
        "rope": differences.get("rope") or rope_spec(config, head_dim),
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6),
        "hidden_act": activation(config.get("hidden_act", "silu")),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "num_labels": num_labels(config),
    }
    return DecoderSpec(**{**fields, **differences})


def encoder_spec(config: Mapping[str, Any], head: Literal["bert", "roberta"], position_offset: int = 0) -> EncoderSpec:
    """The spec of a BERT-shaped config.json.

    Raises CheckpointError for a config without its sizes, UnsupportedModelError for what the encoder cannot run.
    """
    if config.get("is_decoder") or config.get("add_cross_attention"):
        raise UnsupportedModelError("config.json: is_decoder is set; expected a bidirectional encoder")
    if config.get("position_embedding_type", "absolute") != "absolute":
        found = config["position_embedding_type"]
        raise UnsupportedModelError(f"config.json: position_embedding_type {found!r}; expected 'absolute'")
    return EncoderSpec(
        vocab_size=size(config, "vocab_size"),
        hidden_size=size(config, "hidden_size"),
        intermediate_size=size(config, "intermediate_size"),
        num_hidden_layers=size(config, "num_hidden_layers"),
        num_attention_heads=size(config, "num_attention_heads"),
        max_position_embeddings=size(config, "max_position_embeddings") - position_offset,
        type_vocab_size=config.get("type_vocab_size", 2),
        layer_norm_eps=config.get("layer_norm_eps", 1e-12),
        hidden_act=activation(config.get("hidden_act", "gelu")),
        position_offset=position_offset,
        num_labels=num_labels(config),
        head=head if num_labels(config) else "none",
    )


def causal_only(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same config. Raises UnsupportedModelError where it asks a decoder to look ahead."""
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError("config.json: use_bidirectional_attention is set; expected a causal model")
    return config


def size(config: Mapping[str, Any], key: str) -> int:
    """A positive integer of config.json. Raises CheckpointError when it is none."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(
            f"config.json: {key} is {value!r}; expected a positive integer; is this the model's own config.json?"
        )
    return value


def num_labels(config: Mapping[str, Any]) -> int:
    """Outputs of a sequence-classification checkpoint's head; 0 for another kind of checkpoint."""
    if not str((config.get("architectures") or [""])[0]).endswith("ForSequenceClassification"):
        return 0
    if isinstance(config.get("id2label"), Mapping):
        return len(config["id2label"])
    return int(config.get("num_labels", 2))


def activation(name: str) -> Any:
    """One of the op set's activations by its name in config.json."""
    known = {
        "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
        "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    }  # fmt: skip
    if name not in known:
        raise UnsupportedModelError(f"config.json: activation {name!r}; expected one of {', '.join(known)}")
    return known[name]


def windows(config: Mapping[str, Any], sliding: tuple[bool, ...]) -> tuple[int, ...]:
    """DecoderSpec.windows of config.json's layer_types; without them, layer i has sliding_window if sliding[i].

    A window that no text of the model's own length fills is none.
    """
    window = config.get("sliding_window") or 0
    if window >= config.get("max_position_embeddings", window + 1):
        window = 0
    kinds = config.get("layer_types")
    if kinds is not None:
        odd = sorted(set(kinds) - {"sliding_attention", "full_attention"})
        if odd:
            raise UnsupportedModelError(f"config.json: layer_types has {odd}; expected sliding or full attention")
        sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return tuple(window if here else 0 for here in sliding) if window and any(sliding) else ()


def upper_windows(config: dict[str, Any]) -> tuple[int, ...]:
    """Windows from layer max_window_layers on, where the config asks for any."""
    if not config.get("use_sliding_window"):
        return ()
    first = config["max_window_layers"]
    return windows(config, tuple(i >= first for i in range(config["num_hidden_layers"])))


def rope_spec(
    config: Mapping[str, Any], head_dim: int, layer_type: str | None = None, theta: float = 10000.0
) -> RopeSpec:
    """The rotary embedding of a config.json: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`.

    layer_type: whose entry to take where rope_parameters has one a layer type. theta: when nothing says.
    """
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if layer_type is not None and isinstance(said.get(layer_type), Mapping):
        said = said[layer_type]
    values = {key: value for key, value in said.items() if value is not None}
    kind: Any = values.get("rope_type", values.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3", "longrope"):
        raise UnsupportedModelError(
            f"config.json: rope type {kind!r}; expected default, linear, dynamic, yarn, llama3 or longrope"
        )
    length = config.get("max_position_embeddings", 2048)
    original = config.get("original_max_position_embeddings", values.get("original_max_position_embeddings", length))
    partial = values.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    scaled = kind in ("yarn", "llama3", "longrope")
    numbers = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    return RopeSpec(
        theta=float(values.get("rope_theta", config.get("rope_theta") or theta)),
        rotary_dim=0 if partial == 1.0 else int(head_dim * partial),
        kind=kind,
        factor=float(values.get("factor", length / original if scaled else 1.0)),
        original_max_position_embeddings=original if scaled else 0,
        truncate=values.get("truncate", True),
        attention_factor=values.get("attention_factor"),
        short_factor=tuple(values.get("short_factor", ())),
        long_factor=tuple(values.get("long_factor", ())),
        **{key: float(values[key]) for key in numbers if key in values},
    )


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
