"""What is committed. A job's output folder, and the protocol that makes its output exactly-once:

    fingerprint.json              what the job is; made by the first process that opens the folder
    staging/                      unfinished files, which no reader looks at
    ledger/<chunk>.json           the commit of a chunk; `<chunk>.<n>.json` that of its n-th retry
    ledger/rollup-*.jsonl         copies of many entries in one file, to be read faster; never the authority
    parts/part-<chunk>.parquet    what readers see: every file here is committed
    journal/                      finished rows of open chunks
    leases/                       who works on which chunk, where workers share them (runner/leases.py)
    manifest.jsonl                made when every chunk is committed: a line for each part, in input order
    _SUCCESS                      made after it

A chunk is committed in three steps, each atomic and durable before the next begins:

    1. stage     the sink writes staging/part-<chunk>.<retry>.<attempt>.parquet under a name that no other attempt uses;
    2. enter     ledger/<chunk>.json, which names the staged file, is created exclusively. This is the commit: of any
                 number of attempts at a chunk one succeeds, the others remove what they staged;
    3. publish   the staged file is renamed to parts/part-<chunk>.parquet.

A crash, or a pause of any length,

    - in or after 1: the staged file is nobody's. It is removed once the chunk is committed by another attempt, never
      before: its writer may only be slow, and may still enter it;
    - in 2: the entry exists with its full content or not at all, since it is linked into place from a synced file;
    - after 2: whoever opens the ledger next finds a staged file that an entry names, and does step 3. The slow writer
      then finds its staged file gone, which means that it has been published;
    - in or after 3: nothing is left to do.

So a file in parts/ always has its entry, and a late attempt finds the entry taken and changes nothing. A retry of a
chunk's failed rows goes the same way with an entry of the next generation, and its part is renamed over the older one:
a reader has one or the other. Before that, what older generations have left in staging/ is removed, so that a writer
that was paused in front of its step 3 cannot put an old part over a new one.

Nothing is locked and nothing is appended to, so any number of processes on any number of machines can share a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import orjson
import xxhash

from runner.chunk import Chunk, Part
from runner.errors import InputError, InternalError, OutputError
from runner.storage import (
    JOURNAL_FOLDER,
    LEASES_FOLDER,
    PARTS_FOLDER,
    TEMPORARY_FOLDER,
    Storage,
    open_storage,
    parse_staged_name,
)

FINGERPRINT_FILE = "fingerprint.json"
SUCCESS_FILE = "_SUCCESS"
MANIFEST_FILE = "manifest.jsonl"
LEDGER_FOLDER = "ledger"
ROLLUP_ENTRIES = 1000
"""Entries that are copied into one file, and the most that opening a ledger reads one by one for long."""
MAX_ROLLUP_ENTRIES = 10_000
"""In one file: what is in memory twice while it is read."""
_VERSION = 1


class Ledger:
    """The committed chunks of a job. Get one with `Ledger.open`."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._entries: dict[str, Part] = {}
        """By name of the entry's file."""
        self._rolled: set[str] = set()
        """Names in a roll-up."""
        self._rollups: set[str] = set()
        self._parts: dict[int, Part] = {}
        """Newest generation of each committed chunk."""

    @classmethod
    def open(
        cls,
        folder: str | Storage,
        fingerprint: Mapping[str, str],
        on_change: str = "refuse",
        fits: Callable[[Ledger], bool] = lambda ledger: True,
    ) -> Ledger:
        """Begin a job in a folder, or go on with it: completes what a crash has left half done.

        Args:
            folder: The output folder; need not exist.
            fingerprint: All that can change a result, by name.
            on_change: What to do if the folder holds a job with another fingerprint: refuse (OutputError with the
                keys that differ) or new (use <folder>-2, <folder>-3, ...).
            fits: With on_change=new, whether what is committed was made from the input that there is now.
        """
        storage = open_storage(folder) if isinstance(folder, str) else folder
        root = storage.root
        number = 1
        while True:
            differences = _claim(storage, dict(fingerprint))
            ledger = cls(storage)
            if not differences:
                ledger.refresh()
                if on_change != "new" or fits(ledger):
                    break
            elif on_change != "new":
                raise OutputError(
                    f"{storage.root}: holds another job; expected the same {', '.join(differences)}: "
                    + "; ".join(differences.values())
                    + ". Choose another name, set on_change=new, or delete the folder"
                )
            number += 1
            storage = open_storage(f"{root}-{number}")
        ledger.recover()
        ledger._check_parts()
        return ledger

    @classmethod
    def existing(cls, folder: str) -> Ledger:
        """The ledger of an output folder, to be read: completes nothing. Raises OutputError if there is none."""
        storage = open_storage(folder)
        if storage.read(FINGERPRINT_FILE) is None:
            raise OutputError(
                f"{folder}: no {FINGERPRINT_FILE}; expected the output folder of a job; check output.folder and name"
            )
        ledger = cls(storage)
        ledger.refresh()
        return ledger

    @property
    def folder(self) -> str:
        return self.storage.root

    def done(self) -> dict[int, Part]:
        """The committed chunks by index, newest generation. Lists the folder: what others committed is in it."""
        self.refresh()
        return dict(self._parts)

    def entered(self) -> set[int]:
        """Indexes of the committed chunks, by the names of their entries alone: cheaper than `done`."""
        names = self.storage.list(LEDGER_FOLDER)
        return {int(name.partition(".")[0]) for name in names if name.endswith(".json")}

    def is_entered(self, chunk_index: int) -> bool:
        """Whether a chunk is committed now."""
        return self.storage.size(f"{LEDGER_FOLDER}/{_entry_name(chunk_index, 0)}") is not None

    def check(self, chunk: Chunk) -> None:
        """Compare a chunk with what was committed under its index, if anything was.

        Raises:
            InputError: It is another range or another file, or the file has changed: the message names it.
        """
        part = self._parts.get(chunk.index)
        if part is None or part.chunk == chunk:
            return
        old = part.chunk
        if old.file != chunk.file:
            found = f"chunk {chunk.index} now begins in this file; expected {old.file}, as when it was committed"
        elif old.file_id != chunk.file_id:
            found = f"its content has changed; expected what chunk {chunk.index} was made from"
        else:
            found = (
                f"chunk {chunk.index} is rows {chunk.start} to {chunk.start + chunk.num_rows - 1}; expected rows "
                f"{old.start} to {old.start + old.num_rows - 1}, as when it was committed"
            )
        raise InputError(
            f"{chunk.file}: {found}; restore the input and dataset settings, or start a new job (on_change=new or "
            "another name)"
        )

    def commit(self, part: Part) -> bool:
        """Make a staged part the chunk's result, visible to readers.

        Returns False if another attempt was first: its part is the result, and this one's file is removed. May be
        called again with the same part.
        """
        if part.generation:
            previous = self._parts.get(part.chunk.index)
            if previous is None or previous.generation < part.generation - 1:
                raise InternalError(f"chunk {part.chunk.index}: generation {part.generation} before the one it follows")
        name = _entry_name(part.chunk.index, part.generation)
        won = self.storage.create(f"{LEDGER_FOLDER}/{name}", _encode(part))
        if not won:
            self._read_entry(name)
            self.storage.remove(part.staged)
            part = self._entries[name]
        else:
            self._add(name, part)
        self._publish(part)
        if len(self._entries) - len(self._rolled) >= ROLLUP_ENTRIES:
            self._roll_up()
        return won

    def finish(self, num_chunks: int, summary: Mapping[str, Any]) -> bool:
        """Write manifest and success mark, and clear what only an unfinished job needs; False if chunks are missing.

        Args:
            num_chunks: Chunks of the whole input, whoever processed them.
            summary: Kept in the success mark, as JSON.
        """
        self.refresh()
        if any(index not in self._parts for index in range(num_chunks)):
            return False
        surplus = sorted(index for index in self._parts if index >= num_chunks)
        if surplus:
            raise InputError(
                f"dataset: {num_chunks} chunks; expected also chunk {surplus[0]}, which is committed; the input or its "
                "settings have changed: restore them or start a new job"
            )
        self.recover()
        strays = self.strays()
        if strays:
            raise OutputError(
                f"{self.folder}/{PARTS_FOLDER}: has {', '.join(strays[:5])}; expected committed parts only; remove them"
            )
        for folder in (TEMPORARY_FOLDER, JOURNAL_FOLDER, LEASES_FOLDER):
            for name in self.storage.list(folder):
                self.storage.remove(f"{folder}/{name}")
        self._roll_up()
        manifest = b"".join(_manifest_line(self._parts[index]) for index in range(num_chunks))
        self.storage.replace(MANIFEST_FILE, manifest)
        mark = {"version": _VERSION, "num_chunks": num_chunks, "summary": dict(summary)}
        self.storage.replace(SUCCESS_FILE, orjson.dumps(mark, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY))
        return True

    @property
    def finished(self) -> bool:
        """The success mark is there, and so are the entries of all its chunks: a person may have removed some."""
        try:
            mark = orjson.loads(self.storage.read(SUCCESS_FILE) or b"null")
            return mark is not None and len(self._parts) >= mark["num_chunks"]
        except (ValueError, TypeError, KeyError):  # not a mark of this program: another one is made
            return False

    def strays(self) -> list[str]:
        """Parquet files in the parts folder that no entry names."""
        known = {part.path.rpartition("/")[2] for part in self._parts.values()}
        return [name for name in self.storage.list(PARTS_FOLDER) if name.endswith(".parquet") and name not in known]

    def refresh(self) -> None:
        """Read the entries that were made since the last call."""
        listed = self.storage.list(LEDGER_FOLDER)
        names = {name for name in listed if name.endswith(".json")}
        removed = self._entries.keys() - names  # by a person, to have a chunk done again
        if removed:
            self._rolled -= removed
            remaining = {name: part for name, part in self._entries.items() if name in names}
            self._entries, self._parts = {}, {}
            for name, part in remaining.items():
                self._add(name, part)
        for name in listed:
            if name.startswith("rollup-") and name not in self._rollups:
                self._read_rollup(name, names)
        for name in sorted(names - self._entries.keys()):
            self._read_entry(name)
        if len(self._entries) - len(self._rolled) >= ROLLUP_ENTRIES:
            self._roll_up()

    def recover(self) -> None:
        """Publish what was entered and not published; remove what was staged for chunks that others have committed."""
        for name in self.storage.list(TEMPORARY_FOLDER):
            attempt = parse_staged_name(name)
            part = None if attempt is None else self._parts.get(attempt[0])
            if attempt is None or part is None or attempt[1] > part.generation:
                continue
            if part.staged == f"{TEMPORARY_FOLDER}/{name}":
                self._publish(part)
            else:
                self.storage.remove(f"{TEMPORARY_FOLDER}/{name}")

    def _publish(self, part: Part) -> None:
        for generation in range(part.generation):
            older = self._entries.get(_entry_name(part.chunk.index, generation))
            if older is not None:
                self.storage.remove(older.staged)
        self.storage.publish(part.staged, part.path)

    def _check_parts(self) -> None:
        listed = set(self.storage.list(PARTS_FOLDER))
        for part in self._parts.values():
            if part.path.rpartition("/")[2] not in listed and self.storage.size(part.path) is None:
                raise OutputError(
                    f"{self.folder}/{part.path}: is missing; expected the committed rows of chunk {part.chunk.index}; "
                    f"put it back, or remove {LEDGER_FOLDER}/{part.chunk.index:08d}*.json to have them done again"
                )

    def _add(self, name: str, part: Part) -> None:
        self._entries[name] = part
        known = self._parts.get(part.chunk.index)
        if known is None or known.generation <= part.generation:
            self._parts[part.chunk.index] = part

    def _read_entry(self, name: str) -> None:
        data = self.storage.read(f"{LEDGER_FOLDER}/{name}")
        if data is not None:
            self._add(name, self._decode(name, data))

    def _read_rollup(self, rollup: str, names: set[str]) -> None:
        for line in (self.storage.read(f"{LEDGER_FOLDER}/{rollup}") or b"").splitlines():
            part = self._decode(rollup, line)
            name = _entry_name(part.chunk.index, part.generation)
            if name in names:
                self._add(name, part)
                self._rolled.add(name)
        self._rollups.add(rollup)

    def _roll_up(self) -> None:
        names = sorted(self._entries.keys() - self._rolled)
        for begin in range(0, len(names), MAX_ROLLUP_ENTRIES):
            some = names[begin : begin + MAX_ROLLUP_ENTRIES]
            lines = b"\n".join(_encode(self._entries[name]) for name in some)
            # Named by content: processes that copy the same entries at the same time make one file.
            rollup = f"rollup-{xxhash.xxh3_64_hexdigest(lines)}.jsonl"
            self.storage.create(f"{LEDGER_FOLDER}/{rollup}", lines)
            self._rollups.add(rollup)
            self._rolled.update(some)

    def _decode(self, name: str, data: bytes) -> Part:
        try:
            record = orjson.loads(data)
            if record.pop("version") != _VERSION:
                raise ValueError("of another version of this program")
            chunk = record.pop("chunk")
            # The same few names in every entry: kept once.
            chunk["file"], chunk["file_id"] = sys.intern(chunk["file"]), sys.intern(chunk["file_id"])
            return Part(chunk=Chunk(**chunk), **record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OutputError(
                f"{self.folder}/{LEDGER_FOLDER}/{name}: cannot be read ({error}); expected a ledger entry; restore it, "
                "or remove it to have the chunk done again"
            ) from error


def _entry_name(chunk_index: int, generation: int) -> str:
    return f"{chunk_index:08d}.{generation}.json" if generation else f"{chunk_index:08d}.json"


def _encode(part: Part) -> bytes:
    record = {name: getattr(part, name) for name in Part.__slots__}
    return orjson.dumps({"version": _VERSION, **record, "chunk": part.chunk.identity()})


def _manifest_line(part: Part) -> bytes:
    """What a consumer of the output needs to know of a part to read and to check it."""
    chunk = part.chunk
    record = {name: getattr(part, name) for name in ("path", "num_rows", "num_errors", "num_bytes", "checksum")}
    record["input"] = {"file": chunk.file, "first_row": chunk.start, "num_rows": chunk.num_rows}
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def _claim(storage: Storage, fingerprint: dict[str, str]) -> dict[str, str]:
    """Make the folder this job's if it is nobody's; what differs, by key, if it is another's."""
    data = orjson.dumps({"version": _VERSION, "fingerprint": fingerprint}, option=orjson.OPT_INDENT_2)
    recorded = storage.read(FINGERPRINT_FILE)
    if recorded is None:
        if storage.list(PARTS_FOLDER):
            raise OutputError(
                f"{storage.root}/{PARTS_FOLDER}: has files but no {FINGERPRINT_FILE} beside it; expected the folder of "
                "a job, or none; choose another output.folder or name"
            )
        if storage.create(FINGERPRINT_FILE, data):
            return {}
        recorded = storage.read(FINGERPRINT_FILE) or b""
    try:
        other = orjson.loads(recorded)["fingerprint"]
        keys = sorted(other.keys() | fingerprint.keys())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OutputError(
            f"{storage.root}/{FINGERPRINT_FILE}: cannot be read; expected the fingerprint of a job; restore it or "
            "choose another output.folder or name"
        ) from error
    absent = "absent"
    return {
        key: f"{key} is {_short(other.get(key, absent))} there, {_short(fingerprint.get(key, absent))} here"
        for key in keys
        if other.get(key) != fingerprint.get(key)
    }


def _short(value: str) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
