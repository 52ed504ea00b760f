"""Weights that stay integers on the matrix unit: products have the bits of the dequantized weight's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import platform
from engines.cpu import linear
from engines.cpu.offers import offers
from engines.cpu.opset import OpSet
from engines.ops.quantized import GroupedIntWeight
from tests.engines.cpu.test_invariance import assert_bitwise_equal
from tests.engines.cpu.test_opset import needs_library

pytestmark = needs_library


@pytest.fixture(scope="module")
def op_set() -> OpSet:
    if not linear._has_matrix_unit():
        pytest.skip("integers are multiplied as they are only where the processor has a matrix unit (AMX)")
    return OpSet()


def make(rows: int, columns: int, bits: int, group_size: int, zeros: bool, seed: int = 0) -> GroupedIntWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = rows, -(-columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    drawn = torch.randint(0, 2**bits, groups, dtype=torch.int16, generator=generator)
    middle = torch.full(groups, 2 ** (bits - 1), dtype=torch.int16)
    scales = torch.rand(groups, generator=generator) * columns**-0.5 + 1e-4
    return GroupedIntWeight(codes, scales, drawn if zeros else middle, bits, group_size)


def assert_products_are_the_dequantized_ones(ops: OpSet, weight: GroupedIntWeight, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, weight.shape[1], generator=generator).bfloat16()
    bias = torch.randn(weight.shape[0], generator=generator).bfloat16()
    kept = ops.prepare_quantized(weight, bias, torch.bfloat16)
    assert isinstance(kept.data, linear.PackedWeight) and kept.data.data.dtype == torch.uint8
    dense = ops.prepare_linear(weight.dequantize(torch.bfloat16), bias)
    assert_bitwise_equal(ops.linear(x, kept), ops.linear(x, dense))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 300),
    outputs=st.integers(1, 200),
    steps=st.integers(1, 9),
    groups=st.integers(1, 4),
    bits=st.sampled_from((4, 8)),
    zeros=st.booleans(),
)
def test_products_have_the_bits_of_the_dequantized_weight(
    op_set: OpSet, rows: int, outputs: int, steps: int, groups: int, bits: int, zeros: bool
) -> None:
    size = 32 * steps
    assert_products_are_the_dequantized_ones(op_set, make(outputs, groups * size, bits, size, zeros), rows)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 40, 129])
def test_a_scale_an_output_goes_with_any_number_of_inputs(op_set: OpSet, columns: int, bits: int) -> None:
    assert_products_are_the_dequantized_ones(op_set, make(48, columns, bits, columns, zeros=True), 33)


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_take_their_own_memory(op_set: OpSet, bits: int) -> None:
    weight = make(256, 1024, bits, 128, zeros=False)
    data = op_set.prepare_quantized(weight, None, torch.bfloat16).data
    assert data.data.nbytes == weight.codes.numel() * bits // 8
    assert data.scales.numel() == weight.scales.numel()


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (make(32, 96, 4, 48, False), torch.bfloat16),
        (make(32, 100, 8, 32, False), torch.bfloat16),
        (make(32, 64, 2, 32, True), torch.bfloat16),
        (replace(make(32, 64, 4, 32, True), permutation=torch.arange(63, -1, -1)), torch.bfloat16),
        (make(32, 64, 4, 32, True), torch.float32),
    ],
    ids=["groups of 48", "a part of a group", "2 bits", "an order of its own", "float32"],
)
def test_others_are_dequantized(op_set: OpSet, weight: GroupedIntWeight, dtype: torch.dtype) -> None:
    assert not linear.keeps_codes(weight, dtype)
    x = torch.randn(3, weight.shape[1]).to(dtype)
    dense = op_set.prepare_linear(weight.dequantize(dtype), None)
    assert_bitwise_equal(op_set.linear(x, op_set.prepare_quantized(weight, None, dtype)), op_set.linear(x, dense))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 48, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_plans_say_what_the_engine_does(op_set: OpSet, bits: int, group_size: int, dtype: str) -> None:
    weight = make(32, 384, bits, 384 if group_size < 0 else group_size, zeros=True)
    said = {"weights": f"w{bits}a16", "bits": bits, "group_size": group_size, "dtype": dtype}
    kept = linear.keeps_codes(weight, getattr(torch, dtype))
    assert kept is not offers(platform.probe()).dequantizes(said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda p, s: (p[:-1], s), "packed: expected what pack_weight or pack_codes made"),
        (lambda p, s: (p, None), "scales: expected float32"),
        (lambda p, s: (p, s.flatten()), "scales: expected float32"),
        (lambda p, s: (p, s.double()), "scales: expected float32"),
        (lambda p, s: (p, s.repeat(1, 3, 1, 1)), "scales: expected float32"),
    ],
)
def test_other_codes_are_refused(op_set: OpSet, arguments, message: str) -> None:
    data = op_set.prepare_quantized(make(32, 64, 4, 32, False), None, torch.bfloat16).data
    packed, scales = arguments(data.data, data.scales)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cpu_ops.linear_packed(torch.randn(2, 64).bfloat16(), packed, None, scales, None, 32)
