"""Engines in processes of their own: fed, watched, restarted. To the job they are one engine.

A process that dies or hangs takes no row with it. Its requests are tried again: those that it was computing apart from
all others, in ever smaller groups, until one ends a process when it is alone there. That one gets an error.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import queue
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engines import platform
from engines.api import EngineSettings, EngineStats, ErrorInfo, Outcome, Request
from runner import engine_main
from runner.engine_main import Failure, Loaded, Loader, Report, unpack
from runner.engine_process import Ended, EngineProcess
from runner.errors import EngineError, InputError, InternalError
from runner.parallel import Layout, visible_devices

IN_FLIGHT = 2
"""Requests of a worker among several, as a multiple of its engine's max_num_seqs."""
POLL_S = 0.1
"""Longest wait for a message: the job has other duties."""
LOG_INTERVAL_S = 1.0
MAX_KILLERS_IN_A_ROW = 3
"""So many requests that end a process alone, with no outcome between them: it is not the requests."""
MAX_SHRINKS = 4
"""How often an engine that is killed, as for the memory that it takes, is given half of it."""
MAX_ENDS_IN_LOADING = 3
EXIT_S = 2.0
"""What a process may take to be gone after its connection."""
_COUNTERS = ("num_steps", "num_preemptions", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens")
"""Fields of EngineStats that count from the start of a process."""
_SIZES = ("num_waiting", "num_running", "num_free_blocks", "num_blocks")
_NOTHING = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Supervision:
    """How workers are looked after."""

    step_timeout_s: float
    say: Callable[[str], None]
    """A line for the person and the log."""
    note: Callable[[str], None]
    """Lines for the log."""
    check: Callable[[], None] = lambda: None
    """Raises when it is time to leave; called while an engine is being loaded."""
    loader: Loader = engine_main.load


class Worker:
    """One engine, in one process after the other, and the requests that it has.

    Args:
        name: For messages.
        killers: Prompts that ended a process when they were alone in it, and what to say of them; grows.
        deliver: Called in another thread with this worker, the number of the process, and its message.
    """

    def __init__(
        self,
        name: str,
        settings: EngineSettings,
        supervision: Supervision,
        killers: dict[tuple[int, ...], ErrorInfo],
        deliver: Callable[[tuple[Worker, int, Any]], None],
    ) -> None:
        self.max_model_len: int | None = None
        """None until the engine is loaded for the first time."""
        self.load = 0
        """Tokens that its requests in flight have and may get."""
        self.in_flight: dict[int, Request] = {}
        """In the process, by id, in the order in which they were sent."""
        self.groups: list[list[Request]] = []
        """Suspects: each group is sent when nothing is in flight, the first one first."""
        self.isolating = False
        """Whether what is in flight is one of the groups."""
        self.finished: list[Outcome] = []
        """Not yet fetched."""
        self.handed: list[Request] = []
        """Not yet fetched: what this worker has begun and others are to go on with."""
        self.settled: list[int] = []
        """Not yet fetched: requests, of those that others have begun, that need nothing of these any more."""
        self.role = settings.role
        self.notes: list[str] = []
        self._name, self._settings, self._supervision = name, settings, supervision
        self._killers, self._deliver = killers, deliver
        self._stats = self._before = _NOTHING
        self._killers_in_a_row = self._num_shrinks = self._num_ends_in_loading = self._num_starts = 0
        self._logged = 0.0
        self._allowed = False
        self._process = self._start()

    @property
    def ready(self) -> bool:
        """Whether the present process has its engine."""
        return self._process.ready

    @property
    def room(self) -> int:
        """Requests that it takes besides others: enough that its engine has some waiting, the rest for whoever is
        first."""
        copies = max(1, self._settings.ep // self._settings.tp)
        return IN_FLIGHT * copies * self._settings.config.max_num_seqs - len(self.in_flight)

    @property
    def stats(self) -> EngineStats:
        """Of all its processes so far."""
        counters = {name: getattr(self._stats, name) + getattr(self._before, name) for name in _COUNTERS}
        return replace(self._stats, **counters, notes=(*self.notes, *self._stats.notes))

    @property
    def number(self) -> int:
        """Of the present process."""
        return self._num_starts

    def release(self, number: int, request_ids: Sequence[int]) -> None:
        """The process of that number, if it still lives, may forget what it has handed over of these."""
        if number == self._num_starts:
            self._process.release(request_ids)

    def allow_loading(self) -> None:
        """From now on weights may be loaded; until then the process only imports."""
        self._allowed = True
        self._process.allow_loading()

    def send(self, requests: Sequence[Request]) -> None:
        """Put requests in flight."""
        self.in_flight |= {request.request_id: request for request in requests}
        self.load += sum(map(self.num_tokens, requests))
        self._process.send_requests(requests)

    def num_tokens(self, request: Request) -> int:
        """Tokens that a request has and may get here, as far as it can be known."""
        most = (request.sampling.max_tokens or 0) if request.sampling and self.role != "prefill" else 0
        return most + (len(request.token_ids) if request.begun is None else 0)

    def send_suspects(self) -> None:
        """The next group, if it is time for it."""
        if not self.ready or self.in_flight:
            return
        self._refuse_killers()
        self.isolating = bool(self.groups)
        if not self.groups:
            return
        group = self.groups.pop(0)
        if len(group) > 1 and self._killers_in_a_row:
            # Has the engine a future at all? One request says it soonest.
            self.groups.insert(0, group[1:])
            group = group[:1]
        self.send(group)

    def take(self, number: int, message: Any) -> list[Request]:
        """A message of the process of that number; the requests that are lost with it and under no suspicion.

        Raises EngineError, InputError when there is no going on.
        """
        if number != self._num_starts:
            return []
        if isinstance(message, Loaded):
            self._loaded(message)
        elif isinstance(message, Report):
            self._report(message)
        elif isinstance(message, Failure):
            self._supervision.note(f"{self._name}:\n{message.traceback.rstrip()}")
            if message.loading:
                raise self._load_error(message) from None
            return self._gone(f"failed: {message.message}")
        elif isinstance(message, Ended):
            return self._gone(None)
        return []

    def watch(self) -> list[Request]:
        """To be called a few times a second. Ends a process that hangs; then as `take`."""
        now = time.monotonic()
        if now - self._logged >= LOG_INTERVAL_S:
            self._logged = now
            self._note_output()
        limit = self._supervision.step_timeout_s
        if self._process.silent_s(bool(self.in_flight)) < limit or not self.ready:
            return []
        self._process.write_stacks()
        return self._gone(f"hung: no step ended in {limit:g} s (step_timeout_s)")

    def close(self) -> None:
        self._note_output(last=True)
        self._process.close()

    def _start(self) -> EngineProcess:
        self._logged = time.monotonic()
        self._num_starts += 1
        number = self._num_starts
        process = EngineProcess(
            self._supervision.loader, self._settings, lambda message: self._deliver((self, number, message))
        )
        if self._allowed:
            process.allow_loading()
        return process

    def _loaded(self, message: Loaded) -> None:
        self._process.ready, self.max_model_len, self._stats = True, message.max_model_len, message.stats
        self._num_ends_in_loading = 0
        seconds = time.monotonic() - self._process.allowed
        self._supervision.say(f"{self._name}: {self._settings.model_path} loaded in {seconds:.1f} s")

    def _report(self, report: Report) -> None:
        self._stats = report.stats
        for outcome in unpack(Outcome, report.outcomes):
            request = self.in_flight.pop(outcome.request_id, None)
            if request is None:
                raise InternalError(f"request {outcome.request_id}: an outcome that nobody waits for")
            self.load -= self.num_tokens(request)
            if outcome.finish_reason == "handover":
                self.handed.append(replace(request, begun=outcome))
                continue
            self.finished.append(outcome)
            if request.begun is not None:
                self.settled.append(request.request_id)
        self.settled += report.fetched
        if report.outcomes:
            self._process.has_answered, self._killers_in_a_row = True, 0
        if not report.num_unfinished and report.num_received == self._process.num_sent and self.in_flight:
            raise EngineError(
                f"{self._name}: has nothing left while {len(self.in_flight):,} requests have no outcome; expected one "
                "for each; finished rows are kept: run the same command again to go on"
            )

    def _gone(self, reason: str | None) -> list[Request]:
        """The process has ended, or is ended here: start another one, with its suspects."""
        status = self._process.end(0.0 if reason else EXIT_S)
        killed = reason is None and status == -signal.SIGKILL
        reason = reason or _ending(status)
        if not self.ready:
            self._ended_in_loading(reason, killed)
            return []
        self._note_output(last=True)
        if self._settings.launch != "spawn":
            raise EngineError(
                f"{self._name}: the process {reason}, and with it the ranks that {self._settings.launch} has started; "
                "finished rows are kept: run the same command again to go on"
            )
        self.settled += [request.request_id for request in self.in_flight.values() if request.begun is not None]
        self.in_flight = {number: replace(request, begun=None) for number, request in self.in_flight.items()}
        suspects, others = self._suspects()
        self._supervision.say(
            f"{self._name}: the process {reason}; starting it again"
            + (f", {len(suspects):,} requests are tried apart from the others" if suspects else "")
        )
        if self.isolating and len(suspects) == 1 == len(self.in_flight):
            self._convict(suspects[0], reason)
        elif killed and not self.isolating and self._shrink():
            self.groups = [suspects]
        else:
            first = 1 if not self._process.has_answered else (len(suspects) + 1) // 2
            self.groups = [group for group in (suspects[:first], suspects[first:], *self.groups) if group]
        self.in_flight.clear()
        self.load = 0
        self.isolating = bool(self.groups)
        self._restart()
        return others

    def _suspects(self) -> tuple[list[Request], list[Request]]:
        """Of what is in flight: what the process was computing, and the rest."""
        seen = self._process.trace.read()
        requests = list(self.in_flight.values())
        if seen is None or seen.isdisjoint(self.in_flight):
            return requests, []
        return [r for r in requests if r.request_id in seen], [r for r in requests if r.request_id not in seen]

    def _convict(self, request: Request, reason: str) -> None:
        """A request gets an error, and so will all others of the same prompt."""
        error = ErrorInfo("engine_died", f"alone with this prompt, the engine's process {reason}")
        self._killers[tuple(request.token_ids)] = error
        self.finished.append(_refused(request, error))
        self._killers_in_a_row += 1
        if self._killers_in_a_row >= MAX_KILLERS_IN_A_ROW:
            raise EngineError(
                f"{self._name}: the process {reason}, and so it did with {self._killers_in_a_row} requests one after "
                "the other, each alone; expected an engine that gives any outcome on this machine; see run.log, or "
                "choose another backend; finished rows are kept"
            )

    def _refuse_killers(self) -> None:
        """Give the suspects an error whose prompt ended a process, here or at another worker."""
        if not self._killers:
            return
        groups = []
        for group in self.groups:
            kept, refused = _parted(group, self._killers)
            self.finished += refused
            groups += [kept] if kept else []
        self.groups = groups

    def _shrink(self) -> bool:
        """Give the next process half the memory; False if it has been made small enough."""
        config = self._settings.config
        if self._num_shrinks >= MAX_SHRINKS or config.max_num_batched_tokens < 2:
            return False
        self._num_shrinks += 1
        size = config.kv_cache_bytes
        smaller = replace(
            config,
            max_num_batched_tokens=config.max_num_batched_tokens // 2,
            max_num_seqs=max(1, config.max_num_seqs // 2),
            kv_cache_bytes=None if size is None else max(1, size // 2),
            kv_memory_fraction=config.kv_fraction(self._settings.device == "cpu") / 2,
        )
        self._settings = replace(self._settings, config=smaller)
        pool = f"kv_memory_fraction={smaller.kv_memory_fraction:g}" if size is None else f"kv_cache_bytes={size // 2}"
        self.notes.append(
            f"{self._name}: its process was killed, most likely for its memory: going on with "
            f"max_num_batched_tokens={smaller.max_num_batched_tokens}, max_num_seqs={smaller.max_num_seqs}, {pool}"
        )
        return True

    def _ended_in_loading(self, reason: str, killed: bool) -> None:
        self._note_output(last=True)
        self._num_ends_in_loading += 1
        if self._num_ends_in_loading >= MAX_ENDS_IN_LOADING or not (killed and self._shrink()):
            raise EngineError(
                f"{self._name}: cannot load {self._settings.model_path}: the process {reason}; expected a model that "
                "fits this machine; see run.log and mode=plan, or choose another backend"
            )
        self._supervision.say(f"{self._name}: the process {reason} while it loaded the model; starting it again")
        self._restart()

    def _load_error(self, failure: Failure) -> Exception:
        if failure.kind == "checkpoint":
            return InputError(f"model.path: {failure.message}")
        if failure.kind == "unsupported":
            return EngineError(f"model.path: {failure.message}")
        if failure.kind == "other":
            return InternalError(f"{self._name}: {failure.message}; while the model was loaded; see run.log")
        expected = "" if "; expected " in failure.message else "expected a model that fits this device; "
        return EngineError(
            f"{self._name}: cannot load {self._settings.model_path}: {failure.message}; {expected}see mode=plan, or "
            "choose another backend"
        )

    def _restart(self) -> None:
        stats = self.stats
        # What the engine said of itself holds for its process, and stays in the plan.
        self.notes = list(stats.notes)
        self._before = replace(stats, notes=())
        self._stats = _NOTHING
        self._process.close()
        self._process = self._start()

    def _note_output(self, last: bool = False) -> None:
        if lines := self._process.output(last):
            self._supervision.note("\n".join([f"{self._name}, printed:", *lines]))


class Workers:
    """All workers of a job, as one engine. Satisfies engines.api.Engine once `ready` has returned.

    Args:
        settings: Of each worker.
    """

    def __init__(self, settings: Sequence[EngineSettings], supervision: Supervision) -> None:
        self._messages: queue.SimpleQueue[tuple[Worker, int, Any]] = queue.SimpleQueue()
        self._killers: dict[tuple[int, ...], ErrorInfo] = {}
        self._backlog: deque[Request] = deque()
        """Requests that no process has and that are under no suspicion."""
        self._handed: deque[Request] = deque()
        """Likewise; begun by one worker, for another."""
        self._holders: dict[int, tuple[Worker, int]] = {}
        """By request: who has begun it, in the process of which number, and holds what it has computed."""
        self._finished: list[Outcome] = []
        self._supervision = supervision
        self._workers: list[Worker] = []
        with contextlib.ExitStack() as started:
            for index, each in enumerate(settings):
                name = f"engine {each.backend}" + (f" {index}" if len(settings) > 1 else "")
                name += "" if each.role == "hybrid" else f" ({each.role})"
                worker = Worker(name, each, supervision, self._killers, self._messages.put)
                started.callback(worker.close)
                self._workers.append(worker)
            started.pop_all()

    def ready(self) -> Workers:
        """Have the engines loaded and wait for the first of each role; itself.

        Raises EngineError, InputError when it cannot be.
        """
        for worker in self._workers:
            worker.allow_loading()
        roles = {worker.role for worker in self._workers}
        while {worker.role for worker in self._workers if worker.ready} != roles:
            self._supervision.check()
            self._receive()
        return self

    @property
    def max_model_len(self) -> int:
        return min(worker.max_model_len for worker in self._workers if worker.max_model_len is not None)

    @property
    def num_unfinished(self) -> int:
        held = sum(len(w.in_flight) + len(w.finished) + sum(map(len, w.groups)) for w in self._workers)
        handed = len(self._handed) + sum(len(worker.handed) for worker in self._workers)
        return held + handed + len(self._backlog) + len(self._finished)

    def submit(self, requests: Sequence[Request]) -> None:
        kept, refused = _parted(requests, self._killers)
        self._backlog += kept
        self._finished += refused
        self._dispatch()

    def step(self) -> list[Outcome]:
        """What came back; waits a moment for it if nothing has."""
        if not self.num_unfinished:
            return []
        self._dispatch()
        if not self._finished:
            self._receive()
            self._dispatch()
        finished, self._finished = self._finished, []
        for worker in self._workers:
            finished += worker.finished
            worker.finished = []
        return finished

    def _receive(self) -> None:
        """Take what has come, or comes within POLL_S."""
        num_killers, num_waiting = len(self._killers), len(self._backlog)
        for worker, number, message in self._arrived():
            self._backlog.extendleft(reversed(worker.take(number, message)))
        for worker in self._workers:
            self._backlog.extendleft(reversed(worker.watch()))
        self._pass_on()
        if len(self._killers) > num_killers or len(self._backlog) > num_waiting:
            for waiting in (self._backlog, self._handed):
                kept, refused = _parted(waiting, self._killers)
                waiting.clear()
                waiting += kept
                self._finished += refused
                self._release(outcome.request_id for outcome in refused)

    def _pass_on(self) -> None:
        """What workers have begun goes to the queue for others; what these need no more is released."""
        for worker in self._workers:
            self._handed += worker.handed
            self._holders |= {request.request_id: (worker, worker.number) for request in worker.handed}
            worker.handed = []
        for worker in self._workers:
            self._release(worker.settled)
            worker.settled = []

    def _release(self, request_ids: Iterable[int]) -> None:
        """Nobody will read what is held of these, if anything is."""
        held: dict[tuple[Worker, int], list[int]] = {}
        for request_id in request_ids:
            if request_id in self._holders:
                held.setdefault(self._holders.pop(request_id), []).append(request_id)
        for (worker, number), ids in held.items():
            worker.release(number, ids)

    def _arrived(self) -> Iterator[tuple[Worker, int, Any]]:
        with contextlib.suppress(queue.Empty):
            yield self._messages.get(timeout=POLL_S)
            while True:
                yield self._messages.get_nowait()

    def _dispatch(self) -> None:
        """Give waiting requests to the workers that can take them, each to the one with the least to do."""
        for worker in self._workers:
            worker.send_suspects()
        able = [worker for worker in self._workers if worker.ready and not worker.isolating]
        self._share(self._backlog, [worker for worker in able if worker.role != "decode"])
        self._share(self._handed, [worker for worker in able if worker.role == "decode"])

    def _share(self, waiting: deque[Request], able: Sequence[Worker]) -> None:
        if not able or not waiting:
            return
        if len(self._workers) == 1:
            able[0].send(list(waiting))
            waiting.clear()
            return
        shares: list[list[Request]] = [[] for _ in able]
        idle = [(worker.load, index) for index, worker in enumerate(able) if worker.room > 0]
        heapq.heapify(idle)
        while waiting and idle:
            load, index = heapq.heappop(idle)
            request = waiting.popleft()
            shares[index].append(request)
            if len(shares[index]) < able[index].room:
                heapq.heappush(idle, (load + able[index].num_tokens(request), index))
        for worker, share in zip(able, shares, strict=True):
            if share:
                worker.send(share)

    def stats(self) -> EngineStats:
        """Sums over the workers."""
        each = [worker.stats for worker in self._workers]
        sums = {name: sum(getattr(stats, name) for stats in each) for name in (*_SIZES, *_COUNTERS)}
        return EngineStats(**sums, notes=tuple(note for stats in each for note in stats.notes))

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


def each_worker(settings: EngineSettings, layout: Layout, device: str) -> list[EngineSettings]:
    """The settings of each engine of a job: its role; on accelerators, which ones it has; on one processor, each rank's
    share of its threads and of the memory for the cache.

    device: the host's, as configurations call it.
    """
    if layout.num_devices == 1 or settings.launch != "spawn":
        return [settings]
    if settings.device != "cpu":
        visible = platform.platforms()[device].visible
        seen = os.environ.get(visible)
        names = {engine: visible_devices(layout.devices(engine), seen) for engine in range(layout.num_engines)}
        return [replace(settings, role=layout.role(n), environment={visible: own}) for n, own in names.items()]
    config, ranks = settings.config, layout.num_devices
    size = config.kv_cache_bytes
    share: dict[str, Any] = {
        "kv_cache_bytes": None if size is None else max(1, size // ranks),
        "kv_memory_fraction": config.kv_fraction(on_cpu=True) / ranks,
    }
    if hasattr(config, "num_threads"):
        share["num_threads"] = max(1, (config.num_threads or platform.num_cores()) // ranks)
    shared = replace(settings, config=replace(config, **share))
    return [replace(shared, role=layout.role(engine)) for engine in range(layout.num_engines)]


def _ending(status: int) -> str:
    """How a process ended, as what follows "the process"."""
    if status == -signal.SIGKILL:
        return "was killed by the system (SIGKILL), most likely for the memory that it took"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit code {status}"


def _parted(
    requests: Iterable[Request], killers: Mapping[tuple[int, ...], ErrorInfo]
) -> tuple[list[Request], list[Outcome]]:
    """The requests whose prompt is none of the killers, and errors for the others."""
    if not killers:
        return list(requests), []
    kept, refused = [], []
    for request in requests:
        error = killers.get(tuple(request.token_ids))
        if error is None:
            kept.append(request)
        else:
            refused.append(_refused(request, error))
    return kept, refused


def _refused(request: Request, error: ErrorInfo) -> Outcome:
    return Outcome(request.request_id, "error", error=error)
