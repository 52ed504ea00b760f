"""Prompts computed by one engine and continued by another: the tokens are those of one engine that does both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from engines.api import EngineSettings, Outcome, Request, Role, SamplingParams
from engines.core.engine import UNREAD_PROMPTS, LLMEngine
from engines.parallel.group import ALONE
from engines.parallel.leader import KVLink
from tests.engines.core.test_engine import generate, prompts
from tests.engines.core.tiny import Late, TinyModel, make_engine
from tests.parallel import cases

ROLES: tuple[Role, Role] = ("prefill", "decode")
KINDS = ("dense", "gqa", "moe", "mla")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: cases.make(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@dataclass
class Pair:
    """Two engines of this process, and what passed between them."""

    prefill: LLMEngine
    decode: LLMEngine
    handed: list[Outcome] = field(default_factory=list)
    num_stalls: int = 0

    def finish(self, work: Sequence[Request]) -> dict[int, Outcome]:
        """As the runner does it."""
        requests = {request.request_id: request for request in work}
        outcomes: dict[int, Outcome] = {}
        self.prefill.submit(work)
        while self.prefill.num_unfinished or self.decode.num_unfinished:
            for outcome in self.prefill.step():
                if outcome.finish_reason == "handover":
                    self.handed.append(outcome)
                    self.decode.submit([replace(requests[outcome.request_id], begun=outcome)])
                else:
                    outcomes[outcome.request_id] = outcome
            self.num_stalls += self.prefill.stalled
            outcomes |= {outcome.request_id: outcome for outcome in self.decode.step()}
            self.prefill.release(self.decode.fetched())
            self.prefill.check_integrity()
            self.decode.check_integrity()
        assert not self.prefill.scheduler.held or not work, "blocks are held for nobody"
        return outcomes


@contextmanager
def pair(made: EngineSettings, **decoding: Any) -> Iterator[Pair]:
    """decoding: what the second engine's configuration has else."""
    second = replace(made, role="decode", config=replace(made.config, **decoding))
    with ExitStack() as stack:
        engines = [stack.enter_context(cases.threaded(each)) for each in (replace(made, role="prefill"), second)]
        yield Pair(*engines)


def hybrid(made: EngineSettings, work: Sequence[Request]) -> dict[int, Outcome]:
    with cases.threaded(made) as engine:
        engine.submit(work)
        outcomes = {}
        while engine.num_unfinished:
            outcomes |= {outcome.request_id: outcome for outcome in engine.step()}
        return outcomes


