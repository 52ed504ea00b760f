"""The paged KV cache of one layer. Only ops know its layout, so that a backend may have another one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one layer, in blocks that sequences own or share."""

    k: Tensor
    """[num_blocks, num_kv_heads, block_size, head_dim]"""
    v: Tensor
    """The same."""

    @property
    def block_size(self) -> int:
        return self.k.shape[2]


def allocate_kv_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """An uninitialized cache; nothing may depend on what unwritten slots hold, NaN included."""
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return KVCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """Store new keys and values in their slots.

    k, v: [num_tokens, num_kv_heads, head_dim]; slot_mapping: [num_tokens] int64, block * block_size + offset.

    Modifies cache.
    """
    block, offset = slot_mapping // cache.block_size, slot_mapping % cache.block_size
    cache.k[block, :, offset] = k.to(cache.k.dtype)
    cache.v[block, :, offset] = v.to(cache.v.dtype)


@dataclass(frozen=True)
class LatentCache:
    """What multi-head latent attention keeps of one layer: a vector a token, for all heads."""

    data: Tensor
    """[num_blocks, block_size, rank + rope_dim]: the latent, of which keys and values are made, and the rotated key"""
    rank: int
    """Leading numbers of each vector that are the latent."""

    @property
    def block_size(self) -> int:
        return self.data.shape[1]


def allocate_latent_cache(
    num_blocks: int, block_size: int, rank: int, rope_dim: int, dtype: torch.dtype, device: torch.device
) -> LatentCache:
    """An uninitialized cache; nothing may depend on what unwritten slots hold, NaN included."""
    return LatentCache(torch.empty(num_blocks, block_size, rank + rope_dim, dtype=dtype, device=device), rank)


def write_latent(latent: Tensor, cache: LatentCache, slot_mapping: Tensor) -> None:
    """Store new tokens' vectors in their slots.

    latent: [num_tokens, rank + rope_dim]; slot_mapping: [num_tokens] int64, block * block_size + offset.

    Modifies cache.
    """
    cache.data[slot_mapping // cache.block_size, slot_mapping % cache.block_size] = latent.to(cache.data.dtype)
