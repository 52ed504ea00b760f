"""Memory at load: the largest step is tried, the cache gets what it leaves, what does not fit shrinks or is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engines import load
from engines.api import EngineSettings, GPUConfig
from engines.core.profile import largest_step
from engines.ops import OpSet
from tests.engines.core.tiny import Late, TinyModel

BLOCK_BYTES = 2 * 2 * 8 * 4 * 8
"""Of TinyModel with blocks of 8 in float32: keys and values of 2 heads of 8."""
CONFIG = GPUConfig(block_size=8, max_num_seqs=64, max_num_batched_tokens=128, decode_graphs=False)
SETTINGS = EngineSettings("cpu", "nowhere", "float32", CONFIG)


def loading(monkeypatch: pytest.MonkeyPatch, settings: EngineSettings, model: Any = None, **device: int) -> Any:
    """load_engine on a stand-in for an accelerator with so much memory."""
    there = Late()
    for name, value in device.items():
        setattr(there, name, value)
    monkeypatch.setattr(load, "Device", lambda place: there)
    monkeypatch.setattr(load, "load_model", lambda settings, ops, group: model or TinyModel())
    monkeypatch.setattr(load, "import_opset", lambda backend: OpSet)
    monkeypatch.setattr(load, "DTYPES", {"float32": torch.float64})
    monkeypatch.setattr(load.costs, "kv_vector_bytes", lambda head_dim, dtype, kv_dtype: 4 * head_dim)
    return load.load_engine(settings)


def test_the_cache_gets_what_the_largest_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loading(monkeypatch, SETTINGS, memory_bytes=100 * BLOCK_BYTES, step_bytes=40 * BLOCK_BYTES)
    assert engine.stats().num_blocks == 54, "0.9 of the 60 blocks that are left"
    half = replace(SETTINGS, config=replace(CONFIG, kv_memory_fraction=0.5))
    assert loading(monkeypatch, half, memory_bytes=100 * BLOCK_BYTES).stats().num_blocks == 50
    fixed = replace(SETTINGS, config=replace(CONFIG, kv_cache_bytes=7 * BLOCK_BYTES))
    assert loading(monkeypatch, fixed, memory_bytes=100 * BLOCK_BYTES).stats().num_blocks == 7


def test_captured_steps_have_memory_kept_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = replace(SETTINGS, config=replace(CONFIG, decode_graphs=True))
    engine = loading(monkeypatch, captured, memory_bytes=100 * BLOCK_BYTES)
    assert engine.stats().num_blocks == int(0.9 * 95)


class Small(TinyModel):
    """Memory for steps of so many tokens."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, batch, caches):  # type: ignore[no-untyped-def]
        if batch.num_tokens > self.most:
            raise torch.OutOfMemoryError("test")
        return super().forward(batch, caches)


def test_a_step_that_is_too_large_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loading(monkeypatch, SETTINGS, Small(40))
    assert engine.scheduler.max_num_batched_tokens == engine.scheduler.max_num_seqs == 32
    assert engine.stats().notes == (
        "no memory for a step of 128 tokens: going on with max_num_batched_tokens=64",
        "no memory for a step of 64 tokens: going on with max_num_batched_tokens=32",
    )


def test_a_model_that_leaves_no_room_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryError, match=r"a step of 1 token does not fit into the 5,000 bytes that the weights"):
        loading(monkeypatch, SETTINGS, Small(0), memory_bytes=5000)
    with pytest.raises(MemoryError, match=r"kv_cache_bytes: 900 bytes; expected at least 1,024 for one block of 8"):
        loading(monkeypatch, SETTINGS, memory_bytes=1000)


def test_weights_that_do_not_fit_are_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(settings: object, ops: object, group: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(load, "Device", lambda place: Late())
    monkeypatch.setattr(load, "load_model", failing)
    monkeypatch.setattr(load, "import_opset", lambda backend: OpSet)
    with pytest.raises(MemoryError, match=r"ran out while weights were read, 1,099,511,627,776 bytes were free; exp"):
        load.load_engine(SETTINGS)


def test_the_largest_step_is_the_largest() -> None:
    step = largest_step(CONFIG, 50)
    assert [s.num_new_tokens for s in step] == [50, 50, 28]
    assert all(s.completes for s in step) and [s.seq.slot for s in step] == [0, 1, 2]
