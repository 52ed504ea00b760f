"""Copies of a model that do all of their rows, against copies that compute prompts and copies that go on with them.

The same requests go through the runner's processes, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import time

from engines.api import EngineSettings, Outcome, Request, SamplingParams
from engines.cpu.offers import Config
from runner.parallel import Layout
from runner.workers import Supervision, Workers, each_worker

SHARED = 512
"""Tokens that all prompts begin with, where that is asked for."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--output", type=int, default=32)
    parser.add_argument("--shared", action="store_true", help=f"prompts begin with the same {SHARED} tokens")
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--prefill", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=3)


def run(args: argparse.Namespace) -> None:
    chance, params = random.Random(0), SamplingParams(max_tokens=args.output, ignore_eos=True)
    begin = [chance.randrange(3, 250) for _ in range(SHARED)] if args.shared else []
    work = [
        Request(i, "generate", begin + [chance.randrange(3, 250) for _ in range(args.prompt - len(begin))], params)
        for i in range(args.requests)
    ]
    config = Config(max_model_len=args.prompt + args.output, kv_cache_bytes=4 << 30)
    settings = EngineSettings("cpu", args.model, args.dtype, config)
    for _ in range(args.repeat):
        for prefill in args.prefill:
            print(json.dumps(measure(settings, Layout(1, args.copies, 1, prefill), work)), flush=True)


def measure(settings: EngineSettings, layout: Layout, work: list[Request]) -> dict[str, object]:
    watching = Supervision(600.0, say=lambda line: None, note=lambda line: None)
    with contextlib.closing(Workers(each_worker(settings, layout, "cpu"), watching)) as workers:
        workers.ready()
        while not all(worker.ready for worker in workers._workers):
            workers._receive()
        start, outcomes = time.perf_counter(), list[Outcome]()
        workers.submit(work)
        while workers.num_unfinished:
            outcomes += workers.step()
        wall_s = time.perf_counter() - start
        stats = workers.stats()
    assert len(outcomes) == len(work) and not any(outcome.error for outcome in outcomes)
    return {
        "copies": layout.dp,
        "prefill": layout.prefill,
        "wall_s": round(wall_s, 2),
        "rows_s": round(len(work) / wall_s, 2),
        "output_tokens_s": round(stats.num_output_tokens / wall_s, 1),
        "steps": stats.num_steps,
        "notes": stats.notes,
    }
