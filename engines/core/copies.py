"""Copies of a model that share their experts, and so compute every step together: a scheduler each, as one.

A sequence stays with the copy that it was given to, which has its blocks. A copy may have nothing to do in a step; its
ranks take part in it all the same, for the experts that they hold.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many
from itertools import chain

import numpy as np

from engines.core.scheduler import Read, Scheduled, Scheduler
from engines.core.sequence import Sequence


class CopyScheduler:
    """What LLMEngine asks of a Scheduler, of several."""

    def __init__(self, schedulers: Many[Scheduler]) -> None:
        self._each = schedulers
        self._load = [0] * len(schedulers)
        """Tokens that the copies' sequences have and may get."""
        self.block_size = schedulers[0].block_size
        self.patient = False
        # Nothing is handed over to or from such an engine.
        self.read: Read = lambda held, theirs, mine: False
        self.held: dict[int, list[int]] = {}
        self.fetched: list[int] = []
        self.num_unread = 0

    @property
    def waiting(self) -> list[Sequence]:
        return [*chain.from_iterable(each.waiting for each in self._each)]

    @property
    def running(self) -> list[Sequence]:
        return [*chain.from_iterable(each.running for each in self._each)]

    @property
    def block_tables(self) -> list[np.ndarray]:
        """Of each copy, by slot."""
        return [each.block_tables for each in self._each]

    @property
    def num_preemptions(self) -> int:
        return sum(each.num_preemptions for each in self._each)

    @property
    def num_free_blocks(self) -> int:
        return sum(each.num_free_blocks for each in self._each)

    @property
    def num_blocks(self) -> int:
        return sum(each.num_blocks for each in self._each)

    @property
    def max_num_seqs(self) -> int:
        return self._each[0].max_num_seqs

    @property
    def max_num_batched_tokens(self) -> int:
        return self._each[0].max_num_batched_tokens

    def add(self, seqs: Iterable[Sequence]) -> None:
        """Each to the copy with the fewest tokens to do."""
        shares: list[list[Sequence]] = [[] for _ in self._each]
        for seq in seqs:
            seq.copy = self._load.index(min(self._load))
            self._load[seq.copy] += seq.max_num_tokens
            shares[seq.copy].append(seq)
        for each, share in zip(self._each, shares, strict=True):
            each.add(share)

    def give_up(self) -> Sequence:
        seq = next(each for each in self._each if each.waiting).give_up()
        self._load[seq.copy] -= seq.max_num_tokens
        return seq

    def needs_tokens(self) -> bool:
        return any(each.needs_tokens() for each in self._each)

    def schedule(self) -> list[Scheduled]:
        """The next step of all copies, one copy after the other."""
        return [*chain.from_iterable(each.schedule() for each in self._each)]

    def depart(self, step: Scheduled, unread_row: int) -> None:
        self._each[step.seq.copy].depart(step, unread_row)

    def land(self, step: Scheduled) -> None:
        self._each[step.seq.copy].land(step)

    def remove(self, seq: Sequence) -> None:
        self._each[seq.copy].remove(seq)
        self._load[seq.copy] -= seq.max_num_tokens

    def hand_over(self, seq: Sequence) -> list[int]:
        raise AssertionError("copies that share experts hand nothing over")

    def release(self, request_ids: Iterable[int]) -> None:
        """Nothing is held."""

    def shrink(self) -> bool:
        shrunk = [each.shrink() for each in self._each]
        return all(shrunk)

    def check_integrity(self) -> None:
        """Raises AssertionError unless each copy's books agree."""
        for each in self._each:
            each.check_integrity()
