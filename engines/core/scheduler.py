"""Which sequences compute how many tokens in the next step. Knows nothing of tensors.

Sequences that draw tokens go first, one token each; what is left of the token budget goes to prompts, those already
begun before new ones. A prompt may be cut (chunked prefill). When blocks run out the sequence admitted last gives its
own back and is computed again later.

The queue is told the future: each submitted batch is ordered by shared beginnings, then by length of output, so that
texts with a common prefix follow each other and long outputs do not run alone at the end. A sequence waits while
another one is computing the block that it could share.

A step may be chosen while the one before is still in flight: `depart` counts its tokens as computed, and puts UNREAD in
the place of those it draws; `land` makes the blocks known that it has filled.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from engines.api import HeldKV
from engines.core.block_manager import BlockManager
from engines.core.sequence import UNREAD, Sequence

PATIENCE = 8
"""Where admissions are rare, one in so many of the running sequences must have ended since the last were admitted."""
Read = Callable[[HeldKV, Many[int], Many[int]], bool]
"""Fills blocks of this engine, the last ones, with blocks of another, the first ones; whether it did."""
LOOKAHEAD = 256
"""Waiting sequences looked at in one step when the first ones wait for a prefix."""


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A sequence's share of a step: its next num_new_tokens tokens."""

    seq: Sequence
    start: int
    """Tokens computed before."""
    num_new_tokens: int
    completes: bool
    """Whether all tokens are computed after this step."""

    @property
    def end(self) -> int:
        """Tokens computed after it."""
        return self.start + self.num_new_tokens


def share(seq: Sequence, count: int) -> Scheduled:
    """The next `count` tokens of a sequence."""
    return Scheduled(seq, seq.num_computed_tokens, count, count == seq.num_remaining_tokens)


