"""Runs a job: `run` is the flow from a plan to committed parts, the rest of this file its steps.

    source -> task -> engine -> open chunks -> journal, sink -> ledger

The engine holds about `window_rows` rows; whatever order it finishes them in, a chunk is committed in input order.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engines.api import Engine, EngineStats, Outcome, Request
from engines.checkpoint import open_checkpoint
from runner.chunk import Chunk, Part
from runner.config import JobConfig, ShardConfig, to_yaml
from runner.disk import check_room
from runner.engine_main import Loader, load
from runner.env import installed
from runner.errors import EngineError, InputError, InternalError, RowError, RunnerError
from runner.inspect import UNKNOWN_LENGTH, check_columns
from runner.journal import Journal
from runner.leases import Leases
from runner.ledger import Ledger
from runner.openai_batch import OUTPUT_FILE, write_batch_files
from runner.progress import Counts, Progress, Summary
from runner.prompt import load_tokenizer
from runner.secrets import mask, mask_tree
from runner.sink import Sink
from runner.source import Source, open_source
from runner.stop import ErrorLimit, Stop
from runner.storage import local_folder
from runner.tasks import build_task
from runner.window import CODE_COLUMN, Layout, OpenChunk, Result, without
from runner.workers import Supervision, Workers, each_worker

if TYPE_CHECKING:
    from runner.plan import Plan

PIECE_ROWS = 1024
"""Most rows that become requests at once."""
TABLE_ROWS = 4096
"""Finished rows of a chunk that become a table without waiting for the journal's interval."""
MADE_BY = ("batch-inference-runner", "torch", "transformers", "tokenizers", "pyarrow")
"""Packages whose versions are in the metadata of parts."""
COUNTING_S = 2.0
"""Longest time to find out how many rows the input has, for the progress; beyond it the job starts without knowing."""

IDLE_S = 0.05
"""Between two looks for work, while other workers hold all that is left."""

Piece = tuple[OpenChunk, int]
"""A chunk and the first row of the piece."""
LoadEngine = Callable[[], Engine]
Amend = Callable[[Sequence[str]], None]


def run(plan: Plan, engine: Engine | None = None, loader: Loader = load) -> Summary:
    """Do a job, or go on with it, up to the last row.

    Args:
        engine: Given by tests and benchmarks, and left open; null: the plan's, in a process of its own, loaded when
            there is a row for it.
        loader: What makes the engine in that process.

    Raises:
        ConfigError, InputError, OutputError: Before any weight is loaded, where that can be known.
        EngineError: The engine could not be loaded or failed; finished rows are kept.
        TooManyErrors: As max_error_rate and max_consecutive_errors say; finished rows are kept.
        Interrupted: By a signal or max_runtime_s; finished rows are kept.
    """
    began, job = time.monotonic(), plan.job
    source = open_source(job.dataset)
    checkpoint = open_checkpoint(plan.settings.model_path)
    tokenizer = load_tokenizer(checkpoint.path)
    task = build_task(job, checkpoint, tokenizer, plan.settings.config.max_model_len or UNKNOWN_LENGTH)
    check_columns(job, task, source)
    layout = Layout(job, source.schema, task)
    ledger = Ledger.open(plan.output_folder, plan.fingerprint, job.on_change, lambda ledger: fits(source, ledger))
    if ledger.finished and not job.retry_errors:
        check_input(source, ledger)
        if ledger.storage.size(OUTPUT_FILE) is None:
            write_batch(job, ledger)
        print(mask(f"{job.name}: finished already, nothing to do: {ledger.folder}"), file=sys.stderr, flush=True)
        return summarize(ledger, True, Counts(), began)
    with (
        contextlib.closing(Progress(local_folder(ledger.folder), worker_label(job.shard))) as progress,
        Stop(job, began) as stop,
    ):
        save_plan(plan, ledger)
        for name, new in layout.renamed.items():
            progress.say(f"dataset: column {name!r} is in the output as {new!r}, as the task has one of that name")
        progress.total_rows = count_rows(source, job, ledger)
        check_room(ledger.folder, layout.schema, progress.total_rows)
        sink = Sink(ledger.storage, layout.schema, job.output, provenance(plan))
        with contextlib.closing(Journal.open(ledger.storage, layout.schema, f"shard{job.shard.index}")) as journal:
            runner = JobRunner(job, source, layout, ledger, sink, journal, progress, stop)
            with open_engine(plan, engine, loader, progress, stop) as load_engine:
                runner.run(load_engine, lambda notes: save_plan(plan, ledger, notes))
        finished = set(range(runner.num_chunks)) <= ledger.done().keys()
        summary = summarize(ledger, finished, runner.counts, began)
        if finished and (job.retry_errors or not ledger.finished):
            finish(job, ledger, runner.num_chunks, summary)
        progress.say(summary.text())
        return summary


