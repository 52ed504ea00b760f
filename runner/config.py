"""The job's configuration, typed: what every YAML key is, means and may be.

The string under a field is its documentation; `--help` and docs/configuration.md are made from it. Bounds stand in the
field's metadata. Composition is Hydra's; `load` turns the composed tree into a frozen JobConfig or one clear message.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engines import discover
from engines.api import EngineConfig, SamplingParams, bounded
from engines.capability import AT_LOAD
from runner import parallel, schema
from runner.errors import ConfigError
from runner.schema import Key
from runner.secrets import holds_secret, mask, mask_tree


@dataclass(frozen=True)
class ModelConfig:
    """Which checkpoint, and only what it does not say itself."""

    path: str
    """Local folder, `package:<python package>/<folder>` for a checkpoint inside an installed package, or hub id."""
    revision: str | None = None
    """Hub revision; null: the default branch."""
    dtype: str = bounded("auto", choices=("auto", "float32", "float16", "bfloat16"))
    """Compute dtype; auto: the checkpoint's, where the device can."""
    quantization: str | None = bounded(None, choices=tuple(AT_LOAD))
    """Quantize plain weights while they are loaded: int8 has 8-bit weights and inputs; w8a16 8-bit weights and inputs
    in the compute dtype, and is nearer to the checkpoint. null: as the checkpoint is."""
    max_model_len: int | None = bounded(None, ge=1)
    """Longest prompt + output in tokens; null: what the checkpoint allows."""
    adapters: dict[str, str] = field(default_factory=dict)
    """LoRA adapters by name: folder of each, as PEFT's save_pretrained writes it."""
    adapter: str | None = None
    """The adapter of rows that name none; null: the model as it is."""
    adapter_column: str | None = None
    """Column that names each row's adapter; where it is null, `adapter` applies. Rows with different adapters run
    together."""
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
    """Expert parallel: devices that a layer's experts are spread over, of the tp * dp that there are; a divisor or a
    multiple of tp."""
    prefill: int = bounded(0, ge=0)
    """So many of the copies have role prefill: they compute prompts only and hand them over to the other copies, which
    have role decode. 0: all are hybrid, each does all of its rows."""
    launch: str = bounded("spawn", choices=("spawn", "srun", "torchrun"))
    """spawn: this process starts those of the other devices, all on its own machine. srun, torchrun: one process for
    each device was started by that, on one machine or several, each with this same command."""


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
    remote: bool = False
    """Let `path` be a URL that leads to another machine (s3, gs, https, ...). Off: it is refused."""
    follow_links: bool = False
    """Let symbolic links in a folder or under a glob lead out of it. Off: such a link is refused."""


@dataclass(frozen=True)
class OutputConfig:
    """Where and how results are written."""

    folder: str = "outputs"
    """Results go to <folder>/<job name>: a folder, or s3://, gs://, az:// with credentials in the environment."""
    format: str = bounded("parquet", choices=("parquet", "openai_batch"))
    """parquet, or parquet plus an OpenAI batch result file made from it at the end."""
    keep_columns: list[str] | None = None
    """Input columns carried over to the output; null: all of them."""
    compression: str = bounded("zstd", choices=("zstd", "snappy", "lz4", "gzip", "none"))
    """Of the Parquet pages."""
    compression_level: int | None = None
    """For zstd (1 to 22) and gzip (1 to 9); higher is smaller and slower; null: the compressor's own default."""
    row_group_rows: int = bounded(10_000, ge=1)
    """Rows in a Parquet row group."""
    token_ids: bool = False
    """Write the generated token ids as a column."""
    journal_interval_s: float = bounded(1.0, gt=0)
    """Finished rows of open chunks reach the journal at least this often: what a kill can cost."""


