"""What the compiled library of CUDA ops says of itself: ops, the attributes that they take, architectures.

The text lies in the library's data (csrc/cuda/library.cu) and is read without loading the library or torch.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from pathlib import Path

from engines.capability import ANYTHING, Allowed

LIBRARY = Path(__file__).parents[1] / "_cuda_ops.so"
BEGIN, END = b"cuda_ops table 1\n", b"end\n"

FULL = """cuda_ops table 1
sm 80 86 89 90 100 120
rms_norm dtype float32 bfloat16 float16
rms_norm weight_offset any
add_rms_norm dtype float32 bfloat16 float16
add_rms_norm weight_offset any
rope dtype float32 bfloat16 float16
rope head_dim any
rope rotary_dim any
rope kind any
write_kv dtype float32 bfloat16 float16
write_kv head_dim any
rope_write_kv dtype float32 bfloat16 float16
rope_write_kv head_dim any
rope_write_kv rotary_dim any
rope_write_kv kv_dtype int8 int4 fp8
add_rms_norm_for dtype bfloat16 float16
add_rms_norm_for weight_offset any
add_rms_norm_for weights w8a8 fp8
act_and_mul_for dtype bfloat16 float16
act_and_mul_for activation silu gelu gelu_tanh relu swiglu_oai
act_and_mul_for weights w8a8 fp8
act_and_mul dtype float32 bfloat16 float16
act_and_mul activation silu gelu gelu_tanh relu swiglu_oai
linear weights w4a16 w8a8 fp8 mxfp4
route scoring softmax softmax_of_chosen sigmoid
fused_experts dtype bfloat16 float16
fused_experts activation silu gelu gelu_tanh relu swiglu_oai
fused_experts weights w4a16 w8a8 fp8 mxfp4
softcap dtype float32 bfloat16 float16
sample dtype float32
apply_penalties dtype float32
paged_attention dtype bfloat16 float16
paged_attention head_dim 64 80 96 128 256
paged_attention group any
paged_attention window any
paged_attention softcap any
paged_attention sinks any
write_latent dtype float32 bfloat16 float16
write_latent kv_lora_rank any
write_latent rope_dim any
latent_attention dtype bfloat16 float16
latent_attention kv_lora_rank 512
latent_attention rope_dim 64
write_quantized_kv dtype float32 bfloat16 float16
write_quantized_kv head_dim any
write_quantized_kv kv_dtype int8 int4 fp8
quantized_attention dtype bfloat16 float16
quantized_attention head_dim 64 80 96 128 256
quantized_attention kv_dtype int8 int4 fp8
quantized_attention group any
quantized_attention window any
quantized_attention softcap any
quantized_attention sinks any
end
"""
"""The table of a library compiled for everything: what a described host is taken to have."""


@dataclass(frozen=True)
class Table:
    sm: tuple[int, ...]
    """Architectures with machine code, as 90; there is none that a newer driver could compile further."""
    ops: dict[str, dict[str, Allowed]]

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether code runs on a device: code of one major version runs on its later minor ones up to 8.x; from 9.0
        on this library's is for one version each ("a" targets)."""
        major, minor = capability
        own = [arch % 10 for arch in self.sm if arch // 10 == major]
        return any(m <= minor for m in own) if major < 9 else minor in own


def parse(text: str) -> Table:
    """Raises ValueError for a text that is none."""
    lines = text.splitlines()
    if not lines or lines[0] != BEGIN.decode().strip() or lines[-1] != END.decode().strip():
        raise ValueError(f"table of CUDA ops: {text[:40]!r}; expected one that begins {BEGIN!r}; reinstall the project")
    sm: tuple[int, ...] = ()
    ops: dict[str, dict[str, Allowed]] = {}
    for line in lines[1:-1]:
        name, *values = line.split()
        if name == "sm":
            sm = tuple(map(int, values))
            continue
        attribute, *values = values
        ops.setdefault(name, {})[attribute] = ANYTHING if values == ["any"] else _allowed(values)
    return Table(sm, ops)


def _allowed(values: list[str]) -> Allowed:
    return Allowed(values=tuple(int(value) if value.isdigit() else value for value in values))


def read(library: Path = LIBRARY) -> str | None:
    """The library's table; None where there is no library. Raises ValueError for a library without one."""
    if not library.is_file():
        return None
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = data.find(BEGIN)
        end = data.find(END, begin)
        if begin < 0 or end < 0:
            raise ValueError(f"{library.name}: it has no table of its ops; reinstall the project")
        return data[begin : end + len(END)].decode()
