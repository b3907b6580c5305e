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

from nbdclone.errors import CorruptDelta, StorageError
from nbdclone.store.check import check_pool
from nbdclone.store.clone import Clone
from nbdclone.store.delta_file import MAP_SLOTS
from nbdclone.store.fs import F_GET_RW_HINT, F_SET_RW_HINT, FileSystem
from nbdclone.store.layer import BLOCK_SIZE, BLOCKS_PER_SEGMENT, SEGMENT_SIZE
from nbdclone.store.live import MARK_SIZE, MARKS_AT
from nbdclone.store.pool import Pool

SIZE = SEGMENT_SIZE + (1 << 20)
BASE = b"base" * (BLOCK_SIZE // 4)
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
        clone.pwrite(NEW * 100, 100 * BLOCK_SIZE)  # too many blocks for a record, which would tell what the file has
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


def with_a_mark(content: bytes, block: int) -> bytes:
    """A live map that also has this block, of segment 0: one whose data never came here."""
    end = content.index(bytes(MARK_SIZE), MARKS_AT)
    return content[:end] + mark(block, 1) + content[end + MARK_SIZE :]


def mark(block: int, count: int) -> bytes:
    return (block << 24 | count).to_bytes(MARK_SIZE, "big")


def marks_in(live: Path) -> list[tuple[int, int]]:
    """(block, count) of each mark that counts."""
    content = live.read_bytes()
    position = int.from_bytes(content[64:72], "big")
    found = []
    while value := int.from_bytes(content[position : position + MARK_SIZE], "big"):
        found.append((value >> 24, value & 0xFFFFFF))
        position += MARK_SIZE
    return found


def test_a_file_that_was_copied_here_is_not_believed(pool: Pool) -> None:
    live = killed(pool)
    copy = live.with_name("copy")
    copy.write_bytes(with_a_mark(live.read_bytes(), 100))
    copy.rename(live)
    with pool.open_clone("web1") as clone:
        assert clone.pread(BLOCK_SIZE, 100 * BLOCK_SIZE) == BASE


def test_a_file_that_comes_after_a_clean_close_is_not_believed(pool: Pool) -> None:
    live = killed(pool)
    content = live.read_bytes()
    pool.open_clone("web1").close()
    live.write_bytes(with_a_mark(content, 100))
    with pool.open_clone("web1") as clone:
        assert clone.pread(BLOCK_SIZE, 100 * BLOCK_SIZE) == BASE


def test_a_clean_close_takes_the_note_from_the_inode(pool: Pool) -> None:
    killed(pool)
    pool.open_clone("web1").close()
    with open(pool.path / "clones" / "web1" / "delta", "rb") as delta:
        assert fcntl.fcntl(delta.fileno(), F_GET_RW_HINT, bytes(8)) == bytes(8)


class OtherMachine(FileSystem):
    def boot_id(self) -> bytes:
        return b"another machine."


def test_another_machine_that_remembers_the_delta_does_not_believe_the_file(pool: Pool) -> None:
    """A shared file system: it had the clone open before, and what the first one had in its cache went with it."""
    live = killed(pool)
    with Pool.open(pool.path, fs=OtherMachine()).open_clone("web1") as clone:
        assert has_none(clone)
    assert not live.exists()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_lost_map_page_costs_its_segment_alone(pool: Pool) -> None:
    killed(pool)
    with open(pool.path / "clones" / "web1" / "delta", "r+b") as delta:
        for slot in MAP_SLOTS:
            os.pwrite(delta.fileno(), b"rotten", slot)
    with pool.open_clone("web1") as clone:
        with pytest.raises(CorruptDelta):
            clone.pread(BLOCK_SIZE, 0)
        assert clone.pread(BLOCK_SIZE, SEGMENT_SIZE) == NEW


@pytest.mark.parametrize("stands_there", ["a directory", "a fifo"])
def test_what_is_no_file_is_named_and_no_descriptor_is_left(pool: Pool, stands_there: str) -> None:
    live = pool.path / "clones" / "web1" / "live"
    live.mkdir() if stands_there == "a directory" else os.mkfifo(live)
    before = open_descriptors()
    with pytest.raises(StorageError, match="live: cannot be opened"):
        pool.open_clone("web1")
    assert open_descriptors() == before


def test_an_error_while_it_is_read_leaves_no_descriptor(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(pool)

    def failing(fd: int, buffers: list[bytearray], offset: int) -> int:
        if offset == MARKS_AT:
            raise OSError(errno.EIO, "the disk does not answer")
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(FileSystem, "preadv", staticmethod(failing))
    before = open_descriptors()
    with pytest.raises(OSError, match="does not answer"):
        pool.open_clone("web1")
    assert open_descriptors() == before


def test_marks_beyond_the_end_of_the_disk_mean_nothing(pool: Pool) -> None:
    live = killed(pool)
    delta = pool.path / "clones" / "web1" / "delta"
    size = delta.stat().st_size
    end = live.read_bytes().index(bytes(MARK_SIZE), MARKS_AT)
    with open(live, "r+b") as file:
        os.pwrite(file.fileno(), mark(5 * BLOCKS_PER_SEGMENT, 8) + mark(BLOCKS_PER_SEGMENT - 1, 2), end)
    with pool.open_clone("web1") as clone:
        assert has_all(clone)
    assert delta.stat().st_size == size


def test_more_marks_than_are_read_at_once_are_all_there(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(pool)
    monkeypatch.setattr("nbdclone.store.live.READ_SIZE", 2 * MARK_SIZE)
    with pool.open_clone("web1") as clone:
        assert has_all(clone)


@pytest.mark.parametrize("start", [0, 4097, 1 << 30, (1 << 64) - 8])
def test_a_beginning_of_the_marks_that_makes_no_sense_leaves_none_out(pool: Pool, start: int) -> None:
    live = killed(pool)
    with open(live, "r+b") as file:
        os.pwrite(file.fileno(), start.to_bytes(8, "big"), 64)
    with pool.open_clone("web1") as clone:
        assert has_all(clone)


def test_several_writes_are_noted_at_once_and_a_flush_covers_them(pool: Pool) -> None:
    live = pool.path / "clones" / "web1" / "live"
    with pool.open_clone("web1") as clone:
        for block in (7, 3, 9):
            clone.write_nowait(memoryview(NEW), block * BLOCK_SIZE)
        assert marks_in(live) == []
        clone.note_marks()
        assert marks_in(live) == [(7, 1), (3, 1), (9, 1)]
        clone.write_nowait(memoryview(NEW), 3 * BLOCK_SIZE)  # not for the first time
        clone.note_marks()
        assert len(marks_in(live)) == 3
        clone.flush()
        assert marks_in(live) == []
        clone.pwrite(NEW, 11 * BLOCK_SIZE)
        assert marks_in(live) == [(11, 1)]


class DuringSync(FileSystem):
    """Something happens while the disk is busy with a flush."""

    def __init__(self) -> None:
        self.then = lambda: None

    def datasync(self, fd: int) -> None:  # type: ignore[override]
        os.fdatasync(fd)
        then, self.then = self.then, lambda: None
        then()


def test_marks_that_come_during_a_flush_stay(pool: Pool) -> None:
    live = pool.path / "clones" / "web1" / "live"
    fs = DuringSync()
    with Pool.open(pool.path, fs=fs).open_clone("web1") as clone:
        clone.pwrite(NEW, 0)
        clone.write_nowait(memoryview(NEW), BLOCK_SIZE)  # noted, and covered before it is written there

        def meanwhile() -> None:
            clone.pwrite(NEW, 2 * BLOCK_SIZE)
            clone.write_nowait(memoryview(NEW), 3 * BLOCK_SIZE)

        fs.then = meanwhile
        clone.flush()
        assert marks_in(live) == [(2, 1)]
        clone.note_marks()
        assert marks_in(live) == [(2, 1), (3, 1)]
        clone.pwrite(NEW, 4 * BLOCK_SIZE)
        assert marks_in(live) == [(2, 1), (3, 1), (4, 1)]
        clone.flush()
        assert marks_in(live) == []


def test_a_flush_that_fails_leaves_the_marks(pool: Pool) -> None:
    live = pool.path / "clones" / "web1" / "live"
    fs = DuringSync()

    def no_space() -> None:
        raise OSError(errno.ENOSPC, "the file system is full")

    with Pool.open(pool.path, fs=fs).open_clone("web1") as clone:
        clone.pwrite(NEW, 0)
        monkeyed, fs.pwrite_all = fs.pwrite_all, lambda fd, data, offset: no_space()  # type: ignore[method-assign]
        with pytest.raises(OSError, match="full"):
            clone.flush()
        fs.pwrite_all = monkeyed  # type: ignore[method-assign]
        assert marks_in(live) == [(0, 1)]


def test_who_inherits_marks_writes_behind_them(pool: Pool) -> None:
    live = killed(pool)
    before = marks_in(live)
    with pool.open_clone("web1") as clone:
        clone.pwrite(NEW, 20 * BLOCK_SIZE)
        assert marks_in(live) == [*before, (20, 1)]
        clone.flush()
        assert marks_in(live) == []


def test_there_is_space_for_a_mark_before_its_block_is_written(pool: Pool) -> None:
    live = pool.path / "clones" / "web1" / "live"
    with pool.open_clone("web1") as clone:
        for block in range(600):  # a page has room for 512
            clone.write_nowait(memoryview(NEW), block * BLOCK_SIZE)
            assert live.stat().st_blocks * 512 >= MARKS_AT + (block + 2) * MARK_SIZE
        clone.note_marks()
        assert len(marks_in(live)) == 600


class NoFile(FileSystem):
    """The directory of the clone belongs to somebody else."""

    def open(self, path: str | Path, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
        if str(path).endswith("live") and flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "not yours")
        return os.open(path, flags, mode)


class NoNote(FileSystem):
    """The delta belongs to somebody else."""

    def keep_in_memory(self, fd: int, *, keep: bool = True) -> None:
        raise PermissionError(errno.EPERM, "not yours")


@pytest.mark.parametrize("fs", [NoFile(), NoNote()])
def test_where_nothing_can_be_noted_the_clone_goes_on_and_the_log_says_so(
    pool: Pool, fs: FileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    with Pool.open(pool.path, fs=fs).open_clone("web1") as clone:
        for offset in OFFSETS:
            clone.pwrite(NEW, offset)
    assert [record.getMessage().endswith("a kill would take what is not flushed") for record in caplog.records] == [
        True
    ]
    with pool.open_clone("web1") as clone:
        assert clone.pread(BLOCK_SIZE, 0) == NEW


class NotesFail(FailingSync):
    def pwrite_all(self, fd: int, data: bytes, offset: int) -> None:
        if len(data) == 2 * MARK_SIZE:  # a mark, and the zeros that end them
            raise OSError(errno.EIO, "the disk does not answer")
        super().pwrite_all(fd, data, offset)


def test_a_failed_sync_is_noted_also_when_marks_could_not_be(pool: Pool) -> None:
    clone = Pool.open(pool.path, fs=NotesFail()).open_clone("web1")
    clone.pwrite(NEW, 0)
    live = pool.path / "clones" / "web1" / "live"
    assert not live.exists()
    with pytest.raises(OSError, match="does not answer"):
        clone.flush()
    assert live.read_bytes()[24] == 1
    with contextlib.suppress(Exception):
        clone.close()
