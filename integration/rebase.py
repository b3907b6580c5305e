"""Rebase beside qemu-img's, on clones of the same content.

    python -m integration.rebase                                                   # small: a second or two
    python -m integration.rebase --size 1024 --clones 20 --rounds 3                # the figures of docs/lifecycle.md
    python -m integration.rebase --size 1024 --clones 20 --directory /dev/shm      # without the disk

An image, and an update of it that has other content in some of it; clones of it, each of which has written something:
once as nbdclone's, once as qcow2 overlays. Each round moves all of them to the update, with both programs in turn, and
compares what the clones read with what they read before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nbdclone.store.pool import Pool

MIB = 1 << 20
BLOCK = 4096
# An update writes files: runs of so many blocks.
RUNS = (1, 2, 4, 16, 64, 256)
# What each clone has written itself, in pieces of 8 KiB.
OWN_PIECES = 256


class Took(NamedTuple):
    """Seconds: on the clock, and of processors."""

    wall_s: float
    cpu_s: float


def make_images(directory: Path, size: int, changed: float, seed: int) -> tuple[Path, Path]:
    """An image of ``size`` bytes, a quarter of it holes, and one that differs in that share of it."""
    rng = random.Random(seed)
    old, new = directory / "old.img", directory / "new.img"
    with open(old, "wb") as file:
        for _ in range(size // MIB):
            if rng.random() < 0.25:
                file.seek(MIB, os.SEEK_CUR)
            else:
                file.write(rng.randbytes(MIB))
        file.truncate(size)
    shutil.copyfile(old, new)
    with open(new, "r+b") as file:
        left = int(size * changed)
        while left > 0:
            length = min(rng.choice(RUNS) * BLOCK, size)
            file.seek(rng.randrange((size - length) // BLOCK + 1) * BLOCK)
            file.write(rng.randbytes(length))
            left -= length
    return old, new


def own_writes(size: int, number: int) -> list[tuple[int, bytes]]:
    """What the clone of that number writes: (offset, data)."""
    rng = random.Random(f"clone {number}")
    return [(rng.randrange((size - 8192) // 512) * 512, rng.randbytes(8192)) for _ in range(OWN_PIECES)]


def make_clones(directory: Path, old: Path, new: Path, count: int) -> list[str]:
    """The same clones for both. Their names."""
    names = [f"clone{number}" for number in range(count)]
    pool = Pool.open(directory / "pool", create=True)
    pool.import_base(old, "old")
    pool.import_base(new, "new")
    pool.create_clones("old", names)
    for number, name in enumerate(names):
        writes = own_writes(old.stat().st_size, number)
        with pool.open_clone(name) as clone:
            for offset, data in writes:
                clone.pwrite(data, offset)
        overlay = directory / f"{name}.qcow2"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(old), str(overlay))
        data_file = directory / "piece"
        commands = []
        for at, (offset, data) in enumerate(writes):
            data_file.with_name(f"piece{at}").write_bytes(data)
            commands += ["-c", f"write -q -s {directory}/piece{at} {offset} {len(data)}"]
        run("qemu-io", "-f", "qcow2", *commands, str(overlay))
    for piece in directory.glob("piece*"):
        piece.unlink()
    return names


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def timed(work: Callable[[], object]) -> Took:
    """What ``work``, which waits for other processes, took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    work()
    wall_s = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def hash_of_clone(directory: Path, name: str) -> str:
    whole = hashlib.blake2b()
    with Pool.open(directory / "pool").open_clone(name) as clone:
        for offset in range(0, clone.size, MIB):
            whole.update(clone.pread(min(MIB, clone.size - offset), offset))
    return whole.hexdigest()


def hash_of_overlay(directory: Path, name: str) -> str:
    raw = directory / "check.img"
    run("qemu-img", "convert", "-O", "raw", str(directory / f"{name}.qcow2"), str(raw))
    whole = hashlib.blake2b()
    with open(raw, "rb") as file:
        while data := file.read(MIB):
            whole.update(data)
    raw.unlink()
    return whole.hexdigest()


def rebase_with_nbdclone(directory: Path, names: list[str], onto: str) -> None:
    pool = str(directory / "pool")
    command = [sys.executable, "-m", "nbdclone", "--pool", pool, "rebase", *names, "--onto", onto, "--json"]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert {line["state"] for line in result["clones"]} == {"done"}


def rebase_with_qemu(directory: Path, names: list[str], onto: Path) -> None:
    for name in names:
        run("qemu-img", "rebase", "-f", "qcow2", "-F", "raw", "-b", str(onto), str(directory / f"{name}.qcow2"))


def one_round(directory: Path, size: int, count: int, changed: float, seed: int) -> tuple[Took, Took]:
    """Make all anew, and rebase with both; raises AssertionError if a clone reads otherwise than before."""
    old, new = make_images(directory, size, changed, seed)
    names = make_clones(directory, old, new, count)
    looked_at = names[:: max(count // 4, 1)]
    before = [hash_of_clone(directory, name) for name in looked_at]
    assert [hash_of_overlay(directory, name) for name in looked_at] == before
    os.sync()
    works = [
        lambda: rebase_with_nbdclone(directory, names, "new"),
        lambda: rebase_with_qemu(directory, names, new),
    ]
    took: dict[int, Took] = {}
    for number in (0, 1) if seed % 2 else (1, 0):
        took[number] = timed(works[number])
        os.sync()
    old.unlink()  # qemu-img needs it no more, and nbdclone's pool has its own
    Pool.open(directory / "pool").remove(["old"])
    assert [hash_of_clone(directory, name) for name in looked_at] == before, "nbdclone's clones have changed"
    assert [hash_of_overlay(directory, name) for name in looked_at] == before, "qemu's overlays have changed"
    return took[0], took[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="of the base, in MiB")
    parser.add_argument("--clones", type=int, default=4)
    parser.add_argument("--changed", type=float, default=5.0, help="how much of it the update changes, in per cent")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where it is done; default: that of temporary files")
    given = parser.parse_args()
    for number in range(given.rounds):
        with tempfile.TemporaryDirectory(prefix="nbdclone-rebase-", dir=given.directory) as path:
            ours, theirs = one_round(Path(path), given.size * MIB, given.clones, given.changed / 100, seed=number + 1)
        print(
            f"{given.clones} clones of {given.size} MiB, {given.changed:g} % changed: "
            f"nbdclone {ours.wall_s:.2f} s (CPU {ours.cpu_s:.2f}), qemu-img {theirs.wall_s:.2f} s "
            f"(CPU {theirs.cpu_s:.2f}): {theirs.wall_s / ours.wall_s:.1f} times",
            flush=True,
        )


if __name__ == "__main__":
    main()
