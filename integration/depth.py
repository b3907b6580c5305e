"""What it costs to read through many layers, beside a qcow2 chain of the same depth and content served by qemu-nbd.

`python -m integration.depth [SECONDS] [MIB]`: reads of 4 KiB at random places, 16 under way, through 1, 16 and 64
layers: reads a second, processor time of the server for each, and its memory. The servers take turns, round by round,
and what is told is the median of the rounds; the ratios are those to one layer of the same server. Two seconds for each
measurement and a disk of 512 MiB give figures to be quoted; without arguments it takes some ten seconds.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from integration.packages import program
from integration.served import served
from nbdclone.protocol import wire
from nbdclone.protocol.wire import Command, Option
from nbdclone.store.fs import FileSystem
from nbdclone.store.pool import Pool

DEPTHS = (1, 16, 64)
SECONDS = 0.15
SIZE_MIB = 32
ROUNDS = 3
BLOCK = 4096
# Reads under way at a time.
UNDER_WAY = 16
# How many blocks all the layers above the base have together: the depth changes, and what is read does not.
WRITTEN = 640
SERVERS = ("nbdclone", "qemu-nbd")
_TICKS = os.sysconf("SC_CLK_TCK")


class Reader:
    """A client that reads one block after the other, some at a time."""

    def __init__(self, path: str, export: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(60)
        self._sock.connect(path)
        data = struct.pack(f">I{len(export)}sH", len(export), export.encode(), 0)
        self._sock.sendall(wire.CLIENT_FLAGS.pack(3) + wire.OPTION.pack(wire.IHAVEOPT, Option.GO, len(data)) + data)
        self._receive(wire.GREETING.size)
        kind = 0
        while kind != 1:  # the acknowledgement
            _, _, kind, length = wire.OPTION_REPLY.unpack(self._receive(wire.OPTION_REPLY.size))
            assert kind < 1 << 31, f"refused: {self._receive(length)!r}"
            self._receive(length)

    def close(self) -> None:
        self._sock.close()

    def read(self, offsets: list[int]) -> None:
        asked = [struct.pack(">IHHQQI", 0x25609513, 0, Command.READ, 0, offset, BLOCK) for offset in offsets]
        for first in range(0, len(asked), UNDER_WAY):
            burst = asked[first : first + UNDER_WAY]
            self._sock.sendall(b"".join(burst))
            self._receive(len(burst) * (16 + BLOCK))

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._sock.recv(size - len(data))
            assert part, "the server closed the connection"
            data += part
        return bytes(data)


class Figures(NamedTuple):
    reads_s: float
    cpu_us: float
    memory_mib: float


class Chain:
    """A server with one chain, and a client of it."""

    def __init__(self, pids: list[int], path: str, export: str, size: int) -> None:
        self._pids = pids
        self._reader = Reader(path, export)
        self._size = size
        self._rng = random.Random(1)
        for start in range(0, size, BLOCK * UNDER_WAY):  # all of it is in memory, and its maps are known
            self._reader.read(list(range(start, min(start + BLOCK * UNDER_WAY, size), BLOCK)))

    def close(self) -> None:
        self._reader.close()

    def measure(self, seconds: float) -> Figures:
        offsets = [self._rng.randrange(self._size // BLOCK) * BLOCK for _ in range(64 * UNDER_WAY)]
        began, cpu, count = time.perf_counter(), self._cpu_s(), 0
        while (took := time.perf_counter() - began) < seconds:
            self._reader.read(offsets)
            count += len(offsets)
        memory = max(_kib(pid, "Pss:") for pid in self._pids)
        return Figures(count / took, (self._cpu_s() - cpu) / count * 1e6, memory / 1024)

    def _cpu_s(self) -> float:
        times = [Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13] for pid in self._pids]
        return sum(int(user) + int(system) for user, system in times) / _TICKS


def _kib(pid: int, field: str) -> int:
    """Of memory that is shared, a share."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def layers_of(depth: int, size: int) -> list[list[int]]:
    """Which blocks each layer above the base has."""
    rng = random.Random(depth)
    blocks = rng.sample(range(size // BLOCK), WRITTEN)
    return [sorted(blocks[number::depth]) for number in range(depth)]


class Unsynced(FileSystem):
    """What is made here need not outlive the machine."""

    def sync(self, fd: int) -> None:  # type: ignore[override]
        pass

    datasync = sync  # type: ignore[assignment]

    def sync_directory(self, path: Path) -> None:
        pass


def make_pool(directory: Path, image: Path, size: int) -> Pool:
    """A pool with a clone for each depth: so many deltas over one base."""
    pool = Pool.open(directory / "pool", create=True, fs=Unsynced())
    pool.import_base(image, "base")
    for depth in DEPTHS:
        name = f"deep{depth}"
        pool.create_clones("base", [name])
        for number, blocks in enumerate(layers_of(depth, size), start=1):
            with pool.open_clone(name) as clone:
                for block in blocks:
                    clone.pwrite(bytes([number]) * BLOCK, block * BLOCK)
            if number < depth:
                pool.snapshot(f"{name}@s{number}")
    return pool


def make_qcow2(directory: Path, image: Path, depth: int, size: int) -> Path:
    """The same as qcow2 files: the topmost."""
    below, form = image, "raw"
    for number, blocks in enumerate(layers_of(depth, size), start=1):
        path = directory / f"deep{depth}-{number}.qcow2"
        make = [program("qemu-img"), "create", "-q", "-f", "qcow2", "-b", str(below), "-F", form, str(path)]
        subprocess.run(make, check=True)
        commands = [word for block in blocks for word in ("-c", f"write -q -P {number} {block * BLOCK} {BLOCK}")]
        subprocess.run([program("qemu-io"), "-t", "unsafe", "-f", "qcow2", *commands, str(path)], check=True)
        below, form = path, "qcow2"
    return below


@contextlib.contextmanager
def qemu_nbd(directory: Path, top: Path, depth: int) -> Iterator[tuple[int, str]]:
    path = str(directory / f"q{depth}.sock")
    command = [program("qemu-nbd"), "-t", "-f", "qcow2", "--cache=writeback", "-k", path, "-x", "disk", str(top)]
    process = subprocess.Popen(command)
    try:
        while not os.path.exists(path):
            assert process.poll() is None, "qemu-nbd did not start"
            time.sleep(0.01)
        yield process.pid, path
    finally:
        process.terminate()
        process.wait()


def measure(directory: Path, seconds: float, size: int) -> dict[tuple[str, int], Figures]:
    """All of it: (server, depth) to the medians."""
    image = directory / "image.raw"
    rng = random.Random(0)
    with open(image, "wb") as file:
        for _ in range(0, size, 1 << 20):
            file.write(rng.randbytes(1 << 20))
    pool = make_pool(directory, image, size)
    found: dict[tuple[str, int], list[Figures]] = {}
    with contextlib.ExitStack() as held:
        chains: dict[tuple[str, int], Chain] = {}
        for depth in DEPTHS:
            server = held.enter_context(served(pool.path, "--workers", "1"))
            chain = Chain(server.workers, server.socket, f"deep{depth}", size)
            chains["nbdclone", depth] = chain
            held.callback(chain.close)
            server_of = make_qcow2(directory, image, depth, size)
            pid, path = held.enter_context(qemu_nbd(directory, server_of, depth))
            chains["qemu-nbd", depth] = chain = Chain([pid], path, "disk", size)
            held.callback(chain.close)
            if depth != DEPTHS[-1]:
                pool = make_copy(directory, pool, depth)
        for _ in range(ROUNDS):
            for key, chain in chains.items():
                found.setdefault(key, []).append(chain.measure(seconds))
    return {key: Figures(*map(statistics.median, zip(*each, strict=True))) for key, each in found.items()}


def make_copy(directory: Path, pool: Pool, number: int) -> Pool:
    """Another pool of the same content: one server for each depth, to see what each takes."""
    target = directory / f"pool{number}"
    subprocess.run(["cp", "-a", "--sparse=always", str(pool.path), str(target)], check=True)
    for leftover in target.glob(".[sc]*"):
        leftover.unlink()
    return Pool.open(target)


def main(seconds: float = SECONDS, size_mib: int = SIZE_MIB) -> None:
    with tempfile.TemporaryDirectory(prefix="nbdclone-depth-") as directory:
        figures = measure(Path(directory), seconds, size_mib << 20)
    print(f"{'server':10} {'layers':>6} {'reads/s':>9} {'ratio':>6} {'CPU us':>7} {'ratio':>6} {'MiB':>6}")
    for server in SERVERS:
        one = figures[server, 1]
        for depth in DEPTHS:
            found = figures[server, depth]
            print(
                f"{server:10} {depth:6} {found.reads_s:9.0f} {found.reads_s / one.reads_s:6.2f} "
                f"{found.cpu_us:7.1f} {found.cpu_us / one.cpu_us:6.2f} {found.memory_mib:6.1f}"
            )


if __name__ == "__main__":
    main(*(kind(word) for kind, word in zip((float, int), sys.argv[1:], strict=False)))
