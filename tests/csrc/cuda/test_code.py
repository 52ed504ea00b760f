"""The machine code of the kernels: no spills, the registers of the committed table, the instructions that are meant."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from csrc import cuda_build
from engines.cuda import table
from tests.csrc.cuda import code

pytestmark = [pytest.mark.slow, pytest.mark.skipif(cuda_build.nvcc() is None, reason="no nvcc")]
ARCHS = ("sm_80", "sm_90a")


def test_nothing_is_spilled(compiled: Path) -> None:
    found = code.kernels(compiled)
    assert set(found) == set(ARCHS)
    spilled = {
        f"{arch} {name}": entry
        for arch, own in found.items()
        for name, entry in own.items()
        if entry["spill_bytes"] or entry["stack_bytes"]
    }
    assert not spilled


def test_registers_are_those_of_the_table(compiled: Path) -> None:
    """After a change that is meant: `python -m tests.csrc.cuda.code <folder>`, and look at the difference."""
    expected = json.loads(code.TABLE.read_text("utf-8"))
    if expected["nvcc"] != code.version():
        pytest.skip(f"the table is nvcc {expected['nvcc']}'s, this one is {code.version()}")
    found = {a: {n: e["registers"] for n, e in own.items()} for a, own in code.kernels(compiled).items()}
    assert found == expected["registers"]


def test_the_tensor_cores_of_sm_90_are_asked_for_without_serialization(compiled: Path) -> None:
    """ptxas says so when it has to wait between warpgroup products."""
    reports = [path.read_text("utf-8") for path in compiled.glob("*_sm90.ptxas")]
    assert len(reports) == len(list(cuda_build.FOLDER.glob("*_sm90.cu")))
    assert all("sm_90a" in report for report in reports)
    assert not [r for r in reports if "wgmma" in r.lower() or "Performance Loss" in r]


def test_weights_of_attention_are_made_beside_the_products(compiled: Path) -> None:
    """128 keys of two rows are 64 exponentials a thread, between the waits for scores and for sums of values; another
    64 are a softcap's."""
    program = code.cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump: it comes with triton")
    text = code.instructions(program, compiled / "attention_prefill_sm90.o", "sm_90a")
    beside = [part.split("WARPGROUP.DEPBAR")[0] for part in text.split("WARPGROUP.DEPBAR.LE gsb0, 0x1")[1:]]
    assert len(beside) == 4  # two head_dims, two types
    assert [part.count("MUFU.EX2") >= 128 for part in beside] == [True] * 4


def test_products_of_4_bit_weights_are_bound_by_memory(compiled: Path) -> None:
    """64 columns of 128 rows, 4.3 KiB, are 330 cycles of a multiprocessor at 80% of an H200's bandwidth, and one warp's
    instructions on each of its four schedulers. Of those counted here, groups of 128 columns skip a quarter."""
    program = code.cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump: it comes with triton")
    text = code.instructions(program, compiled / "product_w4.o", "sm_90a")
    assert len(code.loop(text, "W4I13__nv_bfloat16EELi16E", "HMMA")) < 300


@pytest.mark.parametrize(("tokens", "most"), ((16, 380), (64, 480)))
def test_warpgroup_products_of_4_bit_weights_are_bound_by_memory_or_tensor_cores(
    compiled: Path, tokens: int, most: int
) -> None:
    """Two chunks of 64 columns of 128 rows, one warp of each scheduler: 560 cycles of an H200's memory at 80%, for 112
    of its multiprocessors; 512 of the tensor cores, for 64 tokens. Groups of 128 columns skip a fifth of this loop. One
    tile's weights are made between the other's products."""
    program = code.cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump: it comes with triton")
    text = code.instructions(program, compiled / "product_w4_sm90.o", "sm_90a")
    loop = code.loop(text, f"W4I13__nv_bfloat16EELi{tokens}ELi1ELb0", "HGMMA")
    assert len(loop) < most
    products = [i for i, name in enumerate(loop) if "HGMMA" in name]
    assert len(products) == 16
    assert sum("HADD2.BF16" in name for name in loop[products[0] : products[4]]) >= 16


