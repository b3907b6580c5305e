"""A worker: a process that serves the exports that the supervisor gives it. The supervisor starts it, as

    python -m nbdclone.server.worker --pool POOL --channel FD

and tells it everything else through the socket FD. When that closes, the supervisor is gone, and the worker ends as it
does when it is told to: it answers what was asked, flushes and closes. Signals that end a server are blocked here: they
reach every process (Ctrl-C, the service manager), and are meant for the supervisor.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nbdclone.control.failures import from_record
from nbdclone.errors import NBDCloneError, NotFound
from nbdclone.server.channel import Channel, Message
from nbdclone.server.connection import Elsewhere
from nbdclone.server.export import Export
from nbdclone.server.host import SWITCH_INTERVAL_S, Host, Options
from nbdclone.server.peer import Peer
from nbdclone.server.settings import parse_settings
from nbdclone.server.tls import ServerTLS
from nbdclone.server.work import Works
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")


class Seat:
    """One connection in this worker: what it gets its export from, once the supervisor says that this is the place.

    ``claimed``: it was moved here, to the export that it asks for. What the supervisor is told is in ``owners``.
    """

    def __init__(self, number: int, channel: Channel, host: Host, *, claimed: bool) -> None:
        self._number = number
        self._channel = channel
        self._host = host
        self._exports = host.exports
        self._claimed = claimed
        self._moved = self._relayed = False
        self._made: dict[str, str] = {}  # the clones that were made for this client, by what it asked for

    async def acquire(self, name: str, *, refused: bool = False) -> Export:
        """As Exports does it. Raises Elsewhere if another worker has the export, or is to have it.

        A name that no export has is looked for here, and nobody else hears of it: neither does the time that it takes
        say more than it does in a server of one process, nor do strangers keep the supervisor busy.
        """
        if not self._claimed:
            asked, name = name, await self._require(name, refused)
            # One that was made under a name of its own is nobody else's: who asks in another worker gets another.
            answer = await self._channel.ask(self._message("claim", name=name, here=name != asked))
            if not answer["here"]:
                raise Elsewhere(partial(self._move, name))
            self._claimed = True
        try:
            return await self._exports.acquire(name)
        except BaseException:
            self._release()
            raise

    async def _require(self, name: str, refused: bool) -> str:
        """Raises NotFound unless there is an export of that name, or a template by which one is made now: its name."""
        name = self._made.get(name, name)
        try:
            await self._exports.require(name)
        except NotFound:
            if refused or self._host.settings.templates.find(name) is None:
                raise
            answer = await self._channel.ask(self._message("make", name=name))
            if "error" in answer:
                raise from_record(answer["error"]) from None
            name = self._made[name] = answer["name"]
        return name

    async def release(self, export: Export) -> None:
        """As Exports does it; the supervisor hears of it when the clone is closed, if this was its last connection."""
        try:
            await self._exports.release(export)
        finally:
            self._release()

    async def names(self, shown: Callable[[str], bool]) -> list[str]:
        return await self._exports.names(shown)

    async def snapshots_beneath(self, name: str) -> dict[str, bytes]:
        return await self._exports.snapshots_beneath(name)

    def gone(self) -> None:
        """The connection has ended here."""
        if self._relayed or not self._moved:
            self._channel.send(self._message("gone", relay=self._relayed))

    def _release(self) -> None:
        self._claimed = False
        self._channel.send(self._message("release"))

    def _move(self, name: str, sock: socket.socket, state: dict[str, Any], relayed: bool) -> None:
        self._moved, self._relayed = True, relayed
        self._channel.send(self._message("move", name=name, relayed=relayed, state=state), sock.fileno())

    def _message(self, verb: str, **more: Any) -> Message:
        return {"do": verb, "connection": self._number, **more}


class Worker:
    """The worker's end of the channel ``sock``."""

    def __init__(self, pool: Path, sock: socket.socket) -> None:
        self._pool = pool
        self._stop = asyncio.Event()
        self._started: asyncio.Future[Message | None] = asyncio.get_running_loop().create_future()
        self._early: list[tuple[Message, int | None]] = []  # what came before it could serve
        self._channel = Channel(sock, self._take_early, self._end)

    async def run(self) -> None:
        """Serve until told to stop, or the supervisor is gone."""
        if (start := await self._started) is not None:
            try:
                async with self._make_host(start) as self._host:
                    self._works = Works(self._host, self._channel)
                    self._channel.answer(start)
                    self._channel.on_message = self._take
                    for message, fd in self._early:
                        self._take(message, fd)
                    await self._stop.wait()
                    await self._works.close()
            except NBDCloneError as error:
                self._channel.answer(start, error=str(error))
                await self._stop.wait()
        self._channel.close()

    def _end(self) -> None:
        self._stop.set()
        if not self._started.done():
            self._started.set_result(None)

    def _make_host(self, start: Message) -> Host:
        logging.basicConfig(format="nbdclone: %(message)s", level=start["log_level"])
        tls = ServerTLS.from_record(start["tls"]) if start["tls"] else None
        options = Options.from_record(start["options"])
        host = Host(Pool.open(self._pool), tls=tls, max_memory=start["max_memory"], options=options)
        host.settings = parse_settings(start["settings"], host.pool.settings_path, options.limit)
        return host

    def _take_early(self, message: Message, fd: int | None) -> None:
        if message["do"] == "start":  # its descriptor is the lock of the pool: held until this process ends
            self._started.set_result(message)
        else:
            self._early.append((message, fd))

    def _take(self, message: Message, fd: int | None) -> None:
        verb = message["do"]
        if verb == "serve":
            self._serve(message, fd)
        elif verb == "drain":
            self._end()
        elif verb == "reload":
            self._reload(message)
        elif verb == "work":
            self._works.begin(message)
        elif verb == "interrupt":
            self._works.interrupt(message["connection"])
        elif verb == "look":
            self._channel.answer(message, exports=self._host.records())

    def _serve(self, message: Message, fd: int | None) -> None:
        host, moved = self._host, message["state"]
        seat = Seat(message["connection"], self._channel, host, claimed=moved is not None)
        if fd is None or self._stop.is_set():
            if fd is None:
                host.scratch.quiet.say("descriptors", "a connection was lost: too many open files")
            else:
                os.close(fd)
            seat.gone()
            return
        host.begin(socket.socket(fileno=fd), Peer.from_record(message["peer"]), seat.gone, seat, moved)

    def _reload(self, message: Message) -> None:
        try:
            host = self._host
            host.take_settings(parse_settings(message["settings"], host.pool.settings_path, host.options.limit))
            if message["tls"] and self._host.tls is not None:
                self._host.tls.context = ServerTLS.from_record(message["tls"]).context
        except NBDCloneError as error:
            self._channel.answer(message, error=str(error))
        else:
            self._channel.answer(message)


async def _run(pool: Path, fd: int) -> None:
    await Worker(pool, socket.socket(fileno=fd)).run()


def main() -> None:
    """The program."""
    import uvloop

    parser = argparse.ArgumentParser()
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--channel", type=int, required=True)
    given = parser.parse_args()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(given.pool, given.channel))


if __name__ == "__main__":
    main()
