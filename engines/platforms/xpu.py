"""Intel GPUs through torch.xpu.

Source: https://docs.pytorch.org/docs/stable/xpu.html; graphs: torch.xpu.XPUGraph, from torch 2.11 on.
Arc and integrated GPUs have no float64.
"""

from engines.platform import Platform

PLATFORM = Platform(
    maker="Intel",
    module="xpu",
    version="xpu",
    drivers=("/dev/dri/by-path", "xpu-smi"),
    visible="ZE_AFFINITY_MASK",
    remedy="install an XPU build",
    graph="XPUGraph",
    collectives="xccl",
    float64=False,
)
