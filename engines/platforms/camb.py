"""Cambricon MLUs through torch_mlu, with Cambricon's Triton for kernels.

Paged caches have blocks of 16 tokens, as LMDeploy has them there.
Source: https://github.com/Cambricon/torch_mlu
"""

from engines.platform import Platform

PLATFORM = Platform(
    maker="Cambricon",
    module="mlu",
    package="torch_mlu",
    drivers=("/dev/cambricon_ctl", "cnmon"),
    visible="MLU_VISIBLE_DEVICES",
    remedy="install torch_mlu and triton of the Cambricon Neuware SDK for this torch",
    graph="MLUGraph",
    collectives="cncl",
    float64=False,
    block_sizes=(16,),
)
