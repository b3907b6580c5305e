"""Flushes with one sync: how many syncs there are, and that no record is believed that must not be."""

from __future__ import annotations

import errno
import logging
import random
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace

import pytest
from mutation import mutate
from powercut import DELTA_PATH, open_clone, read_sectors, simulated_disk
from simulated import SECTOR, File, SimulatedFileSystem

from nbdclone.store.check_delta import Examination
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import (
    EMPTY_PAGE,
    MAP_SLOTS,
    METADATA_SIZE,
    PAGE_SIZE,
    RECORD_SLOTS,
    Header,
    change_header,
    place_of,
    read_header,
)
from nbdclone.store.journal import (
    ENTRY,
    HASH_SIZE,
    MAX_BLOCKS,
    RECORD,
    Journal,
    decode_record,
    encode_record,
    recorded_blocks,
)
from nbdclone.store.layer import BLOCK_SIZE, BLOCKS_PER_SEGMENT, SEGMENT_SIZE
from nbdclone.store.marked import read_from
from nbdclone.store.repair import repair

DELTA_ID = b"I" * 16


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Torn pages are reported, and here there are thousands."""
    caplog.set_level(logging.ERROR, "nbdclone")


@pytest.fixture
def fs() -> SimulatedFileSystem:
    return simulated_disk()


class Syncs:
    """How many syncs there were since the last look."""

    def __init__(self, fs: SimulatedFileSystem) -> None:
        self._count = 0
        fs.on_step = self._step

    def _step(self, what: str) -> None:
        self._count += what == "sync"

    def taken(self) -> int:
        count, self._count = self._count, 0
        return count


def delta_of(fs: SimulatedFileSystem) -> File:
    found = fs.tree.find(DELTA_PATH)
    assert isinstance(found, File)
    return found


def worst(fs: SimulatedFileSystem) -> SimulatedFileSystem:
    """After a power cut that left nothing of what was not synced."""

    class Nothing(random.Random):
        def randrange(self, *arguments: int) -> int:  # type: ignore[override]
            return 0

    return fs.crash(Nothing())


def write(clone: Clone, block: int, byte: bytes = b"x") -> None:
    clone.pwrite(byte * BLOCK_SIZE, block * BLOCK_SIZE)


# How many syncs


def flushes_of(fs: SimulatedFileSystem, count: int, change: Callable[[Clone, int], None]) -> list[int]:
    """The syncs of each change and its flush."""
    with open_clone(fs) as clone:
        syncs = Syncs(fs)
        found = []
        for number in range(count):
            change(clone, number)
            clone.flush()
            found.append(syncs.taken())
        fs.on_step = lambda what: None
    return found


def test_new_blocks_cost_one_sync_each_flush(fs: SimulatedFileSystem) -> None:
    assert flushes_of(fs, 6, write) == [1] * 6


def test_appends_cost_what_they_did_one_sync_more_for_each_block(fs: SimulatedFileSystem) -> None:
    """The second append to a block waits for the map; before, the flush after the first one did."""
    found = flushes_of(fs, 24, lambda clone, number: clone.pwrite(b"a" * SECTOR, number * SECTOR))
    assert found == [1, 2, 1, 1, 1, 1, 1, 1] * 3


def test_a_block_that_is_written_again_and_again_costs_one_sync_more_in_its_life(fs: SimulatedFileSystem) -> None:
    assert flushes_of(fs, 5, lambda clone, number: write(clone, 0, bytes([number + 1]))) == [1, 2, 1, 1, 1]


def test_a_block_that_is_written_again_two_flushes_later_costs_nothing_more(fs: SimulatedFileSystem) -> None:
    def change(clone: Clone, number: int) -> None:
        write(clone, number)
        if number >= 2:
            write(clone, number - 2, b"y")

    assert flushes_of(fs, 5, change) == [1] * 5


def test_a_block_that_is_written_twice_before_the_flush_takes_two_syncs(fs: SimulatedFileSystem) -> None:
    def change(clone: Clone, number: int) -> None:
        write(clone, number)
        write(clone, number, b"y")

    assert flushes_of(fs, 3, change) == [2, 2, 2]


@pytest.mark.parametrize(("count", "syncs"), [(MAX_BLOCKS, 1), (MAX_BLOCKS + 1, 2)])
def test_a_flush_of_many_blocks_takes_two_syncs(fs: SimulatedFileSystem, count: int, syncs: int) -> None:
    with open_clone(fs) as clone:
        clone.pwrite(b"x" * count * BLOCK_SIZE, SEGMENT_SIZE - 40 * BLOCK_SIZE)
        counted = Syncs(fs)
        clone.flush()
        assert counted.taken() == syncs
        clone.flush()
        assert counted.taken() == 0, "a flush after nothing is none"


def test_a_close_leaves_no_record_and_the_next_opening_no_sync(fs: SimulatedFileSystem) -> None:
    with open_clone(fs) as clone:
        write(clone, 0)
        clone.flush()
        assert delta_of(fs).read(RECORD_SLOTS[0], PAGE_SIZE) != EMPTY_PAGE
    for slot in RECORD_SLOTS:
        assert delta_of(fs).read(slot, PAGE_SIZE) == EMPTY_PAGE
    syncs = Syncs(fs)
    with open_clone(fs) as clone:
        write(clone, 1)
        assert syncs.taken() == 0


def test_a_delta_that_was_made_without_a_journal_goes_on_without(fs: SimulatedFileSystem) -> None:
    change_header(DELTA_PATH, fs, features=0)
    assert flushes_of(fs, 3, write) == [2, 2, 2]
    for slot in RECORD_SLOTS:
        assert delta_of(fs).read(slot, PAGE_SIZE) == EMPTY_PAGE
    fd = fs.open(DELTA_PATH, 0)
    assert read_header(fd, "", fs).features == 0


def test_where_a_record_cannot_be_written_the_flush_takes_two_syncs(fs: SimulatedFileSystem) -> None:
    with open_clone(fs) as clone:
        write(clone, 0)
        delta_of(fs).allocated -= {slot // PAGE_SIZE for slot in RECORD_SLOTS}  # a copy that left out its zeros
        fs.capacity = fs.used()
        syncs = Syncs(fs)
        clone.flush()
        assert syncs.taken() == 2
        assert open_clone(worst(fs)).pread(1, 0) == b"x"


# Changes of blocks that rely on a record


@pytest.fixture
def relying(fs: SimulatedFileSystem) -> Clone:
    """A clone whose block 0 a record alone tells of."""
    clone = open_clone(fs)
    write(clone, 0)
    clone.flush()
    assert all(delta_of(fs).read(slot, PAGE_SIZE) == EMPTY_PAGE for slot in MAP_SLOTS)
    return clone


@pytest.mark.parametrize("change", ["whole", "part", "row", "zero", "allocated zeros"])
def test_it_is_in_the_map_before_it_is_changed(fs: SimulatedFileSystem, relying: Clone, change: str) -> None:
    seen: list[str] = []

    def look(what: str) -> None:
        seen.append(what)
        for seed in range(5):
            assert open_clone(fs.crash(random.Random(seed))).pread(1, BLOCK_SIZE - 1) == b"x"

    fs.on_step = look
    if change == "whole":
        relying.pwrite(b"y" * 100 + b"x" * (BLOCK_SIZE - 100), 0)
    elif change == "part":
        relying.pwrite(b"y", 5)
    elif change == "row":
        relying.pwrite(b"x" * 4 * BLOCK_SIZE, 0)
    else:
        fs.on_step = seen.append
        relying.zero(0, BLOCK_SIZE, allocate=change != "zero")
    assert seen[:2] == ["write", "sync"]
    assert seen.count("sync") == 1


def test_a_change_that_must_not_wait_is_left_to_a_thread(relying: Clone) -> None:
    for length, offset in ((BLOCK_SIZE, 0), (5, 100), (2 * BLOCK_SIZE, 0)):
        with pytest.raises(BlockingIOError):
            relying.write_nowait(memoryview(b"y" * length), offset)
    relying.write_nowait(memoryview(b"y" * BLOCK_SIZE), BLOCK_SIZE)
    assert relying.pread(1, 0) == b"x"
    relying.pwrite(b"y", 0)
    relying.write_nowait(memoryview(b"z" * BLOCK_SIZE), 0)


def test_a_change_waits_for_the_flush_that_is_under_way_and_then_for_none(fs: SimulatedFileSystem) -> None:
    """The flush makes the block solid, which the change waits for: it takes no sync of its own."""
    clone = open_clone(fs)
    write(clone, 0)
    clone.flush()
    write(clone, 1)
    syncing, go_on = threading.Event(), threading.Event()
    syncs = 0

    def step(what: str) -> None:
        nonlocal syncs
        if what == "sync":
            syncs += 1
            syncing.set()
            assert go_on.wait(20)

    fs.on_step = step
    flush = threading.Thread(target=clone.flush)
    flush.start()
    assert syncing.wait(20)
    change = threading.Thread(target=write, args=(clone, 0, b"y"))
    change.start()
    change.join(0.05)
    assert change.is_alive()
    go_on.set()
    flush.join()
    change.join()
    assert syncs == 1
    assert clone.pread(1, 0) == b"y"


def test_a_change_while_the_record_is_synced_goes_on_and_the_flush_takes_two(fs: SimulatedFileSystem) -> None:
    clone = open_clone(fs)
    write(clone, 0)
    syncs = 0

    def step(what: str) -> None:
        nonlocal syncs
        syncs += what == "sync"
        if what == "sync" and syncs == 1:
            clone.write_nowait(memoryview(b"y" * BLOCK_SIZE), 0)

    fs.on_step = step
    clone.flush()
    assert syncs == 2
    fs.on_step = lambda what: None
    assert open_clone(worst(fs)).pread(1, 0) in (b"x", b"y")


# After a crash


def test_a_clone_that_crashed_is_read_at_once_and_put_in_order_before_it_is_changed(
    fs: SimulatedFileSystem, relying: Clone
) -> None:
    after = worst(fs)
    syncs = Syncs(after)
    with open_clone(after) as clone:
        assert clone.pread(1, 0) == b"x"
        assert syncs.taken() == 0
        with pytest.raises(BlockingIOError):
            clone.write_nowait(memoryview(b"y" * BLOCK_SIZE), BLOCK_SIZE)
        write(clone, 1)
        assert syncs.taken() == 3
        assert all(delta_of(after).read(slot, PAGE_SIZE) == EMPTY_PAGE for slot in RECORD_SLOTS)
        clone.write_nowait(memoryview(b"z" * BLOCK_SIZE), 0)


def test_marks_of_a_killed_process_are_in_the_map_before_a_flush_relies_on_a_record(fs: SimulatedFileSystem) -> None:
    write(open_clone(fs), 0)
    fs.die()
    clone = open_clone(fs)
    write(clone, 1, b"y")
    clone.flush()
    after = open_clone(worst(fs))
    assert after.pread(1, 0) == b"x"
    assert after.pread(1, BLOCK_SIZE) == b"y"


def test_the_same_is_noticed_if_they_are_put_off(fs: SimulatedFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, Delta, "_merge", "self._young.lose_count()", "pass")
    with pytest.raises(AssertionError):
        test_marks_of_a_killed_process_are_in_the_map_before_a_flush_relies_on_a_record(fs)


def given_up(fs: SimulatedFileSystem) -> None:
    """A power cut left a record and all but the last sector of its block, which is read from below since.

    Then the block is written again, with another first sector and the same last one, and the power is cut again.
    """
    rest = b"2" * (BLOCK_SIZE - SECTOR)
    delta = delta_of(fs)
    delta.write(METADATA_SIZE, b"1" * SECTOR + rest)
    fd = fs.open(DELTA_PATH, 0)
    Journal(fd, DELTA_ID, fs).write([0])
    delta.write(METADATA_SIZE + BLOCK_SIZE - SECTOR, bytes(SECTOR))
    fs.close(fd)
    fs.tree.make_durable()
    clone = open_clone(fs)
    below = clone.pread(SECTOR, 0)
    write(clone, 1)  # whatever comes first
    clone.pwrite(b"3" * SECTOR + rest, 0)
    rng = random.Random(0)
    for _ in range(400):
        assert open_clone(fs.crash(rng)).pread(SECTOR, 0) in (below, b"3" * SECTOR)


def test_a_block_that_was_given_up_does_not_come_together_with_a_later_write(fs: SimulatedFileSystem) -> None:
    given_up(fs)


def test_it_is_noticed_if_records_are_not_wiped(fs: SimulatedFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, Delta, "_recover", "        self._journal.wipe()\n", "")
    with pytest.raises(AssertionError):
        given_up(fs)


def test_it_is_noticed_if_the_wiping_is_not_synced(fs: SimulatedFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, Delta, "_recover", "self._journal.wipe()\n        self._sync()\n", "self._journal.wipe()\n")
    with pytest.raises(AssertionError):
        given_up(fs)


def test_power_cuts_while_a_crash_is_put_in_order_change_nothing(fs: SimulatedFileSystem, relying: Clone) -> None:
    """Three deep: at each step of the recovery of each state that a cut left."""
    write(relying, SEGMENT_SIZE // BLOCK_SIZE, b"s")
    relying.flush()
    expected = read_sectors(relying)
    rng = random.Random(0)
    states = 0

    def recover(fs: SimulatedFileSystem, depth: int) -> None:
        nonlocal states
        assert read_sectors(open_clone(fs)) == expected
        states += 1
        fs.die()
        if depth:

            def look(what: str) -> None:
                for _ in range(4):
                    recover(fs.crash(rng), depth - 1)

            fs.on_step = look
            clone = open_clone(fs)
            clone._writable().begin_changes(nowait=False)
            fs.on_step = lambda what: None
            assert read_sectors(clone) == expected

    for _ in range(3):
        recover(fs.crash(rng), 2)
    print(f"states: {states}")  # pytest -rP shows it
    assert states > 500


def test_a_full_disk_leaves_a_clone_that_crashed_readable(fs: SimulatedFileSystem, relying: Clone) -> None:
    after = worst(fs)
    clone = open_clone(after)
    after.on_step = lambda what: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")) if what == "write" else None
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            write(clone, 1)
        assert clone.pread(1, 0) == b"x"
    after.on_step = lambda what: None
    write(clone, 1)
    clone.close()


# Records


def test_a_record_is_read_as_it_was_written_and_nowhere_else() -> None:
    rng = random.Random(0)
    for count in (0, 1, MAX_BLOCKS, (PAGE_SIZE - RECORD.size) // ENTRY.size):
        entries = [(rng.randrange(1 << 32), rng.randbytes(HASH_SIZE)) for _ in range(count)]
        page = encode_record(DELTA_ID, entries)
        assert len(page) == PAGE_SIZE
        assert decode_record(page, DELTA_ID) == entries
        assert decode_record(page, b"J" * 16) is None
    assert decode_record(EMPTY_PAGE, DELTA_ID) is None


def test_every_flipped_bit_of_a_record_is_seen(fs: SimulatedFileSystem, relying: Clone) -> None:
    page = delta_of(fs).read(RECORD_SLOTS[0], PAGE_SIZE)
    assert decode_record(page, DELTA_ID)
    for bit in range(PAGE_SIZE * 8):
        flipped = bytearray(page)
        flipped[bit // 8] ^= 0x80 >> bit % 8
        assert decode_record(bytes(flipped), DELTA_ID) is None


def test_every_flipped_bit_of_a_block_keeps_it_from_being_believed(fs: SimulatedFileSystem, relying: Clone) -> None:
    fd = fs.open(DELTA_PATH, 0)
    header = read_header(fd, "", fs)
    delta = delta_of(fs)
    assert list(recorded_blocks(fs, fd, header)) == [0]
    for bit in range(0, BLOCK_SIZE * 8, 7):
        byte = delta.read(place_of(0) + bit // 8, 1)[0]
        delta.write(place_of(0) + bit // 8, bytes([byte ^ 0x80 >> bit % 8]))
        assert list(recorded_blocks(fs, fd, header)) == []
        delta.write(place_of(0) + bit // 8, bytes([byte]))
    assert list(recorded_blocks(fs, fd, replace(header, features=0))) == []


@pytest.mark.parametrize("count", [(PAGE_SIZE - RECORD.size) // ENTRY.size + 1, 1 << 63])
def test_a_record_of_too_many_blocks_is_none(count: int) -> None:
    page = encode_record(DELTA_ID, [])
    rest = DELTA_ID[:8] + count.to_bytes(8, "big") + page[RECORD.size :]
    assert decode_record(page[:4] + zlib.crc32(rest).to_bytes(4, "big") + rest, DELTA_ID) is None


def test_blocks_beyond_the_end_of_the_disk_mean_nothing(fs: SimulatedFileSystem) -> None:
    delta_of(fs).write(RECORD_SLOTS[1], encode_record(DELTA_ID, [(1 << 40, bytes(16)), (1 << 63, bytes(16))]))
    with open_clone(fs) as clone:
        assert clone._writable()._map.dirty == set()
        write(clone, 0)


# Check


def test_a_check_tells_of_records_and_leaves_them(fs: SimulatedFileSystem, relying: Clone) -> None:
    write(relying, 3)
    write(relying, BLOCKS_PER_SEGMENT)
    relying.flush()
    expected = read_sectors(relying)
    after = worst(fs)
    fd = after.open(DELTA_PATH, 0)
    for _ in range(2):
        problems = Examination(after, fd, DELTA_PATH, "web1").problems
        [told] = [problem.finding for problem in problems if problem.finding.kind == "records"]
        assert "2 blocks" in told.what
        assert told.ranges == ((3 * BLOCK_SIZE, BLOCK_SIZE), (SEGMENT_SIZE, BLOCK_SIZE))
        assert all(problem.finding.level == "note" for problem in problems), problems
        repair(after, fd, DELTA_PATH, problems)
        assert read_sectors(open_clone(after)) == expected
        after.die()
        fd = after.open(DELTA_PATH, 0)
    open_clone(after).close()
    assert Examination(after, after.open(DELTA_PATH, 0), DELTA_PATH, "web1").problems == []


def test_what_a_record_tells_of_is_not_read_from_below(fs: SimulatedFileSystem, relying: Clone) -> None:
    after = worst(fs)
    fd = after.open(DELTA_PATH, 0)
    header: Header = read_header(fd, "", after)
    assert read_from(after, [(fd, header)], 1, [(0, 2 * BLOCK_SIZE)]) == BLOCK_SIZE
