"""Blocks in one call: the bits of their ops, alone and in a model, and blocks that are not for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines import discover, ops
from engines.api import EngineSettings, Request
from engines.cpu import linear
from engines.cpu.offers import Config
from engines.cpu.opset import OpSet
from engines.load import load_engine
from tests.blocks import CASES, ROWS, BlockCase, inputs, make, one_by_one
from tests.engines.cpu.test_invariance import assert_bitwise_equal
from tests.engines.cpu.test_invariant_engine import PROMPTS, results
from tests.engines.cpu.test_opset import needs_library
from tests.parity.checkpoints import make_checkpoint

pytestmark = needs_library


@pytest.fixture
def op_set() -> OpSet:
    if not linear._has_matrix_unit():
        pytest.skip("blocks are one call only where the processor has a matrix unit (AMX)")
    return OpSet()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_block_has_the_bits_of_its_ops(op_set: OpSet, case: BlockCase, rows: int) -> None:
    block = make(op_set, case)
    run = op_set.prepare_block(block)
    assert run is not None
    attended, residual = inputs(case, rows)
    expected, total = one_by_one(op_set, block, attended, residual.clone())
    assert_bitwise_equal(run(attended, residual), expected)
    if case.into or not case.layer_norm:
        assert_bitwise_equal(residual, total)


def test_a_row_has_the_same_bits_in_any_company(op_set: OpSet) -> None:
    for case in CASES:
        run = op_set.prepare_block(make(op_set, case))
        assert run is not None
        attended, residual = inputs(case, 300)
        part = slice(150, 183)
        alone = run(attended[part], residual[part].clone())
        assert_bitwise_equal(alone, run(attended, residual)[part])


def test_an_empty_block(op_set: OpSet) -> None:
    run = op_set.prepare_block(make(op_set, CASES[0]))
    assert run is not None
    assert run(*inputs(CASES[0], 0)).shape == (0, CASES[0].into)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_go_op_by_op(dtype: torch.dtype) -> None:
    assert OpSet().prepare_block(make(OpSet(), CASES[0], dtype)) is None


def test_halves_that_are_no_whole_tiles_go_op_by_op() -> None:
    assert OpSet().prepare_block(make(OpSet(), replace(CASES[0], inner=40))) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda attended, residual: (attended, residual.float()), "residual: expected a contiguous matrix of 17 x 64"),
        (lambda attended, residual: (attended, residual[:9]), "residual: expected a contiguous matrix of 17 x 64"),
        (lambda attended, residual: (attended.float(), residual), "attended: expected bfloat16"),
        (
            lambda attended, residual: (attended[:, :32], residual),
            "packed: expected what pack_weight or pack_codes made",
        ),
    ],
)
def test_other_inputs_are_refused(op_set: OpSet, changed, message: str) -> None:
    run = op_set.prepare_block(make(op_set, CASES[0]))
    assert run is not None
    with pytest.raises(RuntimeError, match=message):
        run(*changed(*inputs(CASES[0], 17)))


def engine_results(settings: EngineSettings) -> object:
    if settings.kind == "generate":
        return results(settings, PROMPTS)
    engine, found = load_engine(settings), {}
    engine.submit([Request(i, "embed", prompt[:60]) for i, prompt in enumerate(PROMPTS)])
    while engine.num_unfinished:
        for outcome in engine.step():
            assert outcome.values is not None, outcome.error
            found[outcome.request_id] = list(outcome.values)
    engine.close()
    return found


@pytest.mark.parametrize("family", ["llama", "gemma", "internlm2", "deepseek_v2", "gemma3", "bert"])
def test_a_model_has_the_same_bits_op_by_op(
    op_set: OpSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Families with blocks of every form, and some that have none."""
    make_checkpoint(discover.families()[family].tiny_config(), tmp_path)
    kind = "embed" if family == "bert" else "generate"
    settings = EngineSettings("cpu", str(tmp_path), "bfloat16", Config(max_model_len=128), kind=kind, pooling="mean")
    in_one_call = engine_results(settings)
    monkeypatch.setattr(OpSet, "prepare_block", ops.OpSet.prepare_block)
    assert engine_results(settings) == in_one_call
