"""What a process that is killed would take with it: the blocks that it marked, and whether the cache can be believed.

The map of a delta is written by a flush, and until then only the process knows which blocks are the delta's. A power
cut may take them: nobody promised to keep what was not flushed. But a process that is killed leaves its data in the
page cache, and a client that reconnects goes on as if nothing had happened: what was acknowledged must be there, and
its next flush must cover it. So each mark is also written to a file beside the delta:

    page 0        magic, the delta's id (16 bytes), 1 if a sync failed, the boot (16 bytes), the number of its own inode
    page s + 1    the map of segment s as it stands, 4064 bytes

It is never synced and means nothing after a power cut. The next to open the delta believes it only if the delta's
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
from collections.abc import Iterator
from pathlib import Path
from struct import Struct

from nbdclone.store.fs import FileSystem, seek_extent
from nbdclone.store.layer import BITMAP_SIZE

logger = logging.getLogger("nbdclone")

MAGIC = b"NBDLIVE1"
HEAD = Struct(">8s16sB16sQ")
PAGE_SIZE = 4096
FILE_NAME = "live"
# There can be no such file here, or no space taken for it: the user may not, or the file system cannot.
_NOT_HERE = frozenset((errno.EACCES, errno.EPERM, errno.EROFS, errno.EOPNOTSUPP, errno.EINVAL))


class LiveMap:
    """The file beside one delta, which the caller has open and locked as ``delta_fd``. Made when first written."""

    def __init__(self, delta: Path, delta_fd: int, delta_id: bytes, fs: FileSystem) -> None:
        self.path = delta.with_name(FILE_NAME)
        self._delta_fd = delta_fd
        self._delta_id = delta_id
        self._fs = fs
        self._fd: int | None = None
        self._broken = False

    def inherit(self) -> Iterator[tuple[int, bytes]]:
        """What a process that was killed had marked: (segment, bitmap) of each. To be asked once, before anything else.

        After a failed sync of that process the kernel's cache of the delta is dropped instead. Raises OSError, and
        StorageError if something else stands there, or this user may not read it.
        """
        try:
            self._fd = fd = self._fs.open_file(self.path, os.O_RDWR)
        except FileNotFoundError:
            return
        head = bytearray(HEAD.size)
        self._fs.preadv(fd, [head], 0)
        magic, delta_id, failed, _boot, _inode = HEAD.unpack(head)
        known = magic == MAGIC and delta_id == self._delta_id
        if known and failed:
            self._fs.fadvise(self._delta_fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if head != self._head(fd, failed=False) or not self._fs.stayed_in_memory(self._delta_fd):
            self.discard()
            return
        size = self._fs.fstat(fd).st_size
        position = PAGE_SIZE
        while (position := seek_extent(self._fs, fd, position, os.SEEK_DATA, otherwise=position)) < size:
            position -= position % PAGE_SIZE
            page = bytearray(BITMAP_SIZE)
            self._fs.preadv(fd, [page], position)
            if any(page):
                yield position // PAGE_SIZE - 1, bytes(page)
            position += PAGE_SIZE

    def reserve(self, segment: int) -> None:
        """Take the space for a segment's page, so that noting its marks meets no full disk.

        Raises OSError. Where there can be no such file at all, that is logged, and the clone goes on without.
        """
        if self._broken:
            return
        try:
            self._fs.allocate(self._opened(), (segment + 1) * PAGE_SIZE, PAGE_SIZE)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            self._give_up(error)

    def note(self, segment: int, first: int, bits: bytes | bytearray) -> None:
        """Write the bytes of the segment's map from ``first`` on, as they are now.

        There is space for them; if they cannot be written all the same, that is logged, and nothing more is noted.
        """
        if self._broken:
            return
        try:
            self._fs.pwrite_all(self._opened(), bits, (segment + 1) * PAGE_SIZE + first)
        except OSError as error:
            self._give_up(error)

    def note_failure(self) -> None:
        """A sync failed: nobody is to believe the cache after this process."""
        with contextlib.suppress(OSError):
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
                self._fs.pwrite_all(fd, self._head(fd, failed=False), 0)
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
        self._broken = True
        self.discard()

    def _head(self, fd: int, *, failed: bool) -> bytes:
        return HEAD.pack(MAGIC, self._delta_id, failed, self._fs.boot_id(), self._fs.fstat(fd).st_ino)
