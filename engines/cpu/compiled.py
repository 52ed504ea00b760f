"""Ops of the compiled library, csrc/cpu: each has the name of the op it stands for. Needs engines.extension.load()."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.batch import Batch, PrefixGroup
from engines.ops import attention as reference
from engines.ops.kv_cache import KVCache


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: Batch,
    softmax_scale: float,
    window_size: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the reference, for float32, float16 and bfloat16; sums in float32 over tiles of keys that lie at fixed
    positions. So a token's bits depend on its own sequence, not on the batch around it.

    Blocks that a prefix group shares are read once for all its members, to the same bits.
    """
    if q.dtype == torch.float64:
        return reference.paged_attention(q, cache, batch, softmax_scale, window_size, softcap, sinks)
    assert batch.block_tables is not None
    result: Tensor = torch.ops.cpu_ops.paged_attention(
        q,
        cache.k,
        cache.v,
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.block_tables,
        *_flat(batch.prefix_groups),
        None if sinks is None else sinks.float(),
        softmax_scale,
        window_size,
        softcap,
    )
    return result


def _flat(groups: tuple[PrefixGroup, ...]) -> tuple[Tensor | None, Tensor | None]:
    """(members end to end, [num_groups, 2] of members and blocks), both int32; None without groups."""
    if not groups:
        return None, None
    shape = [(len(group.seqs), group.num_blocks) for group in groups]
    return torch.cat([group.seqs for group in groups]), torch.tensor(shape, dtype=torch.int32)
