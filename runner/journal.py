"""Finished rows of chunks that are not committed yet, so that a kill costs seconds of work and not a chunk.

Each process writes files of its own, `journal/<worker>-<process>-<number>.journal`, of frames one after the other:

    magic (4 bytes) | payload length (u32) | payload checksum (xxh3-64) | payload
    payload: chunk index (u64) | generation (u32) | length of the file id (u16) | file id | Arrow IPC stream

all little-endian, the checksum over the length too. Reading stops at the first frame that is cut short or not as its
checksum says: what comes back is what was written up to there. The journal is only a saving: losing all of it repeats
work and changes no result.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import xxhash

from runner.chunk import ROW_COLUMN, Chunk, Part
from runner.errors import InputError
from runner.storage import JOURNAL_FOLDER, AppendFile, Storage, open_storage

_MAGIC = b"BRJ1"
_HEADER = struct.Struct("<4sIQ")
_PAYLOAD = struct.Struct("<QIH")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Frame:
    """Some finished rows of one chunk."""

    chunk_index: int
    generation: int
    file_id: str
    """Identity of the input file that the rows were read from; "" if the writer did not say."""
    table: pa.Table


@dataclass(slots=True)
class _File:
    """A file of frames, and the chunks whose rows would be lost with it."""

    path: str
    chunks: set[int] = field(default_factory=set)


class Journal:
    """The journal of one process. Get one with `Journal.open`. Not for use by several threads at once."""

    def __init__(self, storage: Storage, schema: pa.Schema, worker: str) -> None:
        self._storage = storage
        self._schema = schema.remove_metadata()
        self._worker = worker
        self.name = f"{worker}-{_process_name()}-{secrets.token_hex(4)}"
        """Of this process, like no other's: begins the names of its files."""
        self._num_files = 0
        self._buffer: dict[tuple[int, int, str], list[pa.Table]] = {}
        self._files: list[_File] = []
        """Own files and those of ended processes: deleted when their chunks are committed."""
        self._current: _File | None = None
        self._appender: AppendFile | None = None
        self._recovered_from: dict[int, str] = {}

    @classmethod
    def open(cls, folder: str | Storage, schema: pa.Schema, worker: str) -> Journal:
        """A journal in a job's output folder.

        Args:
            schema: Of the tables that will be appended: that of a part.
            worker: A name for what this process works on: `rivals` finds others of that name.
        """
        return cls(open_storage(folder) if isinstance(folder, str) else folder, schema, worker)

    def recover(
        self,
        done: Mapping[int, Part] = MappingProxyType({}),
        wanted: Callable[[int], bool] = lambda chunk_index: True,
    ) -> dict[int, pa.Table]:
        """Finished rows of chunks not yet committed, by chunk index, in row order; all journals found are read.

        Rows in two frames are the later frame's. Call it before the first `append`.

        Args:
            done: The committed chunks. Their rows are left out, but for rows of the generation after the committed
                one, which a retry was working on.
            wanted: Whether this process has a use for a chunk's rows; with shards, others keep theirs.
        """
        frames: dict[int, list[Frame]] = {}
        for name in self._storage.list(JOURNAL_FOLDER):
            if not name.endswith(".journal"):
                continue
            file = _File(f"{JOURNAL_FOLDER}/{name}")
            for frame in self._read(file.path):
                part = done.get(frame.chunk_index)
                if frame.generation != (0 if part is None else part.generation + 1):
                    continue
                file.chunks.add(frame.chunk_index)
                if wanted(frame.chunk_index):
                    frames.setdefault(frame.chunk_index, []).append(frame)
            if not may_be_alive(name):
                self._files.append(file)
        self._delete_unused()
        recovered = {}
        for chunk_index, found in frames.items():
            file_id = found[-1].file_id
            self._recovered_from[chunk_index] = file_id
            recovered[chunk_index] = _last_of_each_row([frame.table for frame in found if frame.file_id == file_id])
        return recovered

    def rivals(self) -> list[int]:
        """Processes of this machine that still run and have written a journal for the same worker, by process id."""
        names = self._storage.list(JOURNAL_FOLDER)
        written = {_process_id(name) for name in names if name.startswith(f"{self._worker}-")} - {None, os.getpid()}
        return sorted(pid for pid in written if pid is not None and _is_running(pid))

    def recover_chunk(self, chunk: Chunk, writers: Sequence[str]) -> pa.Table | None:
        """Finished rows of one chunk that was never committed, from the journals of these processes, in row order.

        writers: `Journal.name` of each, in the order that they worked in.
        """
        names = [name for name in self._storage.list(JOURNAL_FOLDER) if name.endswith(".journal")]
        found = [
            frame.table
            for writer in writers
            for name in names
            if name.startswith(f"{writer}-")
            for frame in self._read(f"{JOURNAL_FOLDER}/{name}")
            if (frame.chunk_index, frame.generation, frame.file_id) == (chunk.index, 0, chunk.file_id)
        ]
        return _last_of_each_row(found) if found else None

    def check(self, chunk: Chunk) -> None:
        """Raise InputError if rows were recovered for this chunk that another content of its file gave."""
        file_id = self._recovered_from.get(chunk.index)
        if file_id and file_id != chunk.file_id:
            raise InputError(
                f"{chunk.file}: its content has changed; expected what half-done chunk {chunk.index} was made from; "
                "restore the input, or start a new job (on_change=new or another name)"
            )

    def append(self, chunk_index: int, table: pa.Table, file_id: str = "", generation: int = 0) -> None:
        """Note finished rows; they are safe after the next `sync`. Costs next to nothing until then.

        Args:
            table: Rows of the chunk in any order, in the journal's schema.
            file_id: `Chunk.file_id`, for `check` in a later process.
            generation: Of the part that the rows will be in.
        """
        self._buffer.setdefault((chunk_index, generation, file_id), []).append(table)

    def sync(self) -> None:
        """Write what was appended since the last call, and make it survive a crash of the machine."""
        if not self._buffer:
            return
        appender, current = self._open_file()
        try:
            for (chunk_index, generation, file_id), tables in self._buffer.items():
                appender.append(encode_frame(chunk_index, generation, file_id, pa.concat_tables(tables)))
                current.chunks.add(chunk_index)
            appender.sync()
        except BaseException:
            # What follows a torn frame is not read: go on in a new file.
            self._close_file()
            raise
        self._buffer.clear()
        if appender.size >= self._storage.roll_bytes:
            self._close_file()

    def drop(self, chunk_index: int) -> None:
        """The chunk is committed: its rows may be forgotten."""
        for key in [key for key in self._buffer if key[0] == chunk_index]:
            del self._buffer[key]
        for file in self._files:
            file.chunks.discard(chunk_index)
        if self._current is not None and not self._current.chunks and self._appender and self._appender.size:
            self._close_file()
        self._delete_unused()

    def close(self) -> None:
        """Sync and leave; a later process recovers what is not committed."""
        self.sync()
        self._close_file()
        self._delete_unused()

    def _open_file(self) -> tuple[AppendFile, _File]:
        if self._appender is None or self._current is None:
            path = f"{JOURNAL_FOLDER}/{self.name}-{self._num_files}.journal"
            self._num_files += 1
            self._appender = self._storage.append_to(path)
            self._current = _File(path)
            self._files.append(self._current)
        return self._appender, self._current

    def _close_file(self) -> None:
        if self._appender is not None:
            self._appender.close()
        self._appender = self._current = None

    def _delete_unused(self) -> None:
        for file in [file for file in self._files if not file.chunks and file is not self._current]:
            self._storage.remove(file.path)
            self._files.remove(file)

    def _read(self, path: str) -> Iterator[Frame]:
        for frame in decode_frames(self._storage.read(path) or b""):
            if frame.table.schema.equals(self._schema):
                yield frame
            else:
                _log.warning("%s: rows of another schema are done again", path)


