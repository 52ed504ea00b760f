"""Ops of the compiled library, csrc/cpu: each has the name of the op it stands for. Needs engines.extension.load()."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.batch import Batch, PrefixGroup
from engines.cpu import memory
from engines.ops import OpSet, activation, kv_cache, norm, rotary, sampling
from engines.ops import attention as reference
from engines.ops.kv_cache import KVCache, QuantizedKVCache


class PackedKVCache(KVCache):
    """Keys and values of each block in tiles that the matrix unit multiplies by as they lie: csrc/cpu/packed.h.

    The tensors' shapes are the plain ones, but for what their last two dimensions mean.
    """


def allocate_kv_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """As the reference, in huge pages; packed for bfloat16 where the processor has a matrix unit."""
    plain = memory.allocate_kv_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype, device)
    if dtype != torch.bfloat16 or head_dim % 32 or block_size % 32 or not torch.ops.cpu_ops.packs_kv():
        return plain
    return PackedKVCache(plain.k, plain.v)


def paged_attention(
    q: Tensor,
    cache: KVCache,
    batch: Batch,
    softmax_scale: float,
    window_size: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the reference, for float32, float16 and bfloat16; sums in float32 over tiles of keys that lie at fixed
    positions. So a token's bits depend on its own sequence, not on the batch around it.

    Blocks that a prefix group shares are read once for all its members, to the same bits.
    """
    if q.dtype == torch.float64:
        return reference.paged_attention(q, cache, batch, softmax_scale, window_size, softcap, sinks)
    assert batch.block_tables is not None
    result: Tensor = torch.ops.cpu_ops.paged_attention(
        q,
        cache.k,
        cache.v,
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.block_tables,
        *_flat(batch.prefix_groups),
        None if sinks is None else sinks.float(),
        softmax_scale,
        window_size,
        softcap,
        isinstance(cache, PackedKVCache),
    )
    return result


CODES = {"int8": 1, "int4": 2, "fp8": 3}
"""As csrc/cpu/attention.h numbers them."""


def quantized_attention(
    q: Tensor,
    cache: QuantizedKVCache,
    batch: Batch,
    softmax_scale: float,
    window_size: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the reference, in the tiles of paged_attention: keys and values are not rounded to q's dtype."""
    if q.dtype == torch.float64:
        return reference.quantized_attention(OpSet(), q, cache, batch, softmax_scale, window_size, softcap, sinks)
    assert batch.block_tables is not None
    result: Tensor = torch.ops.cpu_ops.quantized_attention(
        q,
        cache.k,
        cache.v,
        cache.k_scales,
        cache.v_scales,
        CODES[cache.kv_dtype],
        batch.cu_seqlens_q,
        batch.seq_lens,
        batch.block_tables,
        *_flat(batch.prefix_groups),
        None if sinks is None else sinks.float(),
        softmax_scale,
        window_size,
        softcap,
    )
    return result


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, batch: Batch, softmax_scale: float) -> Tensor:
    """As the reference, in the tiles of paged_attention: a token's bits depend on its own sequence alone."""
    if q.dtype == torch.float64:
        return reference.encoder_attention(q, k, v, batch, softmax_scale)
    result: Tensor = torch.ops.cpu_ops.encoder_attention(q, k, v, batch.cu_seqlens_q, softmax_scale)
    return result


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """As the reference."""
    if x.dtype == torch.float64:
        return norm.rms_norm(x, weight, eps, weight_offset)
    result: Tensor = torch.ops.cpu_ops.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps, weight_offset)
    return result.view(x.shape)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    if x.dtype == torch.float64:
        return norm.add_rms_norm(x, residual, weight, eps, weight_offset)
    normed, total = torch.ops.cpu_ops.add_rms_norm(x, residual, weight, eps, weight_offset)
    return normed, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """As the reference."""
    if x.dtype == torch.float64:
        return norm.layer_norm(x, weight, bias, eps, residual)
    rows = None if residual is None else residual.reshape(-1, x.shape[-1])
    result: Tensor = torch.ops.cpu_ops.layer_norm(x.reshape(-1, x.shape[-1]), weight, bias, eps, rows)
    return result.view(x.shape)


ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "swiglu_oai": 4}
"""As csrc/cpu/activation.h numbers them."""


