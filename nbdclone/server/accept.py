"""Accepting: the sockets that listen, and how many come in."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from nbdclone.server.admission import Admission
from nbdclone.server.listen import Listener, listen_tcp, listen_unix
from nbdclone.server.peer import Peer
from nbdclone.server.quiet import QuietLog

logger = logging.getLogger("nbdclone")

# How many connections are accepted before those that are there get their turn.
ACCEPT_BURST = 64
# After accept fails for want of descriptors or memory: trying again at once would only burn the processor.
ACCEPT_PAUSE_S = 0.5


class Acceptor:
    """Listens, and hands every connection for which there is room to ``begin``, which owns the socket then.

    Whoever gets one says ``leave`` when it is gone.
    """

    def __init__(self, admission: Admission, quiet: QuietLog, begin: Callable[[socket.socket, Peer], None]) -> None:
        self.listeners: list[Listener] = []
        self.leave = admission.leave
        self._admission = admission
        self._quiet = quiet
        self._begin = begin
        self._loop = asyncio.get_running_loop()
        self._active = False

    def listen(
        self, addresses: Sequence[tuple[str, int]], sockets: Sequence[str | Path], *, tls: bool, local_only: bool
    ) -> list[str]:
        """Bind all of these: their URIs; with ``tls``, those of TLS. Raises UsageError, InUse; close it then too."""
        for host, port in addresses:
            self.listeners += listen_tcp(host, port, local_only=local_only)
        for path in sockets:
            self.listeners.append(listen_unix(Path(path)))
        uris = [listener.uri for listener in self.listeners]
        return [uri.replace("nbd", "nbds", 1) for uri in uris] if tls else uris

    def start(self) -> None:
        """Accept what comes."""
        self._active = True
        for listener in self.listeners:
            self._loop.add_reader(listener.sock.fileno(), self.accept, listener)

    def stop(self) -> None:
        """Leave those who come where they are, until the next ``start``."""
        self._active = False
        for listener in self.listeners:
            self._loop.remove_reader(listener.sock.fileno())

    def close(self) -> None:
        """Listen no more."""
        self.stop()
        for listener in self.listeners:
            listener.close()
        self.listeners = []

    def accept(self, listener: Listener) -> None:
        for _ in range(ACCEPT_BURST):
            try:
                sock, address = listener.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error("%s: cannot accept: %s", listener.uri, error)
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._loop.remove_reader(listener.sock.fileno())
                    self._loop.call_later(ACCEPT_PAUSE_S, self._accept_again, listener)
                return
            peer = Peer.of(sock, address)
            reason = self._admission.enter(peer)
            if reason is None:
                self._begin(sock, peer)
            else:
                sock.close()
                self._quiet.say("admission", "%s: a connection was refused: %s", listener.uri, reason)

    def _accept_again(self, listener: Listener) -> None:
        if self._active:
            self._loop.add_reader(listener.sock.fileno(), self.accept, listener)
