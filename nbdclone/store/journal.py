"""The journal of a delta: what lets a flush that mapped few new blocks do with one sync.

A record lists new blocks, each with a hash of its content, and becomes durable by the same sync as the content. After a
power cut a block of a record is believed to be the delta's if what the file holds at its place has that hash; if not,
the sync had not ended, nobody was promised the block, and it reads from below. Each block is judged by itself, and so
truthfully: what has the hash is what was written.

    offset  length
    0       4       magic, "NREC"
    4       4       CRC-32 of all that follows
    8       8       first eight bytes of the delta's id
    16      8       how many blocks
    24      24 x n  the number of a block, counted from the begin of the disk (8), and the first 16 bytes of the BLAKE3
                    hash of its 4096 bytes

There are two places for records, used in turn. A hole is hashed as the zeros that it reads as. The hash has 16 bytes so
that no mix of old and new sectors ever passes for the new: a wrong block would be believed without a word.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

from blake3 import blake3

from nbdclone.store.delta_file import (
    EMPTY_PAGE,
    JOURNAL,
    PAGE_SIZE,
    RECORD_SLOTS,
    Header,
    place_of,
    read_page,
)
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import BLOCK_SIZE, block_count

# Record: magic, CRC-32 of all that follows, first eight bytes of the delta's id, how many blocks.
RECORD_MAGIC = b"NREC"
RECORD = struct.Struct(">4sI8sQ")
HASH_SIZE = 16
ENTRY = struct.Struct(f">Q{HASH_SIZE}s")
# How many blocks a flush may have mapped to be journaled. Reading and hashing one takes 7 us, a sync of a quick disk
# about 100: with 16 blocks nothing is gained there, with 32 it is lost.
MAX_BLOCKS = 8
assert RECORD.size + MAX_BLOCKS * ENTRY.size <= PAGE_SIZE


def encode_record(delta_id: bytes, entries: Iterable[tuple[int, bytes]]) -> bytes:
    """A record of (block, hash), 4096 bytes."""
    packed = [ENTRY.pack(block, content_hash) for block, content_hash in entries]
    rest = (delta_id[:8] + len(packed).to_bytes(8, "big") + b"".join(packed)).ljust(PAGE_SIZE - 8, b"\0")
    return RECORD_MAGIC + struct.pack(">I", zlib.crc32(rest)) + rest


def decode_record(page: bytes, delta_id: bytes) -> list[tuple[int, bytes]] | None:
    """Return its (block, hash); None if the page is torn, rotten, or no record of this delta."""
    magic, checksum, its_id, count = RECORD.unpack_from(page)
    if magic != RECORD_MAGIC or its_id != delta_id[:8] or zlib.crc32(page[8:]) != checksum:
        return None
    if count * ENTRY.size > PAGE_SIZE - RECORD.size:
        return None
    return [ENTRY.unpack_from(page, RECORD.size + index * ENTRY.size) for index in range(count)]


def hash_of(fs: FileSystem, fd: int, block: int) -> bytes:
    """The hash of what the file has of a block now. Raises OSError."""
    content = bytearray(BLOCK_SIZE)
    fs.pread_all(fd, [content], place_of(block), BLOCK_SIZE)
    return blake3(content).digest(length=HASH_SIZE)


def read_records(fs: FileSystem, fd: int, header: Header) -> list[bytes]:
    """What stands in the two places for records, if there are such places. Raises OSError."""
    return [read_page(fs, fd, slot, nowait=False) for slot in RECORD_SLOTS if header.features & JOURNAL]


def recorded_blocks(fs: FileSystem, fd: int, header: Header, pages: Iterable[bytes] | None = None) -> Iterator[int]:
    """The blocks of the disk that the records say are the delta's, and that have the content which they say.

    ``pages`` are the records where they were read before. Raises OSError: also where a block cannot be read, for it may
    be one that was promised to be kept.
    """
    for page in read_records(fs, fd, header) if pages is None else pages:
        for block, content_hash in decode_record(page, header.id) or ():
            if block < block_count(header.size) and hash_of(fs, fd, block) == content_hash:
                yield block


class Journal:
    """The places for records of a delta that is open for writing. Not thread-safe: flushes wait for one another.

    ``leftover``: something stands there that another process wrote. It must be gone before anything is changed.
    """

    def __init__(self, fd: int, delta_id: bytes, fs: FileSystem) -> None:
        self.leftover = False
        self.used = False
        self._fd = fd
        self._id = delta_id
        self._fs = fs
        self._turn = 0

    def inherit(self, header: Header) -> Iterator[int]:
        """See whether another process left records; the blocks that are the delta's by them. Raises OSError."""
        pages = read_records(self._fs, self._fd, header)
        self.leftover = any(page != EMPTY_PAGE for page in pages)
        return recorded_blocks(self._fs, self._fd, header, pages)

    def write(self, blocks: Iterable[int]) -> None:
        """Write a record of the blocks as they are now, over the record before the last. Raises OSError.

        The last one may be all that tells of its blocks.
        """
        page = encode_record(self._id, ((block, hash_of(self._fs, self._fd, block)) for block in sorted(blocks)))
        self.used = True
        self._fs.pwrite_all(self._fd, page, RECORD_SLOTS[self._turn])

    def written(self) -> None:
        """The record is durable, and blocks rely on it: the next goes to the other place."""
        self._turn = 1 - self._turn

    def wipe(self) -> None:
        """Put zeros over both places, for the next sync to cover: no block relies on them. Raises OSError."""
        for slot in RECORD_SLOTS:
            self._fs.pwrite_all(self._fd, EMPTY_PAGE, slot)
