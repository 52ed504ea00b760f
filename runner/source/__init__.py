"""Where rows come from. One module a format, found by its file name; all of them give numbered chunks.

A format module exports SUFFIXES (of its files' names; () if it is never guessed) and either `open(dataset, files)`, for
formats that are files, or `open_dataset(dataset)`, for those that find their rows themselves.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import ModuleType
from typing import Protocol

import pyarrow as pa

from runner.chunk import Chunk
from runner.config import DatasetConfig
from runner.errors import ConfigError, InputError
from runner.source.paths import InputFile, check_reach, find_files, is_url, local_path, shown_url, suffix

_SHARED = {"base", "filter", "lines", "paths", "values"}
_SAVED_BY_DATASETS = ("state.json", "dataset_dict.json")


class Source(Protocol):
    """The input of a job, readable in any order and any number of times, by one thread at a time.

    Columns of the input that have a reserved name (RESERVED_COLUMNS), as the output of an earlier job has, are not
    passed on: the names are taken by what they mean in this job.
    """

    schema: pa.Schema
    """Of the user's columns, without the reserved ones."""

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in input order, lazily: memory does not grow with the input.

        With `limit`, the range of the last chunk ends at the last row that counts. An input without rows is one chunk
        of no rows, so that its output has a part, and with it a schema.
        """

    def read(self, chunk: Chunk, columns: list[str] | None) -> pa.RecordBatch:
        """The rows of a chunk that pass the filter, in order: `columns` (None: all), then ROW_COLUMN.

        Where the batch has rows that could not be read (a malformed line, a value that is not of its column's type), a
        last column ERROR_COLUMN says why, null for the others; such rows have nulls in place of what could not be read.
        Where the filter cannot be asked (a broken line, a value that a filter column does not hold) the row is kept,
        and counts for the limit. Without such rows there is no such column.

        Raises InputError, naming the file, when its content is no longer the one that the chunk was made from.
        """

    def check_unchanged(self, committed: Mapping[str, str], complete: bool) -> None:
        """Compare the files that chunks were committed of, name -> identity, with those that there are now; complete:
        there were no others. Reads no rows.

        Raises InputError, naming the file: one is gone, has another content, or is new.
        """


def open_source(dataset: DatasetConfig) -> Source:
    """The source that a configuration describes.

    Raises:
        InputError: No such file, or it cannot be read.
        ConfigError: An unknown format, files of several formats, a filter that is wrong, a URL without dataset.remote.
    """
    if not dataset.remote:
        check_reach(dataset.path)
    formats = _formats()
    if dataset.format == "auto":
        if _is_saved_dataset(dataset.path):
            return formats["huggingface"].open_dataset(dataset)
        files = find_files(dataset.path, dataset.follow_links)
        module = formats[_guess_format(dataset.path, files, formats)]
        return module.open(dataset, _of_format(files, module.SUFFIXES))
    if dataset.format not in formats:
        near = difflib.get_close_matches(dataset.format, formats, n=1)
        raise ConfigError(
            f"dataset.format: {dataset.format!r}; expected auto or one of {', '.join(formats)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    module = formats[dataset.format]
    if hasattr(module, "open_dataset"):
        return module.open_dataset(dataset)
    files = find_files(dataset.path, dataset.follow_links)
    return module.open(dataset, _of_format(files, module.SUFFIXES) or files)


def _formats() -> dict[str, ModuleType]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED]
    return {name: import_module(f"{__name__}.{name}") for name in names}


def _is_saved_dataset(path: str) -> bool:
    return not is_url(path) and any((local_path(path) / name).is_file() for name in _SAVED_BY_DATASETS)


def _guess_format(path: str, files: list[InputFile], formats: dict[str, ModuleType]) -> str:
    by_suffix = {ending: name for name, module in formats.items() for ending in module.SUFFIXES}
    found: dict[str, int] = {}
    for file in files:
        name = by_suffix.get(suffix(file.name))
        if name is not None:
            found[name] = found.get(name, 0) + 1
    if len(found) == 1:
        return next(iter(found))
    if not found:
        raise InputError(
            f"dataset.path: {shown_url(path)}: {files[0].name} has a suffix that tells no format; expected one of "
            f"{', '.join(by_suffix)}; set dataset.format"
        )
    counts = ", ".join(f"{count} {name}" for name, count in found.items())
    raise ConfigError(f"dataset.path: {shown_url(path)} has {counts} files; expected one format; set dataset.format")


def _of_format(files: list[InputFile], suffixes: tuple[str, ...]) -> list[InputFile]:
    """The files whose names say so: a folder may hold others, such as a README."""
    return [file for file in files if suffix(file.name) in suffixes]
