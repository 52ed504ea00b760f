"""Paged attention on plain torch, for where the compiled library is absent: decoding sequences go together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from engines.batch import Batch
from engines.ops import attention as reference
from engines.ops.kv_cache import KVCache

MAX_GATHERED = 1 << 22
"""Values of K, and as many of V, that decoding copies out of the cache at a time: 16 MiB in float32."""


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: Batch,
    softmax_scale: float,
    window_size: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the reference. Prefill takes torch's fused attention, whose weights are rounded to q's dtype."""
    if q.dtype == torch.float64:
        return reference.paged_attention(q, cache, batch, softmax_scale, window_size, softcap, sinks)
    assert batch.block_tables is not None
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    starts, lens = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist()
    counts = [end - begin for begin, end in itertools.pairwise(starts)]
    decoding = sorted((i for i, count in enumerate(counts) if count == 1), key=lambda i: lens[i])
    for rows in _groups(decoding, lens, cache):
        tokens = torch.tensor([starts[i] for i in rows])
        out[tokens] = _decode(q[tokens], cache, batch, rows, softmax_scale, window_size, softcap, sinks)
    for i, count in enumerate(counts):
        if count > 1:
            part = slice(starts[i], starts[i + 1])
            out[part] = _prefill(q[part], cache, batch, i, lens[i], softmax_scale, window_size, softcap, sinks)
    return out


def _groups(rows: list[int], lens: list[int], cache: KVCache) -> Iterator[list[int]]:
    """Cuts rows, which ascend in length, so that each group padded to its longest stays below MAX_GATHERED."""
    per_token = cache.k.shape[1] * cache.k.shape[3]
    group: list[int] = []
    for row in rows:
        if group and (len(group) + 1) * lens[row] * per_token > MAX_GATHERED:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _decode(
    q: Tensor,
    cache: KVCache,
    batch: Batch,
    rows: list[int],
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """q: [rows, num_heads, head_dim], one token a sequence. Scores, softmax and sums in float32."""
    assert batch.block_tables is not None
    seq_lens = batch.seq_lens[rows].long()[:, None]
    length = int(seq_lens.max())
    num_blocks = -(-length // cache.block_size)
    used = torch.arange(num_blocks) * cache.block_size < seq_lens
    blocks = batch.block_tables[rows, :num_blocks].long().where(used, 0)
    k, v = (t[blocks].transpose(1, 2).flatten(2, 3)[:, :, :length].float() for t in (cache.k, cache.v))
    key = torch.arange(length)
    hidden = key >= seq_lens
    if window:
        hidden |= key < seq_lens - window
    # A weight of zero times NaN is NaN: what is hidden must be zero in V as well.
    v.masked_fill_(hidden[:, None, :, None], 0.0)
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    scores = (grouped @ k.transpose(2, 3)).mul_(scale)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    scores.masked_fill_(hidden[:, None, None, :], float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.float().view(1, k.shape[1], -1, 1).expand(len(rows), -1, -1, 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    return (weights @ v).flatten(1, 2).to(q.dtype)


def _prefill(
    q: Tensor,
    cache: KVCache,
    batch: Batch,
    row: int,
    seq_len: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """q: [num_new_tokens, num_heads, head_dim] of one sequence."""
    assert batch.block_tables is not None
    blocks = batch.block_tables[row, : -(-seq_len // cache.block_size)].long()
    k, v = (t[blocks].transpose(0, 1).flatten(1, 2)[:, :seq_len] for t in (cache.k, cache.v))
    group, first = q.shape[1] // k.shape[0], seq_len - q.shape[0]
    if softcap or sinks is not None:
        heads_last = (q, k.transpose(0, 1), v.transpose(0, 1))
        return reference._attend(*heads_last, group, scale, first, window, softcap, sinks)
    mask = None
    if first or window:
        query = torch.arange(first, seq_len)[:, None]
        key = torch.arange(seq_len)[None, :]
        mask = key <= query
        if window:
            mask &= key > query - window
    return functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.repeat_interleave(group, 0)[None],
        v.repeat_interleave(group, 0)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )[0].transpose(0, 1)