def encode_frame(chunk_index: int, generation: int, file_id: str, table: pa.Table) -> bytes:
    """The bytes of a frame."""
    identity = file_id.encode()
    sink = pa.BufferOutputStream()
    sink.write(_PAYLOAD.pack(chunk_index, generation, len(identity)))
    sink.write(identity)
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as writer:
        writer.write_table(table)
    payload = sink.getvalue().to_pybytes()
    return _HEADER.pack(_MAGIC, len(payload), _checksum(payload)) + payload


def decode_frames(data: bytes) -> Iterator[Frame]:
    """The frames up to the first that is torn or damaged."""
    position = 0
    while position + _HEADER.size <= len(data):
        magic, length, checksum = _HEADER.unpack_from(data, position)
        begin = position + _HEADER.size
        payload = memoryview(data)[begin : begin + length]
        if magic != _MAGIC or len(payload) != length or _checksum(payload) != checksum:
            return
        chunk_index, generation, id_length = _PAYLOAD.unpack_from(payload)
        rows = _PAYLOAD.size + id_length
        with pa.ipc.open_stream(pa.py_buffer(payload[rows:])) as reader:
            table = reader.read_all()
        yield Frame(chunk_index, generation, bytes(payload[_PAYLOAD.size : rows]).decode(), table)
        position = begin + length


def _checksum(payload: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(payload, seed=len(payload))


def _last_of_each_row(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    rows = table.column(ROW_COLUMN).to_numpy()
    _, first = np.unique(rows[::-1], return_index=True)
    return table.take(pa.array(len(rows) - 1 - first))


def _process_name() -> str:
    """Host, process namespace and process id: tells on the same machine whether a journal's writer still runs."""
    return f"{socket.gethostname()}-{_pid_namespace()}-{os.getpid()}"


def _pid_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def may_be_alive(name: str) -> bool:
    """Whether the process of this `Journal.name`, or that wrote a journal of this file name, may still be running.

    Unknown on another machine: then yes.
    """
    pid = _process_id(name)
    return pid is None or _is_running(pid)


def _process_id(name: str) -> int | None:
    """Of the process that has this `Journal.name`, or wrote this journal; None if it was on another machine."""
    head, _, tail = name.partition(f"-{socket.gethostname()}-{_pid_namespace()}-")
    pid = tail.split("-")[0]
    return int(pid) if head and pid.isdigit() else None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
