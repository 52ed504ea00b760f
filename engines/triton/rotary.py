"""Rotary embedding in place: a program turns all heads of one token, queries and keys alike.

All scalings are in the table (engines/layers/rotary.py). Cost of T tokens: 2 T (num_heads + num_kv_heads) rotary_dim b
bytes and 3 operations a value. Products and their sum are rounded to the dtype of q one by one, as the contract has it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engines.triton.launch import power_of_two, warps


@triton.jit
def turn(
    x_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    head_stride: tl.tensor,
    HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    """Every head of one token, at x_ptr. cos, sin: [HALF_BLOCK], in the dtype of x."""
    heads, columns = tl.arange(0, HEADS_BLOCK), tl.arange(0, HALF_BLOCK)
    mask = (heads < HEADS)[:, None] & (columns < HALF)[None, :]
    at = x_ptr + heads[:, None] * head_stride + columns[None, :]
    first, second = tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)
    dtype = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    cos, sin = cos.to(tl.float32)[None, :], sin.to(tl.float32)[None, :]
    left = (first * cos).to(dtype).to(tl.float32) - (second * sin).to(dtype).to(tl.float32)
    right = (second * cos).to(dtype).to(tl.float32) + (first * sin).to(dtype).to(tl.float32)
    tl.store(at, left.to(dtype), mask=mask)
    tl.store(at + HALF, right.to(dtype), mask=mask)


@triton.jit
def rope_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    table_ptr: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_token_stride: tl.tensor,
    k_head_stride: tl.tensor,
    table_stride: tl.tensor,
    num_positions: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    KV_HEADS_BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    """Grid: [num_tokens]. table: [num_positions, 2 * HALF], cosines first."""
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    if position < 0 or position >= num_positions:
        return
    columns = tl.arange(0, HALF_BLOCK)
    at = table_ptr + position * table_stride + columns
    cos, sin = tl.load(at, mask=columns < HALF, other=0.0), tl.load(at + HALF, mask=columns < HALF, other=0.0)
    turn(q_ptr + token * q_token_stride, cos, sin, q_head_stride, HEADS, HEADS_BLOCK, HALF, HALF_BLOCK)
    turn(k_ptr + token * k_token_stride, cos, sin, k_head_stride, KV_HEADS, KV_HEADS_BLOCK, HALF, HALF_BLOCK)


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """As the reference. Tokens with a position outside the table are left as they are."""
    assert q.stride(-1) == k.stride(-1) == 1 or q.shape[-1] == 1, "heads must be dense"
    half = cos_sin.shape[1] // 2
    if not q.shape[0] or not half:
        return
    heads, kv_heads = power_of_two(q.shape[1]), power_of_two(k.shape[1])
    block = power_of_two(half)
    rope_kernel[(q.shape[0],)](
        q,
        k,
        positions,
        cos_sin,
        *q.stride()[:2],
        *k.stride()[:2],
        cos_sin.stride(0),
        cos_sin.shape[0],
        HEADS=q.shape[1],
        KV_HEADS=k.shape[1],
        HEADS_BLOCK=heads,
        KV_HEADS_BLOCK=kv_heads,
        HALF=half,
        HALF_BLOCK=block,
        num_warps=warps(heads * block),
    )
