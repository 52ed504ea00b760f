"""A model folder as it lies on disk: config.json, tensor headers, end-of-sequence ids. Reads no weights.

Everything in the folder is data of unknown origin: sizes are bounded, paths may not leave the folder, headers are
checked against the files before anything is allocated. Tensors themselves are read by engines/weights.py.

Source of the file format: https://huggingface.co/docs/safetensors (header: 8-byte little-endian length, JSON; offsets
count from the end of the header; limit of 100 MB as in the reference implementation).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from engines.api import CheckpointError

MAX_HEADER_BYTES = 100_000_000
MAX_JSON_BYTES = 256 << 20
ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOAT_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLE_BYTES = 1 << 16
_NUM_SAMPLES = 32


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and what it is, from a safetensors header that was checked against its file."""

    file: str
    """Relative to the model folder."""
    dtype: str
    """As the format spells it: "BF16", "F32", "I32", "F8_E4M3" ..."""
    shape: tuple[int, ...]
    offset: int
    """First byte, from the start of the file."""
    num_bytes: int


@dataclass(frozen=True)
class SentenceConfig:
    """What a checkpoint's sentence-transformers files say about turning hidden states into one vector."""

    pooling: str
    """cls, mean, max or last."""
    normalize: bool
    max_seq_length: int | None
    """Longer inputs are cut to this many tokens."""


COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts")
MAX_COUNT = 4096


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that can be opened: its files are there, of the right sizes, and inside the folder."""

    path: str
    config: dict[str, Any]
    """config.json"""
    architecture: str
    """The first of config.json's `architectures`."""
    generation_config: dict[str, Any]
    """generation_config.json; empty when there is none."""
    tensors: dict[str, TensorInfo]
    sentence: SentenceConfig | None = None
    """None when the folder has no modules.json."""

    def __post_init__(self) -> None:
        _check_counts(self.path, self.config)

    @property
    def dtype(self) -> str:
        """float32, float16, bfloat16 ...: what config.json says, else the float type that most bytes are in."""
        for config in (self.config, _text_config(self.config)):
            said = config.get("dtype") or config.get("torch_dtype")
            if isinstance(said, str) and said != "auto":
                return said.removeprefix("torch.")
        weight: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype in FLOAT_DTYPES:
                weight[FLOAT_DTYPES[tensor.dtype]] += tensor.num_bytes
        return max(weight, key=lambda name: weight[name]) if weight else "float32"

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def quantization(self) -> dict[str, Any] | None:
        """config.json's quantization_config, or None for plain weights."""
        for config in (self.config, _text_config(self.config)):
            for key in ("quantization_config", "compression_config"):
                if isinstance(config.get(key), dict):
                    return dict(config[key])
        return None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: generation_config.json's, else config.json's; () when neither says."""
        for config in (self.generation_config, self.config, _text_config(self.config)):
            said = config.get("eos_token_id")
            ids = said if isinstance(said, list) else [said]
            found = tuple(token for token in ids if isinstance(token, int) and not isinstance(token, bool))
            if found:
                return found
        return ()

    def digest(self) -> str:
        """Identity of the model by content, 32 hexadecimal digits; the folder's name and times do not matter.

        Covers every JSON, tokenizer and template file, each weight file's size and header, and its bytes: all of a
        small file, samples spread over a large one.
        """
        folder = Path(self.path)
        state = hashlib.blake2b(digest_size=16)
        for file in _identity_files(folder):
            _feed(state, file.relative_to(folder).as_posix().encode(), file.read_bytes())
        for name in sorted({tensor.file for tensor in self.tensors.values()}):
            _feed(state, name.encode(), _content_sample(folder / name))
        return state.hexdigest()


def open_checkpoint(path: str, weights: bool = True) -> Checkpoint:
    """The checkpoint in a local folder. weights=False: without looking at weight files, which may be absent.

    Raises CheckpointError for a folder that is missing or incomplete, a file that is damaged, lies about its sizes or
    points outside the folder, and for weights that are pickles.
    """
    folder = Path(path)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{path}: {found}; expected a folder with config.json and *.safetensors; check the path of the model"
        )
    config = _read_json(folder, "config.json")
    if config is None:
        raise CheckpointError(
            f"{path}: has no config.json (it holds {_listing(folder)}); expected a model folder as Hugging Face's "
            "save_pretrained writes it; point at the folder that has config.json"
        )
    generation_config = _read_json(folder, "generation_config.json") or {}
    tensors = _tensors(folder) if weights else {}
    architecture = _architecture(folder, config)
    return Checkpoint(str(folder), config, architecture, generation_config, tensors, _sentence_config(folder))


def _check_counts(folder: str, config: dict[str, Any]) -> None:
    """Numbers that code loops over, before any does."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in COUNTS:
            found = part.get(key)
            if isinstance(found, int | float) and found > MAX_COUNT:
                raise CheckpointError(
                    f"{folder}: config.json: {key} is {found:,}; expected at most {MAX_COUNT:,}; "
                    "is this the model's own config.json?"
                )


