"""What the launches of all kernels share: tensors with dense rows, powers of two, the device's generation."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from engines.platform import platform_of

GENERIC = (0, 0)
"""Capability of devices that are not NVIDIA's: kernels then take their smallest tiles."""


def dense_rows(x: Tensor) -> Tensor:
    """x, copied only where neighbours in its last dimension do not lie side by side."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is neither below size nor below least."""
    return max(least, int(triton.next_power_of_2(max(size, 1))))


def warps(values: int) -> int:
    """Warps of a program that holds so many values: 16 a thread, from 1 to 16 warps."""
    return min(16, max(1, values // 512))


def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of an NVIDIA device, GENERIC for any other."""
    if device.type != "cuda" or torch.version.cuda is None:
        return GENERIC
    return _capability(device)


@functools.cache
def has_float64(device_type: str) -> bool:
    """Whether kernels on devices of this type compute in float64."""
    return device_type == "cpu" or platform_of(device_type).float64


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for what is none."""
    return _processors(device) if device.type == "cuda" else 1


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
