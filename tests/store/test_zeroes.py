"""Law 6: trim gives space back and reads as zeros, and blocks of zeros take no space."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdclone.store.clone import Clone
from nbdclone.store.delta_file import PAGE_SIZE
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool

BASE_SIZE = 1 << 20
SIZE = BASE_SIZE + (2 << 20)  # what follows the base is nowhere
BALLAST = BASE_SIZE + (1 << 20)


@pytest.fixture
def clone(pool: Pool) -> Iterator[Clone]:
    pool.create_clones("base", ["web1"], size=SIZE)
    with pool.open_clone("web1") as clone:
        for number in range(8):  # so that the file system has its own block for the list of extents, and keeps it
            clone.pwrite(b"x" * BLOCK_SIZE, BALLAST + 2 * number * BLOCK_SIZE)
        clone.flush()
        yield clone


@pytest.fixture
def taken(pool: Pool, clone: Clone) -> Callable[[], int]:
    """How many bytes of space were taken since the test began. Flushes: what is delayed has no blocks yet."""
    path = pool.path / "clones" / "web1" / "delta"
    before = path.stat().st_blocks

    def taken() -> int:
        clone.flush()
        return (path.stat().st_blocks - before) * 512

    return taken


def test_a_written_block_takes_a_block(clone: Clone, taken: Callable[[], int]) -> None:
    clone.pwrite(b"x", 10)
    assert taken() == BLOCK_SIZE
    clone.pwrite(b"x" * BLOCK_SIZE, BASE_SIZE)
    assert taken() == 2 * BLOCK_SIZE


@pytest.mark.parametrize("count", [1, 7, 256])
def test_blocks_of_zeros_over_the_base_take_no_space(clone: Clone, taken: Callable[[], int], count: int) -> None:
    clone.pwrite(bytes(count * BLOCK_SIZE), 0)
    assert clone.pread(count * BLOCK_SIZE, 0) == bytes(count * BLOCK_SIZE)
    assert taken() == 0


def test_zeros_where_nothing_is_take_nothing_at_all(clone: Clone, taken: Callable[[], int]) -> None:
    clone.pwrite(bytes(BALLAST - BASE_SIZE), BASE_SIZE)
    clone.pwrite(bytes(100), BASE_SIZE + 7)
    clone.zero(BASE_SIZE, BALLAST - BASE_SIZE)
    assert taken() == 0


def test_of_a_write_only_the_blocks_with_data_take_space(clone: Clone, taken: Callable[[], int]) -> None:
    data = bytearray(64 * BLOCK_SIZE)
    for block in (0, 3, 4, 63):
        data[block * BLOCK_SIZE + 4000] = 1
    clone.pwrite(data, 0)
    assert clone.pread(len(data), 0) == data
    assert taken() == 4 * BLOCK_SIZE


def test_zeros_written_over_data_give_its_space_back(clone: Clone, taken: Callable[[], int]) -> None:
    clone.pwrite(b"x" * (8 * BLOCK_SIZE), 0)
    assert taken() == 8 * BLOCK_SIZE
    clone.pwrite(bytes(8 * BLOCK_SIZE), 0)
    assert taken() == 0
    assert clone.pread(8 * BLOCK_SIZE, 0) == bytes(8 * BLOCK_SIZE)


def test_trim_gives_space_back_and_reads_as_zeros_and_not_as_the_base(
    pool: Pool, clone: Clone, taken: Callable[[], int]
) -> None:
    clone.pwrite(b"x" * (8 * BLOCK_SIZE), 0)
    clone.flush()
    clone.zero(0, 16 * BLOCK_SIZE)
    assert taken() == 0
    assert clone.pread(16 * BLOCK_SIZE, 0) == bytes(16 * BLOCK_SIZE)
    clone.close()
    with pool.open_clone("web1") as again:
        assert again.pread(16 * BLOCK_SIZE, 0) == bytes(16 * BLOCK_SIZE)
        assert again.pread(512, 16 * BLOCK_SIZE) != bytes(512)


def test_a_trim_to_the_end_of_a_disk_that_ends_within_a_block_gives_that_block_back_too(pool: Pool) -> None:
    pool.create_clones("base", ["odd"], size=SIZE + 512)
    with pool.open_clone("odd") as clone:
        clone.pwrite(b"x" * 512, 0)
        clone.flush()
        before = pool.info("odd").allocated
        clone.pwrite(b"x" * 512, SIZE)
        clone.flush()
        assert pool.info("odd").allocated == before + BLOCK_SIZE
        clone.zero(SIZE - 100, 612)
        clone.flush()
        assert pool.info("odd").allocated == before
        assert clone.pread(612, SIZE - 100) == bytes(612)


def test_an_unaligned_trim_zeroes_exactly_its_bytes(clone: Clone, content: bytes) -> None:
    clone.zero(1000, 2 * BLOCK_SIZE + 77)
    end = 1000 + 2 * BLOCK_SIZE + 77
    assert clone.pread(4 * BLOCK_SIZE, 0) == content[:1000] + bytes(end - 1000) + content[end : 4 * BLOCK_SIZE]


def test_a_trim_of_part_after_part_of_a_block_of_the_base_takes_no_space_in_the_end(
    clone: Clone, taken: Callable[[], int]
) -> None:
    clone.zero(0, 1000)
    assert taken() == BLOCK_SIZE
    clone.zero(0, BLOCK_SIZE)
    assert taken() == 0


@pytest.mark.parametrize("offset", [0, BASE_SIZE], ids=["over the base", "where nothing is"])
def test_zeros_without_a_hole_take_their_space(clone: Clone, taken: Callable[[], int], offset: int) -> None:
    clone.zero(offset, 16 * BLOCK_SIZE, allocate=True)
    assert taken() == 16 * BLOCK_SIZE
    assert clone.pread(16 * BLOCK_SIZE, offset) == bytes(16 * BLOCK_SIZE)


def test_zeros_without_a_hole_over_data_keep_its_space(clone: Clone, taken: Callable[[], int]) -> None:
    clone.pwrite(b"x" * (8 * BLOCK_SIZE), 0)
    clone.zero(0, 8 * BLOCK_SIZE, allocate=True)
    assert taken() == 8 * BLOCK_SIZE
    assert clone.pread(8 * BLOCK_SIZE, 0) == bytes(8 * BLOCK_SIZE)


@pytest.mark.parametrize("allocate", [False, True])
def test_where_the_file_system_knows_no_holes_zeros_are_written(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, allocate: bool
) -> None:
    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("nbdclone.store.fs._fallocate", refuse)
    pool.create_clones("base", ["old"])
    with pool.open_clone("old") as clone:
        clone.pwrite(b"x" * (600 * 1024), 0)
        clone.zero(BLOCK_SIZE, 512 * 1024, allocate=allocate)
        assert clone.pread(600 * 1024, 0) == (
            b"x" * BLOCK_SIZE + bytes(512 * 1024) + b"x" * (600 * 1024 - 512 * 1024 - BLOCK_SIZE)
        )


def test_an_error_of_a_hole_is_an_error_of_the_trim(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(5, "Input/output error")

    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1") as clone:
        monkeypatch.setattr("nbdclone.store.fs._fallocate", refuse)
        for allocate in (False, True):
            with pytest.raises(OSError, match="Input/output"):
                clone.zero(0, BLOCK_SIZE, allocate=allocate)


def large_clone(empty_pool: Pool, tmp_path: Path, size: int) -> Clone:
    (tmp_path / "small.img").write_bytes(b"x" * BLOCK_SIZE)
    empty_pool.import_base(tmp_path / "small.img", "small")
    empty_pool.create_clones("small", ["large"], size=size)
    return empty_pool.open_clone("large")


def test_a_trim_of_a_whole_disk_of_1_tib_is_quick_and_takes_no_space(empty_pool: Pool, tmp_path: Path) -> None:
    with large_clone(empty_pool, tmp_path, 1 << 40) as clone:
        started = time.perf_counter()
        clone.zero(0, 1 << 40)
        clone.flush()
        assert time.perf_counter() - started < 5
        assert clone.pread(BLOCK_SIZE, 0) == bytes(BLOCK_SIZE)
    assert empty_pool.info("large").allocated < 64 << 10


def test_a_trim_of_a_whole_base_is_quick(empty_pool: Pool, tmp_path: Path) -> None:
    """Here each segment is the base's, and gets a map of its own."""
    with open(tmp_path / "large.img", "wb") as file:
        file.truncate(100 << 30)
    empty_pool.import_base(tmp_path / "large.img", "large")
    empty_pool.create_clones("large", ["clone"])
    with empty_pool.open_clone("clone") as clone:
        started = time.perf_counter()
        clone.zero(0, clone.size)
        clone.flush()
        assert time.perf_counter() - started < 5
        assert all(clone.pread(1, offset) == b"\0" for offset in range(0, clone.size, 10 << 30))
    segments = -(-(100 << 30) // (127 << 20))
    assert empty_pool.info("clone").allocated <= segments * 2 * PAGE_SIZE + (40 << 10)


def test_touching_a_few_places_of_a_large_disk_reads_only_their_maps(empty_pool: Pool, tmp_path: Path) -> None:
    large_clone(empty_pool, tmp_path, 1 << 40).close()
    reads = 0

    class Counting(FileSystem):
        def preadv(self, fd, buffers, offset, flags=0):  # type: ignore[no-untyped-def, override]
            nonlocal reads
            reads += 1
            return FileSystem.preadv(fd, buffers, offset, flags)

    with Pool.open(empty_pool.path, fs=Counting()).open_clone("large") as clone:
        opening = reads
        for offset in (0, 1 << 39, (1 << 40) - BLOCK_SIZE):
            clone.pread(BLOCK_SIZE, offset)
    assert opening <= 10
    assert reads - opening <= 20
