"""What the engine asks of torch's module for a device, on a stand-in for it under each platform's names."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engines.core.device import ALIGNMENT, Device, let_go, out_of_memory, unpack
from engines.platform import platforms


class Module:
    """As much of torch.cuda, torch.xpu, torch.npu or torch.mlu as is used."""

    def __init__(self, graph_class: str) -> None:
        self.calls: list[str] = []
        self.allocated, self.peak = 100, 100
        setattr(self, graph_class, self.make_graph)

    def make_graph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.calls.append("replay"), pool=lambda: "the pool")

    class graph:
        def __init__(self, captured: Any, pool: Any = None) -> None:
            self.pool = pool

        def __enter__(self) -> None:
            Module.pools.append(self.pool)

        def __exit__(self, *_: object) -> None: ...

    pools: list[Any]

    def mem_get_info(self, place: Any) -> tuple[int, int]:
        return 70, 100

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def memory_allocated(self, place: Any) -> int:
        return self.allocated

    def reset_peak_memory_stats(self, place: Any) -> None:
        self.peak = self.allocated

    def max_memory_allocated(self, place: Any) -> int:
        return self.peak

    def synchronize(self, place: Any) -> None:
        self.calls.append("synchronize")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.calls.append(mode)


def device(kind: str, module: Any) -> Device:
    made = Device(torch.device("cpu"))
    made.place = SimpleNamespace(type=platforms()[kind].module)  # type: ignore[assignment]
    made.overlaps, made.module = True, module
    return made


@pytest.mark.parametrize("kind", platforms())
def test_the_names_of_each_platform(kind: str) -> None:
    Module.pools = []
    module = Module(platforms()[kind].graph)
    there = device(kind, module)
    assert there.captures and there.free_bytes() == 70
    for _ in range(2):
        replay, result = there.capture(lambda: torch.ones(1))
        assert result.item() == 1
    replay()
    assert Module.pools == [None, "the pool"], "graphs share their memory"
    with pytest.raises(ValueError), there.waiting_forbidden():
        raise ValueError
    there.empty_cache()
    assert module.calls == ["replay", "error", "default", "empty_cache"]


def test_a_torch_without_graphs_captures_nothing() -> None:
    assert not device("xpu", SimpleNamespace()).captures
    assert not Device(torch.device("cpu")).captures


def test_the_peak_of_a_call() -> None:
    module = Module("CUDAGraph")

    def call() -> None:
        module.peak = 175

    assert device("cuda", module).peak_bytes(call) == 75


def test_arrays_come_back_as_they_were() -> None:
    arrays = [np.arange(3), np.zeros(0, np.int64), np.arange(5, dtype=np.int32), np.ones((2, 3), np.float32)]
    packed = Device(torch.device("cpu")).pack(arrays)
    assert len(packed) == sum(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)
    for found, array in zip(unpack(packed, arrays), arrays, strict=True):
        assert found.numpy().dtype == array.dtype and np.array_equal(found.numpy(), array)
    strided = np.arange(12).reshape(3, 4)[:, ::2]
    assert torch.equal(unpack(Device(torch.device("cpu")).pack([strided]), [strided])[0], torch.tensor(strided.copy()))


@pytest.mark.parametrize(
    ("error", "less_would_do"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("out of resource: shared memory, Required: 294912, Hardware limit: 232448"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_what_less_would_have_helped(error: Exception, less_would_do: bool) -> None:
    assert out_of_memory(error) is less_would_do


def test_an_error_that_is_kept_holds_no_tensors() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def step() -> None:
        hidden = torch.ones(3)
        held.append(weakref.ref(hidden))
        try:
            raise RuntimeError("in the step")
        except RuntimeError:
            raise ValueError("on the way out") from None

    with pytest.raises(ValueError) as raised:
        step()
    kept = raised.value
    assert held[0]() is not None
    assert let_go(kept) is kept and kept.__traceback__ is not None
    assert held[0]() is None
