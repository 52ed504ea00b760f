"""What the CUDA kernels take the hardware to be, one assumption at a time, on small shapes with exact results: the
first run on a new device says which one is wrong, and where.

    python -m tests.gpu.first              every check, each in a process of its own: one that hangs or ends is named
    python -m tests.gpu.first CHECK ...    these, here

Attention is asked to copy: keys of random signs, queries that are one of them, a scale at which all other weights are
nothing. Products are asked for columns of their weights: inputs are 1 in one place. Values are small integers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engines.batch import Batch
from engines.ops import OpSet
from engines.ops.kv_cache import KVCache
from engines.ops.quantized import Float8Weight, GroupedIntWeight, Int8Weight, MXFP4Weight, QuantizedWeight

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 90.0
"""For one check, the start of its process included."""
AT_A_TIME = 4
BF16 = torch.bfloat16


class Copying:
    """Attention whose every output is the value of one key."""

    def __init__(
        self,
        device: torch.device,
        lens: Sequence[int],
        new: Sequence[int],
        head_dim: int = 128,
        block_size: int = 32,
        heads: int = 8,
        kv_heads: int = 2,
        spare_blocks: int = 0,
    ) -> None:
        """spare_blocks: that nobody uses, ahead of all others."""
        generator = torch.Generator().manual_seed(0)
        width = -(-max(lens) // block_size)
        used = len(lens) * width
        tables = torch.randperm(used, generator=generator).int().view(len(lens), width)
        shape = (used, kv_heads, block_size, head_dim)
        keys = torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).to(BF16)
        values = torch.randint(1, 129, shape, generator=generator).to(BF16)
        queries, expected, self.chosen = [], [], []
        for length, count, table in zip(lens, new, tables, strict=True):
            for position in range(length - count, length):
                key = torch.randint(0, position + 1, (heads,), generator=generator)
                block, offset = table[key // block_size].long(), key % block_size
                own = torch.arange(heads) // (heads // kv_heads)
                queries.append(keys[block, own, offset])
                expected.append(values[block, own, offset])
                self.chosen.append(key)
        self.cache = KVCache(
            *(torch.empty(spare_blocks + used, *shape[1:], dtype=BF16, device=device) for _ in range(2))
        )
        self.cache.k[spare_blocks:], self.cache.v[spare_blocks:] = keys, values
        self.q, self.expected = torch.stack(queries).to(device), torch.stack(expected)
        starts = torch.tensor([0, *new]).cumsum(0).int().to(device)
        ids = torch.zeros(len(self.q), dtype=torch.int64, device=device)
        self.batch = Batch(
            token_ids=ids,
            positions=ids,
            cu_seqlens_q=starts,
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=device),
            max_seqlen_q=max(new),
            max_seqlen_k=max(lens),
            block_tables=(tables + spare_blocks).to(device),
        )
        self._all_values = values.flatten(0, 2)

    def run(self, ops: OpSet) -> Tensor:
        return ops.paged_attention(self.q, self.cache, self.batch, 4.0)

    def problems(self, found: Tensor, what: str) -> list[str]:
        """Empty where every output is the value that was asked for."""
        found = found.cpu()
        rows = (found != self.expected).any(-1).nonzero()
        if not len(rows):
            return []
        token, head = rows[0].tolist()
        own, right = found[token, head], self.expected[token, head]
        others = (self._all_values == own).all(-1)
        if bool(others.any()):
            why = "the value of another key: scores, masks or block tables"
        elif own.isnan().any():
            why = "NaN: what was not copied, or weights of nothing"
        else:
            dims = (own != right).nonzero().flatten().tolist()
            why = f"dimensions {_ranges(dims)} differ: of sums, {own[dims[:4]].tolist()} for {right[dims[:4]].tolist()}"
        key = int(self.chosen[token][head])
        return [
            f"{what}: {len(rows):,} of {found[..., 0].numel():,} rows; token {token}, head {head}, key {key}: {why}"
        ]


def decode(ops: OpSet, device: torch.device) -> list[str]:
    """mma.sync, ldmatrix and cp.async as fragments and stages are read; one split of the keys."""
    found = []
    for head_dim in (64, 80, 96, 128, 256):
        work = Copying(device, (1, 16, 100, 511), (1, 1, 1, 1), head_dim)
        found += work.problems(work.run(ops), f"head_dim {head_dim}")
    return found


def splits(ops: OpSet, device: torch.device) -> list[str]:
    """Blocks of threads that see what others wrote before a fence and an atomic addition; counters left as zeros."""
    work = Copying(device, (1100, 513, 512), (1,) * 3)
    return [line for i in range(4) for line in work.problems(work.run(ops), f"call {i}")]


def prefill(ops: OpSet, device: torch.device) -> list[str]:
    """FlashAttention-2 on mma.sync; head_dims that the kernel for sm_90a does not take."""
    found = []
    for head_dim in (80, 96, 256):
        work = Copying(device, (70, 200), (70, 33), head_dim)
        found += work.problems(work.run(ops), f"head_dim {head_dim}")
    return found


def prefill_sm90(ops: OpSet, device: torch.device) -> list[str]:
    """wgmma of queries in registers: its descriptors with k contiguous (keys) and n contiguous (values), the swizzle
    that the tensor memory accelerator leaves, boxes of every block size, barriers that count bytes."""
    found = []
    for head_dim, block_size in ((64, 128), (128, 128), (128, 256), (128, 64), (128, 32), (128, 16), (128, 8)):
        work = Copying(device, (70, 200), (70, 65), head_dim, block_size, heads=2, kv_heads=1)
        found += work.problems(work.run(ops), f"head_dim {head_dim}, blocks of {block_size}")
    return found


def far_blocks(ops: OpSet, device: torch.device) -> list[str]:
    """Addresses past 2^31 elements of a cache: 4.3 GB each of keys and values."""
    spare = (1 << 31) // (2 * 32 * 128) if device.type == "cuda" else 3
    found = []
    for what, new in (("decoding", (1, 1)), ("prefilling", (20, 33))):
        work = Copying(device, (600, 150), new, heads=4, spare_blocks=spare)
        found += work.problems(work.run(ops), what)
    return found


def graphs(ops: OpSet, device: torch.device) -> list[str]:
    """Launches that are captured: counters at the addresses of the capture, and other lengths later."""
    work = Copying(device, (1100, 513, 40), (1,) * 3)
    weight = ops.prepare_quantized(_moved(_w4(256, 2048), device), None, BF16)
    x = torch.randn(5, 2048, device=device).to(BF16)

    def step() -> tuple[Tensor, Tensor]:
        return work.run(ops), ops.linear(x, weight)

    attended, multiplied = step()
    replay: Callable[[], object] = lambda: (attended.copy_(step()[0]), multiplied.copy_(step()[1]))  # noqa: E731
    if device.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attended, multiplied = step()
        replay = graph.replay
    found = []
    for i in range(3):
        x.normal_()
        replay()
        found += work.problems(attended, f"replay {i}")
        if not torch.equal(multiplied, ops.linear(x, weight)):
            found.append(f"replay {i}: a product in splits differs from its own launch")
    work.batch.seq_lens.clamp_(max=300)
    replay()
    if not torch.equal(attended, work.run(ops)):
        found.append("shorter sequences: a replay differs from a launch")
    return found


def products(ops: OpSet, device: torch.device) -> list[str]:
    """Packed weights on mma.sync: 4-bit integers, 4-bit floats, 8-bit integers. On sm_90 4-bit integers are unpacked to
    registers for wgmma, and inputs are copied to both blocks of a cluster; an odd number of row tiles has none."""
    e2m1 = MXFP4Weight(_random((200, 512), 256).to(torch.uint8), (_random((200, 32), 5) + 125).to(torch.uint8))
    int8 = Int8Weight((_random((200, 1024), 255) - 127).to(torch.int8), torch.ones(200))
    weights = {"w4, groups of 128": _w4(200, 1024), "w4, groups of 32": _w4(130, 1024, 32), "mxfp4": e2m1, "int8": int8}
    weights["w4, no clusters"] = _w4(100, 2112, 64)
    return [line for name, weight in weights.items() for line in _columns(ops, device, weight, name)]


def tokens_alone(ops: OpSet, device: torch.device) -> list[str]:
    """Tiles of 16, 32 and 64 tokens, blocks that take one split or all: a token's bits are the same."""
    weight = ops.prepare_quantized(_moved(_w4(130, 4096), device), None, BF16)
    count = 8192 if device.type == "cuda" else 200  # so many that blocks take all splits
    x = torch.randn(count, 4096, generator=torch.Generator().manual_seed(0)).to(BF16).to(device)
    together = ops.linear(x, weight)
    found = []
    for begin, end in ((0, 1), (180, 196), (3, 35), (30, 94), (50, 200)):
        wrong = (ops.linear(x[begin:end], weight) != together[begin:end]).sum().item()
        if wrong:
            found.append(f"w4, tokens {begin} to {end - 1} apart: {wrong:,} values differ from those among {count:,}")
    return found


