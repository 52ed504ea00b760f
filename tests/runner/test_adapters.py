"""A job whose rows name their adapters, from Parquet to Parquet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from engines import discover
from engines.api import SamplingParams
from engines.cpu.offers import Config
from runner.config import DatasetConfig, JobConfig, ModelConfig, OutputConfig
from runner.errors import InputError
from runner.job import run
from runner.plan import make_plan
from runner.tasks import generate
from tests.engines.adapters import write_adapter
from tests.parity.checkpoints import make_checkpoint
from tests.small_job import read_output, write_rows, write_tokenizer

NAMES = [None, "a", "b", "nobody", None, "a", "b", "a"]
TEXTS = ["one", "two", "three", "four", "one", "two", "three", "one"]


@pytest.fixture
def job(tmp_path: Path) -> JobConfig:
    base = tmp_path / "base"
    make_checkpoint({**discover.families()["llama"].tiny_config(), "vocab_size": 256}, base)
    write_tokenizer(base)
    weights = load_file(base / "model.safetensors")
    modules = [name.removesuffix(".weight") for name in weights if "q_proj.weight" in name or "v_proj.weight" in name]
    for seed, name in enumerate("ab"):
        write_adapter(tmp_path / name, weights, modules, 4, seed)
    rows = write_rows(tmp_path / "rows", TEXTS, which=lambda i: NAMES[i])
    return JobConfig(
        name="job",
        model=ModelConfig(str(base), adapters={name: str(tmp_path / name) for name in "ab"}, adapter_column="which"),
        dataset=DatasetConfig(path=str(rows)),
        task=generate.Config(name="generate", prompt="{{ text }}"),
        sampling=SamplingParams(max_tokens=8),
        backend="cpu",
        backend_config=Config(kv_cache_bytes=1 << 20, num_threads=1),
        output=OutputConfig(folder=str(tmp_path / "out")),
        max_error_rate=1.0,
    )


def texts(asked: JobConfig) -> list[dict[str, Any]]:
    return read_output(run(make_plan(asked)).folder).to_pylist()


def test_rows_name_their_adapters(job: JobConfig) -> None:
    rows = texts(job)
    assert [row["error_code"] for row in rows] == [None if n != "nobody" else "unknown_adapter" for n in NAMES]
    assert rows[3]["error_message"] == "there is no adapter 'nobody'; the job has a, b"
    assert rows[0]["text"] == rows[4]["text"] and rows[1]["text"] == rows[5]["text"]
    for number, name in enumerate((None, "a", "b")):
        model = replace(job.model, adapter=name, adapter_column=None)
        everywhere = texts(replace(job, name=f"all {number}", model=model))
        mine = [i for i, wanted in enumerate(NAMES) if wanted == name]
        assert [everywhere[i]["text"] for i in mine] == [rows[i]["text"] for i in mine]
        assert everywhere[7]["text"] == rows[7]["text"] or name != "a"
    assert len({rows[0]["text"], rows[7]["text"]}) == 2, "the adapter changes nothing: the test shows nothing"


def test_another_adapter_in_the_same_folder_is_another_job(job: JobConfig) -> None:
    first = make_plan(job).fingerprint
    file = Path(job.model.adapters["a"]) / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    second = make_plan(job).fingerprint
    assert {key for key in first if first[key] != second[key]} == {"model.adapters"}
    file.unlink()
    with pytest.raises(InputError, match=r"model.adapters: .* has no adapter_config.json"):
        make_plan(job)
