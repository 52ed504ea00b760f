"""Tiles of attention: online softmax of a tile of queries over a range of keys, and a decoding sequence's part of them.

Names and shapes are those of engines/triton/attention.py. KIND is what the cache holds:

plain: keys and values in the dtype of the queries.
latent: one vector a token; all of it is the key, its first NEXT numbers are the value as well.
int8, int4, fp8: codes with a scale a vector (engines/ops/kv_cache.py), which become numbers of the queries' dtype on
the way from memory to the product.

D0 and D1 are the widths of the two parts of a head, powers of two, NEXT the first column of the second one. Of int4 the
first part has the even columns and the second the odd ones, as they lie in the halves of a byte: nothing is shuffled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engines.triton.activation import tanh

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    ptr: tl.tensor,
    at: tl.tensor,
    there: tl.tensor,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
    LIMIT: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Every STEP-th column from FIRST on of the rows at `at`: zeros from LIMIT on and, with MASKED, in rows that are
    not there.
    """
    columns = FIRST + STEP * tl.arange(0, WIDTH)
    address = ptr + at[:, None] + columns[None, :]
    if FIRST + STEP * (WIDTH - 1) >= LIMIT:
        if MASKED:
            return tl.load(address, mask=there[:, None] & (columns < LIMIT)[None, :], other=0)
        else:
            return tl.load(address, mask=(columns < LIMIT)[None, :], other=0)
    elif MASKED:
        return tl.load(address, mask=there[:, None], other=0)
    else:
        return tl.load(address)


