"""Gated activations of the MLP, and the plain ones of encoders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def act(x: Tensor, name: str) -> Tensor:
    """Elementwise activation; `name` is a key of ACTIVATIONS. x may be overwritten and returned."""
    return ACTIVATIONS[name](x)


def act_and_mul(gate_up: Tensor, name: str) -> Tensor:
    """act(gate) * up (arXiv 2002.05202).

    gate_up: [num_tokens, 2 * intermediate], gate first. Returns [num_tokens, intermediate]; the activation is rounded
    to the input's dtype before it multiplies, as LlamaMLP does.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[name](gate) * up


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return cap * torch.tanh(x / cap)