def inside(folder: Path, name: str) -> Path:
    """The file of that relative name, once it is sure that neither the name nor a symlink leads out of the folder.

    A hub cache keeps files in `blobs` beside `snapshots/<revision>`: links from the one to the other are allowed.
    """
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name or not parts.parts:
        raise CheckpointError(
            f"{folder}: names the file {name!r}; expected a name inside the folder; "
            "do not use this checkpoint unless you know who made it"
        )
    root = folder.resolve()
    target = (folder / name).resolve()
    if not any(target.is_relative_to(allowed) for allowed in (root, *hub_blobs(root))):
        raise CheckpointError(
            f"{folder / name}: is a link to {target}, outside the model folder; expected a file inside it; "
            "copy the file into the folder if it is meant to be there"
        )
    return target


def hub_blobs(folder: Path) -> list[Path]:
    """Where a hub cache keeps the files that a folder `snapshots/<revision>` of it has links to; else nothing.

    Source: huggingface_hub's guide "Understand caching".
    """
    snapshots = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    return [] if snapshots is None else [snapshots.parent / "blobs"]


def _read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON object, or None when there is no such file."""
    value = _parse(folder, name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(
            f"{folder / name}: holds a {type(value).__name__}; expected a JSON object; download the file again"
        )
    return value


def _read_json_list(folder: Path, name: str) -> list[Any] | None:
    value = _parse(folder, name)
    if value is not None and not isinstance(value, list):
        raise CheckpointError(
            f"{folder / name}: holds a {type(value).__name__}; expected a JSON list; download the file again"
        )
    return value


def _parse(folder: Path, name: str) -> Any:
    """The value in a JSON file, or None when there is no such file."""
    file = inside(folder, name)
    if not file.is_file():
        return None
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{folder / name}: is {size:,} bytes; expected at most {MAX_JSON_BYTES:,}; is this the right file?"
        )
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / name}: is not valid JSON ({error}); expected an object; download the file again"
        ) from None


POOLING_MODES = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "lasttoken": "last"}


def _sentence_config(folder: Path) -> SentenceConfig | None:
    """Pooling, normalization and length as sentence-transformers reads them (modules.json and what it points at).

    Raises CheckpointError for modules besides transformer, pooling and normalization: the vectors would be others.
    """
    modules = _read_json_list(folder, "modules.json")
    if modules is None:
        return None
    kinds = {str(module.get("type", "")).rpartition(".")[2]: module for module in modules if isinstance(module, dict)}
    others = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    if others or "Pooling" not in kinds:
        raise CheckpointError(
            f"{folder / 'modules.json'}: has {', '.join(others) or 'no Pooling'}; expected Transformer, Pooling and "
            "perhaps Normalize; other modules of sentence-transformers are not supported"
        )
    name = f"{kinds['Pooling'].get('path', '1_Pooling')}/config.json"
    pooling = _read_json(folder, name) or {}
    modes = [key.removeprefix("pooling_mode_") for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
    if isinstance(pooling.get("pooling_mode"), str):
        modes = [pooling["pooling_mode"]]
    named = [POOLING_MODES.get(mode, mode if mode in POOLING_MODES.values() else None) for mode in modes]
    if len(named) != 1 or named[0] is None:
        raise CheckpointError(
            f"{folder / name}: pools by {', '.join(modes) or 'nothing'}; expected one of "
            f"{', '.join(POOLING_MODES.values())}; set task.pooling only if you know that the model allows it"
        )
    length = (_read_json(folder, "sentence_bert_config.json") or {}).get("max_seq_length")
    return SentenceConfig(named[0], "Normalize" in kinds, length if isinstance(length, int) else None)


def _architecture(folder: Path, config: dict[str, Any]) -> str:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict):
        for key in ("AutoModelForCausalLM", "AutoModel"):
            if isinstance(auto_map.get(key), str):
                return auto_map[key].rpartition(".")[2]
    raise CheckpointError(
        f"{folder / 'config.json'}: architectures is {architectures!r}; expected a list with one class name, as "
        f'["LlamaForCausalLM"]; add it (model_type here is {config.get("model_type")!r})'
    )


def _tensors(folder: Path) -> dict[str, TensorInfo]:
    if inside(folder, "model.safetensors").is_file():
        return _read_header(folder, "model.safetensors")
    index = _read_json(folder, "model.safetensors.index.json")
    if index is not None:
        return _sharded(folder, index)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(files) == 1:
        return _read_header(folder, files[0])
    if files:
        raise CheckpointError(
            f"{folder}: has {len(files)} safetensors files and no model.safetensors.index.json; expected the index "
            "that says which tensor is in which file; download it as well"
        )
    raise CheckpointError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"))
    pickles = [name for name in pickles if name != "training_args.bin"]
    if pickles:
        return (
            f"{folder}: the weights are pickles ({', '.join(pickles[:3])}), which can run any code when they are "
            "opened; expected *.safetensors; take a revision that has them or convert the checkpoint where you trust it"
        )
    return (
        f"{folder}: has no weights (it holds {_listing(folder)}); expected model.safetensors, or several files and "
        "model.safetensors.index.json; download the model again"
    )


def _listing(folder: Path) -> str:
    found = sorted(file.name for file in folder.iterdir())
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "") if found else "nothing"


def _sharded(folder: Path, index: dict[str, Any]) -> dict[str, TensorInfo]:
    where = folder / "model.safetensors.index.json"
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(
            f"{where}: weight_map is missing or not a map of names; expected tensor name -> file; download it again"
        )
    files = sorted(set(weight_map.values()))
    absent = [name for name in files if not inside(folder, name).is_file()]
    if absent:
        raise CheckpointError(
            f"{where}: {len(absent)} of {len(files)} weight files are missing ({', '.join(absent[:3])}); expected all "
            "of them in the same folder; download the model again"
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in _read_header(folder, file).items():
            if weight_map.get(name, file) != file:
                continue
            if name in tensors:
                raise CheckpointError(
                    f"{where}: tensor {name} is in {tensors[name].file} and in {file}, and the index does not say "
                    "which one counts; expected one place for each tensor; download the model again"
                )
            tensors[name] = info
    lost = [name for name in weight_map if name not in tensors]
    if lost:
        raise CheckpointError(
            f"{where}: {len(lost)} tensors are not in the files that the index names ({lost[0]} is not in "
            f"{weight_map[lost[0]]}); expected index and files of one checkpoint; download the model again"
        )
    return tensors


def _read_header(folder: Path, name: str) -> dict[str, TensorInfo]:
    where = folder / name
    file = inside(folder, name)
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if length < 2 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{where}: {size:,} bytes with a header of {'unknown length' if length < 0 else f'{length:,} bytes'}; "
                "expected a complete safetensors file; download it again (git-lfs pointers need `git lfs pull`)"
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: its header is not valid JSON ({error}); expected a safetensors file; download it again"
        ) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{where}: its header is not an object; expected a safetensors file; download it again")
    begin = 8 + length
    tensors = {
        tensor: _tensor_info(f"{where}: tensor {tensor}", name, entry, begin, size)
        for tensor, entry in header.items()
        if tensor != "__metadata__"
    }
    _check_layout(where, tensors, begin, size)
    return tensors


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        name = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the name {name!r} appears twice")
    return result


def _tensor_info(where: str, file: str, entry: Any, begin: int, size: int) -> TensorInfo:
    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise CheckpointError(
            f"{where}: has dtype {dtype!r}; expected one of {', '.join(ITEM_BITS)}; a newer safetensors wrote it"
        )
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{where}: has shape {shape!r} and data_offsets {offsets!r}; expected sizes and two offsets; "
            "download the file again"
        )
    first, last = offsets
    bits = math.prod(shape) * ITEM_BITS[dtype]
    if last < first or (last - first) * 8 != bits:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} in {last - first:,} bytes; expected {-(-bits // 8):,}; "
            "download the file again"
        )
    if begin + last > size:
        raise CheckpointError(
            f"{where}: ends at byte {begin + last:,} of a file of {size:,}; expected a complete file; download it again"
        )
    return TensorInfo(file, dtype, tuple(shape), begin + first, last - first)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_layout(where: Path, tensors: dict[str, TensorInfo], begin: int, size: int) -> None:
    """Tensors lie end to end and fill the file, as the format demands: no byte is shared, none is unaccounted for."""
    end = begin
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if info.offset != end:
            what = "overlaps the one before it" if info.offset < end else "leaves a hole before it"
            raise CheckpointError(
                f"{where}: tensor {name} at byte {info.offset:,} {what}; expected it at {end:,}; download it again"
            )
        end += info.num_bytes
    if end != size:
        raise CheckpointError(
            f"{where}: {size:,} bytes where its header accounts for {end:,}; expected them equal; "
            "download the file again"
        )


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else {}


def _identity_files(folder: Path) -> list[Path]:
    """Files besides the weights that can change a result: configuration, tokenizer, templates, pooling."""
    found = [f for f in folder.iterdir() if f.suffix in (".json", ".jinja", ".model", ".tiktoken", ".py")]
    found += [folder / name for name in ("merges.txt", "vocab.txt")]
    found += folder.glob("*/config.json")
    return sorted(inside(folder, f.relative_to(folder).as_posix()) and f for f in found if f.is_file())


def _feed(state: Any, *parts: bytes) -> None:
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)


def _content_sample(file: Path) -> bytes:
    """Size, header and evenly spread samples of a weight file; the whole of a small one."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _SAMPLE_BYTES * _NUM_SAMPLES:
            return stream.read()
        length = struct.unpack("<Q", stream.read(8))[0]
        pieces = [size.to_bytes(8, "little"), stream.read(length)]
        for i in range(_NUM_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * i // (_NUM_SAMPLES - 1))
            pieces.append(stream.read(_SAMPLE_BYTES))
    return b"".join(pieces)
