"""The engine's promise: each request's result is what the model gives for it alone, whatever the schedule."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.api import Outcome, Request, SamplingParams
from engines.core.engine import LLMEngine
from tests.engines.core.tiny import VOCAB, TinyModel, make_late
from tests.engines.core.tiny import make_engine as make_now

MODEL = TinyModel()
Make = Callable[..., LLMEngine]
pytestmark = pytest.mark.parametrize("make_engine", [make_now, make_late], ids=["at once", "late"])
"""Everything holds too where tokens are known one step late."""


def run(engine: LLMEngine, requests: list[Request]) -> dict[int, Outcome]:
    """All outcomes, with the engine's books checked after each step."""
    engine.submit(requests)
    outcomes: dict[int, Outcome] = {}
    for _ in range(10_000):
        if not engine.num_unfinished:
            break
        for outcome in engine.step():
            assert outcome.request_id not in outcomes, "a second outcome for one request"
            outcomes[outcome.request_id] = outcome
        engine.check_integrity()
    assert set(outcomes) == {r.request_id for r in requests}
    if engine.blocks is not None:
        assert engine.blocks.num_free == engine.blocks.num_blocks, "blocks are lost"
    assert engine.step() == []
    return outcomes


def generate(i: int, prompt: list[int], n: int = 12, **sampling: object) -> Request:
    params = {"max_tokens": n, "ignore_eos": True, **sampling}
    return Request(i, "generate", prompt, SamplingParams(**params), stream=i * 7919)  # type: ignore[arg-type]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    stem = [rng.randrange(2, VOCAB) for _ in range(24)]
    return [
        stem[: rng.randrange(25)] + [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, 20))] for _ in range(count)
    ]


@pytest.mark.parametrize(
    "config",
    [
        {"prefix_caching": False},
        {"prefix_caching": True},
        {"max_num_seqs": 1},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 7, "max_num_seqs": 5},
        {"num_blocks": 16},
        {"num_blocks": 14, "prefix_caching": False, "max_num_batched_tokens": 9},
        {"block_size": 1, "num_blocks": 300},
        {"block_size": 64},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_the_schedule(make_engine: Make, config: dict[str, int]) -> None:
    texts = prompts(20)
    outcomes = run(make_engine(MODEL, **config), [generate(i, p) for i, p in enumerate(texts)])
    for i, prompt in enumerate(texts):
        assert outcomes[i].token_ids == MODEL.greedy(prompt, 12), f"request {i}"
        assert outcomes[i].finish_reason == "length"
        assert outcomes[i].num_prompt_tokens == len(prompt)


def test_samples_do_not_depend_on_the_schedule(make_engine: Make) -> None:
    texts = prompts(16)
    requests = [generate(i, p, temperature=0.9, top_p=0.9) for i, p in enumerate(texts)]
    calm = run(make_engine(MODEL, prefix_caching=False, max_num_seqs=1), requests)
    tight = run(make_engine(MODEL, num_blocks=15, max_num_batched_tokens=8), requests)
    assert [calm[i].token_ids for i in calm] == [tight[i].token_ids for i in calm]
    assert len({tuple(o.token_ids) for o in calm.values()}) > 10


def test_preemption_happens_and_is_counted(make_engine: Make) -> None:
    engine = make_engine(MODEL, num_blocks=14, prefix_caching=False)
    run(engine, [generate(i, p, n=24) for i, p in enumerate(prompts(8))])
    assert engine.stats().num_preemptions > 0


def test_a_common_prefix_is_computed_once(make_engine: Make) -> None:
    stem = list(range(2, 42))
    engine = make_engine(MODEL, max_num_seqs=8, max_num_batched_tokens=400)
    outcomes = run(engine, [generate(i, [*stem, 2 + i], n=2) for i in range(8)])
    assert sorted(o.num_cached_tokens for o in outcomes.values()) == [0] + [40] * 7
    assert engine.stats().num_prompt_tokens == 41 + 7


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_streams(make_engine: Make, data: st.DataObject) -> None:
    """Any mix of requests, submitted at any time, with any sizes: one right outcome each."""
    draw = data.draw
    engine = make_engine(
        MODEL,
        num_blocks=draw(st.integers(3, 40)),
        block_size=draw(st.sampled_from([1, 2, 8])),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.integers(1, 40)),
        prefix_caching=draw(st.booleans()),
    )
    token = st.integers(0, 5)
    texts = draw(st.lists(st.lists(token, max_size=30), min_size=1, max_size=12))
    outcomes: dict[int, Outcome] = {}
    for i, text in enumerate(texts):
        engine.submit([generate(i, text, n=draw(st.integers(1, 8)))])
        for _ in range(draw(st.integers(0, 3))):
            outcomes |= {o.request_id: o for o in engine.step()}
            engine.check_integrity()
    while engine.num_unfinished:
        outcomes |= {o.request_id: o for o in engine.step()}
        engine.check_integrity()
    assert sorted(outcomes) == list(range(len(texts)))
    for i, text in enumerate(texts):
        if outcomes[i].error is None:
            assert outcomes[i].token_ids == MODEL.greedy(text, len(outcomes[i].token_ids))
        else:
            assert outcomes[i].error.code in ("empty_prompt", "too_long", "kv_cache_full")


