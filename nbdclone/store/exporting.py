"""From a base or clone to a raw image file; and how a file of any format comes to its name.

What is being written stands in a directory of its own beside the file: it gets the file's name when it is whole and
durable, and a process that is killed leaves nothing that could be taken for the image.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from nbdclone.errors import FileTooLarge, StorageError, UsageError
from nbdclone.store.clone import Clone
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.image import Progress
from nbdclone.store.layer import BLOCK_SIZE, NOWHERE, SEGMENT_SIZE, Extent, zero_runs
from nbdclone.store.pool import Pool

# Large enough that a disk is read in order, small enough to stay in the processor's cache on the way from file to file.
PIECE_SIZE = 1 << 20
# From linux/fs.h: share a range of a file. The request: descriptor and start of the source, length, start here.
FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("=qQQQ")
# Its directory, beside the file that is being made; what stays of one that was killed may be removed.
DRAFT_PREFIX = ".nbdclone-export-"


def open_for_reading(pool: Pool, name: str) -> Clone:
    """What is called so, to be read from beginning to end while nobody changes it.

    A clone is locked meanwhile. One that a server has open at the moment is refused (InUse): its writers would change
    it between the beginning and the end; who asks takes a snapshot first, and reads that. Raises what
    ``Pool.open_clone`` raises.
    """
    return pool.open_clone(name)


class Draft:
    """A file that is being made: a context manager; what was not published by its end is gone.

    ``target`` is where it shall be, ``force`` says that a file there may be replaced. Entering raises UsageError.
    """

    def __init__(self, target: Path, pool: Pool, *, force: bool) -> None:
        self.target = Path(os.path.realpath(target))
        self._shown = target
        self._pool_path = Path(os.path.realpath(pool.path))
        self._force = force

    def __enter__(self) -> Draft:
        parent = self.target.parent
        if not parent.is_dir():
            raise UsageError(f"{self._shown}: there is no directory {parent}")
        if self.target.is_relative_to(self._pool_path):
            raise UsageError(f"{self._shown} is inside the pool: give a file elsewhere")
        if self.target.exists() and not self.target.is_file():
            raise UsageError(f"{self._shown} is there, and is no file")
        self._refuse_existing()
        self._directory = Path(tempfile.mkdtemp(prefix=DRAFT_PREFIX, dir=parent))
        # Under its own name: a vmdk names itself.
        self.path = self._directory / self.target.name
        return self

    def publish(self) -> None:
        """Make it durable and give it its name. Raises UsageError if there is such a file by now, OSError."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # before it has the name: a power cut leaves what was there before, or all of it
        finally:
            os.close(fd)
        self._refuse_existing()
        os.rename(self.path, self.target)
        FILE_SYSTEM.sync_directory(self.target.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)

    def _refuse_existing(self) -> None:
        if not self._force and self.target.exists():
            raise UsageError(f"{self._shown} exists: --force replaces it")


@contextlib.contextmanager
def space_told(clone: Clone, directory: Path) -> Iterator[None]:
    """Say in a line that a file system is full, or that it cannot hold files as large."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise FileTooLarge(f"an image of {clone.size} bytes is larger than a file can be in {directory}") from None
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise no_space(clone, directory) from None


def no_space(clone: Clone, directory: Path) -> StorageError:
    """The error of a file system that is full."""
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    return StorageError(
        f"export of '{clone.name}': no space left in {directory} ({free} bytes free); what there was of it is removed"
    )


def write_raw(clone: Clone, path: Path, progress: Progress | None = None) -> None:
    """Make a raw image at ``path``: holes and blocks of zeros are holes.

    Where the file system can share extents with the pool's files, nothing is copied. The caller syncs it. Raises
    OSError.
    """
    for done, total in raw_steps(clone, path):
        if progress:
            progress(done, total)


def raw_steps(clone: Clone, path: Path, fs: FileSystem = FILE_SYSTEM) -> Iterator[tuple[int, int]]:
    """The same in steps of some MiB: yields (bytes done, bytes in all)."""
    fd = fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        fs.ftruncate(fd, clone.size)
        sharing = True
        buffer = memoryview(mmap.mmap(-1, PIECE_SIZE))  # page-aligned: the kernel copies faster from there
        for offset, extent in whole_extents(clone):
            if extent.hole:
                continue
            sharing = sharing and _share(clone, extent.origin, fd, offset, extent.length)
            if not sharing:
                for start in range(offset, offset + extent.length, PIECE_SIZE):
                    _copy(clone, fs, fd, start, buffer[: min(PIECE_SIZE, offset + extent.length - start)])
                    yield start, clone.size
            yield offset + extent.length, clone.size
        yield clone.size, clone.size
    finally:
        fs.close(fd)


def stream_raw(clone: Clone, fd: int, progress: Progress | None = None) -> None:
    """Write every byte to a pipe, or whatever is open there. Raises OSError."""
    buffer = bytearray(PIECE_SIZE)
    for offset in range(0, clone.size, PIECE_SIZE):
        view = memoryview(buffer)[: min(PIECE_SIZE, clone.size - offset)]
        clone.read_into(view, offset)
        done = 0
        while done < len(view):
            done += os.write(fd, view[done:])
        if progress:
            progress(offset + len(view), clone.size)


def whole_extents(clone: Clone) -> Iterator[tuple[int, Extent]]:
    """Each extent of the disk, with its offset, from the first to the last; none reaches over the end of a segment."""
    offset = 0
    while offset < clone.size:
        for extent in clone.extents(offset, min(SEGMENT_SIZE - offset % SEGMENT_SIZE, clone.size - offset)):
            yield offset, extent
            offset += extent.length


def _share(clone: Clone, origin: int, fd: int, offset: int, length: int) -> bool:
    """Have the file share what the clone's layer has in a range of one segment. False where that cannot be done."""
    assert origin != NOWHERE
    layer = clone.layers[origin - 1]
    source = offset + (offset // SEGMENT_SIZE + 1) * layer.stride
    whole = length - length % BLOCK_SIZE  # a disk may end within a block, and a file of more may not be shared there
    try:
        if whole:
            fcntl.ioctl(fd, FICLONERANGE, _CLONE_RANGE.pack(layer.fd, source, whole, offset))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    if whole < length:
        os.pwrite(fd, clone.pread(length - whole, offset + whole), offset + whole)
    return True


def _copy(clone: Clone, fs: FileSystem, fd: int, offset: int, view: memoryview) -> None:
    clone.read_into(view, offset)
    for zero, first, last in zero_runs(view):
        if not zero:
            fs.pwrite_all(fd, view[first:last], offset + first)


def stdout_for_image() -> int:
    """The descriptor of standard output, if it is no terminal. Raises UsageError."""
    if sys.stdout.isatty():
        raise UsageError("an image is not for a terminal: redirect the output, or give a file")
    return sys.stdout.fileno()
