"""Every weight format: stored tensors against their published meaning, and whole models against plain ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import discover
from engines.api import CheckpointError, UnsupportedModelError
from engines.checkpoint import open_checkpoint
from engines.formats import gptq, mxfp4
from engines.formats._common import unpack
from engines.models.load import load_model, weight_format
from engines.ops import OpSet
from engines.ops.quantized import GroupedIntWeight, MXFP4Weight, concatenate
from tests.engines.formats import specification
from tests.engines.formats.checkpoints import LLAMA, SIZES, VARIANTS, Variant, write
from tests.parity.ragged import Driver, settings

GOLDEN = {
    "codes": [
        [4, 7, -3, -8, -5, 3, -5, -1, 1, -5, -3, -6, -4, -1, -2, 0],
        [0, 4, 2, -7, -2, -1, -1, 6, 0, -7, -3, 1, 5, 0, 1, -4],
    ],
    "weight_packed": [[1941112316, -2039208647], [-411690296, 1234015512]],
    "zeros": [[-5, -8], [-5, -3]],
    "weight_zero_point": [[51, 80]],
}
"""Packed by pack_to_int32 of compressed-tensors 0.20.0."""


def logits(folder: Path, dtype: str = "float32") -> torch.Tensor:
    ops = OpSet()
    model = load_model(settings(folder, dtype), ops)
    driver = Driver(model, ops, {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype], (9, 3))
    with torch.inference_mode():
        return model.logits(driver.run({0: torch.arange(9), 1: torch.arange(40, 43)}))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_model_is_that_of_the_weights_that_are_meant(variant: Variant, tmp_path: Path) -> None:
    quantized, plain, _ = write(variant, tmp_path)
    found, expected = logits(quantized), logits(plain)
    if variant.name.startswith("int") and variant.name.endswith("inputs"):
        # Inputs are rounded to 8 bits too: near, and not equal.
        error = (found - expected).norm() / expected.norm()
        assert 1e-4 < error < 0.05
    else:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_format_is_tested() -> None:
    methods = {variant.config["quant_method"].replace("-", "_") for variant in VARIANTS}
    assert methods | {"dense", "mxfp4", "int8", "w8a16"} == set(discover.names("engines.formats"))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_one_format_claims_a_checkpoint(variant: Variant) -> None:
    modules = discover.modules("engines.formats")
    assert sum(module.detect(variant.config) for module in modules.values()) == 1


def test_lost_tensors_are_named(tmp_path: Path) -> None:
    quantized, _, tensors = write(VARIANTS[0], tmp_path)
    del tensors["model.layers.0.mlp.up_proj.qzeros"]
    tensors["model.layers.0.mlp.down_proj.scales"] = torch.zeros(5, 5)
    tensors["model.layers.0.mlp.gate_proj.qweight"] = tensors["model.layers.0.mlp.gate_proj.qweight"].to(torch.int16)
    save_file(tensors, quantized / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_model(settings(quantized), OpSet())
    message = str(error.value)
    assert "missing: model.layers.0.mlp.up_proj.qzeros [4, 24]" in message
    assert "wrong shape: model.layers.0.mlp.down_proj.scales is [5, 5], config.json says [6, 128]" in message
    assert "wrong type: model.layers.0.mlp.gate_proj.qweight is I16, expected one of I32" in message


@pytest.mark.parametrize(
    "change, message",
    [
        ({"quant_method": "awq", "version": "gemv", "bits": 4}, "version 'gemv'; expected one of 'gemm'"),
        ({"quant_method": "gptq", "bits": 3}, "bits 3; expected one of 2, 4, 8"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "number of different config_groups 0"),
        ({"quant_method": "bitsandbytes"}, r"quantized \(bitsandbytes\); expected one of awq, compressed_tensors"),
    ],
)
def test_what_is_not_read_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    quantized, _, _ = write(VARIANTS[0], tmp_path)
    (quantized / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": change}))
    with pytest.raises(UnsupportedModelError, match=message):
        load_model(settings(quantized), OpSet())


def test_layers_left_unquantized_and_unknown_biases(tmp_path: Path) -> None:
    """A part of a merged projection in plain floats, and a bias that config.json does not know."""
    variant = next(v for v in VARIANTS if v.name == "gptq-4-32-sym-gptq")
    quantized, plain, tensors = write(variant, tmp_path)
    dense = load_file(plain / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    for end in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{name}.{end}"]
    tensors[f"{name}.weight"] = dense[f"{name}.weight"]
    save_file(tensors, quantized / "model.safetensors")
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=1e-4, atol=1e-4)

    bias = torch.randn(SIZES["mlp.up_proj"][0])
    tensors["model.layers.0.mlp.up_proj.bias"] = bias
    save_file(tensors, quantized / "model.safetensors")
    names = ("gate_proj", "up_proj", "down_proj")
    for which in names:
        size = SIZES[f"mlp.{which}"][0]
        dense[f"model.layers.0.mlp.{which}.bias"] = bias if which == "up_proj" else torch.zeros(size)
    save_file(dense, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps({**LLAMA, "mlp_bias": True}))
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=1e-4, atol=1e-4)


def test_act_order_with_an_order_for_each_part_is_still_right(tmp_path: Path) -> None:
    variant = next(v for v in VARIANTS if v.name.startswith("gptq-4-64-act"))
    quantized, plain, tensors = write(variant, tmp_path)
    dense = load_file(plain / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    made = gptq.quantize(torch.randn(SIZES["mlp.up_proj"]), 4, 64, False, torch.randperm(SIZES["mlp.up_proj"][1]))
    tensors.update({f"{name}.{end}": tensor for end, tensor in made.items()})
    meant = specification.gptq({end: tensor.numpy() for end, tensor in made.items()}, 4)
    dense[f"{name}.weight"] = torch.from_numpy(meant).float()
    save_file(tensors, quantized / "model.safetensors")
    save_file(dense, plain / "model.safetensors")
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=1e-4, atol=1e-4)


def test_act_order_with_unequal_groups_is_refused() -> None:
    g_idx = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    with pytest.raises(UnsupportedModelError, match="groups that are not of 2 inputs each"):
        gptq.column_order("q_proj", g_idx, 2)


def test_bfloat16_weights_are_rounded_once(tmp_path: Path) -> None:
    variant = VARIANTS[0]
    quantized, plain, _ = write(variant, tmp_path)
    torch.testing.assert_close(logits(quantized, "bfloat16"), logits(plain, "bfloat16"), rtol=0, atol=0)


def test_mxfp4_means_what_is_published() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 5, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (2, 5, 3), generator=generator, dtype=torch.uint8)
    for expert in range(2):
        weight = MXFP4Weight(blocks[expert].flatten(1), scales[expert]).dequantize(torch.float64).numpy()
        np.testing.assert_array_equal(weight, specification.mxfp4(blocks[expert].numpy(), scales[expert].numpy()))


def test_mxfp4_rounds_to_the_nearest_code() -> None:
    weight = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(1))
    made = mxfp4.quantize(weight)
    back = MXFP4Weight(made["blocks"][1].flatten(1), made["scales"][1]).dequantize(torch.float32)
    assert ((back - weight[1]).norm() / weight[1].norm()).item() < 0.15
    again = mxfp4.quantize(back[None])
    np.testing.assert_array_equal(MXFP4Weight(again["blocks"][0].flatten(1), again["scales"][0]).dequantize(
        torch.float32).numpy(), back.numpy())  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_rounding_is_to_the_nearest(variant: Variant) -> None:
    """No code is more than half a step from the weight, but where the symmetric range ends; float8: 1/16 of it."""
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(3)) * 0.2
    stored = {n: (t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t).numpy() for n, t in
              variant.quantize(weight).items()}  # fmt: skip
    error = np.abs(variant.meaning(stored) - weight.numpy())
    scales = next(t for name, t in stored.items() if "scale" in name).astype(np.float64)
    if "fp8" in variant.name or "float" in variant.name:
        assert (error <= np.abs(weight.numpy()) / 15.9 + scales.max() * 2**-9).all()
    else:
        assert error.max() <= 0.505 * scales.max() + np.abs(scales).max() * 2**-8


def test_a_zero_of_0_stored_less_one_is_0_again(tmp_path: Path) -> None:
    """Groups of positive weights only have it, and 4 bits of 0 - 1 are 15."""
    variant = next(v for v in VARIANTS if v.name.startswith("gptq-4-64-act"))
    positive = Variant(variant.name, variant.config, lambda w: variant.quantize(w.abs() + 0.1), variant.meaning)
    quantized, plain, tensors = write(positive, tmp_path)
    assert (unpack(tensors["model.layers.0.mlp.up_proj.qzeros"], 4) == 15).all()
    assert (load_file(plain / "model.safetensors")["model.layers.0.mlp.up_proj.weight"] >= 0).all()
    torch.testing.assert_close(logits(quantized), logits(plain), rtol=1e-4, atol=1e-4)


def test_pack_quantized_is_what_the_reference_library_writes() -> None:
    words, zero_words = (
        torch.tensor(GOLDEN[name], dtype=torch.int32) for name in ("weight_packed", "weight_zero_point")
    )
    assert (unpack(words, 4).int() - 8).tolist() == GOLDEN["codes"]
    assert (unpack(zero_words.T.contiguous(), 4).T[:2].int() - 8).tolist() == GOLDEN["zeros"]


def test_weights_of_one_class_are_joined_and_their_rows_chosen() -> None:
    def part(seed: int, rows: int) -> GroupedIntWeight:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (rows, 8), generator=generator, dtype=torch.uint8)
        return GroupedIntWeight(codes, torch.rand(rows, 2), torch.randint(0, 16, (rows, 2)).to(torch.int16), 4, 4)

    a, b = part(1, 3), part(2, 5)
    joined = concatenate([a, b])
    assert isinstance(joined, GroupedIntWeight)
    whole = torch.cat([a.dequantize(torch.float32), b.dequantize(torch.float32)])
    assert torch.equal(joined.dequantize(torch.float32), whole)
    index = torch.tensor([7, 0, 3])
    assert torch.equal(joined.rows(index).dequantize(torch.float32), whole[index])
    assert concatenate([a, torch.zeros(2, 8)]) is None


def test_plain_checkpoint_is_dense(tmp_path: Path) -> None:
    _, plain, _ = write(VARIANTS[0], tmp_path)
    assert weight_format(open_checkpoint(str(plain))).__name__ == "engines.formats.dense"
