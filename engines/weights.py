"""From safetensors files to the tensors that models are made of: streamed, converted, each one taken exactly once.

A model is built twice from the same code: first on the meta device, where `Weights` compares what is asked for with
the headers and reads nothing, then for real. So all that is missing, left over or of the wrong shape is known, and told
in one message, before the first byte of a weight is read.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from engines.adapters import Adapters
from engines.api import CheckpointError, UnsupportedModelError
from engines.checkpoint import FLOAT_DTYPES, Checkpoint, inside
from engines.models.spec import CheckpointLayout, PackedModules
from engines.parallel.group import ALONE, Group

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
class Cut:
    """The features of one dimension that this rank holds."""

    total: int
    held: tuple[range, ...]
    """Runs of neighbours, in the order in which they are stored."""

    def __len__(self) -> int:
        return sum(map(len, self.held))

    def by(self, unit: int = 1) -> list[slice]:
        """Where they are in a tensor with one number for each `unit` neighbours: a scale, or a word that packs them.

        Raises UnsupportedModelError for a unit that has features of two ranks.
        """
        if unit >= self.total or len(self) == self.total:
            return [slice(None)]
        if any(run.start % unit or (run.stop % unit and run.stop != self.total) for run in self.held):
            runs = ", ".join(f"{run.start} to {run.stop}" for run in self.held)
            raise UnsupportedModelError(
                f"parallelism: features {runs} of {self.total} are a rank's, and they are stored in units of {unit}; "
                "expected a cut between units; lower tp"
            )
        return [slice(run.start // unit, -(-run.stop // unit)) for run in self.held]


def whole(total: int) -> Cut:
    return Cut(total, (range(total),))


@dataclass(frozen=True)
class LinearSource:
    """The projections of one input that are multiplied as one, by the names that the model has for them."""

    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    bias: bool = False
    groups: int = 1
    """KV heads, for checkpoints that interleave the parts by group."""
    rows: tuple[range, ...] | None = None
    """Of each projection, the output features that this rank holds; None: all."""
    columns: range | None = None
    """The input features that this rank holds; None: all. Its product is then one of the summands of the whole one, and
    one rank's has the bias."""

    @property
    def has_bias(self) -> bool:
        """Whether this rank adds what the checkpoint has of a bias."""
        return self.columns is None or self.columns.start == 0


