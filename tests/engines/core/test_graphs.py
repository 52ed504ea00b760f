"""Decode steps that are captured once and replayed, on a stand-in that keeps the operations and forgets the Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines.api import Outcome, Request
from engines.core import scheduler
from engines.core.engine import LLMEngine
from engines.core.graphs import ladder
from tests.engines.core.test_engine import generate, prompts
from tests.engines.core.tiny import Late, MaskedOps, TinyModel, make_engine

MODEL = TinyModel()


def captured(
    model: TinyModel | None = None, budget: int = 1 << 40, device: Late | None = None, **options: object
) -> tuple[LLMEngine, Late]:
    """An engine with captured steps of up to four sequences; what no step has written is not a number."""
    model, device = model or TinyModel(), device or Late()
    device.can_capture = True
    model.ops = MaskedOps()
    engine = make_engine(model, device=device, **{"max_num_seqs": 4, **options})  # type: ignore[arg-type]
    for cache in engine.runner.caches:
        cache.k.fill_(math.nan)
        cache.v.fill_(math.nan)
    engine.capture(budget)
    return engine, device


def finish(engine: LLMEngine, requests: list[Request]) -> dict[int, Outcome]:
    engine.submit(requests)
    outcomes: dict[int, Outcome] = {}
    while engine.num_unfinished:
        outcomes |= {o.request_id: o for o in engine.step()}
        engine.check_integrity()
    return outcomes


def test_the_ladder() -> None:
    assert ladder(1) == [1]
    assert ladder(5) == [1, 2, 3, 4, 5]
    assert ladder(256) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for most in range(1, 300):
        sizes = ladder(most)
        assert sizes[-1] == most and sizes == sorted(set(sizes))
        assert all(next(size for size in sizes if size >= n) <= max(n + 1, 1.5 * n) for n in range(1, most + 1))


@pytest.mark.parametrize("config", [{}, {"num_blocks": 14, "prefix_caching": False, "max_num_batched_tokens": 9}])
def test_tokens_are_those_of_single_launches(config: dict[str, int]) -> None:
    engine, device = captured(**config)
    assert not engine.notes
    texts = prompts(11)
    outcomes = finish(engine, [generate(i, p) for i, p in enumerate(texts)])
    assert {i: o.token_ids for i, o in outcomes.items()} == {i: MODEL.greedy(p, 12) for i, p in enumerate(texts)}
    assert device.num_replayed > 20
    assert (engine.stats().num_preemptions > 0) is bool(config)


def test_sampling_is_that_of_single_launches() -> None:
    asked = {"temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 2, "stop_token_ids": (7, 9)}
    requests = [generate(i, p, n=20, **(asked if i % 2 else {})) for i, p in enumerate(prompts(9))]
    found, expected = finish(captured()[0], requests), finish(make_engine(MODEL), requests)
    for i, outcome in expected.items():
        assert (found[i].token_ids, found[i].stop_reason) == (outcome.token_ids, outcome.stop_reason)
        for own, other in zip(found[i].logprobs or [], outcome.logprobs or [], strict=True):
            assert own.logprob == pytest.approx(other.logprob) and own.top_ids == other.top_ids


@pytest.fixture(scope="module")
def engine() -> LLMEngine:
    return captured(num_blocks=20)[0]


TEXTS = st.lists(st.integers(0, 5), min_size=1, max_size=20)
ARRIVALS = st.lists(st.tuples(TEXTS, st.integers(1, 8), st.integers(0, 3)), min_size=1, max_size=7)
"""(prompt, tokens to generate, steps before the next one comes). Drawn whole: an example given up while it draws
would leave its requests in the engine, which the next example shares."""


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=ARRIVALS)
def test_random_streams(engine: LLMEngine, arrivals: list[tuple[list[int], int, int]]) -> None:
    outcomes: dict[int, Outcome] = {}
    for i, (text, count, num_steps) in enumerate(arrivals):
        engine.submit([generate(i, text, n=count)])
        for _ in range(num_steps):
            outcomes |= {o.request_id: o for o in engine.step()}
            engine.check_integrity()
    while engine.num_unfinished:
        outcomes |= {o.request_id: o for o in engine.step()}
        engine.check_integrity()
    for i, (text, count, _) in enumerate(arrivals):
        assert outcomes[i].token_ids == MODEL.greedy(text, count)[: len(outcomes[i].token_ids)]


def test_a_budget_leaves_the_small_sizes_out() -> None:
    device = Late()
    device.graph_bytes = 1000
    engine, _ = captured(budget=1500, device=device)
    note = "decode steps of fewer than 3 sequences are padded to that: 2 of 4 graphs took 2,000 bytes of the 1,500 "
    assert engine.notes == [note + "for them"]
    texts = prompts(5)
    outcomes = finish(engine, [generate(i, p, n=3 + 5 * i) for i, p in enumerate(texts)])
    assert {i: o.token_ids for i, o in outcomes.items()} == {i: MODEL.greedy(p, 3 + 5 * i) for i, p in enumerate(texts)}
    assert device.num_replayed >= 20


def test_a_model_that_waits_for_the_device_is_not_captured() -> None:
    engine, device = captured(TinyModel(poison=50))
    assert device.num_replayed == 0
    assert engine.notes[0].startswith("decode steps are launched kernel by kernel: they cannot be captured (")
    outcomes = finish(engine, [generate(0, [2, 3, 4])])
    assert outcomes[0].token_ids == MODEL.greedy([2, 3, 4], 12)


def test_memory_that_is_missing_leaves_the_large_sizes_out() -> None:
    class Full(Late):
        def capture(self, call):  # type: ignore[no-untyped-def]
            if call().shape[0] > 2:
                raise torch.OutOfMemoryError("test")
            return super().capture(call)

    engine, device = captured(device=Full())
    assert engine.runner.graphs is not None and engine.runner.graphs.sizes == [1, 2]
    texts = prompts(4)
    outcomes = finish(engine, [generate(i, p, n=4 * (i + 1)) for i, p in enumerate(texts)])
    assert [outcomes[i].token_ids for i in range(4)] == [MODEL.greedy(p, 4 * (i + 1)) for i, p in enumerate(texts)]
    assert device.num_replayed > 0


def test_prompts_are_admitted_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step with a prompt in it is not replayed, so that one for each sequence that ends would be dear."""

    engine, device = captured(max_num_seqs=8, num_blocks=200, max_num_batched_tokens=256, prefix_caching=False)
    assert engine.scheduler.patient
    monkeypatch.setattr(scheduler, "PATIENCE", 4)
    texts = prompts(30)

    def run(patient: bool) -> tuple[float, list[list[int]]]:
        engine.scheduler.patient = patient
        replayed, steps = device.num_replayed, engine.stats().num_steps
        outcomes = finish(engine, [generate(i, p, n=4 + i % 9) for i, p in enumerate(texts)])
        tokens = [outcomes[i].token_ids for i in range(len(texts))]
        return (device.num_replayed - replayed) / (engine.stats().num_steps - steps), tokens

    (hasty, one), (patient, other) = run(False), run(True)
    assert one == other
    assert patient > hasty + 0.1, (hasty, patient)


def test_patience_does_not_keep_those_back_that_wait_for_a_prefix() -> None:
    engine, _ = captured(max_num_seqs=16, num_blocks=300, max_num_batched_tokens=256)
    stem = list(range(2, 20))
    engine.submit([generate(i, p, n=40) for i, p in enumerate(prompts(8))])
    for _ in range(4):
        engine.step()
    engine.submit([generate(100 + i, [*stem, 20 + i], n=40) for i in range(8)])
    for _ in range(4):
        engine.step()
    assert engine.stats().num_running == 16


def test_what_is_not_plain_decoding_is_not_replayed() -> None:
    engine, device = captured()
    outcomes = finish(engine, [Request(0, "score", [2, 3, 4, 5], score_from=3)])
    assert outcomes[0].values and device.num_replayed == 0
