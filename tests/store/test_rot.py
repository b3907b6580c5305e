"""A delta whose metadata is torn or rotten: each flipped bit is noticed, or does no harm."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from powercut import DELTA_PATH, open_clone, read_sectors, simulated_disk
from simulated import File, SimulatedFileSystem

from nbdclone import Pool
from nbdclone.errors import CorruptDelta
from nbdclone.store.delta_file import (
    HEADER_SLOTS,
    MAP_SLOTS,
    PAGE_SIZE,
    SEGMENT_SPAN,
    Header,
    decode_map_page,
    encode_map_page,
)
from nbdclone.store.layer import (
    BITMAP_SIZE,
    BLOCK_SIZE,
    SEGMENT_SIZE,
)


def flipped(page: bytes, bit: int) -> bytes:
    changed = bytearray(page)
    changed[bit // 8] ^= 0x80 >> bit % 8
    return bytes(changed)


def test_every_flipped_bit_of_a_header_or_map_page_is_seen() -> None:
    header = Header(b"i" * 16, b"p" * 16, b"f" * 32, 1 << 20, 0, "debian").encode()
    mapped = encode_map_page(3, 5, b"i" * 16, os.urandom(BITMAP_SIZE))
    for bit in range(PAGE_SIZE * 8):
        with pytest.raises(CorruptDelta):
            Header.decode(flipped(header, bit), "delta")
        assert decode_map_page(flipped(mapped, bit), 3, b"i" * 16) is None


def closed_cleanly() -> tuple[SimulatedFileSystem, dict[int, bytes], File]:
    """A clone with blocks in two segments, closed; what it reads as; and its delta's file."""
    fs = simulated_disk()
    with open_clone(fs) as clone:
        clone.pwrite(b"one" * 1000, 100)
        clone.flush()
        clone.pwrite(b"two" * 3000, SEGMENT_SIZE - 4000)
        expected = read_sectors(clone)
    delta = fs.tree.find(DELTA_PATH)
    assert isinstance(delta, File)
    return fs, expected, delta


PAGES = [*HEADER_SLOTS, *(segment * SEGMENT_SPAN + slot for segment in (0, 1) for slot in MAP_SLOTS)]


