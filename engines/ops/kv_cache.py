"""The paged KV cache of one layer. Only ops know its layout, so that a backend may have another one.

Common to all layouts: a cache is a dataclass whose tensors are contiguous and begin with the dimension of blocks, and
what a block holds does not depend on its place.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engines.ops import OpSet

KVDtype = Literal["int8", "int4", "fp8"]
LEVELS = {"int8": 255, "int4": 15}
FP8_MAX = 448.0
TINY = 2.0**-100
"""Smallest scale: a vector of equal numbers, zeros among them, has this one."""


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


@dataclass(frozen=True)
class QuantizedKVCache:
    """Keys and values of one layer in 8 or 4 bits, each vector of a token and a head with a scale of its own.

    x = code * scale + offset for int8 and int4 (codes from 0), x = code * scale for fp8 (float8_e4m3fn).
    """

    kv_dtype: KVDtype
    head_dim: int
    k: Tensor
    """[num_blocks, num_kv_heads, block_size, head_dim] uint8 or float8_e4m3fn; int4: [..., ceil(head_dim / 2)] uint8,
    dimension 2 i in the lower half of byte i"""
    v: Tensor
    """The same."""
    k_scales: Tensor
    """[num_blocks, num_kv_heads, block_size, 2] float32, scale and offset; fp8: [..., 1], scale"""
    v_scales: Tensor
    """The same."""

    @property
    def block_size(self) -> int:
        return self.k.shape[2]


def allocate_quantized_kv_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, kv_dtype: KVDtype, device: torch.device
) -> QuantizedKVCache:
    """An uninitialized cache; nothing may depend on what unwritten slots hold."""
    shape = (num_blocks, num_kv_heads, block_size)
    width = -(-head_dim // 2) if kv_dtype == "int4" else head_dim
    dtype = torch.float8_e4m3fn if kv_dtype == "fp8" else torch.uint8
    k, v = (torch.empty(*shape, width, dtype=dtype, device=device) for _ in range(2))
    numbers = 1 if kv_dtype == "fp8" else 2
    scales = [torch.empty(*shape, numbers, dtype=torch.float32, device=device) for _ in range(2)]
    return QuantizedKVCache(kv_dtype, head_dim, k, v, *scales)


def write_quantized_kv(k: Tensor, v: Tensor, cache: QuantizedKVCache, slot_mapping: Tensor) -> None:
    """Store new keys and values in their slots, rounded.

    k, v: [num_tokens, num_kv_heads, head_dim]; slot_mapping: [num_tokens] int64, block * block_size + offset.

    In float32, whatever the input's dtype. int8, int4: offset is the smallest number of the vector, scale the range
    / 255 or / 15 (at least TINY), code (x - offset) / scale rounded half to even. fp8: scale is the largest magnitude
    / 448, code x / scale rounded half to even. Modifies cache.
    """
    block, offset = slot_mapping // cache.block_size, slot_mapping % cache.block_size
    for x, codes, scales in ((k, cache.k, cache.k_scales), (v, cache.v, cache.v_scales)):
        code, scale = quantize_vectors(x, cache.kv_dtype)
        codes[block, :, offset] = code.to(codes.dtype)
        scales[block, :, offset] = scale.to(scales.dtype)


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
    """What `rope` does to q and k, and then `write_kv`, or `write_quantized_kv`, with k and v.

    Modifies q and cache; what k holds afterwards is not defined.
    """
    self.rope(q, k, positions, cos_sin)
    if isinstance(cache, QuantizedKVCache):
        self.write_quantized_kv(k, v, cache, slot_mapping)
    else:
        self.write_kv(k, v, cache, slot_mapping)


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
    """What `rms_norm` does to the latents, `rope` to q and to the key that all heads share, and then `write_latent`.

    q: [num_tokens, num_heads, rope_dim]; latent: [num_tokens, rank + rope_dim], as projected. Both may be views with
    strides of their own. weight: [rank], of the norm.

    Modifies q and cache; what latent holds afterwards is not defined.
    """
    compressed, k = latent.split([cache.rank, latent.shape[1] - cache.rank], dim=1)
    self.rope(q, k[:, None], positions, cos_sin)
    normed = self.rms_norm(compressed, weight, eps)
    self.write_latent(torch.cat((normed, k), dim=1), cache, slot_mapping)


def quantize_vectors(x: Tensor, kv_dtype: KVDtype) -> tuple[Tensor, Tensor]:
    """(codes, scales) of the last dimension's vectors, as QuantizedKVCache holds them."""
    x = x.float()
    if kv_dtype == "fp8":
        scale = (x.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=TINY)
        return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale
    low = x.amin(-1, keepdim=True)
    scale = ((x.amax(-1, keepdim=True) - low) / LEVELS[kv_dtype]).clamp(min=TINY)
    codes = ((x - low) / scale).round().clamp(0, LEVELS[kv_dtype]).to(torch.uint8)
    if kv_dtype == "int4":
        codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes, torch.cat((scale, low), -1)


def dequantize_vectors(codes: Tensor, scales: Tensor, kv_dtype: KVDtype, head_dim: int, dtype: torch.dtype) -> Tensor:
    """[..., head_dim]: products and sums in float32 (float64 for float64 scales), rounded once."""
    if kv_dtype == "int4":
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., :head_dim]
    wide = codes.to(scales.dtype) * scales[..., :1]
    return (wide if kv_dtype == "fp8" else wide + scales[..., 1:]).to(dtype)


def block_tensors(cache: KVCache | LatentCache | QuantizedKVCache) -> list[Tensor]:
    """All that a cache holds, each [num_blocks, ...]: whoever moves a block moves its part of each."""
    values = (getattr(cache, field.name) for field in fields(cache))
    return [value for value in values if isinstance(value, Tensor)]
