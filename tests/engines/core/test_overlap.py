"""Steps that are launched before the tokens of the one before are known."""

from __future__ import annotations

import pytest

from engines.api import Request, SamplingParams
from tests.engines.core.test_engine import generate, prompts
from tests.engines.core.tiny import Late, TinyModel, make_engine

MODEL = TinyModel()


def finish(engine, requests):  # type: ignore[no-untyped-def]
    engine.submit(requests)
    outcomes = {}
    while engine.num_unfinished:
        outcomes |= {o.request_id: o for o in engine.step()}
        engine.check_integrity()
    return outcomes


@pytest.mark.parametrize(("host_s", "step_s"), [(1.0, 1.0), (0.2, 1.0), (1.0, 0.3)])
def test_the_host_works_while_the_device_does(host_s: float, step_s: float) -> None:
    def total_s(overlaps: bool) -> float:
        device = Late(step_s)
        device.overlaps = overlaps

        def work(request_ids: object) -> None:
            device.now_s += host_s

        requests = [generate(i, p, n=40) for i, p in enumerate(prompts(4))]
        finish(make_engine(MODEL, device=device, watch=work), requests)
        return device.now_s

    one_by_one, overlapped = total_s(False), total_s(True)
    assert overlapped <= one_by_one * max(host_s, step_s) / (host_s + step_s) * 1.1


def test_the_device_is_waited_for_only_with_work_behind() -> None:
    device = Late()
    engine = make_engine(MODEL, num_blocks=256, device=device)
    finish(engine, [generate(i, p, n=60) for i, p in enumerate(prompts(8))])
    assert device.num_launched > 60
    assert device.num_idle <= 2, "the device ran dry"


def test_a_sequence_whose_length_is_known_is_not_computed_in_vain() -> None:
    late, now = make_engine(MODEL, device=Late()), make_engine(MODEL)
    for engine in (late, now):
        finish(engine, [generate(i, p, n=3 + i) for i, p in enumerate(prompts(6))])
    assert late.stats().num_steps == now.stats().num_steps


def test_texts_that_generate_nothing_overlap_too() -> None:
    device = Late()
    engine = make_engine(MODEL, device=device, max_num_seqs=2, pooling="last", prefix_caching=False)
    finish(engine, [Request(i, "embed", p) for i, p in enumerate(prompts(20))])
    assert device.num_idle <= 1


def test_an_end_that_nobody_expected_leaves_no_trace() -> None:
    """A stop token is read one step late: the step computed in vain must not enter the prefix cache."""
    prompt = prompts(1)[0]
    full = MODEL.greedy(prompt, 40)
    stop = next(i for i in range(8, 40) if full[i] not in full[:i])
    engine = make_engine(MODEL, device=Late())
    outcomes = finish(engine, [generate(0, prompt, n=60, stop_token_ids=(full[stop],))])
    assert outcomes[0].token_ids == full[:stop]
    again = finish(engine, [generate(1, prompt + full[:stop], n=9), generate(2, prompt, n=30)])
    assert again[1].token_ids == full[stop : stop + 9] and again[2].token_ids == full[:30]


def test_a_failure_in_the_second_step_keeps_the_first() -> None:
    class Failing(TinyModel):
        calls = 0

        def logits(self, hidden):  # type: ignore[no-untyped-def]
            self.calls += 1
            if self.calls == 5:
                raise RuntimeError("once")
            return super().logits(hidden)

    texts = prompts(5)
    sampling = {"temperature": 0.8, "repetition_penalty": 1.3}
    outcomes = finish(make_engine(Failing(), device=Late()), [generate(i, p, **sampling) for i, p in enumerate(texts)])
    expected = finish(make_engine(MODEL), [generate(i, p, **sampling) for i, p in enumerate(texts)])
    assert {i: o.token_ids for i, o in outcomes.items()} == {i: o.token_ids for i, o in expected.items()}


def test_counts_of_output_tokens_do_not_run_ahead() -> None:
    engine = make_engine(MODEL, device=Late())
    engine.submit([Request(0, "generate", [2, 3, 4], SamplingParams(max_tokens=5, ignore_eos=True))])
    seen = []
    while engine.num_unfinished:
        engine.step()
        seen.append(engine.stats().num_output_tokens)
    assert seen == [0, 1, 2, 3, 4, 5]
