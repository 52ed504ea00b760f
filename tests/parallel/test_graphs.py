"""Decode steps of several ranks: captured on all of them or on none, replayed together, with the tokens of one rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engines import load
from engines.api import EngineSettings, GPUConfig
from engines.batch import Batch
from engines.core.engine import LLMEngine
from engines.ops.kv_cache import KVCache
from engines.parallel import follower
from engines.parallel.follower import Follower
from engines.parallel.group import Group
from engines.parallel.place import Place
from tests.engines.core.test_engine import generate, prompts
from tests.engines.core.test_graphs import finish
from tests.engines.core.tiny import DIM, HEADS, VOCAB, Late, MaskedOps, TinyModel
from tests.parallel.cases import ThreadGroup, Threads

RANKS = 2
CONFIG = GPUConfig(block_size=4, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=96, kv_cache_bytes=1 << 17)
SETTINGS = EngineSettings("cpu", "nowhere", "float32", CONFIG, tp=RANKS)
MEETINGS: dict[int, Threads] = {}
"""By number: an op's arguments are tensors and numbers."""


torch.library.define("tests_parallel::gather", "(Tensor x, int rank, int meeting) -> Tensor")


@torch.library.impl("tests_parallel::gather", "CPU")
def gather(x: Tensor, rank: int, meeting: int) -> Tensor:
    """The ranks' x, [ranks, ...]; an op, as a captured step keeps nothing else."""
    group = ThreadGroup(Place(rank, RANKS), MEETINGS[meeting])
    return torch.stack(ThreadGroup._gathered(group, x, range(RANKS)))


class Ranks(ThreadGroup):
    """Threads whose sums can be captured."""

    def _gathered(self, x: Tensor, ranks: range) -> list[Tensor]:
        return list(torch.ops.tests_parallel.gather(x, self.place.rank, id(self._threads)))


class SplitModel(TinyModel):
    """A head of attention and a part of the vocabulary on each rank."""

    num_kv_heads = HEADS // RANKS

    def __init__(self, group: Group, poison: int | None = None) -> None:
        super().__init__(poison=poison)
        self.group, self.ops = group, MaskedOps()
        self.columns = group.place.split(HEADS * DIM)

    def forward(self, batch: Batch, caches: list[KVCache]) -> Tensor:
        if self.poison is not None and bool((batch.token_ids == self.poison).any()):
            raise RuntimeError("poison")
        own = slice(self.columns.start, self.columns.stop)
        x = self.embedding[batch.token_ids] + self.position[batch.positions]
        q, k, v = (part[:, own].unflatten(1, (-1, DIM)) for part in (x @ self.qkv).chunk(3, dim=1))
        assert batch.slot_mapping is not None
        self.ops.write_kv(k, v, caches[0], batch.slot_mapping)
        part = self.ops.paged_attention(q, caches[0], batch, DIM**-0.5).flatten(1)
        before, after = self.columns.start, HEADS * DIM - self.columns.stop
        x = x + self.group.sum(torch.nn.functional.pad(part, (before, after)))
        return x if batch.output_indices is None else x[batch.output_indices]

    def logits(self, hidden: Tensor) -> Tensor:
        part = self.group.place.split(VOCAB)
        return self.group.join_columns(hidden @ self.head[:, part.start : part.stop], VOCAB)


class Devices:
    """A stand-in for each thread."""

    def __init__(self, change: Callable[[Late, bool], None]) -> None:
        self.leader: Late | None = None
        self.followers: list[Late] = []
        self._change = change

    def make(self, place: torch.device) -> Late:
        made, leads = Late(), threading.current_thread() is threading.main_thread()
        made.can_capture = True
        self._change(made, leads)
        if leads:
            self.leader = made
        else:
            self.followers.append(made)
        return made


@contextmanager
def ranks(
    monkeypatch: pytest.MonkeyPatch,
    settings: EngineSettings = SETTINGS,
    change: Callable[[Late, bool], None] = lambda device, leads: None,
    **model: Any,
) -> Iterator[tuple[LLMEngine, Devices]]:
    """An engine of two threads on stand-ins for accelerators."""
    devices, threads = Devices(change), Threads(RANKS)
    MEETINGS[id(threads)] = threads
    for module in (load, follower):
        monkeypatch.setattr(module, "Device", devices.make)
        monkeypatch.setattr(module, "DTYPES", {"float32": torch.float64})
    monkeypatch.setattr(load, "load_model", lambda settings, ops, group: SplitModel(group, **model))
    monkeypatch.setattr(load, "import_opset", lambda backend: MaskedOps)
    monkeypatch.setattr(load.costs, "kv_vector_bytes", lambda head_dim, dtype, kv_dtype: 4 * head_dim)
    failures: list[BaseException] = []

    def follow() -> None:
        group = Ranks(Place(1, RANKS), threads)
        try:
            with torch.inference_mode():
                Follower(SplitModel(group, **model), MaskedOps(), settings, group).follow()
        except BaseException as error:
            failures.append(error)
            threads.abort()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        engine = load.load_engine(settings, group=Ranks(Place(0, RANKS), threads))
        yield engine, devices
        engine.close()
    finally:
        if failures:
            threads.abort()
        thread.join(60)
        del MEETINGS[id(threads)]
    assert not failures, failures
    assert not thread.is_alive()


def check_tokens(engine: LLMEngine) -> None:
    texts = prompts(9)
    outcomes = finish(engine, [generate(i, p) for i, p in enumerate(texts)])
    whole = TinyModel()
    assert {i: o.token_ids for i, o in outcomes.items()} == {i: whole.greedy(p, 12) for i, p in enumerate(texts)}


def test_the_ranks_replay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks(monkeypatch) as (engine, devices):
        assert not engine.notes
        check_tokens(engine)
        assert engine.runner.graphs is not None and engine.runner.graphs.sizes == [1, 2, 3, 4]
        (other,), leader = devices.followers, devices.leader
    assert leader is not None
    assert leader.num_captured == other.num_captured == 4
    assert leader.num_replayed == other.num_replayed > 20


def test_a_rank_without_memory_leaves_sizes_out_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(device: Late, leads: bool) -> None:
        device.graph_bytes = 0 if leads else 400 << 20

    with ranks(monkeypatch, change=change) as (engine, _):
        assert engine.runner.graphs is not None and engine.runner.graphs.sizes == [2, 3, 4]
        assert engine.notes[0].startswith("decode steps of fewer than 2 sequences are padded to that: 3 of 4 graphs")
        check_tokens(engine)


@pytest.mark.parametrize("leader_fails", (True, False))
def test_a_rank_that_cannot_capture_keeps_all_from_it(monkeypatch: pytest.MonkeyPatch, leader_fails: bool) -> None:
    class Fails(Late):
        def capture(self, call):  # type: ignore[no-untyped-def]
            super().capture(call)
            raise RuntimeError("no graphs here")

    def change(device: Late, leads: bool) -> None:
        if leads is leader_fails:
            device.__class__ = Fails

    with ranks(monkeypatch, change=change) as (engine, _):
        assert engine.runner.graphs is not None and not engine.runner.graphs.sizes
        why = "RuntimeError: no graphs here" if leader_fails else "on another rank"
        assert engine.notes == [f"decode steps are launched kernel by kernel: they cannot be captured ({why})"]
        check_tokens(engine)


def test_steps_that_are_not_to_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, config=replace(CONFIG, decode_graphs=False))
    with ranks(monkeypatch, settings) as (engine, _):
        assert engine.runner.graphs is None and not engine.notes
        check_tokens(engine)