def check_input(source: Source, ledger: Ledger) -> None:
    """Raises InputError when the input is not the one that the committed chunks were made from."""
    source.check_unchanged({p.chunk.file: p.chunk.file_id for p in ledger.done().values()}, ledger.finished)


def fits(source: Source, ledger: Ledger) -> bool:
    """What check_input says, as an answer."""
    try:
        check_input(source, ledger)
    except InputError:
        return False
    return True


def finish(job: JobConfig, ledger: Ledger, num_chunks: int, summary: Summary) -> None:
    """What is due once every chunk is committed, by whoever committed the last one or by mode=merge."""
    write_batch(job, ledger)
    ledger.finish(num_chunks, summary.to_dict())


def worker_label(shard: ShardConfig) -> str:
    """What this process is called where others write to the same log; nothing if it is alone."""
    if shard.sharing == "leases":
        return f"worker {socket.gethostname()}:{os.getpid()}"
    return f"shard {shard.index}" if shard.count > 1 else ""


def summarize(ledger: Ledger, finished: bool, counts: Counts, began: float) -> Summary:
    """began: on the monotonic clock."""
    parts = ledger.done().values()
    return Summary(
        folder=ledger.folder,
        finished=finished,
        num_rows=sum(part.num_rows for part in parts),
        num_errors=sum(part.num_errors for part in parts),
        time_s=time.monotonic() - began,
        counts=counts,
    )


def write_batch(job: JobConfig, ledger: Ledger) -> None:
    """Make the result file in the format of OpenAI batches, where the job asks for one."""
    if job.output.format == "openai_batch":
        write_batch_files(ledger, job.model.path)


def save_plan(plan: Plan, ledger: Ledger, amendments: Sequence[str] = ()) -> None:
    """Put plan.json and config.yaml next to the results.

    amendments: How the engine had to depart from the plan, a sentence each.
    """
    options = orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY
    content = plan.to_dict() | ({"amendments": list(amendments)} if amendments else {})
    ledger.storage.replace("plan.json", orjson.dumps(content, option=options))
    ledger.storage.replace("config.yaml", to_yaml(plan.job).encode())


def provenance(plan: Plan) -> dict[str, str]:
    """What made a part, for its metadata: job, fingerprint, and as JSON what ran and the versions of it."""
    settings = plan.settings
    ran = {
        "model": plan.job.model.path,
        "architecture": plan.architecture,
        "implementation": settings.implementation,
        "engine": settings.backend,
        "dtype": settings.dtype,
        "device": plan.host.device_name,
    }
    texts = {
        "plan": ran,
        "fingerprint": dict(plan.fingerprint),
        "versions": {name: installed(name) for name in MADE_BY},
    }
    return {"job": plan.job.name} | {key: orjson.dumps(mask_tree(value)).decode() for key, value in texts.items()}


def count_rows(source: Source, job: JobConfig, ledger: Ledger) -> int | None:
    """Rows of the input that this process is to read; None if listing the chunks takes long."""
    if job.shard.sharing == "leases":
        return None  # nobody knows
    began, done, total = time.monotonic(), ledger.done(), 0
    for chunk in source.chunks():
        if time.monotonic() - began > COUNTING_S:
            return None
        if is_wanted(job, chunk.index, done.get(chunk.index)):
            total += chunk.num_rows
    return total


