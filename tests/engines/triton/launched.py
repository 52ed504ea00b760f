"""What launches compile, for GPUs that are not here: every kernel as the launches of real calls specialize it.

A stand-in for Triton's driver says that there is such a GPU. Launches are then noted and not made: what they would
compile follows from the types, alignments and constants of their arguments, and can be compiled anywhere. A launch that
no GPU takes, with too large a grid, raises.

    python -m tests.engines.triton.launched 90                  # to Triton's cache, with all processors
    python -m tests.engines.triton.launched 90 --parts cases --only norm --front
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import triton.compiler
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MOST_PROGRAMS = (2**31 - 1, 65535, 65535)
"""Of a grid's dimensions (CUDA C++ programming guide, table of capabilities)."""
SHARED = {70: 96 << 10, 75: 64 << 10, 80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a program may have, by compute capability (the same table)."""
PROCESSORS = 132
"""Of an H200, where the number decides how products and keys are split."""


class Absent(DriverBase):  # type: ignore[misc]
    """The driver of a GPU that is not here: enough of it to compile for."""

    def __init__(self, sm: int) -> None:
        self.target = GPUTarget("cuda", sm, 32)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Variant:
    """A kernel, and what one of its compilations is for."""

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    """num_warps and num_stages, and the compiler's own."""
    sm: int

    def __str__(self) -> str:
        return f"{self.module}.{self.name} {self.signature} {self.constants}"

    def source(self) -> ASTSource:
        kernel = getattr(importlib.import_module(self.module), self.name)
        return ASTSource(kernel, self.signature, self.constants, self.attributes)

    def front(self) -> None:
        """Raises where the language refuses it; a tenth of a second."""
        target = GPUTarget("cuda", self.sm, 32)
        backend, source = make_backend(target), self.source()
        options = backend.parse_options({**self.options, **source.parse_options()})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        made = backend.get_codegen_implementation(options), backend.get_module_map(), context
        source.make_ir(target, options, *made)

    def compile(self) -> None:
        """Into Triton's cache; seconds. Raises for code that the GPU cannot load."""
        made = triton.compiler.compile(self.source(), target=GPUTarget("cuda", self.sm, 32), options=self.options)
        if made.metadata.shared > SHARED[self.sm]:
            raise ValueError(f"{made.metadata.shared} bytes of shared memory; expected at most {SHARED[self.sm]}")


@contextmanager
def noted(sm: int) -> Iterator[dict[Any, Variant]]:
    """While this is open, Triton's launches are not made, and what they would compile goes into the dict."""
    found: dict[Any, Variant] = {}
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        for count, most in zip(grid, MOST_PROGRAMS, strict=False):
            assert 0 < count <= most, f"{self.__name__}: a grid of {grid}; expected at most {MOST_PROGRAMS}"
        return launch(self, *args, grid=grid, warmup=True, **options)

    def do_compile(
        self: Any, key: Any, signature: Any, device: int, constants: Any, options: Any, attributes: Any, warmup: bool
    ) -> None:
        name = self.fn.__name__
        parts = self.module, name, signature, constants, attributes, dict(options.__dict__), sm
        found[self.module, name, key] = Variant(*parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Absent(sm))
        patch.setattr(JITFunction, "run", run)
        patch.setattr(JITFunction, "_do_compile", do_compile)
        for module in ("launch", "linear", "attention", "moe"):
            patch.setattr(f"engines.triton.{module}.capability", lambda device: divmod(sm, 10))
        for module in ("linear", "attention"):
            patch.setattr(f"engines.triton.{module}.processors", lambda device: PROCESSORS)
        patch.setattr("engines.triton.sampling.has_float64", lambda device_type: True)
        yield found


def cases(sm: int, only: str = "") -> list[Variant]:
    """Of all cases of all ops."""
    from engines.triton.opset import OpSet
    from tests.cases import call
    from tests.gpu.checking import chosen

    ops = OpSet()
    with noted(sm) as found, torch.inference_mode():
        for case, dtype in chosen("triton", ops, only):
            call(ops, case, case.arguments(dtype))
    return list(found.values())


def kernels(sm: int, only: str = "") -> list[Variant]:
    """Of the kernels that are timed, in their full sizes, without memory for them."""
    from engines.triton.opset import OpSet
    from tests.engines.triton.kernels import KERNELS

    with noted(sm) as found, torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        # What numbers decide: whether scales fit into 16 bits, whether zeros are all alike, which experts are used.
        patch.setattr(torch, "equal", lambda one, other: True)
        patch.setattr(torch.Tensor, "__bool__", lambda self: True)
        patch.setattr(torch.Tensor, "unique", torch.Tensor.flatten)
        for kernel in KERNELS:
            if only in kernel.name:
                kernel.make(OpSet(), torch.device("meta"), False).call()
    return list(found.values())


def steps(sm: int, only: str = "") -> list[Variant]:
    """Of the steps of the 8B-shaped model that is timed: captured ones, and prompts."""
    from engines.batch import Batch
    from engines.core.model_runner import allocate_caches
    from engines.triton.opset import OpSet
    from tests.gpu.timing import LLAMA_8B, decoder

    ops, meta = OpSet(), torch.device("meta")

    def step(num_seqs: int, tokens: int, longest: int) -> None:
        longs, ints = ([torch.zeros(n, dtype=t, device=meta) for n in (num_seqs * tokens, num_seqs + 1, num_seqs)]
                       for t in (torch.int64, torch.int32))  # fmt: skip
        tables = torch.zeros(num_seqs, -(-longest // 32), dtype=torch.int32, device=meta)
        batch = Batch(longs[0], longs[0], ints[1], ints[2], tokens, longest, longs[0], tables, longs[2])
        logits = model.logits(model.forward(batch, caches))
        ops.argmax(logits)

    with noted(sm) as found, torch.inference_mode():
        for length in (1024, 1280):
            model = decoder(LLAMA_8B, ops, meta, length)
            caches = allocate_caches(model, ops, 64, 32, torch.bfloat16, meta)
            for num_seqs, tokens, longest in ((1, 1, length), (3, 1, length), (64, 1, length), (16, 500, 500)):
                step(num_seqs, tokens, longest)
    return [variant for variant in found.values() if only in variant.name]


PARTS: dict[str, Callable[[int, str], list[Variant]]] = {"cases": cases, "kernels": kernels, "steps": steps}


def compile_all(
    variants: Iterable[Variant], processes: int, deadline: float, front: bool = False
) -> Iterator[tuple[Variant, str]]:
    """(variant, why it does not compile) of what was compiled by the deadline, of time.time."""
    with ExitStack() as stack:
        pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        asked = {pool.submit(_compiled, variant, deadline, front): variant for variant in variants}
        for job in as_completed(asked):
            problem = job.result()
            if problem is not None:
                yield asked[job], problem


def _compiled(variant: Variant, deadline: float, front: bool) -> str | None:
    if time.time() > deadline:
        return None
    try:
        variant.front() if front else variant.compile()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[-1500:]
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.engines.triton.launched", description=__doc__.split("\n")[0])
    parser.add_argument("sm", type=int, help="compute capability, 90 for 9.0")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--only", default="", help="cases and kernels whose name contains this")
    parser.add_argument("--front", action="store_true", help="what the language refuses, without code")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no compilation after this")
    asked = parser.parse_args()
    begin, failed = time.time(), 0
    found = [variant for part in asked.parts for variant in PARTS[part](asked.sm, asked.only)]
    print(f"{len(found)} variants, {time.time() - begin:.0f} s", flush=True)
    done = 0
    for variant, problem in compile_all(found, asked.processes, begin + asked.seconds, asked.front):
        done += 1
        if problem:
            failed += 1
            print(f"{variant}: {problem}", flush=True)
    print(f"{done} compiled, {failed} not, {time.time() - begin:.0f} s")
    return int(failed > 0 or done < len(found))


if __name__ == "__main__":
    raise SystemExit(main())
