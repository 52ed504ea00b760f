"""The one place that touches the output folder: every state change of a job is one of the operations below.

Each operation is durable when it returns, and is seen by others either whole or not at all; a crash inside one leaves
at most a temporary file, which no reader looks at. `Storage` asks for nothing that an object store with a conditional
put cannot do: `create` is a put-if-absent, `publish` a copy followed by a delete (runner/object_storage.py). What is
here is for a folder, local or on NFS or Lustre: exclusive creation is link(2), which is atomic on all three, and
replacement is rename(2).
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from runner.errors import OutputError

TEMPORARY_FOLDER = "staging"
"""Folder of everything unfinished: temporary files, and parts that are not committed. No reader looks here."""
JOURNAL_FOLDER = "journal"
"""Folder of finished rows of open chunks."""
LEASES_FOLDER = "leases"
"""Folder of who works on which chunk (runner/leases.py)."""
PARTS_FOLDER = "parts"
"""Folder of the committed parts: what readers open."""
REPLACED_TIMES = 5
"""How often a file may be replaced while it is read, before that is an error."""
FAULTS = "RUNNER_FAULTS"
"""Environment variable that has storage fail or the process end at a chosen step, for tests: see runner/faults.py."""


def part_path(chunk_index: int) -> str:
    """Path of a chunk's part: the names sort as the input does."""
    return f"{PARTS_FOLDER}/part-{chunk_index:08d}.parquet"


def staged_path(chunk_index: int, generation: int) -> str:
    """A new path for a part that is not committed, unique to this attempt."""
    return f"{TEMPORARY_FOLDER}/part-{chunk_index:08d}.{generation}.{secrets.token_hex(8)}.parquet"


def parse_staged_name(name: str) -> tuple[int, int] | None:
    """Chunk index and generation from the name of a staged part; None for other files."""
    match = re.fullmatch(r"part-(\d+)\.(\d+)\.[0-9a-f]{16}\.parquet", name)
    return None if match is None else (int(match[1]), int(match[2]))


class AppendFile(Protocol):
    """A file that only grows."""

    size: int

    def append(self, data: bytes) -> None:
        """Add bytes; they may be lost in a crash until `sync`."""

    def sync(self) -> None:
        """Make what was appended survive a crash of the machine."""

    def close(self) -> None: ...


class Storage(Protocol):
    """An output folder. Paths are relative to it, with forward slashes."""

    root: str
    roll_bytes: int
    """Size beyond which what is appended goes on in a new file."""

    def create(self, path: str, data: bytes) -> bool:
        """Make a file with this content, unless there is one: False if another's is there.

        A file with exactly this content counts as made by this call: so an acknowledgement lost on the way does no
        harm, as long as the content names its writer where that matters.
        """

    def replace(self, path: str, data: bytes) -> None:
        """Make or overwrite a file; a reader sees the old content or the new one."""

    def write(self, path: str, data: pa.Buffer | bytes) -> None:
        """Make a file under a name that nobody else uses; a crash may leave it incomplete."""

    def publish(self, staged: str, path: str) -> bool:
        """Move a file to its final name, over an older one; False if `staged` is gone: somebody else has moved it."""

    def append_to(self, path: str) -> AppendFile:
        """A new file to append to; the name must be unused."""

    def read(self, path: str) -> bytes | None:
        """The content of a file; None if there is none."""

    def open(self, path: str) -> pa.NativeFile:
        """A file for random reads."""

    def size(self, path: str) -> int | None:
        """Bytes in a file; None if there is none."""

    def list(self, folder: str) -> list[str]:
        """Sorted names of the files in a folder; [] if it does not exist."""

    def remove(self, path: str) -> None:
        """Delete a file if it is there."""


def join(folder: str, name: str) -> str:
    """The output folder of a job: `name` in a folder, or below a URL."""
    return f"{folder.rstrip('/')}/{name}" if "://" in folder else str(Path(folder) / name)


def local_folder(folder: str) -> Path:
    """Where what only people read goes (run.log, metrics.jsonl): the folder itself, or one of its name in outputs/."""
    return Path("outputs", folder.rstrip("/").rpartition("/")[2]) if "://" in folder else Path(folder)


def open_storage(folder: str) -> Storage:
    """The storage of an output folder. Raises OutputError for a URL that none is written for."""
    if "://" not in folder:
        if FAULTS in os.environ:
            from runner.faults import FaultyStorage

            return FaultyStorage(folder, os.environ[FAULTS])
        return LocalStorage(folder)
    from runner.object_storage import SCHEMES, ObjectStorage

    scheme = folder.split("://", 1)[0]
    if scheme not in SCHEMES:
        raise OutputError(
            f"output.folder: a {scheme}:// URL; expected a folder on a local or shared file system, or a URL that "
            f"begins with {', '.join(f'{name}://' for name in SCHEMES)}; write to one of them"
        )
    return ObjectStorage(folder)


