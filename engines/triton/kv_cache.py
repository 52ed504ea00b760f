"""Keys and values into the paged caches, in the reference's layouts: a program stores one token.

Cost of T tokens: 4 T num_kv_heads head_dim b bytes and no operations; in 8 or 4 bits 2 T num_kv_heads head_dim b bytes
read, and what kv_vector_bytes of engines/costs.py says written; of latents 2 T (rank + rope_dim) b bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.ops.kv_cache import FP8_MAX, TINY, KVCache, LatentCache, QuantizedKVCache
from engines.triton.launch import dense_rows, power_of_two, warps

LARGEST, SMALLEST_SCALE = tl.constexpr(FP8_MAX), tl.constexpr(TINY)
ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it to a small float32 and taking it away rounds to an integer, half to even."""


@triton.jit
def write_kv_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    num_slots: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
) -> None:
    """Grid: [num_tokens]. caches: [num_blocks, HEADS, BLOCK_SIZE, D], dense."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0 or slot >= num_slots:
        return
    heads, columns = tl.arange(0, HEADS_BLOCK), tl.arange(0, D_BLOCK)
    mask = (heads < HEADS)[:, None] & (columns < D)[None, :]
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    to = ((block * HEADS + heads) * BLOCK_SIZE + offset)[:, None] * D + columns[None, :]
    k = tl.load(k_ptr + token * k_token_stride + heads[:, None] * k_head_stride + columns[None, :], mask=mask)
    tl.store(k_cache_ptr + to, k.to(k_cache_ptr.dtype.element_ty), mask=mask)
    v = tl.load(v_ptr + token * v_token_stride + heads[:, None] * v_head_stride + columns[None, :], mask=mask)
    tl.store(v_cache_ptr + to, v.to(v_cache_ptr.dtype.element_ty), mask=mask)


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """As the reference. Tokens with a slot outside the cache are not stored."""
    num_tokens, heads, head_dim = k.shape
    if not num_tokens:
        return
    k, v = dense_rows(k), dense_rows(v)
    heads_block, block = power_of_two(heads), power_of_two(head_dim)
    write_kv_kernel[(num_tokens,)](
        k,
        v,
        cache.k,
        cache.v,
        slot_mapping,
        *k.stride()[:2],
        *v.stride()[:2],
        cache.k.shape[0] * cache.block_size,
        BLOCK_SIZE=cache.block_size,
        HEADS=heads,
        HEADS_BLOCK=heads_block,
        D=head_dim,
        D_BLOCK=block,
        num_warps=warps(heads_block * block),
    )


@triton.jit
def to_float8(x: tl.tensor) -> tl.tensor:
    """Bits of float8_e4m3fn, rounded half to even, of float32 numbers of at most 448, NaN among them.

    Numbers below 2^-6 are multiples of 2^-9 there; of others the mantissa is rounded to three bits, and the exponent's
    bias becomes 7 instead of 127.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    magnitude = size.to(tl.float32, bitcast=True)
    small = ((magnitude * 512.0 + ROUNDING) - ROUNDING).to(tl.int32)
    code = tl.where(magnitude < 0.015625, small, normal)
    code = tl.where(magnitude == magnitude, code, 0x7F)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def to_integers(x: tl.tensor, low: tl.tensor, scale: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    """(x - low) / scale, rounded half to even; x: [rows, columns], low and scale: [rows]."""
    code = tl.div_rn(x - low[:, None], tl.broadcast_to(scale[:, None], x.shape))
    code = tl.minimum(tl.maximum((code + ROUNDING) - ROUNDING, 0.0), LEVELS)
    return code.to(tl.uint8)


@triton.jit
def store_quantized(
    x_ptr: tl.tensor,
    head_stride: tl.tensor,
    codes_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """All heads of one token, at x_ptr, into the rows of codes and scales. int4: even and odd columns apart."""
    STEP: tl.constexpr = 2 if KIND == "int4" else 1
    WIDTH: tl.constexpr = (D + 1) // 2 if KIND == "int4" else D
    columns = tl.arange(0, D_BLOCK)
    there = heads < HEADS
    mask = there[:, None] & (columns * STEP < D)[None, :]
    at = x_ptr + heads[:, None] * head_stride + columns[None, :] * STEP
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    bad = tl.max((x != x).to(tl.int32), 1)
    if KIND == "fp8":
        scale = tl.maximum(
            tl.div_rn(tl.max(tl.abs(x), 1), tl.full([heads.shape[0]], LARGEST, tl.float32)), SMALLEST_SCALE
        )
        scale = tl.where(bad != 0, float("nan"), scale)
        code = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        code = to_float8(tl.where(code == code, tl.minimum(tl.maximum(code, -LARGEST), LARGEST), code))
        tl.store(scales_ptr + rows, scale, mask=there)
    else:
        LEVELS: tl.constexpr = 255.0 if KIND == "int8" else 15.0
        low = tl.min(tl.where(mask, x, float("inf")), 1)
        high = tl.max(tl.where(mask, x, float("-inf")), 1)
        odd = x
        if KIND == "int4":
            more = there[:, None] & (columns * 2 + 1 < D)[None, :]
            odd = tl.load(at + 1, mask=more, other=0.0).to(tl.float32)
            bad = tl.maximum(bad, tl.max((odd != odd).to(tl.int32), 1))
            low = tl.minimum(low, tl.min(tl.where(more, odd, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(more, odd, float("-inf")), 1))
        scale = tl.maximum(tl.div_rn(high - low, tl.full([heads.shape[0]], LEVELS, tl.float32)), SMALLEST_SCALE)
        scale = tl.where(bad != 0, float("nan"), scale)
        code = to_integers(x, low, scale, LEVELS)
        if KIND == "int4":
            code |= tl.where(more, to_integers(odd, low, scale, LEVELS), 0) << 4
        tl.store(scales_ptr + rows * 2, scale, mask=there)
        tl.store(scales_ptr + rows * 2 + 1, low, mask=there)
    tl.store(codes_ptr + rows[:, None] * WIDTH + columns[None, :], code, mask=mask)


@triton.jit
def write_quantized_kv_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_codes_ptr: tl.tensor,
    v_codes_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    num_slots: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """Grid: [num_tokens]. codes: [num_blocks, HEADS, BLOCK_SIZE, D or half of it], scales: [..., 1 or 2], dense."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0 or slot >= num_slots:
        return
    heads = tl.arange(0, HEADS_BLOCK)
    rows = (slot // BLOCK_SIZE * HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
    store_quantized(
        k_ptr + token * k_token_stride, k_head_stride, k_codes_ptr, k_scales_ptr, rows, heads, HEADS, D, D_BLOCK, KIND
    )
    store_quantized(
        v_ptr + token * v_token_stride, v_head_stride, v_codes_ptr, v_scales_ptr, rows, heads, HEADS, D, D_BLOCK, KIND
    )


def write_quantized_kv(k: Tensor, v: Tensor, cache: QuantizedKVCache, slot_mapping: Tensor) -> None:
    """As the reference. Tokens with a slot outside the cache are not stored."""
    num_tokens, heads, head_dim = k.shape
    if not num_tokens:
        return
    k, v = dense_rows(k), dense_rows(v)
    heads_block = power_of_two(heads)
    block = power_of_two(-(-head_dim // 2) if cache.kv_dtype == "int4" else head_dim)
    write_quantized_kv_kernel[(num_tokens,)](
        k,
        v,
        cache.k.view(torch.uint8),
        cache.v.view(torch.uint8),
        cache.k_scales,
        cache.v_scales,
        slot_mapping,
        *k.stride()[:2],
        *v.stride()[:2],
        cache.k.shape[0] * cache.block_size,
        BLOCK_SIZE=cache.block_size,
        HEADS=heads,
        HEADS_BLOCK=heads_block,
        D=head_dim,
        D_BLOCK=block,
        KIND=cache.kv_dtype,
        num_warps=warps(heads_block * block),
    )


@triton.jit
def write_latent_kernel(
    latent_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    token_stride: tl.tensor,
    num_slots: tl.tensor,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
) -> None:
    """Grid: [num_tokens]. cache: [num_slots, D], dense."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0 or slot >= num_slots:
        return
    columns = tl.arange(0, D_BLOCK)
    latent = tl.load(latent_ptr + token * token_stride + columns, mask=columns < D)
    tl.store(cache_ptr + slot * D + columns, latent.to(cache_ptr.dtype.element_ty), mask=columns < D)


def write_latent(latent: Tensor, cache: LatentCache, slot_mapping: Tensor) -> None:
    """As the reference. Tokens with a slot outside the cache are not stored."""
    num_tokens, size = latent.shape
    if not num_tokens:
        return
    latent = dense_rows(latent)
    block = power_of_two(size)
    write_latent_kernel[(num_tokens,)](
        latent,
        cache.data,
        slot_mapping,
        latent.stride(0),
        cache.data.shape[0] * cache.block_size,
        D=size,
        D_BLOCK=block,
        num_warps=warps(block),
    )
