"""What a boot reads of its base: recorded once, kept beside the base, read ahead when the next clone starts.

    POOL/bases/NAME/boot.trace

The unit is a grain of 64 KiB of the image file. A trace is the grains that were read, each once, in the order in which
they were first asked for. It is advice and nothing else, and no part of the base's fingerprint: without it, or with one
that is damaged or another base's, all reads are the same, only later.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from nbdclone.errors import NotFound, StorageError, UnsupportedFormat, UsageError
from nbdclone.store.clone import Clone
from nbdclone.store.fs import FILE_SYSTEM, FileSystem, seek_extent
from nbdclone.store.image import Identity, Image, save
from nbdclone.store.layer import MAX_SIZE

TRACE_NAME = "boot.trace"
MAGIC = b"NBDTRACE"
VERSION = 1
# Magic, version, grain size, id of the base, time of the recording (ns since 1970), grains, CRC-32 of the whole file
# without this field. The numbers of the grains follow, 4 bytes each.
HEADER = struct.Struct(">8sII16sQI")
CHECKSUM = struct.Struct(">I")
# A guest reads 4 to 128 KiB at a time. Smaller grains would make more and shorter reads, larger ones more for nothing.
GRAIN_SIZE = 64 << 10
# What reads more than this is no boot but a copy of the disk, of which nothing is kept.
MAX_GRAINS = (1 << 30) // GRAIN_SIZE
# What reads less has looked at the disk and not booted: a kernel and its initrd are more.
MIN_GRAINS = (8 << 20) // GRAIN_SIZE
# So much is asked for in one step, in the order of its place; the steps follow the order of the boot. Two steps are on
# their way at once: as long as one may a read of somebody else wait behind them.
STEP_GRAINS = (4 << 20) // GRAIN_SIZE


@dataclass(frozen=True, slots=True)
class Trace:
    """The grains that a boot read, in its order. ``created`` in ns of Unix time."""

    base_id: bytes
    created: int
    grains: tuple[int, ...]

    def dump(self) -> bytes:
        header = HEADER.pack(MAGIC, VERSION, GRAIN_SIZE, self.base_id, self.created, len(self.grains))
        grains = struct.pack(f">{len(self.grains)}I", *self.grains)
        return header + CHECKSUM.pack(zlib.crc32(grains, zlib.crc32(header))) + grains

    @classmethod
    def parse(cls, data: bytes) -> Trace:
        """Raises UnsupportedFormat, ValueError."""
        start = HEADER.size + CHECKSUM.size
        if len(data) < start:
            raise ValueError("too short")
        magic, version, grain_size, base_id, created, count = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise ValueError("bad magic")
        if version > VERSION:
            raise UnsupportedFormat(f"made by a newer nbdclone (format {version}, this one knows {VERSION})")
        (checksum,) = CHECKSUM.unpack_from(data, HEADER.size)
        if zlib.crc32(data[start:], zlib.crc32(data[: HEADER.size])) != checksum:
            raise ValueError("bad checksum")
        if grain_size != GRAIN_SIZE or count > MAX_GRAINS or len(data) != start + 4 * count:
            raise ValueError("bad geometry")
        grains = struct.unpack_from(f">{count}I", data, start)
        if any(grain > MAX_SIZE // GRAIN_SIZE for grain in grains):
            raise ValueError("places beyond any image")
        return cls(base_id, created, grains)


def load_trace(directory: Path, base_id: bytes | None = None, fs: FileSystem = FILE_SYSTEM) -> Trace | None:
    """The trace in a base's directory, if there is one.

    Raises UnsupportedFormat, or StorageError if it is damaged, cannot be read, or is not of the base with that id.
    """
    path = directory / TRACE_NAME
    most = HEADER.size + CHECKSUM.size + 4 * MAX_GRAINS
    try:
        with open(fs.open_file(path, os.O_RDONLY), "rb") as file:
            trace = Trace.parse(file.read(most + 1))
    except FileNotFoundError:
        return None
    except UnsupportedFormat as error:
        raise UnsupportedFormat(f"{path}: {error}") from None
    except (ValueError, OSError) as error:
        raise StorageError(f"{path}: damaged ({error})") from None
    if base_id is not None and trace.base_id != base_id:
        raise StorageError(f"{path}: of another base ({trace.base_id.hex()})")
    return trace


def drop_trace(directory: Path, fs: FileSystem = FILE_SYSTEM) -> bool:
    """Remove the trace, whatever it is. False if there is none."""
    try:
        fs.unlink(directory / TRACE_NAME)
    except FileNotFoundError:
        return False
    return True


def directory_of_base(pool: Path, name: str) -> Path:
    """Raises NotFound, UsageError if it is a clone's name."""
    with contextlib.suppress(NotFound):
        if (directory := pool / "bases" / _plain(name)).is_dir():
            return directory
        if (pool / "clones" / name).is_dir():
            raise UsageError(f"'{name}' is a clone: traces are kept with bases")
    raise NotFound(f"there is no base {name[:100]!r} in {pool}")


def _plain(name: str) -> str:
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        raise NotFound(name)
    return name


