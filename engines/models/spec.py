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
class MoESpec:
    """A mixture of experts in place of the MLP. Names are those of Qwen's and DeepSeek's config.json."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    scoring: Literal["softmax", "softmax_of_chosen", "sigmoid"] = "softmax"
    """As the op `route` has it."""
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    correction_bias: bool = False
    """A bias on the scores that counts for the choice of experts only (DeepSeek V3)."""
    router_bias: bool = False
    router_float32: bool = False
    """The router's product is in float32 whatever the compute dtype."""
    shared_intermediate_size: int = 0
    """Of the expert that every token goes to; 0: there is none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by the sigmoid of a projection to one number (Qwen 2)."""
    stacked: bool = False
    """Experts are stored in one tensor a projection, with biases, gate and up interleaved (gpt-oss)."""
    dense_layers: tuple[int, ...] = ()
    """Layers that have a plain MLP of DecoderSpec.intermediate_size nevertheless."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.num_experts_per_tok > self.num_experts or self.num_experts % self.n_group:
            raise CheckpointError(
                f"config.json: {self.num_experts_per_tok} of {self.num_experts} experts in {self.n_group} groups; "
                "expected no more than there are, in equal groups; download it again"
            )


@dataclass(frozen=True)
class MLASpec:
    """Multi-head latent attention (DeepSeek V2, arXiv 2405.04434 section 2.1): the cache holds one vector a token.

    With it, DecoderSpec has num_key_value_heads 1 and head_dim kv_lora_rank + qk_rope_head_dim: what is cached.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int = 0
    """0: queries are not compressed."""
    rope_interleave: bool = True
    """Pairs that rotate together are stored side by side; else half a head apart."""

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
    hidden_act: Literal["silu", "gelu_tanh", "gelu", "swiglu_oai"] = "silu"
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
    attn_sinks: bool = False
    """A learned logit a head that joins each softmax (gpt-oss)."""
    mla: MLASpec | None = None
    moe: MoESpec | None = None
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

    def experts(self, layer: int) -> MoESpec | None:
        """The mixture of experts of a layer; None where it has a plain MLP."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe


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


def _check_numbers(spec: RopeSpec | MoESpec | MLASpec | DecoderSpec | EncoderSpec) -> None:
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


def qwen_experts(config: Mapping[str, Any], **differences: Any) -> MoESpec:
    """The mixture of a Qwen-shaped config.json: which layers have one, and its sizes."""
    plain, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    layers = range(size(config, "num_hidden_layers"))
    return MoESpec(
        num_experts=size(config, "num_local_experts" if config.get("num_local_experts") else "num_experts"),
        num_experts_per_tok=size(config, "num_experts_per_tok"),
        moe_intermediate_size=size(config, "moe_intermediate_size"),
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        dense_layers=tuple(i for i in layers if i in plain or (i + 1) % step),
        **differences,
    )


def deepseek_spec(config: Mapping[str, Any], **experts: Any) -> DecoderSpec:
    """The spec of a DeepSeek-shaped config.json: latent attention, experts after some plain layers.

    experts: what the family's router has of its own, as fields of MoESpec.
    """
    rank, rope_dim = size(config, "kv_lora_rank"), size(config, "qk_rope_head_dim")
    mla = MLASpec(
        kv_lora_rank=rank,
        qk_nope_head_dim=size(config, "qk_nope_head_dim"),
        qk_rope_head_dim=rope_dim,
        v_head_dim=size(config, "v_head_dim"),
        q_lora_rank=config.get("q_lora_rank") or 0,
        rope_interleave=bool(config.get("rope_interleave", True)),
    )
    kinds = config.get("mlp_layer_types")
    plain = (
        range(config["first_k_dense_replace"]) if kinds is None else [i for i, k in enumerate(kinds) if k == "dense"]
    )
    inner = size(config, "moe_intermediate_size")
    moe = MoESpec(
        num_experts=size(config, "n_routed_experts"),
        num_experts_per_tok=size(config, "num_experts_per_tok"),
        moe_intermediate_size=inner,
        routed_scaling_factor=config.get("routed_scaling_factor", 1.0),
        router_float32=True,
        shared_intermediate_size=inner * (config.get("n_shared_experts") or 0),
        dense_layers=tuple(plain),
        **experts,
    )
    rope = rope_spec(config, rope_dim)
    scale = (mla.qk_nope_head_dim + rope_dim) ** -0.5
    if rope.kind != "default" and rope.mscale_all_dim and rope.factor > 1:
        # Source: yarn_apply_mscale of transformers' modeling_deepseek_v3.py.
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
    bias = bool(config.get("attention_bias", False))
    whole = {**config, "num_key_value_heads": 1, "head_dim": rank + rope_dim}
    return decoder_spec(
        whole, rope=rope, softmax_scale=scale, qkv_bias=bias, o_bias=bias, mla=mla, moe=moe,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )  # fmt: skip


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


def expect(key: str, found: Any, allowed: tuple[Any, ...]) -> Any:
    """found. Raises UnsupportedModelError where it is none of those that this code knows."""
    if found not in allowed:
        raise UnsupportedModelError(f"config.json: {key} {found!r}; expected {' or '.join(map(repr, allowed))}")
    return found


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
    kv_dtype: str = "auto",
) -> list[Requirement]:
    """What an op set must offer to run a model, from its sizes and variants alone.

    quantization: attributes of the linear layers' format (engines.capability.quantization_attributes); empty: dense.
    """
    said = dict(quantization or {})
    of_experts = said.get("quantization") == "mxfp4"
    linear = Requirement("linear", {"dtype": dtype, **({} if of_experts else said)})
    needed = [Requirement("embedding", {"dtype": dtype}), linear]
    needed += _encoder(spec, dtype) if isinstance(spec, EncoderSpec) else _decoder(spec, dtype, said, kv_dtype)
    if adapters:
        of_encoder = {"encoder": True} if isinstance(spec, EncoderSpec) else {}
        needed.append(Requirement("lora", {"dtype": dtype, **of_encoder}))
    if kind == "generate":
        needed += [Requirement("sample"), Requirement("apply_penalties"), Requirement("top_logprobs")]
    if kind in ("generate", "score"):
        needed.append(Requirement("log_softmax_gather", in_decode_step=False))
    return needed


def _decoder(
    spec: DecoderSpec, dtype: str, quantization: dict[str, int | str | bool], kv_dtype: str
) -> list[Requirement]:
    heads: dict[str, int | str | bool] = {"dtype": dtype, "head_dim": spec.head_dim}
    norm: dict[str, int | str | bool] = {"dtype": dtype}
    if spec.norm_weight_offset:
        norm["weight_offset"] = True
    attention = {**heads, "group": spec.num_attention_heads // spec.num_key_value_heads}
    if any(spec.windows):
        attention["window"] = True
    if spec.attn_softcap:
        attention["softcap"] = True
    if spec.attn_sinks:
        attention["sinks"] = True
    needed = [Requirement("rms_norm", norm), Requirement("add_rms_norm", norm)]
    for rope in filter(None, (spec.rope, spec.rope_local)):
        rotary = {**heads, "kind": rope.kind}
        if spec.mla is not None:
            rotary["head_dim"] = spec.mla.qk_rope_head_dim
        if rope.rotary_dim:
            rotary["rotary_dim"] = rope.rotary_dim
        needed.append(Requirement("rope", rotary))
    kept: dict[str, int | str | bool] = {} if kv_dtype == "auto" else {"kv_dtype": kv_dtype}
    if spec.mla is None:
        names = ("write_quantized_kv", "quantized_attention") if kept else ("write_kv", "paged_attention")
        needed += [Requirement(names[0], heads | kept), Requirement(names[1], attention | kept)]
    else:
        latent: dict[str, int | str | bool] = {"dtype": dtype}
        latent |= kept | {"kv_lora_rank": spec.mla.kv_lora_rank, "rope_dim": spec.mla.qk_rope_head_dim}
        needed += [Requirement(op, latent) for op in ("write_latent", "latent_attention")]
        needed.append(Requirement("head_linear", {"dtype": dtype}))
    needed.append(Requirement("act_and_mul", {"dtype": dtype, "activation": spec.hidden_act}))
    if spec.moe is not None:
        if spec.moe.router_float32:
            needed.append(Requirement("linear", {"dtype": "float32"}))
        needed.append(Requirement("route", {"scoring": spec.moe.scoring}))
        needed.append(Requirement("fused_experts", {"dtype": dtype, "activation": spec.hidden_act, **quantization}))
    if spec.logit_softcap:
        needed.append(Requirement("softcap"))
    return needed


def _encoder(spec: EncoderSpec, dtype: str) -> list[Requirement]:
    return [
        Requirement("layer_norm", {"dtype": dtype}),
        Requirement("encoder_attention", {"dtype": dtype, "head_dim": spec.head_dim}),
        Requirement("act", {"dtype": dtype, "activation": spec.hidden_act}),
    ]
