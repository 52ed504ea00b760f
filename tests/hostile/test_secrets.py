"""Credentials that a job was given are in nothing that it leaves or says, whether it ends well or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import ROOT
from tests.small_job import write_rows

TOKEN = "hf_" + "AbCd1234" * 4
ENVIRONMENT = {
    "HF_TOKEN": TOKEN,
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "IQoJb3JpZ2luX2VjEXAMPLETOKEN0123456789",
    "GITHUB_TOKEN": "ghp_" + "a1B2" * 9,
    "MY_API_KEY": "my-own-key-0123456789",
    "DB_PASSWORD": "correct horse battery",
}
IN_URLS = ("pa55w0rd-in-a-url", "sig-0123456789abcdef", "sk-" + "abcdefgh12345678" * 2)
SECRETS = (*ENVIRONMENT.values(), *IN_URLS)
JOB = ["dataset=local", "dataset.path=rows", "sampling.max_tokens=2", "dataset.limit=3", "task=generate"]


def runner(folder: Path, *arguments: str) -> tuple[int, str]:
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(folder)}
    command = [sys.executable, "-m", "runner", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def check(folder: Path, printed: str) -> int:
    """Looks for every secret in what was printed and in all files, Parquet's metadata and decoded values among them."""
    texts = {"what was printed": printed}
    for path in folder.rglob("*"):
        if path.is_file() and "rows" not in path.relative_to(folder).parts:
            texts[str(path)] = path.read_bytes().decode("latin-1")
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                texts[f"{path}, read"] = f"{table.schema.metadata} {table.to_pylist()}"
        texts[f"the name {path}"] = str(path.relative_to(folder))
    for place, text in texts.items():
        for secret in SECRETS:
            assert secret not in text, f"{secret} is in {place}"
    return len(texts)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([*JOB, "task.prompt='{{ text }}'"], 0),
        ([*JOB, "task.prompt='{{ text }}'", "mode=plan"], 0),
        (["-m", *JOB, "task.prompt='{{ text }}'", "seed=1,2"], 0),
        ([*JOB, f"task.prompt='{IN_URLS[2]} {{{{ text }}}}'", "name=x"], 0),
        ([*JOB, "task.prompt='{{ text }}'", f"name=a{TOKEN}"], 2),
        ([*JOB, f"output.folder=s3://user:{IN_URLS[0]}@nowhere/x", "task.prompt='{{ text }}'"], None),
        (["dataset=local", f"dataset.path='https://user:{IN_URLS[0]}@127.0.0.1:9/x.jsonl?sig={IN_URLS[1]}'"], 2),
        (["dataset=local", "dataset.remote=true", f"dataset.path='https://u:{IN_URLS[0]}@127.0.0.1:9/x.jsonl'"], None),
        (["dataset=local", "dataset.path=${oc.env:HF_TOKEN}"], None),
        ([*JOB, "task.prompt=${oc.env:AWS_SECRET_ACCESS_KEY}"], None),
        (["model=local", f"model.path=org/{TOKEN}"], None),
        ([*JOB, f"no_such_key={TOKEN}"], 2),
        ([*JOB, f"seed={TOKEN}"], 2),
        ([*JOB, "task.prompt='{{ text }}'", f"dataset.filter=\"text == '{TOKEN}'\""], None),
        (["--cfg", "job", f"dataset.path=s3://user:{IN_URLS[0]}@bucket/x"], 0),
        (["--env"], None),
    ],
)
def test_no_secret_is_left_or_said(tmp_path: Path, arguments: list[str], code: int | None) -> None:
    write_rows(tmp_path / "rows", ["one", "two", "three"])
    found, printed = runner(tmp_path, *arguments)
    assert "Traceback" not in printed
    assert code is None or found == code, printed
    assert check(tmp_path, printed) > 1


def test_the_check_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "run.log").write_text(f"token={TOKEN}")
    with pytest.raises(AssertionError, match=r"is in .*run\.log"):
        check(tmp_path, "")
