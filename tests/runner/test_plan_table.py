"""The truth table of plans: every combination has a verdict or a named error, and so has any config.json."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines import discover
from engines.api import CheckpointError
from runner.config import ModelConfig
from runner.errors import EngineError, RunnerError
from runner.plan import resolve
from tests.runner.planning import CPU, H200, LLAMA, NO_DRIVER, checkpoint, planning

# The truth table

QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "nameless": {"bits": 3},
}
HOSTS = {
    "cpu": CPU,
    "cpu without the library": replace(CPU, extensions=frozenset()),
    "sm70": replace(H200, name="v100", compute_capability=(7, 0)),
    "sm75": replace(H200, name="t4", compute_capability=(7, 5)),
    "sm80": replace(H200, name="a100", compute_capability=(8, 0)),
    "sm90": H200,
    "sm90 without the library": replace(H200, extensions=frozenset()),
    "sm unknown": replace(H200, compute_capability=None),
    "rocm": replace(H200, name="mi300", device="rocm", compute_capability=None),
    "ascend": replace(H200, name="npu", device="ascend", compute_capability=None),
    "broken driver": replace(CPU, problems=("cuda is not available. Torch finds no device",)),
    "tiny memory": replace(CPU, memory_bytes=1 << 20, free_bytes=1 << 20, cpu_memory_bytes=1 << 20),
}
ARCHITECTURES = ["LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel", "NobodyForCausalLM"]
TABLE = list(
    itertools.product(
        ARCHITECTURES, QUANTIZATIONS, HOSTS, ["auto", "bfloat16", "float32"], [80, 128], [False, True],
        ["auto", "cuda", "cpu"],
    )
)  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("host", HOSTS)
def test_every_combination_has_a_verdict_or_a_named_error(architecture: str, host: str) -> None:
    for _, quantization, _, dtype, head_dim, adapters, backend in (
        row for row in TABLE if row[0] == architecture and row[2] == host
    ):
        adapted = {"a": "adapters/a"} if adapters else {}
        asked = planning(HOSTS[host], backend=backend, model=ModelConfig("x", dtype=dtype, adapters=adapted))
        config: dict[str, Any] = {"architectures": [architecture], "head_dim": head_dim, "n_positions": 1024}
        config["quantization_config"] = QUANTIZATIONS[quantization]
        known = architecture in discover.transformers_causal_architectures()
        native = architecture[:4] != "GPT2"
        read = quantization == "none" or (native and quantization != "nameless")
        runnable = architecture != "NobodyForCausalLM" and read and (native or not adapters)
        on_cuda = host in ("sm80", "sm90") and dtype != "float32" and native and backend != "cpu"
        on_cuda = on_cuda and quantization != "nameless" and not adapters
        on_triton = backend == "auto" and quantization != "nameless" and (native or quantization == "none")
        on_triton = on_triton and known and (native or not adapters)
        capable = host[:4] in ("sm80", "sm90") or host in ("rocm", "ascend")
        on_triton = on_triton and (capable or (host in ("sm70", "sm75") and dtype != "bfloat16"))
        runnable = runnable and (on_cuda or backend != "cuda")
        runnable = runnable and (host != "tiny memory" or architecture == "GPT2LMHeadModel")
        try:
            plan = resolve(asked, checkpoint(**config), HOSTS[host], "generate", known)
        except EngineError as error:
            assert not runnable, str(error)
            check_sentences(str(error), architecture, quantization, host, dtype, adapters, backend)
        else:
            assert runnable
            assert plan.settings.backend == ("cuda" if on_cuda else "triton" if on_triton else "cpu")
            assert plan.settings.implementation == ("transformers" if architecture.startswith("GPT2") else "native")
            assert json.loads(json.dumps(plan.to_dict()))["settings"]["backend"] == plan.settings.backend


def check_sentences(
    text: str, architecture: str, quantization: str, host: str, dtype: str, adapters: bool, backend: str
) -> None:
    """The reasons of an error are the ones that the combination has."""
    if architecture == "NobodyForCausalLM":
        assert text.startswith("model.path: no native family has NobodyForCausalLM, and transformers has no such")
        return
    method = (QUANTIZATIONS[quantization] or {}).get("quant_method", "unknown")
    op = "transformers_model" if architecture.startswith("GPT2") else "linear"
    of_cpu = backend != "cuda"
    offered = "unquantized weights only" if op != "linear" else "awq, gptq, fp8, compressed-tensors, mxfp4, int8, w8a16"
    quantized = f"{op} quantization={method}: cpu offers {offered}"
    unread = quantization != "none" if op != "linear" else quantization == "nameless"
    assert (quantized in text) == (of_cpu and unread)
    through = "transformers_model adapters=true: cpu does not offer it"
    assert (through in text) == (of_cpu and adapters and op != "linear")
    assert ("memory: weights" in text) == (of_cpu and host == "tiny memory" and op == "linear")
    of_cuda = backend != "cpu"
    sm = HOSTS[host].compute_capability
    asked_bf16 = dtype == "bfloat16" and sm is not None and sm < (8, 0)
    assert (
        f"sm {sm} for bfloat16".replace("(", "").replace(")", "").replace(", ", ".") in text.replace(" < 8.0", "")
    ) == (of_cuda and asked_bf16)
    sentences = {
        "cpu": NO_DRIVER,
        "sm70": "sm 7.0 < 8.0",
        "sm75": "sm 7.5 < 8.0",
        "sm unknown": "compute capability unknown",
        "rocm": "device rocm: expected cuda",
        "ascend": "device ascend: expected cuda",
        "broken driver": "cuda is not available. Torch finds no device",
    }
    if host in sentences and of_cuda:
        assert sentences[host] in text


def test_a_v100_gets_float16_with_a_sentence() -> None:
    plan = resolve(planning(HOSTS["sm70"]), checkpoint(), HOSTS["sm70"], "generate")
    triton = next(verdict for verdict in plan.verdicts if verdict.engine == "triton")
    assert triton.dtype == "float16"
    assert triton.accepted and plan.settings.backend == "triton"
    assert triton.notes[0] == "dtype float16 instead of the checkpoint's bfloat16: sm 7.0"


def test_float8_weights_are_only_stored_so_on_an_a100() -> None:
    config = {"quantization_config": QUANTIZATIONS["fp8"]}
    for host, said in ((HOSTS["sm80"], True), (HOSTS["sm90"], False)):
        plan = resolve(planning(host), checkpoint(**config), host, "generate")
        triton = next(verdict for verdict in plan.verdicts if verdict.engine == "triton")
        note = "fp8: sm 8.0 < 8.9, so weights are only stored in it, and multiplied as bfloat16"
        assert (note in triton.notes) is said


values = (
    st.none() | st.booleans() | st.integers(-2, 1 << 40) | st.text(max_size=5) | st.floats() | st.lists(st.integers())
)


KEYS = {*LLAMA, "head_dim", "rope_scaling", "quantization_config", "text_config", "auto_map", "sliding_window"}
NAMES = [*ARCHITECTURES, "Gemma2ForCausalLM", "Phi3ForCausalLM", "BertModel", "MambaForCausalLM"]


@settings(max_examples=300, deadline=None)
@example(
    changes={"num_hidden_layers": 1 << 40}, architecture="LlamaForCausalLM", kind="generate", known=True, host="sm70"
)
@given(
    changes=st.dictionaries(st.sampled_from(sorted(KEYS | {"n_positions"} - {"architectures"})), values, max_size=3),
    architecture=st.sampled_from(NAMES),
    kind=st.sampled_from(["generate", "score", "embed", "classify"]),
    known=st.booleans(),
    host=st.sampled_from(sorted(HOSTS)),
)
def test_no_config_json_ends_in_an_unnamed_exception(
    changes: dict[str, Any], architecture: str, kind: Any, known: bool, host: str
) -> None:
    config = {**LLAMA, **changes, "architectures": [architecture]}
    try:
        plan = resolve(planning(HOSTS[host]), checkpoint(config), HOSTS[host], kind, known)
    except (RunnerError, CheckpointError) as error:
        assert str(error).count(";") >= 1 or "\n" in str(error), str(error)
    else:
        assert any(verdict.accepted for verdict in plan.verdicts)
        plan.text()