@dataclass(frozen=True)
class ShardConfig:
    """What of the job this process takes."""

    index: int = bounded(0, ge=0)
    """Number of this slice, from 0."""
    count: int = bounded(1, ge=1)
    """Number of slices; each may run at any time and on any machine that sees the output folder."""
    sharing: str = bounded("fixed", choices=("fixed", "leases"))
    """fixed: the chunks whose number % count == index, and no others. leases: those first, then any that nobody works
    on, so that a fast worker does more and a dead one's work is done by the others."""
    lease_s: float = bounded(60.0, ge=0.5)
    """With leases: others take over the chunks of a worker on another machine that gave no sign of life for this time.
    Too short costs work done twice, nothing else."""


@dataclass(frozen=True)
class HostConfig:
    """The machine: this one, or a described one to plan for."""

    name: str = "this"
    """`this` is probed; any other name is described by the keys below and can only be planned for."""
    device: str = bounded("cpu", choices=("cpu", "cuda", "rocm", "xpu", "ascend", "maca", "camb"))
    """Kind of accelerator; cpu: none."""
    device_name: str = ""
    """As its maker calls it; for people only."""
    num_devices: int = bounded(1, ge=1)
    """Equal devices in the machine."""
    compute_capability: str | None = None
    """As "9.0", for CUDA devices."""
    memory_gib: float = bounded(0.0, ge=0)
    """Of one device; for cpu the memory of the machine."""
    memory_gb_s: float = bounded(0.0, ge=0)
    """Read bandwidth of one device, GB/s."""
    tflops_16bit: float = bounded(0.0, ge=0)
    """Matrix rate of one device in bfloat16 or float16, TFLOP/s."""
    tflops_32bit: float = bounded(0.0, ge=0)
    """The same in float32."""
    cuda: str | None = None
    """CUDA version, as "13.0"."""
    price_per_hour: float | None = bounded(None, ge=0)
    """Of the whole machine, in any currency; plans then show cost."""


@dataclass(frozen=True, slots=True)
class SamplingConfig(SamplingParams):
    """How the next token is chosen and when an output ends; names and meanings are those of vLLM and OpenAI."""

    n: int = bounded(1, ge=1, le=1024)
    """Outputs per row; more than one makes the output columns lists."""
    columns: dict[str, str] = field(default_factory=dict)
    """Per-row overrides: sampling parameter -> input column that has it; null in a row: the value given here."""


@dataclass(frozen=True)
class TaskConfig:
    """What is done with a row. Each task in runner/tasks extends this with its own keys."""

    name: str
    """The task: a module of runner/tasks."""


@dataclass(frozen=True)
class JobConfig:
    """Everything that a job is."""

    name: str
    """Name of the job and of its output folder. null: made of the model, dataset and task that were chosen."""
    model: ModelConfig
    dataset: DatasetConfig
    task: TaskConfig
    sampling: SamplingParams
    """n and per-row columns are in sampling_columns and samples."""
    backend_config: EngineConfig
    mode: str = bounded("run", choices=("run", "plan", "status", "merge", "verify"))
    """run: do the job or go on with it; plan: say what would run and stop; status: how far it is; merge: write the
    success mark once all shards are done; verify: check what is in the output."""
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
    """Stop after this many rows in a row that ended in an error; null: never for this reason."""
    retry_errors: bool = False
    """Run again only the rows of a finished job that ended in an error, and put the results in their place."""
    max_runtime_s: float | None = bounded(None, gt=0)
    """Stop cleanly after this time, with exit code 75 if rows are left."""
    grace_s: float = bounded(20.0, ge=0)
    """After a signal: longest time to journal what is finished and leave."""
    step_timeout_s: float = bounded(600.0, gt=0)
    """An engine that ends no step in this time hangs: its stacks go to run.log, it is ended and started again."""
    window_rows: int = bounded(4096, ge=1)
    """Rows read ahead of the engine, which orders them by shared prefixes and length."""


