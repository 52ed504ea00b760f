"""Every Triton kernel against the reference in float64, under the interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engines.ops import OpSet as Reference
from engines.ops import origin
from engines.triton import attention
from engines.triton.opset import OpSet
from tests import attention_cases
from tests.cases import FLOATS, Case, call, cases, convert
from tests.compare import assert_as_exact, assert_bitwise_equal

CASES = [case for case in cases() if origin(OpSet(), case.op) != "reference"]
PRODUCTS = ("linear", "route", "fused_experts")
LONG = ("fused_experts-w4 g32 50x16/3", "fused_experts-mxfp4 50x16/3")
OVER_A_CACHE = ("paged_attention", "quantized_attention", "latent_attention")
FAST = [
    (case, dtype)
    for i, case in enumerate(CASES)
    for j, dtype in enumerate(case.dtypes)
    if case.op not in OVER_A_CACHE and str(case) not in LONG and (case.op not in PRODUCTS or i % 3 == j)
]
ATTENTION = [(case, dtype) for case in CASES if case.op in OVER_A_CACHE for dtype in FLOATS]
NAMES = [case.name for case in attention_cases.PLAIN]
"""Those in larger blocks run the same code with another constant."""
NAMES += ["int8 ragged", "int4 head 33", "fp8 window, softcap, sinks", "int4 nothing", "published"]
# Each case of attention and of products in one dtype; all of them in all take minutes.
SOME = [(case, dtype) for i, (case, dtype) in enumerate(ATTENTION) if i // 3 % 3 == i % 3 and case.name in NAMES]
REST = [pair for pair in ATTENTION if pair not in SOME]
REST += [(case, dtype) for case in CASES for dtype in case.dtypes if case.op in PRODUCTS and (case, dtype) not in FAST]


def named(value: object) -> str:
    return str(value).removeprefix("torch.")


def check(ops: Reference, case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    exact = call(Reference(), case, convert(arguments, torch.float64))
    found, plain = call(ops, case, arguments), call(Reference(), case, arguments)
    for results in zip(found, exact, plain, strict=True):
        assert_as_exact(*results)


@pytest.mark.parametrize(("case", "dtype"), FAST + SOME, ids=named)
def test_as_exact_as_the_reference(ops: Reference, case: Case, dtype: torch.dtype) -> None:
    check(ops, case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dtype"), REST, ids=named)
def test_the_others_in_every_dtype(ops: Reference, case: Case, dtype: torch.dtype) -> None:
    check(ops, case, dtype)


FLAGS = ({}, {"window": 6}, {"softcap": 3.0}, {"sinks": True}, {"window": 6, "softcap": 3.0, "sinks": True})
HEADS = [
    pytest.param(head_dim, kind, marks=() if kind == "plain" and head_dim in (72, 112, 128, 192) else pytest.mark.slow)
    for head_dim in (64, 72, 80, 88, 96, 104, 112, 120, 128, 144, 160, 176, 192, 208, 224, 240, 256)
    for kind in ("plain", "int8", "int4", "fp8")
]


@pytest.mark.parametrize(("head_dim", "kind"), HEADS)
def test_every_head_with_every_flag(ops: Reference, head_dim: int, kind: Any) -> None:
    """A prompt, a piece of one, and a decoding sequence, two queries on a key."""
    for flags in FLAGS:
        own = attention_cases.Case("", (20, 9, 30), (7, 9, 1), 2, 1, head_dim, **flags)

        def make(dtype: torch.dtype, own: attention_cases.Case = own) -> tuple[Any, ...]:
            given = attention_cases.make(own, dtype)
            cache = given.cache if kind == "plain" else attention_cases.quantized(given.cache, kind)
            return given.q, cache, given.batch, 0.2

        op = "paged_attention" if kind == "plain" else "quantized_attention"
        check(ops, Case(op, f"{head_dim} {kind}", make, own.options()), torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=named)
def test_bits_of_a_decoding_sequence_do_not_depend_on_the_batch(ops: Reference, dtype: torch.dtype) -> None:
    """Alone, its grid has two parts; beside a longer one, three."""
    own = attention_cases.Case("two", lens=(300, 700), new=(1, 1), num_heads=4, num_kv_heads=2)
    given = attention_cases.make(own, dtype)
    together = ops.paged_attention(given.q, given.cache, given.batch, 0.2)
    batch = given.batch
    alone = type(batch)(
        batch.token_ids[:1], batch.positions[:1], batch.cu_seqlens_q[:2], batch.seq_lens[:1], 1, 300,
        block_tables=batch.block_tables[:1] if batch.block_tables is not None else None,
    )  # fmt: skip
    assert_bitwise_equal(ops.paged_attention(given.q[:1], given.cache, alone, 0.2), together[:1])


@pytest.mark.parametrize("window", [0, 600])
def test_bits_do_not_depend_on_how_many_programs_share_the_parts(
    ops: Reference, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """In a grid for much longer sequences too, as captured steps have it."""
    own = attention_cases.Case(
        "some", lens=(700, 200), new=(1, 1), num_heads=2, num_kv_heads=1, window=window, sinks=True
    )
    given = attention_cases.make(own, torch.bfloat16)
    found = []
    for programs, longest in ((1, 700), (2, 700), (3, 700), (2, 16_000)):
        monkeypatch.setattr(attention, "programs_of", lambda *sizes, least=programs: least)
        batch = replace(given.batch, max_seqlen_k=longest)
        found.append(ops.paged_attention(given.q, given.cache, batch, 0.2, **own.options()))
    for other in found[1:]:
        assert_bitwise_equal(other, found[0])


@pytest.mark.parametrize("splits, tiles, programs", [(64, 8, 64), (64, 128, 17), (64, 2048, 4), (3, 8, 3), (1, 1, 1)])
def test_programs_of_a_decode_step(splits: int, tiles: int, programs: int) -> None:
    assert attention.programs_of(splits, tiles, 132) == programs


def test_bits_do_not_depend_on_where_a_prompt_is_cut(ops: Reference) -> None:
    whole = attention_cases.Case("whole", lens=(150,), new=(150,), num_heads=4, num_kv_heads=2)
    given = attention_cases.make(whole, torch.bfloat16)
    batch = given.batch
    expected = ops.paged_attention(given.q, given.cache, batch, 0.2)
    rest = type(batch)(
        batch.token_ids[70:], batch.positions[70:], torch.tensor([0, 80], dtype=torch.int32), batch.seq_lens, 80, 150,
        block_tables=batch.block_tables,
    )  # fmt: skip
    assert_bitwise_equal(ops.paged_attention(given.q[70:], given.cache, rest, 0.2), expected[70:])


def test_tokens_without_a_slot_or_an_angle_are_left_alone(ops: Reference) -> None:
    """As padding in a captured graph has it."""
    cache = ops.allocate_kv_cache(2, 4, 1, 16, torch.float32, torch.device("cpu"))
    cache.k.fill_(7.0)
    ones = torch.ones(2, 1, 16)
    ops.write_kv(ones, ones, cache, torch.tensor([-1, 8]))
    assert bool((cache.k == 7.0).all())
    ops.rope(ones, ones.clone(), torch.tensor([-1, 5]), torch.zeros(5, 16))
    assert bool((ones == 1.0).all())
