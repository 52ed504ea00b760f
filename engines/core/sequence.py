"""A request as the engine holds it: its tokens, how far they are computed, the blocks that hold their KV."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import xxhash
from torch import Tensor

from engines.api import HeldKV, Request, SamplingParams, TokenLogprobs

UNREAD = -1
"""Stands in token_ids for a token that the device has drawn and the host has not read."""


@dataclass(slots=True, eq=False)
class Sequence:
    """Made by the engine at submit; the scheduler sets blocks and counts, the sampler appends tokens."""

    seq_id: int
    request: Request
    sampling: SamplingParams
    max_num_tokens: int
    """Prompt and output may have this many tokens."""
    reusable_tokens: int
    """Leading prompt tokens whose hidden states nobody asks for, so that their KV may come from the prefix cache."""
    token_ids: list[int]
    """Prompt and output; the last one may be UNREAD."""
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was reused when the sequence was first admitted."""
    context_key: int = 0
    hands_over: bool = False
    """Whether another engine goes on after the first token."""
    held: HeldKV | None = None
    """Keys and values of the prompt in another engine, not yet read."""
    adapter_id: int = -1
    """Place of the request's adapter among the model's; -1: none."""
    unread_row: int = -1
    """Where the last of token_ids is UNREAD: its row among the tokens of the step in flight; else -1."""
    copy: int = 0
    """The copy of the model that computes it, among those of the engine."""
    slot: int = -1
    """Row of the scheduler's block table while running."""
    num_blocks: int = 0
    num_registered_blocks: int = 0
    """Leading blocks that the prefix cache knows."""
    digests: list[int] = field(default_factory=list)
    """Chained digests of the leading full blocks' tokens, as far as they were asked for."""
    admissions: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    pooled: Tensor | None = None
    """Running sum or maximum of hidden states, float32, for mean and max pooling."""
    counts: Tensor | None = None
    """[2, vocab] int32 occurrences in prompt and output, those in flight included; only where penalties want them."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def waits_for_end(self) -> bool:
        """Whether the token in flight is the last one that this engine draws, whatever it is."""
        return self.unread_row >= 0 and (self.hands_over or len(self.token_ids) >= self.max_num_tokens)

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens to be computed before the next one can be drawn."""
        return len(self.token_ids) - self.num_computed_tokens

    def digest(self, index: int, block_size: int) -> int:
        """Identity of the tokens in blocks 0 to index, all full, and of the context key and adapter that they were
        computed under."""
        while len(self.digests) <= index:
            parent = self.digests[-1] if self.digests else self.context_key | (self.adapter_id + 1) << 64
            start = len(self.digests) * block_size
            tokens = np.array(self.token_ids[start : start + block_size], dtype=np.int32).tobytes()
            self.digests.append(xxhash.xxh3_128_intdigest(parent.to_bytes(16, "little") + tokens))
        return self.digests[index]
