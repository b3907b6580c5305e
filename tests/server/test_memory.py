"""Connections of a server whose memory is short: each goes on when it may, and gives back what it held."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from serving import BASE, BASE_SIZE, MIB, Disk, Peer, make_pool, serving, until

from nbdclone.protocol.wire import CMD_DISC, CMD_READ, CMD_WRITE, Mode
from nbdclone.server import session
from nbdclone.server.budget import Account, Budget
from nbdclone.server.server import Server
from nbdclone.server.session import Session
from nbdclone.store.pool import Pool

LIMIT = 8 * MIB
End = Callable[[Server, Peer], Awaitable[None]]
MODES = [Mode.SIMPLE, Mode.STRUCTURED, Mode.EXTENDED]


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def slow_pool(tmp_path: Path, disk: Disk) -> Pool:
    return make_pool(tmp_path, BASE, "web1", "web2", fs=disk)


class Other:
    """Another connection, that holds memory or waits for it."""

    label = "other"

    def __init__(self, budget: Budget) -> None:
        self.account: Account = budget.open(self)
        self.wanted = 0

    def want(self, size: int) -> None:
        self.wanted = size
        self.resume()

    def resume(self) -> None:
        if self.wanted and self.account.allows(self.wanted):
            self.account.take(self.wanted)
            self.wanted = 0

    def stalled_since(self) -> None:
        return None

    def abandon(self) -> None:
        raise AssertionError("it has stalled nothing")


@contextlib.asynccontextmanager
async def short(pool: Pool, count: int = 64, **where: object) -> AsyncIterator[tuple[Server, list[Other]]]:
    """A server that lends little, with so many other connections, the first of which holds all of it."""
    async with serving(pool, **where) as server:
        budget = server.scratch.budget
        budget.limit = LIMIT
        others = [Other(budget) for _ in range(count)]
        others[0].account.take(LIMIT)
        yield server, others
        for other in others:
            other.account.close()
        await until(lambda: budget.used == 0 or bool(server._connections))


def only_session(server: Server) -> Session:
    [connection] = server._connections
    assert connection._session is not None
    return connection._session


async def test_a_payload_whose_turn_has_come_is_received_whoever_waits_behind(pool: Pool) -> None:
    async with short(pool) as (server, others), await Peer.open(server, "web1") as peer:
        sending = asyncio.create_task(peer.send(peer.request(CMD_WRITE, 0, payload=b"x" * MIB)))
        budget = server.scratch.budget
        await until(lambda: len(budget._waiting) == 1)
        others[1].want(LIMIT)
        others[0].account.give(2 * MIB)
        assert (await peer.reply()).error == 0
        assert others[1].account.held == 0
        await sending


async def test_a_payload_that_comes_while_nothing_is_received_waits_for_its_turn(
    slow_pool: Pool, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the connection would hold memory for it, and not begin to receive it while memory is short."""
    monkeypatch.setattr(session, "MAX_HELD_WRITES", 16 << 10)
    async with short(slow_pool) as (server, others), await Peer.open(server, "web1") as peer:
        others[0].account.give(4 * MIB)
        disk.writes.close()
        theirs = only_session(server)
        theirs._export._stalled_until = theirs._loop.time() + 60  # its writes go through a thread
        small = peer.request(CMD_WRITE, 0, payload=b"s" * (16 << 10), cookie=1)
        large = peer.request(CMD_WRITE, MIB, payload=b"l" * 2 * MIB, cookie=2)
        await peer.send((small + large)[: len(small) + 4096])
        await until(lambda: disk.writes.waiting == 1)
        others[1].account.take(4 * MIB)  # within its share, on a server with fewer connections
        disk.writes.open()
        assert (await peer.reply()).cookie == 1
        sending = asyncio.create_task(peer.send((small + large)[len(small) + 4096 :]))
        await asyncio.sleep(0.05)
        others[0].account.give(4 * MIB)
        others[1].account.give(4 * MIB)
        assert (await peer.reply()).cookie == 2
        await sending


async def test_reads_from_memory_go_on_when_there_is_memory_again(pool: Pool) -> None:
    """None of them holds any, so none gives any back: nobody else wakes the one that is behind."""
    async with short(pool) as (server, others), contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(await Peer.open(server, "web1")) for _ in range(2)]
        for peer in peers:
            await peer.send(*[peer.request(CMD_READ, 0, 256 << 10, cookie=i) for i in range(3)])
        budget = server.scratch.budget
        await until(lambda: len(budget._waiting) == 2)
        others[0].account.give(LIMIT)
        for peer in peers:
            assert len(await peer.replies(3)) == 3


async def vanish(server: Server, peer: Peer) -> None:
    peer.close()


async def break_the_protocol(server: Server, peer: Peer) -> None:
    """In any case: if a payload is awaited, behind it."""
    for _ in range(50):
        with contextlib.suppress(OSError):
            peer.sock.send(bytes(64 << 10))
        await asyncio.sleep(0.001)


async def reset(server: Server, peer: Peer) -> None:
    [connection] = server._connections
    connection._raw.shutdown(socket.SHUT_RDWR)


async def drain_and_abandon(server: Server, peer: Peer) -> None:
    [connection] = server._connections
    connection.drain()
    await asyncio.sleep(0.01)
    connection.abandon()


