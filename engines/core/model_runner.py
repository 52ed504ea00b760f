"""From a scheduled step to hidden states: builds the ragged batch, keeps the KV cache, calls the model."""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from engines.api import UnsupportedModelError
from engines.batch import Batch, PrefixGroup
from engines.core.device import Device
from engines.core.graphs import DecodeGraphs, is_decode
from engines.core.scheduler import Scheduled
from engines.core.sequence import UNREAD
from engines.models.base import Cache, Model
from engines.ops import OpSet
from engines.ops.kv_cache import KVDtype
from engines.parallel.leader import LeaderModel

MIN_GROUP_SEQS = 4
MIN_GROUP_BLOCKS = 2


def allocate_caches(
    model: Model,
    ops: OpSet,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    kv_dtype: KVDtype | None = None,
) -> list[Cache]:
    """One cache a layer, of the kind that the model's attention works on. kv_dtype: None for `dtype`.

    Raises UnsupportedModelError for a kv_dtype and a model whose cache has no such form.
    """
    layers = range(model.num_cache_layers)
    if kv_dtype is not None:
        if model.latent_rank or model.spec is None:
            raise UnsupportedModelError(
                f"backend_config.kv_dtype: {kv_dtype}; expected auto for latent attention and for models that run "
                "through transformers; set it so"
            )
        shape = (model.num_kv_heads, model.head_dim)
        return [ops.allocate_quantized_kv_cache(num_blocks, block_size, *shape, kv_dtype, device) for _ in layers]
    if model.latent_rank:
        sizes = (model.latent_rank, model.head_dim - model.latent_rank)
        return [ops.allocate_latent_cache(num_blocks, block_size, *sizes, dtype, device) for _ in layers]
    sizes = (model.num_kv_heads, model.head_dim)
    return [ops.allocate_kv_cache(num_blocks, block_size, *sizes, dtype, device) for _ in layers]


