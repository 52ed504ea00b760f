"""The CUDA kernels as they are to be timed on a GPU: shapes of an 8B model, and what each call must move and compute.

`KERNELS` is what a benchmark walks over; correctness there comes from cases.compiled(), as here. `small` shapes are for
the emulator, so that every entry is run before a GPU is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.batch import Batch
from engines.cuda.opset import OpSet
from engines.cuda.quantized import Fp8Weight, PackedWeight
from engines.ops.kv_cache import KVCache, KVDtype, LatentCache, QuantizedKVCache, quantize_vectors
from engines.ops.linear import LinearWeight
from engines.ops.moe import Projection
from engines.ops.quantized import Float8Weight, GroupedIntWeight, Int8Weight, MXFP4Weight
from engines.ops.sampling import SamplingBatch

BF16 = torch.bfloat16
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Work:
    """One call, and the least that it must move and compute."""

    call: Callable[[], object]
    num_bytes: float
    flops: float = 0.0


@dataclass(frozen=True)
class Kernel:
    name: str
    sources: tuple[str, ...]
    """Files of csrc/cuda whose change makes an older figure void."""
    make: Callable[[OpSet, torch.device, bool], Work]
    """(op set, device, small) -> work"""
    bar: float
    """Fraction of the measured copy bandwidth (or of the matrix rate, where flops decide) that is expected."""


def attention(
    tokens: int, lengths: list[int], head_dim: int = 128, kv_dtype: KVDtype | None = None
) -> Callable[[OpSet, torch.device], Work]:
    """The last `tokens` tokens of each sequence, 32 query heads on 8 KV heads. kv_dtype: None for bfloat16."""

    def make(ops: OpSet, device: torch.device) -> Work:
        heads, kv_heads, num_seqs = 32, 8, len(lengths)
        width = -(-max(lengths) // BLOCK_SIZE)
        blocks = torch.randperm(num_seqs * width).int().view(num_seqs, width).to(device)
        shape = (num_seqs * width, kv_heads, BLOCK_SIZE, head_dim)
        cache = KVCache(*(torch.randn(shape, dtype=BF16, device=device) for _ in range(2)))
        q = torch.randn(num_seqs * tokens, heads, head_dim, dtype=BF16, device=device)
        ids = torch.zeros(num_seqs * tokens, dtype=torch.int64, device=device)
        batch = Batch(
            token_ids=ids,
            positions=ids,
            cu_seqlens_q=torch.arange(0, num_seqs * tokens + 1, tokens, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            max_seqlen_q=tokens,
            max_seqlen_k=max(lengths),
            block_tables=blocks,
        )
        if kv_dtype is not None:
            coded = (quantize_vectors(t, kv_dtype) for t in (cache.k, cache.v))
            (k, k_scales), (v, v_scales) = coded
            small = QuantizedKVCache(kv_dtype, head_dim, k, v, k_scales, v_scales)
            vector = k.shape[3] + 4 * k_scales.shape[3]
            moved = 2 * sum(lengths) * kv_heads * vector + 2 * q.numel() * 2
            return Work(lambda: ops.quantized_attention(q, small, batch, head_dim**-0.5), moved)
        pairs = sum(tokens * (length - (tokens - 1) / 2) for length in lengths)
        moved = 2 * 2 * sum(lengths) * kv_heads * head_dim + 2 * q.numel() * 2
        return Work(lambda: ops.paged_attention(q, cache, batch, head_dim**-0.5), moved, 4 * pairs * heads * head_dim)

    return make


def _decode(ops: OpSet, device: torch.device, small: bool) -> Work:
    return attention(1, [600, 40] if small else [4096] * 64)(ops, device)


def _latent(ops: OpSet, device: torch.device, small: bool) -> Work:
    """DeepSeek V2 Lite's 16 heads, decoding."""
    lengths = [40, 1100] if small else [4096] * 64
    heads, count, width = 16, len(lengths), -(-max(lengths) // BLOCK_SIZE)
    blocks = torch.randperm(count * width).int().view(count, width).to(device)
    data = torch.randn(count * width, BLOCK_SIZE, 576, dtype=BF16, device=device)
    q = torch.randn(count, heads, 576, dtype=BF16, device=device)
    ids = torch.zeros(count, dtype=torch.int64, device=device)
    batch = Batch(
        token_ids=ids,
        positions=ids,
        cu_seqlens_q=torch.arange(count + 1, dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        max_seqlen_q=1,
        max_seqlen_k=max(lengths),
        block_tables=blocks,
    )
    moved = 2 * (sum(lengths) * 576 + q.numel() + count * heads * 512)
    flops = 2 * sum(lengths) * heads * (576 + 512)
    return Work(lambda: ops.latent_attention(q, LatentCache(data, 512), batch, 0.1), moved, flops)


def _decode_coded(kv_dtype: KVDtype) -> Callable[[OpSet, torch.device, bool], Work]:
    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        lengths = [600, 40] if small else [4096] * 64
        return attention(1, lengths, kv_dtype=kv_dtype)(ops, device)

    return make


def _prefill(ops: OpSet, device: torch.device, small: bool) -> Work:
    return attention(70, [70])(ops, device) if small else attention(8192, [8192])(ops, device)


def _w4a16(tokens: int) -> Callable[[OpSet, torch.device, bool], Work]:
    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        rows, columns = (128, 256) if small else (14336, 4096)
        groups = (rows, columns // 128)
        weight = GroupedIntWeight(
            codes=torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device),
            scales=torch.rand(groups, device=device).half().float(),
            zeros=torch.full(groups, 8, dtype=torch.int16, device=device),
            bits=4,
            group_size=128,
        )
        prepared = ops.prepare_quantized(weight, None, BF16)
        x = torch.randn(tokens, columns, dtype=BF16, device=device)
        # The floor: 4 bits a weight, 16 bits of scale and 4 of zero a group.
        moved = rows * columns / 2 + rows * columns / 128 * 2.5 + 2 * tokens * (rows + columns)
        return Work(lambda: ops.linear(x, prepared), moved, 2 * tokens * rows * columns)

    return make


def _w8a8(tokens: int) -> Callable[[OpSet, torch.device, bool], Work]:
    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        rows, columns = (128, 256) if small else (14336, 4096)
        data = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=device)
        prepared = ops.prepare_quantized(Int8Weight(data, torch.rand(rows, device=device)), None, BF16)
        x = torch.randn(min(tokens, 130) if small else tokens, columns, dtype=BF16, device=device)
        moved = rows * columns + 2 * len(x) * (rows + columns)
        # Counted as bfloat16 products: those of 8 bits have twice the rate.
        return Work(lambda: ops.linear(x, prepared), moved, len(x) * rows * columns)

    return make


def _fp8(tokens: int) -> Callable[[OpSet, torch.device, bool], Work]:
    """Tiles of 128 x 128 with a scale each."""

    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        rows, columns = (128, 256) if small else (14336, 4096)
        data = torch.randn(rows, columns, device=device).to(torch.float8_e4m3fn)
        scales = torch.rand(rows // 128, columns // 128, device=device)
        prepared = ops.prepare_quantized(Float8Weight(data, scales, (128, 128)), None, BF16)
        x = torch.randn(min(tokens, 70) if small else tokens, columns, dtype=BF16, device=device)
        moved = rows * columns + 2 * len(x) * (rows + columns)
        return Work(lambda: ops.linear(x, prepared), moved, len(x) * rows * columns)  # flops: as of 16 bits

    return make


def _experts(kind: str, tokens: int) -> Callable[[OpSet, torch.device, bool], Work]:
    """128 experts of 2048 x 768, 8 of them a token; of mxfp4 32 of 2880 x 2880, 4 a token."""

    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        count, top_k, hidden, inner = (32, 4, 2880, 2880) if kind == "mxfp4" else (128, 8, 2048, 768)
        if small:
            count, top_k, hidden, inner = 5, 2, 96, 64

        def stack(rows: int, columns: int) -> list[Projection]:
            if kind != "mxfp4":
                return [Projection(torch.randn(rows, columns, dtype=BF16, device=device) / 50) for _ in range(count)]
            sizes = ((rows, columns // 2), (rows, columns // 32))
            codes, exponents = (torch.randint(100, 120, size, dtype=torch.uint8, device=device) for size in sizes)
            return [Projection(MXFP4Weight(codes, exponents)) for _ in range(count)]

        x = torch.randn(min(tokens, 20) if small else tokens, hidden, dtype=BF16, device=device)
        prepared = ops.prepare_experts(stack(2 * inner, hidden), stack(hidden, inner), BF16)
        weights = torch.rand(len(x), top_k, device=device)
        ids = torch.rand(len(x), count, device=device).topk(top_k, dim=-1).indices
        used = len(ids.unique())
        of_expert = 3 * hidden * inner * (17 / 32 if kind == "mxfp4" else 2)
        rounds = 2 * len(x) * (2 * hidden + top_k * (3 * inner + 2 * hidden))
        flops = 6 * len(x) * top_k * hidden * inner
        activation = "swiglu_oai" if kind == "mxfp4" else "silu"
        return Work(lambda: ops.fused_experts(x, prepared, weights, ids, activation), used * of_expert + rounds, flops)

    return make


def _route(ops: OpSet, device: torch.device, small: bool) -> Work:
    logits = torch.randn(_rows(small), 128, dtype=BF16, device=device)
    return Work(lambda: ops.route(logits, 8, "softmax", True), logits.numel() * 2 + len(logits) * 8 * 12)


def _rows(small: bool) -> int:
    return 3 if small else 8192


def _norm(ops: OpSet, device: torch.device, small: bool) -> Work:
    x, residual = (torch.randn(_rows(small), 4096, dtype=BF16, device=device) for _ in range(2))
    weight = torch.randn(4096, dtype=BF16, device=device)
    return Work(lambda: ops.add_rms_norm(x, residual, weight, 1e-6), 4 * x.numel() * 2)


def _gate(ops: OpSet, device: torch.device, small: bool) -> Work:
    gate_up = torch.randn(_rows(small), 2 * 14336, dtype=BF16, device=device)
    return Work(lambda: ops.act_and_mul(gate_up, "silu"), 1.5 * gate_up.numel() * 2)


def _product(rounding: str, columns: int, device: torch.device) -> LinearWeight:
    """A weight of a row for which inputs are rounded: what a norm or an activation is told of its reader."""
    if rounding == "int8":
        codes, scale = torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, device=device)
        return LinearWeight(PackedWeight("int8", codes, scale), None, columns, 1)
    scales = torch.ones(1, columns // 128, device=device)
    return LinearWeight(
        Fp8Weight(torch.zeros(1, columns, dtype=torch.uint8, device=device), scales, None), None, columns, 1
    )


def _norm_rounded(rounding: str) -> Callable[[OpSet, torch.device, bool], Work]:
    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        x, residual = (torch.randn(_rows(small), 4096, dtype=BF16, device=device) for _ in range(2))
        weight, product = torch.randn(4096, dtype=BF16, device=device), _product(rounding, 4096, device)
        return Work(lambda: ops.add_rms_norm_for(x, residual, weight, 1e-6, 0.0, product), 7 * x.numel())

    return make


def _gate_rounded(rounding: str) -> Callable[[OpSet, torch.device, bool], Work]:
    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        gate_up = torch.randn(_rows(small), 2 * 14336, dtype=BF16, device=device)
        product = _product(rounding, 14336, device)
        return Work(lambda: ops.act_and_mul_for(gate_up, "silu", product), 2.5 * gate_up.numel())

    return make


def _qkv(rows: int, device: torch.device) -> list[Tensor]:
    """Queries, keys and values as views of one projection."""
    qkv = torch.randn(rows, 48 * 128, dtype=BF16, device=device)
    return [part.unflatten(1, (-1, 128)) for part in qkv.split([32 * 128, 8 * 128, 8 * 128], dim=1)]


def _rope(ops: OpSet, device: torch.device, small: bool) -> Work:
    q, k, _ = _qkv(_rows(small), device)
    positions = torch.arange(len(q), device=device)
    angles = torch.rand(8192, 128, device=device).to(BF16)
    return Work(lambda: ops.rope(q, k, positions, angles), 2 * (q.numel() + k.numel()) * 2)


def _rope_write(kv_dtype: KVDtype | None) -> Callable[[OpSet, torch.device, bool], Work]:
    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        q, k, v = _qkv(_rows(small), device)
        positions = torch.arange(len(q), device=device)
        angles = torch.rand(8192, 128, device=device).to(BF16)
        blocks = len(k) // BLOCK_SIZE + 1
        slots = torch.randperm(blocks * BLOCK_SIZE, device=device)[: len(k)]
        cache: KVCache | QuantizedKVCache
        stored: float = 2 * (k.numel() + v.numel())
        if kv_dtype is None:
            cache = ops.allocate_kv_cache(blocks, BLOCK_SIZE, 8, 128, BF16, device)
        else:
            cache = ops.allocate_quantized_kv_cache(blocks, BLOCK_SIZE, 8, 128, kv_dtype, device)
            stored = len(k) * 2 * 8 * (cache.k.shape[3] + 4 * cache.k_scales.shape[3])
        moved = 2 * (2 * q.numel() + k.numel() + v.numel()) + stored
        return Work(lambda: ops.rope_write_kv(q, k, v, positions, angles, cache, slots), moved)

    return make


def _write(ops: OpSet, device: torch.device, small: bool) -> Work:
    _, k, v = _qkv(_rows(small), device)
    shape = (len(k) // BLOCK_SIZE + 1, 8, BLOCK_SIZE, 128)
    cache = KVCache(*(torch.empty(shape, dtype=BF16, device=device) for _ in range(2)))
    slots = torch.randperm(shape[0] * BLOCK_SIZE, device=device)[: len(k)]
    return Work(lambda: ops.write_kv(k, v, cache, slots), 2 * (k.numel() + v.numel()) * 2)


def _write_coded(ops: OpSet, device: torch.device, small: bool) -> Work:
    _, k, v = _qkv(_rows(small), device)
    cache = ops.allocate_quantized_kv_cache(len(k) // BLOCK_SIZE + 1, BLOCK_SIZE, 8, 128, "int8", device)
    slots = torch.randperm((len(k) // BLOCK_SIZE + 1) * BLOCK_SIZE, device=device)[: len(k)]
    return Work(lambda: ops.write_quantized_kv(k, v, cache, slots), (k.numel() + v.numel()) * 3 + len(k) * 2 * 8 * 8)


def _sample(ops: OpSet, device: torch.device, small: bool) -> Work:
    rows, vocab = (2, 300) if small else (128, 128256)
    logits = torch.randn(rows, vocab, device=device)
    every = torch.ones(rows, device=device)
    ids = torch.arange(rows, device=device)
    params = SamplingBatch(every, torch.zeros_like(ids), 0.9 * every, 0 * every, ids, ids)
    return Work(lambda: ops.sample(logits, params), 4 * rows * vocab)


_ATTENTION = ("attention.h", "attention.cuh", "attention.cu", "primitives.cuh")
_LATENT = ("latent_attention.cuh", "latent_attention.cu", "attention_decode.cuh", "attention.cuh", "primitives.cuh")
_CODED = (*_ATTENTION, "attention_decode.cuh", "attention_coded.cuh", "kv_codes.cuh")
_ELEMENTWISE = ("elementwise.cuh", "elementwise.h", "elementwise.cu", "vectors.cuh", "primitives.cuh")
_QUANTIZE = ("quantize.cuh", "quantize.cu", *_ELEMENTWISE)
_KV_WRITE = ("kv_codes.cuh", "kv_write.cuh", "kv_write.cu", "vectors.cuh", "primitives.cuh")
_PRODUCT = (
    *("product.h", "product_formats.cuh", "small_floats.cuh", "product.cuh", "splits.cuh", "splits.h", "linear.cu"),
    "primitives.cuh",
)
_W4A16 = (*_PRODUCT, "product_w4.cu", "product_sm90.cuh", "product_w4_sm90.cu", "primitives_sm90.cuh")
_EXPERTS = (*_PRODUCT, "product_dense.cu", "product_mxfp4.cu", "moe.cuh", "moe.cu")
_FP8 = (
    "linear_fp8.h",
    "linear_fp8.cu",
    "linear_fp8_sm90.cuh",
    "linear_fp8_sm90.cu",
    "splits.cuh",
    "splits.h",
    "quantize.cuh",
)
_W8A8 = (*_PRODUCT, "product_int8.cu", "quantize.cuh")
_SM90 = ("attention_prefill.cuh", "attention_prefill_sm90.cuh", "attention_prefill_sm90.cu", "primitives_sm90.cuh")
_SAMPLING = ("sampling.cuh", "sampling.cu", "vectors.cuh", "primitives.cuh")
KERNELS = (
    Kernel("decode attention, 64 x 4096", (*_ATTENTION, "attention_decode.cuh"), _decode, 0.85),
    Kernel("int8 decode attention, 64 x 4096", _CODED, _decode_coded("int8"), 0.80),
    Kernel("int4 decode attention, 64 x 4096", _CODED, _decode_coded("int4"), 0.60),
    Kernel("fp8 decode attention, 64 x 4096", _CODED, _decode_coded("fp8"), 0.80),
    Kernel("latent attention, 16 heads, 64 x 4096", _LATENT, _latent, 0.70),
    Kernel("prefill attention, 8192 causal", (*_ATTENTION, *_SM90), _prefill, 0.45),
    Kernel("w4a16 4096 x 14336, batch 1", _W4A16, _w4a16(1), 0.80),
    Kernel("w4a16 4096 x 14336, batch 16", _W4A16, _w4a16(16), 0.80),
    Kernel("w4a16 4096 x 14336, batch 64", _W4A16, _w4a16(64), 0.70),
    Kernel("w8a8 4096 x 14336, batch 16", _W8A8, _w8a8(16), 0.75),
    Kernel("w8a8 4096 x 14336, batch 8192", _W8A8, _w8a8(8192), 0.40),
    Kernel("fp8 4096 x 14336, batch 16", (*_FP8, "product_fp8.cu"), _fp8(16), 0.75),
    Kernel("fp8 4096 x 14336, batch 8192", _FP8, _fp8(8192), 0.60),
    Kernel("experts 128 of 2048 x 768, batch 16", _EXPERTS, _experts("dense", 16), 0.65),
    Kernel("experts 128 of 2048 x 768, batch 8192", _EXPERTS, _experts("dense", 8192), 0.35),
    Kernel("experts 32 of 2880 x 2880 mxfp4, batch 16", _EXPERTS, _experts("mxfp4", 16), 0.55),
    Kernel("experts 32 of 2880 x 2880 mxfp4, batch 8192", _EXPERTS, _experts("mxfp4", 8192), 0.30),
    Kernel("route 8192 x 128", ("moe.cuh", "moe.cu", "vectors.cuh"), _route, 0.30),
    Kernel("add_rms_norm 8192 x 4096", _ELEMENTWISE, _norm, 0.85),
    Kernel("act_and_mul 8192 x 14336", _ELEMENTWISE, _gate, 0.85),
    Kernel("add_rms_norm to int8 8192 x 4096", _QUANTIZE, _norm_rounded("int8"), 0.80),
    Kernel("add_rms_norm to fp8 tiles 8192 x 4096", _QUANTIZE, _norm_rounded("e4m3 128"), 0.80),
    Kernel("act_and_mul to int8 8192 x 14336", _QUANTIZE, _gate_rounded("int8"), 0.75),
    Kernel("act_and_mul to fp8 tiles 8192 x 14336", _QUANTIZE, _gate_rounded("e4m3 128"), 0.75),
    Kernel("rope 8192 x 40 heads", _KV_WRITE, _rope, 0.80),
    Kernel("write_kv 8192 x 8 heads", _KV_WRITE, _write, 0.80),
    Kernel("write_quantized_kv 8192 x 8 heads", _KV_WRITE, _write_coded, 0.65),
    Kernel("rope_write_kv 8192 x 48 heads", _KV_WRITE, _rope_write(None), 0.80),
    Kernel("rope_write_kv int8 8192 x 48 heads", _KV_WRITE, _rope_write("int8"), 0.75),
    Kernel("rope_write_kv int4 8192 x 48 heads", _KV_WRITE, _rope_write("int4"), 0.75),
    Kernel("rope_write_kv fp8 8192 x 48 heads", _KV_WRITE, _rope_write("fp8"), 0.75),
    Kernel("sample 128 x 128256, top_p", _SAMPLING, _sample, 0.05),
)
