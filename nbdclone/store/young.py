"""Young blocks: those that are marked as the delta's, and that no durable page of the map tells of yet.

A young block is in one of three states, and then it is solid, for good:

    fresh      marked since the last flush noted the map
    noted      a record of it is being written, by the flush that is under way
    witnessed  that flush was acknowledged, and the record is all that tells of the block

**What must not happen:** that a witnessed block is changed. A power cut would leave a part of the change, the hash of
the record would not fit, and what was acknowledged would be lost. So who changes a block asks first, and:

    fresh      it is changed, and the next flush takes two syncs: the change may still be under way when the flush
               reads the block, and a block that is written twice is likely to be written again
    noted      it is changed, and the flush under way takes a second sync before it is acknowledged
    witnessed  it waits until a page of the map that has it is durable

The states are changed and asked for under one lock. So a change either asked before the flush noted the block, and
the flush sees that, or after, and is seen when the flush ends; and once the flush has ended, it waits.
"""

from __future__ import annotations

from nbdclone.store.layer import BLOCKS_PER_SEGMENT

_NONE: frozenset[int] = frozenset()


class Young:
    """The young blocks of a delta, by their number on the disk, ``limit`` fresh ones at most: beyond that none is.

    Who calls holds the delta's lock, but for looking whether something is in ``blocks``: what is not there
    is no young block, unless the one who asks marks it himself.
    """

    def __init__(self, limit: int) -> None:
        self.blocks: set[int] = set()
        self._limit = limit
        self._fresh: set[int] = set()
        self._noted = _NONE
        self._witnessed = _NONE
        # The next flush takes two syncs: for it has too many blocks, or blocks that are not known here; or for one that
        # was changed.
        self.counts = True
        self._rewritten = False
        self._spoilt = False  # one that is noted was changed

    def add(self, segment: int, first: int, last: int, bitmap: bytes | bytearray) -> None:
        """Blocks ``first`` to ``last`` of the segment are about to be set in its bitmap."""
        if len(self._fresh) + last - first >= self._limit:
            self.lose_count()
            return
        start = segment * BLOCKS_PER_SEGMENT
        for block in range(first, last + 1):
            if not bitmap[block >> 3] & 0x80 >> (block & 7):
                self._fresh.add(start + block)
                self.blocks.add(start + block)

    def lose_count(self) -> None:
        """The map has new blocks that are not told here, or not one by one: the next flush takes two syncs."""
        self.blocks -= self._fresh
        self._fresh = set()
        self.counts = False

    def change(self, first: int, count: int) -> bool:
        """Blocks [first, first + count) of the disk are about to be changed. True: they have to wait, see above."""
        wanted = range(first, first + count)
        if not self._witnessed.isdisjoint(wanted):
            return True
        if not self._noted.isdisjoint(wanted):
            self._spoilt = True
        if not self._fresh.isdisjoint(wanted):
            self._rewritten = True
        return False

    def note(self, journaling: bool) -> frozenset[int]:
        """A flush begins, and notes the map as it is: the blocks that it is to write a record of. None: two syncs."""
        if not self.counts or self._rewritten or not journaling:
            self.blocks -= self._fresh
            self._noted = _NONE
        else:
            self._noted = frozenset(self._fresh)
        self._fresh = set()
        self._rewritten = self._spoilt = False
        self.counts = True
        return self._noted

    def synced(self, recorded: bool) -> bool:
        """The sync of a flush is done, which made the witnessed blocks solid: are the noted ones witnessed now?"""
        witnessed = recorded and not self._spoilt
        self.blocks -= self._witnessed
        if not witnessed:
            self.blocks -= self._noted
        self._witnessed = self._noted if witnessed else _NONE
        self._noted = _NONE
        return witnessed

    def fail(self) -> None:
        """The flush failed: nothing is promised of what it had noted."""
        self.blocks -= self._noted
        self._noted = _NONE
        self.lose_count()

    def solidify(self) -> None:
        """The witnessed blocks are solid."""
        self.blocks -= self._witnessed
        self._witnessed = _NONE
