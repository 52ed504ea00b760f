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
import yaml

from runner.chunk import ROW_COLUMN, Chunk
from runner.config import DatasetConfig
from runner.errors import ConfigError, InputError
from runner.source import arrow
from runner.source.base import FileSource, Range, row_numbers
from runner.source.paths import InputFile, find_files, is_url, local_path

SUFFIXES = ()
MAX_CARD_BYTES = 1 << 20
MAX_CARD_PARTS = 10_000
_KEPT_CHUNKS = 4


def open_dataset(dataset: DatasetConfig) -> FileSource:
    """The rows of a data set, saved or by name."""
    if not is_url(dataset.path):
        folder = local_path(dataset.path)
        splits = folder / "dataset_dict.json"
        if splits.is_file():
            names = _names(splits, _json(splits), "splits")
            return _saved(dataset, f"{dataset.path}/{_choose_split(dataset, names)}")
        if (folder / "state.json").is_file():
            return _saved(dataset, dataset.path)
    return StreamedSource(dataset)


def _saved(dataset: DatasetConfig, path: str) -> FileSource:
    where = local_path(path) / "state.json"
    state = _json(where)
    entries = state.get("_data_files") if isinstance(state, dict) else None
    listed = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or ()]
    by_name = {file.name.rpartition("/")[2]: file for file in find_files(path, dataset.follow_links)}
    files = [by_name[name] for name in _names(where, {"filename": listed}, "filename") if name in by_name]
    if len(files) < len(listed):
        raise InputError(f"{path}: data files are missing; expected what save_to_disk writes; save the data set again")
    if not files:
        raise InputError(f"{path}: no data files; expected what save_to_disk writes; save the data set again")
    # The order is the one that was saved, whatever the names are.
    return arrow.open(dataset, files)


def _json(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; expected what save_to_disk writes; save the data set again") from None


def _names(file: Path, value: Any, key: str) -> list[str]:
    """Names of files or folders beside `file`, once it is sure that they are names and lead nowhere else."""
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list) or not all(isinstance(n, str) and n == Path(n).name and n != ".." for n in found):
        raise InputError(
            f"{file}: {key} is {str(found)[:60]}; expected names inside the folder; save the data set again"
        )
    return found


def _choose_split(dataset: DatasetConfig, splits: list[str]) -> str:
    if dataset.split is None and len(splits) == 1:
        return splits[0]
    if dataset.split not in splits:
        raise ConfigError(f"dataset.split: {dataset.split or 'null'}; expected one of {', '.join(splits)}; name one")
    return dataset.split


@dataclass(frozen=True, slots=True)
class _Streamed(InputFile):
    """A data set in the place of a file."""

    digest: str = ""

    def identity(self) -> str:
        return self.digest

    def stamp(self) -> None:
        return None


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
        if _is_local(dataset.path):
            _check_card(Path(path))
        splits = datasets.get_dataset_split_names(path, dataset.config_name, revision=dataset.revision)
    except InputError:
        raise
    except Exception as error:  # whatever the hub or the network raises
        raise _unreachable(dataset, error) from error
    split = _choose_split(dataset, list(splits))
    digest = xxhash.xxh3_128(f"{dataset.config_name}/{split}".encode())
    if _is_local(dataset.path):
        for file in find_files(dataset.path, dataset.follow_links):
            digest.update(f"{file.name} {file.identity()}\n".encode())
        return split, dataset.revision, digest.hexdigest()
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(dataset.path, revision=dataset.revision).sha
    except Exception as error:  # whatever the hub or the network raises
        raise _unreachable(dataset, error) from error
    digest.update(str(commit).encode())
    return split, commit, digest.hexdigest()


def _check_card(folder: Path) -> None:
    """Raises InputError for a local data set whose card names files that are somewhere else, the network included."""
    for name in ("README.md", ".huggingface.yaml"):
        file = folder / name
        text = file.read_bytes()[:MAX_CARD_BYTES].decode("utf-8", "replace") if file.is_file() else ""
        front = text.split("---")[1] if text.startswith("---") else text if name.endswith(".yaml") else ""
        try:
            card = yaml.safe_load(front)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise InputError(f"{file}: {str(error).splitlines()[0]}; expected YAML; correct it") from None
        for said in _strings(card.get("configs") if isinstance(card, dict) else None):
            if "::" in said or "://" in said or said.startswith(("/", "~")) or ".." in Path(said).parts:
                raise InputError(f"{file}: names the file {said!r}; expected names inside the folder; correct it")


def _strings(value: Any) -> Iterator[str]:
    """The texts in YAML, at most as many as a card has: aliases can make few look like endlessly many."""
    parts, seen = [value], 0
    while parts:
        part = parts.pop()
        seen += 1
        if seen > MAX_CARD_PARTS:
            raise InputError(f"README.md: more than {MAX_CARD_PARTS:,} values; expected a data set card; correct it")
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _is_local(path: str) -> bool:
    return not is_url(path) and local_path(path).exists()


def _unreachable(dataset: DatasetConfig, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return InputError(
        f"dataset.path: {dataset.path}: {reason}; expected a data set that `datasets` can stream; check its name, "
        "config_name, revision, the network and HF_TOKEN, or save it with save_to_disk and give that folder"
    )
