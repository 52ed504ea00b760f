"""The device an engine computes on: copies that nobody waits for, and what else differs between a processor, which
computes while it is asked, and an accelerator, which works through a queue.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from engines import platform

ALIGNMENT = 16
"""Bytes: where each array begins in an upload, as wide loads want it."""
TORCH_DTYPES = {np.dtype(np.int64): torch.int64, np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


class Download:
    """Tensors on their way from the device."""

    def __init__(self, tensors: list[Tensor], event: Any = None) -> None:
        """event: recorded after the copies; None where the tensors are there already."""
        self._tensors = tensors
        self._event = event

    def wait(self) -> list[Tensor]:
        """The tensors in this process's memory, once the device has come so far."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


class Device:
    """A torch device, by way of torch's module for its kind (torch.cuda, torch.xpu, torch.npu)."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.overlaps = place.type != "cpu"
        """Whether the device computes while the next step is prepared."""
        self.module: Any = torch.get_device_module(place) if self.overlaps else None
        self._pool: Any = None
        """Memory that all captured graphs share: one of them runs at a time."""

    def upload(self, arrays: Many[np.ndarray]) -> list[Tensor]:
        """The arrays on the device, by one copy that nobody waits for."""
        if not self.overlaps:
            return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        return unpack(self.pack(arrays).to(self.place, non_blocking=True), arrays)

    def pack(self, arrays: Many[np.ndarray]) -> Tensor:
        """The bytes of all arrays, in pinned memory, which torch hands out again once copies of it are done."""
        total = sum(map(_room, arrays))
        packed = torch.empty(total, dtype=torch.uint8, pin_memory=self.module is not None)
        memory, start = packed.numpy(), 0
        for array in arrays:
            memory[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            start += _room(array)
        return packed

    def download(self, tensors: Many[Tensor]) -> Download:
        """Copies behind what the device was asked for so far, into pinned memory."""
        if not self.overlaps:
            return Download(list(tensors))
        host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        event = self.module.Event()
        event.record()
        return Download(host, event)

    @property
    def captures(self) -> bool:
        """Whether torch has graphs for the device."""
        return self.module is not None and hasattr(self.module, platform.platform_of(self.place.type).graph)

    def capture(self, call: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(what runs the kernels of the call again, where its result then is). Nothing in the call may wait."""
        graph = getattr(self.module, platform.platform_of(self.place.type).graph)()
        with self.module.graph(graph, pool=self._pool):
            result = call()
        self._pool = self._pool or graph.pool()
        return graph.replay, result

    @contextmanager
    def waiting_forbidden(self) -> Iterator[None]:
        """Whatever waits for the device raises RuntimeError, where torch can tell."""
        set_mode = getattr(self.module, "set_sync_debug_mode", lambda mode: None)
        set_mode("error")
        try:
            yield
        finally:
            set_mode("default")

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory that the call takes for a while, over what is held before."""
        before = self.module.memory_allocated(self.place)
        self.module.reset_peak_memory_stats(self.place)
        call()
        self.module.synchronize(self.place)
        return max(0, int(self.module.max_memory_allocated(self.place)) - int(before))

    def free_bytes(self) -> int:
        """Memory that is free now."""
        if self.place.type == "cpu":
            return platform.free_memory_bytes()
        return int(self.module.mem_get_info(self.place)[0])

    def empty_cache(self) -> None:
        """Give memory that torch holds without need back to the device."""
        if self.module is not None:
            self.module.empty_cache()

    def lost(self) -> bool:
        """Whether nothing works any more after an error: those of kernels stay until the process ends."""
        if self.place.type == "cpu":
            return False
        try:
            torch.zeros(1, device=self.place).add_(1).item()
        except RuntimeError as error:
            return not out_of_memory(error)
        return False


def _room(array: np.ndarray) -> int:
    """Bytes that an array takes among others, with the gap behind it."""
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT


def unpack(packed: Tensor, arrays: Many[np.ndarray]) -> list[Tensor]:
    """The arrays again, as views of what `pack` gave."""
    starts = itertools.accumulate(map(_room, arrays), initial=0)
    return [
        packed[start : start + array.nbytes].view(TORCH_DTYPES[array.dtype]).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
"""Of torch on a processor; of the CUDA runtime, the driver and Triton; of CUDA's libraries, as handles are made."""

Failure = TypeVar("Failure", bound=BaseException)


def out_of_memory(error: Exception) -> bool:
    """Whether less would have worked."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(said in text for said in OUT_OF_MEMORY)


def let_go(error: Failure) -> Failure:
    """The same error, of which the traceback no longer holds what functions had in their hands: tensors, whose memory
    the next try needs."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__context__
    return error