@pytest.mark.parametrize(
    ("source", "arch", "meant"),
    (
        ("attention_prefill_sm90", "sm_90a", (r"HGMMA\.64x128x16\.F32\.BF16", r"HGMMA\.64x64x16\.F32", "UTMALDG.4D")),
        ("attention_decode", "sm_80", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.MT88\.4")),
        ("attention_decode", "sm_90a", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128")),
        ("attention_decode_coded", "sm_80", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", "PRMT", "LOP3")),
        ("latent_attention", "sm_80", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", r"LDSM\.16\.MT88\.4")),
        ("attention_prefill_coded", "sm_80", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", r"STS\.128")),
        ("attention_prefill", "sm_80", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128")),
        ("product_w4", "sm_90a", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128", "LOP3")),
        (
            "product_mxfp4",
            "sm_90a",
            (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", r"HMUL2\.BF16"),
        ),
        ("product_int8", "sm_80", (r"IMMA\.16832\.S8\.S8", r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128")),
        ("product_int8", "sm_90a", (r"IMMA\.16832\.S8\.S8", r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128")),
        ("product_dense", "sm_80", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128")),
        ("product_dense", "sm_90a", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128")),
        ("product_fp8", "sm_80", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", r"LDS\.128")),
        ("product_fp8", "sm_90a", (r"HMMA\.16816\.F32\.BF16", r"LDGSTS\.E\.BYPASS\.128", r"HMUL2\.BF16")),
        (
            "product_w4_sm90",
            "sm_90a",
            (r"HGMMA\.64x64x16\.F32\.BF16", r"HGMMA\.64x16x16\.F32", r"UTMALDG\.4D\.MULTICAST", "UBLKCP"),
        ),
        ("linear_fp8_sm90", "sm_90a", (r"QGMMA\.64x128x32\.F32\.E4M3", r"QGMMA\.64x16x32\.F32", "UTMALDG.4D")),
        ("moe", "sm_90a", (r"LDG\.E\.128", r"STG\.E\.128")),
        ("quantize", "sm_80", (r"LDG\.E\.128", r"STS\.128", r"LDS\.128", r"STG\.E\.64")),
        ("quantize", "sm_90a", (r"LDG\.E\.128", r"STS\.128", r"STG\.E\.64", r"F2FP\.SATFINITE\.E4M3")),
        ("elementwise", "sm_90a", (r"LDG\.E\.128", r"STG\.E\.128")),
        # Other devices' memory past the caches; a fence before a flag is set, the cache emptied after one is seen.
        (
            "all_reduce",
            "sm_90a",
            (
                r"LDG\.E\.128\.STRONG\.SYS",
                r"STG\.E\.64\.STRONG\.SYS",
                r"LDG\.E\.64\.STRONG\.SYS",
                r"MEMBAR\.\w+\.SYS",
                "CCTL.IVALL",
            ),
        ),
        ("kv_write", "sm_80", (r"LDG\.E\.128", r"STG\.E\.128", r"STG\.E\.64")),
        ("kv_write", "sm_90a", (r"LDG\.E\.128", r"STG\.E\.128", r"STG\.E\.64", r"F2FP\.SATFINITE\.E4M3")),
    ),
)
def test_the_instructions_that_are_meant_are_there(
    compiled: Path, source: str, arch: str, meant: tuple[str, ...]
) -> None:
    program = code.cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump: it comes with triton")
    text = code.instructions(program, compiled / f"{source}.o", arch)
    missing = [pattern for pattern in meant if not re.search(pattern, text)]
    assert not missing


def test_the_library_loads_beside_a_torch_without_cuda_and_has_its_table(compiled: Path) -> None:
    library = compiled / "_cuda_ops.so"
    text = table.read(library)
    assert text is not None
    assert table.parse(text).sm == (80, 90)
    assert table.parse(text).ops == table.parse(table.FULL).ops
    source = f"import torch; torch.ops.load_library({str(library)!r}); print(torch.ops.cuda_ops.paged_attention)"
    loaded = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert loaded.stdout.strip() == "cuda_ops.paged_attention", loaded.stderr


def test_the_library_takes_nothing_but_stable_functions_from_torch(compiled: Path) -> None:
    command = ["nm", "--dynamic", "--undefined-only", str(compiled / "_cuda_ops.so")]
    names = [line.split()[-1] for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in names)
    assert not [name for name in names if name.startswith("_Z") and re.search("3c10|2at|5torch", name)]
    assert not [name for name in names if name.startswith(("cuda", "cu", "Py"))]
