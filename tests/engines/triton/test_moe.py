"""Mixtures of experts: the sort on the device, and experts in every class of weight, as large GPUs get them too."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.ops import OpSet as Reference
from engines.ops.moe import Projection
from engines.ops.quantized import Float8Weight, GroupedIntWeight, Int8Weight, QuantizedWeight
from engines.triton import linear, moe
from engines.triton.quantized import Even, Packed
from tests.cases import quantized_weights
from tests.compare import assert_as_exact, assert_bitwise_equal

BF16 = torch.bfloat16
HIDDEN, INNER, EXPERTS, TOP_K = 128, 64, 5, 2


def routed(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(x in float32, weights, ids); expert 3 is nobody's."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, EXPERTS, generator=generator)
    scores[:, 3] = -1.0
    weights, ids = scores.topk(TOP_K, dim=-1)
    return torch.randn(num_tokens, HIDDEN, generator=generator), weights, ids


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "block_t"), [(1, 4, 1, 16), (3, 5, 5, 16), (40, 300, 8, 16), (300, 3, 2, 64)]
)
def test_slots_are_sorted_by_expert(
    ops: Reference, num_tokens: int, num_experts: int, top_k: int, block_t: int
) -> None:
    """An expert's blocks hold its slots in order and are filled up with -1; blocks past the last have no expert."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(num_tokens)])
    made = moe.sort(ids, num_experts, block_t)
    found: dict[int, list[int]] = {}
    for expert, slots in zip(made.experts.tolist(), made.slots.view(-1, block_t).tolist(), strict=True):
        here = [slot for slot in slots if slot >= 0]
        assert (expert >= 0) == bool(here)
        assert slots == here + [-1] * (block_t - len(here))
        found.setdefault(expert, []).extend(here)
    found.pop(-1, None)
    flat = ids.flatten().tolist()
    assert found == {e: [s for s, own in enumerate(flat) if own == e] for e in sorted(set(flat))}


