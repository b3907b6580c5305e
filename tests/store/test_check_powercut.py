"""Power cuts in the midst of a repair: nothing is lost that was there, and the next repair finishes.

``CHECK_CAMPAIGNS=50 pytest -rP tests/store/test_check_powercut.py`` looks at more states.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from checked import PAGES
from powercut import DELTA_PATH, open_clone, read_sectors, simulated_disk
from shadow import ShadowFileSystem
from simulated import SECTOR, File, SimulatedFileSystem, change_entries
from test_rot import closed_cleanly

from nbdclone.errors import CorruptDelta
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.check_delta import Examination
from nbdclone.store.clone import Clone
from nbdclone.store.delta_file import HEADER_SLOTS, MAP_SLOTS, PAGE_SIZE, SEGMENT_SPAN, decode_map_page, encode_map_page
from nbdclone.store.image import BaseRecord
from nbdclone.store.layer import BITMAP_SIZE, BLOCK_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.repair import repair


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Torn pages are reported, and here there are thousands."""
    caplog.set_level(logging.ERROR, "nbdclone")


def examine(fs: SimulatedFileSystem) -> Examination:
    return Examination(fs, fs.open(DELTA_PATH, os.O_RDWR), DELTA_PATH, "web1")


def kinds(fs: SimulatedFileSystem) -> list[str]:
    return [problem.finding.kind for problem in examine(fs).problems]


def repair_all(fs: SimulatedFileSystem) -> None:
    for _ in range(4):
        problems = examine(fs).problems
        if not any(problem.can_be_repaired for problem in problems):
            break
        repair(fs, fs.open(DELTA_PATH, os.O_RDWR), DELTA_PATH, problems)


# Power cuts


def both_rotten(delta: File) -> None:
    """Both slots of the header, of both maps, each in other sectors."""
    for place in PAGES.values():
        delta.write(place + (600 if place % SEGMENT_SPAN < 500_000 else 2600), b"rot")


def one_rotten(delta: File) -> None:
    for place in (HEADER_SLOTS[1], MAP_SLOTS[0], SEGMENT_SPAN + MAP_SLOTS[1]):
        delta.write(place + 40, b"rot")


def marked_beyond(delta: File) -> None:
    for slot in MAP_SLOTS:
        page = delta.read(SEGMENT_SPAN + slot, PAGE_SIZE)
        sequence = int.from_bytes(page[16:24], "big")
        delta.write(SEGMENT_SPAN + slot, encode_map_page(1, sequence, b"I" * 16, page[32:-1] + b"\x01"))


def too_long(delta: File) -> None:
    delta.write(delta.size + 5000, b"garbage")


def too_short(delta: File) -> None:
    delta.truncate(delta.size - BLOCK_SIZE)


