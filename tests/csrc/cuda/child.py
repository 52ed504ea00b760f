"""Runs a library of emulated ops on what shows races: `python -m tests.csrc.cuda.child <library> <op> ...`.

Ends with 1 and a message where a result is not the reference's, or depends on the order of threads.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

import torch

from engines.cuda.opset import OpSet
from engines.ops import OpSet as Reference
from tests import attention_cases
from tests.cases import Case, call, convert
from tests.compare import assert_as_exact, assert_bitwise_equal
from tests.engines.cuda.cases import compiled
from tests.engines.cuda.test_all_reduce import run_calls
from tests.engines.cuda.test_experts import check_slots
from tests.engines.cuda.test_kv_write import KINDS, write_and_compare
from tests.engines.cuda.test_kv_write import SIZES as WRITE_SIZES
from tests.engines.cuda.test_quantized import CASES as W4_CASES
from tests.engines.cuda.test_quantized import FP8_SIZES, SIZES, exponents_of, integers_of, multiply, multiply_fp8
from tests.engines.cuda.test_rounded_inputs import SIZES as ROUNDED_SIZES
from tests.engines.cuda.test_rounded_inputs import WEIGHTS, check

ORDERS = ("forward", "reverse", "random:1", "warp:1", "warp:2", "lag:1")
LENGTHS = (1500, 513, 512, 2049, 700, 100, 1030, 3, 512, 600, 20, 90, 33)
LONG = attention_cases.Case("long", lens=LENGTHS, new=(1,) * len(LENGTHS), head_dim=64)
"""Splits, and blocks of threads that take more than one piece of work."""
PROMPT = attention_cases.Case("prompt", lens=(650, 40), new=(140, 40), num_heads=2, num_kv_heads=1, head_dim=64)
"""More keys than a block of threads has room for at a time."""


def attention(case: attention_cases.Case) -> Case:
    def make(dtype: torch.dtype) -> tuple[object, ...]:
        given = attention_cases.make(case, dtype)
        return given.q, given.cache, given.batch, 0.2

    return Case("paged_attention", case.name, make, {})


def main(library: str, names: list[str]) -> None:
    torch.use_deterministic_algorithms(True)  # results that are not written are NaN, not what lay there before
    ops = OpSet(Path(library))
    cases = [(case, dtype) for case, dtype in compiled() if case.op in names and "71" not in case.name]
    if "paged_attention" in names:
        cases = [(attention(case), torch.bfloat16) for case in (PROMPT, LONG)] + cases
    for case, dtype in cases:
        if dtype != torch.bfloat16 and torch.bfloat16 in case.dtypes:
            continue
        arguments = case.arguments(dtype)
        exact = call(Reference(), case, convert(arguments, torch.float64))
        plain = call(Reference(), case, arguments)
        for capability in ("80", "90") if case.op == "paged_attention" else ("90",):
            os.environ["EMULATOR_CAPABILITY"] = capability
            first = None
            for order, copies in itertools.product(ORDERS, ("early", "late")):
                os.environ.update(EMULATOR_ORDER=order, EMULATOR_COPIES=copies)
                found = call(ops, case, arguments)
                for results in zip(found, exact, plain, strict=True):
                    assert_as_exact(*results)
                first = first or found
                for pair in zip(found, first, strict=True):
                    assert_bitwise_equal(*pair)


def products(library: str) -> None:
    """The same for products with packed weights of more than one split, or tile of tokens."""
    torch.use_deterministic_algorithms(True)
    ops = OpSet(Path(library))
    for case, capability in itertools.product(W4_CASES, ("80", "90")):
        first = None
        for order, copies in itertools.product(ORDERS, ("early", "late")):
            os.environ.update(EMULATOR_CAPABILITY=capability, EMULATOR_ORDER=order, EMULATOR_COPIES=copies)
            found, exact, plain = multiply(ops, case, torch.bfloat16)
            assert_as_exact(found, exact, plain)
            first = found if first is None else first
            assert_bitwise_equal(found, first)
    for size, tile in itertools.product(FP8_SIZES, ((128, 128), None)):
        first = None
        for order, copies in itertools.product(ORDERS, ("early", "late")):
            os.environ.update(EMULATOR_ORDER=order, EMULATOR_COPIES=copies)
            found, exact, plain = multiply_fp8(ops, size, tile, torch.bfloat16)
            assert_as_exact(found, exact, plain)
            first = found if first is None else first
            assert_bitwise_equal(found, first)
    for (rows, columns, tokens), make in itertools.product(SIZES, (exponents_of, integers_of)):
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
        first = None
        for order, copies in itertools.product(ORDERS, ("early", "late")):
            os.environ.update(EMULATOR_ORDER=order, EMULATOR_COPIES=copies)
            found = ops.linear(x, ops.prepare_quantized(make(rows, columns), None, torch.bfloat16))
            first = found if first is None else first
            assert_bitwise_equal(found, first)


def writes(library: str) -> None:
    """Keys turned on their way into every kind of cache."""
    ops = OpSet(Path(library))
    for size, kind, order in itertools.product(WRITE_SIZES, KINDS, ORDERS):
        os.environ["EMULATOR_ORDER"] = order
        write_and_compare(ops, size, kind, torch.bfloat16)


def slots() -> None:
    """Slots of more experts than a warp has lanes."""
    for order in ORDERS:
        os.environ["EMULATOR_ORDER"] = order
        check_slots(300, 16)


def sums(library: str) -> None:
    """The same for sums over several devices, some of which come late."""
    for seed in range(24):
        run_calls(seed, lambda order: os.environ.update(EMULATOR_ORDER=order), Path(library))


def roundings(library: str) -> None:
    """Inputs of products, rounded where they are made."""
    ops = OpSet(Path(library))
    for kind, size, order in itertools.product(WEIGHTS, ROUNDED_SIZES, ORDERS):
        os.environ["EMULATOR_ORDER"] = order
        check(ops, kind, size)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
        if "rope_write_kv" in sys.argv[2:]:
            writes(sys.argv[1])
        if "act_and_mul_for" in sys.argv[2:]:
            roundings(sys.argv[1])
        if "linear" in sys.argv[2:]:
            products(sys.argv[1])
        if "fused_experts" in sys.argv[2:]:
            slots()
        if "all_reduce" in sys.argv[2:]:
            sums(sys.argv[1])
    except AssertionError as error:
        sys.exit(f"noticed: {error}")
