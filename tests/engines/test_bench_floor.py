"""The least time of a step, by hand."""

from __future__ import annotations

import pytest

from engines.models.llama import spec, tiny_config
from tests.bench.ceilings import Ceilings
from tests.bench.floor import Step, seconds


def test_a_step_by_hand() -> None:
    llama = spec(tiny_config())
    hidden, inner, heads, kv = (
        llama.hidden_size,
        llama.intermediate_size,
        llama.num_attention_heads * llama.head_dim,
        llama.num_key_value_heads * llama.head_dim,
    )
    matrices = llama.num_hidden_layers * (hidden * (2 * heads + 2 * kv) + 3 * hidden * inner)
    limits = Ceilings(read_bytes_s=1e3, rows=(1, 8), flops_s=(1e6, 1e6))
    step = Step(num_tokens=8, num_outputs=8, num_keys_read=50, num_scores=1)
    products = 2 * 8 * (matrices + hidden * llama.vocab_size) / 1e6
    keys = 2 * 50 * kv * 2 * llama.num_hidden_layers / 1e3
    assert seconds(step, llama, "bfloat16", limits) == pytest.approx(products + keys)


def test_rates_between_the_measured_ones() -> None:
    limits = Ceilings(1.0, (1, 4, 16), (1.0, 4.0, 8.0))
    assert [limits.linear_flops_s(rows) for rows in (1, 2, 4, 8, 16, 99)] == pytest.approx([1, 2, 4, 32**0.5, 8, 8])
