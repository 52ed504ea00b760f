"""docs/support_matrix.md: what runs where, made from what is found in the tree and from what engines offer.

Whether something runs is asked of the offers, never written down here. What is written down is the evidence: the test
that shows it. An entry whose test is not in the tree is an error, so that a deleted test takes its claim along.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engines import discover
from engines.api import Kind
from engines.capability import difference
from engines.models.spec import DecoderSpec, ModelSpec, requirements
from engines.platform import Host, platforms
from runner.plan import ORDER

ROOT = Path(__file__).resolve().parent.parent
TESTED, COMPILED, SIMULATED, UNTESTED = "tested", "compiled only", "simulated", "not tested"

HOSTS = {
    "cpu": Host("a CPU", "cpu", extensions=frozenset({"cpu"})),
    "triton": Host("an H200", "cuda", compute_capability=(9, 0), extensions=frozenset({"cuda"}), triton=True),
    "cuda": Host("an H200", "cuda", compute_capability=(9, 0), extensions=frozenset({"cuda"}), triton=True),
}
"""Where each engine is asked: a machine that has all it could want."""

PUBLISHED_HEAD_DIM = 128
"""Of most published decoders: tiny ones have odd sizes, which compiled engines do not offer."""

FAMILY_EVIDENCE = {
    ("cpu", "decoder"): "tests/parity/test_logits.py",
    ("cpu", "encoder"): "tests/parity/test_encoders.py",
    ("triton", "decoder"): "tests/engines/triton/test_engine.py",
    ("triton", "encoder"): "tests/engines/triton/test_engine.py",
}
"""Tests that are parametrized over every family found. Engines without one are not tested."""
DTYPE_EVIDENCE = {
    ("cpu", "float32"): "tests/parity/test_logits.py",
    ("cpu", "bfloat16"): "tests/parity/test_logits.py",
    ("cpu", "float16"): "",
    **{("triton", dtype): "tests/engines/triton/test_opset.py" for dtype in ("float32", "bfloat16", "float16")},
}
INTERPRETED = ("triton",)
"""Engines whose tests run their kernels on the processor."""
FORMAT_EVIDENCE = {
    "dense": "tests/parity/test_logits.py",
    **dict.fromkeys(("awq", "compressed_tensors", "fp8", "gptq", "mxfp4"), "tests/engines/formats/test_formats.py"),
    **dict.fromkeys(("int8", "w8a16"), "tests/engines/formats/test_at_load.py"),
}
"""On the CPU engine; what other engines take of them is in their offers."""
DEVICE_EVIDENCE = {
    "x86-64 CPU, Linux": (TESTED, "all tests run there"),
    "ARM CPU, Linux": (UNTESTED, "plain torch serves it; nothing was run there"),
    "macOS": (UNTESTED, "plain torch serves it; nothing was run there"),
    "NVIDIA GPU before 8.0 (Volta 7.0, Turing 7.5)": (COMPILED, "Triton alone: tests/engines/triton/test_aot.py"),
    "NVIDIA GPU": (UNTESTED, "kernels were compiled, and checked on a processor; engines/gpu_ledger.json is empty"),
    **{
        f"{platform.maker} ({name})": (SIMULATED, "found and planned for by tests/engines/test_platform.py; never run")
        for name, platform in platforms().items()
        if name != "cuda"
    },
    **{
        f"Prompts by {name} on NVIDIA GPUs": (
            SIMULATED,
            "a stand-in for the library: tests/engines/triton/test_libraries.py",
        )
        for name in discover.names("engines.triton.libraries")
    },
    "Several GPUs (tp, dp, ep)": (SIMULATED, "several processes on a processor, over gloo: tests/parallel; never NCCL"),
    "Roles (prefill, decode)": (SIMULATED, "several processes on a processor, over gloo: tests/parallel; no GPU"),
    "Several nodes (srun, torchrun)": (SIMULATED, "two processes on one machine: tests/parallel/test_world.py"),
    "Python 3.11, torch 2.13, transformers 5.23": (TESTED, "all tests run with them"),
    "Python 3.10, 3.12, 3.13": (UNTESTED, "constraints.txt resolves for them; nothing was run"),
    "torch 2.11, 2.12": (UNTESTED, "the compiled libraries use nothing newer; nothing was run"),
}
KIND_EVIDENCE = {
    "sources": "tests/runner/source/test_contract.py",
    "tasks": "tests/runner/test_tasks.py",
    "transformers": "tests/parity/test_fallback.py",
    "transformers on triton": "tests/engines/triton/test_engine.py",
}


def render() -> str:
    """The page. Raises FileNotFoundError naming the evidence that is not in the tree."""
    parts = [
        "# What is supported",
        "Made by `python -m runner.docs` from the model families and engines in the tree; not edited by "
        f"hand. **{TESTED}**: a test in this repository shows it. **{COMPILED}**: builds, was not run. "
        f"**{SIMULATED}**: shown by a stand-in (an interpreter, several processes for several devices). "
        f"**{UNTESTED}**: ought to work. "
        "A dash: the engine does not offer it, for the reason that `mode=plan` gives.",
        "## Model families",
        _families(),
        "Other causal models run through their class in transformers, with a line in the plan that says so: on the CPU "
        f"engine {_proof(KIND_EVIDENCE['transformers'])}, on the Triton engine "
        f"{_proof(KIND_EVIDENCE['transformers on triton'], 'triton')}.",
        "## Compute dtypes",
        _dtypes(),
        "## Weight formats",
        _formats(),
        "## Devices",
        _table(("device", "", ""), [(name, mark, why) for name, (mark, why) in DEVICE_EVIDENCE.items()]),
        "## Tasks and data",
        _plugins(),
    ]
    return "\n\n".join(parts) + "\n"


def _families() -> str:
    rows = []
    for name, module in discover.families().items():
        spec = module.spec(module.tiny_config())
        shape = "decoder" if isinstance(spec, DecoderSpec) else "encoder"
        rows.append((name, ", ".join(module.ARCHITECTURES), *(_family_mark(spec, shape, engine) for engine in ORDER)))
    return _table(("family", "architectures", *ORDER), rows)


def _family_mark(spec: ModelSpec, shape: str, engine: str) -> str:
    kind: Kind = "generate" if isinstance(spec, DecoderSpec) else "embed"
    if isinstance(spec, DecoderSpec):
        spec = replace(spec, head_dim=PUBLISHED_HEAD_DIM)
    offer = importlib.import_module(f"engines.{engine}.offers").offers(HOSTS[engine])
    if not any(not difference(requirements(spec, dtype, kind), offer) for dtype in ("float32", "bfloat16", "float16")):
        return "-"
    return _proof(FAMILY_EVIDENCE.get((engine, shape), ""), engine)


def _dtypes() -> str:
    spec = discover.families()["llama"].spec(discover.families()["llama"].tiny_config())
    spec = replace(spec, head_dim=PUBLISHED_HEAD_DIM)
    rows = []
    for dtype in ("float32", "bfloat16", "float16"):
        marks = []
        for engine in ORDER:
            offer = importlib.import_module(f"engines.{engine}.offers").offers(HOSTS[engine])
            offered = not difference(requirements(spec, dtype, "generate"), offer)
            marks.append(_proof(DTYPE_EVIDENCE.get((engine, dtype), ""), engine) if offered else "-")
        rows.append((dtype, *marks))
    return _table(("dtype", *ORDER), rows)


def _formats() -> str:
    rows = [(name, _proof(FORMAT_EVIDENCE.get(name, ""))) for name in discover.names("engines.formats")]
    return _table(("format", ""), rows)


def _plugins() -> str:
    rows = [("task", name, _proof(KIND_EVIDENCE["tasks"])) for name in discover.names("runner.tasks")]
    for name, module in discover.modules("runner.source").items():
        if hasattr(module, "open") or hasattr(module, "open_dataset"):
            rows.append(("dataset format", name, _proof(KIND_EVIDENCE["sources"])))
    return _table(("", "name", ""), rows)


def _proof(test: str, engine: str = "cpu") -> str:
    if not test:
        return UNTESTED
    if (ROOT / "tests").is_dir() and not (ROOT / test).is_file():
        raise FileNotFoundError(f"{test}: named as evidence in runner/support_matrix.py, but not in the tree")
    return f"{SIMULATED if engine in INTERPRETED else TESTED} ({test})"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
