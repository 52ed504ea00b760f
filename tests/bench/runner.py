"""Rows per second through source, template, engine process, journal and sink, with an engine that answers at once.

The tokenizer is replaced by one that splits nothing, so that what is measured is the runner itself. With `--pace` each
engine answers so many rows a second and computes nothing: what several of them reach, and what the runner takes then.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from engines.api import EngineSettings, EngineStats, Outcome, Request
from runner.engine_main import Watch
from runner.progress import Counts, Progress


class InstantEngine:
    """Answers every request with its own prompt at the next step."""

    max_model_len = 256
    stalled = False

    def __init__(self) -> None:
        self._waiting: list[Request] = []
        self._done = 0

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting += requests

    def step(self) -> list[Outcome]:
        requests, self._waiting = self._waiting, []
        self._done += len(requests)
        return [Outcome(r.request_id, "stop", token_ids=[1, 2], num_prompt_tokens=1) for r in requests]

    def release(self, request_ids: Sequence[int]) -> None:
        raise AssertionError("nothing was handed over")

    def fetched(self) -> list[int]:
        return []

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting)

    def stats(self) -> EngineStats:
        return EngineStats(len(self._waiting), 0, 0, 0, 0, 0, self._done, 0, 2 * self._done)

    def close(self) -> None:
        self._waiting.clear()


class PacedEngine(InstantEngine):
    """Answers up to 64 requests a step, which takes as long as they do at `pace` rows a second."""

    def __init__(self, pace: float) -> None:
        super().__init__()
        self._pace = pace

    def step(self) -> list[Outcome]:
        later = self._waiting[64:]
        del self._waiting[64:]
        time.sleep(len(self._waiting) / self._pace)
        outcomes = super().step()
        self._waiting = later
        return outcomes


def load_instant(
    settings: EngineSettings, watch: Watch, permission: Callable[[], None], pace: float | None = None
) -> InstantEngine:
    """For the engine's process."""
    permission()
    return PacedEngine(pace) if pace else InstantEngine()


class NoTokenizer:
    """A token for each text, and a fixed text for tokens."""

    def encode(self, texts: list[str], add_special: bool = True) -> list[list[int]]:
        return [[1]] * len(texts)

    def spells_control(self, text: str) -> bool:
        return False

    def decode(self, ids: Sequence[int]) -> str:
        return "answer"

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return ["answer"] * len(ids)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", type=int, nargs="?", default=200_000)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--pace", type=float, help="rows a second that each engine answers; default: at once")


def run(args: argparse.Namespace) -> None:
    from hydra import compose, initialize_config_module

    from runner import config, job
    from runner.plan import make_plan

    with tempfile.TemporaryDirectory() as folder:
        write_input(Path(folder) / "input.parquet", args.rows)
        overrides = [
            "name=bench",
            "dataset=parquet",
            f"dataset.path={folder}/input.parquet",
            f"output.folder={folder}/out",
            "task=generate",
            "task.prompt='Say what this is: {{ text }}'",
            f"parallelism.dp={args.engines}",
        ]
        with initialize_config_module("conf", version_base="1.3"):
            plan = make_plan(config.load(compose("config", overrides=overrides)))
        memory: dict[int, int] = {}
        with mock.patch.object(job, "load_tokenizer", lambda path: NoTokenizer()), Watching(memory):
            start, used_s = time.perf_counter(), time.process_time()
            job.run(plan, loader=partial(load_instant, pace=args.pace))
            wall_s, used_s = time.perf_counter() - start, time.process_time() - used_s
    grown = (max(memory.values()) - memory.get(100_000, min(memory.values()))) if memory else 0
    print(
        json.dumps(
            {
                "rows": args.rows,
                "rows_s": round(args.rows / wall_s),
                "wall_s": round(wall_s, 2),
                "runner_cores": round(used_s / wall_s, 2),
                "grown_since_row_100000_mib": grown >> 20,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
    )


class Watching:
    """Notes the resident memory at row 100,000 and at each million rows."""

    def __init__(self, memory: dict[int, int]) -> None:
        self._memory = memory
        self._update = Progress.update

    def __enter__(self) -> None:
        memory, update = self._memory, self._update

        def noting(progress: Progress, counts: Counts, num_read: int, stats: EngineStats | None) -> None:
            update(progress, counts, num_read, stats)
            for mark in (100_000, *range(1_000_000, counts.num_rows + 1, 1_000_000)):
                if counts.num_rows >= mark and mark not in memory:
                    memory[mark] = resident_bytes()

        Progress.update = noting  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        Progress.update = self._update  # type: ignore[method-assign]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def write_input(path: Path, rows: int) -> None:
    schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 100_000):
            ids = pa.array(range(start, min(start + 100_000, rows)), pa.int64())
            texts = pa.array([f"a text of some length, number {i.as_py()}" for i in ids])
            writer.write_table(pa.table([ids, texts], schema=schema))
