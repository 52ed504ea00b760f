"""The part of attention that all its kernels share: online softmax of a tile of queries over a range of keys.

Names and shapes are those of engines/triton/attention.py.
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
    D: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Columns FIRST to FIRST + WIDTH of the rows at `at`: zeros past D and, with MASKED, in rows that are not there."""
    columns = FIRST + tl.arange(0, WIDTH)
    address = ptr + at[:, None] + columns[None, :]
    if FIRST + WIDTH > D:
        if MASKED:
            return tl.load(address, mask=there[:, None] & (columns < D)[None, :], other=0.0)
        else:
            return tl.load(address, mask=(columns < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(address, mask=there[:, None], other=0.0)
    else:
        return tl.load(address)


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
    table_ptr: tl.tensor,
    k_block_stride: tl.tensor,
    v_block_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
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
        k0 = load_rows(k_ptr, k_at, there, 0, D0, D, MASKED)
        scores = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1:
            k1 = load_rows(k_ptr, k_at, there, D0, D1, D, MASKED)
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
        v0 = load_rows(v_ptr, v_at, there, 0, D0, D, MASKED)
        acc0 = tl.dot(weights.to(v0.dtype), v0, acc0 * shrink[:, None], input_precision="ieee")
        if D1:
            v1 = load_rows(v_ptr, v_at, there, D0, D1, D, MASKED)
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
    table_ptr: tl.tensor,
    k_block_stride: tl.tensor,
    v_block_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Keys low to end, low a multiple of BLOCK_N: the window's edge, what all rows see, and the rest."""
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1 if D1 else 16], tl.float32)
    seen = end
    if PAGED:
        seen = tl.minimum(end, first_position + 1)
    seen = seen // BLOCK_N * BLOCK_N
    edge = low
    if WINDOW:
        edge = tl.maximum(low, tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK_N) * BLOCK_N)
        acc0, acc1, most, total = attend(
            acc0, acc1, most, total, q0, q1, positions, low, tl.minimum(edge, end), end, k_ptr, v_ptr, table_ptr,
            k_block_stride, v_block_stride, k_slot_stride, v_slot_stride, window, scale, softcap,
            D, D0, D1, BLOCK_N, BLOCK_SIZE, PAGED, True, WINDOW, SOFTCAP,
        )  # fmt: skip
    acc0, acc1, most, total = attend(
        acc0, acc1, most, total, q0, q1, positions, edge, seen, end, k_ptr, v_ptr, table_ptr,
        k_block_stride, v_block_stride, k_slot_stride, v_slot_stride, window, scale, softcap,
        D, D0, D1, BLOCK_N, BLOCK_SIZE, PAGED, False, WINDOW, SOFTCAP,
    )  # fmt: skip
    return attend(
        acc0, acc1, most, total, q0, q1, positions, tl.maximum(edge, seen), end, end, k_ptr, v_ptr, table_ptr,
        k_block_stride, v_block_stride, k_slot_stride, v_slot_stride, window, scale, softcap,
        D, D0, D1, BLOCK_N, BLOCK_SIZE, PAGED, True, WINDOW, SOFTCAP,
    )  # fmt: skip


@triton.jit
def store_rows(
    ptr: tl.tensor, at: tl.tensor, mask: tl.tensor, value0: tl.tensor, value1: tl.tensor,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
) -> None:  # fmt: skip
    """Both parts of the rows at `at`."""
    columns = tl.arange(0, D0)
    to = ptr + at[:, None] + columns[None, :]
    tl.store(to, value0.to(ptr.dtype.element_ty), mask=mask[:, None] & (columns < D)[None, :])
    if D1:
        more = D0 + tl.arange(0, D1)
        to = ptr + at[:, None] + more[None, :]
        tl.store(to, value1.to(ptr.dtype.element_ty), mask=mask[:, None] & (more < D)[None, :])
