"""From logits to tokens without sorting a vocabulary: a program has one sequence, so that a draw does not depend on
the batch.

Filters are cuts through the tokens ordered by logit, highest first and among equals the lowest ids first. A cut is a
key, an integer in the order of the logits: tokens above it are left, and of those that have it the first `ties`. It is
found by bisection, one pass over the row each, at most 32 and mostly about 20, until one token is in question. Weights
and their sums are float64; the random number is the contract's Philox.

Cost of a sequence with V logits: 8 V bytes greedy, 16 V drawn without a filter, about 80 V (from the L2 cache) for each
of top_k and top_p.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.ops import sampling as ops
from engines.ops.sampling import SamplingBatch
from engines.triton.launch import has_float64, power_of_two

BLOCK = 1024


@triton.jit
def order_key(x: tl.tensor) -> tl.tensor:
    """int64 from 0 to 2**32 - 1 in the order of float32 numbers; -0 is 0."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


@triton.jit
def key_logit(key: tl.tensor) -> tl.tensor:
    """The logit of a key."""
    bits = tl.where(key >= 0x80000000, key - 0x80000000, 0xFFFFFFFF - key)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(logit: tl.tensor, most: tl.tensor, temperature: tl.tensor, min_p: tl.tensor) -> tl.tensor:
    """exp(logit / temperature), 1 at the maximum, 0 below min_p: float64."""
    weight = tl.exp((logit.to(tl.float64) - most.to(tl.float64)) / temperature)
    return tl.where(weight < min_p, 0.0, weight)


