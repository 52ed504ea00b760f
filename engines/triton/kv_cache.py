"""Keys and values into the paged cache, in the reference's layout: a program stores one token's heads.

Cost of T tokens: 4 T num_kv_heads head_dim b bytes, no operations.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engines.ops.kv_cache import KVCache
from engines.triton.launch import dense_rows, power_of_two, warps


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
