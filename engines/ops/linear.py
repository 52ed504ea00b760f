"""Matrix products with weights that are prepared once at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from engines.ops.quantized import Int8Weight, QuantizedWeight

if TYPE_CHECKING:
    from engines.ops import OpSet


@dataclass(frozen=True)
class LinearWeight:
    """A weight in whatever form the op set multiplies fastest. Only op sets look inside."""

    data: Any
    bias: Tensor | None
    in_features: int
    out_features: int


@dataclass(frozen=True)
class Quantized:
    """Inputs of a product in 8 bits, as `linear` of the op set that made them takes them with one weight."""

    codes: Tensor
    """[num_tokens, in_features]; an op set may have more columns"""
    scales: Tensor
    """The codes' unit; its shape is the op set's own."""
    dtype: torch.dtype
    """Of what was rounded, and of the product."""


Inputs = Tensor | Quantized


def prepare_linear(weight: Tensor, bias: Tensor | None) -> LinearWeight:
    """weight: [out_features, in_features]; bias: [out_features] or None. The weight may be dropped afterwards."""
    return LinearWeight(weight, bias, weight.shape[1], weight.shape[0])


def prepare_quantized(self: OpSet, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> LinearWeight:
    """As prepare_linear, for inputs of `dtype`. The reference keeps Int8Weight, whose inputs are rounded too, and
    dequantizes all others into dtype: their products are then those of dense weights.

    An op set that overrides this keeps what it can multiply and hands the others to this one; its offer says which.
    """
    if isinstance(weight, Int8Weight):
        return LinearWeight(weight, bias, weight.shape[1], weight.shape[0])
    return self.prepare_linear(weight.dequantize(dtype), bias)


def linear(x: Inputs, weight: LinearWeight) -> Tensor:
    """x @ weight.T + bias. x: [num_tokens, in_features]; returns [num_tokens, out_features], x's dtype.

    Int8Weight: inputs are rounded to 8-bit integers, half to even; integers are summed exactly; the sum times both
    scales, and the bias, in float32 (float64 for float64), rounded once.
    """
    if isinstance(weight.data, Int8Weight):
        return _int8_linear(x, weight.data, weight.bias)
    assert isinstance(x, Tensor)
    return functional.linear(x, weight.data, weight.bias)


def add_rms_norm_for(
    self: OpSet,
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight_offset: float,
    product: LinearWeight,
) -> tuple[Inputs, Tensor]:
    """As add_rms_norm, for a norm that nothing takes but `linear` with `product`: where that rounds its inputs, they
    may come rounded. The product's bits are those of the ops one after the other.
    """
    normed, total = self.add_rms_norm(x, residual, norm_weight, eps, weight_offset)
    return _inputs_of(normed, product), total


def act_and_mul_for(self: OpSet, gate_up: Tensor, name: str, product: LinearWeight) -> Inputs:
    """As act_and_mul, for a result that nothing takes but `linear` with `product`: see add_rms_norm_for."""
    return _inputs_of(self.act_and_mul(gate_up, name), product)


def _inputs_of(x: Tensor, product: LinearWeight) -> Inputs:
    if not isinstance(product.data, Int8Weight):
        return x
    return Quantized(*quantize_input(x, product.data.input_scale), x.dtype)


def mlp(self: OpSet, x: Inputs, up: LinearWeight, down: LinearWeight, activation: str, gated: bool) -> Tensor:
    """Two products with an activation between them: down(act_and_mul(up(x))) if gated, else down(act(up(x))).

    x: [num_tokens, up.in_features]; activation: as those ops have it. What is between the products is rounded to x's
    dtype wherever the ops would, so that the bits are those of the ops one after the other.
    """
    inner = self.linear(x, up)
    return self.linear(self.act_and_mul_for(inner, activation, down) if gated else self.act(inner, activation), down)


def head_linear(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Each head's own product. x: [num_tokens, num_heads, in]; weight: [num_heads, in, out], x's dtype.

    Returns `out`, or a new dense tensor: [num_tokens, num_heads, out], x's dtype. `out` may be a view whose last
    dimension is dense. Modifies out.
    """
    if out is None:
        out = x.new_empty(*x.shape[:2], weight.shape[2])
    torch.bmm(x.transpose(0, 1), weight, out=out.transpose(0, 1))
    return out


def quantize_input(x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """(int8 codes of x's shape, [num_tokens, 1] or [] scales) as Int8Weight.input_scale has it."""
    wide = x if x.dtype == torch.float64 else x.float()
    if scale is None:
        scale = (wide.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).round().clamp(-128, 127).to(torch.int8), scale


def _int8_linear(x: Inputs, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    codes, scale = (x.codes, x.scales) if isinstance(x, Quantized) else quantize_input(x, weight.input_scale)
    if codes.device.type == "cpu" and codes.shape[0]:
        sums: Tensor = torch._int_mm(codes, weight.data.T)
    else:
        sums = codes.double() @ weight.data.double().T
    result = sums.to(scale.dtype) * scale * weight.scales.to(scale.dtype)
    return (result if bias is None else result + bias).to(x.dtype)
