"""Ragged batches over a paged cache with scattered blocks, without an engine: to run models alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.api import EngineConfig, EngineSettings
from engines.batch import Batch
from engines.models.base import Model
from engines.ops import OpSet

BLOCK_SIZE = 16


@dataclass
class Driver:
    """Feeds sequences to a model in pieces; their blocks lie in a random order and begin filled with NaN."""

    model: Model
    ops: OpSet
    dtype: torch.dtype
    lengths: Sequence[int]
    """The most tokens that each sequence will have."""
    done: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        counts = [-(-length // BLOCK_SIZE) for length in self.lengths]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(5)).to(torch.int32)
        self.tables = torch.full((len(counts), max(counts)), 1 << 30, dtype=torch.int32)
        for i, blocks in enumerate(order.split(counts)):
            self.tables[i, : len(blocks)] = blocks
        shape = (self.model.num_kv_heads, self.model.head_dim, self.dtype, torch.device("cpu"))
        self.caches = [
            self.ops.allocate_kv_cache(sum(counts), BLOCK_SIZE, *shape) for _ in range(self.model.num_cache_layers)
        ]
        for cache in self.caches:
            cache.k.fill_(float("nan"))
            cache.v.fill_(float("nan"))
        self.done = [0] * len(counts)

    def run(self, pieces: dict[int, Tensor], outputs: Tensor | None = None, total: Sequence[int] = ()) -> Tensor:
        """Hidden states of new tokens, by sequence. total: the sequences' whole lengths, for context keys."""
        seqs = sorted(pieces)
        new = [len(pieces[i]) for i in seqs]
        positions = [torch.arange(self.done[i], self.done[i] + len(pieces[i])) for i in seqs]
        blocks = [self.tables[i, p // BLOCK_SIZE].long() for i, p in zip(seqs, positions, strict=True)]
        slots = [b * BLOCK_SIZE + p % BLOCK_SIZE for b, p in zip(blocks, positions, strict=True)]
        for i in seqs:
            self.done[i] += len(pieces[i])
        lengths = torch.tensor([self.done[i] for i in seqs], dtype=torch.int32)
        whole = total or [self.done[i] for i in range(len(self.done))]
        batch = Batch(
            token_ids=torch.cat([pieces[i] for i in seqs]),
            positions=torch.cat(positions),
            cu_seqlens_q=torch.tensor([0, *new], dtype=torch.int32).cumsum(0).to(torch.int32),
            seq_lens=lengths,
            max_seqlen_q=max(new),
            max_seqlen_k=int(lengths.max()),
            slot_mapping=torch.cat(slots),
            block_tables=self.tables[seqs],
            output_indices=outputs,
            seq_ids=tuple(seqs),
            context_keys=torch.tensor([self.model.context_key(whole[i], whole[i]) for i in seqs]),
        )
        with torch.inference_mode():
            return self.model.forward(batch, self.caches)


def settings(folder: Path, dtype: str = "float32", max_model_len: int | None = None, **changes: Any) -> EngineSettings:
    return EngineSettings("cpu", str(folder), dtype, EngineConfig(max_model_len=max_model_len), **changes)
