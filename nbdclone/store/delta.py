"""The delta: a clone's own file, and the order of writes that makes it survive a power cut.

What stands where in it is :mod:`nbdclone.store.delta_file`'s, the slots of its map :mod:`nbdclone.store.delta_map`'s.

**The order of a flush**, which the comments in :meth:`Delta._flush` argue step by step: note the map as it is, sync the
data, write the noted map, sync again.

**With one sync.** If there are few new blocks, a record with their hashes is written before the first sync
(:mod:`nbdclone.store.journal`), and the second is left out: the map is written by the next flush, before its first
sync. Until then the blocks rely on the record, and must not be changed (:mod:`nbdclone.store.young`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbdclone.errors import CloneFailed, CorruptDelta, InUse, NotFound, StorageError
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
from nbdclone.store.delta_map import DeltaMap, cut_off
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.journal import MAX_BLOCKS, Journal
from nbdclone.store.layer import (
    BITMAP_SIZE,
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    block_count,
    paint_delta,
)
from nbdclone.store.live import FILE_NAME as LIVE_NAME
from nbdclone.store.live import LiveMap
from nbdclone.store.quota import Quota
from nbdclone.store.sealed import Sealed
from nbdclone.store.young import Young

logger = logging.getLogger("nbdclone")


class Delta:
    """A clone's delta, opened. Thread-safe: marks may come while a flush runs; flushes wait for one another.

    ``young`` are blocks that must not be changed before :meth:`before_change` was asked.
    """

    stride = METADATA_SIZE

    def __init__(self, path: Path, header: Header, fd: int, fs: FileSystem) -> None:
        self.path = path
        self.header = header
        self.fd = fd
        self.size = header.size
        self.quota = Quota(fd, header.quota > 0, self._quota_now, fs)
        self._fs = fs
        self._live = LiveMap(path, fd, header.id, fs)
        self._map = DeltaMap(path, fd, header.id, fs)
        self._lock = self._map.lock
        self._journal = Journal(fd, header.id, fs)
        self._young = Young(MAX_BLOCKS if header.features & JOURNAL else 0)
        self.young = self._young.blocks
        # What the last flush noted, if its pages are not written yet: its data is durable.
        self._earlier: dict[int, bytes] = {}
        # True from the start: a process that was killed may have left acknowledged writes that are not durable yet.
        self._unsynced = True
        self._failure: str | None = None
        self._hindered = False  # there was a failure, or there are records that another process left
        self._flushing = threading.Lock()

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

    # Changes

    def require_sound(self) -> None:
        """Raises CloneFailed if a sync failed before: nothing may be written any more."""
        if self._failure:
            raise CloneFailed(self._failure)

    def begin_changes(self, nowait: bool) -> None:
        """To be called before anything is changed.

        Raises CloneFailed if a sync failed before. After a crash it waits until no block relies on a record any more:
        BlockingIOError if ``nowait``.
        """
        if self._hindered:
            self.require_sound()
            if nowait:
                raise BlockingIOError(errno.EAGAIN, "what a crash left has to be put in order first")
            with self._flushing:
                self.require_sound()
                if self._journal.leftover:  # and no flush has done it meanwhile
                    self._recover()

    def before_change(self, block: int, count: int, nowait: bool) -> None:
        """Blocks [block, block + count) of the disk, of which one was seen in ``young``, are about to be changed.

        It may have to wait until the map of them is durable: BlockingIOError if ``nowait``. Raises OSError and
        CloneFailed.
        """
        while self._has_to_wait(block, count):
            if nowait:
                raise BlockingIOError(errno.EAGAIN, "the map has to be synced before the block is changed")
            with self._flushing:
                self.require_sound()
                if self._has_to_wait(block, count):  # and no flush has done it meanwhile
                    self._solidify()

    def _has_to_wait(self, block: int, count: int) -> bool:
        with self._lock:
            return self._young.change(block, count)

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
            if self._journal.leftover:
                self._recover()
            else:
                self._flush(journaling=True)

    def _flush(self, journaling: bool) -> None:
        """The same, with the lock, and without ``journaling`` so that no block relies on a record."""
        # The map as it is now, before the data sync begins: each block in it was written to the file before it was
        # marked, so this sync covers it. A block marked while the sync runs may not be covered: it is not in here,
        # and goes with the next flush.
        with self._lock:
            if not self._unsynced and not self._map.dirty and (journaling or not self._earlier):
                return
            # A torn page is wiped with the first sync, and written after it; a page that rotted is not put off.
            journaling = journaling and not self._map.torn and not self._map.lost_page
            live = self._live.noted  # before the map: what was marked since is noted, too
            noted = self._map.note()
            blocks = self._young.note(journaling)
            self._unsynced = False
        try:
            wiped = self._map.wipe()
            # The pages that the last flush put off. Their data is durable, and until they are, too, the record of that
            # flush has their blocks: the new record goes to the other place.
            self._map.write(self._earlier)
            recorded = bool(blocks) and self._record(blocks)
            # A power cut before or in this sync: the old map is in force, or for each segment the page put off. New
            # blocks read from below, as before, or, if the record and their data are whole, are there already; blocks
            # that were ours before hold, sector by sector, what they held or what was written since.
            self._sync()
            self._map.wiped(wiped)
            written = self._settle_earlier()
            with self._lock:
                witnessed = self._young.synced(recorded)
            if witnessed:
                # A power cut from now on: the data and the record are durable, and the data is not changed before the
                # pages, which the next flush writes, are durable too.
                self._journal.written()
                self._earlier = noted
            elif noted:
                self._map.write(noted)
                # A power cut before or in this sync: for each segment the new page or, if it is missing or torn,
                # the one in the other slot, which an earlier sync made durable. Both point only at data that is.
                self._sync()
                written |= self._map.written(noted)
            self._live.covered(live)
        except BaseException:
            with self._lock:
                self._map.dirty |= noted.keys()
                self._young.fail()
                self._unsynced = True
            raise
        self._mirror(written, noted)

    def _record(self, blocks: frozenset[int]) -> bool:
        """Write a record. If that cannot be done, the flush takes two syncs."""
        try:
            self._journal.write(blocks)
        except OSError:
            return False
        return True

    def _settle_earlier(self) -> set[int]:
        """The pages that the last flush put off are durable. Returns what :meth:`DeltaMap.written` does."""
        earlier, self._earlier = self._earlier, {}
        return self._map.written(earlier)

    def _solidify(self) -> None:
        """Make the map of the witnessed blocks durable."""
        self._map.write(self._earlier)
        # A power cut before or in this sync: the new page, or the old one and the record, whose blocks did not change.
        self._sync()
        self._settle_earlier()
        with self._lock:
            self._young.solidify()

    def _recover(self) -> None:
        """Put into the map, durably, what the records of another process tell, and then wipe these.

        Before anything is changed. A record whose sync had not ended tells of blocks that were given up and read from
        below since: if one of them were written again, in part, the rest could fit, and it would come to light. And a
        block that is believed is changed only when the map has it, as ever.
        """
        self._flush(journaling=False)
        # A power cut in here: the blocks are in the map, whatever is left of the records.
        self._journal.wipe()
        self._sync()
        self._journal.leftover = self._hindered = False

    def _sync(self) -> None:
        try:
            self._fs.datasync(self.fd)
        except OSError as error:
            self._fail(error)
            self._live.note_failure()
            raise

    def _fail(self, error: OSError) -> None:
        reason = os.strerror(error.errno or errno.EIO)
        self._failure = f"{self.path}: a sync failed ({reason}): no more writes until it is reopened"
        self._hindered = True
        logger.error("%s", self._failure)

    def _mirror(self, due: set[int], noted: dict[int, bytes]) -> None:
        """After a flush: ``due`` and quiet segments get their page in both slots. The copies are not synced here."""
        with self._lock:
            due |= self._map.unmirrored - noted.keys()
        # A copy that fails is made later: the flush itself is done.
        with contextlib.suppress(OSError):
            self._map.mirror(due - self._earlier.keys())

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

    def guard(self, work: Callable[[], object]) -> None:
        """Do what makes the file's name durable. If that fails, nothing that is written here can be promised."""
        try:
            work()
        except OSError as error:
            self._fail(error)

    def discard(self) -> None:
        """The file is not the clone's any more: nothing of it is to be inherited."""
        self._live.discard()

    def settle_all(self) -> None:
        """Flush, and leave each map page in both slots, durable, and no records."""
        with self._flushing:
            self.require_sound()
            self._settle()

    def _settle(self) -> None:
        """The same with the lock."""
        if self._map.torn:
            self.touched()  # there is something for the flush to do
        if self._journal.leftover:
            self._recover()
        self._flush(journaling=False)
        if self._map.unmirrored or self._journal.used:
            # Everything is durable already: a copy that cannot be made (a full disk) is no reason to fail.
            with contextlib.suppress(OSError):
                self._map.mirror(set(self._map.unmirrored))
                if self._journal.used:
                    self._journal.wipe()
            self._sync()
        if self._map.dirty:  # a page that was to be copied had rotted
            self._flush(journaling=False)

    def settled(self, segment: int) -> bool:
        """Do both slots of the segment's map say, durably, what it is? So :meth:`settle_all` leaves it, if it can."""
        return not (self._journal.leftover or self._map.changing(segment))

    def give_up(self, blocks: Mapping[int, bytes | bytearray]) -> None:
        """Let go of the blocks whose bits are set in these bitmaps, by segment. They read the same without the delta.

        Nobody changes the delta meanwhile. Their data stays in the file, to be punched when the map is settled: for
        who reads the old page of the map still needs it. Raises OSError, CloneFailed: then nothing was given up.

        This is the one place where a map loses bits. What else tells of blocks that are the delta's must not bring one
        back when its data is gone:

        - a flush under way: there is none (the lock), and everything is settled first: no page is put off, none is
          dirty, and both slots have the same map. So the new page has nothing new but the bits that are gone.
        - young blocks: settling leaves none, and no record is relied on. The records are wiped with the same sync that
          makes the page durable. A power cut before its end may leave a record with the old page or with the new one:
          a block that it tells of has its data, which is punched later, and reads the same either way.
        - marks beside the delta: a kill would bring them back into the map. All are in it, so their file is removed
          first; if it cannot be, nothing is given up. After a power cut they are not believed.
        - the page in the other slot: the caller settles again before he punches, and looks whether it was done.
        - a page that a power cut tears while it is written: the other slot serves, with all the data there. The zeros
          that wipe it may complete it (see ``DeltaMap.wipe``) in the sync of the next flush at the latest, before
          anything that was written since is promised: so the blocks read from below what they held.
        """
        with self._flushing:
            self.require_sound()
            self._settle()
            if self._map.dirty or any(self._map.changing(segment) for segment in blocks):
                raise OSError(errno.EIO, f"{self.path}: the map cannot be written to both of its places")
            self._live.clear()
            if self._journal.used:
                self._journal.wipe()
            kept = {
                segment: int.from_bytes(self._map.segments[segment].bitmap, "big") & ~int.from_bytes(given, "big")
                for segment, given in blocks.items()
            }
            noted = {segment: bits.to_bytes(BITMAP_SIZE, "big") for segment, bits in kept.items()}
            try:
                self._map.write(noted)
            except BaseException:
                self._take_back(noted)
                raise
            self._sync()
            self._map.written(noted)
            with self._lock:
                for segment, bitmap in noted.items():
                    self._map.segments[segment].bitmap = bitmap

    def _take_back(self, noted: Mapping[int, bytes]) -> None:
        """Pages were written that are not to be in force: put the ones in force over them, or write nothing more.

        They are in the page cache, where the next process would find them, with blocks that were changed since.
        """
        try:
            self._map.mirror(noted.keys())
            if self._map.dirty:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:
            self._fail(error)


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
