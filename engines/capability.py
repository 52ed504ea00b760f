"""What engines offer against what a model needs, and the difference in sentences. Data only, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.api import Requirement

Value = int | str | bool


@dataclass(frozen=True, slots=True)
class Allowed:
    """Values of one attribute of an op that an engine accepts: a set, a range, or anything."""

    values: tuple[Value, ...] = ()
    ge: int | None = None
    le: int | None = None
    multiple_of: int = 1
    anything: bool = False
    text: str = ""
    """How to say it in a sentence; empty: made from the other fields."""

    def accepts(self, value: Value) -> bool:
        if self.anything or value in self.values:
            return True
        if isinstance(value, str | bool) or (self.ge is None and self.le is None):
            return False
        low, high = self.ge or 0, self.le if self.le is not None else value
        return low <= value <= high and value % self.multiple_of == 0

    def __str__(self) -> str:
        if self.text:
            return self.text
        if self.anything:
            return "anything"
        if self.ge is None and self.le is None:
            return ", ".join(_spell(value) for value in self.values)
        what = f"multiples of {self.multiple_of}" if self.multiple_of > 1 else "values"
        low = f" from {self.ge}" if self.ge is not None else ""
        high = f" up to {self.le}" if self.le is not None else ""
        also = f", and {', '.join(map(_spell, self.values))}" if self.values else ""
        return f"{what}{low}{high}{also}"


ANYTHING = Allowed(anything=True)
YES = Allowed(values=(True, False))
DENSE_ONLY = Allowed(text="unquantized weights only")
"""For the attribute `quantization` of engines that have no quantized format."""


def one_of(*values: Value) -> Allowed:
    return Allowed(values=values)


@dataclass(frozen=True)
class Offer:
    """What one engine can do on one host. An attribute that an op does not list is one that it does not offer."""

    engine: str
    ops: Mapping[str, Mapping[str, Allowed]] = field(default_factory=dict)
    """Op -> attribute -> what it accepts. Besides ops of engines.ops: `lora`, `parallelism`, `transformers_model`."""
    blockers: tuple[str, ...] = ()
    """Why the engine cannot run on this host whatever the model: device, driver, extension."""
    sm: tuple[int, int] | None = None
    """Compute capability of the device, for `since`."""
    since: Mapping[Value, tuple[int, int]] = field(default_factory=dict)
    """Attribute value -> first compute capability that has it, as {"bfloat16": (8, 0)}."""
    stored_only: Mapping[Value, tuple[int, int]] = field(default_factory=dict)
    """Values of linear's attribute `weights` -> first compute capability that multiplies them as they are; below it
    they are turned into the compute dtype on the way to the product."""
    dequantized: frozenset[Value] = frozenset()
    """Values of linear's attribute `weights` that are turned into the compute dtype at load, with its memory."""
    kept: Mapping[str, Allowed] = field(default_factory=dict)
    """What attributes of linear must be for such weights to stay as they are all the same; {}: none do."""
    reference: frozenset[str] = frozenset()
    """Ops that run on the plain torch reference here."""
    notes: tuple[str, ...] = ()

    def dequantizes(self, attributes: Mapping[str, Value]) -> bool:
        """Whether weights with these attributes of linear are held in the compute dtype."""
        known = self.kept.keys() & attributes.keys()
        kept = bool(self.kept) and all(self.kept[name].accepts(attributes[name]) for name in known)
        return attributes.get("weights") in self.dequantized and not kept


def difference(requirements: Sequence[Requirement], offer: Offer) -> list[str]:
    """What a model needs and an engine does not offer here, one sentence each, without repetition; [] if it can run."""
    missed = [*offer.blockers, *(text for requirement in requirements for text in _too_old(requirement, offer))]
    if not (offer.blockers and not offer.ops):
        missed += [text for requirement in requirements for text in _not_offered(requirement, offer)]
    return list(dict.fromkeys(missed))


def reference_ops(requirements: Sequence[Requirement], offer: Offer) -> list[str]:
    """Ops that a model would run on the reference inside the decode step: right, but slow."""
    needed = (requirement.op for requirement in requirements if requirement.in_decode_step)
    return [op for op in dict.fromkeys(needed) if op in offer.reference]


