"""Decode steps captured once and replayed: one launch a step in place of one a kernel.

Captured is the model on one new token for each sequence, from look-up to logits, at a ladder of batch sizes. A step is
padded to the next size; rows that are padding write to a block of the cache that belongs to nobody. Where several ranks
hold the model, each captures its own part, sums between them included, and all replay the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engines.api import EngineConfig, GPUConfig
from engines.batch import Batch
from engines.core.device import Device, let_go, out_of_memory, unpack
from engines.core.scheduler import Scheduled
from engines.core.sequence import UNREAD
from engines.models.base import Cache, Model
from engines.parallel.group import ALONE, Group
from engines.parallel.leader import Command, LeaderModel, together

_IMPOSSIBLE, _FULL, _MADE = range(3)
"""What came of a size on a rank."""


def ladder(most: int) -> list[int]:
    """Batch sizes to capture, ascending: powers of two and one between each two, so that padding is a third at most."""
    sizes = {size for k in range(most.bit_length()) for size in (1 << k, 3 << k) if size < most}
    return sorted({*sizes, most})


def is_decode(step: Many[Scheduled]) -> bool:
    """Whether a captured graph computes it: one new token for each sequence, and a token to be drawn after it."""
    return all(s.num_new_tokens == 1 and s.completes and s.seq.request.kind == "generate" for s in step)


def may_capture(model: Model, config: EngineConfig, device: Device, group: Group = ALONE) -> bool:
    """Whether steps can be captured at all; caches have a block for padding then. The same on every rank. Copies that
    share experts have no captured steps: how many rows each has changes from step to step."""
    group = model.group if isinstance(model, LeaderModel) else group
    if group.place.num_copies > 1:
        return False
    wanted = isinstance(config, GPUConfig) and config.decode_graphs and device.overlaps and device.captures
    return wanted and model.paged and model.num_cache_layers > 0


@dataclass(frozen=True)
class Captured:
    """One batch size."""

    packed: Tensor
    """The step's arrays on the device, at an address that the graph knows."""
    replay: Callable[[], None]
    logits: Tensor
    """[size, vocab_size], written by each replay"""


