"""Who owns which block of the KV cache, and which full blocks can be used again by a text that begins alike.

Blocks are counted by reference. A full block is known by a digest of all tokens up to its end; it stays known after its
last owner has gone, until its space is wanted, least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockManager:
    """num_blocks blocks, all free at first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._digest: list[int | None] = [None] * num_blocks
        self._known: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """Blocks without an owner, the next one to be given away first."""

    @property
    def num_free(self) -> int:
        """Blocks that can be had now, those with reusable content included."""
        return len(self._free)

    def allocate(self) -> int:
        """A block for one owner. Its old content is forgotten. At least one must be free."""
        block, _ = self._free.popitem(last=False)
        digest = self._digest[block]
        if digest is not None:
            del self._known[digest]
            self._digest[block] = None
        self._references[block] = 1
        return block

    def find(self, digest: int) -> int | None:
        """The block with this content, or None."""
        return self._known.get(digest)

    def share(self, block: int) -> None:
        """One more owner for a block that `find` gave."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def is_free(self, block: int) -> bool:
        return self._references[block] == 0

    def register(self, block: int, digest: int) -> None:
        """The block is full and computed. If its content is known elsewhere already, that one stays the known one."""
        if self._digest[block] is None and digest not in self._known:
            self._known[digest] = block
            self._digest[block] = digest

    def release(self, blocks: Iterable[int]) -> None:
        """One owner of these blocks, in text order, has gone. Ends of texts are given away before beginnings."""
        for block in reversed(list(blocks)):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                if self._digest[block] is None:
                    self._free.move_to_end(block, last=False)

    def check_integrity(self, owned: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless the books agree with the blocks that owners hold."""
        counts = [0] * self.num_blocks
        for blocks in owned:
            for block in blocks:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from what owners hold"
        assert set(self._free) == {b for b, n in enumerate(counts) if n == 0}, "free list differs from unowned blocks"
        assert {d: b for b, d in enumerate(self._digest) if d is not None} == self._known, "known digests differ"
