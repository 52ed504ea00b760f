"""AMD GPUs through ROCm: torch and Triton call them cuda.

Source: https://docs.pytorch.org/docs/stable/notes/hip.html, https://rocm.docs.amd.com/en/latest/conceptual/gpu-isolation.html
"""

from engines.platform import Platform

PLATFORM = Platform(
    maker="AMD",
    module="cuda",
    version="hip",
    drivers=("/dev/kfd",),
    visible="HIP_VISIBLE_DEVICES",
    remedy="install a ROCm build",
    graph="CUDAGraph",
    collectives="nccl",
)
