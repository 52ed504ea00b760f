"""Feed-forward blocks: gated for decoders, plain for encoders."""

from __future__ import annotations

from torch import Tensor

from engines.layers.linear import Format, Linear
from engines.models.spec import DecoderSpec, EncoderSpec
from engines.ops import OpSet
from engines.ops.linear import Inputs, LinearWeight
from engines.weights import LinearSource, Weights


class GatedMLP:
    """down_proj(act(gate_proj(x)) * up_proj(x)), with gate and up as one product (arXiv 2002.05202).

    A rank has some of the intermediate features.
    """

    def __init__(self, name: str, inner: int, spec: DecoderSpec, weights: Weights, fmt: Format, ops: OpSet) -> None:
        """inner: the intermediate size."""
        self.ops, self.group = ops, weights.group
        self.act = spec.hidden_act
        outer, bias, held = spec.hidden_size, spec.mlp_bias, weights.group.place.split(inner)
        names = (f"{name}.gate_proj", f"{name}.up_proj")
        gate_up = LinearSource(names, outer, (inner, inner), bias, rows=(held, held))
        self.gate_up_proj = Linear(gate_up, weights, fmt, ops, adapts=True)
        down = LinearSource((f"{name}.down_proj",), inner, (outer,), bias, columns=held)
        self.down_proj = Linear(down, weights, fmt, ops, adapts=True)

    @property
    def takes(self) -> LinearWeight | None:
        """As Linear has it, of what `forward` takes."""
        return self.gate_up_proj.takes

    def forward(self, x: Inputs, adapter_ids: Tensor | None = None) -> Tensor:
        """adapter_ids: as Batch has them, for the tokens in x."""
        return self.group.sum(self.summand(x, adapter_ids))

    def summand(self, x: Inputs, adapter_ids: Tensor | None = None) -> Tensor:
        """What this rank adds to the result."""
        up, down = self.gate_up_proj, self.down_proj
        if not (up.adapted(adapter_ids) or down.adapted(adapter_ids)):
            return self.ops.mlp(x, up.weight, down.weight, self.act, gated=True)
        inner = self.ops.act_and_mul(self.gate_up_proj.forward(x, adapter_ids), self.act)
        return self.down_proj.forward(inner, adapter_ids)


class MLP:
    """output(act(intermediate(x)))."""

    def __init__(self, name: str, spec: EncoderSpec, weights: Weights, fmt: Format, ops: OpSet) -> None:
        self.ops = ops
        self.act = spec.hidden_act
        inner, outer = spec.intermediate_size, spec.hidden_size
        up = LinearSource((f"{name}.intermediate.dense",), outer, (inner,), bias=True)
        self.intermediate = Linear(up, weights, fmt, ops)
        self.output = Linear(LinearSource((f"{name}.output.dense",), inner, (outer,), bias=True), weights, fmt, ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.mlp(x, self.intermediate.weight, self.output.weight, self.act, gated=False)
