"""The delta: a clone's own file, and the order of writes that makes it survive a power cut.

The file is a row of segments, each 1 MiB of metadata followed by 127 MiB of data:

    segment s starts at s * 128 MiB
      +0        header, slot A     (segment 0 only)
      +64 KiB   map page, slot A
      +512 KiB  header, slot B     (segment 0 only)
      +576 KiB  map page, slot B
      +1 MiB    the data of the disk's bytes [s * 127 MiB, (s + 1) * 127 MiB)

so byte ``offset`` of the disk stands at ``offset + (offset // 127 MiB + 1) * 1 MiB`` of the file, and a disk grows by
growing its file. A map page has a bit for each block of its segment: set if the block is this delta's. A block whose
bit is set and that was trimmed is a hole in the file, and reads as zeros: there is no third state.

**Two slots.** Header and map pages are written alternately to two places, each page with its sequence number and its
checksum. A page that was torn by a power cut, or rots, fails its checksum, and the other slot holds the one before.
A page is copied to the other slot too: at once if that holds nothing valid, otherwise when it was not changed again by
the next flush, and at the close. So at rest both slots say the same, and losing either loses nothing.

**The order of a flush**, which the comments in :meth:`Delta.flush` argue step by step: note the map as it is, sync the
data, write the noted map, sync again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import struct
import threading
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbdclone.errors import CloneFailed, CorruptDelta, FileTooLarge, NotFound, StorageError, UnsupportedFormat
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.layer import (
    BITMAP_SIZE,
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    MAX_SIZE,
    MIN_SIZE,
    SECTOR_SIZE,
    SEGMENT_SIZE,
    paint_bitmap,
    uniform,
)
from nbdclone.store.live import LiveMap
from nbdclone.store.quota import Quota

logger = logging.getLogger("nbdclone")

METADATA_SIZE = 1 << 20
SEGMENT_SPAN = METADATA_SIZE + SEGMENT_SIZE
PAGE_SIZE = 4096
HEADER_SLOTS = (0, 512 << 10)
MAP_SLOTS = (64 << 10, 576 << 10)

VERSION = 1
MAGIC = b"NBDDELTA"
# Header: magic, version, block size, features that a reader must know, features that it may ignore, sequence, id,
# parent's id, fingerprint of the base, size, time of creation (Unix, ns), length of the parent's name, that name, the
# quota.
HEADER = struct.Struct(">8sIIQQQ16s16s32sQQH255sQ")
# The last four bytes of the header's page: CRC-32 (as in zlib) of the 4092 before them.
CHECKSUM = struct.Struct(">I")
# Map page: magic, CRC-32 of all that follows, segment, sequence, first eight bytes of the delta's id; then the bitmap.
MAP_MAGIC = b"NMAP"
MAP_PAGE = struct.Struct(">4sIQQ8s")
assert MAP_PAGE.size + BITMAP_SIZE == PAGE_SIZE

EMPTY_BITMAP = bytes(BITMAP_SIZE)
_EMPTY_PAGE = bytes(PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class Header:
    """What a delta says of itself. ``parent_name`` is for people and for a first guess: the id is what counts.

    ``quota`` is how many bytes the file may take on the disk; 0: no end of it.
    """

    id: bytes
    parent_id: bytes
    fingerprint: bytes
    size: int
    created: int
    parent_name: str
    sequence: int = 1
    quota: int = 0

    def encode(self) -> bytes:
        name = self.parent_name.encode()
        body = HEADER.pack(
            MAGIC, VERSION, BLOCK_SIZE, 0, 0, self.sequence, self.id, self.parent_id, self.fingerprint,
            self.size, self.created, len(name), name, self.quota,
        ).ljust(PAGE_SIZE - CHECKSUM.size, b"\0")  # fmt: skip
        return body + CHECKSUM.pack(zlib.crc32(body))

    @classmethod
    def decode(cls, page: bytes, path: str) -> Header:
        """Raises CorruptDelta or UnsupportedFormat."""
        fields = HEADER.unpack_from(page)
        magic, version, block_size, incompatible, _compatible, sequence, *identity, name_length, name, quota = fields
        if magic != MAGIC:
            raise CorruptDelta(path, "not a delta (no NBDDELTA at its start)")
        if len(page) != PAGE_SIZE or zlib.crc32(page[: -CHECKSUM.size]) != CHECKSUM.unpack(page[-CHECKSUM.size :])[0]:
            raise CorruptDelta(path, "its header fails its checksum")
        if version != VERSION or incompatible:
            raise UnsupportedFormat(
                f"{path}: made by a newer nbdclone (format {version}, features {incompatible:#x}; "
                f"this one knows format {VERSION})"
            )
        own_id, parent_id, fingerprint, size, created = identity
        if block_size != BLOCK_SIZE or not MIN_SIZE <= size <= MAX_SIZE or size % SECTOR_SIZE or name_length > 255:
            fields_read = f"block size {block_size}, size {size}, name of {name_length} bytes"
            raise CorruptDelta(path, f"its header makes no sense ({fields_read})")
        parent_name = name[:name_length].decode(errors="replace")
        return cls(own_id, parent_id, fingerprint, size, created, parent_name, sequence, quota)


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


def file_size(size: int) -> int:
    """The length in bytes of the delta of a disk of ``size`` bytes."""
    full, rest = divmod(size, SEGMENT_SIZE)
    return full * SEGMENT_SPAN + (METADATA_SIZE + -(-rest // BLOCK_SIZE) * BLOCK_SIZE if rest else 0)


@dataclass(slots=True)
class _Segment:
    """The map of one segment in memory. ``slot`` (0 or 1) is where the newest durable page stands.

    ``bitmap`` is changed to a bytearray by the first mark; until then all empty ones are the same object.
    """

    bitmap: bytes | bytearray
    sequence: int
    slot: int
    alone: bool  # the other slot holds nothing valid
    torn: bool  # no, it holds a page that fails its checksum
    reserved: bool  # both slots have their space: writing the map will not meet a full disk


class Delta:
    """A clone's delta, opened. Thread-safe: marks may come while a flush runs; flushes wait for one another."""

    stride = METADATA_SIZE

    def __init__(self, path: Path, header: Header, fd: int, fs: FileSystem) -> None:
        self.path = path
        self.header = header
        self.fd = fd
        self.size = header.size
        self.damaged_pages: list[str] = []  # slots that failed their checksum; the other slot served
        self.quota = Quota(fd, header.quota > 0, self._quota_now, fs)
        self._fs = fs
        self._live = LiveMap(path, fd, header.id, fs)
        self._segments: dict[int, _Segment] = {}
        self._dirty: set[int] = set()
        self._unmirrored: set[int] = set()  # whose other slot is not the same
        self._torn: set[int] = set()  # whose other slot is to be wiped before it is written
        # True from the start: a process that was killed may have left acknowledged writes that are not durable yet.
        self._unsynced = True
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._flushing = threading.Lock()

    @classmethod
    def create(cls, path: Path, header: Header, fs: FileSystem = FILE_SYSTEM) -> None:
        """Make a delta without blocks and make it durable. Raises FileTooLarge, OSError.

        The caller makes its directory entry durable: until then nothing refers to it.
        """
        fd = fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            try:
                fs.ftruncate(fd, file_size(header.size))
            except OSError as error:
                if error.errno != errno.EFBIG:
                    raise
                raise FileTooLarge(
                    f"a disk of {header.size} bytes needs a sparse file of {file_size(header.size)} bytes, "
                    f"more than this file system takes (ext4: 16 TiB less 4 KiB); use a smaller size, or XFS"
                ) from None
            page = header.encode()
            for slot in HEADER_SLOTS:
                fs.pwrite_all(fd, page, slot)
            fs.sync(fd)
        finally:
            fs.close(fd)

    @classmethod
    def open(cls, path: Path, what: str, fs: FileSystem = FILE_SYSTEM) -> Delta:
        """Open a delta for writing and take its lock. ``what`` begins the messages: "clone 'web1'".

        Costs the same whatever its size. Raises NotFound, InUse, CorruptDelta, UnsupportedFormat.
        """
        try:
            fd = fs.open_file(path, os.O_RDWR)
        except FileNotFoundError:
            raise NotFound(f"{what} is not there ({path})") from None
        try:
            fs.lock(fd, path, what)
            status = fs.fstat(fd)
            if not fs.still_there(path, status):
                raise NotFound(f"{what} was removed just now ({path})")
            header = read_header(fd, str(path), fs)
            if status.st_size < file_size(header.size):
                raise CorruptDelta(str(path), f"truncated: {status.st_size} bytes of {file_size(header.size)}")
            _renew_header(fd, path, header, fs)
            delta = cls(path, header, fd, fs)
            delta._inherit()
        except BaseException:
            fs.close(fd)
            raise
        return delta

    def _inherit(self) -> None:
        """Take over what a process that was killed had marked and not flushed."""
        try:
            marks: dict[int, bytearray] = {}
            for block, count in self._live.inherit():
                segment, first = divmod(block, BLOCKS_PER_SEGMENT)
                if segment * SEGMENT_SIZE < self.size and first + count <= BLOCKS_PER_SEGMENT:
                    _set_bits(marks.setdefault(segment, bytearray(BITMAP_SIZE)), first, first + count - 1)
            for segment, marked in marks.items():
                self._merge(segment, marked)
        except BaseException:
            self._live.close()
            raise

    def _merge(self, segment: int, marked: bytes | bytearray) -> None:
        try:
            state = self._load(segment, nowait=False)
        except CorruptDelta:  # its map is lost: reading it will be refused, and the other segments are as they were
            return
        known = int.from_bytes(state.bitmap, "big")
        both = known | int.from_bytes(marked, "big")
        if both != known:
            state.bitmap = bytearray(both.to_bytes(BITMAP_SIZE, "big"))
            self._dirty.add(segment)

    def close(self) -> None:
        """Close the file and let go of the lock. What was not flushed is not made durable."""
        if self._failure:
            # What a failed sync could not write stays in the page cache as if it had been written: the next to open
            # the delta would read it, flush without an error, and lose it later. Dropped, it is read from the disk.
            with contextlib.suppress(OSError):
                self._fs.fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._live.discard()
        self._live.close()
        self._fs.close(self.fd)

    @functools.cached_property
    def can_punch(self) -> bool:
        """Can this file system make holes? Tried on a place of the metadata that is always a hole."""
        return self._fs.can_punch(self.fd, MAP_SLOTS[0] + PAGE_SIZE, PAGE_SIZE)

    def _quota_now(self, nowait: bool) -> int:
        """The quota as the header has it now: another process may have changed it."""
        with contextlib.suppress(StorageError):
            self.header = replace(self.header, quota=read_header(self.fd, str(self.path), self._fs, nowait).quota)
        return self.header.quota

    # The map

    def paint(self, segment: int, owners: bytes, index: int, nowait: bool) -> bytes:
        bitmap = self._load(segment, nowait).bitmap
        if bitmap == EMPTY_BITMAP:
            return owners
        if bitmap.count(0xFF) == BITMAP_SIZE:
            return uniform(index)
        return paint_bitmap(owners, bitmap, index)

    def reserve(self, segment: int, nowait: bool) -> None:
        """Take the space for the segment's map: before its first block is written, so that no flush meets a full disk.

        Raises OSError (ENOSPC, EDQUOT), and nothing was changed; BlockingIOError if ``nowait`` and it may wait.
        """
        state = self._segments.get(segment) or self._load(segment, nowait)
        if not state.reserved:
            for slot in MAP_SLOTS:
                self.quota.take(segment * SEGMENT_SPAN + slot, PAGE_SIZE, nowait)
                self._fs.allocate(self.fd, segment * SEGMENT_SPAN + slot, PAGE_SIZE)
            state.reserved = True
        self._live.reserve()

    def mark(self, segment: int, first: int, last: int) -> None:
        """Note that blocks ``first`` to ``last`` of the segment are this delta's: their bytes are in the file already.

        The space for the map was taken before, by :meth:`reserve`.
        """
        state = self._load(segment, nowait=False)
        with self._lock:
            if not isinstance(state.bitmap, bytearray):
                state.bitmap = bytearray(state.bitmap)
            _set_bits(state.bitmap, first, last)
            self._dirty.add(segment)
        self._live.note(segment * BLOCKS_PER_SEGMENT + first, last - first + 1)

    def note_marks(self) -> None:
        """Before a change is acknowledged: a process that is killed leaves its data in the page cache, and this."""
        self._live.write()

    def require_sound(self) -> None:
        """Raises CloneFailed if a sync failed before: nothing may be written any more."""
        if self._failure:
            raise CloneFailed(self._failure)

    def touched(self) -> None:
        """Say that the file was written: after the write, for a flush in between must not take it as synced."""
        self._unsynced = True

    # Durability

    def flush(self) -> None:
        """Make durable everything written before the call.

        Raises OSError; ENOSPC leaves everything as it was, to be tried again; an error of a sync makes the delta refuse
        writes from then on (CloneFailed): the kernel may have dropped the pages that it could not write, so that a
        later sync would succeed without them.
        """
        with self._flushing:
            self.require_sound()
            # The map as it is now, before the data sync begins: each block in it was written to the file before it was
            # marked, so this sync covers it. A block marked while the sync runs may not be covered: it is not in here,
            # and goes with the next flush.
            with self._lock:
                if not self._unsynced and not self._dirty:
                    return
                live = self._live.noted  # before the map: what was marked since is noted, too
                noted = {segment: bytes(self._segments[segment].bitmap) for segment in self._dirty}
                self._dirty.clear()
                self._unsynced = False
            try:
                wiped = self._wipe()
                # A power cut before or in this sync: the old map is in force. New blocks read from below, as before;
                # blocks that were ours already hold, sector by sector, what they held or what was written since.
                self._sync()
                for segment in wiped:
                    self._segments[segment].torn = False
                with self._lock:
                    self._torn -= wiped
                if noted:
                    self._write_pages(noted)
                    # A power cut before or in this sync: for each segment the new page or, if it is missing or torn,
                    # the one in the other slot, which an earlier sync made durable. Both point only at data that is.
                    self._sync()
                self._live.covered(live)
            except BaseException:
                with self._lock:
                    self._dirty |= noted.keys()
                    self._unsynced = True
                raise
            self._settle(noted)

    def _sync(self) -> None:
        try:
            self._fs.datasync(self.fd)
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            self._failure = f"{self.path}: a sync failed ({reason}): no more writes until it is reopened"
            logger.error("%s", self._failure)
            self._live.note_failure()
            raise

    def _wipe(self) -> set[int]:
        """Put zeros over the pages that fail their checksum, for the next sync to cover. Which segments' it was.

        A page that a crash tore has sectors of a newer map, whose blocks have been read from below since. If another
        page were written over it at once, and torn by the next crash, the newer map could come together after all.
        Zeros cannot do that: a map only gains bits, so what a torn page has not got of the newer one is not zeros.
        """
        with self._lock:
            torn = set(self._torn)
        for segment in torn:
            slot = 1 - self._segments[segment].slot
            self._fs.pwrite_all(self.fd, _EMPTY_PAGE, segment * SEGMENT_SPAN + MAP_SLOTS[slot])
        return torn

    def _write_pages(self, noted: dict[int, bytes]) -> None:
        for segment, bitmap in noted.items():
            state = self._segments[segment]
            page = encode_map_page(segment, state.sequence + 1, self.header.id, bitmap)
            self._fs.pwrite_all(self.fd, page, segment * SEGMENT_SPAN + MAP_SLOTS[1 - state.slot])

    def _settle(self, noted: dict[int, bytes]) -> None:
        """After the second sync: the new pages are the newest, and quiet segments get their page in both slots.

        The copies are not synced here. A power cut that tears one leaves the newest durable page, which is never
        written over: a new page always goes to the other slot.
        """
        due = set()
        for segment in noted:
            state = self._segments[segment]
            state.sequence += 1
            state.slot = 1 - state.slot
            if state.alone:
                due.add(segment)
        with self._lock:
            due |= self._unmirrored - noted.keys()
            self._unmirrored |= noted.keys()
        # A copy that fails is made later: the flush itself is done.
        with contextlib.suppress(OSError):
            self._mirror(due)

    def _mirror(self, segments: set[int]) -> None:
        for segment in segments:
            state = self._segments.get(segment)
            # Being loaded by another thread; or to be written anyway; or to be wiped first, by the next flush.
            if state is None or segment in self._dirty or state.torn:
                continue
            start = segment * SEGMENT_SPAN
            page = read_page(self._fs, self.fd, start + MAP_SLOTS[state.slot], nowait=False)
            read = decode_map_page(page, segment, self.header.id)
            if read is None or read[0] != state.sequence:
                # It rotted since it was written. Never over the good one: the next flush writes the map, which is in
                # memory, over this one.
                self._note_damage(segment, state.slot)
                with self._lock:
                    state.slot = 1 - state.slot
                    self._dirty.add(segment)
                continue
            self._fs.pwrite_all(self.fd, page, start + MAP_SLOTS[1 - state.slot])
            state.alone = False
            with self._lock:
                self._unmirrored.discard(segment)

    def settle_all(self) -> None:
        """Flush, and leave each map page in both slots, durable: what a close does."""
        if self._torn:
            self.touched()  # there is something for the flush to do
        self.flush()
        with self._flushing:
            if self._unmirrored:
                # Everything is durable already: a copy that cannot be made (a full disk) is no reason to fail.
                with contextlib.suppress(OSError):
                    self._mirror(set(self._unmirrored))
                self._sync()
        if self._dirty:  # a page that was to be copied had rotted
            self.flush()
        self._live.discard()

    # Loading

    def _load(self, segment: int, nowait: bool) -> _Segment:
        state = self._segments.get(segment)
        if state is None:
            state = self._read_map(segment, nowait)
            # Two threads may have read it at once: one of the results becomes the segment's for both.
            state = self._segments.setdefault(segment, state)
            if state.torn:
                with self._lock:
                    self._torn.add(segment)
        return state

    def _read_map(self, segment: int, nowait: bool) -> _Segment:
        start = segment * SEGMENT_SPAN
        pages = [read_page(self._fs, self.fd, start + slot, nowait) for slot in MAP_SLOTS]
        read = [decode_map_page(page, segment, self.header.id) for page in pages]
        for slot, (page, decoded) in enumerate(zip(pages, read, strict=True)):
            if decoded is None and page != _EMPTY_PAGE:
                self._note_damage(segment, slot)
        valid = [(decoded[0], slot, decoded[1]) for slot, decoded in enumerate(read) if decoded is not None]
        if valid:
            sequence, slot, bitmap = max(valid)
            if read[0] != read[1]:
                with self._lock:
                    self._unmirrored.add(segment)
            # A slot of zeros may be a hole: a copy of the file need not have what was reserved.
            alone = len(valid) == 1
            torn = alone and _EMPTY_PAGE not in pages
            return _Segment(bitmap, sequence, slot, alone, torn, reserved=_EMPTY_PAGE not in pages)
        # Both slots empty: never written. One empty and one torn: its first write was cut off before it was durable.
        # Neither empty: something that was durable is gone.
        if _EMPTY_PAGE not in pages:
            raise CorruptDelta(str(self.path), f"both copies of the map page of segment {segment} fail their checksum")
        slot = 1 if pages[1] == _EMPTY_PAGE else 0
        torn = pages[1 - slot] != _EMPTY_PAGE
        return _Segment(EMPTY_BITMAP, sequence=0, slot=slot, alone=True, torn=torn, reserved=False)

    def _note_damage(self, segment: int, slot: int) -> None:
        what = f"map page of segment {segment}, slot {'AB'[slot]}"
        if what not in self.damaged_pages:
            self.damaged_pages.append(what)
            logger.warning("%s: the %s fails its checksum; the other slot serves", self.path, what)


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


