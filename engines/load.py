"""From resolved settings to a running engine: the op set by the backend's name, the model, the size of the cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from engines import costs
from engines.api import EngineConfig, EngineSettings, GPUConfig
from engines.core.device import Device, let_go, out_of_memory
from engines.core.engine import LLMEngine, Watch
from engines.core.profile import step_bytes
from engines.models.base import Model
from engines.models.load import load_model
from engines.ops import OpSet
from engines.parallel.group import ALONE, Group
from engines.parallel.leader import Command, KVLink, LeaderModel
from engines.weights import DTYPES

GRAPH_BYTES = 1 << 30
"""Memory kept for captured decode steps, or a twentieth of what is free if that is less."""


def load_engine(
    settings: EngineSettings,
    detokenize: Callable[[Sequence[int]], str] | None = None,
    watch: Watch = lambda request_ids: None,
    group: Group = ALONE,
) -> LLMEngine:
    """An engine ready for requests. detokenize is needed by requests with stop strings; watch is LLMEngine's. group:
    the ranks that hold the model, of which the caller is the first.

    On an accelerator the largest step is run once, so that the cache gets what it leaves; a step that is too large is
    halved. A cache for which there is no memory after all is halved until there is; the engine's notes say so.

    Raises CheckpointError or UnsupportedModelError as engines.models.load.load_model does, MemoryError when the
    weights, a step of one token or one block of KV cache do not fit.
    """
    prepare(settings)
    ops = make_opset(settings)
    dtype, device = DTYPES[settings.dtype], Device(torch.device(settings.device))
    with torch.inference_mode():
        model = _load_weights(settings, ops, device, group)
        fit = fitted(settings, model, ops, dtype, device, group)
        shared = model if group.place.size == 1 else LeaderModel(model, group)

        def make(count: int) -> LLMEngine:
            return LLMEngine(
                shared,
                ops,
                fit.config,
                count,
                dtype,
                device,
                settings.eos_token_ids,
                detokenize,
                settings.pooling,
                settings.normalize,
                watch,
                group.place.num_copies,
            )

        engine = _with_cache(make, fit.num_blocks, device, group)
        engine.notes[:0] = [*group.notes, *fit.notes]
        engine.take_role(settings.role, KVLink(group, engine.runner.caches))
        if settings.kind == "generate" and settings.role != "prefill":
            engine.capture(fit.graph_bytes)
        return engine


def prepare(settings: EngineSettings) -> None:
    """Settings that are the process's own."""
    threads = getattr(settings.config, "num_threads", None)
    if threads:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Fit:
    """What memory has room for once the weights are loaded."""

    config: EngineConfig
    num_blocks: int
    """Of the KV cache; the same on all ranks."""
    graph_bytes: int
    notes: list[str]


