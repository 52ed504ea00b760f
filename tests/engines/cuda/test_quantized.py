"""Products with 4-bit weights: packing, and the emulated kernel against weights that were not rounded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engines.cuda.opset import OpSet
from engines.cuda.quantized import W4Weight, pack_w4
from engines.ops.quantized import GroupedIntWeight
from tests.compare import assert_as_exact, assert_bitwise_equal


@dataclass(frozen=True)
class W4Case:
    out_features: int
    in_features: int
    group_size: int
    num_tokens: int
    scales: torch.dtype = torch.float16
    permuted: bool = False

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.in_features}x{self.out_features}/{self.group_size}" + "p" * self.permuted

    def weight(self) -> GroupedIntWeight:
        """Zeros from 0 to 16: both ends are used by checkpoints."""
        generator = torch.Generator().manual_seed(self.in_features)
        shape = (self.out_features, self.in_features // self.group_size)
        return GroupedIntWeight(
            codes=torch.randint(0, 16, (self.out_features, self.in_features), generator=generator, dtype=torch.uint8),
            scales=(torch.rand(shape, generator=generator) / 10 + 0.01).to(self.scales).float(),
            zeros=torch.randint(0, 17, shape, generator=generator, dtype=torch.int16),
            bits=4,
            group_size=self.group_size,
            permutation=torch.randperm(self.in_features, generator=generator) if self.permuted else None,
        )

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A strided view that begins at an odd address, and a bias."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.num_tokens, self.in_features + 3, generator=generator).to(dtype)[:, 1:-2]
        return x, torch.randn(self.out_features, generator=generator).to(dtype)


CASES = (
    W4Case(128, 64, 32, 1),
    W4Case(130, 128, 64, 5, torch.bfloat16),
    W4Case(100, 2048, 128, 17),
    W4Case(256, 1088, 1088, 40, permuted=True),
    W4Case(64, 1600, 32, 70, torch.bfloat16),
    W4Case(8, 128, 128, 0),
)


def multiply(ops: OpSet, case: W4Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(what the op set makes of a case, the exact result, that of weights rounded to dtype)."""
    weight, (x, bias) = case.weight(), case.inputs(dtype)
    prepared = ops.prepare_quantized(weight, bias, dtype)
    assert isinstance(prepared.data, W4Weight)
    exact = functional.linear(x.double(), weight.dequantize(torch.float32).double(), bias.double())
    return ops.linear(x, prepared), exact, functional.linear(x, weight.dequantize(dtype), bias)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_dequantized_weights(ops: OpSet, case: W4Case, dtype: torch.dtype) -> None:
    assert_as_exact(*multiply(ops, case, dtype))


def test_a_token_has_the_bits_that_it_has_alone(ops: OpSet) -> None:
    case = CASES[2]
    prepared = ops.prepare_quantized(case.weight(), None, torch.bfloat16)
    x, _ = replace(case, num_tokens=70).inputs(torch.bfloat16)
    together = ops.linear(x, prepared)
    for begin, end in ((0, 1), (69, 70), (3, 12), (10, 40)):
        assert_bitwise_equal(ops.linear(x[begin:end], prepared), together[begin:end])


@pytest.mark.parametrize(
    "weight",
    (
        replace(CASES[0].weight(), bits=8),
        W4Case(16, 96, 32, 1).weight(),
        W4Case(16, 192, 96, 1).weight(),
        replace(CASES[0].weight(), scales=CASES[0].weight().scales + 1e-7),
    ),
    ids=("8 bits", "columns", "group", "scales"),
)
def test_other_weights_are_left_to_the_reference(ops: OpSet, weight: GroupedIntWeight) -> None:
    assert pack_w4(weight) is None
    prepared = ops.prepare_quantized(weight, None, torch.bfloat16)
    assert_bitwise_equal(prepared.data, weight.dequantize(torch.bfloat16))
    x = torch.randn(3, weight.shape[1]).bfloat16()
    assert_bitwise_equal(ops.linear(x, prepared), functional.linear(x, prepared.data))


def test_float32_inputs_take_dequantized_weights(ops: OpSet) -> None:
    prepared = ops.prepare_quantized(CASES[0].weight(), None, torch.float32)
    assert isinstance(prepared.data, Tensor)


def test_every_code_has_its_place() -> None:
    """From the words back to the codes, by the rule that csrc/cuda/linear_w4a16.h states."""
    weight = W4Case(128, 128, 64, 1).weight()
    packed = pack_w4(weight)
    assert packed is not None
    found = torch.zeros_like(weight.codes)
    words = packed.codes.long() & 0xFFFFFFFF
    for lane in range(32):
        for word in range(4):
            for j in range(4):
                for p in range(2):
                    row = lane // 4 + 8 * (j % 2)
                    column = word * 16 + lane % 4 * 2 + 8 * (j // 2) + p
                    found[row::16, column::64] = ((words[:, :, lane, word] >> 4 * (j + 4 * p)) & 15).to(torch.uint8)
    assert_bitwise_equal(found, weight.codes)
