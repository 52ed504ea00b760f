"""Stand-ins for FlashAttention-3 and FlashInfer: their functions with the parameters that they publish, checks of what
their code checks, and results by the formula in float32. Decoding sequences come with one key, and get NaN: their rows
are not to be used.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int, softcap: float) -> Tensor:
    """One sequence: [new, heads, d], [all, kv_heads, d], [all, kv_heads, dv]. left: keys before the own; -1: all."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.float().repeat_interleave(group, 1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    at = torch.arange(len(q))[:, None] + len(k) - len(q)
    keys = torch.arange(len(k))[None]
    hidden = (keys > at) & causal
    if left >= 0:
        hidden = hidden | (keys < at - left)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v).to(q.dtype)


def int32(*given: Tensor) -> None:
    for tensor in given:
        assert tensor.dtype == torch.int32 and tensor.stride(-1) == 1


def rows_of(cu_seqlens: Tensor, i: int) -> slice:
    return slice(int(cu_seqlens[i]), int(cu_seqlens[i + 1]))


def flash_attn_3(addresses: set[int]) -> ModuleType:
    """The module flash_attn_interface, as 3.0.0 has it; addresses: where caches lie, so that a copy is noticed."""

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None, qv: Tensor | None = None,
        rotary_cos: Any = None, rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None,
        cache_leftpad: Any = None, page_table: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None,
        max_seqlen_q: int | None = None, rotary_seqlens: Any = None, q_descale: Any = None, k_descale: Any = None,
        v_descale: Any = None, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1),
        attention_chunk: int = 0, softcap: float = 0.0, rotary_interleaved: bool = True,
        scheduler_metadata: Any = None, num_splits: int = 0, pack_gqa: Any = None, sm_margin: int = 0,
        return_softmax_lse: bool = False,
    ) -> Tensor:  # fmt: skip
        int32(cache_seqlens, page_table, cu_seqlens_q)
        assert cache_seqlens.is_contiguous() and cu_seqlens_q.is_contiguous()
        assert q.dtype in HALVES and k_cache.dtype == v_cache.dtype == q.dtype
        assert q.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == 1
        assert k_cache.dim() == v_cache.dim() == 4 and k_cache.shape[:3] == v_cache.shape[:3]
        assert q.shape[1] % k_cache.shape[2] == 0 and q.shape[2] == k_cache.shape[3] and q.shape[2] % 8 == 0
        assert {t.untyped_storage().data_ptr() for t in (k_cache, v_cache)} <= addresses, "a copy of the cache"
        assert page_table.shape[0] == cache_seqlens.shape[0] == cu_seqlens_q.shape[0] - 1
        assert causal and num_splits == 1 and window_size[1] == (0 if window_size[0] >= 0 else -1)
        assert max_seqlen_q is not None and max_seqlen_q > 1
        if v_cache.shape[3] != k_cache.shape[3]:
            assert qv is not None and k_cache.shape[3] <= 64 and 256 <= v_cache.shape[3] <= 512
            assert qv.shape == (*q.shape[:2], v_cache.shape[3]) and qv.stride(-1) == 1 and qv.dtype == q.dtype
        out = torch.full((*q.shape[:2], v_cache.shape[3]), float("nan"), dtype=q.dtype)
        for i, length in enumerate(cache_seqlens.tolist()):
            rows = rows_of(cu_seqlens_q, i)
            if rows.stop - rows.start < 2:
                assert rows.start == rows.stop or length == 1
                continue
            pages = page_table[i, : -(-length // k_cache.shape[1])].long()
            keys, values = (t[pages].flatten(0, 1)[:length] for t in (k_cache, v_cache))
            own = q[rows]
            if qv is not None:
                keys, own = torch.cat((keys, values), -1), torch.cat((own, qv[rows]), -1)
            out[rows] = attend(own, keys, values, softmax_scale, True, window_size[0], softcap)
        return out

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, seqused_q: Any = None, seqused_k: Any = None, softmax_scale: Any = None,
        causal: bool = False, qv: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
        window_size: Any = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
        pack_gqa: Any = None, deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
    ) -> Tensor:  # fmt: skip
        int32(cu_seqlens_q, cu_seqlens_k)
        assert q.dtype in HALVES and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and not causal
        out = torch.empty(q.shape, dtype=q.dtype)
        for i in range(len(cu_seqlens_q) - 1):
            rows = rows_of(cu_seqlens_q, i)
            assert rows.stop - rows.start <= max_seqlen_q == max_seqlen_k
            out[rows] = attend(q[rows], k[rows], v[rows], softmax_scale, False, -1, 0.0)
        return out

    module = ModuleType("flash_attn_interface")
    module.__dict__.update(
        flash_attn_with_kvcache=flash_attn_with_kvcache, flash_attn_varlen_func=flash_attn_varlen_func
    )
    return module


class Wrapper:
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper, as 0.7.2 has it."""

    addresses: ClassVar[set[int]]
    plans: ClassVar[int]

    def __init__(
        self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        qo_indptr_buf: Any = None, paged_kv_indptr_buf: Any = None, paged_kv_indices_buf: Any = None,
        paged_kv_last_page_len_buf: Any = None, custom_mask_buf: Any = None, mask_indptr_buf: Any = None,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        assert float_workspace_buffer.dtype == torch.uint8 and float_workspace_buffer.numel() >= 128 << 20
        assert kv_layout == "HND" and backend in ("fa2", "fa3")

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, head_dim_vo: Any = None,
        custom_mask: Any = None, packed_custom_mask: Any = None, causal: bool = False, pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False, sm_scale: Any = None, window_left: int = -1, logits_soft_cap: Any = None,
        rope_scale: Any = None, rope_theta: Any = None, q_data_type: Any = "float16", kv_data_type: Any = None,
        non_blocking: bool = True, disable_split_kv: bool = False,
    ) -> None:  # fmt: skip
        int32(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert causal and disable_split_kv and q_data_type in HALVES
        assert len(paged_kv_indices) == paged_kv_indptr[-1]
        assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
        type(self).plans += 1
        self.tables = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self.sizes = num_qo_heads, num_kv_heads, head_dim_qk, page_size
        self.options = sm_scale, window_left, logits_soft_cap, q_data_type

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        k, v = paged_kv_cache
        offsets, starts, pages, last = self.tables
        scale, left, softcap, dtype = self.options
        heads, kv_heads, head_dim, page_size = self.sizes
        assert q.shape == (offsets[-1], heads, head_dim) and q.dtype == k.dtype == v.dtype == dtype
        assert k.shape == v.shape and k.shape[1:] == (kv_heads, page_size, head_dim) and k.stride() == v.stride()
        assert k.stride(-1) == q.stride(-1) == 1
        assert {t.untyped_storage().data_ptr() for t in (k, v)} <= self.addresses, "a copy of the cache"
        out = torch.full(q.shape, float("nan"), dtype=q.dtype)
        for i in range(len(last)):
            rows, own = rows_of(offsets, i), pages[rows_of(starts, i)].long()
            length = (len(own) - 1) * page_size + int(last[i])
            if rows.stop - rows.start < 2:
                assert rows.start == rows.stop or length == 1
                continue
            keys, values = (t[own].transpose(1, 2).flatten(0, 1)[:length] for t in (k, v))
            out[rows] = attend(q[rows], keys, values, scale, True, left, softcap)
        return out


def flashinfer(addresses: set[int]) -> ModuleType:
    """The module flashinfer; addresses: where caches lie, so that a copy is noticed."""
    module = ModuleType("flashinfer")
    own = type("BatchPrefillWithPagedKVCacheWrapper", (Wrapper,), {"addresses": addresses, "plans": 0})
    module.__dict__["BatchPrefillWithPagedKVCacheWrapper"] = own
    return module
