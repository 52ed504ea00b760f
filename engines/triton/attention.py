"""Flash attention (arXiv 2205.14135) over the paged cache, and over plain keys for encoders.

A tile has BLOCK_M rows; a row is one query head of one token, and all heads that read one KV head are packed into the
rows of a tile, so that each key is read once for the whole group: row r of a sequence is token r / GROUP, head
r % GROUP of the group. Head dimensions that are no power of two are cut into two that are (80 = 64 + 16, 96 = 64 + 32),
of which the second is `1` below; what is left over is masked.

Prompts: the keys that all rows of a tile see are multiplied without a mask, only the diagonal and the window's edge
have one. Decoding sequences: keys are split into parts that depend on the sequence's length alone (splits_of), so that
a token's bits do not depend on the batch; a second kernel joins the parts by their log-sum-exp (flash decoding).

Legend: D head dimension, D0 and D1 its two parts, GROUP query heads a KV head. Cost for a sequence of n new tokens and
s in all: 4 n s D num_heads operations (half of it where n = s), 2 s num_kv_heads D b bytes of cache, read once a tile
of tokens, and 2 n num_heads D b bytes for queries and results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engines.batch import Batch
from engines.ops.kv_cache import KVCache, LatentCache, QuantizedKVCache
from engines.triton.flash import LOG2_E, attend_range, decode_part, load_parts, store_rows
from engines.triton.launch import GENERIC, capability, dense_rows, power_of_two, processors

SPLIT = 256
"""Fewest keys of a part: 64 KiB of keys and values of one head, which hides the start of a program."""
MAX_SPLITS = 64
PROGRAMS, LEAST_PROGRAMS = 16, 4
"""Of a decode step: for each multiprocessor, and for each sequence and KV head (programs_of)."""
LEAST_SPLIT, MOST_SPLITS = tl.constexpr(SPLIT), tl.constexpr(MAX_SPLITS)


@dataclass(frozen=True)
class Tiles:
    """Constants of a launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def prefill_tiles(sm: tuple[int, int], itemsize: int, head_dim: int, kind: str = "plain") -> Tiles:
    """What fits into the registers and shared memory of a generation: 227 KiB on sm 9.0, 163 on 8.0, 99 on others.

    Warpgroup products of sm 9.0 want 64 rows a warpgroup; float32 has no tensor cores without rounding. Codes become
    numbers in registers, and products of other generations want those of all keys in every warp.
    """
    if kind == "latent":
        return latent_tiles(sm, itemsize, 64)
    if sm == GENERIC:
        return Tiles(64, 64, 4, 1)
    if itemsize == 4 or sm < (8, 0):
        return Tiles(32, 16 if itemsize == 4 and head_dim > 128 else 32, 4, 2)
    if sm[0] in (9, 10):
        if head_dim > 128:
            return Tiles(128, 32, 8, 2) if kind == "plain" else Tiles(64, 64, 8, 2)
        return Tiles(128, 64 if head_dim > 64 else 128, 8, 3)
    if kind != "plain":
        return Tiles(128, 16, 8, 2) if head_dim <= 128 else Tiles(32, 32, 8, 2)
    if head_dim > 128:
        # Two parts of a head are more numbers on their way than one of 256.
        return Tiles(64, 16 if halves(head_dim)[1] else 32, 8, 2)
    return Tiles(128, 32 if head_dim > 64 else 64, 8, 2)


def decode_tiles(sm: tuple[int, int], itemsize: int, head_dim: int, group: int, kind: str = "plain") -> Tiles:
    """Keys stream through shared memory; more of them in flight where it is large."""
    block_m = min(64, power_of_two(group, 16))
    if kind == "latent":
        return latent_tiles(sm, itemsize, block_m)
    if sm == GENERIC:
        return Tiles(block_m, 64, 4, 1)
    if itemsize == 4 or sm < (8, 0):
        return Tiles(min(block_m, 32), 32, 4, 2)
    if head_dim > 128:
        return Tiles(block_m, 32, 4, 2)
    return Tiles(block_m, 64 if kind == "plain" else 32, 4, 4 if sm[0] in (9, 10) else 2)


def latent_tiles(sm: tuple[int, int], itemsize: int, block_m: int) -> Tiles:
    """For keys of 576 numbers and values of 512: 64 rows of results alone take half of the registers of 256 threads."""
    if sm == GENERIC:
        return Tiles(min(block_m, 16), 32, 8, 1)
    if itemsize == 4 or sm < (8, 0):
        return Tiles(16, 16, 8, 1)
    if sm[0] in (9, 10):
        return Tiles(block_m, 16, 8, 3) if block_m > 32 else Tiles(block_m, 32, 4 if block_m == 16 else 8, 3)
    return Tiles(min(block_m, 32), 32, 8, 2)


