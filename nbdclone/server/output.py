"""What goes out on a connection: replies gathered in a shared buffer, sent in one call, kept while the peer is slow."""

from __future__ import annotations

import asyncio
import select
from collections import deque
from collections.abc import Callable
from mmap import mmap
from typing import TYPE_CHECKING

from nbdclone.protocol.wire import (
    EXTENDED_REPLY,
    EXTENDED_REPLY_MAGIC,
    REPLY_FLAG_DONE,
    REPLY_TYPE_NONE,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    Cookie,
)
from nbdclone.server.budget import Account
from nbdclone.server.buffers import MIN_BUFFER, BufferPool

if TYPE_CHECKING:
    from nbdclone.server.tls import AnySocket

# The buffer in which one pass over a connection gathers its replies. All connections share it, one pass at a time.
GATHER_SIZE = 256 << 10
# Parts of a buffer wait in it if at least one in so many of its bytes is theirs: a backlog is counted by what is to be
# sent, and must not hold much more. A buffer may be twice as long as what was asked for.
MIN_KEPT_SHARE = 4
# What a peer takes of its backlog before others have their turn.
MAX_TAKEN = 256 << 10

_pack_simple_reply = SIMPLE_REPLY.pack_into
_SIMPLE_REPLY_SIZE = SIMPLE_REPLY.size
_pack_extended_reply = EXTENDED_REPLY.pack_into
_EXTENDED_REPLY_SIZE = EXTENDED_REPLY.size


def is_gone(sock: AnySocket) -> bool:
    """Has the peer closed the connection, as far as that shows? One that closed its half of it wants its replies."""
    poll = select.poll()
    poll.register(sock.fileno(), 0)  # POLLHUP and POLLERR are told in any case
    return bool(poll.poll(0))


class Gather:
    """The shared buffer: a connection fills it from 0 and empties it before anybody else runs."""

    def __init__(self) -> None:
        self.buffer = mmap(-1, GATHER_SIZE)
        self.view = memoryview(self.buffer)


