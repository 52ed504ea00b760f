"""Plug-ins by file name: the modules of a package are what can be chosen. No registry, no list to edit."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
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


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.loader is None or not hasattr(spec.loader, "get_source"):
        return ""
    return spec.loader.get_source(module) or ""
