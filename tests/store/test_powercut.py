"""Laws 3 and 4: power cuts at every step of a clone's life, by the ten thousand, in seeded campaigns.

``POWERCUT_CAMPAIGNS=5000 pytest tests/store/test_powercut.py`` runs longer; ``POWERCUT_SEED`` begins elsewhere.
"""

from __future__ import annotations

import logging
import os
import random
from collections import Counter
from typing import NamedTuple

import pytest
from mutation import mutate
from powercut import DELTA_PATH, Campaign, LawBroken, open_clone, simulated_disk
from simulated import SECTOR

from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import MAP_SLOTS, METADATA_SIZE, encode_map_page
from nbdclone.store.delta_flush import DurableDelta
from nbdclone.store.delta_map import DeltaMap
from nbdclone.store.journal import Journal
from nbdclone.store.layer import BITMAP_SIZE, BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.live import LiveMap
from nbdclone.store.young import Young


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Torn pages are reported, and here there are thousands."""
    caplog.set_level(logging.ERROR, "nbdclone")


CAMPAIGNS = int(os.environ.get("POWERCUT_CAMPAIGNS", "36"))
FIRST_SEED = int(os.environ.get("POWERCUT_SEED", "0"))
# Lives in which it is killed again before it has flushed what it inherited.
SHORT = {"openings": 10, "operations": 3}


@pytest.mark.timeout(120 + CAMPAIGNS)
@pytest.mark.parametrize("synced", [False, True], ids=["any work", "small synced writes"])
@pytest.mark.parametrize("errors", [False, True], ids=["sound disk", "disk with errors"])
def test_a_power_cut_at_any_step_leaves_each_sector_old_or_new(errors: bool, synced: bool) -> None:
    states = 0
    flushes: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + CAMPAIGNS):
        campaign = Campaign(seed, errors=errors, synced=synced)
        campaign.run()
        states += campaign.states
        flushes += campaign.flushes
    print(f"states: {states}, flushes {dict(flushes)}")  # pytest -rP shows it
    assert states > 100 * CAMPAIGNS
    if synced:
        assert flushes["with one sync"] > 2 * CAMPAIGNS
        assert flushes["for a change"] > CAMPAIGNS // 4


@pytest.mark.timeout(120 + CAMPAIGNS)
@pytest.mark.parametrize("synced", [False, True], ids=["any work", "small synced writes"])
@pytest.mark.parametrize("errors", [False, True], ids=["sound disk", "disk with errors"])
def test_a_power_cut_or_a_kill_while_blocks_are_dropped_leaves_each_sector_old_or_new(
    errors: bool, synced: bool
) -> None:
    flushes: Counter[str] = Counter()
    count = CAMPAIGNS // 4  # these have more steps
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        campaign = Campaign(seed, errors=errors, synced=synced, compacts=True)
        campaign.run()
        flushes += campaign.flushes
    print(f"flushes {dict(flushes)}")
    assert flushes["dropped"] > count


def test_a_campaign_is_the_same_each_time_for_its_seed() -> None:
    first, second = Campaign(7), Campaign(7)
    first.run()
    second.run()
    assert first.states == second.states > 0


@pytest.mark.timeout(120 + CAMPAIGNS)
@pytest.mark.parametrize("synced", [False, True], ids=["any work", "small synced writes"])
@pytest.mark.parametrize("errors", [False, True], ids=["sound disk", "disk with errors"])
def test_many_short_lives_leave_each_sector_old_or_new(errors: bool, synced: bool) -> None:
    for seed in range(FIRST_SEED, FIRST_SEED + CAMPAIGNS // 2):
        Campaign(seed, errors=errors, synced=synced).run(**SHORT)


def run_campaigns(count: int, *, compacts: bool = False) -> None:
    for seed in range(count):
        Campaign(seed, states_per_step=2, synced=seed % 2 == 1, compacts=compacts).run()
        if seed % 3 == 0:
            Campaign(seed, states_per_step=2, synced=seed % 2 == 1, compacts=compacts).run(**SHORT)


class Mutation(NamedTuple):
    owner: type
    method: str
    old: str
    new: str


FIRST_SYNC = """            self._sync()
            self._map.wiped(wiped)
