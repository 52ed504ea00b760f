"""The device an engine computes on: copies that nobody waits for, and what else differs between a processor, which
computes while it is asked, and an accelerator, which works through a queue.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Any

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

    def upload(self, arrays: Many[np.ndarray]) -> list[Tensor]:
        """The arrays on the device, by one copy out of pinned memory that nobody waits for.

        Pinned memory is given back to torch's allocator, which hands it out again once the copy is done.
        """
        arrays = [np.ascontiguousarray(array) for array in arrays]
        if not self.overlaps:
            return [torch.from_numpy(array) for array in arrays]
        starts = [0]
        for array in arrays:
            starts.append(starts[-1] + -(-array.nbytes // ALIGNMENT) * ALIGNMENT)
        staged = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
        memory = staged.numpy()
        for start, array in zip(starts, arrays, strict=False):
            memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        there = staged.to(self.place, non_blocking=True)
        return [
            there[start : start + array.nbytes].view(TORCH_DTYPES[array.dtype]).view(array.shape)
            for start, array in zip(starts, arrays, strict=False)
        ]

    def download(self, tensors: Many[Tensor]) -> Download:
        """Copies behind what the device was asked for so far, into pinned memory."""
        if not self.overlaps:
            return Download(list(tensors))
        host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        event = self.module.Event()
        event.record()
        return Download(host, event)

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


def out_of_memory(error: Exception) -> bool:
    """Whether less would have worked."""
    text = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text
