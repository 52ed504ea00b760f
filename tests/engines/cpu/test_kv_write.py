"""Rotation and the cache in one call: to the bits of rotating first and writing token by token, however tokens lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines import extension
from engines.cpu.opset import OpSet
from engines.ops.kv_cache import KVCache, KVDtype, QuantizedKVCache, block_tensors
from tests.compare import assert_bitwise_equal

pytestmark = pytest.mark.skipif(extension.reason() is not None, reason=str(extension.reason()))
NUM_BLOCKS = 4
DTYPES = st.sampled_from((torch.bfloat16, torch.float32, torch.float16))


@st.composite
def slots_of(draw: st.DrawFn, block_size: int) -> list[int]:
    """Runs of slots that begin and end anywhere, none written twice."""
    limit = NUM_BLOCKS * block_size
    starts = draw(st.lists(st.integers(0, limit - 1), min_size=1, max_size=6, unique=True))
    ends = [*sorted(starts)[1:], limit]
    runs = [range(a, draw(st.integers(a + 1, b))) for a, b in zip(sorted(starts), ends, strict=True)]
    return [slot for run in draw(st.permutations(runs)) for slot in run]


def allocate(ops: OpSet, kind: KVDtype, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> object:
    if kind == "auto":
        return ops.allocate_kv_cache(*sizes, dtype, torch.device("cpu"))
    return ops.allocate_quantized_kv_cache(*sizes, kind, torch.device("cpu"))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    dtype=DTYPES,
    kind=st.sampled_from(("auto", "auto", "int8", "int4", "fp8")),
    block_size=st.sampled_from((16, 32, 64)),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    head_dim=st.sampled_from((32, 64, 96, 40, 80)),
    share=st.sampled_from((1.0, 0.5)),
)
def test_one_call_or_many(
    data: st.DataObject,
    dtype: torch.dtype,
    kind: KVDtype,
    block_size: int,
    heads: tuple[int, int],
    head_dim: int,
    share: float,
) -> None:
    ops, slots = OpSet(), torch.tensor(data.draw(slots_of(block_size)))
    num_tokens, (num_heads, num_kv_heads) = len(slots), heads
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    positions = torch.randint(0, 50, (num_tokens,), generator=generator)
    cos_sin = torch.randn(50, int(head_dim * share), generator=generator).to(dtype)
    sizes = (NUM_BLOCKS, block_size, num_kv_heads, head_dim)
    caches = [allocate(ops, kind, sizes, dtype) for _ in range(2)]
    for cache in caches:
        for tensor in block_tensors(cache):
            tensor.view(torch.uint8).fill_(7)

    q, k, v = qkv.clone().split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    ops.rope_write_kv(q, k, v, positions, cos_sin, caches[0], slots)

    other_q, other_k, other_v = qkv.clone().split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    ops.rope(other_q, other_k, positions, cos_sin)
    for i in range(num_tokens):
        one = slice(i, i + 1)
        if isinstance(caches[1], QuantizedKVCache):
            ops.write_quantized_kv(other_k[one], other_v[one], caches[1], slots[one])
        else:
            assert isinstance(caches[1], KVCache)
            ops.write_kv(other_k[one], other_v[one], caches[1], slots[one])
    assert_bitwise_equal(q, other_q)
    for found, expected in zip(block_tensors(caches[0]), block_tensors(caches[1]), strict=True):
        assert_bitwise_equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_a_token_outside_table_or_cache_is_refused_before_anything_is_written() -> None:
    ops = OpSet()
    cache = ops.allocate_kv_cache(2, 32, 1, 32, torch.bfloat16, torch.device("cpu"))
    cache.k.zero_()
    q, k, v = (torch.ones(2, 1, 32).bfloat16() for _ in range(3))
    cos_sin = torch.ones(4, 32).bfloat16()
    for positions, slots, message in (([0, 4], [0, 1], "token 1 is at 4"), ([0, 1], [0, 64], "64; expected 0 to 63")):
        with pytest.raises(RuntimeError, match=message):
            ops.rope_write_kv(q, k, v, torch.tensor(positions), cos_sin, cache, torch.tensor(slots))
    assert not cache.k.any() and (q == 1).all()
