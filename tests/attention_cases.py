"""Paged batches for attention: permuted blocks, NaN in slots that must not be read, absurd block ids past the end."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engines.batch import Batch, PrefixGroup
from engines.ops import OpSet
from engines.ops.kv_cache import KVCache, KVDtype, QuantizedKVCache, quantize_vectors


@dataclass(frozen=True)
class Case:
    name: str
    lens: tuple[int, ...] = (1, 17, 40, 200, 64, 77, 65, 130)
    new: tuple[int, ...] = (1, 17, 1, 90, 0, 1, 2, 1)
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    block_size: int = 16
    shared_blocks: int = 0
    """Leading blocks that all sequences have in common; then all of them are one prefix group."""
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    def options(self) -> dict[str, object]:
        generator = torch.Generator().manual_seed(1)
        sinks = torch.randn(self.num_heads, generator=generator) if self.sinks else None
        return {"window_size": self.window, "softcap": self.softcap, "sinks": sinks}


DECODE = {"lens": (100, 333, 64, 500, 1, 128), "new": (1,) * 6}
GROUP = {"lens": (200, 193, 230, 257, 300, 199, 210), "new": (1,) * 7}
PLAIN = (
    Case("ragged"),
    Case("decode", **DECODE),
    Case("prefill", lens=(150, 64, 3), new=(150, 64, 3)),
    Case("one token", lens=(1,), new=(1,), num_heads=1, num_kv_heads=1),
    Case("nothing", lens=(5, 9), new=(0, 0)),
    Case("group of 7", num_heads=7, num_kv_heads=1, head_dim=80),
    Case("head 96", num_heads=4, num_kv_heads=4, head_dim=96),
    Case("head 33", num_heads=6, num_kv_heads=2, head_dim=33, block_size=5),
    Case("head 1", num_heads=2, num_kv_heads=1, head_dim=1),
    Case("head 256", num_heads=2, num_kv_heads=1, head_dim=256, block_size=128),
    Case("group of 71", num_heads=71, num_kv_heads=1),
    Case("window", window=50),
    Case("window of one", window=1),
    Case("softcap", softcap=5.0),
    Case("sinks", sinks=True),
    Case("window, softcap, sinks", window=33, softcap=3.0, sinks=True),
    Case("shared prefix", **GROUP, shared_blocks=12),
    Case("shared prefix within a tile", **GROUP, shared_blocks=9),
    Case("shared prefix below a tile", **GROUP, shared_blocks=3),
    Case("shared prefix, softcap, sinks", **GROUP, shared_blocks=12, softcap=4.0, sinks=True),
    Case("shared prefix, window", **GROUP, shared_blocks=12, window=300),
)
IN_LARGER_BLOCKS = tuple(
    replace(case, name=f"{case.name}, blocks of 32", block_size=32, shared_blocks=case.shared_blocks // 2)
    for case in PLAIN
    if case.head_dim % 32 == 0 and case.block_size < 32
)
"""What an op set may keep in a layout of its own."""
CASES = PLAIN + IN_LARGER_BLOCKS


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    cache: KVCache
    batch: Batch
    poisoned: int = field(default=0)
    """Slots of the cache that hold NaN."""


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> Inputs:
    """q is a strided view of a wider tensor, as layers cut it out of one projection."""
    generator = torch.Generator().manual_seed(seed)
    size = case.block_size
    counts = [-(-length // size) for length in case.lens]
    total = sum(counts) + 2
    ids = torch.randperm(total, generator=generator).tolist()
    tables = torch.full((len(counts), max(counts) + 2), 2**30, dtype=torch.int32)
    shape = (total, case.num_kv_heads, size, case.head_dim)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    written = torch.zeros(total, size, dtype=torch.bool)
    for i, (count, length) in enumerate(zip(counts, case.lens, strict=True)):
        tables[i, :count] = torch.tensor(ids[:count])
        ids = ids[count:]
        if case.shared_blocks:
            tables[i, : case.shared_blocks] = tables[0, : case.shared_blocks]
        slots = torch.arange(length)
        written[tables[i, slots // size].long(), slots % size] = True
    for tensor in (k, v):
        tensor.masked_fill_(~written[:, None, :, None], float("nan"))
    num_tokens, width = sum(case.new), case.num_heads * case.head_dim
    q = torch.randn(num_tokens, width + 5, generator=generator).to(dtype)[:, 3 : 3 + width]
    groups = ()
    if case.shared_blocks:
        groups = (PrefixGroup(torch.arange(len(counts), dtype=torch.int32), case.shared_blocks),)
    batch = Batch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.cat([torch.arange(n - m, n) for n, m in zip(case.lens, case.new, strict=True)]),
        cu_seqlens_q=torch.tensor([0, *itertools.accumulate(case.new)], dtype=torch.int32),
        seq_lens=torch.tensor(case.lens, dtype=torch.int32),
        max_seqlen_q=max(case.new),
        max_seqlen_k=max(case.lens),
        block_tables=tables,
        prefix_groups=groups,
    )
    cache = KVCache(k.to(dtype), v.to(dtype))
    return Inputs(q.unflatten(1, (case.num_heads, case.head_dim)), cache, batch, int((~written).sum()))


def widened(cache: KVCache) -> KVCache:
    return KVCache(cache.k.double(), cache.v.double())


def stored(ops: OpSet, cache: KVCache) -> KVCache:
    """The same in the op set's own layout, NaN included."""
    num_blocks, num_kv_heads, block_size, head_dim = cache.k.shape
    kept = ops.allocate_kv_cache(num_blocks, block_size, num_kv_heads, head_dim, cache.k.dtype, cache.k.device)
    k, v = (t.transpose(1, 2).reshape(-1, num_kv_heads, head_dim) for t in (cache.k, cache.v))
    ops.write_kv(k, v, kept, torch.arange(num_blocks * block_size))
    return kept


def quantized(cache: KVCache, kv_dtype: KVDtype) -> QuantizedKVCache:
    """The same in 8 or 4 bits; what is NaN has codes, and scales of NaN."""
    (k, k_scales), (v, v_scales) = (quantize_vectors(t, kv_dtype) for t in (cache.k, cache.v))
    return QuantizedKVCache(kv_dtype, cache.k.shape[3], k, v, k_scales, v_scales)
