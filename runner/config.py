"""The job's configuration, typed: what every YAML key is, means and may be.

The string under a field is its documentation; `--help` and docs/configuration.md are made from it. Bounds stand in the
field's metadata. Composition is Hydra's; `load` turns the composed tree into a frozen JobConfig or one clear message.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engines.api import EngineConfig, SamplingParams


def bounded(default: Any, **bounds: Any) -> Any:
    """A field with bounds: ge, gt, le, lt (numbers), choices (strings), each checked by `load`."""
    return field(default=default, metadata=bounds)


@dataclass(frozen=True)
class ModelConfig:
    """Which checkpoint, and only what it does not say itself."""

    path: str
    """Local folder, `package:<python package>/<folder>` for a checkpoint inside an installed package, or hub id."""
    revision: str | None = None
    """Hub revision; null: the default branch."""
    dtype: str = bounded("auto", choices=("auto", "float32", "float16", "bfloat16"))
    """Compute dtype; auto: the checkpoint's, where the device can."""
    max_model_len: int | None = bounded(None, ge=1)
    """Longest prompt + output in tokens; null: what the checkpoint allows."""
    adapters: dict[str, str] = field(default_factory=dict)
    """LoRA adapters by name: folder of each."""
    trust_remote_code: bool = False
    """Run Python code that the checkpoint brings. Off: such a checkpoint is refused."""


@dataclass(frozen=True)
class ParallelismConfig:
    """How many devices, and what is spread over them."""

    tp: int = bounded(1, ge=1)
    """Tensor parallel: devices that hold one copy of the model together."""
    dp: int = bounded(1, ge=1)
    """Data parallel: copies of the model, fed with different rows."""
    ep: int = bounded(1, ge=1)
    """Expert parallel: devices that a layer's experts are spread over; divides tp * dp."""


@dataclass(frozen=True)
class DatasetConfig:
    """The input rows."""

    path: str
    """File, folder, glob or fsspec URL; `package:` paths as for models; a dataset name for format huggingface."""
    format: str = "auto"
    """parquet, arrow, jsonl, csv, huggingface, openai_batch; auto: by the file name."""
    split: str | None = None
    """Split of a Hugging Face dataset."""
    config_name: str | None = None
    """Configuration (subset) of a Hugging Face dataset."""
    revision: str | None = None
    """Hub revision of a Hugging Face dataset."""
    filter: str | None = None
    """Rows to keep, as an expression over columns: "lang == 'en' and score >= 0.5"."""
    limit: int | None = bounded(None, ge=0)
    """Take only the first rows that pass the filter; null: all."""
    id_column: str | None = None
    """A column of your own that identifies rows; kept in the output. Identity itself is file and row number."""
    chunk_rows: int = bounded(10_000, ge=1)
    """Most rows in a chunk, the unit of commit: a chunk becomes one Parquet file."""


@dataclass(frozen=True)
class OutputConfig:
    """Where and how results are written."""

    folder: str = "outputs"
    """Results go to <folder>/<job name>."""
    format: str = bounded("parquet", choices=("parquet", "openai_batch"))
    """parquet, or parquet plus an OpenAI batch result file made from it at the end."""
    keep_columns: list[str] | None = None
    """Input columns carried over to the output; null: all of them."""
    compression: str = bounded("zstd", choices=("zstd", "snappy", "lz4", "gzip", "none"))
    compression_level: int | None = None
    row_group_rows: int = bounded(10_000, ge=1)
    """Rows in a Parquet row group."""
    token_ids: bool = False
    """Write the generated token ids as a column."""
    journal_interval_s: float = bounded(1.0, gt=0)
    """Finished rows of open chunks reach the journal at least this often: what a kill can cost."""


@dataclass(frozen=True)
class ShardConfig:
    """The slice of the job that this process takes: chunks with index % count == shard.index."""

    index: int = bounded(0, ge=0)
    count: int = bounded(1, ge=1)


@dataclass(frozen=True)
class HostConfig:
    """The machine: this one, or a described one to plan for."""

    name: str = "this"
    """`this` is probed; any other name is described by the keys below and can only be planned for."""
    device: str = bounded("cpu", choices=("cpu", "cuda", "rocm", "xpu", "ascend", "maca", "camb"))
    device_name: str = ""
    num_devices: int = bounded(1, ge=1)
    compute_capability: str | None = None
    """As "9.0", for CUDA devices."""
    memory_gib: float = bounded(0.0, ge=0)
    """Of one device; for cpu the memory of the machine."""
    memory_gb_s: float = bounded(0.0, ge=0)
    """Read bandwidth of one device, GB/s."""
    tflops_16bit: float = bounded(0.0, ge=0)
    """Matrix rate of one device in bfloat16 or float16, TFLOP/s."""
    tflops_32bit: float = bounded(0.0, ge=0)
    cuda: str | None = None
    """CUDA version, as "13.0"."""
    price_per_hour: float | None = bounded(None, ge=0)
    """Of the whole machine, in any currency; plans then show cost."""


@dataclass(frozen=True)
class TaskConfig:
    """What is done with a row. Each task in runner/tasks extends this with its own keys."""

    name: str


@dataclass(frozen=True)
class JobConfig:
    """Everything that a job is."""

    name: str
    """Name of the job and of its output folder."""
    model: ModelConfig
    dataset: DatasetConfig
    task: TaskConfig
    sampling: SamplingParams
    """n and per-row columns are in sampling_columns and samples."""
    backend_config: EngineConfig
    mode: str = bounded("run", choices=("run", "plan", "verify"))
    """run: do the job or go on with it; plan: say what would run and stop; verify: check what is in the output."""
    backend: str = bounded("auto", choices=("auto", "cuda", "triton", "cpu"))
    """auto: the first of cuda, triton, cpu that can run the model; else that engine or an error that says why not."""
    samples: int = bounded(1, ge=1, le=1024)
    """Outputs per row (`sampling.n` in YAML); more than one makes the output columns lists."""
    sampling_columns: dict[str, str] = field(default_factory=dict)
    """Per-row overrides (`sampling.columns` in YAML): sampling parameter -> input column; null in a row: default."""
    parallelism: ParallelismConfig = ParallelismConfig()
    output: OutputConfig = OutputConfig()
    host: HostConfig = HostConfig()
    shard: ShardConfig = ShardConfig()
    seed: int = 0
    """Of the job's random numbers; each row's own stream is derived from it and the row's identity."""
    numerics: str = bounded("invariant", choices=("invariant", "fast"))
    """invariant: a row's result does not depend on what else is in the batch; fast: whatever is quickest."""
    on_unsupported: str = bounded("error", choices=("error", "fallback"))
    """When the engine you named cannot run the model: stop, or take the next one that can and say so."""
    on_change: str = bounded("refuse", choices=("refuse", "new"))
    """When the output folder holds a job that differs from this one: stop with the keys, or use <name>-2, -3, ..."""
    max_error_rate: float = bounded(0.5, ge=0, le=1)
    """Stop when more than this share of the rows so far (at least 100) ended in an error."""
    max_consecutive_errors: int | None = bounded(1000, ge=1)
    retry_errors: bool = False
    """Run again only the rows of a finished job that ended in an error, and put the results in their place."""
    max_runtime_s: float | None = bounded(None, gt=0)
    """Stop cleanly after this time, with exit code 75 if rows are left."""
    grace_s: float = bounded(20.0, ge=0)
    """After a signal: longest time to journal what is finished and leave."""
    window_rows: int = bounded(4096, ge=1)
    """Rows read ahead of the engine, which orders them by shared prefixes and length."""
