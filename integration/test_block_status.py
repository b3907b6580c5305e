"""What other people's programs make of a clone's holes and layers, against what was done to it."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pytest

from integration.packages import program, require
from integration.served import Served, nbdclone, served, sha256_of_file

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
KIB = 1 << 10
DEADLINE_S = 60
BASE_SIZE = 16 * MIB
SIZE = 24 * MIB
PIECE = 64 * KIB
DATA, HOLE = 0, 3

IN_BASE = range(2 * MIB, 6 * MIB)  # data in the base; the rest of it is a hole
WRITTEN = [range(3 * MIB, 3 * MIB + PIECE), range(9 * MIB, 10 * MIB), range(20 * MIB, 21 * MIB)]
TRIMMED = [range(4 * MIB, 5 * MIB), range(12 * MIB, 12 * MIB + PIECE)]


def expected(allocation: bool) -> list[tuple[int, int, int]]:
    """(offset, length, status) of each extent by what was done: its allocation, or else its depth."""

    def status(offset: int) -> int:
        written, trimmed = (any(offset in part for part in parts) for parts in (WRITTEN, TRIMMED))
        if allocation:
            return DATA if written or (offset in IN_BASE and not trimmed) else HOLE
        return 1 if written or trimmed else 2 if offset < BASE_SIZE else 0

    extents = []
    for state, offsets in groupby(range(0, SIZE, PIECE), status):
        places = list(offsets)
        extents.append((places[0], len(places) * PIECE, state))
    return extents


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of a clone of which a part was written, a part trimmed, and the rest left as it was."""
    require("libnbd-bin", "qemu-utils")
    directory = tmp_path_factory.mktemp("status")
    image = directory / "image.raw"
    with open(image, "wb") as file:
        file.truncate(BASE_SIZE)
        file.seek(IN_BASE.start)
        file.write(random.Random(0).randbytes(len(IN_BASE)))
    pool = directory / "pool"
    nbdclone("--pool", pool, "import", image, "--name", "base")
    nbdclone("--pool", pool, "clone", "base", "web1", "--size", str(SIZE))
    with served(pool) as server:
        commands = [f"write -P 7 {part.start} {len(part)}" for part in WRITTEN]
        commands += [f"discard {part.start} {len(part)}" for part in TRIMMED]
        run("qemu-io", "-f", "raw", *(word for command in commands for word in ("-c", command)), server.uri("web1"))
        yield server


def run(*args: str | Path) -> str:
    command = [program(str(args[0])), *map(str, args[1:])]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def nbdinfo_map(server: Served, context: str) -> list[tuple[int, int, int]]:
    told = json.loads(run("nbdinfo", f"--map={context}", "--json", server.uri("web1")))
    return [(extent["offset"], extent["length"], extent["type"]) for extent in told]


def test_nbdinfo_maps_the_allocation(server: Served) -> None:
    assert nbdinfo_map(server, "base:allocation") == expected(allocation=True)


def test_nbdinfo_maps_the_depth(server: Served) -> None:
    assert nbdinfo_map(server, "qemu:allocation-depth") == expected(allocation=False)


def test_nbdinfo_maps_the_origin_which_counts_from_the_base(server: Served) -> None:
    from_the_base = {0: 0, 2: 1, 1: 2}
    depths = expected(allocation=False)
    assert nbdinfo_map(server, "nbdclone:origin") == [(at, size, from_the_base[depth]) for at, size, depth in depths]


def test_nbdinfo_lists_the_contexts_of_every_export(server: Served) -> None:
    told = json.loads(run("nbdinfo", "--list", "--json", server.uris[0]))
    contexts = {export["export-name"]: export["contexts"] for export in told["exports"]}
    all_three = ["base:allocation", "qemu:allocation-depth", "nbdclone:origin"]
    assert contexts == {"base": all_three, "web1": all_three}


def test_qemu_img_map_sees_data_and_zeros_where_they_are(server: Served) -> None:
    told = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", server.uri("web1")))
    assert [(extent["start"], extent["length"], HOLE if extent["zero"] else DATA) for extent in told] == expected(
        allocation=True
    )
    assert all(extent["data"] != extent["zero"] for extent in told)