PROJECT_FOLDER = Path(__file__).resolve().parent.parent
"""What holds conf and, in a source checkout, jobs."""
NOT_IN_YAML = ("samples", "sampling_columns")
"""Fields of JobConfig that YAML has elsewhere: sampling.n and sampling.columns."""
ENGINE_NAME = Key(
    "name",
    str,
    "auto",
    {"choices": ("auto", "cuda", "triton", "cpu")},
    "The engine that these settings are for; any but auto chooses it, as the key backend does.",
)
COMPRESSION_LEVELS = {"zstd": range(1, 23), "gzip": range(1, 10)}


def load(cfg: DictConfig) -> JobConfig:
    """The job that a composed configuration describes.

    Raises ConfigError with all that is wrong with it, a line for each finding.
    """
    try:
        tree: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_interpolation_message(error)) from None
    except RecursionError:
        raise ConfigError("configuration: nested too deep; expected a few levels; correct it") from None
    findings = list(_interpolated_secrets(OmegaConf.to_container(cfg, resolve=False), tree, ""))
    backend = _backend(tree, findings)
    task = _task_module(tree, findings)
    known = job_keys(backend, task)
    if findings and task is None:  # without a task its keys cannot be judged
        known = [replace(key, hint=Any) if key.name == "task" else key for key in known]
    values = schema.arguments(known, tree, "", findings)
    if findings:
        raise ConfigError("\n".join(findings))
    sampling: SamplingConfig = values.pop("sampling")
    params = {f.name: getattr(sampling, f.name) for f in dataclasses.fields(SamplingParams)}
    job = JobConfig(
        **{**values, "backend": backend},
        samples=sampling.n,
        sampling_columns=sampling.columns,
        sampling=SamplingParams(**params),
    )
    if findings := combinations(job, getattr(task, "KIND", None)):
        raise ConfigError("\n".join(findings))
    return job


def job_keys(backend: str = "auto", task: Any = None) -> list[Key]:
    """The keys of a whole configuration, with the settings of that engine and of that task module."""
    hints = {
        "sampling": SamplingConfig,
        "backend_config": backend_class(backend),
        "task": task.Config if task is not None else TaskConfig,
    }
    found = [key for key in schema.keys(JobConfig) if key.name not in NOT_IN_YAML]
    return [replace(key, hint=hints.get(key.name, key.hint)) for key in found]


def backend_class(backend: str) -> type[EngineConfig]:
    """The settings of an engine; those that all engines share for auto."""
    return EngineConfig if backend == "auto" else importlib.import_module(f"engines.{backend}.offers").Config


def task_modules() -> dict[str, Any]:
    """The tasks by name: modules of runner.tasks that have a Config."""
    return {name: module for name, module in discover.modules("runner.tasks").items() if hasattr(module, "Config")}


def combinations(job: JobConfig, kind: str | None) -> list[str]:
    """What is wrong with values that are each sound, a line for each finding. kind: what the task asks of an engine."""
    return [
        *_path_findings(job),
        *_model_findings(job),
        *_sampling_findings(job, kind),
        *_output_findings(job),
        *_run_findings(job, kind),
    ]


def _path_findings(job: JobConfig) -> Iterator[str]:
    # As from a shell's variable that is not set: an empty path would be the current folder.
    paths = {"model.path": job.model.path, "dataset.path": job.dataset.path, "output.folder": job.output.folder}
    for key, path in paths.items():
        if not path.strip():
            yield f"{key}: {path!r}; expected a path; write . for the current folder"


def _model_findings(job: JobConfig) -> Iterator[str]:
    model = job.model
    known = ", ".join(model.adapters) or "none"
    if model.adapter is not None and model.adapter not in model.adapters:
        yield f"model.adapter: {model.adapter!r}; expected one of model.adapters, which are {known}; correct the name"
    if model.adapter_column is not None and not model.adapters:
        yield f"model.adapter_column: {model.adapter_column!r} without model.adapters; expected both or none; add them"
    if model.adapters and model.adapter is None and model.adapter_column is None:
        yield f"model.adapters: {known}, and no row uses one; expected model.adapter or model.adapter_column; set it"


