"""Table look-ups."""

from __future__ import annotations

from torch import Tensor


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """table[ids]. ids: [num_tokens] int64 within the table; table: [rows, hidden]."""
    return table[ids]
