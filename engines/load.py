"""From resolved settings to a running engine: the op set by the backend's name, the model, the size of the cache."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch

from engines import costs
from engines.api import EngineConfig, EngineSettings
from engines.core.device import Device, out_of_memory
from engines.core.engine import LLMEngine, Watch
from engines.models.base import Model
from engines.models.load import load_model
from engines.ops import OpSet
from engines.weights import DTYPES


def load_engine(
    settings: EngineSettings,
    detokenize: Callable[[Sequence[int]], str] | None = None,
    watch: Watch = lambda request_ids: None,
) -> LLMEngine:
    """An engine ready for requests. detokenize is needed by requests with stop strings; watch is LLMEngine's.

    A cache for which there is no memory after all is halved until there is; the engine's notes say so.

    Raises CheckpointError or UnsupportedModelError as engines.models.load.load_model does, MemoryError when not even
    one block of KV cache fits.
    """
    threads = getattr(settings.config, "num_threads", None)
    if threads:
        torch.set_num_threads(threads)
    ops = import_opset(settings.backend)()
    dtype, device = DTYPES[settings.dtype], Device(torch.device(settings.device))
    with torch.inference_mode():
        model = load_model(settings, ops)
        count, notes = num_blocks(model, settings.config, dtype, device.free_bytes()), list[str]()
        while True:
            try:
                engine = LLMEngine(
                    model,
                    ops,
                    settings.config,
                    count,
                    dtype,
                    device,
                    settings.eos_token_ids,
                    detokenize,
                    settings.pooling,
                    settings.normalize,
                    watch,
                )
            except (MemoryError, RuntimeError) as error:
                if count < 2 or not out_of_memory(error):
                    raise
                notes.append(f"no memory for a KV cache of {count} blocks: going on with {count // 2}")
                count //= 2
            else:
                engine.notes += notes
                return engine


def import_opset(backend: str) -> type[OpSet]:
    """The op set of a backend, imported with all that it takes: what of loading needs no checkpoint."""
    opset: type[OpSet] = importlib.import_module(f"engines.{backend}.opset").OpSet
    return opset


def num_blocks(model: Model, config: EngineConfig, dtype: torch.dtype, free: int) -> int:
    """Blocks of KV cache: as many as kv_cache_bytes or the share of free memory holds, no more than can be in use."""
    if not model.paged or not model.num_cache_layers:
        return 0
    vectors = 1 if model.latent_rank else 2 * model.num_kv_heads
    vector_bytes = costs.kv_vector_bytes(model.head_dim, str(dtype).removeprefix("torch."), config.kv_dtype)
    block_bytes = model.num_cache_layers * vectors * vector_bytes * config.block_size
    length = min(config.max_model_len or model.max_model_len, model.max_model_len)
    most = config.max_num_seqs * -(-length // config.block_size)
    size = config.kv_cache_bytes or int(config.kv_memory_fraction * free)
    count = min(size // block_bytes, most)
    if count < 1:
        raise MemoryError(
            f"backend_config.kv_cache_bytes: {size:,} bytes; expected at least {block_bytes:,} for one block of "
            f"{config.block_size} tokens; free memory, or make block_size smaller"
        )
    return count
