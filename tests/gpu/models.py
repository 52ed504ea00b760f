"""Every family of models by an engine on a device, as jobs run it: memory looked for, decode steps captured, prompts
cut into pieces, steps launched before the last one is read. Tiny ones, with random weights.

Each token must be the most probable one by the same model in float32 on the processor, or so near to it that rounding
decides: rounded numbers choose otherwise than exact ones, and then all later tokens differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines import discover
from engines.api import EngineSettings, GPUConfig, Outcome, Request, SamplingParams
from engines.load import load_engine
from engines.models.load import load_model
from engines.models.spec import DecoderSpec
from engines.ops import OpSet as Reference
from tests.gpu import workers
from tests.parity.checkpoints import make_checkpoint
from tests.parity.ragged import Driver, settings

LENGTHS, NUM_TOKENS = (5, 19, 1, 11, 40, 40), 8
HEAD_DIM = 64
"""Of heads that the CUDA library was compiled for."""
LOOSE = 8.0
"""Between the largest error of plain torch in the same dtype and a gap that is no accident: both logits may be wrong,
by twice that error each, and the tokens before may have been chosen otherwise."""


@dataclass(frozen=True)
class Ran:
    notes: tuple[str, ...]
    """Of the engine: what it could not do as it was asked to."""
    worst: float
    """The largest gap between a token's logit and the largest one, as a share of what is allowed."""


def families(backend: str) -> list[str]:
    """Those that a backend has kernels for."""
    found = discover.families()
    decoders = [name for name, f in found.items() if isinstance(f.spec(f.tiny_config()), DecoderSpec)]
    return decoders if backend == "cuda" else list(found)


def runner(backend: str, device: str) -> Callable[[str], Ran]:
    """What runs a family by its name. Raises AssertionError where results are wrong."""
    open_for_good = workers.prepared(device)

    def work(family: str) -> Ran:
        assert open_for_good
        try:
            with tempfile.TemporaryDirectory() as folder:
                return run(family, Path(folder), backend, device)
        except AssertionError:
            raise
        except Exception as error:
            raise RuntimeError(workers.unless_lost(device, error)) from error

    return work


def run(family: str, folder: Path, backend: str, device: str) -> Ran:
    module = discover.families()[family]
    config = module.tiny_config()
    decodes = isinstance(module.spec(config), DecoderSpec)
    if backend == "cuda":
        from tests.engines.cuda import test_families

        config = test_families.sized(config, HEAD_DIM)
    try:
        make_checkpoint(config, folder)
    except ValueError as error:
        if "does not recognize this architecture" not in str(error):
            raise
        return Ran(("left out: this transformers does not know it",), 0.0)
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    prompts = texts(config["vocab_size"])
    outcomes, notes = finished(prompts, folder, backend, device, dtype, decodes)
    if not decodes:
        expected, _ = finished(prompts, folder, "cpu", "cpu", torch.float32, decodes)
        for own, right in zip(outcomes, expected, strict=True):
            torch.testing.assert_close(torch.tensor(own.values), torch.tensor(right.values), rtol=1e-3, atol=1e-4)
        return Ran(notes, 0.0)
    whole = [torch.tensor([*prompt, *o.token_ids]) for prompt, o in zip(prompts, outcomes, strict=True)]
    exact, plain = (logits(folder, d, whole) for d in (torch.float32, torch.bfloat16))
    worst = 0.0
    for prompt, text, right, rounded in zip(prompts, whole, exact, plain, strict=True):
        # Products of float32 may be made of shorter numbers by the device's settings, but not by ours.
        allowed = LOOSE * (rounded - right).abs().max().item() * (1.0 if dtype == torch.bfloat16 else 2**-12)
        chosen = right[len(prompt) - 1 : -1].gather(1, text[len(prompt) :, None])[:, 0]
        gaps = right[len(prompt) - 1 : -1].amax(1) - chosen
        worst = max(worst, gaps.max().item() / allowed)
        assert gaps.max().item() <= allowed, (
            f"a prompt of {len(prompt)}: token {int(gaps.argmax())} is {gaps.max().item():.4g} less probable than the "
            f"best; expected at most {allowed:.4g} (all: {[round(gap, 4) for gap in gaps.tolist()]})"
        )
    return Ran(notes, worst)


def texts(vocab_size: int) -> list[list[int]]:
    """Prompts of LENGTHS, all of which begin alike."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(5, min(vocab_size, 60), (max(LENGTHS),), generator=generator).tolist()
    return [[*tokens[: length - 1], 7 + i] for i, length in enumerate(LENGTHS)]


def finished(
    prompts: list[list[int]], folder: Path, backend: str, device: str, dtype: torch.dtype, decodes: bool
) -> tuple[list[Outcome], tuple[str, ...]]:
    """(outcomes in order, notes) of an engine."""
    config = GPUConfig(
        max_model_len=64, block_size=16, max_num_seqs=4, max_num_batched_tokens=16 if decodes else 64,
        kv_cache_bytes=1 << 20 if device == "cpu" else None,
    )  # fmt: skip
    kind: Any = "generate" if decodes else "embed"
    name = str(dtype).removeprefix("torch.")
    pooling = None if decodes else "mean"
    engine = load_engine(EngineSettings(backend, str(folder), name, config, kind, device, pooling))
    greedy = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True) if decodes else None
    engine.submit([Request(i, kind, prompt, greedy) for i, prompt in enumerate(prompts)])
    outcomes: dict[int, Outcome] = {}
    while engine.num_unfinished:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            outcomes[outcome.request_id] = outcome
    engine.check_integrity()
    notes = engine.stats().notes
    engine.close()
    return [outcomes[i] for i in range(len(prompts))], notes


def logits(folder: Path, dtype: torch.dtype, whole: list[Tensor]) -> list[Tensor]:
    """Of every token of each text, by the reference on the processor; float32."""
    ops = Reference()
    model = load_model(settings(folder, max_model_len=64, dtype=str(dtype).removeprefix("torch.")), ops)
    driver = Driver(model, ops, dtype, [len(text) for text in whole])
    with torch.inference_mode():
        every = model.logits(driver.run(dict(enumerate(whole)))).float()
    return list(every.split([len(text) for text in whole]))
