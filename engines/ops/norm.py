"""Normalization. All functions accept float32, float16, bfloat16 and, as references, float64."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """x in the accumulation type: float32, or float64 where that is what came in."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """Root-mean-square norm over the last dimension (arXiv 1910.07467).

    x: [..., hidden]; weight: [hidden], x's dtype. Square and mean in float32. With weight_offset 0 the normalized value
    is rounded to x's dtype before the weight multiplies (LlamaRMSNorm); otherwise (weight_offset + weight) multiplies
    in float32 and the product is rounded once (Gemma2RMSNorm).
    """
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight_offset:
        return (normed * (weight_offset + _wide(weight))).to(x.dtype)
    return weight * normed.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(norm of x + residual, x + residual). The sum is rounded to x's dtype before it is normalized.

    x, residual: [num_tokens, hidden]. Either argument may be overwritten and returned: callers use neither again.
    """
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Layer norm of x, or of x + residual, over the last dimension (arXiv 1607.06450).

    x, residual: [..., hidden]; weight, bias: [hidden], x's dtype. The sum is rounded to x's dtype before it is
    normalized; statistics in float32.
    """
    total = x if residual is None else x + residual
    return torch.nn.functional.layer_norm(total, (x.shape[-1],), weight, bias, eps)
