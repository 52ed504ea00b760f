"""Inputs for every op, adversarial by default; tests, benchmarks and ledgers of kernels take them from here.

A case gives the arguments of one call of an op in a dtype. What an op must not read holds NaN, views are strided,
blocks are permuted, texts are ragged, and one of them is empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engines.batch import Batch
from engines.ops import OpSet
from engines.ops.kv_cache import (
    KVCache,
    LatentCache,
    QuantizedKVCache,
    allocate_quantized_kv_cache,
)
from engines.ops.moe import Projection
from engines.ops.quantized import Float8Weight, GroupedIntWeight, Int8Weight, MXFP4Weight, QuantizedWeight
from engines.ops.sampling import SamplingBatch
from tests import attention_cases

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALE = 0.2


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    arguments: Callable[[torch.dtype], tuple[Any, ...]]
    options: dict[str, Any]
    modifies: tuple[int, ...] = ()
    """Arguments that are results, besides what is returned."""
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def call(ops: OpSet, case: Case, arguments: tuple[Any, ...]) -> list[Tensor]:
    """All results, from copies of the arguments."""
    own = convert(arguments)
    if case.op == "linear":
        x, weight, bias = own
        if isinstance(weight, Tensor):
            prepared = ops.prepare_linear(weight, bias)
        else:
            prepared = ops.prepare_quantized(weight, bias, x.dtype)
        returned = ops.linear(x, prepared)
    elif case.op == "mlp":
        x, up, down, *biases = own
        quantized = [isinstance(weight, Int8Weight) for weight in (up, down)]
        prepared = [
            ops.prepare_quantized(weight, bias, x.dtype) if is_int8 else ops.prepare_linear(weight, bias)
            for weight, bias, is_int8 in zip((up, down), biases, quantized, strict=True)
        ]
        returned = ops.mlp(x, *prepared, **case.options)
    elif case.op in ("add_rms_norm_for", "act_and_mul_for"):
        *given, weight, bias = own
        is_plain = isinstance(weight, Tensor)
        prepare = ops.prepare_linear if is_plain else partial(ops.prepare_quantized, dtype=given[0].dtype)
        product = prepare(weight, bias)
        made = getattr(ops, case.op)(*given, **case.options, product=product)
        inputs, *rest = made if isinstance(made, tuple) else (made,)
        returned = (ops.linear(inputs, product), *rest)
    elif case.op == "fused_experts":
        x, gate_up, down, *routed = own
        returned = ops.fused_experts(x, ops.prepare_experts(gate_up, down, x.dtype), *routed, **case.options)
    else:
        returned = getattr(ops, case.op)(*own, **case.options)
    returned = returned if isinstance(returned, tuple) else (returned,)
    return [t for t in (*returned, *(own[i] for i in case.modifies)) for t in tensors(t)]


def convert(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A deep copy with the same strides; floating-point tensors in `dtype` if one is given."""
    if isinstance(value, Tensor):
        to = dtype if dtype and value.dtype.is_floating_point else value.dtype
        return torch.empty_strided(value.shape, value.stride(), dtype=to, device=value.device).copy_(value)
    if isinstance(value, tuple):
        return tuple(convert(v, dtype) for v in value)
    if is_dataclass(value) and not isinstance(value, (Batch, type)):
        return replace(value, **{f.name: convert(getattr(value, f.name), dtype) for f in fields(value)})
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, KVCache):
        yield from (value.k, value.v)
    elif isinstance(value, QuantizedKVCache):
        codes = (t if t.dtype == torch.uint8 else t.double() for t in (value.k, value.v))
        yield from (*codes, value.k_scales, value.v_scales)
    elif isinstance(value, LatentCache):
        yield value.data


