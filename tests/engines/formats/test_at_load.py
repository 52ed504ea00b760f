"""model.quantization: plain checkpoints as 8-bit integers, on the reference and as the CPU engine packs them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines import discover, extension
from engines.api import EngineSettings, Request
from engines.capability import AT_LOAD
from engines.cpu.linear import PackedInt8, PackedWeight
from engines.cpu.offers import Config
from engines.cpu.opset import OpSet as CpuOpSet
from engines.formats import int8, w8a16
from engines.load import load_engine
from engines.models.load import load_model
from engines.ops import OpSet
from engines.ops.linear import LinearWeight
from engines.ops.quantized import QuantizedWeight
from tests.parity.checkpoints import make_checkpoint
from tests.parity.ragged import settings as plain_settings

COMPILED = extension.reason() is None


def test_the_largest_magnitude_of_a_row_is_127_and_the_error_half_a_step() -> None:
    weight = torch.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0.0
    made = int8.quantize(weight)
    assert made.data.abs().amax(1).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert bool(((made.dequantize(torch.float32) - weight).abs() <= made.scales[:, None] * 0.5001).all())


def test_the_same_numbers_whatever_the_inputs_are() -> None:
    weight = torch.randn(33, 70).T  # as experts that lie in one tensor are
    made, expected = w8a16.quantize(weight), int8.quantize(weight)
    assert (made.bits, made.group_size, made.scales.shape, made.zeros.unique().tolist()) == (8, 33, (70, 1), [128])
    assert made.codes.amin(1).clamp(max=2).ge(1).all() and made.codes.is_contiguous()
    assert torch.equal(made.dequantize(torch.float32), expected.dequantize(torch.float32))


def test_what_can_be_planned_for_can_be_read() -> None:
    assert set(AT_LOAD) <= set(discover.names("engines.formats"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 8, 8), (1, 64, 96), (5, 33, 17), (300, 96, 40)])
@pytest.mark.parametrize("given", [False, True], ids=["by token", "one scale"])
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_packed_products_are_the_references(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, given: bool, has_bias: bool
) -> None:
    torch.manual_seed(rows)
    x = torch.randn(rows, inputs).to(dtype)
    x[:, 0] *= 30
    weight = int8.quantize(torch.randn(outputs, inputs))
    if given:
        weight = replace(weight, input_scale=torch.tensor(0.07))
    bias = torch.randn(outputs).to(dtype) if has_bias else None
    ops, reference = CpuOpSet(), OpSet()
    found = ops.linear(x, ops.prepare_quantized(weight, bias, dtype))
    expected = reference.linear(x, reference.prepare_quantized(weight, bias, dtype))
    assert found.dtype == dtype and found.shape == expected.shape
    unit = torch.finfo(dtype).eps * (32 if dtype == torch.float32 else 2)  # bfloat16 is rounded twice
    torch.testing.assert_close(found, expected, rtol=unit, atol=unit * float(expected.abs().max()) if rows else 0.0)


@pytest.mark.skipif(not COMPILED, reason="the library is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    ops = CpuOpSet()
    weight = ops.prepare_quantized(int8.quantize(torch.randn(48, 80)), None, dtype)
    assert isinstance(weight.data, (PackedInt8, PackedWeight))
    x = torch.randn(300, 80).to(dtype)
    whole = ops.linear(x, weight)
    for first, last in ((0, 1), (3, 10), (250, 300), (0, 256), (17, 273)):
        assert torch.equal(ops.linear(x[first:last], weight), whole[first:last])


def test_a_token_that_is_no_number_spoils_no_other() -> None:
    ops = CpuOpSet()
    weight = ops.prepare_quantized(int8.quantize(torch.randn(16, 32)), None, torch.float32)
    x = torch.randn(4, 32)
    sound = ops.linear(x, weight)
    x[2, 5] = torch.nan
    found = ops.linear(x, weight)
    assert bool(found[2].isnan().all()) and torch.equal(found[[0, 1, 3]], sound[[0, 1, 3]])


@pytest.mark.parametrize("quantization", AT_LOAD)
@pytest.mark.parametrize(("family", "share"), [("llama", 0.1), ("qwen3", 0.1), ("qwen2_moe", 0.4), ("gpt_oss", 0.4)])
def test_scores_of_a_model_stay_near(tmp_path: Path, family: str, share: float, quantization: str) -> None:
    """Random routers choose other experts for inputs that are a little off."""
    make_checkpoint(discover.families()[family].tiny_config(), tmp_path)
    settings = EngineSettings("cpu", str(tmp_path), "float32", Config(kv_cache_bytes=1 << 20, num_threads=1))
    prompts = [[5, 9, 2, 7], [1, 2, 3, 4, 5, 6, 7, 8], [11]]

    def score(quantization: str | None) -> torch.Tensor:
        engine = load_engine(replace(settings, kind="score", quantization=quantization))  # type: ignore[arg-type]
        engine.submit([Request(i, "score", prompt * 3, score_from=1) for i, prompt in enumerate(prompts)])
        found = {}
        while engine.num_unfinished:
            for outcome in engine.step():
                assert outcome.values, outcome.error
                found[outcome.request_id] = outcome.values
        return torch.tensor([value for i in sorted(found) for value in found[i]])

    plain, quantized = score(None), score(quantization)
    assert not torch.equal(plain, quantized), "nothing was quantized"
    assert float((plain - quantized).abs().mean()) < share * float(plain.abs().mean())


class Recorded(OpSet):
    """Sizes of what it prepares."""

    def __init__(self) -> None:
        self.plain: list[tuple[int, ...]] = []
        self.quantized: list[tuple[int, ...]] = []

    def prepare_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearWeight:
        self.plain.append(tuple(weight.shape))
        return super().prepare_linear(weight, bias)

    def prepare_quantized(self, weight: QuantizedWeight, bias: torch.Tensor | None, dtype: torch.dtype) -> LinearWeight:
        self.quantized.append(tuple(weight.shape))
        return LinearWeight(weight, bias, weight.shape[1], weight.shape[0])


@pytest.mark.parametrize("quantization", AT_LOAD)
@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "deepseek_v3"])
def test_heads_routers_and_what_is_absorbed_stay_plain(tmp_path: Path, family: str, quantization: str) -> None:
    config = {**discover.families()[family].tiny_config(), "tie_word_embeddings": False}
    make_checkpoint(config, tmp_path)
    before, after = Recorded(), Recorded()
    asked = plain_settings(tmp_path)
    load_model(asked, before)
    load_model(replace(asked, quantization=quantization), after)  # type: ignore[arg-type]
    assert not before.quantized and sorted(before.plain) == sorted(after.plain + after.quantized)
    experts = config.get("n_routed_experts", config.get("num_experts"))
    assert {size[0] for size in after.plain} <= {config["vocab_size"], experts, 1}, "more than heads and routers"
    assert (config["vocab_size"], config["hidden_size"]) in after.plain
