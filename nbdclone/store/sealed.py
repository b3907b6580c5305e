"""A sealed delta: a layer that a snapshot left. Read by everybody, written by nobody.

A layer is opened once in a process, however many chains it is in: a hundred clones of one snapshot cost its file one
descriptor, and its lock is shared with other processes. Its map is not kept: a clone asks for each segment once.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from nbdclone.errors import CorruptDelta, NotFound
from nbdclone.store.delta_file import METADATA_SIZE, Header, file_size, read_header
from nbdclone.store.delta_map import DeltaMap
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.layer import paint_delta

_Key = tuple[FileSystem, int, int]
_opened: dict[_Key, Sealed] = {}
_opening = threading.Lock()


class Sealed:
    """A layer, opened. Thread-safe. Each :meth:`open` is to be followed by a :meth:`close`."""

    stride = METADATA_SIZE

    def __init__(self, path: Path, header: Header, fd: int, fs: FileSystem) -> None:
        """Take over the descriptor, which has the shared lock."""
        self.path = path
        self.header = header
        self.fd = fd
        self.size = header.size
        self._fs = fs
        self._map = DeltaMap(path, fd, header.id, fs)
        self._users = 1
        status = fs.fstat(fd)
        self._key = (fs, status.st_dev, status.st_ino)
        with _opening:
            _opened.setdefault(self._key, self)

    @classmethod
    def open(cls, path: Path, what: str, fs: FileSystem = FILE_SYSTEM) -> Sealed:
        """Open a layer. ``what`` begins the messages: "snapshot 'web1@golden'".

        Raises NotFound, InUse (it is being removed), CorruptDelta, UnsupportedFormat, OSError.
        """
        try:
            status = fs.stat(path)
            with _opening:
                if known := _opened.get((fs, status.st_dev, status.st_ino)):
                    # A merge may have given it another parent.
                    known.header = read_header(known.fd, str(path), fs)
                    known._users += 1
                    return known
            fd = fs.open_file(path, os.O_RDONLY)
        except FileNotFoundError:
            raise NotFound(f"{what} is not there ({path})") from None
        try:
            fs.lock(fd, path, what, shared=True)
            status = fs.fstat(fd)
            if not fs.still_there(path, status):
                raise NotFound(f"{what} was removed just now ({path})")
            header = read_header(fd, str(path), fs)
            if status.st_size < file_size(header.size):
                raise CorruptDelta(str(path), f"truncated: {status.st_size} bytes of {file_size(header.size)}")
            return cls(path, header, fd, fs)
        except BaseException:
            fs.close(fd)
            raise

    @property
    def id(self) -> bytes:
        return self.header.id

    def paint(self, segment: int, owners: bytes, index: int, nowait: bool) -> bytes:
        return paint_delta(segment, owners, self._map.read(segment, nowait).bitmap, index, self.header.overlap)

    def is_alone(self) -> bool:
        """Has one chain of this process it, and nobody else? Who opens it after this was asked, may come at once."""
        with _opening:
            alone = self._users == 1
        return alone and self._fs.is_alone(self.fd)

    def close(self) -> None:
        with _opening:
            self._users -= 1
            if self._users:
                return
            if _opened.get(self._key) is self:
                del _opened[self._key]
        self._fs.close(self.fd)
