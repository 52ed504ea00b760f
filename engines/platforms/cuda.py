"""NVIDIA GPUs through CUDA."""

from engines.platform import Platform

PLATFORM = Platform(
    maker="NVIDIA",
    module="cuda",
    version="cuda",
    drivers=("/proc/driver/nvidia/version", "nvidia-smi"),
    visible="CUDA_VISIBLE_DEVICES",
    remedy="install a CUDA build",
    bfloat16_since=(8, 0),
    graph="CUDAGraph",
    collectives="nccl",
)
