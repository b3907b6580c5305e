"""What a clone says of its extents: where each is read from, and whether there is anything."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdclone.errors import UsageError
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.fs import FileSystem, data_and_holes
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE, Extent
from nbdclone.store.pool import Pool

BASE_BLOCKS = 64
BLOCKS = 96  # the last 32 are beyond the base
IN_BASE = range(8, 24)  # the blocks of the base that hold something


def b(count: int) -> int:
    """So many blocks in bytes."""
    return count * BLOCK_SIZE


@pytest.fixture
def sparse_pool(empty_pool: Pool, tmp_path: Path) -> Pool:
    """A pool with a base that is one stretch of data between two holes."""
    source = tmp_path / "sparse.img"
    with open(source, "wb") as file:
        file.truncate(b(BASE_BLOCKS))
        file.seek(b(IN_BASE.start))
        file.write(b"d" * b(len(IN_BASE)))
    empty_pool.import_base(source, "base")
    return empty_pool


@pytest.fixture
def clone(sparse_pool: Pool) -> Iterator[Clone]:
    sparse_pool.create_clones("base", ["web1"], size=b(BLOCKS))
    with sparse_pool.open_clone("web1") as clone:
        yield clone


def blocks(clone: Clone) -> list[tuple[int, int, int, bool]]:
    """The extents of all, in blocks: (count, origin, depth, hole)."""
    return [(e.length // BLOCK_SIZE, e.origin, e.depth, e.hole) for e in clone.extents(0, clone.size)]


def test_a_fresh_clone_has_the_extents_of_its_base_and_nothing_beyond_it(clone: Clone) -> None:
    assert blocks(clone) == [(8, 1, 2, True), (16, 1, 2, False), (40, 1, 2, True), (32, 0, 0, True)]


def test_a_base_that_is_served_itself_is_the_topmost_layer(sparse_pool: Pool) -> None:
    with sparse_pool.open_clone("base") as base:
        assert blocks(base) == [(8, 1, 1, True), (16, 1, 1, False), (40, 1, 1, True)]


def test_what_was_written_is_data_of_the_clones_own(clone: Clone) -> None:
    clone.pwrite(b"w" * b(2), b(10))  # over data
    clone.pwrite(b"w", b(40) + 17)  # a part of a block, over a hole
    clone.pwrite(b"w" * b(1), b(80))  # where nothing was
    assert blocks(clone) == [
        *[(8, 1, 2, True), (2, 1, 2, False), (2, 2, 1, False), (12, 1, 2, False)],
        *[(16, 1, 2, True), (1, 2, 1, False), (23, 1, 2, True)],
        *[(16, 0, 0, True), (1, 2, 1, False), (15, 0, 0, True)],
    ]


def test_what_was_trimmed_is_a_hole_of_the_clones_own(clone: Clone) -> None:
    clone.zero(b(10), b(4))
    clone.pwrite(bytes(b(2)), b(20))
    assert blocks(clone) == [
        *[(8, 1, 2, True), (2, 1, 2, False), (4, 2, 1, True), (6, 1, 2, False), (2, 2, 1, True), (2, 1, 2, False)],
        *[(40, 1, 2, True), (32, 0, 0, True)],
    ]


def test_what_was_trimmed_and_written_again_is_data(clone: Clone) -> None:
    clone.zero(b(8), b(16))
    clone.pwrite(b"w" * b(1), b(12))
    assert blocks(clone)[1:4] == [(4, 2, 1, True), (1, 2, 1, False), (11, 2, 1, True)]


def test_a_range_begins_and_ends_where_it_was_asked_to(clone: Clone) -> None:
    assert list(clone.extents(b(8) - 100, 300)) == [Extent(100, 1, 2, True), Extent(200, 1, 2, False)]
    assert list(clone.extents(b(BLOCKS) - 1, 1)) == [Extent(1, 0, 0, True)]
    assert list(clone.extents(b(BLOCKS), 0)) == []


def test_extents_of_the_same_kind_are_one_across_segments(empty_pool: Pool, source: Path) -> None:
    empty_pool.import_base(source, "base")
    empty_pool.create_clones("base", ["large"], size=5 * SEGMENT_SIZE)
    with empty_pool.open_clone("large") as clone:
        base = source.stat().st_size
        assert [e.length for e in clone.extents(0, clone.size)] == [base, clone.size - base]
        clone.pwrite(b"w" * b(4), 2 * SEGMENT_SIZE - b(2))
        assert list(clone.extents(0, clone.size)) == [
            *[Extent(base, 1, 2, False), Extent(2 * SEGMENT_SIZE - b(2) - base, 0, 0, True)],
            *[Extent(b(4), 2, 1, False), Extent(3 * SEGMENT_SIZE - b(2), 0, 0, True)],
        ]


def test_a_base_that_ends_within_a_block_is_data_to_the_blocks_end(empty_pool: Pool, tmp_path: Path) -> None:
    source = tmp_path / "odd.img"
    source.write_bytes(b"d" * (b(2) + 512))
    empty_pool.import_base(source, "base")
    empty_pool.create_clones("base", ["web1"], size=b(5))
    with empty_pool.open_clone("web1") as clone:
        assert list(clone.extents(0, clone.size)) == [Extent(b(3), 1, 2, False), Extent(b(2), 0, 0, True)]
    with empty_pool.open_clone("base") as base:
        assert list(base.extents(0, base.size)) == [Extent(b(2) + 512, 1, 1, False)]


def test_no_more_is_looked_at_than_the_limit_allows(clone: Clone) -> None:
    for block in range(0, 64, 2):
        clone.pwrite(b"w" * b(1), b(block))
    told = list(clone.extents(0, clone.size, limit=10))
    assert len(told) == 10
    assert sum(e.length for e in told) == b(10)
    assert list(clone.extents(0, b(10))) == told


def test_no_more_is_looked_at_than_is_taken(sparse_pool: Pool, tmp_path: Path) -> None:
    class Counting(FileSystem):
        seeks = 0

        def lseek(self, fd: int, position: int, whence: int) -> int:
            self.seeks += 1
            return os.lseek(fd, position, whence)

    fs = Counting()
    sparse_pool.create_clones("base", ["web1"], size=b(BLOCKS))
    with Pool.open(sparse_pool.path, fs=fs).open_clone("web1") as clone:
        for block in range(0, 64, 2):
            clone.pwrite(b"w" * b(1), b(block))
        fs.seeks = 0
        assert next(clone.extents(0, clone.size)) == Extent(b(1), 2, 1, False)
        assert fs.seeks <= 4


@pytest.mark.parametrize(("offset", "length"), [(0, b(BLOCKS) + 1), (b(BLOCKS), 1), (-1, 1), (0, -1)])
def test_a_range_outside_the_disk_is_refused(clone: Clone, offset: int, length: int) -> None:
    with pytest.raises(UsageError):
        list(clone.extents(offset, length))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_knows_no_holes_has_data_everywhere(
    sparse_pool: Pool, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def lseek(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileSystem, "lseek", staticmethod(lseek))
    sparse_pool.create_clones("base", ["web1"], size=b(BLOCKS))
    with sparse_pool.open_clone("web1") as clone:
        assert blocks(clone) == [(64, 1, 2, False), (32, 0, 0, True)]


def test_a_seek_that_fails_is_told(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    def lseek(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(FileSystem, "lseek", staticmethod(lseek))
    with pytest.raises(OSError, match="Input/output"):
        list(clone.extents(0, clone.size))


class Mapped(FileSystem):
    """A file of which it is known where it has data, down to the byte."""

    def __init__(self, data: set[int], end: int) -> None:
        self.data, self.end = data, end

    def lseek(self, _fd: int, position: int, whence: int) -> int:
        for at in range(position, self.end):
            if (at in self.data) == (whence == os.SEEK_DATA):
                return at
        if whence == os.SEEK_DATA or position >= self.end:
            raise OSError(errno.ENXIO, "beyond the end")
        return self.end


@given(st.sets(st.integers(0, 40)), st.integers(0, 48), st.integers(0, 48), st.integers(0, 48))
def test_no_hole_ever_hides_data_and_holes_are_whole_units(data: set[int], end: int, start: int, count: int) -> None:
    unit, stop = 8, start + count
    data = {at for at in data if at < end}
    position = start
    for hole, following in data_and_holes(Mapped(data, end), 0, start, stop, unit):
        assert position < following <= stop
        if hole:
            assert not data & set(range(position, following))
            assert position in (start, -(-position // unit) * unit)
            assert following in (stop, following // unit * unit)
        else:
            for block in range(position // unit, -(-following // unit)):
                assert data & set(range(block * unit, block * unit + unit))
        position = following
    assert position == stop


def test_after_anything_that_was_done_to_it_a_clone_tells_the_truth(clone: Clone) -> None:
    rng = random.Random("extents")
    own: set[int] = set()  # the blocks that must be the clone's
    for _ in range(300):
        first = rng.randrange(BLOCKS)
        count = rng.randint(1, min(6, BLOCKS - first))
        change = rng.choice((clone.pwrite, clone.zero))
        if change == clone.zero:
            clone.zero(b(first), b(count))
            own |= {block for block in range(first, first + count) if block < BASE_BLOCKS}
        else:
            clone.pwrite(b"w" * b(count), b(first))
            own |= set(range(first, first + count))
        _agrees(clone, own)


def _agrees(clone: Clone, own: set[int]) -> None:
    position = 0
    previous: Extent | None = None
    for extent in clone.extents(0, clone.size):
        content = clone.pread(extent.length, position)
        assert extent.hole == (not any(content)), "blocks of zeros are holes here, and no others are"
        for block in range(position // BLOCK_SIZE, (position + extent.length) // BLOCK_SIZE):
            if block in own:
                assert extent[1:3] == (2, 1)
            elif extent.origin:
                assert extent[1:3] == (1, 2)
                assert block < BASE_BLOCKS
        assert previous is None or previous[1:] != extent[1:], "neighbours are merged"
        previous = extent
        position += extent.length
    assert position == clone.size


def test_a_write_that_is_not_on_the_disk_yet_is_data(clone: Clone) -> None:
    """Space is taken late by many file systems: what stands in memory must count."""
    clone.pwrite(b"w" * b(1), b(90))
    assert list(clone.extents(b(90), b(1))) == [Extent(b(1), 2, 1, False)]


def test_three_layers_count_from_both_ends(sparse_pool: Pool) -> None:
    """A delta under a delta, put together by hand."""
    sparse_pool.create_clones("base", ["under", "over"], size=b(BLOCKS))
    directory = sparse_pool.path / "clones"
    base = sparse_pool.open_clone("base").layers[0]
    under = Delta.open(directory / "under" / "delta", "under")
    with Clone("under", [base, under]) as middle:
        middle.pwrite(b"u" * b(4), b(8))
        over = Delta.open(directory / "over" / "delta", "over")
        top = Clone("over", [base, under, over])
        top.pwrite(b"o" * b(1), b(9))
        assert list(top.extents(b(8), b(5))) == [
            *[Extent(b(1), 2, 2, False), Extent(b(1), 3, 1, False)],
            *[Extent(b(2), 2, 2, False), Extent(b(1), 1, 3, False)],
        ]
        over.finish()
        over.close()


def test_beside_a_writer_nothing_that_was_written_before_is_told_as_a_hole(sparse_pool: Pool) -> None:
    count = 4000
    sparse_pool.create_clones("base", ["busy"], size=b(2 * count))
    written = 0

    def write() -> None:
        nonlocal written
        for number in range(count):  # every second block, so that each is an extent
            clone.pwrite(b"w" * b(1), b(2 * number))
            written = number + 1
            if number % 500 == 0:
                clone.flush()

    with sparse_pool.open_clone("busy") as clone, ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        asked = 0
        while not writing.done() or not asked:
            before = written
            position, data = 0, set()
            for extent in clone.extents(0, clone.size, limit=3 * count):
                if not extent.hole and extent.origin == 2:
                    data |= set(range(position // BLOCK_SIZE, (position + extent.length) // BLOCK_SIZE))
                position += extent.length
            assert position == clone.size
            assert data >= {2 * number for number in range(before)}
            assert all(block % 2 == 0 for block in data)
            asked += 1
        writing.result()
