"""How many devices a job takes, and what each of them does."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from engines.api import Role
from engines.models.spec import DecoderSpec
from engines.parallel.place import Place, held_spec
from engines.parallel.world import Launch, world
from runner.errors import ConfigError

if TYPE_CHECKING:
    from runner.config import JobConfig


@dataclass(frozen=True)
class Layout:
    """tp * dp devices, in engines of max(tp, ep) devices each.

    A copy of the model takes tp devices, dp copies take tp * dp. ep adds none, as experts are spread over the same
    devices. With ep <= tp each copy has experts of its own and is an engine. With ep > tp, ep / tp copies share one set
    of experts and are one engine: tp=2, dp=2, ep=4 is one engine of 4 devices; tp=2, dp=4, ep=4 is two.

    Of these engines the first `prefill` compute prompts, and the others go on with them; 0: each does all of its rows.
    """

    tp: int
    dp: int
    ep: int
    prefill: int = 0

    @property
    def num_devices(self) -> int:
        return self.tp * self.dp

    @property
    def devices_per_engine(self) -> int:
        return max(self.tp, self.ep)

    @property
    def num_engines(self) -> int:
        return self.num_devices // self.devices_per_engine

    def place(self, device: int) -> tuple[int, Place]:
        """(engine, place in it) of a device, both counted from 0: an engine's devices are neighbours."""
        engine, rank = divmod(device, self.devices_per_engine)
        return engine, Place(rank, self.tp, self.ep)

    def role(self, engine: int) -> Role:
        """What an engine does."""
        if not self.prefill:
            return "hybrid"
        return "prefill" if engine < self.prefill else "decode"

    def devices(self, engine: int) -> tuple[int, ...]:
        """Of one engine."""
        first = engine * self.devices_per_engine
        return tuple(range(first, first + self.devices_per_engine))

    def text(self, spec: DecoderSpec | None) -> str:
        """What is spread, and over how many, for a person. spec: of the model, where it is known."""
        each = f"{self.num_devices} devices"
        if self.num_engines > 1:
            each += f" in {self.num_engines} engines"
        if self.prefill:
            each += (
                f", {self.prefill} of role prefill, which compute prompts and hand their keys and values over, and "
                f"{self.num_engines - self.prefill} of role decode, which go on with them"
            )
        if spec is None or self.devices_per_engine == 1:
            return f"{each}; each holds the whole model" if self.devices_per_engine == 1 else each
        held = held_spec(spec, Place(0, self.tp, self.ep))
        parts = [f"{held.num_attention_heads} of {spec.num_attention_heads} heads"]
        if spec.mla is None:
            parts.append(f"{held.num_key_value_heads} of {spec.num_key_value_heads} KV heads")
        if spec.moe is None or spec.moe.dense_layers:
            parts.append(f"{held.intermediate_size:,} of {spec.intermediate_size:,} intermediate features")
        if spec.moe is not None and held.moe is not None:
            parts.append(f"{held.moe.num_experts} of {spec.moe.num_experts} experts")
            if held.moe.moe_intermediate_size < spec.moe.moe_intermediate_size:
                parts[-1] += (
                    f" ({held.moe.moe_intermediate_size:,} of their {spec.moe.moe_intermediate_size:,} features)"
                )
        parts.append(f"{held.vocab_size:,} of {spec.vocab_size:,} tokens of the vocabulary")
        return f"{each}; a device holds {', '.join(parts)}, and all norms" + (", routers" if spec.moe else "")


def findings(tp: int, dp: int, ep: int, prefill: int = 0) -> Iterator[str]:
    """Why sizes do not go together, with the arithmetic."""
    engines = Layout(tp, dp, ep).num_engines
    if prefill and ep > tp:
        yield (
            f"parallelism.prefill: {prefill} with ep={ep}: {ep} / {tp} = {ep // tp} copies share experts and compute "
            "each step together; expected prefill=0, or ep at most tp; lower one of them"
        )
    elif prefill and prefill >= engines:
        yield (
            f"parallelism.prefill: {prefill}; expected less than the engines that there are, tp * dp / max(tp, ep) = "
            f"{tp} * {dp} / {max(tp, ep)} = {engines}, as one at least must go on with what prefill ones hand over; "
            "raise dp or lower it"
        )
    if tp * dp % ep:
        yield (
            f"parallelism.ep: {ep}; expected a divisor of tp * dp = {tp} * {dp} = {tp * dp}, the devices that experts "
            "are spread over; correct it"
        )
    elif ep < tp and tp % ep:
        yield (
            f"parallelism.ep: {ep}; expected a divisor of tp, or a multiple of it: {tp} / {ep} leaves {tp % ep}; "
            "correct it"
        )
    elif ep > tp and ep % tp:
        yield (
            f"parallelism.ep: {ep}; expected a multiple of tp, as copies of the model share experts as a whole: "
            f"{ep} / {tp} leaves {ep % tp}; correct it"
        )


def layout_of(job: JobConfig) -> Layout:
    """What the configuration asks for."""
    asked = job.parallelism
    return Layout(asked.tp, asked.dp, asked.ep, asked.prefill)


def own_rank(job: JobConfig) -> int:
    """This process's among those that srun or torchrun has started; 0, who does the job, where none has.

    Raises ConfigError when they are not as many as the job has devices.
    """
    launch = job.parallelism.launch
    if launch == "spawn" or job.mode != "run":
        return 0
    try:
        here = world(cast(Launch, launch), os.environ)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    layout = layout_of(job)
    if here.size != layout.num_devices:
        raise ConfigError(
            f"parallelism.launch: {launch} has started {here.size} processes; expected tp * dp = {layout.tp} * "
            f"{layout.dp} = {layout.num_devices}, one for each device; correct one of the two"
        )
    return here.rank


def visible_devices(devices: Sequence[int], seen: str | None) -> str:
    """CUDA_VISIBLE_DEVICES, or its like, of a process that is to see only some of those that its parent sees.

    seen: the parent's own value; None: it sees all.
    """
    names = None if seen is None else [name.strip() for name in seen.split(",") if name.strip()]
    return ",".join(str(device) if names is None else names[device] for device in devices)
