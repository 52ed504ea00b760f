"""Which part of a model each rank of a group holds. Arithmetic only: the plan asks it too, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from engines.capability import AT_LOAD
from engines.models.spec import DecoderSpec, ModelSpec


@dataclass(frozen=True)
class Place:
    """One rank among the max(tp, ep) ranks that hold one engine's model.

    tp ranks hold a copy of all layers but the experts; with ep > tp there are ep / tp such copies, for different
    sequences, and one set of experts for all of them. Ranks are numbered copy by copy: rank = copy * tp + tp_rank.
    """

    rank: int = 0
    tp: int = 1
    ep: int = 1

    @property
    def size(self) -> int:
        """Ranks of the group."""
        return max(self.tp, self.ep)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def num_copies(self) -> int:
        return self.size // self.tp

    @property
    def copy(self) -> int:
        return self.rank // self.tp

    @property
    def ranks(self) -> range:
        return range(self.size)

    @property
    def copy_ranks(self) -> range:
        """Those that hold this copy."""
        return range(self.copy * self.tp, (self.copy + 1) * self.tp)

    @property
    def peers(self) -> range:
        """Those that hold the same part of the other copies, and this one."""
        return range(self.tp_rank, self.size, self.tp)

    @property
    def ranks_per_expert(self) -> int:
        """Ranks that an expert's intermediate features are split over."""
        return self.size // self.ep

    def split(self, total: int) -> range:
        """This rank's share of heads, intermediate features or tokens of the vocabulary: a run of neighbours."""
        return _share(total, self.tp_rank, self.tp)

    def kv_heads(self, total: int) -> range:
        """Like split; where there are fewer KV heads than ranks, neighbours hold the same one."""
        if total >= self.tp:
            return self.split(total)
        first = self.tp_rank * total // self.tp
        return range(first, first + 1)

    def experts(self, total: int) -> range:
        return _share(total, self.rank // self.ranks_per_expert, self.ep)

    def expert_features(self, total: int) -> range:
        """This rank's intermediate features of its experts."""
        return _share(total, self.rank % self.ranks_per_expert, self.ranks_per_expert)


def _share(total: int, index: int, count: int) -> range:
    return range(total * index // count, total * (index + 1) // count)


def scaled(part: range, by: int) -> range:
    """Features of some heads."""
    return range(part.start * by, part.stop * by)


def held_spec(spec: DecoderSpec, place: Place) -> DecoderSpec:
    """The spec of what one rank holds, as if that were a model: for its memory. Not what its layers compute."""
    moe, heads = spec.moe, len(place.split(spec.num_attention_heads))
    if moe is not None:
        held = len(place.experts(moe.num_experts))
        moe = replace(
            moe,
            num_experts=held,
            num_experts_per_tok=min(held, moe.num_experts_per_tok),
            moe_intermediate_size=len(place.expert_features(moe.moe_intermediate_size)),
            shared_intermediate_size=len(place.split(moe.shared_intermediate_size)),
            n_group=1,
        )
    kv_heads = spec.num_key_value_heads if spec.mla else len(place.kv_heads(spec.num_key_value_heads))
    return replace(
        spec,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=len(place.split(spec.intermediate_size)),
        vocab_size=len(place.split(spec.vocab_size)),
        moe=moe,
    )


def in_the_way(
    spec: ModelSpec | None, tp: int, ep: int, quantization: Mapping[str, int | str | bool] | None = None
) -> list[str]:
    """Why a model cannot be held by max(tp, ep) ranks, a sentence each, with the arithmetic; [] if it can.

    spec None: a model that runs through transformers. quantization: as engines.capability.quantization_attributes.
    """
    if max(tp, ep) == 1:
        return []
    if not isinstance(spec, DecoderSpec):
        what = "a model that runs through transformers" if spec is None else "an encoder"
        return [f"parallelism: tp={tp}, ep={ep} with {what}; expected 1, as only native decoders are split; use dp"]
    found = [*_uneven(spec, Place(0, tp, ep)), *_experts(spec, tp, ep)]
    return found or _cut_groups(spec, Place(0, tp, ep), quantization or {})


def _uneven(spec: DecoderSpec, place: Place) -> Iterator[str]:
    tp, kv_heads = place.tp, spec.num_key_value_heads
    sizes = {"num_attention_heads": spec.num_attention_heads}
    if spec.moe is None or spec.moe.dense_layers:
        sizes["intermediate_size"] = spec.intermediate_size
    if spec.moe is not None and spec.moe.shared_intermediate_size:
        sizes["the shared experts' intermediate size"] = spec.moe.shared_intermediate_size
    for name, size in sizes.items():
        if size % tp:
            yield f"parallelism.tp: {tp}; {name} is {size}, and {size} / {tp} leaves {size % tp}; choose a divisor"
    if spec.mla is None and kv_heads % tp and tp % kv_heads:
        yield (
            f"parallelism.tp: {tp}; num_key_value_heads is {kv_heads}, and neither number divides the other; choose a "
            "divisor, or a multiple to have each head on several ranks"
        )
    if spec.vocab_size < tp:
        yield f"parallelism.tp: {tp}; vocab_size is {spec.vocab_size}; expected no more ranks than tokens; lower it"


def _experts(spec: DecoderSpec, tp: int, ep: int) -> Iterator[str]:
    if spec.moe is None:
        if ep > 1:
            yield f"parallelism.ep: {ep}; expected 1, as the model has no experts; use tp or dp"
        return
    experts, inner, per_expert = spec.moe.num_experts, spec.moe.moe_intermediate_size, max(tp, ep) // ep
    if experts % ep:
        yield f"parallelism.ep: {ep}; {experts} experts / {ep} leaves {experts % ep}; choose a divisor"
    if inner % per_expert:
        yield (
            f"parallelism.ep: {ep}; each expert is split over {max(tp, ep)} / {ep} = {per_expert} ranks, and its "
            f"{inner} features / {per_expert} leaves {inner % per_expert}; raise ep"
        )


def _cut_groups(spec: DecoderSpec, place: Place, said: Mapping[str, int | str | bool]) -> list[str]:
    """Scales that are shared by features of several ranks."""
    if not said:
        return []
    features = {}
    if said.get("quantization") != "mxfp4":
        features["attention's output"] = len(place.split(spec.num_attention_heads)) * _value_dim(spec)
        features["the MLP's intermediate features"] = len(place.split(spec.intermediate_size))
        if spec.moe is not None:
            features["the shared experts' features"] = len(place.split(spec.moe.shared_intermediate_size))
            if not spec.moe.dense_layers:
                del features["the MLP's intermediate features"]
    if spec.moe is not None:
        features["an expert's intermediate features"] = len(place.expert_features(spec.moe.moe_intermediate_size))
    unit = feature_unit(said)
    found = [
        f"parallelism.tp: {place.tp}; {size} of {name} a rank, and weights are quantized in units of {unit}: "
        f"{size} / {unit} leaves {size % unit}; lower tp"
        for name, size in features.items()
        if size % unit
    ]
    split = place.tp > 1 or place.ranks_per_expert > 1
    if split and said.get("desc_act") is True:
        found.append(
            f"parallelism.tp: {place.tp}; the checkpoint's inputs are grouped in an order of their own (desc_act), "
            "which cannot be split; use dp, or a checkpoint without it"
        )
    return found


def _value_dim(spec: DecoderSpec) -> int:
    return spec.mla.v_head_dim if spec.mla else spec.head_dim


def feature_unit(said: Mapping[str, int | str | bool]) -> int:
    """Neighbouring features that no two ranks can share: those of one scale, of one packed word.

    Plain weights that each rank quantizes while it loads its own have neither in common.
    """
    if said.get("quantization") in AT_LOAD:
        return 1
    unit, size = 8, said.get("group_size")  # 8: codes in a 32-bit word
    if isinstance(size, int) and size > 0:
        unit = math.lcm(unit, size)
    if said.get("quantization") == "mxfp4":
        unit = 32
    tile = said.get("weight_block_size")
    if isinstance(tile, str):
        unit = math.lcm(*(int(side) for side in tile.split("x")))
    weights = str(said.get("weights"))
    return unit if weights.endswith("a16") or tile or weights == "mxfp4" else 1
