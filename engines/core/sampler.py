"""From logits to the next token of each sequence, and whether it was the last one."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engines.api import FinishReason, TokenLogprobs
from engines.core.device import Device
from engines.core.sequence import Sequence
from engines.ops import OpSet
from engines.ops.sampling import SamplingBatch

Detokenize = Callable[[Many[int]], str]


@dataclass(frozen=True)
class Draw:
    """Tokens that the device draws, and what the host will read of them."""

    tokens: Tensor
    """[num_rows] int64"""
    best: Tensor
    """[num_rows] float32: the largest logit, not finite where the logits are not numbers"""
    wishes: tuple[tuple[int, int], ...] = ()
    """(row, number of most probable tokens) of those whose log-probabilities are asked for"""
    logprobs: tuple[Tensor, ...] = ()
    """[len(wishes)] of the drawn tokens, [len(wishes), k] of the most probable ones, and these"""

    def tensors(self) -> list[Tensor]:
        """What `read` wants, on the host."""
        return [self.tokens, self.best, *self.logprobs]

    def read(self, host: list[Tensor]) -> list[tuple[int | None, TokenLogprobs | None]]:
        """Each row's token, None where its logits are not numbers, and its log-probabilities. host: `tensors`."""
        tokens: list[int | None] = list(host[0].tolist())
        finite = torch.isfinite(host[1])
        if not bool(finite.all()):
            for i in torch.nonzero(~finite).flatten().tolist():
                tokens[i] = None
        logprobs: list[TokenLogprobs | None] = [None] * len(tokens)
        if self.wishes:
            found = zip(*(t.tolist() for t in host[2:]), strict=True)
            for (row, k), (own, values, ids) in zip(self.wishes, found, strict=True):
                logprobs[row] = TokenLogprobs(own, ids[:k], values[:k])
        return list(zip(tokens, logprobs, strict=True))


