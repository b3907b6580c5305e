"""What a quiet client feels of a greedy one on another clone of the same server, compared with itself alone.

`python -m integration.fairness [SECONDS]` measures every kind and prints a table; `python -m integration.fairness KIND
SOCKET` is one greedy client, in a process of its own, until it is killed.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from integration.served import ENVIRONMENT, REPOSITORY, Served, make_pool, served
from nbdclone.protocol import wire
from nbdclone.protocol.wire import Command, Option
from nbdclone.store.delta import METADATA_SIZE

GREEDY, QUIET, COLD = "greedy", "quiet", "cold"
DISK_SIZE = 512 << 20
# Of the quiet client's disk: what it has in memory, and what it writes to.
WARM_SIZE = 16 << 20
WORKS = ("warm_read", "cold_read", "synced_write")
ROUNDS = 3
SECONDS = 2.0


class Raw:
    """A client without a choice: simple replies over a blocking socket, so that the machine is left to the server."""

    def __init__(self, path: str, export: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(path)
        data = struct.pack(f">I{len(export)}sH", len(export), export.encode(), 0)
        self.sock.sendall(wire.CLIENT_FLAGS.pack(3) + wire.OPTION.pack(wire.IHAVEOPT, Option.GO, len(data)) + data)
        self.receive(
            wire.GREETING.size + 3 * wire.OPTION_REPLY.size + wire.INFO_BLOCK_SIZE.size + wire.INFO_EXPORT.size
        )

    def close(self) -> None:
        self.sock.close()

    def receive(self, size: int) -> None:
        while size:
            got = len(self.sock.recv(min(size, 1 << 20)))
            assert got, "the server closed the connection"
            size -= got

    def ask(self, command: int, offset: int = 0, length: int = 0, payload: bytes = b"") -> float:
        """One request and its answer: seconds."""
        began = time.perf_counter()
        self.sock.sendall(request(command, offset, length) + payload)
        self.receive(wire.SIMPLE_REPLY.size + (length if command == Command.READ else 0))
        return time.perf_counter() - began


def request(command: int, offset: int, length: int) -> bytes:
    return wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, command, 1, offset, length)


@dataclass(frozen=True, slots=True)
class Greed:
    """What a greedy client does: ``depth`` requests in flight at all times."""

    what: str
    command: int
    length: int
    depth: int
    export: str = GREEDY
    with_flushes: bool = False  # after each of them one

    def run(self, path: str) -> None:
        client = Raw(path, self.export)
        payload = os.urandom(self.length) if self.command == Command.WRITE else b""
        places = max(1, DISK_SIZE // max(self.length, 1))
        order = random.Random(1)
        reply = wire.SIMPLE_REPLY.size * (1 + self.with_flushes)
        reply += self.length if self.command == Command.READ else 0
        flush = request(Command.FLUSH, 0, 0) if self.with_flushes else b""

        def some(count: int) -> bytes:
            return b"".join(
                request(self.command, self.length * order.randrange(places), self.length) + payload + flush
                for _ in range(count)
            )

        client.sock.sendall(some(self.depth))
        print("greedy", flush=True)
        unread = 0
        buffer = bytearray(4 << 20)
        while True:
            unread += client.sock.recv_into(buffer)
            if done := unread // reply:
                unread -= done * reply
                client.sock.sendall(some(done))


KINDS = {
    "small-reads": Greed("4 KiB reads, 64 in flight", Command.READ, 4096, 64),
    "many-reads": Greed("4 KiB reads, 1,024 in flight", Command.READ, 4096, 1024),
    "medium-reads": Greed("64 KiB reads, 64 in flight", Command.READ, 64 << 10, 64),
    "large-reads": Greed("1 MiB reads, 16 in flight", Command.READ, 1 << 20, 16),
    "huge-reads": Greed("32 MiB reads, 4 in flight", Command.READ, 32 << 20, 4),
    "small-writes": Greed("4 KiB writes, 64 in flight", Command.WRITE, 4096, 64),
    "large-writes": Greed("1 MiB writes, 8 in flight", Command.WRITE, 1 << 20, 8),
    "huge-writes": Greed("32 MiB writes, 2 in flight", Command.WRITE, 32 << 20, 2),
    "flushes": Greed("flushes, 64 in flight", Command.FLUSH, 0, 64),
    "synced-writes": Greed("4 KiB writes, each with a flush, 64 in flight", Command.WRITE, 4096, 64, with_flushes=True),
    "cold-reads": Greed("4 KiB reads that are in no cache, 64 in flight", Command.READ, 4096, 64, COLD),
    "many-cold-reads": Greed("the same, 1,024 in flight", Command.READ, 4096, 1024, COLD),
    "large-cold-reads": Greed("1 MiB reads that are in no cache, 16 in flight", Command.READ, 1 << 20, 16, COLD),
    "trims": Greed("trims of 1 MiB, 64 in flight", Command.TRIM, 1 << 20, 64),
}  # fmt: skip


class Quiet:
    """The quiet client: one request at a time on a disk of its own, of three kinds."""

    def __init__(self, path: str, delta: Path) -> None:
        self._client = Raw(path, QUIET)
        self._order = random.Random(2)
        self._delta = delta
        for offset in range(0, WARM_SIZE * 2, 1 << 20):
            self._client.ask(Command.WRITE, offset, 1 << 20, os.urandom(1 << 20))
        self._client.ask(Command.FLUSH)

    def close(self) -> None:
        self._client.close()

    def _place(self) -> int:
        return 4096 * self._order.randrange(WARM_SIZE // 4096)

    def warm_read(self) -> float:
        return self._client.ask(Command.READ, self._place(), 4096)

    def cold_read(self) -> float:
        offset = WARM_SIZE + self._place()
        fd = os.open(self._delta, os.O_RDONLY)
        os.posix_fadvise(fd, METADATA_SIZE + WARM_SIZE, WARM_SIZE, os.POSIX_FADV_DONTNEED)  # a part of a folio stays
        os.close(fd)
        return self._client.ask(Command.READ, offset, 4096)

    def synced_write(self) -> float:
        return self._client.ask(Command.WRITE, self._place(), 4096, bytes(range(256)) * 16) + self._client.ask(
            Command.FLUSH
        )

    def feel(self, work: Callable[[], float], seconds: float) -> list[float]:
        """The sorted times of as many as there were, in ms."""
        deadline = time.monotonic() + seconds
        times = [work() * 1000]
        while time.monotonic() < deadline:
            times.append(work() * 1000)
        return sorted(times)


def percentile(times: list[float], share: float) -> float:
    return times[min(len(times) - 1, int(share * len(times)))]


@contextmanager
def target(directory: Path, *args: str) -> Iterator[tuple[Served, Quiet]]:
    """A server with a clone to be greedy on, one over a base that is kept out of memory, and a quiet client on one.

    All in one process: with a worker for each of them there would be nothing to share.
    """
    image = directory / "image.raw"
    with open(image, "wb") as file:
        for _ in range(DISK_SIZE >> 20):
            file.write(os.urandom(1 << 20))
    pool = make_pool(directory / "pool", image, GREEDY, QUIET, COLD)
    image.unlink()
    with (
        served(pool, "--workers", "1", *args) as server,
        contextlib.closing(Quiet(server.socket, pool / "clones" / QUIET / "delta")) as quiet,
    ):
        yield server, quiet


@contextmanager
def greedy(kind: str, server: Served, pool: Path) -> Iterator[None]:
    """A greedy client at work."""
    command = [sys.executable, "-m", "integration.fairness", kind, server.socket, str(pool / "bases/base/image")]
    with subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "greedy\n", "it could not begin"
            time.sleep(0.1)
            yield
        finally:
            process.kill()


def be_greedy(kind: str, path: str, image: str) -> None:
    parent = os.getpid()
    os.nice(10)  # real clients have machines of their own: on this one it must not take the processor from the server
    if KINDS[kind].export == COLD and os.fork() == 0:  # a process that drops the image from memory, over and over
        fd = os.open(image, os.O_RDONLY)
        while os.getppid() == parent:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            time.sleep(0.02)
        os._exit(0)
    KINDS[kind].run(path)


def main(seconds: float = SECONDS, *kinds: str) -> None:
    works = WORKS
    with tempfile.TemporaryDirectory(prefix="nbdclone-", dir=os.environ.get("TMPDIR", "/var/tmp")) as directory:
        pool = Path(directory, "pool")
        with target(Path(directory)) as (server, quiet):
            head = [f"{work.replace('_', ' ')}: {what}" for work in works for what in ("alone", "beside", "times")]
            print("| beside |", " | ".join(head), "|\n" + "| --- " * (len(head) + 1) + "|")
            for kind in kinds or KINDS:
                cells = []
                for work in works:
                    alone, beside = [], []
                    for _ in range(ROUNDS):
                        alone.append(percentile(quiet.feel(getattr(quiet, work), seconds / 2), 0.99))
                        with greedy(kind, server, pool):
                            beside.append(percentile(quiet.feel(getattr(quiet, work), seconds), 0.99))
                    a, b = statistics.median(alone), statistics.median(beside)
                    cells += [f"{a:.2f}", f"{b:.2f}", f"{b / a:.1f}"]
                print(f"| {KINDS[kind].what} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[1] in KINDS:
        with contextlib.suppress(OSError):
            be_greedy(*sys.argv[1:4])
    else:
        main(*map(float, sys.argv[1:2]), *sys.argv[2:])
