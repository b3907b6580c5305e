"""What was changed since a snapshot, as told while a clone is in use, against a disk that remembers every block."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdclone.errors import StorageError
from nbdclone.store.changes import changed_ranges, identity_of
from nbdclone.store.clone import Clone
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.since import changes_since
from nbdclone.store.snapshots import take_snapshot

BLOCKS = 48
BASE_BLOCKS = 32
GONE = b"\xff" * 16  # no layer has this id


class Hasty(FileSystem):
    """Syncs nothing."""

    def sync(self, fd: Any) -> None:
        pass

    datasync = sync

    def sync_directory(self, path: Path) -> None:
        pass


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """A base of which each second block is data, and a clone that is longer."""
    with open(tmp_path / "debian.img", "wb") as file:
        for block in range(0, BASE_BLOCKS, 2):
            file.seek(block * BLOCK_SIZE)
            file.write(bytes([1 + block]) * BLOCK_SIZE)
        file.truncate(BASE_BLOCKS * BLOCK_SIZE)
    pool = Pool.open(tmp_path / "pool", create=True, fs=Hasty())
    pool.import_base(tmp_path / "debian.img")
    pool.create_clones("debian", ["web1"], size=BLOCKS * BLOCK_SIZE)
    return pool


def write(disk: Clone, *blocks: int, byte: bytes = b"x") -> None:
    for block in blocks:
        disk.pwrite(byte * BLOCK_SIZE, block * BLOCK_SIZE)


def changed(disk: Clone, layer_id: bytes, offset: int = 0, length: int | None = None) -> list[tuple[int, int]]:
    """The (start, end) of what was changed since, neighbours as one."""
    length = disk.size - offset if length is None else length
    found: list[tuple[int, int]] = []
    with disk.surveyed(offset, length) as (layers, extents):
        parts = changes_since(layer_id, layers)
        end = offset
        for extent in extents:
            told = list(parts(end, extent))
            assert sum(count for count, _ in told) == extent.length
            assert all(count > 0 for count, _ in told)
            for count, is_changed in told:
                if is_changed and found and found[-1][1] == end:
                    found[-1] = found[-1][0], end + count
                elif is_changed:
                    found.append((end, end + count))
                end += count
    assert end == offset + length
    return found


def changed_blocks(disk: Clone, layer_id: bytes) -> list[int]:
    return [at // BLOCK_SIZE for start, end in changed(disk, layer_id) for at in range(start, end, BLOCK_SIZE)]


def by_maps(disk: Clone, layer_id: bytes) -> list[tuple[int, int]]:
    """The same by the maps of all the layers."""
    index = [identity_of(layer) for layer in disk.layers].index(layer_id)
    return [(offset, offset + length) for offset, length in changed_ranges(disk.layers[: index + 1], disk.layers)]


def snapshot(pool: Pool, disk: Clone, name: str) -> bytes:
    take_snapshot(pool.places, disk, name)
    return pool.snapshots_beneath("web1")[name]


def test_what_was_written_and_trimmed_since_each_snapshot_is_told(pool: Pool) -> None:
    with pool.open_clone("web1") as disk:
        write(disk, 1, 2)
        one = snapshot(pool, disk, "one")
        assert changed_blocks(disk, one) == []
        write(disk, 2, 5)
        disk.zero(8 * BLOCK_SIZE, 2 * BLOCK_SIZE)
        disk.zero(40 * BLOCK_SIZE, BLOCK_SIZE)  # there was nothing
        two = snapshot(pool, disk, "two")
        disk.pwrite(b"y", 20 * BLOCK_SIZE + 7)
        assert changed_blocks(disk, one) == [2, 5, 8, 9, 20]
        assert changed_blocks(disk, two) == [20]
    with pool.open_clone("web1@two") as disk:
        assert changed_blocks(disk, one) == [2, 5, 8, 9]


def test_a_part_is_told_from_where_to_where_it_was_asked_for(pool: Pool) -> None:
    with pool.open_clone("web1") as disk:
        one = snapshot(pool, disk, "one")
        write(disk, 3)
        assert changed(disk, one, 3 * BLOCK_SIZE - 10, 30) == [(3 * BLOCK_SIZE, 3 * BLOCK_SIZE + 20)]
        assert changed(disk, one, 4 * BLOCK_SIZE, 100) == []


def test_since_a_layer_that_is_not_beneath_everything_may_have_changed(pool: Pool) -> None:
    with pool.open_clone("web1") as disk:
        write(disk, 1)
        assert changed(disk, GONE) == [(0, disk.size)]


def test_what_a_clone_was_cut_free_of_tells_no_changes_any_more(pool: Pool) -> None:
    with pool.open_clone("web1") as disk:
        write(disk, 1)
        one = snapshot(pool, disk, "one")
        write(disk, 2)
        before = disk.pread(disk.size, 0)
        with disk.surveyed(0, disk.size) as (layers, extents):  # a question that was asked before
            first = next(extents)
            disk.copy_up(0, disk.size)
            disk.relayer([])
            assert list(changes_since(one, layers)(0, first)) == [(first.length, first.origin > 2)]
        assert disk.pread(disk.size, 0) == before
        assert changed(disk, one) == [(0, disk.size)]


def test_a_snapshot_during_a_question_makes_nothing_that_was_changed_look_unchanged(pool: Pool) -> None:
    with pool.open_clone("web1") as disk:
        one = snapshot(pool, disk, "one")
        write(disk, 1)
        with disk.surveyed(0, disk.size) as (layers, extents):
            parts = changes_since(one, layers)
            snapshot(pool, disk, "two")
            write(disk, 7)
            told = [parts(0, extent) for extent in extents]
            assert [is_changed for part in told for _, is_changed in part].count(True) == 2


def test_what_was_copied_up_is_told_as_changed(pool: Pool) -> None:
    with pool.open_clone("web1") as disk:
        write(disk, 1, 3)
        one = snapshot(pool, disk, "one")
        disk.copy_up(0, 2 * BLOCK_SIZE)
        assert changed_blocks(disk, one) == [0, 1]


@pytest.mark.parametrize("odd", [0, 512])
def test_what_was_cut_off_and_what_is_behind_a_smaller_snapshot_is_changed(pool: Pool, odd: int) -> None:
    with pool.open_clone("web1") as disk:
        write(disk, 30, 45)
        disk.resize(47 * BLOCK_SIZE + odd)
        one = snapshot(pool, disk, "one")
        disk.resize(20 * BLOCK_SIZE + odd)
        two = snapshot(pool, disk, "two")
        disk.resize(60 * BLOCK_SIZE)
        write(disk, 50)
        assert not any(disk.pread(30 * BLOCK_SIZE, 21 * BLOCK_SIZE)[: 29 * BLOCK_SIZE])
        assert changed(disk, one) == [(20 * BLOCK_SIZE, 60 * BLOCK_SIZE)] == by_maps(disk, one)
        assert changed(disk, two) == [(20 * BLOCK_SIZE, 60 * BLOCK_SIZE)] == by_maps(disk, two)


def test_what_a_larger_disk_has_behind_a_snapshot_that_ends_within_a_block_is_told_in_whole_blocks(pool: Pool) -> None:
    with pool.open_clone("web1") as disk:
        disk.resize(48 * BLOCK_SIZE + 512)
        one = snapshot(pool, disk, "one")
        disk.resize(60 * BLOCK_SIZE)
        assert changed(disk, one) == [(48 * BLOCK_SIZE, 60 * BLOCK_SIZE)] == by_maps(disk, one)


@pytest.mark.parametrize("seed", range(8))
def test_a_random_life_is_told_as_the_maps_do_and_no_change_is_missing(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    disk = pool.open_clone("web1")
    snapshots: dict[str, tuple[bytes, bytes]] = {}
    acts: list[Callable[[int, int], object]] = [
        lambda block, count: disk.pwrite(rng.randbytes(count * BLOCK_SIZE), block * BLOCK_SIZE),
        lambda block, count: disk.pwrite(rng.randbytes(700), block * BLOCK_SIZE + rng.randrange(3000)),
        lambda block, count: disk.zero(block * BLOCK_SIZE, count * BLOCK_SIZE, allocate=rng.random() < 0.3),
        lambda block, count: disk.copy_up(block * BLOCK_SIZE, count * BLOCK_SIZE),
    ]
    try:
        for number in range(60):
            act = rng.choices([*acts, None], [6, 4, 4, 1, 3])[0]
            block = rng.randrange(disk.size // BLOCK_SIZE - 4)
            if act is not None:
                act(block, rng.randint(1, 4))
            elif len(snapshots) < 8:
                name = f"s{number}"
                snapshots[name] = snapshot(pool, disk, name), disk.pread(disk.size, 0)
            if number % 17 == 16:
                disk.resize(rng.randrange(36, 56) * BLOCK_SIZE)
            if number % 13 == 12:  # maps that are painted anew
                disk.close()
                disk = pool.open_clone("web1")
        assert len(snapshots) > 3
        now = disk.pread(disk.size, 0)
        for layer_id, then in snapshots.values():
            told = changed(disk, layer_id)
            assert told == by_maps(disk, layer_id)
            inside = set(changed_blocks(disk, layer_id))
            then = then.ljust(len(now), b"\0")
            for block in range(disk.size // BLOCK_SIZE):
                at = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
                assert now[at] == then[at] or block in inside
    finally:
        disk.close()


def test_two_segments_are_told_of_like_one(tmp_path: Path, pool: Pool) -> None:
    pool.create_clones("debian", ["large"], size=SEGMENT_SIZE + 8 * BLOCK_SIZE)
    border = SEGMENT_SIZE // BLOCK_SIZE
    with pool.open_clone("large") as disk:
        take_snapshot(pool.places, disk, "one")
        write(disk, border - 1, border, border + 2)
        one = pool.snapshots_beneath("large")["one"]
        assert changed_blocks(disk, one) == [border - 1, border, border + 2]
        assert changed(disk, one) == by_maps(disk, one)


# Which snapshots there are


def test_the_snapshots_beneath_are_those_that_a_clone_stands_on(pool: Pool) -> None:
    for name in ("one", "two", "three"):
        pool.snapshot(f"web1@{name}")
    assert list(pool.snapshots_beneath("web1")) == ["one", "two", "three"]
    assert list(pool.snapshots_beneath("web1@three")) == ["one", "two"]
    assert pool.snapshots_beneath("web1@one") == {}
    pool.rollback("web1@two")
    assert list(pool.snapshots_beneath("web1")) == ["one", "two"]
    assert list(pool.snapshots_beneath("web1@three")) == ["one", "two"]
    assert pool.places.snapshot("web1@two").layer == pool.snapshots_beneath("web1")["two"]
    pool.reset("web1")
    assert pool.snapshots_beneath("web1") == {}


def test_a_clone_of_a_snapshot_has_none_of_its_own(pool: Pool) -> None:
    pool.snapshot("web1@one")
    pool.create_clones("web1@one", ["web2"])
    assert pool.snapshots_beneath("web2") == {}
    pool.snapshot("web2@mine")
    assert list(pool.snapshots_beneath("web2")) == ["mine"]


@pytest.mark.parametrize(
    "name", ["debian", "nobody", "", "web1@nothing", "nobody@one", "../web1", "../clones/web1", "debian+", "web1@", "@"]
)
def test_what_is_no_clone_has_none(pool: Pool, name: str) -> None:
    pool.snapshot("web1@one")
    assert pool.snapshots_beneath(name) == {}


def test_a_snapshot_that_was_removed_is_not_beneath(pool: Pool) -> None:
    pool.snapshot("web1@one")
    pool.snapshot("web1@two")
    pool.remove(["web1@one"])
    assert list(pool.snapshots_beneath("web1")) == ["two"]


def test_a_damaged_clone_is_an_error(pool: Pool) -> None:
    pool.snapshot("web1@one")
    with open(pool.places.delta("web1"), "r+b") as file:
        file.write(bytes(1 << 20))
    with pytest.raises(StorageError):
        pool.snapshots_beneath("web1")
