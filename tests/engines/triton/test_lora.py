"""Adapters of many tokens at once: every rank, what one token's adapter may not do to another token, and its bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.ops import OpSet as Reference
from engines.triton import lora
from tests.cases import Case, call, convert
from tests.compare import assert_as_exact, assert_bitwise_equal


def given(rows: int, size: int, out: int, rank: int, adapters: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y, x, a, b and ids: tokens in no order, some of them without an adapter, the last adapter without a token."""
    generator = torch.Generator().manual_seed(rank)
    y, x, a, b = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((rows, out), (rows, size), (adapters, rank, size), (adapters, out, rank))
    )
    return y, x, a / size**0.5, b / rank**0.5, torch.randint(-1, adapters - 1, (rows,), generator=generator)


@pytest.mark.parametrize("rank", [8, 48, pytest.param(256, marks=pytest.mark.slow)])
def test_ranks(ops: Reference, rank: int) -> None:
    """With two pieces of input features, many adapters in a tile, and parts of a tile of outputs."""
    arguments = given(20, 600, 70, rank, 9, torch.bfloat16)
    case = Case("lora", str(rank), lambda dtype: arguments, {}, modifies=(0,))
    exact = call(Reference(), case, convert(arguments, torch.float64))
    for results in zip(call(ops, case, arguments), exact, call(Reference(), case, arguments), strict=True):
        assert_as_exact(*results)


def test_tokens_without_an_adapter_keep_their_bits_whatever_adapters_hold(ops: Reference) -> None:
    y, x, a, b, ids = given(20, 70, 33, 8, 4, torch.float16)
    a[1], b[2] = float("nan"), float("inf")
    found = y.clone()
    ops.lora(found, x, a, b, ids)
    assert_bitwise_equal(found[ids < 0], y[ids < 0])
    assert bool(found[ids == 0].isfinite().all())
    assert not bool(found[ids > 0].isfinite().all(1).any())
    nobody = torch.full_like(ids, -1)
    found = y.clone()
    ops.lora(found, x, a, b, nobody)
    assert_bitwise_equal(found, y)


def test_bits_of_a_token_do_not_depend_on_how_many_there_are(ops: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens: pieces are programs of their own; more: one program adds them up."""
    y, x, a, b, ids = given(48, 1100, 20, 16, 3, torch.float32)
    few, many = y.clone(), y.clone()
    ops.lora(few, x, a, b, ids)
    monkeypatch.setattr(lora, "FEW", 47)
    ops.lora(many, x, a, b, ids)
    assert_bitwise_equal(few, many)


def test_rows_of_a_wider_result_are_changed_in_place(ops: Reference) -> None:
    y, x, a, b, ids = given(5, 40, 24, 8, 3, torch.float32)
    wide = torch.zeros(5, 30)
    wide[:, 3:27] = y
    ops.lora(wide[:, 3:27], x, a, b, ids)
    Reference().lora(y, x, a, b, ids)
    torch.testing.assert_close(wide[:, 3:27], y)
    assert bool((wide[:, :3] == 0).all() and (wide[:, 27:] == 0).all())
