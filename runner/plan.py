"""What will run, where, and why: the decision between a configuration and a machine, made before any weight is read.

`resolve` is pure; `make_plan` looks at the checkpoint and the machine for it. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engines import discover, gpu_ledger
from engines.adapters import digest
from engines.api import (
    CheckpointError,
    EngineConfig,
    EngineSettings,
    Kind,
    Requirement,
    UnsupportedModelError,
)
from engines.capability import AT_LOAD, Offer, difference, quantization_attributes, reference_ops
from engines.checkpoint import Checkpoint, open_checkpoint
from engines.models.spec import EncoderSpec, ModelSpec, requirements
from engines.parallel.place import in_the_way
from engines.platform import Host, describe, fit_block_size, probe, resolve_dtype, torch_device, untried
from runner.config import HostConfig, JobConfig
from runner.errors import ConfigError, EngineError, InputError
from runner.fingerprint import fingerprint
from runner.hub import model_folder
from runner.libraries import Libraries, libraries_of
from runner.memory import Memory, gb, memory_notes, memory_of
from runner.parallel import Layout, layout_of
from runner.schema import out_of_bounds
from runner.secrets import mask_tree
from runner.source.paths import shown_url
from runner.storage import join

if TYPE_CHECKING:
    from runner.inspect import Inspection

ORDER = ("cuda", "triton", "cpu")
"""Engines in the order in which backend=auto takes them. The last one is slow rather than unable."""
POOLINGS = ("cls", "mean", "max", "last")


@dataclass(frozen=True)
class Verdict:
    """Whether one engine can run this job on this host, and all that is in its way."""

    engine: str
    missed: tuple[str, ...]
    """Requirements that it misses, one sentence each; () if it can run."""
    dtype: str
    notes: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.missed


@dataclass(frozen=True)
class Plan:
    """Everything there is to know about why this engine runs this job; saved as plan.json next to the results."""

    job: JobConfig
    settings: EngineSettings
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    memory: tuple[Memory, ...]
    """On the device of the chosen engine first; then on the host's accelerator, where another engine was chosen."""
    host: Host
    architecture: str
    spec: ModelSpec | None
    """None for a model that runs through transformers."""
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    inspection: Inspection | None = None
    """What the input holds; for mode=plan."""

    @property
    def output_folder(self) -> str:
        return join(self.job.output.folder, self.job.name)

    @property
    def layout(self) -> Layout:
        """How many devices the job takes, and what each of them does."""
        return layout_of(self.job)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without credentials."""
        plain = {
            name: _plain(getattr(self, name))
            for name in ("job", "settings", "architecture", "spec", "memory", "notes", "host", "fingerprint")
        }
        plain["job"]["dataset"]["path"] = shown_url(self.job.dataset.path)
        plain["verdicts"] = [{"accepted": verdict.accepted, **_plain(verdict)} for verdict in self.verdicts]
        plain["output_folder"] = self.output_folder
        plain["inspection"] = _plain(self.inspection)
        return mask_tree(plain)

    def text(self) -> str:
        """The plan for a person, as lines of plain text."""
        from runner.plan_text import render

        return render(self)


def make_plan(job: JobConfig) -> Plan:
    """The plan for a job: opens the checkpoint, looks at the machine, and decides. With mode=plan, reads some rows too.

    Raises ConfigError, InputError or EngineError, each naming what is in the way.
    """
    planning = job.mode == "plan"
    host = _host(job)
    try:
        folder = model_folder(job.model, weights=not planning)
        checkpoint = open_checkpoint(folder, weights=not planning or bool(list(Path(folder).glob("*.safetensors"))))
        model_digest = checkpoint.digest()
    except CheckpointError as error:
        raise InputError(f"model.path: {error}") from None
    through_transformers = checkpoint.architecture in discover.transformers_causal_architectures()
    plan = resolve(job, checkpoint, host, task_kind(job), through_transformers)
    try:
        adapters = {name: digest(path) for name, path in job.model.adapters.items()}
    except CheckpointError as error:
        raise InputError(f"model.adapters: {error}") from None
    plan = replace(plan, fingerprint=fingerprint(job, plan.settings, model_digest, adapters))
    if planning:
        from runner.inspect import inspect

        plan = replace(plan, inspection=inspect(plan, checkpoint))
    return plan


def _host(job: JobConfig) -> Host:
    if job.host.name == "this":
        written = dataclasses.asdict(job.host)
        probed = [f.name for f in dataclasses.fields(job.host) if f.name != "price_per_hour"]
        given = [key for key in probed if written[key] != getattr(HostConfig(), key)]
        if given:
            raise ConfigError(
                f"host.{given[0]}: {written[given[0]]} with host.name=this; expected no description, as this machine "
                "is probed; remove it, or give the host another name and plan for it with mode=plan"
            )
        return probe(job.host.price_per_hour)
    try:
        return describe(**dataclasses.asdict(job.host))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def task_kind(job: JobConfig) -> Kind:
    """What the task asks of the engine."""
    return cast(Kind, importlib.import_module(f"runner.tasks.{job.task.name}").KIND)


def resolve(job: JobConfig, checkpoint: Checkpoint, host: Host, kind: Kind, through_transformers: bool = False) -> Plan:
    """The decision, as a function of its arguments alone.

    through_transformers: whether transformers has code for the checkpoint's architecture.

    Raises ConfigError for settings that contradict each other or the model, EngineError when no engine, or not the one
    that was asked for, can run it.
    """
    _check_host(job, host)
    spec, notes = _model(job, checkpoint, kind, through_transformers)
    _check_task(job, checkpoint, spec, kind)
    _check_quantization(job, checkpoint)
    pooling, normalize, pooling_notes = _pooling(job, checkpoint, spec, kind)
    length, length_notes = _max_model_len(job, checkpoint, spec, kind)
    wanted = _only_one("dtype", job.model.dtype, job.backend_config.dtype, "auto")
    config = replace(job.backend_config, max_model_len=length, dtype=wanted)
    check_config(config)

    verdicts = tuple(_verdict(name, job, config, checkpoint, spec, kind, host) for name in ORDER)
    chosen = _choose(job, checkpoint, verdicts)
    notes += pooling_notes + length_notes
    config, lost = convert(config, chosen.engine)
    notes += lost
    if chosen.engine != "cpu":
        block_size, changed = fit_block_size(config.block_size, host)
        config = replace(config, block_size=block_size)
        notes += [text for text in (changed, untried(host), *host.problems) if text is not None]
    settings = EngineSettings(
        backend=chosen.engine,
        model_path=checkpoint.path,
        dtype=chosen.dtype,
        config=replace(config, dtype=chosen.dtype),
        kind=kind,
        device="cpu" if chosen.engine == "cpu" else torch_device(host),
        pooling=pooling,
        normalize=normalize,
        eos_token_ids=checkpoint.eos_token_ids,
        implementation="native" if spec else "transformers",
        numerics="fast" if job.numerics == "fast" else "invariant",
        quantization=job.model.quantization,  # type: ignore[arg-type]
        adapters=job.model.adapters,
        libraries=_libraries(chosen.engine, job, config, checkpoint, spec, chosen.dtype, kind, host).ops,
        tp=job.parallelism.tp,
        ep=job.parallelism.ep,
        launch=job.parallelism.launch,  # type: ignore[arg-type]
        trust_remote_code=spec is None and not through_transformers,
    )
    on_cpu, layout = chosen.engine == "cpu", layout_of(job)
    dense = _offer(chosen.engine, host).dequantizes({"dtype": chosen.dtype, **quantization_of(job, checkpoint)})
    stored = job.model.quantization
    memory = [memory_of(checkpoint, spec, chosen.dtype, config, host, on_cpu, layout, dense, stored)]
    if on_cpu and host.device != "cpu":
        dtype = resolve_dtype(wanted, checkpoint.dtype, host, on_cpu=False)[0]
        memory.append(memory_of(checkpoint, spec, dtype, config, host, False, layout, False, stored))
    notes += memory_notes(memory[0])
    return Plan(job, settings, verdicts, tuple(notes), tuple(memory), host, checkpoint.architecture, spec)


def _check_host(job: JobConfig, host: Host) -> None:
    if host.described and job.mode != "plan":
        raise ConfigError(
            f"host.name: {host.name!r} with mode={job.mode}; expected `this`, since a described host can only be "
            "planned for; use mode=plan, or host=this"
        )


def _model(job: JobConfig, checkpoint: Checkpoint, kind: Kind, known: bool) -> tuple[ModelSpec | None, list[str]]:
    """(spec of the native family, or None for a model that runs through transformers; why)."""
    architecture = checkpoint.architecture
    family = discover.family(architecture)
    reason = f"no native family has {architecture}"
    if family is not None:
        try:
            return family.spec(checkpoint.config), []
        except CheckpointError as error:
            raise InputError(f"model.path: {checkpoint.path}: {error}") from None
        except UnsupportedModelError as error:
            reason = f"{family.__name__} cannot run it ({error})"
        except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"model.path: {checkpoint.path}: config.json cannot be read as {architecture} ({error!r}); expected "
                "the sizes that transformers writes; download the checkpoint again"
            ) from None
    own_code = _brings_code(checkpoint) and job.model.trust_remote_code
    if not known and not own_code:
        raise EngineError(_unknown(checkpoint, reason))
    if kind == "classify":
        raise EngineError(
            f"model.path: {architecture} with task {job.task.name}: {reason}; expected a native family, since "
            "transformers serves causal models only; choose another model"
        )
    how = (
        "runs the checkpoint's own Python code" if own_code and not known else "its layers run as transformers has them"
    )
    return None, [f"implementation=transformers: {reason}; {how}"]


def _brings_code(checkpoint: Checkpoint) -> bool:
    auto_map = checkpoint.config.get("auto_map")
    return isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map


def _unknown(checkpoint: Checkpoint, reason: str) -> str:
    found = f"model.path: {reason}, and transformers has no such causal model"
    if _brings_code(checkpoint):
        return (
            f"{found}: it needs the Python code that the checkpoint brings; expected {_families()}, or a causal model "
            "of transformers; read that code, and set model.trust_remote_code=true if you trust it"
        )
    return (
        f"{found}; expected {_families()}, or a causal model of transformers; choose another model or update "
        "transformers"
    )


def _families() -> str:
    return f"one of the native families ({', '.join(discover.families())})"


def _check_task(job: JobConfig, checkpoint: Checkpoint, spec: ModelSpec | None, kind: Kind) -> None:
    architecture, where = checkpoint.architecture, f"task {job.task.name}"
    if kind in ("generate", "score"):
        if isinstance(spec, EncoderSpec):
            raise ConfigError(
                f"{where}: {architecture} is an encoder; expected a causal language model (...ForCausalLM); "
                "use task=embed or choose another model"
            )
        if spec is not None and (spec.num_labels or architecture.endswith("Model")):
            raise ConfigError(
                f"{where}: {architecture} has no language-model head; expected ...ForCausalLM; "
                f"use task={'classify' if spec.num_labels else 'embed'} or choose another model"
            )
    if kind == "classify" and spec is not None and not spec.num_labels:
        raise ConfigError(
            f"{where}: {architecture} has no classification head; expected ...ForSequenceClassification; "
            "choose another model"
        )


def _pooling(
    job: JobConfig, checkpoint: Checkpoint, spec: ModelSpec | None, kind: Kind
) -> tuple[str | None, bool, list[str]]:
    """(pooling, normalize, where they come from): the task's own keys, else the checkpoint's files, else a default."""
    if kind != "embed":
        return None, False, []
    sentence, notes = checkpoint.sentence, []
    pooling, normalize = getattr(job.task, "pooling", None), getattr(job.task, "normalize", None)
    if pooling is None and sentence is not None:
        pooling = sentence.pooling
        notes.append(f"pooling={pooling}: from the checkpoint's modules.json")
    elif pooling is None:
        pooling = "mean" if isinstance(spec, EncoderSpec) else "last"
        notes.append(f"pooling={pooling}: the checkpoint does not say; set task.pooling if it was trained otherwise")
    if normalize is None:
        normalize = sentence.normalize if sentence is not None else True
    if pooling not in POOLINGS:
        raise ConfigError(f"task.pooling: {pooling!r}; expected one of {', '.join(POOLINGS)}; correct it")
    if pooling == "cls" and not isinstance(spec, EncoderSpec):
        raise ConfigError(
            f"task.pooling: cls with {checkpoint.architecture}, whose first token sees no other; "
            "expected last or mean; correct it"
        )
    return pooling, bool(normalize), notes


def _max_model_len(
    job: JobConfig, checkpoint: Checkpoint, spec: ModelSpec | None, kind: Kind
) -> tuple[int | None, list[str]]:
    """(longest prompt + output, notes); None where only the loaded model knows (no positions in its config)."""
    wanted = _only_one("max_model_len", job.model.max_model_len, job.backend_config.max_model_len, None)
    own, limit = (length_of(spec), _rope_limit(spec)) if spec else _config_length(checkpoint.config)
    notes: list[str] = []
    sentence = checkpoint.sentence
    if wanted is None and kind == "embed" and sentence and sentence.max_seq_length and own:
        notes.append(
            f"max_model_len={min(own, sentence.max_seq_length)}: from the checkpoint's sentence_bert_config.json"
        )
        return min(own, sentence.max_seq_length), notes
    if wanted is not None and limit is not None and wanted > limit:
        raise ConfigError(
            f"model.max_model_len: {wanted}; expected at most {limit}, the checkpoint's own length; "
            "lower it or leave it null"
        )
    return wanted or own, notes


def length_of(spec: ModelSpec) -> int:
    return spec.max_position_embeddings


def _rope_limit(spec: ModelSpec) -> int:
    """Longest input that the position scheme is meant for; scaled positions go beyond max_position_embeddings."""
    own = spec.max_position_embeddings
    if isinstance(spec, EncoderSpec):
        return own
    rope = spec.rope
    if rope.kind in ("linear", "dynamic"):
        return math.floor(own * rope.factor)
    return max(own, math.floor((rope.original_max_position_embeddings or 0) * rope.factor))


def _config_length(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx", "max_seq_len"):
        if isinstance(config.get(key), int):
            return config[key], config[key]
    return None, None


def _only_one(key: str, model: Any, engine: Any, unset: Any) -> Any:
    """A setting that stands in two groups: the one that is set."""
    if model != unset and engine != unset and model != engine:
        raise ConfigError(
            f"model.{key}: {model} with backend_config.{key}: {engine}; expected one of them, or equal values; "
            f"remove backend_config.{key}"
        )
    return engine if model == unset else model


def check_config(config: EngineConfig) -> None:
    """Raises ConfigError, with all findings, for engine settings outside their bounds."""
    if findings := out_of_bounds(config, "backend_config"):
        raise ConfigError("\n".join(findings))


def needs(job: JobConfig, checkpoint: Checkpoint, spec: ModelSpec | None, dtype: str, kind: Kind) -> list[Requirement]:
    """All that a job requires of an engine: the model's ops, and what the job adds to them."""
    kv_dtype = job.backend_config.kv_dtype
    quantization = quantization_of(job, checkpoint)
    spread = {key: getattr(job.parallelism, key) for key in ("tp", "dp", "ep")}
    needed = [Requirement("parallelism", {key: value for key, value in spread.items() if value > 1})]
    if spec is None:
        kept = {} if kv_dtype == "auto" else {"kv_dtype": kv_dtype}
        adapted = {"adapters": True} if job.model.adapters else {}
        needed.append(Requirement("transformers_model", {"dtype": dtype, **kept, **adapted, **quantization}))
        return needed
    return needed + requirements(spec, dtype, kind, quantization, adapters=bool(job.model.adapters), kv_dtype=kv_dtype)


