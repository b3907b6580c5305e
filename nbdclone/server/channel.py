"""Between the supervisor and a worker: messages both ways over a Unix socket, with a descriptor where one is handed on.

A message is a JSON object behind its length. Either side may ``ask``, which waits for the other's ``answer``. Both ends
are the same code, started by one another: what comes in is believed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

LENGTH = struct.Struct(">I")
RECEIVE_SIZE = 64 << 10
# Descriptors that one receive may bring; the kernel does not join two messages that carry some.
MAX_DESCRIPTORS = 4
# Too many descriptors on their way (man 7 unix), or no memory for more: tried again after this long.
RETRY_S = 0.05

Message = dict[str, Any]


class Channel:
    """One end. ``on_message(message, fd)`` gets what comes, and owns the descriptor; ``on_lost()`` is called once.

    A message that says ``"fd": true`` and comes without has lost it here, for want of descriptors.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_message: Callable[[Message, int | None], None],
        on_lost: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self.on_message = on_message
        self._sock = sock
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._descriptors: deque[int | None] = deque()
        self._unsent: deque[tuple[memoryview, int | None]] = deque()
        self._numbers = count(1)
        self._asked: dict[int, asyncio.Future[Message]] = {}
        self.lost = False
        self._loop.add_reader(sock.fileno(), self._receive)

    def send(self, message: Message, fd: int | None = None) -> None:
        """Send a message, with a copy of a descriptor. What cannot be sent any more is forgotten."""
        if self.lost:
            return
        if fd is not None:
            message = message | {"fd": True}
            fd = os.dup(fd)
        data = json.dumps(message).encode()
        self._unsent.append((memoryview(LENGTH.pack(len(data)) + data), fd))
        if len(self._unsent) == 1:
            self._push()

    async def ask(self, message: Message, fd: int | None = None) -> Message:
        """Send a message and wait for its answer. Raises ConnectionError if none will come."""
        if self.lost:
            raise ConnectionResetError("the other process is gone")
        number = next(self._numbers)
        future = self._asked[number] = self._loop.create_future()
        try:
            self.send(message | {"asked": number}, fd)
            answer: Message = await future
            return answer
        finally:
            self._asked.pop(number, None)

    def answer(self, message: Message, **answer: Any) -> None:
        """Answer a message that was asked."""
        self.send({"answered": message["asked"], **answer})

    def close(self) -> None:
        """End it, without a word to ``on_lost``."""
        if self.lost:
            return
        self.lost = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _data, fd in self._unsent:
            _close(fd)
        for fd in self._descriptors:
            _close(fd)
        self._unsent.clear()
        self._descriptors.clear()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(ConnectionResetError("the other process is gone"))
                future.exception()  # who asked may be gone as well

    def _lose(self) -> None:
        if not self.lost:
            self.close()
            self._on_lost()

    def _push(self) -> None:
        if self.lost:
            return
        self._loop.remove_writer(self._sock.fileno())
        while self._unsent:
            data, fd = self._unsent[0]
            try:
                sent = socket.send_fds(self._sock, [data], [] if fd is None else [fd])
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._sock.fileno(), self._push)
                return
            except OSError as error:
                if error.errno in (errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM):
                    self._loop.call_later(RETRY_S, self._push)
                else:
                    self._loop.call_soon(self._lose)  # what it sent before is not read any more: it is gone
                return
            _close(fd)  # it went with the first byte
            if sent < len(data):
                self._unsent[0] = (data[sent:], None)
            else:
                self._unsent.popleft()

    def _receive(self) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(self._sock, RECEIVE_SIZE, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, fds, flags = b"", [], 0
        self._descriptors += fds
        if flags & socket.MSG_CTRUNC:  # this process can have no more of them
            self._descriptors.append(None)
        if not data:
            self._lose()
            return
        self._received += data
        while not self.lost and (message := self._next()) is not None:
            self._deliver(message)

    def _next(self) -> Message | None:
        if len(self._received) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._received)
        end = LENGTH.size + length
        if len(self._received) < end:
            return None
        message: Message = json.loads(self._received[LENGTH.size : end])
        del self._received[:end]
        return message

    def _deliver(self, message: Message) -> None:
        fd = self._descriptors.popleft() if message.get("fd") else None
        if "answered" not in message:
            self.on_message(message, fd)
            return
        future = self._asked.get(message["answered"])
        if future is not None and not future.done():
            future.set_result(message)


def _close(fd: int | None) -> None:
    if fd is not None:
        with contextlib.suppress(OSError):
            os.close(fd)
