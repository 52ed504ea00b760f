"""How many devices a job takes, and which of them does what."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from engines.parallel.place import Place
from runner.config import ParallelismConfig, combinations
from runner.parallel import Layout, findings
from tests.small_job import make_plan


@pytest.mark.parametrize(
    ("tp", "dp", "ep", "devices", "engines"),
    [
        (1, 1, 1, 1, 1),
        (2, 1, 1, 2, 1),
        (2, 2, 1, 4, 2),
        (2, 2, 4, 4, 1),
        (2, 4, 4, 8, 2),
        (8, 1, 8, 8, 1),
        (1, 4, 4, 4, 1),
    ],
)
def test_devices_and_engines(tp: int, dp: int, ep: int, devices: int, engines: int) -> None:
    layout = Layout(tp, dp, ep)
    assert not list(findings(tp, dp, ep))
    assert (layout.num_devices, layout.num_engines) == (devices, engines)


@pytest.mark.parametrize(
    ("tp", "dp", "ep", "message"),
    [
        (2, 2, 3, "parallelism.ep: 3; expected a divisor of tp * dp = 2 * 2 = 4, the devices"),
        (2, 1, 4, "parallelism.ep: 4; expected a divisor of tp * dp = 2 * 1 = 2"),
        (6, 2, 4, "parallelism.ep: 4; expected a divisor of tp, or a multiple of it: 6 / 4 leaves 2"),
        (4, 3, 6, "parallelism.ep: 6; expected a multiple of tp, as copies of the model share experts as a"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_go_together(tp: int, dp: int, ep: int, message: str) -> None:
    assert message in "\n".join(findings(tp, dp, ep))


def test_roles() -> None:
    layout = Layout(2, 3, 1, prefill=1)
    assert (layout.num_devices, [layout.role(engine) for engine in range(3)]) == (6, ["prefill", "decode", "decode"])
    assert [Layout(2, 2, 1).role(engine) for engine in range(2)] == ["hybrid", "hybrid"]
    assert not list(findings(2, 3, 1, 2))
    expected = r"parallelism.prefill: 3; expected less than .* tp \* dp / max\(tp, ep\) = 2 \* 3 / 2 = 3, as one"
    assert re.match(expected, "\n".join(findings(2, 3, 1, 3)))
    assert "1 of role prefill, which compute prompts" in layout.text(None) and "2 of role decode" in layout.text(None)


@pytest.mark.parametrize(
    ("parallelism", "message"),
    [
        (ParallelismConfig(dp=2, launch="srun"), "parallelism.launch: srun with dp=2: 2 engines; expected one for the"),
        (ParallelismConfig(dp=4, ep=2, prefill=1), r"parallelism.prefill: 1 with ep=2: 2 / 1 = 2 copies share experts"),
        (ParallelismConfig(dp=1, prefill=1), r"parallelism.prefill: 1; expected less than .* = 1 \* 1 / 1 = 1, as one"),
        (ParallelismConfig(dp=2, ep=2, launch="srun"), None),
        (ParallelismConfig(tp=2, dp=2, ep=4), None),
        (ParallelismConfig(dp=2, prefill=1), None),
    ],
)
def test_what_a_configuration_may_ask_for(parallelism: ParallelismConfig, message: str | None, tmp_path: Path) -> None:
    job = make_plan(tmp_path, parallelism=parallelism).job
    found = [finding for finding in combinations(job, "generate") if finding.startswith("parallelism")]
    assert not found if message is None else re.match(message, found[0])
    if job.parallelism.prefill:
        assert "prefill: 1 with task generate, whose rows end with their prompts" in "\n".join(
            combinations(job, "score")
        )


def test_what_each_of_four_devices_does() -> None:
    layout = Layout(2, 2, 4)
    assert [layout.place(device) for device in range(4)] == [(0, Place(rank, 2, 4)) for rank in range(4)]
    assert [layout.place(device)[1].copy for device in range(4)] == [0, 0, 1, 1]
    assert [layout.place(device)[1].tp_rank for device in range(4)] == [0, 1, 0, 1]
    assert [layout.place(device)[1].experts(8) for device in range(4)] == [
        range(2), range(2, 4), range(4, 6), range(6, 8),
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [s for s in itertools.product((1, 2, 3, 4, 8), repeat=3) if not list(findings(*s))])
def test_every_part_has_one_holder_in_each_copy(sizes: tuple[int, int, int]) -> None:
    """Heads, vocabulary and experts' features of each engine: nothing is missing, nothing is there twice."""
    layout = Layout(*sizes)
    by_engine: dict[int, list[Place]] = {}
    for device in range(layout.num_devices):
        engine, place = layout.place(device)
        by_engine.setdefault(engine, []).append(place)
    assert len(by_engine) == layout.num_engines
    for places in by_engine.values():
        experts = [(e, f) for place in places for e in place.experts(24) for f in place.expert_features(48)]
        assert sorted(experts) == list(itertools.product(range(24), range(48)))
        for copy in range(places[0].num_copies):
            members = [place for place in places if place.copy == copy]
            for total in (24, 151, 4099):
                assert [i for place in members for i in place.split(total)] == list(range(total))
            for kv_heads in (1, 2, 24):
                if kv_heads % layout.tp and layout.tp % kv_heads:
                    continue
                for place in members:
                    group = 48 // kv_heads
                    assert {head // group for head in place.split(48)} == set(place.kv_heads(kv_heads))
    assert layout.num_devices == layout.tp * layout.dp
