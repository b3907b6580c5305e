"""The operating system, as the store needs it: the one place that calls it.

Everything that must survive a power cut goes through :class:`FileSystem`, so that a test can put a simulated
disk in its place. The calls that stand on the hot path are the plain functions of :mod:`os`, bound as they are:
going through this class costs an attribute look-up and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import shutil
import stat
import struct
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nbdclone.errors import InUse, StorageError
from nbdclone.store import locks

T = TypeVar("T")

# From linux/falloc.h.
FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10

# Of files that are made together: as many wait for the disk at once, and share what a journal writes for them all.
SYNCS_AT_ONCE = 16

# From linux/fs.h: share the extents of a whole file (btrfs, XFS, bcachefs).
FICLONE = 0x40049409
# And those of a range, if both have the same there, which the kernel sees for itself (man 2 ioctl_fideduperange): the
# source's offset, length, how many targets; then of the one target descriptor, offset, bytes shared, status: below 0 an
# error number, 1 if it differs.
FIDEDUPERANGE = 0xC0189436
DEDUPE = struct.Struct("=QQHHIqQQiI")
# What a file system says that cannot do it.
CANNOT_SHARE = frozenset((errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS))
# And the flags of a file, as chattr sets them: a long in the number of the call, an int in what is passed.
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IMMUTABLE_FL = 0x10

# What an open says of a name that no file of ours stands at, or one that this user may not have.
_NO_FILE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EOVERFLOW)
)

# From linux/fs.h and linux/fiemap.h: where the extents of a range are. The request: start, length, flags, extents told,
# extents that there is room for. An extent: its place in the file, on the disk, its length, flags.
FS_IOC_FIEMAP = 0xC020660B
FIEMAP = struct.Struct("=QQIIII")
FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")
# Its place on the disk is not known, not yet there, or not that of its bytes alone: UNKNOWN, DELALLOC, ENCODED,
# NOT_ALIGNED, DATA_INLINE.
FIEMAP_EXTENT_NO_PLACE = 0x0002 | 0x0004 | 0x0008 | 0x0100 | 0x0200
FIEMAP_EXTENT_SHARED = 0x2000  # with another file
FIEMAP_EXTENTS = 256  # asked for at once

# From linux/fcntl.h: a hint for the disk, which the inode keeps in memory only. 0 is "not set", and 1 says no more than
# that, but is not 0: so it serves as a note that is gone when the inode is.
F_GET_RW_HINT = 1024 + 11
F_SET_RW_HINT = 1024 + 12
_SEEN_BEFORE = struct.pack("=Q", 1)
_NOT_SEEN = struct.pack("=Q", 0)
# What a device reads ahead unless it is told otherwise, in KiB.
READAHEAD_KB = 128
# More would be cut into requests of a disk, of 256 pages at most, with a short one at the end.
READAHEAD_MAX_KB = 1024
# Random, and another after each boot (man 4 random).
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class FileSystem:
    """The file operations of the store. Stateless; every error is an :class:`OSError`."""

    open = staticmethod(os.open)
    close = staticmethod(os.close)
    preadv = staticmethod(os.preadv)
    pwrite = staticmethod(os.pwrite)
    ftruncate = staticmethod(os.ftruncate)
    fstat = staticmethod(os.fstat)
    stat = staticmethod(os.stat)
    fchmod = staticmethod(os.fchmod)
    rename = staticmethod(os.rename)
    link = staticmethod(os.link)
    mkdir = staticmethod(os.mkdir)
    lseek = staticmethod(os.lseek)
    datasync = staticmethod(os.fdatasync)
    sync = staticmethod(os.fsync)
    fadvise = staticmethod(os.posix_fadvise)
    allocate = staticmethod(os.posix_fallocate)
    unlink = staticmethod(os.unlink)
    remove_tree = staticmethod(shutil.rmtree)

    def open_file(self, path: str | Path, flags: int) -> int:
        """Open a file that must be there and must be a file. Raises FileNotFoundError, StorageError, OSError.

        Whatever stands at a pool's names is not to be waited for (a FIFO) nor to be taken for data (a device).
        """
        flags |= os.O_NOCTTY | os.O_CLOEXEC
        try:
            try:
                fd = self.open(path, flags | os.O_NONBLOCK)
            except BlockingIOError:
                # A client of the NFS server here, or of Samba's, has leave to keep the file to itself: it is told to
                # give that up, and the open waits for it, 45 s at most (man 5 proc, lease-break-time).
                if not stat.S_ISREG(self.stat(path).st_mode):
                    raise
                fd = self.open(path, flags)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            raise StorageError(f"{path}: cannot be opened ({os.strerror(error.errno)})") from None
        if not stat.S_ISREG(self.fstat(fd).st_mode):
            self.close(fd)
            raise StorageError(f"{path}: cannot be opened (not a regular file)")
        return fd

    # What preadv takes in order to answer EAGAIN rather than wait for the disk (man 2 preadv2).
    NOWAIT: int = os.RWF_NOWAIT

    def preadv_nowait(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        """preadv that raises BlockingIOError where it would wait, and where the file system cannot say (tmpfs, NFS)."""
        try:
            return self.preadv(fd, buffers, offset, self.NOWAIT)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise BlockingIOError(errno.EAGAIN, "this file system cannot say whether it would wait") from None

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Give the range back to the file system; it reads as zeros from now on.

        Where the file system cannot do that (EOPNOTSUPP), zeros are written: the meaning is kept, not the space.
        """
        try:
            _fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._write_zeros(fd, offset, length)

    def can_punch(self, fd: int, offset: int, length: int) -> bool:
        """Can this file system make holes? Tried on the range, which must be a hole already."""
        try:
            _fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError:
            return False
        return True

    def zero_allocated(self, fd: int, offset: int, length: int) -> None:
        """Make the range read as zeros and keep (or take) the space for it."""
        try:
            _fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            self._write_zeros(fd, offset, length)

    def unallocated(self, fd: int, offset: int, length: int) -> int:
        """How many bytes of the range have no space on the disk yet.

        Where the file system does not tell extents (tmpfs, NFS), space that was taken ahead of its data counts as none.
        """
        missing, stop = 0, offset + length
        try:
            for start, _, size, _ in self._extents(fd, offset, stop):
                missing += max(min(start, stop) - offset, 0)
                offset = max(offset, min(start + size, stop))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL):
                raise
            return missing + _holes(self, fd, offset, stop)
        return missing + stop - offset

    def shared_bytes(self, fd: int) -> int:
        """How many bytes of the file are in extents that it shares with another, as far as that can be told."""
        with contextlib.suppress(OSError):  # what shares nothing need not know the question
            extents = self._extents(fd, 0, self.fstat(fd).st_size)
            return sum(size for _, _, size, flags in extents if flags & FIEMAP_EXTENT_SHARED)
        return 0

    def places_on_disk(self, fd: int, offset: int, length: int) -> list[tuple[int, int, int]] | None:
        """Where the bytes of the range are: (bytes behind ``offset``, place on the disk, length), neighbours joined.

        None if that cannot be told of all that has space there.
        """
        found: list[tuple[int, int, int]] = []
        try:
            for start, place, size, flags in self._extents(fd, offset, offset + length):
                if flags & FIEMAP_EXTENT_NO_PLACE:
                    return None
                first, last = max(start, offset), min(start + size, offset + length)
                at, place = first - offset, place + first - start
                if found and (at, place) == (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]):
                    found[-1] = (*found[-1][:2], found[-1][2] + last - first)
                else:
                    found.append((at, place, last - first))
        except OSError:
            return None
        return found

    def _extents(self, fd: int, offset: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """What space the range has: (place in the file, place on the disk, length, flags) of each extent."""
        request = bytearray(FIEMAP.size + FIEMAP_EXTENTS * FIEMAP_EXTENT.size)
        told = FIEMAP_EXTENTS
        while offset < stop and told == FIEMAP_EXTENTS:
            FIEMAP.pack_into(request, 0, offset, stop - offset, 0, 0, FIEMAP_EXTENTS, 0)
            fcntl.ioctl(fd, FS_IOC_FIEMAP, request)
            told = FIEMAP.unpack_from(request)[3]
            for index in range(told):
                extent = FIEMAP_EXTENT.unpack_from(request, FIEMAP.size + index * FIEMAP_EXTENT.size)
                start, _, size, _ = extent
                yield extent
                offset = max(offset, start + size)

    def keep_in_memory(self, fd: int, *, keep: bool = True) -> None:
        """Note, where only the kernel's memory has it, that this inode is there, and with it what was written to it.

        ``keep`` False takes the note away. Raises OSError: since Linux 6.9 only the owner of the file may, and root.
        """
        fcntl.fcntl(fd, F_SET_RW_HINT, _SEEN_BEFORE if keep else _NOT_SEEN)

    def stayed_in_memory(self, fd: int) -> bool:
        """Is that note still there? Not so after an unmount, or when the kernel needed the memory."""
        try:
            return fcntl.fcntl(fd, F_GET_RW_HINT, bytes(len(_SEEN_BEFORE))) == _SEEN_BEFORE
        except OSError:
            return False

    def boot_id(self) -> bytes:
        """16 bytes that no other machine has, nor this one after the next boot."""
        return _boot_id()

    def will_need(self, fd: int, offset: int, length: int) -> None:
        """Ask the kernel to read the range into its cache: all of it, where one request is taken for its beginning."""
        most = _readahead_limit(self.fstat(fd).st_dev)
        for start in range(offset, offset + length, most):
            self.fadvise(fd, start, min(most, offset + length - start), os.POSIX_FADV_WILLNEED)

    def reflink(self, target_fd: int, source_fd: int) -> bool:
        """Make the target share the source's extents; False where that cannot be done."""
        try:
            fcntl.ioctl(target_fd, FICLONE, source_fd)
        except OSError:
            return False
        return True

    def dedupe(self, source_fd: int, source: int, target_fd: int, target: int, length: int) -> int:
        """Make the target share the source's extents in a range that both have alike: how many bytes of it do so now.

        The kernel compares both while nobody can change them: 0 where they differ, and nothing was done. It may do less
        than it is asked for. The target's descriptor may be read-only, if this user may write to the file. Raises
        OSError: among CANNOT_SHARE where the file system cannot do it, or the range is not of whole blocks.
        """
        request = bytearray(DEDUPE.pack(source, length, 1, 0, 0, target_fd, target, 0, 0, 0))
        fcntl.ioctl(source_fd, FIDEDUPERANGE, request)
        *_, done, status, _ = DEDUPE.unpack(request)
        if status < 0:
            raise OSError(-status, os.strerror(-status))
        return done if status == 0 else 0

    def is_immutable(self, fd: int) -> bool:
        """Has the file the flag that forbids everybody to change or remove it? False where there is no such flag."""
        try:
            return bool(self._flags(fd) & FS_IMMUTABLE_FL)
        except OSError:
            return False

    def set_immutable(self, fd: int, immutable: bool) -> None:
        """Set or clear that flag. Raises OSError: only root may, and not every file system has it."""
        flags = self._flags(fd) & ~FS_IMMUTABLE_FL | (FS_IMMUTABLE_FL if immutable else 0)
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, flags.to_bytes(4, sys.byteorder))

    def _flags(self, fd: int) -> int:
        return int.from_bytes(fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(4)), sys.byteorder)

    def sync_directory(self, path: Path) -> None:
        """Make the directory's entries durable: a file that was synced is not there until its name is."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def for_each(self, work: Callable[[T], object], items: Sequence[T]) -> None:
        """Do the work for each item, several at once, so that a file system can make many syncs one.

        Raises what was raised first; what was not begun by then is left out.
        """
        if len(items) == 1:
            work(items[0])
            return
        from concurrent.futures import ThreadPoolExecutor  # here, as most commands do without

        with ThreadPoolExecutor(SYNCS_AT_ONCE) as threads:
            pending = [threads.submit(work, item) for item in items]
            try:
                for each in pending:
                    each.result()
            except BaseException:
                threads.shutdown(cancel_futures=True)
                raise

    def still_there(self, path: str | Path, status: os.stat_result) -> bool:
        """Is the file that was opened, and then locked, the one of that name? A removal may have come in between."""
        try:
            now = self.stat(path)
        except FileNotFoundError:
            return False
        return (now.st_dev, now.st_ino) == (status.st_dev, status.st_ino)

    def lock(self, fd: int, path: str | Path, what: str, *, shared: bool = False) -> None:
        """Take the advisory locks on an open file. Raises InUse that names the holder, StorageError if there are none.

        ``what`` begins the message: "clone 'web1'". The lock goes when the descriptor is closed or its process dies.
        """
        try:
            locks.take_after_the_dying(fd, shared=shared)
        except BlockingIOError as error:
            raise InUse(f"{what} is in use by {error.strerror} ({path})") from None
        except OSError as error:
            raise locks.no_locks(error, path) or error from None

    def is_alone(self, fd: int) -> bool:
        """Is this the only descriptor with a lock on the file, as far as can be told? False where it cannot."""
        return locks.is_alone(fd)

    def is_of_this_machine(self, fd: int) -> bool:
        """Can no other machine have the file open, as far as can be told?"""
        return locks.is_of_this_machine(fd)

    def lock_look(self, fd: int, number: int) -> None:
        """See :mod:`nbdclone.store.sealed`."""
        locks.lock_look(fd, number)

    def unlock_look(self, fd: int, number: int) -> None:
        locks.unlock_look(fd, number)

    def nobody_looked(self, fd: int, number: int) -> bool:
        """Is no look before that one in use through another descriptor? False where that cannot be told."""
        return locks.nobody_looked(fd, number)

    @contextlib.contextmanager
    def exclusively(self, path: str | Path) -> Iterator[None]:
        """Hold the lock file at ``path`` (made when missing), waiting for it: for critical sections that are short."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                locks.take(fd, wait=True)
            except OSError as error:
                raise locks.no_locks(error, path) or error from None
            yield
        finally:
            os.close(fd)

    def pwrite_all(self, fd: int, data: Any, offset: int) -> None:
        """Write all of ``data`` (bytes-like). The kernel may take less than it is given."""
        view = memoryview(data)
        while view:
            written = self.pwrite(fd, view, offset)
            view = view[written:]
            offset += written

    def pread_all(self, fd: int, buffers: Sequence[Any], offset: int, length: int) -> int:
        """Fill the one buffer given from the file, until ``length`` bytes or the end of the file; the count read."""
        view = memoryview(buffers[0])[:length]
        done = 0
        while done < length:
            count = self.preadv(fd, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def _write_zeros(self, fd: int, offset: int, length: int) -> None:
        piece = bytes(min(length, 1 << 20))
        while length:
            count = min(length, len(piece))
            self.pwrite_all(fd, memoryview(piece)[:count], offset)
            offset += count
            length -= count


def data_and_holes(fs: FileSystem, fd: int, start: int, stop: int, unit: int) -> Iterator[tuple[bool, int]]:
    """Divide [start, stop) of a file: (is it a hole?, its end), in turn, where one ends at multiples of ``unit`` only.

    What lies beyond the end of the file is a hole. A file system that knows no holes has data everywhere. The seeks
    move the descriptor's position: nobody else may use that, and two at once do not mind each other.
    """
    while start < stop:
        data = min(seek_extent(fs, fd, start, os.SEEK_DATA, otherwise=start), stop)
        data = max(data - data % unit, start) if data < stop else stop
        if data > start:
            yield True, data
        if data < stop:
            hole = seek_extent(fs, fd, data - data % unit + unit - 1, os.SEEK_HOLE, otherwise=stop)
            start = min(hole + -hole % unit, stop)
            yield False, start
        else:
            start = stop


def _holes(fs: FileSystem, fd: int, start: int, stop: int) -> int:
    """How many bytes of the range are holes."""
    count = 0
    for hole, end in data_and_holes(fs, fd, start, stop, unit=1):
        count += end - start if hole else 0
        start = end
    return count


def seek_extent(fs: FileSystem, fd: int, position: int, whence: int, otherwise: int) -> int:
    """Where data or a hole begins, at ``position`` or behind it; ``otherwise`` if the file system cannot say."""
    try:
        return fs.lseek(fd, position, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file, or beyond it
            return sys.maxsize if whence == os.SEEK_DATA else position
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return otherwise
        raise


@functools.cache
def _readahead_limit(device: int) -> int:
    """How much the kernel reads ahead when it is asked once, in bytes.

    The device's largest request or its read-ahead, whichever is more (Linux, mm/readahead.c). Where the device cannot
    be asked (NFS, btrfs), what read-ahead is by default.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    disk = Path("/sys/dev/block", number)
    told = [READAHEAD_KB]
    for path in (
        Path("/sys/class/bdi", number, "read_ahead_kb"),
        disk / "queue/max_sectors_kb",
        disk / "../queue/max_sectors_kb",  # of the disk that a partition is on
    ):
        with contextlib.suppress(OSError, ValueError):
            told.append(int(path.read_text(encoding="ascii")))
    return min(max(told), READAHEAD_MAX_KB) << 10


@functools.cache
def _boot_id() -> bytes:
    try:
        return uuid.UUID(_BOOT_ID.read_text(encoding="ascii").strip()).bytes
    except (OSError, ValueError):
        return os.urandom(16)  # no /proc: this process is like no other


FILE_SYSTEM = FileSystem()


def write_durably(path: Path, content: bytes, fs: FileSystem) -> None:
    """Make a new file with this content, durable; its name is so when its directory is synced. Raises OSError."""
    fd = fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        fs.pwrite_all(fd, content, 0)
        fs.sync(fd)
    finally:
        fs.close(fd)