def act(x: Tensor, name: str) -> Tensor:
    """As the reference."""
    if x.dtype == torch.float64:
        return activation.act(x, name)
    rows = x.reshape(-1, x.shape[-1])
    torch.ops.cpu_ops.act_(rows, ACTIVATIONS[name])
    return rows.view(x.shape)


def act_and_mul(gate_up: Tensor, name: str) -> Tensor:
    """As the reference."""
    if gate_up.dtype == torch.float64:
        return activation.act_and_mul(gate_up, name)
    result: Tensor = torch.ops.cpu_ops.act_and_mul(gate_up, ACTIVATIONS[name])
    return result


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """As the reference."""
    if q.dtype == torch.float64:
        return rotary.rope(q, k, positions, cos_sin)
    torch.ops.cpu_ops.rope(q, k, positions, cos_sin)


def write_kv(k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
    """As the reference."""
    if k.dtype == torch.float64 or k.dtype != cache.k.dtype:
        return kv_cache.write_kv(k, v, cache, slot_mapping)
    torch.ops.cpu_ops.write_kv(k, v, cache.k, cache.v, slot_mapping, isinstance(cache, PackedKVCache))


def write_quantized_kv(k: Tensor, v: Tensor, cache: QuantizedKVCache, slot_mapping: Tensor) -> None:
    """As the reference, to the same bits. A vector with a number that is not finite is read back as NaN."""
    if k.dtype == torch.float64:
        return kv_cache.write_quantized_kv(k, v, cache, slot_mapping)
    codes, scales = (cache.k, cache.v), (cache.k_scales, cache.v_scales)
    torch.ops.cpu_ops.write_quantized_kv(k, v, *codes, *scales, slot_mapping, CODES[cache.kv_dtype])
    return None


def rope_write_kv(
    self: OpSet,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    cache: KVCache | QuantizedKVCache,
    slot_mapping: Tensor,
) -> None:
    """As the reference, in one call: each token is rotated and written by one thread."""
    if q.dtype == torch.float64 or (isinstance(cache, KVCache) and k.dtype != cache.k.dtype):
        return kv_cache.rope_write_kv(self, q, k, v, positions, cos_sin, cache, slot_mapping)
    rotation, codes = (q, k, v, positions, cos_sin), (cache.k, cache.v)
    if isinstance(cache, QuantizedKVCache):
        scales, kind = (cache.k_scales, cache.v_scales), CODES[cache.kv_dtype]
        torch.ops.cpu_ops.rope_write_quantized_kv(*rotation, *codes, *scales, slot_mapping, kind)
    else:
        torch.ops.cpu_ops.rope_write_kv(*rotation, *codes, slot_mapping, isinstance(cache, PackedKVCache))
    return None


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
    if logits.dtype == torch.float64:
        return sampling.argmax(logits)
    best, index = torch.ops.cpu_ops.argmax(logits)
    return best, index


def log_softmax_gather(logits: Tensor, targets: Tensor) -> Tensor:
    """As the reference, in the logits' own dtype: nothing of the vocabulary's size is made."""
    if logits.dtype == torch.float64:
        return sampling.log_softmax_gather(logits, targets)
    result: Tensor = torch.ops.cpu_ops.log_softmax_gather(logits, targets)
    return result


def _flat(groups: tuple[PrefixGroup, ...]) -> tuple[Tensor | None, Tensor | None]:
    """(members end to end, [num_groups, 2] of members and blocks), both int32; None without groups."""
    if not groups:
        return None, None
    shape = [(len(group.seqs), group.num_blocks) for group in groups]
    return torch.cat([group.seqs for group in groups]), torch.tensor(shape, dtype=torch.int32)
