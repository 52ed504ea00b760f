"""Attention blocks: projections, rotary embedding, cache, the attention op."""

from __future__ import annotations

from torch import Tensor

from engines.batch import Batch
from engines.layers.linear import Format, Linear
from engines.layers.norm import RMSNorm
from engines.layers.rotary import Rotation
from engines.models.spec import DecoderSpec, EncoderSpec
from engines.ops import OpSet
from engines.ops.kv_cache import KVCache, QuantizedKVCache
from engines.ops.linear import Inputs, LinearWeight
from engines.parallel.place import scaled
from engines.weights import LinearSource, Weights


class Attention:
    """Causal self-attention with grouped KV heads over the paged cache. A rank has some of the heads."""

    def __init__(self, name: str, layer: int, spec: DecoderSpec, weights: Weights, fmt: Format, ops: OpSet) -> None:
        self.ops, self.group = ops, weights.group
        self.head_dim = spec.head_dim
        heads = self.group.place.split(spec.num_attention_heads)
        kv_heads = self.group.place.kv_heads(spec.num_key_value_heads)
        self.softmax_scale = spec.head_dim**-0.5 if spec.softmax_scale is None else spec.softmax_scale
        self.window = spec.window(layer)
        self.softcap = spec.attn_softcap
        self.sinks = weights.take(f"{name}.sinks", spec.num_attention_heads, rows=heads) if spec.attn_sinks else None
        counts = (spec.num_attention_heads, spec.num_key_value_heads, spec.num_key_value_heads)
        sizes = tuple(n * spec.head_dim for n in counts)
        rows = tuple(scaled(held, spec.head_dim) for held in (heads, kv_heads, kv_heads))
        names = (f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj")
        qkv = LinearSource(names, spec.hidden_size, sizes, spec.qkv_bias, groups=spec.num_key_value_heads, rows=rows)
        self.head_counts = [len(heads), len(kv_heads), len(kv_heads)]
        self.qkv_proj = Linear(qkv, weights, fmt, ops, adapts=True)
        out = LinearSource((f"{name}.o_proj",), sizes[0], (spec.hidden_size,), spec.o_bias, columns=rows[0])
        self.o_proj = Linear(out, weights, fmt, ops, adapts=True)
        self.norms = [
            RMSNorm(f"{name}.{which}", spec.head_dim, spec.rms_norm_eps, spec.norm_weight_offset, weights, ops)
            for which in (("q_norm", "k_norm") if spec.qk_norm else ())
        ]

    @property
    def takes(self) -> LinearWeight | None:
        """As Linear has it, of what `enter` takes."""
        return self.qkv_proj.takes

    def enter(self, x: Inputs, adapter_ids: Tensor | None) -> Tensor:
        """x: [num_tokens, hidden_size]; returns queries, keys and values, end to end."""
        return self.qkv_proj.forward(x, adapter_ids)

    def attend(self, x: Inputs, batch: Batch, cache: KVCache | QuantizedKVCache, rotation: Rotation) -> Tensor:
        """x: of `enter`; returns [num_tokens, heads * head_dim]. Modifies x and cache."""
        assert isinstance(x, Tensor)
        q, k, v = x.unflatten(1, (-1, self.head_dim)).split_with_sizes(self.head_counts, dim=1)
        if self.norms:
            q, k = (norm.forward(part) for norm, part in zip(self.norms, (q, k), strict=True))
        assert batch.slot_mapping is not None
        self.ops.rope_write_kv(q, k, v, rotation.positions, rotation.cos_sin, cache, batch.slot_mapping)
        options = (self.softmax_scale, self.window, self.softcap, self.sinks)
        if isinstance(cache, QuantizedKVCache):
            out = self.ops.quantized_attention(q, cache, batch, *options)
        else:
            out = self.ops.paged_attention(q, cache, batch, *options)
        return out.flatten(1)

    def leave(self, attended: Tensor, adapter_ids: Tensor | None) -> Tensor:
        """attended: of `attend`; returns [num_tokens, hidden_size]."""
        return self.group.sum(self.o_proj.forward(attended, adapter_ids))


class EncoderAttention:
    """Bidirectional self-attention within each sequence."""

    def __init__(self, name: str, spec: EncoderSpec, weights: Weights, fmt: Format, ops: OpSet) -> None:
        self.ops = ops
        self.head_dim = spec.head_dim
        size = spec.hidden_size
        names = (f"{name}.self.query", f"{name}.self.key", f"{name}.self.value")
        self.qkv = Linear(LinearSource(names, size, (size, size, size), bias=True), weights, fmt, ops)
        self.output = Linear(LinearSource((f"{name}.output.dense",), size, (size,), bias=True), weights, fmt, ops)

    def attend(self, qkv: Tensor, batch: Batch) -> Tensor:
        """qkv: [num_tokens, 3 * hidden_size]; returns [num_tokens, hidden_size], which `output` takes."""
        q, k, v = qkv.unflatten(1, (3, -1, self.head_dim)).unbind(dim=1)
        return self.ops.encoder_attention(q, k, v, batch, self.head_dim**-0.5).flatten(1)
