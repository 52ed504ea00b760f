"""The Triton engine's offer: what it says is what its op set has; the sentences where it cannot run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engines import discover
from engines.capability import difference
from engines.cpu import offers as cpu
from engines.models.spec import DecoderSpec, EncoderSpec, RopeSpec, requirements
from engines.ops import origin
from engines.platform import Host
from engines.triton import offers
from engines.triton.opset import OpSet

H200 = Host("this", "cuda", compute_capability=(9, 0), triton=True)
TORCH = {"head_linear", "embedding", "top_logprobs"}
NOT_YET = {"lora", "transformers_model"}
"""What the CPU engine has beyond this one."""


def test_ops_without_a_kernel_are_those_that_are_a_call_of_torchs() -> None:
    ops = OpSet()
    own = set(offers.OPS) - {"parallelism"}
    assert {op for op in own if origin(ops, op) == "reference"} == TORCH


def test_what_the_cpu_engine_offers_is_offered() -> None:
    missing = set(cpu.OPS) - set(offers.OPS)
    assert missing <= NOT_YET


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
        (replace(H200, compute_capability=(7, 0)), "sm 7.0 < 7.5: use a newer GPU, or backend=cpu"),
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


def test_encoders_are_offered() -> None:
    encoder = EncoderSpec(100, 64, 128, 2, 4, 512)
    assert difference(requirements(encoder, "float16", "embed"), offers.offers(H200)) == []
