"""The verbs at work in a worker: in threads of their own, on the exports that its clients have.

A verb changes a clone in the queue of that export's changes. Between two of its steps clients have the clone, and the
processor, for themselves at least as long as the step took.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, TypeVar

from nbdclone.control.clients import add_user, describe_clients
from nbdclone.control.failures import to_record
from nbdclone.control.verbs import Arguments, Opened, Steps, drive, find_verb
from nbdclone.errors import Interrupted, InUse, NBDCloneError, UsageError
from nbdclone.server.channel import Channel, Message
from nbdclone.server.export import Export
from nbdclone.server.host import Host
from nbdclone.server.offload import Done, Offload
from nbdclone.store.clone import Clone
from nbdclone.store.names import split_name
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

T = TypeVar("T")

# Verbs at work in one worker; further ones wait. The supervisor lets in no more (server/jobs.py).
MAX_THREADS = 32
# How often progress is told.
PROGRESS_S = 0.1


class WorkerOpened:
    """An export that is open here, for a verb in a thread."""

    def __init__(self, export: Export, work: Work) -> None:
        self._export = export
        self._work = work

    @property
    def clone(self) -> Clone:
        return self._export.clone

    def change(self, step: Callable[[], T]) -> T:
        return self._change(self._export.change, step)

    def change_here(self, step: Callable[[], T]) -> T:
        return self._change(self._export.change_here, step)

    def _change(self, submit: Callable[[Callable[[], Any], Done], None], step: Callable[[], T]) -> T:
        took_s = 0.0

        def timed() -> T:
            nonlocal took_s
            began = perf_counter()
            try:
                return step()
            finally:
                took_s = perf_counter() - began

        asked = perf_counter()
        result: T = self._work.wait_for(lambda done: submit(timed, done))
        self._work.waited_s += perf_counter() - asked - took_s
        return result

    def flush(self) -> None:
        self._work.wait_for(self._export.flush)


class Work:
    """One verb: the Target that it works on."""

    def __init__(self, message: Message, host: Host, channel: Channel, loop: asyncio.AbstractEventLoop) -> None:
        self.number: int = message["connection"]
        self.waited_s = 0.0  # for clients, since the last step ended
        self._verb = find_verb(message["verb"])
        self._arguments: Arguments = message["arguments"]
        self._host = host
        self._channel = channel
        self._loop = loop
        self._interrupted = threading.Event()
        self._resumed = 0.0
        self._next_report = 0.0

    # For whoever runs it

    def do(self) -> Any:
        """Do it, in this thread."""
        self._resumed = perf_counter()
        return drive(self._verb.begin(self, self._arguments), self._after_step)

    def interrupt(self) -> None:
        """Let it end after the step that it is at."""
        self._interrupted.set()

    def _after_step(self, done: int, total: int) -> None:
        took_s = perf_counter() - self._resumed - self.waited_s
        if done == total or time.monotonic() >= self._next_report:
            self._next_report = time.monotonic() + PROGRESS_S
            message = {"do": "progress", "connection": self.number, "progress": [done, total]}
            self._loop.call_soon_threadsafe(self._channel.send, message)
        if self._interrupted.wait(took_s if self._host.has_clients else 0):
            raise Interrupted(f"'{self._verb.name}' was interrupted")
        self.waited_s = 0.0
        self._resumed = perf_counter()

    # The Target

    @property
    def pool(self) -> Pool:
        return self._host.pool

    @contextmanager
    def opened(self, name: str) -> Iterator[Opened]:
        self._require_ours(name)
        export = self._call(self._host.exports.acquire(name))
        try:
            yield WorkerOpened(export, self)
        finally:
            self._call(self._host.exports.release(export))

    @contextmanager
    def if_open(self, name: str) -> Iterator[Opened | None]:
        self._require_ours(name)
        export = self._call(self._host.exports.acquire_open(name))
        if export is None:
            yield None
            return
        try:
            yield WorkerOpened(export, self)
        finally:
            self._call(self._host.exports.release(export))

    def clients(self, name: str) -> list[dict[str, Any]]:
        self._require_ours(name)
        return [add_user(client) for client in self._call(self._host.clients(name))]

    def disconnect(self, name: str) -> None:
        self._require_ours(name)
        self._call(self._host.disconnect(name))

    @contextmanager
    def alone(self, names: Sequence[str], *, disconnect: bool = False) -> Iterator[None]:
        clients = [client for name in names for client in self.clients(name)]
        if clients and not disconnect:
            raise InUse(f"'{names[0]}' is in use; connected: {describe_clients(clients)}")
        held = self._host.kept_closed(names, disconnect=disconnect)
        self._call(held.__aenter__())
        try:
            yield
        finally:
            self._call(held.__aexit__(None, None, None))

    def run(self, verb: str, arguments: Arguments) -> Steps:
        from nbdclone.control.client import Control  # takes memory, and most workers never need it

        control = Control.of(self.pool.path)
        if control is None:
            raise Interrupted(f"the server of pool {self.pool.path} is gone")
        return control.run(verb, arguments)

    def wait_for(self, submit: Callable[[Callable[[Any, BaseException | None], None]], None]) -> Any:
        """Have something done by way of the event loop, and wait here for what comes of it."""
        done = threading.Event()
        outcome: tuple[Any, BaseException | None] = None, None

        def note(result: Any, error: BaseException | None) -> None:
            nonlocal outcome
            outcome = result, error
            done.set()

        self._loop.call_soon_threadsafe(submit, note)
        done.wait()
        result, error = outcome
        if error is not None:
            raise error
        return result

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _require_ours(self, name: str) -> None:
        """Another clone may be another worker's. A clone's snapshots are where the clone is."""
        ours = self._verb.clone_in(self._arguments)
        if split_name(name)[0] != ours:
            raise UsageError(f"'{self._verb.name}' works on '{ours}', and cannot open '{name}' as well")


class Works:
    """All verbs at work in this worker."""

    def __init__(self, host: Host, channel: Channel) -> None:
        self._host = host
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._threads = Offload(self._loop, MAX_THREADS)
        self._works: dict[int, Work] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    def begin(self, message: Message) -> None:
        """Begin what the supervisor asks for, and answer when it has ended."""
        try:
            if self._stopping:
                raise Interrupted("the worker is ending")
            work = Work(message, self._host, self._channel, self._loop)
        except NBDCloneError as error:
            self._channel.answer(message, error=to_record(error))
            return
        self._works[work.number] = work
        task = self._loop.create_task(self._see_through(work, message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def interrupt(self, number: int) -> None:
        if number in self._works:
            self._works[number].interrupt()

    async def close(self) -> None:
        """Interrupt all, and wait until they have put things right."""
        self._stopping = True
        for work in self._works.values():
            work.interrupt()
        await asyncio.gather(*self._tasks)
        self._threads.close()

    async def _see_through(self, work: Work, message: Message) -> None:
        try:
            answer = {"result": await self._threads.run(work.do)}
        except (NBDCloneError, OSError) as error:
            answer = {"error": to_record(error)}
        except Exception as error:
            logger.exception("a defect of the verb '%s'", message["verb"])
            answer = {"error": to_record(error)}
        finally:
            del self._works[work.number]
        self._channel.answer(message, **answer)
