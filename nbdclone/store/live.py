"""What a process that is killed would take with it: the blocks that it marked, and whether the cache can be believed.

The map of a delta is written by a flush, and until then only the process knows which blocks are the delta's. A power
cut may take them: nobody promised to keep what was not flushed. But a process that is killed leaves its data in the
page cache, and a client that reconnects goes on as if nothing had happened: what was acknowledged must be there, and
its next flush must cover it. So each mark is also written to a file beside the delta:

    page 0        magic, the delta's id (16 bytes), 1 if a sync failed, the boot (16 bytes), the number of its own
                  inode, where the marks begin that count (8 bytes)
    from page 1   the marks, 8 bytes each: the first block (40 bits) and how many (24 bits); zeros end them

Marks are gathered by :meth:`LiveMap.note` and written by :meth:`LiveMap.write`, once for all the writes that are
acknowledged together. A mark that counts although a flush has covered it does no harm: a block that is the delta's
stays the delta's, unless the delta gives it up: :meth:`LiveMap.clear` comes before that.

The file is never synced and means nothing after a power cut. The next to open the delta believes it only if the delta's
inode never left the kernel's memory meanwhile, and with it its pages: after a boot, or an unmount, what this file tells
of may be lost. That alone does not tell a file that was copied here, or that another machine wrote to a shared file
system while this one remembered the delta from before: hence the boot and the inode. A clean close removes it.

After a failed sync the page cache may hold what the disk never got, and must not be believed: this is noted here too.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from struct import Struct

from nbdclone.store.fs import FileSystem

logger = logging.getLogger("nbdclone")

MAGIC = b"NBDLIVE2"
HEAD = Struct(">8s16sB16sQ")
# Where the marks begin that count: behind the rest of the head, which stays as it was made.
START = Struct(">Q")
START_AT = 64
MARKS_AT = 4096
MARK_SIZE = 8
COUNT_BITS = 24
PAGE_SIZE = 4096
FILE_NAME = "live"
# How much is read at a time of what a killed process left.
READ_SIZE = 1 << 20
# There can be no such file here, or no space taken for it: the user may not, or the file system cannot.
_NOT_HERE = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.EOPNOTSUPP, errno.EINVAL))


class LiveMap:
    """The file beside one delta, which the caller has open and locked as ``delta_fd``. Made when first written.

    ``reserve``, ``note`` and ``write`` are called by one thread at a time, the one that changes the clone; ``covered``
    comes from another, which flushes it.
    """

    def __init__(self, delta: Path, delta_fd: int, delta_id: bytes, fs: FileSystem) -> None:
        self.path = delta.with_name(FILE_NAME)
        self._delta_fd = delta_fd
        self._delta_id = delta_id
        self._fs = fs
        self._fd: int | None = None
        self._broken = False
        self._pending: list[int] = []  # marks that are not written yet
        self._written = 0  # how many are, since this file was opened
        self._end = MARKS_AT  # where the next go
        self._space = 0  # up to where there is space for them
        self.room = 0  # how many may be noted before ``reserve`` is to be called
        self._lock = threading.RLock()

    def inherit(self) -> Iterator[tuple[int, int]]:
        """What a process that was killed had marked: (block, count) of each. To be asked once, before anything else.

        After a failed sync of that process the kernel's cache of the delta is dropped instead. Raises OSError, and
        StorageError if something else stands there, or this user may not read it.
        """
        try:
            self._fd = fd = self._fs.open_file(self.path, os.O_RDWR)
        except FileNotFoundError:
            return
        page = bytearray(START_AT + START.size)
        self._fs.preadv(fd, [page], 0)
        magic, delta_id, failed, _boot, _inode = HEAD.unpack_from(page)
        known = magic == MAGIC and delta_id == self._delta_id
        if known and failed:
            self._fs.fadvise(self._delta_fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if page[: HEAD.size] != self._head(fd, failed=False) or not self._fs.stayed_in_memory(self._delta_fd):
            self.discard()
            return
        (start,) = START.unpack_from(page, START_AT)
        if start % MARK_SIZE or not MARKS_AT <= start <= self._fs.fstat(fd).st_size:
            start = MARKS_AT  # a mark too many does no harm
        for mark in self._read_marks(fd, start):
            yield mark >> COUNT_BITS, mark & (1 << COUNT_BITS) - 1

    def _read_marks(self, fd: int, start: int) -> Iterator[int]:
        self._end = start
        buffer = bytearray(READ_SIZE)
        while count := self._fs.preadv(fd, [buffer], self._end) // MARK_SIZE:
            for (mark,) in START.iter_unpack(memoryview(buffer)[: count * MARK_SIZE]):
                if not mark:
                    return
                self._end += MARK_SIZE
                yield mark

    def reserve(self) -> None:
        """Take the space for more marks when there is no ``room``, so that noting one meets no full disk.

        Raises OSError. Where there can be no such file at all, that is logged, and the clone goes on without.
        """
        if self._broken:
            self.room = sys.maxsize
            return
        with self._lock:
            needed = self._end + (len(self._pending) + 2) * MARK_SIZE  # zeros follow the last
            try:
                fd = self._opened()
                page = max(self._space, self._end - self._end % PAGE_SIZE)
                while page < needed:
                    self._fs.allocate(fd, page, PAGE_SIZE)
                    page += PAGE_SIZE
                self._space = page
                self.room = 1 + (page - needed) // MARK_SIZE
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                self._give_up(error)

    def note(self, block: int, count: int) -> None:
        """Note that these blocks were marked; :meth:`write` is to be called before that is acknowledged."""
        self.room -= 1
        self._pending.append(block << COUNT_BITS | count)

    def write(self) -> None:
        """Write the marks that were noted.

        There is space for them; if they cannot be written all the same, that is logged, and nothing more is noted.
        """
        if not self._pending:
            return
        with self._lock:
            marks = self._pending.copy()  # more may be noted meanwhile
            if marks and not self._broken:
                try:
                    self._fs.pwrite_all(self._opened(), b"".join(map(START.pack, marks)) + bytes(MARK_SIZE), self._end)
                except OSError as error:
                    self._give_up(error)
                self._end += len(marks) * MARK_SIZE
            self._written += len(marks)
            del self._pending[: len(marks)]

    @property
    def noted(self) -> int:
        """How many marks were noted so far, to be given to :meth:`covered`."""
        with self._lock:
            return self._written + len(self._pending)

    def covered(self, noted: int) -> None:
        """The first ``noted`` marks are in the map now: they need not be kept."""
        with self._lock, contextlib.suppress(OSError):  # one that is kept tells nothing wrong
            early = max(0, noted - self._written)
            del self._pending[:early]
            self._written += early
            if self._fd is None or self._end == MARKS_AT:
                return
            start = self._end - (self._written - noted) * MARK_SIZE
            if start == self._end:
                self._fs.pwrite_all(self._fd, bytes(MARK_SIZE), MARKS_AT)
                start = self._end = MARKS_AT
            self._fs.pwrite_all(self._fd, START.pack(start), START_AT)

    def clear(self) -> None:
        """All that was noted is in the map, durably, and nothing of it may be inherited any more.

        Raises OSError, and then it may be. Nobody changes the clone meanwhile.
        """
        with self._lock:
            with contextlib.suppress(FileNotFoundError):
                self._fs.unlink(self.path)
            self.close()
            self._written += len(self._pending)
            self._pending.clear()
            self._end, self._space, self.room = MARKS_AT, 0, sys.maxsize if self._broken else 0

    def note_failure(self) -> None:
        """A sync failed: nobody is to believe the cache after this process."""
        with self._lock, contextlib.suppress(OSError):
            fd = self._opened()
            self._fs.pwrite_all(fd, self._head(fd, failed=True), 0)

    def discard(self) -> None:
        """All is in the delta, or lost anyway: nothing is to be inherited."""
        self.close()
        with contextlib.suppress(OSError):  # it may not be there; and one that stays tells nothing wrong
            self._fs.unlink(self.path)
        with contextlib.suppress(OSError):
            self._fs.keep_in_memory(self._delta_fd, keep=False)

    def close(self) -> None:
        """Let go of the file."""
        if self._fd is not None:
            self._fs.close(self._fd)
            self._fd = None

    def _opened(self) -> int:
        if self._fd is None:
            fd = self._fs.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                self._note_presence()
                head = self._head(fd, failed=False).ljust(START_AT, b"\0") + START.pack(MARKS_AT)
                self._fs.pwrite_all(fd, head, 0)
            except BaseException:
                self._fs.close(fd)
                raise
            self._fd = fd
        return self._fd

    def _note_presence(self) -> None:
        try:
            self._fs.keep_in_memory(self._delta_fd)
        except OSError as error:  # who does not own the file may not; nor does every kernel know it
            logger.warning(
                "%s: no note on it (%s): a kill would take what is not flushed", self.path.with_name("delta"), error
            )

    def _give_up(self, error: OSError) -> None:
        logger.error("%s: %s: until the clone is opened again, a kill would take what is not flushed", self.path, error)
        with self._lock:
            self._broken = True
            self.room = sys.maxsize
            self.discard()

    def _head(self, fd: int, *, failed: bool) -> bytes:
        return HEAD.pack(MAGIC, self._delta_id, failed, self._fs.boot_id(), self._fs.fstat(fd).st_ino)