def numbers(*shape: int, dtype: torch.dtype, seed: int = 0, stretch: float = 1.0) -> Tensor:
    """A strided view of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(*shape[:-1], shape[-1] + 3, generator=generator) * stretch
    return wide.to(dtype)[..., 2 : 2 + shape[-1]]


def cases() -> tuple[Case, ...]:
    makers = (
        norms, activations, rotations, cache_writes, attentions, quantized_caches, latents, encoders, products, mlps,
        fused_inputs, quantized_products, adapted, experts, choices,
    )  # fmt: skip
    return tuple(itertools.chain.from_iterable(make() for make in makers))


def norms() -> Iterator[Case]:
    for rows, size in ((0, 64), (1, 1), (3, 576), (130, 33), (5, 2100)):
        for offset in (0.0, 1.0):
            options = {"eps": 1e-5, "weight_offset": offset}

            def one(dtype: torch.dtype, rows: int = rows, size: int = size) -> tuple[Tensor, ...]:
                return numbers(rows, size, dtype=dtype, stretch=3.0), numbers(size, dtype=dtype, seed=1).contiguous()

            def two(dtype: torch.dtype, rows: int = rows, size: int = size) -> tuple[Tensor, ...]:
                x, residual = (numbers(rows, size, dtype=dtype, seed=i).contiguous() for i in (0, 2))
                return x, residual, numbers(size, dtype=dtype, seed=1).contiguous()

            yield Case("rms_norm", f"{rows}x{size}+{offset:g}", one, options)
            yield Case("add_rms_norm", f"{rows}x{size}+{offset:g}", two, options)

        def layer(dtype: torch.dtype, rows: int = rows, size: int = size) -> tuple[Any, ...]:
            weight, bias = (numbers(size, dtype=dtype, seed=i).contiguous() for i in (1, 2))
            return numbers(rows, size, dtype=dtype, stretch=3.0), weight, bias, 1e-5

        def sum_layer(dtype: torch.dtype, layer: Callable[..., tuple[Any, ...]] = layer) -> tuple[Any, ...]:
            given = layer(dtype)
            return *given, numbers(*given[0].shape, dtype=dtype, seed=3)

        yield Case("layer_norm", f"{rows}x{size}", layer, {})
        yield Case("layer_norm", f"sum {rows}x{size}", sum_layer, {})

    def heads(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return numbers(5, 3, 80, dtype=dtype), numbers(80, dtype=dtype, seed=1).contiguous()

    yield Case("rms_norm", "heads", heads, {"eps": 1e-6})


def activations() -> Iterator[Case]:
    for name in ("silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"):
        for rows, size in ((0, 64), (1, 1), (7, 33), (64, 192)):

            def gated(dtype: torch.dtype, rows: int = rows, size: int = size, name: str = name) -> tuple[Any, ...]:
                return numbers(rows, 2 * size, dtype=dtype, stretch=10.0), name

            yield Case("act_and_mul", f"{name} {rows}x{size}", gated, {})
            if name == "swiglu_oai":
                continue

            def plain(dtype: torch.dtype, rows: int = rows, size: int = size, name: str = name) -> tuple[Any, ...]:
                return numbers(rows, size, dtype=dtype, stretch=10.0), name

            yield Case("act", f"{name} {rows}x{size}", plain, {})
    yield Case("softcap", "30", lambda dtype: (numbers(5, 100, dtype=dtype, stretch=50.0), 30.0), {})


def rotations() -> Iterator[Case]:
    for rows, head_dim, rotary_dim in ((0, 64, 64), (1, 64, 64), (9, 80, 32), (130, 34, 34), (3, 7, 6)):

        def make(dtype: torch.dtype, rows: int = rows, size: int = head_dim, rot: int = rotary_dim) -> tuple[Any, ...]:
            qkv = numbers(rows, 11 * size, dtype=dtype)
            q, k = (part.unflatten(1, (-1, size)) for part in (qkv[:, : 7 * size], qkv[:, 7 * size : 8 * size]))
            angle = torch.outer(torch.arange(50.0), 10.0 ** -torch.arange(0.0, 4.0, 8 / rot)[: rot // 2])
            positions = torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(1))
            return q, k, positions, torch.cat((angle.cos(), angle.sin()), 1).to(dtype)

        yield Case("rope", f"{rows}x{head_dim}/{rotary_dim}", make, {}, modifies=(0, 1))

        def stored(
            dtype: torch.dtype, make: Callable[..., tuple[Any, ...]] = make, rows: int = rows, size: int = head_dim
        ) -> tuple[Any, ...]:
            q, k, *angles = make(dtype)
            empty = torch.full((30, 1, 8, size), float("nan"), dtype=dtype)
            slots = torch.randperm(30 * 8, generator=torch.Generator().manual_seed(1))[:rows]
            return q, k, numbers(rows, 1, size, dtype=dtype, seed=2), *angles, KVCache(empty, empty.clone()), slots

        yield Case("rope_write_kv", f"{rows}x{head_dim}/{rotary_dim}", stored, {}, modifies=(0, 5))


def cache_writes() -> Iterator[Case]:
    for rows in (0, 1, 77):

        def make(dtype: torch.dtype, rows: int = rows) -> tuple[Any, ...]:
            k, v = (numbers(rows, 3 * 20, dtype=dtype, seed=i).unflatten(1, (3, 20)) for i in (0, 1))
            empty = torch.full((40, 3, 8, 20), float("nan"), dtype=dtype)
            slots = torch.randperm(40 * 8, generator=torch.Generator().manual_seed(1))[:rows]
            return k, v, KVCache(empty, empty.clone()), slots

        yield Case("write_kv", str(rows), make, {}, modifies=(2,))


def attentions() -> Iterator[Case]:
    for case in attention_cases.CASES:

        def make(dtype: torch.dtype, case: attention_cases.Case = case) -> tuple[Any, ...]:
            given = attention_cases.make(case, dtype)
            return given.q, given.cache, given.batch, SCALE

        yield Case("paged_attention", case.name, make, case.options())


QUANTIZED_NAMES = (
    "ragged", "nothing", "decode", "one token", "head 1", "head 33", "head 96", "head 256", "group of 7", "group of 71",
    "window", "window, softcap, sinks", "shared prefix", "shared prefix, softcap, sinks",
)  # fmt: skip
QUANTIZED = [case for case in attention_cases.CASES if case.name in QUANTIZED_NAMES]


def quantized_caches() -> Iterator[Case]:
    for kv_dtype in ("int8", "int4", "fp8"):
        for case in QUANTIZED:

            def attend(
                dtype: torch.dtype, case: attention_cases.Case = case, kv_dtype: Any = kv_dtype
            ) -> tuple[Any, ...]:
                given = attention_cases.make(case, dtype)
                return given.q, attention_cases.quantized(given.cache, kv_dtype), given.batch, SCALE

            yield Case("quantized_attention", f"{kv_dtype} {case.name}", attend, case.options())

        def uneven(dtype: torch.dtype, kv_dtype: Any = kv_dtype) -> tuple[Any, ...]:
            """Keys far from zero, queries from tiny to large, and values of which some are a thousand times others."""
            given = attention_cases.make(attention_cases.CASES[0], torch.float32)
            stretch = 10.0 ** (torch.arange(16) % 4)[:, None]
            cache = KVCache((given.cache.k + 20).to(dtype), (given.cache.v * stretch).to(dtype))
            q = given.q * 10.0 ** -(torch.arange(64) % 5)
            return q.to(dtype), attention_cases.quantized(cache, kv_dtype), given.batch, SCALE

        yield Case("quantized_attention", f"{kv_dtype} uneven", uneven, {})
        for rows, size in ((0, 20), (1, 33), (77, 64)):

            def write(
                dtype: torch.dtype, rows: int = rows, size: int = size, kv_dtype: Any = kv_dtype
            ) -> tuple[Any, ...]:
                k, v = (numbers(rows, 3 * size, dtype=dtype, seed=i).unflatten(1, (3, size)) for i in (0, 1))
                if rows:
                    k[0], v[-1] = 0.0, 1000.0  # no range
                cache = allocate_quantized_kv_cache(40, 8, 3, size, kv_dtype, torch.device("cpu"))
                for codes, scales in ((cache.k, cache.k_scales), (cache.v, cache.v_scales)):
                    codes.zero_()
                    scales.fill_(float("nan"))
                slots = torch.randperm(40 * 8, generator=torch.Generator().manual_seed(1))[:rows]
                return k, v, cache, slots

            yield Case("write_quantized_kv", f"{kv_dtype} {rows}x{size}", write, {}, modifies=(2,))


LATENTS = (
    attention_cases.Case("ragged", num_heads=5, num_kv_heads=1, head_dim=40),
    attention_cases.Case("decode", **attention_cases.DECODE, num_heads=16, num_kv_heads=1, head_dim=72),
    attention_cases.Case("one token", lens=(1,), new=(1,), num_heads=1, num_kv_heads=1, head_dim=12),
    attention_cases.Case("nothing", lens=(5, 9), new=(0, 0), num_heads=2, num_kv_heads=1, head_dim=24),
    attention_cases.Case("published", lens=(70, 200), new=(70, 1), num_heads=16, num_kv_heads=1, head_dim=576,
                         block_size=64),
)  # fmt: skip
"""num_heads 16, rank 512 and 64 rotating: DeepSeek V2 Lite's. In the others an 8th of the head rotates."""


