"""The least time that a workload's steps can take: their bytes and operations at this machine's ceilings, added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engines.batch import Batch
from engines.core.model_runner import ModelRunner
from engines.costs import DTYPE_BYTES, matrix_parameters
from engines.models.spec import DecoderSpec
from tests.bench.ceilings import Ceilings


@dataclass(frozen=True)
class Step:
    """What one step has to do, whatever does it."""

    num_tokens: int
    num_outputs: int
    """Rows that go through the head."""
    num_keys_read: int
    """Cached tokens that attention reads, a shared beginning once."""
    num_scores: int
    """Pairs of a new token and a token it sees."""


def step_of(batch: Batch, block_size: int) -> Step:
    counts = (batch.cu_seqlens_q[1:] - batch.cu_seqlens_q[:-1]).long()
    lengths = batch.seq_lens.long()
    shared = sum((len(group.seqs) - 1) * group.num_blocks for group in batch.prefix_groups)
    scores = (counts * (2 * lengths - counts + 1) // 2).sum()
    outputs = batch.num_tokens if batch.output_indices is None else len(batch.output_indices)
    return Step(batch.num_tokens, outputs, int(lengths.sum()) - shared * block_size, int(scores))


def seconds(step: Step, spec: DecoderSpec, dtype: str, ceilings: Ceilings) -> float:
    """Products at the rate measured for their number of rows; attention at that of memory or of large products."""
    layers = spec.num_hidden_layers
    products = 2 * step.num_tokens * matrix_parameters(spec) / ceilings.linear_flops_s(step.num_tokens)
    head = 2 * step.num_outputs * spec.hidden_size * spec.vocab_size
    products += head / ceilings.linear_flops_s(step.num_outputs) if step.num_outputs else 0.0
    kv_bytes = 2 * step.num_keys_read * spec.num_key_value_heads * spec.head_dim * DTYPE_BYTES[dtype] * layers
    scores = 4 * step.num_scores * spec.num_attention_heads * spec.head_dim * layers
    return products + max(kv_bytes / ceilings.read_bytes_s, scores / max(ceilings.flops_s))


class Recorder:
    """Notes the steps of an engine's model runner."""

    def __init__(self, runner: ModelRunner) -> None:
        self.steps: list[Step] = []
        build, block_size = runner.batch, runner.block_size

        def batch(*args: Any) -> Batch:
            made = build(*args)
            self.steps.append(step_of(made, block_size))
            return made

        runner.batch = batch  # type: ignore[method-assign]

    def floor_s(self, spec: DecoderSpec, dtype: str, ceilings: Ceilings) -> float:
        return sum(seconds(step, spec, dtype, ceilings) for step in self.steps)
