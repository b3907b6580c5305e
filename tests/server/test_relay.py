"""A client's TLS in one place, its export in another; what is the same as without is in test_tls.py."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import time
from pathlib import Path

import pytest
import serving as serving_module
from moving import Moving
from secure import SecurePeer, certificates, trusting
from serving import BASE, MIB, go_data, serving, until, where

from nbdclone.client import Client
from nbdclone.protocol.wire import CMD_READ, CMD_WRITE, Option, OptionReply
from nbdclone.server import connection, relay
from nbdclone.server.relay import PIECE, Relay
from nbdclone.server.server import Server
from nbdclone.server.tls import ServerTLS
from nbdclone.store.pool import Pool


@pytest.fixture(autouse=True)
def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "Server", Moving)


def secured(tmp_path: Path) -> dict[str, object]:
    return {"sockets": [tmp_path / "s"], "listen": [("127.0.0.1", 0)], "tls": ServerTLS(certificates())}


async def opened(server: Server, listener: int) -> SecurePeer:
    peer = await SecurePeer.connect(server, listener)
    await peer.secure()
    assert (await peer.ask(Option.GO, go_data("web1")))[-1][0] == OptionReply.ACK
    return peer


@pytest.mark.parametrize("listener", [0, 1])
async def test_large_transfers_go_both_ways_at_once_on_several_connections(
    pool: Pool, tmp_path: Path, listener: int
) -> None:
    data = random.Random(1).randbytes(4 * MIB)
    async with serving(pool, **secured(tmp_path)) as server:
        clients = [await Client.connect(where(server, "web1", listener), tls=trusting()) for _ in range(4)]
        size = len(data) // 4
        for _ in range(3):
            for number, client in enumerate(clients):
                await client.pwrite(data[number * size : (number + 1) * size], number * size)
            reads = [client.pread(len(data), 0) for client in clients]
            writes = [client.pwrite(data[size * n : size * n + 70_001], size * n) for n, client in enumerate(clients)]
            found = await asyncio.gather(*reads, *writes)
            assert found[:4] == [data] * 4
        for client in clients:
            await client.flush()
            await client.close()
        assert isinstance(server, Moving)
        assert server.moves == 4


async def test_an_info_and_then_a_go_are_moved_once_each(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path)) as server, await SecurePeer.connect(server) as peer:
        await peer.secure()
        for option in (Option.INFO, Option.GO):
            assert (await peer.ask(option, go_data("web1")))[-1][0] == OptionReply.ACK
        assert (await peer.run(CMD_READ, 0, 512)).data == BASE[:512]


async def test_what_a_client_leaves_where_it_is_is_not_gathered(pool: Pool, tmp_path: Path) -> None:
    async with serving(pool, **secured(tmp_path)) as server, await opened(server, 0) as peer:
        await peer.send(*[peer.request(CMD_READ, 0, MIB, cookie=i) for i in range(30)])
        [relayed] = [one._relay for one in server._connections if one._relay is not None]
        await until(lambda: relayed._outward is not None)
        await asyncio.sleep(0.05)
        assert relayed._outward is not None
        assert len(relayed._outward) <= PIECE
        assert all(reply.data == BASE[:MIB] for reply in (await peer.replies(30)).values())


async def test_a_goodbye_that_came_with_a_request_is_heard(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a pass has taken both, nothing more comes by the descriptor."""
    monkeypatch.setattr(relay, "MAX_PASSES", 1)
    async with serving(pool, **secured(tmp_path)) as server, await opened(server, 0) as peer:
        request = peer.encrypt(peer.request(CMD_READ, 0, 512))
        with pytest.raises(ssl.SSLWantReadError):
            peer.tls.unwrap()
        await peer.send_raw(request + peer._outgoing.read())
        await until(lambda: not server._connections)


async def test_the_time_for_a_handshake_does_not_begin_again_with_a_move(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_DEADLINE_S", 0.8)
    async with serving(pool, **secured(tmp_path)) as server, await SecurePeer.connect(server) as peer:
        began = time.monotonic()
        await peer.secure()
        await asyncio.sleep(0.5)
        assert (await peer.ask(Option.INFO, go_data("web1")))[-1][0] == OptionReply.ACK
        assert await peer.is_closed()
        assert 0.7 < time.monotonic() - began < 1.2


@pytest.mark.parametrize("listener", [0, 1])
async def test_who_takes_nothing_after_the_server_has_ended_it_is_let_go(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listener: int
) -> None:
    monkeypatch.setattr(relay, "DELIVERY_S", 0.1)
    async with serving(pool, **secured(tmp_path)) as server:
        peer = await opened(server, listener)
        await peer.send(*[peer.request(CMD_READ, 0, 4 * MIB, cookie=i) for i in range(8)])
        [relayed] = [one._relay for one in server._connections if one._relay is not None]
        await until(lambda: relayed._outward is not None)
        [session] = [one._session for one in server._connections if one._session is not None]
        session.abandon()
        await until(lambda: not server._connections)
        peer.close()


class SlowTaker:
    """What a relay needs of a client under TLS, which takes a little now and then."""

    pending = False

    def __init__(self) -> None:
        self.taken = 0
        self._next = 0.0

    def recv_into(self, view: memoryview) -> int:
        raise BlockingIOError

    def send(self, view: memoryview) -> int:
        if time.monotonic() < self._next:
            raise BlockingIOError
        self._next = time.monotonic() + 0.05
        self.taken += (size := min(len(view), 1000))
        return size


async def test_who_is_slow_is_not_let_go_before_all_is_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "DELIVERY_S", 0.2)
    near, far = socket.socketpair()
    raw, client = socket.socketpair()
    with raw, client, far:
        taker = SlowTaker()
        loop = asyncio.get_running_loop()
        one = Relay(taker, raw, "it", near, memoryview(bytearray(PIECE)), loop)  # type: ignore[arg-type]
        far.send(bytes(20_000))
        far.close()
        await one.run()
        assert taker.taken == 20_000
        assert one.delivered


@pytest.mark.parametrize("listener", [0, 1])
async def test_a_client_that_vanishes_in_the_middle_leaves_nothing(pool: Pool, tmp_path: Path, listener: int) -> None:
    rng = random.Random(listener)
    async with serving(pool, **secured(tmp_path)) as server:
        for _ in range(20):
            peer = await opened(server, listener)
            await peer.send(
                *[peer.request(CMD_READ, 0, MIB, cookie=i) for i in range(rng.randrange(9))],
                peer.request(CMD_WRITE, 0, payload=bytes(300_000), cookie=99)[: rng.randrange(1, 300_000)],
            )
            if listener and rng.random() < 0.5:  # a reset
                peer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            peer.close()
        await until(lambda: not server._connections)
        assert not server._exports._open
