"""Mixtures of experts: slots (one expert of one token) are sorted by expert on the device, and each expert's are
multiplied in tiles with its weights.

Cost of T tokens with top_k experts each, of inner size I and hidden size H: 6 T top_k H I operations; the weights of
each expert that some token has, once for each tile of its slots; T top_k (3 H + 6 I) b bytes between the kernels.

The grids are those of the most tiles that there can be, and tiles without slots end at once: the host never learns how
many tokens an expert has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor

from engines.ops import OpSet
from engines.ops.moe import Experts, Projection
from engines.ops.quantized import QuantizedWeight
from engines.triton.launch import capability, dense_rows, power_of_two
from engines.triton.linear import Sorted, block_of_tokens, inputs, multiply, stacked
from engines.triton.moe_kernels import combine_kernel, count_kernel, layout_kernel, place_kernel, route_kernel
from engines.triton.quantized import Even, Packed, Stacked, stack_dense

ONE_HOT = 8192
"""Pairs of slot and expert in one program of the sort: 32 for each of its threads."""
COMBINE_BLOCK = 1024


@dataclass(frozen=True)
class StackedExperts:
    """Experts.data of this op set."""

    gate_up: Stacked
    gate_up_bias: Tensor | None
    """[num_experts, 2 * intermediate]"""
    down: Stacked
    down_bias: Tensor | None


def prepare_experts(
    self: OpSet, gate_up: Sequence[Projection], down: Sequence[Projection], dtype: torch.dtype
) -> Experts:
    """As the reference."""
    data = StackedExperts(*_stacked(gate_up, dtype), *_stacked(down, dtype))
    return Experts(data, len(gate_up))


def _stacked(projections: Sequence[Projection], dtype: torch.dtype) -> tuple[Stacked, Tensor | None]:
    weights = [projection.weight for projection in projections]
    biases = [projection.bias for projection in projections if projection.bias is not None]
    bias = torch.stack(biases) if biases else None
    packed: list[QuantizedWeight] = [weight for weight in weights if not isinstance(weight, Tensor)]
    if len(packed) == len(weights):
        return stacked(packed), bias
    return stack_dense([w if isinstance(w, Tensor) else w.dequantize(dtype) for w in weights]), bias


def fused_experts(self: OpSet, x: Tensor, experts: Experts, weights: Tensor, ids: Tensor, activation: str) -> Tensor:
    """As the reference. A token's bits do not depend on the tokens around it, but on how many they are: that decides
    the size of tiles."""
    data = experts.data
    assert isinstance(data, StackedExperts)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    ids = ids.contiguous()
    num_tokens, top_k = ids.shape
    if not num_tokens:
        return out
    num_slots = num_tokens * top_k
    mean = num_slots / min(num_slots, experts.num_experts)
    sm = capability(x.device)
    block_t = min(block_of_tokens(sm, weight, _itemsize(weight, x), mean) for weight in (data.gate_up, data.down))
    order = sort(ids, experts.num_experts, block_t)

    of_slots = _differ(data.gate_up)
    rows, scales = inputs(dense_rows(x), data.gate_up, ids if of_slots else None)
    gate_up = x.new_empty(num_slots, data.gate_up.out_features)
    multiply(rows, scales, data.gate_up, data.gate_up_bias, gate_up, order, 1 if of_slots else top_k)
    rows, scales = inputs(self.act_and_mul(gate_up, activation), data.down, ids.view(-1, 1))
    outputs = x.new_empty(num_slots, x.shape[1])
    multiply(rows, scales, data.down, data.down_bias, outputs, order)
    grid = (num_tokens, triton.cdiv(x.shape[1], COMBINE_BLOCK))
    combine_kernel[grid](outputs, weights.float().contiguous(), ids, out, x.shape[1], TOP_K=top_k, B=COMBINE_BLOCK)
    return out


def _differ(weight: Stacked) -> bool:
    """Whether experts want the same token in different forms."""
    return weight.permutation is not None if isinstance(weight, Packed) else weight.input_scale is not None


def _itemsize(weight: Stacked, x: Tensor) -> int:
    return weight.data.element_size() if isinstance(weight, Even) else x.element_size()


def sort(ids: Tensor, num_experts: int, block_t: int) -> Sorted:
    """ids: [num_tokens, top_k] int64. Slots of an expert keep their order."""
    num_slots, device = ids.numel(), ids.device
    width = power_of_two(num_experts)
    chunk = max(1, ONE_HOT // width)
    num_chunks = triton.cdiv(num_slots, chunk)
    # Every expert that has slots may leave all but one of its last block empty.
    num_blocks = min(num_slots, (num_slots + min(num_experts, num_slots) * (block_t - 1)) // block_t)
    slots = torch.full((num_blocks * block_t,), -1, dtype=torch.int32, device=device)
    experts = torch.empty(num_blocks, dtype=torch.int32, device=device)
    counts = torch.empty((num_chunks + 1, width), dtype=torch.int32, device=device)
    starts = counts[num_chunks]
    count_kernel[(num_chunks,)](ids, counts, num_slots, E_BLOCK=width, CHUNK=chunk, num_warps=8)
    layout_kernel[(1,)](
        counts, starts, experts, num_chunks, num_blocks, E_BLOCK=width, BLOCK_T=block_t, ROWS=chunk, B=chunk,
        num_warps=8,
    )  # fmt: skip
    place_kernel[(num_chunks,)](ids, counts, starts, slots, num_slots, E_BLOCK=width, CHUNK=chunk, num_warps=8)
    return Sorted(slots, experts)


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
    """As the reference; of equal scores, the first expert's counts as best. Where logits are NaN, so are weights."""
    logits = dense_rows(logits)
    num_tokens, num_experts = logits.shape
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((num_tokens, top_k), dtype=torch.int64, device=logits.device)
    if num_tokens:
        chosen = scoring == "softmax_of_chosen"
        groups = 1 if chosen else num_groups
        block = power_of_two(groups), power_of_two(num_experts // groups)
        route_kernel[(num_tokens,)](
            logits,
            None if bias is None or chosen else bias.float(),
            weights,
            ids,
            logits.stride(0),
            scale,
            E=num_experts,
            GROUPS=groups,
            TOP_GROUPS=top_groups,
            GROUPS_BLOCK=block[0],
            SIZE_BLOCK=block[1],
            TOP_K=top_k,
            K_BLOCK=power_of_two(top_k),
            SCORING=scoring,
            NORMALIZE=normalize,
            num_warps=1 if block[0] * block[1] <= 512 else 4,
        )
    return weights, ids
