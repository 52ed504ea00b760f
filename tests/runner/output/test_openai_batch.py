"""OpenAI's batch files, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from runner.chunk import ERROR_COLUMN, FILE_COLUMN, ROW_COLUMN, Chunk
from runner.config import DatasetConfig, OutputConfig
from runner.errors import ConfigError
from runner.ledger import Ledger
from runner.openai_batch import write_batch_files
from runner.sink import Sink
from runner.source import open_source


def read(path: Path, requests: list[Any]) -> list[dict[str, Any]]:
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    source = open_source(DatasetConfig(str(path), format="openai_batch"))
    return [row for chunk in source.chunks() for row in source.read(chunk, None).to_pylist()]


def chat(**body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages, **body}}


def test_requests_become_columns(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = read(
        tmp_path / "a.jsonl",
        [
            chat(model="m", temperature=0.5, max_completion_tokens=7, stop="x", logprobs=True, top_logprobs=3, n=1),
            chat(messages=[{"role": "user", "content": parts, "name": None}], seed=None, stream=False, user="u"),
            {
                "custom_id": "p",
                "url": "/v1/completions",
                "body": {"prompt": ["one"], "stop": ["a", "b"], "logprobs": 2},
            },
            {"custom_id": "e", "url": "/v1/embeddings", "body": {"input": "text", "encoding_format": "float"}},
        ],
    )
    assert ERROR_COLUMN not in rows[0]
    assert (rows[0]["model"], rows[0]["temperature"], rows[0]["max_tokens"]) == ("m", 0.5, 7)
    assert (rows[0]["stop"], rows[0]["logprobs"], rows[0]["top_p"]) == (["x"], 3, None)
    assert rows[1]["messages"] == [{"role": "user", "content": "ab"}]
    assert (rows[2]["prompt"], rows[2]["stop"], rows[2]["logprobs"]) == ("one", ["a", "b"], 2)
    assert (rows[3]["input"], rows[3]["url"], rows[3]["messages"]) == ("text", "/v1/embeddings", None)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (chat(tools=[{"type": "function"}]), "body.tools"),
        (chat(n=3), "body.n: 3"),
        (chat(temprature=1), "body.temprature"),
        (chat(stream=True), "body.stream"),
        (chat(temperature="hot"), "column temperature: found 'hot'; expected double"),
        (chat(messages=[]), "body.messages: []"),
        (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "this runner takes text only"),
        (chat(messages=[{"role": "assistant", "content": "", "tool_calls": [1]}]), "body.messages[0].tool_calls"),
        ({"custom_id": "c", "url": "/v1/responses", "body": {}}, "url: '/v1/responses'"),
        ({"custom_id": "c", "url": "/v1/completions", "body": {"prompt": ["a", "b"]}}, "expected one string"),
        ({"custom_id": "c", "url": "/v1/completions", "body": {"input": "a"}}, "body.prompt: missing"),
        ({"url": "/v1/completions", "body": {}}, "custom_id: None"),
        ({"custom_id": "c", "method": "GET", "url": "/v1/completions", "body": {}}, "method: 'GET'"),
        ([1], "a JSON list"),
    ],
)
def test_what_cannot_be_honoured_is_an_error_row(tmp_path: Path, request_: Any, message: str) -> None:
    good, bad = read(tmp_path / "a.jsonl", [chat(), request_])
    assert good[ERROR_COLUMN] is None and message in bad[ERROR_COLUMN]
    assert bad["custom_id"] == (request_.get("custom_id") if isinstance(request_, dict) else None)


def commit(folder: Path, columns: dict[str, Any], num_chunks: int = 1) -> Ledger:
    ledger = Ledger.open(str(folder), {})
    for index in range(num_chunks):
        size = len(columns["error_code"])
        table = pa.table(
            {FILE_COLUMN: ["f"] * size, ROW_COLUMN: range(index * size, index * size + size), **columns},
        )
        table = table.set_column(
            table.schema.get_field_index("error_code"), "error_code", table.column("error_code").cast(pa.string())
        )
        sink = Sink(str(folder), table.schema, OutputConfig(), {})
        ledger.commit(sink.write(Chunk(index, "f", "id", index * size, size), table, 0))
    return ledger


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_of_chat(tmp_path: Path) -> None:
    columns = {
        "custom_id": ["a", "b", "c"],
        "url": ["/v1/chat/completions", "/v1/completions", "/v1/chat/completions"],
        "model": ["x", None, None],
        "text": ["hällo", "one", None],
        "finish_reason": ["stop", "length", None],
        "num_prompt_tokens": [3, 4, None],
        "num_output_tokens": [2, 1, None],
        "error_code": [None, None, "too_long"],
        "error_message": [None, None, "the prompt is too long"],
    }
    assert write_batch_files(commit(tmp_path, columns, num_chunks=2), "default") == (4, 2)
    found, errors = lines(tmp_path / "batch_output.jsonl"), lines(tmp_path / "batch_errors.jsonl")
    assert [line["custom_id"] for line in found] == ["a", "b"] * 2 and len({line["id"] for line in found}) == 4
    body = found[0]["response"]["body"]
    assert found[0]["error"] is None and found[0]["response"]["status_code"] == 200
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "hällo"}
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert (body["object"], body["model"], body["choices"][0]["finish_reason"]) == ("chat.completion", "x", "stop")
    body = found[1]["response"]["body"]
    assert (body["object"], body["model"], body["choices"][0]["text"]) == ("text_completion", "default", "one")
    assert errors[0]["error"] == {"code": "too_long", "message": "the prompt is too long"}
    assert errors[0]["response"] is None and errors[0]["custom_id"] == "c"
    before = (tmp_path / "batch_output.jsonl").read_bytes()
    write_batch_files(Ledger.existing(str(tmp_path)), "default")
    assert (tmp_path / "batch_output.jsonl").read_bytes() == before
    assert list((tmp_path / "staging").iterdir()) == []


def test_results_of_several_samples_and_of_embeddings(tmp_path: Path) -> None:
    samples = {
        "custom_id": ["a"],
        "text": [["x", "y"]],
        "finish_reason": [["stop", "length"]],
        "num_prompt_tokens": [3],
        "num_output_tokens": [[2, 5]],
        "error_code": [None],
    }
    write_batch_files(commit(tmp_path / "samples", samples), "m")
    (line,) = lines(tmp_path / "samples/batch_output.jsonl")
    choices = line["response"]["body"]["choices"]
    assert [(choice["index"], choice["finish_reason"]) for choice in choices] == [(0, "stop"), (1, "length")]
    assert line["response"]["body"]["usage"]["completion_tokens"] == 7
    embeddings = {"custom_id": ["a"], "embedding": [[1.0, 0.5]], "num_prompt_tokens": [3], "error_code": [None]}
    write_batch_files(commit(tmp_path / "embeddings", embeddings), "m")
    (line,) = lines(tmp_path / "embeddings/batch_output.jsonl")
    assert line["response"]["body"]["data"] == [{"object": "embedding", "index": 0, "embedding": [1.0, 0.5]}]
    with pytest.raises(ConfigError, match=r"output\.format: openai_batch"):
        write_batch_files(commit(tmp_path / "none", {"label": ["x"], "error_code": [None]}), "m")
