"""MetaX GPUs through MACA: a torch of their own that calls them cuda, and a Triton of their own.

Source: https://developer.metax-tech.com (MACA PyTorch)
"""

from engines.platform import Platform

PLATFORM = Platform(
    maker="MetaX",
    module="cuda",
    version="cuda",
    drivers=("/dev/mxcd", "mx-smi"),
    visible="CUDA_VISIBLE_DEVICES",
    remedy="install the torch and triton wheels of the MACA SDK",
    graph="CUDAGraph",
    collectives="nccl",
)
