"""What stands where in the file of a delta: its header, its pages of map, and the places of both.

The file is a row of segments, each 1 MiB of metadata followed by 127 MiB of data:

    segment s starts at s * 128 MiB
      +0        header, slot A     (segment 0 only)
      +64 KiB   map page, slot A
      +128 KiB  record, slot A     (segment 0 only)
      +512 KiB  header, slot B     (segment 0 only)
      +576 KiB  map page, slot B
      +640 KiB  record, slot B     (segment 0 only)
      +1 MiB    the data of the disk's bytes [s * 127 MiB, (s + 1) * 127 MiB)

so byte ``offset`` of the disk stands at ``offset + (offset // 127 MiB + 1) * 1 MiB`` of the file, and a disk grows by
growing its file. A map page has a bit for each block of its segment: set if the block is this delta's. A block whose
bit is set and that was trimmed is a hole in the file, and reads as zeros: there is no third state. The records are
:mod:`nbdclone.store.journal`'s.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbdclone.errors import CorruptDelta, FileTooLarge, UnsupportedFormat
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.layer import (
    BITMAP_SIZE,
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    MAX_SIZE,
    MIN_SIZE,
    SECTOR_SIZE,
    SEGMENT_SIZE,
)

logger = logging.getLogger("nbdclone")

METADATA_SIZE = 1 << 20
SEGMENT_SPAN = METADATA_SIZE + SEGMENT_SIZE
PAGE_SIZE = 4096
HEADER_SLOTS = (0, 512 << 10)
MAP_SLOTS = (64 << 10, 576 << 10)
RECORD_SLOTS = (128 << 10, 640 << 10)

VERSION = 1
MAGIC = b"NBDDELTA"
# Features that a reader must know. There may be records of blocks that the map does not tell of yet.
JOURNAL = 1
# Not all of the parent is seen: ``overlap`` says how much.
OVERLAP = 2
KNOWN_FEATURES = JOURNAL | OVERLAP
# Header: magic, version, block size, features that a reader must know, features that it may ignore, sequence, id,
# parent's id, fingerprint of the base, size, time of creation (Unix, ns), length of the parent's name, that name, the
# quota, the origin's id, the overlap.
HEADER = struct.Struct(">8sIIQQQ16s16s32sQQH255sQ16sQ")
# The id of a parent that is not there: what the delta does not hold reads as zeros.
NO_PARENT = bytes(16)
# The id of what a clone was made from, where that is nothing any more: it was flattened, and has snapshots since. Zeros
# would mean the parent, which is one of these snapshots.
NO_ORIGIN = b"\xff" * 16
# The last four bytes of the header's page: CRC-32 (as in zlib) of the 4092 before them.
CHECKSUM = struct.Struct(">I")
# Map page: magic, CRC-32 of all that follows, segment, sequence, first eight bytes of the delta's id; then the bitmap.
MAP_MAGIC = b"NMAP"
MAP_PAGE = struct.Struct(">4sIQQ8s")
assert MAP_PAGE.size + BITMAP_SIZE == PAGE_SIZE

EMPTY_BITMAP = bytes(BITMAP_SIZE)
EMPTY_PAGE = bytes(PAGE_SIZE)


def as_origin(parent_id: bytes) -> bytes:
    """What a header's ``origin`` is for a clone that was made from what has this id, or from nothing."""
    return NO_ORIGIN if parent_id == NO_PARENT else parent_id


@dataclass(frozen=True, slots=True)
class Header:
    """What a delta says of itself. ``parent_name`` is for people and for a first guess: the id is what counts.

    ``parent_id`` is that of a base or of a layer, and ``fingerprint`` that of the base at the bottom. ``quota`` is how
    many bytes the file may take on the disk; 0: no end of it. ``origin`` is the id of what the clone was made from,
    zeros where that is the parent, and NO_ORIGIN where there is nothing. ``overlap`` is how many bytes of the parent
    are seen, in whole blocks: a disk that was made smaller, and larger again, reads zeros behind them; None: all.
    ``features`` are those that a reader must know; a delta that was made before there was a journal has none.
    """

    id: bytes
    parent_id: bytes
    fingerprint: bytes
    size: int
    created: int
    parent_name: str
    sequence: int = 1
    quota: int = 0
    features: int = JOURNAL
    origin: bytes = NO_PARENT
    overlap: int | None = None

    def encode(self) -> bytes:
        name = self.parent_name.encode()
        features = self.features | (OVERLAP if self.overlap is not None else 0)
        body = HEADER.pack(
            MAGIC, VERSION, BLOCK_SIZE, features, 0, self.sequence, self.id, self.parent_id, self.fingerprint,
            self.size, self.created, len(name), name, self.quota, self.origin, self.overlap or 0,
        ).ljust(PAGE_SIZE - CHECKSUM.size, b"\0")  # fmt: skip
        return body + CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def decode(cls, page: bytes, path: str) -> Header:
        """Raises CorruptDelta or UnsupportedFormat."""
        fields = HEADER.unpack_from(page)
        (
            magic,
            version,
            block_size,
            features,
            _ignored,
            sequence,
            *identity,
            name_length,
            name,
            quota,
            origin,
            overlap,
        ) = fields
        if magic != MAGIC:
            raise CorruptDelta(path, "not a delta (no NBDDELTA at its start)")
        if len(page) != PAGE_SIZE or zlib.crc32(page[: -CHECKSUM.size]) != CHECKSUM.unpack(page[-CHECKSUM.size :])[0]:
            raise CorruptDelta(path, "its header fails its checksum")
        if version != VERSION or features & ~KNOWN_FEATURES:
            raise UnsupportedFormat(
                f"{path}: made by a newer nbdclone (format {version}, features {features:#x}; "
                f"this one knows format {VERSION})"
            )
        own_id, parent_id, fingerprint, size, created = identity
        if block_size != BLOCK_SIZE or not MIN_SIZE <= size <= MAX_SIZE or size % SECTOR_SIZE or name_length > 255:
            fields_read = f"block size {block_size}, size {size}, name of {name_length} bytes"
            raise CorruptDelta(path, f"its header makes no sense ({fields_read})")
        parent_name = name[:name_length].decode(errors="replace")
        seen = overlap if features & OVERLAP else None
        return cls(
            own_id,
            parent_id,
            fingerprint,
            size,
            created,
            parent_name,
            sequence,
            quota,
            features & ~OVERLAP,
            origin,
            seen,
        )


