"""A server that moves every connection, as from one worker to another, within this process."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from nbdclone.server.connection import Elsewhere
from nbdclone.server.export import Export, Exports
from nbdclone.server.peer import Peer
from nbdclone.server.server import Server


class Moving(Server):
    """Each export that a connection names is elsewhere, until the connection is there."""

    moves = 0

    def _begin(self, sock: socket.socket, peer: Peer) -> None:
        away = Away(self, self._exports, partial(self._acceptor.leave, peer))
        self.begin(sock, peer, away.gone, away)


class Away:
    """What a connection gets its export from, in the worker that does not have it."""

    def __init__(self, server: Moving, exports: Exports, leave: Callable[[], None]) -> None:
        self._server = server
        self._exports = exports
        self._leave = leave
        self._moved = False

    def gone(self) -> None:
        if not self._moved:
            self._leave()

    async def acquire(self, name: str) -> NoReturn:
        await self._exports.require(name)
        raise Elsewhere(self._take)

    async def release(self, export: Export) -> None:
        raise AssertionError("there was none")

    async def names(self, shown: Callable[[str], bool]) -> list[str]:
        return await self._exports.names(shown)

    async def snapshots_beneath(self, name: str) -> dict[str, bytes]:
        return await self._exports.snapshots_beneath(name)

    def _take(self, sock: socket.socket, state: dict[str, Any], relayed: bool) -> None:
        server = self._server
        server.moves += 1
        state = json.loads(json.dumps(state))
        copy = socket.socket(fileno=os.dup(sock.fileno()))
        self._moved = not relayed
        server.begin(copy, Peer.from_record(state["peer"]), (lambda: None) if relayed else self._leave, None, state)