def is_wanted(job: JobConfig, chunk_index: int, part: Part | None) -> bool:
    """Whether this process has to do something for a chunk. part: what is committed of it."""
    if chunk_index % job.shard.count != job.shard.index:
        return False
    return part is None or (job.retry_errors and part.num_errors > 0)


@contextlib.contextmanager
def open_engine(
    plan: Plan, engine: Engine | None, loader: Loader, progress: Progress, stop: Stop
) -> Iterator[LoadEngine]:
    """What gives the engine when it is first asked for. Its process makes ready for loading meanwhile."""
    if engine is not None:
        yield lambda: engine
        return
    supervision = Supervision(plan.job.step_timeout_s, progress.say, progress.note, stop.check, loader)
    with contextlib.closing(Workers(each_worker(plan.settings, plan.layout, plan.host.device), supervision)) as workers:
        yield workers.ready


class JobRunner:
    """The loop: rows in, outcomes out, chunks committed as they are complete."""

    def __init__(
        self,
        job: JobConfig,
        source: Source,
        layout: Layout,
        ledger: Ledger,
        sink: Sink,
        journal: Journal,
        progress: Progress,
        stop: Stop,
    ) -> None:
        self.counts = Counts()
        self.num_chunks = 0
        """Of the whole input; known when the loop has ended."""
        self._job, self._source, self._layout, self._ledger = job, source, layout, ledger
        self._sink, self._journal, self._progress, self._stop = sink, journal, progress, stop
        self._limit = ErrorLimit(job)
        self._open: dict[int, OpenChunk] = {}
        self._pending: dict[int, Row] = {}
        """By request id: the rows in the engine."""
        self._next_id = 0
        self._num_in_engine = 0
        """Rows."""
        self._num_held = 0
        """Rows of the open chunks."""
        self._num_read = 0
        """Input rows that are behind us; those that were filtered away or recovered count when their chunk is done."""
        self._exhausted = False
        """Whether all chunks have been read."""
        self._leases: Leases | None = None
        self._is_shared = False
        """Whether another process was seen at work on this shard."""
        self._stats: EngineStats | None = None
        self._last_sync = time.monotonic()
        window = job.window_rows
        self._piece_rows = max(1, min(PIECE_ROWS, window // 4))
        # One long row keeps its chunk open while others pass by: their finished rows wait in memory, up to this many.
        self._max_held = 4 * window + 4 * job.dataset.chunk_rows
        self._pieces: Iterator[Piece | None] = (
            self._read_leased() if job.shard.sharing == "leases" else self._read_fixed()
        )

    def run(self, load: LoadEngine, amend: Amend) -> None:
        """Process all chunks of this shard. Whatever ends it, finished rows are in the journal when it returns.

        amend: Called with all the engine's notes when there are new ones.
        """
        engine: Engine | None = None
        self._progress.start()
        try:
            while True:
                requests = self._refill()
                if self._exhausted and not self._num_in_engine:
                    return
                self._stop.check()
                if self._num_in_engine:
                    engine = engine or load()
                    self._take(self._step(engine, requests))
                    self._note(engine.stats(), amend)
                elif self._leases is not None:
                    time.sleep(IDLE_S)
                if time.monotonic() - self._last_sync >= self._job.output.journal_interval_s:
                    self._save()
                self._progress.update(self.counts, self._num_read, self._stats)
        except BaseException:
            self._save()
            raise
        finally:
            if self._leases is not None:
                self._leases.close()
            self._progress.stop(self.counts, self._num_read, self._stats)

    def _refill(self) -> list[Request]:
        """Requests of the next rows, as many as there is room for."""
        requests: list[Request] = []
        num_rows = 0  # refused rows take no room in the engine: they must not keep the loop from its other duties
        while num_rows < self._job.window_rows and (
            not self._num_in_engine
            or (self._num_in_engine + self._piece_rows <= self._job.window_rows and self._num_held <= self._max_held)
        ):
            piece = next(self._pieces, None)
            if piece is None:
                break
            requests += self._prepare(*piece)
            num_rows += self._piece_rows
        return requests

    def _read_fixed(self) -> Iterator[Piece]:
        """The chunks of this shard, opened one after the other, cut into pieces."""
        if rivals := self._journal.rivals():
            self._say_shared(f"process {rivals[0]} of this machine works on it too")
        done = self._ledger.done()
        recovered = self._journal.recover(done, lambda index: is_wanted(self._job, index, done.get(index)))
        for chunk in self._source.chunks():
            self.num_chunks += 1
            self._ledger.check(chunk)
            self._journal.check(chunk)
            part = done.get(chunk.index)
            if is_wanted(self._job, chunk.index, part):
                yield from self._cut(self._open_chunk(chunk, part, recovered.pop(chunk.index, None)))
        self._exhausted = True

    def _read_leased(self) -> Iterator[Piece | None]:
        """The chunks that this worker gets, as _read_fixed; None while others hold all that are left."""
        self._ledger.refresh()
        chunks = []
        for chunk in self._source.chunks():
            self._ledger.check(chunk)
            chunks.append(chunk)
        self.num_chunks = len(chunks)
        leases = self._leases = Leases(self._ledger, self._journal.name, chunks, self._job.shard)
        while not leases.finished:
            taken = leases.take()
            if taken is None:
                yield None
            else:
                recovered = self._journal.recover_chunk(taken.chunk, taken.holders)
                yield from self._cut(self._open_chunk(taken.chunk, None, recovered))
        self._exhausted = True

    def _cut(self, opened: OpenChunk) -> Iterator[Piece]:
        if not opened.num_left:
            self._commit(opened)
        for begin in range(0, opened.batch.num_rows, self._piece_rows):
            yield opened, begin

    def _open_chunk(self, chunk: Chunk, part: Part | None, recovered: pa.Table | None) -> OpenChunk:
        finished = [] if recovered is None else [recovered]
        if part is not None:
            with self._ledger.storage.open(part.path) as stream:
                table = pq.read_table(stream, use_threads=False).replace_schema_metadata(None)
            finished.append(table.cast(self._layout.schema))
        if self._job.retry_errors:
            finished = [table.filter(pc.is_null(table.column(CODE_COLUMN))) for table in finished]
        rows = pa.concat_tables(finished) if finished else None
        batch = without(self._source.read(chunk, self._layout.columns), rows)
        opened = OpenChunk(chunk, self._layout, batch, rows, 0 if part is None else part.generation + 1)
        self._open[chunk.index] = opened
        self._num_held += batch.num_rows
        return opened

    def _prepare(self, opened: OpenChunk, begin: int) -> list[Request]:
        """Requests of a piece. Rows that cannot become requests have their result at once."""
        batch = opened.batch.slice(begin, self._piece_rows)
        requests: list[Request] = []
        first_id = self._next_id
        rows = self._layout.task.requests(batch, opened.chunk.file_id, first_id)
        for place, made in enumerate(rows, begin):
            if isinstance(made, RowError):
                self._limit.refused(made)
                self._record(opened, place, made)
                continue
            self._limit.accepted()
            row = Row(opened, place, len(made))
            for request in made:
                self._pending[request.request_id] = row
            requests += made
            self._num_in_engine += 1
        self._next_id = first_id + batch.num_rows * self._job.samples
        if requests:
            self._next_id = max(self._next_id, requests[-1].request_id + 1)
        self._limit.check()
        self._settle(opened)
        return requests

    def _step(self, engine: Engine, requests: Sequence[Request]) -> list[Outcome]:
        """One step of the engine; what it raises is not about a row."""
        try:
            if requests:
                engine.submit(requests)
            outcomes = engine.step()
            lost = not outcomes and not engine.num_unfinished
        except RunnerError:
            raise
        except Exception as error:
            raise EngineError(
                f"engine: {type(error).__name__}: {error}; expected an outcome for each row; finished rows are kept: "
                "run the same command again to go on"
            ) from error
        if lost and self._pending:
            raise EngineError(
                f"engine: has nothing left while {len(self._pending):,} requests have no outcome; expected one for "
                "each; finished rows are kept: run the same command again to go on"
            )
        return outcomes

    def _note(self, stats: EngineStats, amend: Amend) -> None:
        known = () if self._stats is None else self._stats.notes
        self._stats = stats
        if stats.notes != known:
            for note in stats.notes[len(known) :]:
                self._progress.say(f"plan amended: {note}")
            amend(stats.notes)

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        """Put outcomes where they belong, and commit the chunks that are complete with them."""
        counts, pending, touched = self.counts, self._pending, {}
        for outcome in outcomes:
            row = pending.pop(outcome.request_id, None)
            if row is None:
                raise InternalError(f"request {outcome.request_id}: an outcome that nobody waits for")
            counts.num_prompt_tokens += outcome.num_prompt_tokens
            counts.num_cached_tokens += outcome.num_cached_tokens
            counts.num_output_tokens += len(outcome.token_ids)
            row.outcomes.append(outcome)
            if len(row.outcomes) == row.num_requests:
                self._num_in_engine -= 1
                result = row.result()
                self._limit.returned(result)
                self._record(row.opened, row.place, result)
                touched[row.opened.chunk.index] = row.opened
        self._limit.check()
        for opened in touched.values():
            self._settle(opened)

    def _record(self, opened: OpenChunk, place: int, result: Result) -> None:
        opened.add(place, result)
        self.counts.num_rows += 1
        self._num_read += 1
        if isinstance(result, RowError):
            self.counts.errors[result.code] += 1

    def _settle(self, opened: OpenChunk) -> None:
        """What is due for a chunk after some of its rows were finished."""
        if not opened.num_left:
            self._commit(opened)
        elif opened.num_buffered >= TABLE_ROWS:
            self._to_journal(opened)

    def _commit(self, opened: OpenChunk) -> None:
        self._to_journal(opened)  # it writes nothing yet, and has the rows if the part cannot be written
        part = self._sink.write(opened.chunk, opened.table(), opened.num_errors, opened.generation)
        if not self._ledger.commit(part) and self._leases is None:
            self._say_shared(f"another process has committed chunk {opened.chunk.index} meanwhile")
        self._journal.drop(opened.chunk.index)
        if self._leases is not None:
            self._leases.committed(opened.chunk.index)
        del self._open[opened.chunk.index]
        self._num_held -= opened.batch.num_rows
        self._num_read += opened.chunk.num_rows - opened.batch.num_rows

    def _say_shared(self, found: str) -> None:
        """Say once that this shard is another process's too."""
        if not self._is_shared:
            shard, self._is_shared = self._job.shard, True
            self._progress.say(
                f"shard {shard.index} of {shard.count}: {found}; expected one process for a shard, as rows that two "
                "compute count once and cost twice; end one of them, or start both with shard.sharing=leases"
            )

    def _to_journal(self, opened: OpenChunk) -> None:
        table = opened.flush()
        if table is not None:
            self._journal.append(opened.chunk.index, table, opened.chunk.file_id, opened.generation)

    def _save(self) -> None:
        """Bring all finished rows of open chunks into the journal."""
        for opened in self._open.values():
            self._to_journal(opened)
        self._journal.sync()
        self._last_sync = time.monotonic()


class Row:
    """A row in the engine."""

    __slots__ = ("num_requests", "opened", "outcomes", "place")

    def __init__(self, opened: OpenChunk, place: int, num_requests: int) -> None:
        self.opened = opened
        self.place = place
        self.num_requests = num_requests
        self.outcomes: list[Outcome] = []

    def result(self) -> Result:
        """The outcomes in the order of their requests, or the error of the first one that has one."""
        if self.num_requests > 1:
            self.outcomes.sort(key=lambda outcome: outcome.request_id)
        for outcome in self.outcomes:
            if outcome.error is not None:
                return RowError(outcome.error.code, outcome.error.message)
        return self.outcomes
