"""Tiny checkpoints whose sizes can be split, and what an engine of any number of ranks makes of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines import discover
from engines.api import EngineConfig, EngineSettings, Request, SamplingParams
from engines.core.engine import LLMEngine
from engines.load import load_engine, make_opset
from engines.models.load import load_model
from engines.parallel import launch
from engines.parallel.follower import Follower
from engines.parallel.group import ALONE, Group
from engines.parallel.place import Place
from tests.parity.checkpoints import make_checkpoint

HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96}),
    "gqa": ("llama", {**HEADS, "intermediate_size": 120}),
    "interleaved": ("internlm2", {**HEADS, "intermediate_size": 120}),
    "packed": ("phi3", {**HEADS, "hidden_size": 192, "intermediate_size": 108}),
    "sandwich": ("gemma3", {**HEADS, "hidden_size": 72}),
    "moe": ("qwen2_moe", {**HEADS, "num_experts": 8, "intermediate_size": 92, "moe_intermediate_size": 28}),
    "stacked": ("gpt_oss", {**HEADS, "num_local_experts": 4}),
    "mla": ("deepseek_v3", {"num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 28}),
}
"""Of each kind of model: the family, and where its tiny_config is not even enough."""
PROMPTS = ((3, 17, 40), tuple(range(1, 90, 2)), (5,), tuple(range(1, 30)), tuple(range(1, 90, 2))[:40], (9, 9, 9, 2))
NUM_TOKENS = 16
Result = list[tuple[list[int], list[float]]]


def make(kind: str, folder: Path) -> Path:
    """A checkpoint with random weights."""
    family, sizes = SIZES[kind]
    make_checkpoint(discover.families()[family].tiny_config() | sizes, folder)
    return folder


def settings(folder: Path, tp: int = 1, ep: int = 1, **changes: Any) -> EngineSettings:
    config = EngineConfig(
        max_model_len=64, block_size=8, kv_cache_bytes=1 << 20, max_num_seqs=4, max_num_batched_tokens=48
    )
    return EngineSettings("cpu", str(folder), "float32", config, tp=tp, ep=ep, **changes)


def requests(adapters: tuple[str | None, ...] = (None,)) -> list[Request]:
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    return [
        Request(i, "generate", prompt, params, adapter=adapters[i % len(adapters)]) for i, prompt in enumerate(PROMPTS)
    ]


def finish(engine: LLMEngine, work: Sequence[Request]) -> Result:
    """(tokens, their log-probabilities) of each request."""
    engine.submit(work)
    outcomes = {}
    while engine.num_unfinished:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            outcomes[outcome.request_id] = outcome
        engine.check_integrity()
    ordered = [outcomes[request.request_id] for request in work]
    return [(o.token_ids, [p.logprob for p in o.logprobs or ()]) for o in ordered]


def in_processes(made: EngineSettings, work: Sequence[Request]) -> Result:
    """By an engine whose first rank is this process."""
    engine = load_engine(made, group=launch.start(made).meet())
    try:
        return finish(engine, work)
    finally:
        engine.close()


def in_threads(made: EngineSettings, work: Sequence[Request]) -> Result:
    """By an engine whose ranks are threads of this process: what they compute, without the processes' start."""
    with threaded(made) as engine:
        return finish(engine, work)


class Threads:
    """Where threads lay down what they tell each other."""

    def __init__(self, count: int) -> None:
        self.laid: list[Tensor] = [torch.empty(0)] * count
        self._barriers: dict[range, threading.Barrier] = {}
        self._lock = threading.Lock()
        self._aborted = False

    def wait(self, ranks: range) -> None:
        """For all of these to come here."""
        with self._lock:
            barrier = self._barriers.setdefault(ranks, threading.Barrier(len(ranks), timeout=60))
            if self._aborted:
                barrier.abort()
        barrier.wait()

    def abort(self) -> None:
        """Nobody waits any more."""
        with self._lock:
            self._aborted = True
            for barrier in self._barriers.values():
                barrier.abort()


class ThreadGroup(Group):
    """A rank that is a thread."""

    def __init__(self, place: Place, threads: Threads, invariant: bool = True) -> None:
        super().__init__(place, invariant)
        self._threads = threads

    def _gathered(self, x: Tensor, ranks: range) -> list[Tensor]:
        self._threads.laid[self.place.rank] = x
        self._threads.wait(ranks)
        parts = [self._threads.laid[rank].clone() for rank in ranks]
        self._threads.wait(ranks)
        return parts

    def _reduced(self, x: Tensor, ranks: range) -> Tensor:
        return torch.stack(self._gathered(x, ranks)).sum(0)

    def _broadcast(self, x: Tensor, ranks: range, patient: bool = False) -> None:
        x.copy_(self._gathered(x, ranks)[0])


@contextmanager
def threaded(made: EngineSettings) -> Iterator[LLMEngine]:
    size = max(made.tp, made.ep)
    threads = Threads(size)
    group = ALONE

    def follow(rank: int) -> None:
        try:
            torch.set_num_threads(1)
            ops = make_opset(made)
            with torch.inference_mode():
                group = ThreadGroup(Place(rank, made.tp, made.ep), threads)
                Follower(load_model(made, ops, group), ops, made, group).follow()
        except threading.BrokenBarrierError:
            pass  # another rank has said why
        except BaseException:
            threads.abort()
            raise

    if size > 1:
        group = ThreadGroup(Place(0, made.tp, made.ep), threads)
    followers = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in range(1, size)]
    for follower in followers:
        follower.start()
    try:
        engine = load_engine(made, group=group)
        yield engine
        engine.close()
    except BaseException:
        threads.abort()
        raise
    finally:
        for follower in followers:
            follower.join(60)
            assert not follower.is_alive()


def same(found: Result, expected: Result) -> None:
    """The same tokens, and log-probabilities as far as float32 sums in another order give them."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-3, atol=1e-3)
