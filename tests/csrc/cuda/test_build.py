"""How csrc/cuda is built: for which architectures, and what is said when it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from csrc import cuda_build
from tests.csrc.test_build import build

ROOT = Path(__file__).parents[3]
TORCH = Path(torch.__file__).parent


@pytest.mark.parametrize(
    ("version", "machine", "expected"),
    (
        ((11, 4), "x86_64", "70 75 80"),
        ((11, 8), "x86_64", "70 75 80 86 89"),
        ((12, 0), "x86_64", "70 75 80 86 89 90a"),
        ((12, 8), "x86_64", "70 75 80 86 89 90a 100a 120a"),
        ((13, 0), "x86_64", "80 86 89 90a 100a 120a"),
        ((11, 4), "aarch64", "72"),
        ((12, 8), "aarch64", "72 87 90a"),
        ((13, 0), "aarch64", "87 90a"),
    ),
)
def test_architectures_of_a_compiler(version: tuple[int, int], machine: str, expected: str) -> None:
    assert " ".join(cuda_build.architectures(version, machine)) == expected


def test_what_the_kernels_need_is_left_of_them() -> None:
    assert cuda_build.chosen((12, 0), "x86_64", "") == ("80", "86", "89", "90a")
    assert cuda_build.chosen((13, 0), "x86_64", "90a, 80") == ("90a", "80")


@pytest.mark.parametrize("wanted", ("75", "90", "sm_80", "80,"))
def test_an_architecture_that_cannot_be_is_refused(wanted: str) -> None:
    with pytest.raises(ValueError, match=r"CSRC_CUDA_ARCHS: .*; expected some of 80, 86, 89, 90a with nvcc 12\.1 on"):
        cuda_build.chosen((12, 1), "x86_64", wanted)


def test_the_version_is_read() -> None:
    assert cuda_build.nvcc_version("Cuda compilation tools, release 13.0, V13.0.88") == (13, 0)
    assert cuda_build.nvcc_version("nvcc: not found") is None


def test_commands_name_every_architecture_and_no_other_code(tmp_path: Path) -> None:
    commands = cuda_build.commands(["ccache", "nvcc"], TORCH, ("80", "90a"), tmp_path)
    assert {path.stem for path in commands} == {path.stem for path in cuda_build.FOLDER.glob("*.cu")}
    for path, command in commands.items():
        codes = [flag.rpartition("code=")[2] for flag in command if flag.startswith("-gencode")]
        assert codes == (["sm_90a"] if path.stem.endswith("_sm90") else ["sm_80", "sm_90a"])
        assert command[:2] == ["ccache", "nvcc"]


def test_sources_for_one_architecture_are_left_out_without_it(tmp_path: Path) -> None:
    commands = cuda_build.commands(["nvcc"], TORCH, ("80",), tmp_path)
    assert commands
    assert not [path for path in commands if path.stem.endswith("_sm90")]
    assert not [flag for command in commands.values() for flag in command if "SM90" in flag or "90a" in flag]


def test_why_the_library_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DISABLE_CUDA_ENGINE", "CSRC_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cuda_build.left_out(None) is not None
    monkeypatch.setattr(cuda_build.shutil, "which", lambda name, path=None: None)
    assert cuda_build.left_out(tmp_path) == "no nvcc on PATH or in CUDA_HOME"
    monkeypatch.setattr(cuda_build.shutil, "which", lambda name, path=None: f"/opt/{name}")
    reason = cuda_build.left_out(tmp_path)
    assert reason == "torch is a CPU build; set CSRC_CUDA_ARCHS to compile it all the same"
    monkeypatch.setenv("CSRC_CUDA_ARCHS", "80")
    assert cuda_build.left_out(tmp_path) is None
    monkeypatch.setenv("DISABLE_CUDA_ENGINE", "1")
    assert cuda_build.left_out(tmp_path) == "DISABLE_CUDA_ENGINE is set"


def test_a_build_without_the_library_says_why_and_succeeds(tmp_path: Path) -> None:
    done = build(tmp_path, DISABLE_CUDA_ENGINE="1", DISABLE_CPU_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    message = "_cuda_ops.so is left out: DISABLE_CUDA_ENGINE is set. The CUDA engine cannot run."
    assert message in done.stderr


@pytest.mark.skipif(cuda_build.nvcc() is None, reason="no nvcc")
def test_a_build_with_an_unknown_architecture_says_so_and_succeeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DISABLE_CUDA_ENGINE", raising=False)
    done = build(tmp_path, CSRC_CUDA_ARCHS="30", DISABLE_CPU_EXTENSION="1")
    assert done.returncode == 0, done.stderr
    assert "_cuda_ops.so is left out: CSRC_CUDA_ARCHS: 30; expected some of" in done.stderr
