"""Sampling: known random numbers, the filters in plain numpy, frequencies of what is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engines.ops import OpSet
from engines.ops.sampling import SamplingBatch, philox, uniform
from tests.cases import numbers

OPS = OpSet()


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_has_the_known_answers_of_random123(counter: str, key: str, words: str) -> None:
    def tensors(text: str) -> tuple[torch.Tensor, ...]:
        return tuple(torch.tensor([int(word, 16)]) for word in text.split())

    assert [f"{int(word):08x}" for word in philox(tensors(counter), tensors(key))] == words.split()


def test_uniform_numbers_are_uniform_and_differ_by_key_and_position() -> None:
    keys, positions = torch.arange(-100, 100), torch.arange(100)
    found = uniform(keys.repeat_interleave(100), positions.repeat(200))
    assert float(found.min()) >= 0 and float(found.max()) < 1
    assert len(found.unique()) == len(found)
    counts = torch.histc(found.float(), 50, 0, 1)
    assert float(((counts - 400) ** 2 / 400).sum()) < chi_square_limit(49)


def chi_square_limit(freedom: int) -> float:
    """The value that chi-square exceeds once in a million (Wilson and Hilferty's approximation)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.75 * math.sqrt(2 / (9 * freedom))) ** 3


def settings(rows: int, **values: float) -> SamplingBatch:
    every = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **values}
    return SamplingBatch(
        temperature=torch.full((rows,), float(every["temperature"])),
        top_k=torch.full((rows,), int(every["top_k"])),
        top_p=torch.full((rows,), float(every["top_p"])),
        min_p=torch.full((rows,), float(every["min_p"])),
        stream=torch.arange(rows) * 7919,
        position=torch.arange(rows) % 13,
    )


def plain(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Probabilities that are left, token by token."""
    probs = np.exp((logits - logits.max()) / temperature)
    probs /= probs.sum()
    probs[probs < min_p * probs.max()] = 0
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    if top_k:
        for i in order[top_k:]:
            probs[i] = 0
    if top_p < 1:
        total, so_far = probs.sum(), 0.0
        for rank, i in enumerate(order):
            if rank and so_far >= top_p * total:
                probs[i] = 0
            else:
                so_far += probs[i]
    return probs / probs.sum()


FILTERS = [
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 5},
    {"top_k": 1},
    {"top_k": 900},
    {"top_p": 0.4},
    {"top_p": 0.9999},
    {"temperature": 3.0, "top_p": 0.98},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.parametrize("values", FILTERS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_sample_is_the_inverse_transform_of_what_the_filters_leave(values: dict[str, float], ties: bool) -> None:
    rows, vocab = 40, 6000
    logits = numbers(rows, vocab, dtype=torch.float32, stretch=2.0).contiguous()
    if ties:
        logits = logits.round()
    params = settings(rows, **values)
    numbers_drawn = uniform(params.stream, params.position).numpy()
    found = OPS.sample(logits.clone(), params)
    every = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **values}
    for key in ("temperature", "top_p", "min_p"):
        every[key] = float(np.float32(every[key]))
    for i in range(rows):
        probs = plain(logits[i].double().numpy(), **every)  # type: ignore[arg-type]
        cumulative = probs.cumsum()
        token = int(found[i])
        assert probs[token] > 0, "a token that the filters leave out"
        assert cumulative[token] - probs[token] - 1e-9 <= numbers_drawn[i] <= cumulative[token] + 1e-9


def test_a_draw_depends_on_key_and_position_alone() -> None:
    logits = numbers(30, 700, dtype=torch.float32, stretch=2.0).contiguous()
    params = settings(30, temperature=0.9, top_p=0.95)
    together = OPS.sample(logits, params)
    for i in (0, 7, 29):
        row = torch.tensor([i])
        assert int(OPS.sample(logits[row], params.take(row))) == int(together[i])


def test_frequencies_are_the_probabilities() -> None:
    draws = 20_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.5, -3.0, 0.2])
    for values in ({}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}):
        found = OPS.sample(logits.expand(draws, -1).contiguous(), settings(draws, **values))
        every = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **values}
        expected = plain(logits.double().numpy(), **every) * draws  # type: ignore[arg-type]
        counts = torch.bincount(found, minlength=len(logits)).numpy()
        left = expected > 0
        assert counts[~left].sum() == 0
        assert ((counts[left] - expected[left]) ** 2 / expected[left]).sum() < chi_square_limit(int(left.sum()) - 1)


def test_greedy_rows_among_drawn_ones_take_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]]).repeat(3, 1)
    params = settings(3)
    params.temperature[1] = 0
    assert int(OPS.sample(logits, params)[1]) == 1


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.zeros(2000, 300)
    logits[:, :299] = float("-inf")
    for values in ({}, {"top_p": 0.5}, {"top_k": 20}):
        assert OPS.sample(logits, settings(2000, **values)).unique().tolist() == [299]


def test_penalties_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = numbers(5, 60, dtype=torch.float32, stretch=3.0)
    prompt, output = (torch.randint(0, 3, (5, 60), generator=generator, dtype=torch.int32) for _ in range(2))
    repetition, presence, frequency = (
        torch.tensor(x) for x in ([1.0, 1.3, 0.8, 2.0, 1.0], [0.0, 0.5, -1.0, 2.0, 0.1], [0.0, -0.5, 1.0, 0.2, 0.3])
    )
    found = OPS.apply_penalties(logits.clone(), prompt, output, repetition, presence, frequency)
    for i in range(5):
        for j in range(60):
            x = float(logits[i, j])
            if prompt[i, j] or output[i, j]:
                x = x / float(repetition[i]) if x > 0 else x * float(repetition[i])
            x -= float(frequency[i]) * int(output[i, j]) + (float(presence[i]) if output[i, j] else 0.0)
            assert float(found[i, j]) == pytest.approx(x, rel=1e-5, abs=1e-5)


def test_logprobs() -> None:
    logits = numbers(4, 30, dtype=torch.float32, stretch=5.0)
    expected = logits.double().log_softmax(-1)
    targets = torch.tensor([3, 0, 29, 3])
    torch.testing.assert_close(
        OPS.log_softmax_gather(logits, targets).double(), expected[torch.arange(4), targets], rtol=1e-5, atol=1e-5
    )
    values, ids = OPS.top_logprobs(logits, 3)
    torch.testing.assert_close(values.double(), expected.topk(3).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(ids, logits.topk(3).indices)
