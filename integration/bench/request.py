"""What one request costs the server: processor time in Python and in the kernel, system calls, page faults.

    python -m integration.bench.request [--tree DIR]...

A client that does as little as it can sends batches of requests over a Unix socket, each when the one before it is
answered, and what the server took for them is read from /proc. Several checkouts take turns, batch after batch of
seconds, so that what is compared was measured beside each other. System calls are counted by strace in a run of their
own, for it slows down what it looks at.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from integration.bench.machine import make_random_image
from integration.bench.peers import REPOSITORY, Nbdclone
from integration.bench.processes import TICKS_PER_SECOND, process_tree
from integration.bench.workloads import WORKLOADS
from nbdclone.protocol.client_handshake import ClientHandshake
from nbdclone.protocol.wire import CMD_READ, CMD_WRITE, REQUEST, REQUEST_MAGIC, SIMPLE_REPLY, Mode

SIZE = 1 << 30
TRACED_BATCHES = 200
SYSTEM_CALLS = re.compile(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)\s+(?:\d+\s+)?(\w+)$", re.MULTILINE)
# So many blocks that were never written are left for the counting of system calls.
KEPT_FRESH = 20_000


@dataclass(frozen=True, slots=True)
class Kind:
    """A batch of ``count`` requests of ``length`` bytes. ``first``: writes, each to a block that is not the clone's."""

    title: str
    command: int
    length: int
    count: int
    first: bool = False