@triton.jit(do_not_specialize=["num_seqs"])
def prefill_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    num_seqs: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_block_stride: tl.tensor,
    v_block_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_head_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    table_stride: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    NEXT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    PAGED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """Grid: [num_tokens * GROUP / BLOCK_M + num_seqs, KV_HEADS]; a tile of one sequence and KV head, the last (longest)
    tiles first. PAGED is causal and leaves decoding sequences to the kernel for them; otherwise block strides and
    tables are not used, slots are tokens, and every token sees its whole sequence.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    # Sequence i's tiles begin at offsets[i] * GROUP / BLOCK_M + i: there is room for the last one, which is not full.
    seq, above = tl.full([], 0, tl.int32), num_seqs
    while above - seq > 1:
        middle = (seq + above) // 2
        below = tl.load(offsets_ptr + middle) * GROUP // BLOCK_M + middle <= tile
        seq, above = tl.where(below, middle, seq), tl.where(below, above, middle)
    begin = tl.load(offsets_ptr + seq)
    count = tl.load(offsets_ptr + seq + 1) - begin
    row = (tile - begin * GROUP // BLOCK_M - seq) * BLOCK_M
    if row >= count * GROUP:
        return
    if PAGED and count == 1:
        return
    rows = row + tl.arange(0, BLOCK_M)
    tokens, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    inside = tokens < count
    q_at = (begin + tokens).to(tl.int64) * q_token_stride + heads * q_head_stride
    q0, q1 = load_parts(q_ptr, q_at, inside, D, D0, D1, NEXT, KIND, True)
    low, end, before = 0, count, 0
    if PAGED:
        before = tl.load(lens_ptr + seq) - count
        end = before + tl.minimum((row + BLOCK_M - 1) // GROUP, count - 1) + 1
        k_ptr += kv_head * k_head_stride
        v_ptr += kv_head * v_head_stride
        tables_ptr += seq.to(tl.int64) * table_stride
        if KIND != "plain" and KIND != "latent":
            k_scales_ptr += kv_head * BLOCK_SIZE * (1 if KIND == "fp8" else 2)
            v_scales_ptr += kv_head * BLOCK_SIZE * (1 if KIND == "fp8" else 2)
    else:
        k_ptr += begin.to(tl.int64) * k_slot_stride + kv_head * k_head_stride
        v_ptr += begin.to(tl.int64) * v_slot_stride + kv_head * v_head_stride
    first_position = before + row // GROUP
    if WINDOW:
        low = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    if SINKS:
        most = tl.load(sinks_ptr + heads).to(tl.float32) * LOG2_E
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        most = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    acc0, acc1, most, total = attend_range(
        low, end, first_position, end - 1, most, total, q0, q1, before + tokens, k_ptr, v_ptr, k_scales_ptr,
        v_scales_ptr, tables_ptr, k_block_stride, v_block_stride, k_slot_stride, v_slot_stride, window, scale, softcap,
        KV_HEADS, D, D0, D1, NEXT, BLOCK_M, BLOCK_N, BLOCK_SIZE, KIND, PAGED, WINDOW, SOFTCAP,
    )  # fmt: skip
    share = (1.0 / tl.where(inside, total, 1.0))[:, None]
    out_at = ((begin + tokens).to(tl.int64) * (KV_HEADS * GROUP) + heads) * (NEXT if KIND == "latent" else D)
    store_rows(out_ptr, out_at, inside, acc0 * share, acc1 * share, D, D0, D1, NEXT, KIND)


@triton.jit
def splits_of(length: tl.tensor, window: tl.tensor, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """(first key, keys of a part) for the last token of a sequence: as many parts as MOST_SPLITS allows."""
    low = 0
    if WINDOW:
        low = tl.maximum(length - window, 0) // BLOCK_N * BLOCK_N
    part = tl.maximum(LEAST_SPLIT, tl.cdiv(tl.cdiv(length - low, MOST_SPLITS), BLOCK_N) * BLOCK_N)
    return low, part


@triton.jit(do_not_specialize=["splits"])
def decode_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    k_scales_ptr: tl.tensor,
    v_scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    sinks_ptr: tl.tensor,
    q_token_stride: tl.tensor,
    q_head_stride: tl.tensor,
    k_block_stride: tl.tensor,
    v_block_stride: tl.tensor,
    k_head_stride: tl.tensor,
    v_head_stride: tl.tensor,
    k_slot_stride: tl.tensor,
    v_slot_stride: tl.tensor,
    table_stride: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    splits: tl.tensor,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    NEXT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SHARED: tl.constexpr,
) -> None:
    """Grid: [num_seqs, KV_HEADS * cdiv(GROUP, BLOCK_M), programs], which take a sequence's parts in turn (SHARED;
    else there is one for each part); sequences without exactly one new token are left out.

    parts: [num_seqs, num_heads, splits, D] float32, each divided by its own sum; sums: [num_seqs, num_heads, splits]
    float32, log-sum-exp in base 2. A sequence of a single part is written to out.
    """
    seq = tl.program_id(0)
    tiles = tl.cdiv(GROUP, BLOCK_M)
    kv_head, tile = tl.program_id(1) // tiles, tl.program_id(1) % tiles
    split = tl.program_id(2)
    begin = tl.load(offsets_ptr + seq)
    if tl.load(offsets_ptr + seq + 1) - begin != 1:
        return
    length = tl.load(lens_ptr + seq)
    low, part = splits_of(length, window, WINDOW, BLOCK_N)
    if low + split * part >= length:
        return
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    table_ptr = tables_ptr + seq.to(tl.int64) * table_stride
    if KIND != "plain" and KIND != "latent":
        k_scales_ptr += kv_head * BLOCK_SIZE * (1 if KIND == "fp8" else 2)
        v_scales_ptr += kv_head * BLOCK_SIZE * (1 if KIND == "fp8" else 2)
    if SHARED:
        for split in range(tl.program_id(2), tl.cdiv(length - low, part), tl.num_programs(2)):
            decode_part(
                split, low, part, length, begin, seq, kv_head, tile, q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr,
                out_ptr, parts_ptr, sums_ptr, table_ptr, sinks_ptr, q_token_stride, q_head_stride, k_block_stride,
                v_block_stride, k_slot_stride, v_slot_stride, window, scale, softcap, splits, KV_HEADS, GROUP, D, D0,
                D1, NEXT, BLOCK_M, BLOCK_N, BLOCK_SIZE, KIND, WINDOW, SOFTCAP, SINKS,
            )  # fmt: skip
    else:
        decode_part(
            split, low, part, length, begin, seq, kv_head, tile, q_ptr, k_ptr, v_ptr, k_scales_ptr, v_scales_ptr,
            out_ptr, parts_ptr, sums_ptr, table_ptr, sinks_ptr, q_token_stride, q_head_stride, k_block_stride,
            v_block_stride, k_slot_stride, v_slot_stride, window, scale, softcap, splits, KV_HEADS, GROUP, D, D0, D1,
            NEXT, BLOCK_M, BLOCK_N, BLOCK_SIZE, KIND, WINDOW, SOFTCAP, SINKS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def join_kernel(
    parts_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    out_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    window: tl.tensor,
    splits: tl.tensor,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    S_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
) -> None:
    """Grid: [num_seqs, num_heads]: parts weighted by their share of the whole sum. S_BLOCK: at least splits."""
    seq, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(offsets_ptr + seq)
    if tl.load(offsets_ptr + seq + 1) - begin != 1:
        return
    length = tl.load(lens_ptr + seq)
    low, part = splits_of(length, window, WINDOW, BLOCK_N)
    if length - low <= part:
        return
    each, columns = tl.arange(0, S_BLOCK), tl.arange(0, D_BLOCK)
    there = each < tl.cdiv(length - low, part)
    at = (seq.to(tl.int64) * tl.num_programs(1) + head) * splits + each
    sums = tl.load(sums_ptr + at, mask=there, other=float("-inf"))
    shares = tl.exp2(sums - tl.max(sums, 0))
    shares = shares / tl.sum(shares, 0)
    values = tl.load(
        parts_ptr + at[:, None] * D + columns[None, :], mask=there[:, None] & (columns < D)[None, :], other=0.0
    )
    result = tl.sum(values * shares[:, None], 0)
    to = out_ptr + (begin.to(tl.int64) * tl.num_programs(1) + head) * D + columns
    tl.store(to, result.to(out_ptr.dtype.element_ty), mask=columns < D)


def halves(head_dim: int) -> tuple[int, int]:
    """Two powers of two, each at least 16 or the second 0, that together cover a head."""
    first = 16
    while first * 2 <= head_dim:
        first *= 2
    return first, power_of_two(head_dim - first, 16) if head_dim > first else 0


def num_splits(max_seqlen: int) -> int:
    """Parts of the longest sequence that there may be: room for their results."""
    return max(1, min(MAX_SPLITS, -(-max_seqlen // SPLIT)))


def programs_of(splits: int, num_tiles: int, num_processors: int) -> int:
    """Programs that share the parts of one of `num_tiles` tiles, a sequence's of a KV head. Bits do not depend on it.

    A captured step knows only how long a sequence may become. Estimated, not measured: a program without a part takes a
    multiprocessor 0.1 us, so with 64 for each of 256 sequences' 8 heads, of 4 parts each, 132 multiprocessors would
    spend 90 us a layer on them, and 370 us on the keys. PROGRAMS for each come to 2 us, LEAST_PROGRAMS to 6.
    """
    return min(splits, max(LEAST_PROGRAMS, -(-PROGRAMS * num_processors // num_tiles)))


@dataclass(frozen=True)
class Keys:
    """Keys and values as the kernels take them: paged, or plain ones of an encoder."""

    k: Tensor
    v: Tensor
    k_strides: tuple[int, int, int]
    """Of a block, a head and a slot (a token where there are no blocks)."""
    v_strides: tuple[int, int, int]
    num_heads: int
    block_size: int
    """0: not paged."""
    kind: str = "plain"
    rank: int = 0
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None

    def parts(self, head_dim: int) -> tuple[int, int, int]:
        """D0, D1 and NEXT of flash.py."""
        return parts_of(self.kind, head_dim, self.rank)


def parts_of(kind: str, head_dim: int, rank: int = 0) -> tuple[int, int, int]:
    """(width of the first part, width of the second, first column of the second), as flash.py has them."""
    if kind == "latent":
        return power_of_two(rank, 16), power_of_two(head_dim - rank, 16), rank
    if kind == "int4":
        width = power_of_two(-(-head_dim // 2), 16)
        return width, width, 1
    first, second = halves(head_dim)
    return first, second, first


@dataclass(frozen=True)
class Scores:
    """What becomes of a product of query and key."""

    scale: float
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None


def keys_of(cache: KVCache | LatentCache) -> Keys:
    """A cache in 16 or 32 bits as the kernels take it."""
    if isinstance(cache, LatentCache):
        block, slot, _ = cache.data.stride()
        strides = (block, 0, slot)
        return Keys(cache.data, cache.data, strides, strides, 1, cache.block_size, "latent", cache.rank)
    (k_block, k_head, k_slot, _), (v_block, v_head, v_slot, _) = cache.k.stride(), cache.v.stride()
    strides = (k_block, k_head, k_slot)
    return Keys(cache.k, cache.v, strides, (v_block, v_head, v_slot), cache.k.shape[1], cache.block_size)


def write_decoding(out: Tensor, q: Tensor, cache: KVCache | LatentCache, batch: Batch, scores: Scores) -> None:
    """The rows of `out` that belong to sequences with one new token, made by the kernel for them; the others are left
    as they are. out: [num_tokens, num_heads, head_dim or rank], dense.
    """
    if batch.max_seqlen_q == 1 or batch.num_seqs > 1:
        _decode(dense_rows(q), keys_of(cache), out, batch, scores)


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: Batch,
    softmax_scale: float,
    window_size: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the reference; products and sums in float32, weights rounded to the cache's dtype before they multiply.

    A token's bits do not depend on the batch around it, nor on where its prompt was cut; but the one token of a
    decoding sequence is summed in another order than it would be as the last one of a longer piece of prompt.
    """
    return _attend(q, keys_of(cache), batch, Scores(softmax_scale, window_size, softcap, sinks))


