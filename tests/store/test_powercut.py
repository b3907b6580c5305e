"""Laws 3 and 4: power cuts at every step of a clone's life, by the ten thousand, in seeded campaigns.

``POWERCUT_CAMPAIGNS=5000 pytest tests/store/test_powercut.py`` runs longer; ``POWERCUT_SEED`` begins elsewhere.
"""

from __future__ import annotations

import logging
import os
import random
from typing import NamedTuple

import pytest
from mutation import mutate
from powercut import DELTA_PATH, Campaign, LawBroken, open_clone, simulated_disk
from simulated import SECTOR

from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import MAP_SLOTS, METADATA_SIZE, encode_map_page
from nbdclone.store.layer import BITMAP_SIZE, BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.live import LiveMap


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Torn pages are reported, and here there are thousands."""
    caplog.set_level(logging.ERROR, "nbdclone")


CAMPAIGNS = int(os.environ.get("POWERCUT_CAMPAIGNS", "60"))
FIRST_SEED = int(os.environ.get("POWERCUT_SEED", "0"))


@pytest.mark.timeout(120 + CAMPAIGNS)
@pytest.mark.parametrize("errors", [False, True], ids=["sound disk", "disk with errors"])
def test_a_power_cut_at_any_step_leaves_each_sector_old_or_new(errors: bool) -> None:
    states = 0
    for seed in range(FIRST_SEED, FIRST_SEED + CAMPAIGNS):
        campaign = Campaign(seed, errors=errors)
        campaign.run()
        states += campaign.states
    print(f"states: {states}")  # pytest -rP shows it
    assert states > 100 * CAMPAIGNS


def test_a_campaign_is_the_same_each_time_for_its_seed() -> None:
    first, second = Campaign(7), Campaign(7)
    first.run()
    second.run()
    assert first.states == second.states > 0


def run_campaigns(count: int) -> None:
    for seed in range(count):
        Campaign(seed, states_per_step=2).run()


class Mutation(NamedTuple):
    owner: type
    method: str
    old: str
    new: str


FIRST_SYNC = """                self._sync()
                for segment in wiped:
"""
SECOND_SYNC = """which an earlier sync made durable. Both point only at data that is.
                    self._sync()
"""
STORED = """so when it failed: in blocks that were ours already, some of it may be read from now on
            delta.touched()
