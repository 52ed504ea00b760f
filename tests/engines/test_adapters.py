"""Requests with different adapters in one batch, against checkpoints in which each adapter is merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines import discover
from engines.adapters import digest
from engines.api import CheckpointError, EngineConfig, EngineSettings, Outcome, Request, SamplingParams
from engines.api import UnsupportedModelError as Unsupported
from engines.load import load_engine
from engines.models.load import load_model
from engines.ops import OpSet
from tests.engines.adapters import PREFIX, merge, scale_of, write_adapter
from tests.parity.checkpoints import make_checkpoint

FAMILIES = discover.families()
ATTENTION = ("q_proj", "v_proj")
EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def modules_of(weights: dict[str, torch.Tensor], kinds: tuple[str, ...]) -> list[str]:
    names = (name.removesuffix(".weight") for name in weights)
    return sorted(name for name in names if name.endswith(kinds) and ".experts." not in name)


def settings(folder: Path, adapters: dict[str, str] | None = None, **changes: Any) -> EngineSettings:
    config = EngineConfig(max_model_len=128, block_size=8, kv_cache_bytes=4 << 20, **changes)
    return EngineSettings("cpu", str(folder), "float32", config, adapters=adapters or {})


def run(engine_settings: EngineSettings, requests: list[Request]) -> list[Outcome]:
    engine = load_engine(engine_settings)
    engine.submit(requests)
    outcomes = {}
    while engine.num_unfinished:
        outcomes |= {outcome.request_id: outcome for outcome in engine.step()}
    engine.check_integrity()
    engine.close()
    return [outcomes[request.request_id] for request in requests]


def requests(names: list[str | None], vocab: int, kind: Any = "generate") -> list[Request]:
    """Prompts that begin alike, so that blocks must not be shared across adapters."""
    generator = torch.Generator().manual_seed(4)
    shared = torch.randint(0, vocab, (20,), generator=generator).tolist()
    ends = torch.randint(0, vocab, (len(names), 3), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=0)
    return [Request(i, kind, shared + ends[i // 4], sampling, adapter=name) for i, name in enumerate(names)]


SUBJECTS = {
    "llama": EVERYTHING,
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "internlm2": ("wqkv", "wo", "w1", "w3", "w2"),
    "qwen2_moe": (*ATTENTION, "shared_expert.up_proj", "shared_expert.down_proj"),
    "deepseek_v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "shared_experts.gate_proj"),
}


@pytest.mark.parametrize("family", SUBJECTS)
def test_each_request_gets_its_own_adapter(family: str, tmp_path: Path) -> None:
    """Token for token what merged checkpoints give, in one batch that mixes adapters of different ranks."""
    config = FAMILIES[family].tiny_config()
    base = tmp_path / "base"
    make_checkpoint(config, base)
    weights = load_file(base / "model.safetensors")
    wide, narrow = modules_of(weights, SUBJECTS[family]), modules_of(weights, SUBJECTS[family][:1])
    first = write_adapter(tmp_path / "a", weights, wide, rank=4, seed=1)
    second = write_adapter(tmp_path / "b", weights, narrow, rank=7, seed=2, use_rslora=True)
    merged = {
        None: base,
        "a": merge(base, tmp_path / "merged_a", first, scale_of(4)),
        "b": merge(base, tmp_path / "merged_b", second, scale_of(7, rank_stabilized=True)),
    }
    names = [None, "a", "b", "a"] * 3
    asked = requests(names, config["vocab_size"])
    folders = {"a": str(tmp_path / "a"), "b": str(tmp_path / "b")}
    found = run(settings(base, folders, max_num_batched_tokens=40), asked)
    assert not [outcome.error for outcome in found if outcome.error]
    for name, folder in merged.items():
        mine = [request for request in asked if request.adapter == name]
        plain = [Request(r.request_id, r.kind, r.token_ids, r.sampling) for r in mine]
        for request, expected in zip(mine, run(settings(folder), plain), strict=True):
            outcome = found[request.request_id]
            assert outcome.token_ids == expected.token_ids, f"adapter {name}"
            theirs = torch.tensor([t.logprob for t in expected.logprobs or []])
            torch.testing.assert_close(torch.tensor([t.logprob for t in outcome.logprobs or []]), theirs,
                                       rtol=1e-3, atol=1e-3)  # fmt: skip
    different = {tuple(found[i].token_ids) for i in range(3)}
    assert len(different) == 3, "adapters change nothing: the test shows nothing"


def test_blocks_are_shared_within_an_adapter_only(tmp_path: Path) -> None:
    config = FAMILIES["llama"].tiny_config()
    make_checkpoint(config, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    write_adapter(tmp_path / "a", weights, modules_of(weights, ATTENTION), 4, 1)
    prompt = list(range(40))
    sampling = SamplingParams(max_tokens=1)
    engine = load_engine(settings(tmp_path / "base", {"a": str(tmp_path / "a")}))
    cached = []
    for i, name in enumerate((None, "a", "a", None)):
        engine.submit([Request(i, "generate", prompt, sampling, adapter=name)])
        while engine.num_unfinished:
            cached += [outcome.num_cached_tokens for outcome in engine.step()]
    assert cached == [0, 0, 32, 32]


def test_an_unknown_adapter_is_an_error_of_its_request(tmp_path: Path) -> None:
    make_checkpoint(FAMILIES["llama"].tiny_config(), tmp_path)
    asked = requests(["nobody", None], 100)
    refused, sound = run(settings(tmp_path), asked)
    assert refused.error is not None and refused.error.code == "unknown_adapter"
    assert refused.error.message == "there is no adapter 'nobody'; the job has none"
    assert sound.error is None


def test_alpha_patterns_match_the_end_of_a_name(tmp_path: Path) -> None:
    config = FAMILIES["llama"].tiny_config()
    make_checkpoint(config, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    modules = modules_of(weights, ATTENTION)
    made = write_adapter(tmp_path / "a", weights, modules, 4, 1, alpha_pattern={"layers.1.*q_proj": 12, "v_proj": 2})
    scales = {m: scale_of(4, 12 if "1.self_attn.q" in m else 2 if "v_proj" in m else 6) for m in modules}
    merged = merge(tmp_path / "base", tmp_path / "merged", made, scales)
    [found] = run(settings(tmp_path / "base", {"a": str(tmp_path / "a")}), requests(["a"], config["vocab_size"]))
    [expected] = run(settings(merged), requests([None], config["vocab_size"]))
    assert found.token_ids == expected.token_ids


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_checkpoint(FAMILIES["llama"].tiny_config(), folder)
    return folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora=True; expected plain LoRA"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "another method": ({"peft_type": "IA3"}, "peft_type='IA3'"),
    "another base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_adapter_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    weights = load_file(base / "model.safetensors")
    write_adapter(tmp_path / "a", weights, modules_of(weights, ATTENTION), 4, 1, **changes)
    with pytest.raises(Unsupported, match=r"model.adapters.a: adapter_config.json has " + message):
        load_model(settings(base, {"a": str(tmp_path / "a")}), OpSet())


def test_modules_that_take_no_adapter_and_wrong_shapes_are_named(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    write_adapter(tmp_path / "head", weights, ["lm_head", *modules_of(weights, ATTENTION)], 4, 1)
    with pytest.raises(Unsupported, match=r"model.adapters.x: 2 of its 14 tensors .*lm_head.lora_A"):
        load_model(settings(base, {"x": str(tmp_path / "head")}), OpSet())
    write_adapter(tmp_path / "shape", weights, modules_of(weights, ATTENTION), 4, 1)
    file = tmp_path / "shape" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 9)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"q_proj are \[\[4, 9\], \[168, 4\]\]; expected \[rank, 70\]"):
        load_model(settings(base, {"x": str(tmp_path / "shape")}), OpSet())


def test_missing_and_damaged_files_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json; expected a folder with"):
        load_model(settings(base, {"x": str(tmp_path)}), OpSet())
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(settings(base, {"x": str(tmp_path)}), OpSet())
    first = digest(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert digest(str(tmp_path)) != first


def test_models_that_take_no_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    write_adapter(tmp_path / "a", weights, modules_of(weights, ATTENTION), 4, 1)
    make_checkpoint(FAMILIES["bert"].tiny_config(), tmp_path / "bert")
    asked = settings(tmp_path / "bert", {"a": str(tmp_path / "a")})
    with pytest.raises(Unsupported, match=r"model.adapters: a with Bert.*; expected a decoder of a native family"):
        load_model(EngineSettings(**{**vars(asked), "kind": "embed"}), OpSet())
    config = json.loads((base / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    through = EngineSettings(**{**vars(settings(base, {"a": "x"})), "implementation": "transformers"})
    with pytest.raises(Unsupported, match="expected a decoder of a native family"):
        load_model(through, OpSet())
