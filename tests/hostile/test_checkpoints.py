"""Checkpoints that are damaged or that lie: a message before any weight is used, or a model that runs."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engines import discover
from engines.api import CheckpointError, SamplingParams, UnsupportedModelError
from engines.cpu.offers import Config
from engines.load import load_engine
from runner.config import DatasetConfig, JobConfig, ModelConfig, OutputConfig
from runner.errors import RunnerError
from runner.job import run
from runner.plan import make_plan
from runner.prompt import load_tokenizer
from runner.tasks import generate
from tests.parity.checkpoints import make_checkpoint
from tests.small_job import read_output, write_rows, write_tokenizer

CONFIG = {**discover.families()["llama"].tiny_config(), "vocab_size": 256}
LIES = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([0, 10**6, 10**9, 2**31, 2**63, 10**30, -1, 1.5, 0.0, 1e308, float("nan"), True, None]),
    st.sampled_from(["", "llama", "../x", [], [1], {}, {"rope_type": "yarn", "factor": 0}, {"quant_method": "awq"}]),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "quant_method", "bits"]),
        st.integers(-1, 9) | st.text(max_size=5),
    ),
)
KEYS = [
    *CONFIG, "rope_scaling", "rope_parameters", "quantization_config", "sliding_window", "head_dim", "torch_dtype",
    "layer_types", "auto_map", "tie_word_embeddings", "attention_bias", "eos_token_id", "text_config", "hidden_act",
]  # fmt: skip
MAX_GROWTH = 2 << 30


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make_checkpoint(CONFIG, folder / "model")
    write_tokenizer(folder / "model")
    write_rows(folder / "rows", ["a row", "another"])
    return folder


def job_of(folder: Path, rows: Path, name: str = "job") -> JobConfig:
    return JobConfig(
        name=name,
        model=ModelConfig(str(folder)),
        dataset=DatasetConfig(path=str(rows)),
        task=generate.Config(name="generate", prompt="{{ text }}"),
        sampling=SamplingParams(max_tokens=2),
        backend="cpu",
        backend_config=Config(kv_cache_bytes=1 << 20, num_threads=1, max_model_len=64),
        output=OutputConfig(folder=str(folder.parent / "out")),
        max_error_rate=1.0,
    )


def outcome(folder: Path, rows: Path) -> str:
    """ "runs", or the name of the error; anything else is a failure."""
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        plan = make_plan(job_of(folder, rows))
        load_tokenizer(str(folder))
        load_engine(plan.settings).close()
        return "runs"
    except (RunnerError, CheckpointError, UnsupportedModelError, MemoryError) as error:
        assert len(str(error)) < 10_000 and "Traceback" not in str(error)
        return type(error).__name__
    finally:
        assert time.process_time() - began < 30
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MAX_GROWTH


def changed(sound: Path, folder: Path) -> Path:
    """A copy to be spoiled."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound / "model", folder)
    return folder


def test_the_checkpoint_itself_runs(sound: Path, tmp_path: Path) -> None:
    assert outcome(changed(sound, tmp_path / "model"), sound / "rows") == "runs"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), LIES, min_size=1, max_size=3))
def test_a_config_that_lies(sound: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = changed(sound, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    outcome(folder, sound / "rows")


@pytest.mark.parametrize("window", [[1], "llama", 1e308, 1.5, 2**63, -1], ids=str)
def test_a_window_that_transformers_cannot_compute_with(sound: Path, tmp_path: Path, window: object) -> None:
    """The kind of rotation makes it another model than the native family; what then fails is the first step."""
    folder, lies = changed(sound, tmp_path / "model"), {"rope_parameters": {"rope_type": 0}, "sliding_window": window}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **lies}))
    assert outcome(folder, sound / "rows") == "UnsupportedModelError"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_damaged_files(sound: Path, tmp_path: Path, name: str) -> None:
    """Bits flipped in the parts that are read as structure, bytes taken out, files cut short."""
    found = set()
    for seed in range(40):
        chance = random.Random(seed)
        folder = changed(sound, tmp_path / "model")
        content = bytearray((folder / name).read_bytes())
        header = 8 + struct.unpack("<Q", content[:8])[0] if name.endswith("tensors") else len(content)
        for _ in range(chance.choice([1, 3, 30])):
            content[chance.randrange(header)] = chance.choice([0, 34, 44, 57, 91, 93, 123, 125, 255])
        (folder / name).write_bytes(content[: chance.choice([len(content), chance.randrange(len(content))])])
        found.add(outcome(folder, sound / "rows"))
    assert len(found) > 1 or name == "tokenizer_config.json"


def _reshaped(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].reshape(-1)[:-1].clone()


def _transposed(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].t().contiguous()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.pop("model.layers.0.mlp.gate_proj.weight"), "model.layers.0.mlp.gate_proj.weight"),
        (lambda t: _reshaped(t, "model.norm.weight"), "model.norm.weight"),
        (lambda t: _transposed(t, "model.layers.0.mlp.down_proj.weight"), "down_proj"),
        (lambda t: t.update({"model.layers.0.mlp.gate_proj.weight": torch.zeros(0)}), "gate_proj"),
        (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bool()}), "model.norm.weight"),
        (lambda t: t.update({"surprise": torch.ones(3)}), "surprise"),
    ],
    ids=["missing", "shorter", "transposed", "empty", "of booleans", "unknown"],
)
def test_tensors_that_do_not_fit(sound: Path, tmp_path: Path, spoil: Any, said: str) -> None:
    folder = changed(sound, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match=said) as caught:
        run(make_plan(job_of(folder, sound / "rows")))
    assert isinstance(caught.value, RunnerError)


def test_weights_that_are_no_numbers(sound: Path, tmp_path: Path) -> None:
    """Every row says so; none has a text that was made of nothing."""
    folder = changed(sound, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    table = read_output(run(make_plan(job_of(folder, sound / "rows"))).folder)
    assert table.column("error_code").to_pylist() == ["nan_logits"] * 2 and table.column("text").null_count == 2


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_links_that_lead_out_are_not_followed(sound: Path, tmp_path: Path, name: str) -> None:
    folder = changed(sound, tmp_path / "model")
    secret = tmp_path / "secret"
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"{{ messages }}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(Exception, match="outside the model folder") as caught:
        run(make_plan(job_of(folder, sound / "rows")))
    assert isinstance(caught.value, RunnerError)


def test_code_of_a_checkpoint_is_not_run(sound: Path, tmp_path: Path) -> None:
    """auto_map, a tokenizer class of its own, a pickle: none is looked into without its word."""
    folder = changed(sound, tmp_path / "model")
    owned = tmp_path / "owned"
    code = f"open({str(owned)!r}, 'w').close()\nclass X: pass\n"
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py"):
        (folder / name).write_text(code)
    auto = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    for architecture in ("LlamaForCausalLM", "UnknownForCausalLM"):
        made = {**CONFIG, "architectures": [architecture], "model_type": "x", "auto_map": auto}
        (folder / "config.json").write_text(json.dumps(made))
        tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        outcome(folder, sound / "rows")
        assert not owned.exists()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(RunnerError, match="pickles"):
        make_plan(job_of(folder, sound / "rows"))
