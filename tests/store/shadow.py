"""The real file system with a simulated disk behind it: what the operations of a pool would leave after a power cut."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

from simulated import Directory, File, Tree, change_entries

from nbdclone.store.fs import FileSystem

T = TypeVar("T")


class ShadowFileSystem(FileSystem):
    """Does everything for real and notes it in ``tree``, which mirrors ``root``.

    ``on_step`` is called before anything changes or is synced. ``ignored`` are the numbers of syncs (from 0) that
    are not done: defects, to see that they are noticed.
    """

    def __init__(self, root: Path, ignored: Set[int] = frozenset()) -> None:
        self.root = root
        self.tree = Tree.load(root)
        self.on_step: Callable[[], None] = lambda: None
        self.syncs: list[str] = []
        self._ignored = ignored
        self._files: dict[int, tuple[str, File]] = {}

    def _directory(self, path: Path) -> Directory:
        return self.tree.directory(path.relative_to(self.root))

    def _sync(self, name: str) -> bool:
        self.on_step()
        self.syncs.append(name)
        return len(self.syncs) - 1 not in self._ignored

    def open(self, path: str | Path, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
        path = Path(path)
        creates = flags & os.O_CREAT and not path.exists()
        if creates:
            self.on_step()
        fd = os.open(path, flags, mode)
        if creates:
            change_entries((self._directory(path.parent), path.name, File()))
        if path.is_relative_to(self.root):
            node = self.tree.find(path.relative_to(self.root))
            assert isinstance(node, File)
            self._files[fd] = (path.name, node)
        return fd

    def close(self, fd: int) -> None:  # type: ignore[override]
        self._files.pop(fd, None)
        os.close(fd)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:  # type: ignore[override]
        self.on_step()
        written = os.pwrite(fd, data, offset)
        self._files[fd][1].write(offset, bytes(data)[:written])
        return written

    def ftruncate(self, fd: int, size: int) -> None:  # type: ignore[override]
        self.on_step()
        os.ftruncate(fd, size)
        self._files[fd][1].truncate(size)

    def punch(self, fd: int, offset: int, length: int) -> None:
        self.on_step()
        super().punch(fd, offset, length)
        self._files[fd][1].clear(offset, length)

    def zero_allocated(self, fd: int, offset: int, length: int) -> None:
        self.on_step()
        super().zero_allocated(fd, offset, length)
        self._files[fd][1].clear(offset, length)

    def reflink(self, target_fd: int, source_fd: int) -> bool:
        return False

    def mkdir(self, path: Path) -> None:  # type: ignore[override]
        self.on_step()
        path.mkdir()
        change_entries((self._directory(path.parent), path.name, Directory()))

    def rename(self, source: Path, target: Path) -> None:  # type: ignore[override]
        self.on_step()
        source.rename(target)
        before, after = self._directory(source.parent), self._directory(target.parent)
        change_entries((before, source.name, None), (after, target.name, before.entries[source.name]))

    def link(self, source: Path, target: Path) -> None:  # type: ignore[override]
        self.on_step()
        os.link(source, target)
        change_entries(
            (self._directory(target.parent), target.name, self._directory(source.parent).entries[source.name])
        )

    def unlink(self, path: Path) -> None:  # type: ignore[override]
        if path.exists():  # a step only if there is something to remove
            self.on_step()
        os.unlink(path)
        change_entries((self._directory(path.parent), path.name, None))

    def remove_tree(self, path: Path, ignore_errors: bool = False) -> None:  # type: ignore[override]
        self.on_step()
        FileSystem.remove_tree(path, ignore_errors=ignore_errors)
        _forget(self._directory(path.parent), path.name)
        self.on_step()

    def for_each(self, work: Callable[[T], object], items: Sequence[T]) -> None:
        for item in items:  # one after the other: what a seed gives must be the same each time
            work(item)

    def datasync(self, fd: int) -> None:  # type: ignore[override]
        name, file = self._files[fd]
        if self._sync(name):
            file.settle(len(file.pending))

    sync = datasync  # type: ignore[assignment]

    def sync_directory(self, path: Path) -> None:
        if self._sync(f"{path.name}/"):
            self._directory(path).sync()


def _forget(parent: Directory, name: str) -> None:
    node = parent.entries[name]
    if isinstance(node, Directory):
        for child in list(node.entries):
            _forget(node, child)
    change_entries((parent, name, None))
