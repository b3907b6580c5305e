"""A quota: no clone takes more of the disk than it may, and what needs no space goes on."""

from __future__ import annotations

import errno
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mutation import mutate
from powercut import DELTA_PATH, LawBroken, open_clone, simulated_disk
from simulated import PAGE, SimulatedFileSystem
from test_full_disk import ALL_PAGES, FullDisk, delta_of

from nbdclone.store import quota
from nbdclone.store.catalog import CloneInfo
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import HEADER_SLOTS, PAGE_SIZE, Header, change_header, read_header
from nbdclone.store.fs import FILE_SYSTEM
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.quota import Quota

MIB = 1 << 20
# What a file system adds of its own to a small file: a block or two for the list of its extents.
OWN_RECORDS = 4 * BLOCK_SIZE


def refused(clone: Clone, data: bytes, offset: int) -> bool:
    try:
        clone.pwrite(data, offset)
    except OSError as error:
        if error.errno != errno.EDQUOT:
            raise
        return True
    return False


def limited(fs: SimulatedFileSystem, blocks: int) -> None:
    """From now on the clone may take so many pages more."""
    change_header(DELTA_PATH, fs, quota=(len(delta_of(fs).allocated) + blocks) * PAGE)


@pytest.fixture
def fs() -> SimulatedFileSystem:
    return simulated_disk()


# On a real file system


@pytest.fixture
def clone(pool: Pool) -> Iterator[Clone]:
    """A clone of 64 MiB that may take 1 MiB."""
    pool.create_clones("base", ["web1", "web2"], size=64 * MIB, quota=MIB)
    with pool.open_clone("web1") as clone:
        yield clone


def allocated(pool: Pool, name: str = "web1") -> int:
    return pool.info(name).allocated


def test_at_the_quota_new_blocks_are_refused_and_all_else_goes_on(pool: Pool, clone: Clone, content: bytes) -> None:
    written = 0
    while not refused(clone, b"x" * BLOCK_SIZE, written * 3 * BLOCK_SIZE):
        written += 1
    assert MIB - OWN_RECORDS <= (written + 4) * BLOCK_SIZE <= MIB  # two pages of the header, two of the map
    end = written * 3 * BLOCK_SIZE
    assert clone.pread(512, end) == (content[end : end + 512] or bytes(512))
    clone.flush()
    assert allocated(pool) <= MIB + OWN_RECORDS
    for block in range(written):
        clone.pwrite(b"y" * (BLOCK_SIZE if block % 2 else 100), block * 3 * BLOCK_SIZE)
    clone.pwrite(bytes(BLOCK_SIZE), end)  # zeros take nothing
    clone.flush()
    assert clone.pread(100, 0) == b"y" * 100
    with pool.open_clone("web2") as other:
        other.pwrite(b"z" * BLOCK_SIZE, 0)

    clone.zero(0, 30 * 3 * BLOCK_SIZE)
    again = sum(not refused(clone, b"w" * BLOCK_SIZE, end + (1 + block) * BLOCK_SIZE) for block in range(40))
    assert 26 <= again <= 34
    clone.flush()
    assert allocated(pool) <= MIB + OWN_RECORDS


