"""A mixture of experts in place of the MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.api import UnsupportedModelError
from engines.layers.linear import Format, Linear, select_rows
from engines.layers.mlp import GatedMLP
from engines.models.spec import DecoderSpec, MoESpec
from engines.ops import OpSet
from engines.ops.linear import Inputs, LinearWeight
from engines.ops.moe import Experts, Projection
from engines.parallel.place import scaled
from engines.weights import Cut, LinearSource, Weights, whole


class MixtureOfExperts:
    """The sum of a token's experts, by the weights that the router gives them, and of the shared expert's output.

    A rank has some of the experts, or some of the intermediate features of some.
    """

    def __init__(self, name: str, spec: DecoderSpec, moe: MoESpec, weights: Weights, fmt: Format, ops: OpSet) -> None:
        self.ops, self.moe, self.group = ops, moe, weights.group
        self.held = self.group.place.experts(moe.num_experts)
        self.act = spec.hidden_act
        self.gate = _Router(f"{name}.gate", spec, moe, weights, ops)
        if moe.stacked:
            self.experts = _stacked(f"{name}.experts", spec, moe, weights, fmt, ops)
        else:
            self.experts = _separate(f"{name}.experts", spec, moe, weights, fmt, ops)
        self.shared_expert = None
        if moe.shared_intermediate_size:
            size = moe.shared_intermediate_size
            self.shared_expert = GatedMLP(f"{name}.shared_expert", size, spec, weights, fmt, ops)
        self.shared_gate = None
        if moe.shared_gate:
            self.shared_gate = Linear(
                LinearSource((f"{name}.shared_expert_gate",), spec.hidden_size, (1,)), weights, fmt, ops
            )

    @property
    def takes(self) -> LinearWeight | None:
        """None: the router and the experts take what `forward` does."""
        return None

    def forward(self, x: Inputs, adapter_ids: Tensor | None = None) -> Tensor:
        """x: [num_tokens, hidden_size]; returns the same shape. adapter_ids: as Batch has them, for the tokens in x;
        only the shared expert takes adapters."""
        assert isinstance(x, Tensor)
        if self.group.place.num_copies > 1:
            everyone, own = self.group.join_copies(x)
            out = self.group.sum_all(self._of_experts(everyone))[own]
            # Of a copy without tokens no rank gets here with any: they leave together.
            return (
                out if self.shared_expert is None or not len(x) else out + self.group.sum(self._shared(x, adapter_ids))
            )
        out = self._of_experts(x)
        return self.group.sum(out if self.shared_expert is None else out + self._shared(x, adapter_ids))

    def _shared(self, x: Tensor, adapter_ids: Tensor | None) -> Tensor:
        """What this rank has of the shared expert's output."""
        assert self.shared_expert is not None
        shared = self.shared_expert.summand(x, adapter_ids)
        return shared if self.shared_gate is None else torch.sigmoid(self.shared_gate.forward(x)) * shared

    def _of_experts(self, x: Tensor) -> Tensor:
        """What the experts that are held here add."""
        weights, ids = self.gate.forward(x)
        if len(self.held) == self.moe.num_experts:
            return self.ops.fused_experts(x, self.experts, weights, ids, self.act)
        here = (ids >= self.held.start) & (ids < self.held.stop)
        own = torch.where(here, ids - self.held.start, -1)
        return self.ops.fused_experts(x, self.experts, weights, own, self.act)


class _Router:
    """Experts of each token and their weights. No format quantizes the router."""

    def __init__(self, name: str, spec: DecoderSpec, moe: MoESpec, weights: Weights, ops: OpSet) -> None:
        self.ops, self.moe = ops, moe
        self.dtype = torch.float32 if moe.router_float32 else weights.dtype
        count = moe.num_experts
        weight = weights.read(weights.stored_name(f"{name}.weight"), (count, spec.hidden_size), self.dtype)
        bias = weights.read(weights.stored_name(f"{name}.bias"), (count,), self.dtype) if moe.router_bias else None
        self.weight: LinearWeight = ops.prepare_linear(weight, bias)
        self.correction_bias = None
        if moe.correction_bias:
            stored = weights.stored_name(f"{name}.e_score_correction_bias")
            self.correction_bias = weights.read(stored, (count,), torch.float32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        moe = self.moe
        return self.ops.route(
            self.ops.linear(x.to(self.dtype), self.weight),
            moe.num_experts_per_tok,
            moe.scoring,
            moe.norm_topk_prob,
            moe.routed_scaling_factor,
            self.correction_bias,
            moe.n_group,
            moe.topk_group,
        )


def _separate(name: str, spec: DecoderSpec, moe: MoESpec, weights: Weights, fmt: Format, ops: OpSet) -> Experts:
    """Experts that are modules of their own, as MLPs are."""
    outer, inner, place = spec.hidden_size, moe.moe_intermediate_size, weights.group.place
    held = place.expert_features(inner)
    gate_up, down = [], []
    for expert in place.experts(moe.num_experts):
        prefix = f"{name}.{expert}"
        names = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
        gate_up.append(fmt.read(weights, LinearSource(names, outer, (inner, inner), rows=(held, held))))
        down.append(fmt.read(weights, LinearSource((f"{prefix}.down_proj",), inner, (outer,), columns=held)))
    return ops.prepare_experts(gate_up, down, weights.dtype)


def _stacked(name: str, spec: DecoderSpec, moe: MoESpec, weights: Weights, fmt: Format, ops: OpSet) -> Experts:
    """Experts that lie in one tensor a projection; rows of gate and up alternate there."""
    read_stacked = getattr(fmt, "read_stacked", None)
    if read_stacked is None:
        raise UnsupportedModelError(
            f"{weights.checkpoint.path}: the experts of {weights.checkpoint.architecture} lie in one tensor, quantized "
            "in a format that is not known for such; expected mxfp4 or plain weights; use one of these checkpoints"
        )
    place, outer, inner = weights.group.place, spec.hidden_size, moe.moe_intermediate_size
    held = place.expert_features(inner)
    experts = Cut(moe.num_experts, (place.experts(moe.num_experts),))
    rows, columns, size = Cut(2 * inner, (scaled(held, 2),)), Cut(inner, (held,)), 2 * len(held)
    gate_first = torch.cat((torch.arange(0, size, 2), torch.arange(1, size, 2))).to(weights.device)
    gate_up: list[Projection] = read_stacked(weights, f"{name}.gate_up_proj", experts, rows, whole(outer))
    down = read_stacked(weights, f"{name}.down_proj", experts, whole(outer), columns)
    return ops.prepare_experts([select_rows(read, gate_first) for read in gate_up], down, weights.dtype)
