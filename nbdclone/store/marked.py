"""What the maps of deltas say, read from their files: which blocks are marked, and which layer a range is read from."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nbdclone.store.delta_file import (
    EMPTY_BITMAP,
    EMPTY_PAGE,
    MAP_SLOTS,
    PAGE_SIZE,
    SEGMENT_SPAN,
    Header,
    decode_map_page,
)
from nbdclone.store.finding import Range
from nbdclone.store.fs import FileSystem
from nbdclone.store.journal import recorded_blocks
from nbdclone.store.layer import (
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    NOWHERE,
    SEGMENT_SIZE,
    paint_bitmap,
    paint_delta,
    uniform,
)

_MARKED = re.compile(rb"\x01+")


def marked_runs(bitmap: bytes) -> list[Range]:
    """The (first, count) of each row of blocks that are marked."""
    if bitmap == EMPTY_BITMAP:
        return []
    painted = paint_bitmap(uniform(NOWHERE), bitmap, 1)
    return [(run.start(), run.end() - run.start()) for run in _MARKED.finditer(painted)]


def read_from(fs: FileSystem, chain: Sequence[tuple[int, Header]], origin: int, ranges: Sequence[Range]) -> int:
    """How many bytes of the ranges are read from the layer of that number: 1 for the base, 2 for the lowest delta.

    ``chain`` has the descriptor and the header of each delta, from the bottom upwards. A map that is lost hides
    nothing.
    """
    total = 0
    segment, owners = -1, uniform(NOWHERE)
    top, header = chain[-1]
    recorded = set(recorded_blocks(fs, top, header))  # before the maps, for a writer may be at work (docs/format.md)
    for offset, length in ranges:
        end = min(offset + length, header.size)
        while offset < end:
            if offset // SEGMENT_SIZE != segment:
                segment = offset // SEGMENT_SIZE
                owners = uniform(1)
                for index, (fd, delta) in enumerate(chain, start=2):
                    bitmap = _newest_map(fs, fd, delta, segment)
                    owners = paint_delta(segment, owners, bitmap, index, delta.overlap)
            start = offset - segment * SEGMENT_SIZE
            stop = min(end - segment * SEGMENT_SIZE, SEGMENT_SIZE)
            for block in range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)):
                is_own = segment * BLOCKS_PER_SEGMENT + block in recorded
                if owners[block] == origin and (not is_own or origin == len(chain) + 1):
                    total += min(stop, (block + 1) * BLOCK_SIZE) - max(start, block * BLOCK_SIZE)
            offset = segment * SEGMENT_SIZE + stop
    return total


def is_marked(fs: FileSystem, fd: int, header: Header, block: int) -> bool:
    """Does a page of the map have the block, by its number on the disk?"""
    segment, within = divmod(block, BLOCKS_PER_SEGMENT)
    return bool(_newest_map(fs, fd, header, segment)[within >> 3] & 0x80 >> (within & 7))


def _newest_map(fs: FileSystem, fd: int, header: Header, segment: int) -> bytes:
    page = bytearray(PAGE_SIZE)
    maps: list[tuple[int, bytes]] = []
    for slot in MAP_SLOTS:
        page[:] = EMPTY_PAGE
        fs.pread_all(fd, [page], segment * SEGMENT_SPAN + slot, PAGE_SIZE)
        decoded = decode_map_page(bytes(page), segment, header.id)
        if decoded:
            maps.append(decoded)
    return max(maps)[1] if maps else EMPTY_BITMAP