def _too_old(requirement: Requirement, offer: Offer) -> list[str]:
    """Values that the device's generation does not have."""
    if offer.sm is None:
        return []
    first = {value: offer.since[value] for value in requirement.attributes.values() if value in offer.since}
    return [
        f"sm {offer.sm[0]}.{offer.sm[1]} < {since[0]}.{since[1]} for {_spell(value)}"
        for value, since in first.items()
        if offer.sm < since
    ]


def _not_offered(requirement: Requirement, offer: Offer) -> list[str]:
    op, offered = requirement.op, offer.ops.get(requirement.op)
    if offered is None:
        return [f"{op}: {offer.engine} does not offer it"]
    missed = []
    for attribute, value in requirement.attributes.items():
        allowed = offered.get(attribute)
        if allowed is None:
            missed.append(f"{op} {attribute}={_spell(value)}: {offer.engine} does not offer it")
        elif not allowed.accepts(value):
            missed.append(f"{op} {attribute}={_spell(value)}: {offer.engine} offers {allowed}")
            if attribute == "quantization":
                break  # what follows are details of a format that is not offered at all
    return missed


def _spell(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


AT_LOAD: Mapping[str, Mapping[str, Value]] = {
    "int8": {"weights": "w8a8"},
    "w8a16": {"weights": "w8a16", "bits": 8, "group_size": -1, "sym": True},
}
"""Formats that plain weights can be quantized to while they are loaded -> attributes as quantization_attributes has
them."""


def quantization_attributes(config: Mapping[str, Any] | None) -> dict[str, Value]:
    """The attributes of `linear` that a checkpoint's quantization_config asks for; {} for plain weights.

    Names are those of the configs that transformers writes: bits, group_size, sym, desc_act, version, format,
    activation_scheme, weight_block_size. `weights` is what op sets multiply, whatever the file's layout: w2a16, w4a16,
    w8a16 (integers with a scale for each group), w8a8 (8-bit integers on both sides), fp8, mxfp4.
    """
    if config is None:
        return {}
    method = str(config.get("quant_method", "compressed-tensors" if "config_groups" in config else "unknown"))
    if "config_groups" in config:
        method, config = "compressed-tensors", _flattened(config)
    attributes: dict[str, Value] = {"quantization": method}
    for name, keys in {
        "bits": ("bits", "w_bit"),
        "group_size": ("group_size", "q_group_size"),
        "desc_act": ("desc_act",),
        "sym": ("sym",),
        "version": ("version",),
        "format": ("format", "checkpoint_format", "fmt"),
        "activation_scheme": ("activation_scheme",),
    }.items():
        found = next((config[key] for key in keys if config.get(key) is not None), None)
        if isinstance(found, int | str | bool):
            attributes[name] = found
    tile = config.get("weight_block_size")
    if isinstance(tile, list):
        attributes["weight_block_size"] = "x".join(str(side) for side in tile)
    weights = _weights(method, attributes, config.get("type"))
    return {**attributes, "weights": weights} if weights else attributes


def _flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of compressed-tensors in the words of the others: its first group's, as a rule the only one."""
    group: Mapping[str, Any] = next(iter((config["config_groups"] or {}).values()), {})
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    flat = {
        "bits": weights.get("num_bits", 8),
        "group_size": weights.get("group_size"),
        "sym": weights.get("symmetric", True),
        "desc_act": True if weights.get("actorder") == "group" else None,
        "format": group.get("format") or config.get("format"),
        "type": weights.get("type", "int"),
        "weight_block_size": weights.get("block_structure"),
    }
    if inputs:
        flat["activation_scheme"] = "dynamic" if inputs.get("dynamic") else "static"
    return flat


def _weights(method: str, attributes: Mapping[str, Value], kind: str | None) -> str | None:
    if method in ("fp8", "mxfp4"):
        return method
    if kind == "float":
        return "fp8"
    if kind == "int" and "activation_scheme" in attributes:
        return "w8a8"
    if method in ("awq", "gptq", "compressed-tensors") and "bits" in attributes:
        return f"w{attributes['bits']}a16"
    return None
