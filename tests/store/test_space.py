"""What a pool takes: whose it is, and what comes free; held against what the file system says."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdclone.errors import InUse, NotFound
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.removal import require_removable
from nbdclone.store.resizing import resize
from nbdclone.store.snapshots import look_back
from nbdclone.store.space import Account, Usage, account, disk_usage, freed_by, layer_needs

MIB = 1 << 20


def measure(pool: Pool, *names: str) -> Account:
    steps = account(pool.places, names)
    try:
        while True:
            done, total = next(steps)
            assert done <= total
    except StopIteration as end:
        found: Account = end.value
        return found


def usage(pool: Pool, name: str) -> Usage:
    (found,) = measure(pool, name).entries
    return found


def write(pool: Pool, name: str, offset: int, length: int) -> None:
    with pool.open_clone(name) as disk:
        disk.pwrite(os.urandom(length), offset)


def du(path: Path) -> int:
    done = subprocess.run(["du", "-s", "-B1", str(path)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


@pytest.fixture(name="full")
def make_full(pool: Pool) -> Pool:
    """web1 with two snapshots, of which the first has lost its name; web2 stands on the second."""
    pool.create_clones("base", ["web1"], size=3 * SEGMENT_SIZE)
    write(pool, "web1", 0, 64 * BLOCK_SIZE)
    pool.snapshot("web1@a")
    write(pool, "web1", 32 * BLOCK_SIZE, 64 * BLOCK_SIZE)
    write(pool, "web1", 2 * SEGMENT_SIZE, 16 * BLOCK_SIZE)
    pool.snapshot("web1@b")
    write(pool, "web1", 0, 8 * BLOCK_SIZE)
    pool.create_clones("web1@b", ["web2"])
    write(pool, "web2", 2 * SEGMENT_SIZE + BLOCK_SIZE, BLOCK_SIZE)
    pool.remove(["web1@a"])
    return pool


def test_the_sum_is_what_the_file_system_counts(full: Pool) -> None:
    found = measure(full)
    assert found.total == found.rest + sum(entry.own for entry in found.entries)
    assert abs(found.total - du(full.path)) <= du(full.path) // 100
    kinds = [(entry.kind, entry.name) for entry in found.entries if entry.kind != "layer"]
    assert kinds == [("base", "base"), ("clone", "web1"), ("clone", "web2"), ("snapshot", "web1@b")]
    assert [entry.kind for entry in found.entries].count("layer") == 1


def test_what_is_shared_is_what_is_read_from_beneath(full: Pool) -> None:
    shared = {entry.name if entry.kind != "layer" else "a": entry.shared for entry in measure(full).entries}
    blocks = MIB // BLOCK_SIZE
    assert shared == {
        "base": 0,
        "a": (blocks - 64) * BLOCK_SIZE,
        "web1@b": (blocks - 64) * BLOCK_SIZE,
        "web1": (blocks - 8 + 16) * BLOCK_SIZE,
        "web2": (blocks + 16 - 1) * BLOCK_SIZE,
    }


def test_shared_agrees_with_the_extents_of_the_disks(full: Pool) -> None:
    for name in ("web1", "web2", "web1@b"):
        with full.open_clone(name) as disk:
            top = len(disk.layers)
            beneath = 0
            position = 0
            while position < disk.size:
                for extent in disk.extents(position, disk.size - position):
                    position += extent.length
                    if extent.origin not in (0, top) and not extent.hole:
                        beneath += extent.length
        assert usage(full, name).shared == beneath


def test_holes_are_shared_by_nobody(empty_pool: Pool, tmp_path: Path) -> None:
    with open(tmp_path / "sparse.img", "wb") as file:
        file.truncate(1 << 30)
        file.write(os.urandom(5 * MIB))
        file.seek(700 * MIB)
        file.write(os.urandom(3 * MIB))
    empty_pool.import_base(tmp_path / "sparse.img", "base")
    empty_pool.create_clones("base", ["web1"])
    assert usage(empty_pool, "web1").shared == 8 * MIB
    with empty_pool.open_clone("web1") as disk:
        disk.zero(700 * MIB, MIB)
    assert usage(empty_pool, "web1").shared == 7 * MIB
    empty_pool.snapshot("web1@s")
    assert usage(empty_pool, "web1").shared == 7 * MIB
    assert usage(empty_pool, "web1@s").shared == 7 * MIB
    resize(empty_pool.places, "web1", 4 * MIB)
    assert usage(empty_pool, "web1").shared == 4 * MIB
    assert measure(empty_pool).copies < 32 * MIB


def removed(pool: Pool, *names: str) -> int:
    before = disk_usage(pool.path)
    pool.remove(names)
    return before - disk_usage(pool.path)


@pytest.mark.parametrize(
    "names", [("web2",), ("web1", "web2"), ("web1@b",), ("web2", "web1@b"), ("base", "web1", "web2")]
)
def test_what_is_said_to_come_free_comes_free(full: Pool, names: tuple[str, ...]) -> None:
    said = freed_by(full.places, names, layer_needs(full.places))
    assert said == removed(full, *names)


def test_what_others_need_frees_nothing_by_itself(full: Pool) -> None:
    free = {entry.name: entry.freed for entry in measure(full).entries if entry.kind != "layer"}
    assert free["base"] is None
    assert free["web1"] is None
    assert free["web1@b"] == disk_usage(full.path / "clones/web1/snapshots/b")  # web2 stands on it: the layer stays
    assert free["web2"] == removed(full, "web2")
    (layer,) = [entry for entry in measure(full).entries if entry.kind == "layer"]
    assert layer.freed is None


def test_going_back_frees_what_is_said(full: Pool) -> None:
    full.remove(["web2"])
    for name, snapshot in (("web1", "b"), ("web1", None)):
        write(full, "web1", 0, MIB)
        said = look_back(full.places, name, snapshot)
        before = disk_usage(full.path)
        full.rollback("web1@b") if snapshot else full.reset("web1")
        assert said.freed == before - disk_usage(full.path) - 0
        assert said.later == (() if snapshot else ("web1@b",))
    full.remove(["web1@b"])
    write(full, "web1", 0, MIB)


def test_a_reset_frees_the_layers_that_only_the_clone_stood_on(full: Pool) -> None:
    full.remove(["web2", "web1@b"])
    assert len(os.listdir(full.path / "layers")) == 2
    said = look_back(full.places, "web1", None)
    before = disk_usage(full.path)
    full.reset("web1")
    assert (said.freed, len(said.layers), said.to) == (before - disk_usage(full.path), 2, "base")
    assert os.listdir(full.path / "layers") == []
    assert os.listdir(full.path / ".tmp") == []


def test_a_damaged_clone_is_told_and_the_rest_is_counted(full: Pool) -> None:
    with open(full.places.delta("web2"), "r+b") as file:
        for slot in (0, 512 << 10):
            file.seek(slot)
            file.write(b"rot")
    found = {entry.name: entry for entry in measure(full).entries}
    assert "NBDDELTA" in (found["web2"].error or "")
    assert found["web1"].shared > 0


def test_names_that_are_not_there(full: Pool) -> None:
    with pytest.raises(NotFound, match="there is no base, clone, snapshot or layer 'web9'"):
        measure(full, "web1", "web9")


def test_what_cannot_be_removed_is_refused_beforehand_and_nothing_is_held(full: Pool) -> None:
    require_removable(full.places, ["web2"])
    with pytest.raises(InUse, match="needed by"):
        require_removable(full.places, ["web1"])
    with full.open_clone("web2"), pytest.raises(InUse, match="in use by this process"):
        require_removable(full.places, ["web2"])
    with pytest.raises(NotFound):
        require_removable(full.places, ["web2", "web9"])
    full.open_clone("web2").close()
    assert "web2" in full.names()


@pytest.fixture(params=["xfs", "btrfs"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path, require: Callable[[bool, str], None]) -> Iterator[Path]:
    """A file system that can share extents, in a file."""
    kind = request.param
    image, point = tmp_path / "disk", tmp_path / "mounted"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(512 * MIB)
    made = os.geteuid() == 0 and all(
        subprocess.run(command, capture_output=True, check=False).returncode == 0
        for command in ([f"mkfs.{kind}", str(image)], ["mount", "-o", "loop", str(image), str(point)])
    )
    if not made:
        pytest.skip(f"needs root, mkfs.{kind} and loop devices")
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_shared_extents_do_not_come_free(mounted: Path) -> None:
    (mounted / "source.img").write_bytes(os.urandom(8 * MIB))
    os.sync()
    pool = Pool.open(mounted / "pool", create=True)
    pool.import_base(mounted / "source.img", "base")
    pool.create_clones("base", ["web1"])
    write(pool, "web1", 0, 2 * MIB)
    os.sync()
    found = measure(pool)
    assert abs(found.total - du(pool.path)) <= du(pool.path) // 100
    assert usage(pool, "web1").freed >= 2 * MIB  # type: ignore[operator]
    assert freed_by(pool.places, ["base"], {}) < MIB  # its extents are the source's too
    (mounted / "source.img").unlink()
    deadline = time.monotonic() + 20  # XFS frees in its own time what was unlinked
    while freed_by(pool.places, ["base"], {}) < 8 * MIB:
        assert time.monotonic() < deadline
        os.sync()
        time.sleep(0.1)
