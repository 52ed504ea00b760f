"""An output folder in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure.

What the ledger rests on is a put that the store refuses when there is an object of that name: `If-None-Match: *` on S3
(since 2024), x-goog-if-generation-match on Google's, the same header on Azure's. A store that ignores the condition is
found out before anything is written. Credentials and endpoint come from the environment, as the store's own tools have
them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow as pa

from runner.errors import OutputError
from runner.storage import TEMPORARY_FOLDER, AppendFile

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "gs", "az", "abfs", "abfss")


class ObjectStorage:
    """Satisfies runner.storage.Storage. An object is there with its whole content or not at all."""

    roll_bytes = 1
    """Objects do not grow: a journal begins a new one after every sync."""

    def __init__(self, url: str) -> None:
        """Raises OutputError if the URL has credentials in it, or obstore is not installed."""
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query:
            raise OutputError(
                f"output.folder: {parts.scheme}://{parts.hostname}{parts.path} with credentials or options in the URL; "
                "expected them in the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...); move them there"
            )
        self.root = url.rstrip("/")
        self._store = _store(self.root)
        self._checked = False

    def create(self, path: str, data: bytes) -> bool:
        with self._explained(path):
            self._check_condition()
            return self._create(path, data)

    def replace(self, path: str, data: bytes) -> None:
        with self._explained(path):
            self._store.put(path, data)

    def write(self, path: str, data: pa.Buffer | bytes) -> None:
        with self._explained(path):
            self._store.put(path, memoryview(data).cast("B"))

    def publish(self, staged: str, path: str) -> bool:
        with self._explained(path):
            try:
                self._store.copy(staged, path)
            except _not_found():
                return False
            self._remove(staged)
        return True

    def append_to(self, path: str) -> AppendFile:
        return _ObjectAppendFile(self, path)

    def read(self, path: str) -> bytes | None:
        with self._explained(path):
            try:
                return bytes(self._store.get(path).bytes())
            except _not_found():
                return None

    def open(self, path: str) -> pa.NativeFile:
        data = self.read(path)
        if data is None:
            raise OutputError(f"{self.root}/{path}: is missing; expected a committed file; put it back")
        return pa.BufferReader(data)

    def size(self, path: str) -> int | None:
        with self._explained(path):
            try:
                return int(self._store.head(path)["size"])
            except _not_found():
                return None

    def list(self, folder: str) -> list[str]:
        prefix = f"{folder.rstrip('/')}/"
        with self._explained(folder):
            names = [
                item["path"].removeprefix(prefix)
                for batch in self._store.list(prefix)
                for item in batch
                if item["path"].startswith(prefix)
            ]
        return sorted(name for name in names if "/" not in name)

    def remove(self, path: str) -> None:
        with self._explained(path):
            self._remove(path)

    def _create(self, path: str, data: bytes) -> bool:
        import obstore.exceptions as errors

        try:
            self._store.put(path, data, mode="create", use_multipart=False)
        except (errors.AlreadyExistsError, errors.PreconditionError):
            # Also where an earlier attempt of this very call was carried out and its answer lost.
            return self.read(path) == data
        return True

    def _remove(self, path: str) -> None:
        with contextlib.suppress(*_not_found()):
            self._store.delete(path)

    def _check_condition(self) -> None:
        """Once: of two puts of different content under one new name the store must refuse the second."""
        if self._checked:
            return
        probe = f"{TEMPORARY_FOLDER}/{secrets.token_hex(8)}.probe"
        kept = self._create(probe, b"1") and not self._create(probe, b"2")
        self._remove(probe)
        if not kept:
            raise OutputError(
                f"output.folder: {self.root}: this store overwrites where it is asked not to (If-None-Match: *), on "
                "which exactly-once output rests; expected conditional puts; choose another store, or a folder"
            )
        self._checked = True

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError) as error:
            raise OutputError(
                f"{self.root}/{path}: {_first_line(error)}; expected a bucket that can be read and written; what is "
                "committed is kept: check credentials, endpoint and bucket, then run the same command again"
            ) from error


class _ObjectAppendFile:
    """Held back until it is synced, then one object."""

    def __init__(self, storage: ObjectStorage, path: str) -> None:
        self.size = 0
        self._storage = storage
        self._path = path
        self._data = bytearray()

    def append(self, data: bytes) -> None:
        self._data += data
        self.size += len(data)

    def sync(self) -> None:
        if self._data:
            self._storage.replace(self._path, bytes(self._data))

    def close(self) -> None:
        self._data.clear()


def _store(url: str) -> ObjectStore:
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise OutputError(
            f"output.folder: {url} needs the package obstore, which is not installed; "
            "expected batch-inference-runner[objectstore]; install it, or choose a folder"
        ) from error
    options: dict[str, Any] = {}
    if urlsplit(url).scheme == "s3":
        import os

        endpoint = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", ""))
        if endpoint.startswith("http://"):
            options["client_options"] = {"allow_http": True}
        options["config"] = {"conditional_put": "etag"}
    store: ObjectStore = from_url(url, **options)
    return store


def _not_found() -> tuple[type[Exception], ...]:
    from obstore.exceptions import NotFoundError

    return NotFoundError, FileNotFoundError


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