def test_score(make_engine: Make) -> None:
    texts = [p for p in prompts(9) if len(p) > 3]
    requests = [Request(i, "score", p, score_from=1 + i % 3) for i, p in enumerate(texts)]
    for config in ({}, {"max_num_batched_tokens": 5}, {"num_blocks": 14}):
        outcomes = run(make_engine(MODEL, **config), requests)
        for i, text in enumerate(texts):
            logprobs = MODEL.logits(MODEL.all_hidden(text)).log_softmax(-1)
            expected = [float(logprobs[p - 1, text[p]]) for p in range(1 + i % 3, len(text))]
            assert outcomes[i].values == pytest.approx(expected)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "last"])
def test_embed(make_engine: Make, pooling: str) -> None:
    texts = prompts(9)
    requests = [Request(i, "embed", p) for i, p in enumerate(texts)]
    pools = {"cls": lambda h: h[0], "mean": lambda h: h.mean(0), "max": lambda h: h.amax(0), "last": lambda h: h[-1]}
    for config in ({}, {"max_num_batched_tokens": 5}):
        outcomes = run(make_engine(MODEL, pooling=pooling, **config), requests)
        for i, text in enumerate(texts):
            expected = pools[pooling](MODEL.all_hidden(text)).tolist()
            assert outcomes[i].values == pytest.approx(expected, rel=1e-5)


def test_stop_rules(make_engine: Make) -> None:
    prompt = prompts(1)[0]
    full = MODEL.greedy(prompt, 12)
    letters = "".join(chr(ord("a") + i % 26) for i in full)
    ended = [
        generate(0, prompt, stop=(letters[4:6],)),
        generate(1, prompt, stop_token_ids=(full[3],)),
        generate(2, prompt, stop_token_ids=(full[3],), min_tokens=8),
    ]
    outcomes = run(make_engine(MODEL), ended)
    first = letters.index(letters[4:6])
    assert outcomes[0].stop_reason == letters[4:6] and outcomes[0].token_ids == full[: first + 2]
    assert outcomes[1].stop_reason == full[3] and outcomes[1].token_ids == full[: full.index(full[3])]
    assert len(outcomes[2].token_ids) >= 8 and full[3] not in outcomes[2].token_ids[:8]


def test_penalties_change_greedy_output(make_engine: Make) -> None:
    prompt = prompts(1)[0]
    outcomes = run(
        make_engine(MODEL),
        [generate(0, prompt, n=24), generate(1, prompt, n=24, repetition_penalty=5.0, frequency_penalty=2.0)],
    )
    assert len(set(outcomes[1].token_ids)) > len(set(outcomes[0].token_ids))


def test_logprobs(make_engine: Make) -> None:
    prompt = prompts(1)[0]
    outcome = run(make_engine(MODEL), [generate(0, prompt, n=3, logprobs=2)])[0]
    assert outcome.logprobs is not None and len(outcome.logprobs) == 3
    row = MODEL.logits(MODEL.all_hidden(prompt)[-1:]).log_softmax(-1)[0]
    assert outcome.logprobs[0].logprob == pytest.approx(float(row.max()))
    assert outcome.logprobs[0].top_ids == row.topk(2).indices.tolist()


def test_one_bad_request_takes_no_other_with_it(make_engine: Make) -> None:
    model = TinyModel(poison=50)
    texts = prompts(10)
    texts = [[t if t != 50 else 2 for t in text] for text in texts]
    texts[3] = [*texts[3], 50]
    outcomes = run(make_engine(model), [generate(i, p, n=1) for i, p in enumerate(texts)])
    assert outcomes[3].error is not None and outcomes[3].error.code == "engine_error"
    for i, text in enumerate(texts):
        if i != 3:
            assert outcomes[i].token_ids == model.greedy(text, 1)


def test_logits_that_are_no_numbers(make_engine: Make) -> None:
    model = TinyModel()
    model.embedding[50] = math.nan
    outcomes = run(make_engine(model, prefix_caching=False), [generate(0, [2, 50]), generate(1, [2, 3])])
    assert outcomes[0].error is not None and outcomes[0].error.code == "nan_logits"
    assert outcomes[1].token_ids == model.greedy([2, 3], 12)


def test_memory_that_runs_out_shrinks_the_step(make_engine: Make) -> None:
    held: list[weakref.ref[Tensor]] = []

    class Small(TinyModel):
        def forward(self, batch, caches):  # type: ignore[no-untyped-def]
            assert not any(reference() is not None for reference in held), "the step before is still in memory"
            hidden = torch.zeros(batch.num_tokens)
            held.append(weakref.ref(hidden))
            if batch.num_tokens > 6:
                raise MemoryError("test")
            return super().forward(batch, caches)

    texts = prompts(6)
    outcomes = run(make_engine(Small()), [generate(i, p) for i, p in enumerate(texts)])
    for i, text in enumerate(texts):
        assert outcomes[i].token_ids == MODEL.greedy(text, 12)


def test_refusals_name_the_reason(make_engine: Make) -> None:
    outcomes = run(
        make_engine(MODEL, num_blocks=4),
        [generate(0, []), generate(1, [2] * 96), generate(2, [VOCAB]), generate(3, [2] * 20), generate(4, [2] * 10)],
    )
    codes = [outcomes[i].error.code if outcomes[i].error else None for i in range(5)]
    assert codes == ["empty_prompt", "too_long", "bad_token", "too_long", "kv_cache_full"]
    assert torch.is_inference_mode_enabled() is False
