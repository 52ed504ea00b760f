"""Compiles Triton's kernels for GPUs that are not here, in a process of its own without the interpreter.

`python -m tests.engines.triton.aot 90 attention 128` prints a JSON list: what the code of each kernel, or of those
named so at the end, takes of a multiprocessor.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engines.ops.quantized import Float8Weight, GroupedIntWeight, MXFP4Weight
from engines.triton import (
    activation,
    attention,
    kv_cache,
    linear,
    linear_kernels,
    lora,
    moe,
    moe_kernels,
    norm,
    rotary,
    sampling,
)
from engines.triton.launch import power_of_two, warps
from engines.triton.quantized import WIDTH, Even, Packed, pack_floats, pack_ints, pack_mxfp4

Build = tuple[str, Any, dict[str, Any], dict[str, str], int, int]
"""(name, kernel, constants, types of arguments that are not pointers to the compute dtype, warps, stages)"""
INTEGERS = ("offsets_ptr", "lens_ptr", "tables_ptr", "prompt_ptr", "output_ptr", "slots_ptr", "experts_ptr")
LONG = ("positions_ptr", "top_k_ptr", "stream_ptr", "position_ptr", "targets_ptr")
FLOATS = ("k_scales_ptr", "v_scales_ptr", "sinks_ptr", "parts_ptr", "sums_ptr", "temperature_ptr", "top_p_ptr",
          "min_p_ptr", "repetition_ptr", "presence_ptr", "frequency_ptr", "scales_ptr", "x_scales_ptr")  # fmt: skip


def builds(sm: int, group: str) -> Iterator[Build]:
    if group == "attention":
        for head_dim, options in (
            (128, {}),
            (80, {"WINDOW": True, "SOFTCAP": True, "SINKS": True}),
            (256, {}),
            (64, {}),
            (96, {}),
            (192, {}),
            (224, {"WINDOW": True, "SOFTCAP": True, "SINKS": True}),
        ):
            yield from attentions(divmod(sm, 10), head_dim, options)
    elif group == "cache":
        for kind, head_dim in (
            ("int8", 128),
            ("int4", 128),
            ("fp8", 128),
            ("int8", 80),
            ("int4", 256),
            ("latent", 576),
        ):
            yield from cached(divmod(sm, 10), kind, head_dim)
    elif group == "adapters":
        yield from adapters()
    elif group == "elementwise":
        yield from elementwise()
    elif group == "packed":
        yield from packed(divmod(sm, 10))
    elif group == "even":
        yield from even(divmod(sm, 10))
    elif group == "mixtures":
        yield from mixtures()
    else:
        vocab = {"B": sampling.BLOCK}
        logits = {"logits_ptr": "*fp32"}
        yield "sample", sampling.sample_kernel, vocab, {**logits, "out_ptr": "*i64"}, 8, 3
        yield "apply_penalties", sampling.penalties_kernel, vocab, {**logits, "out_ptr": "*fp32"}, 4, 3
        yield "log_softmax_gather", sampling.log_softmax_gather_kernel, vocab, {"out_ptr": "*fp32"}, 8, 3


def attentions(sm: tuple[int, int], head_dim: int, options: dict[str, bool]) -> Iterator[Build]:
    heads = constants("plain", head_dim, options)
    for paged in (True, False) if not options else (True,):
        tiles = attention.prefill_tiles(sm, 2, head_dim)
        own = {**heads, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "PAGED": paged}
        if not paged:
            own |= {"GROUP": 1, "BLOCK_SIZE": 1, "tables_ptr": None}
        name = "prefill" if paged else "encoder"
        yield f"{name} {head_dim}", attention.prefill_kernel, own, {}, tiles.num_warps, tiles.num_stages
    yield decoding(sm, str(head_dim), heads, 4)
    own = {"D": head_dim, "D_BLOCK": power_of_two(head_dim), "S_BLOCK": 64, "BLOCK_N": 64, "WINDOW": heads["WINDOW"]}
    yield f"join {head_dim}", attention.join_kernel, own, {}, attention.join_warps(power_of_two(head_dim)), 3


def cached(sm: tuple[int, int], kind: str, head_dim: int) -> Iterator[Build]:
    """Codes, or the latents of DeepSeek V2 Lite (16 heads) and V3 (128)."""
    heads = constants(kind, head_dim, {"WINDOW": head_dim == 80})
    tiles = attention.prefill_tiles(sm, 2, head_dim, kind)
    own = {**heads, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "PAGED": True}
    types = {} if kind == "latent" else {"k_ptr": "*u8", "v_ptr": "*u8"}
    yield f"prefill {kind} {head_dim}", attention.prefill_kernel, own, types, tiles.num_warps, tiles.num_stages
    for group in (16, 128) if kind == "latent" else (4,):
        yield decoding(sm, f"{kind} {head_dim}, group of {group}", {**heads, "GROUP": group}, group, types)
    if kind == "latent":
        own = {"D": 512, "D_BLOCK": 512, "S_BLOCK": 64, "BLOCK_N": 64, "WINDOW": False}
        yield "join latent", attention.join_kernel, own, {}, attention.join_warps(512), 3
        yield (
            "write_latent",
            kv_cache.write_latent_kernel,
            {"D": 576, "D_BLOCK": 1024},
            {"slots_ptr": "*i64"},
            warps(1024),
            3,
        )
        own = {"RANK": 512, "RANK_BLOCK": 512, "ROPE": 64, "ROPE_BLOCK": 64, "HALF": 32, "HALF_BLOCK": 32}
        for heads_here in (16, 128):
            many = {**own, "HEADS": heads_here, "HEADS_BLOCK": heads_here}
            count = warps(max(heads_here * 32, 512))
            name = f"rope_write_latent {heads_here} heads"
            yield name, kv_cache.rope_write_latent_kernel, many, {"slots_ptr": "*i64"}, count, 3
    else:
        block = power_of_two(head_dim // 2 if kind == "int4" else head_dim)
        types = {"k_cache_ptr": "*u8", "v_cache_ptr": "*u8"}
        yield from writing(kind, head_dim, block, types)


def writing(kind: str, head_dim: int, block: int, types: dict[str, str]) -> Iterator[Build]:
    """Keys and values alone, and with the rotation."""
    types = {**types, "slots_ptr": "*i64"}
    own: dict[str, Any] = {"BLOCK_SIZE": 32, "HEADS": 8, "HEADS_BLOCK": 8, "D": head_dim, "D_BLOCK": block}
    own |= {"KIND": kind} | (dict.fromkeys(("k_scales_ptr", "v_scales_ptr")) if kind == "plain" else {})
    alone = {"Q_HEADS": 1, "Q_HEADS_BLOCK": 1, "HALF": 0, "HALF_BLOCK": 1}
    alone |= dict.fromkeys(("q_ptr", "positions_ptr", "table_ptr"))
    yield f"write {kind} {head_dim}", kv_cache.write_kernel, {**own, **alone}, types, warps(8 * block), 3
    half = head_dim // 2
    turned = {"Q_HEADS": 32, "Q_HEADS_BLOCK": 32, "HALF": half, "HALF_BLOCK": power_of_two(half)}
    yield f"turn {kind} {head_dim}", kv_cache.write_kernel, {**own, **turned}, types, warps(32 * half), 3


def adapters() -> Iterator[Build]:
    types = {"ids_ptr": "*i64", "parts_ptr": "*fp32"}
    for tokens, rank in ((16, 8), (16, 64), (32, 192)):
        block, features = min(64, power_of_two(rank, 16)), 4096
        own = {"SIZE": features, "RANK": rank, "BLOCK_T": tokens, "BLOCK_R": block}
        down = {**own, "PIECE": lora.PIECE, "BLOCK_K": 64}
        yield f"shrink {tokens} x {rank}", lora.shrink_kernel, down, types, 4, 3
        yield f"expand {tokens} x {rank}", lora.expand_kernel, {**own, "BLOCK_N": 64}, types, 4, 2


def constants(kind: str, head_dim: int, options: dict[str, bool]) -> dict[str, Any]:
    """What all kernels of attention are compiled for."""
    flags = {"WINDOW": False, "SOFTCAP": False, "SINKS": False, **options}
    first, second, following = attention.parts_of(kind, head_dim, 512)
    heads = {"KV_HEADS": 8, "GROUP": 4, "D": head_dim, "D0": first, "D1": second, "NEXT": following, "KIND": kind}
    if kind == "latent":
        heads |= {"KV_HEADS": 1, "GROUP": 16}
    absent = [] if flags["SINKS"] else ["sinks_ptr"]
    absent += ["k_scales_ptr", "v_scales_ptr"] if kind in ("plain", "latent") else []
    return {**heads, "BLOCK_SIZE": 32, **flags, **dict.fromkeys(absent)}


def decoding(
    sm: tuple[int, int], name: str, heads: dict[str, Any], group: int, types: dict[str, str] | None = None
) -> Build:
    tiles = attention.decode_tiles(sm, 2, heads["D"], group, heads["KIND"])
    own = {
        **heads,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "SHARED": heads["KIND"] == "plain" and not heads["D1"],
    }
    return f"decode {name}", attention.decode_kernel, own, types or {}, tiles.num_warps, tiles.num_stages


def elementwise() -> Iterator[Build]:
    rows = {"N": 8192, "R": 1, "BLOCK": 8192, "ADD": True}
    yield "add_rms_norm", norm.rms_norm_kernel, {**rows, "OFFSET": False}, {}, warps(8192), 3
    yield "layer_norm", norm.layer_norm_kernel, rows, {}, warps(8192), 3
    for name in ("silu", "gelu", "gelu_tanh", "swiglu_oai"):
        own = {"N": 14336, "NAME": name, "B": activation.BLOCK}
        yield f"act_and_mul {name}", activation.act_and_mul_kernel, own, {}, 4, 3
    own = {"N": 128256, "NAME": "softcap", "B": activation.BLOCK}
    yield "softcap", activation.elementwise_kernel, own, {"cap": "fp32"}, 4, 3
    own = {"HEADS": 32, "KV_HEADS": 8, "HEADS_BLOCK": 32, "KV_HEADS_BLOCK": 8, "HALF": 64, "HALF_BLOCK": 64}
    yield "rope", rotary.rope_kernel, own, {}, warps(32 * 64), 3
    yield from writing("plain", 128, 128, {})


def packed(sm: tuple[int, int]) -> Iterator[Build]:
    """Weights of every kind, in groups that chunks hold, share, or cut; a few tokens, experts, and many tokens."""
    generator = torch.Generator().manual_seed(0)

    def ints(bits: int, size: int) -> Packed:
        codes = torch.randint(0, 1 << bits, (8, 1536), dtype=torch.uint8, generator=generator)
        zeros = torch.zeros(8, 1536 // size, dtype=torch.int16)
        return pack_ints([GroupedIntWeight(codes, torch.ones(8, 1536 // size), zeros, bits, size)])

    floats = Float8Weight(torch.zeros(8, 1536).to(torch.float8_e4m3fn), torch.ones(1, 12), (128, 128))
    small = Float8Weight(torch.zeros(8, 1536).to(torch.float8_e4m3fn), torch.rand(1, 96), (16, 16))
    four = MXFP4Weight(torch.zeros(8, 768, dtype=torch.uint8), torch.zeros(8, 48, dtype=torch.uint8))
    weights = {
        "w4 g128": ints(4, 128), "w4 g32": ints(4, 32), "w8 g128": ints(8, 128), "w4 g48": ints(4, 48),
        "w2 g64": ints(2, 64), "fp8": pack_floats([floats]), "fp8 g16": pack_floats([small]),
        "mxfp4": pack_mxfp4([four]),
    }  # fmt: skip
    for (name, weight), tokens in itertools.product(weights.items(), (1, 32, 8192)):
        tiles = linear.tiles_of(sm, weight, 2, linear.block_of_tokens(sm, weight, 2, tokens))
        own = {
            "VALUES": weight.values, "BITS": weight.bits, "WIDTH": WIDTH[weight.bits], "TOP_K": 1,
            "EVEN_K": name not in ("w4 g48", "fp8 g16"),
            "PAIRED": linear.pairs(sm, weight, 2, tiles.block_t),
            "GROUPS": linear.grouping(weight)[0], "SPLITS": 4 if tokens == 1 else 1, "BLOCK_N": tiles.block_n,
            "BLOCK_T": tiles.block_t, "bias_ptr": None,
        }  # fmt: skip
        scales = {torch.uint8: "*u8", torch.float16: "*fp16", torch.float32: "*fp32"}[weight.scales.dtype]
        types = {"words_ptr": "*i32", "scales_ptr": scales, "zeros_ptr": "*u8"}
        own |= {} if weight.zeros is not None else {"zeros_ptr": None}
        own |= {} if tokens == 32 else {"slots_ptr": None, "experts_ptr": None}
        types |= {"out_ptr": "*fp32"} if tokens == 1 else {}
        kind = "experts" if tokens == 32 else "product"
        yield f"{kind} {name} {tokens}", linear_kernels.packed_kernel, own, types, tiles.num_warps, tiles.num_stages


def even(sm: tuple[int, int]) -> Iterator[Build]:
    """Weights and inputs of one type, and what stands before and after the product."""
    for name, dtype, kind in (
        ("float", torch.bfloat16, None),
        ("int8", torch.int8, "*i8"),
        ("e4m3", torch.float8_e4m3fn, "*fp8e4nv"),
    ):
        if name == "e4m3" and sm < linear.FLOAT8_PRODUCTS:
            continue
        weight = Even(torch.zeros(1, 8, 256).to(dtype))
        size = weight.data.element_size()
        for tokens in (1, 32, 8192):
            tiles = linear.tiles_of(sm, weight, size, linear.block_of_tokens(sm, weight, size, tokens))
            own = {
                "VALUES": name, "TOP_K": 1, "SPLITS": 1, "BLOCK_N": tiles.block_n, "BLOCK_T": tiles.block_t,
                "BLOCK_K": linear.block_k(size), "bias_ptr": None,
            }  # fmt: skip
            types = {} if kind is None else {"x_ptr": kind, "weight_ptr": kind}
            own |= {"scales_ptr": None, "x_scales_ptr": None} if kind is None else {}
            own |= {} if tokens == 32 else {"slots_ptr": None, "experts_ptr": None}
            label = f"{'experts' if tokens == 32 else 'product'} {name} {tokens}"
            yield label, linear_kernels.even_kernel, own, types, tiles.num_warps, tiles.num_stages
        if kind is not None:
            own = {"LARGEST": linear.LARGEST[dtype], "TOP_K": 1, "WIDTH": 4096, "B": linear.INPUTS_BLOCK}
            own |= {"ids_ptr": None, "order_ptr": None, "static_ptr": None}
            yield f"inputs {name}", linear_kernels.inputs_kernel, own, {"out_ptr": kind}, 4, 3
    own = {"SPLITS": 4, "B": linear.JOIN_BLOCK}
    yield "join", linear_kernels.join_kernel, own, {"parts_ptr": "*i32"}, 4, 3


def mixtures() -> Iterator[Build]:
    """What stands beside the products of a mixture, for 8 to 256 experts."""
    for experts, groups, top_k, scoring in ((8, 1, 2, "softmax"), (160, 8, 6, "softmax"), (256, 8, 8, "sigmoid")):
        own = {
            "E": experts, "GROUPS": groups, "TOP_GROUPS": 4, "GROUPS_BLOCK": groups, "TOP_K": top_k, "SCORING": scoring,
            "SIZE_BLOCK": power_of_two(experts // groups), "K_BLOCK": power_of_two(top_k), "NORMALIZE": True,
        }  # fmt: skip
        own |= {} if scoring == "sigmoid" else {"bias_ptr": None}
        types = {"weights_ptr": "*fp32", "ids_ptr": "*i64", "bias_ptr": "*fp32"}
        yield f"route {experts}", moe_kernels.route_kernel, own, types, 1, 3
        width = power_of_two(experts)
        chunk = moe.ONE_HOT // width
        own, types = {"E_BLOCK": width, "CHUNK": chunk}, {"ids_ptr": "*i64", "counts_ptr": "*i32", "starts_ptr": "*i32"}
        yield f"count {experts}", moe_kernels.count_kernel, own, types, 8, 3
        yield f"place {experts}", moe_kernels.place_kernel, own, types, 8, 3
        own = {"E_BLOCK": width, "BLOCK_T": 64, "ROWS": chunk, "B": chunk}
        yield f"layout {experts}", moe_kernels.layout_kernel, own, types, 8, 3
    own = {"TOP_K": 8, "B": moe.COMBINE_BLOCK}
    yield "combine", moe_kernels.combine_kernel, own, {"weights_ptr": "*fp32", "ids_ptr": "*i64"}, 4, 3


def type_of(name: str, dtype: str, types: dict[str, str]) -> str:
    if name in types:
        return types[name]
    for names, kind in ((INTEGERS, "*i32"), (LONG, "*i64"), (FLOATS, "*fp32")):
        if name in names:
            return kind
    if name.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if name in ("scale", "softcap", "eps", "offset") else "i32"


def compiled(build: Build, sm: int) -> dict[str, Any]:
    name, kernel, constants, types, num_warps, num_stages = build
    names = list(kernel.arg_names)
    dtype = "bf16" if sm >= 80 else "fp16"
    signature = {n: "constexpr" if n in constants else type_of(n, dtype, types) for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(names)
        if n not in constants and (n.endswith(("_ptr", "_stride")) or n in ("N", "K"))
    }
    source = ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    own = resources(made.asm["cubin"], sm)
    return {"name": name, "shared": made.metadata.shared, "threads": 32 * num_warps, **own}


def resources(cubin: bytes, sm: int) -> dict[str, Any]:
    """Registers, stack bytes, and products of the tensor cores, as cuobjdump reads them; it knows no code of sm 70, of
    which the first two remain.
    """
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        sass = [program, "--dump-sass" if sm >= 75 else "--dump-elf-symbols", file.name]
        code = subprocess.run(sass, capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said.stdout)}
    instructions = re.findall(r"\b(HGMMA|IGMMA|QGMMA|HMMA|IMMA|QMMA|STL|LDL)\b", code.stdout)
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "spills": sum(i in ("STL", "LDL") for i in instructions),
        "hgmma": sum(i in ("HGMMA", "IGMMA", "QGMMA") for i in instructions),
        "hmma": sum(i in ("HMMA", "IMMA", "QMMA") for i in instructions),
    }


if __name__ == "__main__":
    sm, asked, ending = int(sys.argv[1]), sys.argv[2], "".join(sys.argv[3:])
    print(json.dumps([compiled(build, sm) for build in builds(sm, asked) if build[0].endswith(ending)]))
