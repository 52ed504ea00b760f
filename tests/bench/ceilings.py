"""This machine's physical limits for inference: read bandwidth, bfloat16 matrix rate by number of rows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from engines.cpu.opset import OpSet

K, N, COPIES = 4864, 896, 24
"""A weight of the 0.5B class, in more copies than the caches hold."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128, 512])


def per_second(call: Callable[[], object], seconds: float = 0.4) -> float:
    for _ in range(3):
        call()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        count += 1
    return count / (time.perf_counter() - start)


def run(args: argparse.Namespace) -> None:
    big = torch.ones(64 << 20)
    print(f"read {big.numel() * 4 * per_second(big.sum) / 1e9:.1f} GB/s")
    ops = OpSet()
    weights = [ops.prepare_linear(torch.randn(N, K).bfloat16(), None) for _ in range(COPIES)]
    for rows in args.rows:
        x = torch.randn(rows, K).bfloat16()
        turn = iter(range(1 << 60))
        rate = per_second(lambda x=x, turn=turn: ops.linear(x, weights[next(turn) % COPIES]))
        gflops, gb_s = 2 * rows * K * N * rate / 1e9, 2 * K * N * rate / 1e9
        print(f"bfloat16 linear, {rows:4d} rows: {gflops:7.0f} GFLOP/s {gb_s:6.1f} GB/s")
