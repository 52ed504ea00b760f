"""The ops of the CUDA engine: those of its compiled library, csrc/cuda, torch's own for products and look-ups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from engines import extension, ops
from engines.batch import Batch
from engines.cuda.experts import PackedExperts, pack_experts
from engines.cuda.quantized import Fp8Weight, PackedWeight, pack, pack_fp8
from engines.ops.kv_cache import KVCache, LatentCache, QuantizedKVCache
from engines.ops.linear import Inputs, LinearWeight, Quantized
from engines.ops.moe import Experts, Projection
from engines.ops.quantized import Float8Weight, Int8Weight, QuantizedWeight
from engines.ops.sampling import SamplingBatch

COUNTERS = 1 << 16
"""Pairs of sequence and KV head that one step may have (1,024 sequences with 64 KV heads), or tiles of a product."""
HALVES = (torch.bfloat16, torch.float16)


class OpSet(ops.OpSet):
    """An op that is asked for a dtype or size that was not compiled raises; plans do not let it come to that."""

    def __init__(self, library: Path | None = None) -> None:
        """library: None for the installed one."""
        extension.load(extension.CUDA if library is None else replace(extension.CUDA, path=library))
        self._arrived: dict[torch.device, Tensor] = {}

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
        """As the reference."""
        shape = x.shape
        x = x if x.dim() in (2, 3) else x.reshape(-1, shape[-1])
        result: Tensor = torch.ops.cuda_ops.rms_norm(x, weight, eps, weight_offset)
        return result.view(shape)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As the reference, in one pass."""
        normed, total = torch.ops.cuda_ops.add_rms_norm(x, residual, weight, eps, weight_offset)
        return normed, total

    def act_and_mul(self, gate_up: Tensor, name: str) -> Tensor:
        """As the reference."""
        result: Tensor = torch.ops.cuda_ops.act_and_mul(gate_up, name)
        return result

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """As the reference; rounded once."""
        result: Tensor = torch.ops.cuda_ops.softcap(x.contiguous().view(-1, x.shape[-1]), cap)
        return result.view(x.shape)

    def sample(self, logits: Tensor, params: SamplingBatch) -> Tensor:
        """As the reference. Sums of weights are made in another order, in float64."""
        values = (getattr(params, field.name) for field in fields(params))
        result: Tensor = torch.ops.cuda_ops.sample(logits, *values)
        return result

    def apply_penalties(
        self,
        logits: Tensor,
        prompt_counts: Tensor,
        output_counts: Tensor,
        repetition_penalty: Tensor,
        presence_penalty: Tensor,
        frequency_penalty: Tensor,
    ) -> Tensor:
        """As the reference, for counts in int32."""
        result: Tensor = torch.ops.cuda_ops.apply_penalties(
            logits, prompt_counts, output_counts, repetition_penalty, presence_penalty, frequency_penalty
        )
        return result

    def prepare_quantized(self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> LinearWeight:
        """Weights stay as small as they are where a kernel takes them (quantized.pack); the others as the reference."""
        packed: PackedWeight | Fp8Weight | None = None
        if dtype in HALVES:
            if isinstance(weight, Float8Weight) and torch.ops.cuda_ops.has_linear_fp8(weight.data):
                packed = pack_fp8(weight)
            packed = packed or pack(weight)
        if packed is None:
            return super().prepare_quantized(weight, bias, dtype)
        return LinearWeight(packed, bias, weight.shape[1], weight.shape[0])

    def linear(self, x: Inputs, weight: LinearWeight) -> Tensor:
        """As the reference. 4-bit weights are not rounded: codes (less zeros) are exact, a group's sum times its scale
        is float32. On sm_90a inputs of 8-bit floats are rounded to such. A token's bits do not depend on the batch."""
        packed = weight.data
        if not isinstance(packed, Fp8Weight | PackedWeight):
            return super().linear(x, weight)
        if isinstance(packed, PackedWeight) and packed.permutation is not None:
            assert isinstance(x, Tensor)
            x = x.index_select(1, packed.permutation)
        rows, scales = _inputs_of(x, packed)
        out = torch.empty((len(rows), weight.out_features), dtype=x.dtype, device=rows.device)
        arrived = self._counters(rows.device)
        if isinstance(packed, Fp8Weight):
            torch.ops.cuda_ops.linear_fp8(rows, packed.codes, packed.scales, weight.bias, scales, arrived, out)
            return out
        bias = None if weight.bias is None else weight.bias[None]
        torch.ops.cuda_ops.linear(rows, packed.format, packed.codes, packed.scales, bias, scales, arrived, out)
        return out

    def add_rms_norm_for(
        self,
        x: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        eps: float,
        weight_offset: float,
        product: LinearWeight,
    ) -> tuple[Inputs, Tensor]:
        """As the reference; in one pass where the product takes 8 bits."""
        packed = product.data
        given = (x, residual, norm_weight)
        whole = all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in given)
        if not (isinstance(packed, Fp8Weight | PackedWeight) and packed.rounding and whole):
            return super().add_rms_norm_for(x, residual, norm_weight, eps, weight_offset, product)
        codes, scales, total = torch.ops.cuda_ops.add_rms_norm_quantize(
            *given, eps, weight_offset, packed.rounding, packed.input_scale
        )
        return Quantized(codes, scales, x.dtype), total

    def act_and_mul_for(self, gate_up: Tensor, name: str, product: LinearWeight) -> Inputs:
        """As the reference; in one pass where the product takes 8 bits."""
        packed = product.data
        if not isinstance(packed, Fp8Weight | PackedWeight):
            return super().act_and_mul_for(gate_up, name, product)
        return self._gated(gate_up, name, packed)

    def _gated(self, gate_up: Tensor, name: str, packed: Fp8Weight | PackedWeight) -> Inputs:
        """act_and_mul, as `packed` takes it."""
        if packed.rounding is None:
            return self.act_and_mul(gate_up, name)
        codes, scales = torch.ops.cuda_ops.act_and_mul_quantize(
            _aligned(gate_up), name, packed.rounding, packed.input_scale
        )
        return Quantized(codes, scales, gate_up.dtype)

    def prepare_experts(self, gate_up: Sequence[Projection], down: Sequence[Projection], dtype: torch.dtype) -> Experts:
        """As the reference; stacked for one launch a projection where dtype is a 16-bit float. Integers whose inputs
        have a fixed scale stay with the reference."""
        fixed = any(isinstance(p.weight, Int8Weight) and p.weight.input_scale is not None for p in (*gate_up, *down))
        if dtype not in HALVES or fixed:
            return super().prepare_experts(gate_up, down, dtype)
        return Experts((pack_experts(gate_up, dtype), pack_experts(down, dtype)), len(gate_up))

    def fused_experts(self, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor, activation: str) -> Tensor:
        """As the reference, without a look at ids from the processor. A token's bits do not depend on the batch."""
        if not isinstance(experts.data, tuple):
            return super().fused_experts(x, experts, weights, ids, activation)
        gate_up, down = experts.data
        top_k = ids.shape[1]
        outer, inner = gate_up.tile(ids.numel()), down.tile(ids.numel())
        ids = ids.contiguous()
        slots = torch.ops.cuda_ops.sort_slots(ids, experts.num_experts, outer)
        hidden = self._gated(_expert_linear(x, gate_up, slots, top_k), activation, down.weight)
        if inner != outer:
            slots = torch.ops.cuda_ops.sort_slots(ids, experts.num_experts, inner)
        result: Tensor = torch.ops.cuda_ops.combine(_expert_linear(hidden, down, slots, 1), weights.contiguous(), ids)
        return result

    def route(
        self,
        logits: Tensor,
        top_k: int,
        scoring: Literal["softmax", "softmax_of_chosen", "sigmoid"],
        normalize: bool,
        scale: float = 1.0,
        bias: Tensor | None = None,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """As the reference; of equal scores the first. Up to 1,024 experts."""
        if bias is not None:
            bias = bias.float()
        weights, ids = torch.ops.cuda_ops.route(logits, top_k, scoring, normalize, scale, bias, num_groups, top_groups)
        return weights, ids

    def rope(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
        """As the reference. Tokens with a position outside the table are left as they are."""
        torch.ops.cuda_ops.rope(q, k, positions, cos_sin)

    def write_kv(self, k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
        """As the reference. Tokens with a slot outside the cache are not stored."""
        torch.ops.cuda_ops.write_kv(k, v, cache.k, cache.v, slot_mapping)

    def rope_write_kv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        cache: KVCache | QuantizedKVCache,
        slot_mapping: Tensor,
    ) -> None:
        """As the reference, in one launch; k is left as it is. The bits are those of rope and the writing op.

        Tokens with a position outside the table are left alone, and those with a slot outside the cache are not stored.
        """
        arguments = (q, k, v, positions, cos_sin)
        if isinstance(cache, QuantizedKVCache):
            torch.ops.cuda_ops.rope_write_quantized_kv(*arguments, cache.kv_dtype, *_coded(cache), slot_mapping)
        else:
            torch.ops.cuda_ops.rope_write_kv(*arguments, cache.k, cache.v, slot_mapping)

    def paged_attention(
        self,
        q: Tensor,
        cache: KVCache,
        batch: Batch,
        softmax_scale: float,
        window_size: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As the reference, for float16 and bfloat16; products and sums in float32, weights rounded to q's dtype.

        A token's bits do not depend on the batch around it, nor on where its prompt was cut; but the one token of a
        decoding sequence is summed in another order than it would be as the last one of a longer piece of prompt.
        """
        result: Tensor = torch.ops.cuda_ops.paged_attention(
            _even(q), cache.k, cache.v, *self._batch(batch, q, sinks), softmax_scale, window_size, softcap
        )
        return result

    def write_quantized_kv(self, k: Tensor, v: Tensor, cache: QuantizedKVCache, slot_mapping: Tensor) -> None:
        """As the reference, bit by bit. Tokens with a slot outside the cache are not stored."""
        torch.ops.cuda_ops.write_quantized_kv(k, v, cache.kv_dtype, *_coded(cache), slot_mapping)

    def quantized_attention(
        self,
        q: Tensor,
        cache: QuantizedKVCache,
        batch: Batch,
        softmax_scale: float,
        window_size: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As paged_attention. Where one token is new, codes are exact in the products, and weights times scales are
        rounded to q's dtype; where more are, keys and values are."""
        arguments = (*_coded(cache), *self._batch(batch, q, sinks), softmax_scale, window_size, softcap)
        result: Tensor = torch.ops.cuda_ops.quantized_attention(_even(q), cache.kv_dtype, *arguments)
        return result

    def write_latent(self, latent: Tensor, cache: LatentCache, slot_mapping: Tensor) -> None:
        """As the reference. Tokens with a slot outside the cache are not stored."""
        torch.ops.cuda_ops.write_latent(latent, cache.data, slot_mapping)

    def latent_attention(self, q: Tensor, cache: LatentCache, batch: Batch, softmax_scale: float) -> Tensor:
        """As the reference, for float16 and bfloat16; products and sums in float32, weights rounded to q's dtype.

        A token's bits do not depend on the batch around it; but the one token of a decoding sequence is summed in
        another order than it would be as the last one of a longer piece of prompt.
        """
        cu_seqlens_q, seq_lens, tables, _, *rest = self._batch(batch, q, None)
        result: Tensor = torch.ops.cuda_ops.latent_attention(
            _dense(q), cache.data, cache.rank, cu_seqlens_q, seq_lens, tables, *rest, softmax_scale
        )
        return result

    def _batch(self, batch: Batch, q: Tensor, sinks: Tensor | None) -> tuple[object, ...]:
        """What the attention kernels are told of a batch."""
        assert batch.block_tables is not None
        return (
            batch.cu_seqlens_q,
            batch.seq_lens,
            batch.block_tables,
            None if sinks is None else sinks.float(),
            self._counters(q.device),
            batch.max_seqlen_q,
            batch.max_seqlen_k,
        )

    def _counters(self, device: torch.device) -> Tensor:
        """Zeros that every launch leaves as zeros. Made once: a captured graph keeps their address."""
        if device not in self._arrived:
            self._arrived[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        return self._arrived[device]


def _even(q: Tensor) -> Tensor:
    """q, copied unless every head begins where 4 bytes do, as the kernels load it."""
    strides = (stride for size, stride in zip(q.shape[:2], q.stride()[:2], strict=True) if size > 1)
    fits = q.data_ptr() % 4 == 0 and all(stride % 2 == 0 for stride in strides)
    return q if fits else q.clone(memory_format=torch.contiguous_format)


def _inputs_of(x: Inputs, packed: Fp8Weight | PackedWeight) -> tuple[Tensor, Tensor | None]:
    """(rows as `packed` takes them, their scales where they are codes)."""
    if isinstance(x, Quantized):
        return x.codes, x.scales
    if packed.rounding is None:
        return _aligned(x), None
    codes, scales = torch.ops.cuda_ops.quantize(_aligned(x), packed.rounding, packed.input_scale)
    return codes, scales


def _expert_linear(x: Inputs, experts: PackedExperts, slots: tuple[Tensor, Tensor], slots_of_row: int) -> Tensor:
    weight = experts.weight
    if isinstance(x, Tensor) and x.shape[1] % 8:
        x = functional.pad(x, (0, -x.shape[1] % 8))
    rows, scales = _inputs_of(x, weight)
    out = torch.empty((len(rows) * slots_of_row, experts.out_features), dtype=x.dtype, device=rows.device)
    torch.ops.cuda_ops.expert_linear(
        rows, weight.format, weight.codes, weight.scales, experts.bias, scales, *slots, slots_of_row, out
    )
    return out


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it whose rows begin where 16 bytes do."""
    if x.data_ptr() % 16 or (x.shape[0] > 1 and x.stride(0) % 8) or x.stride(1) != 1:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _dense(x: Tensor) -> Tensor:
    """x, or a copy of it: contiguous from where 16 bytes begin."""
    fits = x.is_contiguous() and x.data_ptr() % 16 == 0
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _coded(cache: QuantizedKVCache) -> tuple[Tensor, ...]:
    return cache.k.view(torch.uint8), cache.v.view(torch.uint8), cache.k_scales, cache.v_scales