def _sampling_findings(job: JobConfig, kind: str | None) -> Iterator[str]:
    sampling, columns, generating = job.sampling, job.sampling_columns, kind in ("generate", None)
    if job.samples > 1 and not generating:
        yield (
            f"sampling.n: {job.samples} with task {job.task.name}; expected 1, as only tasks that generate have "
            "several outputs; set sampling.n=1"
        )
    elif job.samples > 1 and sampling.temperature == 0 and "temperature" not in columns:
        yield (
            f"sampling.n: {job.samples} with sampling.temperature=0; expected a temperature above 0, as greedy outputs "
            "are all alike; raise the temperature or set sampling.n=1"
        )
    if columns and not generating:
        yield (
            f"sampling.columns: {', '.join(columns)} with task {job.task.name}; expected none, as only tasks that "
            "generate sample; remove it"
        )
    known = [key.name for key in schema.keys(SamplingParams)]
    for name in columns:
        if name not in known:
            yield (
                f"sampling.columns.{name}: no such sampling parameter; expected one of {', '.join(known)}; "
                + schema.advice(name, known, "remove it")
            )
    if "" in sampling.stop:
        yield "sampling.stop: holds an empty text; expected texts that end an output; remove it"
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        yield (
            f"sampling.min_tokens: {sampling.min_tokens}; expected at most sampling.max_tokens, which is "
            f"{sampling.max_tokens}; lower the one or raise the other"
        )


def _output_findings(job: JobConfig) -> Iterator[str]:
    name, compression, level = job.name, job.output.compression, job.output.compression_level
    if name in ("", ".", "..") or any(char in name for char in "/\\\0\n") or len(name.encode(errors="replace")) > 200:
        yield f"name: {name!r}; expected a name for a folder, at most 200 bytes; leave out slashes, or shorten it"
    levels = COMPRESSION_LEVELS.get(compression, range(0))
    if level is not None and level not in levels:
        expected = f"{levels[0]} to {levels[-1]}, or null" if levels else "null"
        yield f"output.compression_level: {level} with compression {compression}; expected {expected}; correct it"


def _run_findings(job: JobConfig, kind: str | None) -> Iterator[str]:
    if mask(job.name) != job.name:
        yield "name: holds a credential; expected a name that anybody may see, as it is the output folder's; change it"
    if job.retry_errors and job.mode != "run":
        yield f"retry_errors: true with mode={job.mode}; expected mode=run; remove one of them"
    if job.retry_errors and job.shard.sharing == "leases":
        yield "retry_errors: true with shard.sharing=leases; expected shard.sharing=fixed; set it"
    if job.shard.index >= job.shard.count:
        yield (
            f"shard.index: {job.shard.index}; expected less than shard.count, which is {job.shard.count} (the first is "
            "0); correct it"
        )
    yield from parallel.findings(job.parallelism.tp, job.parallelism.dp, job.parallelism.ep, job.parallelism.prefill)
    if job.parallelism.prefill and kind not in (None, "generate"):
        yield (
            f"parallelism.prefill: {job.parallelism.prefill} with task {job.task.name}, whose rows end with their "
            "prompts; expected 0, as there is nothing to hand over; remove it"
        )
    engines = parallel.layout_of(job).num_engines
    if job.parallelism.launch != "spawn" and engines > 1:
        yield (
            f"parallelism.launch: {job.parallelism.launch} with dp={job.parallelism.dp}: {engines} engines; expected "
            "one for the processes that were started; set dp=1, and share the rows between jobs with shard.count or "
            "shard.sharing"
        )


