"""Products with quantized weights; plain ones are torch's own.

Groups of integers (AWQ, GPTQ), MXFP4, and float8 below sm 8.9 stay packed and meet inputs as they are. Int8Weight and,
from sm 8.9 on, Float8Weight meet inputs of 8 bits. A few tokens are multiplied by many programs that share the input
features; their sums are joined by a second kernel, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from engines.ops import OpSet
from engines.ops import linear as reference
from engines.ops.linear import Inputs, LinearWeight
from engines.ops.quantized import Float8Weight, GroupedIntWeight, Int8Weight, MXFP4Weight, QuantizedWeight
from engines.triton.launch import capability, dense_rows, power_of_two, processors
from engines.triton.linear_kernels import even_kernel, inputs_kernel, join_kernel, packed_kernel
from engines.triton.quantized import (
    BLOCK_K,
    WIDTH,
    Even,
    Packed,
    Stacked,
    pack_floats,
    pack_ints,
    pack_mxfp4,
    stack_floats,
    stack_ints,
)

FLOAT8_PRODUCTS = (8, 9)
"""First compute capability whose tensor cores multiply float8."""
MAX_SPLITS = 16
INPUTS_BLOCK, JOIN_BLOCK = 1024, 512
LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
VALUES = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


@dataclass(frozen=True)
class Sorted:
    """Slots (rows of a product's output) by expert, each expert's in blocks of their own."""

    slots: Tensor
    """[num_blocks * block_t] int32, -1 where a block is filled up"""
    experts: Tensor
    """[num_blocks] int32, -1: nothing is in the block"""


@dataclass(frozen=True)
class Tiles:
    """Constants of a launch."""

    block_n: int
    block_t: int
    num_warps: int
    num_stages: int


def block_of_tokens(sm: tuple[int, int], weight: Stacked, itemsize: int, num_tokens: float) -> int:
    """Tokens of a tile, for so many of one weight in a dtype of itemsize bytes.

    128 where one warpgroup's registers hold two sums of it: those of several groups, or of float8, are more, and groups
    that end anywhere have scales that shared memory has to hold too.
    """
    if itemsize == 4 or sm < (8, 0):
        return min(32, power_of_two(int(num_tokens), 16))
    scaled = grouping(weight)[0] != 1 if isinstance(weight, Packed) else weight.data.dtype == torch.float8_e4m3fn
    most = 128 if sm[0] in (9, 10) and not scaled else 64
    return min(most, power_of_two(int(num_tokens), 16))


def tiles_of(sm: tuple[int, int], weight: Stacked, itemsize: int, block_t: int) -> Tiles:
    """itemsize: of what is multiplied. What fits into the registers and shared memory of a generation (99 KiB at
    least); 64 rows of weights a warpgroup, as the products of sm 9.0 want."""
    if itemsize == 4 or sm < (8, 0):
        return Tiles(32, block_t, 4, 2)
    large = sm[0] in (9, 10)
    if block_t >= 64:
        return Tiles(128, block_t, 8, 3 if large else 2)
    wide = isinstance(weight, Packed) and pairs(sm, weight, itemsize, block_t)
    return Tiles(128 if wide else 64, block_t, 4, 4 if large else 3)


def splits_of(num_programs: int, num_steps: int, num_processors: int) -> int:
    """Parts of the input features: four programs for each processor, and two steps at least for each program."""
    return max(1, min(MAX_SPLITS, num_steps // 2, 4 * num_processors // max(1, num_programs)))


def prepare_quantized(self: OpSet, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype) -> LinearWeight:
    """As the reference; nothing is dequantized."""
    return LinearWeight(stacked([weight]), bias, weight.shape[1], weight.shape[0])


def stacked(weights: Sequence[QuantizedWeight]) -> Stacked:
    """One weight for each expert, all of one class, shape and grouping."""
    ints = [weight for weight in weights if isinstance(weight, GroupedIntWeight)]
    whole = [weight for weight in weights if isinstance(weight, Int8Weight)]
    floats = [weight for weight in weights if isinstance(weight, Float8Weight)]
    if floats:
        native = capability(floats[0].data.device) >= FLOAT8_PRODUCTS
        even = stack_floats(floats) if native else None
        return pack_floats(floats) if even is None else even
    if ints:
        return pack_ints(ints)
    return stack_ints(whole) if whole else pack_mxfp4([w for w in weights if isinstance(w, MXFP4Weight)])


def linear(x: Inputs, weight: LinearWeight) -> Tensor:
    """As the reference. Packed weights are not rounded, but where a group is no multiple of quantized.WIDTH: codes less
    zeros are exact, and a group's sum is scaled in float32. Float8 inputs are rounded as Float8Weight says."""
    if not isinstance(weight.data, Packed | Even):
        return reference.linear(x, weight)
    assert isinstance(x, Tensor)
    out = torch.empty((x.shape[0], weight.out_features), dtype=x.dtype, device=x.device)
    if x.shape[0]:
        rows, scales = inputs(dense_rows(x), weight.data)
        multiply(rows, scales, weight.data, weight.bias, out)
    return out


def inputs(x: Tensor, weight: Stacked, ids: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(rows as `weight` takes them, their scales) of x: in its order, and of 8 bits if it is.

    ids: [num_tokens, top_k], the expert of each row; there are then top_k rows a token. None: a row for each token.
    """
    order = weight.permutation if isinstance(weight, Packed) else None
    static = weight.input_scale if isinstance(weight, Even) else None
    dtype = weight.data.dtype if isinstance(weight, Even) else x.dtype
    largest = LARGEST.get(dtype, 0)
    if order is None and not largest:
        return x, None
    num_tokens, columns = x.shape
    num_rows = num_tokens if ids is None else ids.numel()
    width = min(columns, weight.group_size) if largest else columns
    num_groups = triton.cdiv(columns, width)
    out = torch.empty((num_rows, columns), dtype=dtype, device=x.device)
    scales = torch.empty((num_rows, num_groups), dtype=torch.float32, device=x.device) if largest else None
    inputs_kernel[(num_rows, num_groups)](
        x,
        ids,
        order,
        static,
        out,
        scales,
        x.stride(0),
        columns,
        num_groups,
        LARGEST=largest,
        TOP_K=1 if ids is None else ids.shape[1],
        WIDTH=width,
        B=min(INPUTS_BLOCK, power_of_two(width)),
    )
    return out, scales


def multiply(
    x: Tensor, x_scales: Tensor | None, weight: Stacked, bias: Tensor | None, out: Tensor,
    sorted_slots: Sorted | None = None, top_k: int = 1,
) -> None:  # fmt: skip
    """Into out [num_rows, out_features]: x's rows times the weight, plus the bias.

    x, x_scales: as `inputs` gives them. With sorted_slots, rows are slots: slot i is row i // top_k of x times its
    expert's weight plus its bias [num_experts, out_features].
    """
    sm = capability(x.device)
    num_rows, columns = out.shape[0], weight.in_features
    if sorted_slots is None:
        tiles = tiles_of(sm, weight, x.element_size(), block_of_tokens(sm, weight, x.element_size(), num_rows))
        blocks = triton.cdiv(num_rows, tiles.block_t)
    else:
        blocks = len(sorted_slots.experts)
        tiles = tiles_of(sm, weight, x.element_size(), len(sorted_slots.slots) // blocks)
    programs = blocks, triton.cdiv(out.shape[1], tiles.block_n)
    steps = weight.words.shape[1] if isinstance(weight, Packed) else triton.cdiv(columns, BLOCK_K)
    splits = 1
    if sorted_slots is None and tiles.block_t <= 64:
        splits = splits_of(programs[0] * programs[1], steps, processors(x.device))
    summed = isinstance(weight, Even) and weight.data.dtype == torch.int8
    target = out
    if splits > 1:
        dtype = torch.int32 if summed else torch.float32
        target = torch.empty((splits, *out.shape), dtype=dtype, device=x.device)
    slots, experts = (None, None) if sorted_slots is None else (sorted_slots.slots, sorted_slots.experts)
    grid = (*programs, splits)
    shape = (num_rows, x.stride(0), out.shape[1], columns)
    constants = {
        "TOP_K": top_k, "SPLITS": splits, "BLOCK_N": tiles.block_n, "BLOCK_T": tiles.block_t,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip
    if isinstance(weight, Packed):
        groups, step = grouping(weight)
        packed_kernel[grid](
            x, weight.words, weight.scales, weight.zeros, bias, slots, experts, target, *shape, steps,
            weight.scales.shape[1], step, VALUES=weight.values, BITS=weight.bits, WIDTH=WIDTH[weight.bits],
            GROUPS=groups, EVEN_K=columns % (32 // weight.bits * WIDTH[weight.bits]) == 0,
            PAIRED=pairs(sm, weight, x.element_size(), tiles.block_t), **constants,
        )  # fmt: skip
    else:
        num_groups = 1 if weight.scales is None else weight.scales.shape[1]
        step = weight.group_size // BLOCK_K if num_groups > 1 else steps
        even_kernel[grid](
            x, weight.data, x_scales, weight.scales, bias, slots, experts, target, *shape, num_groups, step,
            VALUES=VALUES.get(weight.data.dtype, "float"), BLOCK_K=block_k(x.element_size()), **constants,
        )  # fmt: skip
    if splits > 1:
        of_weight = weight.scales if isinstance(weight, Even) and summed else None
        join_kernel[(num_rows, triton.cdiv(out.shape[1], JOIN_BLOCK))](
            target, x_scales if summed else None, of_weight, bias, out, num_rows, out.shape[1],
            SPLITS=splits, B=JOIN_BLOCK,
        )  # fmt: skip


def grouping(weight: Packed) -> tuple[int, int]:
    """(GROUPS, step) of packed_kernel."""
    width = WIDTH[weight.bits]
    chunk = 32 // weight.bits * width
    size, num_chunks = weight.group_size, weight.words.shape[1]
    if weight.scales.shape[1] == 1:
        return 1, num_chunks
    if size % chunk == 0:
        return 1, size // chunk
    if chunk % size == 0 and size % width == 0:
        return chunk // size, 1
    return 0, size


def pairs(sm: tuple[int, int], weight: Packed, itemsize: int, block_t: int) -> bool:
    """PAIRED of packed_kernel. Below sm 9.0 the compiler no longer copies inputs ahead when two products read them."""
    wanted = weight.values == "int" and weight.bits == 4 and grouping(weight)[0] > 0
    return wanted and sm[0] == 9 and itemsize == 2 and block_t <= 32


def block_k(itemsize: int) -> int:
    """Columns of a step of even_kernel: 128 bytes, which are a line of shared memory; 8-bit sums are scaled by them."""
    return BLOCK_K // itemsize
