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
OAI_ALPHA, OAI_LIMIT = 1.702, 7.0


def act(x: Tensor, name: str) -> Tensor:
    """Elementwise activation; `name` is a key of ACTIVATIONS. x may be overwritten and returned."""
    return ACTIVATIONS[name](x)


def act_and_mul(gate_up: Tensor, name: str) -> Tensor:
    """act(gate) * up (arXiv 2002.05202).

    gate_up: [num_tokens, 2 * intermediate], gate first. Returns [num_tokens, intermediate]; the activation is rounded
    to the input's dtype before it multiplies, as LlamaMLP does. name: a key of ACTIVATIONS, or

    swiglu_oai: gate * sigmoid(1.702 * gate) * (up + 1), gate at most 7 and up from -7 to 7, as gpt-oss has it
    (gpt_oss/torch/model.py of github.com/openai/gpt-oss: swiglu); in float32, rounded once.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if name == "swiglu_oai":
        wide = torch.float64 if gate_up.dtype == torch.float64 else torch.float32
        gate, up = gate.to(wide).clamp(max=OAI_LIMIT), up.to(wide).clamp(-OAI_LIMIT, OAI_LIMIT)
        return (gate * torch.sigmoid(OAI_ALPHA * gate) * (up + 1)).to(gate_up.dtype)
    return ACTIVATIONS[name](gate) * up


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap)."""
    return cap * torch.tanh(x / cap)
