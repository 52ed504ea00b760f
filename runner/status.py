"""mode=status: how far a job is, whoever works on it. mode=merge: the marks of the whole, once nothing is missing.

Both need the output folder and the input and nothing else: no model and no GPU, so a login node will do.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import orjson

from runner.config import JobConfig
from runner.errors import Interrupted
from runner.leases import leased
from runner.ledger import Ledger
from runner.progress import METRICS_FILE, Counts, Summary, duration
from runner.source import open_source
from runner.storage import local_folder

HEARD_OF_S = 300.0
"""Workers whose last line in the metrics is older than this are not listed."""
TAIL_BYTES = 1 << 18
"""Of the metrics file: a line is about 400 bytes."""


@dataclass(frozen=True)
class Status:
    """How far a job is."""

    folder: str
    finished: bool
    """The success mark is there."""
    num_chunks: int
    num_done: int
    num_rows: int
    num_errors: int
    shards: dict[int, tuple[int, int]]
    """(chunks done, chunks) by number of the shard; as configured now, whatever they were when a chunk was done."""
    num_leased: int
    """Chunks that somebody works on, where workers share them."""
    workers: list[str]
    """A line for each worker that was heard of."""

    @property
    def exit_code(self) -> int:
        """0: the whole job is done and marked so; 75: it is not."""
        return 0 if self.finished else Interrupted.exit_code

    def text(self) -> str:
        """A few lines for a person."""
        share = self.num_done / max(self.num_chunks, 1)
        lines = [
            f"folder    {self.folder}",
            f"chunks    {self.num_done:,} of {self.num_chunks:,} done, {share:.0%}",
            f"rows      {self.num_rows:,} committed, {self.num_errors:,} of them errors",
        ]
        if len(self.shards) > 1:
            left = {index: counts for index, counts in self.shards.items() if counts[0] < counts[1]}
            lines.append(f"shards    {len(self.shards) - len(left):,} of {len(self.shards):,} done")
            lines += [f"          shard {index}: {done:,} of {total:,} chunks" for index, (done, total) in left.items()]
        if self.num_leased:
            lines.append(f"leases    {self.num_leased:,} chunks")
        lines += [f"worker    {line}" for line in self.workers]
        unmarked = "all chunks done, no success mark: run mode=merge" if share == 1 else "not finished"
        lines.append("finished" if self.finished else unmarked)
        return "\n".join(lines)


def status(folder: str, job: JobConfig) -> Status:
    """What is committed and who works on the rest. Changes nothing.

    Raises OutputError if the folder is no job's, InputError if the input cannot be listed.
    """
    ledger = Ledger.existing(folder)
    done, count, total, entered = ledger.done(), job.shard.count, 0, set[int]()
    for chunk in open_source(job.dataset).chunks():
        total += 1
        if chunk.index in done:
            ledger.check(chunk)
            entered.add(chunk.index)
    finished = Counter(index % count for index in entered)
    return Status(
        folder=folder,
        finished=ledger.finished,
        num_chunks=total,
        num_done=len(entered),
        num_rows=sum(part.num_rows for part in done.values()),
        num_errors=sum(part.num_errors for part in done.values()),
        shards={i: (finished[i], len(range(i, total, count))) for i in range(count) if job.shard.sharing == "fixed"},
        num_leased=len(leased(ledger.storage).keys() - entered),
        workers=[] if ledger.finished else _workers(local_folder(folder) / METRICS_FILE),
    )


def merge(folder: str, job: JobConfig) -> Summary:
    """Write the success mark and the manifest of a job whose shards are all done; a second time changes nothing.

    Raises:
        Interrupted: Chunks are missing.
        InputError: The input is not what the chunks were made from.
        OutputError: The folder is no job's, or has parts that nobody committed.
    """
    from runner.job import finish, summarize

    began, ledger = time.monotonic(), Ledger.existing(folder)
    done, missing, total = ledger.done(), 0, 0
    for chunk in open_source(job.dataset).chunks():
        total += 1
        missing += chunk.index not in done
        ledger.check(chunk)
    if missing:
        raise Interrupted(
            f"{folder}: {missing:,} of {total:,} chunks are not done; expected all; run the shards that are left "
            "(mode=status lists them), then merge again"
        )
    summary = summarize(ledger, True, Counts(), began)
    if not ledger.finished:
        finish(job, ledger, total, summary)
    return summary


def _workers(metrics: Path) -> list[str]:
    """The last line of each worker, the slowest first. Times are the workers' own clocks: for people only."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(metrics.stat().st_size - TAIL_BYTES, 0))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return []
    last = {}
    for line in lines:
        try:
            record = orjson.loads(line)
            age_s = (datetime.now().astimezone() - datetime.fromisoformat(record["time"])).total_seconds()
            last[record["worker"] or "alone"] = (record["rows_per_s"], age_s)
        except (ValueError, KeyError, TypeError):  # the line that the tail begins in
            continue
    return [
        f"{name}: {rate:,.1f} rows/s, heard of {duration(max(age_s, 0))} ago"
        for name, (rate, age_s) in sorted(last.items(), key=lambda item: item[1])
        if age_s < HEARD_OF_S
    ]