def newer_torn(delta: File) -> None:
    """A power cut tore the page of a flush over an older one; a block in the middle tells that from the other slot."""
    decoded = decode_map_page(delta.read(MAP_SLOTS[0], PAGE_SIZE), 0, b"I" * 16)
    assert decoded is not None
    sequence, oldest = decoded
    newest = bytearray(oldest)
    newest[BITMAP_SIZE // 2] = 0x80
    newer = b"\xff" + newest[1:]
    assert newer != newest
    delta.write(MAP_SLOTS[1], encode_map_page(0, sequence + 1, b"I" * 16, bytes(newest)))
    delta.write(MAP_SLOTS[0], encode_map_page(0, sequence + 2, b"I" * 16, newer)[:SECTOR])


CAMPAIGNS = int(os.environ.get("CHECK_CAMPAIGNS", "1"))
DAMAGE = (both_rotten, one_rotten, marked_beyond, newer_torn, too_long, too_short)


def cut_power_in_a_repair(damage: Callable[[File], None], states_per_step: int, forgotten: int = -1) -> int:
    """At each step of a repair: what a power cut leaves is repaired as well, and reads as it should."""
    fs, expected, delta = closed_cleanly()
    size = delta.size
    damage(delta)
    fs.tree.make_durable()
    assert kinds(fs)
    rng = random.Random(0)
    states = 0

    def look(what: str) -> None:
        nonlocal states
        for _ in range(states_per_step):
            after = fs.crash(rng)
            repair_all(after)
            assert [problem.finding.kind for problem in examine(after).problems] == [], what
            after.die()
            found = after.tree.find(DELTA_PATH)
            assert isinstance(found, File)
            assert found.size == size
            assert read_sectors(open_clone(after)) == expected, what
            states += 1

    fs.on_step = look
    forget_sync(fs, forgotten)
    repair_all(fs)
    look("the end")
    return states


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_power_cut_in_a_repair_loses_nothing(damage: Callable[[File], None]) -> None:
    states = cut_power_in_a_repair(damage, (80 if damage is newer_torn else 8) * CAMPAIGNS)
    print(f"states: {states}")  # pytest -rP shows it


# A block whose bit stands in another sector of the page than those of the first blocks: the page can be torn.
FAR = 30_000 * BLOCK_SIZE


class KilledCampaign:
    """A process died between the write of a map page and its sync: the newest page may be in the cache only."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.states = 0
        self.fs = simulated_disk()
        with open_clone(self.fs) as clone:
            clone.pwrite(b"1" * BLOCK_SIZE, 0)
            clone.flush()
            self.allowed = [self._read(clone)]
        clone = open_clone(self.fs)
        clone.pwrite(b"2" * BLOCK_SIZE, BLOCK_SIZE)
        clone.pwrite(b"2" * BLOCK_SIZE, FAR)
        clone.pwrite(b"2" * BLOCK_SIZE, FAR)  # written again: a flush with two syncs
        self.allowed.append(self._read(clone))
        syncs = itertools.count()
        self.fs.on_step = lambda what: self._die() if what == "sync" and next(syncs) == 1 else None
        with pytest.raises(KeyboardInterrupt):
            clone.flush()
        self.fs.die()

    def _read(self, clone: Clone) -> bytes:
        return clone.pread(2 * BLOCK_SIZE, 0) + clone.pread(BLOCK_SIZE, FAR)

    def _die(self) -> None:
        raise KeyboardInterrupt

    def run(self) -> None:
        self.fs.on_step = self._look
        repair_all(self.fs)
        self.fs.on_step = lambda what: None
        assert self._read(open_clone(self.fs)) == self.allowed[1]

    def _look(self, what: str) -> None:
        for _ in range(10):
            self.states += 1
            assert self._read(open_clone(self.fs.crash(self.rng))) in self.allowed, what


def test_a_power_cut_in_a_repair_after_a_kill_shows_each_sector_old_or_new() -> None:
    states = 0
    for seed in range(10 * CAMPAIGNS):
        campaign = KilledCampaign(seed)
        campaign.run()
        states += campaign.states
    print(f"states: {states}")  # pytest -rP shows it
    assert states > 300


def forget_sync(fs: SimulatedFileSystem, forgotten: int) -> None:
    """A defect: one of the syncs of the delta is not done."""
    syncs = itertools.count()
    done = fs.datasync
    fs.datasync = lambda fd: None if next(syncs) == forgotten else done(fd)  # type: ignore[method-assign]


def test_it_is_noticed_if_a_repair_does_not_sync_first() -> None:
    def run() -> None:
        for seed in range(30):
            campaign = KilledCampaign(seed)
            forget_sync(campaign.fs, 0)
            campaign.run()

    with pytest.raises((AssertionError, CorruptDelta)):
        run()


def test_it_is_noticed_if_a_repair_has_both_slots_in_flight() -> None:
    with pytest.raises(AssertionError):
        cut_power_in_a_repair(marked_beyond, 60, forgotten=1)


class LinkingShadow(ShadowFileSystem):
    def link(self, source: Path, target: Path) -> None:  # type: ignore[override]
        self.on_step()
        os.link(source, target)
        directory = self._directory(target.parent)
        change_entries((directory, target.name, directory.entries[source.name]))


@pytest.mark.parametrize("damaged", ["base.json", "manifest"])
def test_a_power_cut_while_a_base_is_repaired_leaves_the_old_file_or_the_new_one(tmp_path: Path, damaged: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "base.img").write_bytes(os.urandom(8192))
    pool = Pool.open(root / "pool", create=True)
    pool.import_base(root / "base.img", "base")
    pool.create_clones("base", ["web1"])
    path = root / "pool" / "bases" / "base" / damaged
    path.chmod(0o644)
    right = path.read_bytes()
    path.write_bytes(b"rot" * 11)
    fs = LinkingShadow(root)
    rng = random.Random(0)
    memory = "/dev/shm" if os.path.ismount("/dev/shm") else None
    states = 0

    def look(done: bool = False) -> None:
        nonlocal states
        for _ in range(15 * CAMPAIGNS):
            states += 1
            with tempfile.TemporaryDirectory(prefix="nbdclone-test-", dir=memory) as state:
                fs.tree.crash(rng).write_to(Path(state))
                found = Path(state) / "pool" / "bases" / "base" / damaged
                if damaged == "manifest":
                    assert found.read_bytes() in ((right,) if done else (right, b"rot" * 11))
                elif found.read_bytes() != b"rot" * 11 or done:
                    assert BaseRecord.load(found).fingerprint == json_fingerprint(right)
                assert is_clean(list(check_pool(Path(state) / "pool", repair=True)))
                assert (
                    Pool.open(Path(state) / "pool").open_clone("web1").pread(8192, 0)
                    == (root / "base.img").read_bytes()
                )

    fs.on_step = look
    assert is_clean(list(check_pool(root / "pool", repair=True, fs=fs)))
    look(done=True)
    print(f"states: {states}")  # pytest -rP shows it


def json_fingerprint(record: bytes) -> bytes:
    return bytes.fromhex(json.loads(record)["fingerprint"])
