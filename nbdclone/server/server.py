"""The server of one process: listens, accepts, and sees everybody out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType

from nbdclone.errors import UsageError
from nbdclone.protocol.handshake_events import TLSMode
from nbdclone.server.accept import Acceptor
from nbdclone.server.admission import MAX_CONNECTIONS, Admission
from nbdclone.server.budget import MIN_MEMORY, default_memory
from nbdclone.server.host import Host, Options
from nbdclone.server.peer import Peer
from nbdclone.server.settings import read_settings
from nbdclone.server.tls import ServerTLS
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")


class Server(Host):
    """Serves every clone and base of a pool. An async context manager: entered, it listens; left, it has flushed.

    ``listen``: (host, port) pairs, port 0 for a free one. ``sockets``: paths of Unix sockets. ``uris`` says, once it
    listens, how to reach each of them, in this order. ``tls``: how it does TLS; unless that is required, an address
    that other machines reach is refused, or taken with ``insecure``. ``max_connections`` in all,
    ``max_connections_per_address`` (default: half of that) from one IP address, or one user on Unix sockets: those
    above it are closed at once. ``max_memory``: bytes that are lent to all clients together, 256 MiB at least (default:
    1 GiB, or a quarter of the machine's). ``options``: how it serves.

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
        options: Options = Options(),  # noqa: B008 - it is frozen
    ) -> None:
        memory = default_memory() if max_memory is None else max_memory
        if memory < MIN_MEMORY:
            raise UsageError(f"{memory} bytes of memory for all clients are too few: the least is {MIN_MEMORY}")
        super().__init__(pool, tls=tls, max_memory=memory, options=options)
        self.uris: list[str] = []
        self._insecure = insecure
        self._listen = listen
        self._sockets = sockets
        self._admission = Admission(max_connections, max_connections_per_address)

    async def __aenter__(self) -> Server:
        await super().__aenter__()
        self._acceptor.start()
        return self

    def _prepare(self, held: contextlib.ExitStack) -> None:
        held.enter_context(self.pool.served())
        self.settings = read_settings(self.pool.settings_path, self.options.limit)
        super()._prepare(held)
        self._acceptor = Acceptor(self._admission, self.scratch.quiet, self._begin)
        held.callback(self._acceptor.close)
        required = self.tls_mode is TLSMode.REQUIRED
        local_only = not (required or self._insecure)
        self.uris = self._acceptor.listen(self._listen, self._sockets, tls=required, local_only=local_only)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening, answer what was asked, flush and close every clone."""
        self._acceptor.close()
        await super().__aexit__(kind, error, trace)

    def reload(self) -> None:
        """Read the pool's settings and the files of TLS again, for clients to come. Bad ones are not taken."""
        try:
            settings = read_settings(self.pool.settings_path, self.options.limit)
        except UsageError as error:
            logger.error("the settings stay as they were: %s", error)
        else:
            self.take_settings(settings)
            logger.info("the settings were read again")
        self.reload_tls()

    def _begin(self, sock: socket.socket, peer: Peer) -> None:
        self.begin(sock, peer, partial(self._acceptor.leave, peer))


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