@triton.jit
def load_parts(
    ptr: tl.tensor,
    at: tl.tensor,
    there: tl.tensor,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    NEXT: tl.constexpr,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both parts of the rows of a tensor of numbers; the second is the first where D1 is 0."""
    if KIND == "int4":
        return load_rows(ptr, at, there, 0, D0, 2, D, MASKED), load_rows(ptr, at, there, 1, D0, 2, D, MASKED)
    elif D1:
        return (
            load_rows(ptr, at, there, 0, D0, 1, NEXT, MASKED),
            load_rows(ptr, at, there, NEXT, D1, 1, D, MASKED),
        )
    else:
        first = load_rows(ptr, at, there, 0, D0, 1, D, MASKED)
        return first, first


@triton.jit
def decoded(
    codes: tl.tensor, scale: tl.tensor, offset: tl.tensor, KIND: tl.constexpr, dtype: tl.constexpr
) -> tl.tensor:
    """The numbers that codes stand for, rounded once. codes: [rows, columns]; scale, offset: [rows] float32.

    An integer becomes a float32 as the last bits of 2^23. The bits of a float8_e4m3fn, moved to those of a float16, are
    the number divided by 2^8, as the exponents' biases are 7 and 15, subnormal numbers among them (and NaN is 480).
    """
    if KIND == "fp8":
        bits = codes.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half.to(tl.float32) * (scale * 256.0)[:, None]).to(dtype)
    else:
        number = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        return (number * scale[:, None] + offset[:, None]).to(dtype)


@triton.jit
def load_cached(
    ptr: tl.tensor,
    scales_ptr: tl.tensor,
    at: tl.tensor,
    rows: tl.tensor,
    there: tl.tensor,
    dtype: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    NEXT: tl.constexpr,
    KIND: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both parts of cached vectors as numbers of a dtype. rows: where their scales are, in vectors."""
    if KIND == "plain" or KIND == "latent":
        return load_parts(ptr, at, there, D, D0, D1, NEXT, KIND, MASKED)
    else:
        numbers: tl.constexpr = 1 if KIND == "fp8" else 2
        if MASKED:
            scale = tl.load(scales_ptr + rows * numbers, mask=there, other=0.0)
            offset = tl.load(scales_ptr + rows * numbers + (numbers - 1), mask=there, other=0.0)
        else:
            scale = tl.load(scales_ptr + rows * numbers)
            offset = tl.load(scales_ptr + rows * numbers + (numbers - 1))
        if KIND == "int4":
            codes = load_rows(ptr, at, there, 0, D0, 1, (D + 1) // 2, MASKED)
            return decoded(codes & 15, scale, offset, KIND, dtype), decoded(codes >> 4, scale, offset, KIND, dtype)
        else:
            first, second = load_parts(ptr, at, there, D, D0, D1, NEXT, KIND, MASKED)
            return decoded(first, scale, offset, KIND, dtype), decoded(second, scale, offset, KIND, dtype)


@triton.jit
def attend(
    acc0: tl.tensor,
    acc1: tl.tensor,
    most: tl.tensor,
    total: tl.tensor,
    q0: tl.tensor,
    q1: tl.tensor,
    positions: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    end: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    k_block_stride: tl.tensor,
    v_block_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    NEXT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    PAGED: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax, in base 2, over the tiles of keys from `first` to `last`; keys from `end` on are not there.

    most, total: [BLOCK_M] maximum and sum so far; -inf and 0 where no key has been seen.
    """
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        there = keys < end
        if PAGED:
            if MASKED:
                blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
            else:
                blocks = tl.load(table_ptr + keys // BLOCK_SIZE).to(tl.int64)
            k_at = blocks * k_block_stride + (keys % BLOCK_SIZE) * k_slot_stride
            v_at = blocks * v_block_stride + (keys % BLOCK_SIZE) * v_slot_stride
        else:
            k_at = keys.to(tl.int64) * k_slot_stride
            v_at = keys.to(tl.int64) * v_slot_stride
        rows = k_at
        if KIND != "plain" and KIND != "latent":
            rows = blocks * (KV_HEADS * BLOCK_SIZE) + keys % BLOCK_SIZE
        k0, k1 = load_cached(k_ptr, k_scales_ptr, k_at, rows, there, q0.dtype, D, D0, D1, NEXT, KIND, MASKED)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1:
            scores = tl.dot(q1, tl.trans(k1), scores, input_precision="ieee")
        scores = softcap * tanh(scores * (scale / softcap)) * LOG2_E if SOFTCAP else scores * (scale * LOG2_E)
        if MASKED:
            visible = there[None, :]
            if PAGED:
                visible = visible & (keys[None, :] <= positions[:, None])
            if WINDOW:
                visible = visible & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        raised = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(raised == float("-inf"), 0.0, raised) if MASKED else raised
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(weights, 1)
        most = raised
        if KIND == "latent":
            acc0 = tl.dot(weights.to(k0.dtype), k0, acc0 * shrink[:, None], input_precision="ieee")
        else:
            v0, v1 = load_cached(v_ptr, v_scales_ptr, v_at, rows, there, q0.dtype, D, D0, D1, NEXT, KIND, MASKED)
            acc0 = tl.dot(weights.to(v0.dtype), v0, acc0 * shrink[:, None], input_precision="ieee")
            if D1:
                acc1 = tl.dot(weights.to(v1.dtype), v1, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, most, total


@triton.jit
def attend_range(
    low: tl.tensor,
    end: tl.tensor,
    first_position: tl.tensor,
    last_position: tl.tensor,
    most: tl.tensor,
    total: tl.tensor,
    q0: tl.tensor,
    q1: tl.tensor,
    positions: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    table_ptr: tl.tensor,
    k_block_stride: tl.tensor,
    v_block_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    NEXT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    PAGED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Keys low to end, low a multiple of BLOCK_N: the window's edge, what all rows see, and the rest.

    Returns both parts of the sum of weighted values, and the softmax's maximum and sum.
    """
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 and KIND != "latent" else 16], tl.float32)
    seen = end
    if PAGED:
        seen = tl.minimum(end, first_position + 1)
    seen = seen // BLOCK_N * BLOCK_N
    edge = low
    if WINDOW:
        edge = tl.maximum(low, tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_N) * BLOCK_N)
        acc0, acc1, most, total = attend(
            acc0, acc1, most, total, q0, q1, positions, low, tl.minimum(edge, end), end, k_ptr, v_ptr,
            k_scales_ptr, v_scales_ptr, table_ptr, k_block_stride, v_block_stride, k_slot_stride, v_slot_stride,
            window, scale, softcap, KV_HEADS, D, D0, D1, NEXT, BLOCK_N, BLOCK_SIZE, KIND, PAGED, True, WINDOW, SOFTCAP,
        )  # fmt: skip
    acc0, acc1, most, total = attend(
        acc0, acc1, most, total, q0, q1, positions, edge, seen, end, k_ptr, v_ptr,
        k_scales_ptr, v_scales_ptr, table_ptr, k_block_stride, v_block_stride, k_slot_stride, v_slot_stride,
        window, scale, softcap, KV_HEADS, D, D0, D1, NEXT, BLOCK_N, BLOCK_SIZE, KIND, PAGED, False, WINDOW, SOFTCAP,
    )  # fmt: skip
    acc0, acc1, most, total = attend(
        acc0, acc1, most, total, q0, q1, positions, tl.maximum(edge, seen), end, end, k_ptr, v_ptr,
        k_scales_ptr, v_scales_ptr, table_ptr, k_block_stride, v_block_stride, k_slot_stride, v_slot_stride,
        window, scale, softcap, KV_HEADS, D, D0, D1, NEXT, BLOCK_N, BLOCK_SIZE, KIND, PAGED, True, WINDOW, SOFTCAP,
    )  # fmt: skip
    return acc0, acc1, most, total


