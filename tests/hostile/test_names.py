"""Names and texts that are no UTF-8, a user without a home, streams that cannot show what is said to them."""

from __future__ import annotations

import io
import os
import pwd
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runner.__main__ import command_line
from runner.config import resolve_path
from runner.errors import InputError
from runner.source.paths import find_files

LATIN = os.fsdecode("größe".encode("latin-1"))
"""As the system hands on a name or an argument that is no UTF-8."""


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (f"output.folder=/{LATIN}", r"output.folder: '/gr\udcf6\udcdfe'; expected text in UTF-8; correct it"),
        (f"task.prompt='{LATIN}'", r"task.prompt: 'gr\udcf6\udcdfe'; expected text in UTF-8; correct it"),
        (f"name={LATIN}", r"'gr\udcf6\udcdfe'"),
        (f"+task.template_kwargs={{a: ['{LATIN}']}}", r"task.template_kwargs: {'a': ['gr\udcf6\udcdfe']}; expected"),
    ],
)
def test_arguments_that_are_no_utf8(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = ["task=chat", "task.user=a"] if "kwargs" in argument else []
    assert command_line([*task, argument]) == 2
    assert said in capsys.readouterr().err


def test_file_names_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "good.parquet").touch()
    assert len(find_files(str(tmp_path))) == 1
    (tmp_path / f"{LATIN}.parquet").touch()
    for path in (tmp_path, tmp_path / "*.parquet"):
        with pytest.raises(InputError, match=r"gr\\udcf6\\udcdfe.parquet': its name is not UTF-8; .* rename it"):
            find_files(str(path))


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under any number."""
    assert resolve_path("~no-such-user/model") == "~no-such-user/model"
    assert resolve_path("~/model") == str(Path.home() / "model")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    assert resolve_path("~/model") == "~/model"


def test_a_plan_on_a_stream_of_ascii(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["größer ☃"]}), tmp_path / "0.parquet")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    arguments = [
        f"dataset.path={tmp_path}",
        "task=generate",
        "task.prompt='{{ text }}'",
        f"output.folder={tmp_path}/out",
    ]
    assert command_line(["mode=plan", "dataset=parquet", *arguments]) == 0
    assert rb"  | gr\xf6\xdfer \u2603" in stream.buffer.getvalue()


def test_yaml_files_in_a_folder_with_any_name(weird_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = weird_tmp_path / "größe, 100% = #1"
    (folder / "task").mkdir(parents=True)
    (folder / "task" / "größe.yaml").write_text("name: generate\nprompt: 'größe {{ sentence }}'\n", "utf-8")
    monkeypatch.setattr("runner.__main__._run", lambda job: 0 if job.task.prompt == "größe {{ sentence }}" else 1)
    monkeypatch.chdir(weird_tmp_path)
    assert command_line(["--config-dir", str(folder), "task='größe'"]) == 0
