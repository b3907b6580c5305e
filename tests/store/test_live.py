"""What a killed process leaves for the next one, on a real file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import struct
from pathlib import Path

import pytest

from nbdclone.store.check import check_pool
from nbdclone.store.clone import Clone
from nbdclone.store.fs import F_SET_RW_HINT, FileSystem
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool

SIZE = SEGMENT_SIZE + (1 << 20)
NEW = b"new!" * (BLOCK_SIZE // 4)
# The first block, one in the middle and the last of a segment, and one of the next.
OFFSETS = (0, 10 * BLOCK_SIZE, SEGMENT_SIZE - BLOCK_SIZE, SEGMENT_SIZE)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    (tmp_path / "base.raw").write_bytes(b"base" * (1 << 18))
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "base.raw", "base")
    pool.create_clones("base", ["web1"], size=SIZE)
    return pool


class FailingSync(FileSystem):
    def datasync(self, fd: int) -> None:  # type: ignore[override]
        raise OSError(errno.EIO, "the disk does not answer")


def write_and_die(path: Path, fail: bool) -> None:
    clone = Pool.open(path, fs=FailingSync() if fail else FileSystem()).open_clone("web1")
    for offset in OFFSETS:
        clone.pwrite(NEW, offset)
    clone.zero(BLOCK_SIZE, BLOCK_SIZE)
    if fail:
        with contextlib.suppress(OSError):
            clone.flush()
    os._exit(9)


def killed(pool: Pool, *, fail: bool = False) -> Path:
    """A process has written to the clone and was killed; what it left."""
    process = multiprocessing.get_context("spawn").Process(target=write_and_die, args=(pool.path, fail))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    live = pool.path / "clones" / "web1" / "live"
    assert live.exists()
    return live


def has_all(clone: Clone) -> bool:
    return all(clone.pread(BLOCK_SIZE, offset) == NEW for offset in OFFSETS) and not any(
        clone.pread(BLOCK_SIZE, BLOCK_SIZE)
    )


def has_none(clone: Clone) -> bool:
    base = b"base" * (BLOCK_SIZE // 4)
    return all(clone.pread(BLOCK_SIZE, offset) == base for offset in (0, BLOCK_SIZE, 10 * BLOCK_SIZE))


def test_what_a_killed_process_acknowledged_is_there_and_goes_into_the_delta(pool: Pool) -> None:
    live = killed(pool)
    with pool.open_clone("web1") as clone:
        assert has_all(clone)
        clone.flush()
        live.unlink()  # all is in the delta now
    with pool.open_clone("web1") as clone:
        assert has_all(clone)


def test_it_outlives_several_kills_and_a_clean_close_ends_it(pool: Pool) -> None:
    killed(pool)
    live = killed(pool)
    with pool.open_clone("web1") as clone:
        assert has_all(clone)
    assert not live.exists()
    with pool.open_clone("web1") as clone:
        assert has_all(clone)
    assert not live.exists(), "who only reads has nothing to note"


def test_it_is_not_believed_when_the_inode_left_the_memory(pool: Pool) -> None:
    live = killed(pool)
    with open(pool.path / "clones" / "web1" / "delta", "r+b") as delta:
        fcntl.fcntl(delta.fileno(), F_SET_RW_HINT, struct.pack("=Q", 0))  # as a new inode has it
    with pool.open_clone("web1") as clone:
        assert has_none(clone)
    assert not live.exists()


@pytest.mark.parametrize("spoil", ["empty", "short", "other magic", "another delta's"])
def test_a_file_that_makes_no_sense_is_not_believed(pool: Pool, spoil: str) -> None:
    live = killed(pool)
    content = live.read_bytes()
    spoilt = {
        "empty": b"",
        "short": content[:20],
        "other magic": b"X" + content[1:],
        "another delta's": content[:8] + bytes(16) + content[24:],
    }
    live.write_bytes(spoilt[spoil])
    with pool.open_clone("web1") as clone:
        assert has_none(clone)


def test_after_a_failed_sync_the_cache_is_not_believed(pool: Pool) -> None:
    live = killed(pool, fail=True)
    with pool.open_clone("web1") as clone:
        assert has_none(clone)
        clone.pwrite(NEW, 0)
        clone.flush()
    assert not live.exists()


def test_check_knows_the_file_and_changes_nothing(pool: Pool) -> None:
    killed(pool)
    assert {finding.kind for finding in check_pool(pool.path, repair=True)} == {"unmarked-data"}
    with pool.open_clone("web1") as clone:
        assert has_all(clone)
    assert list(check_pool(pool.path)) == []
