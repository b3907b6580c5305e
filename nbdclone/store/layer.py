"""What a layer is, and the geometry that layers and clones share.

A disk is divided into blocks of 4096 bytes, the unit of every map, and into segments of 127 MiB, the unit in which maps
are loaded, changed and written: one page of 4096 bytes holds a header of 32 bytes and 4064 bytes of bits, one for each
of a segment's 32,512 blocks.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

SECTOR_SIZE = 512
BLOCK_SIZE = 4096
BLOCK_SHIFT = 12
BITMAP_SIZE = 4064
BLOCKS_PER_SEGMENT = BITMAP_SIZE * 8
SEGMENT_SIZE = BLOCKS_PER_SEGMENT * BLOCK_SIZE

# The smallest disk is one block. The largest is what ext4 can address at 4 KiB blocks, to which the other file
# systems' limits are far; the limit of a pool's own file system is met when a delta is made, as FileTooLarge.
MIN_SIZE = BLOCK_SIZE
MAX_SIZE = 1 << 44

# The owner of blocks that no layer holds: they read as zeros.
NOWHERE = 0
# An owner is one byte, and 0 is taken.
MAX_LAYERS = 255

# For each value of a byte of a bitmap, the eight blocks that it stands for: 0xff where the bit is set.
_SPREAD = tuple(bytes(0xFF if byte & (0x80 >> bit) else 0 for bit in range(8)) for byte in range(256))
_RUN = re.compile(rb"(.)\1*", re.DOTALL)
_ONES = int.from_bytes(b"\x01" * BLOCKS_PER_SEGMENT, "little")


class Layer(Protocol):
    """An image in a chain. Its bytes are read straight from its file, at a place that arithmetic gives.

    ``fd`` and ``stride`` say where: byte ``offset`` of the disk, in segment ``s``, stands at
    ``offset + (s + 1) * stride`` of the file. A plain image has stride 0.
    """

    fd: int
    stride: int
    size: int

    @property
    def id(self) -> bytes:
        """What deltas above name as their parent."""

    def paint(self, segment: int, owners: bytes, index: int, nowait: bool) -> bytes:
        """Return ``owners`` (a byte per block of the segment) with ``index`` at each block that this layer holds.

        Raises BlockingIOError if ``nowait`` and the answer is not in memory.
        """

    def close(self) -> None:
        """Let go of the file and of the lock on it."""


class Extent(NamedTuple):
    """A stretch of a disk, ``length`` bytes of it, all alike.

    ``origin`` is the layer that it is read from: NOWHERE, 1 for the base, 2 and up for those above it. ``depth`` is the
    same as seen from the top: 0 for NOWHERE, 1 for the topmost layer, 2 for the one under it. A ``hole`` takes no
    space there, and reads as zeros.
    """

    length: int
    origin: int
    depth: int
    hole: bool


@functools.lru_cache(maxsize=2 * (MAX_LAYERS + 1))
def uniform(index: int) -> bytes:
    """The owners of a segment that one layer holds whole. Shared: an untouched segment costs nothing."""
    return bytes([index]) * BLOCKS_PER_SEGMENT


def set_bits(bitmap: bytearray, first: int, last: int) -> None:
    """Set bits ``first`` to ``last``; bit 0 is the most significant of byte 0."""
    if first == last:
        bitmap[first >> 3] |= 0x80 >> (first & 7)
        return
    low, high = first >> 3, last >> 3
    head = 0xFF >> (first & 7)
    tail = 0xFF << (7 - (last & 7)) & 0xFF
    if low == high:
        bitmap[low] |= head & tail
    else:
        bitmap[low] |= head
        bitmap[high] |= tail
        bitmap[low + 1 : high] = b"\xff" * (high - low - 1)


def paint_bitmap(owners: bytes, bitmap: bytes | bytearray, index: int) -> bytes:
    """Return ``owners`` with ``index`` at each block whose bit is set in ``bitmap`` (most significant bit first)."""
    mask = int.from_bytes(b"".join([_SPREAD[byte] for byte in bitmap]), "little")
    below = int.from_bytes(owners, "little")
    painted = (below & ~mask) | (mask & (_ONES * index))
    return painted.to_bytes(BLOCKS_PER_SEGMENT, "little")


def paint_delta(segment: int, owners: bytes, bitmap: bytes | bytearray, index: int, overlap: int | None) -> bytes:
    """Return ``owners`` with ``index`` where the bitmap of a delta says; what lies beneath ends at ``overlap``."""
    if overlap is not None:
        seen = min(max(overlap // BLOCK_SIZE - segment * BLOCKS_PER_SEGMENT, 0), BLOCKS_PER_SEGMENT)
        owners = owners[:seen] + uniform(NOWHERE)[seen:]
    if not any(bitmap):
        return owners
    if bitmap.count(0xFF) == BITMAP_SIZE:
        return uniform(index)
    return paint_bitmap(owners, bitmap, index)


def block_count(size: int) -> int:
    """How many blocks a disk of ``size`` bytes has; the last may be partial."""
    return -(-size // BLOCK_SIZE)


def is_zero(data: bytes | bytearray | memoryview) -> bool:
    """Is every byte zero?"""
    return data[0] == 0 and data[-1] == 0 and bytes(data) == bytes(len(data))


def may_hold_zeros(view: memoryview) -> bool:
    """Can one of these whole blocks be all zeros? False for nearly all data: a block of zeros begins and ends with one.

    Much data begins with a zero byte (offsets, lengths, sparse tables), so looking at one end alone does not tell.
    """
    if len(view) == BLOCK_SIZE:
        return not (view[0] or view[-1])
    ends = int.from_bytes(view[::BLOCK_SIZE], "little") | int.from_bytes(view[BLOCK_SIZE - 1 :: BLOCK_SIZE], "little")
    return 0 in ends.to_bytes(len(view) >> BLOCK_SHIFT, "little")


def zero_runs(view: memoryview) -> Iterator[tuple[bool, int, int]]:
    """Divide ``view``, whose last block may be partial, into runs of blocks: (all zeros?, start, end) in bytes."""
    kinds = bytes(is_zero(view[at : at + BLOCK_SIZE]) for at in range(0, len(view), BLOCK_SIZE))
    for run in _RUN.finditer(kinds):
        yield bool(run[0][0]), run.start() << BLOCK_SHIFT, min(run.end() << BLOCK_SHIFT, len(view))
