"""The one encoder: embeddings, post-norm layers of bidirectional attention and MLP, classification heads."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.batch import Batch
from engines.layers.attention import EncoderAttention
from engines.layers.embedding import EncoderEmbedding
from engines.layers.linear import Format, Linear
from engines.layers.mlp import MLP
from engines.layers.norm import LayerNorm
from engines.models.base import Cache
from engines.models.spec import EncoderSpec, ModelSpec
from engines.ops import OpSet
from engines.ops.block import Block
from engines.weights import LinearSource, Weights

HEADS: dict[str, tuple[str, str]] = {
    "bert": ("pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
}
"""By EncoderSpec.head: the dense layer on the first token's hidden state (tanh follows), the projection to labels."""


class EncoderLayer:
    """Attention and MLP, each followed by the norm of its sum with its input."""

    def __init__(self, layer: int, spec: EncoderSpec, weights: Weights, fmt: Format, ops: OpSet) -> None:
        self.ops = ops
        name, size, eps = f"encoder.layer.{layer}", spec.hidden_size, spec.layer_norm_eps
        self.attention = EncoderAttention(f"{name}.attention", spec, weights, fmt, ops)
        self.after_attention = LayerNorm(f"{name}.attention.output.LayerNorm", size, eps, weights, ops)
        self.mlp = MLP(name, spec, weights, fmt, ops)
        self.after_mlp = LayerNorm(f"{name}.output.LayerNorm", size, eps, weights, ops)

    def follow(self, attention: EncoderAttention | None) -> None:
        """What takes the result: the next layer's attention, or nothing. To be called once."""
        self.next_attention = attention
        out, up, down = self.attention.output.weight, self.mlp.intermediate.weight, self.mlp.output.weight
        norms, into = (
            (self.after_attention.of_block(), self.after_mlp.of_block()),
            attention.qkv.weight if attention else None,
        )
        self.block = self.ops.prepare_block(Block(out, norms[0], up, down, self.mlp.act, False, norms[1], into))

    def forward(self, qkv: Tensor, residual: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(what the next layer attends with, the residual); of the last layer the hidden states and nothing of use.

        qkv: of the residual, which may be overwritten.
        """
        attended = self.attention.attend(qkv, batch)
        if self.block is not None:
            return self.block(attended, residual), residual
        x = self.after_attention.forward(self.attention.output.forward(attended), residual)
        x = self.after_mlp.forward(self.mlp.forward(x), x)
        return (x if self.next_attention is None else self.next_attention.qkv.forward(x)), x


class Encoder:
    """A bidirectional model without a cache. Satisfies engines.models.base.Model."""

    paged = True
    adapters: tuple[str, ...] = ()
    num_cache_layers = latent_rank = 0

    def __init__(
        self, spec: EncoderSpec, classifies: bool, max_model_len: int, weights: Weights, fmt: Format, ops: OpSet
    ) -> None:
        self.spec: ModelSpec | None = spec
        self.vocab_size, self.hidden_size = spec.vocab_size, spec.hidden_size
        self.max_model_len = max_model_len
        self.num_kv_heads, self.head_dim = spec.num_attention_heads, spec.head_dim
        self.embeddings = EncoderEmbedding(spec, weights, ops)
        self.layers = [EncoderLayer(i, spec, weights, fmt, ops) for i in range(spec.num_hidden_layers)]
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            layer.follow(following.attention if following else None)
        self.head: tuple[Linear, Linear] | None = None
        if classifies:
            dense, labels = HEADS[spec.head]
            self.head = (
                Linear(LinearSource((dense,), spec.hidden_size, (spec.hidden_size,), bias=True), weights, fmt, ops),
                Linear(LinearSource((labels,), spec.hidden_size, (spec.num_labels,), bias=True), weights, fmt, ops),
            )

    def forward(self, batch: Batch, caches: list[Cache]) -> Tensor:
        """caches: not used, may be empty."""
        residual = self.embeddings.forward(batch)
        x = self.layers[0].attention.qkv.forward(residual)
        for layer in self.layers:
            x, residual = layer.forward(x, residual, batch)
        return x if batch.output_indices is None else x[batch.output_indices]

    def logits(self, hidden: Tensor) -> Tensor:
        raise NotImplementedError("encoders have no language-model head here")

    def classify(self, hidden: Tensor) -> Tensor:
        """hidden: [n, hidden_size], the last hidden state of each sequence's first token."""
        assert self.head is not None, "built without a classification head"
        dense, labels = self.head
        return labels.forward(torch.tanh(dense.forward(hidden))).float()

    def context_key(self, num_prompt_tokens: int, num_tokens: int) -> int:
        return 0

    def close(self) -> None:
        """Nothing: all is in this process."""

    def release(self, seq_id: int) -> None:
        """Nothing: no state is kept."""
