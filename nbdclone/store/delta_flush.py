"""What is durable of a delta, and when: the order of writes that makes it survive a power cut.

**The order of a flush**, which the comments in :meth:`DurableDelta._flush` argue step by step: note the map as it is,
sync the data, write the noted map, sync again.

**With one sync.** If there are few new blocks, a record with their hashes is written before the first sync
(:mod:`nbdclone.store.journal`), and the second is left out: the map is written by the next flush, before its first
sync. Until then the blocks rely on the record, and must not be changed (:mod:`nbdclone.store.young`).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from nbdclone.errors import CloneFailed
from nbdclone.store.delta_file import JOURNAL, Header
from nbdclone.store.delta_map import DeltaMap
from nbdclone.store.fs import FileSystem
from nbdclone.store.journal import MAX_BLOCKS, Journal
from nbdclone.store.layer import BITMAP_SIZE
from nbdclone.store.live import LiveMap
from nbdclone.store.young import Young

logger = logging.getLogger("nbdclone")


class DurableDelta:
    """The file of a delta that is open, with its map, its records and its marks: all that a flush has to do with.

    ``young`` are blocks that must not be changed before :meth:`before_change` was asked.
    """

    def __init__(self, path: Path, header: Header, fd: int, fs: FileSystem) -> None:
        self.path = path
        self.header = header
        self.fd = fd
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

    def guard(self, work: Callable[[], object]) -> None:
        """Do what makes the file's name durable. If that fails, nothing that is written here can be promised."""
        try:
            work()
        except OSError as error:
            self._fail(error)

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
