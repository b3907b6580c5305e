"""What comes in on a connection: requests, taken from a shared buffer in one pass; large writes, received in place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from mmap import mmap
from typing import TYPE_CHECKING, Protocol

from nbdclone.protocol.requests import Request, RequestLayout
from nbdclone.protocol.wire import MAX_PIPELINED
from nbdclone.server.buffers import PAGE, BufferPool

if TYPE_CHECKING:
    from nbdclone.server.tls import AnySocket

# The shared receiving buffer: a Unix socket hands over about 200 KiB at once. It holds all that came with a handshake.
RECEIVE_SIZE = PAGE + MAX_PIPELINED
# A payload of this size gets a buffer of its own and is received straight into it; a smaller one is run where it is.
DIRECT_WRITE = 32 << 10
# How often one wake-up receives, for the sake of the other connections, while a payload is not complete.
MAX_RECEIVES = 16


class Receiver(Protocol):
    """Who is told of what came in."""

    def run(self, requests: list[Request], buffer: memoryview) -> None:
        """Run these requests; their payloads stand in ``buffer``, for the time of the call."""

    def run_write(self, request: Request, payload: memoryview, buffer: mmap) -> None:
        """Run a request whose large payload stands in a buffer of its own, to be given back to the pool."""

    def drain(self) -> None:
        """The peer sends nothing more."""


class ReceiveBuffer:
    """The shared buffer: a connection fills it and empties it before anybody else runs."""

    def __init__(self) -> None:
        self.buffer = mmap(-1, RECEIVE_SIZE)
        self.view = memoryview(self.buffer)


class _Payload:
    """A large payload while it is being received: ``got`` of ``view`` is there."""

    __slots__ = ("buffer", "got", "request", "view")

    def __init__(self, request: Request, buffer: mmap, length: int) -> None:
        self.request = request
        self.buffer = buffer
        self.view = memoryview(buffer)[:length]
        self.got = 0


class Input:
    """The receiving side of a connection's socket. ``on_readable`` is to call ``receive``, between start and stop."""

    def __init__(
        self,
        sock: AnySocket,
        loop: asyncio.AbstractEventLoop,
        layout: RequestLayout,
        shared: ReceiveBuffer,
        buffers: BufferPool,
        receiver: Receiver,
        on_readable: Callable[[], None],
    ) -> None:
        self.active = False
        self._sock = sock
        self._loop = loop
        self._parse = layout.parse
        self._layout = layout
        # The first request is put so that what follows its header starts on a page: a payload there is copied at full
        # speed.
        self._receive_at = PAGE - layout.size
        self._buffer = shared.buffer
        self._view = shared.view
        self._buffers = buffers
        self._receiver = receiver
        self._on_readable = on_readable
        self._carry = b""  # the beginning of a request that is not all there
        self._payload: _Payload | None = None

    def start(self) -> None:
        """Receive when there is something."""
        if not self.active:
            self.active = True
            self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def stop(self) -> None:
        """Leave in the socket what comes."""
        if self.active:
            self.active = False
            self._loop.remove_reader(self._sock.fileno())

    def close(self) -> None:
        """Stop, and drop what is not complete."""
        self.stop()
        if self._payload is not None:
            self._buffers.give(self._payload.buffer)
            self._payload = None

    def feed(self, data: bytes) -> None:
        """Take what was received already: at most MAX_PIPELINED bytes, before anything else. Raises as ``receive``."""
        end = self._receive_at + len(data)
        self._view[self._receive_at : end] = data
        self._take(end)

    def receive(self) -> None:
        """Receive what there is, and hand on what is complete. Raises RemoteProtocolError, OSError."""
        for _ in range(MAX_RECEIVES):
            more = self._receive_requests() if self._payload is None else self._receive_payload(self._payload)
            if not (more and self.active):
                return

    def _receive_requests(self) -> bool:
        """Receive into the shared buffer. False if it is better to wait for the next wake-up."""
        view = self._view
        start = self._receive_at
        if carry := self._carry:
            start += len(carry)
            view[self._receive_at : start] = carry
        try:
            count = self._sock.recv_into(view[start:])
        except (BlockingIOError, InterruptedError):
            return False
        if not count:
            self._receiver.drain()
            return False
        self._carry = b""
        self._take(start + count)
        return self._payload is not None

    def _take(self, end: int) -> None:
        """Hand on every whole request in the shared buffer up to ``end``, and keep the rest."""
        requests: list[Request] = []
        try:
            position = self._parse(self._buffer, self._receive_at, end, requests)
        finally:
            if requests:
                self._receiver.run(requests, self._view)
        if position == end:
            return
        header = self._layout.size
        request = self._layout.head(self._buffer, position) if end - position >= header else None
        if request is None or request[4] + header < DIRECT_WRITE:
            self._carry = bytes(self._view[position:end])
            return
        length = request[4]
        payload = _Payload(request, self._buffers.take(length), length)
        payload.got = end - position - header
        payload.view[: payload.got] = self._view[position + header : end]
        self._payload = payload

    def _receive_payload(self, payload: _Payload) -> bool:
        """Receive more of a large payload. False if the socket holds no more for now."""
        try:
            count = self._sock.recv_into(payload.view[payload.got :])
        except (BlockingIOError, InterruptedError):
            return False
        if not count:
            self._receiver.drain()
            return False
        payload.got += count
        if payload.got == len(payload.view):
            self._payload = None
            self._receiver.run_write(payload.request, payload.view, payload.buffer)
        return True
