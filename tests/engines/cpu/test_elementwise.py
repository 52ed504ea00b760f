"""The compiled ops that touch every value once, against the references in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engines import extension
from engines.cpu.opset import OpSet
from engines.ops import activation, kv_cache, norm, rotary, sampling
from engines.ops.kv_cache import KVCache, KVDtype
from tests.compare import assert_as_exact

pytestmark = pytest.mark.skipif(extension.reason() is not None, reason=str(extension.reason()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("rows", (0, 1, 3, 257))
every_size = pytest.mark.parametrize("size", (1, 15, 64, 576, 33))


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, stretch: float = 3.0) -> Tensor:
    """A strided view, with values from tiny to large."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator) * stretch
    return wide.to(dtype)[..., 2 : 2 + shape[-1]]


def as_exact(found: Tensor, op: Callable[..., Tensor], *args: Tensor) -> None:
    assert_as_exact(found, op(*(arg.double() for arg in args)), op(*args))


@every_dtype
@every_shape
@every_size
@pytest.mark.parametrize("offset", (0.0, 1.0))
def test_rms_norm(dtype: torch.dtype, rows: int, size: int, offset: float) -> None:
    x, weight = numbers(rows, size, dtype=dtype), numbers(size, dtype=dtype, seed=1).contiguous()
    found = OpSet().rms_norm(x, weight, 1e-5, offset)
    as_exact(found, lambda x, weight: norm.rms_norm(x, weight, 1e-5, offset), x, weight)


@every_dtype
def test_rms_norm_of_heads(dtype: torch.dtype) -> None:
    x, weight = numbers(5, 3, 80, dtype=dtype), numbers(80, dtype=dtype, seed=1).contiguous()
    as_exact(OpSet().rms_norm(x, weight, 1e-6), lambda x, weight: norm.rms_norm(x, weight, 1e-6), x, weight)


@every_dtype
@every_shape
@every_size
@pytest.mark.parametrize("offset", (0.0, 1.0))
def test_add_rms_norm(dtype: torch.dtype, rows: int, size: int, offset: float) -> None:
    x, residual = (numbers(rows, size, dtype=dtype, seed=seed) for seed in (0, 1))
    weight = numbers(size, dtype=dtype, seed=2).contiguous()
    found, total = OpSet().add_rms_norm(x.clone(), residual.clone(), weight, 1e-5, offset)
    assert torch.equal(total, x + residual)
    as_exact(found, lambda total, weight: norm.rms_norm(total, weight, 1e-5, offset), total, weight)


@every_dtype
@every_shape
@every_size
@pytest.mark.parametrize("name", ("silu", "gelu_tanh"))
def test_act_and_mul(dtype: torch.dtype, rows: int, size: int, name: str) -> None:
    gate_up = numbers(rows, 2 * size, dtype=dtype, stretch=20.0)
    as_exact(OpSet().act_and_mul(gate_up, name), lambda x: activation.act_and_mul(x, name), gate_up)


def test_silu_of_what_is_not_finite_and_of_extremes() -> None:
    gate = torch.tensor([[float("inf"), float("nan"), 1e4, -1e4, 0.0, -80.0]])
    found = OpSet().act_and_mul(torch.cat((gate, torch.ones_like(gate)), 1), "silu")
    torch.testing.assert_close(found, torch.nn.functional.silu(gate), equal_nan=True, atol=1e-30, rtol=1e-6)


