"""What clones cost: the time to make, open and list them, the disk that they take, the memory of a server of many."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from integration.bench.processes import memory_mb
from integration.served import COMMAND, ENVIRONMENT, nbdclone, served
from nbdclone.client import Client
from nbdclone.store.pool import Pool

HUGE = 1 << 40
CLONES = 1000
SPARE_FILES = 256  # besides one descriptor for each connection
REPEATS = 21


@dataclass(frozen=True, slots=True)
class Cost:
    """A cost that was measured. ``limit``, in the same unit, is the goal; None where there is none."""

    what: str
    value: float
    unit: str
    limit: float | None = None


def measure_costs(directory: Path, size: int = HUGE, clones: int = CLONES) -> list[Cost]:
    """Measure on a pool of its own in ``directory``, over a sparse base of ``size`` bytes."""
    shown = f"{size >> 40} TiB" if size >= 1 << 40 else f"{size >> 20} MiB"
    image = directory / "sparse.raw"
    with open(image, "wb") as file:
        file.truncate(size)
    nbdclone("--pool", directory / "pool", "import", image, "--name", "base")
    pool = Pool.open(directory / "pool")
    return [
        *_making(pool, shown),
        *_opening(pool, shown),
        *_many(pool, clones),
    ]


def _making(pool: Pool, shown: str) -> list[Cost]:
    names = iter(f"made-{number}" for number in range(10_000))
    in_process = _median_ms(lambda: pool.create_clones("base", [next(names)]))
    as_command = _median_ms(lambda: nbdclone("--pool", pool.path, "clone", "base", next(names)), repeats=5)
    return [
        Cost(f"making a clone of a {shown} base", in_process, "ms", limit=10),
        Cost("the same as a command, the interpreter's start included", as_command, "ms"),
        Cost("disk that it takes", _disk_usage(pool.path / "clones" / "made-0") / 1024, "KiB", limit=64),
    ]


def _opening(pool: Pool, shown: str) -> list[Cost]:
    def open_and_read() -> None:
        with pool.open_clone("made-0") as clone:
            clone.pread(4096, clone.size // 2)

    return [
        Cost(f"opening and closing a {shown} clone", _median_ms(lambda: pool.open_clone("made-0").close()), "ms", 10),
        Cost("the same with a read in between", _median_ms(open_and_read), "ms"),
    ]


def _many(pool: Pool, count: int) -> list[Cost]:
    missing = count - sum(name != "base" for name in pool.names())
    pool.create_clones("base", [f"many-{number}" for number in range(missing)])
    listing = _median_ms(lambda: _list(pool), repeats=3)
    idle_mb, used_mb, each_ms = asyncio.run(_serve_all(pool, [name for name in pool.names() if name != "base"]))
    return [
        Cost(f"listing {count:,} clones, as a command", listing / 1000, "s", limit=1),
        Cost(f"memory of a server with {count:,} clones, all connected", idle_mb, "MB", limit=150),
        Cost("the same when each has served a read", used_mb, "MB"),
        Cost("connecting to a clone that nobody has open yet", each_ms, "ms"),
    ]


def _list(pool: Pool) -> None:
    command = [*COMMAND, "--pool", str(pool.path), "ls"]
    subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True, timeout=120)


async def _serve_all(pool: Pool, names: list[str]) -> tuple[float, float, float]:
    """Connect to every clone at once: memory in MB then, and after a read from each; ms for each connection."""
    _allow_files(len(names) + SPARE_FILES)
    with served(pool.path) as server:
        async with contextlib.AsyncExitStack() as stack:
            began = time.perf_counter()
            clients = [
                await stack.enter_async_context(await Client.connect(server.uri(name), timeout=60)) for name in names
            ]
            each_ms = (time.perf_counter() - began) * 1000 / len(names)
            idle_mb = memory_mb(server.pid, "VmRSS")
            for client in clients:
                await client.pread(4096, client.size // 2)
            return idle_mb, memory_mb(server.pid, "VmRSS"), each_ms


def _allow_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _median_ms(work: Callable[[], object], repeats: int = REPEATS) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def _disk_usage(directory: Path) -> int:
    """Bytes of disk that a directory takes, with all that is in it."""
    return sum(os.lstat(path).st_blocks * 512 for path in [directory, *directory.rglob("*")])
