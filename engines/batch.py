"""The ragged batch of one engine step: built by core/model_runner.py, read by layers and attention ops."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class PrefixGroup:
    """Sequences whose block tables begin with the same blocks, so that attention may read those once for all."""

    seqs: torch.Tensor
    """[num_members] int32: indices into the batch's sequences; each of them decodes one token in this step."""
    num_blocks: int
    """Leading blocks that all members share. Full blocks only; inside every member's window."""


@dataclass(frozen=True)
class Batch:
    """New tokens of `num_seqs` sequences laid end to end. All tensors are on the model's device and contiguous.

    Sequence i has new tokens cu_seqlens_q[i]:cu_seqlens_q[i+1] and, once they are cached, seq_lens[i] tokens in all:
    its new tokens are the last ones. Decoding sequences have one new token, prefilling ones any number.
    """

    token_ids: torch.Tensor
    """[num_tokens] int64"""
    positions: torch.Tensor
    """[num_tokens] int64, from 0"""
    cu_seqlens_q: torch.Tensor
    """[num_seqs + 1] int32"""
    seq_lens: torch.Tensor
    """[num_seqs] int32, KV length including the new tokens"""
    max_seqlen_q: int
    max_seqlen_k: int
    slot_mapping: torch.Tensor | None = None
    """[num_tokens] int64: block * block_size + offset; None for encoders, which keep no cache"""
    block_tables: torch.Tensor | None = None
    """[num_seqs, max_blocks] int32; entries past a sequence's last block are undefined"""
    output_indices: torch.Tensor | None = None
    """[num_outputs] int64: the tokens whose hidden states go on to the head; None: all"""
    prefix_groups: tuple[PrefixGroup, ...] = field(default=())
    seq_ids: tuple[int, ...] = ()
    """One id a sequence, stable over its life: for models that keep their own state instead of the paged cache."""
    adapter_ids: torch.Tensor | None = None
    """[num_tokens] int64: each token's adapter by its place in the model's `adapters`, -1: none; None: none has one"""
    lengths: np.ndarray | None = None
    """[2, num_seqs] int64, in this process's memory: new tokens and KV length of each sequence, for libraries that lay
    out their work there; None where only the device's memory has them"""
    context_keys: torch.Tensor | None = None
    """[num_seqs] int64: each sequence's Model.context_key; None where all are 0."""

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]
