"""Hugging Face datasets: folders that `save_to_disk` made, and any other by name, streamed.

A saved data set is read as the Arrow files it is. One by name (on the hub, or a folder that `load_dataset` takes) is
streamed in order; going back begins the stream again, so it suits one process going through it once. Its identity is
the hub's commit, or for a local folder the identities of its files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import xxhash

from runner.chunk import ROW_COLUMN, Chunk
from runner.config import DatasetConfig
from runner.errors import ConfigError, InputError
from runner.source import arrow
from runner.source.base import FileSource, Range, row_numbers
from runner.source.paths import InputFile, find_files, is_url, local_path

SUFFIXES = ()
_KEPT_CHUNKS = 4


def open_dataset(dataset: DatasetConfig) -> FileSource:
    """The rows of a data set, saved or by name."""
    if not is_url(dataset.path):
        folder = local_path(dataset.path)
        splits = folder / "dataset_dict.json"
        if splits.is_file():
            return _saved(dataset, f"{dataset.path}/{_choose_split(dataset, _json(splits)['splits'])}")
        if (folder / "state.json").is_file():
            return _saved(dataset, dataset.path)
    return StreamedSource(dataset)


def _saved(dataset: DatasetConfig, path: str) -> FileSource:
    state = _json(local_path(path) / "state.json")
    files = []
    for entry in state["_data_files"]:
        files += find_files(f"{path}/{entry['filename']}")
    if not files:
        raise InputError(f"{path}: no data files; expected what save_to_disk writes; save the data set again")
    # The order is the one that was saved, whatever the names are.
    return arrow.open(dataset, files)


def _json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; expected what save_to_disk writes; save the data set again") from None


def _choose_split(dataset: DatasetConfig, splits: list[str]) -> str:
    if dataset.split is None and len(splits) == 1:
        return splits[0]
    if dataset.split not in splits:
        raise ConfigError(f"dataset.split: {dataset.split}; expected one of {', '.join(splits)}; name one")
    return dataset.split


@dataclass(frozen=True, slots=True)
class _Streamed(InputFile):
    """A data set in the place of a file."""

    digest: str = ""

    def identity(self) -> str:
        return self.digest


class StreamedSource(FileSource):
    """Rows of a data set by name."""

    def __init__(self, dataset: DatasetConfig) -> None:
        self.dataset = dataset
        split, revision, digest = _look_up(dataset)
        self._split, self._revision = split, revision
        name = "/".join(piece for piece in (dataset.path, dataset.config_name, split) if piece)
        self._batches: Iterator[pa.Table] = iter(())
        self._next = -1
        self._kept: OrderedDict[int, pa.Table] = OrderedDict()
        super().__init__(dataset, [_Streamed(f"hf://{name}", name, (), digest)])

    def infer_schema(self) -> pa.Schema:
        features = self._load().features
        if features is not None:
            return features.arrow_schema
        first = self._chunk(0)
        return first.schema if first is not None else pa.schema([])

    def ranges(self, file: InputFile) -> Iterator[Range]:
        number = start = 0
        while (table := self._chunk(number)) is not None:
            yield Range(start, table.num_rows, number)
            start += table.num_rows
            number += 1

    def read_range(self, file: InputFile, chunk: Chunk, columns: list[str]) -> pa.Table:
        table = self._chunk(chunk.locator)
        if table is None or table.num_rows < chunk.num_rows:
            raise InputError(f"{file.name}: ends before row {chunk.start + chunk.num_rows}; expected the rows it had")
        rows = table.slice(0, chunk.num_rows).select(columns)
        return rows.append_column(ROW_COLUMN, row_numbers(chunk.start, chunk.start + chunk.num_rows))

    def _chunk(self, number: int) -> pa.Table | None:
        """The number-th chunk_rows rows; None behind the end."""
        if number in self._kept:
            return self._kept[number]
        try:
            if self._next != number:
                stream = self._load().with_format("arrow").skip(number * self.dataset.chunk_rows)
                self._batches = iter(stream.iter(self.dataset.chunk_rows))
            table = next(self._batches, None)
        except Exception as error:  # whatever the hub, the network or a file format raises
            raise _unreachable(self.dataset, error) from error
        self._next = number + 1
        if table is not None:
            self._kept[number] = table
            if len(self._kept) > _KEPT_CHUNKS:
                self._kept.popitem(last=False)
        return table

    def _load(self) -> Any:
        import datasets

        path = str(local_path(self.dataset.path)) if _is_local(self.dataset.path) else self.dataset.path
        try:
            return datasets.load_dataset(
                path, self.dataset.config_name, split=self._split, revision=self._revision, streaming=True
            )
        except Exception as error:  # whatever the hub, the network or a file format raises
            raise _unreachable(self.dataset, error) from error


def _look_up(dataset: DatasetConfig) -> tuple[str, str | None, str]:
    """Split, revision and content digest of a data set by name."""
    import datasets

    path = str(local_path(dataset.path)) if _is_local(dataset.path) else dataset.path
    try:
        splits = datasets.get_dataset_split_names(path, dataset.config_name, revision=dataset.revision)
    except Exception as error:  # whatever the hub or the network raises
        raise _unreachable(dataset, error) from error
    split = _choose_split(dataset, list(splits))
    digest = xxhash.xxh3_128(f"{dataset.config_name}/{split}".encode())
    if _is_local(dataset.path):
        for file in find_files(dataset.path):
            digest.update(f"{file.name} {file.identity()}\n".encode())
        return split, dataset.revision, digest.hexdigest()
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset.path, revision=dataset.revision).sha
    except Exception as error:  # whatever the hub or the network raises
        raise _unreachable(dataset, error) from error
    digest.update(str(commit).encode())
    return split, commit, digest.hexdigest()


def _is_local(path: str) -> bool:
    return not is_url(path) and local_path(path).exists()


def _unreachable(dataset: DatasetConfig, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return InputError(
        f"dataset.path: {dataset.path}: {reason}; expected a data set that `datasets` can stream; check its name, "
        "config_name, revision, the network and HF_TOKEN, or save it with save_to_disk and give that folder"
    )