def test_qemu_img_map_sees_what_is_the_clones_own(server: Served) -> None:
    """With this option qemu-img shows one other context: it says "data" for what is allocated further down."""
    options = f"driver=nbd,server.type=unix,server.path={server.socket},export=web1"
    told = json.loads(
        run("qemu-img", "map", "--output=json", "--image-opts", f"{options},x-dirty-bitmap=qemu:allocation-depth")
    )
    own = [(extent["start"], extent["length"]) for extent in told if not extent["present"]]
    assert own == [(at, size) for at, size, depth in expected(allocation=False) if depth == 1]


def test_a_copy_by_qemu_img_is_as_sparse_and_the_same(server: Served, tmp_path: Path) -> None:
    copy, plain = tmp_path / "copy.raw", tmp_path / "plain.raw"
    # Zeros that it would have to find by reading them do not count: there are never so many together.
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", "-S", "16M", server.uri("web1"), copy)
    check_copy(server, copy, plain)


def test_a_copy_by_nbdcopy_is_as_sparse_and_the_same(server: Served, tmp_path: Path) -> None:
    copy, plain = tmp_path / "copy.raw", tmp_path / "plain.raw"
    run("nbdcopy", "--sparse=0", "--destination-is-zero", server.uri("web1"), copy)
    check_copy(server, copy, plain)


def check_copy(server: Served, copy: Path, plain: Path) -> None:
    """``copy`` takes the space of the data alone, and is what a copy is that asks for no holes."""
    data = sum(size for _offset, size, status in expected(allocation=True) if status == DATA)
    assert data <= copy.stat().st_blocks * 512 < data + MIB
    run("nbdcopy", "--no-extents", "--sparse=0", "--allocated", server.uri("web1"), plain)
    assert sha256_of_file(copy) == sha256_of_file(plain)


def test_libnbd_gets_several_contexts_at_once(server: Served) -> None:
    require("python3-libnbd")
    script = f"""
import json, nbd
h = nbd.NBD()
names = ["base:allocation", "qemu:allocation-depth", "nbdclone:origin"]
for name in [*names, "x-strange:thing", "base:"]:
    h.add_meta_context(name)
h.connect_uri({server.uri("web1")!r})
assert [h.can_meta_context(name) for name in [*names, "x-strange:thing"]] == [True, True, True, False]

told = {{}}
def note(name, offset, entries, error):
    told[name] = list(zip(entries[::2], entries[1::2]))
    return 0

h.block_status({SIZE}, 0, note)
whole, told = told, {{}}
h.block_status({SIZE - 3 * MIB}, {3 * MIB}, note, nbd.CMD_FLAG_REQ_ONE)
print(json.dumps([whole, told]))
"""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    whole, one = json.loads(done.stdout)
    allocation, depth = expected(allocation=True), expected(allocation=False)
    assert whole["base:allocation"] == [[size, status] for _offset, size, status in allocation]
    assert whole["qemu:allocation-depth"] == [[size, status] for _offset, size, status in depth]
    assert one == {
        "base:allocation": [[MIB, DATA]],
        "qemu:allocation-depth": [[PIECE, 1]],
        "nbdclone:origin": [[PIECE, 2]],
    }


def test_libnbd_is_told_zeros_as_holes_when_it_reads(server: Served) -> None:
    require("python3-libnbd")
    script = f"""
import json, nbd
h = nbd.NBD()
h.connect_uri({server.uri("web1")!r})
reads = []
for length, offset, flags in [
    ({SIZE}, 0, 0), ({SIZE}, 0, nbd.CMD_FLAG_DF), ({PIECE}, {TRIMMED[0].start}, 0), (512, {SIZE - 512}, 0),
    (4096, {WRITTEN[0].start}, 0)
]:
    chunks = []
    data = h.pread_structured(length, offset, lambda data, at, kind, error: chunks.append((at, len(data), kind)), flags)
    reads.append(chunks)
    assert data == h.pread(length, offset)
print(json.dumps([nbd.READ_DATA, nbd.READ_HOLE, reads]))
"""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", script], check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    data, hole, reads = json.loads(done.stdout)
    kinds = {DATA: data, HOLE: hole}
    assert reads == [
        [[offset, size, kinds[status]] for offset, size, status in expected(allocation=True)],
        [[0, SIZE, data]],
        [[TRIMMED[0].start, PIECE, hole]],
        [[SIZE - 512, 512, hole]],
        [[WRITTEN[0].start, 4096, data]],
    ]