class LocalStorage:
    """A folder of a POSIX file system."""

    roll_bytes = 32 << 20

    def __init__(self, root: str) -> None:
        self.root = root

    # The steps. Everything that changes the folder goes through these, one system call each.

    def _open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def _write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def _fsync(self, fd: int) -> None:
        os.fsync(fd)

    def _sync_folder(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def _rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def _unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def _mkdir(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)

    # The operations.

    def create(self, path: str, data: bytes) -> bool:
        target = self._target(path)
        temporary = self._write_temporary(data)
        with self._explained(path):
            try:
                self._link(temporary, target)
            except FileExistsError:
                self._unlink(temporary)
                return self.read(path) == data
            except FileNotFoundError:
                # Whoever finishes the job clears its temporary folder, once.
                if target.exists():
                    return self.read(path) == data
                return self.create(path, data)
            except OSError as error:
                self._unlink(temporary)
                if isinstance(error, PermissionError) and not os.access(target.parent, os.W_OK):
                    raise
                raise OutputError(
                    f"{self.root}: this file system cannot make hard links ({error.strerror}), on which exactly-once "
                    "output rests; expected a local, NFS or Lustre folder; choose another output.folder"
                ) from error
            self._sync_folder(target.parent)
            self._unlink(temporary)
        return True

    def replace(self, path: str, data: bytes) -> None:
        target = self._target(path)
        temporary = self._write_temporary(data)
        with self._explained(path):
            try:
                self._rename(temporary, target)
            except FileNotFoundError:  # as in create
                return self.replace(path, data)
            self._sync_folder(target.parent)

    def write(self, path: str, data: pa.Buffer | bytes) -> None:
        target = self._target(path)
        with self._explained(path):
            fd = self._open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                self._write_all(fd, data)
                self._fsync(fd)
            finally:
                os.close(fd)
            self._sync_folder(target.parent)

    def publish(self, staged: str, path: str) -> bool:
        target = self._target(path)
        source = Path(self.root, staged)
        with self._explained(path):
            try:
                self._rename(source, target)
            except FileNotFoundError:
                return False
            self._sync_folder(target.parent)
            # Both names on one inode, as a crash can leave them: POSIX then renames nothing and keeps both.
            self._unlink(source)
        return True

    def append_to(self, path: str) -> AppendFile:
        target = self._target(path)
        with self._explained(path):
            fd = self._open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
            self._sync_folder(target.parent)
        return _LocalAppendFile(self, path, fd)

    def read(self, path: str) -> bytes | None:
        with self._explained(path):
            try:
                return _read(Path(self.root, path))
            except FileNotFoundError:
                return None

    def open(self, path: str) -> pa.NativeFile:
        with self._explained(path):
            return pa.OSFile(str(Path(self.root, path)))

    def size(self, path: str) -> int | None:
        with self._explained(path):
            try:
                return Path(self.root, path).stat().st_size
            except FileNotFoundError:
                return None

    def list(self, folder: str) -> list[str]:
        with self._explained(folder):
            try:
                with os.scandir(Path(self.root, folder)) as entries:
                    return sorted(entry.name for entry in entries if not entry.is_dir())
            except FileNotFoundError:
                return []

    def remove(self, path: str) -> None:
        with self._explained(path):
            self._unlink(Path(self.root, path))

    # What they share.

    def _target(self, path: str) -> Path:
        """The absolute path, its folder made if need be."""
        target = Path(self.root, path)
        with self._explained(path):
            self._make_folders(target.parent)
        return target

    def _make_folders(self, folder: Path) -> None:
        try:
            if stat.S_ISDIR(folder.stat().st_mode):
                return
            raise NotADirectoryError(20, "Not a directory", str(folder))
        except FileNotFoundError:
            pass
        self._make_folders(folder.parent)
        self._mkdir(folder)
        self._sync_folder(folder.parent)

    def _write_temporary(self, data: bytes) -> Path:
        name = f"{TEMPORARY_FOLDER}/{secrets.token_hex(8)}.tmp"
        self.write(name, data)
        return Path(self.root, name)

    def _write_all(self, fd: int, data: pa.Buffer | bytes) -> None:
        view = memoryview(data).cast("B")
        while view:
            view = view[self._write(fd, view) :]

    def _explained(self, path: str) -> contextlib.AbstractContextManager[None]:
        return explained(Path(self.root, path))


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the system says about writing a file, as an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: {error.strerror or error}; expected a folder that can be written and has room; what is committed "
            "is kept: make room or fix the permissions, then run the same command again"
        ) from error


def _read(path: Path) -> bytes:
    """The content of a file. NFS says ESTALE for one that was replaced as it was being read: then it is read again."""
    for _ in range(REPLACED_TIMES):
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return path.read_bytes()


class _LocalAppendFile:
    def __init__(self, storage: LocalStorage, path: str, fd: int) -> None:
        self.size = 0
        self._storage = storage
        self._path = path
        self._fd = fd

    def append(self, data: bytes) -> None:
        with self._storage._explained(self._path):
            self._storage._write_all(self._fd, data)
        self.size += len(data)

    def sync(self) -> None:
        with self._storage._explained(self._path):
            self._storage._fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
