"""The references against other people's code and plain formulas, in float64."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.ops import OpSet, attention
from engines.ops.kv_cache import KVCache
from tests.attention_cases import CASES, Case, make, widened
from tests.cases import cases, numbers

OPS = OpSet()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if not c.softcap and not c.sinks], ids=lambda c: c.name)
def test_paged_attention_is_torchs_attention_on_gathered_keys(case: Case) -> None:
    given = make(case, torch.float64)
    found = OPS.paged_attention(given.q, widened(given.cache), given.batch, 0.3, window_size=case.window)
    starts = [0, *itertools.accumulate(case.new)]
    for i, length in enumerate(case.lens):
        q = given.q[starts[i] : starts[i + 1]]
        if not len(q):
            continue
        slots = torch.arange(length)
        table = given.batch.block_tables[i].long()
        k, v = (
            torch.stack([t[table[s // case.block_size], :, s % case.block_size] for s in slots], 1)
            for t in (given.cache.k, given.cache.v)
        )
        query = torch.arange(length - len(q), length)[:, None]
        seen = slots[None] <= query
        if case.window:
            seen &= slots[None] > query - case.window
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k, v, attn_mask=seen, scale=0.3, enable_gqa=True
        )
        close(found[starts[i] : starts[i + 1]], expected.transpose(0, 1))


def test_softcap_and_sinks_of_one_token() -> None:
    """Written out: the sink is one more logit, without a value; the cap bends scores before the softmax."""
    case = Case("one", lens=(3,), new=(1,), num_heads=1, num_kv_heads=1, head_dim=4, block_size=4)
    given = make(case, torch.float64)
    block = int(given.batch.block_tables[0, 0])
    k, v = given.cache.k[block, 0, :3], given.cache.v[block, 0, :3]
    scores = 2.0 * torch.tanh((k @ given.q[0, 0]) * 0.5 / 2.0)
    weights = scores.exp() / (scores.exp().sum() + torch.tensor(0.7).double().exp())
    found = OPS.paged_attention(
        given.q, given.cache, given.batch, 0.5, softcap=2.0, sinks=torch.tensor([0.7], dtype=torch.float32).double()
    )
    torch.testing.assert_close(found[0, 0], weights @ v, rtol=1e-6, atol=1e-7)


def test_prefix_groups_change_nothing() -> None:
    case = next(c for c in CASES if c.shared_blocks)
    given = make(case, torch.float64)
    ungrouped = replace(given.batch, prefix_groups=())
    cache = widened(given.cache)
    assert torch.equal(
        OPS.paged_attention(given.q, cache, given.batch, 0.3), OPS.paged_attention(given.q, cache, ungrouped, 0.3)
    )


def test_rope_is_a_rotation_of_complex_numbers() -> None:
    q, k = numbers(9, 3, 16, dtype=torch.float64), numbers(9, 1, 16, dtype=torch.float64, seed=1)
    positions = torch.tensor([0, 1, 2, 7, 7, 30, 3, 2, 1])
    angle = torch.outer(torch.arange(31.0).double(), 10.0 ** -torch.arange(6.0).double())
    expected = []
    for x in (q, k):
        turned = (
            torch.complex(x[..., :6], x[..., 6:12]) * torch.polar(torch.ones_like(angle), angle)[positions][:, None]
        )
        expected.append(torch.cat((turned.real, turned.imag, x[..., 12:]), -1))
    OPS.rope(q, k, positions, torch.cat((angle.cos(), angle.sin()), 1))
    close(q, expected[0])
    close(k, expected[1])


def test_norms() -> None:
    x, weight, bias = (numbers(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(((5, 7), (7,), (7,))))
    close(OPS.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (7,), weight, 1e-5))
    close(OPS.rms_norm(x, weight, 1e-5, 1.0), torch.nn.functional.rms_norm(x, (7,), weight + 1, 1e-5))
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    close(OPS.layer_norm(x, weight, bias, 1e-5), normal * weight + bias)
    normed, total = OPS.add_rms_norm(x.clone(), 2 * x, weight, 1e-5)
    close(total, 3 * x)
    close(normed, OPS.rms_norm(3 * x, weight, 1e-5))


def test_rms_norm_rounds_where_it_says() -> None:
    """LlamaRMSNorm rounds before the weight multiplies, Gemma2RMSNorm after."""
    x, weight = numbers(9, 64, dtype=torch.bfloat16), numbers(64, dtype=torch.bfloat16, seed=1)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(OPS.rms_norm(x, weight, 1e-6), weight * wide.bfloat16())
    assert torch.equal(OPS.rms_norm(x, weight, 1e-6, 1.0), (wide * (1.0 + weight.float())).bfloat16())


def test_write_kv_leaves_other_slots_alone() -> None:
    cache = KVCache(torch.full((3, 2, 4, 5), -1.0), torch.full((3, 2, 4, 5), -2.0))
    k, v = numbers(2, 2, 5, dtype=torch.float32), numbers(2, 2, 5, dtype=torch.float32, seed=1)
    OPS.write_kv(k, v, cache, torch.tensor([9, 3]))
    assert torch.equal(cache.k[2, :, 1], k[0])
    assert torch.equal(cache.v[0, :, 3], v[1])
    assert int((cache.k != -1).any(-1).any(1).sum()) == 2


def test_latent_attention_does_not_depend_on_how_many_scores_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(c for c in cases() if str(c) == "latent_attention-ragged")
    arguments = case.arguments(torch.float64)
    whole = OpSet().latent_attention(*arguments)
    monkeypatch.setattr(attention, "MAX_SCORES", 5 * 200 * 7)  # 7 queries of the longest sequence at a time
    torch.testing.assert_close(OpSet().latent_attention(*arguments), whole, rtol=1e-12, atol=1e-12)
