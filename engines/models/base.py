"""What the engine asks of a loaded model, native or not."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from engines.batch import Batch
from engines.models.spec import ModelSpec

Cache = Any
"""engines.ops.kv_cache.KVCache, or LatentCache for models with a latent_rank: a model gets the kind it asks for."""


class Model(Protocol):
    """Weights on a device, and the forward pass over a ragged batch."""

    spec: ModelSpec | None
    """None for a model that runs through transformers."""
    adapters: tuple[str, ...]
    """Names of the job's adapters: a request may ask for one of them."""
    vocab_size: int
    hidden_size: int
    max_model_len: int
    paged: bool
    """Whether forward uses `caches`. If not, the model keeps its own state by batch.seq_ids until `release`."""
    num_cache_layers: int
    num_kv_heads: int
    head_dim: int
    """Shape of the caches that `forward` wants; 0 layers for encoders."""
    latent_rank: int
    """0: caches are of keys and values. Else: of latents, head_dim numbers a token, of which so many make values."""

    def forward(self, batch: Batch, caches: list[Cache]) -> Tensor:
        """Hidden states after the last norm, [num_outputs, hidden_size], of the tokens in batch.output_indices.

        Modifies the caches: the new tokens' keys and values are written at batch.slot_mapping.
        """

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, vocab_size] in the model's dtype, soft cap applied."""

    def classify(self, hidden: Tensor) -> Tensor:
        """One pooled hidden state a sequence, [n, hidden_size] -> [n, num_labels] float32."""

    def context_key(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """What a sequence's keys and values depend on besides the tokens before them; 0 for nearly all models.

        Rotary scalings that look at the length of the text (dynamic, longrope) give others. Cached blocks may be
        shared by sequences with the same key only, and a sequence whose key changes as it grows to num_tokens (prompt
        and output) must be computed again from its first token. Goes to forward as batch.context_keys.
        """

    def release(self, seq_id: int) -> None:
        """The sequence has ended or was preempted: forget its state, if any is kept here."""

    def close(self) -> None:
        """No call follows: let go of what is held outside of this process."""
