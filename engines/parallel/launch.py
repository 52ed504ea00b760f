"""The processes of a group: its leader starts the others as its children, and does not outlive them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from engines.api import EngineSettings
from engines.child import die_with_parent
from engines.parallel.group import ALONE, Group
from engines.parallel.place import Place
from engines.parallel.world import world

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

TIMEOUT = timedelta(minutes=30)
"""Longest that ranks wait for each other in a step, or while one of them still reads its weights."""
GRACE_S = 2.0
"""What a leader gets to notice by itself that a follower has gone, and to say what it was doing."""
LOST = 3
"""Exit status of a leader that did not."""
_BOOTSTRAP = (
    "import pickle, sys; sys.path[:], *rest = pickle.load(sys.stdin.buffer); "
    "from engines.parallel.launch import follow; follow(*rest)"
)


@dataclass
class Ranks:
    """A group in the making, as its leader has it."""

    group: Group
    settings: EngineSettings
    store: Store | None = None
    followers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def meet(self) -> Group:
        """The group, once all ranks are there. They can be told that it is over by leaving it, or by ending."""
        if self.store is not None:
            self.group.join(self.store, self.settings.device, TIMEOUT)
        return self.group


def start(settings: EngineSettings) -> Ranks:
    """The ranks of an engine; the caller is the first. The others import what they need until they meet.

    To be called by the process's main thread: they are killed when it ends. Raises ValueError as `world` does.
    """
    place = Place(0, settings.tp, settings.ep)
    if place.size == 1:
        return Ranks(ALONE, settings)
    group = Group(place, settings.numerics == "invariant")
    if settings.launch != "spawn":
        here = world(settings.launch, os.environ)
        return Ranks(group, settings, _store(here.address, here.port, place.size, first=True))
    if settings.device == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    store = _store("127.0.0.1", 0, place.size, first=True)
    followers = [_start_follower(settings, rank, store.port) for rank in range(1, place.size)]
    threading.Thread(target=_watch, args=(followers,), name="watch followers", daemon=True).start()
    return Ranks(group, settings, store, followers)


def _store(address: str, port: int, size: int, first: bool) -> TCPStore:
    """Where ranks meet; the first one keeps it."""
    from torch.distributed import TCPStore

    return TCPStore(address, port, size, is_master=first, wait_for_workers=False, timeout=TIMEOUT)


def _start_follower(settings: EngineSettings, rank: int, port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", _BOOTSTRAP], stdin=subprocess.PIPE)  # noqa: S603
    assert process.stdin is not None
    pickle.dump((sys.path, settings, rank, port), process.stdin)
    process.stdin.close()
    return process


def follow(settings: EngineSettings, rank: int, port: int) -> None:
    """Be a follower that its leader has started."""
    die_with_parent()
    _follow(settings, rank, rank, _store("127.0.0.1", port, max(settings.tp, settings.ep), first=False))


def follow_world(settings: EngineSettings) -> None:
    """Be a follower that was started from outside. Returns when the leader is done or gone."""
    here = world(settings.launch, os.environ)
    store = _store(here.address, here.port, here.size, first=False)
    _follow(settings, here.rank, here.local_rank, store)


def _follow(settings: EngineSettings, rank: int, device: int, store: Store) -> None:
    """device: of those that this process sees, unless it sees its own only."""
    from engines.parallel.follower import serve

    if settings.device != "cpu":
        import torch

        module = torch.get_device_module(settings.device)
        module.set_device(device if module.device_count() > 1 else 0)
    serve(settings, rank, store, TIMEOUT)


def _watch(followers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End this process when a follower has ended with an error, in case it waits for it in a call without end."""
    while all(process.poll() is None for process in followers):
        time.sleep(0.1)
    ended = next((rank, p.returncode) for rank, p in enumerate(followers, 1) if p.returncode is not None)
    if ended[1] == 0:
        return
    time.sleep(GRACE_S)
    print(f"rank {ended[0]} has ended with exit status {ended[1]}: so does the engine", file=sys.stderr, flush=True)
    os._exit(LOST)
