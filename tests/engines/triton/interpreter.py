"""Repairs Triton's interpreter for bfloat16, which it keeps as 16-bit integers: products multiply the integers, and
casts from float32 cut bits off (seen with Triton 3.6 and 3.9). Other arithmetic on bfloat16 is refused: the GPU has
it, but kernels are to widen first. And for casts to float8, which lose the carry of a mantissa that is rounded up to
the next power of two: 127.7 becomes 64 (seen with Triton 3.7).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

ARITHMETIC = ("create_fadd", "create_fsub", "create_fmul", "create_fdiv", "create_fneg", "create_frem", "create_fma")


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """bfloat16 bits, rounded half to even; NaN stays NaN."""
    bits = np.array(values, np.float32, copy=True, order="C").view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, value: Any, dtype: Any) -> Any:
        source, target = value.dtype.scalar, dtype.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return original(self, value, dtype)
        wide = widened(value.data) if source == tl.bfloat16 else value.data.astype(np.float32)
        data = narrowed(wide) if target == tl.bfloat16 else wide.astype(interpreter._get_np_dtype(target))
        return interpreter.TensorHandle(data, target)

    return apply


def dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            product = np.matmul(widened(a.data), widened(b.data), dtype=np.float32)
            return interpreter.TensorHandle(product + d.data, d.dtype.scalar)
        return original(self, a, b, d, *options)

    return apply


def to_float8(original: Callable[..., Any]) -> Callable[..., Any]:
    """Casts from float32 as torch has them, half to even; the others as they are."""

    def apply(self: Any, value: Any, dtype: Any, rounding: Any) -> Any:
        if value.dtype.scalar != tl.float32 or dtype.scalar != tl.float8e4nv:
            return original(self, value, dtype, rounding)
        wide = torch.from_numpy(np.array(value.data, np.float32, copy=True, order="C"))
        bits = wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(bits, tl.float8e4nv)

    return apply


def refusing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, value: Any, *others: Any) -> Any:
        if getattr(getattr(value, "dtype", None), "scalar", None) == tl.bfloat16:
            raise TypeError(f"{name} on bfloat16: convert to float32 first")
        return original(self, value, *others)

    return apply


@contextmanager
def repaired() -> Iterator[None]:
    """While this is open, bfloat16 is right or refused, and casts to float8 are right."""
    builder = interpreter.InterpreterBuilder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_dot", dot(builder.create_dot))
        patch.setattr(builder, "cast_impl", cast(builder.cast_impl))
        patch.setattr(builder, "create_fp_to_fp", to_float8(builder.create_fp_to_fp))
        for name in ARITHMETIC:
            if hasattr(builder, name):
                patch.setattr(builder, name, refusing(name, getattr(builder, name)))
        yield
