"""A launch waits for nothing: no number is read from the device, and no Python list goes there by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from engines.core.engine import LLMEngine
from engines.ops import OpSet
from tests.engines.core.test_engine import generate, prompts
from tests.engines.core.tiny import Late, TinyModel, make_engine

READS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "nonzero",
    "any_all",
    "unique",
}
MAKERS = (torch.tensor, torch.as_tensor)


class Waited(Exception):
    pass


class Forbidden(TorchFunctionMode):
    """Raises for what would wait for an accelerator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS or func in MAKERS:
            raise Waited(str(func))
        if getattr(func, "__name__", "") in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list | np.ndarray) for part in index):
                raise Waited(f"{func.__name__} with {index}")
        return func(*args, **(kwargs or {}))


class Still(OpSet):
    """Where the reference's sampling would wait."""

    @staticmethod
    def sample(logits: torch.Tensor, params: Any) -> torch.Tensor:
        return logits.argmax(-1)


class Silent(Late):
    """Uploads and downloads are what may touch the host."""

    def upload(self, arrays: Any) -> list[torch.Tensor]:
        with torch._C.DisableTorchFunction():
            return super().upload(arrays)


def forbid(engine: LLMEngine, *names: str) -> list[int]:
    """Calls of the engine's parts run with waiting forbidden; how many there were."""
    calls = [0]

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            with Forbidden():
                return call(*args, **kwargs)

        return run

    for name in names:
        owner, _, method = name.rpartition(".")
        part = getattr(engine, owner)
        setattr(part, method, watched(getattr(part, method)))
    return calls


SETTINGS = [
    {},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"min_tokens": 5, "stop_token_ids": (7, 9)},
    {"logprobs": 3},
]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_batches_and_draws_wait_for_nothing(sampling: dict[str, Any], mixed: bool) -> None:
    model = TinyModel()
    model.ops = Still()
    engine = make_engine(model, device=Silent(), max_num_batched_tokens=12)
    calls = forbid(engine, "runner.batch", "sampler.draw", "device.download")
    engine.submit([generate(i, p, **(sampling if i % 2 or not mixed else {})) for i, p in enumerate(prompts(6))])
    while engine.num_unfinished:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
    assert calls[0] > 60


def test_what_waits_is_seen() -> None:
    ones = torch.ones(3)
    for wait in (
        ones.sum().item,
        ones.tolist,
        lambda: bool(ones.any()),
        lambda: ones[[0, 1]],
        lambda: torch.tensor([1]),
    ):
        with pytest.raises(Waited), Forbidden():
            wait()
