"""Who works on which chunk, where workers share a job as they go: no server, no lock, no common clock.

    leases/<chunk>.<turn>      made by exclusive create: the worker that has the chunk in this turn; the first is turn 0
    leases/<worker>.worker     replaced by its worker again and again with the next number, or with `left` at its end
    leases/seen                a bit for each chunk that a worker found committed, so that not all list the ledger

A worker takes a chunk by making the file of its turn, commits it, and removes it. A lease is lost when its worker has
left, has died on this machine, or has shown the same number for `shard.lease_s` of the observer's own monotonic clock;
then whoever makes the file of the next turn has the chunk, with what the journals of the earlier holders have of it.

A lease saves work and decides nothing: the ledger's exclusive create of the chunk's entry does. A worker that was
paused and wakes up goes on as if nothing had happened, and either its commit is the first or it changes nothing; a
wrong guess about who is alive costs a chunk computed twice. The order matters in two places: a worker's own file is
there before any lease of it, and a lease is removed only when the chunk has an entry. So whoever makes the file of any
turn and then finds no entry is alone with the chunk, or among holders who were taken for dead.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from runner.chunk import Chunk
from runner.config import ShardConfig
from runner.errors import RunnerError
from runner.journal import may_be_alive
from runner.ledger import Ledger
from runner.storage import LEASES_FOLDER, Storage

WORKER_SUFFIX = ".worker"
SEEN_FILE = f"{LEASES_FOLDER}/seen"
LEFT = b"left"
"""In a worker's file: it has ended in order, and what it held is free."""
MAX_CANDIDATES = 256
"""Chunks that a worker keeps in mind to be tried."""
MAX_MISSES = 8
"""Chunks in a row that turn out to be another's: then what was known of the folder is too old."""
MOST_BETWEEN_LOOKS_S = 2.0


@dataclass(frozen=True, slots=True)
class Taken:
    """A chunk that this worker now has the lease of."""

    chunk: Chunk
    holders: tuple[str, ...]
    """Names of the workers that held it before, in the order of their turns: their journals may have rows of it."""


@dataclass(slots=True)
class _Seen:
    """What another worker's file was found to be."""

    content: bytes | None
    since: float
    """When it was first found so, on this worker's monotonic clock."""
    last: float
    """When it was last looked at."""