def fitted(settings: EngineSettings, model: Model, ops: OpSet, dtype: torch.dtype, device: Device, group: Group) -> Fit:
    """To be called on every rank of a group: the largest step is theirs together."""
    config, reserved, notes = _sized(settings, model, ops, dtype, device, group)
    captures = isinstance(config, GPUConfig) and config.decode_graphs
    if captures and group.place.num_copies > 1:
        captures = False
        notes.append("decode steps are launched kernel by kernel: those of copies that share experts are not captured")
    graphs = group.least(min(GRAPH_BYTES, device.free_bytes() // 20) if captures else 0)
    free = device.free_bytes() - reserved - graphs
    count = group.least(num_blocks(model, config, dtype, free, not device.overlaps))
    return Fit(config, count, graphs, notes)


def _with_cache(make: Callable[[int], LLMEngine], count: int, device: Device, group: Group) -> LLMEngine:
    """What `make` gives for so many blocks, or for a half, a quarter ... of them where memory runs out on some rank."""
    notes: list[str] = []
    while True:
        group.command([Command.ALLOCATE, count])
        engine, failure = None, None
        try:
            engine = make(count)
        except (MemoryError, RuntimeError) as error:
            failure = let_go(error)
        everywhere = group.least(int(failure is None))
        if engine is not None and everywhere:
            engine.notes += notes
            return engine
        if failure is not None and (count < 2 or not out_of_memory(failure)):
            raise failure
        if count < 2:
            raise MemoryError("no memory for one block of KV cache on another rank; free memory, or raise tp")
        notes.append(f"no memory for a KV cache of {count} blocks: going on with {count // 2}")
        count //= 2
        device.empty_cache()


def _load_weights(settings: EngineSettings, ops: OpSet, device: Device, group: Group) -> Model:
    free = device.free_bytes()
    try:
        return load_model(settings, ops, group)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(
            f"model.path: memory of {settings.device} ran out while weights were read, {free:,} bytes were free; "
            "expected room for all of them; end other programs there, use a quantized checkpoint or "
            f"model.quantization=int8, or spread the model with parallelism.tp ({error})"
        ) from error


def _sized(
    settings: EngineSettings, model: Model, ops: OpSet, dtype: torch.dtype, device: Device, group: Group
) -> tuple[EngineConfig, int, list[str]]:
    """(the settings with a step that fits, the bytes that it takes, notes)."""
    config, notes = settings.config, list[str]()
    if not device.overlaps:
        return config, 0, notes
    length = min(config.max_model_len or model.max_model_len, model.max_model_len)
    while True:
        try:
            reserved = step_bytes(model, ops, config, dtype, device, settings.kind, length)
        except (MemoryError, RuntimeError) as error:
            if group.place.size > 1 or not out_of_memory(error):
                raise  # the other ranks are in the middle of the step
            failure = let_go(error)
        else:
            device.empty_cache()
            return config, reserved, notes
        device.empty_cache()
        if config.max_num_batched_tokens == 1:
            raise MemoryError(
                f"backend_config.max_num_batched_tokens: a step of 1 token does not fit into the "
                f"{device.free_bytes():,} bytes that the weights leave on {settings.device}; use a quantized "
                f"checkpoint, or spread the model with parallelism.tp ({failure})"
            )
        tokens = config.max_num_batched_tokens // 2
        config = replace(config, max_num_batched_tokens=tokens, max_num_seqs=min(config.max_num_seqs, tokens))
        notes.append(f"no memory for a step of {2 * tokens} tokens: going on with max_num_batched_tokens={tokens}")


def make_opset(settings: EngineSettings) -> OpSet:
    """The op set of the settings' engine, with the libraries that the plan has found.

    Raises UnsupportedModelError where an installed library does not work.
    """
    ops = import_opset(settings.backend)()
    ops.invariant = settings.numerics == "invariant"
    for name in sorted(set(settings.libraries.values())):
        library = importlib.import_module(f"engines.{settings.backend}.libraries.{name}")
        library.attach(ops, [op for op, taken in settings.libraries.items() if taken == name])
    return ops


def num_blocks(model: Model, config: EngineConfig, dtype: torch.dtype, free: int, on_cpu: bool = True) -> int:
    """Blocks of KV cache: as many as kv_cache_bytes or the share of free memory holds, no more than can be in use."""
    if not model.paged or not model.num_cache_layers:
        return 0
    vectors = 1 if model.latent_rank else 2 * model.num_kv_heads
    vector_bytes = costs.kv_vector_bytes(model.head_dim, str(dtype).removeprefix("torch."), config.kv_dtype)
    block_bytes = model.num_cache_layers * vectors * vector_bytes * config.block_size
    length = min(config.max_model_len or model.max_model_len, model.max_model_len)
    most = config.max_num_seqs * -(-length // config.block_size)
    size = config.kv_cache_bytes or int(config.kv_fraction(on_cpu) * max(free, 0))
    count = min(size // block_bytes, most)
    if count < 1:
        raise MemoryError(
            f"backend_config.kv_cache_bytes: {size:,} bytes; expected at least {block_bytes:,} for one block of "
            f"{config.block_size} tokens; raise it, or free memory where it is null"
        )
    return count


def import_opset(backend: str) -> type[OpSet]:
    """The op set of a backend, imported with all that it takes: what of loading needs no checkpoint."""
    opset: type[OpSet] = importlib.import_module(f"engines.{backend}.opset").OpSet
    return opset
