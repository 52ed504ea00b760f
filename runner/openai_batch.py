"""An OpenAI batch result file made from committed parts: batch_output.jsonl, and batch_errors.jsonl for failed rows.

Made at the end of a job with output.format=openai_batch, and can be made again at any time. Lines are in input order.

Source: https://platform.openai.com/docs/api-reference/batch/request-output
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow.parquet as pq
import xxhash

from runner.chunk import FILE_COLUMN, ROW_COLUMN
from runner.errors import ConfigError
from runner.ledger import Ledger
from runner.storage import TEMPORARY_FOLDER, Storage

OUTPUT_FILE = "batch_output.jsonl"
ERROR_FILE = "batch_errors.jsonl"
_BATCH_ROWS = 1000
_BUFFER_BYTES = 1 << 20


def write_batch_files(ledger: Ledger, model: str, created: int = 0) -> tuple[int, int]:
    """Write both files next to the parts; how many results and errors they hold.

    Each appears whole, under a temporary name until then. Memory: some rows.

    Args:
        model: Named in a response where its request names none.
        created: Unix time in every response; 0 keeps the bytes of two runs equal.

    Raises:
        ConfigError: The parts have neither a text nor an embedding column.
    """
    results, errors = _LineFile(ledger.storage, OUTPUT_FILE), _LineFile(ledger.storage, ERROR_FILE)
    for row in _rows(ledger):
        file = results if row.get("error_code") is None else errors
        file.write(orjson.dumps(_line(row, model, created), option=orjson.OPT_APPEND_NEWLINE))
    results.publish()
    errors.publish()
    return results.num_lines, errors.num_lines


class _LineFile:
    """A file that appears under its name when it is whole."""

    def __init__(self, storage: Storage, path: str) -> None:
        self.num_lines = 0
        self._storage = storage
        self._path = path
        self._staged = f"{TEMPORARY_FOLDER}/{path}.{secrets.token_hex(8)}"
        self._file = storage.append_to(self._staged)
        self._buffer = bytearray()

    def write(self, line: bytes) -> None:
        self._buffer += line
        self.num_lines += 1
        if len(self._buffer) >= _BUFFER_BYTES:
            self._flush()

    def publish(self) -> None:
        self._flush()
        self._file.sync()
        self._file.close()
        self._storage.publish(self._staged, self._path)

    def _flush(self) -> None:
        self._file.append(bytes(self._buffer))
        self._buffer.clear()


def _rows(ledger: Ledger) -> Iterator[dict[str, Any]]:
    parts = ledger.done()
    for index in sorted(parts):
        with ledger.storage.open(parts[index].path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(_BATCH_ROWS, use_threads=False):
                yield from batch.to_pylist()


def _line(row: dict[str, Any], model: str, created: int) -> dict[str, Any]:
    identity = xxhash.xxh3_64_hexdigest(f"{row[FILE_COLUMN]}:{row[ROW_COLUMN]}".encode())
    line: dict[str, Any] = {"id": f"batch_req_{identity}", "custom_id": row.get("custom_id"), "response": None}
    if row.get("error_code") is not None:
        return {**line, "error": {"code": row["error_code"], "message": row.get("error_message")}}
    body = _body(row, row.get("model") or model, identity, created)
    response = {"status_code": 200, "request_id": f"req_{identity}", "body": body}
    return {**line, "response": response, "error": None}


def _body(row: dict[str, Any], model: str, identity: str, created: int) -> dict[str, Any]:
    usage = {"prompt_tokens": row.get("num_prompt_tokens") or 0}
    if "embedding" in row:
        usage["total_tokens"] = usage["prompt_tokens"]
        data = [{"object": "embedding", "index": 0, "embedding": row["embedding"]}]
        return {"object": "list", "data": data, "model": model, "usage": usage}
    if "text" not in row:
        raise ConfigError(
            "output.format: openai_batch, and this task gives neither text nor embeddings; expected task generate, "
            "chat or embed; set output.format=parquet"
        )
    texts, reasons = _listed(row["text"]), _listed(row.get("finish_reason"))
    usage["completion_tokens"] = sum(count or 0 for count in _listed(row.get("num_output_tokens")))
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    is_chat = row.get("url") != "/v1/completions"
    choices = []
    for index, text in enumerate(texts):
        content = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        reason = reasons[index] if index < len(reasons) else None
        choices.append({"index": index, **content, "logprobs": None, "finish_reason": reason})
    kind = ("chatcmpl", "chat.completion") if is_chat else ("cmpl", "text_completion")
    return {
        "id": f"{kind[0]}-{identity}",
        "object": kind[1],
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage,
    }


def _listed(value: Any) -> list[Any]:
    """With several samples a row, columns are lists."""
    return value if isinstance(value, list) else [value]