def _verdict(
    engine: str,
    job: JobConfig,
    config: EngineConfig,
    checkpoint: Checkpoint,
    spec: ModelSpec | None,
    kind: Kind,
    host: Host,
) -> Verdict:
    on_cpu = engine == "cpu"
    dtype, note = resolve_dtype(config.dtype, checkpoint.dtype, host, on_cpu)
    offer = _offer(engine, host)
    needed = needs(job, checkpoint, spec, dtype, kind)
    missed = difference(needed, offer)
    slow = ", ".join(reference_ops(needed, offer))
    notes = [note] if note else []
    if not offer.blockers:
        libraries = _libraries(engine, job, config, checkpoint, spec, dtype, kind, host)
        missed += libraries.missed
        notes += libraries.notes
    dense = offer.dequantizes({"dtype": dtype, **quantization_of(job, checkpoint)})
    if dense and spec is not None:
        method = quantization_of(job, checkpoint)["quantization"]
        notes.append(f"{method}: weights are dequantized to {dtype} at load and take the memory of that")
    if slow and job.backend == "auto" and engine != ORDER[-1]:
        missed.append(f"{slow}: on the reference inside the decode step")
    elif slow:
        why = f" ({', '.join(offer.notes)})" if offer.notes else ""
        notes.append(f"{slow}: on the reference inside the decode step{why}")
    since = offer.stored_only.get(quantization_of(job, checkpoint).get("weights", ""))
    if since is not None and offer.sm is not None and offer.sm < since:
        method, generation = quantization_of(job, checkpoint)["quantization"], ".".join(map(str, offer.sm))
        least = ".".join(map(str, since))
        notes.append(
            f"{method}: sm {generation} < {least}, so weights are only stored in it, and multiplied as {dtype}"
        )
    layout = layout_of(job)
    undivided = in_the_way(spec, layout.tp, layout.ep, quantization_of(job, checkpoint))
    missed += undivided
    here = job.parallelism.launch == "spawn"
    if here and not on_cpu and not offer.blockers and layout.num_devices > host.num_devices:
        missed.append(
            f"parallelism: tp * dp = {layout.tp} * {layout.dp} = {layout.num_devices} devices; {host.name} has "
            f"{host.num_devices}"
        )
    # What cannot be divided has no share that a device could hold: the whole is shown.
    held = Layout(1, layout.dp, 1) if undivided else layout
    memory = memory_of(checkpoint, spec, dtype, config, host, on_cpu, held, dense, job.model.quantization)
    if memory.fits is False and not offer.blockers and not undivided:
        missed.append(
            f"memory: weights {gb(memory.weight_bytes)} + activations {gb(memory.activation_bytes)} > "
            f"{gb(memory.total_bytes)} of {memory.device}: use a quantized checkpoint, model.quantization=int8 or more "
            "parallelism.tp"
        )
    if not on_cpu and layout.num_devices > 1:
        notes.append("several GPUs have not run this yet: it was tested with several processes on a processor")
    unseen = gpu_ledger.unseen(engine)
    if unseen and not missed:
        notes.append(unseen)
    return Verdict(engine, tuple(missed), dtype, tuple(notes))


