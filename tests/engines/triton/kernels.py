"""The Triton kernels as they are to be timed on a GPU: the works of the CUDA kernels, and those of encoders."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch

from engines.batch import Batch
from engines.ops import OpSet
from tests.engines.cuda import kernels as cuda
from tests.engines.cuda.kernels import BF16, Kernel, Work

SOURCES = {
    "decode": ("attention.py", "flash.py", "launch.py"),
    "prefill": ("attention.py", "flash.py", "launch.py"),
    "add_rms_norm": ("norm.py", "launch.py"),
    "act_and_mul": ("activation.py", "launch.py"),
    "rope": ("rotary.py", "launch.py"),
    "write_kv": ("kv_cache.py", "launch.py"),
    "sample": ("sampling.py", "launch.py"),
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


def _gather(ops: OpSet, device: torch.device, small: bool) -> Work:
    logits = torch.randn(3 if small else 1024, 128256, dtype=BF16, device=device)
    targets = torch.arange(len(logits), device=device)
    return Work(lambda: ops.log_softmax_gather(logits, targets), logits.numel() * 2)


KERNELS = (
    *(
        replace(kernel, sources=SOURCES[kernel.name.split()[0]])
        for kernel in cuda.KERNELS
        if kernel.name.split()[0] in SOURCES
    ),
    Kernel("encoder_attention 64 x 512", SOURCES["prefill"], _encoder, 0.3),
    Kernel("layer_norm 32768 x 768", SOURCES["add_rms_norm"], _layer_norm, 0.85),
    Kernel("log_softmax_gather 1024 x 128256", SOURCES["sample"], _gather, 0.8),
)
