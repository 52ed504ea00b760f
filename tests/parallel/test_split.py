"""A model that several ranks hold says what it says in one process; ranks are threads here, for their fast start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engines import costs, discover
from engines.api import EngineSettings, Request, UnsupportedModelError
from engines.core.engine import LLMEngine
from engines.layers.rotary import RotaryEmbedding
from engines.models.load import load_model
from engines.ops import OpSet
from engines.parallel.group import Group
from engines.parallel.place import Place, held_spec
from engines.weights import Cut
from tests.engines.adapters import write_adapter
from tests.engines.formats.checkpoints import VARIANTS, Variant, write
from tests.parallel import cases

CASES = [
    ("dense", 2, 1),
    ("dense", 4, 1),
    ("gqa", 2, 1),
    ("gqa", 4, 1),  # two ranks a KV head
    ("interleaved", 2, 1),
    ("interleaved", 4, 1),
    ("packed", 2, 1),
    ("sandwich", 4, 1),
    ("moe", 2, 1),
    ("moe", 2, 2),
    ("moe", 4, 2),  # two ranks an expert
    ("stacked", 2, 1),
    ("stacked", 4, 4),
    ("mla", 2, 1),
    ("mla", 4, 2),
    ("moe", 2, 4),  # two copies of two ranks, with the experts over all four
    ("moe", 1, 4),
    ("stacked", 1, 2),
    ("mla", 2, 4),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: cases.make(kind, tmp_path_factory.mktemp(kind)) for kind in cases.SIZES}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path]) -> dict[str, cases.Result]:
    return {kind: cases.in_threads(cases.settings(folder), cases.requests()) for kind, folder in folders.items()}


@pytest.mark.parametrize(("kind", "tp", "ep"), CASES)
def test_same_tokens(kind: str, tp: int, ep: int, folders: dict[str, Path], alone: dict[str, cases.Result]) -> None:
    cases.same(cases.in_threads(cases.settings(folders[kind], tp, ep), cases.requests()), alone[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moe", "mla"])
def test_same_tokens_of_copies_that_share_experts(
    kind: str, folders: dict[str, Path], alone: dict[str, cases.Result]
) -> None:
    """As above, ranks being processes that talk over gloo: tp=2, dp=2, ep=4."""
    cases.same(cases.in_processes(cases.settings(folders[kind], 2, 4), cases.requests()), alone[kind])


def test_a_copy_without_rows_computes_for_the_others(folders: dict[str, Path], alone: dict[str, cases.Result]) -> None:
    """And so does one whose rows have all ended."""
    with cases.threaded(cases.settings(folders["moe"], 1, 4)) as engine:
        first = cases.finish(engine, cases.requests()[:1])
        assert [seq.copy for seq in engine.scheduler.running] == []
        rest = cases.finish(engine, cases.requests()[1:])
    cases.same(first + rest, alone["moe"])


def test_the_checkpoints_tell_ranks_apart(alone: dict[str, cases.Result]) -> None:
    """Continuations that were all alike would test little."""
    for result in alone.values():
        assert len({token for tokens, _ in result for token in tokens}) > 20


@pytest.mark.parametrize("kind", ["gqa", "mla"])
def test_adapters(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(folders[kind] / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]
    modules = [name for name in modules if "experts" not in name and "kv_b" not in name]
    write_adapter(tmp_path / "a", weights, modules, 4, seed=1)
    work = cases.requests(("a", None))
    found = [
        cases.in_threads(cases.settings(folders[kind], tp, adapters={"a": str(tmp_path / "a")}), work) for tp in (1, 2)
    ]
    cases.same(found[1], found[0])
    assert found[0] != cases.in_threads(cases.settings(folders[kind]), cases.requests())


def test_copies_with_adapters_scores_and_chunks(folders: dict[str, Path], tmp_path: Path) -> None:
    """Shared experts with adapters; steps in which a copy's prompts are cut, so that it gives no hidden state."""
    weights = load_file(folders["mla"] / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in weights if "shared_experts" in name]
    write_adapter(tmp_path / "a", weights, modules, 4, seed=1)
    work = cases.requests(("a", None))
    found = []
    for tp, ep in ((1, 1), (1, 2)):
        made = cases.settings(folders["mla"], tp, ep, adapters={"a": str(tmp_path / "a")})
        made = replace(made, config=replace(made.config, max_num_batched_tokens=7))
        found.append(cases.in_threads(made, work))
        with cases.threaded(made) as engine:
            found[-1] += [([], scores) for scores in _all_scores(engine)]
    cases.same(found[1], found[0])