class Output:
    """The sending side of a connection's socket.

    ``backlog`` counts the bytes that the peer has not taken yet. ``on_room`` is called whenever it took some,
    ``on_lost`` once when the connection is found broken; from then on everything is swallowed. ``before_sending`` is
    called at the end of a turn, and before what was gathered leaves, ``on_sent`` when the socket took something.
    """

    def __init__(
        self,
        sock: AnySocket,
        loop: asyncio.AbstractEventLoop,
        gather: Gather,
        buffers: BufferPool,
        account: Account,
        on_room: Callable[[], None],
        on_lost: Callable[[], None],
        before_sending: Callable[[], None],
        on_sent: Callable[[], None],
    ) -> None:
        self.buffer = gather.buffer
        self.view = gather.view
        self.filled = 0
        self.backlog = 0
        self.blocked_since: float | None = None  # since when the peer has not taken the oldest piece of it whole
        self._sock = sock
        self._loop = loop
        self._buffers = buffers
        self._account = account
        self._on_room = on_room
        self._on_lost = on_lost
        self._before_sending = before_sending
        self._on_sent = on_sent
        self._waiting: deque[tuple[memoryview, mmap | None]] = deque()
        self._lost = False

    @property
    def pieces(self) -> int:
        """In how many pieces the backlog is kept."""
        return len(self._waiting)

    def reserve(self, size: int) -> int:
        """Where in ``buffer`` the next ``size`` bytes (at most GATHER_SIZE) go; set ``filled`` to their end."""
        if self.filled + size > GATHER_SIZE:
            self.push()
        return self.filled

    def simple_reply(self, cookie: Cookie, error: int = 0) -> None:
        """Gather a simple reply."""
        at = self.filled
        if at + _SIMPLE_REPLY_SIZE > GATHER_SIZE:
            self.push()
            at = 0
        _pack_simple_reply(self.buffer, at, SIMPLE_REPLY_MAGIC, error, cookie)
        self.filled = at + _SIMPLE_REPLY_SIZE

    def extended_success(self, cookie: Cookie) -> None:
        """Gather an extended reply that says no more than success."""
        at = self.reserve(_EXTENDED_REPLY_SIZE)
        _pack_extended_reply(self.buffer, at, EXTENDED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, 0)
        self.filled = at + _EXTENDED_REPLY_SIZE

    def add(self, message: bytes) -> None:
        """Gather a short message."""
        at = self.reserve(len(message))
        self.view[at : at + len(message)] = message
        self.filled = at + len(message)

    def push(self) -> None:
        """Send what was gathered. What the socket does not take now, is copied and waits."""
        self._before_sending()
        filled = self.filled
        if not filled:
            return
        self.filled = 0
        sent = 0 if self._waiting else self._send(self.view[:filled])
        if sent < filled and not self._lost:
            self._wait_copied(self.view[sent:filled])

    def send_owned(self, view: memoryview, buffer: mmap) -> None:
        """Send ``view``, which lies in ``buffer``, without copying it; the buffer goes back to the pool afterwards."""
        self.push()
        sent = 0 if self._waiting else self._send(view)
        if sent == len(view) or self._lost:
            self._buffers.give(buffer)
        else:
            self._wait(view[sent:], buffer)

    def send_parts(self, parts: list[memoryview], buffer: mmap) -> None:
        """Send ``parts``, which lie in ``buffer``, one after the other; the buffer goes back to the pool afterwards.

        What must wait is copied where the parts are but little of the buffer, which would else be held for them.
        """
        self.push()
        keep = sum(map(len, parts)) * MIN_KEPT_SHARE >= len(buffer)
        for part in parts:
            sent = 0 if self._waiting else self._send(part)
            if sent < len(part) and not self._lost:
                rest = part[sent:] if keep else memoryview(bytes(part[sent:]))
                self._wait(rest, buffer if keep and part is parts[-1] else None)
        if not (keep and self._waiting):  # if anything waits, the last part does
            self._buffers.give(buffer)

    def close(self) -> None:
        """Drop what waits."""
        self._lose()

    def _send(self, view: memoryview) -> int:
        if self._lost:
            return 0
        try:
            sent = self._sock.send(view)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._lose()
            self._on_lost()
            return 0
        self._on_sent()
        return sent

    def _wait_copied(self, view: memoryview) -> None:
        size = len(view)
        if size < MIN_BUFFER:
            self._wait(memoryview(bytes(view)), None)
            return
        # Not from the heap, which would keep for ever what a hundred slow peers once made it take.
        buffer = self._buffers.take(size)
        copy = memoryview(buffer)[:size]
        copy[:] = view
        self._wait(copy, buffer)

    def _wait(self, view: memoryview, buffer: mmap | None) -> None:
        if not self._waiting:
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
            self.blocked_since = self._loop.time()
        self._waiting.append((view, buffer))
        self.backlog += len(view)
        self._account.take(len(view))

    def _on_writable(self) -> None:
        taken = 0
        while self._waiting:
            view, buffer = self._waiting[0]
            sent = self._send(view)
            if self._lost:
                return
            self.backlog -= sent
            self._account.give(sent)
            if sent < len(view):
                self._waiting[0] = (view[sent:], buffer)
                self._on_room()
                return
            self._waiting.popleft()
            self.blocked_since = self._loop.time()
            if buffer is not None:
                self._buffers.give(buffer)
            taken += sent
            if taken >= MAX_TAKEN and self._waiting:
                self._on_room()
                return
        self.blocked_since = None
        self._loop.remove_writer(self._sock.fileno())
        self._on_room()

    def _lose(self) -> None:
        if self._lost:
            return
        self._lost = True
        if self._waiting:
            self._loop.remove_writer(self._sock.fileno())
        for _view, buffer in self._waiting:
            if buffer is not None:
                self._buffers.give(buffer)
        self._waiting.clear()
        self._account.give(self.backlog)
        self.backlog = 0
        self.blocked_since = None
