"""Sending: what the socket does not take waits, in its order, and every buffer goes back."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
from serving import MIB, until

from nbdclone.protocol.wire import SIMPLE_REPLY, SIMPLE_REPLY_MAGIC
from nbdclone.server import output as output_module
from nbdclone.server.budget import Budget
from nbdclone.server.buffers import BufferPool
from nbdclone.server.output import GATHER_SIZE, Gather, Output


class Pool(BufferPool):
    """Counts what is out."""

    out = 0

    def take(self, size: int):  # type: ignore[no-untyped-def]
        self.out += 1
        return super().take(size)

    def give(self, buffer) -> None:  # type: ignore[no-untyped-def]
        self.out -= 1
        super().give(buffer)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


@pytest.fixture
def buffers() -> Pool:
    return Pool()


class Heard:
    label = "somebody"
    room = 0
    lost = 0
    sending = 0
    sent = 0

    def resume(self) -> None:
        self.on_room()

    def stalled_since(self) -> None:
        return None

    def abandon(self) -> None:
        self.on_lost()

    def on_room(self) -> None:
        self.room += 1

    def on_lost(self) -> None:
        self.lost += 1

    def on_sending(self) -> None:
        self.sending += 1

    def on_sent(self) -> None:
        self.sent += 1


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
async def output(ends: tuple[socket.socket, socket.socket], buffers: Pool, heard: Heard) -> AsyncIterator[Output]:
    loop = asyncio.get_running_loop()
    account = Budget(MIB, loop).open(heard)
    output = Output(
        ends[0], loop, Gather(), buffers, account, heard.on_room, heard.on_lost, heard.on_sending, heard.on_sent
    )
    yield output
    assert account.held == output.backlog
    output.close()
    assert account.held == 0


async def receive(sock: socket.socket, count: int) -> bytes:
    data = b""
    async with asyncio.timeout(10):
        while len(data) < count:
            data += await asyncio.get_running_loop().sock_recv(sock, 1 << 20)
    return data


async def test_replies_are_gathered_and_sent_together(
    ends: tuple[socket.socket, socket.socket], output: Output, heard: Heard
) -> None:
    output.simple_reply(1, 0)
    output.add(b"message")
    at = output.reserve(4)
    output.view[at : at + 4] = b"data"
    output.filled = at + 4
    with pytest.raises(BlockingIOError):
        ends[1].recv(1)
    assert not heard.sending
    output.push()
    assert heard.sending
    assert ends[1].recv(100) == SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, 1) + b"messagedata"
    assert (output.backlog, output.filled) == (0, 0)


async def test_more_than_the_shared_buffer_holds_is_sent_in_between(
    ends: tuple[socket.socket, socket.socket], output: Output
) -> None:
    count = 2 * GATHER_SIZE // SIMPLE_REPLY.size + 5
    for cookie in range(count):
        output.simple_reply(cookie, 0)
    output.push()
    data = await receive(ends[1], count * SIMPLE_REPLY.size)
    assert [cookie for _, _, cookie in SIMPLE_REPLY.iter_unpack(data)] == list(range(count))


@pytest.mark.parametrize("seed", range(5))
async def test_what_a_slow_peer_does_not_take_waits_and_arrives_in_order(
    ends: tuple[socket.socket, socket.socket], output: Output, buffers: Pool, heard: Heard, seed: int
) -> None:
    rng = random.Random(seed)
    expected = b""
    for number in range(60):
        if rng.random() < 0.5:
            message = bytes([number]) * rng.randrange(1, 1000)
            output.add(message)
            if rng.random() < 0.5:
                output.push()
        else:
            message = bytes([number]) * rng.randrange(1, 300_000)
            buffer = buffers.take(len(message) + 100)
            buffer[100 : 100 + len(message)] = message
            output.send_owned(memoryview(buffer)[100 : 100 + len(message)], buffer)
        expected += message
    output.push()
    assert 0 < output.backlog < len(expected)
    assert output.pieces > 1
    assert buffers.out > 0
    assert await receive(ends[1], len(expected)) == expected
    await until(lambda: output.backlog == 0)
    assert (buffers.out, output.pieces) == (0, 0)
    assert heard.room > 1
    assert heard.lost == 0


async def test_nothing_overtakes_what_waits_when_the_peer_has_made_room(
    ends: tuple[socket.socket, socket.socket], output: Output, buffers: Pool
) -> None:
    first = buffers.take(MIB)
    first[:] = b"1" * MIB
    output.send_owned(memoryview(first), first)
    assert output.backlog > 0
    received = ends[1].recv(MIB)  # the loop has not heard of it yet
    second = buffers.take(MIB)
    second[:] = b"2" * MIB
    output.send_owned(memoryview(second), second)
    output.add(b"3")
    output.push()
    received += await receive(ends[1], 2 * MIB + 1 - len(received))
    assert received == b"1" * MIB + b"2" * MIB + b"3"


async def test_a_broken_connection_is_told_once_and_swallows_the_rest(
    ends: tuple[socket.socket, socket.socket], output: Output, buffers: Pool, heard: Heard
) -> None:
    ends[1].close()
    for _ in range(3):
        output.add(b"lost")
        output.push()
        buffer = buffers.take(MIB)
        output.send_owned(memoryview(buffer), buffer)
    assert (heard.lost, output.backlog, buffers.out) == (1, 0, 0)


async def test_a_connection_that_breaks_while_replies_wait_gives_their_buffers_back(
    ends: tuple[socket.socket, socket.socket], output: Output, buffers: Pool, heard: Heard
) -> None:
    for _ in range(5):
        buffer = buffers.take(MIB)
        output.send_owned(memoryview(buffer), buffer)
    assert buffers.out == 5
    ends[1].close()
    await until(lambda: heard.lost == 1)
    assert (output.backlog, buffers.out) == (0, 0)


async def test_close_drops_what_waits_and_gives_its_buffers_back(
    ends: tuple[socket.socket, socket.socket], output: Output, buffers: Pool, heard: Heard
) -> None:
    for _ in range(5):
        buffer = buffers.take(MIB)
        output.send_owned(memoryview(buffer), buffer)
    output.close()
    output.close()
    assert (output.backlog, buffers.out, heard.lost) == (0, 0, 0)


async def test_a_peer_that_takes_as_fast_as_it_is_given_lets_others_in_between(
    output: Output, buffers: Pool, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(6):
        buffer = buffers.take(MIB)
        output.send_owned(memoryview(buffer)[:MIB], buffer)
    sizes = [len(view) for view, _buffer in output._waiting]
    assert len(sizes) == 6  # of the first, a part
    turns = []
    monkeypatch.setattr(output, "_send", len)
    monkeypatch.setattr(output_module, "MAX_TAKEN", 2 * MIB)
    while output.backlog:
        before = output.pieces
        output._on_writable()
        turns.append(before - output.pieces)
    assert (turns, heard.room, buffers.out) == ([3, 2, 1], 3, 0)