def latents() -> Iterator[Case]:
    for case in LATENTS:
        rank = 512 if case.head_dim == 576 else case.head_dim // 8 * 7

        def attend(dtype: torch.dtype, case: attention_cases.Case = case, rank: int = rank) -> tuple[Any, ...]:
            given = attention_cases.make(case, dtype)
            return given.q, LatentCache(given.cache.k[:, 0].contiguous(), rank), given.batch, SCALE / 4

        yield Case("latent_attention", case.name, attend, {})
    for rows in (0, 1, 77):

        def write(dtype: torch.dtype, rows: int = rows) -> tuple[Any, ...]:
            empty = torch.full((40, 8, 36), float("nan"), dtype=dtype)
            slots = torch.randperm(40 * 8, generator=torch.Generator().manual_seed(1))[:rows]
            return numbers(rows, 36, dtype=dtype), LatentCache(empty, 28), slots

        yield Case("write_latent", str(rows), write, {}, modifies=(1,))
    for rows, heads, rank, rope_dim in ((0, 2, 28, 8), (1, 1, 3, 2), (77, 5, 28, 8), (9, 16, 512, 64)):

        def at_once(
            dtype: torch.dtype, rows: int = rows, heads: int = heads, rank: int = rank, rope_dim: int = rope_dim
        ) -> tuple[Any, ...]:
            q = numbers(rows, heads * (rope_dim + 5), dtype=dtype).unflatten(1, (heads, -1))[..., 5:]
            latent = numbers(rows, rank + rope_dim, dtype=dtype, seed=1, stretch=3.0)
            weight = numbers(rank, dtype=dtype, seed=2).contiguous()
            angle = torch.outer(torch.arange(50.0), 10.0 ** -torch.arange(0.0, 4.0, 8 / rope_dim)[: rope_dim // 2])
            generator = torch.Generator().manual_seed(1)
            positions = torch.randint(0, 50, (rows,), generator=generator)
            slots = torch.randperm(20 * 8, generator=generator)[:rows]
            empty = torch.full((20, 8, rank + rope_dim), float("nan"), dtype=dtype)
            table = torch.cat((angle.cos(), angle.sin()), 1).to(dtype)
            return q, latent, weight, 1e-6, positions, table, LatentCache(empty, rank), slots

        yield Case("rope_write_latent", f"{rows}x{heads} {rank}+{rope_dim}", at_once, {}, modifies=(0, 6))
    for rows, heads, size, out in ((0, 2, 8, 4), (1, 1, 1, 1), (5, 3, 24, 40), (70, 16, 32, 48)):

        def product(
            dtype: torch.dtype, rows: int = rows, heads: int = heads, size: int = size, out: int = out
        ) -> tuple[Any, ...]:
            x = numbers(rows, heads * (size + 3), dtype=dtype).unflatten(1, (heads, -1))[..., :size]
            return x, numbers(heads, size, out, dtype=dtype, seed=1).contiguous()

        yield Case("head_linear", f"{rows}x{heads}x{size}x{out}", product, {})

        def within(
            dtype: torch.dtype, made: Callable[..., tuple[Any, ...]] = product, out: int = out
        ) -> tuple[Any, ...]:
            x, weight = made(dtype)
            return x, weight, torch.zeros(*x.shape[:2], out + 5, dtype=dtype)[..., 2 : 2 + out]

        yield Case("head_linear", f"{rows}x{heads}x{size}x{out} within", within, {}, modifies=(2,))


def encoders() -> Iterator[Case]:
    shapes = (((5, 0, 1, 130), 3, 32), ((1,), 1, 64), ((33, 64), 2, 7), ((), 2, 8), ((16, 17, 300, 15), 5, 96))
    for lens, heads, head_dim in shapes:

        def make(
            dtype: torch.dtype, lens: tuple[int, ...] = lens, heads: int = heads, size: int = head_dim
        ) -> tuple[Any, ...]:
            qkv = numbers(sum(lens), 3 * heads * size, dtype=dtype)
            q, k, v = (part.unflatten(1, (heads, size)) for part in qkv.chunk(3, dim=1))
            offsets = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)
            ids = torch.zeros(sum(lens), dtype=torch.int64)
            longest = max(lens, default=0)
            return q, k, v, Batch(ids, ids, offsets, torch.tensor(lens, dtype=torch.int32), longest, longest), SCALE

        yield Case("encoder_attention", str(lens), make, {})


def products() -> Iterator[Case]:
    for rows, size, out, bias in ((0, 64, 8, False), (1, 1, 1, True), (3, 33, 37, True), (130, 192, 576, False)):

        def make(
            dtype: torch.dtype, rows: int = rows, size: int = size, out: int = out, bias: bool = bias
        ) -> tuple[Any, ...]:
            offset = numbers(out, dtype=dtype, seed=2).contiguous() if bias else None
            return numbers(rows, size, dtype=dtype), numbers(out, size, dtype=dtype, seed=1).contiguous(), offset

        yield Case("linear", f"{rows}x{size}x{out}{'+bias' if bias else ''}", make, {})

    def rows_of_a_table(dtype: torch.dtype) -> tuple[Any, ...]:
        return torch.tensor([7, 0, 7, 96]), numbers(97, 48, dtype=dtype).contiguous()

    yield Case("embedding", "4", rows_of_a_table, {})
    yield Case("embedding", "0", lambda dtype: (torch.zeros(0, dtype=torch.int64), rows_of_a_table(dtype)[1]), {})


def mlps() -> Iterator[Case]:
    """Rows on both sides of where op sets change their ways; inner sizes of whole tiles and not."""
    for rows, size, inner, bias in ((0, 64, 32, False), (1, 33, 48, True), (5, 40, 37, True), (150, 96, 80, False)):
        for gated in (False, True):
            name = "gelu_tanh" if bias else "silu"

            def make(
                dtype: torch.dtype,
                rows: int = rows,
                size: int = size,
                inner: int = inner,
                bias: bool = bias,
                gated: bool = gated,
            ) -> tuple[Any, ...]:
                shapes = ((2 * inner if gated else inner, size), (size, inner))
                weights = [
                    numbers(*shape, dtype=dtype, seed=i, stretch=0.3).contiguous() for i, shape in enumerate(shapes)
                ]
                biases = [numbers(len(w), dtype=dtype, seed=3).contiguous() if bias else None for w in weights]
                return numbers(rows, size, dtype=dtype), *weights, *biases

            yield Case(
                "mlp", f"{rows}x{size}x{inner}{'-gated' if gated else ''}", make, {"activation": name, "gated": gated}
            )

    def integers(dtype: torch.dtype) -> tuple[Any, ...]:
        weights = (quantized_weights(out, size)["int8 static"] for out, size in ((192, 96), (96, 96)))
        return numbers(150, 96, dtype=dtype), *weights, None, None

    yield Case("mlp", "150-int8 static", integers, {"activation": "relu", "gated": True})


def fused_inputs() -> Iterator[Case]:
    """Products after what makes their inputs, which may round them on the way."""
    for (rows, size), kind in itertools.product(((0, 64), (5, 192), (40, 1152)), ("plain", "int8", "int8 static")):

        def product(dtype: torch.dtype, size: int = size, kind: str = kind) -> tuple[Any, ...]:
            bias = numbers(40, dtype=dtype, seed=4).contiguous()
            if kind == "plain":
                return numbers(40, size, dtype=dtype, seed=3).contiguous(), bias
            return quantized_weights(40, size)[kind], bias

        def normed(
            dtype: torch.dtype, rows: int = rows, size: int = size, make: Callable[..., tuple[Any, ...]] = product
        ) -> tuple[Any, ...]:
            x, residual = (numbers(rows, size, dtype=dtype, seed=i).contiguous() for i in (0, 2))
            return x, residual, numbers(size, dtype=dtype, seed=1).contiguous(), *make(dtype)

        def activated(
            dtype: torch.dtype, rows: int = rows, size: int = size, make: Callable[..., tuple[Any, ...]] = product
        ) -> tuple[Any, ...]:
            return numbers(rows, 2 * size, dtype=dtype), *make(dtype)

        name = f"{kind} {rows}x{size}"
        yield Case("add_rms_norm_for", name, normed, {"eps": 1e-5, "weight_offset": 0.0})
        yield Case("act_and_mul_for", name, activated, {"name": "silu"})


def quantized_weights(out: int, size: int) -> dict[str, QuantizedWeight]:
    """A weight of every class and variant; size is a multiple of 32."""
    generator = torch.Generator().manual_seed(out)

    def integers(*shape: int, low: int = 0, high: int = 256, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    def scales(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator) + 0.5) * 0.02

    def grouped(bits: int, group: int, order: Tensor | None = None) -> GroupedIntWeight:
        groups = -(-size // group)
        zeros = integers(out, groups, high=2**bits, dtype=torch.int16)
        return GroupedIntWeight(integers(out, size, high=2**bits), scales(out, groups), zeros, bits, group, order)

    eight = integers(out, size, low=-127, high=128, dtype=torch.int8)
    floats = torch.randn(out, size, generator=generator).to(torch.float8_e4m3fn)
    tiles = scales(-(-out // 16), -(-size // 16))
    return {
        "w4 g32": grouped(4, 32),
        "w4 one group": grouped(4, size),
        "w4 act-order": grouped(4, 32, torch.randperm(size, generator=generator)),
        "w8 g32": grouped(8, 32),
        "w8 rows": replace(grouped(8, size), zeros=torch.full((out, 1), 128, dtype=torch.int16)),
        "int8": Int8Weight(eight, scales(out)),
        "int8 static": Int8Weight(eight, scales(out), torch.tensor(0.03)),
        "fp8 rows": Float8Weight(floats, scales(out, 1), (1, size)),
        "fp8 tiles": Float8Weight(floats, tiles, (16, 16)),
        "mxfp4": MXFP4Weight(integers(out, size // 2), integers(out, size // 32, low=118, high=123)),
    }


def quantized_products() -> Iterator[Case]:
    for rows, size, out, bias in ((0, 64, 24, False), (1, 32, 16, True), (5, 96, 40, True), (70, 192, 64, False)):
        for name in quantized_weights(out, size):

            def make(
                dtype: torch.dtype, rows: int = rows, size: int = size, out: int = out, bias: bool = bias,
                name: str = name,
            ) -> tuple[Any, ...]:  # fmt: skip
                offset = numbers(out, dtype=dtype, seed=2).contiguous() if bias else None
                return numbers(rows, size, dtype=dtype).contiguous(), quantized_weights(out, size)[name], offset

            yield Case("linear", f"{name} {rows}x{size}x{out}{'+bias' if bias else ''}", make, {})

    for tile in ((1, 384), (128, 128)):

        def eight_bits(dtype: torch.dtype, tile: tuple[int, int] = tile) -> tuple[Any, ...]:
            """Inputs that are 8-bit floats, with a scale of 1: op sets that round them change nothing."""
            generator = torch.Generator().manual_seed(0)
            x, weight = (torch.randn(n, 384, generator=generator).to(torch.float8_e4m3fn) for n in (70, 200))
            x = x.to(dtype)
            x[:, ::128] = 448.0
            scales = torch.rand(-(-200 // tile[0]), 384 // tile[1], generator=generator) + 0.5
            return x, Float8Weight(weight, scales, tile), None

        yield Case("linear", f"fp8 inputs {tile[0]}x{tile[1]}", eight_bits, {})


def adapted() -> Iterator[Case]:
    """Tokens without an adapter, adapters without a token, an adapter that is filled up with zeros."""
    for rows, size, out, rank, count in ((0, 64, 8, 4, 2), (1, 1, 1, 1, 1), (9, 70, 33, 5, 4), (130, 64, 96, 16, 3)):

        def make(
            dtype: torch.dtype, rows: int = rows, size: int = size, out: int = out, rank: int = rank, count: int = count
        ) -> tuple[Any, ...]:
            a, b = (numbers(count, *shape, dtype=dtype, seed=i).contiguous() for i, shape in
                    ((1, (rank, size)), (2, (out, rank))))  # fmt: skip
            a[0, rank // 2 :], b[0, :, rank // 2 :] = 0.0, 0.0
            ids = torch.arange(rows) * 3 % (count + 1) - 1
            if rows > 1:
                ids[ids == count - 1] = -1
            return numbers(rows, out, dtype=dtype).contiguous(), numbers(rows, size, dtype=dtype, seed=3), a, b, ids

        yield Case("lora", f"{rows}x{size}x{out}/{rank}", make, {}, modifies=(0,))


def experts() -> Iterator[Case]:
    """Experts that no token goes to, and tokens that all go to one."""
    for rows, count, top_k in ((0, 4, 2), (1, 4, 1), (3, 5, 5), (50, 16, 3)):

        def logits(dtype: torch.dtype, rows: int = rows, count: int = count) -> Tensor:
            generator = torch.Generator().manual_seed(rows)
            ranks = torch.stack([torch.randperm(count, generator=generator) for _ in range(rows)]) if rows else (
                torch.zeros(0, count))  # fmt: skip
            return (ranks.float() / 4 - 1).to(dtype)

        shape = f"{rows}x{count}/{top_k}"
        for scoring, normalize in (("softmax", False), ("softmax", True), ("softmax_of_chosen", True)):
            options = {"top_k": top_k, "scoring": scoring, "normalize": normalize}
            yield Case("route", f"{scoring} {normalize} {shape}", lambda dtype, make=logits: (make(dtype),), options)
        if count % 4 == 0:
            grouped = {"top_k": top_k, "scoring": "sigmoid", "normalize": True, "scale": 2.5,
                       "bias": torch.linspace(-0.4, 0.3, count), "num_groups": 4, "top_groups": 3}  # fmt: skip
            yield Case("route", f"sigmoid {shape}", lambda dtype, make=logits: (make(dtype),), grouped)
            limited = {**grouped, "scoring": "softmax", "normalize": False, "bias": None}
            yield Case("route", f"limited {shape}", lambda dtype, make=logits: (make(dtype),), limited)

        for kind, bias in (("dense", True), ("w4 g32", False), ("mxfp4", True)):

            def make(
                dtype: torch.dtype, rows: int = rows, count: int = count, top_k: int = top_k, kind: str = kind,
                bias: bool = bias, logits: Callable[..., Tensor] = logits,
            ) -> tuple[Any, ...]:  # fmt: skip
                def stack(out: int, size: int) -> tuple[Projection, ...]:
                    made = []
                    for expert in range(count):
                        weight = numbers(out, size, dtype=dtype, seed=expert, stretch=0.2).contiguous()
                        offset = numbers(out, dtype=dtype, seed=expert + 50).contiguous() if bias else None
                        packed = None if kind == "dense" else quantized_weights(out, size)[kind]
                        made.append(Projection(weight if packed is None else packed, offset))
                    return tuple(made)

                x = numbers(rows, 96, dtype=dtype).contiguous()
                ids = logits(torch.float32).topk(top_k, dim=-1).indices
                if rows > 10:
                    ids[5:30] = torch.arange(top_k)  # a crowd at a few of them
                ids[1:2, 1:], ids[30:35], ids[35:40, 0] = -1, -1, -1  # held elsewhere, some or all of a token's
                weights = torch.rand(rows, top_k, generator=torch.Generator().manual_seed(1))
                return x, stack(2 * 64, 96), stack(96, 64), weights, ids

            activation = "swiglu_oai" if kind == "mxfp4" else "silu"
            yield Case("fused_experts", f"{kind} {shape}", make, {"activation": activation})


def choices() -> Iterator[Case]:
    """Ops on logits, which are float32. Exact ties, as logits of bfloat16 models have, and forbidden tokens."""
    single = (torch.float32,)
    for rows, vocab in ((1, 1), (6, 11), (9, 997), (4, 5003)):

        def logits(dtype: torch.dtype, rows: int = rows, vocab: int = vocab) -> Tensor:
            values = numbers(rows, vocab, dtype=torch.float32, stretch=3.0).bfloat16().contiguous().to(dtype)
            values[:, vocab // 3 : vocab // 3 + vocab // 4] = float("-inf")
            return values

        def draw(dtype: torch.dtype, logits: Callable[..., Tensor] = logits, rows: int = rows) -> tuple[Any, ...]:
            return logits(dtype), sampling_batch(rows)

        def gather(
            dtype: torch.dtype, logits: Callable[..., Tensor] = logits, rows: int = rows, vocab: int = vocab
        ) -> tuple[Any, ...]:
            return logits(dtype), torch.arange(rows) * 7 % vocab

        def most(dtype: torch.dtype, rows: int = rows, vocab: int = vocab) -> tuple[Any, ...]:
            return numbers(rows, vocab, dtype=dtype, stretch=3.0), min(vocab, 5)

        def penalties(dtype: torch.dtype, logits: Callable[..., Tensor] = logits) -> tuple[Any, ...]:
            x = logits(dtype)
            generator = torch.Generator().manual_seed(1)
            prompt, output = (torch.randint(0, 3, x.shape, generator=generator, dtype=torch.int32) for _ in range(2))
            each = torch.linspace(0.1, 1.9, len(x)).to(dtype)
            return x, prompt, output, each, each - 1, 1 - each

        size = f"{rows}x{vocab}"

        def largest(dtype: torch.dtype, logits: Callable[..., Tensor] = logits) -> tuple[Any, ...]:
            x = logits(dtype)
            if len(x) > 2:
                x[1], x[2, 1:] = float("-inf"), float("nan")
                x[2, 0] = 1.0
            return (x,)

        yield Case("argmax", size, largest, {}, dtypes=FLOATS)
        yield Case("sample", size, draw, {}, dtypes=single)
        yield Case("apply_penalties", size, penalties, {}, dtypes=single)
        yield Case("log_softmax_gather", size, gather, {}, dtypes=FLOATS)
        yield Case("top_logprobs", size, most, {}, dtypes=single)


def sampling_batch(rows: int) -> SamplingBatch:
    """Every mixture of filters, greedy rows among them, keys with the sign bit set."""
    row = torch.arange(rows)
    return SamplingBatch(
        temperature=torch.tensor([0.7, 0.0, 1.0, 1.6, 0.1])[row % 5],
        top_k=torch.tensor([0, 3, 0, 600, 40, 1, 5])[row % 7],
        top_p=torch.tensor([1.0, 0.9, 0.3, 0.999])[row % 4],
        min_p=torch.tensor([0.0, 0.0, 0.05])[row % 3],
        stream=row * 0x1E3779B97F4A7C15 - 5,
        position=row * 3,
    )
