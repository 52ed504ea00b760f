"""FlashAttention-3 and FlashInfer where they are installed: what they are passed, by stand-ins; when they are taken."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from engines import load
from engines.api import EngineConfig, EngineSettings, Request, Requirement, UnsupportedModelError
from engines.discover import families, names
from engines.models.spec import EncoderSpec, requirements
from engines.ops import OpSet as Reference
from engines.ops import origin
from engines.platform import Host, installed_packages
from engines.triton.libraries import _common, flash_attn_3, flashinfer
from engines.triton.offers import Config
from engines.triton.opset import OpSet
from runner.config import HostConfig
from runner.errors import EngineError
from runner.fingerprint import fingerprint
from runner.libraries import libraries_of
from runner.plan import resolve
from tests import attention_cases
from tests.cases import Case, call, cases, convert, tensors
from tests.compare import assert_as_exact
from tests.engines.triton import kernels, standins
from tests.parity.checkpoints import make_checkpoint
from tests.runner.planning import checkpoint, planning

MODULES = {"flash_attn_3": "flash_attn_interface", "flashinfer": "flashinfer"}
H200 = Host("this", "cuda", compute_capability=(9, 0), triton=True, nvcc=True)
BOTH = {"flash_attn_interface": "3.0.0", "flashinfer": "0.7.2.post1"}


class Anything(set[int]):
    """Every address."""

    def __ge__(self, other: object) -> bool:
        return True


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    def put(library: str, addresses: set[int] | None = None) -> ModuleType:
        made: ModuleType = getattr(standins, library)(Anything() if addresses is None else addresses)
        monkeypatch.setitem(sys.modules, MODULES[library], made)
        return made

    return put


def with_library(library: str, *taken: str) -> OpSet:
    ops = OpSet()
    importlib.import_module(f"engines.triton.libraries.{library}").attach(ops, taken)
    return ops


PAGED = ("ragged", "prefill", "window", "softcap", "group of 7")
EVERY = [case for case in cases() if case.op == "paged_attention" and case.name in PAGED]
PAIRS = [("flash_attn_3", case) for case in EVERY]
PAIRS += [("flashinfer", case) for case in EVERY if case.name != "group of 7"]
PAIRS += [("flash_attn_3", case) for case in cases() if case.op == "encoder_attention"]
PAIRS += [("flash_attn_3", case) for case in cases() if case.op == "latent_attention" and case.name == "published"]


@pytest.mark.parametrize(("library", "case"), PAIRS, ids=str)
def test_as_exact_as_the_reference_without_a_copy_of_the_cache(
    ops: Reference, install: Any, library: str, case: Case
) -> None:
    arguments = convert(case.arguments(torch.bfloat16))
    exact = call(Reference(), case, convert(arguments, torch.float64))
    plain = call(Reference(), case, arguments)
    addresses = {t.untyped_storage().data_ptr() for value in arguments for t in tensors(value)}
    install(library, addresses)
    found = getattr(with_library(library, case.op), case.op)(*arguments, **case.options)
    assert_as_exact(found, exact[0], plain[0])


def test_a_step_is_laid_out_once_whatever_the_layers(ops: Reference, install: Any) -> None:
    """Two kinds of layers, each of them twice, in two steps."""
    wrapper = install("flashinfer").BatchPrefillWithPagedKVCacheWrapper
    own = with_library("flashinfer", "paged_attention")
    given = attention_cases.make(attention_cases.Case("two", lens=(40, 9), new=(5, 1)), torch.float16)
    known = replace(given.batch, lengths=np.array([[5, 1], [40, 9]]))
    results = [
        own.paged_attention(given.q, given.cache, batch, 0.2, window)
        for batch in (given.batch, known)
        for window in (0, 7, 0, 7)
    ]
    assert wrapper.plans == 4
    assert torch.equal(results[0], results[4]) and torch.equal(results[1], results[7])
    assert not torch.equal(results[0], results[1])


def test_decoding_steps_and_other_ops_stay_with_the_engine(install: Any) -> None:
    install("flash_attn_3")
    own = with_library("flash_attn_3", "paged_attention")
    assert origin(own, "paged_attention") == "engines.triton.libraries.flash_attn_3"
    assert origin(own, "latent_attention") == "engines.triton.attention"


@pytest.mark.parametrize("library", [pytest.param("flash_attn_3", marks=pytest.mark.slow), "flashinfer"])
def test_the_engine_scores_as_with_its_own_kernels(
    ops: Reference, install: Any, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint({**families()["llama"].tiny_config(), "head_dim": 64, "num_hidden_layers": 1}, tmp_path)
    install(library)
    config = EngineConfig(max_model_len=64, block_size=8, max_num_batched_tokens=16, kv_cache_bytes=1 << 20)
    calls: list[float] = []
    attend = standins.attend
    monkeypatch.setattr(standins, "attend", lambda *given: calls.append(1.0) or attend(*given))
    values = []
    for libraries in ({}, {"paged_attention": library}):
        assert not calls
        settings = EngineSettings("triton", str(tmp_path), "float16", config, "score", libraries=libraries)
        engine = load.load_engine(settings)
        engine.submit([Request(i, "score", list(range(5, 5 + n)), score_from=1) for i, n in enumerate((5, 19))])
        outcomes = []
        while engine.num_unfinished:
            outcomes += engine.step()
        assert all(outcome.error is None for outcome in outcomes)
        values.append([v for o in sorted(outcomes, key=lambda o: o.request_id) for v in o.values or ()])
        engine.close()
    assert len(calls) == 3, "one prompt whole, one in two pieces"
    assert len(values[0]) == 22 and values[0] == pytest.approx(values[1], abs=5e-3)


def test_they_are_timed_beside_the_engines_own_kernels(
    ops: Reference, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.by_libraries() == []
    monkeypatch.setattr(kernels, "installed_packages", lambda: {"flashinfer": "0.7.2"})
    install("flashinfer")
    found = kernels.by_libraries()
    assert [kernel.name.rpartition(", ")[2] for kernel in found] == ["flashinfer"] * len(found) and found
    found[0].make(OpSet(), torch.device("cpu"), True)
    wrong = install("flashinfer").BatchPrefillWithPagedKVCacheWrapper
    monkeypatch.setattr(wrong, "run", lambda self, q, caches: torch.zeros_like(q))
    with pytest.raises(AssertionError):
        found[0].make(OpSet(), torch.device("cpu"), True)


def test_the_plan_says_which_and_why() -> None:
    asked = planning(INSTALLED, backend="triton", backend_config=Config(block_size=64))
    asked = replace(asked, host=HostConfig(name="this"), mode="run")
    plan = resolve(asked, checkpoint(), INSTALLED, "generate")
    assert plan.settings.libraries == {"paged_attention": "flash_attn_3"}
    assert "paged_attention of prompts: flash_attn_3, which is installed (backend_config.attention)" in plan.text()
    assert fingerprint(asked, plan.settings, "", {})["libraries"] == '{"paged_attention": "flash_attn_3"}'
    own = resolve(replace(asked, backend_config=Config(attention="own")), checkpoint(), INSTALLED, "generate")
    assert own.settings.libraries == {} and "libraries" not in fingerprint(asked, own.settings, "", {})
    with pytest.raises(EngineError, match="attention=flashinfer: flashinfer is not installed"):
        resolve(replace(asked, backend_config=Config(attention="flashinfer")), checkpoint(), H200, "generate")
    compiled = replace(INSTALLED, name="h200", extensions=frozenset({"cuda"}))
    auto = planning(compiled, backend_config=Config(attention="own"))
    assert resolve(auto, checkpoint(), compiled, "generate").notes[0] == (
        "backend_config.attention=own: not carried over, cuda has no such setting"
    )


def test_a_library_that_is_not_what_was_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(
        UnsupportedModelError, match=r"flash_attn_with_kvcache cannot be had .*backend_config.attention=own"
    ):
        with_library("flash_attn_3", "paged_attention")
    old = ModuleType("flashinfer")
    old.__dict__["BatchPrefillWithPagedKVCacheWrapper"] = type("Old", (), {"plan": lambda self, qo_indptr: None})
    monkeypatch.setitem(sys.modules, "flashinfer", old)
    with pytest.raises(
        UnsupportedModelError, match=r"has no paged_kv_indptr, .* disable_split_kv; expected the interface"
    ):
        with_library("flashinfer", "paged_attention")


def needed(
    family: str = "llama", dtype: str = "bfloat16", kv_dtype: str = "auto", **differences: Any
) -> list[Requirement]:
    module = families()[family]
    spec = module.spec(module.tiny_config())
    if family == "deepseek_v3":
        spec = module.spec({**module.tiny_config(), "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    elif family == "bert":
        return requirements(EncoderSpec(100, 768, 3072, 2, 12, 512), dtype, "embed")
    else:
        spec = replace(spec, **{"head_dim": 128, **differences})
    return requirements(spec, dtype, "generate", kv_dtype=kv_dtype)


def taken(wanted: str, host: Host, asked: list[Requirement], invariant: bool = True) -> Any:
    return libraries_of("triton", Config(attention=wanted), asked, host, invariant)


INSTALLED = replace(H200, packages=BOTH)
A100 = replace(INSTALLED, compute_capability=(8, 0))


@pytest.mark.parametrize(
    ("host", "asked", "invariant", "expected"),
    [
        (H200, needed(), True, {}),
        (INSTALLED, needed(), True, {"paged_attention": "flash_attn_3"}),
        (replace(INSTALLED, packages={"flashinfer": "0.7.2"}), needed(), True, {"paged_attention": "flashinfer"}),
        (A100, needed(), True, {}),
        (A100, needed(), False, {"paged_attention": "flashinfer"}),
        (INSTALLED, needed(head_dim=256), True, {"paged_attention": "flashinfer"}),
        (INSTALLED, needed(head_dim=80), True, {"paged_attention": "flash_attn_3"}),
        (INSTALLED, needed(dtype="float32"), True, {}),
        (INSTALLED, needed(kv_dtype="fp8"), True, {}),
        (INSTALLED, needed(attn_sinks=True), True, {}),
        (INSTALLED, needed(windows=(64,) * 2, attn_softcap=30.0), True, {"paged_attention": "flash_attn_3"}),
        (INSTALLED, needed("deepseek_v3"), True, {"latent_attention": "flash_attn_3"}),
        (INSTALLED, needed("bert"), True, {"encoder_attention": "flash_attn_3"}),
        (replace(A100, compute_capability=(7, 5)), needed(dtype="float16"), False, {"paged_attention": "flashinfer"}),
        (replace(A100, compute_capability=(10, 0)), needed(), False, {}),
        (replace(A100, nvcc=False), needed(), False, {}),
        (replace(A100, nvcc=False, packages={**BOTH, "flashinfer_jit_cache": "0.7.2"}), needed(), False,
         {"paged_attention": "flashinfer"}),
        (replace(INSTALLED, packages={"flash_attn_interface": "2.8.3", "flashinfer": "0.2.5"}), needed(), True, {}),
    ],
)  # fmt: skip
def test_the_case_is_theirs(host: Host, asked: list[Requirement], invariant: bool, expected: dict[str, str]) -> None:
    found = taken("auto", host, asked, invariant)
    assert found.ops == expected and not found.missed
    assert all(f"{op} of prompts: {name}, " in " ".join(found.notes) for op, name in expected.items())
    assert taken("own", host, asked, invariant).ops == {}


def test_why_not_is_said() -> None:
    assert taken("auto", H200, needed()).notes == []
    assert taken("auto", A100, needed()).notes == [
        "flash_attn_3: expected sm 9.0: the engine's own kernel is used",
        "paged_attention invariant=true: flashinfer offers numerics=fast only: the engine's own kernel is used",
    ]
    assert taken("flashinfer", H200, needed()).missed == [
        "backend_config.attention=flashinfer: flashinfer is not installed"
    ]
    assert taken("flash_attn_3", INSTALLED, needed(attn_sinks=True)).missed == [
        "backend_config.attention=flash_attn_3: paged_attention sinks=true: flash_attn_3 does not offer it"
    ]
    through = [Requirement("transformers_model", {"dtype": "bfloat16"})]
    assert taken("flashinfer", INSTALLED, through).missed == [
        "backend_config.attention=flashinfer: not for models that run through transformers"
    ]


def test_libraries_are_found_by_their_files_and_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert names("engines.triton.libraries") == ["flash_attn_3", "flashinfer"]
    (tmp_path / "flash_attn_interface.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = installed_packages()
    assert found["flash_attn_interface"] == "of no known version"
    assert flash_attn_3.offers(replace(H200, packages=found)).blockers == ("flash_attn_3 of no known version < 3.0",)
    assert _common.release("3.0.0b1+cu128") == (3, 0)
    assert flashinfer.offers(replace(H200, packages={"flashinfer": "0.7.2"})).blockers == ()
