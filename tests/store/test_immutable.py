"""A base that was imported as immutable: nobody changes it, and it can be removed all the same."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nbdclone.errors import StorageError
from nbdclone.store.check import check_pool
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.pool import Pool


def set_flag(path: Path, wanted: bool) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        FILE_SYSTEM.set_immutable(fd, wanted)
    finally:
        os.close(fd)


def has_flag(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return FILE_SYSTEM.is_immutable(fd)
    finally:
        os.close(fd)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory where files can be made immutable; whatever a test left so is cleared."""
    probe = tmp_path / "probe"
    probe.touch()
    try:
        set_flag(probe, True)
        set_flag(probe, False)
    except OSError as error:
        pytest.skip(f"no file can be made immutable here: {error}")
    yield tmp_path
    for path in tmp_path.rglob("image"):
        with suppress(OSError):
            set_flag(path, False)


@pytest.fixture
def immutable_pool(place: Path, source: Path) -> Pool:
    pool = Pool.open(place / "pool", create=True)
    pool.import_base(source, "base", immutable=True)
    pool.create_clones("base", ["web1"])
    return pool


def test_nobody_changes_an_immutable_base_and_its_clones_work(immutable_pool: Pool) -> None:
    image = immutable_pool.path / "bases" / "base" / "image"
    assert has_flag(image)
    for change in (
        lambda: os.truncate(image, 0),
        lambda: image.write_bytes(b"!"),
        image.unlink,
        lambda: os.utime(image),
    ):
        with pytest.raises(PermissionError):
            change()
    assert list(check_pool(immutable_pool.path, deep=True)) == []
    with immutable_pool.open_clone("web1") as clone:
        clone.pwrite(b"own", 0)


def test_it_is_removed_by_name(immutable_pool: Pool) -> None:
    immutable_pool.remove(["base", "web1"])
    assert immutable_pool.names() == []
    assert os.listdir(immutable_pool.path / ".tmp") == []


@pytest.mark.parametrize("by", ["the next command", "check"])
def test_what_an_interrupted_import_left_is_cleared(immutable_pool: Pool, by: str) -> None:
    left = immutable_pool.path / ".tmp" / "left"
    left.mkdir()
    (immutable_pool.path / "bases" / "base").rename(left / "base")
    if by == "check":
        assert "leftover" in [finding.kind for finding in check_pool(immutable_pool.path, repair=True)]
    else:
        immutable_pool.remove(["web1"])
    assert os.listdir(immutable_pool.path / ".tmp") == []


def test_without_the_wish_a_base_is_not_immutable(place: Path, source: Path) -> None:
    pool = Pool.open(place / "pool", create=True)
    pool.import_base(source, "base")
    assert not has_flag(pool.path / "bases" / "base" / "image")


class NotAllowed(FileSystem):
    """A user who is not root; or a file system without the flag."""

    def __init__(self, code: int) -> None:
        self.code = code

    def set_immutable(self, fd: int, immutable: bool) -> None:
        raise OSError(self.code, os.strerror(self.code))


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTTY, errno.EOPNOTSUPP])
def test_where_it_cannot_be_done_the_import_is_refused_and_nothing_is_left(
    tmp_path: Path, source: Path, code: int
) -> None:
    pool = Pool.open(tmp_path / "pool", create=True, fs=NotAllowed(code))
    with pytest.raises(StorageError, match=r"the image cannot be made immutable .*takes root.*without --immutable"):
        pool.import_base(source, "base", immutable=True)
    assert pool.names() == []
    assert os.listdir(pool.path / ".tmp") == []


def test_an_import_that_fails_after_the_flag_was_set_leaves_nothing(place: Path, source: Path) -> None:
    class Failing(FileSystem):
        def rename(self, source: Path, target: Path) -> None:  # type: ignore[override]
            raise OSError(errno.EIO, "Input/output error")

    pool = Pool.open(place / "pool", create=True, fs=Failing())
    with pytest.raises(OSError, match="Input/output error"):
        pool.import_base(source, "base", immutable=True)
    assert os.listdir(pool.path / ".tmp") == []


def test_who_may_not_clear_the_flag_is_refused_and_nothing_is_removed(immutable_pool: Pool) -> None:
    pool = Pool.open(immutable_pool.path, fs=NotAllowed(errno.EPERM))
    with pytest.raises(StorageError, match=r"base 'base' is immutable .*only root can remove it"):
        pool.remove(["web1", "base"])
    assert pool.names() == ["base", "web1"]
    pool.open_clone("web1").close()