def change_header(path: Path, fs: FileSystem = FILE_SYSTEM, **changes: Any) -> Header:
    """Write the header with these fields changed, durably. The caller sees to it that nobody else does.

    Another process may have the delta open: it goes on with what it read, but for the quota. A power cut leaves the old
    header or the new one: first the slot that is not the newest is written and synced, then the other. Both have their
    space. Raises what ``read_header`` raises, OSError.
    """
    fd = fs.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        header = read_header(fd, str(path), fs)
        changed = replace(header, sequence=header.sequence + 1, **changes)
        page = header.encode()
        for slot in sorted(HEADER_SLOTS, key=lambda slot: read_page(fs, fd, slot, nowait=False) == page):
            fs.pwrite_all(fd, changed.encode(), slot)
            fs.datasync(fd)
    finally:
        fs.close(fd)
    return changed


def _renew_header(fd: int, path: Path, header: Header, fs: FileSystem) -> None:
    """Write the header again over a slot that lost it. The other slot, which is valid, is not touched."""
    for slot in HEADER_SLOTS:
        try:
            Header.decode(read_page(fs, fd, slot, nowait=False), str(path))
        except CorruptDelta as error:
            logger.warning("%s (slot at %d); written again from the other", error, slot)
            with contextlib.suppress(OSError):
                fs.pwrite_all(fd, header.encode(), slot)
                fs.datasync(fd)


def _set_bits(bitmap: bytearray, first: int, last: int) -> None:
    """Set bits ``first`` to ``last``; bit 0 is the most significant of byte 0."""
    low, high = first >> 3, last >> 3
    head = 0xFF >> (first & 7)
    tail = 0xFF << (7 - (last & 7)) & 0xFF
    if low == high:
        bitmap[low] |= head & tail
    else:
        bitmap[low] |= head
        bitmap[high] |= tail
        bitmap[low + 1 : high] = b"\xff" * (high - low - 1)
