"""Writes the rows of a chunk as a Parquet file that waits in the staging folder; the ledger makes it visible."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from runner.chunk import ROW_COLUMN, Chunk, Part
from runner.config import OutputConfig
from runner.errors import ConfigError, InternalError
from runner.storage import Storage, open_storage, part_path, staged_path

CHUNK_METADATA = b"chunk"
"""Key of the file metadata that holds the chunk's identity, as JSON."""


class Sink:
    """Parts of one schema.

    Args:
        folder: The job's output folder (`Ledger.folder`), or its storage.
        metadata: Provenance, written into the metadata of every part.
    """

    def __init__(
        self, folder: str | Storage, schema: pa.Schema, output: OutputConfig, metadata: Mapping[str, str]
    ) -> None:
        if output.compression_level is not None and not pa.Codec.supports_compression_level(output.compression):
            raise ConfigError(
                f"output.compression_level: {output.compression_level} with compression {output.compression}, which "
                "has no levels; expected null; remove it, or use zstd or gzip"
            )
        self.schema = schema
        self._written = pa.schema([field.with_type(_written(field.type)) for field in schema])
        self._storage = open_storage(folder) if isinstance(folder, str) else folder
        self._output = output
        self._metadata = {key.encode(): value.encode() for key, value in metadata.items()}

    def write(self, chunk: Chunk, table: pa.Table, num_errors: int, generation: int = 0) -> Part:
        """Encode and store a chunk's rows durably, not yet visible to readers; `Ledger.commit` makes them so.

        Args:
            table: All rows of the chunk that the source gave, in its order, in the sink's schema.
            generation: 0, or for a chunk that is committed already its part's generation + 1.
        """
        self._check(chunk, table)
        metadata = {**self._metadata, CHUNK_METADATA: orjson.dumps(chunk.identity())}
        data = encode(table.cast(self._written).replace_schema_metadata(metadata), self._output)
        staged = staged_path(chunk.index, generation)
        self._storage.write(staged, data)
        return Part(
            chunk=chunk,
            path=part_path(chunk.index),
            num_rows=table.num_rows,
            num_errors=num_errors,
            num_bytes=data.size,
            checksum=xxhash.xxh3_128_hexdigest(memoryview(data)),
            staged=staged,
            generation=generation,
        )

    def _check(self, chunk: Chunk, table: pa.Table) -> None:
        if not table.schema.equals(self.schema):
            raise InternalError(f"chunk {chunk.index}: schema {table.schema}; expected {self.schema}")
        rows = table.column(ROW_COLUMN).to_numpy()
        if len(rows) and (
            rows[0] < chunk.start or rows[-1] >= chunk.start + chunk.num_rows or not np.all(np.diff(rows) > 0)
        ):
            raise InternalError(
                f"chunk {chunk.index}: its rows are {rows}; expected some of {chunk.start} to "
                f"{chunk.start + chunk.num_rows - 1}, each once and in order"
            )


def _written(data_type: pa.DataType) -> pa.DataType:
    """Lists of one length as plain ones: pyarrow before 26 cannot read a file in which one of the former is null."""
    return pa.list_(data_type.value_type) if pa.types.is_fixed_size_list(data_type) else data_type


def unwritable(data_type: pa.DataType) -> str | None:
    """Why a column of this type cannot be in a part; None if it can."""
    try:
        pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([pa.field("column", data_type)])).close()
    except (pa.ArrowException, OSError) as error:
        return str(error).splitlines()[0]
    return None


def encode(table: pa.Table, output: OutputConfig) -> pa.Buffer:
    """The bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=output.row_group_rows,
        compression=output.compression,
        compression_level=output.compression_level,
    )
    return sink.getvalue()
