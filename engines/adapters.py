"""LoRA adapters as PEFT writes them: a folder with adapter_config.json and adapter_model.safetensors.

    base_model.model.<module>.lora_A.weight  [rank, in_features]
    base_model.model.<module>.lora_B.weight  [out_features, rank]

What an adapter adds is scale * B @ A @ x, scale = lora_alpha / rank, or / sqrt(rank) with use_rslora. Source:
github.com/huggingface/peft, tuners/lora/layer.py and utils/save_and_load.py. Importable without torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.api import CheckpointError, UnsupportedModelError
from engines.checkpoint import inside

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None), "lora_bias": (False, None),
    "fan_in_fan_out": (False, None), "modules_to_save": (None, []), "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}  # fmt: skip
"""Values of adapter_config.json that mean a plain adapter of linear layers."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin training (init_lora_weights) after which the base model's own weights are not the published ones."""


def digest(folder: str) -> str:
    """Identity of an adapter by content, 32 hexadecimal digits. Raises CheckpointError for a missing file."""
    state = hashlib.blake2b(digest_size=16)
    for name in (CONFIG, WEIGHTS):
        state.update(_file(folder, name).read_bytes())
    return state.hexdigest()


@dataclass
class Adapter:
    """One folder, read as the model asks for its parts."""

    name: str
    folder: str
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        from safetensors.torch import load_file

        try:
            self.config = json.loads(_file(self.folder, CONFIG).read_bytes())
            self.tensors: dict[str, Tensor] = load_file(_file(self.folder, WEIGHTS))
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.folder}: cannot be read ({error}); expected an adapter as PEFT's save_pretrained writes it; "
                "save it again"
            ) from None
        self._check()

    def _check(self) -> None:
        """Raises UnsupportedModelError for what is no plain LoRA of linear layers."""
        odd = {key: self.config[key] for key, fine in NEUTRAL.items() if self.config.get(key, fine[0]) not in fine}
        start = self.config.get("init_lora_weights")
        if isinstance(start, str) and start.startswith(CHANGES_BASE):
            odd["init_lora_weights"] = start
        if odd:
            raise UnsupportedModelError(
                f"model.adapters.{self.name}: {CONFIG} has {', '.join(f'{k}={v!r}' for k, v in odd.items())}; expected "
                "plain LoRA of linear layers; merge this adapter into the checkpoint"
            )

    def read(self, module: str, in_features: int, out_features: int) -> tuple[Tensor, Tensor] | None:
        """(A [rank, in], scale * B [out, rank]), both float32; None where the adapter leaves the module alone."""
        names = [f"{PREFIX}{module}.lora_{which}.weight" for which in ("A", "B")]
        if not any(name in self.tensors for name in names):
            return None
        self.taken.update(names)
        a, b = (self.tensors.get(name) for name in names)
        shapes = [None if t is None else list(t.shape) for t in (a, b)]
        if a is None or b is None or [[len(a), in_features], [out_features, len(a)]] != shapes:
            raise CheckpointError(
                f"{self.folder}: lora_A and lora_B of {module} are {shapes}; expected [rank, {in_features}] and "
                f"[{out_features}, rank]; is this an adapter of the model?"
            )
        return a.float(), b.float() * self._scale(module, len(a))

    def _scale(self, module: str, rank: int) -> float:
        """Source: PEFT's get_pattern_key: a pattern is matched against the end of a module's name."""
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))


class Adapters:
    """Those of one job; a token names one by its place in `names`."""

    def __init__(self, folders: Mapping[str, str]) -> None:
        """Raises CheckpointError or UnsupportedModelError for a folder that cannot be used."""
        self.names = tuple(folders)
        self._adapters = [Adapter(name, folder) for name, folder in folders.items()]

    def read(
        self, modules: list[tuple[str, int]], in_features: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """(a, b) as the op `lora` takes them, for projections of one input that are multiplied as one.

        modules: (stored name, output features) of each. None where no adapter has any of them. Each module has its own
        rows of a and its own columns of b; adapters of a lower rank than others are filled up with zeros.
        """
        import torch

        found = [[adapter.read(name, in_features, rows) for name, rows in modules] for adapter in self._adapters]
        ranks = [max((len(each[i][0]) for each in found if each[i]), default=0) for i in range(len(modules))]  # type: ignore[index]
        if not sum(ranks):
            return None
        a = torch.zeros(len(found), sum(ranks), in_features, dtype=dtype)
        b = torch.zeros(len(found), sum(rows for _, rows in modules), sum(ranks), dtype=dtype)
        for adapter, pairs in enumerate(found):
            row = column = 0
            for pair, (_, rows), rank in zip(pairs, modules, ranks, strict=True):
                if pair is not None:
                    a[adapter, column : column + len(pair[0])] = pair[0]
                    b[adapter, row : row + rows, column : column + len(pair[0])] = pair[1]
                row, column = row + rows, column + rank
        return a.to(device), b.to(device)

    def check(self) -> None:
        """Raises UnsupportedModelError, once the model is built, for parts of adapters that found no place in it."""
        for adapter in self._adapters:
            left = sorted(set(adapter.tensors) - adapter.taken)
            if left:
                raise UnsupportedModelError(
                    f"model.adapters.{adapter.name}: {len(left)} of its {len(adapter.tensors)} tensors are for modules "
                    f"that take no adapter here ({', '.join(left[:3])}); expected projections of attention and of "
                    "MLPs; merge this adapter into the checkpoint"
                )


def _file(folder: str, name: str) -> Path:
    path = inside(Path(folder), name)
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: has no {name}; expected a folder with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained writes "
            "it; check the path of the adapter"
        )
    return path