class DecodeGraphs:
    """The graphs of a model, and the steps that they are replayed for."""

    def __init__(
        self,
        model: Model,
        caches: list[Cache],
        device: Device,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        scratch_block: int,
        group: Group = ALONE,
    ) -> None:
        """scratch_block: of the caches, for rows that are padding. group: the ranks, of which the caller leads unless
        it was told to `capture_part`."""
        self.model, self.group = (model.own, model.group) if isinstance(model, LeaderModel) else (model, group)
        self.caches = caches
        self.device = device
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.scratch_block = scratch_block
        self.width = -(-max_model_len // block_size)
        self._graphs: dict[int, Captured] = {}
        self._unread = torch.zeros(max_num_seqs, dtype=torch.int64, device=device.place)
        self._offsets = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device.place)

    @property
    def sizes(self) -> list[int]:
        """Captured batch sizes, ascending."""
        return sorted(self._graphs)

    def capture(self, budget_bytes: int) -> str | None:
        """Capture the ladder, the largest size first, in so much memory; why some of it is missing, in a sentence."""
        sizes = (self.block_size, self.max_model_len, self.max_num_seqs, self.scratch_block)
        self.group.command([Command.CAPTURE, budget_bytes, *sizes])
        with together(self.group):
            return self.capture_part(budget_bytes)

    def capture_part(self, budget_bytes: int) -> str | None:
        """What `capture` does on every rank: a size is captured on all of them or on none."""
        before = self.device.free_bytes()
        wanted = ladder(self.max_num_seqs)
        for size in reversed(wanted):
            used = -self.group.least(self.device.free_bytes() - before)  # the most that one of the ranks has used
            if used > budget_bytes:
                return (
                    f"decode steps of fewer than {self.sizes[0]} sequences are padded to that: {len(self._graphs)} of "
                    f"{len(wanted)} graphs took {used:,} bytes of the {budget_bytes:,} for them"
                )
            failure = None
            try:
                self._graphs[size] = self._capture(size)
            except Exception as error:
                failure = let_go(error)
            worst = _MADE if failure is None else _FULL if out_of_memory(failure) else _IMPOSSIBLE
            worst = self.group.least(worst)
            if worst == _MADE:
                continue
            self._graphs.pop(size, None)
            self.device.empty_cache()
            if worst == _IMPOSSIBLE:
                self._graphs.clear()
                why = "on another rank" if failure is None else first_line(failure)
                return f"decode steps are launched kernel by kernel: they cannot be captured ({why})"
        if not self._graphs:
            return "decode steps are launched kernel by kernel: there is no memory to capture them"
        return None

    def _capture(self, size: int) -> Captured:
        """Runs the step twice before: kernels are compiled, then whatever waits for the device is found out."""
        arrays = self._arrays([], np.zeros((0, self.width), dtype=np.int32), size)
        packed = self.device.pack(arrays).to(self.device.place, copy=True)
        inputs = unpack(packed, arrays)

        def call() -> Tensor:
            return self._forward(inputs, size)

        call()
        with self.device.waiting_forbidden():
            call()
        replay, logits = self.device.capture(call)
        return Captured(packed, replay, logits)

    def _forward(self, inputs: list[Tensor], size: int) -> Tensor:
        token_ids, positions, slots, rows, adapter_ids, keys, seq_lens, tables = inputs
        batch = Batch(
            token_ids=torch.where(rows >= 0, self._unread[rows.clamp(min=0)], token_ids),
            positions=positions,
            cu_seqlens_q=self._offsets[: size + 1],
            seq_lens=seq_lens,
            max_seqlen_q=1,
            max_seqlen_k=self.max_model_len,
            slot_mapping=slots,
            block_tables=tables,
            adapter_ids=adapter_ids if self.model.adapters else None,
            context_keys=keys,
        )
        return self.model.logits(self.model.forward(batch, self.caches))

    def replay(self, step: Many[Scheduled], block_tables: np.ndarray, unread: Tensor | None) -> Tensor | None:
        """Logits of a decode step, [len(step), vocab_size], until the next replay; None where no size is large enough.

        block_tables: the scheduler's, by slot. unread: the tokens that the step in flight draws.
        """
        size = next((size for size in self.sizes if size >= len(step)), None)
        if size is None:
            return None
        tables = block_tables[[s.seq.slot for s in step], : self.width]
        packed = self.device.pack(self._arrays(step, tables, size))
        self._graphs[size].packed.copy_(packed, non_blocking=True)
        if unread is not None:
            self._unread[: len(unread)].copy_(unread)
        num_unread = 0 if unread is None else len(unread)
        with together(self.group):
            self.group.command([Command.REPLAY, size, num_unread])
            return self.replay_part(size, num_unread)[: len(step)]

    def replay_part(self, size: int, num_unread: int) -> Tensor:
        """What `replay` does on every rank, once the leader has what is computed: logits, [size, vocab_size]."""
        graph = self._graphs[size]
        self.group.share(graph.packed)
        if num_unread:
            self.group.share(self._unread[:num_unread])
        graph.replay()
        return graph.logits

    def _arrays(self, step: Many[Scheduled], tables: np.ndarray, size: int) -> list[np.ndarray]:
        """What the graph reads, in the order of `_forward`. tables: [len(step), width], the sequences' block tables."""
        count, scratch = len(step), self.scratch_block
        longs = np.zeros((6, size), dtype=np.int64)
        token_ids, positions, slots, rows, adapter_ids, keys = longs
        lengths = np.ones(size, dtype=np.int32)
        blocks = np.full((size, self.width), scratch, dtype=np.int32)
        slots[count:], rows[:], adapter_ids[:] = scratch * self.block_size, -1, -1
        if count:
            ids = np.array([s.seq.token_ids[s.start] for s in step], dtype=np.int64)
            token_ids[:count] = np.maximum(ids, 0)
            rows[:count] = np.where(ids == UNREAD, [s.seq.unread_row for s in step], -1)
            positions[:count] = at = np.array([s.start for s in step], dtype=np.int64)
            lengths[:count] = at + 1
            blocks[:count] = tables
            slots[:count] = tables[np.arange(count), at // self.block_size].astype(np.int64) * self.block_size
            slots[:count] += at % self.block_size
            adapter_ids[:count] = [s.seq.adapter_id for s in step]
            keys[:count] = [s.seq.context_key for s in step]
        return [*longs, lengths, blocks]


def first_line(error: Exception) -> str:
    """What an error says, short enough for a note."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
