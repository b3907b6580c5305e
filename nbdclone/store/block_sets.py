"""Sets of the blocks of a segment: a byte for each block, 1 where it is among them, as the owners in a chain's map."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from nbdclone.store.layer import (
    BITMAP_SIZE,
    BLOCK_SHIFT,
    BLOCKS_PER_SEGMENT,
    NOWHERE,
    SEGMENT_SIZE,
    Layer,
    paint_bitmap,
    uniform,
)

NO_BLOCKS = uniform(NOWHERE)
ALL_BLOCKS = uniform(1)
_SET = re.compile(rb"\x01+")
_AS_DIGITS = bytes.maketrans(b"\0\1", b"01")


def blocks_in(bitmap: bytes | None) -> bytes:
    """A byte for each block of the segment: 1 where its bit is set."""
    return NO_BLOCKS if bitmap is None else paint_bitmap(NO_BLOCKS, bitmap, 1)


def to_bitmap(blocks: bytes) -> bytes:
    """The other way."""
    return int(blocks.translate(_AS_DIGITS), 2).to_bytes(BITMAP_SIZE, "big")


def owned_by(layers: Iterable[Layer], segment: int) -> bytes:
    """Which blocks of the segment any of the layers holds itself. Waits for the disk."""
    owned = NO_BLOCKS
    for layer in layers:
        own = layer.paint(segment, NO_BLOCKS, 1, nowait=False)
        if own is not NO_BLOCKS:
            owned = either(owned, own)
    return owned


def either(one: bytes, other: bytes) -> bytes:
    """The blocks that are in one or the other."""
    return _combined(int.from_bytes(one, "little") | int.from_bytes(other, "little"))


def both(one: bytes, other: bytes) -> bytes:
    """The blocks that are in both."""
    return _combined(int.from_bytes(one, "little") & int.from_bytes(other, "little"))


def without(one: bytes, other: bytes) -> bytes:
    """The blocks of one that are not in the other."""
    return _combined(int.from_bytes(one, "little") & ~int.from_bytes(other, "little"))


def _combined(number: int) -> bytes:
    return number.to_bytes(BLOCKS_PER_SEGMENT, "little")


def runs_of(blocks: bytes, segment: int) -> Iterator[tuple[int, int]]:
    """The (offset, length) on the disk of each run of blocks, in order."""
    start = segment * SEGMENT_SIZE
    for run in _SET.finditer(blocks):
        yield start + (run.start() << BLOCK_SHIFT), (run.end() - run.start()) << BLOCK_SHIFT
