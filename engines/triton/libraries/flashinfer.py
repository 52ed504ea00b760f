"""FlashInfer (arXiv 2501.01005) for prompts over paged keys and values, from sm 7.5 on.

Read: 0.7.2.post1, flashinfer/prefill.py and include/flashinfer/attention. Its layout HND is that of the caches here.

Work is laid out on the host (`plan`) once a step and kind of layer, so captured steps cannot have it: decoding stays
with the engine. Its kernels for sm 9.0 ("fa3") have tiles that depend on the head alone. Of the others ("fa2") the
tile depends on the mean length of the step's prompts, and with it the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engines.capability import YES, Allowed, Offer, one_of
from engines.platform import Host
from engines.triton.libraries import _common

if TYPE_CHECKING:
    from torch import Tensor

    from engines.batch import Batch
    from engines.ops import OpSet
    from engines.ops.kv_cache import KVCache

PACKAGES = {"flashinfer": "flashinfer-python", "flashinfer_jit_cache": "flashinfer-jit-cache"}
"""Module -> distribution; the first is the library."""
OLDEST = (0, 6)
WORKSPACE_BYTES = 128 << 20
"""As its documentation recommends; for all layers together."""
PAGED = {
    "dtype": one_of("bfloat16", "float16"),
    "head_dim": one_of(64, 128, 256),
    "group": Allowed(ge=1),
    "window": YES,
    "softcap": YES,
}
RUN = "BatchPrefillWithPagedKVCacheWrapper"
PLAN = (
    *("qo_indptr", "paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "num_qo_heads", "num_kv_heads"),
    *("head_dim_qk", "page_size", "causal", "sm_scale", "window_left", "logits_soft_cap", "q_data_type"),
    "disable_split_kv",
)


def offers(host: Host) -> Offer:
    version = host.packages.get("flashinfer")
    blockers = [] if version is not None else ["flashinfer is not installed"]
    if version is not None and _common.release(version) < OLDEST:
        blockers.append(f"flashinfer {version} < {OLDEST[0]}.{OLDEST[1]}")
    sm = host.compute_capability or (0, 0)
    if sm < (7, 5) or sm[0] in (10, 11):
        blockers.append("flashinfer: expected sm 7.5 to 9.0, or 12")
    if version is not None and not (host.nvcc or "flashinfer_jit_cache" in host.packages):
        blockers.append(
            "flashinfer: neither flashinfer-jit-cache nor nvcc, with which it compiles its kernels, is here"
        )
    invariant = YES if sm == (9, 0) else Allowed(values=(False,), text="numerics=fast only")
    ops = {"paged_attention": {**PAGED, "invariant": invariant}}
    return Offer("flashinfer", ops, tuple(blockers), sm=host.compute_capability, since={"bfloat16": (8, 0)})


def attach(ops: OpSet, taken: Sequence[str]) -> None:
    """Raises UnsupportedModelError where the installed library is not what was read."""
    _common.attach(ops, taken, Prompts(ops))


class Prompts:
    """Steps without prompts are the op set's own, and so are decoding sequences in a step with some."""

    def __init__(self, ops: OpSet) -> None:
        self.paged_attention = _common.paged_attention(ops, __name__, self._paged_prompts)
        self._wrapper = _common.function("flashinfer", f"{RUN}.plan", PLAN)
        self._wrappers: dict[tuple[object, ...], Any] = {}
        self._planned: set[tuple[object, ...]] = set()
        """Keys of the wrappers that know the step."""
        self._seen: tuple[Batch, tuple[Tensor, ...]] | None = None
        self._workspace: Tensor | None = None

    def _paged_prompts(
        self, q: Tensor, cache: KVCache, batch: Batch, softmax_scale: float, window_size: int, softcap: float
    ) -> Tensor:
        planned = self._plan(q, cache, batch, softmax_scale, window_size, softcap)
        out: Tensor = planned.run(q, (cache.k, cache.v))
        return out

    def _plan(self, q: Tensor, cache: KVCache, batch: Batch, scale: float, window: int, softcap: float) -> Any:
        """A wrapper that knows this step and kind of layer."""
        if self._seen is None or self._seen[0] is not batch:
            self._seen = batch, laid_out(batch, cache.block_size)
            self._planned.clear()
        heads, kv_heads, head_dim = q.shape[1], cache.k.shape[1], q.shape[2]
        key = (heads, kv_heads, head_dim, cache.block_size, q.dtype, scale, window, softcap)
        if key not in self._wrappers:
            self._wrappers[key] = self._made(q)
        if key not in self._planned:
            self._wrappers[key].plan(
                *self._seen[1],
                num_qo_heads=heads,
                num_kv_heads=kv_heads,
                head_dim_qk=head_dim,
                page_size=cache.block_size,
                causal=True,
                sm_scale=scale,
                window_left=window - 1 if window else -1,
                logits_soft_cap=softcap,
                q_data_type=q.dtype,
                disable_split_kv=True,
            )
            self._planned.add(key)
        return self._wrappers[key]

    def _made(self, q: Tensor) -> Any:
        import torch

        from engines.triton.launch import capability

        if self._workspace is None:
            self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        backend = "fa3" if capability(q.device) == (9, 0) else "fa2"
        return self._wrapper(self._workspace, "HND", backend=backend)


def laid_out(batch: Batch, block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(offsets of queries, offsets of blocks, the blocks of all sequences, tokens in each last block), int32.

    All but the blocks in this process's memory. Of a decoding sequence one token, as its row is made anew.
    """
    import numpy as np
    import torch

    assert batch.block_tables is not None
    if batch.lengths is None:  # of a rank that was only sent the tensors
        offsets, lengths = batch.cu_seqlens_q.cpu().numpy(), batch.seq_lens.cpu().numpy()
        counts = np.diff(offsets)
    else:
        counts, lengths = batch.lengths
        offsets = np.concatenate(([0], np.cumsum(counts)))
    lengths = np.where(counts == 1, 1, lengths)
    blocks = -(-lengths // block_size)
    starts = np.concatenate(([0], np.cumsum(blocks)))
    rows = np.repeat(np.arange(len(blocks)), blocks)
    width = batch.block_tables.shape[1]
    places = torch.from_numpy(rows * width + np.arange(starts[-1]) - starts[rows])
    device = batch.block_tables.device
    if device.type == "cuda":
        places = places.pin_memory().to(device, non_blocking=True)
    taken = batch.block_tables.reshape(-1).index_select(0, places)
    qo, kv, last = (
        torch.from_numpy(array.astype(np.int32)) for array in (offsets, starts, lengths - (blocks - 1) * block_size)
    )
    return qo, kv, taken, last
