"""What the CPU engine offers: every op of the reference, on any processor; a compiled library makes some fast."""

from __future__ import annotations

from dataclasses import dataclass

from engines.api import EngineConfig, bounded
from engines.capability import ANYTHING, DENSE_ONLY, YES, Allowed, Offer, one_of
from engines.platform import CPU_EXTENSION, Host


@dataclass(frozen=True)
class Config(EngineConfig):
    """Settings of the CPU engine."""

    num_threads: int | None = bounded(None, ge=1)
    """Threads that compute; null: one for each core that this process may use."""


DTYPES = one_of("float32", "bfloat16", "float16")
WEIGHTS = ("w2a16", "w4a16", "w8a16", "w8a8", "fp8", "mxfp4")
FORMATS = ("gptq", "gptq_v2", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
QUANTIZED: dict[str, Allowed] = {
    "dtype": DTYPES,
    "quantization": one_of("awq", "gptq", "fp8", "compressed-tensors", "mxfp4", "int8", "w8a16"),
    "weights": one_of(*WEIGHTS),
    "bits": one_of(2, 4, 8),
    "group_size": Allowed(values=(-1,), ge=1),
    "sym": YES,
    "desc_act": YES,
    "version": one_of("gemm", "GEMM"),
    "format": one_of(*FORMATS, "e4m3", "float8_e4m3fn"),
    "activation_scheme": one_of("dynamic", "static"),
    "weight_block_size": ANYTHING,
}
HEADS = {"dtype": DTYPES, "head_dim": ANYTHING}
ATTENTION = {**HEADS, "group": ANYTHING, "window": YES, "softcap": YES, "sinks": YES}
KV_DTYPES = one_of("int8", "int4", "fp8")
LATENT = {"dtype": DTYPES, "kv_lora_rank": ANYTHING, "rope_dim": ANYTHING}
OPS: dict[str, dict[str, Allowed]] = {
    "embedding": {"dtype": DTYPES},
    "linear": QUANTIZED,
    "route": {"scoring": ANYTHING},
    "fused_experts": {**QUANTIZED, "activation": ANYTHING},
    "rms_norm": {"dtype": DTYPES, "weight_offset": YES},
    "add_rms_norm": {"dtype": DTYPES, "weight_offset": YES},
    "layer_norm": {"dtype": DTYPES},
    "rope": {**HEADS, "kind": ANYTHING, "rotary_dim": ANYTHING},
    "write_kv": HEADS,
    "paged_attention": ATTENTION,
    "write_quantized_kv": {**HEADS, "kv_dtype": KV_DTYPES},
    "quantized_attention": {**ATTENTION, "kv_dtype": KV_DTYPES},
    "write_latent": LATENT,
    "latent_attention": LATENT,
    "head_linear": {"dtype": DTYPES},
    "encoder_attention": HEADS,
    "act": {"dtype": DTYPES, "activation": ANYTHING},
    "act_and_mul": {"dtype": DTYPES, "activation": ANYTHING},
    "lora": {"dtype": DTYPES},
    "softcap": {},
    "sample": {},
    "apply_penalties": {},
    "log_softmax_gather": {},
    "top_logprobs": {},
    "parallelism": {name: Allowed(ge=1) for name in ("tp", "dp", "ep")},
    "transformers_model": {"dtype": DTYPES, "quantization": DENSE_ONLY},
}

KEPT: dict[str, Allowed] = {
    "dtype": one_of("bfloat16"),
    "weights": one_of("w4a16", "w8a16"),
    "bits": one_of(4, 8),
    "group_size": Allowed(values=(-1,), ge=32, multiple_of=32),
    "desc_act": one_of(False),
}
"""Weights that are multiplied from their codes where the processor has a matrix unit: engines/cpu/linear.py."""

COMPILED = frozenset(
    {
        *("paged_attention", "quantized_attention", "encoder_attention"),
        *("rope", "write_kv", "write_quantized_kv", "rope_write_kv"),
        *("rms_norm", "add_rms_norm", "layer_norm", "act", "act_and_mul", "log_softmax_gather"),
    }
)
"""Ops of the compiled library; without it they are the slower ones of torch, and the plan says so."""
PLAIN_TORCH = frozenset({"write_latent", "latent_attention"})
"""Ops that no library compiles: right, and slower than they could be."""


def offers(host: Host) -> Offer:
    built = CPU_EXTENSION in host.extensions
    return Offer(
        engine="cpu",
        ops=OPS,
        dequantized=frozenset(WEIGHTS) - {"w8a8"},
        kept=KEPT if built and host.cpu_tiles else {},
        blockers=(host.stale[CPU_EXTENSION],) if CPU_EXTENSION in host.stale else (),
        reference=PLAIN_TORCH if built else PLAIN_TORCH | COMPILED,
        notes=() if built else ("compiled CPU library absent: reinstall with a C++20 compiler on PATH",),
    )
