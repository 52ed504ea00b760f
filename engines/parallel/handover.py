"""Blocks of KV cache on their way from an engine that computes prompts to one that goes on with them.

Rank r of the one reads from rank r of the other, which holds the same part of the model: over gloo, as the ranks of an
engine use it, and through the host's memory whatever the device. The reader asks for blocks by their numbers and waits;
a thread of the other rank answers, whatever its engine is doing. A pair of ranks is a group of its own, so that the end
of one process is an exception in the others and nothing more.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import sys
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engines.models.base import Cache
from engines.ops.kv_cache import block_tensors
from engines.parallel.group import PATIENCE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store, TCPStore

ADDRESS = "127.0.0.1"
"""Engines that hand over are children of one process."""
TIMEOUT = timedelta(seconds=60)
"""Longest wait for one layer's blocks."""
CONNECT_S = 10.0
HERE, OVER = "here", "over"
SERVER, READER = 0, 1
"""Ranks in the group of the two."""


def open_store() -> tuple[TCPStore, int]:
    """A place where readers find servers, and a number that no other one has."""
    from torch.distributed import TCPStore

    return TCPStore(ADDRESS, 0, 1, is_master=True, wait_for_workers=False), secrets.randbits(62)


def join_store(port: int, timeout: timedelta = PATIENCE) -> Store:
    """One that another process has opened. Raises OSError or RuntimeError when it is not there."""
    from torch.distributed import TCPStore

    socket.create_connection((ADDRESS, port), CONNECT_S).close()  # TCPStore tries for seconds what is refused at once
    return TCPStore(ADDRESS, port, 1, is_master=False, timeout=timeout)


def _pair(store: Store, name: str, rank: int, timeout: timedelta) -> ProcessGroup:
    """The group of a server and a reader that have agreed on a name. Raises RuntimeError if the other does not come."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    pair: Any = dist.ProcessGroupGloo(dist.PrefixStore(name, store), rank, 2, timeout)
    group: ProcessGroup = pair
    return group


def knock(store: Store, name: str, word: str) -> str:
    """Say a word to the server of that name; the name of what may follow."""
    own = f"{name}/{store.add(f'{name}/knocks', 1) - 1}"
    store.set(own, word)
    return own


class BlockServer:
    """Gives blocks of a rank's caches to whoever asks, as long as its process and the store live.

    Args:
        port, key: Of `open_store`.
        caches: Read when somebody asks. Blocks that are asked for must not change meanwhile.
    """

    def __init__(self, port: int, key: int, rank: int, caches: Sequence[Cache]) -> None:
        self._port, self._name, self._caches = port, f"{key}/{rank}", caches
        self._thread = threading.Thread(target=self._accept, name="hand over", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let nobody in any more; who is in is served until it leaves."""
        knock(join_store(self._port), self._name, OVER)
        self._thread.join()

    def _accept(self) -> None:
        store = join_store(self._port)
        for number in itertools.count():
            name = f"{self._name}/{number}"
            if store.get(name) == OVER.encode():
                return
            threading.Thread(target=self._serve, args=(name,), name="hand over", daemon=True).start()

    def _serve(self, name: str) -> None:
        torch.set_num_threads(1)  # of this thread: the engine's own are computing
        with contextlib.suppress(RuntimeError), torch.inference_mode():  # the reader has gone
            pair = _pair(join_store(self._port), name, SERVER, PATIENCE)
            while True:
                count = torch.empty(1, dtype=torch.int64)
                pair.recv([count], READER, 0).wait()
                blocks = torch.empty(int(count), dtype=torch.int64)
                pair.recv([blocks], READER, 0).wait()
                for cache in self._caches:
                    for tensor in block_tensors(cache):
                        chosen = as_bytes(tensor).index_select(0, blocks.to(tensor.device))
                        pair.send([chosen.cpu()], READER, 0).wait()


class BlockReader:
    """Fills blocks of a rank's caches with those of the same rank elsewhere."""

    def __init__(self, rank: int, caches: Sequence[Cache]) -> None:
        self._rank, self._caches = rank, caches
        self._pairs: dict[int, ProcessGroup | None] = {}
        """By the server's key; None: lost."""

    def read(self, port: int, key: int, theirs: Sequence[int], mine: Sequence[int]) -> bool:
        """Fill the blocks `mine` with `theirs`; False, and anything in them, when the server does not give them."""
        try:
            if key not in self._pairs:
                self._pairs[key] = self._meet(port, f"{key}/{self._rank}")
            pair = self._pairs[key]
            if pair is None:
                return False
            self._fill(pair, theirs, mine)
        except (RuntimeError, OSError):
            self._pairs[key] = None
            return False
        return True

    def close(self) -> None:
        """Leave the servers."""
        self._pairs.clear()

    def _meet(self, port: int, name: str) -> ProcessGroup:
        store = join_store(port, TIMEOUT)
        return _pair(store, knock(store, name, HERE), READER, TIMEOUT)

    def _fill(self, pair: ProcessGroup, theirs: Sequence[int], mine: Sequence[int]) -> None:
        blocks = torch.tensor([*theirs], dtype=torch.int64)
        for request in (torch.tensor([len(blocks)]), blocks):
            pair.send([request], SERVER, 0).wait()
        places = torch.tensor([*mine], dtype=torch.int64)
        for cache in self._caches:
            for tensor in block_tensors(cache):
                bytes_of = as_bytes(tensor)
                came = torch.empty(len(places), bytes_of.shape[1], dtype=torch.uint8)
                pair.recv([came], SERVER, 0).wait()
                bytes_of.index_copy_(0, places.to(tensor.device), came.to(tensor.device))


def as_bytes(tensor: Tensor) -> Tensor:
    """[n, ...] as [n, bytes of each], the same memory."""
    return tensor.view(torch.uint8).flatten(1)
