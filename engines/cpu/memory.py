"""Memory that the CPU engine keeps: page faults cost more than the arithmetic on what they bring."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import torch

from engines.ops.kv_cache import KVCache, KVDtype, QuantizedKVCache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of mallopt(3), from glibc's malloc.h."""
LARGE = 1 << 30
KEPT_PRODUCTS = 256
"""Compiled products that oneDNN keeps: those of the last fifty batch sizes, each of which has about five."""


def keep_freed_memory() -> bool:
    """Have malloc reuse blocks of up to 1 GiB instead of returning each to the system; False where that is not glibc.

    A step's activations are megabytes each. By default every one is mapped, faulted in page by page, and unmapped
    again: 13 times the cost of writing to a block that is reused.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(M_MMAP_THRESHOLD, LARGE) and mallopt(M_TRIM_THRESHOLD, LARGE))


def keep_few_products() -> None:
    """Have oneDNN keep KEPT_PRODUCTS compiled products, if its own variable does not say how many.

    Every number of rows has its own, a millisecond to compile and 0.1 to 0.2 MB to keep; by default 1,024 are kept. It
    reads the variable at its first product.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))


def allocate_kv_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """As the reference, in huge pages where the system has them: a 512th of the faults when blocks are first used."""
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return KVCache(_huge_pages(shape, dtype), _huge_pages(shape, dtype))


def allocate_quantized_kv_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, kv_dtype: KVDtype, device: torch.device
) -> QuantizedKVCache:
    """As the reference, in huge pages."""
    shape = (num_blocks, num_kv_heads, block_size)
    width = -(-head_dim // 2) if kv_dtype == "int4" else head_dim
    dtype, numbers = (torch.float8_e4m3fn, 1) if kv_dtype == "fp8" else (torch.uint8, 2)
    k, v = (_huge_pages((*shape, width), dtype) for _ in range(2))
    scales = [_huge_pages((*shape, numbers), torch.float32) for _ in range(2)]
    return QuantizedKVCache(kv_dtype, head_dim, k, v, *scales)


def _huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
