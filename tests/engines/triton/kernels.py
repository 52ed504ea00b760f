"""The Triton kernels as they are to be timed on a GPU: the works of the CUDA kernels, and those of encoders."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from engines.batch import Batch
from engines.discover import modules
from engines.ops import OpSet
from engines.ops.kv_cache import KVCache, KVDtype, LatentCache
from engines.ops.moe import Projection
from engines.ops.quantized import Float8Weight, GroupedIntWeight, Weight
from engines.platform import installed_packages
from tests.engines.cuda import kernels as cuda
from tests.engines.cuda.kernels import BF16, Kernel, Work

Make = Callable[[OpSet, torch.device, bool], Work]
SOURCES = {
    "decode": ("attention.py", "flash.py", "launch.py"),
    "prefill": ("attention.py", "flash.py", "launch.py"),
    "add_rms_norm": ("norm.py", "launch.py"),
    "act_and_mul": ("activation.py", "launch.py"),
    "rope": ("rotary.py", "launch.py"),
    "write_kv": ("kv_cache.py", "rotary.py", "launch.py"),
    "write_quantized_kv": ("kv_cache.py", "rotary.py", "launch.py"),
    "lora": ("lora.py", "launch.py"),
    "sample": ("sampling.py", "launch.py"),
    "w4a16": ("linear.py", "linear_kernels.py", "quantized.py", "launch.py"),
    "w8a8": ("linear.py", "linear_kernels.py", "quantized.py", "launch.py"),
    "experts": ("moe.py", "moe_kernels.py", "linear.py", "linear_kernels.py", "quantized.py", "launch.py"),
}
"""By the first word of a kernel's name."""


def _encoder(ops: OpSet, device: torch.device, small: bool) -> Work:
    """Sentences of a length, 12 heads of 64."""
    num_seqs, length = (2, 20) if small else (64, 512)
    qkv = torch.randn(num_seqs * length, 3 * 12 * 64, dtype=BF16, device=device)
    q, k, v = (part.unflatten(1, (12, 64)) for part in qkv.chunk(3, dim=1))
    ids = torch.zeros(num_seqs * length, dtype=torch.int64, device=device)
    offsets = torch.tensor([0, *itertools.accumulate([length] * num_seqs)], dtype=torch.int32, device=device)
    lens = torch.full((num_seqs,), length, dtype=torch.int32, device=device)
    batch = Batch(ids, ids, offsets, lens, length, length)
    flops = 4.0 * num_seqs * length * length * 12 * 64
    return Work(lambda: ops.encoder_attention(q, k, v, batch, 0.125), 4 * q.numel() * 2, flops)


def _layer_norm(ops: OpSet, device: torch.device, small: bool) -> Work:
    x, residual = (torch.randn(3 if small else 32768, 768, dtype=BF16, device=device) for _ in range(2))
    weight = torch.randn(768, dtype=BF16, device=device)
    return Work(lambda: ops.layer_norm(x, weight, weight, 1e-6, residual), 3 * x.numel() * 2)


