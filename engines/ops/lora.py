"""Low-rank adapters (arXiv 2106.09685), a different one for each token of a batch."""

from __future__ import annotations

from torch import Tensor


def lora(y: Tensor, x: Tensor, a: Tensor, b: Tensor, adapter_ids: Tensor) -> None:
    """Add to each token what its adapter makes of it: y[t] += b[i] @ (a[i] @ x[t]) with i = adapter_ids[t].

    y: [num_tokens, out_features]; x: [num_tokens, in_features]; a: [num_adapters, rank, in_features]; b: [num_adapters,
    out_features, rank], scale included; all of one dtype. adapter_ids: [num_tokens] int64; -1: y[t] stays as it is.
    The inner product is rounded to that dtype, and so is the outer one before it is added.

    Modifies y.
    """
    for adapter in range(a.shape[0]):
        tokens = (adapter_ids == adapter).nonzero().flatten()
        if len(tokens):
            y[tokens] += x[tokens] @ a[adapter].T @ b[adapter].T
