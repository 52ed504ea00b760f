"""OpenAI batch input files: JSON Lines of {"custom_id", "method", "url", "body"}, as columns with a fixed schema.

Columns: custom_id, url, model, messages, prompt, input, and one for each sampling parameter, null where the request
does not set it; `sampling.columns` in the configuration makes those count. What this runner cannot honour (tools,
images, several choices a request, ...) makes an error row that says so, never a request that means something else.

Source: https://platform.openai.com/docs/api-reference/batch/request-input
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from runner.config import DatasetConfig
from runner.source.jsonl import JsonLinesSource
from runner.source.paths import InputFile

SUFFIXES = ()
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
SAMPLING = {
    "temperature": pa.float64(),
    "top_p": pa.float64(),
    "top_k": pa.int64(),
    "min_p": pa.float64(),
    "repetition_penalty": pa.float64(),
    "presence_penalty": pa.float64(),
    "frequency_penalty": pa.float64(),
    "max_tokens": pa.int64(),
    "min_tokens": pa.int64(),
    "stop": pa.list_(pa.string()),
    "stop_token_ids": pa.list_(pa.int64()),
    "ignore_eos": pa.bool_(),
    "logprobs": pa.int64(),
}
"""Columns of sampling parameters: the body's own and those that vLLM adds."""
SCHEMA = pa.schema(
    [
        ("custom_id", pa.string()),
        ("url", pa.string()),
        ("model", pa.string()),
        ("messages", MESSAGES),
        ("prompt", pa.string()),
        ("input", pa.string()),
        *SAMPLING.items(),
    ]
)
_WITHOUT_EFFECT = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "stream_options",
    "safety_identifier",
    "prompt_cache_key",
}
_DEFAULTS: dict[str, Any] = {"stream": False, "n": 1, "best_of": 1, "echo": False, "encoding_format": "float"}
"""Parameters that may be given if they ask for what is done anyway."""


def open(dataset: DatasetConfig, files: Sequence[InputFile]) -> OpenAIBatchSource:
    """The requests of OpenAI batch files."""
    return OpenAIBatchSource(dataset, files)


class OpenAIBatchSource(JsonLinesSource):
    """Rows of OpenAI batch files."""

    def infer_schema(self) -> pa.Schema:
        return SCHEMA

    def table(
        self, rows: list[dict[str, Any]], numbers: list[int], broken: dict[int, str], columns: list[str]
    ) -> pa.Table:
        flat = []
        for position, row in enumerate(rows):
            try:
                flat.append({} if position in broken else flatten(row))
            except ValueError as error:
                custom_id = row.get("custom_id")
                flat.append({"custom_id": custom_id} if isinstance(custom_id, str) else {})
                broken[position] = str(error)
        return super().table(flat, numbers, broken, columns)


def flatten(request: dict[str, Any]) -> dict[str, Any]:
    """Column values of a request. Raises ValueError, saying why, if it cannot be honoured."""
    body, url = request.get("body"), request.get("url")
    if not isinstance(request.get("custom_id"), str):
        raise ValueError(f"custom_id: {request.get('custom_id')!r}; expected a string")
    if request.get("method", "POST") != "POST":
        raise ValueError(f"method: {request['method']!r}; expected POST")
    if url not in URLS:
        raise ValueError(f"url: {url!r}; expected one of {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise ValueError(f"body: {body!r}; expected an object")
    row: dict[str, Any] = {"custom_id": request["custom_id"], "url": url}
    for key, value in body.items():
        if value is None or key in _WITHOUT_EFFECT or (key in _DEFAULTS and value == _DEFAULTS[key]):
            continue
        if key == "messages":
            row["messages"] = _messages(value)
        elif key in ("prompt", "input"):
            row[key] = _text(key, value)
        elif key == "max_completion_tokens":
            row["max_tokens"] = value
        elif key == "stop":
            row["stop"] = [value] if isinstance(value, str) else value
        elif key in ("logprobs", "top_logprobs"):
            continue
        elif key in SAMPLING or key == "model":
            row[key] = value
        else:
            raise ValueError(f"body.{key}: {str(value)[:60]}; this runner has no such parameter; remove it")
    row["logprobs"] = _logprobs(body)
    wanted = {"/v1/chat/completions": "messages", "/v1/completions": "prompt", "/v1/embeddings": "input"}[url]
    if row.get(wanted) is None:
        raise ValueError(f"body.{wanted}: missing; expected it for {url}")
    return row


def _logprobs(body: dict[str, Any]) -> int | None:
    """Both spellings: chat has logprobs (bool) and top_logprobs, completions an integer."""
    logprobs = body.get("logprobs")
    if isinstance(logprobs, bool):
        return int(body.get("top_logprobs") or 0) if logprobs else None
    return logprobs


def _text(key: str, value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise ValueError(f"body.{key}: {str(value)[:60]}; expected one string; write a request for each")
    return value


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"body.messages: {str(value)[:60]}; expected a list of messages")
    return [_message(f"body.messages[{index}]", message) for index, message in enumerate(value)]


def _message(where: str, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(f"{where}: {str(message)[:60]}; expected an object with role and content")
    surplus = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if surplus:
        raise ValueError(f"{where}.{surplus[0]}: expected role and content only; this runner takes no tools or names")
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}.content: parts that are not text; this runner takes text only")
        content = "".join(str(text) for text in texts)
    if not isinstance(content, str) or not isinstance(message.get("role"), str):
        raise ValueError(f"{where}: expected role and content to be strings")
    return {"role": message["role"], "content": content}
