"""Who owns which block of the KV cache, and which full blocks can be used again by a text that begins alike.

Blocks are counted by reference. A full block is known by a digest of all tokens up to its end; it stays known after its
last owner has gone, until its space is wanted: blocks that a waiting text begins with last, and otherwise the least
recently used first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable


class BlockManager:
    """num_blocks blocks, all free at first."""

    def __init__(self, num_blocks: int, num_spare: int | None = None) -> None:
        """num_spare: blocks of texts that nobody waits for that are kept while there are blocks never used; None: all.

        Blocks that were used lately are in caches, and never used ones may still have to come from the system.
        """
        self.num_blocks = num_blocks
        self._num_spare = num_blocks if num_spare is None else num_spare
        self._references = [0] * num_blocks
        self._digest: list[int | None] = [None] * num_blocks
        self._known: dict[int, int] = {}
        self._awaited: Counter[int] = Counter()
        # Blocks without an owner: of no content, of one that nobody waits for, of one that somebody does.
        self._empty: OrderedDict[int, None] = OrderedDict.fromkeys(reversed(range(num_blocks)))
        self._spare: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be had now, those with reusable content included."""
        return len(self._empty) + len(self._spare) + len(self._kept)

    def expect(self, digests: Iterable[int]) -> None:
        """A text that begins with these blocks waits."""
        self._awaited.update(digests)

    def expect_no_more(self, digests: Iterable[int]) -> None:
        """It waits no more."""
        for digest in digests:
            self._awaited[digest] -= 1
            if not self._awaited[digest]:
                del self._awaited[digest]

    def allocate(self) -> int:
        """A block for one owner. Its old content is forgotten. At least one must be free."""
        if self._empty and len(self._spare) <= self._num_spare:
            block, _ = self._empty.popitem()
        else:
            block, _ = (self._spare or self._empty or self._kept).popitem(last=False)
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
            del (self._kept if block in self._kept else self._spare)[block]
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
                digest = self._digest[block]
                pool = self._empty if digest is None else self._kept if digest in self._awaited else self._spare
                pool[block] = None

    def check_integrity(self, owned: Iterable[Iterable[int]], awaited: Iterable[Iterable[int]]) -> None:
        """Raises AssertionError unless the books agree with the blocks that owners hold and texts that wait."""
        counts = [0] * self.num_blocks
        for blocks in owned:
            for block in blocks:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from what owners hold"
        free = [*self._empty, *self._spare, *self._kept]
        assert sorted(free) == [b for b, n in enumerate(counts) if n == 0], "free blocks differ from unowned ones"
        assert {d: b for b, d in enumerate(self._digest) if d is not None} == self._known, "known digests differ"
        assert all(self._digest[block] is None for block in self._empty), "a block of no content has one"
        expected = Counter(digest for digests in awaited for digest in digests)
        assert expected == self._awaited, "awaited blocks differ from what waits"
