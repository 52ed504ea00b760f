"""The CPU op set against the reference in float64: at most twice the error of the reference in the same dtype."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines import extension, platform, sources
from engines.cpu import attention, linear
from engines.cpu.offers import COMPILED
from engines.cpu.opset import OpSet
from engines.ops import OP_NAMES, origin
from engines.ops import attention as reference
from engines.ops import linear as linear_reference
from engines.ops.kv_cache import KVCache
from tests.attention_cases import CASES, IN_LARGER_BLOCKS, Case, Inputs, make, stored, widened

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALE = 0.2
FLOOR = 2**-22
"""Two units of float32's last place, at the largest output: what orders of sums, or fused multiply-adds, differ by."""
needs_library = pytest.mark.skipif(extension.reason() is not None, reason=str(extension.reason()))


def compiled_attention(q: Tensor, cache: KVCache, *rest: object, **options: object) -> Tensor:
    """Over a cache in the op set's own layout."""
    ops = OpSet()
    return ops.paged_attention(q, stored(ops, cache), *rest, **options)


def paged_attentions() -> list[pytest.param]:
    """All forms: that on plain torch is what machines without a compiler run."""
    return [
        pytest.param(lambda: attention.paged_attention, id="torch"),
        pytest.param(lambda: OpSet().paged_attention, id="plain cache", marks=needs_library),
        pytest.param(lambda: compiled_attention, id="compiled", marks=needs_library),
    ]


def attend(op: Callable[..., Tensor], case: Case, given: Inputs) -> Tensor:
    return op(given.q, given.cache, given.batch, SCALE, **case.options())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("form", paged_attentions())
def test_attention_is_as_exact_as_the_reference(form: Callable[[], Callable[..., Tensor]], case: Case, dtype) -> None:
    given = make(case, dtype)
    exact = reference.paged_attention(given.q.double(), widened(given.cache), given.batch, SCALE, **case.options())
    error = (attend(reference.paged_attention, case, given).double() - exact).abs()
    found = attend(form(), case, given)
    assert found.dtype == dtype
    assert found.shape == given.q.shape
    assert not exact.isnan().any()
    allowed = 2 * error.max().item() + FLOOR * max(1.0, exact.abs().max().item()) if error.numel() else 0.0
    assert torch.equal(found.isnan(), exact.isnan())
    assert (found.double() - exact).abs().max().item() <= allowed if error.numel() else True


def test_the_cases_poison_what_must_not_be_read() -> None:
    assert all(make(case, torch.float32).poisoned > 0 for case in CASES)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_do_not_depend_on_the_batch(case: Case, dtype: torch.dtype) -> None:
    """Each sequence alone, without its prefix group, has the bits that it has among the others."""
    op, given = compiled_attention, make(case, dtype)
    together = attend(op, case, given)
    batch = given.batch
    for i, length in enumerate(case.lens):
        begin, end = batch.cu_seqlens_q[i : i + 2].tolist()
        alone = replace(
            batch,
            cu_seqlens_q=torch.tensor([0, end - begin], dtype=torch.int32),
            seq_lens=torch.tensor([length], dtype=torch.int32),
            block_tables=batch.block_tables[i : i + 1].contiguous(),
            prefix_groups=(),
        )
        assert torch.equal(attend(op, case, replace(given, q=given.q[begin:end], batch=alone)), together[begin:end])


@needs_library
@pytest.mark.parametrize("block_size", (16, 32))
def test_bits_do_not_depend_on_how_a_prompt_is_cut(block_size: int) -> None:
    """A token has the same bits whether its sequence is prefilled at once or it is the one token decoded."""
    case = Case("prefill", lens=(150,), new=(150,), block_size=block_size)
    op, given = compiled_attention, make(case, torch.bfloat16)
    whole = attend(op, case, given)
    for position in (0, 63, 64, 149):
        batch = replace(
            given.batch,
            cu_seqlens_q=torch.tensor([0, 1], dtype=torch.int32),
            seq_lens=torch.tensor([position + 1], dtype=torch.int32),
        )
        one = replace(given, q=given.q[position : position + 1], batch=batch)
        assert torch.equal(attend(op, case, one), whole[position : position + 1])