def untaken(peer: Peer) -> list[bytes]:
    return [peer.request(CMD_READ, 0, BASE_SIZE, cookie=i) for i in range(4)]


def half_a_payload(peer: Peer) -> list[bytes]:
    return [peer.request(CMD_WRITE, 0, payload=b"x" * MIB)[: 512 << 10]]


def cold_reads(peer: Peer) -> list[bytes]:
    return [peer.request(CMD_READ, MIB + i * 4096, 128 << 10, cookie=i) for i in range(8)]


def writes_in_threads(peer: Peer) -> list[bytes]:
    return [peer.request(CMD_WRITE, i * MIB, payload=b"x" * (MIB + 1), cookie=i) for i in range(3)]


ASKED = [untaken, half_a_payload, cold_reads, writes_in_threads]


@pytest.mark.parametrize("error", [0, errno.EIO], ids=["well", "failing"])
@pytest.mark.parametrize("end", [vanish, break_the_protocol, reset, drain_and_abandon])
@pytest.mark.parametrize("asked", ASKED)
async def test_nothing_is_held_after_a_connection_whatever_ended_it(
    slow_pool: Pool, disk: Disk, asked: Callable[[Peer], list[bytes]], end: End, error: int
) -> None:
    async with serving(slow_pool) as server, await Peer.open(server, "web1") as peer:
        budget = server.scratch.budget
        disk.cold = range(MIB, BASE_SIZE)
        disk.reads.close()
        disk.writes.close()
        if asked is untaken:
            disk.reads.open()
        await peer.send(*asked(peer))
        await until(lambda: budget.used > 0)
        await end(server, peer)
        await asyncio.sleep(0.01)
        disk.read_error = disk.write_error = error
        disk.reads.open()
        disk.writes.open()
        await until(lambda: not server._connections)
        assert (budget.used, len(budget._accounts), len(budget._waiting)) == (0, 0, 0)
        disk.read_error = disk.write_error = 0


@pytest.mark.parametrize("mode", MODES)
async def test_nothing_is_held_once_all_was_answered(slow_pool: Pool, disk: Disk, mode: Mode) -> None:
    async with serving(slow_pool) as server, await Peer.open(server, "web1", mode=mode) as peer:
        disk.cold = range(MIB, BASE_SIZE)
        for error in (0, errno.EIO, errno.ENOSPC):
            disk.read_error = disk.write_error = error
            requests = [
                *[peer.request(CMD_READ, MIB * (i % 3), MIB + i, cookie=i) for i in range(8)],
                *[peer.request(CMD_WRITE, MIB * i, payload=b"x" * MIB * 2, cookie=8 + i) for i in range(4)],
            ]
            sending = asyncio.create_task(peer.send(*requests))
            assert len(await peer.replies(12)) == 12
            await sending
            assert server.scratch.budget.used == 0
        disk.read_error = disk.write_error = 0
        await peer.send(peer.request(CMD_DISC))
        assert await peer.is_closed()


async def test_a_connection_that_waits_for_memory_is_drained(pool: Pool) -> None:
    async with short(pool) as (server, others), await Peer.open(server, "web1") as peer:
        await peer.send(peer.request(CMD_READ, 0, MIB))
        await until(lambda: len(server.scratch.budget._waiting) == 1)
        [connection] = server._connections
        connection.drain()
        others[0].account.give(2 * MIB)
        assert (await peer.reply()).data == BASE[:MIB]
        assert await peer.is_closed()


@pytest.mark.parametrize("where", ["unix", "tcp"])
async def test_what_a_client_asked_before_it_closed_its_half_is_done_when_there_is_memory(
    pool: Pool, tmp_path: Path, where: str
) -> None:
    listening = {"listen": [("127.0.0.1", 0)]} if where == "tcp" else {"sockets": [tmp_path / "s"]}
    async with short(pool, 300, **listening) as (server, others), await Peer.open(server, "web1") as peer:
        write = peer.request(CMD_WRITE, 0, payload=b"x" * (64 << 10), cookie=1)
        await peer.send(peer.request(CMD_READ, 0, 128 << 10, cookie=0), write, peer.request(CMD_DISC))
        peer.sock.shutdown(socket.SHUT_WR)
        await until(lambda: len(server.scratch.budget._waiting) == 1)
        others[0].account.give(MIB)
        replies = await peer.replies(2)
        assert [replies[cookie].error for cookie in range(2)] == [0, 0]
        assert len(replies[0].data) == 128 << 10
        assert await peer.is_closed()


async def test_a_client_that_went_away_does_not_get_its_turn(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with short(pool) as (server, others), await Peer.open(server, "web1") as peer:
        await peer.send(peer.request(CMD_READ, 0, 2 * MIB))
        await until(lambda: len(server.scratch.budget._waiting) == 1)
        theirs = only_session(server)
        made: list[object] = []
        monkeypatch.setattr(theirs, "_read_large", lambda *what: made.append(what))
        peer.close()
        others[0].account.give(4 * MIB)
        await until(lambda: not server._connections)
        assert not made


async def test_a_session_has_no_more_attributes_than_share_their_names(pool: Pool, tmp_path: Path) -> None:
    """With more than 30, each of thousands of sessions has a dictionary of its own, of 1.2 KiB."""
    async with short(pool, 300, sockets=[tmp_path / "s"]) as (server, _others), await Peer.open(server, "web1"):
        assert len(vars(only_session(server))) <= 30
