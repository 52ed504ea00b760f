"""Weights, activations and KV cache against what a device has, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

from engines import costs
from engines.api import EngineConfig
from engines.checkpoint import FLOAT_DTYPES, ITEM_BITS, Checkpoint
from engines.models.spec import DecoderSpec, ModelSpec
from engines.parallel.place import Place, held_spec
from engines.platform import Host
from runner.parallel import Layout


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
    layout: Layout,
    dequantized: bool = False,
    quantization: str | None = None,
) -> Memory:
    """What one device of the host would hold, or its CPU, which stands for all devices of the layout; spec None: a
    model whose cache is not known.

    dequantized: as weight_bytes. quantization: what plain weights become at load.
    """
    if on_cpu:
        device = host.cpu_name or "the CPU"
        total = host.memory_bytes if host.device == "cpu" else host.cpu_memory_bytes
        free = host.cpu_memory_bytes
    else:
        device, total, free = host.device_name or host.device, host.memory_bytes, host.free_bytes
    length = config.max_model_len or 0
    held = held_spec(spec, Place(0, layout.tp, layout.ep)) if isinstance(spec, DecoderSpec) else spec
    weights = weight_bytes(checkpoint, spec, dtype, dequantized)
    if spec is not None and held is not None:
        weights = weights * costs.num_parameters(held) // costs.num_parameters(spec)
        if quantization is not None and not dequantized:  # to 8 bits, whichever it is
            weights -= costs.held_matrix_parameters(held) * (costs.DTYPE_BYTES[dtype] - 1)
    per_token = costs.kv_bytes_per_token(held, dtype, config.kv_dtype) if held else 0
    tokens = max(config.max_num_batched_tokens, config.max_num_seqs)
    if isinstance(held, DecoderSpec) and isinstance(spec, DecoderSpec):
        held = replace(held, vocab_size=spec.vocab_size)  # a rank's logits are joined with the others'
    activations = costs.activation_bytes(held, dtype, tokens, config.max_num_seqs) if held else 0
    holders = layout.num_devices if on_cpu else 1
    weights, activations = weights * holders, activations * holders
    per_token *= layout.tp if on_cpu else 1
    kv = config.kv_cache_bytes or int(config.kv_fraction(on_cpu) * max(free - weights - activations, 0))
    copies = layout.dp if on_cpu else 1
    if length:  # as engines.load.num_blocks: no more than can be in use
        most = copies * config.max_num_seqs * -(-length // config.block_size) * config.block_size
        kv = min(kv, most * per_token)
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
