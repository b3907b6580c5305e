"""Sharing extents: what is alike at whatever place takes its space once, and each clone reads what it read before."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nbdclone.cli import app
from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import Steps, drive, find_verb
from nbdclone.errors import UsageError
from nbdclone.store import sharing
from nbdclone.store.check import check_pool
from nbdclone.store.delta_file import place_of
from nbdclone.store.delta_map import DeltaMap
from nbdclone.store.fs import FILE_SYSTEM
from nbdclone.store.image import Identity
from nbdclone.store.layer import BLOCK_SIZE, BLOCKS_PER_SEGMENT, SEGMENT_SIZE
from nbdclone.store.pool import Pool

MIB = 1 << 20
SLACK = MIB // 2  # what a file system keeps for its own trees
DATA = random.Random(1).randbytes(4 * MIB)
# It has something twice in itself, which stays so.
BASE = (random.Random(2).randbytes(MIB) * 2)[: MIB + (64 << 10)]
# Where the same stands in two clones; the second goes over the end of a segment.
PLACES = {"web1": MIB, "web2": SEGMENT_SIZE - 3 * MIB - BLOCK_SIZE}
SIZE = SEGMENT_SIZE + 4 * MIB
# All that is written to stands in these: (start, stop).
WINDOWS = (0, 24 * MIB), (PLACES["web2"] - MIB, SIZE)

Mount = Callable[[str], Path]


@pytest.fixture(scope="module", name="mount")
def make_mount(tmp_path_factory: pytest.TempPathFactory, require: Callable[[bool, str], None]) -> Iterator[Mount]:
    """A file system of that kind, in a file; made when it is first asked for."""
    points: dict[str, Path] = {}

    def mount(kind: str) -> Path:
        if kind in points:
            return points[kind]
        directory = tmp_path_factory.mktemp(kind)
        image, point = directory / "disk", directory / "mounted"
        point.mkdir()
        image.touch()
        os.truncate(image, 512 * MIB)
        options = ["-m", "reflink=1"] if kind == "xfs" else []
        made = os.geteuid() == 0 and all(
            subprocess.run(command, capture_output=True, check=False).returncode == 0
            for command in (
                [f"mkfs.{kind}", "-q", *options, str(image)],
                ["mount", "-o", "loop", str(image), str(point)],
            )
        )
        require(made, f"needs root, mkfs.{kind} and loop devices")
        points[kind] = point
        return point

    yield mount
    for point in points.values():
        subprocess.run(["umount", str(point)], check=True)


@pytest.fixture(params=["xfs", "btrfs"])
def mounted(request: pytest.FixtureRequest, mount: Mount) -> Path:
    return mount(request.param)


def make_pool(directory: Path, name: str) -> Pool:
    """A base, and two clones that have the same data in other places."""
    source = directory / f"{name}.img"
    source.write_bytes(BASE)
    pool = Pool.open(directory / name, create=True)
    pool.import_base(source, "base")
    source.unlink()
    pool.create_clones("base", list(PLACES), size=SIZE)
    for clone, place in PLACES.items():
        with pool.open_clone(clone) as disk:
            disk.pwrite(DATA, place)
    return pool


@pytest.fixture(name="twice")
def make_twice(mounted: Path, request: pytest.FixtureRequest) -> Pool:
    return make_pool(mounted, request.node.name)


@pytest.fixture(name="twice_on_xfs")
def make_twice_on_xfs(mount: Mount, request: pytest.FixtureRequest) -> Pool:
    return make_pool(mount("xfs"), request.node.name)


def share(pool: Pool, **options: Any) -> dict[str, Any]:
    result: dict[str, Any] = drive(steps(pool, **options))
    return result


def steps(pool: Pool, **options: Any) -> Steps:
    return find_verb("hoist").begin(LocalTarget(pool), {"base": "base", "dedupe": True, **options})


def read(pool: Pool, name: str) -> list[bytes]:
    with pool.open_clone(name) as disk:
        return [disk.pread(stop - start, start) for start, stop in WINDOWS]


def used(pool: Pool) -> int:
    subprocess.run(["sync", "-f", str(pool.path)], check=True)
    status = os.statvfs(pool.path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_what_stands_in_two_places_takes_its_space_once(twice: Pool) -> None:
    contents = {name: read(twice, name) for name in PLACES}
    image = twice.path / "bases/base/image"
    identity = Identity.of(image.stat())
    before = used(twice)
    said = share(twice, dry_run=True)
    assert said == {"base": "base", "alike": len(DATA), "shared": 0, "one_in": 1, "dry_run": True}
    assert used(twice) == before
    assert share(twice)["shared"] == len(DATA)
    after = used(twice)
    print(f"used: {before} bytes before, {after} after: {before - after} less")
    assert abs(before - after - len(DATA)) < SLACK
    assert {name: read(twice, name) for name in PLACES} == contents
    assert list(check_pool(twice.path, deep=True)) == []
    assert Identity.of(image.stat()) == identity
    again = share(twice)
    assert (again["alike"], again["shared"]) == (0, 0)


def test_the_base_and_the_layers_of_snapshots_share_as_well(twice: Pool) -> None:
    with twice.open_clone("web1") as disk:
        disk.pwrite(BASE[BLOCK_SIZE:], 8 * MIB)
    twice.snapshot("web1@old")
    with twice.open_clone("web1") as disk:
        disk.pwrite(DATA[:MIB], 12 * MIB)
        disk.pwrite(DATA[:MIB], 16 * MIB)
    identity = Identity.of((twice.path / "bases/base/image").stat())
    contents, before = {name: read(twice, name) for name in PLACES}, used(twice)
    expected = len(DATA) + len(BASE) - BLOCK_SIZE + 2 * MIB
    assert share(twice)["shared"] == expected
    assert abs(before - used(twice) - expected) < SLACK
    assert {name: read(twice, name) for name in PLACES} == contents
    assert list(check_pool(twice.path, deep=True)) == []
    assert Identity.of((twice.path / "bases/base/image").stat()) == identity


def test_layers_that_no_clone_stands_on_or_that_have_no_name_share_as_well(mount: Mount) -> None:
    pool = make_pool(mount("xfs"), "layered")
    with pool.open_clone("web1") as disk:
        disk.pwrite(DATA[:MIB], PLACES["web2"])
    pool.snapshot("web1@old")
    pool.reset("web1")
    assert share(pool, dry_run=True)["alike"] == len(DATA) + MIB  # web1@old is seen, which is beneath nothing
    pool.create_clones("base", ["web3", "web4"], size=SIZE)
    for name in ("web3", "web4"):
        with pool.open_clone(name) as disk:
            disk.pwrite(DATA[MIB - 1 :: -1], 0)
    drive(find_verb("hoist").begin(LocalTarget(pool), {"base": "base", "min_clones": 2}))
    with pool.open_clone("web1") as disk:
        disk.pwrite(DATA[MIB - 1 :: -1], 16 * MIB)
    assert share(pool)["shared"] == len(DATA) + 2 * MIB
    assert list(check_pool(pool.path, deep=True)) == []


def test_a_run_ends_where_the_data_of_a_segment_does() -> None:
    delta = sharing._File(0, BLOCKS_PER_SEGMENT + 10, DeltaMap(Path(), 0, b"", FILE_SYSTEM))
    for first, last in ((0, BLOCKS_PER_SEGMENT - 1), (BLOCKS_PER_SEGMENT, BLOCKS_PER_SEGMENT + 9)):
        for block in (first, first + 5, last):
            assert delta.data_around(place_of(block)) == (place_of(first), place_of(last) + BLOCK_SIZE)


def test_a_clone_that_is_written_to_meanwhile_keeps_what_was_written(twice: Pool) -> None:
    dice = random.Random(3)
    with twice.open_clone("web2") as disk:
        model = bytearray(DATA)
        for _ in steps(twice):
            place = dice.randrange(len(model) - 10_000)
            model[place : place + 10_000] = dice.randbytes(10_000)
            disk.pwrite(model[place : place + 10_000], PLACES["web2"] + place)
        disk.flush()
        assert disk.pread(len(model), PLACES["web2"]) == model
    assert read(twice, "web1")[0][MIB : MIB + len(DATA)] == DATA
    assert list(check_pool(twice.path, deep=True)) == []


def test_what_changes_between_the_comparison_and_the_call_stays_changed(
    twice_on_xfs: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with twice_on_xfs.open_clone("web2") as disk:

        def change(*_: Any) -> bool:
            disk.pwrite(b"changed", PLACES["web2"] + MIB)
            return False

        monkeypatch.setattr(sharing, "_is_shared", change)
        result = share(twice_on_xfs)
        assert 0 < result["shared"] < result["alike"] == len(DATA)
        changed = DATA[:MIB] + b"changed" + DATA[MIB + 7 :]
        assert disk.pread(len(DATA), PLACES["web2"]) == changed
    assert read(twice_on_xfs, "web1")[0][MIB : MIB + len(DATA)] == DATA


def test_a_table_that_is_full_keeps_one_block_in_some_and_finds_long_runs(
    twice_on_xfs: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "MAX_HASHES", 64)
    result = share(twice_on_xfs)
    assert result["one_in"] >= 32
    assert result["shared"] == len(DATA)


def test_a_block_that_repeats_itself_is_shared_within_one_file(twice_on_xfs: Pool) -> None:
    before = used(twice_on_xfs)
    with twice_on_xfs.open_clone("web1") as disk:
        disk.pwrite(b"again..." * (4 * MIB // 8), 8 * MIB)
    contents = read(twice_on_xfs, "web1")
    assert share(twice_on_xfs)["shared"] >= len(DATA) + 3 * MIB
    assert used(twice_on_xfs) - before < MIB - len(DATA) + SLACK
    assert read(twice_on_xfs, "web1") == contents


def test_short_runs_stay_as_they_are(mount: Mount) -> None:
    pool = Pool.open(mount("xfs") / "short", create=True)
    (pool.path.parent / "short.img").write_bytes(BASE)
    pool.import_base(pool.path.parent / "short.img", "base")
    pool.create_clones("base", ["web1"], size=SIZE)
    with pool.open_clone("web1") as disk:
        disk.pwrite(BASE[: sharing.MIN_RUN - BLOCK_SIZE], 8 * MIB)
    assert share(pool)["alike"] == 0
    with pool.open_clone("web1") as disk:
        disk.pwrite(BASE[: sharing.MIN_RUN], 8 * MIB)
    assert share(pool)["shared"] == sharing.MIN_RUN


def test_a_file_system_that_cannot_says_so_and_nothing_is_changed(mount: Mount) -> None:
    pool = make_pool(mount("ext4"), "pool")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_blocks) for path in pool.path.rglob("*/*/*")}
    for dry_run in (True, False):
        with pytest.raises(UsageError, match="this file system cannot share extents: XFS with reflink, and btrfs, can"):
            share(pool, dry_run=dry_run)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_blocks) for path in pool.path.rglob("*/*/*")}
    assert after == before


def test_the_number_of_clones_is_of_no_account(pool: Pool) -> None:
    with pytest.raises(UsageError, match="takes no --min-clones"):
        share(pool, min_clones=2)


def test_the_call_says_what_differs_and_what_cannot_be(mounted: Path) -> None:
    path = mounted / "file"
    path.write_bytes(b"a" * 65536 + b"a" * 65536 + b"b" * 65536)
    with open(path, "rb") as file:
        assert FILE_SYSTEM.dedupe(file.fileno(), 0, file.fileno(), 65536, 65536) == 65536
        assert FILE_SYSTEM.dedupe(file.fileno(), 0, file.fileno(), 131072, 65536) == 0
        with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
            FILE_SYSTEM.dedupe(file.fileno(), 0, file.fileno(), 100, 65536)
    assert path.read_bytes() == b"a" * 131072 + b"b" * 65536


def test_the_command_line_says_what_is_shared(mount: Mount) -> None:
    def run(path: Path, *options: str, status: int = 0) -> str:
        result = CliRunner().invoke(app, ["--pool", str(path), "hoist", "base", "--dedupe", *options])
        assert result.exit_code == status, result.output
        return result.output.strip()

    path = make_pool(mount("xfs"), "spoken").path
    assert run(path, "--dry-run") == "4 MiB in what stands on 'base' could be shared"
    assert json.loads(run(path, "--dry-run", "--json"))["alike"] == len(DATA)
    assert run(path) == "4 MiB in what stands on 'base' is shared now"
    assert run(path) == "'base' and what stands on it have nothing alike that is not shared already"
    assert "takes no --min-clones" in run(path, "--min-clones", "2", status=2)
