"""The verbs at work, as the supervisor sees them: in the worker that has the clone, or in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from nbdclone.control.failures import from_record
from nbdclone.control.verbs import Arguments, Verb, find_verb
from nbdclone.errors import Interrupted, InUse, NBDCloneError
from nbdclone.server.channel import Message
from nbdclone.server.process import Process, describe_status, start
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

# Verbs at work at a time. Each may be a process; more of them would only make each other slow.
MAX_JOBS = 32
# One line of a process: a verb's result may be a list of many extents.
MAX_LINE = 64 << 20
_MODULE = "nbdclone.control.job"


class Places(Protocol):
    """Where verbs can be run: the supervisor."""

    async def place(self, number: int, name: str) -> Process:
        """The worker that has this clone, or is to have it, as for a connection of this number: until ``leave``.

        Raises Interrupted when the server ends.
        """

    def leave(self, number: int) -> None:
        """It is over."""


class Job:
    """A verb that was begun."""

    def __init__(self, number: int, verb: Verb, arguments: Arguments) -> None:
        self.number = number
        self.verb = verb
        self.arguments = arguments
        self.began = time.time()
        self.last: tuple[int, int] | None = None
        self.interrupted = False
        self.stop: Callable[[], None] | None = None  # tells whoever is at work on it
        self._outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._news = asyncio.Event()

    async def progress(self) -> AsyncIterator[tuple[int, int]]:
        """How far it is, whenever that was told; what nobody waited for is left out."""
        told = None
        while not self._outcome.done():
            await self._news.wait()
            self._news.clear()
            if self.last is not None and self.last != told:
                told = self.last
                yield told

    def result(self) -> Any:
        return self._outcome.result()

    def note(self, done: int, total: int) -> None:
        self.last = (done, total)
        self._news.set()

    def end(self, result: Any = None, error: BaseException | None = None) -> None:
        if error is None:
            self._outcome.set_result(result)
        else:
            self._outcome.set_exception(error)
            self._outcome.exception()  # whoever asked may be gone
        self._news.set()

    def interrupt(self) -> None:
        """Nobody wants it any more. It may take a moment to put things right."""
        if not (self.interrupted or self._outcome.done()):
            self.interrupted = True
            if self.stop is not None:
                self.stop()

    def begin(self, stop: Callable[[], None]) -> None:
        """Somebody is to be at work on it, whom ``stop`` tells to end. Raises Interrupted if nobody wants it by now."""
        if self.interrupted:
            raise Interrupted(f"'{self.verb.name}' was interrupted before it began")
        self.stop = stop

    def record(self) -> dict[str, Any]:
        return {
            "verb": self.verb.name,
            "arguments": dict(self.arguments),
            "progress": self.last,
            "since": self.began,
        }


class Jobs:
    """All of them. ``begin_task`` begins a task, of which the caller sees the end before that of ``places``."""

    def __init__(
        self, pool: Pool, places: Places, next_number: Callable[[], int], begin_task: Callable[[Any], Any]
    ) -> None:
        self._pool = pool
        self._places = places
        self._next_number = next_number
        self._begin_task = begin_task
        self._jobs: dict[int, Job] = {}
        self._stopping = False

    @contextlib.asynccontextmanager
    async def begin(self, verb: str, arguments: Arguments) -> AsyncIterator[Job]:
        """Begin a verb; at the end of the context it is interrupted if it has not ended.

        Raises NotFound, UsageError, InUse, Interrupted.
        """
        found = find_verb(verb)
        found.check(arguments)
        if self._stopping:
            raise Interrupted("the server is ending")
        if len(self._jobs) >= MAX_JOBS:
            raise InUse(f"{len(self._jobs)} verbs are at work: ask again when one has ended")
        job = Job(self._next_number(), found, arguments)
        self._jobs[job.number] = job
        self._begin_task(self._see_through(job))
        try:
            yield job
        finally:
            job.interrupt()

    def records(self) -> list[dict[str, Any]]:
        return [job.record() for job in self._jobs.values()]

    def note(self, number: int, done: int, total: int) -> None:
        """A worker tells how far it is."""
        if number in self._jobs:
            self._jobs[number].note(done, total)

    def stop(self) -> None:
        """Interrupt all, and begin no more."""
        self._stopping = True
        for job in self._jobs.values():
            job.interrupt()

    async def _see_through(self, job: Job) -> None:
        run = self._in_worker if job.verb.place == "worker" else self._apart
        try:
            job.end(await run(job))
        except (NBDCloneError, OSError) as error:
            job.end(error=error)
        except Exception as error:
            logger.exception("a defect of the server")
            job.end(error=error)
        finally:
            del self._jobs[job.number]

    async def _in_worker(self, job: Job) -> Any:
        process = await self._places.place(job.number, job.verb.clone_in(job.arguments))
        channel = process.channel
        message = {
            "do": "work",
            "connection": job.number,
            "verb": job.verb.name,
            "arguments": dict(job.arguments),
        }
        try:
            job.begin(lambda: channel.send({"do": "interrupt", "connection": job.number}))
            answer = await channel.ask(message)
        except ConnectionError:  # what it had is given away when the kernel says that it is dead
            raise Interrupted(f"the worker that did '{job.verb.name}' has ended, process {process.pid}") from None
        except BaseException:
            self._places.leave(job.number)
            raise
        self._places.leave(job.number)
        return _result(answer)

    async def _apart(self, job: Job) -> Any:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                job.begin(lambda: None)
                popen = start(_MODULE, self._pool.path, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MAX_LINE)
        job.stop = writer.write_eof
        outcome: Message | None = None
        try:
            writer.write(json.dumps({"verb": job.verb.name, "arguments": dict(job.arguments)}).encode() + b"\n")
            if job.interrupted:
                writer.write_eof()
            with contextlib.suppress(ConnectionError):
                while line := await reader.readline():
                    event = json.loads(line)
                    if "progress" in event:
                        job.note(*event["progress"])
                    else:
                        outcome = event
        finally:
            job.stop = None
            writer.close()
            status = await asyncio.get_running_loop().run_in_executor(None, popen.wait)
        if outcome is None:
            raise Interrupted(f"the process that did '{job.verb.name}' {describe_status(status)}")
        return _result(outcome)


def _result(outcome: Message) -> Any:
    if "error" in outcome:
        raise from_record(outcome["error"])
    return outcome["result"]
