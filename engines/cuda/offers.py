"""What the CUDA engine offers on a host: what its library says that it was compiled for, and what torch does for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engines.api import GPUConfig
from engines.capability import ANYTHING, DENSE_ONLY, YES, Allowed, Offer, one_of
from engines.cuda import table
from engines.platform import CUDA_EXTENSION, Host, cuda_blockers


@dataclass(frozen=True)
class Config(GPUConfig):
    """Settings of the CUDA engine: those that all engines for accelerators share."""


MINIMUM = (8, 0)
DTYPES = one_of("float32", "bfloat16", "float16")
DEQUANTIZED = frozenset({"w2a16", "w8a16"})
"""Weights that become dense at load: there is no kernel for them."""
QUANTIZED: dict[str, Allowed] = {
    "quantization": one_of("awq", "gptq", "compressed-tensors", "fp8", "mxfp4", "int8"),
    "bits": one_of(2, 4, 8),
    "group_size": Allowed(values=(-1, 32), ge=64, multiple_of=64),
    "sym": YES,
    "desc_act": YES,
    "version": one_of("gemm", "GEMM"),
    "format": ANYTHING,
    "activation_scheme": ANYTHING,
    "weight_block_size": ANYTHING,
}
TORCH: dict[str, dict[str, Allowed]] = {
    "linear": {"dtype": DTYPES, "quantization": DENSE_ONLY},
    "head_linear": {"dtype": DTYPES},
    "embedding": {"dtype": DTYPES},
    "log_softmax_gather": {},
    "top_logprobs": {},
}
"""Ops that are a call or two of torch's own kernels: cuBLAS, a gather, topk."""


def _weights(compiled: Mapping[str, Allowed]) -> dict[str, Allowed]:
    """The kinds of weights that an op takes: as they are, or dequantized."""
    return {"weights": one_of(*compiled["weights"].values, *sorted(DEQUANTIZED))}


def offers(host: Host) -> Offer:
    blockers = cuda_blockers(host, MINIMUM)
    text = None
    if CUDA_EXTENSION in host.extensions:
        text = table.FULL if host.described else table.read()
    compiled = table.parse(text) if text is not None else None
    sm = host.compute_capability
    if compiled is None:
        blockers.append("compiled extension absent: reinstall with nvcc on PATH")
    elif not blockers and sm is not None and not compiled.serves(sm):
        blockers.append(
            f"{table.LIBRARY.name} was compiled for sm {', '.join(map(str, compiled.sm))}, this device is sm "
            f"{sm[0]}.{sm[1]}: reinstall with CSRC_CUDA_ARCHS unset, or with this one in it"
        )
    return Offer(
        engine="cuda",
        ops={} if compiled is None else _ops(compiled.ops),  # without a library its absence is all that is to be said
        blockers=tuple(blockers),
        sm=sm,
        dequantized=DEQUANTIZED,
        since={"bfloat16": (8, 0)},
    )


def _ops(compiled: Mapping[str, Mapping[str, Allowed]]) -> dict[str, Mapping[str, Allowed]]:
    ops = {**TORCH, **compiled, "parallelism": {name: Allowed(ge=1) for name in ("tp", "dp", "ep")}}
    if "linear" in compiled:
        ops["linear"] = {**TORCH["linear"], **QUANTIZED, **_weights(compiled["linear"])}
    if "fused_experts" in compiled:
        own = compiled["fused_experts"]
        # Inputs that each expert has in an order of its own would need a copy each.
        ops["fused_experts"] = {**own, **QUANTIZED, **_weights(own), "desc_act": one_of(False)}
    return ops
