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

from integration.bench.processes import memory_mb, process_count
from integration.served import COMMAND, ENVIRONMENT, nbdclone, served
from nbdclone.client import Client
from nbdclone.store.pool import Pool

HUGE = 1 << 40
CLONES = 1000
LISTED = 10_000
IDLE_CONNECTIONS = 2000
LARGEST = (16 << 40) - (256 << 30)  # with its metadata, what ext4 takes in one file
SPARE_FILES = 256  # besides one descriptor for each connection
REPEATS = 21
# So many clones are connected to before memory is first looked at: each worker has some, and what it takes for itself
# is not counted for the clones. The last worker starts meanwhile: the processes have to be the same for so long.
SETTLING = 16
SETTLED_S = 2.0


@dataclass(frozen=True, slots=True)
class Cost:
    """A cost that was measured. ``limit``, in the same unit, is the goal; None where there is none."""

    what: str
    value: float
    unit: str
    limit: float | None = None


def measure_costs(directory: Path, size: int = HUGE, clones: int = CLONES, listed: int = LISTED) -> list[Cost]:
    """Measure on a pool of its own in ``directory``, over a sparse base of ``size`` bytes.

    ``clones`` are connected to, each; ``listed`` are there at the end.
    """
    shown = f"{size >> 40} TiB" if size >= 1 << 40 else f"{size >> 20} MiB"
    image = directory / "sparse.raw"
    with open(image, "wb") as file:
        file.truncate(size)
    nbdclone("--pool", directory / "pool", "import", image, "--name", "base")
    pool = Pool.open(directory / "pool")
    return [
        *_making(pool, shown),
        *_opening(pool, shown),
        *_largest(pool),
        *_many(pool, clones),
        *_batch(pool, clones),
        *_listing(pool, listed),
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


def _largest(pool: Pool) -> list[Cost]:
    pool.create_clones("base", ["largest"], size=LARGEST)
    opening = _median_ms(lambda: pool.open_clone("largest").close())
    pool.remove(["largest"])
    return [Cost(f"opening and closing a clone of {LARGEST / (1 << 40):.2f} TiB", opening, "ms", 10)]


def _fill(pool: Pool, count: int) -> list[str]:
    """Make clones until there are so many; the names of all."""
    missing = count - sum(name != "base" for name in pool.names())
    if missing > 0:
        pool.create_clones("base", [f"filled-to-{count}-{number}" for number in range(missing)])
    return [name for name in pool.names() if name != "base"]


def _many(pool: Pool, count: int) -> list[Cost]:
    names = _fill(pool, count)
    listing = _command_s(pool, "ls")
    settled_mb, idle_mb, used_mb, each_ms = asyncio.run(_serve_all(pool, names))
    _settled_mb, same_mb, *_ = asyncio.run(_serve_all(pool, names[:1] * IDLE_CONNECTIONS))
    each_kib = (idle_mb - settled_mb) * 1e6 / 1024 / (len(names) - SETTLING)
    return [
        Cost(f"listing {count:,} clones, as a command", listing, "s", limit=1),
        Cost(f"memory (PSS) of a server with {count:,} clones, all connected", idle_mb, "MB", limit=150),
        Cost("memory for each of them", each_kib, "KiB", limit=16),
        Cost("memory of the server when each has served a read", used_mb, "MB"),
        Cost("connecting to a clone that nobody has open yet", each_ms, "ms"),
        Cost(f"memory of a server with {IDLE_CONNECTIONS:,} idle connections to one clone", same_mb, "MB", limit=150),
    ]


def _batch(pool: Pool, count: int) -> list[Cost]:
    names = [f"batch-{number}" for number in range(count)]
    making = _command_s(pool, "clone", "base", *names, repeats=1)
    removing = _command_s(pool, "rm", *names, repeats=1)
    return [
        Cost(f"making {count:,} clones in one command", making, "s", limit=3),
        Cost(f"removing {count:,} clones in one command", removing, "s", limit=3),
    ]


def _listing(pool: Pool, count: int) -> list[Cost]:
    names = _fill(pool, count)

    def start() -> None:
        with served(pool.path):
            pass

    return [
        *(
            Cost(f"{' '.join(command)} with {count:,} clones, as a command", _command_s(pool, *command), "s", limit=1)
            for command in (("ls",), ("ls", "--json"), ("tree",))
        ),
        Cost(f"info of one of {count:,} clones, as a command", _command_s(pool, "info", names[0]), "s"),
        Cost("changing its quota, as a command", _command_s(pool, "quota", names[0], "1G"), "s"),
        Cost(f"starting and stopping a server of {count:,} clones", _median_ms(start, repeats=3) / 1000, "s", limit=1),
    ]


def _command_s(pool: Pool, *args: str, repeats: int = 3) -> float:
    """Seconds that a command takes, the interpreter's start included."""
    command = [*COMMAND, "--pool", str(pool.path), *args]

    def run() -> None:
        subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=True, timeout=120)

    return _median_ms(run, repeats) / 1000


async def _serve_all(pool: Pool, names: list[str]) -> tuple[float, float, float, float]:
    """Connect to every clone at once: memory in MB after the first SETTLING, after all, and after a read from each; ms
    for each connection. The memory is that of all processes, and what they share counts once.
    """
    _allow_files(len(names) + SPARE_FILES)
    with served(pool.path) as server:
        async with contextlib.AsyncExitStack() as stack:

            async def connect(some: list[str]) -> list[Client]:
                return [
                    await stack.enter_async_context(await Client.connect(server.uri(name), timeout=60)) for name in some
                ]

            clients = await connect(names[:SETTLING])
            await _settle(server.pid)
            settled_mb = memory_mb(server.pid, "Pss")
            began = time.perf_counter()
            clients += await connect(names[SETTLING:])
            each_ms = (time.perf_counter() - began) * 1000 / (len(names) - SETTLING)
            idle_mb = memory_mb(server.pid, "Pss")
            for client in clients:
                await client.pread(4096, client.size // 2)
            return settled_mb, idle_mb, memory_mb(server.pid, "Pss"), each_ms


async def _settle(pid: int) -> None:
    """Wait until the server has had as many processes for a while."""
    count, since = 0, time.monotonic()
    while time.monotonic() - since < SETTLED_S:
        if (now := process_count(pid)) != count:
            count, since = now, time.monotonic()
        await asyncio.sleep(0.1)


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
