"""How many may come, in all and from one address."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from serving import CLONES, Peer, connect_from, serving, until

from nbdclone.client import Client
from nbdclone.server import peer as peer_module
from nbdclone.server.admission import MAX_CONNECTIONS, Admission
from nbdclone.store.pool import Pool

TCP = ("127.0.0.1", 0)


def at(address: str) -> peer_module.Peer:
    return peer_module.Peer(address, ip_address(address))


def user(uid: int | None) -> peer_module.Peer:
    return peer_module.Peer("unix", uid=uid)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (at("10.0.0.1"), at("10.0.0.1")),
        (at("fd00::1"), at("fd00::ffff:0:0:1")),  # one host has all of a /64
        (user(1000), user(1000)),
        (user(None), user(None)),
    ],
)
def test_these_count_as_one(one: peer_module.Peer, other: peer_module.Peer) -> None:
    admission = Admission(10, 1)
    assert admission.enter(one) is None
    assert admission.enter(other) is not None
    admission.leave(one)
    assert admission.enter(other) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (at("10.0.0.1"), at("10.0.0.2")),
        (at("fd00:0:0:1::1"), at("fd00:0:0:2::1")),
        (user(1000), user(1001)),
        (user(167772161), at("10.0.0.1")),
    ],
)
def test_these_do_not(one: peer_module.Peer, other: peer_module.Peer) -> None:
    admission = Admission(10, 1)
    assert admission.enter(one) is None
    assert admission.enter(other) is None
    assert "limit 1)" in str(admission.enter(one))


def test_one_address_has_half_of_all_at_most_unless_told_otherwise() -> None:
    admission = Admission()
    here = [admission.enter(at("10.0.0.1")) for _ in range(MAX_CONNECTIONS)]
    assert here.count(None) == MAX_CONNECTIONS // 2
    there = [admission.enter(at("10.0.0.2")) for _ in range(MAX_CONNECTIONS)]
    assert there.count(None) == MAX_CONNECTIONS // 2
    assert "all together 8192 (limit 8192)" in str(admission.enter(at("10.0.0.3")))
    assert Admission(1).enter(at("10.0.0.1")) is None


def test_who_has_left_is_not_remembered() -> None:
    admission = Admission()
    for number in range(100):
        admission.enter(user(number))
        admission.leave(user(number))
    assert not admission._counts


async def test_one_address_does_not_keep_another_out(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(pool, listen=[TCP], max_connections=4) as server:
        greedy = [await Peer.open(server, "web1") for _ in range(2)]
        for _ in range(5):
            async with await Peer.connect(server) as peer:
                assert await peer.is_closed()
        async with await connect_from(server, "127.0.0.2") as other:
            await other.greet()
        assert caplog.text.count("a connection was refused: 127.0.0.1 has 2 connections (limit 2)") == 1
        greedy.pop().close()
        await until(lambda: len(server._connections) == 1)
        greedy.append(await Peer.open(server, "web1"))
        for peer in greedy:
            peer.close()


async def test_a_user_has_the_same_number_on_unix_sockets(pool: Pool) -> None:
    sockets = [pool.path.parent / "nbd.sock"]
    async with serving(pool, sockets=sockets, listen=[TCP], max_connections_per_address=1) as server:
        async with await Peer.open(server, "web1", listener=1):
            async with await Peer.connect(server, 1) as peer:
                assert await peer.is_closed()
            assert await Client.list(server.uris[0]) == ["base", *CLONES]
        await until(lambda: not server._connections)
        assert await Client.list(server.uris[1]) == ["base", *CLONES]


async def test_connections_that_failed_in_the_handshake_are_not_counted_any_more(pool: Pool) -> None:
    async with serving(pool, listen=[TCP], max_connections=2) as server:
        for _ in range(5):
            async with await Peer.connect(server) as peer:
                await peer.greet()
                await peer.send(b"GET / HTTP/1.1\r\n\r\n")
                assert await peer.is_closed()
            await until(lambda: not server._connections)
        async with await Peer.open(server, "web1"):
            pass
