"""Which block is given away next: those whose text is awaited last, and lately used ones before those never used."""

from __future__ import annotations

from collections.abc import Sequence

from engines.core.block_manager import BlockManager


def used(blocks: BlockManager, digests: Sequence[int | None]) -> list[int]:
    """A text of these blocks, computed and gone again; None: a block that was not full."""
    owned = [blocks.allocate() for _ in digests]
    for block, digest in zip(owned, digests, strict=True):
        if digest is not None:
            blocks.register(block, digest)
    blocks.release(owned)
    return owned


def test_blocks_used_lately_come_before_those_never_used() -> None:
    blocks = BlockManager(100, num_spare=2)
    seen = {block for digest in range(0, 60, 3) for block in used(blocks, [digest, digest + 1, None])}
    assert len(seen) <= 6, "a stream of texts that nobody waits for touches the cache's memory again and again"


def test_on_a_device_every_text_is_kept_while_there_is_room() -> None:
    blocks = BlockManager(10)
    used(blocks, range(10))
    assert all(blocks.find(digest) is not None for digest in range(10))
    used(blocks, [10])
    assert [digest for digest in range(10) if blocks.find(digest) is None] == [9], "ends go before beginnings"


def test_what_is_awaited_stays() -> None:
    blocks = BlockManager(6, num_spare=0)
    blocks.expect([1, 2])
    blocks.expect([1])
    first = used(blocks, [1, 2, 3])
    used(blocks, [4, 5, 6, 7])
    assert [blocks.find(digest) for digest in (1, 2, 3)] == [*first[:2], None]
    blocks.expect_no_more([1, 2])
    blocks.check_integrity([], [[1]])
    used(blocks, range(10, 16))
    assert blocks.find(1) is None and blocks.num_free == 6, "with nothing else left even that is given away"


def test_one_that_is_shared_is_not_given_away() -> None:
    blocks = BlockManager(3, num_spare=0)
    block, *_ = used(blocks, [1])
    blocks.share(block)
    assert block not in used(blocks, [5, 6])
    assert blocks.find(1) == block
    blocks.check_integrity([[block]], [])
