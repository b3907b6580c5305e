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
from nbdclone.server.access import Access, read_access
from nbdclone.server.admission import MAX_CONNECTIONS, Admission
from nbdclone.server.budget import MIN_MEMORY, Budget, default_memory
from nbdclone.server.connection import Connection
from nbdclone.server.export import Exports
from nbdclone.server.listen import Listener, listen_tcp, listen_unix
from nbdclone.server.offload import Offload
from nbdclone.server.peer import Peer
from nbdclone.server.quiet import QuietLog
from nbdclone.server.replay import Boots
from nbdclone.server.session import Scratch
from nbdclone.server.tls import ServerTLS
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

# How many connections are accepted before those that are there get their turn.
ACCEPT_BURST = 64
# After accept fails for want of descriptors or memory: trying again at once would only burn the processor.
ACCEPT_PAUSE_S = 0.5
# How long clients have, at a shutdown, to take the replies to what they asked.
DRAIN_S = 5.0
# Reads of more than a MiB that are made at once. More would only wait for each other: for memory that the kernel has to
# clear, or for a disk that is busy with one of them.
BULK_THREADS = 4
# A TCP client that vanished without a word is noticed after about this many seconds.
KEEPALIVE_S = 60

# Half of what may be on its way to a client (the kernel doubles it, and cuts it to net.core.wmem_max): a Unix socket's
# usual 208 KiB, not doubled, do not hold a read of 256 KiB, which then takes another wake-up for its second half.
SEND_BUFFER = 256 << 10


class Server:
    """Serves every clone and base of a pool. An async context manager: entered, it listens; left, it has flushed.

    ``listen``: (host, port) pairs, port 0 for a free one. ``sockets``: paths of Unix sockets. ``uris`` says, once it
    listens, how to reach each of them, in this order. ``tls``: how it does TLS; unless that is required, an address
    that other machines reach is refused, or taken with ``insecure``. ``max_connections`` in all,
    ``max_connections_per_address`` (default: half of that) from one IP address, or one user on Unix sockets: those
    above it are closed at once. ``max_memory``: bytes that are lent to all clients together, 256 MiB at least (default:
    1 GiB, or a quarter of the machine's). ``replay``: record what boots read, and read it ahead (docs/prefetch.md).

    Entering raises InUse (another server has the pool; an address is taken) or UsageError (the pool's settings too).
    """

    def __init__(
        self,
        pool: Pool,
        *,
        listen: Sequence[tuple[str, int]] = (),
        sockets: Sequence[str | Path] = (),
        tls: ServerTLS | None = None,
        insecure: bool = False,
        max_connections: int = MAX_CONNECTIONS,
        max_connections_per_address: int | None = None,
        max_memory: int | None = None,
        replay: bool = True,
    ) -> None:
        self.pool = pool
        self._replay = replay
        self._max_memory = default_memory() if max_memory is None else max_memory
        if self._max_memory < MIN_MEMORY:
            raise UsageError(f"{max_memory} bytes of memory for all clients are too few: the least is {MIN_MEMORY}")
        self.access = Access()
        self.uris: list[str] = []
        self.tls = tls
        self.tls_mode = TLSMode.OFF if tls is None else TLSMode.REQUIRED if tls.required else TLSMode.ON
        self._insecure = insecure
        self._listen = listen
        self._sockets = sockets
        self._listeners: list[Listener] = []
        self._connections: set[Connection] = set()
        self._admission = Admission(max_connections, max_connections_per_address)
        self._held = contextlib.ExitStack()
        self._stopping = False

    async def __aenter__(self) -> Server:
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as held:
            held.enter_context(self.pool.served())
            self.access = read_access(self.pool.settings_path)
            self._listeners = []
            required = self.tls_mode is TLSMode.REQUIRED
            held.callback(self._close_listeners)
            for host, port in self._listen:
                self._listeners += listen_tcp(host, port, local_only=not (required or self._insecure))
            for path in self._sockets:
                self._listeners.append(listen_unix(Path(path)))
            offload, keeper, bulk = Offload(self._loop), Offload(self._loop), Offload(self._loop, BULK_THREADS)
            for threads in (offload, keeper, bulk):
                held.callback(threads.close)
            self.scratch = Scratch(
                Budget(self._max_memory, self._loop), QuietLog(logger, self._loop.time), offload, bulk
            )
            boots = Boots(keeper, self._loop, enabled=self._replay)
            held.callback(boots.stop)
            self._exports = Exports(self.pool, offload, keeper, boots, self._loop)
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
        """Read the pool's settings and the files of TLS again, for clients to come. Bad ones are not taken."""
        try:
            self.access = read_access(self.pool.settings_path)
        except UsageError as error:
            logger.error("the settings stay as they were: %s", error)
        else:
            logger.info("the settings were read again")
        if self.tls is None:
            return
        try:
            self.tls.reload()
        except UsageError as error:
            logger.error("TLS goes on as it was: %s", error)
        else:
            logger.info("the files of TLS were read again")

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
            peer = Peer.of(sock, address)
            reason = self._admission.enter(peer)
            if reason is None:
                self._begin(sock, peer)
            else:
                sock.close()
                self.scratch.quiet.say("admission", "%s: a connection was refused: %s", listener.uri, reason)

    def _accept_again(self, listener: Listener) -> None:
        if not self._stopping:
            self._loop.add_reader(listener.sock.fileno(), self._accept, listener)

    def _begin(self, sock: socket.socket, peer: Peer) -> None:
        sock.setblocking(False)
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
        connection = Connection(sock, peer, self._exports, self)
        self._connections.add(connection)
        self._tasks.create_task(self._serve(connection, peer))

    async def _serve(self, connection: Connection, peer: Peer) -> None:
        try:
            await connection.serve()
        except Exception:
            logger.exception("a defect of the server")
        finally:
            self._connections.discard(connection)
            self._admission.leave(peer)


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
