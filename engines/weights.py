"""From safetensors files to the tensors that models are made of: streamed, converted, each one taken exactly once.

A model is built twice from the same code: first on the meta device, where `Weights` compares what is asked for with
the headers and reads nothing, then for real. So all that is missing, left over or of the wrong shape is known, and told
in one message, before the first byte of a weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from engines.adapters import Adapters
from engines.api import CheckpointError
from engines.checkpoint import FLOAT_DTYPES, Checkpoint, inside
from engines.models.spec import CheckpointLayout, PackedModules

STORED = {
    torch.float8_e4m3fn: ("F8_E4M3",),
    torch.int8: ("I8",),
    torch.uint8: ("U8",),
    torch.int32: ("I32",),
    torch.int64: ("I64", "I32"),
}
"""What a tensor that is not converted to a float may be stored as."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_SHOWN = 8
_OPEN_FILES = 2
Built = TypeVar("Built")


@dataclass(frozen=True)
class LinearSource:
    """The projections of one input that are multiplied as one, by the names that the model has for them."""

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    bias: bool = False
    groups: int = 1
    """KV heads, for checkpoints that interleave the parts by group."""


@dataclass
class Weights:
    """The tensors of one checkpoint under the names that a model asks by."""

    checkpoint: Checkpoint
    layout: CheckpointLayout
    dtype: torch.dtype
    device: torch.device
    """meta: nothing is read, and what does not fit is noted in `problems`."""
    anchor: str = "embed_tokens.weight"
    """The tensor that is looked for to find the prefix."""
    heads: tuple[str, ...] = ("lm_head", "score", "classifier")
    """Modules that stand outside the prefix."""
    adapters: Adapters | None = None
    taken: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    _files: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        anchor = self._renamed(self.anchor)
        fitting = [p for p in self.layout.prefixes if p + anchor in self.checkpoint.tensors]
        self.prefix = fitting[0] if fitting else self.layout.prefixes[0]

    def has(self, name: str) -> bool:
        return self.stored_name(name) in self.checkpoint.tensors

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a tensor that a model asks for."""
        prefix = "" if name.split(".", 1)[0] in self.heads else self.prefix
        stored = prefix + self._renamed(name)
        if stored not in self.checkpoint.tensors:
            for asked, older in self.layout.aliases:
                alias = stored.removesuffix(asked) + older
                if stored.endswith(asked) and alias in self.checkpoint.tensors:
                    return alias
        return stored

    def take(self, name: str, *shape: int) -> Tensor:
        """A new tensor of that shape, in the compute dtype, on the device."""
        return self.read(self.stored_name(name), shape, self.dtype)

    def read(self, stored: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new tensor by the name that the checkpoint has for it. A float is converted from any float, another type
        is what is stored."""
        out = torch.empty(shape, dtype=dtype, device=self.device)
        self._read(stored, shape, out)
        return out

    def stored(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of this name, as the checkpoint spells it."""
        return name in self.checkpoint.tensors

    def modules(self, source: LinearSource) -> tuple[list[tuple[str, int]], Tensor | None]:
        """([(a stored module, its output features)], which of those rows, end to end, the source's rows are).

        The second is None where the order is the same.
        """
        packed = self._packed(source.names)
        if packed is None:
            pairs = zip(source.names, source.out_features, strict=True)
            return [(self.stored_name(f"{name}.weight").removesuffix(".weight"), rows) for name, rows in pairs], None
        parent = source.names[0].rpartition(".")[0]
        total = sum(source.out_features)
        stored = self.stored_name(f"{parent}.{packed.stored}.weight").removesuffix(".weight")
        if not packed.grouped:
            return [(stored, total)], None
        per_group = [count // source.groups for count in source.out_features]
        parts = torch.arange(total).view(source.groups, -1).split(per_group, dim=1)
        return [(stored, total)], torch.cat([part.flatten() for part in parts])

    def stack(self, source: LinearSource, suffix: str, *row_shape: int) -> Tensor:
        """The tensors `<name>.<suffix>` of all the source's modules, one below the other, as one new tensor."""
        rows = source.out_features
        out = torch.empty((sum(rows), *row_shape), dtype=self.dtype, device=self.device)
        packed = self._packed(source.names)
        if packed is None:
            for name, piece in zip(source.names, out.split(list(rows)), strict=True):
                self._read(self.stored_name(f"{name}.{suffix}"), tuple(piece.shape), piece)
            return out
        parent = source.names[0].rpartition(".")[0]
        stored = self.stored_name(f"{parent}.{packed.stored}.{suffix}")
        if not packed.grouped:
            self._read(stored, tuple(out.shape), out)
            return out
        grouped = torch.empty_like(out)
        self._read(stored, tuple(out.shape), grouped)
        per_group = [count // source.groups for count in rows]
        parts = grouped.view(source.groups, sum(per_group), *row_shape).split(per_group, dim=1)
        torch.cat([part.reshape(-1, *row_shape) for part in parts], out=out)
        return out

    def read_adapters(self, source: LinearSource) -> tuple[Tensor, Tensor] | None:
        """What the job's adapters add to a source, as the op `lora` takes it; None: nothing."""
        if self.adapters is None:
            return None
        modules, order = self.modules(source)
        found = self.adapters.read(modules, source.in_features, self.dtype, self.device)
        return found if found is None or order is None else (found[0], found[1][:, order])

    def close(self) -> None:
        self._files.clear()

    def _renamed(self, name: str) -> str:
        dotted = f".{name}."
        for asked, stored in self.layout.renames:
            dotted = dotted.replace(f".{asked}.", f".{stored}.")
        return dotted.strip(".")

    def _packed(self, names: Sequence[str]) -> PackedModules | None:
        own = tuple(name.rpartition(".")[2] for name in names)
        return next((packed for packed in self.layout.packed if packed.parts == own), None)

    def _read(self, name: str, shape: tuple[int, ...], out: Tensor) -> None:
        """Fill `out` with a stored tensor, or on the meta device note why that is not possible."""
        if name in self.taken:
            raise RuntimeError(f"{name}: taken a second time; expected every tensor to have one place in the model")
        self.taken.add(name)
        info = self.checkpoint.tensors.get(name)
        if self.device.type != "meta":
            assert info is not None
            out.copy_(self._open(info.file).get_tensor(name))
        elif info is None:
            self.problems.append(f"missing: {name} {list(shape)}")
        elif info.shape != shape:
            self.problems.append(f"wrong shape: {name} is {list(info.shape)}, config.json says {list(shape)}")
        elif info.dtype not in (accepted := STORED.get(out.dtype, tuple(FLOAT_DTYPES))):
            self.problems.append(f"wrong type: {name} is {info.dtype}, expected one of {', '.join(accepted)}")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            # Mapped pages count as this process's memory until they are unmapped.
            for oldest in list(self._files)[: max(0, len(self._files) + 1 - _OPEN_FILES)]:
                del self._files[oldest]
            path = inside(Path(self.checkpoint.path), file)
            self._files[file] = safe_open(path, framework="pt", device="cpu")
        return self._files[file]


def build(make: Callable[[Weights], Built], weights: Weights, ignored: Sequence[str] = ()) -> Built:
    """What `make` builds from the weights, once `check` has found that it takes every tensor of the checkpoint."""
    check(make, weights, ignored)
    try:
        return make(weights)
    finally:
        weights.close()


def check(make: Callable[[Weights], object], weights: Weights, ignored: Sequence[str] = ()) -> None:
    """Compare what `make` takes with what the checkpoint has, reading headers only.

    ignored: regular expressions of names, beside the layout's own. Raises CheckpointError with all that is missing,
    unexpected, of the wrong shape or type, UnsupportedModelError for parts of adapters that nothing took.
    """
    probe = replace(weights, device=torch.device("meta"), taken=set(), problems=[])
    make(probe)
    checkpoint = weights.checkpoint
    patterns = [re.compile(pattern) for pattern in (*weights.layout.ignored, *ignored)]
    left = sorted(set(checkpoint.tensors) - probe.taken)
    unexpected = [name for name in left if not any(pattern.fullmatch(name) for pattern in patterns)]
    problems = [*probe.problems, *(f"unexpected: {n} {list(checkpoint.tensors[n].shape)}" for n in unexpected)]
    if problems:
        raise CheckpointError(_message(checkpoint, problems))
    if weights.adapters is not None:
        weights.adapters.check()


def _message(checkpoint: Checkpoint, problems: list[str]) -> str:
    kinds = ("missing", "wrong shape", "wrong type", "unexpected")
    shown: list[str] = []
    for kind in kinds:
        of_kind = [problem for problem in problems if problem.startswith(kind + ":")]
        shown += of_kind[:_SHOWN]
        if len(of_kind) > _SHOWN:
            shown.append(f"{kind}: {len(of_kind) - _SHOWN} more")
    return (
        f"{checkpoint.path}: its tensors are not those of a {checkpoint.architecture} with this config.json:\n  "
        + "\n  ".join(shown)
        + "\nexpected every parameter once and nothing else; is config.json from the same revision as the weights?"
    )
