"""Products with quantized weights as large GPUs get them: shared among programs, and with float8 inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engines.ops import OpSet as Reference
from engines.ops.linear import LinearWeight
from engines.ops.quantized import Float8Weight, GroupedIntWeight, Int8Weight, MXFP4Weight, QuantizedWeight
from engines.triton import linear
from engines.triton.quantized import Even, Packed, pack_words
from tests.cases import quantized_weights
from tests.compare import assert_as_exact, assert_bitwise_equal

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Product:
    """A weight of 4 bits, or of others, and its inputs."""

    num_tokens: int
    in_features: int
    out_features: int
    group_size: int
    dtype: torch.dtype = BF16
    bits: int = 4
    symmetric: bool = False
    permuted: bool = False
    scales: torch.dtype = F16

    def __str__(self) -> str:
        flags = "s" * self.symmetric + "p" * self.permuted
        return f"{self.num_tokens}x{self.in_features}x{self.out_features}-w{self.bits}/{self.group_size}{flags}"

    def weight(self) -> GroupedIntWeight:
        generator = torch.Generator().manual_seed(self.in_features)
        shape = (self.out_features, -(-self.in_features // self.group_size))
        top = 1 << self.bits
        half = torch.full(shape, top // 2, dtype=torch.int16)
        codes = torch.randint(0, top, (self.out_features, self.in_features), generator=generator, dtype=torch.uint8)
        return GroupedIntWeight(
            codes,
            (torch.rand(shape, generator=generator) / 10 + 0.01).to(self.scales).float(),
            half if self.symmetric else torch.randint(0, top, shape, generator=generator, dtype=torch.int16),
            self.bits,
            self.group_size,
            torch.randperm(self.in_features, generator=generator) if self.permuted else None,
        )

    def inputs(self) -> tuple[Tensor, Tensor]:
        """A strided view that begins at an odd address, and a bias."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.num_tokens, self.in_features + 3, generator=generator).to(self.dtype)[:, 1:-2]
        return x, torch.randn(self.out_features, generator=generator).to(self.dtype)


