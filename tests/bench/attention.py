"""Decode attention over caches in bfloat16, int8, int4 and fp8, in turn in one run: milliseconds a call, and ratios."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from engines.batch import Batch
from engines.cpu.opset import OpSet

BLOCK_SIZE = 32
BYTES_KEPT_COLD = 1 << 28
"""Cached keys and values that a call walks through, so that no cache of the processor holds them from call to call."""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--heads", type=int, nargs=3, default=[9, 3, 64], metavar=("QUERY", "KV", "SIZE"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="least processor time: for a machine that others use")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    choose = min if args.cpu_time else statistics.median
    for context in args.context:
        calls = {kv_dtype: decode(context, *args.heads, kv_dtype) for kv_dtype in ("auto", "int8", "int4", "fp8")}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.repeat):
            for name, call in calls.items():
                start = clock()
                call()
                times[name].append(clock() - start)
        middle = {name: choose(found) for name, found in times.items()}
        ratios = {f"{name}_ratio": round(middle["auto"] / seconds, 2) for name, seconds in middle.items()}
        print(json.dumps({"context": context, "ms": {n: round(s * 1e3, 2) for n, s in middle.items()}, **ratios}))


def decode(context: int, num_heads: int, num_kv_heads: int, head_dim: int, kv_dtype: str) -> Callable[[], Tensor]:
    """One token of each of as many sequences as BYTES_KEPT_COLD holds in bfloat16, at least 2."""
    ops, device = OpSet(), torch.device("cpu")
    num_seqs = max(2, BYTES_KEPT_COLD // (context * num_kv_heads * head_dim * 4))
    each = context // BLOCK_SIZE
    size = (each * num_seqs, BLOCK_SIZE, num_kv_heads, head_dim)
    plain = kv_dtype == "auto"
    cache = (
        ops.allocate_kv_cache(*size, torch.bfloat16, device)
        if plain
        else ops.allocate_quantized_kv_cache(*size, kv_dtype, device)
    )
    write = ops.write_kv if plain else ops.write_quantized_kv
    for seq in range(num_seqs):
        k, v = (torch.randn(context, num_kv_heads, head_dim).bfloat16() for _ in range(2))
        write(k, v, cache, torch.arange(seq * context, (seq + 1) * context))
    batch = Batch(
        token_ids=torch.zeros(num_seqs, dtype=torch.int64),
        positions=torch.full((num_seqs,), context - 1),
        cu_seqlens_q=torch.arange(num_seqs + 1, dtype=torch.int32),
        seq_lens=torch.full((num_seqs,), context, dtype=torch.int32),
        max_seqlen_q=1,
        max_seqlen_k=context,
        block_tables=torch.randperm(each * num_seqs).int().view(num_seqs, each),
    )
    q = torch.randn(num_seqs, num_heads, head_dim).bfloat16()
    attend = ops.paged_attention if plain else ops.quantized_attention
    return lambda: attend(q, cache, batch, head_dim**-0.5)
