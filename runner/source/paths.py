"""The one place that touches an input path: local files, folders, globs, fsspec URLs, hive folders, identities.

A file has two addresses: the one it is opened by, which may hold credentials, and its name, which never does. Names
are what chunks, outputs and messages show.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs
import xxhash

from engines.checkpoint import hub_blobs
from runner import config
from runner.errors import ConfigError, InputError

IDENTITY_BYTES = 64 << 10
"""Bytes at the beginning and at the end of a file that enter its identity."""
UNREADABLE = (pa.ArrowException, OSError, ValueError, MemoryError)
"""What reading a damaged file raises: text that is no UTF-8 is a ValueError, a length that lies takes all memory."""
_PREFIXES = ("package:", "project:", "~")
_LOCAL_PROTOCOLS = {"file", "local", "memory", "zip", "tar"}
"""Of fsspec: those that reach nothing but this machine, whatever the path after them says."""
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_COMPRESSIONS = (".gz", ".zst", ".bz2")
_MAGIC = set("*?[")


def reason(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of the input."""

    name: str
    """As the configuration's path leads to it, without credentials."""
    address: str
    """What it is opened by. Never shown."""
    partitions: tuple[tuple[str, str | None], ...] = ()
    """Hive partition values from `key=value` folders."""

    @property
    def compression(self) -> str | None:
        """Compression of the whole file, by its name: gzip, zstd, bz2 or none."""
        for suffix, codec in ((".gz", "gzip"), (".zst", "zstd"), (".bz2", "bz2")):
            if self.name.lower().endswith(suffix):
                return codec
        return None

    def open(self) -> pa.NativeFile:
        """The file for random reads, as stored. Raises InputError."""
        filesystem, path = _filesystem(self.address)
        try:
            return filesystem.open_input_file(path)
        except Exception as error:
            raise InputError(f"{self.name}: {_reason(error, self.address)}; expected a file that can be read") from None

    def open_stream(self) -> pa.NativeFile:
        """The file's content for sequential reads, decompressed. Raises InputError."""
        file = self.open()
        return file if self.compression is None else pa.CompressedInputStream(file, self.compression)

    def stamp(self) -> tuple[int, int, int] | None:
        """What differs once somebody has written to a local file: its number, size and time. None for others, and for
        one that is gone: what is open can still be read."""
        if is_url(self.address):
            return None
        try:
            found = local_path(self.address).stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def identity(self) -> str:
        """Digest of the file's size, first 64 KiB and last 64 KiB (xxh3-128, hexadecimal). Raises InputError."""
        with self.open() as file:
            try:
                size = file.size()
                digest = xxhash.xxh3_128(size.to_bytes(8, "little"))
                digest.update(file.read(IDENTITY_BYTES))
                file.seek(max(0, size - IDENTITY_BYTES))
                digest.update(file.read(IDENTITY_BYTES))
            except Exception as error:
                raise InputError(
                    f"{self.name}: {_reason(error, self.address)}; expected a file that can be read"
                ) from None
        return digest.hexdigest()


def is_url(path: str) -> bool:
    """Whether fsspec is needed to read this path."""
    return "://" in path and not path.startswith("file://")


def local_path(path: str) -> Path:
    """A path that is not a URL, `package:`, `project:` and `~` resolved."""
    return Path(config.resolve_path(path) if path.startswith(_PREFIXES) else path.removeprefix("file://"))


def check_reach(path: str) -> None:
    """Raises ConfigError for a URL that leads to another machine, or that is chained to one that does."""
    for piece in path.split("::") if is_url(path) else ():
        protocol, separator, _ = piece.partition("://")
        if not separator and not protocol.isidentifier():
            protocol = "file"
        if protocol not in _LOCAL_PROTOCOLS:
            raise ConfigError(
                f"dataset.path: {shown_url(path)} is read by {protocol}, which may reach another machine; expected a "
                "path on this one; set dataset.remote=true if that is meant"
            )


def find_files(path: str, follow_links: bool = False) -> list[InputFile]:
    """The files of a path, in natural order: part-2 before part-10.

    Files and folders whose names begin with `.` or `_` are left out where a folder or a glob is expanded, as Spark and
    Hive do.

    Raises:
        InputError: There is no such file, or none in the folder, or it is a link that leads out of the folder (or out
            of what a glob's names have in common) and follow_links is not set.
    """
    if is_url(path):
        names = _find_remote(path)
    else:
        root = str(local_path(path))
        base, found = _find_local(root)
        if not follow_links:
            _check_links(base, found)
        names = [(_shown(path, root, file), file) for file in found]
    if not names:
        raise InputError(f"dataset.path: nothing at {shown_url(path)}; expected a file, a folder or a glob with files")
    for name, _ in names:
        if name != name.encode(errors="replace").decode():
            raise InputError(f"dataset.path: {name!a}: its name is not UTF-8; expected one that is; rename it")
    files = [InputFile(name, address, _partitions(name)) for name, address in names]
    return sorted(files, key=lambda file: (_natural(file.name), file.name))


def suffix(name: str) -> str:
    """The suffix that tells a file's format, lower case, without that of its compression."""
    name = name.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def shown_url(url: str) -> str:
    """A path or URL without user, password, query and fragment, fit for messages and identities."""
    if not is_url(url):
        return url
    return "::".join(_without_secrets(part) for part in url.split("::"))


