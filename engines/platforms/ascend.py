"""Huawei NPUs through torch_npu, with Triton-Ascend for kernels.

Cube units multiply 16 x 16 tiles, and paged caches are published with blocks of a multiple of that, up to 128.
Source: https://gitee.com/ascend/pytorch (torch_npu), https://gitee.com/ascend/triton-ascend
"""

from engines.platform import Platform

PLATFORM = Platform(
    maker="Ascend",
    module="npu",
    package="torch_npu",
    drivers=("/dev/davinci_manager", "npu-smi"),
    visible="ASCEND_RT_VISIBLE_DEVICES",
    remedy="install torch_npu and triton-ascend for this torch",
    graph="NPUGraph",
    collectives="hccl",
    float64=False,
    block_sizes=(16, 32, 64, 128),
)
