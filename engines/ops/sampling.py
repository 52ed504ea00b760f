"""From logits to tokens: penalties, filters, counter-based random choice, log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

MAX_VALUES = 1 << 20
"""Logits that sampling looks at together: bounds its copies, and keeps them in the processor's cache."""
CANDIDATES = (256, 4096)
"""Numbers of most probable tokens that top_k and top_p are tried on before the whole vocabulary is sorted."""


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

    def take(self, rows: Tensor) -> SamplingBatch:
        """The settings of some of the sequences. rows: [n] int64."""
        return SamplingBatch(*(getattr(self, field.name)[rows] for field in fields(self)))


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


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(maximum of each row, float32 and NaN where any value is; the lowest id that has it, int64).

    logits: [num_rows, vocab], any float type.
    """
    return logits.amax(-1).float(), logits.argmax(-1)


def sample(logits: Tensor, params: SamplingBatch) -> Tensor:
    """One token a sequence: [num_seqs] int64.

    logits: [num_seqs, vocab] float32, not NaN. Greedy takes the lowest id among equal maxima. Otherwise: softmax of
    logits / temperature in float64, min_p, top_k, top_p in this order (each on what the one before left, among equals
    the lowest ids first, top_p keeps the token that crosses the threshold), then inverse transform in order of token id
    with one uniform number that depends on (stream, position) alone.
    """
    tokens = logits.argmax(-1)
    drawn = params.temperature > 0
    filtered = (params.top_k > 0) | (params.top_p < 1)
    for chosen, draw in ((drawn & ~filtered, _draw_from_all), (drawn & filtered, _draw_from_top)):
        rows = torch.nonzero(chosen).flatten()
        for part in rows.split(max(1, MAX_VALUES // logits.shape[1])) if len(rows) else ():
            tokens[part] = draw(logits[part], params.take(part))
    return tokens


def _draw_from_all(logits: Tensor, params: SamplingBatch) -> Tensor:
    return _invert(_weights(logits, params), params)


def _draw_from_top(logits: Tensor, params: SamplingBatch) -> Tensor:
    """Tries the filters on the most probable tokens, and on more of them where that is not all that may be left."""
    vocab = logits.shape[1]
    total = None
    if bool((params.top_k == 0).any()):
        total = _weights(logits, params).sum(-1)
    drawn = torch.empty_like(params.position)
    rest = torch.arange(len(drawn), device=drawn.device)
    for count in (*CANDIDATES, vocab):
        if not len(rest) or (count < vocab and count < int(params.top_k[rest].max())):
            continue
        few = params.take(rest)
        values, ids = logits[rest].topk(min(count, vocab), dim=-1)
        ids, order = ids.sort(dim=-1)
        weights = _weights(values.gather(-1, order), few)
        kept, least = _keep(weights, None if total is None else total[rest], few)
        drawn[rest] = ids.gather(-1, _invert(kept, few)[:, None]).squeeze(-1)
        # Were the least probable candidate kept, its equals among the others might come before it.
        rest = rest[least <= weights.amin(-1)]
        if count >= vocab:
            break
    return drawn


def _weights(logits: Tensor, params: SamplingBatch) -> Tensor:
    """exp of logits / temperature, 1 at the maximum, 0 for what min_p leaves out: [num_seqs, vocab] float64."""
    wide = logits.to(torch.float64, copy=True)
    wide = wide.sub_(wide.amax(-1, keepdim=True)).div_(params.temperature[:, None]).exp_()
    if bool((params.min_p > 0).any()):
        wide.masked_fill_(wide < params.min_p[:, None], 0.0)
    return wide


def _keep(weights: Tensor, total: Tensor | None, params: SamplingBatch) -> tuple[Tensor, Tensor]:
    """(weights with zeros for what top_k and top_p leave out, the least weight that is left).

    weights: [num_seqs, n] in order of token id; total: [num_seqs] their sum with those of the tokens that are not among
    them, needed by sequences without top_k.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(weights.shape[1], device=weights.device)[None, :]
    left = ordered.masked_fill((params.top_k[:, None] > 0) & (rank >= params.top_k[:, None]), 0.0)
    before = left.cumsum(-1) - left
    own = left.sum(-1)
    total = own if total is None else torch.where(params.top_k > 0, own, total)
    cut = (params.top_p[:, None] < 1) & (before >= params.top_p[:, None] * total[:, None]) & (rank > 0)
    left = left.masked_fill(cut, 0.0)
    return torch.zeros_like(weights).scatter(-1, order, left), left.masked_fill(left == 0, float("inf")).amin(-1)


def _invert(weights: Tensor, params: SamplingBatch) -> Tensor:
    """The first token, in order of id, at which the running sum exceeds a uniform share of the total."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    # Below the total even where the product rounds up, so that what is drawn has a weight.
    share = torch.minimum(uniform(params.stream, params.position) * total, torch.nextafter(total, total.new_zeros(())))
    return torch.searchsorted(cumulative, share[:, None], right=True).squeeze(-1)


def uniform(stream: Tensor, position: Tensor) -> Tensor:
    """Uniform float64 in [0, 1): 53 bits of the first two words of Philox with key `stream` and counter `position`."""
    mask = 0xFFFFFFFF
    zero = torch.zeros_like(position)
    first, second, _, _ = philox(
        (position & mask, (position >> 32) & mask, zero, zero), (stream & mask, (stream >> 32) & mask)
    )
    return ((first >> 5) * 67108864 + (second >> 6)).double() / 9007199254740992.0


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words from a counter of four and a key of two, each 32 bits in an int64.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants as in Random123.
    """
    mask = 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = _multiply(counter[0], 0xD2511F53)
        high1, low1 = _multiply(counter[2], 0xCD9E8D57)
        counter = (high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0)
        key = ((key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask)
    return counter


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