KINDS = (
    Kind("4k read, 1 at a time", CMD_READ, 4096, 1),
    Kind("4k read, 16 at a time", CMD_READ, 4096, 16),
    Kind("4k rewrite, 1 at a time", CMD_WRITE, 4096, 1),
    Kind("4k rewrite, 16 at a time", CMD_WRITE, 4096, 16),
    Kind("4k first write, 16 at a time", CMD_WRITE, 4096, 16, first=True),
    Kind("256k read, 4 at a time", CMD_READ, 256 << 10, 4),
    Kind("256k rewrite, 4 at a time", CMD_WRITE, 256 << 10, 4),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """For one request: microseconds of processor time, and minor page faults."""

    user_us: float
    system_us: float
    faults: float


class Sender:
    """A client with one connection, without structured replies: a reply is 16 bytes, and what was read."""

    def __init__(self, path: Path, export: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(path))
        handshake = ClientHandshake(Mode.SIMPLE)
        self._step(handshake)
        handshake.go(export)
        while handshake.finished is None:
            self._step(handshake)
        self._buffer = bytearray(1 << 20)
        self._payload = random.Random(0).randbytes(256 << 10)
        self.fresh = random.Random(0).sample(range(SIZE // 4096), SIZE // 4096)

    def _step(self, handshake: ClientHandshake) -> None:
        while handshake.next_event() is None and not handshake.finished:
            for message in handshake.data_to_send():
                self._sock.sendall(message)
            handshake.receive_data(self._sock.recv(65536))
        for message in handshake.data_to_send():
            self._sock.sendall(message)

    def run(self, kind: Kind, choice: random.Random) -> None:
        """Send one batch, and take its replies."""
        message = bytearray()
        payload = self._payload[: kind.length] if kind.command == CMD_WRITE else b""
        for cookie in range(kind.count):
            # What is rewritten lies in the first eighth of the disk.
            place = self.fresh.pop() if kind.first else choice.randrange(SIZE // 8 // kind.length)
            message += REQUEST.pack(REQUEST_MAGIC, 0, kind.command, cookie, place * kind.length, kind.length) + payload
        self._sock.sendall(message)
        left = kind.count * (SIMPLE_REPLY.size + (kind.length if kind.command == CMD_READ else 0))
        while left:
            left -= self._sock.recv_into(self._buffer, min(left, len(self._buffer)))

    def close(self) -> None:
        self._sock.close()


def spent(pid: int) -> tuple[float, float, int]:
    """User and system time in microseconds, and minor faults, of a server with its workers so far (man 5 proc)."""
    all_fields = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split() for process in process_tree(pid)]
    user, system, faults = (sum(int(fields[index]) for fields in all_fields) for index in (11, 12, 7))
    return user * 1e6 / TICKS_PER_SECOND, system * 1e6 / TICKS_PER_SECOND, faults


def measure(pid: int, sender: Sender, kind: Kind, seconds: float) -> Cost:
    choice = random.Random(1)
    end = time.monotonic() + seconds
    batches = 0
    before = spent(pid)
    while time.monotonic() < end and not (kind.first and len(sender.fresh) < KEPT_FRESH):
        sender.run(kind, choice)
        batches += 1
    after = spent(pid)
    user, system, faults = ((now - then) / (batches * kind.count) for then, now in zip(before, after, strict=True))
    return Cost(user, system, faults)


def count_system_calls(pid: int, sender: Sender, kind: Kind) -> dict[str, float]:
    """System calls of each name for one request."""
    choice = random.Random(2)
    processes = [argument for process in process_tree(pid) for argument in ("-p", str(process))]
    strace = subprocess.Popen(["strace", "-f", "-c", *processes], stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(0.5)  # it attaches; what the server does meanwhile is nothing
        for _ in range(TRACED_BATCHES):
            sender.run(kind, choice)
    finally:
        strace.send_signal(signal.SIGINT)
        _, report = strace.communicate(timeout=30)
    requests = TRACED_BATCHES * kind.count
    return {name: int(calls) / requests for calls, name in SYSTEM_CALLS.findall(report) if name != "total"}


@contextlib.contextmanager
def served(tree: Path, base: Path, directory: Path) -> Iterator[tuple[int, Sender]]:
    peer = Nbdclone(tree)
    directory.mkdir()
    peer.prepare(base, directory, directory)
    clone = directory / "clone"
    clone.mkdir()
    with peer.serving(clone, WORKLOADS[0]) as server:
        uri = urlsplit(server.uris[0])
        sender = Sender(Path(parse_qs(uri.query)["socket"][0]), uri.path.lstrip("/"))
        # What is rewritten is the clone's; what is read is in the page cache.
        for place in range(0, SIZE // 8, 256 << 10):
            sender.run(Kind("", CMD_WRITE, 256 << 10, 1), _At(place >> 18))
        try:
            yield server.pids[0], sender
        finally:
            sender.close()


class _At(random.Random):
    """One place, rather than a random one."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self._place = place

    def randrange(self, *_args: int) -> int:  # type: ignore[override]
        return self._place


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration.bench.request", description=__doc__.split("\n")[0])
    parser.add_argument("--tree", type=Path, action="append", default=[], metavar="DIR", help="this checkout as well")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    arguments = parser.parse_args()
    trees = [REPOSITORY, *(tree.resolve() for tree in arguments.tree)]
    cache = REPOSITORY / ".cache" / "bench"
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        make_random_image(directory / "base.raw", SIZE)
        servers = [
            stack.enter_context(served(tree, directory / "base.raw", directory / f"tree-{number}"))
            for number, tree in enumerate(trees)
        ]
        print("| request | tree | µs | in Python | in the kernel | page faults | system calls |")
        print("| --- | --- | ---: | ---: | ---: | ---: | --- |")
        for kind in KINDS:
            costs: list[list[Cost]] = [[] for _ in trees]
            for _ in range(arguments.rounds):
                for (pid, sender), found in zip(servers, costs, strict=True):
                    found.append(measure(pid, sender, kind, arguments.seconds))
            for tree, (pid, sender), found in zip(trees, servers, costs, strict=True):
                calls = count_system_calls(pid, sender, kind) if shutil.which("strace") else {}
                print(_row(kind, tree.name, found, calls), flush=True)


def _row(kind: Kind, tree: str, costs: list[Cost], calls: dict[str, float]) -> str:
    user, system, faults = (
        statistics.median(getattr(cost, field) for cost in costs) for field in ("user_us", "system_us", "faults")
    )
    told = ", ".join(f"{name} {count:.2f}" for name, count in sorted(calls.items(), key=lambda it: -it[1]))
    return f"| {kind.title} | {tree} | {user + system:.2f} | {user:.2f} | {system:.2f} | {faults:.2f} | {told} |"


if __name__ == "__main__":
    sys.exit(main())