def weight_of(kind: str, out: int, size: int, expert: int) -> QuantizedWeight:
    """Of another content for each expert."""
    if kind == "w4 order":
        made = quantized_weights(out, size)["w4 act-order"]
        assert isinstance(made, GroupedIntWeight)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(expert))
        return replace(made.rows((torch.arange(out) + expert) % out), permutation=order if expert else None)
    if kind == "fp8 128":
        generator = torch.Generator().manual_seed(expert)
        data = torch.randn(out, size, generator=generator).to(torch.float8_e4m3fn)
        return Float8Weight(data, torch.full((-(-out // 128), -(-size // 128)), 0.02 + expert / 100), (128, 128))
    made = quantized_weights(out, size)[kind]
    if isinstance(made, Int8Weight) and made.input_scale is not None:
        made = replace(made, input_scale=made.input_scale * (1 + expert))
    return made.rows((torch.arange(out) + expert) % out)


def experts_of(
    make: Callable[[int, int, int], Any], bias: bool, inner: int = INNER
) -> tuple[list[Projection], list[Projection]]:
    generator = torch.Generator().manual_seed(9)
    made: list[list[Projection]] = [[], []]
    for (out, size), projections in zip(((2 * inner, HIDDEN), (HIDDEN, inner)), made, strict=True):
        for expert in range(EXPERTS):
            offset = torch.randn(out, generator=generator).to(BF16) if bias else None
            projections.append(Projection(make(out, size, expert), offset))
    return made[0], made[1]


def check(ops: Reference, make: Callable[[int, int, int], Any], num_tokens: int, bias: bool, form: type[Any]) -> None:
    x, weights, ids = routed(num_tokens)
    projections = experts_of(make, bias)
    reference = Reference()
    exact_projections = (
        [Projection(exactly(p.weight), None if p.bias is None else p.bias.double()) for p in part]
        for part in projections
    )
    exact = reference.fused_experts(
        x.to(BF16).double(), reference.prepare_experts(*exact_projections, torch.float64), weights, ids, "silu"
    )
    plain = reference.fused_experts(x.to(BF16), reference.prepare_experts(*projections, BF16), weights, ids, "silu")
    prepared = ops.prepare_experts(*projections, BF16)
    assert isinstance(prepared.data.gate_up, form)
    found = ops.fused_experts(x.to(BF16), prepared, weights, ids, "silu")
    assert_as_exact(found, exact, plain)


def exactly(weight: Any) -> Any:
    if isinstance(weight, Tensor):
        return weight.double()
    return replace(weight, scales=weight.scales.double()) if isinstance(weight, Int8Weight) else weight


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear, moe):
        monkeypatch.setattr(module, "capability", lambda device: (9, 0))


@pytest.mark.parametrize("kind", ["w4 order", "int8", "int8 static", "fp8 rows"])
def test_experts_in_every_class(ops: Reference, kind: str) -> None:
    form = Even if kind.startswith("int8") else Packed
    check(ops, lambda out, size, expert: weight_of(kind, out, size, expert), 7, kind == "int8", form)


@pytest.mark.parametrize("num_tokens", [1, 90])
def test_plain_experts_in_large_tiles(ops: Reference, num_tokens: int, h200: None) -> None:
    def dense(out: int, size: int, expert: int) -> Tensor:
        return torch.randn(out, size, generator=torch.Generator().manual_seed(expert)).mul(0.2).to(BF16)

    check(ops, dense, num_tokens, True, Even)


def test_experts_with_float8_inputs(ops: Reference, h200: None) -> None:
    """Against the same products one by one: what float8 inputs do to a product is tested there."""
    gate_up, down = experts_of(lambda out, size, expert: weight_of("fp8 128", out, size, expert), False, inner=128)
    x, weights, ids = routed(6)
    x = x.to(BF16)
    prepared = ops.prepare_experts(gate_up, down, BF16)
    assert isinstance(prepared.data.gate_up, Even) and isinstance(prepared.data.down, Even)
    one_by_one = Reference.prepare_experts(ops, gate_up, down, BF16)
    expected = Reference.fused_experts(ops, x, one_by_one, weights, ids, "silu")
    found = ops.fused_experts(x, prepared, weights, ids, "silu")
    assert_bitwise_equal(found, expected)


def test_bits_of_a_token_do_not_depend_on_the_others(ops: Reference) -> None:
    projections = experts_of(lambda out, size, expert: weight_of("w4 g32", out, size, expert), bias=False)
    prepared = ops.prepare_experts(*projections, BF16)
    x, weights, ids = routed(5)
    x = x.to(BF16)
    together = ops.fused_experts(x, prepared, weights, ids, "silu")
    back = torch.arange(4, -1, -1)
    assert_bitwise_equal(ops.fused_experts(x[back], prepared, weights[back], ids[back], "silu")[back], together)
    assert_bitwise_equal(ops.fused_experts(x[:1], prepared, weights[:1], ids[:1], "silu"), together[:1])


def test_a_token_of_nan_spoils_itself_only(ops: Reference) -> None:
    projections = experts_of(lambda out, size, expert: weight_of("w4 g32", out, size, expert), bias=False)
    prepared = ops.prepare_experts(*projections, BF16)
    x, _, _ = routed(3)
    logits = torch.randn(3, EXPERTS, generator=torch.Generator().manual_seed(4))
    weights, ids = ops.route(logits, TOP_K, "softmax", True)
    expected = ops.fused_experts(x, prepared, weights, ids, "silu")
    logits[1], x[1] = float("nan"), float("nan")
    weights, ids = ops.route(logits, TOP_K, "softmax", True)
    assert bool(((ids >= 0) & (ids < EXPERTS)).all())
    found = ops.fused_experts(x, prepared, weights, ids, "silu")
    assert bool(found[1].isnan().all())
    assert_bitwise_equal(found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize(("num_experts", "groups"), [(160, 8), (24, 3), (7, 1)])
@pytest.mark.parametrize("scoring", ["softmax", "softmax_of_chosen", "sigmoid"])
def test_numbers_of_experts_that_are_no_power_of_two(
    ops: Reference, num_experts: int, groups: int, scoring: Any
) -> None:
    logits = torch.randn(4, num_experts, generator=torch.Generator().manual_seed(1))
    bias = torch.randn(num_experts, generator=torch.Generator().manual_seed(2)) if scoring == "sigmoid" else None
    for bias_now, normalize in itertools.product({None, bias}, (False, True)):
        options = {"bias": bias_now, "num_groups": groups, "top_groups": min(2, groups), "scale": 1.5}
        weights, ids = ops.route(logits, 5, scoring, normalize, **options)
        expected, expected_ids = Reference().route(logits.double(), 5, scoring, normalize, **options)
        assert_bitwise_equal(ids, expected_ids)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-7)