def test_every_flipped_bit_of_the_metadata_is_noticed_or_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    """All bits where something is written, one in 37 of the padding, all of it with FLIP_ALL=1.

    At rest either slot is enough. That the page alone notices each flip is shown above.
    """
    caplog.set_level(logging.ERROR, "nbdclone")
    fs, expected, delta = closed_cleanly()
    flips = 0
    for page in PAGES:
        content = delta.read(page, PAGE_SIZE)
        dense = {bit for bit in range(PAGE_SIZE * 8) if content[bit // 8] or os.environ.get("FLIP_ALL")}
        for bit in sorted(dense | set(range(0, PAGE_SIZE * 8, 37))):
            kept = dict(delta.cached)
            delta.write(page, flipped(content, bit))
            clone = open_clone(fs)
            assert read_sectors(clone) == expected, (page, bit)
            if page not in HEADER_SLOTS:
                assert len(clone._writable().damaged_pages) == 1, (page, bit)
            fs.die()
            delta.cached = kept
            flips += 1
    print(f"flips: {flips}")  # pytest -rP shows it
    assert flips > 6_000


@pytest.mark.parametrize("slots", [HEADER_SLOTS, MAP_SLOTS], ids=["header", "map"])
def test_a_delta_that_lost_both_of_its_slots_is_refused(slots: tuple[int, int]) -> None:
    fs, _, delta = closed_cleanly()
    for slot in slots:
        delta.write(slot + 100, b"rot")
    with pytest.raises(CorruptDelta, match=r"/delta: .*checksum"):
        read_sectors(open_clone(fs))


def test_the_other_segments_of_a_delta_that_lost_a_map_page_can_still_be_read() -> None:
    fs, expected, delta = closed_cleanly()
    for slot in MAP_SLOTS:
        delta.write(slot + 100, b"rot")
    clone = open_clone(fs)
    assert clone.pread(512, SEGMENT_SIZE) == expected[SEGMENT_SIZE // 512]


def test_a_torn_page_shows_the_old_map_or_the_new_one() -> None:
    """Any of the 256 subsets of the eight sectors of the page that was being written, over what stood there before."""
    fs = simulated_disk()
    with open_clone(fs) as clone:
        for block in range(3):
            clone.pwrite(bytes([1 + block]) * BLOCK_SIZE, block * BLOCK_SIZE)
            clone.flush()
        old = read_sectors(clone)
    delta = fs.tree.find(DELTA_PATH)
    assert isinstance(delta, File)
    before = dict(delta.cached)
    with open_clone(fs) as clone:
        clone.pwrite(b"n" * BLOCK_SIZE, 3 * BLOCK_SIZE)
        new = read_sectors(clone)
        clone._writable()._young.lose_count()  # or the flush would put the page off
        clone.flush()
        page = next(
            slot // 512
            for slot in MAP_SLOTS
            if delta.read(slot, PAGE_SIZE) != b"".join(before[slot // 512 + at] for at in range(8))
        )
    after = dict(delta.cached)
    seen = {"old": 0, "new": 0}
    for subset in range(256):
        delta.cached = after | before  # the one slot as it was, the block written
        delta.cached |= {page + at: after[page + at] for at in range(8) if subset >> at & 1}
        found = read_sectors(open_clone(fs))
        assert found in (old, new)
        seen["new" if found == new else "old"] += 1
        fs.die()
    # The page differs in its first sector only: its checksum, its sequence, and the bits of the first blocks.
    assert seen == {"old": 128, "new": 128}


@pytest.mark.parametrize("slot", [*HEADER_SLOTS, *MAP_SLOTS])
def test_a_slot_that_rotted_is_whole_again_after_the_next_close(slot: int) -> None:
    fs, expected, delta = closed_cleanly()
    before = delta.read(slot, PAGE_SIZE)
    delta.write(slot + 40, b"rot")
    with open_clone(fs) as clone:
        assert read_sectors(clone) == expected
    assert delta.read(slot, PAGE_SIZE) == before
    for other in (*HEADER_SLOTS, *MAP_SLOTS):
        if other != slot:
            delta.write(other + 40, b"rot")
            assert read_sectors(open_clone(fs)) == expected
            fs.die()
            break


def test_a_page_that_rots_while_the_clone_is_open_is_not_copied_over_the_good_one(tmp_path: Path) -> None:
    with open(tmp_path / "image", "wb") as image:
        image.truncate(2 * SEGMENT_SIZE)
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "image", "base")
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1") as clone:
        for block in range(3):  # the third leaves the older page in the other slot
            clone.pwrite(b"x" * BLOCK_SIZE, block * BLOCK_SIZE)
            clone.flush()
        with open(pool.path / "clones" / "web1" / "delta", "r+b") as file:
            pages = {slot: os.pread(file.fileno(), PAGE_SIZE, slot) for slot in MAP_SLOTS}
            newest = max(MAP_SLOTS, key=lambda slot: pages[slot][16:24])
            os.pwrite(file.fileno(), b"rotten!!", newest + 100)
        clone.pwrite(b"y" * BLOCK_SIZE, SEGMENT_SIZE)
        clone.flush()  # the first segment is quiet now: its page is due to be copied
    with pool.open_clone("web1") as clone:
        for block in range(3):
            assert clone.pread(BLOCK_SIZE, block * BLOCK_SIZE) == b"x" * BLOCK_SIZE
        assert clone.pread(1, SEGMENT_SIZE) == b"y"


def test_a_damaged_segment_is_said_once_however_often_it_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "image").write_bytes(bytes(1 << 20))
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "image", "base")
    pool.create_clones("base", ["web1"])
    with open(pool.path / "clones" / "web1" / "delta", "r+b") as file:
        for slot in MAP_SLOTS:
            os.pwrite(file.fileno(), b"nonsense", slot)
    with pool.open_clone("web1") as clone:
        for _ in range(5):
            with pytest.raises(CorruptDelta):
                clone.pread(1, 0)
    assert len(caplog.records) == len(MAP_SLOTS)
