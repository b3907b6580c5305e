"""A change of a disk's size that a power cut ended: what a check says of it, and what a repair makes of it."""

from __future__ import annotations

import logging
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from powercut import stamp
from shadow import ShadowFileSystem

from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.finding import NOTE, WRONG, Finding
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.resizing import resize

STATES_PER_STEP = int(os.environ.get("POOL_STATES_PER_STEP", "12"))
# Two segments: of the second there is a whole page of the map, and a part of its data.
SIZE = SEGMENT_SIZE + 4 * BLOCK_SIZE
LARGER = SIZE + 5 * BLOCK_SIZE + 512
# Within the last block, within the second segment, and within the first: there the second goes whole.
SMALLER = [SIZE - 1024, SEGMENT_SIZE + BLOCK_SIZE + 512, 2 * BLOCK_SIZE - 512]
WINDOWS = [(0, 4 * BLOCK_SIZE), (SEGMENT_SIZE - 2 * BLOCK_SIZE, 6 * BLOCK_SIZE)]
# What says that a page was torn: a check cannot tell that from one that rotted.
TORN = {"header-slot", "map-slot"}


def read(pool: Pool) -> list[bytes]:
    with pool.open_clone("web1") as clone:
        assert clone.size >= SIZE
        return [clone.pread(length, offset) for offset, length in WINDOWS]


def expected(size: int) -> list[bytes]:
    """The windows of a disk that was made smaller, and then as large as it was."""
    written = [b"".join(stamp(1, (at + sector) // 512) for sector in range(0, length, 512)) for at, length in WINDOWS]
    return [data[: max(size - at, 0)].ljust(length, b"\0") for data, (at, length) in zip(written, WINDOWS, strict=True)]


@pytest.fixture(name="root")
def make_root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    (root / "base.img").write_bytes(b"base" * BLOCK_SIZE)
    pool = Pool.open(root / "pool", create=True)
    pool.import_base(root / "base.img", "base")
    pool.create_clones("base", ["web1"], size=SIZE)
    with pool.open_clone("web1") as clone:
        for (at, _), data in zip(WINDOWS, expected(SIZE), strict=True):
            clone.pwrite(data, at)
    return root


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "nbdclone")


def states(root: Path, size: int) -> Iterator[Pool]:
    """What a power cut before each step of the change, and after the last, may leave."""
    rng = random.Random(0)
    fs = ShadowFileSystem(root)
    found = []
    seen = set()

    def look() -> None:
        for _ in range(STATES_PER_STEP):
            left = fs.tree.crash(rng)
            if (summary := left.summary()) not in seen:
                seen.add(summary)
                found.append(left)

    fs.on_step = look
    resize(Pool.open(root / "pool", fs=fs).places, "web1", size)
    look()
    memory = "/dev/shm" if os.path.ismount("/dev/shm") else None
    for left in found:
        with tempfile.TemporaryDirectory(prefix="nbdclone-test-", dir=memory) as state:
            left.write_to(Path(state))
            yield Pool.open(Path(state) / "pool")


def check(pool: Pool, repair: bool = False) -> list[Finding]:
    return [finding for finding in check_pool(pool.path, ["web1"], repair=repair) if not finding.repaired]


def require_notes(found: list[Finding]) -> None:
    """Nothing is wrong, but for pages that were torn; and what is behind the end, if one of them was a header's."""
    kinds = {finding.kind for finding in found if finding.level == WRONG}
    assert kinds <= TORN | ({"too-long", "marked-beyond"} if "header-slot" in kinds else set()), found


@pytest.mark.parametrize("size", [*SMALLER, LARGER])
def test_what_a_power_cut_leaves_of_a_change_of_the_size_is_a_note(root: Path, size: int) -> None:
    notes = set()
    for pool in states(root, size):
        found = check(pool)
        require_notes(found)
        notes |= {finding.kind for finding in found if finding.level == NOTE}
        for finding in found:
            if finding.kind == "marked-beyond" and finding.level == NOTE:
                assert finding.todo == "the next to open it clears them, and so does --repair"
        # Nothing need be done but to open it.
        now = pool.info("web1").size
        pool.open_clone("web1").close()
        assert {finding.kind for finding in check(pool)} <= {"header-older", "not-closed"} | TORN
        resize(pool.places, "web1", max(SIZE, now))
        same = read(pool) == expected(min(now, SIZE))
        assert same, found
    assert "too-long" in notes
    assert ("marked-beyond" in notes) == (size in SMALLER[1:])


@pytest.mark.parametrize("size", [*SMALLER, LARGER])
def test_what_a_repair_makes_of_it_does_not_come_to_light_when_the_disk_grows(root: Path, size: int) -> None:
    for pool in states(root, size):
        found = check(pool)
        left = check(pool, repair=True)
        assert is_clean(left), left
        now = pool.info("web1").size
        resize(pool.places, "web1", max(SIZE, now))
        same = read(pool) == expected(min(now, SIZE))
        assert same, found
