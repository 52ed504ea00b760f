"""The decision: which engine, through which implementation, and every refusal's words."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from engines.checkpoint import SentenceConfig
from engines.cpu.offers import Config as CpuConfig
from runner.config import HostConfig, ModelConfig, ParallelismConfig, TaskConfig
from runner.errors import ConfigError, EngineError, InputError
from runner.plan import ORDER, make_plan, resolve
from tests.runner.planning import (
    BERT,
    CPU,
    H200,
    LLAMA,
    NO_DRIVER,
    EmbedConfig,
    checkpoint,
    job,
    missed,
    offer_everything,
    offer_nothing,
    planning,
)

# What is chosen, and why


def test_a_cpu_machine_runs_on_the_cpu_and_says_why_not_elsewhere() -> None:
    plan = resolve(job(), checkpoint(), CPU, "generate")
    assert (plan.settings.backend, plan.settings.dtype, plan.settings.device) == ("cpu", "bfloat16", "cpu")
    assert plan.settings.implementation == "native"
    assert type(plan.settings.config) is CpuConfig
    assert [verdict.engine for verdict in plan.verdicts] == list(ORDER)
    assert missed(plan, "cuda")[0] == missed(plan, "triton")[0] == NO_DRIVER
    assert missed(plan, "cpu") == ()


def test_auto_takes_the_first_that_misses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_nothing(monkeypatch, "cuda")
    offer_everything(monkeypatch, "triton")
    assert resolve(planning(H200), checkpoint(), H200, "generate").settings.backend == "triton"
    offer_everything(monkeypatch, "cuda")
    plan = resolve(planning(H200), checkpoint(), H200, "generate")
    assert (plan.settings.backend, plan.settings.device) == ("cuda", "cuda")


def test_auto_passes_over_reference_ops_in_the_decode_step_and_a_named_engine_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offer_nothing(monkeypatch, "cuda")
    offer_everything(monkeypatch, "triton", reference=frozenset({"rope"}))
    plan = resolve(planning(H200), checkpoint(), H200, "generate")
    assert plan.settings.backend == "cpu"
    assert missed(plan, "triton") == ("rope: on the reference inside the decode step",)
    named = resolve(planning(H200, backend="triton"), checkpoint(), H200, "generate")
    assert named.settings.backend == "triton"
    notes = next(v for v in named.verdicts if v.engine == "triton").notes
    assert notes[0] == "rope: on the reference inside the decode step"
    assert "no GPU has run its kernels yet" in notes[1]


def test_an_explicit_backend_overrides_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_everything(monkeypatch, "cuda")
    assert resolve(planning(H200, backend="cpu"), checkpoint(), H200, "generate").settings.backend == "cpu"


def test_an_explicit_backend_that_cannot_be_honoured_is_an_error_with_the_list() -> None:
    with pytest.raises(EngineError) as caught:
        resolve(job(backend="cuda"), checkpoint(), CPU, "generate")
    lines = str(caught.value).splitlines()
    assert lines[0] == "backend: cuda cannot run LlamaForCausalLM here"
    assert lines[1] == f"  {NO_DRIVER}"
    assert lines[-1] == (
        "expected an engine that misses nothing; use backend=auto, or on_unsupported=fallback to take cpu"
    )


def test_fallback_takes_the_next_engine_and_names_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = resolve(job(backend="cuda", on_unsupported="fallback"), checkpoint(), CPU, "generate")
    assert plan.settings.backend == "cpu"
    assert "instead of cuda, which cannot run it" in plan.text()
    offer_everything(monkeypatch, "triton")
    config = CpuConfig(num_threads=2, prefix_caching=False)
    wide = planning(
        H200, backend="cpu", on_unsupported="fallback", backend_config=config, parallelism=ParallelismConfig(2)
    )
    offer_nothing(monkeypatch, "cpu", "cuda")
    plan = resolve(wide, checkpoint(), replace(H200, num_devices=2), "generate")
    assert plan.settings.backend == "triton" and plan.settings.config.prefix_caching is False
    assert "backend_config.num_threads=2: not carried over, triton has no such setting" in plan.notes


def test_when_nothing_can_run_it_every_engine_says_why() -> None:
    unread = {"quant_method": "bitsandbytes", "bits": 4}
    with pytest.raises(EngineError) as caught:
        resolve(job(), checkpoint(quantization_config=unread), CPU, "generate")
    offered = "awq, gptq, fp8, compressed-tensors, mxfp4, int8, w8a16"
    assert f"  cpu: linear quantization=bitsandbytes: cpu offers {offered}" in str(caught.value).splitlines()
    assert f"  cuda: {NO_DRIVER}" in str(caught.value)


# Models without a native family


def test_a_causal_model_without_a_family_runs_through_transformers() -> None:
    gpt2 = checkpoint({"architectures": ["GPT2LMHeadModel"], "n_positions": 1024})
    plan = resolve(job(), gpt2, CPU, "generate", through_transformers=True)
    assert plan.settings.implementation == "transformers" and plan.spec is None
    assert plan.settings.config.max_model_len == 1024
    assert plan.notes == (
        "implementation=transformers: no native family has GPT2LMHeadModel; its layers run as transformers has them",
    )


def test_a_variant_that_the_family_cannot_run_goes_to_transformers() -> None:
    odd = checkpoint(rope_scaling={"rope_type": "spiral", "factor": 2.0})
    plan = resolve(job(), odd, CPU, "generate", through_transformers=True)
    assert plan.settings.implementation == "transformers"
    assert "engines.models.llama cannot run it" in plan.notes[0] and "spiral" in plan.notes[0]


def test_code_of_the_checkpoint_runs_only_when_asked_for() -> None:
    own = checkpoint(architectures=["OwnForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling.OwnForCausalLM"})
    with pytest.raises(
        EngineError, match=r"needs the Python code that the checkpoint brings; .*trust_remote_code=true"
    ):
        resolve(job(), own, CPU, "generate")
    plan = resolve(job(model=ModelConfig("x", trust_remote_code=True)), own, CPU, "generate")
    assert plan.settings.trust_remote_code
    assert "runs the checkpoint's own Python code" in plan.notes[0]
    # A family or a class of transformers comes before the checkpoint's code.
    known = checkpoint(auto_map={"AutoModelForCausalLM": "modeling.X"})
    plan = resolve(job(model=ModelConfig("x", trust_remote_code=True)), known, CPU, "generate")
    assert not plan.settings.trust_remote_code and plan.settings.implementation == "native"


def test_a_config_without_sizes_is_named() -> None:
    broken = {key: value for key, value in LLAMA.items() if key != "hidden_size"}
    with pytest.raises(InputError, match=r"model.path: /models/x: .*hidden_size"):
        resolve(job(), checkpoint(broken), CPU, "generate")


# Task and model


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (BERT, "generate", "BertModel is an encoder; expected a causal language model"),
        (BERT, "score", "BertModel is an encoder; expected a causal language model"),
        (LLAMA, "classify", "LlamaForCausalLM has no classification head; expected ...ForSequenceClassification"),
        ({**LLAMA, "architectures": ["LlamaModel"]}, "generate", "LlamaModel has no language-model head"),
        (
            {**LLAMA, "architectures": ["LlamaForSequenceClassification"], "num_labels": 3},
            "generate",
            "LlamaForSequenceClassification has no language-model head; .* use task=classify",
        ),
    ],
)
def test_a_task_that_the_model_cannot_do(config: dict[str, Any], kind: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(job(task=TaskConfig(kind)), checkpoint(config), CPU, kind)


def test_classification_through_transformers_is_refused() -> None:
    with pytest.raises(EngineError, match="transformers serves causal models only"):
        resolve(job(), checkpoint({"architectures": ["GPT2X"]}), CPU, "classify", through_transformers=True)


@pytest.mark.parametrize(
    ("config", "asked", "sentence", "expected"),
    [
        (BERT, None, None, ("mean", True)),
        (BERT, None, SentenceConfig("cls", False, 256), ("cls", False)),
        (BERT, "max", SentenceConfig("cls", False, 256), ("max", False)),
        (LLAMA, None, None, ("last", True)),
        (LLAMA, "mean", None, ("mean", True)),
    ],
)
def test_pooling(config: dict[str, Any], asked: str | None, sentence: Any, expected: tuple[str, bool]) -> None:
    opened = replace(checkpoint(config), sentence=sentence)
    plan = resolve(job(task=EmbedConfig("embed", pooling=asked)), opened, CPU, "embed")
    assert (plan.settings.pooling, plan.settings.normalize) == expected


def test_pooling_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"task.pooling: cls with LlamaForCausalLM, whose first token sees no other"):
        resolve(job(task=EmbedConfig("embed", pooling="cls")), checkpoint(), CPU, "embed")
    with pytest.raises(ConfigError, match=r"task.pooling: 'median'; expected one of cls, mean, max, last"):
        resolve(job(task=EmbedConfig("embed", pooling="median")), checkpoint(), CPU, "embed")


# Hosts, and the whole


def test_a_described_host_can_only_be_planned_for() -> None:
    with pytest.raises(ConfigError, match=r"host.name: 'h200' with mode=run; expected `this`.*; use mode=plan"):
        resolve(job(host=HostConfig("h200")), checkpoint(), H200, "generate")


def test_a_malformed_host_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r'host.compute_capability: \'90\'; expected "<major>.<minor>"'):
        make_plan(job(mode="plan", host=HostConfig("box", "cuda", compute_capability="90")))


def test_this_machine_cannot_be_described() -> None:
    with pytest.raises(ConfigError, match=r"host.memory_gib: 8.0 with host.name=this; expected no description"):
        make_plan(job(host=HostConfig(memory_gib=8.0)))


def test_the_text_of_a_plan() -> None:
    text = resolve(job(), checkpoint(), CPU, "generate").text()
    for line in (
        "job       test, task generate, results in outputs/test",
        "model     models/x (LlamaForCausalLM, 8.03 B parameters)",
        "engine    cpu: the first of cuda, triton, cpu that can run the model",
        "dtype     bfloat16",
        "  cpu     can run it (chosen)",
        "  cuda    cannot run it",
        f"          - {NO_DRIVER}",
    ):
        assert line in text.splitlines()


def test_importing_the_plan_loads_no_torch() -> None:
    code = (
        "import sys, runner.plan, runner.memory, runner.plan_text, runner.hub\n"
        "print(sorted({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