def quantized_attention(
    q: Tensor,
    cache: QuantizedKVCache,
    batch: Batch,
    softmax_scale: float,
    window_size: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the reference; keys and values are rounded to q's dtype. Of bits, what paged_attention says holds."""
    _, num_heads, size, width = cache.k.shape
    strides = (num_heads * size * width, size * width, width)
    k, v = cache.k.view(torch.uint8).contiguous(), cache.v.view(torch.uint8).contiguous()
    scales = cache.k_scales.contiguous(), cache.v_scales.contiguous()
    keys = Keys(k, v, strides, strides, num_heads, size, cache.kv_dtype, 0, *scales)
    return _attend(q, keys, batch, Scores(softmax_scale, window_size, softcap, sinks))


def latent_attention(q: Tensor, cache: LatentCache, batch: Batch, softmax_scale: float) -> Tensor:
    """As the reference; a tile of latents is read once, and is key and value of all heads. Of bits, what
    paged_attention says holds.
    """
    return _attend(q, keys_of(cache), batch, Scores(softmax_scale))


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, softmax_scale: float) -> Tensor:
    """As the reference, by the kernel for prompts."""
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0]:
        keys = Keys(k, v, (0, k.stride(1), k.stride(0)), (0, v.stride(1), v.stride(0)), k.shape[1], 0)
        _prefill(q, keys, out, batch, Scores(softmax_scale))
    return out


