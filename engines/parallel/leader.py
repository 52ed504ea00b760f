"""A model that several ranks hold, as the engine of the first rank sees it: one model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from engines.api import HeldKV
from engines.batch import Batch, PrefixGroup
from engines.models.base import Cache, Model
from engines.models.decoder import Decoder
from engines.parallel.group import Group, GroupError
from engines.parallel.handover import BlockReader, BlockServer, open_store


class Command(IntEnum):
    """The first number of what a leader sends; what follows it."""

    ALLOCATE = 0
    """number of blocks: make the caches, and say with Group.least whether there was memory for them."""
    FORWARD = 1
    """`plan_of` the copies' batches; then their own numbers with Group.share."""
    LOGITS = 2
    """number of rows; then, for the first copy, the hidden states with Group.share_in_copy."""
    LEAVE = 3
    """Nothing: the work is done."""
    SERVE = 4
    """port and key: give blocks of the caches to whoever asks for them there."""
    READ = 5
    """port and key, then the server's blocks and as many of one's own: fill these, and say with Group.least whether
    they came."""
    CAPTURE = 6
    """bytes, then sizes of decode steps as DecodeGraphs has them: capture them in so much memory."""
    REPLAY = 7
    """size, number of unread tokens; then both with Group.share: replay the decode step of that size."""


class LeaderModel:
    """Each call goes to all ranks. Satisfies engines.models.base.Model.

    The scheduler, the sampler and the pooler are the leader's alone; every rank has its part of all caches.
    """

    def __init__(self, model: Model, group: Group) -> None:
        self.spec, self.adapters, self.paged = model.spec, model.adapters, model.paged
        self.vocab_size, self.hidden_size, self.max_model_len = model.vocab_size, model.hidden_size, model.max_model_len
        self.num_cache_layers, self.num_kv_heads = model.num_cache_layers, model.num_kv_heads
        self.head_dim, self.latent_rank = model.head_dim, model.latent_rank
        self.own, self.group = model, group
        """The leader's part of the model; the ranks."""

    def forward(self, batch: Batch, caches: list[Cache]) -> Tensor:
        """Raises GroupError, after which the ranks are out of step."""
        return self.forward_copies([batch], caches)

    def forward_copies(self, batches: Sequence[Batch | None], caches: list[Cache]) -> Tensor:
        """One batch for each copy of the model, None for those that have nothing to do: the hidden states of all, one
        copy after the other. Raises GroupError, after which the ranks are out of step."""
        with together(self.group):
            plan = [numbers_of(batch) if batch is not None else [] for batch in batches]
            self.group.command([Command.FORWARD, *spelled(plan)])
            self.group.share(torch.cat([payload_of(batch) for batch in batches if batch is not None]))
            return step_of_copies(self.own, batches[0], caches, plan, self.group)

    def logits(self, hidden: Tensor) -> Tensor:
        """Raises GroupError, after which the ranks are out of step."""
        with together(self.group):
            self.group.command([Command.LOGITS, len(hidden)])
            return self.own.logits(self.group.share_in_copy(hidden.contiguous()))

    def classify(self, hidden: Tensor) -> Tensor:
        return self.own.classify(hidden)

    def context_key(self, num_prompt_tokens: int, num_tokens: int) -> int:
        return self.own.context_key(num_prompt_tokens, num_tokens)

    def release(self, seq_id: int) -> None:
        self.own.release(seq_id)

    def close(self) -> None:
        self.group.command([Command.LEAVE])
        self.group.leave()


class KVLink:
    """How an engine, of one rank or of several, gives blocks of its caches to another one or gets them from it."""

    def __init__(self, group: Group, caches: Sequence[Cache]) -> None:
        self._group, self._caches = group, caches
        self._reader = BlockReader(group.place.rank, caches)
        self._server: BlockServer | None = None

    def serve(self) -> tuple[int, int]:
        """Give blocks to whoever asks: (port, key) of engines.api.HeldKV."""
        self._store, key = open_store()
        self._server = BlockServer(self._store.port, key, self._group.place.rank, self._caches)
        with together(self._group):
            self._group.command([Command.SERVE, self._store.port, key])
        return self._store.port, key

    def close(self) -> None:
        """Before the engine's ranks leave."""
        self._reader.close()
        if self._server is not None:
            self._server.close()

    def read(self, held: HeldKV, theirs: Sequence[int], mine: Sequence[int]) -> bool:
        """As BlockReader.read, on all ranks. Raises GroupError where one of these has gone."""
        with together(self._group):
            self._group.command([Command.READ, held.port, held.key, *theirs, *mine])
            return bool(self._group.least(int(self._reader.read(held.port, held.key, theirs, mine))))


