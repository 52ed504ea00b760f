"""One workload through the CPU engine: wall time and tokens per second, without the load."""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engines.api import Request, SamplingParams
from engines.cpu.offers import Config
from engines.load import EngineSettings, load_engine
from tests.bench import ceilings, floor


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("workload")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", choices=("int8", "w8a16"))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit", type=int, help="only the first requests")
    parser.add_argument("--touched", action="store_true", help="the cache's memory is in use before the clock starts")
    parser.add_argument("--floor", action="store_true", help="print the least time at this machine's limits")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, by op")


def run(args: argparse.Namespace) -> None:
    workload = json.loads(Path(args.workload).read_text())[: args.limit]
    limits = ceilings.measure() if args.floor else None
    for _ in range(args.repeat):
        print(json.dumps(measure(args, workload, limits)), flush=True)


def measure(args: argparse.Namespace, workload: list[dict], limits: ceilings.Ceilings | None) -> dict[str, object]:
    start = time.perf_counter()
    config = Config(max_model_len=2048, kv_cache_bytes=4 << 30)
    engine = load_engine(EngineSettings("cpu", args.model, args.dtype, config, quantization=args.quantization))
    load_s = time.perf_counter() - start
    if args.touched:
        touch(engine.runner.caches, sum(-(-(len(r["prompt"]) + r["n"]) // config.block_size) for r in workload))
    recorder = floor.Recorder(engine.runner)
    start = time.perf_counter()
    requests = [
        Request(i, "generate", r["prompt"], SamplingParams(max_tokens=r["n"], ignore_eos=True))
        for i, r in enumerate(workload)
    ]
    engine.submit(requests)
    if args.profile:
        profiled(engine)
    done = 0
    while engine.num_unfinished:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            done += len(outcome.token_ids)
    wall_s = time.perf_counter() - start
    prompt = sum(len(r["prompt"]) for r in workload)
    assert done == sum(r["n"] for r in workload)
    stats, spec = engine.stats(), engine.model.spec
    kept = resident_bytes(t for cache in engine.runner.caches for t in vars(cache).values() if isinstance(t, Tensor))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    engine.close()
    least = recorder.floor_s(spec, args.dtype, limits) if limits else None
    return {
        "model": Path(args.model).name,
        "workload": Path(args.workload).stem,
        "quantization": args.quantization,
        "wall_s": round(wall_s, 2),
        "out_tok_s": round(done / wall_s, 1),
        "total_tok_s": round((prompt + done) / wall_s, 1),
        "load_s": round(load_s, 2),
        "steps": stats.num_steps,
        "cached_tokens": stats.num_cached_tokens,
        **({} if least is None else {"floor_s": round(least, 2), "of_floor": round(least / wall_s, 2)}),
        "peak_mib": peak >> 20,
        "kv_mib": kept >> 20,
        "peak_over_weights_and_kv_mib": (peak - kept - weight_bytes(args.model)) >> 20,
    }


@torch.inference_mode()
def touch(caches: Iterable[object], num_blocks: int) -> None:
    """First use of memory, which an engine that fills its cache when it is loaded has behind it."""
    for cache in caches:
        for tensor in vars(cache).values():
            if isinstance(tensor, Tensor):
                tensor[:num_blocks].zero_()


def weight_bytes(model: str) -> int:
    """Of the checkpoint's tensors as they are stored: what else is made of them counts as the engine's own."""
    return sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Of some tensors' pages, those that memory has been found for: proc(5), /proc/pid/pagemap."""
    page = resource.getpagesize()
    count = 0
    with Path("/proc/self/pagemap").open("rb") as pagemap:
        for tensor in tensors:
            first, last = tensor.data_ptr() // page, -(-(tensor.data_ptr() + tensor.nbytes) // page)
            pagemap.seek(first * 8)
            entries = np.frombuffer(pagemap.read((last - first) * 8), np.uint64)
            count += int((entries >> np.uint64(63)).sum())
    return count * page


def profiled(engine: object) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as result:
        while engine.num_unfinished:  # type: ignore[attr-defined]
            engine.step()  # type: ignore[attr-defined]
    print(result.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))
    raise SystemExit
