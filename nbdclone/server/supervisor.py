"""The server of several processes: accepts, and lets workers do the rest. docs/decisions/0004-workers.md says why so.

It has the pool's lock and the sockets that listen, says who may come in, and which worker has which export. It never
reads a byte that a client sent. A connection goes to a worker for its handshake; when that knows the export's name it
``claim``s it here, and where another worker has the export, the connection is ``move``d there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Coroutine, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from nbdclone.control.serve import ControlServer
from nbdclone.control.verbs import Arguments
from nbdclone.errors import Interrupted, UsageError
from nbdclone.protocol.handshake_events import TLSMode
from nbdclone.server.accept import Acceptor
from nbdclone.server.admission import MAX_CONNECTIONS, Admission
from nbdclone.server.budget import MIN_MEMORY, default_memory
from nbdclone.server.channel import Message
from nbdclone.server.ephemeral import Ephemerals
from nbdclone.server.host import Options, tls_mode
from nbdclone.server.jobs import Job, Jobs
from nbdclone.server.merger import Merger
from nbdclone.server.owners import Owners
from nbdclone.server.peer import Peer
from nbdclone.server.process import Process, describe_status
from nbdclone.server.quiet import QuietLog
from nbdclone.server.settings import parse_settings, read_text
from nbdclone.server.tls import ServerTLS
from nbdclone.store.names import split_name
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

# The first worker that dies is replaced at once, so that its clients find another when they come again, and not all the
# one that is left. When one dies younger than this after that, there is a pause, and the next time twice that.
YOUNG_S = 2.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 30.0
# How long a worker has nothing to do until it is ended; one such is kept for the next export.
IDLE_S = 60.0


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def divide_memory(max_memory: int | None, workers: int | None) -> tuple[int, int]:
    """How many workers there may be, and what each lends to its clients: an even share, MIN_MEMORY at least.

    What nobody gave is chosen: a worker for each core, if there is memory for so many. Raises UsageError.
    """
    count = workers or cores()
    total = default_memory(count) if max_memory is None else max_memory
    if total < MIN_MEMORY:
        raise UsageError(f"{total} bytes of memory for all clients are too few: the least is {MIN_MEMORY}")
    if workers is None:
        count = min(count, total // MIN_MEMORY)
    if total // count < MIN_MEMORY:
        raise UsageError(f"{total} bytes of memory are too few for {count} workers: each needs {MIN_MEMORY}")
    return count, total // count


class Supervisor:
    """Serves a pool as ``Server`` does, with up to ``workers`` processes, each of which lends ``worker_memory`` bytes.

    Further workers are started as exports come into use: there is always one without, until there are so many.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        workers: int,
        worker_memory: int,
        listen: Sequence[tuple[str, int]] = (),
        sockets: Sequence[str | Path] = (),
        tls: ServerTLS | None = None,
        insecure: bool = False,
        max_connections: int = MAX_CONNECTIONS,
        max_connections_per_address: int | None = None,
        options: Options = Options(),  # noqa: B008 - it is frozen
    ) -> None:
        self.pool = pool
        self._options = options
        self.uris: list[str] = []
        self._workers = workers
        self._worker_memory = worker_memory
        self._listen = listen
        self._sockets = sockets
        self._tls = tls
        self._insecure = insecure
        self._admission = Admission(max_connections, max_connections_per_address)
        self._settings = ""
        self._owners = Owners()
        self._processes: dict[int, Process] = {}
        self._peers: dict[int, Peer] = {}  # of each connection that there is
        self._numbers = count(1)
        # What waits until a worker that is starting can serve, or one that is dying, and may have the export open, is
        # dead.
        self._parked: list[tuple[Process, Message, int | None]] = []
        self._failures = 0  # workers that died young, or could not be started, one after the other
        self._not_before = 0.0  # when the next may be started
        self._pausing: asyncio.TimerHandle | None = None
        self._moved = asyncio.Event()  # set, and replaced, whenever what was parked is tried again
        self._jobs = Jobs(pool, self, lambda: next(self._numbers), self._begin_task)
        self._merging: asyncio.Task[None] | None = None
        self._stopping = False

    # The whole

    async def __aenter__(self) -> Supervisor:
        self._loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as held:
            self._lock = held.enter_context(self.pool.served())
            self._settings = read_text(self.pool.settings_path)
            self._templates = parse_settings(self._settings, self.pool.settings_path).templates
            self._ephemerals = Ephemerals(self.pool, self._owners.has, self._begin_task)
            self._acceptor = Acceptor(self._admission, QuietLog(logger, self._loop.time), self._begin)
            held.callback(self._acceptor.close)
            required = tls_mode(self._tls) is TLSMode.REQUIRED
            local_only = not (required or self._insecure)
            self.uris = self._acceptor.listen(self._listen, self._sockets, tls=required, local_only=local_only)
            self._control = ControlServer(self)
            held.callback(self._control.stop)
            self._tasks = await asyncio.TaskGroup().__aenter__()
            try:
                await self._start_first()
            except BaseException:
                await self._stop()
                raise
            self._control.start()
            await self._ephemerals.start()
            self._merging = self._tasks.create_task(Merger(self.pool, self._jobs).run())
            self._held = held.pop_all()
        self._retiring = self._loop.call_later(IDLE_S, self._retire, set())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening, let the workers see out their clients and close every clone."""
        try:
            self._retiring.cancel()
            self._acceptor.close()
            self._control.stop()
            await self._stop()
        finally:
            await self._control.close()
            self._held.close()

    async def _stop(self) -> None:
        self._stopping = True
        if self._pausing is not None:
            self._pausing.cancel()
        self._jobs.stop()
        self._ephemerals.stop()
        if self._merging is not None:
            self._merging.cancel()
        self._moved.set()
        for process in self._processes.values():
            self._end(process)
        await self._tasks.__aexit__(None, None, None)  # one for each worker, until it is dead
        for _process, _message, fd in self._parked:
            _close(fd)

    def reload(self) -> None:
        """Read the pool's settings and the files of TLS again, for clients to come. Bad ones are not taken."""
        settings = tls = False
        try:
            text = read_text(self.pool.settings_path)
            templates = parse_settings(text, self.pool.settings_path).templates
        except UsageError as error:
            logger.error("the settings stay as they were: %s", error)
        else:
            self._settings, self._templates, settings = text, templates, True
        if self._tls is not None:
            try:
                self._tls.reload()
            except UsageError as error:
                logger.error("TLS goes on as it was: %s", error)
            else:
                tls = True
        if not self._stopping:
            self._tasks.create_task(self._reload_workers(settings, tls))

    async def _reload_workers(self, settings: bool, tls: bool) -> None:
        """Let every worker take up what is good, and say so when all have."""
        message = {"do": "reload", "settings": self._settings, "tls": self._tls and self._tls.record()}
        asked = [process.channel.ask(message) for process in self._processes.values() if not process.ending]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        errors = [answer["error"] for answer in answers if isinstance(answer, dict) and "error" in answer]
        for error in errors:
            logger.error("a worker goes on as it was: %s", error)
        if settings and not errors:
            logger.info("the settings were read again")
        if tls and not errors:
            logger.info("the files of TLS were read again")

    # Workers

    async def _start_first(self) -> None:
        """Start a worker before anybody comes, and see whether it can serve. Raises UsageError."""
        self._start_worker()
        [process] = self._processes.values()
        await process.settled.wait()
        if process.refusal is not None:
            raise UsageError(process.refusal)

    def _provide(self) -> None:
        """Have a worker for the next export, if there may be one more."""
        if self._stopping or self._owners.without_exports() or len(self._processes) >= self._workers:
            return
        if self._loop.time() >= self._not_before:
            try:
                self._start_worker()
            except OSError as error:
                logger.error("no further worker can be started: %s", error)
                self._pause()
        if self._loop.time() < self._not_before and self._pausing is None:
            self._pausing = self._loop.call_at(self._not_before, self._provide_again)

    def _provide_again(self) -> None:
        self._pausing = None
        self._provide()

    def _pause(self) -> None:
        """Start no worker for a while, that grows while nothing comes of it."""
        pause = min(FIRST_PAUSE_S * 2 ** (self._failures - 1), LONGEST_PAUSE_S) if self._failures else 0.0
        self._failures += 1
        self._not_before = self._loop.time() + pause

    def _start_worker(self) -> None:
        process = Process(next(self._numbers), self.pool.path, self._take, self._lose)
        self._processes[process.number] = process
        self._owners.add(process.number)
        self._tasks.create_task(self._watch(process))

    async def _watch(self, process: Process) -> None:
        """See a worker through from its start to its death."""
        start = {
            "do": "start",
            "settings": self._settings,
            "tls": self._tls and self._tls.record(),
            "max_memory": self._worker_memory,
            "options": self._options.record(),
            "log_level": logger.getEffectiveLevel(),
        }
        try:
            process.refusal = (await process.channel.ask(start, self._lock)).get("error")
        except ConnectionError:
            process.refusal = "a worker ended before it could serve"
        began = self._loop.time()
        process.settled.set()
        if process.refusal is None:
            self._owners.ready(process.number)
            if not self._stopping:
                self._acceptor.start()
            self._unpark()
        elif not process.channel.lost:
            logger.error("a worker cannot serve: %s", process.refusal)
            process.channel.close()
            self._lose(process)
        await process.lost.wait()
        status = await self._loop.run_in_executor(None, process.wait)
        self._bury(process, status, self._loop.time() - began)

    def _end(self, process: Process) -> None:
        """Let a worker see out its clients, and end."""
        process.expected = process.ending = True
        process.channel.send({"do": "drain"})

    def _lose(self, process: Process) -> None:
        """Its channel is closed: it is dead, or as good as that."""
        if not process.expected:
            process.kill()
        process.ending = True
        self._owners.close(process.number)
        if not self._owners.available:
            self._acceptor.stop()  # who comes now, waits for the next one
        process.lost.set()

    def _bury(self, process: Process, status: int, lived_s: float) -> None:
        """It is dead, and nothing is locked by it any more."""
        del self._processes[process.number]
        names, gone = self._owners.remove(process.number)
        for number in gone:
            if number in self._peers:  # else it was a verb
                self._acceptor.leave(self._peers.pop(number))
        if status or not (process.expected or process.refusal):
            shown = ", ".join(f"'{name}'" for name in names) or "no export"
            logger.error("worker %d %s; it had %s", process.pid, describe_status(status), shown)
        if not process.expected:
            if lived_s >= YOUNG_S:
                self._failures = 0
            self._pause()
        self._provide()
        self._unpark()

    def _unpark(self) -> None:
        parked, self._parked = self._parked, []
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()
        for asking, message, fd in parked:
            self._take(asking, message, fd)

    def _retire(self, before: set[int]) -> None:
        """End those who had nothing to do the last time and now, but one."""
        idle = set(self._owners.idle())
        for number in sorted(idle & before)[1:]:
            self._owners.close(number)
            self._end(self._processes[number])
        self._retiring = self._loop.call_later(IDLE_S, self._retire, idle)

    # Connections

    def _begin(self, sock: socket.socket, peer: Peer) -> None:
        number = next(self._numbers)
        worker = self._owners.arrive(number)
        self._peers[number] = peer
        with sock:
            self._serve(worker, number, peer.record(), None, sock.fileno())

    def _serve(self, worker: int, number: int, peer: Message, state: Message | None, fd: int) -> None:
        message = {"do": "serve", "connection": number, "peer": peer, "state": state}
        self._processes[worker].channel.send(message, fd)

    def _take(self, process: Process, message: Message, fd: int | None) -> None:
        """Do what a worker says."""
        verb, number = message["do"], message["connection"]
        if number not in self._owners:  # it went with a worker that died
            _close(fd)
        elif verb == "gone":
            self._leave(number, relay=message["relay"])
        elif verb == "release":
            self._owners.release(number)
            self._ephemerals.look()
        elif verb == "make":
            self._begin_task(self._make(process, message))
        elif verb == "progress":
            self._jobs.note(number, *message["progress"])
        else:
            # A snapshot is where its clone is: what is done to the names of both is done there.
            clone = split_name(message["name"])[0]
            owner = self._owners.claim(number, clone, here=message.get("here", False))
            self._ephemerals.claimed(clone)
            if self._processes[owner].ending or not self._processes[owner].settled.is_set():
                self._parked.append((process, message, fd))
            elif verb == "claim":
                process.channel.answer(message, here=owner == process.number)
            else:
                self._move(number, owner, message, fd)
            self._provide()

    def _move(self, number: int, worker: int, message: Message, fd: int | None) -> None:
        self._owners.move(number, worker, relayed=message["relayed"])
        if fd is None:
            logger.error("a connection was lost: too many open files")
            self._leave(number)
        else:
            state = message["state"]
            self._serve(worker, number, state["peer"], state, fd)
            _close(fd)

    def _leave(self, number: int, *, relay: bool = False) -> None:
        if self._owners.leave(number, relay=relay):
            self._acceptor.leave(self._peers.pop(number))
        self._ephemerals.look()

    async def _make(self, process: Process, message: Message) -> None:
        """Make the clone that a client has asked for by a template."""
        process.channel.answer(message, **await self._ephemerals.make(message["name"], self._templates))

    # Verbs

    def begin(self, verb: str, arguments: Arguments) -> contextlib.AbstractAsyncContextManager[Job]:
        """Begin a verb: ``Jobs.begin``."""
        return self._jobs.begin(verb, arguments)

    def jobs(self) -> list[dict[str, Any]]:
        """The verbs at work."""
        return self._jobs.records()

    def workers(self) -> list[dict[str, Any]]:
        """The processes that serve, and what each has."""
        return [
            {"pid": process.pid, "exports": self._owners.exports_of(number)}
            for number, process in self._processes.items()
        ]

    async def exports(self) -> list[dict[str, Any]]:
        """Every export that is open: its name, its worker, and the clients that have it."""
        asked = [process for process in self._processes.values() if process.settled.is_set() and not process.ending]
        answers = await asyncio.gather(
            *[process.channel.ask({"do": "look"}) for process in asked], return_exceptions=True
        )
        return sorted(
            (
                {"name": export["name"], "worker": process.pid, "clients": export["clients"]}
                for process, answer in zip(asked, answers, strict=True)
                if isinstance(answer, dict)  # else it has just died
                for export in answer["exports"]
            ),
            key=lambda export: str(export["name"]),
        )

    def _begin_task(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.create_task(work)

    async def place(self, number: int, name: str) -> Process:
        """The worker that has this export, or is to have it, claimed as for a connection of this number."""
        self._owners.enlist(number)
        while not self._stopping:
            moved = self._moved
            if self._owners.open:
                process = self._processes[self._owners.claim(number, name)]
                self._ephemerals.claimed(name)
                self._provide()
                if process.settled.is_set() and not process.ending:
                    self._owners.move(number, process.number, relayed=False)
                    return process
            await moved.wait()
        self._owners.leave(number)
        raise Interrupted("the server is ending")

    def leave(self, number: int) -> None:
        """What was claimed with ``place`` is given back, unless it went with its worker."""
        if number in self._owners:
            self._owners.leave(number)
        self._ephemerals.look()


def _close(fd: int | None) -> None:
    if fd is not None:
        os.close(fd)
