"""Kernels of mixtures of experts beside the products: which experts, which order, and the sum of their outputs.

A slot is one expert of one token: slot s is choice s % top_k of token s / top_k. Nothing here is read by the host, so
that a step can be captured in a graph: what depends on the counts of experts lies in arrays of the largest size.

Legend: E experts, S slots of T tokens, N output features, BLOCK_T slots of one tile of a product. Cost: route_kernel
T E b bytes read, 12 S written, and E operations for each choice; count_kernel and place_kernel 8 S bytes each, and one
comparison for each slot and expert; layout_kernel 4 E bytes for each chunk; combine_kernel (S + T) N b bytes and 2 S N
operations.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route_kernel(
    logits_ptr: tl.tensor, bias_ptr: tl.tensor, weights_ptr: tl.tensor, ids_ptr: tl.tensor, row_stride: tl.tensor,
    scale: tl.tensor, E: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUPS_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, SCORING: tl.constexpr,
    NORMALIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: [num_tokens]. logits: [num_tokens, E]; weights, ids: [num_tokens, TOP_K]. Scores lie in [groups, experts of
    a group], of which the best is taken TOP_K times."""
    token = tl.program_id(0).to(tl.int64)
    SIZE: tl.constexpr = E // GROUPS
    groups, members = tl.arange(0, GROUPS_BLOCK), tl.arange(0, SIZE_BLOCK)
    at = groups[:, None] * SIZE + members[None, :]
    there = (groups < GROUPS)[:, None] & (members < SIZE)[None, :]
    logits = tl.load(logits_ptr + token * row_stride + at, mask=there, other=float("-inf")).to(tl.float32)
    scores = logits
    if SCORING == "softmax":
        powers = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        scores = powers / tl.sum(tl.sum(powers, 1), 0)
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logits))
    choice = scores
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + at, mask=there, other=0.0)
    choice = tl.where(there, choice, float("-inf"))
    if GROUPS > 1:
        value = tl.max(choice, 1)
        if bias_ptr is not None and SIZE > 1:
            first = tl.min(tl.where(choice == value[:, None], members[None, :], SIZE_BLOCK), 1)
            value += tl.max(tl.where(members[None, :] == first[:, None], float("-inf"), choice), 1)
        value = tl.where(groups < GROUPS, value, float("-inf"))
        kept = groups < 0
        for _ in range(TOP_GROUPS):
            open_value = tl.where(kept, float("-inf"), value)
            best = tl.min(tl.where((open_value == tl.max(open_value, 0)) & ~kept, groups, GROUPS_BLOCK), 0)
            kept = kept | (groups == best)
        choice = tl.where(kept[:, None] & there, choice, 0.0 if bias_ptr is None else float("-inf"))
        choice = tl.where(there, choice, float("-inf"))
    places = tl.arange(0, K_BLOCK)
    weights = tl.zeros([K_BLOCK], tl.float32)
    taken = at < 0
    for place in range(TOP_K):
        open_choice = tl.where(taken | ~there, float("-inf"), choice)
        most = tl.max(tl.max(open_choice, 1), 0)
        best = tl.min(tl.min(tl.where((open_choice == most) & there & ~taken, at, E), 1), 0)
        best = tl.minimum(best, E - 1)  # NaN is never the largest
        taken = taken | (at == best)
        tl.store(ids_ptr + token * TOP_K + place, best.to(tl.int64))
        weight = tl.sum(tl.sum(tl.where(at == best, scores, 0.0), 1), 0)
        weights = tl.where(places == place, weight, weights)
    if SCORING == "softmax_of_chosen":
        inside = places < TOP_K
        powers = tl.where(inside, tl.exp(weights - tl.max(tl.where(inside, weights, float("-inf")), 0)), 0.0)
        weights = powers / tl.sum(powers, 0)
    elif NORMALIZE:
        weights = weights / (tl.sum(weights, 0) + (1e-20 if SCORING == "sigmoid" else 0.0))
    tl.store(weights_ptr + token * TOP_K + places, weights * scale, mask=places < TOP_K)


