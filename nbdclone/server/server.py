"""The server: listens, accepts, and sees everybody out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from nbdclone.errors import UsageError
from nbdclone.protocol.handshake import TLSMode
from nbdclone.server.connection import Connection
from nbdclone.server.export import Exports
from nbdclone.server.listen import Listener, listen_tcp, listen_unix
from nbdclone.server.offload import Offload
from nbdclone.server.session import Scratch
from nbdclone.server.tls import ServerTLS
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

# What one server takes on. A connection that does nothing costs a few KiB; the limit is there to be a limit.
MAX_CONNECTIONS = 8192
# How many connections are accepted before those that are there get their turn.
ACCEPT_BURST = 64
# After accept fails for want of descriptors or memory: trying again at once would only burn the processor.
ACCEPT_PAUSE_S = 0.5
# How long clients have, at a shutdown, to take the replies to what they asked.
DRAIN_S = 5.0
# A TCP client that vanished without a word is noticed after about this many seconds.
KEEPALIVE_S = 60

# Half of what may be on its way to a client (the kernel doubles it, and cuts it to net.core.wmem_max): a Unix socket's
# usual 208 KiB, not doubled, do not hold a read of 256 KiB, which then takes another wake-up for its second half.
SEND_BUFFER = 256 << 10


class Server:
    """Serves every clone and base of a pool. An async context manager: entered, it listens; left, it has flushed.

    ``listen``: (host, port) pairs, port 0 for a free one. ``sockets``: paths of Unix sockets. ``uris`` says, once it
    listens, how to reach each of them, in this order. ``tls``: how it does TLS; unless that is required, an address
    that other machines reach is refused, or taken with ``insecure``.

    Entering raises InUse (another server has the pool; an address is taken) or UsageError.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        listen: Sequence[tuple[str, int]] = (),
        sockets: Sequence[str | Path] = (),
        tls: ServerTLS | None = None,
        insecure: bool = False,
    ) -> None:
        self.pool = pool
        self.uris: list[str] = []
        self.tls = tls
        self.tls_mode = TLSMode.OFF if tls is None else TLSMode.REQUIRED if tls.required else TLSMode.ON
        self._insecure = insecure
        self._listen = listen
        self._sockets = sockets
        self._listeners: list[Listener] = []
        self._connections: set[Connection] = set()
        self._held = contextlib.ExitStack()
        self._stopping = False

    async def __aenter__(self) -> Server:
        self._loop = asyncio.get_running_loop()
        self.scratch = Scratch()
        with contextlib.ExitStack() as held:
            held.enter_context(self.pool.served())
            self._listeners = []
            required = self.tls_mode is TLSMode.REQUIRED
            held.callback(self._close_listeners)
            for host, port in self._listen:
                self._listeners += listen_tcp(host, port, local_only=not (required or self._insecure))
            for path in self._sockets:
                self._listeners.append(listen_unix(Path(path)))
            self.offload = Offload(self._loop)
            held.callback(self.offload.close)
            keeper = Offload(self._loop)
            held.callback(keeper.close)
            self._exports = Exports(self.pool, self.offload, keeper, self._loop)
            self._held = held.pop_all()
        self._tasks = await asyncio.TaskGroup().__aenter__()
        self.uris = [listener.uri for listener in self._listeners]
        if required:
            self.uris = [uri.replace("nbd", "nbds", 1) for uri in self.uris]
        for listener in self._listeners:
            self._loop.add_reader(listener.sock.fileno(), self._accept, listener)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening, answer what was asked, flush and close every clone."""
        self._stopping = True
        try:
            self._close_listeners()
            for connection in list(self._connections):
                connection.drain()
            abandoning = self._loop.call_later(DRAIN_S, self._abandon)
            try:
                await self._tasks.__aexit__(None, None, None)
            finally:
                abandoning.cancel()
        finally:
            self._held.close()

    def reload(self) -> None:
        """Read the files of TLS again, for the connections to come. If they are wrong, that is logged, and no more."""
        if self.tls is None:
            return
        try:
            self.tls.reload()
        except UsageError as error:
            logger.error("TLS goes on as it was: %s", error)
        else:
            logger.info("TLS: the files were read again")

    def _abandon(self) -> None:
        for connection in self._connections:
            connection.abandon()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener.sock.fileno())
            listener.close()
        self._listeners = []

    def _accept(self, listener: Listener) -> None:
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
            if len(self._connections) >= MAX_CONNECTIONS:
                logger.error("%s: refused, there are %d connections", listener.uri, MAX_CONNECTIONS)
                sock.close()
                continue
            self._begin(sock, address)

    def _accept_again(self, listener: Listener) -> None:
        if not self._stopping:
            self._loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def _begin(self, sock: socket.socket, address: object) -> None:
        sock.setblocking(False)
        peer = "unix"
        if sock.family == socket.AF_UNIX:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        else:  # whose buffers grow by themselves, unless they are set
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S // 2)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S // 6)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
                # The same when replies are on their way, during which nothing is kept alive.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, KEEPALIVE_S * 1000)
            if isinstance(address, tuple):
                peer = f"{address[0]}:{address[1]}"
        connection = Connection(sock, peer, self._exports, self)
        self._connections.add(connection)
        self._tasks.create_task(self._serve(connection))

    async def _serve(self, connection: Connection) -> None:
        try:
            await connection.serve()
        except Exception:
            logger.exception("a defect of the server")
        finally:
            self._connections.discard(connection)


async def serve(
    pool: Pool,
    *,
    listen: Sequence[tuple[str, int]] = (("127.0.0.1", 10809),),
    sockets: Sequence[str | Path] = (),
    tls: ServerTLS | None = None,
    insecure: bool = False,
    ready: Callable[[Server], None] | None = None,
) -> None:
    """Serve a pool until cancelled; ``ready`` is called once it listens. Raises what entering a Server raises."""
    async with Server(pool, listen=listen, sockets=sockets, tls=tls, insecure=insecure) as server:
        if ready is not None:
            ready(server)
        await asyncio.get_running_loop().create_future()