def _attend(q: Tensor, keys: Keys, batch: Batch, scores: Scores) -> Tensor:
    assert batch.block_tables is not None
    q = dense_rows(q)
    out = torch.empty((*q.shape[:2], keys.rank or q.shape[2]), dtype=q.dtype, device=q.device)
    if not q.shape[0]:
        return out
    if batch.max_seqlen_q > 1:
        _prefill(q, keys, out, batch, scores)
    if batch.max_seqlen_q == 1 or batch.num_seqs > 1:
        _decode(q, keys, out, batch, scores)
    return out


def _prefill(q: Tensor, keys: Keys, out: Tensor, batch: Batch, scores: Scores) -> None:
    num_heads, head_dim = q.shape[1:]
    group = num_heads // keys.num_heads
    tiles = prefill_tiles(capability(q.device), q.element_size(), head_dim, keys.kind)
    first, second, following = keys.parts(head_dim)
    prefill_kernel[(q.shape[0] * group // tiles.block_m + batch.num_seqs, keys.num_heads)](
        q,
        keys.k,
        keys.v,
        keys.k_scales,
        keys.v_scales,
        out,
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.block_tables,
        scores.sinks,
        batch.num_seqs,
        *q.stride()[:2],
        *(stride for pair in zip(keys.k_strides, keys.v_strides, strict=True) for stride in pair),
        0 if batch.block_tables is None else batch.block_tables.stride(0),
        scores.window,
        scores.scale,
        scores.softcap,
        KV_HEADS=keys.num_heads,
        GROUP=group,
        D=head_dim,
        D0=first,
        D1=second,
        NEXT=following,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_SIZE=keys.block_size or 1,
        KIND=keys.kind,
        PAGED=keys.block_size > 0,
        WINDOW=scores.window > 0,
        SOFTCAP=scores.softcap > 0,
        SINKS=scores.sinks is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _decode(q: Tensor, keys: Keys, out: Tensor, batch: Batch, scores: Scores) -> None:
    assert batch.block_tables is not None
    num_heads, head_dim = q.shape[1:]
    group = num_heads // keys.num_heads
    tiles = decode_tiles(capability(q.device), q.element_size(), head_dim, group, keys.kind)
    window = scores.window
    splits = num_splits(min(batch.max_seqlen_k, window + tiles.block_n) if window else batch.max_seqlen_k)
    seqs = batch.num_seqs if splits > 1 else 0
    parts = torch.empty((seqs, num_heads, splits, out.shape[2]), dtype=torch.float32, device=q.device)
    sums = torch.empty((seqs, num_heads, splits), dtype=torch.float32, device=q.device)
    first, second, following = keys.parts(head_dim)
    heads = keys.num_heads * triton.cdiv(group, tiles.block_m)
    shared = keys.kind == "plain" and not second  # others have no registers left for a loop: 255 and spilled
    programs = programs_of(splits, batch.num_seqs * heads, processors(q.device)) if shared else splits
    decode_kernel[(batch.num_seqs, heads, programs)](
        q,
        keys.k,
        keys.v,
        keys.k_scales,
        keys.v_scales,
        out,
        parts,
        sums,
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.block_tables,
        scores.sinks,
        *q.stride()[:2],
        *(stride for pair in zip(keys.k_strides, keys.v_strides, strict=True) for stride in pair),
        batch.block_tables.stride(0),
        window,
        scores.scale,
        scores.softcap,
        splits,
        KV_HEADS=keys.num_heads,
        GROUP=group,
        D=head_dim,
        D0=first,
        D1=second,
        NEXT=following,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_SIZE=keys.block_size,
        KIND=keys.kind,
        WINDOW=window > 0,
        SOFTCAP=scores.softcap > 0,
        SINKS=scores.sinks is not None,
        SHARED=shared,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if splits > 1:
        block = power_of_two(out.shape[2])
        join_kernel[(batch.num_seqs, num_heads)](
            parts, sums, out, batch.cu_seqlens_q, batch.seq_lens, window, splits,
            D=out.shape[2], D_BLOCK=block, S_BLOCK=power_of_two(splits, 2), BLOCK_N=tiles.block_n,
            WINDOW=window > 0, num_warps=join_warps(block),
        )  # fmt: skip


def join_warps(block: int) -> int:
    """Warps that hold 64 parts of so many numbers: 128 a thread."""
    return 8 if block > 256 else 4
