"""Writing a layer from one end to the other: what a receive makes of what it is sent.

Nobody has the file yet, so there is no order of writes to keep but this: what :meth:`LayerWriter.sync` promised is not
written again. Of the map, the segment that is being filled is all there is in memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import (
    EMPTY_BITMAP,
    MAP_SLOTS,
    METADATA_SIZE,
    SEGMENT_SPAN,
    Header,
    encode_map_page,
    file_size,
    place_of,
)
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import BITMAP_SIZE, BLOCK_SIZE, BLOCKS_PER_SEGMENT, SEGMENT_SIZE, block_count, set_bits


class Filled(NamedTuple):
    """Up to which offset a layer is filled, and the map of the segment that is: no file has it yet."""

    offset: int
    segment: int
    bitmap: bytes


class LayerWriter:
    """A delta that gets its blocks in the order of their offsets, each once, whole but for the last of the disk."""

    def __init__(self, path: Path, header: Header, fs: FileSystem, known: Filled | None = None) -> None:
        """Make the file; or go on with it where :meth:`sync` gave ``known``. Raises FileTooLarge, OSError."""
        self._header = header
        self._fs = fs
        if known is None:
            Delta.create(path, header, fs)
            known = Filled(0, 0, EMPTY_BITMAP)
        self._offset, self._segment, bitmap = known
        assert len(bitmap) == BITMAP_SIZE
        self._bitmap = bytearray(bitmap)
        self._fd = fs.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            if 0 < self._offset < header.size:
                # What was written behind what was synced: it will come again, and zeros have to be holes.
                fs.ftruncate(self._fd, place_of(self._offset // BLOCK_SIZE))
                fs.ftruncate(self._fd, file_size(header.size))
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        """These bytes."""
        while data:
            self._enter(offset // SEGMENT_SIZE)
            count = min(len(data), SEGMENT_SIZE - offset % SEGMENT_SIZE)
            self._fs.pwrite_all(self._fd, data[:count], offset + (self._segment + 1) * METADATA_SIZE)
            self._mark(offset, count)
            offset, data = offset + count, data[count:]

    def zeros(self, offset: int, length: int) -> None:
        """Zeros: blocks that are the layer's, and holes."""
        while length:
            self._enter(offset // SEGMENT_SIZE)
            count = min(length, SEGMENT_SIZE - offset % SEGMENT_SIZE)
            self._mark(offset, count)
            offset, length = offset + count, length - count

    def sync(self) -> Filled:
        """Make durable what was written. Returns what has to be known to go on from here."""
        self._fs.sync(self._fd)
        return Filled(self._offset, self._segment, bytes(self._bitmap))

    def finish(self) -> None:
        """It is whole: write the rest of its map, and make all of it durable."""
        self._write_page()
        self._fs.sync(self._fd)

    def close(self) -> None:
        self._fs.close(self._fd)

    def _mark(self, offset: int, length: int) -> None:
        self._offset = offset + length
        first = offset // BLOCK_SIZE - self._segment * BLOCKS_PER_SEGMENT
        set_bits(self._bitmap, first, first + block_count(length) - 1)

    def _enter(self, segment: int) -> None:
        if segment != self._segment:
            self._write_page()
            self._segment = segment
            self._bitmap[:] = EMPTY_BITMAP

    def _write_page(self) -> None:
        """The map of a segment that is full, in both slots. Cut off before the next sync, it is written again."""
        if self._bitmap == EMPTY_BITMAP:
            return
        page = encode_map_page(self._segment, 1, self._header.id, bytes(self._bitmap))
        for slot in MAP_SLOTS:
            self._fs.pwrite_all(self._fd, page, self._segment * SEGMENT_SPAN + slot)