@every_dtype
@every_shape
@pytest.mark.parametrize(("head_dim", "rotary_dim"), ((64, 64), (80, 32), (34, 34), (7, 6)))
def test_rope(dtype: torch.dtype, rows: int, head_dim: int, rotary_dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    qkv = torch.randn(rows, 5 * head_dim, generator=generator).to(dtype)
    cos_sin = torch.rand(50, rotary_dim, generator=generator).mul(2).sub(1).to(dtype)
    positions = torch.randint(0, 50, (rows,), generator=generator)

    def rotated(op: Callable[..., None], qkv: Tensor, cos_sin: Tensor) -> Tensor:
        qkv = qkv.clone()
        q, k, _ = (part.unflatten(1, (-1, head_dim)) for part in qkv.split([3 * head_dim, head_dim, head_dim], dim=1))
        op(q, k, positions, cos_sin)
        return qkv

    found = rotated(OpSet().rope, qkv, cos_sin)
    as_exact(found, lambda qkv, cos_sin: rotated(rotary.rope, qkv, cos_sin), qkv, cos_sin)
    if dtype != torch.float32:  # every step is rounded, so nothing is left to the order of sums
        assert torch.equal(found, rotated(rotary.rope, qkv, cos_sin))


def test_rope_past_the_table_is_refused() -> None:
    q = torch.zeros(2, 1, 4)
    with pytest.raises(RuntimeError, match=r"positions: token 1 is at 9; expected 0 to 7"):
        OpSet().rope(q, q.clone(), torch.tensor([0, 9]), torch.zeros(8, 4))


@every_dtype
@every_shape
def test_write_kv(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(4)
    k, v = (numbers(rows, 3, 20, dtype=dtype, seed=seed) for seed in (0, 1))
    slots = torch.randperm(40 * 8, generator=generator)[:rows]
    found, expected = (
        KVCache(torch.zeros(40, 3, 8, 20, dtype=dtype), torch.zeros(40, 3, 8, 20, dtype=dtype)) for _ in "ab"
    )
    OpSet().write_kv(k, v, found, slots)
    kv_cache.write_kv(k, v, expected, slots)
    assert torch.equal(found.k, expected.k)
    assert torch.equal(found.v, expected.v)


def test_write_kv_outside_the_cache_is_refused() -> None:
    cache = kv_cache.allocate_kv_cache(2, 4, 1, 8, torch.float32, torch.device("cpu"))
    k = torch.zeros(1, 1, 8)
    with pytest.raises(RuntimeError, match=r"slot_mapping: 8; expected 0 to 7"):
        OpSet().write_kv(k, k, cache, torch.tensor([8]))


@every_dtype
@pytest.mark.parametrize("kv_dtype", ("int8", "int4", "fp8"))
def test_a_vector_that_is_not_finite_is_read_back_as_nan(dtype: torch.dtype, kv_dtype: KVDtype) -> None:
    k, v = (numbers(9, 2, 33, dtype=dtype, seed=seed) for seed in (0, 1))
    k[1, 0, 32], k[2, 1, 0], v[3, 1, 7] = float("nan"), float("inf"), float("-inf")
    ops, slots = OpSet(), torch.arange(9)
    found, expected = (ops.allocate_quantized_kv_cache(3, 4, 2, 33, kv_dtype, torch.device("cpu")) for _ in "ab")
    ops.write_quantized_kv(k, v, found, slots)
    kv_cache.write_quantized_kv(k, v, expected, slots)
    for x, codes, scales, other in (
        (k, found.k, found.k_scales, (expected.k, expected.k_scales)),
        (v, found.v, found.v_scales, (expected.v, expected.v_scales)),
    ):
        bad = ~x.isfinite().all(-1, keepdim=True).expand(x.shape)
        back, right = (
            kv_cache.dequantize_vectors(*of, kv_dtype, 33, torch.float32).transpose(1, 2).flatten(0, 1)[:9]
            for of in ((codes, scales), other)
        )
        assert bad.any()
        assert torch.equal(back.isnan(), bad)
        assert torch.equal(back[~bad], right[~bad])


def test_write_quantized_kv_outside_the_cache_is_refused() -> None:
    ops = OpSet()
    cache = ops.allocate_quantized_kv_cache(2, 4, 1, 8, "int4", torch.device("cpu"))
    k = torch.zeros(1, 1, 8)
    with pytest.raises(RuntimeError, match=r"slot_mapping: -1; expected 0 to 7"):
        ops.write_quantized_kv(k, k, cache, torch.tensor([-1]))


@every_dtype
@pytest.mark.parametrize("vocab", (1, 40, 5003))
def test_log_softmax_gather_of_what_is_not_finite(dtype: torch.dtype, vocab: int) -> None:
    logits = numbers(7, vocab, dtype=dtype)
    targets = torch.arange(7) * 7 % vocab
    logits[1], logits[2, -1], logits[3, vocab // 2] = float("-inf"), float("nan"), float("inf")
    logits[4, targets[4]], logits[5, vocab // 3] = float("-inf"), float("-inf")
    as_exact(OpSet().log_softmax_gather(logits, targets), lambda x: sampling.log_softmax_gather(x, targets), logits)


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"targets: 8; expected 0 to 7"):
        OpSet().log_softmax_gather(torch.zeros(1, 8), torch.tensor([8]))