def _libraries(
    engine: str,
    job: JobConfig,
    config: EngineConfig,
    checkpoint: Checkpoint,
    spec: ModelSpec | None,
    dtype: str,
    kind: Kind,
    host: Host,
) -> Libraries:
    return libraries_of(engine, config, needs(job, checkpoint, spec, dtype, kind), host, job.numerics != "fast")


def _offer(engine: str, host: Host) -> Offer:
    offer: Offer = importlib.import_module(f"engines.{engine}.offers").offers(host)
    return offer


def quantization_of(job: JobConfig, checkpoint: Checkpoint) -> dict[str, int | str | bool]:
    """What is asked of the op `linear`, by the checkpoint or by model.quantization; {} for plain weights."""
    if job.model.quantization is not None:
        return {"quantization": job.model.quantization, **AT_LOAD[job.model.quantization]}
    return quantization_attributes(checkpoint.quantization)


def _check_quantization(job: JobConfig, checkpoint: Checkpoint) -> None:
    found = quantization_attributes(checkpoint.quantization)
    if job.model.quantization is not None and found:
        raise ConfigError(
            f"model.quantization: {job.model.quantization}, and the checkpoint's weights are quantized already "
            f"({found['quantization']}); expected null, or a checkpoint of plain weights; remove it"
        )


