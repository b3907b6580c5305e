"""A disk in memory that knows what a power cut may leave of it.

Of every file it keeps what reads see (the page cache), what is durable, and each change since the last sync; of every
directory the same with its entries. :meth:`Tree.crash` gives a state that a real disk may be found in after the power
went: from what was not synced anything may be there or not, in any order, and torn at sectors of 512 bytes. The disk
may have a capacity.

:class:`SimulatedFileSystem` offers this as the file system of the store. ``on_step`` is called before anything
changes or is synced: there a test looks at the states, lets something else happen at that very moment, or raises an
error or a power cut.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nbdclone.errors import InUse
from nbdclone.store.fs import FileSystem

SECTOR = 512
ZEROS = bytes(SECTOR)
PAGE = 4096  # the unit in which space is taken

Sectors = dict[int, bytes]  # by number; one that is missing holds zeros


class Change(NamedTuple):
    """What one call changed in a file: the sectors it left there, and the length of the file where it set that."""

    sectors: Sectors
    size: int | None = None


@dataclass(eq=False)
class File:
    """``cached`` is what reads see. ``pending`` are the changes that no sync has covered, oldest first."""

    size: int = 0
    cached: Sectors = field(default_factory=dict)
    durable_size: int = 0
    durable: Sectors = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    allocated: set[int] = field(default_factory=set)  # pages that have their space
    durably_allocated: set[int] = field(default_factory=set)
    inode: int = field(default_factory=itertools.count(1).__next__)

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self.size - offset))
        first, end = offset // SECTOR, -(-(offset + length) // SECTOR)
        data = b"".join([self.cached.get(number, ZEROS) for number in range(first, end)])
        return data[offset - first * SECTOR :][:length]

    def write(self, offset: int, data: bytes) -> None:
        first, end = offset // SECTOR, -(-(offset + len(data)) // SECTOR)
        lead = offset - first * SECTOR
        whole = bytearray(b"".join([self.cached.get(number, ZEROS) for number in range(first, end)]))
        whole[lead : lead + len(data)] = data
        sectors = {first + at // SECTOR: bytes(whole[at : at + SECTOR]) for at in range(0, len(whole), SECTOR)}
        self.allocated |= pages(offset, len(data))
        grown = max(self.size, offset + len(data))
        self._change(sectors, grown if grown > self.size else None)

    def clear(self, offset: int, length: int) -> None:
        """Make whole sectors zeros, with or without their space."""
        first, end = offset // SECTOR, (offset + length) // SECTOR
        self._change({number: ZEROS for number in self.cached if first <= number < end})

    def truncate(self, size: int) -> None:
        kept = -(-size // SECTOR)
        self._change({number: ZEROS for number in self.cached if number >= kept}, size)

    def _change(self, sectors: Sectors, size: int | None = None) -> None:
        self.cached.update(sectors)
        self.size = self.size if size is None else size
        self.pending.append(Change(sectors, size))

    def settle(self, count: int) -> None:
        """The oldest ``count`` changes are durable."""
        for change in self.pending[:count]:
            self.durable.update(change.sectors)
            self.durable_size = self.durable_size if change.size is None else change.size
        del self.pending[:count]

    def lose(self, count: int, rng: random.Random) -> None:
        """A sync failed: some of the oldest ``count`` changes never become durable, and the cache does not tell."""
        survivors = list(_survivors(self.pending[:count], rng))
        self.pending[:count] = survivors
        self.settle(len(survivors))

    def forget(self) -> None:
        """Drop from the cache what is not waiting to be written: the next read comes from the disk."""
        self.cached = dict(self.durable)
        for change in self.pending:
            self.cached.update(change.sectors)

    def crash(self, rng: random.Random) -> File:
        """What may be left after a power cut. Each sector holds what was durable or what any change left there."""
        after = File(self.durable_size, dict(self.durable), self.durable_size, dict(self.durable))
        for change in _survivors(self.pending, rng):
            after.cached.update(change.sectors)
            after.size = after.size if change.size is None else change.size
        after.durable = dict(after.cached)
        after.durable_size = after.size
        filled = {number * SECTOR // PAGE for number, content in after.cached.items() if content != ZEROS}
        after.inode = self.inode
        after.allocated = self.durably_allocated | filled
        after.durably_allocated = set(after.allocated)
        return after


def pages(offset: int, length: int) -> set[int]:
    return set(range(offset // PAGE, -(-(offset + length) // PAGE)))


def _survivors(pending: list[Change], rng: random.Random) -> Iterable[Change]:
    """Some of the changes: none, all, those up to a moment, any, all but one; whole or torn."""
    count = len(pending)
    if not count:
        return []
    kind = rng.randrange(6)
    moment = rng.randrange(count)
    if kind == 0:
        return []
    if kind == 1:
        return pending
    if kind == 2:  # in order up to a moment, and a part of the one that was being written then
        return [*pending[:moment], _torn(pending[moment], rng)]
    if kind == 3:  # any, whole
        return [change for change in pending if rng.random() < 0.5]
    if kind == 4:  # any sector of any
        return [_torn(change, rng) for change in pending]
    return [*pending[:moment], _torn(pending[moment], rng), *pending[moment + 1 :]]


def _torn(change: Change, rng: random.Random) -> Change:
    """Some of its sectors, by chance or up to one, and its length or not."""
    numbers = sorted(change.sectors)
    if rng.random() < 0.5:
        kept = numbers[: rng.randrange(len(numbers) + 1)]
    else:
        kept = [number for number in numbers if rng.random() < 0.5]
    return Change({number: change.sectors[number] for number in kept}, rng.choice([change.size, None]))


@dataclass(eq=False)
class EntryChange:
    """Names that appeared or went in one step, all of them or none: a rename has two."""

    parts: list[tuple[Directory, str, File | Directory | None]]


@dataclass(eq=False)
class Directory:
    """``entries`` is what is seen; ``durable`` what a power cut cannot take; ``pending`` what it may."""

    entries: dict[str, File | Directory] = field(default_factory=dict)
    durable: dict[str, File | Directory] = field(default_factory=dict)
    pending: list[EntryChange] = field(default_factory=list)

    def sync(self) -> None:
        for change in list(self.pending):
            for directory, name, node in change.parts:
                _put(directory.durable, name, node)
                if change in directory.pending:
                    directory.pending.remove(change)


def change_entries(*parts: tuple[Directory, str, File | Directory | None]) -> None:
    change = EntryChange(list(parts))
    for directory, name, node in parts:
        _put(directory.entries, name, node)
        if change not in directory.pending:
            directory.pending.append(change)


def _put(entries: dict[str, File | Directory], name: str, node: File | Directory | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


class Tree:
    """Directories and files from ``root`` down."""

    def __init__(self) -> None:
        self.root = Directory()

    def find(self, path: str | Path) -> File | Directory:
        node: File | Directory = self.root
        for part in Path(path).parts:
            if part != "/":
                if not isinstance(node, Directory):
                    raise NotADirectoryError(errno.ENOTDIR, "not a directory", str(path))
                if part not in node.entries:
                    raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
                node = node.entries[part]
        return node

    def directory(self, path: str | Path) -> Directory:
        node = self.find(path)
        assert isinstance(node, Directory)
        return node

    def make_durable(self) -> None:
        """All there is, as if it had always been there."""
        _settle(self.root)

    def crash(self, rng: random.Random) -> Tree:
        """A state that the disk may be found in after a power cut now."""
        changes: dict[int, EntryChange] = {}
        _collect(self.root, changes)
        pending = list(changes.values())
        kind = rng.randrange(4)
        if kind == 0:
            kept = []
        elif kind == 1:
            kept = pending
        elif kind == 2:
            kept = pending[: rng.randrange(len(pending) + 1)]
        else:
            kept = [change for change in pending if rng.random() < 0.5]
        after = Tree()
        after.root = _rebuilt(self.root, kept, rng, {})
        return after

    @classmethod
    def load(cls, path: Path) -> Tree:
        """A directory of a real file system, all of it durable."""
        tree = cls()
        tree.root = _read_in(path, {})
        return tree

    def summary(self) -> bytes:
        """What reads see of it: two trees with the same are the same for whoever opens them."""
        hashed = hashlib.blake2b()
        _summarize(self.root, hashed, {})
        return hashed.digest()

    def write_to(self, path: Path) -> None:
        """Put all of it into an empty directory of a real file system."""
        _write_out(self.root, path, {})


def _settle(node: File | Directory) -> None:
    if isinstance(node, File):
        node.settle(len(node.pending))
        return
    node.durable, node.pending = dict(node.entries), []
    for child in node.entries.values():
        _settle(child)


def _collect(directory: Directory, changes: dict[int, EntryChange]) -> None:
    for change in directory.pending:
        changes.setdefault(id(change), change)
    for child in {id(node): node for node in (*directory.durable.values(), *directory.entries.values())}.values():
        if isinstance(child, Directory):
            _collect(child, changes)


def _rebuilt(directory: Directory, kept: list[EntryChange], rng: random.Random, files: dict[int, File]) -> Directory:
    """``files``: those that were met before, under another name."""
    entries = dict(directory.durable)
    for change in kept:
        for where, name, node in change.parts:
            if where is directory:
                _put(entries, name, node)
    found: dict[str, File | Directory] = {}
    for name, node in entries.items():
        if isinstance(node, File):
            if id(node) not in files:
                files[id(node)] = node.crash(rng)
            found[name] = files[id(node)]
        else:
            found[name] = _rebuilt(node, kept, rng, files)
    return Directory(found, dict(found))


def _read_in(path: Path, files: dict[int, File]) -> Directory:
    entries: dict[str, File | Directory] = {}
    for child in path.iterdir():
        if child.is_dir():
            entries[child.name] = _read_in(child, files)
        elif (inode := child.stat().st_ino) in files:
            entries[child.name] = files[inode]
        else:
            content = child.read_bytes().ljust(-(-child.stat().st_size // SECTOR) * SECTOR, b"\0")
            sectors = {at // SECTOR: content[at : at + SECTOR] for at in range(0, len(content), SECTOR)}
            sectors = {number: sector for number, sector in sectors.items() if sector != ZEROS}
            files[inode] = File(child.stat().st_size, sectors, child.stat().st_size, dict(sectors))
            entries[child.name] = files[inode]
    return Directory(entries, dict(entries))


def _summarize(directory: Directory, hashed: hashlib.blake2b, files: dict[int, int]) -> None:
    for name, node in sorted(directory.entries.items()):
        hashed.update(f"{len(name)} {name} ".encode())
        if isinstance(node, Directory):
            hashed.update(b"(")
            _summarize(node, hashed, files)
            hashed.update(b")")
        elif id(node) in files:  # another name of the same file
            hashed.update(f"= {files[id(node)]} ".encode())
        else:
            files[id(node)] = len(files)
            hashed.update(f"{node.size} ".encode())
            for number, content in sorted(node.cached.items()):
                if content != ZEROS:
                    hashed.update(f"{number} ".encode() + content)
            hashed.update(b".")


def _write_out(directory: Directory, path: Path, written: dict[int, Path]) -> None:
    for name, node in directory.entries.items():
        if isinstance(node, Directory):
            (path / name).mkdir()
            _write_out(node, path / name, written)
        elif id(node) in written:
            os.link(written[id(node)], path / name)
        else:
            written[id(node)] = path / name
            with open(path / name, "xb") as file:
                file.truncate(node.size)
                for number, content in node.cached.items():
                    if number * SECTOR < node.size:
                        os.pwrite(file.fileno(), content[: node.size - number * SECTOR], number * SECTOR)


class SimulatedFileSystem(FileSystem):
    """The store's file system over a :class:`Tree`: one process, its page cache, and a disk.

    ``capacity``, in pages, is what all files may take together: a call that needs more takes what there is, and answers
    as the kernel may, with what it did or with ENOSPC. None: no end of it.
    """

    def __init__(self, tree: Tree | None = None) -> None:
        self.tree = tree or Tree()
        self.on_step: Callable[[str], None] = lambda what: None
        self.on_read: Callable[[], None] = lambda: None
        self.rng = random.Random(0)
        self.capacity: int | None = None
        self._in_memory: set[File] = set()
        self._open: dict[int, File] = {}
        self._locked: dict[int, File] = {}
        self._next = 1000

    # For the test

    def forget_inodes(self) -> None:
        """All that was written is on its way to the disk, and the kernel needs the memory."""
        self._in_memory.clear()

    def die(self) -> None:
        """The process is killed: its descriptors and locks go, what it wrote stays in the page cache."""
        self._open.clear()
        self._locked.clear()

    def crash(self, rng: random.Random) -> SimulatedFileSystem:
        """The power is cut, and comes back; or the disk alone was away, and is mounted again."""
        after = SimulatedFileSystem(self.tree.crash(rng))
        after.capacity = self.capacity
        return after

    def used(self) -> int:
        """How many pages all files take."""
        return sum(len(file.allocated) for file in _files(self.tree.root))

    def add_file(self, path: str, file: File) -> None:
        where = Path(path)
        change_entries((self.tree.directory(where.parent), where.name, file))

    # For the store

    def open(self, path: str | Path, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
        try:
            file = self.tree.find(path)
            if flags & os.O_EXCL:
                raise FileExistsError(errno.EEXIST, "there is one", str(path))
        except FileNotFoundError:
            if not flags & os.O_CREAT:
                raise
            self.on_step("create")
            file = File()
            self.add_file(str(path), file)
        assert isinstance(file, File)
        self._next += 1
        self._open[self._next] = file
        return self._next

    def close(self, fd: int) -> None:  # type: ignore[override]
        del self._open[fd]
        self._locked.pop(fd, None)

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:  # type: ignore[override]
        self.on_read()
        done = 0
        for buffer in buffers:
            data = self._open[fd].read(offset + done, len(buffer))
            memoryview(buffer)[: len(data)] = data
            done += len(data)
        return done

    def pwrite(self, fd: int, data: Any, offset: int) -> int:  # type: ignore[override]
        self.on_step("write")
        fits = self._that_fits(fd, offset, len(data))
        if fits:
            self._open[fd].write(offset, bytes(data[:fits]))
        if fits < len(data) and (not fits or self.rng.random() < 0.3):
            raise OSError(errno.ENOSPC, "no space left")
        return fits

    def punch(self, fd: int, offset: int, length: int) -> None:
        self.on_step("punch")
        self._open[fd].clear(offset, length)
        self._open[fd].allocated -= pages(offset, length)

    def can_punch(self, fd: int, offset: int, length: int) -> bool:
        return True

    def zero_allocated(self, fd: int, offset: int, length: int) -> None:
        self.on_step("zero")
        fits = self._that_fits(fd, offset, length)
        self._open[fd].clear(offset, fits)
        self._open[fd].allocated |= pages(offset, fits)
        if fits < length:
            raise OSError(errno.ENOSPC, "no space left")

    def ftruncate(self, fd: int, size: int) -> None:  # type: ignore[override]
        self.on_step("truncate")
        self._open[fd].truncate(size)

    def allocate(self, fd: int, offset: int, length: int) -> None:  # type: ignore[override]
        self.on_step("allocate")
        file = self._open[fd]
        fits = self._that_fits(fd, offset, length)
        file.allocated |= pages(offset, fits)
        if offset + fits > file.size:
            file.truncate(offset + fits)
        if fits < length:
            raise OSError(errno.ENOSPC, "no space left")

    def unallocated(self, fd: int, offset: int, length: int) -> int:
        return PAGE * len(pages(offset, length) - self._open[fd].allocated)

    def _that_fits(self, fd: int, offset: int, length: int) -> int:
        """How many bytes of the range, from its begin, have their space or find some."""
        if self.capacity is None:
            return length
        room = max(self.capacity - self.used(), 0)
        missing = sorted(pages(offset, length) - self._open[fd].allocated)
        return length if len(missing) <= room else max(missing[room] * PAGE - offset, 0)

    def datasync(self, fd: int) -> None:  # type: ignore[override]
        file = self._open[fd]
        covered = len(file.pending)  # what is written while the sync runs may miss it
        allocated = set(file.allocated)
        try:
            self.on_step("sync")
        except OSError:
            file.lose(covered, self.rng)
            raise
        file.settle(covered)
        file.durably_allocated = allocated

    sync = datasync  # type: ignore[assignment]

    def fadvise(self, fd: int, offset: int, length: int, advice: int) -> None:  # type: ignore[override]
        if advice == os.POSIX_FADV_DONTNEED:
            self._open[fd].forget()

    def lseek(self, fd: int, position: int, whence: int) -> int:  # type: ignore[override]
        file = self._open[fd]
        data = {
            n for n, content in file.cached.items() if content != ZEROS and position < (n + 1) * SECTOR <= file.size
        }
        if position >= file.size or (whence == os.SEEK_DATA and not data):
            raise OSError(errno.ENXIO, "no more data")
        if whence == os.SEEK_DATA:
            return max(position, min(data) * SECTOR)
        number = position // SECTOR
        while number in data:
            number += 1
        return max(position, number * SECTOR)

    def keep_in_memory(self, fd: int, *, keep: bool = True) -> None:
        if keep:
            self._in_memory.add(self._open[fd])
        else:
            self._in_memory.discard(self._open[fd])

    def stayed_in_memory(self, fd: int) -> bool:
        return self._open[fd] in self._in_memory

    def unlink(self, path: Path) -> None:  # type: ignore[override]
        self.on_step("unlink")
        directory = self.tree.directory(path.parent)
        if path.name not in directory.entries:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
        change_entries((directory, path.name, None))

    def rename(self, source: Path, target: Path) -> None:  # type: ignore[override]
        self.on_step("rename")
        before, after = self.tree.directory(source.parent), self.tree.directory(target.parent)
        change_entries((before, source.name, None), (after, target.name, before.entries[source.name]))

    def fstat(self, fd: int) -> os.stat_result:  # type: ignore[override]
        return _status(self._open[fd])

    def stat(self, path: str | Path) -> os.stat_result:  # type: ignore[override]
        file = self.tree.find(path)
        assert isinstance(file, File)
        return _status(file)

    def sync_directory(self, path: Path) -> None:
        self.on_step("sync directory")
        self.tree.directory(path).sync()

    def lock(self, fd: int, path: str | Path, what: str, *, shared: bool = False) -> None:
        if not shared and self._open[fd] in self._locked.values():
            raise InUse(f"{what} is in use by this process ({path})")
        self._locked[fd] = self._open[fd]

    def lock_look(self, fd: int, number: int) -> None:
        pass

    def unlock_look(self, fd: int, number: int) -> None:
        pass


def _files(directory: Directory) -> Iterable[File]:
    for node in directory.entries.values():
        if isinstance(node, File):
            yield node
        else:
            yield from _files(node)


def _status(file: File) -> os.stat_result:
    blocks = len(file.allocated) * PAGE // 512
    return os.stat_result((0o100644, file.inode, 1, 1, 0, 0, file.size, 0, 0, 0), {"st_blocks": blocks})