PRODUCTS = (
    Product(1, 1024, 72, 128),
    Product(1, 2048, 8, 64, F16, symmetric=True),
    Product(3, 640, 40, 32, BF16, permuted=True, scales=BF16),
    Product(17, 1000, 24, 1000, symmetric=True),
    Product(2, 512, 20, 32, F16, bits=8, scales=F32),
    Product(1, 1536, 16, 64, BF16, bits=2),
    Product(20, 576, 200, 48, BF16),
    Product(1, 900, 10, 64, F32),
    Product(5, 520, 16, 20, F16, bits=8),
    Product(3, 1100, 40, 1100, BF16, bits=8, scales=F32, symmetric=True),
    Product(70, 256, 140, 128, BF16, permuted=True),
    Product(0, 128, 128, 128),
)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tiles and its number of processors."""
    monkeypatch.setattr(linear, "capability", lambda device: (9, 0))
    monkeypatch.setattr(linear, "processors", lambda device: 132)


def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The splits of each product from here on."""
    seen: list[int] = []
    own = linear.splits_of
    monkeypatch.setattr(linear, "splits_of", lambda *sizes: (seen.append(own(*sizes)), seen[-1])[1])
    return seen


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_groups_of_integers(ops: Reference, case: Product, h200: None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, (x, bias) = case.weight(), case.inputs()
    prepared = ops.prepare_quantized(weight, bias, case.dtype)
    assert isinstance(prepared.data, Packed)
    assert (prepared.data.scales.dtype == F32) == (case.scales == F32)
    assert (prepared.data.zeros is None) == case.symmetric
    seen = launched(monkeypatch)
    exact = functional.linear(x.double(), weight.dequantize(torch.float64).double(), bias.double())
    plain = functional.linear(x, weight.dequantize(case.dtype), bias)
    assert_as_exact(ops.linear(x, prepared), exact, plain)
    assert seen == [] if case.num_tokens in (0, 70) else seen[0] > 1


@pytest.mark.parametrize("name", ["fp8 tiles", "mxfp4", "int8", "int8 static"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_other_weights_shared_among_programs(
    ops: Reference, name: str, dtype: torch.dtype, h200: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = quantized_weights(40, 1024)[name]
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(3)).to(dtype)
    reference = Reference()
    wide = replace(weight, scales=weight.scales.double()) if isinstance(weight, Int8Weight) else weight
    exact = reference.linear(x.double(), reference.prepare_quantized(wide, bias.double(), torch.float64))
    plain = reference.linear(x, reference.prepare_quantized(weight, bias, dtype))
    seen = launched(monkeypatch)
    assert_as_exact(ops.linear(x, ops.prepare_quantized(weight, bias, dtype)), exact, plain)
    assert seen[0] > 1


def float8(out_features: int, in_features: int, tile: tuple[int, int], static: bool) -> Float8Weight:
    generator = torch.Generator().manual_seed(out_features)
    data = torch.randn(out_features, in_features, generator=generator).to(torch.float8_e4m3fn)
    shape = (-(-out_features // tile[0]), -(-in_features // tile[1]))
    scales = (torch.rand(shape, generator=generator) + 0.5) * 0.02
    return Float8Weight(data, scales, tile, torch.tensor(0.01) if static else None)


def rounded(x: Tensor, weight: Float8Weight) -> Tensor:
    """Inputs as the tensor cores get them, in float32."""
    size = min(weight.tile[1], x.shape[1])
    parts = []
    for part in x.float().split(size, 1):
        scale = part.abs().amax(1, keepdim=True) / 448 if weight.input_scale is None else weight.input_scale
        scale = scale.clamp(min=torch.finfo(F32).tiny)
        parts.append((part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    ("weight", "num_tokens"),
    [
        (float8(40, 384, (128, 128), False), 5),
        (float8(200, 1152, (128, 128), False), 1),
        (float8(24, 384, (24, 384), True), 3),
        (float8(40, 512, (1, 512), False), 70),
    ],
    ids=lambda value: f"{value.tile}" if isinstance(value, Float8Weight) else str(value),
)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_float8_inputs(ops: Reference, weight: Float8Weight, num_tokens: int, dtype: torch.dtype, h200: None) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(num_tokens, weight.shape[1], generator=generator).to(dtype)
    x[:, 3] *= 9.0  # beyond a static scale
    prepared = ops.prepare_quantized(weight, None, dtype)
    assert isinstance(prepared.data, Even)
    meant = rounded(x, weight)
    exact = meant.double() @ weight.dequantize(F32).double().T
    assert_as_exact(ops.linear(x, prepared), exact, meant.to(dtype) @ weight.dequantize(dtype).T)


@pytest.mark.parametrize(("columns", "tile"), [(128, (32, 64)), (300, (128, 128)), (96, (1, 96))])
def test_other_float8_meets_inputs_as_they_are(ops: Reference, columns: int, tile: tuple[int, int], h200: None) -> None:
    assert isinstance(ops.prepare_quantized(float8(32, columns, tile, False), None, BF16).data, Packed)


def test_a_token_of_zeros(ops: Reference, h200: None) -> None:
    """It has no largest magnitude to be divided by."""
    for weight in (float8(40, 256, (128, 128), False), quantized_weights(40, 256)["int8"]):
        prepared = ops.prepare_quantized(weight, None, BF16)
        assert not ops.linear(torch.zeros(2, 256, dtype=BF16), prepared).any()


def test_words_hold_columns_in_the_order_of_the_documentation() -> None:
    codes = torch.arange(3 * 300).view(3, 300).remainder(16).to(torch.uint8)
    words = pack_words(codes, 4)
    assert words.shape == (3, 3, 16)
    for row, column in ((0, 0), (1, 17), (2, 299), (1, 255)):
        chunk, inside = divmod(column, 128)
        field = int(words[chunk, row, inside % 16]) >> (4 * (inside // 16)) & 15
        assert field == int(codes[row, column])


@pytest.mark.parametrize("name", quantized_weights(32, 64))
def test_memory_is_that_of_the_codes(ops: Reference, name: str) -> None:
    weight = quantized_weights(256, 1024)[name]
    prepared: LinearWeight = ops.prepare_quantized(weight, None, BF16)
    kept = sum(t.numel() * t.element_size() for t in vars(prepared.data).values() if isinstance(t, Tensor))
    bits: dict[type[Any], int] = {Int8Weight: 8, Float8Weight: 8, MXFP4Weight: 4}
    size = weight.bits if isinstance(weight, GroupedIntWeight) else bits[type(weight)]
    # Scales and zeros of groups of 16 and 32, and an order of inputs, are the rest.
    assert kept <= 256 * 1024 * size / 8 * 1.4


def test_bits_of_a_token_do_not_depend_on_others_in_its_block(ops: Reference, h200: None) -> None:
    case = Product(16, 512, 40, 64)
    weights: tuple[QuantizedWeight, ...] = (case.weight(), quantized_weights(40, 512)["int8"])
    x, bias = case.inputs()
    for weight in weights:
        prepared = ops.prepare_quantized(weight, bias, BF16)
        assert_bitwise_equal(ops.linear(x[:1], prepared), ops.linear(x, prepared)[:1])
