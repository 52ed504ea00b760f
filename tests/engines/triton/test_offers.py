"""The Triton engine's offer: what it says is what its op set has; the sentences where it cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from engines import discover
from engines.capability import AT_LOAD, YES, Allowed, difference, one_of, quantization_attributes
from engines.cpu import offers as cpu
from engines.cuda import offers as cuda
from engines.models.spec import DecoderSpec, EncoderSpec, RopeSpec, requirements
from engines.ops import origin
from engines.platform import Host
from engines.triton import offers
from engines.triton.opset import OpSet
from tests.engines.formats.checkpoints import VARIANTS

H200 = Host("this", "cuda", compute_capability=(9, 0), triton=True)
TORCH = {"head_linear", "embedding", "top_logprobs"}
SIZES: dict[str, tuple[int | str, ...]] = {
    "head_dim": (1, 64, 80, 96, 128, 192, 256),
    "rotary_dim": (2, 32, 64, 128, 256),
    "kv_lora_rank": (256, 512),
    "rope_dim": (32, 64),
    "group": (1, 7, 8, 16, 64),
    "activation": ("silu", "gelu", "gelu_tanh", "relu"),
    **dict.fromkeys(("weight_offset", "window", "softcap", "sinks"), (True, False)),
}
"""Where others take anything: what published models have."""


def test_ops_without_a_kernel_are_those_that_are_a_call_of_torchs() -> None:
    ops = OpSet()
    composed = {"add_rms_norm_for", "act_and_mul_for"}  # of kernels, one after the other
    own = set(offers.OPS) - composed - {"parallelism", "transformers_model"}
    assert {op for op in own if origin(ops, op) == "reference"} == TORCH


def includes(wide: Allowed, narrow: Allowed, sizes: tuple[int | str, ...]) -> bool:
    if wide.anything or narrow == wide:
        return True
    values = [*narrow.values, *(sizes if narrow.anything else ())]
    if not all(wide.accepts(value) for value in values) or (narrow.anything and not sizes):
        return False
    if narrow.ge is None and narrow.le is None:
        return True
    return (
        (wide.ge or 0) <= (narrow.ge or 0) and wide.multiple_of == 1 and (wide.le or 1 << 60) >= (narrow.le or 1 << 60)
    )


def missing(others: Mapping[str, Mapping[str, Allowed]], own: Mapping[str, Mapping[str, Allowed]]) -> list[str]:
    """What an engine offers and another does not, as op and attribute."""
    found = [op for op in others if op not in own]
    for op, attributes in others.items():
        for name, allowed in attributes.items():
            if op in own and not (name in own[op] and includes(own[op][name], allowed, SIZES.get(name, ()))):
                found.append(f"{op} {name}")
    return found


def test_what_the_cpu_engine_offers_is_offered() -> None:
    assert missing(cpu.OPS, offers.OPS) == []


def test_what_the_cuda_engine_offers_is_offered() -> None:
    assert missing(cuda.offers(replace(H200, name="h200", extensions=frozenset({"cuda"}))).ops, offers.OPS) == []


def test_inclusion_is_told_from_its_contrary() -> None:
    own: dict[str, dict[str, Allowed]] = {"a": {"x": Allowed(ge=1, le=256), "y": one_of("s")}, "b": {}}
    assert missing({"a": {"x": Allowed(ge=2, le=200), "y": one_of("s")}}, own) == []
    assert missing({"a": {"x": Allowed(ge=2, le=300)}}, own) == ["a x"]
    assert missing({"a": {"x": Allowed(ge=0)}, "c": {}}, own) == ["c", "a x"]
    assert missing({"a": {"y": one_of("s", "t")}, "b": {"z": YES}}, own) == ["a y", "b z"]


CONFIGS: tuple[dict[str, Any], ...] = (
    *(variant.config for variant in VARIANTS),
    {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    {"quant_method": "fp8", "activation_scheme": "static"},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
)


@pytest.mark.parametrize("name", AT_LOAD)
def test_every_quantization_at_load_is_offered(name: str) -> None:
    module = discover.families()["qwen3_moe"]
    asked = {"quantization": name, **AT_LOAD[name]}
    needed = requirements(module.spec(module.tiny_config()), "bfloat16", "generate", asked)
    assert difference(needed, offers.offers(H200)) == []


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda config: f"{config['quant_method']} {config.get('group_size', '')}"
)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_every_weight_format_is_offered_and_stays_as_it_is(family: str, config: dict[str, Any]) -> None:
    module = discover.families()[family]
    needed = requirements(module.spec(module.tiny_config()), "bfloat16", "generate", quantization_attributes(config))
    offer = offers.offers(H200)
    assert difference(needed, offer) == []
    assert not offer.dequantized


@pytest.mark.parametrize("family", discover.families())
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_family_is_offered(family: str, dtype: str) -> None:
    module = discover.families()[family]
    spec = module.spec(module.tiny_config())
    kind: Any = "generate" if isinstance(spec, DecoderSpec) else "embed"
    assert difference(requirements(spec, dtype, kind), offers.offers(H200)) == []


NO_DRIVER = "cuda is not available. No NVIDIA driver was found: install one, or use backend=cpu"
PLAIN = DecoderSpec(100, 64, 128, 2, 8, 2, 96, 512, RopeSpec())


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        (replace(H200, triton=False), "triton is not installed: pip install triton"),
        (
            replace(H200, c_compiler=False),
            "no C compiler: triton builds its launchers with one; install gcc, or set CC to another",
        ),
        (replace(H200, compute_capability=(6, 1)), "sm 6.1 < 7.0: use a newer GPU, or backend=cpu"),
        (replace(H200, compute_capability=(7, 0)), "sm 7.0 < 8.0 for bfloat16"),
        (replace(H200, compute_capability=(7, 5)), "sm 7.5 < 8.0 for bfloat16"),
        (
            Host("this", "cpu", triton=True),
            "cuda is not available. No NVIDIA driver was found: install one, or use backend=cpu",
        ),
    ],
)
def test_what_is_said_before_a_weight_is_read(host: Host, sentence: str) -> None:
    assert sentence in difference(requirements(PLAIN, "bfloat16", "generate"), offers.offers(host))


def test_a_head_that_does_not_fit_is_named() -> None:
    missed = difference(requirements(replace(PLAIN, head_dim=512), "bfloat16", "generate"), offers.offers(H200))
    assert "paged_attention head_dim=512: triton offers values from 1 up to 256" in missed


def test_volta_runs_in_float16() -> None:
    assert (
        difference(requirements(PLAIN, "float16", "generate"), offers.offers(replace(H200, compute_capability=(7, 0))))
        == []
    )


def test_latents_need_more_shared_memory_than_sm_75_has() -> None:
    module = discover.families()["deepseek_v3"]
    spec = module.spec({**module.tiny_config(), "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    needed = requirements(spec, "float16", "generate")
    missed = {sm: difference(needed, offers.offers(replace(H200, compute_capability=sm))) for sm in ((7, 0), (7, 5))}
    assert missed == {
        (7, 0): [],
        (7, 5): ["latent_attention kv_lora_rank=512: triton offers values from 1 up to 256"],
    }


def test_encoders_are_offered() -> None:
    encoder = EncoderSpec(100, 64, 128, 2, 4, 512)
    assert difference(requirements(encoder, "float16", "embed"), offers.offers(H200)) == []
