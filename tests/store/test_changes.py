"""In what two disks differ, told from their maps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from nbdclone.errors import UsageError
from nbdclone.store.changes import Change, changed_extents, changed_ranges, owned_ranges
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool

SIZE = SEGMENT_SIZE + 64 * BLOCK_SIZE
BORDER = SEGMENT_SIZE // BLOCK_SIZE


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    with open(tmp_path / "debian.img", "wb") as file:
        file.truncate(SIZE)
        file.write(b"debian" * 4096)
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "debian.img")
    pool.create_clones("debian", ["web1"])
    return pool


def write(pool: Pool, name: str, *blocks: int, byte: bytes = b"x") -> None:
    with pool.open_clone(name) as disk:
        for block in blocks:
            disk.pwrite(byte * BLOCK_SIZE, block * BLOCK_SIZE)


def trim(pool: Pool, name: str, block: int, count: int) -> None:
    with pool.open_clone(name) as disk:
        disk.zero(block * BLOCK_SIZE, count * BLOCK_SIZE)


def diff(pool: Pool, a: str, b: str, *, content: bool = False) -> list[tuple[int, int, str]]:
    """The (first block, count, kind) of each change."""
    with pool.open_clone(a) as before, pool.open_clone(b) as after:
        return [in_blocks(change) for change in changed_extents(before, after, content=content)]


def in_blocks(change: Change) -> tuple[int, int, str]:
    assert change.offset % BLOCK_SIZE == 0
    return change.offset // BLOCK_SIZE, -(-change.length // BLOCK_SIZE), "zero" if change.zero else "data"


def test_what_was_written_since_the_base_is_told(pool: Pool) -> None:
    write(pool, "web1", 1, 2, 3, 9, BORDER - 1, BORDER, BORDER + 63)
    expected = [(1, 3, "data"), (9, 1, "data"), (BORDER - 1, 2, "data"), (BORDER + 63, 1, "data")]
    assert diff(pool, "debian", "web1") == expected
    assert [length for _, length, _ in diff(pool, "web1", "debian")][:2] == [3, 1]


def test_what_was_trimmed_is_told_as_zeros(pool: Pool) -> None:
    write(pool, "web1", 1, 5)
    trim(pool, "web1", 2, 3)
    assert diff(pool, "debian", "web1") == [(1, 1, "data"), (2, 3, "zero"), (5, 1, "data")]


def test_what_is_between_two_snapshots_is_told_from_the_layers_between(pool: Pool) -> None:
    write(pool, "web1", 1)
    pool.snapshot("web1@one")
    write(pool, "web1", 3)
    pool.snapshot("web1@two")
    write(pool, "web1", 5)
    pool.snapshot("web1@three")
    write(pool, "web1", 7)
    assert diff(pool, "web1@one", "web1@two") == [(3, 1, "data")]
    assert diff(pool, "web1@one", "web1@three") == [(3, 1, "data"), (5, 1, "data")]
    assert diff(pool, "web1@two", "web1") == [(5, 1, "data"), (7, 1, "data")]
    assert diff(pool, "web1@one", "web1@one") == []
    assert [at for at, _, _ in diff(pool, "web1@three", "web1@one")] == [3, 5]


def test_of_two_clones_what_either_has_of_its_own_is_told(pool: Pool) -> None:
    pool.create_clones("debian", ["web2"])
    write(pool, "web1", 1, 2)
    write(pool, "web2", 2, 40)
    assert diff(pool, "web1", "web2") == [(1, 2, "data"), (40, 1, "data")]


def test_with_content_only_what_reads_otherwise_is_told(pool: Pool) -> None:
    pool.create_clones("debian", ["web2"])
    write(pool, "web1", 1, 2, 3)
    write(pool, "web2", 2, 3)
    write(pool, "web2", 3, byte=b"y")
    assert diff(pool, "web1", "web2", content=True) == [(1, 1, "data"), (3, 1, "data")]
    write(pool, "web1", 1, 2, 3, byte=b"y")
    write(pool, "web2", 1, 2, 3, byte=b"y")
    assert diff(pool, "web1", "web2", content=True) == []


def test_disks_of_different_bases_are_compared_by_content_alone(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "other.img").write_bytes((tmp_path / "debian.img").read_bytes()[: 40 * BLOCK_SIZE])
    pool.import_base(tmp_path / "other.img")
    pool.create_clones("other", ["web2"])
    write(pool, "web2", 9)
    with pytest.raises(UsageError, match="no layer in common"):
        diff(pool, "debian", "web2")
    assert diff(pool, "debian", "web2", content=True) == [(9, 1, "data")]


def test_what_a_larger_disk_has_more_is_told(pool: Pool) -> None:
    pool.snapshot("web1@one")
    pool.create_clones("web1@one", ["web2"], size=SIZE + 4 * BLOCK_SIZE)
    assert diff(pool, "web1", "web2") == [(BORDER + 64, 4, "zero")]
    assert diff(pool, "web1", "web2", content=True) == [(BORDER + 64, 4, "zero")]
    write(pool, "web2", BORDER + 65)
    assert diff(pool, "web1@one", "web2") == [
        (BORDER + 64, 1, "zero"), (BORDER + 65, 1, "data"), (BORDER + 66, 2, "zero"),
    ]  # fmt: skip
    assert diff(pool, "web2", "web1@one") == []


def test_what_is_cut_off_beneath_a_layer_is_told(pool: Pool) -> None:
    from nbdclone.store.delta_file import change_header

    write(pool, "web1", 1, 20)
    pool.snapshot("web1@one")
    change_header(pool.places.delta("web1"), overlap=BORDER * BLOCK_SIZE + 10 * BLOCK_SIZE)
    assert diff(pool, "web1@one", "web1") == [(BORDER + 10, 54, "zero")]


def test_neither_the_base_nor_shared_layers_are_read(pool: Pool) -> None:
    write(pool, "web1", 1)
    pool.snapshot("web1@one")
    write(pool, "web1", 2)
    with pool.open_clone("web1@one") as before, pool.open_clone("web1") as after:
        for layer in (*before.layers, *after.layers[:-1]):
            layer.paint = unreadable  # type: ignore[method-assign]
        assert list(changed_ranges(before.layers, after.layers)) == [(2 * BLOCK_SIZE, BLOCK_SIZE)]


def unreadable(segment: int, owners: bytes, index: int, nowait: bool) -> bytes:
    raise AssertionError("its map was asked for")


def test_a_layer_tells_what_it_holds_in_one_run_across_segments(pool: Pool) -> None:
    write(pool, "web1", BORDER - 1, BORDER, BORDER + 1)
    with pool.open_clone("web1") as disk:
        assert list(owned_ranges(disk.layers[-1])) == [((BORDER - 1) * BLOCK_SIZE, 3 * BLOCK_SIZE)]
        assert list(owned_ranges(disk.layers[0])) == [(0, SIZE)]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_told_is_what_a_comparison_finds_and_what_was_written(pool: Pool, seed: int) -> None:
    dice = random.Random(seed)
    written: list[set[int]] = []
    for number in range(3):
        blocks = {dice.choice([dice.randrange(30), BORDER - 8 + dice.randrange(16)]) for _ in range(8)}
        write(pool, "web1", *blocks, byte=bytes([65 + number]))
        written.append(blocks)
        pool.snapshot(f"web1@{number}")
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        changed = set().union(*written[a + 1 : b + 1])
        assert blocks_of(diff(pool, f"web1@{a}", f"web1@{b}")) == changed
        assert blocks_of(diff(pool, f"web1@{a}", f"web1@{b}", content=True)) == changed


def blocks_of(changes: Sequence[tuple[int, int, str]]) -> set[int]:
    return {block for first, count, _ in changes for block in range(first, first + count)}