def test_a_hole_of_its_own_is_new_space_too(clone: Clone) -> None:
    clone.pwrite(b"x" * (MIB // 2), 0)
    clone.zero(0, MIB // 2)
    offset = 8 * MIB
    while not refused(clone, b"y" * BLOCK_SIZE, offset):
        offset += BLOCK_SIZE
    assert refused(clone, b"z" * BLOCK_SIZE, 0)
    assert refused(clone, b"z" * 10, 5000)
    assert clone.pread(MIB // 2, 0) == bytes(MIB // 2)


def test_a_clone_that_is_opened_again_is_held_to_its_quota(pool: Pool, clone: Clone) -> None:
    offset = 0
    while not refused(clone, b"x" * (64 << 10), offset):
        offset += 64 << 10
    clone.close()
    with pool.open_clone("web1") as again:
        assert refused(again, b"x" * (64 << 10), offset)
        again.pwrite(b"y" * offset, 0)


def test_space_that_was_taken_ahead_of_its_data_may_be_filled_at_the_quota(clone: Clone) -> None:
    clone.zero(0, MIB // 2, allocate=True)
    if FILE_SYSTEM.unallocated(clone.layers[-1].fd, MIB, MIB // 2):
        pytest.skip("this file system does not tell what is allocated")
    with pytest.raises(OSError, match="quota"):
        clone.zero(MIB, MIB, allocate=True)
    assert refused(clone, b"x" * MIB, 2 * MIB)
    clone.pwrite(b"x" * (MIB // 2), 0)


def test_a_quota_may_be_changed_while_the_clone_is_open(
    pool: Pool, clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "LEASE", 4 * MIB)
    assert refused(clone, b"x" * (2 * MIB), 0)
    assert pool.set_quota("web1", 4 * MIB).quota == 4 * MIB
    assert not refused(clone, b"x" * (2 * MIB), 0)
    pool.set_quota("web1", None)
    clone.pwrite(b"x" * (6 * MIB), 0)
    clone.pwrite(b"x" * MIB, 6 * MIB)
    info = pool.set_quota("web1", 2 * MIB)
    assert (info.quota, info.in_use_by is not None) == (2 * MIB, True)
    went_on = sum(not refused(clone, b"x" * MIB, number * MIB) for number in range(8, 24))
    assert 0 < went_on <= 4
    clone.close()
    with pool.open_clone("web1") as again:
        again.pwrite(b"y" * (6 * MIB), 0)
        assert refused(again, b"x" * BLOCK_SIZE, 60 * MIB)
        again.zero(0, 64 * MIB)
        assert not refused(again, b"x" * BLOCK_SIZE, 60 * MIB)


def test_without_waiting_a_look_at_the_file_is_left_to_a_thread(clone: Clone) -> None:
    with pytest.raises(BlockingIOError):
        clone.write_nowait(memoryview(b"x" * BLOCK_SIZE), 0)
    clone.write(memoryview(b"x" * BLOCK_SIZE), 0)
    clone.write_nowait(memoryview(b"x" * BLOCK_SIZE), 0)  # from here on there is a lease


def test_a_quota_is_kept_in_the_header_and_an_older_delta_has_none(pool: Pool) -> None:
    pool.create_clones("base", ["old", "new"])
    info = pool.set_quota("new", 3 * MIB)
    assert isinstance(info, CloneInfo)
    for name, expected in (("old", bytes(8)), ("new", (3 * MIB).to_bytes(8))):
        delta = pool.path / "clones" / name / "delta"
        for slot in HEADER_SLOTS:
            assert delta.read_bytes()[slot + 377 :][:8] == expected


@pytest.mark.parametrize("directory", ["tmp", "/dev/shm"])
def test_what_has_no_space_yet_is_counted_as_it_is(tmp_path: Path, directory: str) -> None:
    """Against a model of blocks, on a file system that tells extents and on one that tells holes only."""
    path = (tmp_path if directory == "tmp" else Path(directory)) / f"nbdclone-test-{os.getpid()}"
    if not path.parent.is_dir():
        pytest.skip("there is no tmpfs at /dev/shm")
    rng = random.Random(5)
    taken: set[int] = set()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        os.ftruncate(fd, 2000 * BLOCK_SIZE)
        for turn in range(1500):
            first = rng.randrange(2000)
            blocks = set(range(first, min(first + rng.choice([1, 1, 2, 5]), 2000)))
            if rng.random() < 0.8:
                os.pwrite(fd, b"x" * BLOCK_SIZE * len(blocks), first * BLOCK_SIZE)
                taken |= blocks
            else:
                FILE_SYSTEM.punch(fd, first * BLOCK_SIZE, len(blocks) * BLOCK_SIZE)
                taken -= blocks
            if turn % 50 == 0:
                start = rng.randrange(2000)
                stop = rng.randrange(start, 2001)
                missing = len(set(range(start, stop)) - taken) * BLOCK_SIZE
                assert FILE_SYSTEM.unallocated(fd, start * BLOCK_SIZE, (stop - start) * BLOCK_SIZE) == missing
        assert FILE_SYSTEM.unallocated(fd, 0, 2000 * BLOCK_SIZE) == (2000 - len(taken)) * BLOCK_SIZE
    finally:
        os.close(fd)
        path.unlink()


# On the simulated disk


class AtTheQuota(FullDisk):
    """A life with a quota that leaves hardly any space. It may be raised while the clone is open."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        limited(self._fs, 4)

    def _operate(self) -> None:
        header = read_header_of(self._fs)
        before = used = len(delta_of(self._fs).allocated) * PAGE
        if self._rng.random() < 0.1:
            least = max(header.quota, used) // PAGE
            if least < ALL_PAGES + 2:
                self._change(self._rng.randrange(least, ALL_PAGES + 2) * PAGE)
        self._fs.capacity = 10 * ALL_PAGES
        super(FullDisk, self)._operate()
        used = len(delta_of(self._fs).allocated) * PAGE
        # After a power cut it may take more: what it had given back was not durable.
        if used > max(limit := read_header_of(self._fs).quota, before):
            raise LawBroken(f"the clone takes {used} bytes of {limit}")
        self.went_on += used == limit

    def _change(self, limit: int) -> None:
        on_step, self._fs.on_step = self._fs.on_step, lambda what: self._examine()
        change_header(DELTA_PATH, self._fs, quota=limit)
        self._fs.on_step = on_step


def read_header_of(fs: SimulatedFileSystem) -> Header:
    fd = fs.open(DELTA_PATH, os.O_RDONLY)
    try:
        return read_header(fd, str(DELTA_PATH), fs)
    finally:
        fs.close(fd)


def run_campaigns(count: int) -> tuple[int, int, int]:
    states, refused, went_on = 0, 0, 0
    for seed in range(count):
        campaign = AtTheQuota(seed)
        campaign.run(operations=20)
        states, refused, went_on = states + campaign.states, refused + campaign.refused, went_on + campaign.went_on
    return states, refused, went_on


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "nbdclone")


@pytest.mark.usefixtures("quiet")
def test_random_work_at_the_quota_never_passes_it_and_is_refused_only_where_it_needs_space() -> None:
    states, refused, went_on = run_campaigns(40)
    print(f"states: {states}, refused: {refused}, done at the quota: {went_on}")
    assert refused > 100
    assert went_on > 100


MUTATIONS = {
    "a whole block is not counted": (Clone, "_store", "quota.lease -= length", "pass"),
    "a part of a hole is not counted": (Clone, "_write_partial", "delta.quota.take(", "id(("),
    "zeros with their space are not counted": (Clone, "_zero_blocks", "if allocate or not", "if not"),
    "the map is not counted": (Delta, "reserve", "self.quota.take(", "id(("),
    "what is allocated counts again": (Quota, "renew", "self._fs.unallocated(self._fd, position, length)", "length"),
    "the lease is too long": (Quota, "renew", "min(room, LEASE)", "LEASE"),
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", MUTATIONS)
def test_it_is_noticed_when(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, method, old, new = MUTATIONS[name]
    if new == "id((":  # a call with its arguments, to nothing
        new = "(lambda *_: None)("
    mutate(monkeypatch, owner, method, old, new)
    with pytest.raises(LawBroken, match="seed"):
        run_campaigns(200)


@pytest.mark.parametrize("step", range(4))
def test_a_power_cut_while_the_quota_is_changed_leaves_the_old_one_or_the_new(
    fs: SimulatedFileSystem, step: int, quiet: None
) -> None:
    limited(fs, 5)
    old = read_header_of(fs)
    new = 99 * PAGE
    steps: list[str] = []
    fs.capacity = fs.used()  # and it takes no space

    def look(what: str) -> None:
        steps.append(what)
        if len(steps) - 1 == step:
            for seed in range(50):
                assert read_header_of(fs.crash(random.Random(seed))).quota in (old.quota, new)

    fs.on_step = look
    change_header(DELTA_PATH, fs, quota=new)
    assert steps == ["write", "sync", "write", "sync"]
    for seed in range(20):
        assert read_header_of(fs.crash(random.Random(seed))).quota == new


@pytest.mark.parametrize("newer", HEADER_SLOTS)
def test_after_a_change_that_was_cut_off_the_next_does_not_bring_back_what_was_before(
    fs: SimulatedFileSystem, newer: int, quiet: None
) -> None:
    limited(fs, 5)
    newest = replace(read_header_of(fs), quota=50 * PAGE)
    newest = replace(newest, sequence=newest.sequence + 1)
    fd = fs.open(DELTA_PATH, os.O_RDWR)
    fs.pwrite(fd, newest.encode(), newer)
    fs.close(fd)
    fs.tree.make_durable()

    def look(what: str) -> None:
        for seed in range(50):
            assert read_header_of(fs.crash(random.Random(seed))).quota in (newest.quota, 99 * PAGE)

    fs.on_step = look
    change_header(DELTA_PATH, fs, quota=99 * PAGE)


@pytest.mark.parametrize("slot", HEADER_SLOTS)
def test_a_quota_is_changed_although_one_slot_of_the_header_is_lost(pool: Pool, slot: int) -> None:
    pool.create_clones("base", ["web1"], quota=MIB)
    path = pool.path / "clones" / "web1" / "delta"
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), b"rot" * 100, slot)
    assert pool.set_quota("web1", 2 * MIB).quota == 2 * MIB
    pages = [path.read_bytes()[at:][:PAGE_SIZE] for at in HEADER_SLOTS]
    assert pages[0] == pages[1]


def test_a_header_that_cannot_be_read_leaves_the_quota_as_it_was(fs: SimulatedFileSystem) -> None:
    limited(fs, 4)
    with open_clone(fs) as clone:
        file = delta_of(fs)
        headers = [file.read(slot, PAGE_SIZE) for slot in HEADER_SLOTS]
        for slot in HEADER_SLOTS:
            file.write(slot, b"rot" * 100)
        clone.pwrite(b"x" * (2 * BLOCK_SIZE), 0)
        assert refused(clone, b"x" * BLOCK_SIZE, 3 * BLOCK_SIZE)
        for slot, header in zip(HEADER_SLOTS, headers, strict=True):
            file.write(slot, header)


def test_where_holes_cannot_be_made_zeros_count(fs: SimulatedFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_zeros(self: SimulatedFileSystem, fd: int, offset: int, length: int) -> None:
        self._write_zeros(fd, offset, length)

    monkeypatch.setattr(SimulatedFileSystem, "punch", write_zeros)
    monkeypatch.setattr(SimulatedFileSystem, "can_punch", lambda *_: False)
    limited(fs, 3)
    with open_clone(fs) as clone:
        clone.zero(0, BLOCK_SIZE)
        with pytest.raises(OSError, match="quota"):
            clone.zero(BLOCK_SIZE, BLOCK_SIZE)


def test_a_clone_without_a_quota_never_sends_a_write_to_a_thread(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdclone.store.quota.LEASE", 2 * BLOCK_SIZE)
    pool.create_clones("base", ["free"])
    with pool.open_clone("free") as clone:
        clone.pwrite(b"x" * BLOCK_SIZE, 0)  # the maps are in memory, and the first lease nearly used
        for block in range(20):
            clone.write_nowait(memoryview(b"y" * BLOCK_SIZE), block * BLOCK_SIZE)
