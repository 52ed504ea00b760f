"""Greedy continuations by transformers' generate: what engines must reproduce token for token."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_TOKENS = 64
MARGIN = 5e-5
"""A prompt counts only if its best token is ahead of the second by this share of the logits' standard deviation, at
every step: closer than that, the order of float32 sums decides, and there is no right answer."""
LENGTHS = (1, 2, 3, 7, 16, 17, 31, 48, 64, 90, 111, 127, 128, 129, 200, 250, 300)


@dataclass(frozen=True)
class Sample:
    """A prompt and its continuation."""

    prompt: list[int]
    expected: list[int]


def make_prompts(vocab: int, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of LENGTHS in turn; each begins like one of four texts and ends with three tokens of its own."""
    generator = torch.Generator().manual_seed(seed)
    texts = torch.randint(0, vocab, (4, max(LENGTHS)), generator=generator)
    ends = torch.randint(0, vocab, (count, 3), generator=generator)
    prompts = []
    for i in range(count):
        length = LENGTHS[i % len(LENGTHS)]
        own = min(3, length)
        prompts.append(texts[i % 4, : length - own].tolist() + ends[i, :own].tolist())
    return prompts


def greedy_samples(reference: Any, prompts: list[list[int]], padded: bool, count: int) -> list[Sample]:
    """The first `count` prompts whose continuation is beyond doubt.

    padded: all prompts in one batch; otherwise prompts of one length together, for models whose result depends on the
    longest text of the batch or that keep a recurrent state.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for i, prompt in enumerate(prompts):
        groups[0 if padded else len(prompt)].append(i)
    results: dict[int, tuple[list[int], float]] = {}
    for members in groups.values():
        tokens, margins = _generate(reference, [prompts[i] for i in members])
        for i, row, margin in zip(members, tokens.tolist(), margins.tolist(), strict=True):
            results[i] = (row, margin)
    clear = [Sample(prompts[i], results[i][0]) for i in range(len(prompts)) if results[i][1] > MARGIN]
    assert len(clear) >= count, f"only {len(clear)} of {len(prompts)} prompts have a clear continuation"
    variety = sum(len(set(sample.expected)) for sample in clear) / len(clear)
    assert variety > 8, f"continuations have {variety:.1f} different tokens of {NUM_TOKENS}: they test little"
    return clear[:count]


def _generate(reference: Any, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    rotary = getattr(reference.base_model, "rotary_emb", None)
    if rotary is not None:
        # Dynamic ropes remember the longest text they have seen.
        reference.base_model.rotary_emb = type(rotary)(reference.config)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.inference_mode():
        output = reference.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=NUM_TOKENS,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack(output.logits, dim=1).float()
    best = logits.topk(2, dim=-1).values
    return output.sequences[:, longest:], ((best[..., 0] - best[..., 1]) / logits.std(-1)).amin(-1)
