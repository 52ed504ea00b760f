"""Rotary position embedding, arXiv 2104.09864, in the half-split layout of the Hugging Face checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Rotate the first rotary_dim dimensions of every head of q and k.

    q: [num_tokens, num_heads, head_dim]; k: [num_tokens, num_kv_heads, head_dim]; may be views with a token stride.
    positions: [num_tokens] int64. cos_sin: [max_position, rotary_dim], q's dtype: cosines, then sines, of
    rotary_dim / 2 frequencies each. Products and sum are in q's dtype, as LlamaAttention has them.

    Modifies q and k.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    half = cos.shape[-1]
    for x in (q, k):
        first, second = x[..., :half], x[..., half : 2 * half]
        rotated = torch.cat((first * cos + (-second) * sin, second * cos + first * sin), dim=-1)
        x[..., : 2 * half] = rotated
