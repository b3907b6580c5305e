"""Hoist on real input: clones of the Debian disk, with the same packages installed in each.

    python -m integration.hoist                  # 4 clones
    python -m integration.hoist --clones 20      # the figures of docs/lifecycle.md

Takes root (loop devices, chroot). In each of so many copies of the image, mounted on a loop device, the packages are
installed with apt in a chroot, one copy after the other, and the machine gets a name of its own. What a copy has
otherwise than the image, block by block, is written to a clone of it. Then `nbdclone hoist`, after which each clone has
to have the hash that it had before.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from integration.guest.debian_disk import ROOT_OFFSET, debian_disk
from nbdclone.store.pool import Pool

BLOCK, MIB = 4096, 1 << 20
PACKAGES = ("nginx-light", "python3-minimal")
_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "DEBIAN_FRONTEND": "noninteractive",
    "SOURCE_DATE_EPOCH": "0",
}


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | _ENVIRONMENT)


@contextlib.contextmanager
def mounted(image: Path, debs: Path) -> Iterator[Path]:
    """The root file system of a disk image, with the directory of packages at its /mnt."""
    tree = image.with_suffix(".tree")
    tree.mkdir()
    run("mount", "-o", f"loop,offset={ROOT_OFFSET}", str(image), str(tree))
    try:
        run("mount", "--bind", str(debs), str(tree / "mnt"))
        try:
            yield tree
        finally:
            run("umount", str(tree / "mnt"))
    finally:
        run("umount", str(tree))
        tree.rmdir()


def copy_of(image: Path, target: Path) -> Path:
    run("cp", "--sparse=always", "--no-preserve=mode", str(image), str(target))
    return target


def download(image: Path, directory: Path, debs: Path) -> None:
    """The packages and what they need that the image has not got."""
    scratch = copy_of(image, directory / "scratch.img")
    with mounted(scratch, debs) as tree:
        shutil.copy("/etc/resolv.conf", tree / "etc/resolv.conf")
        get = (
            "chroot",
            str(tree),
            "apt-get",
            "-qq",
            "-o",
            "Dir::Cache::archives=/mnt",
            "-o",
            "APT::Sandbox::User=root",
        )
        (debs / "partial").mkdir()
        run(*get, "update")
        run(*get, "install", "-y", "--download-only", "--no-install-recommends", *PACKAGES)
    scratch.unlink()


def install(image: Path, debs: Path, name: str) -> None:
    with mounted(image, debs) as tree:
        (tree / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")  # no daemon is started in the chroot
        (tree / "usr/sbin/policy-rc.d").chmod(0o755)
        run("chroot", str(tree), "sh", "-c", "apt-get -qq install -y --no-install-recommends /mnt/*.deb")
        (tree / "etc/hostname").write_text(f"{name}\n")
        (tree / "etc/machine-id").write_text(hashlib.md5(name.encode()).hexdigest() + "\n")


def write_difference(old: Path, new: Path, pool: Pool, name: str) -> None:
    """Write to the clone what the new image has otherwise."""
    with open(old, "rb") as before, open(new, "rb") as after, pool.open_clone(name) as clone:
        for offset in range(0, clone.size, MIB):
            one, other = (os.pread(file.fileno(), MIB, offset) for file in (before, after))
            if one == other:
                continue
            for at in range(0, len(other), BLOCK):
                if one[at : at + BLOCK] != other[at : at + BLOCK]:
                    clone.pwrite(other[at : at + BLOCK], offset + at)


def hash_of(pool: Pool, name: str) -> str:
    whole = hashlib.blake2b()
    with pool.open_clone(name) as clone:
        for offset in range(0, clone.size, MIB):
            whole.update(clone.pread(min(MIB, clone.size - offset), offset))
    return whole.hexdigest()


def allocated(pool: Pool) -> int:
    return sum(path.stat().st_blocks * 512 for path in pool.path.glob("*/*/delta"))


def show(directory: Path, count: int) -> None:
    image, pool = debian_disk(), Pool.open(directory / "pool", create=True)
    debs = directory / "debs"
    debs.mkdir()
    download(image, directory, debs)
    packages = sorted(path.name.partition("_")[0] for path in debs.glob("*.deb"))
    print(f"{len(packages)} packages in each of {count} clones: {', '.join(packages)}")
    names = [f"web{number}" for number in range(1, count + 1)]
    pool.import_base(image, "debian")
    pool.create_clones("debian", names)
    for name in names:
        copy = copy_of(image, directory / f"{name}.img")
        install(copy, debs, name)
        write_difference(image, copy, pool, name)
        copy.unlink()
    hashes = [hash_of(pool, name) for name in names]
    before = allocated(pool)
    began = time.perf_counter()
    command = [sys.executable, "-m", "nbdclone", "--pool", str(pool.path), "hoist", "debian", "--json"]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    took_s = time.perf_counter() - began
    assert [hash_of(pool, name) for name in names] == hashes, "a clone has changed"
    after = allocated(pool)
    assert (result["before"], result["after"]) == (before, after)
    print(
        f"deltas before {before / MIB:.1f} MiB ({before / count / MIB:.1f} each), after {after / MIB:.1f} MiB "
        f"(layer {result['layer'] / MIB:.1f}, then {(after - result['layer']) / count / MIB:.1f} each); "
        f"{len(result['clones'])} clones moved, {took_s:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clones", type=int, default=4)
    parser.add_argument("--all-cpus", action="store_true", help="install with all of this machine's processors")
    given = parser.parse_args()
    if not given.all_cpus:
        # ext4 allocates small files from a place for each processor: with one, as in a small guest, the same files
        # come to the same blocks more often.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="nbdclone-hoist-") as path:
        show(Path(path), given.clones)


if __name__ == "__main__":
    main()
