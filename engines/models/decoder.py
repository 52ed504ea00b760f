"""The one decoder: token embedding, layers of attention and MLP around a residual, norm, head. Built from a spec."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from engines.batch import Batch
from engines.layers.attention import Attention
from engines.layers.embedding import TokenEmbedding, make_head
from engines.layers.linear import Format, Linear
from engines.layers.mla import LatentAttention
from engines.layers.mlp import GatedMLP
from engines.layers.moe import MixtureOfExperts
from engines.layers.norm import RMSNorm
from engines.layers.rotary import RotaryEmbedding, Rotation
from engines.models.base import Cache
from engines.models.spec import DecoderSpec, ModelSpec, RopeSpec
from engines.ops import OpSet
from engines.ops.block import Block
from engines.ops.linear import Inputs
from engines.weights import LinearSource, Weights

Head = Literal["logits", "labels", "none"]


class DecoderLayer:
    """Attention and MLP, each between a norm before and, with sandwich norms, one after."""

    def __init__(self, layer: int, spec: DecoderSpec, weights: Weights, fmt: Format, ops: OpSet) -> None:
        name = f"layers.{layer}"
        self.ops = ops
        self.attention = make_attention(f"{name}.self_attn", layer, spec, weights, fmt, ops)
        self.mlp = make_mlp(f"{name}.mlp", layer, spec, weights, fmt, ops)

        def norm(which: str) -> RMSNorm:
            return make_norm(f"{name}.{which}", spec, weights, ops)

        self.before_attention = norm("input_layernorm")
        if spec.sandwich_norm:
            self.after_attention: RMSNorm | None = norm("post_attention_layernorm")
            self.before_mlp = norm("pre_feedforward_layernorm")
            self.after_mlp: RMSNorm | None = norm("post_feedforward_layernorm")
        else:
            self.after_attention = self.after_mlp = None
            self.before_mlp = norm("post_attention_layernorm")
        self.alone = weights.group.place.tp == 1 and weights.adapters is None
        """Whether nothing from elsewhere is added to what the products give."""

    def follow(self, norm: RMSNorm, attention: Attention | LatentAttention | None) -> None:
        """What comes next: a norm, and the attention that takes its result; None: the head. To be called once."""
        self.next_norm, self.next_attention = norm, attention
        self.block = None
        if self.alone and self.after_attention is None and isinstance(self.mlp, GatedMLP):
            into = attention.qkv_proj.weight if isinstance(attention, Attention) else None
            out, up, down = self.attention.o_proj.weight, self.mlp.gate_up_proj.weight, self.mlp.down_proj.weight
            norms = self.before_mlp.of_block(), norm.of_block()
            self.block = self.ops.prepare_block(Block(out, norms[0], up, down, self.mlp.act, True, norms[1], into))

    def forward(
        self, x: Inputs, residual: Tensor, batch: Batch, cache: Cache, rotation: Rotation, kept: Tensor | None = None
    ) -> tuple[Inputs, Tensor]:
        """(what the next layer's attention or the head takes, the residual), for the tokens in `kept` or for all.

        x: as `enter` of the attention gives it. x and residual may be overwritten.
        """
        attended, adapter_ids = self.attention.attend(x, batch, cache, rotation), batch.adapter_ids
        if kept is not None:
            attended, residual = attended[kept], residual[kept]
            adapter_ids = None if adapter_ids is None else adapter_ids[kept]
        if self.block is not None:
            return self.block(attended, residual), residual
        x = self.attention.leave(attended, adapter_ids)
        if self.after_attention is not None:
            x = self.after_attention.forward(x)
        inputs, residual = self.before_mlp.add_for(x, residual, self.mlp.takes)
        x = self.mlp.forward(inputs, adapter_ids)
        if self.after_mlp is not None:
            x = self.after_mlp.forward(x)
        if self.next_attention is None:
            return self.next_norm.add(x, residual)
        inputs, residual = self.next_norm.add_for(x, residual, self.next_attention.takes)
        return self.next_attention.enter(inputs, adapter_ids), residual


class Decoder:
    """A causal model with a paged cache. Satisfies engines.models.base.Model."""

    paged = True

    def __init__(
        self, spec: DecoderSpec, head: Head, max_model_len: int, weights: Weights, fmt: Format, ops: OpSet
    ) -> None:
        self.spec: ModelSpec | None = spec
        self.ops, self.group = ops, weights.group
        self.adapters = weights.adapters.names if weights.adapters else ()
        self.vocab_size, self.hidden_size = spec.vocab_size, spec.hidden_size
        self.max_model_len = max_model_len
        self.num_cache_layers = spec.num_hidden_layers
        self.num_kv_heads = len(self.group.place.kv_heads(spec.num_key_value_heads))
        self.head_dim = spec.head_dim
        self.latent_rank = spec.mla.kv_lora_rank if spec.mla else 0
        self.logit_softcap = spec.logit_softcap

        def rotary(rope: RopeSpec) -> RotaryEmbedding:
            own = spec.max_position_embeddings
            head_dim = spec.mla.qk_rope_head_dim if spec.mla else spec.head_dim
            return RotaryEmbedding(rope, head_dim, own, max_model_len, weights.dtype, weights.device)

        self.rope = rotary(spec.rope)
        self.rope_local = rotary(spec.rope_local) if spec.rope_local else self.rope
        self.local = [bool(spec.window(i)) for i in range(spec.num_hidden_layers)]
        self.embed_tokens = TokenEmbedding(spec, weights, ops)
        self.layers = [DecoderLayer(i, spec, weights, fmt, ops) for i in range(spec.num_hidden_layers)]
        self.norm = make_norm("norm", spec, weights, ops)
        for layer, following in zip(self.layers, self.layers[1:], strict=False):
            layer.follow(following.before_attention, following.attention)
        self.layers[-1].follow(self.norm, None)
        self.head = make_head(spec, self.embed_tokens.weight, weights, fmt, ops) if head == "logits" else None
        self.score = None
        if head == "labels":
            self.score = Linear(LinearSource(("score",), spec.hidden_size, (spec.num_labels,)), weights, fmt, ops)

    def forward(self, batch: Batch, caches: list[Cache]) -> Tensor:
        residual, first = self.embed_tokens.forward(batch.token_ids), self.layers[0]
        x = first.attention.enter(first.before_attention.forward(residual), batch.adapter_ids)
        rotation = self.rope.rotation(batch)
        local = rotation if self.rope_local is self.rope else self.rope_local.rotation(batch)
        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            here = local if self.local[i] else rotation
            kept = batch.output_indices if i == len(self.layers) - 1 else None
            x, residual = layer.forward(x, residual, batch, cache, here, kept)
        assert isinstance(x, Tensor)
        return x

    def assist(self) -> Tensor:
        """As `forward` without tokens, [0, hidden_size]: what a step of other copies asks of the experts here."""
        nothing = self.embed_tokens.weight.new_empty(0, self.hidden_size)
        for layer in self.layers:
            if isinstance(layer.mlp, MixtureOfExperts):
                layer.mlp.forward(nothing)
        return nothing

    def logits(self, hidden: Tensor) -> Tensor:
        assert self.head is not None, "built without a language-model head"
        logits = self.group.join_columns(self.head.forward(hidden), self.vocab_size)
        if self.logit_softcap:
            logits = self.ops.softcap(logits, self.logit_softcap)
        return logits

    def classify(self, hidden: Tensor) -> Tensor:
        assert self.score is not None, "built without a classification head"
        return self.score.forward(hidden).float()

    def context_key(self, num_prompt_tokens: int, num_tokens: int) -> int:
        key = self.rope.context_key(num_prompt_tokens, num_tokens)
        return key or self.rope_local.context_key(num_prompt_tokens, num_tokens)

    def close(self) -> None:
        """Nothing: all is in this process."""

    def release(self, seq_id: int) -> None:
        """Nothing: all state is in the caches."""


def make_attention(
    name: str, layer: int, spec: DecoderSpec, weights: Weights, fmt: Format, ops: OpSet
) -> Attention | LatentAttention:
    if spec.mla is not None:
        return LatentAttention(name, spec, spec.mla, weights, fmt, ops)
    return Attention(name, layer, spec, weights, fmt, ops)


def make_mlp(
    name: str, layer: int, spec: DecoderSpec, weights: Weights, fmt: Format, ops: OpSet
) -> GatedMLP | MixtureOfExperts:
    experts = spec.experts(layer)
    if experts is not None:
        return MixtureOfExperts(name, spec, experts, weights, fmt, ops)
    return GatedMLP(name, spec.intermediate_size, spec, weights, fmt, ops)


def make_norm(name: str, spec: DecoderSpec, weights: Weights, ops: OpSet) -> RMSNorm:
    return RMSNorm(name, spec.hidden_size, spec.rms_norm_eps, spec.norm_weight_offset, weights, ops)
