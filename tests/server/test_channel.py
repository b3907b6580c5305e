"""Messages between processes, with descriptors."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from serving import open_files, until

from nbdclone.server import channel as module
from nbdclone.server.channel import Channel, Message


class End:
    """One end, and what came to it."""

    def __init__(self, sock: socket.socket) -> None:
        self.got: list[tuple[Message, bytes | None]] = []
        self.lost = 0
        self.channel = Channel(sock, self._take, self._lose)

    def _take(self, message: Message, fd: int | None) -> None:
        content = None
        if fd is not None:
            content = os.pread(fd, 100, 0)
            os.close(fd)
        self.got.append((message, content))

    def _lose(self) -> None:
        self.lost += 1


@contextmanager
def ends() -> Iterator[tuple[End, End]]:
    before = open_files()
    here, there = socket.socketpair()
    one, other = End(here), End(there)
    yield one, other
    one.channel.close()
    other.channel.close()
    assert {fd for fd, _ in open_files()} <= {fd for fd, _ in before}


def file(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


async def test_messages_of_any_size_come_in_their_order_each_with_its_descriptor() -> None:
    rng = random.Random(1)
    with ends() as (one, other):
        sent: list[tuple[str, bytes | None]] = []
        for number in range(300):
            text = "x" * rng.choice([0, 1, 100, 70_000, 400_000] if number % 20 == 0 else [0, 1, 100])
            content = b"%d" % number if rng.random() < 0.5 else None
            if content is None:
                one.channel.send({"text": text})
            else:
                fd = file(content)
                one.channel.send({"text": text}, fd)
                os.close(fd)
            sent.append((text, content))
            if rng.random() < 0.1:
                await asyncio.sleep(0)
        await until(lambda: len(other.got) == 300)
        assert [(message["text"], content) for message, content in other.got] == sent


async def test_who_asks_gets_its_own_answer() -> None:
    with ends() as (one, other):
        asked = [asyncio.create_task(one.channel.ask({"question": n})) for n in range(5)]
        await until(lambda: len(other.got) == 5)
        for message, _ in reversed(other.got):
            other.channel.answer(message, answer=message["question"] * 10)
        assert [(await task)["answer"] for task in asked] == [0, 10, 20, 30, 40]


async def test_when_the_other_end_is_gone_that_is_told_once_and_nobody_waits_for_an_answer() -> None:
    with ends() as (one, other):
        asked = asyncio.create_task(one.channel.ask({}))
        await until(lambda: bool(other.got))
        other.channel.close()
        with pytest.raises(ConnectionError):
            await asked
        await until(lambda: one.lost == 1)
        one.channel.send({"late": True}, 0)
        with pytest.raises(ConnectionError):
            await one.channel.ask({})
        await asyncio.sleep(0)
        assert (one.lost, other.lost) == (1, 0)


async def test_what_was_sent_before_the_end_arrives() -> None:
    with ends() as (one, other):
        for number in range(10):
            one.channel.send({"number": number})
        one.channel.close()
        await until(lambda: other.lost == 1)
        assert [message["number"] for message, _ in other.got] == list(range(10))


async def test_a_descriptor_that_this_process_cannot_have_is_missing_from_its_own_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receive = socket.recv_fds
    lose = iter([False, True, False])

    def receive_without(*args: int) -> tuple[bytes, list[int], int, object]:
        data, fds, flags, address = receive(*args)  # type: ignore[arg-type]
        if fds and next(lose):
            os.close(fds.pop())
            flags |= socket.MSG_CTRUNC
        return data, fds, flags, address

    monkeypatch.setattr(socket, "recv_fds", receive_without)
    with ends() as (one, other):
        for number in range(3):
            fd = file(b"%d" % number)
            one.channel.send({"number": number}, fd)
            os.close(fd)
        await until(lambda: len(other.got) == 3)
        assert [content for _, content in other.got] == [b"0", None, b"2"]


async def test_when_too_many_descriptors_are_on_their_way_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    send = socket.send_fds
    fails = iter([True, True])

    def send_later(*args: object) -> int:
        if next(fails, False):
            raise OSError(errno.ETOOMANYREFS, "too many")
        return send(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "send_fds", send_later)
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    with ends() as (one, other):
        fd = file(b"here")
        one.channel.send({}, fd)
        one.channel.send({"second": True})
        os.close(fd)
        await until(lambda: len(other.got) == 2)
        assert other.got[0][1] == b"here"