@needs_library
def test_bits_do_not_depend_on_threads() -> None:
    case, threads = IN_LARGER_BLOCKS[0], torch.get_num_threads()
    given, op = make(case, torch.bfloat16), compiled_attention
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(attend(op, case, given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_library
def test_float64_takes_the_reference() -> None:
    given = make(CASES[0], torch.float64)
    assert torch.equal(
        attend(OpSet().paged_attention, CASES[0], given), attend(reference.paged_attention, CASES[0], given)
    )


@needs_library
def test_a_prefix_group_of_a_prefilling_sequence_is_refused() -> None:
    case = Case("bad", lens=(200, 200), new=(2, 1), shared_blocks=12)
    with pytest.raises(RuntimeError, match=r"prefix_groups: sequence 0; expected one that decodes one token"):
        attend(OpSet().paged_attention, case, make(case, torch.float32))


@needs_library
def test_a_block_table_that_is_too_short_is_refused() -> None:
    given = make(CASES[0], torch.float32)
    short = replace(given.batch, block_tables=given.batch.block_tables[:, :2].contiguous())
    with pytest.raises(RuntimeError, match=r"seq_lens: sequence 2 has 40 tokens; expected"):
        attend(OpSet().paged_attention, CASES[0], replace(given, batch=short))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", (0, 1, 3, 130))
@pytest.mark.parametrize(
    ("out_features", "in_features", "bias"), ((576, 192, False), (37, 33, True), (1, 1, True), (16416, 33, True))
)
def test_linear_is_as_exact_as_the_reference(
    dtype: torch.dtype, num_tokens: int, out_features: int, in_features: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(out_features, in_features, generator=generator).to(dtype)
    offset = torch.randn(out_features, generator=generator).to(dtype) if bias else None
    batch = torch.randn(130, 2 * in_features, generator=generator).to(dtype)[:, 1 : 1 + in_features]
    x = batch[:num_tokens]

    def in_float64(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())

    exact = in_float64(x)
    # torch adds up in other ways for a few rows, with other errors: a batch shows what is usual.
    plain = linear_reference.linear(batch, linear_reference.prepare_linear(weight, offset))
    usual = (plain.double() - in_float64(batch)).abs().max().item()
    prepared = OpSet().prepare_linear(weight, offset)
    assert (prepared.in_features, prepared.out_features) == (in_features, out_features)
    found = linear.linear(x, prepared)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    if num_tokens:
        assert (found.double() - exact).abs().max().item() <= 2 * usual + 2**-22


def overridden(ops: OpSet) -> set[str]:
    """What the library computes of what models need; argmax is a part of sampling, and caches are only kept."""
    names = set(OP_NAMES) - {"allocate_kv_cache", "argmax"}
    return {name for name in names if origin(ops, name) == "engines.cpu.compiled"}


@needs_library
def test_the_offer_names_what_the_library_does() -> None:
    assert overridden(OpSet()) == set(COMPILED)


def test_the_library_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_CPU_EXTENSION", "1")
    assert extension.reason() == "DISABLE_CPU_EXTENSION is set"
    assert "cpu" not in platform.installed_extensions()
    assert overridden(OpSet()) == set()
    assert origin(OpSet(), "paged_attention") == "engines.cpu.attention"


def test_a_library_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("DISABLE_CPU_EXTENSION", raising=False)
    library = replace(extension.CPU, path=tmp_path / "_cpu_ops.so", sources=None)
    assert extension.reason(library) == "_cpu_ops.so was not built; reinstall with a C++20 compiler on PATH"
    library.path.write_bytes(b"not a library")
    assert extension.reason(library) is None
    with pytest.raises(OSError, match=r"expected a library built for this torch .*; reinstall the project"):
        extension.load(library)


@needs_library
@pytest.mark.parametrize("change", ("edit", "add", "none exported"))
def test_a_library_of_other_sources_is_refused(tmp_path: Path, change: str) -> None:
    csrc = tmp_path / "csrc" / "cpu"
    shutil.copytree(extension.CPU.sources, csrc)
    library = replace(extension.CPU, path=tmp_path / "_cpu_ops.so", sources=csrc)
    built = extension.LIBRARY.read_bytes()
    found = sources.digest(csrc)
    if change == "edit":
        (csrc / "isa.h").write_text("// other")
    elif change == "add":
        (csrc / "more.cpp").touch()
    else:
        built, found = built.replace(sources.MARK.encode(), b"-" * len(sources.MARK)), "none"
    library.path.write_bytes(built)
    expected = rf"built from sources with digest {found}; expected {sources.digest(csrc)}, that of csrc/cpu; run"
    with pytest.raises(OSError, match=expected):
        extension.load(library)


def in_process(isa: str, script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CPU_OPS_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


LEVELS = """
import torch
from engines import ops
from engines.cpu.opset import OpSet
from tests.attention_cases import stored
from tests.cases import call, cases, convert
from tests.compare import assert_as_exact
compiled, reference, run = OpSet(), ops.OpSet(), set()
for case in cases():
    if ops.origin(compiled, case.op) != "engines.cpu.compiled":
        continue
    run.add(case.op)
    for dtype in case.dtypes:
        given = case.arguments(dtype)
        exact = call(reference, case, convert(given, torch.float64))
        plain = call(reference, case, given)
        if case.op == "paged_attention":
            given = (given[0], stored(compiled, given[1]), *given[2:])
        for results in zip(call(compiled, case, given), exact, plain, strict=True):
            try:
                assert_as_exact(*results)
            except AssertionError as error:
                raise AssertionError(f"{case}, {dtype}") from error
print(*sorted(run))
lines = open("/proc/self/maps").read().splitlines()
runtimes = {line.split()[-1] for line in lines if any(name in line for name in ("gomp", "libomp", "iomp"))}
assert len(runtimes) == 1, runtimes
"""


@needs_library
@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512", "amx"))
def test_every_instruction_set_is_exact(isa: str) -> None:
    """Every op of the library. Also: it brings no second OpenMP runtime into the process."""
    done = in_process(isa, LEVELS)
    if isa != "baseline" and "at most" in done.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= COMPILED


@needs_library
def test_an_unknown_instruction_set_is_an_error() -> None:
    done = in_process("sse9", LEVELS)
    assert done.returncode == 1
    assert "CPU_OPS_ISA: sse9; expected" in done.stderr