class Recorder:
    """Notes which grains of its base a clone reads, from now until ``stop``.

    The functions that the clone reads with are exchanged for others, and back: when nothing is recorded it costs
    nothing.
    """

    def __init__(self, clone: Clone) -> None:
        base = clone.layers[0]
        assert isinstance(base, Image)
        self._clone = clone
        self._base = base
        self._grains: dict[int, None] = {}
        self._watching = True
        clone.read_through(cast(FileSystem, _Watched(base.fs, base.fd, self._see)))

    @property
    def base(self) -> Image:
        """Of which the boot is. The clone may have been cut free of it meanwhile."""
        return self._base

    def stop(self) -> Trace | None:
        """End it. The trace, if it is one of a boot, and the clone still over its base; it must still be open."""
        self._unwatch()
        grains = tuple(self._grains)
        if not MIN_GRAINS <= len(grains) <= MAX_GRAINS:
            return None
        with self._clone.holding() as layers:
            if layers[0] is not self._base:
                return None
            # In a hole there is nothing to be read ahead, but zeros that would take memory.
            kept = tuple(grain for grain in grains if self._has_data(grain))
        return Trace(self._base.record.id, time.time_ns(), kept) if len(kept) >= MIN_GRAINS else None

    def _see(self, offset: int, length: int) -> None:
        grains = self._grains
        for grain in range(offset // GRAIN_SIZE, (offset + length - 1) // GRAIN_SIZE + 1):
            if grain not in grains:
                grains[grain] = None
                if len(grains) > MAX_GRAINS:
                    self._unwatch()

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            self._clone.read_through(self._base.fs)

    def _has_data(self, grain: int) -> bool:
        start = grain * GRAIN_SIZE
        if start >= self._base.size:
            return False
        return seek_extent(self._base.fs, self._base.fd, start, os.SEEK_DATA, otherwise=start) < start + GRAIN_SIZE


class _Watched:
    """A file system that tells of each read of one of its files: place and length."""

    def __init__(self, fs: FileSystem, fd: int, see: Callable[[int, int], None]) -> None:
        self._fs = fs
        self._fd = fd
        self._see = see

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        if fd == self._fd:
            self._see(offset, sum(map(len, buffers)))
        return self._fs.preadv(fd, buffers, offset, flags)

    def preadv_nowait(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if fd == self._fd:
            self._see(offset, sum(map(len, buffers)))
        return self._fs.preadv_nowait(fd, buffers, offset)

    def pread_all(self, fd: int, buffers: Sequence[Any], offset: int, length: int) -> int:
        if fd == self._fd:
            self._see(offset, length)
        return self._fs.pread_all(fd, buffers, offset, length)


def still_read(trace: Trace, clone: Clone) -> tuple[int, ...]:
    """The grains of which the clone still reads anything from its base. May wait for the clone's map."""
    size = clone.layers[0].size
    return tuple(
        grain
        for grain in trace.grains
        if (start := grain * GRAIN_SIZE) < size and clone.reads_base(start, min(GRAIN_SIZE, size - start))
    )


def warm(image: Path, identity: Identity, grains: Sequence[int], fs: FileSystem, go_on: Callable[[int], bool]) -> int:
    """Have the kernel read the grains of an image into its cache; the bytes that were asked for.

    ``go_on(bytes)`` is asked before each step of up to 4 MiB whether it may be done. At most two steps are on their way
    at once. The image has a descriptor of its own, and no lock: a base may be removed meanwhile. Raises OSError,
    StorageError.
    """
    fd = fs.open_file(image, os.O_RDONLY)
    try:
        if Identity.of(fs.fstat(fd)) != identity:
            return 0
        fs.fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # exactly what is asked for
        asked = 0
        before: list[tuple[int, int]] = []
        for first in range(0, len(grains), STEP_GRAINS):
            step = list(_runs(sorted(grains[first : first + STEP_GRAINS])))
            size = sum(length for _, length in step)
            if not go_on(size):
                break
            for offset, length in step:
                fs.will_need(fd, offset, length)
            asked += size
            _wait_for(fs, fd, before)
            before = step
        return asked
    finally:
        fs.close(fd)


def _runs(grains: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours joined: (offset, length) in bytes."""
    start = end = None
    for grain in grains:
        if start is None or grain != end:
            if start is not None and end is not None:
                yield start * GRAIN_SIZE, (end - start) * GRAIN_SIZE
            start = grain
        end = grain + 1
    if start is not None and end is not None:
        yield start * GRAIN_SIZE, (end - start) * GRAIN_SIZE


def _wait_for(fs: FileSystem, fd: int, runs: Sequence[tuple[int, int]]) -> None:
    """Wait until what was asked for is there: a byte of the end of each run comes when that has been read."""
    byte = bytearray(1)
    for offset, length in runs:
        fs.preadv(fd, [byte], offset + length - 1)


def bytes_in(grains: Sequence[int]) -> int:
    return len(grains) * GRAIN_SIZE


def runs_in(trace: Trace) -> int:
    """In how many pieces of the image the grains of a trace lie."""
    return sum(1 for _ in _runs(sorted(trace.grains)))


def save_trace(trace: Trace, base: Image) -> None:
    """Put a trace beside its base, in the place of the one there was. Raises OSError.

    A power cut leaves the old one, the new one, or none, and a draft that ``check`` knows.
    """
    save(base.directory / TRACE_NAME, trace.dump(), base.fs)
