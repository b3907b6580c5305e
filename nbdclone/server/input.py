"""What comes in on a connection: requests, taken from a shared buffer in one pass; large writes, received in place."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from mmap import mmap
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from nbdclone.protocol.requests import MAX_BURST, Request, RequestLayout
from nbdclone.protocol.wire import MAX_PIPELINED
from nbdclone.server.budget import Account
from nbdclone.server.buffers import PAGE, BufferPool

if TYPE_CHECKING:
    from nbdclone.server.tls import AnySocket

# The shared receiving buffer: a Unix socket hands over about 200 KiB at once. It holds all that came with a handshake.
RECEIVE_SIZE = PAGE + MAX_PIPELINED
# A payload of this size gets a buffer of its own and is received straight into it; a smaller one is run where it is.
DIRECT_WRITE = 32 << 10
# How often one wake-up receives, for the sake of the other connections, while a payload is not complete.
MAX_RECEIVES = 16
# How long a connection runs requests before the others have their turn: while others have had one a moment ago, and
# while nobody has. What was received and not run must be copied out of the shared buffer: so the less is received.
SLICE_S = 0.0001
LONE_SLICE_S = 0.002
CROWDED_FOR_S = 0.05
CROWDED_RECEIVE = 64 << 10


class Receiver(Protocol):
    """Who is told of what came in."""

    def run(self, requests: list[Request], buffer: memoryview) -> int:
        """Run these requests; their payloads stand in ``buffer``, for the time of the call. How many it took: if not
        all, it has stopped the input, and gets the others again when that was started.
        """

    def finish_turn(self) -> None:
        """There are no more for now: send the replies."""

    def run_write(self, request: Request, payload: memoryview, buffer: mmap) -> None:
        """Run a request whose large payload stands in a buffer of its own, to be given back to the pool."""

    def has_memory(self, size: int) -> bool:
        """May so much be received and held now? If not, the input is started again when it may."""

    def drain(self) -> None:
        """The peer sends nothing more."""


class ReceiveBuffer:
    """The shared buffer: a connection fills it and empties it before anybody else runs. It knows who did so last."""

    def __init__(self) -> None:
        self.buffer = mmap(-1, RECEIVE_SIZE)
        self.view = memoryview(self.buffer)
        self.crowded = False
        self._last: object = None
        self._crowded_until = 0.0

    def begin_turn(self, who: object) -> float:
        """When (``perf_counter``) the turn that begins now is to end."""
        now = perf_counter()
        if self._last is not who:
            self._last = who
            self._crowded_until = now + CROWDED_FOR_S
        self.crowded = now < self._crowded_until
        return now + (SLICE_S if self.crowded else LONE_SLICE_S)


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
        account: Account,
        receiver: Receiver,
        on_readable: Callable[[], None],
    ) -> None:
        self.active = False
        self.until = 0.0  # when this turn ends (``perf_counter``)
        self.blocked_since: float | None = None  # when the peer began to send the large payload that is not all there
        self._sock = sock
        self._loop = loop
        self._parse = layout.parse
        self._layout = layout
        # The first request is put so that what follows its header starts on a page: a payload there is copied at full
        # speed.
        self._receive_at = PAGE - layout.size
        self._shared = shared
        self._buffer = shared.buffer
        self._view = shared.view
        self._buffers = buffers
        self._account = account
        self._receiver = receiver
        self._on_readable = on_readable
        self._carry = b""  # the beginning of a request that is not all there, unless
        self._unparsed = False  # that is not known: it was received before, and is to be looked at
        self._payload: _Payload | None = None
        self._again: asyncio.Handle | None = None

    def start(self) -> None:
        """Receive when there is something."""
        if not self.active:
            self.active = True
            self._loop.add_reader(self._sock.fileno(), self._on_readable)
            self._come_again()

    def stop(self) -> None:
        """Leave in the socket what comes."""
        if self.active:
            self.active = False
            self._loop.remove_reader(self._sock.fileno())
            if self._again is not None:
                self._again.cancel()
                self._again = None

    def close(self) -> None:
        """Stop, and drop what is not complete."""
        self.stop()
        if self._payload is not None:
            self._buffers.give(self._payload.buffer)
            self._release(self._payload)

    def feed(self, data: bytes) -> None:
        """Take what was received already: at most MAX_PIPELINED bytes, before anything else. Raises as ``receive``."""
        end = self._receive_at + len(data)
        self._view[self._receive_at : end] = data
        self.begin_turn()
        self._take(end)
        self._come_again()

    def begin_turn(self) -> float:
        """It is this connection's turn on the loop: when (``perf_counter``) that is to end."""
        self.until = self._shared.begin_turn(self)
        return self.until

    def receive(self) -> None:
        """Receive what there is, and hand on what is complete. Raises RemoteProtocolError, OSError."""
        self.begin_turn()
        for _ in range(MAX_RECEIVES):
            more = self._receive_requests() if self._payload is None else self._receive_payload(self._payload)
            if not (more and self.active) or perf_counter() > self.until:
                break
        self._come_again()

    def _come_again(self) -> None:
        """Do not wait for the descriptor while there is something that it does not tell of."""
        if self.active and self._again is None and self._pending():
            self._again = self._loop.call_soon(self._receive_again)

    def _pending(self) -> bool:
        return self._unparsed

    def _receive_again(self) -> None:
        self._again = None
        self._on_readable()

    def _receive_requests(self) -> bool:
        """Receive into the shared buffer. False if it is better to wait for the next wake-up."""
        view = self._view
        start = self._receive_at
        if carry := self._carry:
            start += len(carry)
            view[self._receive_at : start] = carry
            if self._unparsed:
                self._unparsed = False
                self._take(start)
                return False
        try:
            limit = start + CROWDED_RECEIVE if self._shared.crowded else RECEIVE_SIZE
            count = self._sock.recv_into(view[start:limit])
        except (BlockingIOError, InterruptedError):
            return False
        if not count:
            self._receiver.drain()
            return False
        self._take(start + count)
        return self._payload is not None

    def _take(self, end: int) -> None:
        """Hand on every whole request in the shared buffer up to ``end``, and keep the rest."""
        self._carry = b""
        position = self._receive_at
        active, unparsed = self.active, True
        try:
            while unparsed:
                requests: list[Request] = []
                taken = 0
                try:
                    position = self._parse(self._buffer, position, end, requests)
                finally:
                    if requests:
                        taken = self._receiver.run(requests, self._view)
                if taken < len(requests):
                    position = requests[taken][5] - self._layout.size
                    break
                unparsed = len(requests) == MAX_BURST and position < end
                if perf_counter() > self.until or self.active is not active:  # the others first; or no more
                    break
        finally:
            self._receiver.finish_turn()
        if unparsed:
            self._carry, self._unparsed = bytes(self._view[position:end]), True
            return
        if position == end:
            return
        header = self._layout.size
        request = self._layout.head(self._buffer, position) if end - position >= header else None
        if request is None or request[4] + header < DIRECT_WRITE:
            self._carry = bytes(self._view[position:end])
            return
        length = request[4]
        # While nothing is received, nothing is held for what is to be: it could keep the input from starting again.
        if not (self.active and self._receiver.has_memory(length)):
            self._carry, self._unparsed = bytes(self._view[position:end]), True
            self.stop()
            return
        self._account.take(length)
        self.blocked_since = self._loop.time()
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
            self._release(payload)
            self._receiver.run_write(payload.request, payload.view, payload.buffer)
        return True

    def _release(self, payload: _Payload) -> None:
        """It is all there, or never will be: no more to be held for the peer."""
        self._payload = None
        self.blocked_since = None
        self._account.give(len(payload.view))
