"""From logits to the next token of each sequence, and whether it was the last one."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from engines.api import FinishReason, TokenLogprobs
from engines.core.sequence import Sequence
from engines.ops import OpSet
from engines.ops.sampling import SamplingBatch

Detokenize = Callable[[Many[int]], str]


class Sampler:
    """Draws tokens and decides on the end of sequences."""

    def __init__(self, ops: OpSet, eos_token_ids: Many[int], detokenize: Detokenize | None) -> None:
        self.ops = ops
        self.eos_token_ids = frozenset(eos_token_ids)
        self.detokenize = detokenize

    def sample(self, logits: Tensor, seqs: Many[Sequence]) -> list[int | None]:
        """The next token of each sequence; None where its logits are not numbers.

        logits: [len(seqs), vocab], may be overwritten. Log-probabilities that are asked for are appended.
        """
        if not any(map(_looks_at_all, seqs)):
            best, drawn = self.ops.argmax(logits)
            return _tokens(drawn, best)
        raw = logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if any(s.sampling.logprobs is not None for s in seqs):
            raw = logits.clone()
        logits = self._penalize(logits, seqs)
        logits = self._forbid_early_end(logits, seqs)
        best, drawn = self.ops.argmax(logits)
        if any(s.sampling.temperature > 0 for s in seqs):
            drawn = self.ops.sample(torch.nan_to_num(logits, nan=0.0), self._batch(seqs, logits.device))
        tokens = _tokens(drawn, best)
        self._append_logprobs(raw, seqs, tokens)
        return tokens

    def _penalize(self, logits: Tensor, seqs: Many[Sequence]) -> Tensor:
        rows = [i for i, s in enumerate(seqs) if _penalized(s)]
        if not rows:
            return logits
        chosen = [seqs[i] for i in rows]
        counts = torch.stack([_counts(s, logits.shape[1], logits.device) for s in chosen])

        def values(name: str) -> Tensor:
            return torch.tensor([getattr(s.sampling, name) for s in chosen], device=logits.device)

        logits[rows] = self.ops.apply_penalties(
            logits[rows],
            counts[:, 0],
            counts[:, 1],
            values("repetition_penalty"),
            values("presence_penalty"),
            values("frequency_penalty"),
        )
        return logits

    def _forbid_early_end(self, logits: Tensor, seqs: Many[Sequence]) -> Tensor:
        for i, s in enumerate(seqs):
            if s.num_output_tokens < s.sampling.min_tokens:
                ends = [*self.eos_token_ids, *s.sampling.stop_token_ids]
                logits[i, [t for t in ends if t < logits.shape[1]]] = float("-inf")
        return logits

    def _batch(self, seqs: Many[Sequence], device: torch.device) -> SamplingBatch:
        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        # Streams are unsigned 64-bit keys; the tensor holds their bits.
        streams = [s.request.stream - (1 << 64) if s.request.stream >= 1 << 63 else s.request.stream for s in seqs]
        return SamplingBatch(
            temperature=column([s.sampling.temperature for s in seqs], torch.float32),
            top_k=column([s.sampling.top_k for s in seqs], torch.int64),
            top_p=column([s.sampling.top_p for s in seqs], torch.float32),
            min_p=column([s.sampling.min_p for s in seqs], torch.float32),
            stream=torch.tensor(streams, dtype=torch.int64, device=device),
            position=column([s.num_output_tokens for s in seqs], torch.int64),
        )

    def _append_logprobs(self, logits: Tensor, seqs: Many[Sequence], tokens: list[int | None]) -> None:
        rows = [i for i, s in enumerate(seqs) if s.sampling.logprobs is not None and tokens[i] is not None]
        if not rows:
            return
        chosen = logits[rows]
        targets = torch.tensor([tokens[i] for i in rows], device=logits.device)
        own = self.ops.log_softmax_gather(chosen, targets).tolist()
        most = min(max(seqs[i].sampling.logprobs or 0 for i in rows), logits.shape[1])
        values, ids = self.ops.top_logprobs(chosen, most) if most else (chosen[:, :0], chosen[:, :0].long())
        for i, logprob, value, index in zip(rows, own, values.tolist(), ids.tolist(), strict=True):
            k = seqs[i].sampling.logprobs or 0
            seqs[i].logprobs.append(TokenLogprobs(logprob, index[:k], value[:k]))

    def append(self, seq: Sequence, token: int) -> tuple[FinishReason, str | int | None] | None:
        """Add a drawn token; (reason, stop string or token) if the sequence has ended.

        The token that ends a sequence, end-of-sequence or stop token, is not kept.
        """
        params = seq.sampling
        if seq.num_output_tokens >= params.min_tokens:
            if token in self.eos_token_ids and not params.ignore_eos:
                return self._ended(seq, None)
            if token in params.stop_token_ids:
                return self._ended(seq, token)
        seq.token_ids.append(token)
        if seq.counts is not None:
            seq.counts[1, token] += 1
        if params.stop and seq.num_output_tokens >= params.min_tokens:
            found = self._stop_string(seq)
            if found is not None:
                return "stop", found
        return ("length", None) if seq.num_tokens >= seq.max_num_tokens else None

    def _ended(self, seq: Sequence, stop: int | None) -> tuple[FinishReason, int | None]:
        if seq.sampling.logprobs is not None:
            seq.logprobs.pop()
        return "stop", stop

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


def _tokens(drawn: Tensor, best: Tensor) -> list[int | None]:
    """None where the row's maximum is not a number: it is NaN if any of its logits is."""
    tokens: list[int | None] = list(drawn.tolist())
    if not bool(torch.isfinite(best).all()):
        for i in torch.nonzero(~torch.isfinite(best)).flatten().tolist():
            tokens[i] = None
    return tokens


def _penalized(seq: Sequence) -> bool:
    p = seq.sampling
    return p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0


def _counts(seq: Sequence, vocab: int, device: torch.device) -> Tensor:
    if seq.counts is None:
        parts = (seq.token_ids[: seq.num_prompt_tokens], seq.token_ids[seq.num_prompt_tokens :])
        rows = [torch.bincount(torch.tensor(part, dtype=torch.int64), minlength=vocab) for part in parts]
        seq.counts = torch.stack(rows).to(torch.int32).to(device)
    return seq.counts