def _choose(job: JobConfig, checkpoint: Checkpoint, verdicts: Sequence[Verdict]) -> Verdict:
    accepted = [verdict for verdict in verdicts if verdict.accepted]
    if job.backend == "auto":
        if accepted:
            return accepted[0]
        reasons = "\n".join(f"  {verdict.engine}: {miss}" for verdict in verdicts for miss in verdict.missed)
        raise EngineError(
            f"backend: auto finds no engine that can run {checkpoint.architecture} here\n{reasons}\n"
            "expected one that misses nothing; change the model or the setting that is named"
        )
    named = next(verdict for verdict in verdicts if verdict.engine == job.backend)
    if named.accepted:
        return named
    if job.on_unsupported == "fallback" and accepted:
        return accepted[0]
    reasons = "\n".join(f"  {miss}" for miss in named.missed)
    others = f", or on_unsupported=fallback to take {accepted[0].engine}" if accepted else ""
    raise EngineError(
        f"backend: {job.backend} cannot run {checkpoint.architecture} here\n{reasons}\n"
        f"expected an engine that misses nothing; use backend=auto{others}"
    )


def convert(config: EngineConfig, engine: str) -> tuple[EngineConfig, list[str]]:
    """(the settings as that engine's own class, a sentence for each one that was set and cannot be carried over).

    Every field is carried whatever its value, falsy ones too, and the result is checked again.
    """
    target = importlib.import_module(f"engines.{engine}.offers").Config
    if type(config) is target:
        return config, []
    names = {f.name for f in dataclasses.fields(target)}
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    converted = target(**{name: value for name, value in values.items() if name in names})
    check_config(converted)
    lost = [
        f"backend_config.{f.name}={values[f.name]}: not carried over, {engine} has no such setting"
        for f in dataclasses.fields(config)
        if f.name not in names and values[f.name] != f.default
    ]
    return converted, lost


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(_plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
