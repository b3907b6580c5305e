"""The log of all writes to a disk, as qemu's blklogwrites and the kernel's dm-log-writes keep it, and cuts in it.

    sector 0    magic, version, number of entries (8 bytes each, little-endian), sector size (4)
    then        for each entry a sector: first sector, number of sectors, flags, length of a mark's data (8 bytes each);
                behind it the data, if the entry has any

An entry is written when its request is done. A flush covers the entries before it: qemu, told not to sync the file
(cache.no-flush), takes no time between the two.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct

SUPER = Struct("<QQQI")
MAGIC = 0x6A736677736872
VERSION = 1
ENTRY = Struct("<QQQQ")
FLUSH, FUA, DISCARD = 1, 2, 4

SECTOR = 512  # what a disk writes whole


@dataclass(frozen=True)
class Entry:
    offset: int
    data: bytes = field(repr=False)
    flags: int


def read_log(path: Path) -> list[Entry]:
    """All entries of a log that was finished by a flush."""
    log = path.read_bytes()
    magic, version, count, sector_size = SUPER.unpack_from(log)
    assert (magic, version) == (MAGIC, VERSION), "not a log of writes"
    entries = []
    position = sector_size
    for _ in range(count):
        first, sectors, flags, mark_length = ENTRY.unpack_from(log, position)
        assert not mark_length, "nobody here makes marks"
        position += sector_size
        data = b"" if flags & DISCARD else log[position : position + sectors * sector_size]
        position += len(data)
        assert position <= len(log), "the log ends before its last entry"
        entries.append(Entry(first * sector_size, data, flags))
    return entries


class Cuts:
    """The disk after a power cut at any entry, the cuts in ascending order.

    A write that has to do with ``untorn``, a range of bytes, is there as a whole or not at all.
    """

    def __init__(self, disk: bytes, entries: list[Entry], untorn: range) -> None:
        self._entries = entries
        self._untorn = untorn
        self._durable = bytearray(disk)
        self._covered = 0  # this many entries are in it

    def after(self, count: int, rng: random.Random, kept: float) -> bytearray:
        """What the disk may hold when the power goes after so many entries.

        All that was flushed is there, and what had FUA. Of each later write there is, with the probability ``kept``,
        something: all of it, or any of its sectors.
        """
        flushed = max((at for at in range(self._covered, count) if self._entries[at].flags & FLUSH), default=None)
        if flushed is not None:
            for entry in self._entries[self._covered : flushed + 1]:
                _apply(self._durable, entry.offset, entry.data)
            self._covered = flushed + 1
        disk = bytearray(self._durable)
        for entry in self._entries[self._covered : count]:
            if entry.flags & FUA:
                _apply(disk, entry.offset, entry.data)
            elif rng.random() < kept:
                for offset, data in self._torn(entry, rng):
                    _apply(disk, offset, data)
        return disk

    def _torn(self, entry: Entry, rng: random.Random) -> Iterator[tuple[int, bytes]]:
        end = entry.offset + len(entry.data)
        if rng.random() < 0.7 or (entry.offset < self._untorn.stop and end > self._untorn.start):
            yield entry.offset, entry.data
            return
        for at in range(0, len(entry.data), SECTOR):
            if rng.random() < 0.5:
                yield entry.offset + at, entry.data[at : at + SECTOR]


def _apply(disk: bytearray, offset: int, data: bytes) -> None:
    disk[offset : offset + len(data)] = data
