"""Keys turned on their way into the cache: the emulated kernel against the reference's two ops, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engines.cuda.opset import OpSet
from engines.ops import OpSet as Reference
from engines.ops.kv_cache import KVCache, KVDtype, QuantizedKVCache
from tests.cases import convert, tensors
from tests.compare import assert_bitwise_equal

CPU = torch.device("cpu")
KINDS: tuple[KVDtype | None, ...] = (None, "int8", "int4", "fp8")
SIZES = ((128, 128), (64, 32), (80, 32), (256, 256), (33, 12), (7, 6))
"""(head_dim, rotary_dim): whole pieces of 16 bytes, lanes without a piece, the longest head, odd sizes."""
TOKENS, HEADS, KV_HEADS, BLOCKS, BLOCK_SIZE = 5, 7, 3, 3, 8


def empty(kind: KVDtype | None, head_dim: int, dtype: torch.dtype) -> KVCache | QuantizedKVCache:
    """A cache of zeros."""
    cache: KVCache | QuantizedKVCache
    if kind is None:
        cache = Reference().allocate_kv_cache(BLOCKS, BLOCK_SIZE, KV_HEADS, head_dim, dtype, CPU)
    else:
        cache = Reference().allocate_quantized_kv_cache(BLOCKS, BLOCK_SIZE, KV_HEADS, head_dim, kind, CPU)
        cache.k_scales.zero_(), cache.v_scales.zero_()
    for codes in (cache.k, cache.v):
        codes.view(torch.uint8).zero_()
    return cache


def given(head_dim: int, rotary_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v as views of one projection, positions, angles; one key is zeros, another has NaN."""
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(TOKENS, (HEADS + 2 * KV_HEADS) * head_dim, generator=generator).to(dtype)
    sizes = [HEADS * head_dim, KV_HEADS * head_dim, KV_HEADS * head_dim]
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in qkv.split(sizes, dim=1))
    k[1, 0] = 0.0
    v[2, 1, 3] = float("nan")
    angles = torch.rand(20, rotary_dim, generator=generator).to(dtype)
    return q, k, v, torch.randint(0, 20, (TOKENS,), generator=generator), angles


SLOTS = torch.tensor([9, 3, 23, 0, 16])


def write_and_compare(ops: OpSet, size: tuple[int, int], kind: KVDtype | None, dtype: torch.dtype) -> None:
    arguments = given(*size, dtype)
    expected = (*convert(arguments), empty(kind, size[0], dtype))
    Reference().rope_write_kv(*expected, SLOTS)
    found = (*convert(arguments), empty(kind, size[0], dtype))
    ops.rope_write_kv(*found, SLOTS)
    assert_bitwise_equal(found[1], arguments[1])
    for i in (0, -1):
        for pair in zip(tensors(found[i]), tensors(expected[i]), strict=True):
            assert_same_numbers(*pair)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_keys_turned_on_their_way_have_the_bits_of_both_ops(
    ops: OpSet, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], kind: KVDtype | None
) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        write_and_compare(ops, size, kind, dtype)
    for order in ("reverse", "random:1", "warp:2"):
        monkeypatch.setenv("EMULATOR_ORDER", order)
        write_and_compare(ops, size, kind, torch.bfloat16)


def assert_same_numbers(found: Tensor, expected: Tensor) -> None:
    """Bit by bit, but for codes of vectors that hold NaN: their scale says so, and codes mean nothing."""
    if found.dtype == torch.uint8:
        found, expected = found.clone(), expected.clone()
        for codes in (found, expected):
            codes[SLOTS[2] // BLOCK_SIZE, 1, SLOTS[2] % BLOCK_SIZE] = 0
    assert_bitwise_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_a_captured_batch_is_left_alone(ops: OpSet, kind: KVDtype | None) -> None:
    """Tokens without a position keep their queries; those without a slot are turned and not stored."""
    arguments = given(64, 64, torch.bfloat16)
    q, k, v, _, angles = convert(arguments)
    cache = empty(kind, 64, torch.bfloat16)
    ops.rope_write_kv(q, k, v, torch.tensor([-1, 20, 4, 5, 6]), angles, cache, torch.tensor([0, 1, -1, 24, 17]))
    kept = [bool(torch.equal(*pair)) for pair in zip(q, arguments[0], strict=True)]
    assert kept == [True, True, False, False, False]
    written = next(tensors(cache)).float().abs().sum((1, 3)).flatten().nonzero().flatten().tolist()
    assert written == [17]


def test_a_wrong_argument_is_named(ops: OpSet) -> None:
    q, k, v, positions, angles = given(64, 64, torch.bfloat16)
    cache = empty(None, 64, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"cos_sin: expected \[max_position, rotary_dim\]"):
        ops.rope_write_kv(q, k, v, positions, angles.repeat(1, 2), cache, SLOTS)
    with pytest.raises(RuntimeError, match="positions: expected int64"):
        ops.rope_write_kv(q, k, v, positions.int(), angles, cache, SLOTS)
    with pytest.raises(RuntimeError, match=r"k_cache: expected \[num_blocks, 3, block_size, 64\]"):
        ops.rope_write_kv(q, k, v, positions, angles, empty(None, 32, torch.bfloat16), SLOTS)