@triton.jit
def store_rows(
    ptr: tl.tensor, at: tl.tensor, mask: tl.tensor, value0: tl.tensor, value1: tl.tensor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, NEXT: tl.constexpr, KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Both parts of the rows at `at`; of latents the first, which is the value."""
    STEP: tl.constexpr = 2 if KIND == "int4" else 1
    columns = STEP * tl.arange(0, D0)
    to = ptr + at[:, None] + columns[None, :]
    inside = columns < (NEXT if KIND == "latent" else D)
    tl.store(to, value0.to(ptr.dtype.element_ty), mask=mask[:, None] & inside[None, :])
    if D1 and KIND != "latent":
        more = NEXT + STEP * tl.arange(0, D1)
        to = ptr + at[:, None] + more[None, :]
        tl.store(to, value1.to(ptr.dtype.element_ty), mask=mask[:, None] & (more < D)[None, :])


@triton.jit
def decode_part(
    split: tl.tensor, low: tl.tensor, part: tl.tensor, length: tl.tensor, begin: tl.tensor, seq: tl.tensor,
    kv_head: tl.tensor, tile: tl.tensor, q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor, v_scales_ptr: tl.tensor, out_ptr: tl.tensor, parts_ptr: tl.tensor, sums_ptr: tl.tensor,
    table_ptr: tl.tensor, sinks_ptr: tl.tensor, q_token_stride: tl.tensor, q_head_stride: tl.tensor,
    k_block_stride: tl.tensor, v_block_stride: tl.tensor, k_slot_stride: tl.tensor, v_slot_stride: tl.tensor,
    window: tl.tensor, scale: tl.tensor, softcap: tl.tensor, splits: tl.tensor, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, NEXT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, KIND: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
) -> None:  # fmt: skip
    """One part of a decoding sequence's keys for one tile of its heads; k_ptr and v_ptr are the KV head's."""
    first = low + split * part
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < GROUP
    heads = kv_head * GROUP + rows
    q_at = begin.to(tl.int64) * q_token_stride + heads * q_head_stride
    q0, q1 = load_parts(q_ptr, q_at, inside, D, D0, D1, NEXT, KIND, True)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # noqa: SIM102 (a constant, and a number of the device)
        if split == 0:
            most = tl.load(sinks_ptr + heads, mask=inside, other=0.0).to(tl.float32) * LOG2_E
            total += 1.0
    acc0, acc1, most, total = attend_range(
        first, tl.minimum(first + part, length), length - 1, length - 1, most, total, q0, q1, length - 1 + rows * 0,
        k_ptr, v_ptr, k_scales_ptr, v_scales_ptr, table_ptr,
        k_block_stride, v_block_stride, k_slot_stride, v_slot_stride, window, scale, softcap,
        KV_HEADS, D, D0, D1, NEXT, BLOCK_M, BLOCK_N, BLOCK_SIZE, KIND, True, WINDOW, SOFTCAP,
    )  # fmt: skip
    share = (1.0 / total)[:, None]
    width: tl.constexpr = NEXT if KIND == "latent" else D
    if length - low <= part:
        out_at = (begin.to(tl.int64) * (KV_HEADS * GROUP) + heads) * width
        store_rows(out_ptr, out_at, inside, acc0 * share, acc1 * share, D, D0, D1, NEXT, KIND)
    else:
        at = (seq.to(tl.int64) * (KV_HEADS * GROUP) + heads) * splits + split
        store_rows(parts_ptr, at * width, inside, acc0 * share, acc1 * share, D, D0, D1, NEXT, KIND)
        tl.store(sums_ptr + at, most + tl.log2(total), mask=inside)
