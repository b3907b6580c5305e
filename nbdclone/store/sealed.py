"""A sealed delta: a layer that a snapshot left. Read by everybody, written by nobody.

A layer is opened once in a process, however many chains it is in: a hundred clones of one snapshot cost its file one
descriptor, and its lock is shared with other processes. Its map is not kept: a clone asks for each segment once.

Who merges the layer into what is above it, and gives its space back meanwhile, has to know who may have found blocks in
it that are above it by now. For this the mark ``layers/ID/going`` has a length, which is counted up: the number of the
look. Who opens the layer has a lock on the byte of that number; so nobody has one of an earlier number, if nobody reads
it who has not looked anew (see :mod:`nbdclone.store.giving_back`).
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from pathlib import Path

from nbdclone.errors import CorruptDelta, NotFound
from nbdclone.store.delta_file import METADATA_SIZE, Header, file_size, read_header
from nbdclone.store.delta_map import DeltaMap
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.layer import paint_delta
from nbdclone.store.places import GOING

_Key = tuple[FileSystem, int, int]
_opened: dict[_Key, _File] = {}
_opening = threading.Lock()


class _File:
    """The file of a layer, open in this process. What is done to ``users`` is done under the lock of this module."""

    def __init__(self, fd: int, header: Header, path: Path, fs: FileSystem) -> None:
        self.fd = fd
        self.map = DeltaMap(path, fd, header.id, fs)
        self.fs = fs
        self.users: Counter[int] = Counter()  # by the look that they took
        status = fs.fstat(fd)
        self.key = (fs, status.st_dev, status.st_ino)

    def look(self, mark: Path) -> int:
        """Be one of the users, from now on. The number of this look."""
        while True:
            number = look_at(mark)
            if not self.users[number]:
                self.fs.lock_look(self.fd, number)
            self.users[number] += 1
            if look_at(mark) == number:  # else it was counted up before the lock was there to be seen
                return number
            self.leave(number)

    def leave(self, number: int) -> None:
        self.users[number] -= 1
        if not self.users[number]:
            del self.users[number]
            self.fs.unlock_look(self.fd, number)


def look_at(mark: Path) -> int:
    """The number of a look at a layer that is taken now; ``mark`` is its ``going``."""
    try:
        return os.stat(mark).st_size
    except FileNotFoundError:
        return 0


class Sealed:
    """A layer, opened. Thread-safe. Each :meth:`open` is to be followed by a :meth:`close`."""

    stride = METADATA_SIZE

    def __init__(self, path: Path, header: Header, fd: int, fs: FileSystem) -> None:
        """Take over the descriptor, which has the shared lock."""
        file = _File(fd, header, path, fs)
        with _opening:
            self._begin(path, header, file)
            _opened.setdefault(file.key, file)

    def _begin(self, path: Path, header: Header, file: _File) -> None:
        self.path = path
        self.header = header
        self.fd = file.fd
        self.size = header.size
        self._file = file
        self._look = file.look(path.with_name(GOING))

    @classmethod
    def open(cls, path: Path, what: str, fs: FileSystem = FILE_SYSTEM) -> Sealed:
        """Open a layer. ``what`` begins the messages: "snapshot 'web1@golden'".

        Raises NotFound, InUse (it is being removed), CorruptDelta, UnsupportedFormat, OSError.
        """
        try:
            status = fs.stat(path)
            with _opening:
                if known := _opened.get((fs, status.st_dev, status.st_ino)):
                    layer = cls.__new__(cls)
                    layer._begin(path, read_header(known.fd, str(path), fs), known)  # the parent may be another by now
                    return layer
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

    def look_again(self) -> bool:
        """Does it stand on something else by now? Then the header says so. Raises CorruptDelta, OSError."""
        before, self.header = self.header, read_header(self.fd, str(self.path), self._file.fs)
        return self.header.parent_id != before.parent_id

    @property
    def id(self) -> bytes:
        return self.header.id

    def paint(self, segment: int, owners: bytes, index: int, nowait: bool) -> bytes:
        return paint_delta(segment, owners, self._file.map.read(segment, nowait).bitmap, index, self.header.overlap)

    def is_alone(self) -> bool:
        """Has one chain of this process it, and nobody else? Who opens it after this was asked, may come at once."""
        with _opening:
            alone = self._file.users.total() == 1
        return alone and self._file.fs.is_alone(self.fd)

    def is_alone_before(self, number: int) -> bool:
        """Has nobody else it who took a look before that one?"""
        with _opening:
            before = sum(count for look, count in self._file.users.items() if look < number)
        return before == (self._look < number) and self._file.fs.nobody_looked(self.fd, number)

    def close(self) -> None:
        with _opening:
            self._file.leave(self._look)
            if self._file.users:
                return
            if _opened.get(self._file.key) is self._file:
                del _opened[self._file.key]
        self._file.fs.close(self.fd)
