"""This machine's physical limits for inference: read bandwidth, bfloat16 matrix rate by number of rows."""

from __future__ import annotations

import argparse
import bisect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engines.cpu.opset import OpSet

K, N, COPIES = 4864, 896, 24
"""A weight of the 0.5B class, in more copies than the caches hold."""
ROWS = (1, 8, 32, 128, 512)


@dataclass(frozen=True)
class Ceilings:
    """What was measured; see run() for how it prints."""

    read_bytes_s: float
    rows: tuple[int, ...]
    flops_s: tuple[float, ...]
    """Of a bfloat16 product with so many rows, weights from memory."""

    def linear_flops_s(self, rows: int) -> float:
        """Between the measured numbers of rows: on the line through their logarithms."""
        at = bisect.bisect_left(self.rows, rows)
        if at == 0 or at == len(self.rows):
            return self.flops_s[min(at, len(self.rows) - 1)] * (rows / self.rows[0] if at == 0 else 1.0)
        low, high = self.rows[at - 1], self.rows[at]
        share = math.log(rows / low) / math.log(high / low)
        return math.exp((1 - share) * math.log(self.flops_s[at - 1]) + share * math.log(self.flops_s[at]))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))


def per_second(call: Callable[[], object], seconds: float = 0.4) -> float:
    for _ in range(3):
        call()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - start)


def measure(rows: Sequence[int] = ROWS) -> Ceilings:
    big = torch.ones(64 << 20)
    read = big.numel() * 4 * per_second(big.sum)
    ops = OpSet()
    weights = [ops.prepare_linear(torch.randn(N, K).bfloat16(), None) for _ in range(COPIES)]
    rates = []
    for count in rows:
        x, turn = torch.randn(count, K).bfloat16(), iter(range(1 << 60))
        calls = per_second(lambda x=x, turn=turn: ops.linear(x, weights[next(turn) % COPIES]))
        rates.append(2 * count * K * N * calls)
    return Ceilings(read, tuple(rows), tuple(rates))


def run(args: argparse.Namespace) -> None:
    found = measure(sorted(args.rows))
    print(f"read {found.read_bytes_s / 1e9:.1f} GB/s")
    for rows, flops_s in zip(found.rows, found.flops_s, strict=True):
        print(f"bfloat16 linear, {rows:4d} rows: {flops_s / 1e9:7.0f} GFLOP/s {flops_s / rows / 1e9:6.1f} GB/s")
