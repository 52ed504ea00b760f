"""What the CUDA engine says of itself to plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.api import Kind
from engines.capability import AT_LOAD, difference, quantization_attributes
from engines.cuda import offers, table
from engines.models.spec import DecoderSpec, EncoderSpec, MoESpec, RopeSpec, requirements
from engines.platform import Host

H200 = Host("this", "cuda", compute_capability=(9, 0), extensions=frozenset({"cuda"}))
H200_DESCRIBED = replace(H200, name="h200")
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8}, "input_activations": {"num_bits": 8, "dynamic": True}}},
}
LLAMA = DecoderSpec(100, 512, 128, 2, 8, 2, 64, 512, RopeSpec())


def library(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "_cuda_ops.so"
    path.write_bytes(b"\x7fELF\0" + text.encode() + b"\0\0")
    return path


def test_a_table_is_found_among_other_bytes(tmp_path: Path) -> None:
    assert table.read(library(tmp_path, table.FULL)) == table.FULL
    assert table.read(tmp_path / "absent.so") is None


@pytest.mark.parametrize("text", ("", "cuda_ops table 1\nsm 80\n", "cuda_ops table 2\nend\n"))
def test_a_library_without_a_table_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"_cuda_ops.so: it has no table of its ops; reinstall the project"):
        table.read(library(tmp_path, text))


def test_offers_are_those_of_the_installed_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = table.FULL.replace("head_dim 64 80 96 128 256", "head_dim 128").replace("sm 80 86 89 90 100 120", "sm 80 90")
    monkeypatch.setattr(table, "read", lambda: own)
    missed = difference(requirements(LLAMA, "bfloat16", "score"), offers.offers(H200))
    assert missed == ["paged_attention head_dim=64: cuda offers 128"]
    assert offers.offers(H200_DESCRIBED).ops != offers.offers(H200).ops


def test_of_a_library_that_is_absent_nothing_else_is_said() -> None:
    absent = offers.offers(replace(H200, extensions=frozenset()))
    assert difference(requirements(LLAMA, "bfloat16", "generate"), absent) == [
        "compiled extension absent: reinstall with nvcc on PATH"
    ]


@pytest.mark.parametrize(
    ("sm", "capability", "serves"),
    (
        ((80, 90), (8, 0), True),
        ((80, 90), (8, 9), True),
        ((86,), (8, 0), False),
        ((80, 90), (9, 0), True),
        ((80, 90), (10, 0), False),
        ((100,), (10, 3), False),
        ((120,), (12, 0), True),
    ),
)
def test_which_devices_the_code_runs_on(sm: tuple[int, ...], capability: tuple[int, int], serves: bool) -> None:
    assert table.Table(sm, {}).serves(capability) is serves


def test_a_device_without_code_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "read", lambda: table.FULL.replace("sm 80 86 89 90 100 120", "sm 80 86"))
    assert offers.offers(H200).blockers == (
        "_cuda_ops.so was compiled for sm 80, 86, this device is sm 9.0: reinstall with CSRC_CUDA_ARCHS unset, or with "
        "this one in it",
    )


def test_float32_is_missed_where_attention_lacks_it() -> None:
    described = offers.offers(H200_DESCRIBED)
    assert described.blockers == ()
    missed = difference(requirements(LLAMA, "float32", "generate"), described)
    assert missed == ["paged_attention dtype=float32: cuda offers bfloat16, float16"]


@pytest.mark.parametrize("kind", ("generate", "score"))
def test_no_op_of_a_decoder_is_left_to_the_reference(kind: Kind) -> None:
    described = offers.offers(H200_DESCRIBED)
    assert difference(requirements(LLAMA, "bfloat16", kind), described) == []
    assert described.reference == frozenset()


def test_encoders_are_not_offered() -> None:
    encoder = EncoderSpec(100, 64, 128, 2, 4, 512)
    missed = difference(requirements(encoder, "bfloat16", "embed"), offers.offers(H200_DESCRIBED))
    assert "encoder_attention: cuda does not offer it" in missed


@pytest.mark.parametrize(
    ("config", "missed"),
    (
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, []),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}, []),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, []),
        ({"quant_method": "gptq", "bits": 4, "group_size": 96}, ["linear group_size=96: cuda offers "]),
        (W8A8, []),
        ({"quant_method": "bitsandbytes"}, ["linear quantization=bitsandbytes: cuda offers "]),
    ),
)
def test_weights_that_the_kernel_takes_are_offered(config: dict[str, Any], missed: list[str]) -> None:
    needed = requirements(LLAMA, "bfloat16", "generate", quantization_attributes(config))
    found = difference(needed, offers.offers(H200_DESCRIBED))
    assert len(found) == len(missed)
    assert all(text.startswith(begin) for text, begin in zip(found, missed, strict=True))
    assert not {"w4a16", "w8a8", "fp8", "mxfp4"} & offers.offers(H200_DESCRIBED).dequantized


def test_inputs_of_16_bits_with_weights_of_8_are_not_offered() -> None:
    """They would be turned into 16 bits at load: less exact, and nothing saved."""
    asked = {"quantization": "w8a16", **AT_LOAD["w8a16"]}
    found = difference(requirements(LLAMA, "bfloat16", "generate", asked), offers.offers(H200_DESCRIBED))
    assert found == ["linear quantization=w8a16: cuda offers awq, gptq, compressed-tensors, fp8, mxfp4, int8"]


MOE = replace(LLAMA, moe=MoESpec(8, 2, 64))


@pytest.mark.parametrize(
    ("config", "missed"),
    (
        (None, []),
        ({"quant_method": "mxfp4"}, []),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, []),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, []),
        (W8A8, []),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
            ["fused_experts desc_act=true: cuda "],
        ),
    ),
)
def test_mixtures_of_experts_are_offered(config: dict[str, Any] | None, missed: list[str]) -> None:
    needed = requirements(MOE, "bfloat16", "generate", quantization_attributes(config))
    found = difference(needed, offers.offers(H200_DESCRIBED))
    assert len(found) == len(missed)
    assert all(text.startswith(begin) for text, begin in zip(found, missed, strict=True))


def test_a_library_without_the_product_takes_dense_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "read", lambda: table.FULL.replace("linear weights w4a16 w8a8 fp8 mxfp4\n", ""))
    needed = requirements(LLAMA, "bfloat16", "generate", quantization_attributes({"quant_method": "awq", "bits": 4}))
    assert difference(needed, offers.offers(H200)) == [
        "linear quantization=awq: cuda offers unquantized weights only",
    ]
