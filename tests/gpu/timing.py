"""Times on a device: its own limits, kernels against them, and decoding with an 8B-shaped model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engines.api import EngineConfig, Request, SamplingParams
from engines.checkpoint import Checkpoint
from engines.core.device import Device
from engines.core.engine import LLMEngine
from engines.formats import dense
from engines.models import llama
from engines.models.decoder import Decoder
from engines.models.spec import DecoderSpec, RopeSpec
from engines.ops import OpSet
from engines.weights import Weights
from tests.engines.cuda.kernels import Kernel

SMALL = DecoderSpec(512, 64, 128, 2, 4, 2, 16, 4096, RopeSpec())
LLAMA_8B = DecoderSpec(128256, 4096, 14336, 32, 32, 8, 128, 8192, RopeSpec(theta=500000.0))


@dataclass(frozen=True)
class Ceilings:
    """What the device gives in this run."""

    bytes_s: float
    """Of a copy: read and written."""
    flops_s: float
    """Of a bfloat16 product of two 8192 x 8192 matrices."""


@dataclass(frozen=True)
class Timed:
    name: str
    time_s: float
    fraction: float
    """Of the roofline: its least time over the time."""
    bar: float
    sources: tuple[str, ...] = ()
    """Files of the backend's folder that decide it; empty: all of them."""


def median_s(call: Callable[[], object], device: torch.device) -> float:
    """Median of a call on the device, its second-level cache emptied before each."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=50, rep=200, return_mode="median")) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def ceilings(device: torch.device) -> Ceilings:
    small = device.type != "cuda"
    source = torch.ones((1 << 20) if small else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 128 if small else 8192
    a = torch.randn(size, size, device=device).bfloat16()
    copy_s = median_s(lambda: target.copy_(source), device)
    return Ceilings(2 * source.numel() / copy_s, 2 * size**3 / median_s(lambda: a @ a, device))


def time_kernel(kernel: Kernel, ops: OpSet, device: torch.device, limits: Ceilings) -> Timed:
    """Small shapes where the device is a processor: they show that it runs, and nothing else."""
    work = kernel.make(ops, device, device.type != "cuda")
    work.call()
    seconds = median_s(work.call, device)
    least = max(work.num_bytes / limits.bytes_s, work.flops / limits.flops_s)
    return Timed(kernel.name, seconds, least / seconds, kernel.bar, kernel.sources)


@dataclass
class RandomWeights(Weights):
    """Normal numbers for every tensor that is asked for."""

    generator: torch.Generator = field(default_factory=torch.Generator)

    def _read(self, name: str, shape: tuple[int, ...], out: Tensor, *held: list[slice]) -> None:
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        out.normal_(centre, 0.02)


def decoder(spec: DecoderSpec, ops: OpSet, device: torch.device, max_model_len: int) -> Decoder:
    checkpoint = Checkpoint("", {}, "LlamaForCausalLM", {}, {})
    weights = RandomWeights(checkpoint, llama.CHECKPOINT, torch.bfloat16, device)
    with torch.inference_mode():
        return Decoder(spec, "logits", max_model_len, weights, dense, ops)


def time_decoding(ops: OpSet, device: torch.device, limits: Ceilings, batches: tuple[int, ...]) -> list[Timed]:
    """Steps of an engine that decodes so many sequences, each about 500 tokens long, against the bytes of weights and
    cache.
    """
    spec, prompt, steps = (LLAMA_8B, 500, 64) if device.type == "cuda" else (SMALL, 5, 3)
    model = decoder(spec, ops, device, 1024)
    results = []
    for count in batches:
        config = EngineConfig(max_model_len=1024, max_num_seqs=count, max_num_batched_tokens=8192, block_size=32)
        engine = LLMEngine(model, ops, config, count * 32, torch.bfloat16, Device(device))
        sampling = SamplingParams(max_tokens=steps + 8, ignore_eos=True)
        engine.submit(
            [Request(i, "generate", [(i * 31 + j * 7) % 500 for j in range(prompt)], sampling) for i in range(count)]
        )
        while engine.stats().num_output_tokens < count * 4:
            engine.step()
        begin, before = time.perf_counter(), engine.stats()
        for _ in range(steps):
            engine.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = (time.perf_counter() - begin) / steps
        drawn = engine.stats().num_output_tokens - before.num_output_tokens
        assert drawn == steps * count, f"{drawn} tokens in {steps} steps of {count}"
        matrices = 2 * spec.num_key_value_heads * spec.head_dim * spec.hidden_size + 2 * spec.hidden_size**2
        matrices += 3 * spec.hidden_size * spec.intermediate_size
        moved = 2 * (matrices * spec.num_hidden_layers + spec.vocab_size * spec.hidden_size)
        cached = 2 * 2 * spec.num_key_value_heads * spec.head_dim * spec.num_hidden_layers * (prompt + steps // 2)
        least = (moved + count * cached) / limits.bytes_s
        results.append(Timed(f"decode step of 8B, batch {count}", seconds, least / seconds, 0.75))
        engine.close()
    return results