class Leases:
    """The leases of one worker; close it. A thread keeps them alive.

    Args:
        worker: A name that no other process ever has, as `Journal.name`.
        chunks: Of the whole input, in order.
        shard: Chunks with number % count == index are taken first, then those that nobody holds.
    """

    def __init__(
        self,
        ledger: Ledger,
        worker: str,
        chunks: Sequence[Chunk],
        shard: ShardConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.finished = False
        """Whether every chunk was committed when the folder was last looked at."""
        self._ledger, self._storage, self._chunks, self._shard = ledger, ledger.storage, chunks, shard
        self._worker, self._clock = worker, clock
        self._held: dict[int, int] = {}
        """Turn of each chunk that this worker works on."""
        self._done = np.zeros(len(chunks), bool)
        """Chunks that are known to be committed."""
        self._done[[index for index in ledger.done() if index < len(chunks)]] = True
        self._seen_file = self._storage.read(SEEN_FILE)
        """As it was when it was last looked at; what is there from an earlier run is never believed."""
        self._candidates: deque[tuple[int, int]] = deque()
        """Chunk and turn to be tried, as the folder was when it was last looked at."""
        self._next_look = clock()
        self._between_looks_s = min(shard.lease_s / 4, MOST_BETWEEN_LOOKS_S)
        self._seen: dict[str, _Seen] = {}
        self._holders: dict[str, str] = {}
        """Worker by name of the lease: it never changes."""
        self._beat(0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="leases", daemon=True)
        self._thread.start()

    def take(self) -> Taken | None:
        """A chunk for this worker, or None while others hold all that are left. Cheap to ask again and again."""
        misses = 0
        while True:
            if not self._candidates:
                if self.finished or self._clock() < self._next_look:
                    return None
                self._look()
                if not self._candidates:
                    return None
            index, turn = self._candidates.popleft()
            if self._try(index, turn):
                earlier = (self._holder(f"{index:08d}.{number}") for number in range(turn))
                return Taken(self._chunks[index], tuple(name for name in earlier if name is not None))
            misses += 1
            if misses >= MAX_MISSES:
                misses = 0
                self._candidates.clear()
                self._next_look = self._clock()

    def committed(self, chunk_index: int) -> None:
        """The chunk has its entry in the ledger: its lease is not needed any more, nor those of earlier holders."""
        self._done[chunk_index] = True
        for turn in range(self._held.pop(chunk_index) + 1):
            self._storage.remove(f"{LEASES_FOLDER}/{chunk_index:08d}.{turn}")

    def close(self) -> None:
        """Leave: chunks that are not committed are free for others, who find the finished rows in the journal."""
        self._stop.set()
        self._thread.join()
        path = f"{LEASES_FOLDER}/{self._worker}{WORKER_SUFFIX}"
        if self._held or not self.finished:
            self._storage.replace(path, LEFT)
        else:
            self._storage.remove(path)
            self._storage.remove(SEEN_FILE)

    def _try(self, index: int, turn: int) -> bool:
        """Take a chunk; False if another has it or has committed it."""
        path = f"{LEASES_FOLDER}/{index:08d}.{turn}"
        if index in self._held or not self._storage.create(path, self._worker.encode()):
            return False
        if self._ledger.is_entered(index):  # committed since, and its lease removed
            self._done[index] = True
            self._storage.remove(path)
            return False
        self._held[index] = turn
        return True

    def _look(self) -> None:
        """Find out what is left to do, and what of it this worker may try."""
        self._next_look = self._clock() + self._between_looks_s
        self._refresh()
        self.finished = bool(self._done.all())
        turns = {index: turn for index, turn in leased(self._storage).items() if index < len(self._done)}
        is_free = ~self._done
        is_free[list(turns)] = False
        self._candidates.extend((index, 0) for index in self._in_order(np.flatnonzero(is_free)))
        if not self._candidates:
            others = [i for i in turns.items() if not self._done[i[0]] and i[0] not in self._held]
            lost = [(index, turn + 1) for index, turn in others if self._is_lost(index, turn)]
            start = secrets.randbelow(len(lost)) if lost else 0
            self._candidates.extend((lost[start:] + lost[:start])[:MAX_CANDIDATES])

    def _refresh(self) -> None:
        """Learn what is committed: from another worker, if one has listed the ledger since this one last asked.

        Entries are never removed while a job runs, so that what was seen once may be old but never wrong.
        """
        seen = self._storage.read(SEEN_FILE)
        if seen is None or seen == self._seen_file or len(seen) != -(-len(self._done) // 8):
            entered = self._ledger.entered()
            self._done[[index for index in entered if index < len(self._done)]] = True
            seen = np.packbits(self._done).tobytes()
            self._storage.replace(SEEN_FILE, seen)
        self._seen_file = seen
        self._done |= np.unpackbits(np.frombuffer(seen, np.uint8), count=len(self._done)).astype(bool)

    def _in_order(self, free: npt.NDArray[np.int64]) -> list[int]:
        """This worker's shard as it comes, then the rest, each worker from another place on."""
        shard = self._shard
        is_own = free % shard.count == shard.index if shard.count > 1 else np.zeros(len(free), bool)
        own, rest = free[is_own][:MAX_CANDIDATES].tolist(), free[~is_own]
        start = secrets.randbelow(len(rest)) if len(rest) else 0
        return (own + np.roll(rest, -start)[:MAX_CANDIDATES].tolist())[:MAX_CANDIDATES]

    def _is_lost(self, index: int, turn: int) -> bool:
        """Whether the worker that holds a chunk has left, or is not to be reckoned with any more."""
        holder = self._holder(f"{index:08d}.{turn}")
        if holder is None:  # removed since: it is committed
            return False
        content, now = self._storage.read(f"{LEASES_FOLDER}/{holder}{WORKER_SUFFIX}"), self._clock()
        if content == LEFT or not may_be_alive(holder):
            return True
        seen = self._seen.get(holder)
        # A time in which this worker itself did not look, as it may have been paused too, says nothing about others.
        if seen is None or seen.content != content or now - seen.last > self._shard.lease_s / 2:
            self._seen[holder] = _Seen(content, now, now)
            return False
        seen.last = now
        return now - seen.since >= self._shard.lease_s

    def _holder(self, name: str) -> str | None:
        if name not in self._holders:
            data = self._storage.read(f"{LEASES_FOLDER}/{name}")
            if data is None:
                return None
            self._holders[name] = data.decode()
        return self._holders[name]

    def _keep_alive(self) -> None:
        number = 0
        while not self._stop.wait(self._shard.lease_s / 4):
            number += 1
            try:
                self._beat(number)
            except RunnerError:
                # What is not written looks to others as if this worker were dead, which costs work and harms nothing;
                # if the folder is gone for good, the job's next write says so.
                continue

    def _beat(self, number: int) -> None:
        self._storage.replace(f"{LEASES_FOLDER}/{self._worker}{WORKER_SUFFIX}", str(number).encode())


def leased(storage: Storage) -> dict[int, int]:
    """Newest turn of each chunk that has a lease; it may be committed since."""
    turns: dict[int, int] = {}
    for name in storage.list(LEASES_FOLDER):
        chunk, _, turn = name.partition(".")
        if turn.isdigit():
            turns[int(chunk)] = max(int(turn), turns.get(int(chunk), 0))
    return turns
