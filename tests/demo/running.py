"""Jobs as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tests.conftest import ROOT


def run_job(folder: Path, *arguments: str) -> str:
    """`python -m runner` in a folder; what it printed. Any exit code but 0 is a failure."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "runner", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def parts(folder: Path, name: str) -> pa.Table:
    """All rows of a job's output, in the order of the file names."""
    files = sorted((folder / "outputs" / name / "parts").glob("*.parquet"))
    assert files
    return pa.concat_tables(pq.read_table(file) for file in files)
