"""Every kernel that a benchmark would time runs, on small shapes, and names sources that there are."""

from __future__ import annotations

import pytest
import torch

from csrc import cuda_build
from engines.cuda.opset import OpSet
from tests.engines.cuda.kernels import KERNELS, Kernel

SOURCES = ("decode.cu", "prefill.cu")


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_a_kernel_to_be_timed_runs(ops: OpSet, kernel: Kernel) -> None:
    work = kernel.make(ops, torch.device("cpu"), True)
    work.call()
    assert work.num_bytes > 0
    assert 0 < kernel.bar <= 1
    assert not [name for name in kernel.sources if not (cuda_build.FOLDER / name).is_file()]


def test_every_kernel_source_is_timed() -> None:
    timed = {name for kernel in KERNELS for name in kernel.sources}
    shared = {
        "tensors.h",
        "attention_launch.h",
        "product_launch.h",
        "attention_decode.cu",
        "attention_decode_coded.cu",
        "attention_prefill.cu",
        "attention_prefill_coded.cu",
        "all_reduce.cu",  # by `python -m tests.gpu` on devices that reach each other
        "all_reduce.cuh",
        "library.cu",
        "README.md",
    }
    assert {path.name for path in cuda_build.FOLDER.iterdir() if path.is_file()} <= timed | shared
