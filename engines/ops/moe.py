"""Mixtures of experts: which experts a token goes to, and their MLPs (arXiv 1701.06538, 2401.04088)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from engines.ops.quantized import Weight

if TYPE_CHECKING:
    from engines.ops import OpSet


@dataclass(frozen=True)
class Projection:
    """Weight and bias of one projection of one expert, as read."""

    weight: Weight
    bias: Tensor | None = None


@dataclass(frozen=True)
class Experts:
    """The experts of one layer in whatever form the op set multiplies fastest. Only op sets look inside."""

    data: Any
    num_experts: int


def prepare_experts(
    self: OpSet, gate_up: Sequence[Projection], down: Sequence[Projection], dtype: torch.dtype
) -> Experts:
    """The experts of a layer, for inputs of `dtype`. The weights may be dropped afterwards.

    gate_up: of each expert, [2 * intermediate, hidden], gate first; down: [hidden, intermediate]. All of one class.
    """

    def prepare(projection: Projection) -> Any:
        if isinstance(projection.weight, Tensor):
            return self.prepare_linear(projection.weight, projection.bias)
        return self.prepare_quantized(projection.weight, projection.bias, dtype)

    data = [(prepare(up), prepare(out)) for up, out in zip(gate_up, down, strict=True)]
    return Experts(data, len(data))


def fused_experts(self: OpSet, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor, activation: str) -> Tensor:
    """Sum over a token's experts of weight * down(act_and_mul(gate_up(x))).

    x: [num_tokens, hidden]; weights: [num_tokens, top_k] float32; ids: [num_tokens, top_k] int64, those of a token all
    different, or -1 for an expert that is not here, whose output is zero. activation: as act_and_mul's. Each expert's
    output is rounded to x's dtype; weighted and summed in float32 (float64 for float64) in the order of ids; rounded
    once. Returns [num_tokens, hidden], x's dtype.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    num_tokens, top_k = ids.shape
    outputs = x.new_zeros(num_tokens * top_k, x.shape[1])
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    elsewhere, *counts = torch.bincount(flat + 1, minlength=experts.num_experts + 1).tolist()
    for slots, (gate_up, down) in zip(order[elsewhere:].split(counts), experts.data, strict=True):
        if len(slots):
            outputs[slots] = self.mlp(x[slots // top_k], gate_up, down, activation, gated=True)
    spread = outputs.view(num_tokens, top_k, x.shape[1]).to(wide) * weights.to(wide)[..., None]
    return spread.sum(1).to(x.dtype)


def route(
    logits: Tensor,
    top_k: int,
    scoring: Literal["softmax", "softmax_of_chosen", "sigmoid"],
    normalize: bool,
    scale: float = 1.0,
    bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """(weights [num_tokens, top_k] float32, ids [num_tokens, top_k] int64) of each token's experts, best first.

    logits: [num_tokens, num_experts]; scores in float32 (float64 for float64). softmax: over all experts (Mixtral,
    Qwen). softmax_of_chosen: over the best top_k only (gpt-oss). sigmoid: of each (DeepSeek V3, arXiv 2412.19437).
    bias: [num_experts], added to scores for the choice, not for the weights. num_groups > 1: only the experts of the
    top_groups best groups of neighbours are eligible; a group counts by its best expert, or with a bias by the sum of
    its two best. normalize: weights are divided by their sum (+ 1e-20 for sigmoid). scale multiplies the weights.
    """
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    if scoring == "softmax_of_chosen":
        best, ids = wide.topk(top_k, dim=-1)
        return best.softmax(-1) * scale, ids
    scores = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    if num_groups > 1:
        grouped = choice.unflatten(1, (num_groups, -1))
        of_group = grouped.amax(-1) if bias is None else grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, of_group.topk(top_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept[..., None], 0.0 if bias is None else float("-inf")).flatten(1)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + (1e-20 if scoring == "sigmoid" else 0.0))
    return weights * scale, ids
