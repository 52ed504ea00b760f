"""Products with packed weights: packing, and the emulated kernels against weights that were not rounded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engines.cuda.opset import OpSet
from engines.cuda.quantized import Fp8Weight, PackedWeight, in_lane_order, pack
from engines.ops import OpSet as Reference
from engines.ops.quantized import Float8Weight, GroupedIntWeight, Int8Weight, MXFP4Weight
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
    assert isinstance(prepared.data, PackedWeight)
    exact = functional.linear(x.double(), weight.dequantize(torch.float32).double(), bias.double())
    return ops.linear(x, prepared), exact, functional.linear(x, weight.dequantize(dtype), bias)


@pytest.fixture(params=("80", "90"))
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the emulated device: both have a kernel of their own for 4-bit weights."""
    monkeypatch.setenv("EMULATOR_CAPABILITY", request.param)
    return str(request.param)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_dequantized_weights(ops: OpSet, capability: str, case: W4Case, dtype: torch.dtype) -> None:
    assert_as_exact(*multiply(ops, case, dtype))


@pytest.mark.parametrize("order", ("reverse", "random:1", "warp:2", "lag:1"))
@pytest.mark.parametrize("copies", ("early", "late"))
def test_warpgroups_that_share_inputs_wait_for_each_other(
    ops: OpSet, monkeypatch: pytest.MonkeyPatch, order: str, copies: str
) -> None:
    """Clusters of two blocks of threads, rings of stages that are used again."""
    monkeypatch.setenv("EMULATOR_ORDER", order)
    monkeypatch.setenv("EMULATOR_COPIES", copies)
    assert_as_exact(*multiply(ops, W4Case(256, 2688, 128, 40), torch.bfloat16))


def test_a_token_has_the_bits_that_it_has_alone(ops: OpSet, capability: str) -> None:
    """By tiles of every size, and by blocks of threads that take one split or all of them."""
    case = W4Case(100, 2048, 128, 200)
    prepared = ops.prepare_quantized(case.weight(), None, torch.bfloat16)
    x, _ = case.inputs(torch.bfloat16)
    together = ops.linear(x, prepared)
    for begin, end in ((0, 1), (69, 70), (3, 12), (10, 40), (150, 200), (30, 130)):
        assert_bitwise_equal(ops.linear(x[begin:end], prepared), together[begin:end])


def test_products_that_are_not_split_need_no_counters(ops: OpSet, capability: str) -> None:
    """They have more tiles than there are counters where rows and tokens are many."""
    weight = replace(CASES[0], out_features=384).weight()
    prepared, x = ops.prepare_quantized(weight, None, torch.bfloat16), torch.randn(3, 64).bfloat16()
    packed = prepared.data
    assert isinstance(packed, PackedWeight)
    out, none = x.new_empty(3, 384), torch.zeros(0, dtype=torch.int32)
    torch.ops.cuda_ops.linear(x, packed.format, packed.codes, packed.scales, None, None, none, out)
    assert_bitwise_equal(out, ops.linear(x, prepared))


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
    assert pack(weight) is None
    prepared = ops.prepare_quantized(weight, None, torch.bfloat16)
    assert_bitwise_equal(prepared.data, weight.dequantize(torch.bfloat16))
    x = torch.randn(3, weight.shape[1]).bfloat16()
    assert_bitwise_equal(ops.linear(x, prepared), functional.linear(x, prepared.data))


def test_float32_inputs_take_dequantized_weights(ops: OpSet) -> None:
    prepared = ops.prepare_quantized(CASES[0].weight(), None, torch.float32)
    assert isinstance(prepared.data, Tensor)


def test_every_4_bit_code_has_its_place() -> None:
    """From the words back to the codes, by the rule that csrc/cuda/product.h states."""
    weight = W4Case(128, 128, 64, 1).weight()
    packed = pack(weight)
    assert packed is not None
    found = torch.zeros_like(weight.codes)
    words = packed.codes[0, :, :, 0].long() & 0xFFFFFFFF
    for lane in range(32):
        for word in range(4):
            for j in range(4):
                for p in range(2):
                    row = lane // 4 + 8 * (j % 2)
                    column = word * 16 + lane % 4 * 2 + 8 * (j // 2) + p
                    found[row::16, column::64] = ((words[:, :, lane, word] >> 4 * (j + 4 * p)) & 15).to(torch.uint8)
    assert_bitwise_equal(found, weight.codes)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.int8), ids=str)