@dataclass(frozen=True)
class StoredModule:
    """A module as the checkpoint has it, and what of it this rank holds."""

    name: str
    rows: Cut
    columns: Cut

    @property
    def shape(self) -> tuple[int, int]:
        """(output features, input features) that are held."""
        return len(self.rows), len(self.columns)


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
    group: Group = ALONE
    """The ranks that hold the model together."""
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

    def take(self, name: str, *shape: int, rows: range | None = None) -> Tensor:
        """A new tensor of that shape, in the compute dtype, on the device. rows: those to read; None: all."""
        if rows is None:
            return self.read(self.stored_name(name), shape, self.dtype)
        held = Cut(shape[0], (rows,)).by()
        return self.read(self.stored_name(name), (len(rows), *shape[1:]), self.dtype, held)

    def read(self, stored: str, shape: tuple[int, ...], dtype: torch.dtype, *held: list[slice]) -> Tensor:
        """A new tensor by the name that the checkpoint has for it. A float is converted from any float, another type
        is what is stored.

        held: of each of the first dimensions, the slices that are read, end to end; shape is what they make.
        """
        out = torch.empty(shape, dtype=dtype, device=self.device)
        self._read(stored, shape, out, *held)
        return out

    def stored(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of this name, as the checkpoint spells it."""
        return name in self.checkpoint.tensors

    def modules(self, source: LinearSource) -> tuple[list[StoredModule], Tensor | None]:
        """(the stored modules, which of their held rows, end to end, the source's rows are).

        The second is None where the order is the same.
        """
        columns = Cut(source.in_features, (source.columns or range(source.in_features),))
        rows = source.rows or tuple(map(range, source.out_features))
        packed = self._packed(source.names)
        if packed is None:
            cuts = [Cut(total, (held,)) for total, held in zip(source.out_features, rows, strict=True)]
            return [
                StoredModule(self.stored_name(f"{name}.weight").removesuffix(".weight"), cut, columns)
                for name, cut in zip(source.names, cuts, strict=True)
            ], None
        parent = source.names[0].rpartition(".")[0]
        stored = self.stored_name(f"{parent}.{packed.stored}.weight").removesuffix(".weight")
        total, groups = sum(source.out_features), source.groups if packed.grouped else 1
        per_group = [count // groups for count in source.out_features]
        parts = torch.arange(total).view(groups, -1).split(per_group, dim=1)
        wanted = torch.cat([part.flatten()[r.start : r.stop] for part, r in zip(parts, rows, strict=True)])
        in_store, order = wanted.sort()
        module = StoredModule(stored, Cut(total, _runs(in_store.tolist())), columns)
        place = order.argsort()
        return [module], None if torch.equal(in_store, wanted) else place

    def stack(self, source: LinearSource, suffix: str) -> Tensor:
        """The tensors `<name>.<suffix>`, weight or bias, of all the source's modules, one below the other, as one new
        tensor."""
        modules, order = self.modules(source)
        matrix = suffix == "weight"
        inputs = modules[0].shape[1:] if matrix else ()
        counts = [module.shape[0] for module in modules]
        out = torch.empty((sum(counts), *inputs), dtype=self.dtype, device=self.device)
        for module, piece in zip(modules, out.split(counts), strict=True):
            held = (module.rows.by(), module.columns.by()) if matrix else (module.rows.by(),)
            self._read(f"{module.name}.{suffix}", tuple(piece.shape), piece, *held)
        return out if order is None or out.is_meta else out[order.to(out.device)]

    def read_adapters(self, source: LinearSource) -> tuple[Tensor, Tensor] | None:
        """What the job's adapters add to a source, as the op `lora` takes it; None: nothing."""
        if self.adapters is None:
            return None
        modules, order = self.modules(source)
        sizes = [(module.name, module.rows.total) for module in modules]
        found = self.adapters.read(sizes, source.in_features, self.dtype, self.device)
        if found is None or (source.rows is None and source.columns is None and order is None):
            return found
        starts = itertools.accumulate((total for _, total in sizes), initial=0)
        rows = torch.tensor(
            [first + i for first, m in zip(starts, modules, strict=False) for r in m.rows.held for i in r]
        )
        rows = rows if order is None else rows[order]
        a, b = found
        columns = source.columns or range(source.in_features)
        return a[..., columns.start : columns.stop].contiguous(), b[:, rows.to(b.device)]

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

    def _read(self, name: str, shape: tuple[int, ...], out: Tensor, *held: list[slice]) -> None:
        """Fill `out` with what is held of a stored tensor, or on the meta device note why that is not possible."""
        if name in self.taken:
            raise RuntimeError(f"{name}: taken a second time; expected every tensor to have one place in the model")
        self.taken.add(name)
        info = self.checkpoint.tensors.get(name)
        if self.device.type != "meta":
            assert info is not None
            if all(slices == [slice(None)] for slices in held):
                out.copy_(self._open(info.file).get_tensor(name))
            else:
                _fill(out, self._open(info.file).get_slice(name), info.shape, held)
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


def _runs(indices: list[int]) -> tuple[range, ...]:
    """Ascending indices as runs of neighbours."""
    starts = [i for i, index in enumerate(indices) if not i or indices[i - 1] + 1 != index]
    return tuple(range(indices[a], indices[b - 1] + 1) for a, b in itertools.pairwise([*starts, len(indices)]))


def _fill(out: Tensor, stored: Any, shape: Sequence[int], held: Sequence[list[slice]]) -> None:
    """Copy slices of a safetensors file's tensor, without reading the rest, end to end into out."""
    targets: list[list[tuple[slice, slice]]] = []
    for size, slices in zip(shape, held, strict=False):
        stops = itertools.accumulate((len(range(size)[each]) for each in slices), initial=0)
        targets.append([(each, slice(a, b)) for each, (a, b) in zip(slices, itertools.pairwise(stops), strict=True)])
    for pieces in itertools.product(*targets):
        out[tuple(there for _, there in pieces)].copy_(stored[tuple(here for here, _ in pieces)])


def build(make: Callable[[Weights], Built], weights: Weights, ignored: Sequence[str] = ()) -> Built:
    """What `make` builds from the weights, once `check` has found that it takes every tensor of the checkpoint.

    Of a group, the first rank checks for all; the others wait until it has.
    """
    if weights.group.place.rank == 0:
        check(make, weights, ignored)
    weights.group.wait()
    try:
        return make(weights)
    finally:
        weights.close()


def check(make: Callable[[Weights], object], weights: Weights, ignored: Sequence[str] = ()) -> None:
    """Compare what `make` takes with what the checkpoint has, reading headers only.

    ignored: regular expressions of names, beside the layout's own. Raises CheckpointError with all that is missing,
    unexpected, of the wrong shape or type, UnsupportedModelError for parts of adapters that nothing took.
    """
    probe = replace(weights, device=torch.device("meta"), taken=set(), problems=[], group=ALONE)
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
