"""Inputs of products rounded where they are made: the bits of the two ops one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines import discover
from engines.cuda.opset import OpSet
from engines.models.load import load_model
from engines.ops import OpSet as Reference
from engines.ops.linear import Inputs, LinearWeight, Quantized
from engines.ops.quantized import Float8Weight, Int8Weight
from tests.compare import assert_bitwise_equal
from tests.csrc.cuda import emulated
from tests.engines.cuda.test_families import sized
from tests.engines.cuda.test_quantized import floats_of, integers_of
from tests.parity.checkpoints import make_checkpoint
from tests.parity.ragged import Driver, settings

ORDERS = ("forward", "reverse", "random:1", "warp:1", "warp:2")
SIZES = ((5, 1024), (18, 128), (4, 1152), (1, 2176), (0, 128))
"""(num_tokens, columns): a warp a row, room for more tokens, a block a row, pieces in more than one round."""


def static(weight: Int8Weight | Float8Weight, scale: float) -> Int8Weight | Float8Weight:
    return replace(weight, input_scale=torch.tensor(scale))


WEIGHTS: dict[str, Callable[[int], Int8Weight | Float8Weight]] = {
    "int8": lambda columns: integers_of(24, columns),
    "int8 static": lambda columns: integers_of(24, columns, static=True),
    "fp8 tiles": lambda columns: floats_of(24, columns, (128, 128)),
    "fp8 tiles, static": lambda columns: static(floats_of(24, columns, (128, 128)), 0.01),
    "fp8 rows": lambda columns: floats_of(24, columns),
    "fp8 rows, static": lambda columns: static(floats_of(24, columns), 0.01),
}


def rows_of(tokens: int, columns: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers; one token of zeros, one with NaN."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[1:2] = 0.0
    x[3:4, 7] = float("nan")
    return x


def assert_same(product: LinearWeight, fused: Inputs, plain: Tensor) -> None:
    """Codes and scales are those that the plain result is rounded to."""
    assert isinstance(fused, Quantized)
    codes, scales = torch.ops.cuda_ops.quantize(plain, product.data.rounding, product.data.input_scale)
    assert_bitwise_equal(fused.codes, codes)
    assert fused.scales.shape == scales.shape
    assert_bitwise_equal(fused.scales[..., : len(plain)], scales[..., : len(plain)])


def check(ops: OpSet, kind: str, size: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> None:
    tokens, columns = size
    product = ops.prepare_quantized(WEIGHTS[kind](columns), None, dtype)
    x, residual = (rows_of(tokens, columns, seed, dtype) for seed in (1, 2))
    weight = rows_of(1, columns, 3, dtype)[0]
    offset = float(tokens % 2)
    plain, total = ops.add_rms_norm(x, residual, weight, 1e-5, offset)
    fused, same = ops.add_rms_norm_for(x, residual, weight, 1e-5, offset, product)
    assert_bitwise_equal(same, total)
    assert_same(product, fused, plain)
    gate_up = 3 * rows_of(tokens, 2 * columns, 4, dtype)
    for name in ("silu", "swiglu_oai"):
        assert_same(product, ops.act_and_mul_for(gate_up, name, product), ops.act_and_mul(gate_up, name))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_bits_are_those_of_both_ops(ops: OpSet, kind: str, size: tuple[int, int]) -> None:
    check(ops, kind, size)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_bits_do_not_depend_on_the_order_of_threads(ops: OpSet, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    monkeypatch.setenv("EMULATOR_ORDER", order)
    for kind, size in zip(WEIGHTS, (SIZES[0], SIZES[2]) * 3, strict=True):
        check(ops, kind, size, torch.float16)


def test_rows_that_shared_memory_does_not_hold_are_read_again(ops: OpSet) -> None:
    """The emulated device has 227 KiB."""
    check(ops, "int8", (1, 117 * 1024))


def test_other_weights_and_addresses_are_left_to_the_two_ops(ops: OpSet) -> None:
    wide = rows_of(2, 136, 1, torch.bfloat16)[:, 1:129]
    x, residual = (wide.clone() for _ in range(2))
    plain = ops.prepare_linear(torch.ones(8, 128).bfloat16(), None)
    assert isinstance(ops.act_and_mul_for(torch.cat((x, x), 1), "silu", plain), Tensor)
    rounds = ops.prepare_quantized(integers_of(24, 128), None, torch.bfloat16)
    weight = torch.ones(129).bfloat16()[1:]
    fused, _ = ops.add_rms_norm_for(x, residual, weight, 1e-5, 0.0, rounds)
    assert isinstance(fused, Tensor)
    gate_up = torch.randn(3, 257).bfloat16()[:, 1:]
    expected = ops.linear(ops.act_and_mul(gate_up, "silu"), rounds)
    assert_bitwise_equal(ops.linear(ops.act_and_mul_for(gate_up, "silu", rounds), rounds), expected)


class Apart(OpSet):
    """Every input is written in 16 bits and read again."""

    add_rms_norm_for = Reference.add_rms_norm_for
    act_and_mul_for = Reference.act_and_mul_for


class Counting(OpSet):
    """Counts products whose inputs come rounded."""

    count = 0

    def linear(self, x: Inputs, weight: LinearWeight) -> Tensor:
        self.count += isinstance(x, Quantized)
        return super().linear(x, weight)


LENGTHS = (5, 1, 34)


@pytest.mark.parametrize(("family", "rounded"), (("llama", 3), ("deepseek_v2", 1)))
def test_a_decoder_in_8_bits_has_the_logits_that_it_has_with_the_ops_apart(
    ops: OpSet, family: str, rounded: int, tmp_path: Path
) -> None:
    """rounded: products of a layer whose inputs come so, at least; the first norm of all has no sum before it."""
    config = sized(discover.families()[family].tiny_config())
    make_checkpoint(config, tmp_path)
    generator = torch.Generator().manual_seed(1)
    tokens = {i: torch.randint(0, config["vocab_size"], (n,), generator=generator) for i, n in enumerate(LENGTHS)}
    results = []
    for kind in (Apart, Counting):
        own = kind(emulated.library())
        model = load_model(settings(tmp_path, "bfloat16", 100, quantization="int8"), own)
        with torch.inference_mode():
            results.append(model.logits(Driver(model, own, torch.bfloat16, LENGTHS).run(tokens)))
    assert isinstance(own, Counting)
    assert own.count >= rounded * config["num_hidden_layers"] - 1
    assert_bitwise_equal(results[1], results[0])
