"""Incremental backups by other people's programs, which ask a server what was changed since a snapshot."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.packages import program, require
from integration.served import Served, nbdclone, save_export, served, sha256_of_file

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
SIZE = 136 * MIB  # two segments
DEADLINE_S = 60
CONTEXT = "qemu:dirty-bitmap:golden"


def run(*args: str | Path) -> str:
    command = [program(str(args[0])), *map(str, args[1:])]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def write_with_fio(server: Served, seed: int) -> None:
    """Random writes and trims across the border of the segments, verified."""
    run(
        "fio", "--name=write", "--ioengine=nbd", f"--uri={server.uri('web1')}", "--rw=randwrite", "--bsrange=512-64k",
        "--blockalign=512", f"--offset={118 + 3 * seed}m", "--size=8m", "--io_size=3m", f"--randseed={seed}",
        "--verify=crc32c", "--verify_state_save=0", "--iodepth=8", "--minimal",
    )  # fmt: skip
    commands = [f"write -z {seed + 3}M 300k", f"discard {100 + seed}M 1M", f"write -P 9 {seed + 1}M 4k", "flush"]
    words = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "raw", "-d", "unmap", *words, server.uri("web1"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A clone with the snapshots ``golden`` and ``second``, both made while a server had it, and written since."""
    require("fio", "qemu-utils", "libnbd-bin", "python3-libnbd")
    directory = tmp_path_factory.mktemp("changed")
    image = directory / "debian.img"
    with open(image, "wb") as file:
        for offset in (0, 100 * MIB, 130 * MIB):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(2 * MIB))
        file.truncate(SIZE)
    pool = directory / "pool"
    nbdclone("--pool", pool, "import", image, "--name", "debian")
    nbdclone("--pool", pool, "clone", "debian", "web1")
    with served(pool) as server:
        for seed, name in enumerate(["golden", "second"]):
            write_with_fio(server, seed)
            nbdclone("--pool", pool, "snapshot", f"web1@{name}")
        write_with_fio(server, 2)
        yield server


@pytest.fixture(scope="module")
def full(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full backup of the first snapshot."""
    return save_export(server.uri("web1@golden"), tmp_path_factory.mktemp("full") / "golden.raw")


@pytest.fixture(scope="module")
def second(server: Served, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The hash of the second snapshot."""
    return sha256_of_file(save_export(server.uri("web1@second"), tmp_path_factory.mktemp("second") / "second.raw"))


def dirty_ranges(server: Served, export: str, context: str = CONTEXT) -> list[tuple[int, int]]:
    """The (offset, length) of what nbdinfo tells to be dirty."""
    told = json.loads(run("nbdinfo", f"--map={context}", "--json", server.uri(export)))
    assert sum(extent["length"] for extent in told) == SIZE
    assert {extent["type"] for extent in told} <= {0, 1}
    return [(extent["offset"], extent["length"]) for extent in told if extent["type"]]


def node(server: Served, export: str) -> str:
    return f"driver=nbd,server.type=unix,server.path={server.socket},export={export}"


def test_nbdinfo_maps_what_was_changed_under_both_names(server: Served) -> None:
    ranges = dirty_ranges(server, "web1@second")
    assert ranges == dirty_ranges(server, "web1@second", "nbdclone:changed-since=golden")
    assert 3 * MIB < sum(length for _, length in ranges) < 10 * MIB
    more = dirty_ranges(server, "web1")
    assert sum(length for _, length in more) > sum(length for _, length in ranges)


def test_nbdinfo_lists_the_contexts_of_the_snapshots(server: Served) -> None:
    told = json.loads(run("nbdinfo", "--list", "--json", server.uris[0]))
    bitmaps = {
        export["export-name"]: [name for name in export["contexts"] if name.startswith("qemu:dirty-bitmap:")]
        for export in told["exports"]
    }
    both = [CONTEXT, "qemu:dirty-bitmap:second"]
    assert bitmaps == {"debian": [], "web1": both, "web1@golden": [], "web1@second": both[:1]}


def test_qemu_img_maps_what_nbdinfo_does(server: Served) -> None:
    """qemu-img shows a bitmap in the place of the allocation: "data" is false where it is dirty."""
    options = f"{node(server, 'web1@second')},x-dirty-bitmap={CONTEXT}"
    told = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    assert [(extent["start"], extent["length"]) for extent in told if not extent["data"]] == dirty_ranges(
        server, "web1@second"
    )


def test_an_incremental_backup_by_qemu_is_the_snapshot(server: Served, full: Path, second: str, tmp_path: Path) -> None:
    """An overlay of the snapshot, into which qemu-io brings what is dirty (-C copies what is read); then it is put on
    the full backup instead.
    """
    options = f"{node(server, 'web1@second')},x-dirty-bitmap={CONTEXT}"
    told = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    increment = tmp_path / "increment.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", server.uri("web1@second"), "-F", "raw", increment)
    reads = [f"read {extent['start']} {extent['length']}" for extent in told if not extent["data"]]
    for at in range(0, len(reads), 500):
        run(
            "qemu-io", "-C", "-f", "qcow2", *(word for read in reads[at : at + 500] for word in ("-c", read)), increment
        )
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", full, "-F", "raw", increment)
    assert increment.stat().st_blocks * 512 < 20 * MIB
    restored = tmp_path / "restored.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", increment, restored)
    assert sha256_of_file(restored) == second != sha256_of_file(full)


@pytest.mark.parametrize("context", [CONTEXT, "nbdclone:changed-since=golden"])
def test_an_incremental_backup_by_libnbd_is_the_snapshot(
    server: Served, full: Path, second: str, tmp_path: Path, context: str
) -> None:
    backup = tmp_path / "backup.raw"
    run("cp", full, backup)
    script = f"""
import nbd
h = nbd.NBD()
h.add_meta_context({context!r})
h.connect_uri({server.uri("web1@second")!r})
assert h.can_meta_context({context!r})
changed, offset = [], 0
def note(name, at, entries, error):
    for length, status in zip(entries[::2], entries[1::2]):
        if status & 1:
            changed.append((at, length))
        at += length
    global offset
    offset = at
    return 0
while offset < h.get_size():
    h.block_status(h.get_size() - offset, offset, note)
with open({str(backup)!r}, "r+b") as file:
    for at, length in changed:
        file.seek(at)
        file.write(h.pread(length, at))
print(sum(length for _, length in changed))
"""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10 * MIB
    assert sha256_of_file(backup) == second
