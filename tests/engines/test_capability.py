"""Needs against offers: the sentences that a person reads."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from engines import discover, platform
from engines.api import EngineConfig, Requirement
from engines.capability import (
    ANYTHING,
    DENSE_ONLY,
    YES,
    Allowed,
    Offer,
    difference,
    one_of,
    quantization_attributes,
    reference_ops,
)
from engines.models.spec import DecoderSpec, EncoderSpec, RopeSpec, requirements
from engines.platform import Host

HEADS = one_of(64, 96, 128, 256)
CUDA_LIKE = Offer(
    engine="cuda",
    ops={
        "paged_attention": {"head_dim": HEADS, "dtype": one_of("bfloat16", "float16"), "window": YES},
        "linear": {"dtype": one_of("bfloat16", "float16"), "quantization": one_of("awq"), "group_size": one_of(128)},
        "rope": {"rotary_dim": Allowed(ge=16, le=256, multiple_of=8)},
    },
    sm=(7, 5),
    since={"bfloat16": (8, 0)},
    reference=frozenset({"rope"}),
)


@pytest.mark.parametrize(
    ("op", "attributes", "expected"),
    [
        ("paged_attention", {"head_dim": 128}, []),
        ("paged_attention", {"head_dim": 80}, ["paged_attention head_dim=80: cuda offers 64, 96, 128, 256"]),
        ("paged_attention", {"dtype": "bfloat16"}, ["sm 7.5 < 8.0 for bfloat16"]),
        ("paged_attention", {"dtype": "float32"}, ["paged_attention dtype=float32: cuda offers bfloat16, float16"]),
        ("paged_attention", {"window": True}, []),
        ("paged_attention", {"softcap": True}, ["paged_attention softcap=true: cuda does not offer it"]),
        ("lora", {}, ["lora: cuda does not offer it"]),
        ("rope", {"rotary_dim": 64}, []),
        ("rope", {"rotary_dim": 20}, ["rope rotary_dim=20: cuda offers multiples of 8 from 16 up to 256"]),
        ("rope", {"rotary_dim": 512}, ["rope rotary_dim=512: cuda offers multiples of 8 from 16 up to 256"]),
        ("linear", {"quantization": "awq", "group_size": 128}, []),
        ("linear", {"quantization": "awq", "group_size": 32}, ["linear group_size=32: cuda offers 128"]),
        ("linear", {"quantization": "gptq", "bits": 4}, ["linear quantization=gptq: cuda offers awq"]),
    ],
)
def test_sentences(op: str, attributes: dict[str, Any], expected: list[str]) -> None:
    assert difference([Requirement(op, attributes)], CUDA_LIKE) == expected


def test_a_finding_is_said_once() -> None:
    twice = [Requirement("paged_attention", {"dtype": "bfloat16"}), Requirement("linear", {"dtype": "bfloat16"})]
    assert difference(twice, CUDA_LIKE) == ["sm 7.5 < 8.0 for bfloat16"]


def test_an_offer_without_ops_accepts_nothing() -> None:
    assert difference([Requirement("linear")], Offer("x")) == ["linear: x does not offer it"]
    assert difference([Requirement("linear")], Offer("x", blockers=("no device",))) == ["no device"]


def test_reference_ops_count_in_the_decode_step_only() -> None:
    assert reference_ops([Requirement("rope"), Requirement("linear")], CUDA_LIKE) == ["rope"]
    assert reference_ops([Requirement("rope", in_decode_step=False)], CUDA_LIKE) == []


@pytest.mark.parametrize(
    ("allowed", "value", "accepted"),
    [
        (ANYTHING, "x", True),
        (DENSE_ONLY, "awq", False),
        (one_of(1), True, True),
        (Allowed(ge=1), 5, True),
        (Allowed(ge=1), 0, False),
        (Allowed(ge=1), True, False),
        (Allowed(le=8), "x", False),
        (Allowed(values=(3,), ge=8), 3, True),
    ],
)
def test_allowed(allowed: Allowed, value: Any, accepted: bool) -> None:
    assert allowed.accepts(value) is accepted


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, {}),
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
            {"quantization": "awq", "bits": 4, "group_size": 128, "version": "gemm", "weights": "w4a16"},
        ),
        (
            {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False, "sym": True},
            {"quantization": "gptq", "bits": 4, "group_size": -1, "desc_act": False, "sym": True, "weights": "w4a16"},
        ),
        (
            {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
            {
                "quantization": "fp8",
                "format": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": "128x128",
                "weights": "fp8",
            },
        ),
        ({"quant_method": "mxfp4"}, {"quantization": "mxfp4", "weights": "mxfp4"}),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {
                    "g": {"weights": {"num_bits": 8, "type": "int"}, "input_activations": {"dynamic": True}}
                },
            },
            {
                "quantization": "compressed-tensors",
                "format": "int-quantized",
                "bits": 8,
                "sym": True,
                "activation_scheme": "dynamic",
                "weights": "w8a8",
            },
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 128, "actorder": "group"}}},
            },
            {
                "quantization": "compressed-tensors",
                "format": "pack-quantized",
                "bits": 4,
                "group_size": 128,
                "sym": True,
                "desc_act": True,
                "weights": "w4a16",
            },
        ),
        ({"bits": 4}, {"quantization": "unknown", "bits": 4}),
    ],
)
def test_quantization_attributes(config: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    assert quantization_attributes(config) == expected


PLAIN = DecoderSpec(100, 64, 128, 2, 8, 2, 24, 512, RopeSpec())


def attributes_of(op: str, spec: Any, kind: Any = "generate", **options: Any) -> dict[str, Any]:
    found = [need for need in requirements(spec, "bfloat16", kind, **options) if need.op == op]
    assert found, op
    return {key: value for need in found for key, value in need.attributes.items()}


def test_requirements_follow_from_the_spec() -> None:
    assert attributes_of("paged_attention", PLAIN) == {"dtype": "bfloat16", "head_dim": 24, "group": 4}
    rich = DecoderSpec(
        100, 64, 128, 2, 8, 2, 24, 512, RopeSpec(kind="yarn", rotary_dim=12), windows=(64, 0), attn_softcap=50.0,
        norm_weight_offset=1.0, hidden_act="gelu_tanh", logit_softcap=30.0,
    )  # fmt: skip
    attention = attributes_of("paged_attention", rich)
    assert attention["window"] is True and attention["softcap"] is True
    assert attributes_of("rope", rich) == {"dtype": "bfloat16", "head_dim": 24, "kind": "yarn", "rotary_dim": 12}
    assert attributes_of("rms_norm", rich)["weight_offset"] is True
    assert attributes_of("act_and_mul", rich)["activation"] == "gelu_tanh"
    assert attributes_of("softcap", rich) == {}
    assert attributes_of("lora", PLAIN, adapters=True) == {"dtype": "bfloat16"}
    assert attributes_of("linear", PLAIN, quantization={"quantization": "awq"})["quantization"] == "awq"
    encoder = EncoderSpec(100, 64, 128, 2, 4, 512)
    assert attributes_of("encoder_attention", encoder, "embed") == {"dtype": "bfloat16", "head_dim": 16}
    assert not [need for need in requirements(encoder, "float32", "embed") if need.op == "sample"]


def test_backends_are_the_ones_that_plans_order() -> None:
    from runner.plan import ORDER

    assert sorted(ORDER) == discover.backends()


@pytest.mark.parametrize("backend", discover.backends())
def test_a_backend_offers_known_ops_and_has_a_config(backend: str) -> None:
    from engines.ops import OP_NAMES

    module = importlib.import_module(f"engines.{backend}.offers")
    offer = module.offers(platform.probe())
    assert offer.engine == backend
    assert set(offer.ops) <= {*OP_NAMES, "lora", "parallelism", "transformers_model"}
    assert issubclass(module.Config, EngineConfig)
    assert module.Config() == module.Config()


@pytest.mark.parametrize("family", discover.families())
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_cpu_engine_runs_every_family(family: str, dtype: str) -> None:
    from engines.cpu.offers import offers

    module = discover.families()[family]
    spec = module.spec(module.tiny_config())
    kind = "generate" if isinstance(spec, DecoderSpec) else "embed"
    offer = offers(Host(name="this", device="cpu"))
    assert difference(requirements(spec, dtype, kind), offer) == []


def test_the_cpu_engine_says_what_the_missing_library_costs() -> None:
    from engines.cpu.offers import offers

    absent, present = (offers(Host("this", "cpu", extensions=frozenset(e))) for e in ((), ("cpu",)))
    assert "paged_attention" in reference_ops(requirements(PLAIN, "float32", "generate"), absent)
    assert absent.notes == ("compiled CPU library absent: reinstall with a C++20 compiler on PATH",)
    assert reference_ops(requirements(PLAIN, "float32", "generate"), present) == []


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_engines_that_are_not_built_say_so(backend: str) -> None:
    module = importlib.import_module(f"engines.{backend}.offers")
    h200 = Host("h200", "cuda", compute_capability=(9, 0), extensions=frozenset({"cuda"}), triton=True)
    built = "opset" in discover.names(f"engines.{backend}")
    sentence = f"the {backend} engine is not part of this version: there is no engines/{backend}/opset.py"
    assert (sentence in module.offers(h200).blockers) is not built


def test_an_absent_extension_is_named() -> None:
    from engines.cuda import offers

    host = Host("this", "cuda", compute_capability=(9, 0))
    assert offers.offers(host).blockers == ("compiled extension absent: reinstall with nvcc on PATH",)
    assert (
        offers.offers(Host("this", "cuda", compute_capability=(7, 5))).blockers[0]
        == "sm 7.5 < 8.0: use a newer GPU, or backend=cpu"
    )


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.triton import offers

    monkeypatch.setattr(offers, "names", lambda package: ["offers", "opset"])
    host = Host("this", "cuda", compute_capability=(9, 0), triton=False)
    assert offers.offers(host).blockers == ("triton is not installed: pip install triton",)