class Scheduler:
    """Queues, block tables and the choice of each step."""

    def __init__(
        self,
        blocks: BlockManager | None,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        prefix_caching: bool,
        chunked: bool,
        context_key: Callable[[int, int], int],
        overlaps: bool = False,
    ) -> None:
        """blocks: None for models without a paged cache. chunked: False where a text must be computed in one piece.
        overlaps: whether steps are chosen while another one is in flight."""
        self.blocks = blocks
        self.block_size = block_size
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefix_caching = prefix_caching and blocks is not None
        self.chunked = chunked
        self.context_key = context_key
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission."""
        self.patient = False
        """Whether sequences are admitted many at a time: for engines whose steps without prompts are much cheaper."""
        self._admit_at = max_num_seqs
        """Running sequences, at most, when `patient` sequences are admitted."""
        self.read: Read = lambda held, theirs, mine: False
        """For engines that others hand over to."""
        self.held: dict[int, list[int]] = {}
        """By request id: blocks of sequences that were handed over, until `release`."""
        self.fetched: list[int] = []
        """Requests handed over to this engine whose blocks elsewhere it needs no more."""
        self.num_unread = 0
        """Of these, those whose blocks could not be read and are computed again."""
        self.num_preemptions = 0
        """Sequences that gave their blocks back because others needed them."""
        width = -(-max_model_len // block_size) if blocks is not None else 0
        # Sequences that end in the step in flight keep their place until it has landed.
        num_slots = self.max_num_seqs * (2 if overlaps else 1)
        self.block_tables = np.zeros((num_slots, width), dtype=np.int32)
        self._slots = list(range(num_slots - 1, -1, -1))
        self._pending: dict[int, Sequence] = {}
        """By digest: full prompt blocks that a running sequence is about to compute."""
        self._awaited: dict[int, list[int]] = {}
        """By id of a waiting sequence: digests of the blocks that it may reuse."""

    @property
    def num_blocks(self) -> int:
        return self.blocks.num_blocks if self.blocks else 0

    @property
    def num_free_blocks(self) -> int:
        return self.blocks.num_free if self.blocks else 0

    def add(self, seqs: Iterable[Sequence]) -> None:
        ordered = self._ordered(list(seqs))
        for seq in ordered:
            self._expect(seq, seq.reusable_tokens)
        self.waiting.extend(ordered)

    def give_up(self) -> Sequence:
        """The first that waits, which does so no more."""
        seq = self.waiting.popleft()
        self._expect_no_more(seq)
        return seq

    def _expect(self, seq: Sequence, num_tokens: int) -> None:
        """The sequence will wait; what it may reuse are its first num_tokens."""
        if self.prefix_caching:
            assert self.blocks is not None
            self._awaited[seq.seq_id] = [seq.digest(i, self.block_size) for i in range(num_tokens // self.block_size)]
            self.blocks.expect(self._awaited[seq.seq_id])

    def _expect_no_more(self, seq: Sequence) -> None:
        if self.prefix_caching:
            assert self.blocks is not None
            self.blocks.expect_no_more(self._awaited.pop(seq.seq_id))

    def _ordered(self, seqs: list[Sequence]) -> list[Sequence]:
        """Groups with a common first block together, the group with the longest outputs first."""
        if self.blocks is None and not self.chunked:
            return sorted(seqs, key=lambda s: s.num_tokens)
        first = {s.seq_id: tuple(s.token_ids[: self.block_size]) for s in seqs}
        size = Counter(first.values())
        longest: dict[tuple[int, ...], int] = {}
        for s in seqs:
            key = first[s.seq_id]
            longest[key] = max(longest.get(key, 0), s.max_num_tokens)
        shared = [s for s in seqs if size[first[s.seq_id]] > 1]
        alone = [s for s in seqs if size[first[s.seq_id]] == 1]
        shared.sort(key=lambda s: (-longest[first[s.seq_id]], s.token_ids, -s.max_num_tokens))
        alone.sort(key=lambda s: -(s.max_num_tokens - s.num_tokens))
        return shared + alone

    def needs_tokens(self) -> bool:
        """Whether those in flight must be known before the next step: a sequence would give way, and what it is
        computed from again is its text."""
        growing = 0
        for seq in self.running:
            if seq.num_remaining_tokens != 1 or seq.waits_for_end:
                continue
            if self.context_key(seq.num_prompt_tokens, seq.num_tokens) != seq.context_key:
                return True
            growing += seq.num_tokens > seq.num_blocks * self.block_size
        return self.blocks is not None and growing > self.blocks.num_free

    def schedule(self) -> list[Scheduled]:
        """The next step; empty when nothing can be computed. Blocks for it are allocated.

        With a step in flight: only where needs_tokens() is False.
        """
        budget = self.max_num_batched_tokens
        scheduled: list[Scheduled] = []
        for seq in list(self.running):
            if seq.slot < 0 or seq.waits_for_end or not self._same_context(seq):
                continue
            if seq.num_remaining_tokens == 1 and budget and self._grow(seq):
                scheduled.append(share(seq, 1))
                budget -= 1
        scheduled = [s for s in scheduled if s.seq.slot >= 0]
        for seq in self.running:
            if budget and seq.num_remaining_tokens > 1:
                count = min(seq.num_remaining_tokens, budget)
                scheduled.append(share(seq, count))
                budget -= count
        return scheduled + self._admit(budget)

    def _admit(self, budget: int) -> list[Scheduled]:
        """Start waiting sequences while there is room for them."""
        admitted: list[Scheduled] = []
        skipped: list[Sequence] = []
        active = sum(seq.num_remaining_tokens > 0 and not seq.waits_for_end for seq in self.running)
        if self.patient and active > self._admit_at:
            return admitted
        room, full = self.max_num_seqs - active, False
        while self.waiting and budget > 0 and len(admitted) < room and self._slots and len(skipped) < LOOKAHEAD:
            seq = self.waiting.popleft()
            if not self.chunked and seq.num_tokens > budget and (admitted or self.running):
                skipped.append(seq)
                break
            reused = self._reusable(seq)
            if reused is None:
                skipped.append(seq)
                continue
            if not self._place(seq, reused):
                skipped.append(seq)
                full = True
                break
            count = min(seq.num_remaining_tokens, budget) if self.chunked else seq.num_remaining_tokens
            admitted.append(share(seq, count))
            budget -= count
        self.waiting.extendleft(reversed(skipped))
        active += len(admitted)
        # What stopped for the step's tokens or for a prefix goes on in the next one; what did for room waits for more.
        full = full or len(admitted) >= room or not self._slots
        self._admit_at = active - active // PATIENCE if full else self.max_num_seqs
        return admitted

    def _reusable(self, seq: Sequence) -> list[int] | None:
        """Known blocks that the sequence's text begins with; None: better wait for one that is being computed."""
        key = self.context_key(seq.num_prompt_tokens, seq.num_tokens)
        if key != seq.context_key:
            seq.context_key, seq.digests = key, []
        found: list[int] = []
        if not self.prefix_caching:
            return found
        assert self.blocks is not None
        # The last token is always computed: its hidden state is what the next one is drawn from.
        limit = seq.num_tokens - 1 if seq.num_output_tokens else seq.reusable_tokens
        for index in range(limit // self.block_size):
            digest = seq.digest(index, self.block_size)
            block = self.blocks.find(digest)
            if block is None:
                return None if digest in self._pending else found
            found.append(block)
        return found

    def _place(self, seq: Sequence, reused: list[int]) -> bool:
        """Give the sequence a slot and blocks for all its tokens, or nothing and False."""
        if self.blocks is not None:
            needed = -(-seq.num_tokens // self.block_size) - len(reused)
            taken = sum(self.blocks.is_free(block) for block in reused)
            # One spare block for each running sequence keeps admission from causing preemption at once.
            if needed + taken + min(len(self.running), self.blocks.num_blocks // 8) > self.blocks.num_free:
                return False
            for block in reused:
                self.blocks.share(block)
            self._expect_no_more(seq)
            seq.slot = self._slots.pop()
            row = reused + [self.blocks.allocate() for _ in range(needed)]
            self.block_tables[seq.slot, : len(row)] = row
            seq.num_blocks = len(row)
            seq.num_registered_blocks = len(reused)
            seq.num_computed_tokens = len(reused) * self.block_size
            if not seq.admissions:
                seq.num_cached_tokens = seq.num_computed_tokens
            if seq.held is not None:
                self._read_held(seq, seq.held)
            if self.prefix_caching:
                for index in range(len(reused), seq.num_tokens // self.block_size):
                    self._pending.setdefault(seq.digest(index, self.block_size), seq)
        else:
            seq.slot = self._slots.pop()
        seq.admissions += 1
        self.running.append(seq)
        return True

    def _read_held(self, seq: Sequence, held: HeldKV) -> None:
        """Have what was computed elsewhere, besides what is known here, or else compute it again."""
        known, count = seq.num_registered_blocks, len(held.blocks)
        theirs, mine = held.blocks[known:], self.block_tables[seq.slot, known:count].tolist()
        holds = held.context_key == seq.context_key
        if holds and (not theirs or self.read(held, theirs, mine)):
            seq.num_computed_tokens = seq.num_tokens - 1
        elif holds:
            self.num_unread += 1
        self.fetched.append(seq.request.request_id)
        seq.held = None

    def _same_context(self, seq: Sequence) -> bool:
        """False if the keys and values computed so far no longer hold: the sequence goes back to the queue."""
        if self.context_key(seq.num_prompt_tokens, seq.num_tokens) == seq.context_key:
            return True
        self._preempt(seq)
        return False

    def _grow(self, seq: Sequence) -> bool:
        """Make sure that the last token has a place in the cache; False if the sequence itself had to give way."""
        if self.blocks is None or seq.num_tokens <= seq.num_blocks * self.block_size:
            return True
        while not self.blocks.num_free:
            last = self.running[-1]
            self._preempt(last)
            self.num_preemptions += 1
            if last is seq:
                return False
        self.block_tables[seq.slot, seq.num_blocks] = self.blocks.allocate()
        seq.num_blocks += 1
        return True

    def _preempt(self, seq: Sequence) -> None:
        assert seq.unread_row < 0, "a sequence with a token in flight has no text to begin again from"
        # Before its blocks are free: they are kept for it.
        self._expect(seq, seq.num_registered_blocks * self.block_size)
        self.remove(seq)
        seq.num_computed_tokens = 0
        seq.values.clear()
        seq.pooled = None
        self.waiting.appendleft(seq)

    def depart(self, step: Scheduled, unread_row: int) -> None:
        """The step was given to the device. unread_row: of the token that it draws for this sequence; -1: none."""
        seq = step.seq
        seq.num_computed_tokens += step.num_new_tokens
        if unread_row >= 0:
            seq.token_ids.append(UNREAD)
            seq.unread_row = unread_row

    def land(self, step: Scheduled) -> None:
        """The step has run: take UNREAD away, and make the blocks that became full known."""
        seq = step.seq
        if seq.unread_row >= 0:
            seq.token_ids.pop()
            seq.unread_row = -1
        if self.prefix_caching:
            assert self.blocks is not None
            for index in range(seq.num_registered_blocks, step.end // self.block_size):
                digest = seq.digest(index, self.block_size)
                self.blocks.register(int(self.block_tables[seq.slot, index]), digest)
                if self._pending.get(digest) is seq:
                    del self._pending[digest]
            seq.num_registered_blocks = max(seq.num_registered_blocks, step.end // self.block_size)

    def remove(self, seq: Sequence) -> None:
        """Take a running sequence out and free what it holds."""
        self.running.remove(seq)
        if self.blocks is not None:
            self.blocks.release(self.owned(seq))
            for digest in seq.digests[seq.num_registered_blocks :]:
                if self._pending.get(digest) is seq:
                    del self._pending[digest]
        self._slots.append(seq.slot)
        seq.slot, seq.num_blocks, seq.num_registered_blocks = -1, 0, 0

    def hand_over(self, seq: Sequence) -> list[int]:
        """Take a running sequence out; the blocks that hold its tokens, kept until `release`."""
        blocks = self.held[seq.request.request_id] = self.owned(seq)
        seq.num_blocks = 0
        self.remove(seq)
        return blocks

    def release(self, request_ids: Iterable[int]) -> None:
        """Free what was kept for these."""
        for request_id in request_ids:
            if self.blocks is not None:
                self.blocks.release(self.held.pop(request_id, ()))

    def owned(self, seq: Sequence) -> list[int]:
        return self.block_tables[seq.slot, : seq.num_blocks].tolist()

    def shrink(self) -> bool:
        """After memory ran out: halve the step. False if it cannot get smaller."""
        if self.max_num_batched_tokens == 1:
            return False
        self.max_num_batched_tokens = max(1, self.max_num_batched_tokens // 2)
        self.max_num_seqs = max(1, min(self.max_num_seqs // 2, self.max_num_batched_tokens))
        while len(self.running) > self.max_num_seqs:
            self._preempt(self.running[-1])
        return True

    def check_integrity(self) -> None:
        """Raises AssertionError unless queues, slots and blocks agree."""
        slots = [seq.slot for seq in self.running]
        assert sorted(slots + self._slots) == list(range(len(self.block_tables))), "slots are lost or doubly used"
        if self.blocks is not None:
            waiting = [self._awaited[seq.seq_id] for seq in self.waiting] if self.prefix_caching else []
            self.blocks.check_integrity([*map(self.owned, self.running), *self.held.values()], waiting)
            for seq in self.running:
                assert seq.num_computed_tokens <= seq.num_blocks * self.block_size, "computed tokens without a block"
        running = {id(seq) for seq in self.running}
        assert all(id(seq) in running for seq in self._pending.values()), "a pending block has no owner"
