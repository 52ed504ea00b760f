"""From logits to tokens: penalties, filters, counter-based random choice, log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingBatch:
    """Per-sequence sampling settings of one step, as tensors of [num_seqs] on the logits' device."""

    temperature: Tensor
    """float32; 0 is greedy"""
    top_k: Tensor
    """int64; 0: all"""
    top_p: Tensor
    """float32"""
    min_p: Tensor
    """float32"""
    stream: Tensor
    """int64: the bits of each request's 64-bit random key"""
    position: Tensor
    """int64: number of the token to be drawn in its output, from 0"""


def apply_penalties(
    logits: Tensor,
    prompt_counts: Tensor,
    output_counts: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    frequency_penalty: Tensor,
) -> Tensor:
    """Logits after the penalties, as vLLM and OpenAI define them.

    logits: [num_seqs, vocab] float32; counts: [num_seqs, vocab] integer occurrences in prompt and in output;
    penalties: [num_seqs] float32. Repetition divides positive and multiplies negative logits of every token seen in
    prompt or output (arXiv 1909.05858); presence and frequency subtract for tokens seen in the output.
    """
    seen = (prompt_counts > 0) | (output_counts > 0)
    factor = torch.where(seen, repetition_penalty[:, None], 1.0)
    logits = torch.where(logits > 0, logits / factor, logits * factor)
    return logits - frequency_penalty[:, None] * output_counts - presence_penalty[:, None] * (output_counts > 0)


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """One token a sequence: [num_seqs] int64.

    logits: [num_seqs, vocab] float32, not NaN. Greedy takes the lowest id among equal maxima. Otherwise: softmax of
    logits / temperature, min_p, top_k, top_p in this order (each on what the one before left, top_p keeps the token
    that crosses the threshold), then inverse transform in order of token id with one uniform number that depends on
    (stream, position) alone.
    """
    greedy = logits.argmax(-1)
    if not bool((params.temperature > 0).any()):
        return greedy
    temperature = torch.where(params.temperature > 0, params.temperature, 1.0)
    probs = torch.softmax(logits.double() / temperature[:, None].double(), dim=-1)
    probs = probs.masked_fill(probs < params.min_p[:, None] * probs.amax(-1, keepdim=True), 0.0)
    probs = _top_k_top_p(probs, params.top_k, params.top_p)
    cumulative = probs.cumsum(-1)
    threshold = uniform(params.stream, params.position)[:, None] * cumulative[:, -1:]
    drawn = (cumulative <= threshold).sum(-1).clamp_(max=logits.shape[-1] - 1)
    return torch.where(params.temperature > 0, drawn, greedy)


def _top_k_top_p(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    if not bool(((top_k > 0) | (top_p < 1)).any()):
        return probs
    ordered, order = torch.sort(probs, dim=-1, descending=True, stable=True)
    rank = torch.arange(probs.shape[-1], device=probs.device)[None, :]
    ordered = ordered.masked_fill((top_k[:, None] > 0) & (rank >= top_k[:, None]), 0.0)
    before = ordered.cumsum(-1) - ordered
    cut = (top_p[:, None] < 1) & (before >= top_p[:, None] * ordered.sum(-1, keepdim=True)) & (rank > 0)
    return torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(cut, 0.0))


def uniform(stream: Tensor, position: Tensor) -> Tensor:
    """Uniform float64 in [0, 1) from Philox4x32-10 with key `stream` and counter `position`.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants as in Random123. The first
    two output words give 53 bits.
    """
    mask = 0xFFFFFFFF
    key = [stream & mask, (stream >> 32) & mask]
    zero = torch.zeros_like(position)
    counter = [position & mask, (position >> 32) & mask, zero, zero]
    for _ in range(10):
        high0, low0 = _multiply(counter[0], 0xD2511F53)
        high1, low1 = _multiply(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    bits = (counter[0] >> 5) * 67108864 + (counter[1] >> 6)
    return bits.double() / 9007199254740992.0


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """(high, low) 32 bits of a 32-bit product, in int64 without overflow: by 16-bit halves of the constant."""
    low_part = x * (constant & 0xFFFF)
    high_part = x * (constant >> 16)
    middle = high_part + (low_part >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)


def log_softmax_gather(logits: Tensor, targets: Tensor) -> Tensor:
    """log_softmax(logits)[i, targets[i]]: [num_rows] float32. logits: [num_rows, vocab], any float type."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.gather(-1, targets[:, None]).squeeze(-1) - wide.logsumexp(-1)


def top_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, ids) of the k largest log-probabilities of each row: [num_rows, k] float32 and int64, descending."""
    wide = logits.float()
    values, ids = wide.topk(k, dim=-1)
    return values - wide.logsumexp(-1, keepdim=True), ids
