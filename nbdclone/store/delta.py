"""The delta: a clone's own file, made, opened, and told which blocks are the clone's.

What stands where in it is :mod:`nbdclone.store.delta_file`'s, the slots of its map :mod:`nbdclone.store.delta_map`'s,
the order of writes in a flush :mod:`nbdclone.store.delta_flush`'s.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbdclone.errors import CorruptDelta, InUse, NotFound, StorageError
from nbdclone.store.delta_file import (
    HEADER_SLOTS,
    JOURNAL,
    MAP_SLOTS,
    METADATA_SIZE,
    PAGE_SIZE,
    RECORD_SLOTS,
    SEGMENT_SPAN,
    Header,
    change_header,
    file_size,
    read_header,
    renew_header,
    set_length,
    write_header,
)
from nbdclone.store.delta_flush import DurableDelta
from nbdclone.store.delta_map import DeltaMap, cut_off
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.layer import BITMAP_SIZE, BLOCK_SIZE, BLOCKS_PER_SEGMENT, block_count, paint_delta, set_bits
from nbdclone.store.live import FILE_NAME as LIVE_NAME
from nbdclone.store.quota import Quota
from nbdclone.store.sealed import Sealed

logger = logging.getLogger("nbdclone")


class Delta(DurableDelta):
    """A clone's delta, opened. Thread-safe: marks may come while a flush runs; flushes wait for one another."""

    stride = METADATA_SIZE

    def __init__(self, path: Path, header: Header, fd: int, fs: FileSystem) -> None:
        super().__init__(path, header, fd, fs)
        self.size = header.size
        self.quota = Quota(fd, header.quota > 0, self._quota_now, fs)

    @classmethod
    def create(cls, path: Path, header: Header, fs: FileSystem = FILE_SYSTEM) -> None:
        """Make a delta without blocks and make it durable. Raises FileTooLarge, OSError.

        The caller makes its directory entry durable: until then nothing refers to it.
        """
        fd = fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            set_length(fd, header.size, fs, file_size(header.size))
            page = header.encode()
            for slot in HEADER_SLOTS:
                fs.pwrite_all(fd, page, slot)
            if header.features & JOURNAL:
                for slot in RECORD_SLOTS:  # so that no flush meets a full disk with them
                    fs.allocate(fd, slot, PAGE_SIZE)
            fs.sync(fd)
        finally:
            fs.close(fd)

    @classmethod
    def open(cls, path: Path, what: str, fs: FileSystem = FILE_SYSTEM, *, shared: bool = False) -> Delta:
        """Open a delta for writing and take its lock. ``what`` begins the messages: "clone 'web1'".

        ``shared``: it is a layer, which others read; it may gain blocks that change nothing for them, of whatever size.
        The caller sees to it that nobody else does that. Costs the same whatever its size. Raises NotFound, InUse,
        CorruptDelta, UnsupportedFormat.
        """
        while True:
            try:
                fd = fs.open_file(path, os.O_RDWR)
            except FileNotFoundError:
                raise NotFound(f"{what} is not there ({path})") from None
            try:
                fs.lock(fd, path, what, shared=shared)
                status = fs.fstat(fd)
                there = fs.still_there(path, status)
            except BaseException:
                fs.close(fd)
                raise
            if there:
                break
            fs.close(fd)  # it was removed; or a snapshot or a rollback has put another in its place: that one, then
        try:
            header = read_header(fd, str(path), fs)
            if status.st_size < file_size(header.size):
                raise CorruptDelta(str(path), f"truncated: {status.st_size} bytes of {file_size(header.size)}")
            renew_header(fd, path, header, fs)
            if status.st_size > file_size(header.size):  # a change of the size was interrupted
                cut_off(path, fd, header, fs)
            delta = cls(path, replace(header, quota=0) if shared else header, fd, fs)
            delta._inherit()
        except BaseException:
            fs.close(fd)
            raise
        return delta

    def _inherit(self) -> None:
        """Take over what a process that was killed had marked and not flushed, and what records tell."""
        try:
            marks: dict[int, bytearray] = {}
            for block, count in self._live.inherit():
                segment, first = divmod(block, BLOCKS_PER_SEGMENT)
                if block + count <= block_count(self.size) and first + count <= BLOCKS_PER_SEGMENT:
                    set_bits(marks.setdefault(segment, bytearray(BITMAP_SIZE)), first, first + count - 1)
            for segment, marked in marks.items():
                self._merge(segment, marked)
            # Not before the live map was asked: it may have dropped from the cache what the disk never got.
            for block in self._journal.inherit(self.header):
                segment, within = divmod(block, BLOCKS_PER_SEGMENT)
                bitmap = bytearray(BITMAP_SIZE)
                set_bits(bitmap, within, within)
                self._merge(segment, bitmap)
            self._hindered = self._journal.leftover
        except BaseException:
            self._live.close()
            raise

    def _merge(self, segment: int, marked: bytes | bytearray) -> None:
        try:
            state = self._map.load(segment, nowait=False)
        except CorruptDelta:  # its map is lost: reading it will be refused, and the other segments are as they were
            return
        known = int.from_bytes(state.bitmap, "big")
        both = known | int.from_bytes(marked, "big")
        if both != known:
            state.bitmap = bytearray(both.to_bytes(BITMAP_SIZE, "big"))
            self._map.dirty.add(segment)
            self._young.lose_count()

    def finish(self) -> None:
        """Leave everything durable and in order, before a close."""
        self.settle_all()
        self._live.discard()

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

    def change_header(self, **changes: Any) -> None:
        """Write the header with these fields changed, durably: see ``delta_file.change_header``. Raises OSError."""
        self.require_sound()
        self.header = write_header(self.fd, self.path, self._fs, **changes)

    # The map

    @property
    def damaged_pages(self) -> list[str]:
        """The slots of the map that failed their checksum; the other slot served."""
        return self._map.damaged_pages

    @property
    def id(self) -> bytes:
        return self.header.id

    def paint(self, segment: int, owners: bytes, index: int, nowait: bool) -> bytes:
        return paint_delta(segment, owners, self._map.load(segment, nowait).bitmap, index, self.header.overlap)

    def reserve(self, segment: int, nowait: bool) -> None:
        """Take the space for the segment's map: before its first block is written, so that no flush meets a full disk.

        Raises OSError (ENOSPC, EDQUOT), and nothing was changed; BlockingIOError if ``nowait`` and it may wait.
        """
        state = self._map.segments.get(segment) or self._map.load(segment, nowait)
        if not state.reserved:
            for slot in MAP_SLOTS:
                self.quota.take(segment * SEGMENT_SPAN + slot, PAGE_SIZE, nowait)
                self._fs.allocate(self.fd, segment * SEGMENT_SPAN + slot, PAGE_SIZE)
            state.reserved = True
        if self._live.room <= 0:
            self._live.reserve()

    def mark(self, segment: int, first: int, last: int) -> None:
        """Note that blocks ``first`` to ``last`` of the segment are this delta's: their bytes are in the file already.

        The space for the map was taken before, by :meth:`reserve`.
        """
        state = self._map.segments.get(segment) or self._map.load(segment, nowait=False)
        with self._lock:
            bitmap = state.bitmap
            if not isinstance(bitmap, bytearray):
                bitmap = state.bitmap = bytearray(bitmap)
            if self._young.counts:
                self._young.add(segment, first, last, bitmap)
            set_bits(bitmap, first, last)
            self._map.dirty.add(segment)
        self._live.note(segment * BLOCKS_PER_SEGMENT + first, last - first + 1)

    def note_marks(self) -> None:
        """Before a change is acknowledged: a process that is killed leaves its data in the page cache, and this."""
        self._live.write()

    # The file itself

    def seal(self, path: Path) -> Sealed:
        """Become the layer at ``path``: the same file, which was settled, and of which nothing is written any more.

        Others may open it from now on. This object is not to be used any more.
        """
        try:
            self._fs.lock(self.fd, path, f"layer {self.header.id.hex()}", shared=True)
        except (OSError, InUse, StorageError):  # it stays ours alone, until the clone is closed
            logger.exception("%s: its lock cannot be shared", path)
        self._live.discard()
        return Sealed(path, self.header, self.fd, self._fs)

    def resize(self, size: int, overlap: int | None) -> None:
        """Become the delta of a disk of ``size`` bytes, durably; ``overlap`` as in the header.

        Nobody changes it meanwhile. Before it gets smaller everything is settled. Raises FileTooLarge, OSError: the
        size is the old one then, or the new one.
        """
        self.require_sound()
        shrinks, length = size < self.size, file_size(size)
        if shrinks:  # longer than it has to be, it says that there may be something behind the disk's end (see cut_off)
            length = max(file_size(self.size), length + BLOCK_SIZE)
        set_length(self.fd, size, self._fs, length)
        # Before the header says so: a power cut leaves a file that is too long, and nothing behind the old end.
        self._fs.sync(self.fd)
        # This is the commit. A power cut after it: the next to open the delta cuts off what is too much.
        self.header = change_header(self.path, self._fs, size=size, overlap=overlap)
        self.size = size
        if shrinks:
            cut_off(self.path, self.fd, self.header, self._fs)
            self._map = DeltaMap(self.path, self.fd, self.header.id, self._fs)
            self._lock = self._map.lock

    def moved(self, path: Path) -> None:
        """The file has another name now."""
        self.path = path
        self._live.path = path.with_name(LIVE_NAME)
        self._map.path = path

    def discard(self) -> None:
        """The file is not the clone's any more: nothing of it is to be inherited."""
        self._live.discard()
