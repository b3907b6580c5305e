"""A server as a whole: who it takes in, how it leaves, and that it leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path

import pytest
from serving import BASE, MIB, PATIENCE_S, Disk, Peer, connect, go_data, make_pool, option, serving, until, where

from nbdclone.client import Client
from nbdclone.errors import ConnectionFailed, InUse, UsageError
from nbdclone.protocol.wire import CMD_FLUSH, CMD_READ, CMD_WRITE, CMD_WRITE_ZEROES, Option
from nbdclone.server import host as host_module
from nbdclone.server.server import Server, serve
from nbdclone.store.clone import Clone
from nbdclone.store.pool import Pool

# Coming


async def test_it_listens_on_every_address_and_socket_that_it_is_given(pool: Pool, tmp_path: Path) -> None:
    sockets = [tmp_path / "one", tmp_path / "two"]
    async with serving(pool, listen=[("127.0.0.1", 0), ("127.0.0.1", 0)], sockets=sockets) as server:
        assert len(server.uris) == 4
        assert server.uris[2:] == [f"nbd+unix:///?socket={path}" for path in sockets]
        clients = [await connect(server, "web1", listener) for listener in range(4)]
        await clients[0].pwrite(b"x" * 512, 0)
        for client in clients:
            assert await client.pread(512, 0) == b"x" * 512
            await client.close()
    assert not any(path.exists() for path in sockets)


async def test_it_listens_on_ipv6(pool: Pool) -> None:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
    async with serving(pool, listen=[("::1", 0)]) as server, await connect(server, "web1") as client:
        assert await client.pread(512, 0) == BASE[:512]


async def test_tcp_connections_answer_at_once_and_notice_a_peer_that_vanished(pool: Pool) -> None:
    async with serving(pool, listen=[("127.0.0.1", 0)]) as server, await Peer.open(server, "web1"):
        [connection] = server._connections
        option = connection._sock.getsockopt
        assert option(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, interval, count = (
            option(socket.IPPROTO_TCP, number)
            for number in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + interval * count == host_module.KEEPALIVE_S


async def test_a_second_server_of_the_pool_is_refused_with_the_process_of_the_first(pool: Pool) -> None:
    async with serving(pool):
        with pytest.raises(InUse, match=rf"pool {pool.path} is in use by this process \({os.getpid()}\)"):
            async with Server(pool):
                pass
    async with serving(pool):
        pass


@pytest.mark.parametrize("bad", ["no/such/directory", "x" * 200])
async def test_a_server_that_cannot_listen_leaves_nothing_behind(pool: Pool, tmp_path: Path, bad: str) -> None:
    good = tmp_path / "good"
    with pytest.raises(UsageError):
        async with Server(pool, listen=[("127.0.0.1", 0)], sockets=[good, tmp_path / bad]):
            pass
    assert not good.exists()
    async with serving(pool, sockets=[good]):  # the lock on the pool has gone as well
        pass


async def test_connections_above_the_limit_are_closed_and_logged(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    sockets = [pool.path.parent / "nbd.sock"]
    async with serving(pool, sockets=sockets, max_connections=3, max_connections_per_address=3) as server:
        peers = [await Peer.open(server, "web1") for _ in range(3)]
        async with await Peer.connect(server) as peer:
            assert await peer.is_closed()
        assert "a connection was refused: uid" in caplog.text
        peers.pop().close()
        await until(lambda: len(server._connections) == 2)
        peers.append(await Peer.open(server, "web1"))
        for peer in peers:
            peer.close()


async def test_serve_calls_back_when_it_listens_and_ends_when_it_is_cancelled(pool: Pool, tmp_path: Path) -> None:
    ready: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
    path = tmp_path / "nbd.sock"
    serving = asyncio.create_task(serve(pool, listen=[], sockets=[path], ready=ready.set_result))
    async with await connect(await ready, "web1") as client:
        await client.pwrite(b"x" * 512, 0)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert not path.exists()


# Leaving


async def test_leaving_answers_what_was_asked_and_flushes(tmp_path: Path) -> None:
    disk = Disk()
    pool = make_pool(tmp_path, BASE, "web1", fs=disk)
    async with serving(pool) as server:
        peer = await Peer.open(server, "web1")
        disk.writes.close()
        await peer.send(
            peer.request(CMD_WRITE, 0, payload=b"x" * 2 * MIB, cookie=1),
            peer.request(CMD_WRITE_ZEROES, 3 * MIB, 4096, cookie=2),
            peer.request(CMD_READ, 2 * MIB, MIB, cookie=3),
        )
        await until(lambda: disk.writes.waiting == 1)
        leaving = asyncio.create_task(server.__aexit__(None, None, None))
        await asyncio.sleep(0.05)
        assert not leaving.done()
        before = disk.syncs.passed
        disk.writes.open()
        replies = await peer.replies(3)
        assert {reply.error for reply in replies.values()} == {0}
        assert replies[3].data == BASE[2 * MIB : 3 * MIB]
        assert await peer.is_closed()
        await leaving
        assert disk.syncs.passed > before
        peer.close()
    with Pool.open(pool.path).open_clone("web1") as clone:
        assert clone.pread(2 * MIB, 0) == b"x" * 2 * MIB
        assert clone.pread(4096, 3 * MIB) == bytes(4096)


async def test_leaving_ends_idle_connections_and_handshakes_at_once(pool: Pool) -> None:
    async with serving(pool) as server:
        idle = await Peer.open(server, "web1")
        haggling = await Peer.connect(server)
        await haggling.greet()
        silent = await Peer.connect(server)
        await until(lambda: len(server._connections) == 3)
        began = time.monotonic()
        await server.__aexit__(None, None, None)
        assert time.monotonic() - began < 4
        for peer in (idle, haggling, silent):
            assert await peer.is_closed() or peer is silent
            peer.close()


async def test_leaving_waits_for_a_client_that_reads_slowly_and_no_longer_than_the_limit(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_module, "DRAIN_S", 0.4)
    async with serving(pool) as server:
        slow, dead = await Peer.open(server, "web1"), await Peer.open(server, "web1")
        for peer in (slow, dead):
            await peer.send(*[peer.request(CMD_READ, 0, MIB, cookie=cookie) for cookie in range(4)])
        await until(lambda: sum(c._session._output.backlog > 0 for c in server._connections if c._session) == 2)
        leaving = asyncio.create_task(server.__aexit__(None, None, None))
        for _ in range(4):
            assert (await slow.reply()).data == BASE[:MIB]
        assert await slow.is_closed()
        assert not leaving.done()
        async with asyncio.timeout(2):
            await leaving
        slow.close()
        dead.close()


async def test_leaving_while_an_export_is_being_opened_closes_it(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on = threading.Event(), threading.Event()
    opened = pool.open_clone

    def open_slowly(name: str) -> Clone:
        began.set()
        assert go_on.wait(PATIENCE_S)
        return opened(name)

    monkeypatch.setattr(pool, "open_clone", open_slowly)
    async with serving(pool) as server:
        peer = await Peer.connect(server)
        await peer.greet()
        await peer.send(option(Option.GO, go_data("web1")))
        await until(began.is_set)
        asyncio.get_running_loop().call_later(0.1, go_on.set)
        threading.Timer(0.2, go_on.set).start()
        await server.__aexit__(None, None, None)
        peer.close()
    with opened("web1"):
        pass


async def test_an_error_of_the_body_does_not_keep_it_from_flushing(pool: Pool) -> None:
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        async with serving(pool) as server, await connect(server, "web1") as client:
            await client.pwrite(b"x" * 4096, 0)
            raise ZeroDivisionError
    with pool.open_clone("web1") as clone:
        assert clone.pread(4096, 0) == b"x" * 4096


async def test_clients_of_a_server_that_left_know_it(pool: Pool) -> None:
    async with serving(pool) as server:
        client = await connect(server, "web1")
        uri = where(server, "web1")
        await server.__aexit__(None, None, None)
        with pytest.raises(ConnectionFailed):
            await client.pread(512, 0)
        with pytest.raises(ConnectionFailed):
            await Client.connect(uri)
        await client.close()


@pytest.mark.parametrize("where", ["unix", "tcp"])
async def test_many_comings_and_goings_leave_nothing_behind(pool: Pool, where: str) -> None:
    # What is left behind is found by `serving`; the buffers are counted here.
    options = {"listen": [("127.0.0.1", 0)]} if where == "tcp" else {}
    async with serving(pool, **options) as server:
        for round_number in range(20):
            peers = [await Peer.open(server, f"web{1 + number % 2}") for number in range(10)]
            for peer in peers:
                await peer.send(
                    peer.request(CMD_READ, 0, MIB, cookie=1),
                    peer.request(CMD_READ, 0, 2 * MIB, cookie=2),
                    peer.request(CMD_WRITE, 0, payload=b"x" * 100_000, cookie=3),
                    peer.request(CMD_FLUSH, cookie=4),
                    peer.request(CMD_WRITE, 0, payload=b"x" * 100_000, cookie=5)[: -round_number - 1],
                )
            for peer in peers:
                peer.close()
            await until(lambda: not server._connections)
        assert not server._exports._open
        assert not server._exports._turns


async def test_a_client_that_comes_in_the_moment_of_the_stop_does_not_hold_it_up(pool: Pool) -> None:
    began = time.monotonic()
    with socket.socket(socket.AF_UNIX) as client:
        async with serving(pool) as server:
            client.connect(str(pool.path.parent / "nbd.sock"))
            server._acceptor.accept(server._acceptor.listeners[0])  # its task has not begun when the server is left
        client.settimeout(PATIENCE_S)
        assert client.recv(100) == b""
    assert time.monotonic() - began < 3
