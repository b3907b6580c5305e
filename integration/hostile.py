"""Clients that mean harm, or behave as if: what each does, and what a quiet client beside it feels of it.

`python -m integration.hostile` runs all of them against a server of its own and prints a table; `python -m
integration.hostile ATTACK PORT SECONDS` is one attacker, in a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from integration.bench.processes import memory_mb
from integration.served import ENVIRONMENT, REPOSITORY, Served, make_pool, served
from nbdclone.client import Client
from nbdclone.protocol import wire
from nbdclone.protocol.wire import Command, Option

HOST = "127.0.0.1"
ATTACKED, QUIET = "web1", "web2"
DISK_SIZE = 256 << 20
# A pause between the quiet client's requests, as a guest that does little has: it feels each delay of the server's.
PAUSE_S = 0.002

_GREETING = wire.CLIENT_FLAGS.pack(3)


def _option(number: int, data: bytes = b"") -> bytes:
    return wire.OPTION.pack(wire.IHAVEOPT, number, len(data)) + data


def _go(name: str) -> bytes:
    return _option(Option.GO, struct.pack(f">I{len(name)}sH", len(name), name.encode(), 0))


def _request(command: int, offset: int, length: int, payload: bytes = b"") -> bytes:
    return wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, command, 1, offset, length) + payload


def _connect(port: int) -> socket.socket:
    sock = socket.create_connection((HOST, port), timeout=10)
    sock.setblocking(False)
    return sock


def _open(port: int) -> socket.socket:
    """A connection after its handshake."""
    sock = _connect(port)
    sock.setblocking(True)
    sock.settimeout(10)
    sock.sendall(_GREETING + _go(ATTACKED))
    expected = wire.GREETING.size + 3 * wire.OPTION_REPLY.size + wire.INFO_BLOCK_SIZE.size + wire.INFO_EXPORT.size
    while expected:
        got = len(sock.recv(expected))
        assert got, "the server closed the connection"
        expected -= got
    sock.setblocking(False)
    return sock


def _send_some(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(BlockingIOError):
        sock.send(data)


# Each attack is a generator: it acts, and yields how many seconds to wait before it goes on.
Attack = Callable[[int], Iterator[float]]


def open_and_sit(port: int) -> Iterator[float]:
    """2,000 connections that say nothing, made again as the server ends them"""
    socks = [_connect(port) for _ in range(2000)]
    selector = selectors.DefaultSelector()
    for sock in socks:
        selector.register(sock, selectors.EVENT_READ)
    while True:
        for key, _events in selector.select(0):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            with contextlib.suppress(OSError):
                if sock.recv(4096):
                    continue
            selector.unregister(sock)
            sock.close()
            with contextlib.suppress(OSError):
                selector.register(_connect(port), selectors.EVENT_READ)
        yield 0.05


def storm(port: int) -> Iterator[float]:
    """connections made and dropped, with garbage, as fast as one process can"""
    for number in count():
        with contextlib.suppress(OSError):
            sock = _connect(port)
            _send_some(sock, struct.pack(">QI", number * 0x9E3779B97F4A7C15 % (1 << 64), number) * 8)
            sock.close()
        if number % 20 == 0:
            yield 0.0


def list_again_and_again(port: int) -> Iterator[float]:
    """100 connections that ask for the list of exports 256 times each, and read nothing"""
    socks = [_connect(port) for _ in range(100)]
    for sock in socks:
        _send_some(sock, _GREETING + _option(Option.LIST) * 256)
    while True:
        yield 1.0


def byte_by_byte(port: int) -> Iterator[float]:
    """200 connections that send their handshake, and 200 a write, at one byte a second"""
    handshaking = [_connect(port) for _ in range(200)]
    writing = [_open(port) for _ in range(200)]
    write = _request(Command.WRITE, 0, 32 << 20)
    greeting = _GREETING + _go(ATTACKED)
    for step in count():
        for socks, data in ((handshaking, greeting), (writing, write)):
            for sock in socks:
                with contextlib.suppress(OSError):
                    sock.send(data[step : step + 1] or b"\0")
        yield 1.0


def never_read(port: int) -> Iterator[float]:
    """200 connections that send 64 KiB reads, and take no reply"""
    yield from _flood(port, 200, _request(Command.READ, 0, 64 << 10))


def never_read_large(port: int) -> Iterator[float]:
    """200 connections that send 32 MiB reads, and take no reply"""
    yield from _flood(port, 200, _request(Command.READ, 0, 32 << 20))


def never_finish_writing(port: int) -> Iterator[float]:
    """200 connections that announce writes of 32 MiB, and send a KiB a second of them"""
    socks = [_open(port) for _ in range(200)]
    for sock in socks:
        _send_some(sock, _request(Command.WRITE, 0, 32 << 20))
    while True:
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.send(bytes(1024))
        yield 1.0


def greedy(port: int) -> Iterator[float]:
    """one connection with thousands of 4 KiB reads in flight, that takes its replies as fast as it can"""
    sock = _open(port)
    reads = b"".join(_request(Command.READ, 4096 * i, 4096) for i in range(9000))
    while True:
        with contextlib.suppress(BlockingIOError):
            while sock.recv(1 << 20):
                pass
        _send_some(sock, reads)  # a torn request is made whole by nobody: so the server sees garbage now and then
        yield 0.0


def _flood(port: int, connections: int, request: bytes) -> Iterator[float]:
    socks = [_open(port) for _ in range(connections)]
    while True:
        for sock in socks:
            with contextlib.suppress(OSError):
                sock.send(request)
        yield 0.01


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        open_and_sit,
        storm,
        list_again_and_again,
        byte_by_byte,
        never_read,
        never_read_large,
        never_finish_writing,
        greedy,
    )
}


def attack(name: str, port: int, seconds: float) -> None:
    """Be one attacker for so long."""
    deadline = time.monotonic() + seconds
    with contextlib.suppress(ConnectionError, AssertionError, TimeoutError):
        for pause in ATTACKS[name](port):
            print("attacking", flush=True)
            if time.monotonic() > deadline:
                return
            time.sleep(pause)


@dataclass(frozen=True, slots=True)
class Felt:
    """What the quiet client felt: percentiles of the time of one 4 KiB request, and the server's memory at its most."""

    requests: int
    p50_ms: float
    p99_ms: float
    worst_ms: float
    server_mb: float


