"""Norms: each row is read once, kept in registers while its statistics are made, and written once.

Legend: R rows of a program, N columns. Cost of [T, N] in a dtype of b bytes: 2 T N b bytes (4 T N b with the residual)
and about 4 T N operations, so that bandwidth is the floor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.triton.launch import dense_rows, power_of_two, warps

ROW_VALUES = 2048
"""Short rows, as those of q_norm, share a program until it has so many values."""


@triton.jit(do_not_specialize=["num_rows"])
def rms_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    total_ptr: tl.tensor,
    num_rows: tl.tensor,
    inner: tl.tensor,
    outer_stride: tl.tensor,
    inner_stride: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    N: tl.constexpr,
    ADD: tl.constexpr,
    OFFSET: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid: [cdiv(num_rows, R)]. Row i of x lies at (i / inner) * outer_stride + (i % inner) * inner_stride; with ADD,
    residual and total are as x, and what is normalized is the rounded sum. out: [num_rows, N], dense.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (columns < N)[None, :]
    at = ((rows // inner).to(tl.int64) * outer_stride + (rows % inner) * inner_stride)[:, None] + columns[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + at, x, mask=mask)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, 1) / N
    normed = wide * tl.rsqrt(mean + eps)[:, None]
    weight = tl.load(weight_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    result = normed * (offset + weight) if OFFSET else weight * normed.to(x.dtype).to(tl.float32)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :], result.to(x.dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def layer_norm_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    row_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    N: tl.constexpr,
    ADD: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid: [cdiv(num_rows, R)]. With ADD, what is normalized is the rounded sum of x and residual. The variance
    is made from the differences to the mean, which are in registers.
    """
    rows = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    mask = (rows < num_rows)[:, None] & inside[None, :]
    x = tl.load(x_ptr + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    wide = x.to(tl.float32)
    centred = tl.where(mask, wide - (tl.sum(wide, 1) / N)[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / N
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    result = centred * tl.rsqrt(variance + eps)[:, None] * weight + bias
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], result.to(x.dtype), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """As the reference."""
    x = dense_rows(x)
    if x.dim() not in (2, 3):
        x = x.reshape(-1, x.shape[-1])
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rms_norm(x, None, weight, out, eps, weight_offset)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As the reference, in one pass; x holds the norm afterwards and residual the sum."""
    x, residual = x.contiguous(), residual.contiguous()
    _rms_norm(x, residual, weight, x, eps, weight_offset)
    return x, residual


def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float, offset: float) -> None:
    size = x.shape[-1]
    num_rows = x.numel() // size if size else 0
    if not num_rows:
        return
    block = power_of_two(size)
    rows = max(1, ROW_VALUES // block)
    rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        residual,
        weight,
        out,
        residual,
        num_rows,
        x.shape[1] if x.dim() == 3 else 1,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        eps,
        offset,
        N=size,
        ADD=residual is not None,
        OFFSET=bool(offset),
        R=rows,
        BLOCK=block,
        num_warps=warps(block * rows),
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """As the reference, in one pass."""
    size = x.shape[-1]
    flat = dense_rows(x).reshape(-1, size)
    added = None if residual is None else dense_rows(residual).reshape(-1, size)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    block = power_of_two(size)
    rows = max(1, ROW_VALUES // block)
    layer_norm_kernel[(triton.cdiv(flat.shape[0], rows),)](
        flat,
        added,
        weight,
        bias,
        out,
        flat.shape[0],
        flat.stride(0),
        0 if added is None else added.stride(0),
        eps,
        N=size,
        ADD=added is not None,
        R=rows,
        BLOCK=block,
        num_warps=warps(block * rows),
    )
    return out
