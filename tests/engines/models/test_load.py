"""Checkpoints that do not fit, and the spellings and layouts that do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines import discover
from engines.api import CheckpointError, UnsupportedModelError
from engines.models.load import load_model
from engines.ops import OpSet
from engines.ops.linear import LinearWeight
from tests.parity.checkpoints import make_checkpoint
from tests.parity.ragged import Driver, settings

LLAMA = discover.families()["llama"].tiny_config()
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint(LLAMA, folder)
    return load_file(folder / "model.safetensors")


@pytest.fixture
def write(tensors: Tensors, tmp_path: Path) -> Callable[..., Path]:
    def write(change: Callable[[Tensors], object] = lambda t: None, **config: object) -> Path:
        changed = dict(tensors)
        change(changed)
        save_file(changed, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **config}))
        return tmp_path

    return write


def logits(folder: Path, **changes: object) -> Tensor:
    ops = OpSet()
    model = load_model(settings(folder, **changes), ops)
    with torch.inference_mode():
        return model.logits(Driver(model, ops, torch.float32, (9,)).run({0: torch.arange(9)}))


def test_all_findings_come_in_one_error(write: Callable[..., Path]) -> None:
    def change(t: Tensors) -> None:
        del t["model.layers.1.mlp.up_proj.weight"]
        t["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(167, 70)
        t["model.layers.3.input_layernorm.weight"] = torch.zeros(70)
        t["model.norm.weight"] = torch.zeros(70, dtype=torch.int32)

    with pytest.raises(CheckpointError) as error:
        load_model(settings(write(change)), OpSet())
    message = str(error.value)
    assert "missing: model.layers.1.mlp.up_proj.weight [122, 70]" in message
    assert "wrong shape: model.layers.2.self_attn.q_proj.weight is [167, 70], config.json says [168, 70]" in message
    assert "unexpected: model.layers.3.input_layernorm.weight [70]" in message
    assert "wrong type: model.norm.weight is I32, expected one of" in message
    assert message.count("\n  ") == 4


def test_nothing_is_read_before_everything_fits(write: Callable[..., Path]) -> None:
    class Untouched(OpSet):
        def prepare_linear(self, weight: Tensor, bias: Tensor | None) -> LinearWeight:  # type: ignore[override]
            raise AssertionError("a weight was prepared")

    folder = write(lambda t: t.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"missing: lm_head\.weight"):
        load_model(settings(folder), Untouched())


def test_a_long_list_is_cut(write: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="unexpected: 8 more"):
        load_model(settings(write(num_hidden_layers=2)), OpSet())


def test_tied_model_without_head(write: Callable[..., Path], tensors: Tensors) -> None:
    def tie(t: Tensors) -> None:
        t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()

    untied = logits(write(tie))
    tied = logits(write(lambda t: t.pop("lm_head.weight"), tie_word_embeddings=True))
    torch.testing.assert_close(tied, untied, rtol=0, atol=0)


def test_tied_model_with_a_head_of_its_own_uses_it(write: Callable[..., Path]) -> None:
    torch.testing.assert_close(logits(write(tie_word_embeddings=True)), logits(write()), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_types_are_converted(write: Callable[..., Path], dtype: torch.dtype) -> None:
    def change(t: Tensors) -> None:
        t.update({name: tensor.to(dtype) for name, tensor in t.items()})

    def rounded(t: Tensors) -> None:
        t.update({name: tensor.to(dtype).float() for name, tensor in t.items()})

    torch.testing.assert_close(logits(write(change)), logits(write(rounded)), rtol=0, atol=0)


def test_sharded(write: Callable[..., Path], tensors: Tensors) -> None:
    whole = logits(write())
    folder = write()
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    torch.testing.assert_close(logits(folder), whole, rtol=0, atol=0)


def test_old_buffers_are_ignored(write: Callable[..., Path]) -> None:
    def change(t: Tensors) -> None:
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(12)

    logits(write(change))


def test_embedding_models_need_no_head_and_no_prefix(write: Callable[..., Path], tensors: Tensors) -> None:
    ops = OpSet()

    def bare(t: Tensors) -> None:
        t.clear()
        t.update({n.removeprefix("model."): x for n, x in tensors.items() if n.startswith("model.")})

    def hidden(folder: Path) -> Tensor:
        model = load_model(settings(folder, kind="embed"), ops)
        return Driver(model, ops, torch.float32, (9,)).run({0: torch.arange(9)})

    with_head = hidden(write())
    torch.testing.assert_close(hidden(write(bare, architectures=["LlamaModel"])), with_head, rtol=0, atol=0)


def test_a_head_that_is_not_there(write: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM cannot classify; expected a"):
        load_model(settings(write(), kind="classify"), OpSet())
    with pytest.raises(UnsupportedModelError, match="LlamaModel cannot generate; expected a"):
        load_model(settings(write(architectures=["LlamaModel"])), OpSet())


def test_unknown_architecture_names_the_known_ones(write: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"NovelForCausalLM has no native family; .*Qwen3ForCausalLM"):
        load_model(settings(write(architectures=["NovelForCausalLM"])), OpSet())


def test_quantized_checkpoint_is_refused_by_its_method(write: Callable[..., Path]) -> None:
    folder = write(quantization_config={"quant_method": "bitsandbytes", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantized \(bitsandbytes\); expected one of awq"):
        load_model(settings(folder), OpSet())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope type 'spiral'"),
        ({"hidden_act": "mish"}, "activation 'mish'"),
    ],
)
def test_values_that_cannot_be_run(write: Callable[..., Path], change: dict[str, object], found: str) -> None:
    with pytest.raises(UnsupportedModelError, match=found):
        load_model(settings(write(**change)), OpSet())


def test_a_config_without_sizes(write: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="hidden_size is None; expected a positive integer"):
        load_model(settings(write(hidden_size=None)), OpSet())


def test_bert_with_the_names_of_2018(tmp_path: Path) -> None:
    config = discover.families()["bert"].tiny_config()
    make_checkpoint(config, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    old = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in stored.items()
    }
    load_model(settings(tmp_path, kind="embed"), OpSet())
    old["cls.predictions.bias"] = torch.zeros(config["vocab_size"])
    save_file(old, tmp_path / "model.safetensors")
    load_model(settings(tmp_path, kind="embed"), OpSet())


def test_gemma3_text_inside_a_multimodal_checkpoint(tmp_path: Path) -> None:
    config = discover.families()["gemma3"].tiny_config()
    make_checkpoint(config, tmp_path)
    text = logits(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    nested = {"language_model." + name: tensor for name, tensor in stored.items()}
    nested["vision_tower.embeddings.weight"] = torch.zeros(3)
    save_file(nested, tmp_path / "model.safetensors")
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    torch.testing.assert_close(logits(tmp_path), text, rtol=0, atol=0)
