"""Times on a device: its own limits, and kernels against them. Random weights for models of any shape."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engines.checkpoint import Checkpoint
from engines.formats import dense
from engines.models import llama
from engines.models.decoder import Decoder
from engines.models.spec import DecoderSpec, RopeSpec
from engines.ops import OpSet
from engines.weights import Weights
from tests.engines.cuda.kernels import Kernel
from tests.gpu import workers

SMALL = DecoderSpec(512, 64, 128, 2, 4, 2, 16, 4096, RopeSpec())
LLAMA_8B = DecoderSpec(128256, 4096, 14336, 32, 32, 8, 128, 8192, RopeSpec(theta=500000.0))


LONG_S = 2e-3
"""Of longer calls the launches do not matter."""


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
    """Median of a call on the device, its second-level cache emptied before each.

    The smaller one of two: launched by Python, and as a captured graph, as decode steps have it. A small kernel ends
    before Python has launched it; a graph has a start of its own.
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        def median(launch: Callable[[], object]) -> float:
            return float(do_bench(launch, warmup=25, rep=100, return_mode="median")) / 1e3

        called = median(call)
        if called > LONG_S:
            return called
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # a library's, that lays out its work on the host
            return called
        return min(called, median(graph.replay))
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


def kernels_of(backend: str) -> list[Kernel]:
    """What is timed of a backend, libraries in its place among it."""
    works = importlib.import_module(f"tests.engines.{backend}.kernels")
    return [*works.KERNELS, *(works.by_libraries() if backend == "triton" else [])]


def timer(backend: str, device: str, limits: Ceilings) -> Callable[[str], Timed]:
    """What times a kernel by its name."""
    open_for_good = workers.prepared(device)
    ops: OpSet = importlib.import_module(f"engines.{backend}.opset").OpSet()
    known = {kernel.name: kernel for kernel in kernels_of(backend)}

    def work(name: str) -> Timed:
        assert open_for_good
        try:
            return time_kernel(known[name], ops, torch.device(device), limits)
        except Exception as error:
            raise RuntimeError(workers.unless_lost(device, error)) from error

    return work


def time_kernel(kernel: Kernel, ops: OpSet, device: torch.device, limits: Ceilings) -> Timed:
    """Small shapes where the device is a processor: they show that it runs, and nothing else."""
    with torch.inference_mode():
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