class ModelRunner:
    """A model, its caches and the batches made for it."""

    def __init__(
        self,
        model: Model,
        ops: OpSet,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: Device,
        kv_dtype: KVDtype | None = None,
        max_num_seqs: int = 0,
        max_model_len: int = 0,
    ) -> None:
        """max_num_seqs, max_model_len: of the decode steps that may be captured (graphs.may_capture); 0: none are."""
        self.model = model
        self.block_size = block_size
        self.device = device
        self.paged = model.paged and model.num_cache_layers > 0
        captures = max_num_seqs > 0
        where = (ops, num_blocks + captures, block_size, dtype, device.place)
        self.caches = allocate_caches(model, *where, kv_dtype) if self.paged else []
        self.graphs: DecodeGraphs | None = None
        """Nothing is captured until its `capture` is called."""
        if captures:
            sizes = (block_size, max_model_len, max_num_seqs)
            self.graphs = DecodeGraphs(model, self.caches, device, *sizes, scratch_block=num_blocks)
        # A window may hide part of a shared beginning from some of the sequences; without a spec that is not known.
        windows = getattr(model.spec, "windows", (1,))
        self.groups_prefixes = self.paged and not any(windows)

    def execute(
        self,
        step: Many[Scheduled],
        outputs: list[int] | None,
        block_tables: np.ndarray | list[np.ndarray],
        unread: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of the tokens whose index in the batch is in `outputs` (None: all): [num_outputs, hidden].

        block_tables: of several copies, each one's; `step` and `outputs` are then in the order of copies. unread: the
        tokens that the step in flight draws, for sequences whose last token is one of them.
        """
        if isinstance(block_tables, np.ndarray):
            return self.model.forward(self.batch(step, outputs, block_tables, unread), self.caches)
        batches: list[Batch | None] = []
        first = 0
        for copy, tables in enumerate(block_tables):
            part = [s for s in step if s.seq.copy == copy]
            end = first + sum(s.num_new_tokens for s in part)
            wanted = None if outputs is None else [index - first for index in outputs if first <= index < end]
            batches.append(self.batch(part, wanted, tables, unread) if part else None)
            first = end
        assert isinstance(self.model, LeaderModel)
        return self.model.forward_copies(batches, self.caches)

    def decode(
        self, step: Many[Scheduled], block_tables: np.ndarray | list[np.ndarray], unread: Tensor | None
    ) -> Tensor | None:
        """The logits of a step that only draws tokens, by a captured graph; None where there is none for it."""
        if self.graphs is None or not is_decode(step) or not isinstance(block_tables, np.ndarray):
            return None
        return self.graphs.replay(step, block_tables, unread)

    def batch(
        self,
        step: Many[Scheduled],
        outputs: list[int] | None,
        block_tables: np.ndarray,
        unread: Tensor | None = None,
    ) -> Batch:
        """block_tables: the scheduler's, by slot."""
        counts = np.array([s.num_new_tokens for s in step], dtype=np.int64)
        starts = np.array([s.start for s in step], dtype=np.int64)
        offsets = np.zeros(len(step) + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        token_ids: list[int] = []
        for s in step:
            token_ids += s.seq.token_ids[s.start : s.end]
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        lengths = starts + counts
        longest = int(lengths.max())
        arrays = {
            "token_ids": np.array(token_ids, dtype=np.int64),
            "positions": positions,
            "cu_seqlens_q": offsets.astype(np.int32),
            "seq_lens": lengths.astype(np.int32),
        }
        groups: list[tuple[np.ndarray, int]] = []
        if self.paged:
            width = -(-longest // self.block_size)
            rows = block_tables[[s.seq.slot for s in step], :width]
            owner = np.repeat(np.arange(len(step)), counts)
            slots = rows[owner, positions // self.block_size].astype(np.int64) * self.block_size
            arrays["slot_mapping"] = slots + positions % self.block_size
            arrays["block_tables"] = rows
            if self.groups_prefixes and len(step) >= MIN_GROUP_SEQS:
                groups = self._prefix_groups(rows, counts, lengths)
        if outputs is not None:
            arrays["output_indices"] = np.array(outputs, dtype=np.int64)
        adapters = [s.seq.adapter_id for s in step]
        if max(adapters) >= 0:
            arrays["adapter_ids"] = np.repeat(np.array(adapters, dtype=np.int64), counts)
        keys = [s.seq.context_key for s in step]
        if any(keys):
            arrays["context_keys"] = np.array(keys, dtype=np.int64)
        members = [group for group, _ in groups]
        fed = unread_tokens(step, arrays["token_ids"]) if unread is not None else []
        uploaded = self.device.upload([*arrays.values(), *members, *fed])
        tensors = dict(zip(arrays, uploaded, strict=False))
        if unread is not None and fed:
            places, read = uploaded[-2:]
            tensors["token_ids"].index_copy_(0, places, unread.index_select(0, read))
        shared = zip(uploaded[len(arrays) :], (num_blocks for _, num_blocks in groups), strict=False)
        return Batch(
            max_seqlen_q=int(counts.max()),
            max_seqlen_k=longest,
            prefix_groups=tuple(PrefixGroup(seqs, num_blocks) for seqs, num_blocks in shared),
            seq_ids=tuple(s.seq.seq_id for s in step),
            lengths=np.stack((counts, lengths)),
            **tensors,
        )

    def _prefix_groups(self, rows: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Decoding sequences whose tables begin with the same blocks: their places, int32, and how many blocks."""
        decoding = np.flatnonzero(counts == 1)
        if len(decoding) < MIN_GROUP_SEQS:
            return []
        first = rows[decoding, 0]
        groups = []
        values, sizes = np.unique(first, return_counts=True)
        for value in values[sizes >= MIN_GROUP_SEQS]:
            members = decoding[first == value]
            full = int((lengths[members].min() - 1) // self.block_size)
            same = (rows[members, :full] == rows[members[0], :full]).all(axis=0)
            shared = full if same.all() else int(same.argmin())
            if shared >= MIN_GROUP_BLOCKS:
                groups.append((members.astype(np.int32), shared))
        return groups


def unread_tokens(step: Many[Scheduled], token_ids: np.ndarray) -> list[np.ndarray]:
    """(places of the batch's tokens that are UNREAD, their rows among those that the step in flight draws), or
    nothing."""
    rows = [s.seq.unread_row for s in step if s.seq.unread_row >= 0]
    return [np.flatnonzero(token_ids == UNREAD), np.array(rows, dtype=np.int64)] if rows else []
