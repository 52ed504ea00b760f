"""What jobs/examples says of itself is so. That each of them composes and loads is tested with conf."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from runner.source.filter import parse
from tests.conftest import ROOT

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
