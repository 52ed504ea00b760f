"""Token embeddings, and the head that turns hidden states into logits."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.batch import Batch
from engines.layers.linear import Format, Linear
from engines.layers.norm import LayerNorm
from engines.models.spec import DecoderSpec, EncoderSpec
from engines.ops import OpSet
from engines.weights import LinearSource, Weights


class TokenEmbedding:
    """Rows of the token table, scaled where the model says so. A rank has some of the rows."""

    def __init__(self, spec: DecoderSpec, weights: Weights, ops: OpSet) -> None:
        self.ops, self.group = ops, weights.group
        self.rows = self.group.place.split(spec.vocab_size)
        self.weight = weights.take("embed_tokens.weight", spec.vocab_size, spec.hidden_size, rows=self.rows)
        self.scale = float(torch.tensor(spec.embedding_scale, dtype=weights.dtype))

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.group.place.tp == 1:
            x = self.ops.embedding(token_ids, self.weight)
        else:
            here = (token_ids >= self.rows.start) & (token_ids < self.rows.stop)
            x = self.ops.embedding((token_ids - self.rows.start) * here, self.weight)
            x = self.group.sum(x.masked_fill_(~here[:, None], 0))
        return x if self.scale == 1.0 else x * self.scale


class TiedHead:
    """The token table, or a rank's rows of it, as a projection: for a model whose checkpoint has no head of its own."""

    def __init__(self, table: Tensor, ops: OpSet) -> None:
        self.ops = ops
        self.weight = ops.prepare_linear(table, None)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.ops.linear(hidden, self.weight)


def make_head(spec: DecoderSpec, table: Tensor, weights: Weights, fmt: Format, ops: OpSet) -> TiedHead | Linear:
    """The language-model head: logits of the tokens whose rows this rank has.

    A tied model whose checkpoint brings a head nevertheless gets that one, as transformers does when the two differ.
    """
    if spec.tie_word_embeddings and not weights.has("lm_head.weight"):
        return TiedHead(table, ops)
    held = weights.group.place.split(spec.vocab_size)
    return Linear(LinearSource(("lm_head",), spec.hidden_size, (spec.vocab_size,), rows=(held,)), weights, fmt, ops)


class EncoderEmbedding:
    """Sum of token, position and type embeddings, normed. All tokens are of type 0: one text a sequence."""

    def __init__(self, spec: EncoderSpec, weights: Weights, ops: OpSet) -> None:
        self.ops = ops
        self.offset = spec.position_offset
        rows = spec.max_position_embeddings + spec.position_offset
        name, size = "embeddings", spec.hidden_size
        self.words = weights.take(f"{name}.word_embeddings.weight", spec.vocab_size, size)
        self.positions = weights.take(f"{name}.position_embeddings.weight", rows, size)
        types = spec.type_vocab_size
        self.types = weights.take(f"{name}.token_type_embeddings.weight", types, size) if types else None
        self.norm = LayerNorm(f"{name}.LayerNorm", size, spec.layer_norm_eps, weights, ops)

    def forward(self, batch: Batch) -> Tensor:
        x = self.ops.embedding(batch.token_ids, self.words)
        if self.types is not None:
            x = x + self.types[0]
        return self.norm.forward(x, self.ops.embedding(batch.positions + self.offset, self.positions))
