"""What the largest step of an engine takes, seen by running it once before the cache is made."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from engines.api import EngineConfig, Kind, Request, SamplingParams
from engines.core.device import Device
from engines.core.model_runner import ModelRunner
from engines.core.pooling import SCORE_ROWS
from engines.core.scheduler import Scheduled, share
from engines.core.sequence import Sequence
from engines.models.base import Model
from engines.ops import OpSet
from engines.ops.kv_cache import KVDtype


def largest_step(config: EngineConfig, max_model_len: int) -> list[Scheduled]:
    """max_num_batched_tokens of prompts, each as long as it may be."""
    left = config.max_num_batched_tokens
    step: list[Scheduled] = []
    while left > 0:
        count = min(left, max_model_len)
        prompt = [0] * count
        request = Request(len(step), "generate", prompt)
        seq = Sequence(len(step), request, SamplingParams(), count + 1, 0, prompt, count, slot=len(step))
        step.append(share(seq, count))
        left -= count
    return step


def step_bytes(
    model: Model, ops: OpSet, config: EngineConfig, dtype: torch.dtype, device: Device, kind: Kind, max_model_len: int
) -> int:
    """Memory that the largest step takes beside weights and cache, with its logits in the float32 that sampling wants.

    Kernels are compiled on the way. 0 for models that keep their own state: what they take is not known.
    """
    if not model.paged:
        return 0
    step = largest_step(config, max_model_len)
    width = -(-max_model_len // config.block_size)
    counts = [-(-s.num_new_tokens // config.block_size) for s in step]
    tables = np.zeros((len(step), width), dtype=np.int32)
    first = 0
    for row, count in enumerate(counts):
        tables[row, :count] = np.arange(first, first + count)
        first += count
    kv_dtype = None if config.kv_dtype == "auto" else cast(KVDtype, config.kv_dtype)
    runner = ModelRunner(model, ops, first, config.block_size, dtype, device, kv_dtype)
    rows = {"generate": config.max_num_seqs, "score": SCORE_ROWS}.get(kind, 0)

    def call() -> None:
        total = config.max_num_batched_tokens
        hidden = runner.execute(step, list(range(min(rows, total))) if rows else None, tables)
        if rows:
            logits = model.logits(hidden).float()
            ops.argmax(torch.nan_to_num(logits))

    return device.peak_bytes(call)
