"""Opening model folders: what is read from sound ones, and how each kind of unsound one is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.api import CheckpointError
from engines.checkpoint import open_checkpoint


def write_safetensors(file: Path, tensors: dict[str, tuple[str, list[int], bytes]], **changes: Any) -> None:
    """A safetensors file written from the format's description; `changes` replace header entries."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    header |= changes
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


TENSORS = {"a": ("F32", [3, 5], bytes(60)), "b": ("BF16", [7], bytes(range(14)))}


@pytest.fixture
def folder(weird_tmp_path: Path) -> Path:
    config = {"architectures": ["LlamaForCausalLM"], "eos_token_id": 2, "torch_dtype": "bfloat16"}
    (weird_tmp_path / "config.json").write_text(json.dumps(config))
    write_safetensors(weird_tmp_path / "model.safetensors", TENSORS)
    return weird_tmp_path


def make_sharded(folder: Path, **weight_map: str) -> None:
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "one.safetensors", {"a": TENSORS["a"]})
    write_safetensors(folder / "two.safetensors", {"b": TENSORS["b"]})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"} | weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_single_file(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.weight_bytes == 74
    b = checkpoint.tensors["b"]
    assert (b.file, b.dtype, b.shape, b.num_bytes) == ("model.safetensors", "BF16", (7,), 14)
    content = (folder / "model.safetensors").read_bytes()
    assert content[b.offset : b.offset + b.num_bytes] == bytes(range(14))


def test_headers_agree_with_the_safetensors_library(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {f"t{i}": torch.randn(i + 1, 3).to(torch.float16 if i % 2 else torch.float32) for i in range(9)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    found = open_checkpoint(str(tmp_path)).tensors
    content = (tmp_path / "model.safetensors").read_bytes()
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        info = found[name]
        assert info.shape == tuple(tensor.shape)
        assert content[info.offset : info.offset + info.num_bytes] == tensor.numpy().tobytes()


def test_several_files(folder: Path) -> None:
    make_sharded(folder)
    tensors = open_checkpoint(str(folder)).tensors
    assert {name: info.file for name, info in tensors.items()} == {"a": "one.safetensors", "b": "two.safetensors"}


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, 2, (2,)),
        ({"eos_token_id": [5, 7]}, 2, (5, 7)),
        ({"eos_token_id": 0}, 2, (0,)),
        ({"eos_token_id": None}, [3], (3,)),
        ({}, None, ()),
        ({"eos_token_id": True}, 4, (4,)),
    ],
)
def test_end_of_sequence_ids(folder: Path, generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], "eos_token_id": config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert open_checkpoint(str(folder)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.float16"}, "float16"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({}, "float32"),  # most bytes
    ],
)
def test_dtype(folder: Path, config: dict[str, Any], expected: str) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["X"], **config}))
    assert open_checkpoint(str(folder)).dtype == expected


def test_the_digest_follows_content_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    first = open_checkpoint(str(folder)).digest()
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert open_checkpoint(str(moved)).digest() == first
    (moved / "README.md").write_text("words")
    assert open_checkpoint(str(moved)).digest() == first
    changed = dict(TENSORS, a=("F32", [3, 5], bytes(59) + b"\1"))
    write_safetensors(moved / "model.safetensors", changed)
    second = open_checkpoint(str(moved)).digest()
    (moved / "tokenizer.json").write_text("{}")
    third = open_checkpoint(str(moved)).digest()
    assert len({first, second, third}) == 3


def test_the_digest_of_a_large_file_sees_its_header_ends_and_samples(folder: Path) -> None:
    size = 16 << 20
    write_safetensors(folder / "model.safetensors", {"a": ("U8", [size], bytes(size))})
    before = open_checkpoint(str(folder)).digest()
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert open_checkpoint(str(folder)).digest() != before


