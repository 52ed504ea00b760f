"""Low-rank adapters (arXiv 2106.09685), a different one for each token, without sorting the tokens.

A tile of tokens meets, one after the other, the adapters that its tokens have, so an adapter is read once a tile that
has it, and adapters that no token has are never read. Two kernels: down to the rank, and up again into the result. The
input features are cut into pieces of PIECE, whose sums are added in order, whether the pieces of a few tokens are
programs of their own or not: a token's bits do not depend on the batch.

Cost of T tokens of input K, output N, rank R: 2 T R (K + N) operations; (K + 2 N) T b bytes of tokens, (K + N) R b
bytes for each adapter of each tile, and 8 T R bytes between the kernels for each part that is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.triton.launch import dense_rows, power_of_two

PIECE = 512
"""Input features of a sum; enough of them for a program to be worth its start."""
FEW = 256
"""Tokens up to which pieces are programs of their own, and tiles are small: each has the adapters of few tokens."""
NONE = tl.constexpr(2**31 - 1)


@triton.jit
def adapter_after(ids: tl.tensor, adapter: tl.tensor) -> tl.tensor:
    """The smallest of ids above an adapter; NONE if there is none."""
    return tl.min(tl.where(ids > adapter, ids, NONE), 0)


@triton.jit(do_not_specialize=["num_tokens", "pieces"])
def shrink_kernel(
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_tokens: tl.tensor,
    x_stride: tl.tensor,
    pieces: tl.tensor,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Grid: [tiles of tokens, tiles of the rank, parts], each part of `pieces` pieces. a: [num_adapters, RANK, SIZE],
    dense. parts: [num parts, num_tokens, RANK] float32, zeros where a token has no adapter.
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    ranks = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside, there = tokens < num_tokens, ranks < RANK
    ids = tl.load(ids_ptr + tokens, mask=inside, other=-1).to(tl.int32)
    begin = tl.program_id(2) * pieces * PIECE
    end = tl.minimum(begin + pieces * PIECE, SIZE)
    result = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    adapter = adapter_after(ids, -1)
    while adapter != NONE:
        mine = ids == adapter
        x_at = x_ptr + tokens.to(tl.int64)[:, None] * x_stride
        a_at = a_ptr + (adapter.to(tl.int64) * RANK + ranks)[:, None] * SIZE
        total = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        for first in range(begin, end, PIECE):
            part = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            for start in range(first, tl.minimum(first + PIECE, end), BLOCK_K):
                columns = start + tl.arange(0, BLOCK_K)
                x = tl.load(x_at + columns[None, :], mask=mine[:, None] & (columns < SIZE)[None, :], other=0.0)
                a = tl.load(a_at + columns[None, :], mask=there[:, None] & (columns < SIZE)[None, :], other=0.0)
                part = tl.dot(x, tl.trans(a), part, input_precision="ieee")
            total += part
        result = tl.where(mine[:, None], total, result)
        adapter = adapter_after(ids, adapter)
    at = (tl.program_id(2) * num_tokens + tokens).to(tl.int64)[:, None] * RANK + ranks[None, :]
    tl.store(parts_ptr + at, result, mask=inside[:, None] & there[None, :])


@triton.jit(do_not_specialize=["num_tokens", "num_parts"])
def expand_kernel(
    y_ptr: tl.tensor,
    b_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    num_tokens: tl.tensor,
    y_stride: tl.tensor,
    num_parts: tl.tensor,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid: [tiles of tokens, tiles of output features]. b: [num_adapters, SIZE, RANK], dense. parts: as above."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, there = tokens < num_tokens, columns < SIZE
    ids = tl.load(ids_ptr + tokens, mask=inside, other=-1).to(tl.int32)
    result = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    adapter = adapter_after(ids, -1)
    while adapter != NONE:
        mine = ids == adapter
        b_at = b_ptr + (adapter.to(tl.int64) * SIZE + columns)[:, None] * RANK
        total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for start in range(0, RANK, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            inner = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
            for part in range(num_parts):
                at = (part * num_tokens + tokens).to(tl.int64)[:, None] * RANK + ranks[None, :]
                inner += tl.load(parts_ptr + at, mask=mine[:, None] & (ranks < RANK)[None, :], other=0.0)
            b = tl.load(b_at + ranks[None, :], mask=there[:, None] & (ranks < RANK)[None, :], other=0.0)
            total = tl.dot(inner.to(b.dtype), tl.trans(b), total, input_precision="ieee")
        result = tl.where(mine[:, None], total, result)
        adapter = adapter_after(ids, adapter)
    y_at = y_ptr + tokens.to(tl.int64)[:, None] * y_stride + columns[None, :]
    mask = (ids >= 0)[:, None] & there[None, :]
    y = tl.load(y_at, mask=mask, other=0.0)
    result = y.to(tl.float32) + result.to(y.dtype).to(tl.float32)
    tl.store(y_at, result.to(y.dtype), mask=mask)


def lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter_ids: Tensor) -> None:
    """As the reference; products and sums in float32. A token's bits do not depend on the tokens around it."""
    num_tokens, size = x.shape
    rank, out = a.shape[1], b.shape[1]
    assert out <= 1 or y.stride(1) == 1, "rows of y must be dense"
    if not num_tokens or not rank:
        return
    x, a, b = dense_rows(x), a.contiguous(), b.contiguous()
    all_pieces = triton.cdiv(size, PIECE)
    num_parts = all_pieces if num_tokens <= FEW else 1
    block_t, block_r = (16 if num_tokens <= FEW else 32), min(64, power_of_two(rank, 16))
    block_k, block_n = (32, 32) if x.element_size() == 4 else (64, 64)
    parts = torch.empty((num_parts, num_tokens, rank), dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(num_tokens, block_t)
    shrink_kernel[(tiles, triton.cdiv(rank, block_r), num_parts)](
        x, a, adapter_ids, parts, num_tokens, x.stride(0), triton.cdiv(all_pieces, num_parts),
        SIZE=size, RANK=rank, PIECE=PIECE, BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_K=block_k, num_warps=4, num_stages=3,
    )  # fmt: skip
    expand_kernel[(tiles, triton.cdiv(out, block_n))](
        y, b, adapter_ids, parts, num_tokens, y.stride(0), num_parts,
        SIZE=out, RANK=rank, BLOCK_T=block_t, BLOCK_R=block_r, BLOCK_N=block_n, num_warps=4, num_stages=2,
    )  # fmt: skip
