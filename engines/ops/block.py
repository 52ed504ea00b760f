"""What stands between one layer's attention and the next one's: every token by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from engines.ops.linear import LinearWeight

if TYPE_CHECKING:
    from engines.ops import OpSet


@dataclass(frozen=True)
class NormWeight:
    """Of an RMS norm; with a bias, of a layer norm."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class Block:
    """Of a dense layer: the attention's output projection, the residual's sum and norm, the MLP, again sum and norm,
    and the next layer's first projection; None: the block ends with the norm.

    After an RMS norm the residual is the sum that was normed, after a layer norm the norm itself.
    """

    out: LinearWeight
    norm: NormWeight
    up: LinearWeight
    down: LinearWeight
    activation: str
    gated: bool
    next_norm: NormWeight
    into: LinearWeight | None


RunBlock = Callable[[Tensor, Tensor], Tensor]
"""(attended [num_tokens, out.in_features], residual [num_tokens, hidden_size]) -> [num_tokens, into.out_features], or
[num_tokens, hidden_size] without `into`. The residual becomes what the next block's is; both may be views of rows that
are dense. The bits are those of the ops one after the other."""


def prepare_block(self: OpSet, block: Block) -> RunBlock | None:
    """The block as one op, to be called for every step; None: it is to be made of its ops."""
    return None
