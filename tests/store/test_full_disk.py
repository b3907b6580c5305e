"""Law 8: a full disk fails the writes that need space, and nothing else; on a simulated disk, with power cuts.

``POWERCUT_CAMPAIGNS=5000 pytest tests/store/test_full_disk.py`` runs longer; ``POWERCUT_SEED`` begins elsewhere.
"""

from __future__ import annotations

import errno
import logging
import os
import random

import pytest
from mutation import mutate
from powercut import BASE_SIZE, DELTA_PATH, SIZE, Campaign, LawBroken, open_clone, simulated_disk, stamp
from simulated import PAGE, SECTOR, File, SimulatedFileSystem, pages

from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import MAP_SLOTS, METADATA_SIZE, SEGMENT_SPAN
from nbdclone.store.layer import BLOCK_SIZE, BLOCKS_PER_SEGMENT, SEGMENT_SIZE
from nbdclone.store.live import MARKS_AT

CAMPAIGNS = int(os.environ.get("POWERCUT_CAMPAIGNS", "60"))
FIRST_SEED = int(os.environ.get("POWERCUT_SEED", "0"))
# Two pages of headers, four of maps, and the blocks of the disk that the campaigns use.
ALL_PAGES = 2 + 4 + 6 + 9


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Torn pages are reported, and here there are thousands."""
    caplog.set_level(logging.ERROR, "nbdclone")


def delta_of(fs: SimulatedFileSystem) -> File:
    file = fs.tree.find(DELTA_PATH)
    assert isinstance(file, File)
    return file


def places(offset: int, length: int) -> set[int]:
    """The pages of the delta that a write of this range needs: its blocks', and its segments' maps'."""
    needed = set()
    for block in range(offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE)):
        segment = block // BLOCKS_PER_SEGMENT
        needed |= pages(block * BLOCK_SIZE + (segment + 1) * METADATA_SIZE, BLOCK_SIZE)
        for slot in MAP_SLOTS:
            needed |= pages(segment * SEGMENT_SPAN + slot, PAGE)
    return needed


