"""Damage to a delta: each kind is found and named with its place, and repaired where there is one right answer."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checked import (
    PAGES,
    SIZE,
    base_of,
    check,
    content,
    delta_of,
    make_pool,
    page,
    patch,
    put_back,
    repair_and_require,
    told,
    wrong,
)

from nbdclone.errors import BaseChanged, CorruptDelta, NBDCloneError
from nbdclone.store import check_delta
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.check_delta import linked_to
from nbdclone.store.delta_file import (
    HEADER_SLOTS,
    MAP_SLOTS,
    METADATA_SIZE,
    PAGE_SIZE,
    SEGMENT_SPAN,
    decode_map_page,
    encode_map_page,
    file_size,
    read_header,
)
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import BITMAP_SIZE, BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return make_pool(tmp_path)


def header_id(pool: Pool) -> bytes:
    with open(delta_of(pool), "rb") as file:
        return read_header(file.fileno(), "").id


def test_a_sound_pool_has_no_findings_and_is_not_changed(pool: Pool) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in pool.path.rglob("*")}
    for wishes in ({}, {"deep": True}, {"repair": True}, {"deep": True, "repair": True}):
        assert check(pool, **wishes) == []
    before.pop(pool.path / ".lock", None)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in before} == before


# One slot


@pytest.mark.parametrize("where", PAGES)
def test_a_rotten_slot_is_named_and_written_again_from_its_twin(pool: Pool, where: str) -> None:
    expected, path = content(pool), delta_of(pool)
    before = page(path, PAGES[where])
    patch(path, PAGES[where] + 40, b"rot")
    kind = "header-slot" if "header" in where else "map-slot"
    [finding] = check(pool)
    assert (finding.name, finding.kind) == ("web1", kind)
    assert f"slot {where[-1]}" in finding.what
    assert finding.where == f"{path}, bytes {PAGES[where]}-{PAGES[where] + PAGE_SIZE - 1}"
    if "map" in where:
        assert f"segment {where[4]}" in finding.what
    repair_and_require(pool, [("web1", kind)])
    assert page(path, PAGES[where]) == before
    assert content(pool) == expected


@pytest.mark.parametrize("where", PAGES)
def test_what_a_repair_changes_can_be_put_back(pool: Pool, where: str) -> None:
    path = delta_of(pool)
    patch(path, PAGES[where] + 40, b"rot")
    damaged = page(path, PAGES[where])
    [finding] = check(pool, repair=True)
    assert finding.kept == str(path) + ".before-repair-1"
    assert os.path.getsize(finding.kept) < 2 * PAGE_SIZE
    put_back(Path(finding.kept))
    assert page(path, PAGES[where]) == damaged
    [again] = check(pool, repair=True)
    assert again.kept == str(path) + ".before-repair-2"


def test_a_slot_of_zeros_is_noticed_in_a_header(pool: Pool) -> None:
    patch(delta_of(pool), 0, bytes(PAGE_SIZE))
    assert told(check(pool)) == [("web1", "header-slot")]
    repair_and_require(pool, [("web1", "header-slot")])


def test_an_older_header_is_a_note_and_the_newer_is_copied(pool: Pool) -> None:
    path = delta_of(pool)
    newer = bytearray(page(path, 0))
    struct.pack_into(">Q", newer, 32, 9)
    newer[-4:] = zlib.crc32(newer[:-4]).to_bytes(4, "big")
    patch(path, HEADER_SLOTS[1], newer)
    found = check(pool)
    assert told(found) == [("web1", "header-older")]
    assert is_clean(found)
    repair_and_require(pool, [("web1", "header-older")])
    assert page(path, 0) == page(path, HEADER_SLOTS[1]) == newer


def test_slots_that_say_different_things_with_the_same_sequence_are_not_guessed_at(pool: Pool) -> None:
    path = delta_of(pool)
    other = bytearray(page(path, 0))
    other[112] ^= 1  # the time of creation
    other[-4:] = zlib.crc32(other[:-4]).to_bytes(4, "big")
    patch(path, 0, other)
    sequence, bitmap = decode_map_page(page(path, MAP_SLOTS[0]), 0, header_id(pool)) or (0, b"")
    patch(path, MAP_SLOTS[1], encode_map_page(0, sequence, header_id(pool), bytes([bitmap[0] ^ 1]) + bitmap[1:]))
    kinds = [("web1", "header-slots-disagree"), ("web1", "map-slots-disagree")]
    assert wrong(check(pool)) == kinds
    assert wrong(repair_and_require(pool, [], clean=False)) == kinds


def test_a_clone_that_was_killed_is_a_note_and_its_page_is_copied(pool: Pool) -> None:
    path = delta_of(pool)
    sequence, bitmap = decode_map_page(page(path, MAP_SLOTS[0]), 0, header_id(pool)) or (0, b"")
    newer = encode_map_page(0, sequence + 1, header_id(pool), b"\xff" + bitmap[1:])
    for slot, other in (MAP_SLOTS, MAP_SLOTS[::-1]):
        patch(path, slot, newer)
        patch(path, other, bytes(PAGE_SIZE))
        found = check(pool)
        assert told(found) == [("web1", "not-closed")]
        assert is_clean(found)
        repair_and_require(pool, [("web1", "not-closed")])
        assert page(path, other) == newer


# Both slots


@pytest.mark.parametrize("kind", ["header", "map"])
def test_two_slots_damaged_in_different_sectors_are_put_together(pool: Pool, kind: str) -> None:
    expected, path = content(pool), delta_of(pool)
    places = [PAGES[f"{kind}{number} {slot}"] for number in ("" if kind == "header" else " 0",) for slot in "AB"]
    before = page(path, places[0])
    patch(path, places[0] + 100, b"rot")
    patch(path, places[0] + 3000, b"rot")
    patch(path, places[1] + 2000, b"rot")
    with pytest.raises(CorruptDelta):
        content(pool)
    assert wrong(check(pool)) == [("web1", f"{kind}-slots")]
    repair_and_require(pool, [("web1", f"{kind}-slots")])
    assert page(path, places[0]) == page(path, places[1]) == before
    assert content(pool) == expected


def test_a_header_that_is_lost_is_not_guessed_and_the_other_clone_is_fine(pool: Pool) -> None:
    for slot in HEADER_SLOTS:
        patch(delta_of(pool), slot + 100, b"rot")
    before = delta_of(pool).read_bytes()
    [finding] = repair_and_require(pool, [], clean=False)
    assert (finding.name, finding.kind) == ("web1", "header-lost")
    assert "docs/format.md" in finding.todo
    assert delta_of(pool).read_bytes() == before


def test_a_map_that_is_lost_is_named_as_bytes_of_the_disk(pool: Pool) -> None:
    for slot in MAP_SLOTS:
        patch(delta_of(pool), SEGMENT_SPAN + slot + 100, b"rot")
    [finding] = repair_and_require(pool, [], clean=False)
    assert (finding.name, finding.kind) == ("web1", "map-lost")
    assert finding.ranges == ((SEGMENT_SIZE, BLOCK_SIZE),)
    assert f"bytes {SEGMENT_SIZE}-{SEGMENT_SIZE + BLOCK_SIZE - 1} of the disk" in str(finding)
    with pool.open_clone("web1") as clone:  # as it says
        clone.pread(BLOCK_SIZE, 0)
        with pytest.raises(CorruptDelta):
            clone.pread(1, SEGMENT_SIZE)


def test_a_first_page_that_was_torn_is_cleared(pool: Pool) -> None:
    path = delta_of(pool)
    patch(path, MAP_SLOTS[0] + 100, b"torn")
    patch(path, MAP_SLOTS[1], bytes(PAGE_SIZE))
    expected = content_without_close(pool)
    [finding] = check(pool)
    assert (finding.name, finding.kind) == ("web1", "map-first-torn")
    assert finding.ranges == ((0, 2 * BLOCK_SIZE), (SEGMENT_SIZE - BLOCK_SIZE, BLOCK_SIZE))
    found = check(pool, repair=True)
    assert told(found) == [("web1", "map-first-torn"), ("web1", "unmarked-data")]
    assert is_clean(check(pool))
    assert content_without_close(pool) == expected


def content_without_close(pool: Pool) -> bytes:
    """What the first block reads as, with the file put back as it was: a close would write to it."""
    before = {slot: page(delta_of(pool), slot) for slot in MAP_SLOTS}
    with pool.open_clone("web1") as clone:
        found = clone.pread(BLOCK_SIZE, 0)
    for slot, kept in before.items():
        patch(delta_of(pool), slot, kept)
    return found


def test_data_without_a_map_is_a_note(pool: Pool) -> None:
    for slot in MAP_SLOTS:
        patch(delta_of(pool), SEGMENT_SPAN + slot, bytes(PAGE_SIZE))
    [finding] = check(pool)
    assert (finding.kind, finding.level) == ("unmarked-data", "note")
    assert finding.ranges == ((SEGMENT_SIZE, BLOCK_SIZE),)


# Marks and lengths


def test_marks_beyond_the_disk_are_cleared_and_the_others_stay(pool: Pool) -> None:
    expected, path = content(pool), delta_of(pool)
    read = decode_map_page(page(path, SEGMENT_SPAN + MAP_SLOTS[0]), 1, header_id(pool))
    assert read is not None
    marked = bytearray(read[1])
    marked[1] |= 0b00100001  # blocks 10 and 15; the disk ends at 10
    marked[-1] |= 1
    for slot in MAP_SLOTS:
        patch(path, SEGMENT_SPAN + slot, encode_map_page(1, read[0], header_id(pool), bytes(marked)))
    [finding] = check(pool)
    assert (finding.kind, finding.what.split()[0]) == ("marked-beyond", "3")
    repair_and_require(pool, [("web1", "marked-beyond")])
    for slot in MAP_SLOTS:
        assert decode_map_page(page(path, SEGMENT_SPAN + slot), 1, header_id(pool)) == (read[0] + 1, read[1])
    assert content(pool) == expected


def test_garbage_behind_the_end_is_kept_and_cut_off(pool: Pool) -> None:
    expected, path = content(pool), delta_of(pool)
    right = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(right + (300 << 20))
        os.pwrite(file.fileno(), b"garbage", right + (200 << 20))
    before = page(path, right + (200 << 20))
    [finding] = repair_and_require(pool, [("web1", "too-long")])
    assert path.stat().st_size == right
    assert content(pool) == expected
    assert finding.kept is not None
    assert os.path.getsize(finding.kept) < 64 << 10
    put_back(Path(finding.kept))
    assert path.stat().st_size == right + (300 << 20)
    assert page(path, right + (200 << 20)) == before


def test_what_is_too_much_to_keep_is_not_cut_off(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_delta, "MAX_TRAILING", 8192)
    path = delta_of(pool)
    right = path.stat().st_size
    with open(path, "ab") as file:
        file.write(b"x" * 10_000)
    [finding] = repair_and_require(pool, [], clean=False)
    assert finding.kind == "too-long"
    assert f"truncate -s {right}" in finding.todo


def test_a_map_page_behind_the_end_is_not_cut_off_for_the_header_may_be_what_lies(pool: Pool) -> None:
    path = delta_of(pool)
    right = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(3 * SEGMENT_SPAN)
    patch(
        path, 2 * SEGMENT_SPAN + MAP_SLOTS[1], encode_map_page(2, 1, header_id(pool), b"\x80".ljust(BITMAP_SIZE, b"\0"))
    )
    [finding] = repair_and_require(pool, [], clean=False)
    assert finding.kind == "too-long"
    assert path.stat().st_size == 3 * SEGMENT_SPAN > right


def test_a_short_file_that_misses_no_block_gets_its_length(pool: Pool) -> None:
    expected, path = content(pool), delta_of(pool)
    right = path.stat().st_size
    os.truncate(path, right - 8 * BLOCK_SIZE)
    with pytest.raises(CorruptDelta, match="truncated"):
        content(pool)
    assert told(check(pool)) == [("web1", "too-short")]
    repair_and_require(pool, [("web1", "too-short")])
    assert path.stat().st_size == right
    assert content(pool) == expected


@pytest.mark.parametrize(
    ("length", "lost"),
    [
        (SEGMENT_SPAN + METADATA_SIZE + 1, [(SEGMENT_SIZE, BLOCK_SIZE)]),
        (SEGMENT_SPAN + METADATA_SIZE, [(SEGMENT_SIZE, BLOCK_SIZE)]),
        (SEGMENT_SPAN + MAP_SLOTS[1] + PAGE_SIZE, [(SEGMENT_SIZE, BLOCK_SIZE)]),
        (SEGMENT_SPAN + MAP_SLOTS[1] + PAGE_SIZE - 1, [(SEGMENT_SIZE, SIZE - SEGMENT_SIZE)]),
        (SEGMENT_SPAN, [(SEGMENT_SIZE, SIZE - SEGMENT_SIZE)]),
        (SEGMENT_SPAN - 1, [(SEGMENT_SIZE - BLOCK_SIZE, BLOCK_SIZE), (SEGMENT_SIZE, SIZE - SEGMENT_SIZE)]),
        (
            METADATA_SIZE + BLOCK_SIZE,
            [
                (BLOCK_SIZE, BLOCK_SIZE),
                (SEGMENT_SIZE - BLOCK_SIZE, BLOCK_SIZE),
                (SEGMENT_SIZE, SIZE - SEGMENT_SIZE),
            ],
        ),
        (HEADER_SLOTS[1], [(0, SIZE)]),
    ],
)
def test_what_a_truncated_file_lost_is_named(pool: Pool, length: int, lost: list[tuple[int, int]]) -> None:
    path = delta_of(pool)
    os.truncate(path, length)
    [finding] = [finding for finding in check(pool, repair=True) if finding.kind == "truncated"]
    assert list(finding.ranges) == lost
    assert f"truncate -s {file_size(SIZE)}" in finding.todo
    assert path.stat().st_size <= max(length, HEADER_SLOTS[1] + PAGE_SIZE), "a repair must not hide what is missing"
    with pytest.raises(CorruptDelta):
        content(pool)


def test_a_newer_format_is_left_alone(pool: Pool) -> None:
    path = delta_of(pool)
    newer = bytearray(page(path, 0))
    struct.pack_into(">I", newer, 8, 2)
    newer[-4:] = zlib.crc32(newer[:-4]).to_bytes(4, "big")
    patch(path, 0, newer)
    patch(path, MAP_SLOTS[0], b"rot")
    before = path.read_bytes()
    [finding] = repair_and_require(pool, [], clean=False)
    assert finding.kind == "newer-format"
    assert path.read_bytes() == before


# The base


def test_a_clone_without_its_base_is_an_orphan_and_not_repaired(pool: Pool) -> None:
    for file in base_of(pool).iterdir():
        file.unlink()
    base_of(pool).rmdir()
    found = repair_and_require(pool, [], clean=False)
    assert wrong(found) == [("web1", "orphan"), ("web2", "orphan")]
    assert "import the same image again" in found[0].todo


def test_an_orphan_is_linked_to_a_base_of_the_same_content(pool: Pool, tmp_path: Path) -> None:
    expected = content(pool)
    for file in base_of(pool).iterdir():
        file.unlink()
    base_of(pool).rmdir()
    pool.import_base(tmp_path / "debian.img", "debian-again")
    with pytest.raises(BaseChanged):
        content(pool)
    assert "base 'debian-again' has the same content" in check(pool)[0].todo
    repair_and_require(pool, [("web1", "orphan"), ("web2", "orphan")])
    assert content(pool) == expected
    with pytest.raises(NBDCloneError, match="needed by 2 clone"):
        pool.remove(["debian-again"])


def test_an_orphan_with_a_rotten_header_is_linked_too(pool: Pool, tmp_path: Path) -> None:
    expected = content(pool)
    base_of(pool).rename(tmp_path / "gone")
    pool.import_base(tmp_path / "debian.img", "other")
    patch(delta_of(pool), HEADER_SLOTS[0] + 60, b"rot")
    repair_and_require(pool, [("web1", "header-slot"), ("web1", "orphan"), ("web2", "orphan")])
    assert content(pool) == expected


def test_an_orphan_is_not_linked_to_a_base_of_another_content(pool: Pool, tmp_path: Path) -> None:
    base_of(pool).rename(tmp_path / "gone")
    patch(tmp_path / "debian.img", 5000, b"!")
    pool.import_base(tmp_path / "debian.img", "debian")
    assert wrong(repair_and_require(pool, [], clean=False)) == [("web1", "orphan"), ("web2", "orphan")]


def test_a_link_that_was_cut_off_between_the_two_headers_is_finished(pool: Pool, tmp_path: Path) -> None:
    expected = content(pool)
    base_of(pool).rename(tmp_path / "gone")
    other = pool.import_base(tmp_path / "debian.img", "other")
    with open(delta_of(pool), "r+b") as file:
        (offset, new), _ = linked_to(FileSystem(), file.fileno(), bytes.fromhex(other.id), "other")
        os.pwrite(file.fileno(), new, offset)
    assert told(check(pool, "web1")) == [("web1", "header-older")]
    assert content(pool) == expected
    repair_and_require(pool, [("web1", "header-older"), ("web2", "orphan")])


# Disks with errors


class BadSectors(FileSystem):
    """Pages of the file that the disk cannot read until they are written."""

    def __init__(self, *places: int) -> None:
        self.places = set(places)

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:  # type: ignore[override]
        if offset in self.places:
            raise OSError(errno.EIO, "Input/output error")
        return os.preadv(fd, buffers, offset, flags)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:  # type: ignore[override]
        self.places.discard(offset)
        return os.pwrite(fd, data, offset)


@pytest.mark.parametrize("where", ["header B", "map 0 A", "map 1 B"])
def test_a_slot_that_the_disk_cannot_read_is_written_again(tmp_path: Path, where: str) -> None:
    pool = make_pool(tmp_path, "web1")
    fs = BadSectors(PAGES[where])
    kind = "header-slot" if "header" in where else "map-slot"
    assert told(list(check_pool(pool.path, fs=fs))) == [("web1", kind)]
    assert is_clean(list(check_pool(pool.path, fs=fs, repair=True)))
    assert fs.places == set()
    assert check(pool) == []


def test_a_full_disk_leaves_a_repair_undone(pool: Pool) -> None:
    class Full(FileSystem):
        def pwrite(self, fd: int, data: Any, offset: int) -> int:  # type: ignore[override]
            raise OSError(errno.ENOSPC, "No space left on device")

    patch(delta_of(pool), MAP_SLOTS[0] + 40, b"rot")
    before = delta_of(pool).read_bytes()
    found = list(check_pool(pool.path, fs=Full(), repair=True))
    assert told(found) == [("web1", "unreadable")]
    assert "No space left" in str(found[0])
    assert delta_of(pool).read_bytes() == before
    assert os.listdir(delta_of(pool).parent) == ["delta"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path), lambda path: None])
def test_what_is_no_file_is_named_and_not_waited_for(pool: Pool, make: Callable[[Path], None]) -> None:
    delta_of(pool).unlink()
    make(delta_of(pool))
    [finding] = repair_and_require(pool, [], clean=False)
    assert finding.name == "web1"
    assert finding.kind in ("unreadable", "delta-missing")
    with pytest.raises(NBDCloneError):
        pool.open_clone("web1")
    pool.entries()
    pool.remove(["web1"])