def encode_map_page(segment: int, sequence: int, delta_id: bytes, bitmap: bytes) -> bytes:
    """A page of the map, 4096 bytes."""
    rest = struct.pack(">QQ8s", segment, sequence, delta_id[:8]) + bitmap
    return MAP_MAGIC + CHECKSUM.pack(zlib.crc32(rest)) + rest


def decode_map_page(page: bytes, segment: int, delta_id: bytes) -> tuple[int, bytes] | None:
    """Return (sequence, bitmap); None if the page is torn, rotten, or belongs elsewhere."""
    magic, checksum, its_segment, sequence, its_id = MAP_PAGE.unpack_from(page)
    if magic != MAP_MAGIC or its_segment != segment or its_id != delta_id[:8] or zlib.crc32(page[8:]) != checksum:
        return None
    return sequence, page[MAP_PAGE.size :]


def place_of(block: int) -> int:
    """Where the block of that number, counted from the begin of the disk, stands in the file."""
    return block * BLOCK_SIZE + (block // BLOCKS_PER_SEGMENT + 1) * METADATA_SIZE


def file_size(size: int) -> int:
    """The length in bytes of the delta of a disk of ``size`` bytes."""
    full, rest = divmod(size, SEGMENT_SIZE)
    return full * SEGMENT_SPAN + (METADATA_SIZE + -(-rest // BLOCK_SIZE) * BLOCK_SIZE if rest else 0)


def read_page(fs: FileSystem, fd: int, offset: int, nowait: bool) -> bytes:
    """Read one page; zeros past the end of the file. BlockingIOError if ``nowait`` and it is not in memory."""
    page = bytearray(PAGE_SIZE)
    if nowait and fs.preadv_nowait(fd, [page], offset) != PAGE_SIZE:
        raise BlockingIOError(errno.EAGAIN, "not in memory")
    if not nowait:
        fs.pread_all(fd, [page], offset, PAGE_SIZE)
    return bytes(page)


def read_header(fd: int, path: str, fs: FileSystem = FILE_SYSTEM, nowait: bool = False) -> Header:
    """The header of an open delta: the newer of the two that are valid. Raises CorruptDelta, UnsupportedFormat.

    BlockingIOError if ``nowait`` and it is not in memory.
    """
    headers: list[Header] = []
    errors: list[CorruptDelta] = []
    pages = dict.fromkeys(read_page(fs, fd, slot, nowait) for slot in HEADER_SLOTS)  # one, where both are the same
    for page in pages:
        try:
            headers.append(Header.decode(page, path))
        except CorruptDelta as error:
            errors.append(error)
    if not headers:
        raise errors[0]
    return max(headers, key=lambda header: header.sequence)


def set_length(fd: int, size: int, fs: FileSystem, length: int) -> None:
    """Give the file of a disk of ``size`` bytes this length. Raises FileTooLarge, OSError."""
    try:
        fs.ftruncate(fd, length)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise FileTooLarge(
            f"a disk of {size} bytes needs a sparse file of {length} bytes, "
            f"more than this file system takes (ext4: 16 TiB less 4 KiB); use a smaller size, or XFS"
        ) from None


def change_header(path: Path, fs: FileSystem = FILE_SYSTEM, **changes: Any) -> Header:
    """Write the header with these fields changed, durably. The caller sees to it that nobody else does.

    Another process may have the delta open: it goes on with what it read, but for the quota. A power cut leaves the old
    header or the new one: first the slot that is not the newest is written and synced, then the other. Both have their
    space. Raises what ``read_header`` raises, OSError.
    """
    fd = fs.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return write_header(fd, path, fs, **changes)
    finally:
        fs.close(fd)


def write_header(fd: int, path: Path, fs: FileSystem, **changes: Any) -> Header:
    """The same through a descriptor."""
    header = read_header(fd, str(path), fs)
    changed = replace(header, sequence=header.sequence + 1, **changes)
    page = header.encode()
    for slot in sorted(HEADER_SLOTS, key=lambda slot: read_page(fs, fd, slot, nowait=False) == page):
        fs.pwrite_all(fd, changed.encode(), slot)
        fs.datasync(fd)
    return changed


def renew_header(fd: int, path: Path, header: Header, fs: FileSystem) -> None:
    """Write the header again over a slot that lost it. The other slot, which is valid, is not touched."""
    for slot in HEADER_SLOTS:
        try:
            Header.decode(read_page(fs, fd, slot, nowait=False), str(path))
        except CorruptDelta as error:
            logger.warning("%s (slot at %d); written again from the other", error, slot)
            with contextlib.suppress(OSError):
                fs.pwrite_all(fd, header.encode(), slot)
                fs.datasync(fd)
