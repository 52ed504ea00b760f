"""Jobs small enough to be run hundreds of times: a tokenizer of bytes, a plan by hand, rows in Parquet files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engines.api import EngineConfig, EngineSettings, SamplingParams
from engines.platform import Host
from runner.config import DatasetConfig, JobConfig, ModelConfig, OutputConfig
from runner.plan import Plan
from runner.tasks import generate

MAX_MODEL_LEN = 64


def write_model(folder: Path) -> Path:
    """What of a checkpoint the runner itself reads: configuration, tensor headers, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "eos_token_id": 0, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A token for each byte; the printable ASCII characters come first."""
    vocabulary = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")


def write_rows(folder: Path, *files: Sequence[str | None], **columns: Any) -> Path:
    """Parquet files with the columns `id` and `text`, and more: a function of the row's number gives each value."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for number, texts in enumerate(files):
        ids = range(first, first + len(texts))
        table = {"id": pa.array(ids, pa.int64()), "text": pa.array(texts, pa.string())}
        table |= {name: pa.array([value(i) for i in ids]) for name, value in columns.items()}
        pq.write_table(pa.table(table), folder / f"{number}.parquet", row_group_size=100)
        first += len(texts)
    return folder


def make_plan(folder: Path, **changes: Any) -> Plan:
    """The plan of a job that generates from `folder`/rows with `folder`/model into `folder`/out/job.

    changes: of the JobConfig; `dataset` and `output` as mappings, whose keys change the ones here.
    """
    model = folder / "model"
    if not model.exists():
        write_model(model)
    dataset = DatasetConfig(**{"path": str(folder / "rows"), "chunk_rows": 100, **changes.pop("dataset", {})})
    output = OutputConfig(**{"folder": str(folder / "out"), "journal_interval_s": 0.05, **changes.pop("output", {})})
    job = replace(
        JobConfig(
            name="job",
            model=ModelConfig(str(model)),
            dataset=dataset,
            task=generate.Config(name="generate", prompt="{{ text }}"),
            sampling=SamplingParams(max_tokens=8),
            backend_config=EngineConfig(),
            output=output,
            window_rows=256,
        ),
        **changes,
    )
    settings = EngineSettings("cpu", str(model), "float32", EngineConfig(max_model_len=MAX_MODEL_LEN))
    fingerprint = {"dataset": repr(job.dataset), "task": repr(job.task), "samples": str(job.samples)}
    return Plan(job, settings, (), (), (), Host("this", "cpu"), "LlamaForCausalLM", None, fingerprint)


def read_output(folder: str | Path) -> pa.Table:
    """All committed rows, in order of the parts."""
    files = sorted((Path(folder) / "parts").glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])