class Sampler:
    """Draws tokens and decides on the end of sequences."""

    def __init__(
        self, ops: OpSet, eos_token_ids: Many[int], detokenize: Detokenize | None, device: Device | None = None
    ) -> None:
        self.ops = ops
        self.eos_token_ids = frozenset(eos_token_ids)
        self.detokenize = detokenize
        self.device = device or Device(torch.device("cpu"))

    def draw(self, logits: Tensor, seqs: Many[Sequence]) -> Draw:
        """The next token of each sequence, without waiting for the device.

        logits: [len(seqs), vocab], may be overwritten. Modifies the counts of sequences with penalties.
        """
        if not any(map(_looks_at_all, seqs)):
            best, tokens = self.ops.argmax(logits)
            return Draw(tokens, best)
        raw = logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if any(s.sampling.logprobs is not None for s in seqs):
            raw = logits.clone()
        penalized = [i for i, s in enumerate(seqs) if _penalized(s)]
        if penalized:
            logits = self._penalize(logits, seqs, penalized)
        self._forbid_early_end(logits, seqs)
        best, tokens = self.ops.argmax(logits)
        if any(s.sampling.temperature > 0 for s in seqs):
            tokens = self.ops.sample(torch.nan_to_num(logits, nan=0.0), self._batch(seqs))
        for i in penalized:
            counts = seqs[i].counts
            assert counts is not None
            counts[1].index_add_(0, tokens[i : i + 1], counts.new_ones(1))
        wishes = tuple((i, s.sampling.logprobs) for i, s in enumerate(seqs) if s.sampling.logprobs is not None)
        return Draw(tokens, best, wishes, self._logprobs(raw, wishes, tokens))

    def _penalize(self, logits: Tensor, seqs: Many[Sequence], rows: list[int]) -> Tensor:
        chosen = [seqs[i] for i in rows]
        counts = torch.stack([self._counts(s, logits.shape[1]) for s in chosen])
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        columns = [np.array([getattr(s.sampling, name) for s in chosen], dtype=np.float32) for name in names]
        where, *penalties = self.device.upload([np.array(rows), *columns])
        whole = len(rows) == len(seqs)
        changed = self.ops.apply_penalties(logits if whole else logits[where], counts[:, 0], counts[:, 1], *penalties)
        return changed if whole else logits.index_copy_(0, where, changed)

    def _counts(self, seq: Sequence, vocab: int) -> Tensor:
        if seq.counts is None:
            parts = (seq.token_ids[: seq.num_prompt_tokens], seq.token_ids[seq.num_prompt_tokens :])
            rows = [np.bincount(np.array(part, dtype=np.int64), minlength=vocab) for part in parts]
            # Counts change in place: not in memory that the array keeps.
            seq.counts = self.device.upload([np.stack(rows).astype(np.int32)])[0].clone()
        return seq.counts

    def _forbid_early_end(self, logits: Tensor, seqs: Many[Sequence]) -> None:
        rows: list[int] = []
        tokens: list[int] = []
        for i, s in enumerate(seqs):
            if s.num_output_tokens < s.sampling.min_tokens:
                ends = [t for t in (*self.eos_token_ids, *s.sampling.stop_token_ids) if t < logits.shape[1]]
                rows += [i] * len(ends)
                tokens += ends
        if rows:
            where = self.device.upload([np.array(rows), np.array(tokens)])
            logits[where[0], where[1]] = float("-inf")

    def _batch(self, seqs: Many[Sequence]) -> SamplingBatch:
        def column(values: list[Any], dtype: type) -> np.ndarray:
            return np.array(values, dtype=dtype)

        # Streams are unsigned 64-bit keys; the tensor holds their bits.
        streams = column([s.request.stream for s in seqs], np.uint64).view(np.int64)
        columns = [
            column([s.sampling.temperature for s in seqs], np.float32),
            column([s.sampling.top_k for s in seqs], np.int64),
            column([s.sampling.top_p for s in seqs], np.float32),
            column([s.sampling.min_p for s in seqs], np.float32),
            streams,
            column([s.num_output_tokens for s in seqs], np.int64),
        ]
        return SamplingBatch(*self.device.upload(columns))

    def _logprobs(self, logits: Tensor, wishes: Many[tuple[int, int]], tokens: Tensor) -> tuple[Tensor, ...]:
        if not wishes:
            return ()
        if len(wishes) < len(logits):
            where = self.device.upload([np.array([row for row, _ in wishes])])[0]
            logits, tokens = logits[where], tokens[where]
        own = self.ops.log_softmax_gather(logits, tokens)
        most = min(max(k for _, k in wishes), logits.shape[1])
        values, ids = self.ops.top_logprobs(logits, most) if most else (logits[:, :0], tokens[:, None][:, :0])
        return own, values, ids

    def append(
        self, seq: Sequence, token: int, logprobs: TokenLogprobs | None
    ) -> tuple[FinishReason, str | int | None] | None:
        """Add a drawn token; (reason, stop string or token) if the sequence has ended.

        The token that ends a sequence, end-of-sequence or stop token, is not kept.
        """
        params = seq.sampling
        if seq.num_output_tokens >= params.min_tokens:
            if token in self.eos_token_ids and not params.ignore_eos:
                return "stop", None
            if token in params.stop_token_ids:
                return "stop", token
        seq.token_ids.append(token)
        if logprobs is not None:
            seq.logprobs.append(logprobs)
        if params.stop and seq.num_output_tokens >= params.min_tokens:
            found = self._stop_string(seq)
            if found is not None:
                return "stop", found
        return ("length", None) if seq.num_tokens >= seq.max_num_tokens else None

    def _stop_string(self, seq: Sequence) -> str | None:
        """The stop string that the end of the output now holds: the earliest one, and of two at one place the longer.

        A character has at most four tokens in byte-level vocabularies; a few more cover one cut at the front.
        """
        assert self.detokenize is not None, "stop strings need a detokenizer"
        tail = 4 * max(map(len, seq.sampling.stop)) + 8
        text = self.detokenize(seq.token_ids[max(seq.num_prompt_tokens, seq.num_tokens - tail) :])
        found = [(text.find(stop), -len(stop), stop) for stop in seq.sampling.stop if stop in text]
        return min(found)[2] if found else None


def _looks_at_all(seq: Sequence) -> bool:
    """Whether the next token takes more of the logits than their maximum."""
    p = seq.sampling
    return p.temperature > 0 or p.logprobs is not None or _penalized(seq) or seq.num_output_tokens < p.min_tokens


def _penalized(seq: Sequence) -> bool:
    p = seq.sampling
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
