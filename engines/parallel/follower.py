"""The process of a rank that is not the first: it loads its part of the model and computes when the leader does."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import torch

from engines.api import EngineSettings
from engines.child import leave_signals_to_parent
from engines.core.device import Device, out_of_memory
from engines.core.graphs import DecodeGraphs, may_capture
from engines.core.model_runner import allocate_caches
from engines.load import fitted, make_opset, prepare
from engines.models.base import Cache, Model
from engines.models.load import load_model
from engines.ops import OpSet
from engines.ops.kv_cache import KVDtype
from engines.parallel.group import Group
from engines.parallel.handover import BlockReader, BlockServer
from engines.parallel.leader import Command, batch_of, payload_sizes, read_plan, step_of_copies
from engines.parallel.place import Place
from engines.weights import DTYPES

if TYPE_CHECKING:
    from torch.distributed import Store


def serve(settings: EngineSettings, rank: int, store: Store, timeout: timedelta) -> None:
    """Be the rank: returns when the leader is done or gone."""
    leave_signals_to_parent()
    group = Group(Place(rank, settings.tp, settings.ep), settings.numerics == "invariant")
    ops = make_opset(settings)
    prepare(settings)
    group.join(store, settings.device, timeout)
    with torch.inference_mode():
        Follower(load_model(settings, ops, group), ops, settings, group).follow()
    group.leave()


class Follower:
    """A rank's part of the model and of the caches."""

    def __init__(self, model: Model, ops: OpSet, settings: EngineSettings, group: Group) -> None:
        self._model, self._ops, self._settings, self._group = model, ops, settings, group
        self._dtype, self._device = DTYPES[settings.dtype], Device(torch.device(settings.device))
        self._caches: list[Cache] = []
        self._reader = BlockReader(group.place.rank, self._caches)
        self._server: BlockServer | None = None
        self._graphs: DecodeGraphs | None = None

    def follow(self) -> None:
        """Do what the leader says until it says no more. What fails here is raised: the leader cannot go on alone."""
        fitted(self._settings, self._model, self._ops, self._dtype, self._device, self._group)
        while True:
            try:
                command, *numbers = self._group.obey()
            except RuntimeError:
                return  # the leader has gone, and with it whoever wants to know
            if command == Command.LEAVE:
                self._reader.close()
                if self._server is not None:
                    self._server.close()
                return
            self._do(command, numbers)

    def _do(self, command: int, numbers: Sequence[int]) -> None:
        if command == Command.ALLOCATE:
            self._group.least(int(self._allocate(numbers[0])))
        elif command == Command.FORWARD:
            self._forward(read_plan(numbers))
        elif command == Command.LOGITS:
            if self._group.place.copy:
                return
            rows = torch.empty(numbers[0], self._model.hidden_size, dtype=self._dtype, device=self._device.place)
            self._model.logits(self._group.share_in_copy(rows))
        elif command == Command.SERVE:
            self._server = BlockServer(numbers[0], numbers[1], self._group.place.rank, self._caches)
        elif command == Command.READ:
            port, key, *blocks = numbers
            middle = len(blocks) // 2
            self._group.least(int(self._reader.read(port, key, blocks[:middle], blocks[middle:])))
        elif command == Command.CAPTURE:
            budget, block_size, length, seqs, scratch = numbers
            parts = (self._model, self._caches, self._device)
            self._graphs = DecodeGraphs(*parts, block_size, length, seqs, scratch, self._group)
            self._graphs.capture_part(budget)
        elif command == Command.REPLAY:
            assert self._graphs is not None
            self._graphs.replay_part(*numbers)

    def _forward(self, plan: list[list[int]]) -> None:
        sizes = [sum(payload_sizes(numbers)) if numbers else 0 for numbers in plan]
        payload = self._group.share(torch.empty(sum(sizes), dtype=torch.int64, device=self._device.place))
        copy = self._group.place.copy
        own = payload.split(sizes)[copy]
        batch = batch_of(plan[copy], own) if plan[copy] else None
        step_of_copies(self._model, batch, self._caches, plan, self._group)

    def _allocate(self, count: int) -> bool:
        """Whether there was memory for the caches."""
        config, self._caches = self._settings.config, []
        kv_dtype = None if config.kv_dtype == "auto" else cast(KVDtype, config.kv_dtype)
        count += may_capture(self._model, config, self._device, self._group)
        where = (self._ops, count, config.block_size, self._dtype, self._device.place)
        try:
            self._caches = allocate_caches(self._model, *where, kv_dtype)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        self._reader = BlockReader(self._group.place.rank, self._caches)
        return bool(self._caches)
