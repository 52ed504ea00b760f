"""Attention over a ragged batch: paged for decoders, plain for encoders. Softmax in float32 (float64 for float64)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engines.batch import Batch
from engines.ops.kv_cache import KVCache, LatentCache, QuantizedKVCache, dequantize_vectors

if TYPE_CHECKING:
    from engines.ops import OpSet

MAX_SCORES = 1 << 24
"""Scores of queries and keys that latent_attention holds at a time: 64 MiB in float32, unless one query has more."""
MAX_UNPACKED_TOKENS = 1 << 14
"""Cached tokens that quantized_attention has unpacked at a time, unless one sequence has more."""


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: Batch,
    softmax_scale: float,
    window_size: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens to all its tokens, whose keys and values the cache already holds.

    q: [num_tokens, num_heads, head_dim]; num_heads is a multiple of the cache's num_kv_heads, query head h reads KV
    head h // (num_heads / num_kv_heads). window_size: a token attends to itself and the window_size - 1 tokens before
    it; 0: to all. softcap: scores become softcap * tanh(score / softcap) (Gemma 2); 0: off. sinks: [num_heads] logits
    that join each softmax without a value (gpt-oss). batch.prefix_groups is a hint that an op set may ignore.

    Returns a new tensor, [num_tokens, num_heads, head_dim], q's dtype. Slots past a sequence's length are not read.
    """
    assert batch.block_tables is not None
    out = torch.empty_like(q)
    group = q.shape[1] // cache.k.shape[1]
    starts = batch.cu_seqlens_q.tolist()
    for i, seq_len in enumerate(batch.seq_lens.tolist()):
        begin, end = starts[i], starts[i + 1]
        if begin == end:
            continue
        num_blocks = -(-seq_len // cache.block_size)
        blocks = batch.block_tables[i, :num_blocks].long()
        k, v = (t[blocks].transpose(1, 2).reshape(-1, *t.shape[1:2], t.shape[3])[:seq_len] for t in (cache.k, cache.v))
        first = seq_len - (end - begin)
        out[begin:end] = _attend(q[begin:end], k, v, group, softmax_scale, first, window_size, softcap, sinks)
    return out


def quantized_attention(
    self: OpSet,
    q: Tensor,
    cache: QuantizedKVCache,
    batch: Batch,
    softmax_scale: float,
    window_size: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As paged_attention, over keys and values in 8 or 4 bits. They may be rounded to q's dtype before use.

    The reference unpacks the blocks of some sequences at a time, and has the op set's own paged_attention work on them.
    """
    assert batch.block_tables is not None
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    starts = batch.cu_seqlens_q.tolist()
    for first, last in _runs(batch.seq_lens.tolist()):
        part = slice(starts[first], starts[last])
        if part.start == part.stop:
            continue
        counts = -(-batch.seq_lens[first:last].long() // cache.block_size)
        tables = batch.block_tables[first:last, : int(counts.max())].long()
        used = torch.arange(tables.shape[1], device=q.device) < counts[:, None]
        blocks, places = tables[used].unique(return_inverse=True)
        own = torch.zeros_like(tables, dtype=torch.int32)
        own[used] = places.int()
        some = replace(
            batch,
            cu_seqlens_q=batch.cu_seqlens_q[first : last + 1] - starts[first],
            seq_lens=batch.seq_lens[first:last],
            token_ids=batch.token_ids[part],
            positions=batch.positions[part],
            slot_mapping=None,
            lengths=None,
            block_tables=own,
            prefix_groups=batch.prefix_groups if last - first == batch.num_seqs else (),
        )
        unpacked = _unpacked(self, cache, blocks, q.dtype)
        out[part] = self.paged_attention(q[part], unpacked, some, softmax_scale, window_size, softcap, sinks)
    return out


def _runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """[first, last) of neighbouring sequences with at most MAX_UNPACKED_TOKENS together, or one with more."""
    first = total = 0
    for i, length in enumerate(lengths):
        if i > first and total + length > MAX_UNPACKED_TOKENS:
            yield first, i
            first, total = i, 0
        total += length
    if lengths:
        yield first, len(lengths)


def _unpacked(ops: OpSet, cache: QuantizedKVCache, blocks: Tensor, dtype: torch.dtype) -> KVCache:
    """Some of the blocks, in the op set's own form for that dtype."""
    heads, size = cache.k.shape[1], cache.block_size
    k, v = (
        dequantize_vectors(codes[blocks], scales[blocks], cache.kv_dtype, cache.head_dim, dtype)
        .transpose(1, 2)
        .reshape(-1, heads, cache.head_dim)
        for codes, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales))
    )
    plain = ops.allocate_kv_cache(len(blocks), size, heads, cache.head_dim, dtype, k.device)
    ops.write_kv(k, v, plain, torch.arange(len(k), device=k.device))
    return plain


