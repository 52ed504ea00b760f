"""FlashAttention-3 (arXiv 2407.08608) for prompts on sm 9.0: paged keys and values, latents, encoders.

Read: 3.0.0, flash_attn_interface.py and flash_api.cpp of https://github.com/Dao-AILab/flash-attention/tree/0251105/hopper.
It takes keys as [blocks, tokens, heads, head_dim] with any strides, so that the caches here are passed as views.

With num_splits=1 and 16-bit numbers the keys of a tile (tile_size.h) depend on the head alone up to 192 dimensions;
beyond, on whether a window is shorter than the longest sequence of the step, so that bits would depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engines.capability import YES, Allowed, Offer, one_of
from engines.platform import Host
from engines.triton.libraries import _common

if TYPE_CHECKING:
    from torch import Tensor

    from engines.batch import Batch
    from engines.ops import OpSet
    from engines.ops.kv_cache import KVCache, LatentCache

PACKAGES = {"flash_attn_interface": "flash_attn_3"}
"""Module -> distribution; the first is the library."""
OLDEST = (3, 0)
SM = (9, 0)
DTYPES = one_of("bfloat16", "float16")
OPS = {
    "paged_attention": {
        "dtype": DTYPES,
        "head_dim": Allowed(ge=8, le=192, multiple_of=8),
        "group": Allowed(ge=1),
        "window": YES,
        "softcap": YES,
        "invariant": YES,
    },
    "latent_attention": {"dtype": DTYPES, "kv_lora_rank": one_of(512), "rope_dim": one_of(64), "invariant": YES},
    "encoder_attention": {"dtype": DTYPES, "head_dim": Allowed(ge=8, le=256, multiple_of=8), "invariant": YES},
}
PAGED = (
    *("cache_seqlens", "page_table", "cu_seqlens_q", "max_seqlen_q", "qv", "softmax_scale", "causal", "window_size"),
    *("softcap", "num_splits"),
)
PLAIN = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal")


def offers(host: Host) -> Offer:
    version = host.packages.get("flash_attn_interface")
    blockers = [] if version is not None else ["flash_attn_3 is not installed"]
    if version is not None and _common.release(version) < OLDEST:
        blockers.append(f"flash_attn_3 {version} < {OLDEST[0]}.{OLDEST[1]}")
    if host.compute_capability != SM:
        blockers.append(f"flash_attn_3: expected sm {SM[0]}.{SM[1]}")
    return Offer("flash_attn_3", OPS, tuple(blockers))


def attach(ops: OpSet, taken: Sequence[str]) -> None:
    """Raises UnsupportedModelError where the installed library is not what was read."""
    _common.attach(ops, taken, Prompts(ops))


class Prompts:
    """Steps without prompts are the op set's own, and so are decoding sequences in a step with some."""

    def __init__(self, ops: OpSet) -> None:
        self._paged = _common.function("flash_attn_interface", "flash_attn_with_kvcache", PAGED)
        self._plain = _common.function("flash_attn_interface", "flash_attn_varlen_func", PLAIN)
        self._own_latent = ops.latent_attention
        self.paged_attention = _common.paged_attention(ops, __name__, self._paged_prompts)
        self._seen: tuple[Batch, Tensor] | None = None

    def _paged_prompts(
        self, q: Tensor, cache: KVCache, batch: Batch, softmax_scale: float, window_size: int, softcap: float
    ) -> Tensor:
        out: Tensor = self._paged(
            q,
            cache.k.transpose(1, 2),
            cache.v.transpose(1, 2),
            window_size=(window_size - 1, 0) if window_size else (-1, -1),
            softcap=softcap,
            **self._step(batch, softmax_scale),
        )
        return out

    def latent_attention(self, q: Tensor, cache: LatentCache, batch: Batch, softmax_scale: float) -> Tensor:
        """As the reference: the part that turns is the key, the latent both a second query's key and the value."""
        from engines.triton.attention import Scores, write_decoding

        if batch.max_seqlen_q == 1 or not q.shape[0]:
            return self._own_latent(q, cache, batch, softmax_scale)
        latent, turned = cache.data[..., : cache.rank], cache.data[..., cache.rank :]
        out: Tensor = self._paged(
            q[..., cache.rank :],
            turned[:, :, None],
            latent[:, :, None],
            qv=q[..., : cache.rank],
            **self._step(batch, softmax_scale),
        )
        write_decoding(out, q, cache, batch, Scores(softmax_scale))
        return out

    def encoder_attention(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch, softmax_scale: float) -> Tensor:
        """As the reference."""
        if not q.shape[0]:
            return q.new_empty(q.shape)
        out: Tensor = self._plain(
            q,
            k,
            v,
            cu_seqlens_q=batch.cu_seqlens_q,
            cu_seqlens_k=batch.cu_seqlens_q,
            max_seqlen_q=batch.max_seqlen_q,
            max_seqlen_k=batch.max_seqlen_q,
            softmax_scale=softmax_scale,
            causal=False,
        )
        return out

    def _step(self, batch: Batch, softmax_scale: float) -> dict[str, object]:
        """What it is told of a step, whatever the layer: of a decoding sequence one key, as its row is made anew."""
        if self._seen is None or self._seen[0] is not batch:
            decodes = batch.cu_seqlens_q[1:] - batch.cu_seqlens_q[:-1] == 1
            self._seen = batch, batch.seq_lens.masked_fill(decodes, 1) if batch.num_seqs > 1 else batch.seq_lens
        return {
            "cache_seqlens": self._seen[1],
            "page_table": batch.block_tables,
            "cu_seqlens_q": batch.cu_seqlens_q,
            "max_seqlen_q": batch.max_seqlen_q,
            "softmax_scale": softmax_scale,
            "causal": True,
            "num_splits": 1,
        }
