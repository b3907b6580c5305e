"""The server's end of the control socket.

The socket is there when the server is ready; aiohttp is imported when somebody comes for the first time, in a thread:
a server that is never asked needs neither its memory nor the third of a second.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nbdclone.control import address

if TYPE_CHECKING:
    from nbdclone.control.api import Served

logger = logging.getLogger("nbdclone")


class ControlServer:
    """Listens from the start; ``start`` lets those in who came. Where there can be no such socket, the log says so."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._path = served.pool.path
        self._loop = asyncio.get_running_loop()
        self._runner: Any = None
        self._server: asyncio.AbstractServer | None = None
        self._starting: asyncio.Task[None] | None = None
        self._sock: socket.socket | None = None
        try:
            self._sock = address.listen(self._path)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            logger.warning("%s: no control socket (%s): commands do without the server", self._path, reason)

    def start(self) -> None:
        if self._sock is not None:
            self._loop.add_reader(self._sock.fileno(), self._begin)

    def _begin(self) -> None:
        assert self._sock is not None
        self._loop.remove_reader(self._sock.fileno())
        self._starting = self._loop.create_task(self._serve(self._sock))

    async def _serve(self, sock: socket.socket) -> None:
        try:
            api = await self._loop.run_in_executor(None, import_module, "nbdclone.control.api")
            self._runner = api.make_runner(self._served)
            await self._runner.setup()
            self._server = await self._loop.create_unix_server(self._runner.server, sock=sock, backlog=address.BACKLOG)
        except Exception:
            logger.exception("the control socket cannot be served")
            self.stop()

    def stop(self) -> None:
        """Let nobody in any more."""
        if self._sock is None:
            return
        address.remove(self._path)
        if self._server is not None:
            self._server.close()
        else:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        self._sock = None

    async def close(self) -> None:
        """Let those who were asked for answers take them, for a moment, and end."""
        if self._starting is not None:
            await self._starting
        self.stop()
        if self._runner is not None:
            await self._runner.cleanup()