@triton.jit(do_not_specialize=["num_slots"])
def count_kernel(
    ids_ptr: tl.tensor, counts_ptr: tl.tensor, num_slots: tl.tensor, E_BLOCK: tl.constexpr, CHUNK: tl.constexpr
) -> None:
    """Grid: [cdiv(num_slots, CHUNK)]. counts: [chunks, E_BLOCK] int32, slots of each expert in each chunk."""
    slots = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    experts = tl.arange(0, E_BLOCK)
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=-1).to(tl.int32)
    hits = (ids[:, None] == experts[None, :]).to(tl.int32)
    tl.store(counts_ptr + tl.program_id(0) * E_BLOCK + experts, tl.sum(hits, 0))


@triton.jit(do_not_specialize=["num_chunks", "num_blocks"])
def layout_kernel(
    counts_ptr: tl.tensor, starts_ptr: tl.tensor, experts_ptr: tl.tensor, num_chunks: tl.tensor, num_blocks: tl.tensor,
    E_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: [1]. counts become those of earlier chunks; starts: [E_BLOCK], the first place of each expert; experts:
    [num_blocks], the expert of each block of places, -1 where there is none."""
    experts = tl.arange(0, E_BLOCK)
    total = tl.zeros([E_BLOCK], tl.int32)
    for first in range(0, num_chunks, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = counts_ptr + rows[:, None] * E_BLOCK + experts[None, :]
        counts = tl.load(at, mask=(rows < num_chunks)[:, None], other=0)
        tl.store(at, tl.cumsum(counts, 0) - counts + total[None, :], mask=(rows < num_chunks)[:, None])
        total += tl.sum(counts, 0)
    blocks = (total + (BLOCK_T - 1)) // BLOCK_T
    ends = tl.cumsum(blocks, 0)
    tl.store(starts_ptr + experts, (ends - blocks) * BLOCK_T)
    for first in range(0, num_blocks, B):
        places = first + tl.arange(0, B)
        before = tl.sum((ends[None, :] <= places[:, None]).to(tl.int32), 1)
        tl.store(experts_ptr + places, tl.where(before < E_BLOCK, before, -1), mask=places < num_blocks)


@triton.jit(do_not_specialize=["num_slots"])
def place_kernel(
    ids_ptr: tl.tensor, counts_ptr: tl.tensor, starts_ptr: tl.tensor, slots_ptr: tl.tensor, num_slots: tl.tensor,
    E_BLOCK: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: [cdiv(num_slots, CHUNK)]. Each slot to its place, in the order of slots; one of no expert has none."""
    slots = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    experts = tl.arange(0, E_BLOCK)
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=-1).to(tl.int32)
    hits = (ids[:, None] == experts[None, :]).to(tl.int32)
    first = tl.load(starts_ptr + experts) + tl.load(counts_ptr + tl.program_id(0) * E_BLOCK + experts)
    places = tl.sum(hits * (tl.cumsum(hits, 0) - 1 + first[None, :]), 1)
    tl.store(slots_ptr + places, slots, mask=ids >= 0)


@triton.jit
def combine_kernel(
    rows_ptr: tl.tensor, weights_ptr: tl.tensor, ids_ptr: tl.tensor, out_ptr: tl.tensor, N: tl.tensor,
    TOP_K: tl.constexpr, B: tl.constexpr,
) -> None:  # fmt: skip
    """Grid: [num_tokens, cdiv(N, B)]. out: [num_tokens, N], rows [num_tokens * TOP_K, N] by their weights, in order;
    rows of ids below 0 were not written and count as zero."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * B + tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = token * TOP_K + choice
        row = tl.load(rows_ptr + slot * N + columns, mask=(columns < N) & (tl.load(ids_ptr + slot) >= 0), other=0.0)
        total += row.to(tl.float32) * tl.load(weights_ptr + slot)
    tl.store(out_ptr + token * N + columns, total.to(out_ptr.dtype.element_ty), mask=columns < N)