def products_fp8(ops: OpSet, device: torch.device) -> list[str]:
    """wgmma of 8-bit floats out of shared memory, both factors with k contiguous; tiles that end outside the tensor."""
    data = (_random((200, 1024), 17) - 8).float().to(torch.float8_e4m3fn)
    tiles = Float8Weight(data, 2.0 ** (_random((2, 8), 5) - 2).float(), (128, 128))
    rows = Float8Weight(data, 2.0 ** (_random((200, 1), 5) - 2).float(), (1, 1024))
    return [
        line
        for name, weight in (("tiles of 128 x 128", tiles), ("scales of rows", rows))
        for line in _columns(ops, device, weight, name)
    ]


def _columns(ops: OpSet, device: torch.device, weight: QuantizedWeight, name: str) -> list[str]:
    """A column for each token, for numbers of tokens that take every size of tile."""
    exact = weight.dequantize(torch.float32).to(BF16)
    columns = exact.shape[1]
    prepared = ops.prepare_quantized(_moved(weight, device), None, BF16)
    found = []
    for tokens in (1, 16, 33, 130):
        column = (torch.arange(tokens) * 67 + 3) % columns
        x = torch.zeros(tokens, columns, dtype=BF16)
        x[torch.arange(tokens), column] = 1.0
        out, expected = ops.linear(x.to(device), prepared).cpu(), exact[:, column].T
        wrong = (out != expected).nonzero()
        if len(wrong):
            token, row = wrong[0].tolist()
            found.append(
                f"{name}, {tokens} tokens: {len(wrong):,} of {out.numel():,} values; token {token}, "
                f"column {int(column[token])}, rows {_ranges(wrong[wrong[:, 0] == token, 1].tolist())}: "
                f"{out[token, row].item()} for {expected[token, row].item()}"
            )
    return found