def test_links_of_a_hub_cache_are_followed_and_others_are_not(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        (blobs / f"blob-{file.name}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / f"blob-{file.name}")
    assert open_checkpoint(str(snapshot)).weight_bytes == 74
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(CheckpointError, match="outside the model folder"):
        open_checkpoint(str(snapshot))


def test_sentence_transformers_files(folder: Path) -> None:
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in
               (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_cls_token": false, "pooling_mode_lasttoken": true}')
    sentence = open_checkpoint(str(folder)).sentence
    assert sentence is not None
    assert (sentence.pooling, sentence.normalize, sentence.max_seq_length) == ("last", True, 256)
    pooling.write_text('{"pooling_mode_mean_sqrt_len_tokens": true}')
    with pytest.raises(CheckpointError, match="pools by mean_sqrt_len_tokens; expected one of cls, mean, max, last"):
        open_checkpoint(str(folder))
    (folder / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(CheckpointError, match="has Dense; expected Transformer, Pooling"):
        open_checkpoint(str(folder))


def _config(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


def _weights(**entry: Any) -> Callable[[Path], None]:
    sound = {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]}
    return lambda folder: write_safetensors(folder / "model.safetensors", TENSORS, a={**sound, **entry})


def _raw(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(content) and None


def _index(**weight_map: Any) -> Callable[[Path], None]:
    return lambda folder: make_sharded(folder, **weight_map)


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _append(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")


def _missing_file(folder: Path) -> None:
    make_sharded(folder)
    (folder / "two.safetensors").unlink()


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_index(folder: Path) -> None:
    make_sharded(folder)
    (folder / "model.safetensors.index.json").unlink()


def _twice(folder: Path) -> None:
    make_sharded(folder)
    write_safetensors(folder / "two.safetensors", {"b": TENSORS["b"], "c": TENSORS["b"]})
    write_safetensors(folder / "one.safetensors", {"a": TENSORS["a"], "c": TENSORS["b"]})


def _link_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


UNSOUND: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json .it holds model\.safetensors."),
    "config is not JSON": (_config("{"), r"config\.json: is not valid JSON"),
    "config is a list": (_config("[]"), "holds a list; expected a JSON object"),
    "config is nested without end": (_config("[" * 100_000), r"config\.json: is not valid JSON"),
    "no architectures": (_config('{"model_type": "llama"}'), "architectures is None; expected a list .* 'llama'"),
    "layers without end": (
        _config('{"architectures": ["X"], "num_hidden_layers": 2147483648}'),
        "num_hidden_layers is 2,147,483,648; expected at most 4,096",
    ),
    "experts without end": (
        _config('{"architectures": ["X"], "text_config": {"num_experts": 1e30}}'),
        "num_experts is .*; expected at most 4,096",
    ),
    "empty architectures": (_config('{"architectures": []}'), r"architectures is \[\]"),
    "architectures of numbers": (_config('{"architectures": [1]}'), r"architectures is \[1\]"),
    "index leads up": (_index(a="../one.safetensors"), "names the file '../one.safetensors'; expected a name inside"),
    "index leads away": (_index(a="/etc/passwd"), "names the file '/etc/passwd'"),
    "index leads up by backslash": (_index(a="..\\x"), "expected a name inside the folder"),
    "index of numbers": (_index(a=1), "weight_map is missing or not a map of names"),
    "index names a tensor that is not there": (
        _index(c="one.safetensors"),
        "1 tensors are not in the files .*c is not in one",
    ),
    "index disagrees with the files": (_index(a="two.safetensors"), "a is not in two.safetensors"),
    "a tensor in two files": (_twice, "tensor c is in one.safetensors and in two.safetensors"),
    "shard missing": (_missing_file, r"1 of 2 weight files are missing .two\.safetensors."),
    "no index": (_no_index, r"has 2 safetensors files and no model\.safetensors\.index\.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "pickle": (_pickle, r"weights are pickles .pytorch_model\.bin., which can run any code"),
    "link out of the folder": (_link_out, "is a link to .*, outside the model folder"),
    "empty file": (_raw(b""), "0 bytes with a header of unknown length"),
    "git-lfs pointer": (_raw(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "header longer than the file": (_raw(struct.pack("<Q", 1000) + b"{}"), "a header of 1,000 bytes"),
    "header of exabytes": (_raw(struct.pack("<Q", 1 << 62) + b"{}"), "expected a complete safetensors file"),
    "header is not JSON": (_raw(struct.pack("<Q", 4) + b"{]{]"), "header is not valid JSON"),
    "header names a tensor twice": (
        _raw(struct.pack("<Q", 18) + b'{"a":  1, "a":  2}'),
        "the name 'a' appears twice",
    ),
    "truncated data": (_truncate, "tensor b: ends at byte .* of a file of"),
    "more data than the header says": (_append, "where its header accounts for"),
    "shape too large": (_weights(shape=[3, 6]), r"tensor a: F32 of shape \[3, 6\] in 60 bytes; expected 72"),
    "shape of petabytes": (_weights(shape=[1 << 40, 1 << 40]), "tensor a: F32 of shape"),
    "negative shape": (_weights(shape=[-3, -5]), r"has shape \[-3, -5\]"),
    "shape of text": (_weights(shape=["3", 5]), "expected sizes and two offsets"),
    "shape of booleans": (_weights(shape=[True]), "expected sizes and two offsets"),
    "unknown dtype": (_weights(dtype="F31"), "has dtype 'F31'; expected one of F64"),
    "offsets backwards": (_weights(data_offsets=[60, 0]), "tensor a: F32"),
    "three offsets": (_weights(data_offsets=[0, 30, 60]), "two offsets"),
    "tensors overlap": (_weights(shape=[7], dtype="BF16", data_offsets=[60, 74]), "leaves a hole|overlaps"),
    "entry is a number": (
        lambda f: write_safetensors(f / "model.safetensors", TENSORS, a=3),
        "tensor a: has dtype None",
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_folders_are_refused_by_name(folder: Path, case: str) -> None:
    damage, message = UNSOUND[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(folder))
    assert str(folder) in str(caught.value)


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; expected a folder"):
        open_checkpoint(str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file; expected a folder"):
        open_checkpoint(str(tmp_path / "file"))


def test_without_weights_only_the_description_is_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert open_checkpoint(str(folder), weights=False).tensors == {}
