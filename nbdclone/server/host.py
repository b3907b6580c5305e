"""What serves connections in one process: the exports, the memory that is lent, the threads, the connections."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from nbdclone.errors import UsageError
from nbdclone.protocol.handshake_events import TLSMode
from nbdclone.server.budget import Budget
from nbdclone.server.busy import DEFAULT_LIMIT_US, Busy
from nbdclone.server.connection import Connection, Opener
from nbdclone.server.export import Exports
from nbdclone.server.limits import UNLIMITED, Limit
from nbdclone.server.offload import Offload
from nbdclone.server.peer import Peer
from nbdclone.server.quiet import QuietLog
from nbdclone.server.replay import Boots
from nbdclone.server.scratch import Scratch
from nbdclone.server.settings import Settings
from nbdclone.server.tls import ServerTLS
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

# How long clients have, at a shutdown, to take the replies to what they asked.
DRAIN_S = 5.0
# Reads of more than a MiB that are made at once. More would only wait for each other: for memory that the kernel has to
# clear, or for a disk that is busy with one of them.
BULK_THREADS = 4
# How long a thread that reads from a disk waits for the interpreter while the event loop has it. The usual 5 ms,
# several times for each read, are more than most disks take. For programs that do nothing but serve.
SWITCH_INTERVAL_S = 0.0005
# A TCP client that vanished without a word is noticed after about this many seconds.
KEEPALIVE_S = 60

# Half of what may be on its way to a client (the kernel doubles it, and cuts it to net.core.wmem_max): a Unix socket's
# usual 208 KiB, not doubled, do not hold a read of 256 KiB, which then takes another wake-up for its second half.
SEND_BUFFER = 256 << 10


@dataclass(frozen=True, slots=True)
class Options:
    """How a process serves.

    ``busy_poll_us``: for how many microseconds at most it stays awake for the next request of a client that sends one
    after the other; 0 for never. ``limit``: of each export that the pool's settings give none. ``replay``: record what
    boots read, and read it ahead (docs/prefetch.md).
    """

    busy_poll_us: int = DEFAULT_LIMIT_US
    limit: Limit = UNLIMITED
    replay: bool = True

    def record(self) -> dict[str, Any]:
        """For another process: what :meth:`from_record` takes."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Options:
        return cls(**record | {"limit": Limit(**record["limit"])})


class Host:
    """An async context manager: entered, connections may ``begin``; left, all are seen out, and every clone is closed.

    ``settings`` are those of the pool; ``max_memory`` is what all connections together are lent, in bytes.
    """

    def __init__(self, pool: Pool, *, tls: ServerTLS | None, max_memory: int, options: Options) -> None:
        self.pool = pool
        self.options = options
        self.settings = Settings()
        self.tls = tls
        self.tls_mode = tls_mode(tls)
        self._max_memory = max_memory
        self._connections: set[Connection] = set()
        self._held = contextlib.ExitStack()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as held:
            self._prepare(held)
            self._held = held.pop_all()
        self._tasks = await asyncio.TaskGroup().__aenter__()
        return self

    def _prepare(self, held: contextlib.ExitStack) -> None:
        """Get all that serving takes; what is to be undone in the end is put into ``held``."""
        offload, keeper, bulk = Offload(self._loop), Offload(self._loop), Offload(self._loop, BULK_THREADS)
        for threads in (offload, keeper, bulk):
            held.callback(threads.close)
        self.scratch = Scratch(
            Budget(self._max_memory, self._loop),
            QuietLog(logger, self._loop.time),
            offload,
            bulk,
            Busy(self._loop, self.options.busy_poll_us),
        )
        boots = Boots(keeper, self._loop, enabled=self.options.replay)
        held.callback(boots.stop)
        self._exports = Exports(self.pool, offload, keeper, boots, self._loop, self.settings.limits)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Answer what was asked, flush and close every clone."""
        try:
            for connection in list(self._connections):
                connection.drain()
            abandoning = self._loop.call_later(DRAIN_S, self._abandon)
            try:
                await self._tasks.__aexit__(None, None, None)
            finally:
                abandoning.cancel()
        finally:
            self._held.close()

    # For verbs, and whoever wants to know

    @property
    def exports(self) -> Exports:
        """What is open here."""
        return self._exports

    @property
    def has_clients(self) -> bool:
        return bool(self._connections)

    async def clients(self, name: str) -> list[dict[str, Any]]:
        """Who has this export here."""
        return [connection.record() for connection in self._with(name)]

    async def disconnect(self, name: str) -> None:
        """End the connections to this export, and wait until they are gone."""
        ending = self._with(name)
        for connection in ending:
            connection.abandon()
        tasks = {connection.task for connection in ending if connection.task is not None}
        if tasks:
            await asyncio.wait(tasks)

    def kept_closed(self, names: Sequence[str], *, disconnect: bool) -> AbstractAsyncContextManager[None]:
        """As Exports does it; with ``disconnect`` the clients that are there are made to go."""

        async def leave() -> None:
            for name in names:
                if disconnect:
                    await self.disconnect(name)

        return self._exports.kept_closed(names, leave)

    def _with(self, name: str) -> list[Connection]:
        return [connection for connection in self._in_order() if connection.export_name == name]

    def _in_order(self) -> list[Connection]:
        """Whoever came first, first."""
        return sorted(self._connections, key=lambda connection: connection.since)

    def records(self) -> list[dict[str, Any]]:
        """Every export that is open here, and who has it, as JSON can hold it."""
        clients: dict[str, list[dict[str, Any]]] = {name: [] for name in self._exports.open_names}
        for connection in self._in_order():
            if (name := connection.export_name) is not None:
                clients.setdefault(name, []).append(connection.record())
        return [{"name": name, "clients": found} for name, found in clients.items()]

    # Connections

    def take_settings(self, settings: Settings) -> None:
        """Others from now on: the rules for clients to come, the limits for all."""
        self.settings = settings
        self._exports.change_limits(settings.limits)

    def reload_tls(self) -> None:
        """Read the files of TLS again, for clients to come. Bad ones are not taken; the log says how it went."""
        if self.tls is None:
            return
        try:
            self.tls.reload()
        except UsageError as error:
            logger.error("TLS goes on as it was: %s", error)
        else:
            logger.info("the files of TLS were read again")

    def begin(
        self,
        sock: socket.socket,
        peer: Peer,
        gone: Callable[[], None],
        exports: Opener | None = None,
        moved: dict[str, Any] | None = None,
    ) -> None:
        """Serve a connection, from its greeting on, or from where it was ``moved``; ``gone`` is called at its end."""
        _set_options(sock)
        connection = Connection(sock, peer, exports or self._exports, self, moved)
        self._connections.add(connection)
        self._tasks.create_task(self._serve(connection, gone))

    async def _serve(self, connection: Connection, gone: Callable[[], None]) -> None:
        try:
            await connection.serve()
        except Exception:
            logger.exception("a defect of the server")
        finally:
            self._connections.discard(connection)
            gone()

    def _abandon(self) -> None:
        for connection in self._connections:
            connection.abandon()


def tls_mode(tls: ServerTLS | None) -> TLSMode:
    """What such a server does about TLS."""
    return TLSMode.OFF if tls is None else TLSMode.REQUIRED if tls.required else TLSMode.ON


def _set_options(sock: socket.socket) -> None:
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
