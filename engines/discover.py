"""Plug-ins by file name: the modules of a package are what can be chosen. No registry, no list to edit."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import pkgutil
import re
from pathlib import Path
from types import ModuleType

_DECLARES_ARCHITECTURES = re.compile(r"^ARCHITECTURES\b", re.MULTILINE)


def names(package: str) -> list[str]:
    """Modules and sub-packages of a package whose names have no leading underscore, sorted; imports none of them."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        return []
    found = pkgutil.iter_modules(list(spec.submodule_search_locations))
    return sorted(module.name for module in found if not module.name.startswith("_"))


def modules(package: str) -> dict[str, ModuleType]:
    """The imported modules of a package by file name. Not for packages where some modules load torch: see families."""
    return {name: importlib.import_module(f"{package}.{name}") for name in names(package)}


@functools.cache
def families(package: str = "engines.models") -> dict[str, ModuleType]:
    """Model families by file name: the modules that declare ARCHITECTURES. The others may load torch."""
    return {
        name: importlib.import_module(f"{package}.{name}")
        for name in names(package)
        if _DECLARES_ARCHITECTURES.search(_source(f"{package}.{name}"))
    }


def family(architecture: str) -> ModuleType | None:
    """The family that declares an architecture (a name of config.json's `architectures`), or None.

    Raises ValueError when two families declare it.
    """
    found = [module for module in families().values() if architecture in module.ARCHITECTURES]
    if len(found) > 1:
        claims = " and ".join(module.__name__ for module in found)
        raise ValueError(f"{architecture}: declared by {claims}; expected one family; remove it from the others")
    return found[0] if found else None


def backends() -> list[str]:
    """Engines that have an offers.py, by folder name; imports nothing of them but their empty packages."""
    return [name for name in names("engines") if "offers" in names(f"engines.{name}")]


@functools.cache
def transformers_causal_architectures() -> frozenset[str]:
    """Causal language models that the installed transformers has code for, by class name.

    Read from the source of its automatic classes: importing those loads torch, which takes more than a second.
    Raises RuntimeError when the mapping is not where transformers 5 keeps it.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return frozenset()
    file = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    wanted = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if isinstance(targets[0], ast.Name) and targets[0].id == wanted and isinstance(node.value, ast.Call):
                return _second_items(ast.literal_eval(node.value.args[0]))
    raise RuntimeError(
        f"{file}: has no {wanted}; expected transformers 5; install a release that pyproject.toml allows"
    )


def _second_items(pairs: list[tuple[str, str | tuple[str, ...]]]) -> frozenset[str]:
    return frozenset(name for _, value in pairs for name in (value if isinstance(value, tuple) else (value,)))


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.loader is None or not hasattr(spec.loader, "get_source"):
        return ""
    return spec.loader.get_source(module) or ""
