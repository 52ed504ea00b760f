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
from engines.core.model_runner import allocate_caches
from engines.models.base import Model
from engines.ops import OpSet
from engines.ops.kv_cache import KVCache

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
        where = (self.dtype, torch.device("cpu"))
        self.caches = allocate_caches(self.model, self.ops, sum(counts), BLOCK_SIZE, *where)
        for cache in self.caches:
            for tensor in (cache.k, cache.v) if isinstance(cache, KVCache) else (cache.data,):
                tensor.fill_(float("nan"))
        self.done = [0] * len(counts)

    def run(
        self, pieces: dict[int, Tensor], outputs: Tensor | None = None, keys: Sequence[int] | None = None
    ) -> Tensor:
        """Hidden states of new tokens, by sequence. keys: all sequences' context keys; without, those of prompts that
        end here."""
        seqs = sorted(pieces)
        new = [len(pieces[i]) for i in seqs]
        positions = [torch.arange(self.done[i], self.done[i] + len(pieces[i])) for i in seqs]
        blocks = [self.tables[i, p // BLOCK_SIZE].long() for i, p in zip(seqs, positions, strict=True)]
        slots = [b * BLOCK_SIZE + p % BLOCK_SIZE for b, p in zip(blocks, positions, strict=True)]
        for i in seqs:
            self.done[i] += len(pieces[i])
        lengths = torch.tensor([self.done[i] for i in seqs], dtype=torch.int32)
        if keys is None:
            keys = [self.model.context_key(done, done) for done in self.done]
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
            context_keys=torch.tensor([keys[i] for i in seqs]),
        )
        with torch.inference_mode():
            return self.model.forward(batch, self.caches)


def greedy(model: Model, ops: OpSet, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """The most likely tokens, all prompts in one batch; a sequence starts again when its context key changes."""
    driver = Driver(model, ops, torch.float32, [len(prompt) + num_tokens for prompt in prompts])
    texts, keys = [list(prompt) for prompt in prompts], [0] * len(prompts)
    for _ in range(num_tokens):
        for i, text in enumerate(texts):
            key = model.context_key(len(prompts[i]), len(text))
            if key != keys[i]:
                keys[i], driver.done[i] = key, 0
        pieces = {i: torch.tensor(text[driver.done[i] :]) for i, text in enumerate(texts)}
        ends = torch.tensor([len(piece) for piece in pieces.values()]).cumsum(0) - 1
        with torch.inference_mode():
            best = model.logits(driver.run(pieces, ends, keys)).argmax(-1).tolist()
        for text, token in zip(texts, best, strict=True):
            text.append(token)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def settings(folder: Path, dtype: str = "float32", max_model_len: int | None = None, **changes: Any) -> EngineSettings:
    return EngineSettings("cpu", str(folder), dtype, EngineConfig(max_model_len=max_model_len), **changes)