@contextlib.contextmanager
def together(group: Group) -> Iterator[None]:
    """What fails on one of several ranks cannot be tried again: the others are in the middle of it."""
    try:
        yield
    except Exception as error:
        if group.place.size == 1:
            raise
        raise GroupError(f"{type(error).__name__}: {error}; in a step of several ranks") from error


def step_of_copies(
    model: Model, batch: Batch | None, caches: list[Cache], plan: Sequence[Sequence[int]], group: Group
) -> Tensor:
    """A rank's part of a step: the hidden states of all copies, on the first rank of each; elsewhere its own ones."""
    if batch is not None:
        hidden = model.forward(batch, caches)
    else:
        assert isinstance(model, Decoder)
        hidden = model.assist()
    if len(plan) == 1 or group.place.tp_rank:
        return hidden
    return group.join_copies(hidden, [num_outputs(numbers) for numbers in plan])[0]


def spelled(plan: Sequence[Sequence[int]]) -> list[int]:
    """Lists of numbers as one."""
    return [number for numbers in plan for number in (len(numbers), *numbers)]


def read_plan(numbers: Sequence[int]) -> list[list[int]]:
    """The lists of which these are `spelled`."""
    plan, at = [], 0
    while at < len(numbers):
        plan.append([*numbers[at + 1 : at + 1 + numbers[at]]])
        at += 1 + numbers[at]
    return plan


def num_outputs(numbers: Sequence[int]) -> int:
    """Hidden states that a batch gives, by its `numbers_of`; 0 for no batch."""
    if not numbers:
        return 0
    return numbers[0] if numbers[5] < 0 else numbers[5]


def numbers_of(batch: Batch) -> list[int]:
    """What a follower must know of a batch to receive it."""
    tables, outputs = batch.block_tables, batch.output_indices
    groups = [n for group in batch.prefix_groups for n in (len(group.seqs), group.num_blocks)]
    return [
        batch.num_tokens,
        batch.num_seqs,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        0 if tables is None else tables.shape[1],
        -1 if outputs is None else len(outputs),
        int(batch.adapter_ids is not None),
        int(batch.context_keys is not None),
        *groups,
    ]


def payload_of(batch: Batch) -> Tensor:
    """All tensors of a batch as one, int64, in the order of `batch_of`."""
    fields = (
        batch.token_ids,
        batch.positions,
        batch.slot_mapping,
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.block_tables,
        batch.output_indices,
        batch.adapter_ids,
        batch.context_keys,
        *(group.seqs for group in batch.prefix_groups),
    )
    return torch.cat([field.flatten().long() for field in fields if field is not None])


def payload_sizes(numbers: Sequence[int]) -> list[int]:
    """Of each tensor in the payload; 0 where there is none."""
    tokens, seqs, _, _, width, outputs, adapters, keys, *groups = numbers
    sizes = [tokens, tokens, tokens, seqs + 1, seqs, seqs * width, max(outputs, 0), tokens * adapters, seqs * keys]
    return [*sizes, *groups[::2]]


def batch_of(numbers: Sequence[int], payload: Tensor) -> Batch:
    """The batch of which these are `numbers_of` and `payload_of`."""
    _, _, longest_q, longest_k, width, num_outputs, has_adapters, has_keys, *groups = numbers
    parts = payload.split(payload_sizes(numbers))
    tokens, positions, slots, offsets, lengths, tables, outputs, adapters, keys, *members = parts
    return Batch(
        token_ids=tokens,
        positions=positions,
        cu_seqlens_q=offsets.int(),
        seq_lens=lengths.int(),
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        slot_mapping=slots,
        block_tables=tables.view(-1, width).int(),
        output_indices=None if num_outputs < 0 else outputs,
        prefix_groups=tuple(PrefixGroup(m.int(), n) for m, n in zip(members, groups[1::2], strict=True)),
        adapter_ids=adapters if has_adapters else None,
        context_keys=keys if has_keys else None,
    )