class FullDisk(Campaign):
    """A life on a disk with hardly any space, of which others take some, and give some back."""

    _others = 0  # it is to be known which one is refused

    def __init__(self, seed: int, *, states_per_step: int = 2) -> None:
        super().__init__(seed, states_per_step=states_per_step, errors=False)
        self.refused = 0
        self.went_on = 0

    def _operate(self) -> None:
        if self._fs.capacity is None or self._rng.random() < 0.2:
            self._fs.capacity = self._rng.randrange(2, ALL_PAGES + 2)
        super()._operate()

    def _send(self, offset: int, data: bytes, *, zero: bool, allocate: bool = False) -> None:
        has_its_space = places(offset, len(data)) <= delta_of(self._fs).allocated and self._has_marks(offset, len(data))
        try:
            super()._send(offset, data, zero=zero, allocate=allocate)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT) and has_its_space:
                raise LawBroken(f"a write of {len(data)} bytes at {offset} needs no space, and is refused") from error
            self.refused += 1
            raise
        assert self._fs.capacity is not None
        self.went_on += self._fs.used() >= self._fs.capacity

    def _has_marks(self, offset: int, length: int) -> bool:
        """Are these blocks marked, or is there space to note that they will be?"""
        live = self._fs.tree.root.entries.get("live")
        noted = live.allocated if isinstance(live, File) else set()
        for block in range(offset // BLOCK_SIZE, -(-(offset + length) // BLOCK_SIZE)):
            segment, within = divmod(block, BLOCKS_PER_SEGMENT)
            # One page holds all the marks that there are here.
            if (
                MARKS_AT // PAGE not in noted
                and self._clone._owners_of(self._clone._chain, segment, False)[within] != self._clone._top
            ):
                return False
        return True

    def _flush(self) -> None:
        try:
            super()._flush()
        except OSError as error:
            raise LawBroken(f"what was acknowledged cannot be flushed: {error}") from error

    def _close(self) -> None:
        try:
            self._clone.close()
        except OSError as error:
            raise LawBroken(f"what was acknowledged cannot be flushed by a close: {error}") from error
        self._examine()


def run_campaigns(count: int) -> tuple[int, int, int]:
    states, refused, went_on = 0, 0, 0
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        campaign = FullDisk(seed)
        campaign.run(operations=20)
        states, refused, went_on = (
            states + campaign.states,
            refused + campaign.refused,
            went_on + campaign.went_on,
        )
    return states, refused, went_on


@pytest.mark.timeout(120 + CAMPAIGNS)
def test_a_power_cut_on_a_full_disk_leaves_each_sector_old_or_new_and_no_flush_lacks_space() -> None:
    states, refused, went_on = run_campaigns(CAMPAIGNS)
    print(f"states: {states}, refused for want of space: {refused}, done on a full disk: {went_on}")
    assert states > 100 * CAMPAIGNS
    assert refused > 5 * CAMPAIGNS
    assert went_on > 5 * CAMPAIGNS


MUTATIONS = {
    "the map has no space of its own": (Delta, "reserve", "if not state.reserved:", "if False:"),
    "one slot of the map has no space": (Delta, "reserve", "in MAP_SLOTS:", "in MAP_SLOTS[:1]:"),
    "what got in of a write that failed is not said": (
        Clone,
        "_store",
        "        finally:  # also when it failed: in blocks that were ours already, some of it may be read from "
        "now on\n            delta.touched()\n",
        "        except ZeroDivisionError:\n            pass\n        else:\n            delta.touched()\n",
    ),
    "what got in of a write that failed is taken": (
        Clone,
        "_store_rest",
        "            self._give_back(segment,",
        "            self._take(segment, within >> BLOCK_SHIFT, (within + len(view)) >> BLOCK_SHIFT)\n"
        "            self._give_back(segment,",
    ),
    "what was ours is given back": (Clone, "_give_back", "if run[0][0] != self._top:", "if True:"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_it_is_noticed_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *MUTATIONS[name])
    with pytest.raises(LawBroken, match="seed"):
        run_campaigns(300)


# One by one


@pytest.fixture
def fs() -> SimulatedFileSystem:
    return simulated_disk()


def room(fs: SimulatedFileSystem, blocks: int) -> None:
    """So many pages are left."""
    fs.capacity = fs.used() + blocks


def test_a_write_that_does_not_fit_gives_back_what_it_had_taken(fs: SimulatedFileSystem) -> None:
    with open_clone(fs) as clone:
        clone.pwrite(b"x" * BLOCK_SIZE, 2 * BLOCK_SIZE)
        before = clone.pread(6 * BLOCK_SIZE, 0)
        room(fs, 3)
        used = fs.used()
        with pytest.raises(OSError, match="no space"):
            clone.pwrite(b"y" * (6 * BLOCK_SIZE), 0)
        after = clone.pread(6 * BLOCK_SIZE, 0)
        ours = slice(2 * BLOCK_SIZE, 3 * BLOCK_SIZE)
        assert after[ours] in (before[ours], b"y" * BLOCK_SIZE)
        assert after[: ours.start] + after[ours.stop :] == before[: ours.start] + before[ours.stop :]
        assert fs.used() == used
        clone.pwrite(b"z" * (3 * BLOCK_SIZE), 3 * BLOCK_SIZE)


def test_without_waiting_it_is_left_to_a_thread(fs: SimulatedFileSystem) -> None:
    with open_clone(fs) as clone:
        room(fs, 6)
        fs.rng = random.Random(0)  # the write is cut short, not refused
        with pytest.raises(BlockingIOError):
            clone.write_nowait(memoryview(b"y" * (6 * BLOCK_SIZE)), 0)
        with pytest.raises(OSError, match="no space"):
            clone.write(memoryview(b"y" * (6 * BLOCK_SIZE)), 0)


def test_zeros_that_are_to_have_their_space_and_find_none_give_back_what_they_had_taken(
    fs: SimulatedFileSystem,
) -> None:
    with open_clone(fs) as clone:
        clone.pwrite(b"x" * BLOCK_SIZE, 2 * BLOCK_SIZE)
        room(fs, 2)
        used = fs.used()
        with pytest.raises(OSError, match="no space"):
            clone.zero(0, 6 * BLOCK_SIZE, allocate=True)
        assert fs.used() == used
        assert clone.pread(SECTOR, 0) == stamp(0, 0)
        assert clone.pread(2, 2 * BLOCK_SIZE) in (b"xx", bytes(2))


def test_a_trim_whose_map_has_no_space_finds_it_in_what_it_gives_back(fs: SimulatedFileSystem) -> None:
    with open_clone(fs) as clone:
        clone.pwrite(b"x" * (4 * BLOCK_SIZE), SEGMENT_SIZE)
        clone.flush()
        room(fs, 0)
        clone.zero(0, SIZE)  # the first segment's map is new, and only the second has something to give
        assert clone.pread(BLOCK_SIZE, 0) == clone.pread(BLOCK_SIZE, SEGMENT_SIZE) == bytes(BLOCK_SIZE)
        clone.flush()
    after = open_clone(fs.crash(random.Random(0)))
    assert after.pread(BLOCK_SIZE, 0) == after.pread(BLOCK_SIZE, BASE_SIZE - BLOCK_SIZE) == bytes(BLOCK_SIZE)


def test_a_trim_that_finds_no_space_at_all_says_so(fs: SimulatedFileSystem) -> None:
    with open_clone(fs) as clone:
        room(fs, 1)
        with pytest.raises(OSError, match="no space"):
            clone.zero(0, SIZE)
        room(fs, 7)
        clone.zero(0, SIZE)
        assert clone.pread(SIZE - SEGMENT_SIZE, SEGMENT_SIZE) == bytes(SIZE - SEGMENT_SIZE)


@pytest.mark.parametrize("change", ["whole", "part", "hole of ours", "part of a hole of ours"])
def test_every_kind_of_write_goes_on_when_there_is_space_again(fs: SimulatedFileSystem, change: str) -> None:
    offset, length = (0, BLOCK_SIZE) if change in ("whole", "hole of ours") else (700, 900)
    with open_clone(fs) as clone:
        clone.pwrite(b"x" * BLOCK_SIZE, 4 * BLOCK_SIZE)
        if change.endswith("ours"):
            clone.zero(0, BLOCK_SIZE)
        before = clone.pread(BLOCK_SIZE, 0)
        room(fs, 0)
        for _ in range(2):
            with pytest.raises(OSError, match="no space"):
                clone.pwrite(b"y" * length, offset)
            assert clone.pread(BLOCK_SIZE, 0) == before
        clone.pwrite(b"w" * 100, 4 * BLOCK_SIZE + 5)
        clone.zero(4 * BLOCK_SIZE, BLOCK_SIZE)
        clone.pwrite(b"y" * length, offset)
        clone.flush()
    after = open_clone(fs.crash(random.Random(0)))
    assert after.pread(BLOCK_SIZE, 0) == before[:offset] + b"y" * length + before[offset + length :]