def _all_scores(engine: LLMEngine) -> list[list[float]]:
    engine.submit([Request(i, "score", list(range(1 + i, 30 + 2 * i)), score_from=1) for i in range(3)])
    values: dict[int, list[float]] = {}
    while engine.num_unfinished:
        values |= {outcome.request_id: list(outcome.values or ()) for outcome in engine.step()}
    return [values[i] for i in range(3)]


CUT = ("awq-64", "fp8-(32, 64)", "fp8-(128, 128)", "pack-quantized-4-group-asym", "float-quantized-8-block")
"""Formats with units of 64 or more, of which 96 intermediate features a rank are no multiple."""


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name not in CUT], ids=str)
def test_quantized_weights(variant: Variant, tmp_path: Path) -> None:
    """Ranks hold the same numbers; inputs in 8 bits are rounded by rank."""
    quantized, _, _ = write(variant, tmp_path)
    if variant.config.get("desc_act"):
        with pytest.raises(UnsupportedModelError, match="desc_act"), cases.threaded(cases.settings(quantized, 2)):
            pass
        return
    expected, found = (_scores(cases.settings(quantized, tp)) for tp in (1, 2))
    if variant.name.startswith("int") and variant.name.endswith("inputs"):
        assert 1e-4 < (found - expected).norm() / expected.norm() < 0.05
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.name in CUT], ids=str)
def test_units_that_would_be_cut_are_refused(variant: Variant, tmp_path: Path) -> None:
    quantized, _, _ = write(variant, tmp_path)
    with pytest.raises(UnsupportedModelError, match="weights are quantized in units of"):
        _scores(cases.settings(quantized, 2))


def _scores(made: EngineSettings) -> torch.Tensor:
    """Log-probabilities of a text."""
    with cases.threaded(made) as engine:
        engine.submit([Request(0, "score", list(range(1, 40)), score_from=1)])
        while not (outcomes := engine.step()):
            pass
    return torch.tensor(outcomes[0].values)


def test_no_unit_has_features_of_two_ranks() -> None:
    assert Cut(256, (range(64, 128),)).by(32) == [slice(2, 4)]
    assert Cut(256, (range(64, 128),)).by(256) == [slice(None)]
    with pytest.raises(UnsupportedModelError, match=r"features 64 to 128 of 256 .* units of 128"):
        Cut(256, (range(64, 128),)).by(128)


class _Alone(Group):
    """A rank that waits for nobody."""

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("kind", ["packed", "stacked", "mla"])
def test_ranks_hold_their_share_and_no_more(kind: str, folders: dict[str, Path]) -> None:
    made = cases.settings(folders[kind], 2)
    held = [sum(t.numel() for t in _tensors(load_model(made, OpSet(), _Alone(Place(rank, 2, 1))))) for rank in range(2)]
    everything = sum(t.numel() for t in _tensors(load_model(cases.settings(folders[kind]), OpSet())))
    assert max(held) < 0.62 * everything, "norms, routers and latents are on every rank, nothing else"
    spec = discover.families()[cases.SIZES[kind][0]].spec(json.loads((folders[kind] / "config.json").read_text()))
    share = held_spec(spec, Place(0, 2, 1))
    assert costs.num_parameters(share) == pytest.approx(held[0], rel=0.05)


def _tensors(model: object) -> list[torch.Tensor]:
    """Of all that hangs on a model, each storage once."""
    found: dict[int, torch.Tensor] = {}
    waiting, seen = [model], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (str, int, float, type, OpSet)):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            whole = torch.empty(0, dtype=item.dtype).set_(item.untyped_storage())
            found[item.untyped_storage().data_ptr()] = whole
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple)):
            waiting += item
        elif not isinstance(item, RotaryEmbedding):
            waiting += getattr(item, "__dict__", {}).values()
    return list(found.values())
