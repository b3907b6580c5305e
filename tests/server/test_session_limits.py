"""What a client that asks for too much, or does not take what it asked for, can make the server hold."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import pytest
from serving import BASE, BASE_SIZE, MIB, Disk, Peer, connect, make_pool, serving, until

from nbdclone.protocol.requests import REQUEST_SIZE
from nbdclone.protocol.wire import CMD_CACHE, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES
from nbdclone.server import session
from nbdclone.server.buffers import MIN_BUFFER
from nbdclone.server.input import RECEIVE_SIZE
from nbdclone.server.server import Server
from nbdclone.server.session import Session
from nbdclone.store.pool import Pool


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def slow_pool(tmp_path: Path, disk: Disk) -> Pool:
    return make_pool(tmp_path, BASE, "web1", fs=disk)


def resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def sessions(server: Server) -> list[Session]:
    return [connection._session for connection in server._connections if connection._session is not None]


async def flood(peer: Peer, message: bytes, seconds: float = 0.7) -> int:
    """Send the same bytes again and again, for so long; how many bytes the server took."""
    taken = 0
    batch = message * max(1, (64 << 10) // len(message))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                try:
                    taken += peer.sock.send(batch[taken % len(message) :])
                except BlockingIOError:
                    await asyncio.sleep(0.001)
                else:
                    await asyncio.sleep(0)
    return taken


ONE_RECEIVE = RECEIVE_SIZE // REQUEST_SIZE  # requests
REQUESTS = {
    "writes": (CMD_WRITE, 0, 1),
    "small reads": (CMD_READ, 0, 512),
    "large reads": (CMD_READ, 0, 300_000),
    "reads in threads": (CMD_READ, 0, 2 * MIB),
    "flushes": (CMD_FLUSH, 0, 0),
    "trims": (CMD_TRIM, 0, 512),
    "zeroes": (CMD_WRITE_ZEROES, 4096, 4096),
    "cache hints": (CMD_CACHE, 0, 4096),
    "refusals": (CMD_READ, BASE_SIZE, 512),
    "unknown commands": (99, 0, 512),
}


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bounds on what is unsent that are met within a second; the larger one."""
    monkeypatch.setattr(session, "MAX_UNSENT", 256 << 10)
    monkeypatch.setattr(session, "MAX_BACKLOG", 384 << 10)
    return 384 << 10


@pytest.mark.parametrize("what", REQUESTS)
async def test_a_client_that_never_reads_is_held_back_alone(pool: Pool, bound: int, what: str) -> None:
    command, offset, length = REQUESTS[what]
    async with serving(pool) as server, await connect(server, "web2") as other:
        async with await Peer.open(server, "web1") as peer:
            [theirs] = [session for session in sessions(server) if session._clone.name == "web1"]
            before = resident_bytes()
            payload = b"x" if command == CMD_WRITE else b""
            flooding = asyncio.create_task(flood(peer, peer.request(command, offset, length, payload=payload)))
            slowest = 0.0
            while not flooding.done():
                began = time.perf_counter()
                assert await other.pread(4096, 4096) == BASE[4096:8192]
                slowest = max(slowest, time.perf_counter() - began)
                await asyncio.sleep(0.005)
            assert slowest < 5.0
            # Beyond the bound: one read, and the replies to what was received at once.
            assert theirs._output.backlog + theirs._reading <= bound + length + (512 << 10)
            assert len(theirs._waiting) + theirs._in_flight <= 2 * session.MAX_IN_FLIGHT + ONE_RECEIVE
            assert resident_bytes() - before < 32 * MIB
        await until(lambda: len(server._connections) == 1)


async def test_when_a_client_reads_at_last_everything_arrives_right(pool: Pool) -> None:
    count = 3000
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        [theirs] = sessions(server)
        reads = [
            peer.request(CMD_READ, 512 * i, 512 * (1 + i % 200), cookie=i) for i in range(count)
        ]  # about 150 MB of replies
        sending = asyncio.create_task(peer.send(*reads))
        await until(lambda: theirs._output.backlog >= session.MAX_UNTAKEN)
        await asyncio.sleep(0.1)
        assert theirs._output.backlog <= session.MAX_UNTAKEN + MIB
        for _ in range(count):
            reply = await peer.reply()
            start = 512 * reply.cookie
            assert reply.data == BASE[start : start + 512 * (1 + reply.cookie % 200)]
        await sending
        assert theirs._output.backlog == 0