def _without_secrets(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    if scheme in ("http", "https"):
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    authority, slash, tail = rest.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{tail}"


def _reason(error: Exception, address: str) -> str:
    """What an exception says, in a few words and without credentials."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    text = str(error).split("\n")[0][:300] or type(error).__name__
    if is_url(address):
        text = text.replace(address, shown_url(address))
        secrets = re.split(r"[?#]", address, maxsplit=1)[1:] + re.findall(r"://([^/@]+)@", address)
        for secret in secrets:
            for piece in (secret, *re.split(r"[&=:]", secret)):
                if len(piece) > 3:
                    text = text.replace(piece, "***")
    return text


def _filesystem(address: str) -> tuple[Any, str]:
    if not is_url(address):
        return pa.fs.LocalFileSystem(), address
    filesystem, path = _open_url(address)
    return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(filesystem)), path


def _open_url(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, which fsspec keeps for the next call, and the path in it."""
    import fsspec.core

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # unknown protocol, package not installed, bad credentials: any class
        raise InputError(
            f"{shown_url(url)}: {_reason(error, url)}; expected a URL that fsspec can open; install the package of "
            "its protocol (s3fs, gcsfs, ...) or check the URL"
        ) from None
    return filesystem, path


def _find_remote(url: str) -> list[tuple[str, str]]:
    filesystem, path = _open_url(url)
    shown, shown_root = shown_url(url), shown_url(f"x://{path}").removeprefix("x://")
    try:
        if _MAGIC & set(path) and not filesystem.exists(path):
            base = path[: re.search(r"[*?\[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
            found = [name for name in filesystem.glob(path) if filesystem.isfile(name)]
            found = [name for name in found if not _hidden(name[len(base) :])]
        elif filesystem.isdir(path):
            found = [name for name in filesystem.find(path) if not _hidden(name[len(path) :])]
        else:
            return [(shown, url)] if filesystem.exists(path) else []
    except Exception as error:  # each protocol raises classes of its own
        raise InputError(f"dataset.path: {shown}: {_reason(error, url)}; expected a URL that can be listed") from None
    # fsspec gives paths without the protocol: put back what the URL has in front of its own path.
    front = url[: len(url) - len(path)] if url.endswith(path) else url.partition("://")[0] + "://"
    shown_front = shown[: len(shown) - len(shown_root)] if shown.endswith(shown_root) else _without_secrets(front)
    if path.startswith(("http://", "https://")):
        return [(shown_url(name), name) for name in found]
    return [(shown_front + name, front + name) for name in found]


def _find_local(root: str) -> tuple[Path, list[str]]:
    """(the folder that was looked through, the files found in it)"""
    path = Path(root)
    if path.is_file():  # named by the user, wherever it leads
        return path.resolve().parent, [root]
    if path.is_dir():
        found = [str(file) for file in path.rglob("*") if file.is_file()]
        return path, [file for file in found if not _hidden(file[len(str(path)) :])]
    # A folder may have brackets in its own name: what exists is taken by its name, the rest is the pattern.
    pieces = Path(root).parts
    base = Path()
    while pieces and (base / pieces[0]).exists():
        base, pieces = base / pieces[0], pieces[1:]
    pattern = str(Path(*pieces)) if pieces else ""
    if not _MAGIC & set(pattern):
        return base, []
    matches = [name for name in glob.glob(pattern, root_dir=base, recursive=True) if not _hidden(name)]  # noqa: PTH207
    return base, [str(base / name) for name in matches if (base / name).is_file()]


def _check_links(base: Path, files: Sequence[str]) -> None:
    inside = base.resolve()
    allowed = [inside, *hub_blobs(inside)]
    folders: dict[Path, bool] = {}
    for file in map(Path, files):
        if file.parent not in folders:
            folders[file.parent] = file.parent.resolve().is_relative_to(inside)
        if folders[file.parent] and not file.is_symlink():
            continue
        target = file.resolve()
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise InputError(
                f"{file}: is a link to {target}, outside of {base}; expected files inside; set "
                "dataset.follow_links=true if that is meant, or name the file itself"
            )


def _hidden(relative: str) -> bool:
    return any(piece.startswith((".", "_")) for piece in relative.split("/") if "=" not in piece)


def _shown(path: str, root: str, found: str) -> str:
    """The name of a file found: with the configuration's prefix, so that it is the same wherever that leads."""
    for prefix in _PREFIXES:
        rest = path.removeprefix(prefix)
        if rest and rest != path and root.endswith(rest):
            base = root[: len(root) - len(rest)]
            if found.startswith(base):
                return prefix + found[len(base) :]
    return found


def _partitions(name: str) -> tuple[tuple[str, str | None], ...]:
    found = []
    for piece in name.split("/")[:-1]:
        key, separator, value = piece.partition("=")
        if separator and re.fullmatch(r"[A-Za-z_]\w*", key):
            found.append((key, None if value == _NULL_PARTITION else unquote(value)))
    return tuple(found)


def partition_fields(files: Sequence[InputFile]) -> list[pa.Field]:
    """Columns from the folder names of all files: int64 where every value is a whole number, else string."""
    values: dict[str, set[str | None]] = {}
    for file in files:
        for key, value in file.partitions:
            values.setdefault(key, set()).add(value)
    return [
        pa.field(key, pa.int64() if all(_is_integer(value) for value in found) else pa.string())
        for key, found in values.items()
    ]


def partition_value(file: InputFile, field: pa.Field) -> int | str | None:
    """The value of a partition column in a file; None if its path does not say."""
    value = dict(file.partitions).get(field.name)
    return int(value) if value is not None and pa.types.is_integer(field.type) else value


def _is_integer(value: str | None) -> bool:
    return value is None or re.fullmatch(r"0|-?[1-9]\d{0,17}", value) is not None


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in re.split(r"(\d+)", name) if piece]
