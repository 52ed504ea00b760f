"""Weights, activations and KV cache against what a device has, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from engines import costs
from engines.api import EngineConfig
from engines.checkpoint import FLOAT_DTYPES, ITEM_BITS, Checkpoint
from engines.models.spec import DecoderSpec, ModelSpec
from engines.platform import Host


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, against what the device has; 0 means unknown."""

    device: str
    dtype: str
    total_bytes: int
    free_bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    """What the KV cache gets."""
    max_model_len: int
    num_copies: int = 1
    """Of the model, among which the KV cache is divided."""

    @property
    def fits(self) -> bool | None:
        """None: not known."""
        if not self.total_bytes:
            return None
        return self.weight_bytes + self.activation_bytes < self.total_bytes

    @property
    def kv_tokens(self) -> int:
        return self.kv_bytes // self.kv_bytes_per_token if self.kv_bytes_per_token else 0

    def num_seqs(self, num_tokens: float) -> int:
        """Sequences of that many tokens that the cache holds at once."""
        return int(self.kv_tokens // num_tokens) if num_tokens else 0


def weight_bytes(checkpoint: Checkpoint, spec: ModelSpec | None, dtype: str, dequantized: bool = False) -> int:
    """What the weights take once loaded: float tensors in the compute dtype, packed ones as they are.

    dequantized: whether the engine turns packed ones into the compute dtype.
    """
    if not checkpoint.tensors or (dequantized and spec):
        return costs.weight_bytes(spec, dtype) if spec else 0
    tied = isinstance(spec, DecoderSpec) and spec.tie_word_embeddings
    total = 0
    for name, tensor in checkpoint.tensors.items():
        if tied and name == "lm_head.weight":
            continue
        if tensor.dtype in FLOAT_DTYPES and checkpoint.quantization is None:
            total += tensor.num_bytes * 8 // ITEM_BITS[tensor.dtype] * costs.DTYPE_BYTES[dtype]
        else:
            total += tensor.num_bytes
    return total


def memory_of(
    checkpoint: Checkpoint,
    spec: ModelSpec | None,
    dtype: str,
    config: EngineConfig,
    host: Host,
    on_cpu: bool,
    tp: int,
    dequantized: bool = False,
    quantization: str | None = None,
    dp: int = 1,
) -> Memory:
    """What one device of the host would hold, or its CPU, which holds all dp copies; spec None: a model whose cache is
    not known."""
    if on_cpu:
        device = host.cpu_name or "the CPU"
        total = host.memory_bytes if host.device == "cpu" else host.cpu_memory_bytes
        free = host.cpu_memory_bytes
        tp = 1
    else:
        device, total, free = host.device_name or host.device, host.memory_bytes, host.free_bytes
    length = config.max_model_len or 0
    weights = weight_bytes(checkpoint, spec, dtype, dequantized) // tp
    if quantization == "int8" and spec:
        weights -= costs.held_matrix_parameters(spec) * (costs.DTYPE_BYTES[dtype] - 1) // tp
    per_token = costs.kv_bytes_per_token(spec, dtype, config.kv_dtype) // tp if spec else 0
    tokens = max(config.max_num_batched_tokens, config.max_num_seqs)
    activations = costs.activation_bytes(spec, dtype, tokens, config.max_num_seqs) if spec else 0
    copies = dp if on_cpu else 1
    weights, activations = weights * copies, activations * copies
    kv = config.kv_cache_bytes or int(config.kv_fraction(on_cpu) * max(free - weights - activations, 0))
    return Memory(device, dtype, total, free, weights, activations, per_token, kv if per_token else 0, length, copies)


def memory_notes(memory: Memory) -> list[str]:
    notes = []
    if not memory.total_bytes:
        notes.append(f"memory of {memory.device}: not described, so whether the model fits is not known")
    elif memory.weight_bytes + memory.activation_bytes > memory.free_bytes:
        notes.append(
            f"memory: {gb(memory.free_bytes)} of {memory.device} are free now, the model takes "
            f"{gb(memory.weight_bytes + memory.activation_bytes)}: close other programs"
        )
    elif memory.kv_bytes_per_token and (held := memory.kv_tokens // memory.num_copies) < memory.max_model_len:
        holder = "KV cache" if memory.num_copies == 1 else "KV cache of each copy of the model"
        notes.append(
            f"{holder}: holds {held:,} tokens, fewer than max_model_len={memory.max_model_len:,}: a longer "
            "request ends in an error; raise backend_config.kv_memory_fraction or kv_cache_bytes"
        )
    return notes


def gb(num_bytes: float) -> str:
    """Decimal units, as devices and checkpoints are sold."""
    if num_bytes >= 1e8:
        return f"{num_bytes / 1e9:,.1f} GB"
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:,.1f} kB"
