"""`numerics: invariant` through the engine: a row's numbers have the same bits alone and in any company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines import discover, extension
from engines.api import EngineSettings, Request, SamplingParams
from engines.cpu.offers import Config
from engines.load import load_engine
from tests.parity.checkpoints import make_checkpoint

pytestmark = pytest.mark.skipif(extension.reason() is not None, reason=str(extension.reason()))
SHARED = [7, 3, 9, 4, 1, 8, 2, 6] * 5
PROMPTS = [[*SHARED, i, i + 1] for i in range(6)] + [[5], [11, 2, 3], list(range(1, 90))]
WAYS = (
    {},
    {"max_num_batched_tokens": 7},
    {"max_num_seqs": 2, "prefix_caching": False},
    {"max_num_batched_tokens": 33, "kv_cache_bytes": "tight"},
)
"""Chunked prefill, small batches, no reuse, and so few blocks that sequences give way and are computed again."""


def results(
    settings: EngineSettings, prompts: list[list[int]], **config: object
) -> list[tuple[list[int], list[float]]]:
    given = {"kv_cache_bytes": 1 << 22, "block_size": 32, "num_threads": 2, **config}
    if given["kv_cache_bytes"] == "tight":
        probe = load_engine(replace(settings, config=Config(**{**given, "kv_cache_bytes": 1 << 22})))
        given["kv_cache_bytes"] = 6 * (1 << 22) // probe.stats().num_blocks
        probe.close()
    engine = load_engine(replace(settings, config=Config(**given)))
    params = SamplingParams(max_tokens=5, ignore_eos=True, logprobs=2)
    engine.submit([Request(i, "generate", prompt, params) for i, prompt in enumerate(prompts)])
    found = {}
    while engine.num_unfinished:
        for outcome in engine.step():
            assert outcome.error is None, outcome.error
            assert outcome.logprobs is not None
            found[outcome.request_id] = (outcome.token_ids, [entry.logprob for entry in outcome.logprobs])
    engine.close()
    return [found[i] for i in range(len(prompts))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_a_row_has_the_same_bits_in_any_company(tmp_path: Path, family: str, dtype: str) -> None:
    make_checkpoint(discover.families()[family].tiny_config(), tmp_path)
    settings = EngineSettings("cpu", str(tmp_path), dtype, Config())
    alone = [results(settings, [prompt])[0] for prompt in (PROMPTS[0], PROMPTS[6], PROMPTS[8])]
    for way in WAYS:
        together = results(settings, PROMPTS, **way)
        assert [together[i] for i in (0, 6, 8)] == alone, f"{way}: a row's numbers depend on its batch"
