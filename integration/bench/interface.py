"""What it costs that the store calls the operating system through one narrow interface.

    python -m integration.bench.interface [DIRECTORY]

Reads and rewrites 4 KiB at random in a clone that is in memory, on the hot path's own methods: as they are; with the
functions of `os` written into them; and, to see that a cost would show, through an interface of ordinary methods. They
take turns, round after round; what is compared is the processor's time within a round. The directory must be on a file
system that knows RWF_NOWAIT (ext4, XFS, btrfs); the default is where temporary files go.
"""

from __future__ import annotations

import inspect
import os
import random
import statistics
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbdclone.store.clone import Clone
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool

SIZE = 64 << 20
REQUESTS = 20_000  # of each kind in a round: some 50 ms
ROUNDS = 41

Work = Callable[[memoryview, int], None]


class Methods(FileSystem):
    """The same calls as methods that call on."""

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:  # type: ignore[override]
        return os.preadv(fd, buffers, offset, flags)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:  # type: ignore[override]
        return os.pwrite(fd, data, offset)


def direct() -> type[Clone]:
    """A Clone whose hot path names the functions of `os` where it had those of the interface."""
    methods = {}
    direct = {"_direct_preadv": os.preadv, "_direct_pwrite": os.pwrite}
    for method, old, new in (
        (Clone.read_into_nowait, "self._preadv(", "_direct_preadv("),
        (Clone._store, "self._pwrite(", "_direct_pwrite("),
    ):
        source = textwrap.dedent(inspect.getsource(method))
        assert source.count(old) == 1, f"{method.__name__} has no longer what is replaced here: {old}"
        names = {**method.__globals__, **direct}
        exec(source.replace(old, new).replace("self._nowait", str(os.RWF_NOWAIT)), names, methods)
    return type("Direct", (Clone,), methods)


def time_of(work: Work, view: memoryview, offsets: list[int]) -> float:
    """Microseconds of the processor for each request."""
    begun = time.thread_time_ns()
    for offset in offsets:
        work(view, offset)
    return (time.thread_time_ns() - begun) / len(offsets) / 1000


def main(directory: Path) -> None:
    image = directory / "image"
    image.write_bytes(os.urandom(SIZE))
    pool = Pool.open(directory / "pool", create=True)
    pool.import_base(image, "base")
    pool.create_clones("base", ["clone"])
    rng = random.Random(4)
    with pool.open_clone("clone") as clone:
        for offset in range(0, SIZE, 2 * BLOCK_SIZE):  # so that reads alternate between base and delta
            clone.pwrite(rng.randbytes(BLOCK_SIZE), offset)
        clone.flush()
        variants = {
            "as it is": clone,
            "os alone": direct()("clone", clone.layers),
            "methods": Clone("clone", clone.layers, Methods()),
        }
        everywhere = [block * BLOCK_SIZE for block in range(SIZE // BLOCK_SIZE)]
        view = memoryview(bytearray(rng.randbytes(BLOCK_SIZE)))
        for kind, places in (("read", everywhere), ("rewrite", everywhere[::2])):
            works: dict[str, Work] = {
                name: (variant.read_into_nowait if kind == "read" else variant.write_nowait)
                for name, variant in variants.items()
            }
            times: dict[str, list[float]] = {name: [] for name in works}
            for number in range(ROUNDS + 1):
                offsets = rng.choices(places, k=REQUESTS)
                names = list(works)
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    times[name].append(time_of(works[name], view, offsets))
            for name, found in times.items():
                found = found[1:]  # the first round brings everything into memory
                ratio = statistics.median(a / b for a, b in zip(found, times["os alone"][1:], strict=True))
                print(f"{kind} 4 KiB, {name + ':':10} {statistics.median(found):.3f} us, {(ratio - 1) * 100:+.1f} %")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(prefix="nbdclone-") as here:
            main(Path(here))