def _float8(tokens: int) -> Make:
    """An 8B model's largest product in tiles of 128 x 128, inputs in float8 where the GPU multiplies it."""

    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        rows, columns = (128, 256) if small else (14336, 4096)
        count = 3 if small else tokens
        data = torch.randn(rows, columns, device=device).to(torch.float8_e4m3fn)
        scales = torch.rand(rows // 128, columns // 128, device=device)
        prepared = ops.prepare_quantized(Float8Weight(data, scales, (128, 128)), None, BF16)
        x = torch.randn(count, columns, dtype=BF16, device=device)
        return Work(lambda: ops.linear(x, prepared), rows * columns + 2 * count * (rows + columns), _flops(x, rows))

    return make


def _experts(tokens: int, quantized: bool) -> Make:
    """A layer of Qwen3-30B-A3B: 8 of 128 experts of 768, hidden size 2048. From 64 tokens on, all are used."""

    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        count, num_experts, inner, hidden = (3, 4, 64, 128) if small else (tokens, 128, 768, 2048)
        top_k = 2 if small else 8

        def projections(out: int, size: int) -> list[Projection]:
            return [Projection(weight(out, size)) for _ in range(num_experts)]

        def weight(out: int, size: int) -> Weight:
            if not quantized:
                return torch.randn(out, size, dtype=BF16, device=device)
            groups = (out, size // 32)
            codes = torch.randint(0, 16, (out, size), dtype=torch.uint8, device=device)
            zeros = torch.full(groups, 8, dtype=torch.int16, device=device)
            return GroupedIntWeight(codes, torch.rand(groups, device=device).half().float(), zeros, 4, 32)

        experts = ops.prepare_experts(projections(2 * inner, hidden), projections(hidden, inner), BF16)
        x = torch.randn(count, hidden, dtype=BF16, device=device)
        weights, ids = torch.rand(count, num_experts, device=device).topk(top_k, dim=-1)
        used = min(num_experts, count * top_k)
        bits = 4.5 if quantized else 16.0
        moved = used * 3 * hidden * inner * bits / 8 + 4 * x.numel()
        flops = 6.0 * count * top_k * hidden * inner
        return Work(lambda: ops.fused_experts(x, experts, weights, ids, "silu"), moved, flops)

    return make


def _flops(x: Tensor, out_features: int) -> float:
    return 2.0 * x.numel() * out_features


def _gather(ops: OpSet, device: torch.device, small: bool) -> Work:
    logits = torch.randn(3 if small else 1024, 128256, dtype=BF16, device=device)
    targets = torch.arange(len(logits), device=device)
    return Work(lambda: ops.log_softmax_gather(logits, targets), logits.numel() * 2)


def _codes(kv_dtype: KVDtype) -> Make:
    """Decoding over a cache in 8 or 4 bits."""

    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        return cuda.attention(1, [600, 40] if small else [4096] * 64, kv_dtype=kv_dtype)(ops, device)

    return make


def _latents(heads: int) -> Make:
    """Decoding over the latents of DeepSeek V2 and V3."""

    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        num_seqs, length, size, rank, block = (2, 40, 576, 512, 64) if small else (64, 4096, 576, 512, 64)
        width = -(-length // block)
        data = torch.randn(num_seqs * width, block, size, dtype=BF16, device=device)
        q = torch.randn(num_seqs, heads, size, dtype=BF16, device=device)
        ids = torch.zeros(num_seqs, dtype=torch.int64, device=device)
        batch = Batch(
            ids, ids, torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
            torch.full((num_seqs,), length, dtype=torch.int32, device=device), 1, length,
            block_tables=torch.randperm(num_seqs * width).int().view(num_seqs, width).to(device),
        )  # fmt: skip
        moved = num_seqs * (length * size + heads * (size + rank)) * 2
        flops = 2.0 * num_seqs * length * heads * (size + rank)
        return Work(lambda: ops.latent_attention(q, LatentCache(data, rank), batch, size**-0.5), moved, flops)

    return make


def _with_room(ops: OpSet, device: torch.device, small: bool) -> Work:
    """Decoding short texts in a step that was captured for long ones: most programs of the grid have nothing to do."""
    num_seqs, length, room, heads, kv_heads, size, block = (2, 40, 600, 4, 2, 16, 32) if small else (
        256, 512, 131072, 32, 8, 128, 32
    )  # fmt: skip
    width = -(-length // block)
    tables = torch.zeros(num_seqs, -(-room // block), dtype=torch.int32, device=device)
    tables[:, :width] = torch.arange(num_seqs * width, dtype=torch.int32, device=device).view(num_seqs, width)
    shape = (num_seqs * width, kv_heads, block, size)
    cache = KVCache(*(torch.randn(shape, dtype=BF16, device=device) for _ in range(2)))
    q = torch.randn(num_seqs, heads, size, dtype=BF16, device=device)
    ids = torch.zeros(num_seqs, dtype=torch.int64, device=device)
    offsets = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
    lens = torch.full((num_seqs,), length, dtype=torch.int32, device=device)
    batch = Batch(ids, ids, offsets, lens, 1, room, block_tables=tables)
    moved = 2 * 2 * num_seqs * length * kv_heads * size + 2 * q.numel() * 2
    return Work(lambda: ops.paged_attention(q, cache, batch, 0.1), moved)


def _adapters(num_tokens: int, count: int, rank: int) -> Make:
    """Tokens in no order, each with one of the adapters of a 4096 x 4096 projection."""

    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        tokens, size = (5, 64) if small else (num_tokens, 4096)
        y, x = (torch.randn(tokens, size, dtype=BF16, device=device) for _ in range(2))
        a, b = (torch.randn(count, *s, dtype=BF16, device=device) for s in ((rank, size), (size, rank)))
        ids = torch.arange(tokens, device=device) * 7 % count
        moved = 2 * (3 * y.numel() + a.numel() + b.numel())
        return Work(lambda: ops.lora(y, x, a, b, ids), moved, 4.0 * tokens * rank * size)

    return make


def _turn_and_write(ops: OpSet, device: torch.device, small: bool) -> Work:
    tokens = 3 if small else 8192
    qkv = torch.randn(tokens, 48 * 128, dtype=BF16, device=device)
    q, k, v = (part.unflatten(1, (-1, 128)) for part in qkv.split([32 * 128, 8 * 128, 8 * 128], dim=1))
    cache = ops.allocate_kv_cache(tokens // 32 + 1, 32, 8, 128, BF16, device)
    slots, positions = torch.randperm(tokens, device=device), torch.arange(tokens, device=device)
    angles = torch.rand(8192, 128, device=device).to(BF16)
    moved = 2 * 2 * (q.numel() + k.numel() + v.numel())
    return Work(lambda: ops.rope_write_kv(q, k, v, positions, angles, cache, slots), moved)


def _turn_and_write_latents(ops: OpSet, device: torch.device, small: bool) -> Work:
    """As DeepSeek V3 has it: 128 of 192 numbers of a query's head are not touched."""
    tokens, heads, rank, rope_dim = 3 if small else 8192, 128, 512, 64
    q = torch.randn(tokens, heads, 192, dtype=BF16, device=device)[..., 128:]
    latent = torch.randn(tokens, 1536 + rank + rope_dim, dtype=BF16, device=device)[:, 1536:]
    cache = ops.allocate_latent_cache(tokens // 64 + 1, 64, rank, rope_dim, BF16, device)
    slots, positions = torch.randperm(tokens, device=device), torch.arange(tokens, device=device)
    angles, weight = torch.rand(8192, rope_dim, device=device).to(BF16), torch.rand(rank, device=device).to(BF16)
    moved = 2 * 2 * (q.numel() + latent.numel())
    return Work(lambda: ops.rope_write_latent(q, latent, weight, 1e-6, positions, angles, cache, slots), moved)


def _by(library: str, kernel: Kernel) -> Kernel:
    """The work of a kernel for prompts by a library, if it gives what the engine's own gives."""

    def make(ops: OpSet, device: torch.device, small: bool) -> Work:
        torch.manual_seed(0)
        expected = kernel.make(ops, device, small).call()
        theirs = type(ops)()
        importlib.import_module(f"engines.triton.libraries.{library}").attach(theirs, ["paged_attention"])
        torch.manual_seed(0)
        work = kernel.make(theirs, device, small)
        torch.testing.assert_close(work.call(), expected, rtol=2e-2, atol=2e-2)
        return work

    return replace(kernel, name=f"{kernel.name}, {library}", sources=(f"libraries/{library}.py",), make=make, bar=0.0)


def by_libraries() -> list[Kernel]:
    """Prompts by each library that is installed: no bars, as they are others' work."""
    found = modules("engines.triton.libraries")
    here = [name for name, library in found.items() if next(iter(library.PACKAGES)) in installed_packages()]
    return [_by(name, kernel) for name in here for kernel in KERNELS if kernel.name.startswith("prefill")]


KERNELS = (
    *(
        replace(kernel, sources=SOURCES[kernel.name.split()[0]])
        for kernel in cuda.KERNELS
        if kernel.name.split()[0] in SOURCES
    ),
    Kernel("encoder_attention 64 x 512", SOURCES["prefill"], _encoder, 0.3),
    Kernel("layer_norm 32768 x 768", SOURCES["add_rms_norm"], _layer_norm, 0.85),
    Kernel("log_softmax_gather 1024 x 128256", SOURCES["sample"], _gather, 0.8),
    Kernel("fp8 4096 x 14336, batch 1", SOURCES["w4a16"], _float8(1), 0.75),
    Kernel("fp8 4096 x 14336, batch 8192", SOURCES["w4a16"], _float8(8192), 0.9),
    Kernel("experts 128 x 768, batch 64", SOURCES["experts"], _experts(64, False), 0.7),
    Kernel("experts 128 x 768, batch 8192", SOURCES["experts"], _experts(8192, False), 0.4),
    Kernel("experts in 4 bits, batch 64", SOURCES["experts"], _experts(64, True), 0.5),
    Kernel("quantized_attention int8, 64 x 4096", SOURCES["decode"], _codes("int8"), 0.6),
    Kernel("quantized_attention int4, 64 x 4096", SOURCES["decode"], _codes("int4"), 0.4),
    Kernel("quantized_attention fp8, 64 x 4096", SOURCES["decode"], _codes("fp8"), 0.6),
    Kernel("latent_attention 64 x 4096, 16 heads", SOURCES["decode"], _latents(16), 0.6),
    Kernel("latent_attention 64 x 4096, 128 heads", SOURCES["decode"], _latents(128), 0.4),
    Kernel("decode attention, 256 x 512 of 131072", SOURCES["decode"], _with_room, 0.6),
    Kernel("lora 64 tokens, 16 adapters of rank 16", SOURCES["lora"], _adapters(64, 16, 16), 0.1),
    Kernel("lora 8192 tokens, 4 adapters of rank 64", SOURCES["lora"], _adapters(8192, 4, 64), 0.3),
    Kernel("rope_write_kv 8192 x 48 heads", SOURCES["write_kv"], _turn_and_write, 0.7),
    Kernel("rope_write_latent 8192 x 128 heads", SOURCES["write_kv"], _turn_and_write_latents, 0.6),
)
