"""Writing into the cache: rotation and writing in one launch, and what must not be stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines.ops import OpSet
from engines.ops.kv_cache import KVCache, QuantizedKVCache
from tests.cases import tensors
from tests.compare import assert_bitwise_equal

SHAPES = ((5, 3, 20, 20), (3, 2, 33, 12), (2, 1, 64, 64))
"""Tokens, heads of keys (queries have twice as many), head_dim, rotary_dim."""


def empty(ops: OpSet, kind: str, heads: int, head_dim: int, dtype: torch.dtype) -> KVCache | QuantizedKVCache:
    cpu = torch.device("cpu")
    if kind == "plain":
        cache: Any = ops.allocate_kv_cache(4, 8, heads, head_dim, dtype, cpu)
    else:
        cache = ops.allocate_quantized_kv_cache(4, 8, heads, head_dim, kind, cpu)  # type: ignore[arg-type]
    for name in ("k", "v"):
        codes = getattr(cache, name)
        (codes if codes.itemsize > 1 else codes.view(torch.uint8)).zero_()
        if kind != "plain":
            getattr(cache, f"{name}_scales").zero_()
    return cache  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["plain", "int8", "int4", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_turned_and_written_at_once_as_one_after_the_other(ops: OpSet, kind: str, dtype: torch.dtype) -> None:
    """Bit for bit, whichever dimensions are turned; tokens without an angle or a slot are left alone."""
    for rows, heads, head_dim, rotary_dim in SHAPES:
        generator = torch.Generator().manual_seed(rows)
        q, k, v = (torch.randn(rows, n, head_dim, generator=generator).to(dtype) for n in (2 * heads, heads, heads))
        angles = torch.rand(10, rotary_dim // 2, generator=generator) * 6
        table = torch.cat((angles.cos(), angles.sin()), 1).to(dtype)
        positions, slots = torch.arange(rows) + 4, torch.arange(rows) * 7 % 32
        slots[-1] = -1
        one, other = (empty(ops, kind, heads, head_dim, dtype) for _ in range(2))
        turned, given = q.clone(), k.clone()
        ops.rope_write_kv(turned, given, v, positions, table, one, slots)
        assert_bitwise_equal(given, k)
        ops.rope(q, k, positions, table)
        write: Any = ops.write_kv if kind == "plain" else ops.write_quantized_kv
        write(k, v, other, slots)
        for found, expected in zip((turned, *tensors(one)), (q, *tensors(other)), strict=True):
            assert_bitwise_equal(found, expected)
        before = [t.clone() for t in tensors(one)]
        nowhere = torch.full_like(positions, 10)
        ops.rope_write_kv(turned, given, v, nowhere, table, one, slots.clamp(min=0))
        for found, expected in zip((turned, *tensors(one)), (q, *before), strict=True):
            assert_bitwise_equal(found, expected)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_number_that_is_none_is_seen_in_the_scale(ops: OpSet, kind: str) -> None:
    """As the reference has it: the whole vector is none then, the others are not."""
    cache, expected = (empty(ops, kind, 1, 8, torch.float32) for _ in range(2))
    k = torch.linspace(-1, 2, 24).view(3, 1, 8)
    k[1, 0, 5] = float("nan")
    slots = torch.arange(3)
    ops.write_quantized_kv(k, k, cache, slots)  # type: ignore[arg-type]
    OpSet().write_quantized_kv(k, k, expected, slots)  # type: ignore[arg-type]
    assert isinstance(cache, QuantizedKVCache) and isinstance(expected, QuantizedKVCache)
    assert_bitwise_equal(cache.k_scales[..., 0].isnan(), expected.k_scales[..., 0].isnan())
    assert cache.k_scales[0, 0, :3, 0].isnan().tolist() == [False, True, False]
