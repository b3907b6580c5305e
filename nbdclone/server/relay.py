"""A client's TLS in one process, its export in another: what is decrypted here goes there, and back.

TLS's keys cannot be moved, so the process that made the handshake stays in between, with a pair of sockets to the one
that has the export. Each direction holds one piece at most that its receiver has not taken, and takes no more until
then: who is slow is so for the other side too. A direction that ends is ended on the other side.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from nbdclone.server.output import is_gone
from nbdclone.server.tls import TLSSocket

logger = logging.getLogger("nbdclone")

# What one pass moves, and what a direction holds at most: two pieces of what TLS encrypts at once.
PIECE = 64 << 10
# Passes of one wake-up, for the sake of the other connections.
MAX_PASSES = 8
# When the server has ended a connection, and its client takes nothing of the last replies for so long, it gets no more.
DELIVERY_S = 5.0


class Relay:
    """Joins a client, under TLS, to the plain socket of the process that serves it; ``plain`` is closed in the end.

    ``scratch`` is a buffer of PIECE bytes or more that others use too, between passes. ``delivered``, afterwards: it
    was the server that ended it, and the client has been sent all.
    """

    def __init__(
        self,
        secured: TLSSocket,
        raw: socket.socket,
        label: str,
        plain: socket.socket,
        scratch: memoryview,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.delivered = False
        plain.setblocking(False)
        self._secured = secured
        self._raw = raw  # the same connection, for the event loop
        self._label = label  # whose it is, for the log
        self._plain = plain
        self._scratch = scratch[:PIECE]
        self._loop = loop
        self._inward: memoryview | None = None  # decrypted, and not yet taken by the server
        self._outward: memoryview | None = None  # from the server, and not yet taken by the client
        self._client_ended = False
        self._again: asyncio.Handle | None = None
        self._late: asyncio.TimerHandle | None = None
        self._over: asyncio.Future[None] = loop.create_future()

    async def run(self) -> None:
        """Relay until either side has ended."""
        try:
            self._receive_from_client()
            self._receive_from_server()
            await self._over
        finally:
            self._end()
            for sock in (self._raw, self._plain):
                self._loop.remove_reader(sock.fileno())
                self._loop.remove_writer(sock.fileno())
            for timer in (self._again, self._late):
                if timer is not None:
                    timer.cancel()
            self._plain.close()

    # From the client to the server

    def _receive_from_client(self) -> None:
        self._loop.add_reader(self._raw.fileno(), self._guarded, self._move_inward)
        if self._secured.pending and self._again is None:  # which the descriptor does not tell of
            self._again = self._loop.call_soon(self._come_again)

    def _come_again(self) -> None:
        self._again = None
        self._guarded(self._move_inward)

    def _move_inward(self) -> None:
        for _ in range(MAX_PASSES):
            if self._inward is not None or self._client_ended:
                return
            count = self._secured.recv_into(self._scratch)
            if not count:
                self._client_ended = True
                self._loop.remove_reader(self._raw.fileno())
                self._plain.shutdown(socket.SHUT_WR)
                return
            sent = _send(self._plain.send, self._scratch[:count])
            if sent < count:
                self._inward = memoryview(bytes(self._scratch[sent:count]))
                self._loop.remove_reader(self._raw.fileno())
                self._loop.add_writer(self._plain.fileno(), self._guarded, self._push_inward)
                return
        self._receive_from_client()

    def _push_inward(self) -> None:
        assert self._inward is not None
        self._inward = self._inward[_send(self._plain.send, self._inward) :]
        if not self._inward:
            self._inward = None
            self._loop.remove_writer(self._plain.fileno())
            self._receive_from_client()

    # From the server to the client

    def _receive_from_server(self) -> None:
        self._loop.add_reader(self._plain.fileno(), self._guarded, self._move_outward)

    def _move_outward(self) -> None:
        for _ in range(MAX_PASSES):
            try:
                count = self._plain.recv_into(self._scratch)
            except ConnectionResetError:  # it left unread what the client sent last
                count = 0
            if not count:
                self.delivered = True
                self._end()
                return
            sent = _send(self._secured.send, self._scratch[:count])
            if sent < count:
                self._outward = memoryview(bytes(self._scratch[sent:count]))
                self._loop.remove_reader(self._plain.fileno())
                self._loop.add_writer(self._raw.fileno(), self._guarded, self._push_outward)
                if self._late is None:
                    self._late = self._loop.call_later(DELIVERY_S, self._check_delivery, self._outward)
                return

    def _push_outward(self) -> None:
        assert self._outward is not None
        if sent := _send(self._secured.send, self._outward):
            self._outward = self._outward[sent:]
        if not self._outward:
            self._outward = None
            self._loop.remove_writer(self._raw.fileno())
            self._receive_from_server()

    def _check_delivery(self, before: memoryview) -> None:
        """End it if the server has and the client has taken nothing since: the server's end does not show by itself."""
        if self._outward is before and is_gone(self._plain):
            self._end()
        elif self._outward is not None:
            self._late = self._loop.call_later(DELIVERY_S, self._check_delivery, self._outward)
        else:
            self._late = None

    # Ending

    def _guarded(self, step: Callable[[], None]) -> None:
        """Run a step; whatever goes wrong on either side ends both."""
        try:
            step()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            logger.debug("%s: connection lost: %s", self._label, error)
            self._end()

    def _end(self) -> None:
        if not self._over.done():
            self._over.set_result(None)


def _send(send: Callable[[memoryview], int], view: memoryview) -> int:
    """How much of it was taken."""
    with contextlib.suppress(BlockingIOError, InterruptedError):
        return send(view)
    return 0