def latent_attention(q: Tensor, cache: LatentCache, batch: Batch, softmax_scale: float) -> Tensor:
    """Causal attention of each sequence's new tokens to all its tokens, on the latents that all heads share.

    q: [num_tokens, num_heads, rank + rope_dim]. A token's key is its whole vector, its value the first `rank` numbers
    of it. Returns a new tensor, [num_tokens, num_heads, rank], q's dtype. Slots past a sequence's length are not read.
    """
    assert batch.block_tables is not None
    out = q.new_empty(*q.shape[:2], cache.rank)
    starts = batch.cu_seqlens_q.tolist()
    for i, seq_len in enumerate(batch.seq_lens.tolist()):
        begin, end = starts[i], starts[i + 1]
        if begin == end:
            continue
        blocks = batch.block_tables[i, : -(-seq_len // cache.block_size)].long()
        k = cache.data[blocks].flatten(0, 1)[:seq_len].to(_wide(q))
        first = seq_len - (end - begin)
        step = max(1, MAX_SCORES // (q.shape[1] * seq_len))
        for start in range(begin, end, step):
            part = slice(start, min(start + step, end))
            out[part] = _attend_latents(q[part], k, cache.rank, softmax_scale, first + start - begin)
    return out


def _attend_latents(q: Tensor, k: Tensor, rank: int, scale: float, first: int) -> Tensor:
    """k: [seq_len, rank + rope_dim], wide. first: position of q's first token, for the causal mask."""
    scores = (q.flatten(0, 1).to(k.dtype) @ k.T).view(*q.shape[:2], len(k)).mul_(scale)
    query = torch.arange(first, first + len(q), device=q.device)[:, None, None]
    scores.masked_fill_(torch.arange(len(k), device=q.device) > query, float("-inf"))
    return (scores.softmax(-1).flatten(0, 1) @ k[:, :rank]).view(*q.shape[:2], rank).to(q.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, softmax_scale: float) -> Tensor:
    """Bidirectional attention within each sequence of the batch, without a cache.

    q, k, v: [num_tokens, num_heads, head_dim]. Returns a new tensor of q's shape and dtype.
    """
    out = torch.empty_like(q)
    starts = batch.cu_seqlens_q.tolist()
    for begin, end in itertools.pairwise(starts):
        if begin == end:
            continue
        out[begin:end] = _attend(q[begin:end], k[begin:end], v[begin:end], 1, softmax_scale, None, 0, 0.0, None)
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: int,
    scale: float,
    first: int | None,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """One sequence. first: position of q's first token, for the causal mask; None: no mask."""
    wide = _wide(q)
    q_, k_, v_ = (t.to(wide).transpose(0, 1) for t in (q, k, v))
    k_, v_ = k_.repeat_interleave(group, 0), v_.repeat_interleave(group, 0)
    scores = q_ @ k_.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if first is not None:
        query = torch.arange(first, first + q.shape[0], device=q.device)[:, None]
        key = torch.arange(k.shape[0], device=q.device)[None, :]
        hidden = key > query
        if window:
            hidden |= key <= query - window
        scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.to(wide)[:, None, None].expand(-1, q.shape[0], 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    return (weights @ v_).transpose(0, 1).to(q.dtype)
