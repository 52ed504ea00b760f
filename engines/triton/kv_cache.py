"""Keys and values into the paged caches, in the reference's layouts: a program stores one token.

Cost of T tokens: 4 T num_kv_heads head_dim b bytes and no operations; in 8 or 4 bits 2 T num_kv_heads head_dim b bytes
read, and what kv_vector_bytes of engines/costs.py says written; of latents 2 T (rank + rope_dim) b bytes. Where queries
are turned on the way, what rotary.py says of them; where latents are normalized, 4 T rank operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.ops import OpSet
from engines.ops.kv_cache import FP8_MAX, TINY, KVCache, LatentCache, QuantizedKVCache
from engines.triton.launch import dense_rows, power_of_two, warps
from engines.triton.rotary import turn

LARGEST, SMALLEST_SCALE = tl.constexpr(FP8_MAX), tl.constexpr(TINY)
ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it to a small float32 and taking it away rounds to an integer, half to even."""


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
def load_heads(
    x_ptr: tl.tensor,
    heads: tl.tensor,
    columns: tl.tensor,
    mask: tl.tensor,
    head_stride: tl.tensor,
    angles_ptr: tl.tensor,
    HALF: tl.constexpr,
) -> tl.tensor:
    """Columns of all heads of a token, turned as by rotary.py where HALF is not 0. angles: HALF cosines, then sines."""
    x = tl.load(x_ptr + heads[:, None] * head_stride + columns[None, :], mask=mask, other=0.0)
    if HALF:
        turns, upper = columns < 2 * HALF, columns >= HALF
        partner = tl.where(upper, columns - HALF, columns + HALF)
        at = x_ptr + heads[:, None] * head_stride + partner[None, :]
        other = tl.load(at, mask=mask & turns[None, :], other=0.0)
        angle = angles_ptr + tl.where(upper, columns - HALF, columns)
        cos = tl.load(angle, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(angle + HALF, mask=turns, other=0.0).to(tl.float32)
        along = (x.to(tl.float32) * cos[None, :]).to(x.dtype).to(tl.float32)
        across = (other.to(tl.float32) * sin[None, :]).to(x.dtype).to(tl.float32)
        x = (along + tl.where(upper[None, :], across, -across)).to(x.dtype)
    return x


@triton.jit
def store_heads(
    x_ptr: tl.tensor,
    head_stride: tl.tensor,
    cache_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    rows: tl.tensor,
    heads: tl.tensor,
    angles_ptr: tl.tensor,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """All heads of one token, at x_ptr, into rows of the cache and its scales. int4: even and odd columns apart."""
    STEP: tl.constexpr = 2 if KIND == "int4" else 1
    WIDTH: tl.constexpr = (D + 1) // 2 if KIND == "int4" else D
    columns = tl.arange(0, D_BLOCK)
    there = heads < HEADS
    mask = there[:, None] & (columns * STEP < D)[None, :]
    x = load_heads(x_ptr, heads, columns * STEP, mask, head_stride, angles_ptr, HALF)
    to = cache_ptr + rows[:, None] * WIDTH + columns[None, :]
    if KIND == "plain":
        tl.store(to, x.to(cache_ptr.dtype.element_ty), mask=mask)
    elif KIND == "fp8":
        x = x.to(tl.float32)
        bad = tl.max((x != x).to(tl.int32), 1)
        scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full([heads.shape[0]], LARGEST, tl.float32))
        scale = tl.where(bad != 0, float("nan"), tl.maximum(scale, SMALLEST_SCALE))
        code = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        code = tl.where(code == code, tl.minimum(tl.maximum(code, -LARGEST), LARGEST), code)
        tl.store(scales_ptr + rows, scale, mask=there)
        tl.store(to, to_float8(code), mask=mask)
    else:
        LEVELS: tl.constexpr = 255.0 if KIND == "int8" else 15.0
        x = x.to(tl.float32)
        bad = tl.max((x != x).to(tl.int32), 1)
        low = tl.min(tl.where(mask, x, float("inf")), 1)
        high = tl.max(tl.where(mask, x, float("-inf")), 1)
        odd, more = x, mask
        if KIND == "int4":
            more = there[:, None] & (columns * 2 + 1 < D)[None, :]
            odd = load_heads(x_ptr, heads, columns * 2 + 1, more, head_stride, angles_ptr, HALF).to(tl.float32)
            bad = tl.maximum(bad, tl.max((odd != odd).to(tl.int32), 1))
            low = tl.minimum(low, tl.min(tl.where(more, odd, float("inf")), 1))
            high = tl.maximum(high, tl.max(tl.where(more, odd, float("-inf")), 1))
        scale = tl.div_rn(high - low, tl.full([heads.shape[0]], LEVELS, tl.float32))
        scale = tl.where(bad != 0, float("nan"), tl.maximum(scale, SMALLEST_SCALE))
        code = to_integers(x, low, scale, LEVELS)
        if KIND == "int4":
            code |= tl.where(more, to_integers(odd, low, scale, LEVELS), 0) << 4
        tl.store(scales_ptr + rows * 2, scale, mask=there)
        tl.store(scales_ptr + rows * 2 + 1, low, mask=there)
        tl.store(to, code, mask=mask)


@triton.jit
def write_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_cache_ptr: tl.tensor,
    v_cache_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    table_ptr: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_token_stride: tl.tensor,
    v_head_stride: tl.tensor,
    table_stride: tl.tensor,
    num_slots: tl.tensor,
    num_positions: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    Q_HEADS: tl.constexpr,
    Q_HEADS_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    KIND: tl.constexpr,
) -> None:
    """Grid: [num_tokens]. caches: [num_blocks, HEADS, BLOCK_SIZE, D, or half of it], scales: [..., 1 or 2], dense.

    HALF: half of what is turned of a head, of queries in place and of keys on their way; 0: nothing is turned.
    """
    token = tl.program_id(0).to(tl.int64)
    angles_ptr = table_ptr
    if HALF:
        position = tl.load(positions_ptr + token)
        if position < 0 or position >= num_positions:
            return
        angles_ptr += position * table_stride
        half = tl.arange(0, HALF_BLOCK)
        cos = tl.load(angles_ptr + half, mask=half < HALF, other=0.0)
        sin = tl.load(angles_ptr + HALF + half, mask=half < HALF, other=0.0)
        turn(q_ptr + token * q_token_stride, cos, sin, q_head_stride, Q_HEADS, Q_HEADS_BLOCK, HALF, HALF_BLOCK)
    slot = tl.load(slots_ptr + token)
    if slot < 0 or slot >= num_slots:
        return
    heads = tl.arange(0, HEADS_BLOCK)
    rows = (slot // BLOCK_SIZE * HEADS + heads) * BLOCK_SIZE + slot % BLOCK_SIZE
    store_heads(
        k_ptr + token * k_token_stride, k_head_stride, k_cache_ptr, k_scales_ptr, rows, heads, angles_ptr,
        HEADS, D, D_BLOCK, HALF, KIND,
    )  # fmt: skip
    store_heads(
        v_ptr + token * v_token_stride, v_head_stride, v_cache_ptr, v_scales_ptr, rows, heads, angles_ptr,
        HEADS, D, D_BLOCK, 0, KIND,
    )  # fmt: skip


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """As the reference. Tokens with a slot outside the cache are not stored."""
    _write(k, v, cache, slot_mapping)


def write_quantized_kv(k: Tensor, v: Tensor, cache: QuantizedKVCache, slot_mapping: Tensor) -> None:
    """As the reference. Tokens with a slot outside the cache are not stored."""
    _write(k, v, cache, slot_mapping)


def rope_write_kv(
    self: OpSet,
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
    assert q.stride(-1) == 1 or q.shape[-1] == 1, "heads must be dense"
    _write(k, v, cache, slot_mapping, q, positions, cos_sin)


def _write(
    k: Tensor,
    v: Tensor,
    cache: KVCache | QuantizedKVCache,
    slots: Tensor,
    q: Tensor | None = None,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
) -> None:
    """q, positions and cos_sin: all of them, or none."""
    num_tokens, heads, head_dim = k.shape
    if not num_tokens:
        return
    k, v = dense_rows(k), dense_rows(v)
    kind: str = "plain"
    stored: tuple[Tensor | None, ...] = (cache.k, cache.v, None, None)
    if isinstance(cache, QuantizedKVCache):
        kind = cache.kv_dtype
        stored = (cache.k.view(torch.uint8), cache.v.view(torch.uint8), cache.k_scales, cache.v_scales)
    half = 0 if cos_sin is None else cos_sin.shape[1] // 2
    q_heads = 1 if q is None else q.shape[1]
    heads_block = power_of_two(heads)
    block = power_of_two(-(-head_dim // 2) if kind == "int4" else head_dim)
    write_kernel[(num_tokens,)](
        q,
        k,
        v,
        *stored,
        slots,
        positions,
        cos_sin,
        *((0, 0) if q is None else q.stride()[:2]),
        *k.stride()[:2],
        *v.stride()[:2],
        0 if cos_sin is None else cos_sin.stride(0),
        cache.k.shape[0] * cache.block_size,
        0 if cos_sin is None else cos_sin.shape[0],
        BLOCK_SIZE=cache.block_size,
        Q_HEADS=q_heads,
        Q_HEADS_BLOCK=power_of_two(q_heads),
        HEADS=heads,
        HEADS_BLOCK=heads_block,
        D=head_dim,
        D_BLOCK=block,
        HALF=half,
        HALF_BLOCK=power_of_two(half),
        KIND=kind,
        num_warps=warps(max(heads_block * block, power_of_two(q_heads) * half)),
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


@triton.jit
def rope_write_latent_kernel(
    q_ptr: tl.tensor,
    latent_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    table_ptr: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    latent_stride: tl.tensor,
    table_stride: tl.tensor,
    num_slots: tl.tensor,
    num_positions: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROPE: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    """Grid: [num_tokens]. latent: RANK numbers to be normalized, as norm.py does, and a key of ROPE to be turned;
    cache: [num_slots, RANK + ROPE], dense. HALF: half of what is turned of a head.
    """
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    if position < 0 or position >= num_positions:
        return
    angles_ptr = table_ptr + position * table_stride
    half = tl.arange(0, HALF_BLOCK)
    cos = tl.load(angles_ptr + half, mask=half < HALF, other=0.0)
    sin = tl.load(angles_ptr + HALF + half, mask=half < HALF, other=0.0)
    turn(q_ptr + token * q_token_stride, cos, sin, q_head_stride, HEADS, HEADS_BLOCK, HALF, HALF_BLOCK)
    slot = tl.load(slots_ptr + token)
    if slot < 0 or slot >= num_slots:
        return
    latent_ptr += token * latent_stride
    cache_ptr += slot * (RANK + ROPE)
    columns = tl.arange(0, RANK_BLOCK)
    inside = columns < RANK
    x = tl.load(latent_ptr + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    result = (weight * normed.to(x.dtype).to(tl.float32)).to(x.dtype)
    tl.store(cache_ptr + columns, result.to(cache_ptr.dtype.element_ty), mask=inside)
    one, turned = tl.arange(0, 1), tl.arange(0, ROPE_BLOCK)
    mask = (one < 1)[:, None] & (turned < ROPE)[None, :]
    key = load_heads(latent_ptr + RANK, one, turned, mask, 0, angles_ptr, HALF)
    at = cache_ptr + RANK + one[:, None] + turned[None, :]
    tl.store(at, key.to(cache_ptr.dtype.element_ty), mask=mask)


def rope_write_latent(
    self: OpSet,
    q: Tensor,
    latent: Tensor,
    weight: Tensor,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    cache: LatentCache,
    slot_mapping: Tensor,
) -> None:
    """As the reference, in one launch; latent is left as it is. Tokens with a position outside the table are left
    alone, those with a slot outside the cache are not stored.
    """
    assert q.stride(-1) == 1 or q.shape[-1] == 1, "heads must be dense"
    num_tokens, heads, rope_dim = q.shape
    if not num_tokens:
        return
    latent, half = dense_rows(latent), cos_sin.shape[1] // 2
    heads_block, half_block, rank_block = power_of_two(heads), power_of_two(half), power_of_two(cache.rank)
    rope_write_latent_kernel[(num_tokens,)](
        q,
        latent,
        weight,
        cache.data,
        slot_mapping,
        positions,
        cos_sin,
        *q.stride()[:2],
        latent.stride(0),
        cos_sin.stride(0),
        cache.data.shape[0] * cache.block_size,
        cos_sin.shape[0],
        eps,
        HEADS=heads,
        HEADS_BLOCK=heads_block,
        RANK=cache.rank,
        RANK_BLOCK=rank_block,
        ROPE=rope_dim,
        ROPE_BLOCK=power_of_two(rope_dim),
        HALF=half,
        HALF_BLOCK=half_block,
        num_warps=warps(max(heads_block * half_block, rank_block)),
    )
