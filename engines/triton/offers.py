"""What the Triton engine offers on a host: every op of a decoder and of an encoder, for any size of head up to 256, and
every weight format.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.api import GPUConfig, bounded
from engines.capability import ANYTHING, DENSE_ONLY, YES, Allowed, Offer, one_of
from engines.discover import modules, names
from engines.platform import Host, accelerator_blockers


@dataclass(frozen=True)
class Config(GPUConfig):
    """Settings of the Triton engine: those that all engines for accelerators share, and its own."""

    attention: str = bounded("auto", choices=("auto", "own", *names("engines.triton.libraries")))
    """Whose kernels compute the attention of prompts: auto: the first installed library that has the case, else the
    engine's own; own: the engine's, whatever is installed; a library: that one, or the engine refuses the job."""


MINIMUM = (7, 0)
DTYPES = one_of("float32", "bfloat16", "float16")
HEADS = {"dtype": DTYPES, "head_dim": Allowed(ge=1, le=256)}
ATTENTION = {**HEADS, "group": Allowed(ge=1), "window": YES, "softcap": YES, "sinks": YES}
KV_DTYPES = one_of("int8", "int4", "fp8")
LATENT = {"dtype": DTYPES, "kv_lora_rank": Allowed(ge=1, le=512), "rope_dim": Allowed(ge=1, le=64)}
LATENT_75 = {**LATENT, "kv_lora_rank": Allowed(ge=1, le=256)}
"""On sm 7.5 a block has 64 KiB of shared memory, and 512 + 64 numbers of 16 keys take 68."""
QUANTIZED: dict[str, Allowed] = {
    "dtype": DTYPES,
    "quantization": one_of("awq", "gptq", "fp8", "compressed-tensors", "mxfp4", "int8", "w8a16"),
    "weights": one_of("w2a16", "w4a16", "w8a16", "w8a8", "fp8", "mxfp4"),
    "bits": one_of(2, 4, 8),
    "group_size": Allowed(values=(-1,), ge=1),
    "sym": YES,
    "desc_act": YES,
    "version": one_of("gemm", "GEMM"),
    "format": ANYTHING,
    "activation_scheme": ANYTHING,
    "weight_block_size": ANYTHING,
}
"""Nothing is dequantized at load. float8 meets inputs of float8 from sm 8.9 on, and inputs as they are below. Triton
compiles products of 8-bit integers from sm 8.0 on."""
ROUNDED = one_of("w8a8", "fp8")
"""Weights whose products take rounded inputs: here by a kernel of its own, after the norm's or the activation's."""
OPS: dict[str, dict[str, Allowed]] = {
    "embedding": {"dtype": DTYPES},
    "linear": QUANTIZED,
    "rms_norm": {"dtype": DTYPES, "weight_offset": YES},
    "add_rms_norm": {"dtype": DTYPES, "weight_offset": YES},
    "layer_norm": {"dtype": DTYPES},
    "rope": {**HEADS, "kind": ANYTHING, "rotary_dim": Allowed(ge=2, le=256, multiple_of=2)},
    "write_kv": HEADS,
    "rope_write_kv": {**HEADS, "rotary_dim": Allowed(ge=2, le=256, multiple_of=2), "kv_dtype": KV_DTYPES},
    "paged_attention": ATTENTION,
    "write_quantized_kv": {**HEADS, "kv_dtype": KV_DTYPES},
    "quantized_attention": {**ATTENTION, "kv_dtype": KV_DTYPES},
    "write_latent": LATENT,
    "rope_write_latent": LATENT,
    "latent_attention": LATENT,
    "head_linear": {"dtype": DTYPES},
    "route": {"scoring": ANYTHING},
    "fused_experts": {**QUANTIZED, "activation": ANYTHING},
    "encoder_attention": HEADS,
    "act": {"dtype": DTYPES, "activation": one_of("silu", "gelu", "gelu_tanh", "relu")},
    "act_and_mul": {"dtype": DTYPES, "activation": one_of("silu", "gelu", "gelu_tanh", "relu", "swiglu_oai")},
    "add_rms_norm_for": {"dtype": DTYPES, "weight_offset": YES, "weights": ROUNDED},
    "act_and_mul_for": {"dtype": DTYPES, "activation": ANYTHING, "weights": ROUNDED},
    "lora": {"dtype": DTYPES},
    "softcap": {"dtype": DTYPES},
    "sample": {"dtype": DTYPES},
    "apply_penalties": {"dtype": DTYPES},
    "log_softmax_gather": {},
    "top_logprobs": {},
    "parallelism": {name: Allowed(ge=1) for name in ("tp", "dp", "ep")},
    "transformers_model": {"dtype": DTYPES, "quantization": DENSE_ONLY},
}
"""head_linear, embedding, top_logprobs and linear of plain weights are a call or two of torch's own kernels."""


def offers(host: Host) -> Offer:
    blockers = accelerator_blockers(host, MINIMUM)
    if "opset" not in names("engines.triton"):
        blockers.append("the triton engine is not part of this version: there is no engines/triton/opset.py")
    elif not host.triton:
        blockers.append("triton is not installed: pip install triton")
    elif not host.c_compiler and not blockers:
        blockers.append("no C compiler: triton builds its launchers with one; install gcc, or set CC to another")
    ops = OPS
    if host.device == "cuda" and host.compute_capability == (7, 5):
        ops = {**OPS, "latent_attention": LATENT_75}
    return Offer(
        engine="triton",
        ops=ops,
        blockers=tuple(blockers),
        sm=host.compute_capability,
        since={"bfloat16": (8, 0), "w8a8": (8, 0)},
        stored_only={"fp8": (8, 9)},
    )


def library_offers(host: Host) -> dict[str, Offer]:
    """What libraries do of the engine's ops for prompts, by name, in the order in which they are asked."""
    return {name: module.offers(host) for name, module in modules("engines.triton.libraries").items()}