async def test_while_replies_wait_more_requests_are_taken_up_to_a_bound(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        [theirs] = sessions(server)
        size = MIB
        await peer.send(
            *[peer.request(CMD_READ, 0, size, cookie=i) for i in range(128)]
        )  # what the kernel has in flight
        await until(lambda: len(theirs._waiting) > 100)
        replies = await peer.replies(128)
        assert all(reply.data == BASE[:size] for reply in replies.values())


@pytest.mark.parametrize("length", [1, 4096, 128 << 10])
async def test_cold_reads_are_bounded_however_short(slow_pool: Pool, disk: Disk, length: int) -> None:
    disk.cold = range(BASE_SIZE)
    count = 5000 if length == 1 else 300
    async with serving(slow_pool) as server, await Peer.open(server, "web1") as peer:
        [theirs] = sessions(server)
        disk.reads.close()
        sending = asyncio.create_task(peer.send(*[peer.request(CMD_READ, i, length, cookie=i) for i in range(count)]))
        await until(lambda: theirs._in_flight > 0 and (sending.done() or not theirs._input.active))
        assert theirs._in_flight <= session.MAX_UNSENT // MIN_BUFFER
        disk.reads.open()
        for _ in range(count):
            reply = await peer.reply()
            assert reply.data == BASE[reply.cookie : reply.cookie + length]
        await sending


async def test_writes_that_wait_for_a_thread_are_bounded(slow_pool: Pool, disk: Disk) -> None:
    async with serving(slow_pool) as server, await Peer.open(server, "web1") as peer:
        [theirs] = sessions(server)
        disk.writes.close()
        first = peer.request(CMD_WRITE, 0, payload=b"x" * 2 * MIB, cookie=0)
        small = [peer.request(CMD_WRITE, 2 * MIB + i, payload=bytes([i % 251]), cookie=i + 1) for i in range(20_000)]
        sending = asyncio.create_task(peer.send(first, *small))
        await until(lambda: not theirs._input.active)
        assert theirs._held_writes <= session.MAX_HELD_WRITES + 2 * MIB
        assert (
            theirs._in_flight <= session.MAX_IN_FLIGHT + ONE_RECEIVE
        )  # each holds a buffer of 64 KiB, and the kernel allows a process 65,530
        disk.writes.open()
        assert {(await peer.reply()).error for _ in range(20_001)} == {0}
        await sending
        assert (await peer.run(CMD_READ, 2 * MIB, 20_000)).data == bytes(i % 251 for i in range(20_000))


@pytest.mark.parametrize("command", [CMD_FLUSH, CMD_TRIM, CMD_WRITE_ZEROES])
async def test_requests_that_wait_for_a_slow_disk_are_bounded(slow_pool: Pool, disk: Disk, command: int) -> None:
    async with serving(slow_pool) as server, await Peer.open(server, "web1") as peer:
        [theirs] = sessions(server)
        disk.syncs.close()
        disk.writes.close()
        await peer.send(peer.request(CMD_WRITE, 0, payload=b"x" * 512, cookie=0), peer.request(CMD_FLUSH, cookie=1))
        await peer.send(peer.request(CMD_WRITE, MIB, payload=b"x" * 2 * MIB, cookie=2))
        await flood(peer, peer.request(command, 0, 0 if command == CMD_FLUSH else 4096, cookie=3))
        assert not theirs._input.active
        assert theirs._in_flight <= session.MAX_IN_FLIGHT + ONE_RECEIVE
        disk.syncs.open()
        disk.writes.open()


async def test_idle_connections_cost_little(pool: Pool) -> None:
    count = 300
    async with serving(pool) as server:
        async with await connect(server, "web1") as disk:
            await disk.pread(MIB, 0)
            before = resident_bytes()
            peers = [await Peer.open(server, "web1") for _ in range(count)]
            for peer in peers:
                assert (await peer.run(CMD_READ, 0, 64 << 10)).data == BASE[: 64 << 10]
            assert (resident_bytes() - before) / count < 48 << 10  # both ends of it
            assert await disk.pread(512, 0) == BASE[:512]
        for peer in peers:
            peer.close()
