"""Which installed libraries compute which ops of an engine: a part of the plan."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from engines.api import EngineConfig, Requirement
from engines.capability import difference
from engines.platform import Host


@dataclass(frozen=True)
class Libraries:
    ops: dict[str, str] = field(default_factory=dict)
    """Op -> library."""
    missed: list[str] = field(default_factory=list)
    """Why a library that was asked for by name cannot be had."""
    notes: list[str] = field(default_factory=list)
    """What of the engine's attention is a library's, and why an installed one is not taken."""


def libraries_of(
    engine: str, config: EngineConfig, needed: Sequence[Requirement], host: Host, invariant: bool
) -> Libraries:
    """The first library, of those that are installed or the one that is asked for, that has all that an op needs."""
    module = importlib.import_module(f"engines.{engine}.offers")
    wanted = getattr(config, "attention", "auto")
    if not hasattr(module, "library_offers") or wanted == "own":
        return Libraries()
    offers = {
        name: offer
        for name, offer in module.library_offers(host).items()
        if wanted == name or (wanted == "auto" and not any(b.endswith("is not installed") for b in offer.blockers))
    }
    found, asked = Libraries(), [need for need in needed if need.op.endswith("_attention")]
    for need in asked:
        whole = Requirement(need.op, {**need.attributes, "invariant": invariant})
        reasons = {name: difference([whole], offer) for name, offer in offers.items()}
        taken = next((name for name, texts in reasons.items() if not texts), None)
        if taken is not None:
            found.ops[need.op] = taken
            found.notes.append(f"{need.op} of prompts: {taken}, which is installed (backend_config.attention)")
        elif wanted != "auto":
            found.missed.extend(f"backend_config.attention={wanted}: {text}" for text in reasons[wanted])
        else:
            found.notes.extend(
                f"{text}: the engine's own kernel is used" for texts in reasons.values() for text in texts
            )
    if not asked and wanted != "auto":
        found.missed.append(f"backend_config.attention={wanted}: not for models that run through transformers")
    return found
