"""Multi-head latent attention (DeepSeek V2, arXiv 2405.04434 section 2.1), with its up-projections absorbed.

A key of head h is W_UK[h] c and a value W_UV[h] c for one latent vector c a token, which all heads share. So a score is
(W_UK[h]^T q) . c, and an output W_UV[h] times the weighted sum of c: attention runs on what the cache holds, as if all
heads shared one key of kv_lora_rank + qk_rope_head_dim numbers whose first kv_lora_rank are the value.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from engines.batch import Batch
from engines.layers.linear import Format, Linear
from engines.layers.norm import RMSNorm
from engines.layers.rotary import Rotation
from engines.models.spec import DecoderSpec, MLASpec
from engines.ops import OpSet
from engines.ops.kv_cache import LatentCache
from engines.ops.linear import Inputs, LinearWeight
from engines.parallel.place import scaled
from engines.weights import LinearSource, Weights

NORM_EPS = 1e-6
"""Of the norms on latents, whatever config.json says of the others (DeepseekV2Attention of transformers)."""


class LatentAttention:
    """Causal self-attention over a paged cache of latents."""

    def __init__(self, name: str, spec: DecoderSpec, mla: MLASpec, weights: Weights, fmt: Format, ops: OpSet) -> None:
        self.ops, self.mla, self.group = ops, mla, weights.group
        all_heads, heads = spec.num_attention_heads, self.group.place.split(spec.num_attention_heads)
        self.num_heads = len(heads)
        self.q_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        self.softmax_scale = self.q_dim**-0.5 if spec.softmax_scale is None else spec.softmax_scale
        hidden, bias, cached = spec.hidden_size, spec.qkv_bias, mla.kv_lora_rank + mla.qk_rope_head_dim
        of_heads = self._half_split(self.num_heads, mla.qk_nope_head_dim)
        self.down_sizes = [mla.q_lora_rank, cached] if mla.q_lora_rank else [cached]
        names = [f"{name}.q_a_proj", f"{name}.kv_a_proj_with_mqa"][-len(self.down_sizes) :]
        down = LinearSource(tuple(names), hidden, tuple(self.down_sizes), bias)
        split = self._half_split(1, sum(self.down_sizes[:-1]) + mla.kv_lora_rank)
        self.down_proj = Linear(down, weights, fmt, ops, split, adapts=True)
        self.q_a_layernorm = None
        if mla.q_lora_rank:
            self.q_a_layernorm = RMSNorm(f"{name}.q_a_layernorm", mla.q_lora_rank, NORM_EPS, 0.0, weights, ops)
            up = LinearSource((f"{name}.q_b_proj",), mla.q_lora_rank, (all_heads * self.q_dim,))
        else:
            up = LinearSource((f"{name}.q_proj",), hidden, (all_heads * self.q_dim,))
        up = replace(up, rows=(scaled(heads, self.q_dim),))
        self.q_proj = Linear(up, weights, fmt, ops, of_heads, adapts=True)
        self.kv_a_layernorm = RMSNorm(f"{name}.kv_a_layernorm", mla.kv_lora_rank, NORM_EPS, 0.0, weights, ops)
        self.key_up, self.value_up = self._absorbed(name, all_heads, heads, weights, fmt)
        columns = scaled(heads, mla.v_head_dim)
        out = LinearSource((f"{name}.o_proj",), all_heads * mla.v_head_dim, (hidden,), spec.o_bias, columns=columns)
        self.o_proj = Linear(out, weights, fmt, ops, adapts=True)

    def _half_split(self, num_heads: int, before: int) -> Tensor | None:
        """Rows of heads of `before` plain and then rotating features, pairs brought half a rotating part apart."""
        if not self.mla.rope_interleave:
            return None
        size = self.mla.qk_rope_head_dim
        pairs = torch.cat((torch.arange(0, size, 2), torch.arange(1, size, 2)))
        head = torch.cat((torch.arange(before), before + pairs))
        return (torch.arange(num_heads)[:, None] * (before + size) + head).flatten()

    def _absorbed(self, name: str, all_heads: int, held: range, weights: Weights, fmt: Format) -> tuple[Tensor, Tensor]:
        """([heads, nope, rank], [heads, rank, v]) of kv_b_proj, in the compute dtype whatever the format."""
        mla, heads, size = self.mla, len(held), self.mla.qk_nope_head_dim + self.mla.v_head_dim
        source = LinearSource((f"{name}.kv_b_proj",), mla.kv_lora_rank, (all_heads * size,), rows=(scaled(held, size),))
        read = fmt.read(weights, source)
        dense = read.weight if isinstance(read.weight, Tensor) else read.weight.dequantize(weights.dtype)
        by_head = dense.view(heads, -1, mla.kv_lora_rank)
        keys, values = by_head.split([mla.qk_nope_head_dim, mla.v_head_dim], dim=1)
        return keys.contiguous(), values.transpose(1, 2).contiguous()

    @property
    def takes(self) -> LinearWeight | None:
        """As Linear has it, of what `attend` takes; None where two products do."""
        return self.down_proj.takes if self.q_a_layernorm is not None else None

    def enter(self, x: Inputs, adapter_ids: Tensor | None) -> Inputs:
        """x itself: several products of it follow."""
        return x

    def attend(self, x: Inputs, batch: Batch, cache: LatentCache, rotation: Rotation) -> Tensor:
        """x: [num_tokens, hidden_size]; returns [num_tokens, heads * v_head_dim]. Modifies cache."""
        mla = self.mla
        *compressed, cached = self.down_proj.forward(x, batch.adapter_ids).split(self.down_sizes, dim=1)
        if self.q_a_layernorm is not None:
            x = self.q_a_layernorm.forward(compressed[0])
        q = self.q_proj.forward(x, batch.adapter_ids).unflatten(1, (self.num_heads, self.q_dim))
        q_nope, q_rope = q.split([mla.qk_nope_head_dim, mla.qk_rope_head_dim], dim=2)
        assert batch.slot_mapping is not None
        norm, angles = self.kv_a_layernorm, (rotation.positions, rotation.cos_sin)
        self.ops.rope_write_latent(q_rope, cached, norm.weight, norm.eps, *angles, cache, batch.slot_mapping)
        absorbed = q.new_empty(*q.shape[:2], mla.kv_lora_rank + mla.qk_rope_head_dim)
        self.ops.head_linear(q_nope, self.key_up, absorbed[..., : mla.kv_lora_rank])
        absorbed[..., mla.kv_lora_rank :].copy_(q_rope)
        out = self.ops.latent_attention(absorbed, cache, batch, self.softmax_scale)
        return self.ops.head_linear(out, self.value_up).flatten(1)

    def leave(self, attended: Tensor, adapter_ids: Tensor | None) -> Tensor:
        """attended: of `attend`; returns [num_tokens, hidden_size]."""
        return self.group.sum(self.o_proj.forward(attended, adapter_ids))