def told(outcomes: dict[int, Outcome]) -> dict[int, Any]:
    """What a user sees of them, to the bit."""
    return {
        number: (o.finish_reason, o.token_ids, o.stop_reason, o.logprobs, o.num_prompt_tokens, o.error)
        for number, o in outcomes.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_same_tokens(kind: str, folders: dict[str, Path]) -> None:
    made = cases.settings(folders[kind])
    with pair(made) as both:
        found = both.finish(cases.requests())
        assert len(both.handed) == len(found) and not both.decode.stats().num_prompt_tokens
    assert told(found) == told(hybrid(made, cases.requests()))


@pytest.mark.parametrize("kind", ["gqa", pytest.param("mla", marks=pytest.mark.slow)])
def test_same_tokens_of_two_ranks_each(kind: str, folders: dict[str, Path]) -> None:
    made = cases.settings(folders[kind], tp=2)
    with pair(made) as both:
        found = both.finish(cases.requests())
        assert not both.decode.stats().num_prompt_tokens
    assert told(found) == told(hybrid(made, cases.requests()))


def long_requests(count: int = 12, **sampling: Any) -> list[Request]:
    """With a common beginning of two blocks."""
    begin = list(range(100, 118))
    return [
        Request(
            i, "generate", [*begin, *range(i, 3 * i + 2)], SamplingParams(**{"max_tokens": 12, **sampling}), stream=i
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("kv_dtype", "dtype"),
    [
        ("int8", "float32"),
        ("auto", "bfloat16"),
        pytest.param("int4", "float32", marks=pytest.mark.slow),
        pytest.param("fp8", "float32", marks=pytest.mark.slow),
        pytest.param("int8", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_every_layout_of_the_cache(kv_dtype: str, dtype: str, folders: dict[str, Path]) -> None:
    """Codes with their scales, and bfloat16 blocks as the compiled CPU ops pack them."""
    made = cases.settings(folders["gqa"])
    made = replace(made, dtype=dtype, config=replace(made.config, kv_dtype=kv_dtype))
    with pair(made) as both:
        found = both.finish(long_requests(ignore_eos=True))
        assert len(both.handed) == 12 and not both.decode.stats().num_prompt_tokens
    assert told(found) == told(hybrid(made, long_requests(ignore_eos=True)))


def test_a_decode_engine_reads_what_it_does_not_have(folders: dict[str, Path]) -> None:
    made = cases.settings(folders["gqa"])
    with pair(made) as both:
        reads: list[int] = []
        read = both.decode.scheduler.read
        both.decode.scheduler.read = lambda held, theirs, mine: (
            not reads.append(len(theirs)) and read(held, theirs, mine)
        )
        both.finish(long_requests(ignore_eos=True))
        blocks = [-(-len(request.token_ids) // 8) for request in long_requests()]
        assert sum(reads) == sum(blocks) - 2 * 11, "the common beginning is read once"


SAMPLING: dict[str, dict[str, Any]] = {
    "seeded": {"temperature": 1.0, "top_p": 0.9, "top_k": 40},
    "penalized": {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 3},
    "stop": {"temperature": 1.0, "stop": ("17", "22"), "min_tokens": 2},
    "one token": {"max_tokens": 1},
}


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_goes_on_where_it_was(name: str, folders: dict[str, Path]) -> None:
    made = cases.settings(folders["dense"])
    work = long_requests(**SAMPLING[name])

    def spell(engine: LLMEngine) -> LLMEngine:
        engine.sampler.detokenize = lambda tokens: " ".join(map(str, tokens))
        return engine

    with pair(made) as both:
        spell(both.prefill), spell(both.decode)
        found = both.finish(work)
        assert not both.handed if name == "one token" else both.handed
    with cases.threaded(made) as engine:
        spell(engine).submit(work)
        alone: dict[int, Outcome] = {}
        while engine.num_unfinished:
            alone |= {outcome.request_id: outcome for outcome in engine.step()}
    assert told(found) == told(alone)
    if name == "stop":
        assert {outcome.finish_reason for outcome in found.values()} == {"stop", "length"}


def test_full_caches_wait(folders: dict[str, Path]) -> None:
    """The decode engine's holds a few of the texts, and so does the other one's."""
    made = cases.settings(folders["dense"])
    made = replace(made, config=replace(made.config, kv_cache_bytes=10 * block_bytes(made)))
    with pair(made) as both:
        assert both.decode.stats().num_blocks == 10
        found = both.finish(long_requests(ignore_eos=True))
        assert both.num_stalls and both.decode.stats().num_preemptions
    assert told(found) == told(hybrid(cases.settings(folders["dense"]), long_requests(ignore_eos=True)))


def block_bytes(made: EngineSettings) -> int:
    with cases.threaded(made) as engine:
        return sum(t[0].numel() * 4 for cache in engine.runner.caches for t in (cache.k, cache.v))


def test_a_server_that_is_lost_costs_its_prompts_again(folders: dict[str, Path]) -> None:
    made = cases.settings(folders["dense"])
    work = long_requests(ignore_eos=True)
    with pair(made) as both:
        both.prefill.submit(work)
        handed: list[Outcome] = []
        while both.prefill.num_unfinished:
            handed += both.prefill.step()
            both.decode.submit([replace(work[o.request_id], begun=replace_port(o)) for o in handed[len(both.handed) :]])
            both.handed = list(handed)
        found = both.finish([])
        notes = both.decode.stats().notes
        both.prefill.release([request.request_id for request in work])
        assert both.decode.scheduler.num_unread == 12
    assert notes == (UNREAD_PROMPTS,)
    assert told(found) == told(hybrid(made, work))


def replace_port(outcome: Outcome) -> Outcome:
    """As if its engine had ended: nobody listens there."""
    assert outcome.held is not None
    return replace(outcome, held=replace(outcome.held, port=1))


def test_texts_that_outgrow_their_context_are_computed_again(folders: dict[str, Path]) -> None:
    """As with rotary scalings that look at the length."""
    made = cases.settings(folders["dense"])
    work = long_requests(4, ignore_eos=True)
    with pair(made) as both:
        both.decode.scheduler.context_key = lambda num_prompt, num_tokens: 7
        both.decode.scheduler.read = lambda held, theirs, mine: pytest.fail("of another context")
        found = both.finish(work)
        assert not both.decode.stats().notes
    assert told(found) == told(hybrid(made, work))


def test_what_draws_nothing_is_not_handed_over(folders: dict[str, Path]) -> None:
    made = cases.settings(folders["dense"])
    work = [Request(i, "score", list(range(i + 2, i + 20)), score_from=1) for i in range(4)]
    with pair(made) as both:
        found = both.finish(work)
        assert not both.handed and all(outcome.values for outcome in found.values())


def test_engines_whose_steps_overlap() -> None:
    """No step is launched for a sequence whose first token, its last one there, is not read yet."""
    model = TinyModel()
    engines = [make_engine(model, device=Late(), max_num_batched_tokens=16) for _ in range(2)]
    for engine, role in zip(engines, ROLES, strict=True):
        engine.take_role(role, KVLink(ALONE, engine.runner.caches))
    work = [generate(i, prompt, n=10) for i, prompt in enumerate(prompts(12))]
    found = Pair(*engines).finish(work)
    assert {i: o.token_ids for i, o in found.items()} == {i: model.greedy(r.token_ids, 10) for i, r in enumerate(work)}
    cached = sum(outcome.num_cached_tokens for outcome in found.values())
    assert engines[0].stats().num_prompt_tokens + cached == sum(len(request.token_ids) for request in work)
    for engine in reversed(engines):
        engine.close()