def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    return replace(weight, **{name: t.to(device) for name, t in vars(weight).items() if isinstance(t, Tensor)})


def _w4(rows: int, columns: int, group: int = 128) -> GroupedIntWeight:
    """Scales are powers of two: weights are exact in 16 bits."""
    groups = (rows, columns // group)
    return GroupedIntWeight(
        codes=_random((rows, columns), 16).to(torch.uint8),
        scales=2.0 ** (_random(groups, 5) - 2).float(),
        zeros=_random(groups, 17).to(torch.int16),
        bits=4,
        group_size=group,
    )


def _random(shape: tuple[int, ...], below: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(shape[0] + below))


def _ranges(numbers: Sequence[int]) -> str:
    """8 to 15, 24 to 31 and so on, the first few."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    texts = [f"{first} to {last}" if last > first else str(first) for first, last in runs[:4]]
    return ", ".join(texts) + (f" and {len(runs) - 4} runs more" if len(runs) > 4 else "")


CHECKS: dict[str, Callable[[OpSet, torch.device], list[str]]] = {
    check.__name__: check
    for check in (decode, splits, prefill, prefill_sm90, products, tokens_alone, products_fp8, graphs, far_blocks)
}


def run(seconds: float) -> tuple[list[str], bool]:
    """(lines to print, whether something is wrong) of all checks, on the first GPU."""
    deadline = time.time() + seconds
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        results = list(pool.map(lambda name: one(name, min(PATIENCE_S, deadline - time.time())), CHECKS))
    lines = [f"{len(results) - sum(map(bool, results))} of {len(CHECKS)} assumptions hold"]
    for name, said in zip(CHECKS, results, strict=True):
        if said:
            lines += [f"  {name} ({' '.join((CHECKS[name].__doc__ or '').split())})", *(f"    {line}" for line in said)]
    return lines, any(results)


def one(name: str, seconds: float) -> list[str]:
    """What a check in a process of its own finds wrong."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.first", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(seconds, 0.01))
    except subprocess.TimeoutExpired:
        return [f"hangs: ended after {seconds:.0f} s"]
    if done.returncode in (0, 1) and not done.stderr:
        return done.stdout.splitlines()
    return [f"ended with status {done.returncode}", *(done.stdout + done.stderr).splitlines()[-3:]]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.first")
    parser.add_argument("checks", nargs="*", choices=[[], *CHECKS], metavar="CHECK", help=", ".join(CHECKS))
    asked = parser.parse_args().checks
    if not asked:
        lines, wrong = run(8 * PATIENCE_S)
        print(*lines, sep="\n")
        return int(wrong)
    from engines.cuda.opset import OpSet as CudaOps

    with torch.inference_mode():
        lines = [line for name in asked for line in CHECKS[name](CudaOps(), torch.device("cuda:0"))]
    print(*lines, sep="\n", end="\n" if lines else "")
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
