"""A token's bits do not depend on what else is in the batch: `numerics: invariant`, of every compiled op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines import extension
from engines.batch import Batch
from engines.cpu.linear import PackedWeight
from engines.cpu.opset import OpSet
from engines.formats import int8
from engines.ops.linear import LinearWeight
from tests.attention_cases import Case, Inputs, make, quantized, stored
from tests.compare import assert_bitwise_equal

pytestmark = pytest.mark.skipif(extension.reason() is not None, reason=str(extension.reason()))
SCALE = 0.2
DTYPES = st.sampled_from((torch.bfloat16, torch.float32, torch.float16))
few = settings(max_examples=40, deadline=None)


@st.composite
def paged_cases(draw: st.DrawFn) -> Case:
    num_kv_heads = draw(st.integers(1, 3))
    block_size = draw(st.sampled_from((16, 32, 64)))
    shared = draw(st.integers(0, 5))
    lens = draw(st.lists(st.integers(shared * block_size + 1, 400), min_size=1, max_size=6))
    new = [draw(st.sampled_from((1, 1, length if not shared else 1, draw(st.integers(1, length))))) for length in lens]
    return Case(
        "drawn",
        tuple(lens),
        tuple(1 if shared else count for count in new),
        num_heads=num_kv_heads * draw(st.integers(1, 9)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from((32, 64, 96, 40))),
        block_size=block_size,
        shared_blocks=shared,
        window=draw(st.sampled_from((0, 0, 1, 70))) if not shared else 0,
        softcap=draw(st.sampled_from((0.0, 0.0, 3.0))),
        sinks=draw(st.booleans()),
    )


def attend(case: Case, inputs: Inputs, kv_dtype: str) -> Tensor:
    ops = OpSet()
    if kv_dtype == "auto":
        op, cache = ops.paged_attention, stored(ops, inputs.cache)
    else:
        op, cache = ops.quantized_attention, quantized(inputs.cache, kv_dtype)
    out: Tensor = op(inputs.q, cache, inputs.batch, SCALE, **case.options())
    return out


def only(batch: Batch, seq: int, num_new: int, length: int) -> Batch:
    """One sequence of the batch, as if it had `length` tokens, the last `num_new` of them new."""
    assert batch.block_tables is not None
    return replace(
        batch,
        cu_seqlens_q=torch.tensor([0, num_new], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=batch.block_tables[seq : seq + 1].contiguous(),
        prefix_groups=(),
    )


@pytest.mark.parametrize("kv_dtype", ("auto", "int8", "int4", "fp8"))
@few
@given(case=paged_cases(), dtype=DTYPES, data=st.data())
def test_paged_attention(kv_dtype: str, case: Case, dtype: torch.dtype, data: st.DataObject) -> None:
    """Alone or together, in a prefix group or not, and the new tokens cut anywhere."""
    inputs = make(case, dtype)
    together = attend(case, inputs, kv_dtype)
    starts = inputs.batch.cu_seqlens_q.tolist()
    seq = data.draw(st.integers(0, len(case.lens) - 1))
    first = data.draw(st.integers(0, case.new[seq] - 1))
    last = data.draw(st.integers(first + 1, case.new[seq]))
    length = case.lens[seq] - case.new[seq] + last
    part = slice(starts[seq] + first, starts[seq] + last)
    alone = replace(inputs, q=inputs.q[part], batch=only(inputs.batch, seq, last - first, length))
    assert_bitwise_equal(attend(case, alone, kv_dtype), together[part])


@few
@given(
    lens=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    heads=st.integers(1, 6),
    head_dim=st.sampled_from((32, 64, 24)),
    dtype=DTYPES,
    data=st.data(),
)
def test_encoder_attention(lens: list[int], heads: int, head_dim: int, dtype: torch.dtype, data: st.DataObject) -> None:
    ops = OpSet()

    def attend(qkv: Tensor, lens: list[int]) -> Tensor:
        offsets = torch.tensor([0, *lens]).cumsum(0).int()
        ids = torch.zeros(len(qkv), dtype=torch.int64)
        batch = Batch(ids, ids, offsets, torch.tensor(lens, dtype=torch.int32), max(lens), max(lens))
        out: Tensor = ops.encoder_attention(*(x.unflatten(1, (heads, -1)) for x in qkv.chunk(3, 1)), batch, SCALE)
        return out

    qkv = torch.randn(sum(lens), 3 * heads * head_dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    seq = data.draw(st.integers(0, len(lens) - 1))
    part = slice(sum(lens[:seq]), sum(lens[: seq + 1]))
    assert_bitwise_equal(attend(qkv[part], [lens[seq]]), attend(qkv, lens)[part])


ROW_OPS: dict[str, Callable[[OpSet, Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]] = {
    "rms_norm": lambda ops, x, w: ops.rms_norm(x, w, 1e-5),
    "add_rms_norm": lambda ops, x, w: ops.add_rms_norm(x.clone(), x.flip(1), w, 1e-5),
    "layer_norm": lambda ops, x, w: ops.layer_norm(x, w, w, 1e-5),
    "gelu": lambda ops, x, w: ops.act(x.clone(), "gelu"),
    "silu": lambda ops, x, w: ops.act_and_mul(torch.cat((x, x.flip(1)), 1), "silu"),
    "argmax": lambda ops, x, w: ops.argmax(x),
    "log_softmax_gather": lambda ops, x, w: ops.log_softmax_gather(x, x.argmin(1)),
}


@few
@given(
    name=st.sampled_from(sorted(ROW_OPS)),
    rows=st.integers(1, 70),
    size=st.integers(1, 700),
    dtype=DTYPES,
    data=st.data(),
)
def test_rows(name: str, rows: int, size: int, dtype: torch.dtype, data: st.DataObject) -> None:
    ops, op = OpSet(), ROW_OPS[name]
    generator = torch.Generator().manual_seed(rows)
    x, w = torch.randn(rows, size, generator=generator).to(dtype), torch.randn(size, generator=generator).to(dtype)
    first = data.draw(st.integers(0, rows - 1))
    part = slice(first, data.draw(st.integers(first + 1, rows)))
    for together, alone in zip(_all(op(ops, x, w)), _all(op(ops, x[part], w)), strict=True):
        assert_bitwise_equal(alone, together[part])


@few
@given(
    rows=st.integers(1, 200),
    size=st.sampled_from((32, 40, 96, 300)),
    inner=st.sampled_from((16, 48, 23)),
    gated=st.booleans(),
    dtype=DTYPES,
    quantized=st.booleans(),
    data=st.data(),
)
def test_products(
    rows: int, size: int, inner: int, gated: bool, dtype: torch.dtype, quantized: bool, data: st.DataObject
) -> None:
    """Of every dtype and of 8-bit integers, on both sides of where threads share rows and not weights."""
    ops, generator = OpSet(), torch.Generator().manual_seed(rows)

    def weight(out: int, size: int) -> LinearWeight:
        made = torch.randn(out, size, generator=generator).to(dtype)
        return (
            ops.prepare_quantized(int8.quantize(made), None, made.dtype)
            if quantized
            else ops.prepare_linear(made, None)
        )

    up, down = weight(2 * inner if gated else inner, size), weight(size, inner)
    x = torch.randn(rows, size, generator=generator).to(dtype)
    together = ops.mlp(x, up, down, "silu", gated)
    first = data.draw(st.integers(0, rows - 1))
    part = slice(first, data.draw(st.integers(first + 1, rows)))
    assert_bitwise_equal(ops.mlp(x[part], up, down, "silu", gated), together[part])
    inside = ops.linear(x[part], up)
    inside = ops.act_and_mul(inside, "silu") if gated else ops.act(inside, "silu")
    if isinstance(up.data, PackedWeight):
        assert_bitwise_equal(ops.linear(inside, down), together[part])


def _all(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