async def feel(server: Served, uri: str, seconds: float) -> Felt:
    """Read and write 4 KiB, one request at a time, each checked; every tenth is a connection of its own."""
    times: list[float] = []
    memory = 0.0
    deadline = time.monotonic() + seconds
    async with await Client.connect(uri) as client:
        for number in count():
            if time.monotonic() > deadline:
                break
            offset = 4096 * (number % 1000)
            data = struct.pack(">Q", number) * 512
            began = time.perf_counter()
            await client.pwrite(data, offset)
            written = time.perf_counter()
            assert await client.pread(4096, offset) == data
            times += [written - began, time.perf_counter() - written]
            if number % 100 == 0:
                await Client.describe(uri)  # whoever comes new gets in, too
                memory = max(memory, memory_mb(server.pid, "VmRSS"))
            await asyncio.sleep(PAUSE_S)
    times.sort()
    assert times, "the quiet client got no answer at all"
    at = lambda share: 1000 * times[min(len(times) - 1, int(share * len(times)))]  # noqa: E731
    return Felt(len(times), at(0.5), at(0.99), at(1.0), memory)


@contextmanager
def attacked(name: str, server: Served, seconds: float) -> Iterator[None]:
    """An attacker at work, in a process of its own."""
    command = [sys.executable, "-m", "integration.hostile", name, str(server.port), str(seconds)]
    with subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "attacking\n", "the attacker could not begin"
            yield
        finally:
            process.kill()


@contextmanager
def target(directory: Path, *args: str) -> Iterator[Served]:
    """A server with a clone to attack and one to be quiet on."""
    image = directory / "image.raw"
    with open(image, "wb") as file:
        file.truncate(DISK_SIZE)
        for offset in range(0, DISK_SIZE, 1 << 20):
            file.seek(offset)
            file.write(b"\xa5" * 65536)
    pool = make_pool(directory / "pool", image, ATTACKED, QUIET)
    with served(pool, "--listen", f"{HOST}:0", *args) as server:
        yield server


def feel_beside(name: str, server: Served, seconds: float) -> Felt:
    """What the quiet client feels while the attacker is at work; after it, the server is as it was."""
    if not name:
        return asyncio.run(feel(server, server.uri(QUIET), seconds))
    with attacked(name, server, seconds + 60):
        return asyncio.run(feel(server, server.uri(QUIET), seconds))


def main(seconds: float = 10.0) -> None:
    print(
        f"| for {seconds:g} s each | requests | p50 ms | p99 ms | worst ms | server MB |\n| --- " + "| --- " * 5 + "|"
    )
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as directory, target(Path(directory)) as server:
        for name in ("", *ATTACKS, ""):
            felt = feel_beside(name, server, seconds)
            what = (ATTACKS[name].__doc__ or name) if name else "nobody else"
            figures = f"{felt.p50_ms:.2f} | {felt.p99_ms:.2f} | {felt.worst_ms:.1f} | {felt.server_mb:.0f}"
            print(f"| {what} | {felt.requests} | {figures} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        attack(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
    else:
        main(*map(float, sys.argv[1:]))