def resolve_path(path: str) -> str:
    """A path with its prefix resolved: `package:<python package>/<folder>` to where the package is installed (it is not
    imported), `project:<folder>` to the folder that holds `conf`, `~` to the home folder. Others come back as they are.

    Raises ConfigError when there is no such package.
    """
    prefix, separator, rest = path.partition(":")
    if not separator or prefix not in ("package", "project"):
        return os.path.expanduser(path)  # noqa: PTH111 -- Path.expanduser raises where there is no home folder
    if prefix == "project":
        return str(PROJECT_FOLDER / rest)
    package, _, folder = rest.partition("/")
    found = _package_folder(package)
    if found is None:
        raise ConfigError(
            f"{path}: no Python package {package!r} is installed here; expected package:<package>/<folder>; "
            f"pip install {package.replace('_', '-')}, or give a path"
        )
    return str(found / folder)


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    locations = list(spec.submodule_search_locations or ()) if spec else []
    return Path(locations[0]) if locations else None


def to_yaml(job: JobConfig) -> str:
    """The whole configuration of a job, resolved, as YAML that can be run again; credentials stand as ***."""
    tree = mask_tree(dataclasses.asdict(job))
    tree["sampling"] |= {"n": tree.pop("samples"), "columns": tree.pop("sampling_columns")}
    tree["backend_config"] = {"name": job.backend, **tree["backend_config"]}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _backend(tree: dict[str, Any], findings: list[str]) -> str:
    """The engine that was chosen by `backend` and `backend_config.name`, which is taken out of the tree."""
    settings = tree.get("backend_config")
    given = {"backend": tree.get("backend", "auto")}
    if isinstance(settings, dict) and "name" in settings:
        given["backend_config.name"] = settings.pop("name")
    for path, value in given.items():
        if value not in ENGINE_NAME.bounds["choices"]:
            if path != "backend":  # `backend` itself is among the keys that are checked
                findings.append(schema.finding(path, value, ENGINE_NAME))
            return "auto"
    chosen = sorted({value for value in given.values() if value != "auto"})
    if len(chosen) > 1:
        findings.append(
            f"backend: {given['backend']} with backend_config={given['backend_config.name']}; expected one engine; "
            "remove one of them"
        )
    return chosen[0] if chosen else "auto"


def _task_module(tree: Mapping[str, Any], findings: list[str]) -> Any:
    """The module of the task; None, and a finding, when there is none of that name."""
    task = tree.get("task")
    if not isinstance(task, dict):
        return None
    found = task_modules()
    name = task.get("name", schema.MISSING)
    if isinstance(name, str) and name in found:
        return found[name]
    key = replace(schema.keys(TaskConfig)[0], bounds={"choices": tuple(found)})
    schema.arguments([key], {"name": name}, "task", findings)
    return None


def _interpolated_secrets(written: Any, resolved: Any, path: str) -> Iterator[str]:
    """Keys that fetch a credential from the environment (`${oc.env:HF_TOKEN}`) into what is saved and computed with.

    dataset.path may: URLs can need them, and are never shown with them.
    """
    if isinstance(written, str):
        if "${" in written and path != "dataset.path" and holds_secret(str(resolved)):
            yield (
                f"{path}: {written} holds a credential; expected none, as configurations are saved with the results; "
                "leave it in the environment, where the libraries that need it find it"
            )
    elif isinstance(written, dict) and isinstance(resolved, dict):
        for name in written.keys() & resolved.keys():
            yield from _interpolated_secrets(written[name], resolved[name], f"{path}.{name}" if path else str(name))
    elif isinstance(written, list) and isinstance(resolved, list):
        for place, (inner, value) in enumerate(zip(written, resolved, strict=False)):
            yield from _interpolated_secrets(inner, value, f"{path}[{place}]")


def _interpolation_message(error: OmegaConfBaseException) -> str:
    text, key = str(error.msg or error).split("\n")[0], error.full_key or "configuration"
    return f"{key if key.isprintable() else ascii(key)}: {text}; expected a value that can be resolved; correct it"