"""
SECOND_SYNC = """which an earlier sync made durable. Both point only at data that is.
                self._sync()
"""
CHANGE = "if not self._{}.isdisjoint(wanted):\n            "
STORED = """so when it failed: in blocks that were ours already, some of it may be read from now on
            delta.touched()
"""
MUTATIONS = {
    "the data sync is left out": Mutation(Delta, "_flush", FIRST_SYNC, "            self._map.wiped(wiped)\n"),
    "the map is written before the data sync": Mutation(
        Delta, "_flush", FIRST_SYNC, "            self._map.write(noted)\n" + FIRST_SYNC
    ),
    "the map is noted after the data sync": Mutation(
        Delta,
        "_flush",
        FIRST_SYNC,
        "            self._sync()\n"
        "            noted = {segment: bytes(self._map.segments[segment].bitmap) for segment in noted}\n"
        "            self._map.wiped(wiped)\n",
    ),
    "the second sync is left out": Mutation(Delta, "_flush", SECOND_SYNC, "\n"),
    "the copies are made before the second sync": Mutation(
        Delta,
        "_flush",
        SECOND_SYNC,
        "\n                self._map.mirror(set(noted))\n                self._sync()\n",
    ),
    "the map goes to the same slot each time": Mutation(
        DeltaMap, "write", "MAP_SLOTS[1 - state.slot]", "MAP_SLOTS[0]"
    ),
    "the newest page is written over": Mutation(DeltaMap, "written", "state.slot = 1 - state.slot", "pass"),
    "the older page is believed": Mutation(DeltaMap, "read", "max(valid)", "min(valid)"),
    "a new delta takes its file for synced": Mutation(
        DurableDelta, "__init__", "self._unsynced = True", "self._unsynced = False"
    ),
    "a flush that failed forgets its blocks": Mutation(
        Delta, "_flush", "self._map.dirty |= noted.keys()\n", "pass\n"
    ),
    "a failed sync is tried again": Mutation(Delta, "require_sound", "if self._failure:", "if False:"),
    "what a failed sync lost stays in the cache": Mutation(
        Delta, "close", "if self._failure:", "self._live.discard()\n        if False:"
    ),
    "blocks are marked before they are written": Mutation(
        Clone,
        "_store",
        "            if length <= PIECE_SIZE:",
        "            self._take(segment, first, first + count)\n            if length <= PIECE_SIZE:",
    ),
    "touched is said before the write": Mutation(
        Clone,
        "_store",
        "            if length <= PIECE_SIZE:",
        "            delta.touched = lambda: None\n            Delta.touched(delta)\n"
        "            if length <= PIECE_SIZE:",
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
    "marks are not written before they are acknowledged": Mutation(Clone, "note_marks", "is not None", "is None"),
    "a flush takes marks for covered that came after it began": Mutation(
        Delta, "_flush", "self._live.covered(live)", "self._live.covered(self._live.noted)"
    ),
    "the marks that stay are looked for in the wrong place": Mutation(
        LiveMap, "covered", "start = self._end - (self._written - noted) * MARK_SIZE", "start = self._end"
    ),
    "marks are written over those that were inherited": Mutation(
        LiveMap, "_read_marks", "self._end += MARK_SIZE", "pass"
    ),
    "marks that were inherited are not flushed": Mutation(Delta, "_merge", "self._map.dirty.add(segment)", "pass"),
    "marks are believed after a power cut": Mutation(
        LiveMap, "inherit", " or not self._fs.stayed_in_memory(self._delta_fd)", ""
    ),
    "a failed sync is not noted": Mutation(Delta, "_sync", "self._live.note_failure()", "pass"),
    "the cache of before a failed sync is kept": Mutation(LiveMap, "inherit", "if known and failed:", "if False:"),
    # Of flushes with one sync.
    "a block that relies on a record is changed at once": Mutation(Young, "change", "return True", "pass"),
    "a change of a block while it is recorded is not seen": Mutation(Young, "change", "self._spoilt = True", "pass"),
    "a change of a block that began before it is recorded is not seen": Mutation(
        Young, "change", "self._rewritten = True", "pass"
    ),
    "nobody asks before a block is written": Mutation(Clone, "_store", "if delta.young and", "if False and"),
    "nobody asks before a part is written": Mutation(Clone, "_write_partial", "if delta.young:", "if False:"),
    "nobody asks before a hole is made": Mutation(Clone, "_zero_blocks", "if delta.young:", "if False:"),
    "a change that waits syncs no map": Mutation(Delta, "_solidify", "self._sync()", "pass"),
    "a change that waits writes no map": Mutation(Delta, "_solidify", "self._map.write(self._earlier)", "pass"),
    "a record is not written": Mutation(Delta, "_record", "self._journal.write(blocks)", "pass"),
    "the pages that were put off are forgotten": Mutation(
        Delta, "_flush", "            self._map.write(self._earlier)\n", ""
    ),
    "the pages that were put off have the newest marks": Mutation(
        Delta,
        "_flush",
        "self._map.write(self._earlier)\n",
        "self._map.write({segment: bytes(self._map.segments[segment].bitmap) for segment in self._earlier})\n",
    ),
    "the pages are put off without a record": Mutation(Young, "synced", "recorded and ", ""),
    "the place of the last record is used again": Mutation(Journal, "written", "1 - self._turn", "self._turn"),
    "marks that are not counted are put off": Mutation(Young, "lose_count", "self.counts = False", "pass"),
    "a flush that failed leaves its blocks to no record": Mutation(Young, "fail", "self.lose_count()", "pass"),
    "records are wiped before the map is written": Mutation(
        Delta,
        "_recover",
        "        self._flush(journaling=False)\n",
        "        self._journal.wipe()\n        self._flush(journaling=False)\n",
    ),
    "what records tell is not taken over": Mutation(
        Delta, "_inherit", "self._journal.inherit(self.header)", "[self._journal.inherit(self.header)][:0]"
    ),
    "a clone that crashed is changed at once": Mutation(Delta, "begin_changes", "if self._hindered:", "if False:"),
}  # fmt: skip


GIVEN_UP = "                delta.give_up(given)\n"
DROPS = {
    "the space is given back before the map is durable": Mutation(
        Clone,
        "drop",
        GIVEN_UP,
        "                for run in runs:\n"
        "                    for at, count in pieces(*run):\n"
        "                        at += (at // SEGMENT_SIZE + 1) * delta.stride\n"
        "                        self._fs.punch(delta.fd, at, count)\n" + GIVEN_UP,
    ),
    "the map that lost bits is not synced": Mutation(
        Delta,
        "give_up",
        "            self._sync()\n            self._map.written(noted)\n",
        "            self._map.written(noted)\n            self._map.unmirrored -= noted.keys()\n",
    ),
    "it is not settled before": Mutation(
        Delta, "give_up", "            self._settle()\n            if", "            if False and"
    ),
}


@pytest.mark.parametrize("name", DROPS)
def test_the_power_cuts_notice_when_of_a_drop(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *DROPS[name])
    with pytest.raises(LawBroken, match="seed"):
        run_campaigns(60, compacts=True)


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_power_cuts_notice_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *MUTATIONS[name])
    with pytest.raises(LawBroken, match="seed"):
        run_campaigns(300)


def test_the_power_cuts_notice_when_a_checksum_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdclone.store.delta_file.zlib.crc32", lambda data: 0)
    with pytest.raises(LawBroken, match="seed"):
        run_campaigns(300)


def test_the_power_cuts_notice_when_a_record_is_believed_without_its_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdclone.store.journal.hash_of", lambda fs, fd, block: bytes(16))
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
