"""Caches in 8 and 4 bits: the emulated kernels against the reference in float64, over numbers that are not rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.cuda.opset import OpSet
from engines.ops import OpSet as Reference
from engines.ops.kv_cache import KVDtype, QuantizedKVCache, quantize_vectors
from tests import attention_cases
from tests.attention_cases import Inputs, make
from tests.cases import convert
from tests.compare import assert_as_exact, assert_bitwise_equal
from tests.engines.cuda.test_opset import part

SCALE = 0.2
KV_DTYPES: tuple[KVDtype, ...] = ("int8", "int4", "fp8")
MIXED = {"lens": (70, 600, 1, 34), "new": (70, 1, 1, 5), "num_heads": 4, "num_kv_heads": 2}
"""Decoding sequences, one of them split, beside longer pieces."""


def quantized(given: Inputs, kv_dtype: KVDtype) -> QuantizedKVCache:
    (k, k_scales), (v, v_scales) = (quantize_vectors(t, kv_dtype) for t in (given.cache.k, given.cache.v))
    return QuantizedKVCache(kv_dtype, given.cache.k.shape[3], k, v, k_scales, v_scales)


def results(ops: OpSet, given: Inputs, cache: QuantizedKVCache) -> tuple[Tensor, Tensor, Tensor]:
    """(the kernels', the exact, torch's)."""
    exact = Reference().quantized_attention(given.q.double(), convert(cache, torch.float64), given.batch, SCALE)
    plain = Reference().quantized_attention(given.q, cache, given.batch, SCALE)
    return ops.quantized_attention(given.q, cache, given.batch, SCALE), exact, plain


@pytest.mark.parametrize("head_dim", (64, 80, 96, 128, 256))
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_every_size_of_head(ops: OpSet, kv_dtype: KVDtype, head_dim: int) -> None:
    dtype = torch.float16 if head_dim in (64, 128) else torch.bfloat16
    given = make(attention_cases.Case("mixed", **MIXED, head_dim=head_dim), dtype)  # type: ignore[arg-type]
    assert_as_exact(*results(ops, given, quantized(given, kv_dtype)))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_scales_that_a_half_does_not_hold(ops: OpSet, kv_dtype: KVDtype) -> None:
    """Values a millionth of the usual, some of them ten thousand times the others."""
    case = attention_cases.Case("decode", **attention_cases.DECODE, num_heads=2, num_kv_heads=1)  # type: ignore[arg-type]
    given = make(case, torch.float16)
    cache = quantized(given, kv_dtype)
    cache.v_scales.mul_(1e-6)
    cache.v_scales[::2].mul_(1e4)
    assert_as_exact(*results(ops, given, cache))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_decoding_sequence_has_the_bits_that_it_has_alone(ops: OpSet, kv_dtype: KVDtype) -> None:
    case = attention_cases.Case("long", lens=(700, 1025, 7), new=(1, 1, 1), num_heads=2, num_kv_heads=1)
    given = make(case, torch.bfloat16)
    cache = quantized(given, kv_dtype)
    together = ops.quantized_attention(given.q, cache, given.batch, SCALE)
    for i, length in enumerate(case.lens):
        alone = part(given, i, length, 1)
        assert_bitwise_equal(ops.quantized_attention(given.q[i : i + 1], cache, alone, SCALE), together[i : i + 1])  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_is_written(ops: OpSet, kv_dtype: KVDtype) -> None:
    """Codes and scales bit by bit; NaN stays NaN; a token without a slot is not stored."""
    size = 128
    x = torch.linspace(-3, 3, 2 * size).view(2, 1, size)
    x[0, 0, 1], x[1, 0, 0] = 0.0, float("nan")
    for dtype in (torch.bfloat16, torch.float16):
        k = x.to(dtype)
        cache = ops.allocate_quantized_kv_cache(2, 16, 1, size, kv_dtype, torch.device("cpu"))
        ops.write_quantized_kv(k, k.flip(2), cache, torch.tensor([16, -1]))
        expected = Reference().allocate_quantized_kv_cache(2, 16, 1, size, kv_dtype, torch.device("cpu"))
        Reference().write_quantized_kv(k[:1], k[:1].flip(2), expected, torch.tensor([16]))
        for name in ("k", "v", "k_scales", "v_scales"):
            found, other = (getattr(c, name)[1, :, 0] for c in (cache, expected))
            assert_bitwise_equal(found.float(), other.float())
        ops.write_quantized_kv(k[1:], k[1:], cache, torch.tensor([0]))
        assert cache.k_scales[0, 0, 0].isnan().any()


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"kv_dtype": "fp8"}, r"k_codes: expected \[num_blocks, num_kv_heads, block_size, 64\], contiguous|k_scales"),
        ({"k_scales": torch.zeros(1)}, r"k_scales: expected \[num_blocks, num_kv_heads, block_size, 2\] float32"),
        ({"k": torch.zeros(3, 3, 12, 64, dtype=torch.uint8)}, "k_codes: block_size is 12; expected a power of two"),
    ),
)
def test_a_wrong_cache_is_named(ops: OpSet, change: dict[str, object], message: str) -> None:
    given = make(attention_cases.CASES[0], torch.bfloat16)
    cache = replace(quantized(given, "int8"), **change)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=message):
        ops.quantized_attention(given.q, cache, given.batch, SCALE)