def test_every_value_has_its_place(dtype: torch.dtype) -> None:
    weight = torch.randint(-100, 100, (130, 72), generator=torch.Generator().manual_seed(0)).to(dtype)
    words = in_lane_order(weight)
    size = dtype.itemsize
    values = words.view(dtype).unflatten(-1, (4, 4 // size))  # tile, chunk, quarter, lane, word, value
    assert values.shape == (16, -(-72 * size // 128), 4, 32, 4, 4 // size)
    for row, column in ((0, 0), (129, 71), (7, 70), (24, 33), (100, 40), (13, 5)):
        chunk, byte = divmod(column * size, 128)
        lane, word = row % 8 * 4 + byte % 16 // 4, row % 16 // 8 + 2 * (byte % 32 // 16)
        found = values[row // 16, chunk, byte // 32, lane, word, byte % 4 // size]
        assert found == weight[row, column]
    assert int((values != 0).sum()) == int((weight != 0).sum())


SIZES = ((100, 2080, 17), (130, 96, 70), (16, 416, 130))
"""(out_features, in_features, num_tokens): several splits, a chunk that is not full, tiles of 128 tokens."""


def exponents_of(out_features: int, in_features: int) -> MXFP4Weight:
    """Codes of all values; powers down to 2^-127."""
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(110, 135, (out_features, in_features // 32), generator=generator)
    exponents[:4] = 0
    codes = torch.randint(0, 256, (out_features, in_features // 2), generator=generator)
    return MXFP4Weight(codes.to(torch.uint8), exponents.to(torch.uint8))


def integers_of(out_features: int, in_features: int, static: bool = False) -> Int8Weight:
    generator = torch.Generator().manual_seed(4)
    data = torch.randint(-128, 128, (out_features, in_features), generator=generator).to(torch.int8)
    scales = (torch.rand(out_features, generator=generator) + 0.5) / 100
    return Int8Weight(data, scales, torch.tensor(0.02) if static else None)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("rows", "columns", "tokens"), SIZES)
def test_products_with_mxfp4_weights(ops: OpSet, rows: int, columns: int, tokens: int, dtype: torch.dtype) -> None:
    weight = exponents_of(rows, columns)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    prepared = ops.prepare_quantized(weight, None, dtype)
    assert isinstance(prepared.data, PackedWeight)
    exact = functional.linear(x.double(), weight.dequantize(torch.float32).double())
    plain = functional.linear(x.float(), weight.dequantize(torch.float32)).to(dtype)
    assert_as_exact(ops.linear(x, prepared), exact, plain)


def floats_of(out_features: int, in_features: int, tile: tuple[int, int] | None = None) -> Float8Weight:
    """Numbers of all magnitudes, subnormal ones as well. tile: None for one of a row."""
    generator = torch.Generator().manual_seed(5)
    stretch = 2.0 ** torch.randint(-7, 5, (out_features, in_features), generator=generator)
    data = (torch.randn(out_features, in_features, generator=generator) * stretch).to(torch.float8_e4m3fn)
    tile = tile or (1, in_features)
    shape = (-(-out_features // tile[0]), -(-in_features // tile[1]))
    return Float8Weight(data, (torch.rand(shape, generator=generator) + 0.5) / 50, tile)


@pytest.mark.parametrize("tile", ((128, 128), None), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(("rows", "columns", "tokens"), ((260, 2048, 17), (16, 384, 70)))
def test_products_of_8_bit_floats_with_16_bit_inputs(
    ops: OpSet, monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, tokens: int, dtype: torch.dtype,
    tile: tuple[int, int] | None,
) -> None:  # fmt: skip
    monkeypatch.setenv("EMULATOR_CAPABILITY", "80")
    weight = floats_of(rows, columns, tile)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    prepared = ops.prepare_quantized(weight, None, dtype)
    assert isinstance(prepared.data, PackedWeight)
    exact = functional.linear(x.double(), weight.dequantize(torch.float32).double())
    plain = functional.linear(x.float(), weight.dequantize(torch.float32)).to(dtype)
    assert_as_exact(ops.linear(x, prepared), exact, plain)


FP8_SIZES = ((100, 2048, 5), (300, 512, 70), (128, 256, 130), (64, 128, 1))
"""(out_features, in_features, num_tokens): splits, tiles that are not full, more stages than the pipeline has."""


def rounded(x: Tensor, weight: Float8Weight) -> Tensor:
    """x as products of 8-bit floats see it: in float64."""
    columns = x.shape[1] if weight.tile[0] == 1 else 128
    grouped = x.float().unflatten(1, (-1, columns))
    scale = (grouped.abs().amax(-1, keepdim=True) / 448).clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale if weight.input_scale is None else weight.input_scale
    return ((grouped / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double()).flatten(1)


def multiply_fp8(
    ops: OpSet, size: tuple[int, int, int], tile: tuple[int, int] | None, dtype: torch.dtype, static: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As multiply, on sm_90."""
    rows, columns, tokens = size
    generator = torch.Generator().manual_seed(1)
    weight = replace(floats_of(rows, columns, tile), input_scale=torch.tensor(0.004) if static else None)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    x[0] = 0.0
    bias = torch.randn(rows, generator=generator).to(dtype)
    prepared = ops.prepare_quantized(weight, bias, dtype)
    assert isinstance(prepared.data, Fp8Weight)
    wide = replace(weight, scales=weight.scales.double()).dequantize(torch.float64)
    exact = functional.linear(rounded(x, weight), wide, bias.double())
    return ops.linear(x, prepared), exact, exact.float().to(dtype)


@pytest.mark.parametrize("copies", ("early", "late"))
@pytest.mark.parametrize("tile", ((128, 128), None), ids=str)
@pytest.mark.parametrize("size", FP8_SIZES, ids=str)
def test_products_of_8_bit_floats(
    ops: OpSet, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], tile: tuple[int, int] | None, copies: str
) -> None:
    monkeypatch.setenv("EMULATOR_COPIES", copies)
    dtype = torch.float16 if size[2] == 70 else torch.bfloat16
    assert_as_exact(*multiply_fp8(ops, size, tile, dtype, static=size[2] == 70))


def test_a_token_of_8_bit_floats_has_the_bits_that_it_has_alone(ops: OpSet) -> None:
    prepared = ops.prepare_quantized(floats_of(100, 2048, (128, 128)), None, torch.bfloat16)
    x = torch.randn(130, 2048, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = ops.linear(x, prepared)
    for begin, end in ((0, 1), (129, 130), (40, 70)):
        assert_bitwise_equal(ops.linear(x[begin:end], prepared), together[begin:end])


@pytest.mark.parametrize(("kind", "capability"), (("w4", "80"), ("w4", "90"), ("fp8", "90")))
def test_more_tokens_than_a_launch_of_splits_takes_have_the_same_bits(
    ops: OpSet, monkeypatch: pytest.MonkeyPatch, kind: str, capability: str
) -> None:
    """On sm_90 they are a launch of blocks that take all splits."""
    monkeypatch.setenv("EMULATOR_CAPABILITY", capability)
    weight = floats_of(16, 2048, (128, 128)) if kind == "fp8" else W4Case(16, 2048, 128, 1).weight()
    bias = torch.randn(16).bfloat16()
    prepared = ops.prepare_quantized(weight, bias, torch.bfloat16)
    x = torch.randn(1100, 2048, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = ops.linear(x, prepared)
    for begin, end in ((0, 2), (1022, 1027), (1099, 1100)):
        assert_bitwise_equal(ops.linear(x[begin:end], prepared), together[begin:end])


@pytest.mark.parametrize("tile", ((16, 16), (128, 32)))
def test_8_bit_floats_of_other_tiles_are_left_to_the_reference(ops: OpSet, tile: tuple[int, int]) -> None:
    weight = floats_of(128, 128, tile)
    prepared = ops.prepare_quantized(weight, None, torch.bfloat16)
    assert_bitwise_equal(prepared.data, weight.dequantize(torch.bfloat16))


@pytest.mark.parametrize("static", (False, True))
@pytest.mark.parametrize(("rows", "columns", "tokens"), SIZES)
def test_products_with_8_bit_integers_have_the_bits_of_the_reference(
    ops: OpSet, rows: int, columns: int, tokens: int, static: bool
) -> None:
    """Integers are summed exactly, however they are split."""
    weight = integers_of(rows, columns, static)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    x[1] = 0.0
    bias = torch.randn(rows, generator=generator).bfloat16()
    prepared = ops.prepare_quantized(weight, bias, torch.bfloat16)
    assert isinstance(prepared.data, PackedWeight)
    plain = Reference()
    expected = plain.linear(x, plain.prepare_quantized(weight, bias, torch.bfloat16))
    assert_bitwise_equal(ops.linear(x, prepared), expected)


def test_an_input_that_is_no_number_makes_its_token_none(ops: OpSet) -> None:
    weight = integers_of(16, 64)
    prepared = ops.prepare_quantized(weight, None, torch.bfloat16)
    x = torch.ones(3, 64).bfloat16()
    x[1, 5] = float("nan")
    found = ops.linear(x, prepared)
    assert found.isnan().all(1).tolist() == [False, True, False]
    assert not found[::2].isnan().any()
