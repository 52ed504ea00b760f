"""The CUDA kernels, emulated, against the reference in float64, in several orders of their threads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.cuda import table
from engines.cuda.opset import COUNTERS, OpSet
from engines.ops import OpSet as Reference
from engines.ops import origin
from tests import attention_cases
from tests.attention_cases import Inputs, make
from tests.cases import Case, call, convert
from tests.compare import assert_as_exact, assert_bitwise_equal
from tests.csrc.cuda import emulated
from tests.engines.cuda.cases import OPS, compiled

CASES = compiled()
ORDERS = ("reverse", "random:1", "warp:1", "warp:2")
SCALE = 0.2


def named(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=named)
def test_as_exact_as_the_reference(ops: OpSet, monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    if case.op == "paged_attention" and dtype == torch.float16:
        monkeypatch.setenv("EMULATOR_CAPABILITY", "80")  # bfloat16 takes the kernels of sm_90
    exact = call(Reference(), case, convert(arguments, torch.float64))
    found, plain = call(ops, case, arguments), call(Reference(), case, arguments)
    for results in zip(found, exact, plain, strict=True):
        assert_as_exact(*results)


ORDERED = [(case, dtype) for case, dtype in CASES if dtype == torch.bfloat16 and "71" not in case.name]
ORDERED += [(case, dtype) for case, dtype in CASES if str(case) in ("sample-6x11", "apply_penalties-6x11")]


@pytest.mark.parametrize("copies", ("early", "late"))
@pytest.mark.parametrize("order", ORDERS)
def test_bits_do_not_depend_on_the_order_of_threads(
    ops: OpSet, monkeypatch: pytest.MonkeyPatch, order: str, copies: str
) -> None:
    """Each order has every third case; copies that land early and late have all orders."""
    for case, dtype in ORDERED[ORDERS.index(order) % 3 :: 3]:
        arguments = case.arguments(dtype)
        expected = call(ops, case, arguments)
        with monkeypatch.context() as changed:
            changed.setenv("EMULATOR_ORDER", order)
            changed.setenv("EMULATOR_COPIES", copies)
            found = call(ops, case, arguments)
        for results in zip(found, expected, strict=True):
            assert_bitwise_equal(*results)


def test_every_compiled_op_is_overridden_and_tested(ops: OpSet) -> None:
    assert {case.op for case, _ in CASES} == set(OPS)
    assert {op for op in OPS if origin(ops, op) == "reference"} == set()


def test_the_table_is_what_was_compiled() -> None:
    """But for the head dimensions that the emulated build is given."""
    text = table.read(emulated.library())
    assert text is not None
    found, full = table.parse(text), table.parse(table.FULL)
    for op in ("paged_attention", "quantized_attention"):
        assert found.ops[op].pop("head_dim").values == emulated.HEAD_DIMS
        full.ops[op].pop("head_dim")
    assert found.ops == full.ops


SHAPES = (
    attention_cases.Case("128", lens=(200, 129, 400), new=(200, 1, 150), num_heads=4, num_kv_heads=2, head_dim=128),
    attention_cases.Case("blocks of 8", lens=(300, 40), new=(130, 39), block_size=8),
    attention_cases.Case("blocks of 4", lens=(300, 40), new=(130, 39), block_size=4),
    attention_cases.Case("blocks of 256", lens=(300, 40), new=(130, 39), block_size=256, head_dim=128),
    attention_cases.Case("window", lens=(400, 300), new=(70, 290), block_size=32, window=90, sinks=True, softcap=9.0),
    attention_cases.Case("window of a tile", lens=(520,), new=(130,), block_size=64, head_dim=128, window=128),
)


@pytest.mark.parametrize("capability", ("80", "90"))
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_prefill_of_each_architecture(
    ops: OpSet, monkeypatch: pytest.MonkeyPatch, case: attention_cases.Case, capability: str
) -> None:
    monkeypatch.setenv("EMULATOR_CAPABILITY", capability)
    given = make(case, torch.bfloat16)
    exact = Reference().paged_attention(
        given.q.double(), attention_cases.widened(given.cache), given.batch, SCALE, **case.options()
    )
    arguments = (given.q, given.cache, given.batch, SCALE)
    plain = Reference().paged_attention(*arguments, **case.options())
    for copies in ("early", "late"):
        monkeypatch.setenv("EMULATOR_COPIES", copies)
        assert_as_exact(ops.paged_attention(*arguments, **case.options()), exact, plain)


LONG = attention_cases.Case("long", lens=(1500, 513, 512, 7, 2049), new=(1, 1, 1, 1, 1), head_dim=64)


@pytest.mark.parametrize("window", (0, 600))
def test_a_decoding_sequence_has_the_bits_that_it_has_alone(ops: OpSet, window: int) -> None:
    given = make(LONG, torch.bfloat16)
    together = ops.paged_attention(given.q, given.cache, given.batch, SCALE, window)
    exact = Reference().paged_attention(
        given.q.double(), attention_cases.widened(given.cache), given.batch, SCALE, window
    )
    plain = Reference().paged_attention(given.q, given.cache, given.batch, SCALE, window)
    assert_as_exact(together, exact, plain)
    for i, length in enumerate(LONG.lens):
        alone = ops.paged_attention(given.q[i : i + 1], given.cache, part(given, i, length, 1), SCALE, window)
        assert_bitwise_equal(alone, together[i : i + 1])


@pytest.mark.parametrize("capability", ("80", "90"))
def test_a_prompt_has_the_same_bits_however_it_is_cut(
    ops: OpSet, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    monkeypatch.setenv("EMULATOR_CAPABILITY", capability)
    case = attention_cases.Case("cut", lens=(150,), new=(150,), head_dim=64)
    given = make(case, torch.bfloat16)
    whole = ops.paged_attention(given.q, given.cache, given.batch, SCALE)
    for begin, end in ((0, 64), (64, 150), (3, 5), (40, 149)):
        piece = part(given, 0, end, end - begin)
        found = ops.paged_attention(given.q[begin:end], given.cache, piece, SCALE)
        assert_bitwise_equal(found, whole[begin:end])


def test_a_step_leaves_the_counters_at_zero(ops: OpSet) -> None:
    given = make(LONG, torch.float16)
    ops.paged_attention(given.q, given.cache, given.batch, SCALE)
    counters = ops._counters(torch.device("cpu"))
    assert counters.shape == (COUNTERS,)
    assert not counters.any()


def test_padding_of_a_captured_batch_is_left_alone(ops: OpSet) -> None:
    q, k = (torch.randn(3, 2, 16).bfloat16() for _ in range(2))
    table_of_angles = torch.rand(5, 16).bfloat16()
    before = q.clone()
    ops.rope(q, k, torch.tensor([2, -1, 5]), table_of_angles)
    assert not torch.equal(q[0], before[0])
    assert torch.equal(q[1:], before[1:])
    cache = ops.allocate_kv_cache(2, 4, 2, 16, torch.bfloat16, torch.device("cpu"))
    cache.k.zero_()
    ops.write_kv(k, k, cache, torch.tensor([-1, 8, 3]))
    assert torch.equal(cache.k[0, :, 3], k[2])
    assert int((cache.k != 0).any(-1).sum()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda g: {"q": g.q.float()}, "k_cache: expected the dtype of q"),
        (lambda g: {"cache": replace(g.cache, k=g.cache.k[:, :, :12])}, r"k_cache: expected \[num_blocks,"),
        (lambda g: {"cache": odd_blocks(g)}, "k_cache: block_size is 12; expected a power of two"),
        (
            lambda g: {"batch": replace(g.batch, max_seqlen_k=10**6)},
            "block_tables: .* expected room for 1000000 tokens",
        ),
        (lambda g: {"q": g.q[:, :8].contiguous()}, "q: 8 heads; expected a multiple of 3"),
        (lambda g: {"q": g.q[..., :48].contiguous()}, r"expected \[num_blocks, num_kv_heads, block_size, 48\]"),
    ),
)
def test_a_wrong_argument_is_named(ops: OpSet, change: object, message: str) -> None:
    given = make(attention_cases.CASES[0], torch.bfloat16)
    arguments = {"q": given.q, "cache": given.cache, "batch": given.batch, **change(given)}  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=message):
        ops.paged_attention(**arguments, softmax_scale=SCALE)


def odd_blocks(given: Inputs) -> object:
    return replace(given.cache, k=given.cache.k[:, :, :12].contiguous(), v=given.cache.v[:, :, :12].contiguous())


def part(given: Inputs, i: int, length: int, new: int) -> object:
    """The last `new` of the first `length` tokens of sequence i, alone."""
    tables = given.batch.block_tables
    assert isinstance(tables, Tensor)
    return replace(
        given.batch,
        cu_seqlens_q=torch.tensor([0, new], dtype=torch.int32),
        seq_lens=torch.tensor([length], dtype=torch.int32),
        block_tables=tables[i : i + 1].contiguous(),
        max_seqlen_q=new,
        max_seqlen_k=length,
        prefix_groups=(),
    )