"""
MUTATIONS = {
    "the data sync is left out": Mutation(Delta, "flush", FIRST_SYNC, "                for segment in wiped:\n"),
    "the map is written before the data sync": Mutation(
        Delta,
        "flush",
        FIRST_SYNC,
        "                self._write_pages(noted)\n                self._sync()\n"
        "                for segment in wiped:\n",
    ),
    "the map is noted after the data sync": Mutation(
        Delta,
        "flush",
        FIRST_SYNC,
        "                self._sync()\n"
        "                noted = {segment: bytes(self._segments[segment].bitmap) for segment in noted}\n"
        "                for segment in wiped:\n",
    ),
    "the second sync is left out": Mutation(Delta, "flush", SECOND_SYNC, "\n"),
    "the copies are made before the second sync": Mutation(
        Delta,
        "flush",
        SECOND_SYNC,
        "\n                    self._mirror(set(noted))\n                    self._sync()\n",
    ),
    "the map goes to the same slot each time": Mutation(
        Delta, "_write_pages", "MAP_SLOTS[1 - state.slot]", "MAP_SLOTS[0]"
    ),
    "the newest page is written over": Mutation(Delta, "_settle", "state.slot = 1 - state.slot", "pass"),
    "the older page is believed": Mutation(Delta, "_read_map", "max(valid)", "min(valid)"),
    "a new delta takes its file for synced": Mutation(
        Delta, "__init__", "self._unsynced = True", "self._unsynced = False"
    ),
    "a flush that failed forgets its blocks": Mutation(
        Delta, "flush", "self._dirty |= noted.keys()\n", "pass\n"
    ),
    "a failed sync is tried again": Mutation(Delta, "require_sound", "if self._failure:", "if False:"),
    "what a failed sync lost stays in the cache": Mutation(
        Delta, "close", "if self._failure:", "self._live.discard()\n        if False:"
    ),
    "blocks are marked before they are written": Mutation(
        Clone,
        "_store",
        "            written = self._pwrite(",
        "            self._take(segment, first, first + count)\n            written = self._pwrite(",
    ),
    "touched is said before the write": Mutation(
        Clone,
        "_store",
        "            written = self._pwrite(",
        "            delta.touched = lambda: None\n            Delta.touched(delta)\n"
        "            written = self._pwrite(",
    ),
    "touched is not said": Mutation(Clone, "_store", STORED, STORED.replace("delta.touched()", "pass")),
    "a part of a block that is written is not said": Mutation(
        Clone, "_write_partial", "                delta.touched()\n", "                pass\n"
    ),
    "a hole is not said": Mutation(Clone, "_zero_blocks", "delta.touched()", "pass"),
    "a block that is not ours is not cleared": Mutation(
        Clone, "_zero_blocks", "clear(delta.fd,", "owners[first] == self._top and clear(delta.fd,"
    ),
    "marks are not noted as they are made": Mutation(Delta, "mark", "self._live.note(", "(lambda *_: None)("),
    "marks that were inherited are not flushed": Mutation(Delta, "_merge", "self._dirty.add(segment)", "pass"),
    "marks are believed after a power cut": Mutation(
        LiveMap, "inherit", " or not self._fs.stayed_in_memory(self._delta_fd)", ""
    ),
    "a failed sync is not noted": Mutation(Delta, "_sync", "self._live.note_failure()", "pass"),
    "the cache of before a failed sync is kept": Mutation(LiveMap, "inherit", "if known and failed:", "if False:"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_power_cuts_notice_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *MUTATIONS[name])
    with pytest.raises(LawBroken, match="seed"):
        run_campaigns(300)


def test_the_power_cuts_notice_when_a_checksum_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdclone.store.delta.zlib.crc32", lambda data: 0)
    with pytest.raises(LawBroken, match="seed"):
        run_campaigns(300)


def zero_over_bytes_that_a_crash_left() -> None:
    """A block was written and not marked when the process died: its bytes lie in the file, and are nobody's.

    The block is made zeros, and at the very moment in which its hole is made, another client's flush is done.
    """
    fs = simulated_disk()
    open_clone(fs).pwrite(b"lost" * 1024, 0)
    fs.die()
    fs.forget_inodes()
    with open_clone(fs) as clone:
        before = clone.pread(BLOCK_SIZE, 0)
        fs.on_step = lambda what: clone.flush() if what == "punch" else None
        clone.zero(0, BLOCK_SIZE)
        fs.on_step = lambda what: None
        for seed in range(20):
            found = open_clone(fs.crash(random.Random(seed))).pread(BLOCK_SIZE, 0)
            if found not in (before, bytes(BLOCK_SIZE)):
                raise LawBroken(f"the block holds {found[:8]!r}")


def test_bytes_that_a_crash_left_do_not_come_to_light() -> None:
    zero_over_bytes_that_a_crash_left()


def test_it_is_noticed_if_a_hole_is_marked_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = "                clear(delta.fd, position, (end - first) << BLOCK_SHIFT)\n"
    mutate(monkeypatch, Clone, "_zero_blocks", made, "                self._take(segment, first, end)\n" + made)
    with pytest.raises(LawBroken):
        zero_over_bytes_that_a_crash_left()


def test_a_page_that_two_power_cuts_tore_does_not_come_together() -> None:
    """The first tore the newest map, and its block was read from below since; the second tears what replaces it."""
    fs = simulated_disk()
    older, newest, torn = (
        encode_map_page(0, sequence, b"I" * 16, bitmap.ljust(BITMAP_SIZE - 1, b"\0") + end)
        for sequence, bitmap, end in ((1, b"\x80", b"\0"), (2, b"\x80", b"\1"), (3, b"\xc0", b"\1"))
    )
    fd = fs.open(DELTA_PATH, 0)
    fs.pwrite(fd, b"what nobody flushed".ljust(BLOCK_SIZE), METADATA_SIZE + BLOCK_SIZE)
    fs.pwrite(fd, newest, MAP_SLOTS[1])
    fs.pwrite(fd, torn[:SECTOR] + older[SECTOR:], MAP_SLOTS[0])
    fs.close(fd)
    fs.tree.make_durable()
    rng = random.Random(0)
    clone = open_clone(fs)
    expected = clone.pread(BLOCK_SIZE, BLOCK_SIZE)

    def look(what: str) -> None:
        for _ in range(100):
            assert open_clone(fs.crash(rng)).pread(BLOCK_SIZE, BLOCK_SIZE) == expected

    fs.on_step = look
    clone.flush()
    clone.pwrite(b"new!", 0)
    clone.flush()
    look("at the end")
    clone.close()
    look("when it is closed")


@pytest.mark.parametrize("kept", [0, 1], ids=["the first slot", "the second slot"])
def test_a_first_page_that_two_power_cuts_tore_does_not_come_together(kept: int) -> None:
    fs = simulated_disk()
    torn = encode_map_page(0, 1, b"I" * 16, b"\xc0".ljust(BITMAP_SIZE - 1, b"\0") + b"\1")
    fd = fs.open(DELTA_PATH, 0)
    fs.pwrite(fd, b"what nobody flushed".ljust(BLOCK_SIZE), METADATA_SIZE + BLOCK_SIZE)
    fs.pwrite(fd, torn[:SECTOR], MAP_SLOTS[kept])
    fs.close(fd)
    fs.tree.make_durable()
    rng = random.Random(0)
    clone = open_clone(fs)
    expected = clone.pread(BLOCK_SIZE, BLOCK_SIZE)

    def look(what: str) -> None:
        for _ in range(100):
            assert open_clone(fs.crash(rng)).pread(BLOCK_SIZE, BLOCK_SIZE) == expected

    fs.on_step = look
    clone.pwrite(b"new!", SEGMENT_SIZE - BLOCK_SIZE)
    clone.flush()
    clone.pwrite(b"new!", 0)
    clone.flush()
    clone.close()
    look("when it is closed")
