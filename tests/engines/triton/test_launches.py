"""What a decode step launches, kernel by kernel: whether torch has work left between kernels that could be fused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from engines import discover
from engines.api import EngineConfig, EngineSettings
from engines.core.device import Device
from engines.core.graphs import DecodeGraphs
from engines.core.model_runner import allocate_caches
from engines.models.load import load_model
from engines.ops import OpSet
from engines.parallel.group import ALONE
from tests.parity.checkpoints import make_checkpoint

WITHOUT_WORK = ("empty", "empty_strided", "empty_like", "new_empty", "_unsafe_view", "lift_fresh", "view")
COPIES = ("contiguous", "reshape", "flatten")
"""Which copy what is no view."""


class Counted(TorchDispatchMode):
    """Kernels by name: torch's that are no views and no allocations, and Triton's."""

    def __init__(self) -> None:
        super().__init__()
        self.torch: Counter[str] = Counter()
        self.own: Counter[str] = Counter()
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if name in COPIES:
            name = "clone" if result.data_ptr() != args[0].data_ptr() else "view"
        if not self.inside and (name == "clone" or not func.is_view) and name not in WITHOUT_WORK:
            self.torch[name] += 1
        return result


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    seen = Counted()
    launch = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **options: Any) -> Any:
        seen.own[self.fn.__name__] += 1
        seen.inside = True
        try:
            return launch(self, *args, **options)
        finally:
            seen.inside = False

    with monkeypatch.context() as patch, seen:
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        yield seen


def step(ops: OpSet, family: str, layers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """One decode step of two sequences, as it is captured."""
    config = {**discover.families()[family].tiny_config(), "num_hidden_layers": layers}
    make_checkpoint(config, folder)
    settings = EngineSettings("triton", str(folder), "float32", EngineConfig())
    model = load_model(settings, ops, ALONE)
    device = Device(torch.device("cpu"))
    caches = allocate_caches(model, ops, 8, 8, torch.float32, device.place)
    for cache in caches:
        for tensor in vars(cache).values():
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()
    graphs = DecodeGraphs(model, caches, device, 8, 64, 2, scratch_block=7)
    inputs = device.upload(graphs._arrays([], np.zeros((0, graphs.width), dtype=np.int32), 2))
    with torch.inference_mode(), counted(monkeypatch) as seen:
        graphs._forward(inputs, 2)
    return seen


FED = {"ge": 1, "clamp": 1, "where": 1, "index": 2}
"""Once a step: tokens that the step in flight draws are put in, and the look-up."""
DENSE = {"rms_norm_kernel": 2, "write_kernel": 1, "decode_kernel": 1, "act_and_mul_kernel": 1}
EXPERTS = {"route_kernel": 1, "count_kernel": 1, "layout_kernel": 1, "place_kernel": 1, "even_kernel": 2}
EXPERTS |= {"combine_kernel": 1}
LATENT = {"rms_norm_kernel": 3, "rope_write_latent_kernel": 1, "decode_kernel": 1, "act_and_mul_kernel": 1}


@pytest.mark.parametrize(
    ("family", "torchs", "own"),
    [
        ("llama", {"linear": 4}, DENSE),
        pytest.param("gpt_oss", {"linear": 3, "full": 1}, DENSE | EXPERTS, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", {"linear": 5, "bmm": 2, "copy_": 1}, LATENT, marks=pytest.mark.slow),
    ],
)
def test_between_kernels_there_is_nothing_to_fuse(
    ops: OpSet,
    family: str,
    torchs: dict[str, int],
    own: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One layer, the norm after the last one, and the logits: docs/gpu.md says what follows for torch.compile."""
    seen = step(ops, family, 1, tmp_path, monkeypatch)
    assert seen.torch == Counter(FED) + Counter(torchs) + Counter({"linear": 1})
    assert seen.own == Counter(own) + Counter({"rms_norm_kernel": 1})
