"""Whose turn it is on the loop: a client that asks for much does not keep the others from theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import BASE, Disk, Peer, make_pool, serving

from nbdclone.protocol.requests import MAX_BURST, Request
from nbdclone.protocol.wire import CMD_FLUSH, CMD_READ, CMD_WRITE, Mode
from nbdclone.server import input as input_module
from nbdclone.server.session import LONG_READ, Session
from nbdclone.store.clone import Clone
from nbdclone.store.pool import Pool


@contextmanager
def turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Which clone's requests are run, and how many at a time."""
    seen: list[tuple[str, int]] = []
    run = Session.run

    def note(session: Session, requests: list[Request], buffer: memoryview) -> int:
        seen.append((session._clone.name, len(requests)))
        return run(session, requests, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "run", note)
        yield seen


async def test_a_burst_of_requests_lets_others_in_between(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_module, "SLICE_S", 0)
    monkeypatch.setattr(input_module, "LONE_SLICE_S", 0)
    count = 10 * MAX_BURST
    async with serving(pool) as server, await Peer.open(server, "web1") as many, await Peer.open(server, "web2") as one:
        with turns(monkeypatch) as seen:
            many.sock.send(b"".join(many.request(CMD_READ, n, 1, cookie=n) for n in range(count)))
            one.sock.send(one.request(CMD_READ, 0, 512, cookie=1))
            assert (await one.reply()).data == BASE[:512]
            replies = await many.replies(count)
        assert all(replies[n].data == BASE[n : n + 1] for n in range(count))
        assert [seen.index(("web2", 1)) < 3, *{len for name, len in seen if name == "web1"}] == [True, MAX_BURST]


async def test_long_reads_of_one_burst_let_others_in_between(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_module, "SLICE_S", 0)
    monkeypatch.setattr(input_module, "LONE_SLICE_S", 0)
    seen: list[str] = []
    read = Session._read

    def note(session: Session, *args: Any) -> None:
        seen.append(session._clone.name)
        read(session, *args)

    monkeypatch.setattr(Session, "_read", note)
    async with serving(pool) as server, await Peer.open(server, "web1") as many, await Peer.open(server, "web2") as one:
        many.sock.send(b"".join(many.request(CMD_READ, n * LONG_READ, LONG_READ, cookie=n) for n in range(MAX_BURST)))
        one.sock.send(one.request(CMD_READ, 0, 512, cookie=1))
        assert (await one.reply()).data == BASE[:512]
        replies = await many.replies(MAX_BURST)
        assert all(replies[n].data == BASE[n * LONG_READ : (n + 1) * LONG_READ] for n in range(MAX_BURST))
        assert seen.index("web2") < 3


async def test_who_is_alone_has_a_longer_turn(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_module, "CROWDED_FOR_S", 0)
    monkeypatch.setattr(input_module, "SLICE_S", 0)
    monkeypatch.setattr(input_module, "LONE_SLICE_S", 60)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.SIMPLE) as peer:
        count = 3 * MAX_BURST
        peer.sock.send(b"".join(peer.request(CMD_READ, n, 1, cookie=n) for n in range(count)))
        data = await peer.receive(count * 17)
        assert bytes(data[16::17]) == BASE[:count]


async def test_large_reads_that_had_to_wait_come_in_turns_and_in_order(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_module, "SLICE_S", 0)
    monkeypatch.setattr(input_module, "LONE_SLICE_S", 0)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.SIMPLE) as peer:
        await peer.send(*[peer.request(CMD_READ, n << 16, 1 << 16, cookie=n) for n in range(60)])
        for n in range(60):
            reply = await peer.reply()
            assert (reply.cookie, reply.data) == (n, BASE[n << 16 : (n + 1) << 16])


async def test_what_came_with_the_handshake_is_answered_whole(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_module, "SLICE_S", 0)
    monkeypatch.setattr(input_module, "LONE_SLICE_S", 0)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.SIMPLE) as peer:
        [connection] = server._connections
        assert connection._session is not None
        count = 5 * MAX_BURST
        connection._session._input.feed(b"".join(peer.request(CMD_READ, n, 1, cookie=n) for n in range(count)))
        data = await peer.receive(count * 17)
        assert bytes(data[16::17]) == BASE[:count]


async def test_the_flushes_of_a_turn_are_one_and_cover_its_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk()
    pool = make_pool(tmp_path, BASE, "web1", fs=disk)
    order: list[str] = []

    def noted(name: str) -> None:
        method: Any = getattr(Clone, name)

        def call(*args: Any) -> Any:
            order.append(name)
            return method(*args)

        monkeypatch.setattr(Clone, name, call)

    noted("write_nowait")
    noted("flush")
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        messages = []
        for n in range(8):
            messages.append(peer.request(CMD_WRITE, n * 4096, payload=b"x" * 4096, cookie=2 * n))
            messages.append(peer.request(CMD_FLUSH, cookie=2 * n + 1))
        peer.sock.send(b"".join(messages))
        replies = await peer.replies(16)
        assert not any(reply.error for reply in replies.values())
        assert order == ["write_nowait"] * 8 + ["flush"]
