"""The decision: a truth table over models and machines, settings that carry over, memory, and every refusal's words."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest

from engines import discover
from engines.api import EngineConfig, SamplingParams
from engines.checkpoint import Checkpoint, SentenceConfig, TensorInfo
from engines.cpu.offers import Config as CpuConfig
from engines.platform import Host
from runner.config import DatasetConfig, HostConfig, JobConfig, ModelConfig, OutputConfig, ParallelismConfig, TaskConfig
from runner.errors import ConfigError, EngineError, InputError
from runner.fingerprint import fingerprint, spell
from runner.plan import ORDER, convert, make_plan, resolve

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": 128001,
}
BERT = {**discover.families()["bert"].tiny_config(), "torch_dtype": "float32"}

H200 = Host(
    "h200", "cuda", "NVIDIA H200", 1, (9, 0), 141 << 30, 141 << 30, 4.8e12, 989e12, 67e12, "13.0", 4.0,
    extensions=frozenset({"cpu", "cuda"}), triton=True,
)  # fmt: skip
CPU = Host(
    "this", "cpu", "a CPU", 1, None, 64 << 30, 60 << 30, cpu_name="a CPU", cpu_cores=8, cpu_memory_bytes=60 << 30,
    cpu_dtypes=frozenset({"float32", "bfloat16"}), extensions=frozenset({"cpu"}), triton=True,
)  # fmt: skip


@dataclass(frozen=True)
class EmbedConfig(TaskConfig):
    pooling: str | None = None
    normalize: bool | None = None


NO_DRIVER = "cuda is not available. No NVIDIA driver was found: install one, or use backend=cpu"


def checkpoint(config: dict[str, Any] = LLAMA, **changes: Any) -> Checkpoint:
    config = {**config, **changes}
    return Checkpoint("/models/x", config, config["architectures"][0], {}, {})


def job(**changes: Any) -> JobConfig:
    base = JobConfig(
        name="test",
        model=ModelConfig("models/x"),
        dataset=DatasetConfig("rows.parquet"),
        task=TaskConfig("generate"),
        sampling=SamplingParams(),
        backend_config=EngineConfig(),
    )
    return replace(base, **changes)


def planning(host: Host, **changes: Any) -> JobConfig:
    return job(mode="plan", host=HostConfig(name=host.name), **changes)


def missed(plan: Any, engine: str) -> tuple[str, ...]:
    return next(verdict.missed for verdict in plan.verdicts if verdict.engine == engine)


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
    reason = "  cpu: linear quantization=bitsandbytes: cpu offers awq, gptq, fp8, compressed-tensors, mxfp4, int8"
    assert reason in str(caught.value).splitlines()
    assert f"  cuda: {NO_DRIVER}" in str(caught.value)


def test_weights_that_are_dequantized_at_load_are_counted_so() -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    plan = resolve(job(), checkpoint(quantization_config=awq), CPU, "generate")
    text = "awq: weights are dequantized to bfloat16 at load and take the memory of that"
    assert text in next(verdict for verdict in plan.verdicts if verdict.engine == "cpu").notes
    plain = resolve(job(), checkpoint(), CPU, "generate")
    assert plan.memory[0].weight_bytes == plain.memory[0].weight_bytes


def offer_everything(monkeypatch: pytest.MonkeyPatch, backend: str, **changes: Any) -> None:
    """Give an engine that this version has no op set for the offer of the CPU engine, two devices wide."""
    import importlib

    from engines.capability import Offer, one_of
    from engines.cpu.offers import OPS

    ops = {**OPS, "parallelism": {"tp": one_of(1, 2), "dp": one_of(1, 2), "ep": one_of(1)}}
    module = importlib.import_module(f"engines.{backend}.offers")
    offered = Offer(engine=backend, ops=ops, since={"bfloat16": (8, 0)}, **changes)
    monkeypatch.setattr(module, "offers", lambda host: replace(offered, sm=host.compute_capability))


def offer_nothing(monkeypatch: pytest.MonkeyPatch, *backends: str) -> None:
    from engines.capability import Offer

    for backend in backends:
        monkeypatch.setattr(f"engines.{backend}.offers.offers", lambda host, name=backend: Offer(engine=name))


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


def test_sentence_encoders_keep_their_length() -> None:
    opened = replace(checkpoint(BERT), sentence=SentenceConfig("mean", True, 256))
    assert resolve(job(task=EmbedConfig("embed")), opened, CPU, "embed").settings.config.max_model_len == 256
    asked = job(task=EmbedConfig("embed"), model=ModelConfig("x", max_model_len=300))
    assert resolve(asked, opened, CPU, "embed").settings.config.max_model_len == 300


# Settings


@pytest.mark.parametrize(("key", "value"), [("max_model_len", 100), ("dtype", "float32")])
def test_a_setting_of_two_groups_may_stand_in_either(key: str, value: Any) -> None:
    other = {"max_model_len": 200, "dtype": "float16"}[key]
    for changes in (
        {"model": ModelConfig("x", **{key: value})},
        {"backend_config": EngineConfig(**{key: value})},
        {"model": ModelConfig("x", **{key: value}), "backend_config": EngineConfig(**{key: value})},
    ):
        assert getattr(resolve(job(**changes), checkpoint(), CPU, "generate").settings.config, key) == value
    both = job(model=ModelConfig("x", **{key: value}), backend_config=EngineConfig(**{key: other}))
    with pytest.raises(ConfigError, match=f"model.{key}: {value} with backend_config.{key}: {other}"):
        resolve(both, checkpoint(), CPU, "generate")


def test_a_length_beyond_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.max_model_len: 8193; expected at most 8192"):
        resolve(job(model=ModelConfig("x", max_model_len=8193)), checkpoint(), CPU, "generate")
    dynamic = checkpoint(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    plan = resolve(job(model=ModelConfig("x", max_model_len=16384)), dynamic, CPU, "generate")
    assert plan.settings.config.max_model_len == 16384


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("block_size", 24, "a power of two"),
        ("block_size", 0, "a power of two"),
        ("max_num_seqs", 0, "at least 1"),
        ("max_num_batched_tokens", 0, "at least 1"),
        ("kv_memory_fraction", 1.5, "more than 0 and at most 1"),
        ("kv_cache_bytes", 0, "at least 1, or null"),
    ],
)
def test_engine_settings_out_of_bounds(key: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"backend_config.{key}: {value}; expected .*{expected}"):
        resolve(job(backend_config=replace(EngineConfig(), **{key: value})), checkpoint(), CPU, "generate")


UNLIKE_DEFAULTS = {
    "dtype": "float16", "max_model_len": 77, "max_num_seqs": 3, "max_num_batched_tokens": 99, "block_size": 64,
    "kv_dtype": "fp8", "kv_cache_bytes": 1 << 20, "kv_memory_fraction": 0.25, "prefix_caching": False,
}  # fmt: skip


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineConfig)])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(discover.backends(), 2)))
def test_every_shared_setting_carries_over(field: str, source: str, target: str) -> None:
    import importlib

    value = UNLIKE_DEFAULTS[field]  # a KeyError here: a new field needs a value
    config = importlib.import_module(f"engines.{source}.offers").Config(**{field: value})
    assert value != getattr(type(config)(), field)
    converted, lost = convert(config, target)
    assert type(converted) is importlib.import_module(f"engines.{target}.offers").Config
    assert {**dataclasses.asdict(converted), field: value} == dataclasses.asdict(converted)
    assert lost == []


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(discover.backends(), 2)))
def test_every_own_setting_that_is_lost_is_named(source: str, target: str) -> None:
    import importlib

    own = importlib.import_module(f"engines.{source}.offers").Config
    shared = {f.name for f in dataclasses.fields(importlib.import_module(f"engines.{target}.offers").Config)}
    for f in dataclasses.fields(own):
        if f.name in shared:
            continue
        for value in (0, False, 4):
            converted, lost = convert(own(**{f.name: value}), target)
            assert lost == [f"backend_config.{f.name}={value}: not carried over, {target} has no such setting"]
            assert not hasattr(converted, f.name)


def test_parallelism_that_the_model_cannot_have() -> None:
    with pytest.raises(EngineError, match=r"cpu: parallelism.tp: 3; num_attention_heads is 32, and 32 / 3 leaves 2"):
        resolve(job(parallelism=ParallelismConfig(tp=3)), checkpoint(), CPU, "generate")
    with pytest.raises(EngineError, match=r"cpu: parallelism.tp: 64; num_attention_heads is 32, and 32 / 64 leaves 32"):
        resolve(job(parallelism=ParallelismConfig(tp=64)), checkpoint(), CPU, "generate")


def test_a_plan_says_what_each_device_holds() -> None:
    whole = resolve(planning(H200), checkpoint(), H200, "generate")
    wide = planning(H200, parallelism=ParallelismConfig(tp=4, dp=2))
    plan = resolve(wide, checkpoint(), replace(H200, num_devices=8), "generate")
    assert (plan.settings.tp, plan.settings.ep) == (4, 1)
    line = next(line for line in plan.text().splitlines() if line.startswith("parallel "))
    assert line == (
        "parallel  tp 4, dp 2, ep 1: 8 devices in 2 engines; a device holds 8 of 32 heads, 2 of 8 KV heads, 3,584 of "
        "14,336 intermediate features, 32,064 of 128,256 tokens of the vocabulary, and all norms"
    )
    of_whole, of_rank = whole.memory[-1], plan.memory[-1]
    assert of_rank.kv_bytes_per_token * 4 == of_whole.kv_bytes_per_token
    assert 0.25 < of_rank.weight_bytes / of_whole.weight_bytes < 0.2501
    few = "parallelism: tp * dp = 4 * 2 = 8 devices; h200 has 1"
    assert few in missed(resolve(wide, checkpoint(), H200, "generate"), "triton")


def test_a_described_host_can_only_be_planned_for() -> None:
    with pytest.raises(ConfigError, match=r"host.name: 'h200' with mode=run; expected `this`.*; use mode=plan"):
        resolve(job(host=HostConfig("h200")), checkpoint(), H200, "generate")


# Memory


def test_memory_of_llama_3_8b(monkeypatch: pytest.MonkeyPatch) -> None:
    offer_nothing(monkeypatch, "cuda", "triton")
    config = EngineConfig(kv_memory_fraction=0.5)
    plan = resolve(planning(H200, backend_config=config), checkpoint(), H200, "generate")
    on_gpu = plan.memory[1]
    assert on_gpu.device == "NVIDIA H200" and on_gpu.fits
    assert on_gpu.weight_bytes == 16_060_522_496 and on_gpu.kv_bytes_per_token == 131_072
    free = (141 << 30) - 16_060_522_496 - on_gpu.activation_bytes
    assert on_gpu.kv_tokens == free // 2 // 131_072
    assert on_gpu.num_seqs(1000) == on_gpu.kv_tokens // 1000
    assert plan.memory[0].fits is None, "the processor of a described GPU machine is not described"
    assert "KV cache 262,144 bytes a token; not known to fit" in plan.text()
    assert "not described, so whether the model fits is not known" in "\n".join(plan.notes)


def test_the_cache_is_no_larger_than_can_be_in_use() -> None:
    config = EngineConfig(max_num_seqs=4, max_model_len=100, block_size=32)
    for dp in (1, 2):
        memory = resolve(
            job(backend_config=config, parallelism=ParallelismConfig(dp=dp)), checkpoint(), CPU, "generate"
        ).memory[0]
        assert (memory.kv_tokens, memory.num_seqs(128)) == (dp * 4 * 128, dp * 4)


def test_weights_count_in_the_compute_dtype_and_tied_heads_once() -> None:
    tensors = {
        "model.embed_tokens.weight": TensorInfo("f", "BF16", (10, 4), 0, 80),
        "lm_head.weight": TensorInfo("f", "BF16", (10, 4), 80, 80),
    }
    for tied, dtype, expected in ((False, "float32", 320), (True, "float32", 160), (True, "bfloat16", 80)):
        opened = replace(checkpoint(tie_word_embeddings=tied), tensors=tensors)
        plan = resolve(job(model=ModelConfig("x", dtype=dtype)), opened, CPU, "generate")
        assert plan.memory[0].weight_bytes == expected


def test_a_model_larger_than_memory_is_refused_with_the_numbers() -> None:
    small = replace(CPU, memory_bytes=8 << 30, free_bytes=8 << 30, cpu_memory_bytes=8 << 30)
    with pytest.raises(EngineError, match=r"cpu: memory: weights 16\.1 GB \+ activations .* > 8\.6 GB of a CPU"):
        resolve(job(), checkpoint(), small, "generate")


def test_little_free_memory_is_said() -> None:
    busy = replace(CPU, free_bytes=1 << 30, cpu_memory_bytes=1 << 30)
    assert "close other programs" in "\n".join(resolve(job(), checkpoint(), busy, "generate").notes)


def test_a_cache_smaller_than_one_request_is_said() -> None:
    config = EngineConfig(kv_cache_bytes=1000 * 131_072)
    notes = "\n".join(resolve(job(backend_config=config), checkpoint(), CPU, "generate").notes)
    assert "KV cache: holds 1,000 tokens, fewer than max_model_len=8,192" in notes


# Fingerprint


def prints(**changes: Any) -> dict[str, str]:
    asked = job(**changes)
    return fingerprint(
        asked,
        resolve(asked, checkpoint(), CPU, "generate").settings,
        "digest",
        dict.fromkeys(asked.model.adapters, "f00"),
    )


STEERING = {
    "mode": "plan",
    "max_runtime_s": 5.0,
    "max_error_rate": 0.1,
    "max_consecutive_errors": None,
    "grace_s": 1.0,
    "window_rows": 7,
    "retry_errors": True,
    "on_change": "new",
    "on_unsupported": "fallback",
    "output": OutputConfig(folder="elsewhere", compression="gzip", row_group_rows=5, journal_interval_s=9.0),
    "backend_config": EngineConfig(
        max_num_seqs=5, max_num_batched_tokens=64, kv_cache_bytes=1 << 30, prefix_caching=False
    ),
    "host": HostConfig(price_per_hour=3.0),
}


@pytest.mark.parametrize("key", STEERING)
def test_what_only_steers_the_run_is_not_in_the_fingerprint(key: str) -> None:
    assert prints(**{key: STEERING[key]}) == prints()


MATTERS = {
    "seed": ({"seed": 1}, {"seed"}),
    "samples": ({"samples": 2}, {"samples"}),
    "numerics": ({"numerics": "fast"}, {"numerics"}),
    "sampling": ({"sampling": SamplingParams(temperature=0.5, stop=("a",))}, {"sampling.temperature", "sampling.stop"}),
    "sampling columns": ({"sampling_columns": {"top_k": "k"}}, {"sampling_columns"}),
    "dtype": ({"model": ModelConfig("x", dtype="float32")}, {"dtype"}),
    "length": ({"model": ModelConfig("x", max_model_len=9)}, {"max_model_len"}),
    "adapters": (
        {"model": ModelConfig("x", adapters={"a": "folder"}, adapter="a", adapter_column="c")},
        {"model.adapters", "model.adapter", "model.adapter_column"},
    ),
    "kv dtype": ({"backend_config": EngineConfig(kv_dtype="int8")}, {"kv_dtype"}),
    "block size": ({"backend_config": EngineConfig(block_size=16)}, {"block_size"}),
    "task": ({"task": EmbedConfig("generate", pooling="x")}, {"task.pooling", "task.normalize"}),
    "dataset": (
        {"dataset": DatasetConfig("y", "csv", filter="a > 1", limit=3, chunk_rows=5, id_column="i", split="s")},
        {f"dataset.{key}" for key in ("path", "format", "filter", "limit", "chunk_rows", "id_column", "split")},
    ),
    "columns": ({"output": OutputConfig(keep_columns=[], token_ids=True)}, {"output.keep_columns", "output.token_ids"}),
}


@pytest.mark.parametrize("case", MATTERS)
def test_what_can_change_a_result_is_in_the_fingerprint(case: str) -> None:
    changes, keys = MATTERS[case]
    first, second = prints(), prints(**changes)
    assert {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)} == keys


def test_fingerprints_are_readable_and_hold_no_secret() -> None:
    assert all(len(value) <= 160 for value in prints(dataset=DatasetConfig("x" * 5000)).values())
    assert spell("a" * 5000) != spell("a" * 4999 + "b")
    assert prints(dataset=DatasetConfig("s3://key:secret@bucket/a"))["dataset.path"] == "s3://bucket/a"
    signed = prints(dataset=DatasetConfig("https://host/a.parquet?X-Signature=abc"))
    assert signed["dataset.path"] == "https://host/a.parquet"
    assert prints(dataset=DatasetConfig("/a b/c?d=*.parquet"))["dataset.path"] == "/a b/c?d=*.parquet"


def test_a_plan_shows_no_secret() -> None:
    plan = resolve(job(dataset=DatasetConfig("s3://key:secret@bucket/a")), checkpoint(), CPU, "generate")
    assert "secret" not in plan.text() and "secret" not in json.dumps(plan.to_dict())


# The whole


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


def test_a_malformed_host_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r'host.compute_capability: \'90\'; expected "<major>.<minor>"'):
        make_plan(job(mode="plan", host=HostConfig("box", "cuda", compute_capability="90")))


def test_this_machine_cannot_be_described() -> None:
    with pytest.raises(ConfigError, match=r"host.memory_gib: 8.0 with host.name=this; expected no description"):
        make_plan(job(host=HostConfig(memory_gib=8.0)))


def test_a_quantized_cache_holds_more_and_is_part_of_the_requirements() -> None:
    plain = resolve(job(), checkpoint(), CPU, "generate")
    small = resolve(
        planning(CPU, backend="cpu", backend_config=CpuConfig(kv_dtype="int8")), checkpoint(), CPU, "generate"
    )
    size = plain.memory[0].kv_bytes_per_token // 2
    assert size < small.memory[0].kv_bytes_per_token < size * 1.2
    assert small.settings.config.kv_dtype == "int8"
    slow = planning(replace(CPU, extensions=frozenset()), backend="cpu", backend_config=CpuConfig(kv_dtype="int8"))
    bare = resolve(slow, checkpoint(), replace(CPU, extensions=frozenset()), "generate")
    for plan, noted in ((small, False), (bare, True)):
        notes = [note for verdict in plan.verdicts for note in verdict.notes]
        assert any("quantized_attention" in note for note in notes) is noted
    through = planning(CPU, backend="cpu", backend_config=CpuConfig(kv_dtype="int8"))
    with pytest.raises(EngineError, match="transformers_model kv_dtype=int8: cpu does not offer it"):
        resolve(through, checkpoint(architectures=["GPT2LMHeadModel"], n_positions=1024), CPU, "generate", True)


def test_quantization_at_load_is_planned_for() -> None:
    """Engines without it say what they lack, and a quantized checkpoint is not quantized again."""
    wanted = job(model=replace(job().model, quantization="int8"))
    plan, plain = resolve(wanted, checkpoint(), CPU, "generate"), resolve(job(), checkpoint(), CPU, "generate")
    assert plan.settings.quantization == "int8" and plain.settings.quantization is None
    assert plan.settings.backend == "cpu"
    assert plan.memory[0].weight_bytes < plain.memory[0].weight_bytes
    t4 = replace(H200, name="t4", compute_capability=(7, 5))
    elsewhere = resolve(planning(t4, model=wanted.model), checkpoint(), t4, "generate")
    assert "sm 7.5 < 8.0 for w8a8" in missed(elsewhere, "triton")
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    with pytest.raises(ConfigError, match=r"model\.quantization: int8, and .* quantized already \(awq\)"):
        resolve(wanted, checkpoint(quantization_config=awq), CPU, "generate")


def test_copies_of_the_model_on_one_processor_take_memory_each() -> None:
    one, two = (resolve(job(parallelism=ParallelismConfig(dp=dp)), checkpoint(), CPU, "generate") for dp in (1, 2))
    assert two.memory[0].weight_bytes == 2 * one.memory[0].weight_bytes
    config = EngineConfig(kv_cache_bytes=10_000 * 131_072)  # of 10,000 tokens, and of 5,000 each
    notes = [
        resolve(job(parallelism=ParallelismConfig(dp=dp), backend_config=config), checkpoint(), CPU, "generate").notes
        for dp in (1, 2)
    ]
    assert "KV cache" not in " ".join(notes[0])
    assert "KV cache of each copy of the model: holds 5,000 tokens, fewer than max_model_len" in "\n".join(notes[1])
    elsewhere = resolve(planning(H200, parallelism=ParallelismConfig(dp=2)), checkpoint(), H200, "generate")
    assert "tp * dp = 1 * 2 = 2 devices; h200 has 1" in " ".join(missed(elsewhere, "triton"))
