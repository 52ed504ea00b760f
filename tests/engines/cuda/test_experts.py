"""Mixtures of experts: stacks of packed weights, sorted slots, bits that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.cuda.experts import PackedExperts, pack_experts
from engines.cuda.opset import OpSet
from engines.ops import OpSet as Reference
from engines.ops.moe import Experts, Projection
from engines.ops.quantized import GroupedIntWeight, Int8Weight
from tests.compare import assert_as_exact, assert_bitwise_equal
from tests.engines.cuda.test_quantized import W4Case, exponents_of, floats_of, integers_of

BF16 = torch.bfloat16
COUNT, TOP_K = 6, 2


def w4(rows: int, columns: int) -> GroupedIntWeight:
    return W4Case(rows, columns, 64, 1).weight()


def dense(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)).to(BF16)


KINDS = {"dense": dense, "w4 float16": w4, "fp8": floats_of, "mxfp4": exponents_of, "int8": integers_of}


def stacks(make: Callable[[int, int], object], hidden: int, inner: int) -> tuple[list[Projection], list[Projection]]:
    """The experts' rows differ: those of one large weight, a part for each."""

    def parts(rows: int, columns: int) -> list[Projection]:
        whole = make(rows * COUNT, columns)
        index = [torch.arange(rows * i, rows * (i + 1)) for i in range(COUNT)]
        return [Projection(whole[i] if isinstance(whole, Tensor) else whole.rows(i)) for i in index]  # type: ignore[attr-defined]

    return parts(2 * inner, hidden), parts(hidden, inner)


def prepared(ops: Reference, kind: str, hidden: int = 192, inner: int = 64) -> Experts:
    return ops.prepare_experts(*stacks(KINDS[kind], hidden, inner), BF16)


def routed(tokens: int, hidden: int = 192) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, weights, ids): the first experts have most of the tokens, the last has none."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(BF16) / 8
    chances = torch.tensor([8.0, 4.0, 1.0, 1.0, 0.5, 0.0]).expand(tokens, COUNT)
    ids = torch.multinomial(chances, TOP_K, generator=generator)
    return x, torch.rand(tokens, TOP_K, generator=generator), ids


@pytest.mark.parametrize("tokens", (8, 60, 200))
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_and_tile(ops: OpSet, kind: str, tokens: int) -> None:
    x, weights, ids = routed(tokens)
    own = prepared(ops, kind)
    assert [stack.weight.format for stack in own.data] == [kind] * 2
    reference = Reference()
    plain = reference.fused_experts(x, prepared(reference, kind), weights, ids, "silu")
    wide = Experts([tuple(widened(weight) for weight in both) for both in prepared(reference, kind).data], COUNT)
    exact = reference.fused_experts(x.double(), wide, weights, ids, "silu")
    assert_as_exact(ops.fused_experts(x, own, weights, ids, "silu"), exact, plain)


def widened(weight: object) -> object:
    data = weight.data  # type: ignore[attr-defined]
    if isinstance(data, Int8Weight):
        return replace(weight, data=replace(data, scales=data.scales.double()))  # type: ignore[type-var]
    return replace(weight, data=data.double())  # type: ignore[type-var]


@pytest.mark.parametrize("kind", ("dense", "mxfp4"))
def test_a_token_has_the_bits_that_it_has_alone(ops: OpSet, kind: str) -> None:
    x, weights, ids = routed(200)
    own = prepared(ops, kind)
    assert len({own.data[0].tile(ids[:n].numel()) for n in (1, 150, 200)}) > 1
    together = ops.fused_experts(x, own, weights, ids, "silu")
    for begin, end in ((0, 1), (199, 200), (20, 100)):
        part = slice(begin, end)
        assert_bitwise_equal(ops.fused_experts(x[part], own, weights[part], ids[part], "silu"), together[part])


def check_slots(count: int, tile: int) -> None:
    """Raises AssertionError unless every slot is in one tile of its expert."""
    ids = torch.randint(0, 40, (count,), generator=torch.Generator().manual_seed(0))
    ids[::7] = 39
    slots, experts = torch.ops.cuda_ops.sort_slots(ids, 40, tile)
    found = []
    for own, expert in zip(slots.tolist(), experts.tolist(), strict=True):
        real = [slot for slot in own if slot >= 0] if expert >= 0 else []
        assert own[: len(real)] == real or expert < 0
        assert all(ids[slot] == expert for slot in real)
        found += real
    assert sorted(found) == list(range(count))
    used = [expert for expert in experts.tolist() if expert >= 0]
    assert used == sorted(used)
    assert len(used) == sum(-(-int((ids == e).sum()) // tile) for e in range(40))


@pytest.mark.parametrize(("count", "tile"), ((0, 16), (1, 16), (300, 16), (300, 128)))
def test_every_slot_is_in_one_tile_of_its_expert(ops: OpSet, count: int, tile: int) -> None:
    check_slots(count, tile)


def test_an_id_that_is_no_experts_has_no_slot(ops: OpSet) -> None:
    slots, experts = torch.ops.cuda_ops.sort_slots(torch.tensor([5, -1, 2, 99]), 6, 16)
    assert experts.tolist() == [2, 5, -1, -1]
    assert [slot for slot in slots[:2].flatten().tolist() if slot >= 0] == [2, 0]


def test_weights_of_several_formats_become_dense() -> None:
    mixed = [Projection(w4(128, 128)), Projection(exponents_of(128, 128))]
    packed = pack_experts(mixed, BF16)
    assert isinstance(packed, PackedExperts)
    assert packed.weight.format == "dense"
    assert packed.weight.codes.shape == (2, 8, 2, 4, 32, 4)


def test_experts_with_an_input_scale_of_their_own_are_left_to_the_reference(ops: OpSet) -> None:
    def make(rows: int, columns: int) -> Int8Weight:
        return integers_of(rows, columns, static=True)

    own = ops.prepare_experts(*stacks(make, 192, 64), BF16)
    reference = Reference()
    x, weights, ids = routed(5)
    expected = reference.fused_experts(x, reference.prepare_experts(*stacks(make, 192, 64), BF16), weights, ids, "silu")
    assert_as_exact(ops.fused_experts(x, own, weights, ids, "silu"), expected.double(), expected)


def test_tiles_follow_the_mean_of_an_experts_slots() -> None:
    packed = pack_experts([Projection(dense(128, 128))] * 4, BF16)
    assert [packed.tile(4 * mean) for mean in (1, 16, 17, 64, 65, 1000)] == [16, 16, 64, 64, 128, 128]
    four_bits = pack_experts([Projection(exponents_of(128, 128))] * 4, BF16)
    assert [four_bits.tile(4 * mean) for mean in (16, 17, 1000)] == [16, 64, 64]


def test_equal_scores_go_to_the_first_and_no_number_to_some_expert(ops: OpSet) -> None:
    logits = torch.zeros(2, 40)
    logits[1] = float("nan")
    weights, ids = ops.route(logits, 3, "softmax", True)
    assert ids[0].tolist() == [0, 1, 2]
    assert ids[1].min() >= 0 and ids[1].max() < 40
    assert_as_exact(weights[0], torch.full((3,), 1 / 3).double(), torch.full((3,), 1 / 3))
    assert weights[1].isnan().all()