@triton.jit
def tail(
    row_ptr: tl.tensor,
    vocab: tl.tensor,
    key: tl.tensor,
    most: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    WEIGHTS: tl.constexpr,
    B: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(number, sum of the weights) of the tokens whose key is at least `key`; the sum is 0 without WEIGHTS."""
    number = tl.full([], 0, tl.int64)
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, vocab, B):
        ids = start + tl.arange(0, B)
        logits = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
        chosen = (ids < vocab) & (order_key(logits) >= key)
        number += tl.sum(chosen.to(tl.int64), 0)
        if WEIGHTS:
            total += tl.sum(tl.where(chosen, weight_of(logits, most, temperature, min_p), 0.0), 0)
    return number, total


@triton.jit
def bisect(
    row_ptr: tl.tensor,
    vocab: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    number: tl.tensor,
    goal: tl.tensor,
    most: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    WEIGHTS: tl.constexpr,
    B: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """(low, number from low on, number from above it on, sum above it) for the largest key `low` at which the tokens
    from it on reach the goal, their number or with WEIGHTS the sum of their weights; or a smaller one with the same
    tokens. number: of the tokens from the given low on, which reach it.
    """
    above = tl.full([], 0, tl.int64)
    above_sum = tl.full([], 0.0, tl.float64)
    while (high - low > 1) & (number - above > 1):
        middle = (low + high) // 2
        count, total = tail(row_ptr, vocab, middle, most, temperature, min_p, WEIGHTS, B)
        enough = total >= goal if WEIGHTS else count >= goal
        low, number = tl.where(enough, middle, low), tl.where(enough, count, number)
        high, above = tl.where(enough, high, middle), tl.where(enough, above, count)
        above_sum = tl.where(enough, above_sum, total)
    return low, number, above, above_sum


@triton.jit
def uniform(stream: tl.tensor, position: tl.tensor) -> tl.tensor:
    """As engines.ops.sampling.uniform, from the same two words."""
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    first, second, _, _ = tl.philox(stream, low, high, zero, zero)
    bits = (first >> 5).to(tl.int64) * 67108864 + (second >> 6).to(tl.int64)
    return bits.to(tl.float64) / 9007199254740992.0


@triton.jit
def invert(
    row_ptr: tl.tensor,
    vocab: tl.tensor,
    cut: tl.tensor,
    ties: tl.tensor,
    share: tl.tensor,
    most: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    B: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(first token left by the cut at which the running sum of weights exceeds share, or the last one that has a
    weight; the whole sum).
    """
    found = tl.full([], -1, tl.int64)
    last = tl.full([], 0, tl.int64)
    running = tl.full([], 0.0, tl.float64)
    tied = tl.full([], 0, tl.int64)
    for start in range(0, vocab, B):
        ids = start + tl.arange(0, B)
        logits = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
        keys = tl.where(ids < vocab, order_key(logits), -2)
        equal = (keys == cut).to(tl.int64)
        left = (keys > cut) | ((equal != 0) & (tied + tl.cumsum(equal, 0) <= ties))
        weights = tl.where(left, weight_of(logits, most, temperature, min_p), 0.0)
        through = running + tl.cumsum(weights, 0)
        over = (through > share) & (weights > 0.0)
        here = tl.min(tl.where(over, ids, vocab), 0).to(tl.int64)
        found = tl.where((found < 0) & (here < vocab), here, found)
        last = tl.maximum(last, tl.max(tl.where(weights > 0.0, ids, 0), 0).to(tl.int64))
        running = tl.max(through, 0)
        tied += tl.sum(equal, 0)
    return tl.where(found < 0, last, found), running


@triton.jit
def sample_kernel(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    min_p_ptr: tl.tensor,
    stream_ptr: tl.tensor,
    position_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab: tl.tensor,
    B: tl.constexpr,
) -> None:
    """Grid: [num_seqs]. logits: [num_seqs, vocab] float32."""
    seq = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + seq * row_stride
    most = tl.full([], float("-inf"), tl.float32)
    at = tl.full([], 0, tl.int64)
    for start in range(0, vocab, B):
        ids = start + tl.arange(0, B)
        logits = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
        here = tl.max(logits, 0)
        first = tl.min(tl.where(logits == here, ids, vocab), 0).to(tl.int64)
        at = tl.where(here > most, first, at)
        most = tl.maximum(most, here)
    temperature = tl.load(temperature_ptr + seq).to(tl.float64)
    if temperature <= 0.0:
        tl.store(out_ptr + seq, at)
        return
    min_p = tl.load(min_p_ptr + seq).to(tl.float64)
    top_k = tl.minimum(tl.load(top_k_ptr + seq), vocab).to(tl.int64)
    top_p = tl.load(top_p_ptr + seq).to(tl.float64)
    above_most = order_key(most) + 1
    # Before any filter: everything is above the cut.
    cut, ties = tl.full([], -1, tl.int64), tl.full([], 0, tl.int64)
    left = tl.full([], 0, tl.int64) + vocab
    if top_k > 0:
        low, number, above, _ = bisect(
            row_ptr, vocab, cut, above_most, left, top_k, most, temperature, min_p, False, B
        )  # fmt: skip
        single = number - above <= 1
        cut, ties = tl.where(single, low - 1, low), tl.where(single, 0, top_k - above)
        left = top_k
    if top_p < 1.0:
        _, total = tail(row_ptr, vocab, cut + 1, most, temperature, min_p, True, B)
        tied_weight = weight_of(key_logit(tl.maximum(cut, 0)), most, temperature, min_p)
        total += tl.where(ties > 0, ties.to(tl.float64) * tied_weight, 0.0)
        target = top_p * total
        low, number, above, above_sum = bisect(
            row_ptr, vocab, cut, above_most, left, target, most, temperature, min_p, True, B
        )  # fmt: skip
        weight = weight_of(key_logit(tl.maximum(low, 0)), most, temperature, min_p)
        wanted = tl.ceil((target - above_sum) / tl.where(weight > 0.0, weight, 1.0)).to(tl.int64)
        wanted = tl.minimum(tl.maximum(wanted, 1), number - above)
        single = number - above <= 1
        whole = single & (low == cut)
        ties = tl.where(whole, ties, tl.where(single, 0, wanted))
        cut = tl.where(whole | (not single), low, low - 1)
    _, total = invert(row_ptr, vocab, cut, ties, float("inf"), most, temperature, min_p, B)
    share = uniform(tl.load(stream_ptr + seq), tl.load(position_ptr + seq)) * total
    token, _ = invert(row_ptr, vocab, cut, ties, share, most, temperature, min_p, B)
    tl.store(out_ptr + seq, token)


@triton.jit
def penalties_kernel(
    logits_ptr: tl.tensor,
    prompt_ptr: tl.tensor,
    output_ptr: tl.tensor,
    repetition_ptr: tl.tensor,
    presence_ptr: tl.tensor,
    frequency_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row_stride: tl.tensor,
    prompt_stride: tl.tensor,
    output_stride: tl.tensor,
    vocab: tl.tensor,
    B: tl.constexpr,
) -> None:
    """Grid: [num_seqs, cdiv(vocab, B)]; 16 bytes and 6 operations a logit. out: [num_seqs, vocab], dense."""
    seq = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * B + tl.arange(0, B)
    inside = ids < vocab
    logit = tl.load(logits_ptr + seq * row_stride + ids, mask=inside, other=0.0)
    prompt = tl.load(prompt_ptr + seq * prompt_stride + ids, mask=inside, other=0)
    output = tl.load(output_ptr + seq * output_stride + ids, mask=inside, other=0)
    repetition = tl.load(repetition_ptr + seq)
    factor = tl.where((prompt > 0) | (output > 0), repetition, 1.0)
    wide = tl.where(logit > 0, logit / factor, logit * factor)
    wide -= tl.load(frequency_ptr + seq) * output.to(tl.float32)
    wide -= tl.where(output > 0, tl.load(presence_ptr + seq), 0.0)
    tl.store(out_ptr + seq * vocab + ids, wide, mask=inside)


@triton.jit
def log_softmax_gather_kernel(
    logits_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    out_ptr: tl.tensor,
    row_stride: tl.tensor,
    vocab: tl.tensor,
    B: tl.constexpr,
) -> None:
    """Grid: [num_rows]. Maximum and sum go along, one for each lane: each logit is read once."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.full([B], float("-inf"), tl.float32)
    total = tl.zeros([B], tl.float32)
    for start in range(0, vocab, B):
        ids = start + tl.arange(0, B)
        logits = tl.load(logits_ptr + row * row_stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        raised = tl.maximum(most, logits)
        base = tl.where(raised == float("-inf"), 0.0, raised)
        total = total * tl.exp(most - base) + tl.exp(logits - base)
        most = raised
    highest = tl.max(most, 0)
    total = tl.sum(total * tl.exp(most - highest), 0)
    own = tl.load(logits_ptr + row * row_stride + tl.load(targets_ptr + row)).to(tl.float32)
    tl.store(out_ptr + row, own - (highest + tl.log(total)))


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """As the reference. Sums of weights are made in another order, in float64: on the processor for devices without."""
    if not has_float64(logits.device.type):
        columns = (getattr(params, field.name).cpu() for field in fields(params))
        return ops.sample(logits.float().cpu(), SamplingBatch(*columns)).to(logits.device)
    rows, vocab = logits.shape
    logits = logits.float()
    logits = logits if logits.stride(1) == 1 or vocab == 1 else logits.contiguous()
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        sample_kernel[(rows,)](
            logits,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            params.stream,
            params.position,
            out,
            logits.stride(0),
            vocab,
            B=min(BLOCK, power_of_two(vocab, 2)),
            num_warps=8,
        )
    return out


def apply_penalties(
    logits: Tensor,
    prompt_counts: Tensor,
    output_counts: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
) -> Tensor:
    """As the reference, in one pass."""
    rows, vocab = logits.shape
    out = torch.empty((rows, vocab), dtype=logits.dtype, device=logits.device)
    if out.numel():
        counts = [t if vocab == 1 or t.stride(1) == 1 else t.contiguous() for t in (prompt_counts, output_counts)]
        logits = logits if vocab == 1 or logits.stride(1) == 1 else logits.contiguous()
        block = min(BLOCK, power_of_two(vocab))
        penalties_kernel[(rows, triton.cdiv(vocab, block))](
            logits,
            *counts,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            out,
            logits.stride(0),
            *(t.stride(0) for t in counts),
            vocab,
            B=block,
        )
    return out


def log_softmax_gather(logits: Tensor, targets: Tensor) -> Tensor:
    """As the reference."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        logits = logits if vocab == 1 or logits.stride(1) == 1 else logits.contiguous()
        log_softmax_gather_kernel[(rows,)](
            logits, targets, out, logits.stride(0), vocab, B=min(BLOCK, power_of_two(vocab)), num_warps=8
        )
    return out
