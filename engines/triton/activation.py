"""Activations, gated and plain, and the soft cap: elementwise, in float32, one read and one write of each value.

Cost of an output of n values of b bytes: 3 n b bytes gated, 2 n b otherwise; about 10 n operations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.ops.activation import OAI_ALPHA, OAI_LIMIT
from engines.triton.launch import dense_rows, power_of_two

BLOCK = 1024
ALPHA, LIMIT = tl.constexpr(OAI_ALPHA), tl.constexpr(OAI_LIMIT)


@triton.jit
def tanh(x: tl.tensor) -> tl.tensor:
    """By the exponential of a number that is not positive, which cannot overflow."""
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def activation(x: tl.tensor, NAME: tl.constexpr) -> tl.tensor:
    """x: float32. NaN goes through."""
    if NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(NAME == "relu")
        return tl.where(x < 0, 0.0, x)


@triton.jit
def act_and_mul_kernel(
    x_ptr: tl.tensor, out_ptr: tl.tensor, row_stride: tl.tensor, N: tl.constexpr, NAME: tl.constexpr, B: tl.constexpr
) -> None:
    """Grid: [num_rows, cdiv(N, B)]. x: [num_rows, 2 * N], gate first; out: [num_rows, N], dense."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * B + tl.arange(0, B)
    inside = columns < N
    gate = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * row_stride + N + columns, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    if NAME == "swiglu_oai":
        wide = tl.minimum(wide, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        result = wide / (1.0 + tl.exp(wide * -ALPHA)) * (up + 1.0)
    else:
        result = activation(wide, NAME).to(gate.dtype).to(tl.float32) * up
    tl.store(out_ptr + row * N + columns, result.to(gate.dtype), mask=inside)


@triton.jit
def elementwise_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row_stride: tl.tensor,
    cap: tl.tensor,
    N: tl.constexpr,
    NAME: tl.constexpr,
    B: tl.constexpr,
) -> None:
    """Grid: [num_rows, cdiv(N, B)]. NAME: an activation's, or softcap. x: [num_rows, N]; out: the same, dense."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * B + tl.arange(0, B)
    inside = columns < N
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    result = cap * tanh(wide / cap) if NAME == "softcap" else activation(wide, NAME)
    tl.store(out_ptr + row * N + columns, result.to(x.dtype), mask=inside)


def act_and_mul(gate_up: Tensor, name: str) -> Tensor:
    """As the reference."""
    gate_up = dense_rows(gate_up)
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, size), dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(BLOCK, power_of_two(size))
        grid = (rows, triton.cdiv(size, block))
        act_and_mul_kernel[grid](gate_up, out, gate_up.stride(0), N=size, NAME=name, B=block)
    return out


def act(x: Tensor, name: str) -> Tensor:
    """As the reference."""
    return _elementwise(x, name, 1.0)


def softcap(x: Tensor, cap: float) -> Tensor:
    """As the reference; rounded once."""
    return _elementwise(x, "softcap", cap)


def _elementwise(x: Tensor, name: str, cap: float) -> Tensor:
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        flat = dense_rows(x).reshape(-1, size)
        block = min(BLOCK, power_of_two(size))
        grid = (flat.shape[0], triton.cdiv(size, block))
        elementwise_kernel[grid](flat, out, flat.stride(0), cap, N=size, NAME=name, B=block)
    return out
