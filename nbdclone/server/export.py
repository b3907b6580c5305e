"""An export: one open clone, shared by all connections to it, and the order in which it is changed.

Reads go on beside everything. Changes that may wait for a disk run in threads, one at a time for each clone, and while
one is under way the others queue behind it: that is what lets a warm write run on the event loop without ever waiting
there for the clone's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from time import perf_counter
from typing import Any

from nbdclone.errors import InUse
from nbdclone.server.limits import UNLIMITED, Limit, Limits
from nbdclone.server.offload import Done, Offload
from nbdclone.server.replay import Boots
from nbdclone.server.throttle import Throttle
from nbdclone.store.clone import Clone
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

# A write that kept the loop longer than this met a disk that cannot follow (the kernel makes a writer wait for tens of
# milliseconds when too much is dirty), and not just a busy processor. For the next while this clone's writes go through
# a thread, and wait there for nobody else.
STALL_S = 0.02
STALLED_FOR_S = 0.5
# Writes that waited for one in a thread, and are made on the loop one after the other then.
MAX_ATTEMPTS = 64

# By name: a lock, and who holds it or waits for it.
Turns = dict[str, tuple[asyncio.Lock, set[object]]]


class Export:
    """A clone that is open, with its queue of changes and its flushes."""

    def __init__(self, clone: Clone, offload: Offload, loop: asyncio.AbstractEventLoop) -> None:
        self.clone = clone
        self.users = 0
        self.changing = False  # a change runs in a thread, or waits to
        self._offload = offload
        self._loop = loop
        # What to do in a thread (None: nothing), what on the loop.
        self._changes: deque[tuple[Callable[[], Any] | None, Callable[[], Any] | None, Done]] = deque()
        self._flush_waiting: list[Done] = []
        self._flushing = False
        self._stalled_until = 0.0
        self.throttle: Throttle | None = None  # what holds all connections together to the limits, if there are any

    def set_limit(self, limit: Limit) -> None:
        """Hold to this limit from now on."""
        if self.throttle is not None and limit != UNLIMITED:
            self.throttle.change(limit)
        elif limit != UNLIMITED:
            self.throttle = Throttle(limit, self._loop)
        elif self.throttle is not None:
            throttle, self.throttle = self.throttle, None
            throttle.close()

    def change(self, work: Callable[[], Any], done: Done, attempt: Callable[[], Any] | None = None) -> None:
        """Run a change of the clone in a thread, after those before it.

        If it had to wait for its turn, ``attempt`` comes first, on the loop: the same, which raises BlockingIOError
        where it would wait. Or a client that keeps some writes under way would send all of them through threads for
        ever, after one that had to.
        """
        self._changes.append((work, attempt, done))
        if not self.changing:
            self.changing = True
            self._submit_change(work)

    def _submit_change(self, work: Callable[[], Any]) -> None:
        done = self._changes[0][2]

        def changed(result: Any, error: BaseException | None) -> None:
            self._finish_change(done, result, error)
            self._next_change()

        self._offload.submit(work, changed, self)

    def change_here(self, step: Callable[[], Any], done: Done) -> None:
        """Do a step on the event loop, after the changes before it: for what no read on the loop may run beside.

        It must be quick: everybody waits for it.
        """
        self._changes.append((None, step, done))
        if not self.changing:
            self.changing = True
            self._next_change()

    def _next_change(self) -> None:
        attempts = 0
        while self._changes:
            work, attempt, done = self._changes[0]
            if work is not None and (attempt is None or attempts == MAX_ATTEMPTS or self.stalled):
                self._submit_change(work)
                return
            assert attempt is not None
            attempts += 1
            result: Any = None
            failure: Exception | None = None
            began = perf_counter()
            try:
                result = attempt()
            except Exception as error:
                if work is not None and isinstance(error, BlockingIOError):
                    self._submit_change(work)
                    return
                failure = error
            self.note_write_time(perf_counter() - began)
            self._finish_change(done, result, failure)
        self.changing = False

    def _finish_change(self, done: Done, result: Any, error: BaseException | None) -> None:
        self._changes.popleft()
        try:
            done(result, error)
        except Exception:
            logger.exception("a defect of the server")

    def flush(self, done: Done) -> None:
        """Make durable every write that was acknowledged before this call.

        One sync serves all the flushes that were waiting when it began; those that come meanwhile wait for the next.
        """
        self._flush_waiting.append(done)
        if not self._flushing:
            self._next_flush()

    def _next_flush(self) -> None:
        self._flushing = True
        served, self._flush_waiting = self._flush_waiting, []

        def flushed(result: Any, error: BaseException | None) -> None:
            self._flushing = False
            if self._flush_waiting:
                self._next_flush()
            for done in served:
                try:
                    done(result, error)
                except Exception:
                    logger.exception("a defect of the server")

        self._offload.submit(self.clone.flush, flushed, self)

    def note_write_time(self, seconds: float) -> None:
        """How long a write kept the event loop."""
        if seconds > STALL_S:
            self._stalled_until = self._loop.time() + STALLED_FOR_S

    @property
    def stalled(self) -> bool:
        """Do writes to this clone make their caller wait at present?"""
        if self._stalled_until and self._loop.time() >= self._stalled_until:
            self._stalled_until = 0.0
        return self._stalled_until > 0.0


class Exports:
    """The exports of a pool: opened when the first connection asks, closed (and flushed) after the last has gone."""

    def __init__(
        self,
        pool: Pool,
        offload: Offload,
        keeper: Offload,
        boots: Boots,
        loop: asyncio.AbstractEventLoop,
        limits: Limits | None = None,
    ) -> None:
        self._pool = pool
        self._boots = boots
        self._limits = limits or Limits()
        self._offload = offload
        self._keeper = keeper  # opens and closes: hashing a base takes minutes, and nobody's reads shall wait for it
        self._loop = loop
        self._open: dict[str, Export] = {}
        self._turns: Turns = {}  # of those that are being opened or closed
        self._entrances: Turns = {}  # of those that somebody asks for, or that are kept closed

    async def acquire(self, name: str, *, refused: bool = False) -> Export:
        """The export of that name, to be given back with :meth:`release`. Raises what ``Pool.open_clone`` raises."""
        async with _turn(self._entrances, name), _turn(self._turns, name):
            export = self._open.get(name)
            if export is None:
                clone = await self._keeper.run(lambda: self._open_clone(name), abandoned=self._close_clone)
                export = self._open[name] = Export(clone, self._offload, self._loop)
                export.set_limit(self._limits.of(name))
            export.users += 1
            return export

    async def acquire_open(self, name: str) -> Export | None:
        """The same, of one that is open already; None if it is not."""
        async with _turn(self._entrances, name), _turn(self._turns, name):
            export = self._open.get(name)
            if export is not None:
                export.users += 1
            return export

    async def release(self, export: Export) -> None:
        """Give an export back. The last one's return flushes and closes the clone; a failure of that is logged."""
        name = export.clone.name
        async with _turn(self._turns, name):
            export.users -= 1
            if export.users:
                return
            del self._open[name]
            export.set_limit(UNLIMITED)
            try:
                await self._keeper.run(lambda: self._close_clone(export.clone))
            except Exception as error:
                logger.error("closing '%s': %s", name, error)

    @contextlib.asynccontextmanager
    async def kept_closed(self, names: Sequence[str], leave: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
        """Nobody has any of these open, and who asks for one waits until the end of the ``async with``.

        ``leave`` is awaited when nobody comes in any more, to make go who is there. Raises InUse if one is open then.
        """
        async with contextlib.AsyncExitStack() as held:
            for name in sorted(names):
                await held.enter_async_context(_turn(self._entrances, name))
            await leave()
            for name in sorted(names):
                await held.enter_async_context(_turn(self._turns, name))
                if name in self._open:
                    raise InUse(f"'{name}' is in use: a client has just come, or a verb is at work on it")
            yield

    @property
    def open_names(self) -> list[str]:
        """The names of those that are open."""
        return sorted(self._open)

    def change_limits(self, limits: Limits) -> None:
        """Other limits from now on, for the exports too that are open."""
        self._limits = limits
        for name, export in self._open.items():
            export.set_limit(limits.of(name))

    async def require(self, name: str) -> None:
        """Raise NotFound unless there is an export of that name."""
        await self._keeper.run(lambda: self._pool.require(name))

    async def snapshots_beneath(self, name: str) -> dict[str, bytes]:
        """What ``Pool.snapshots_beneath`` tells at this moment. Raises StorageError, OSError."""
        return await self._keeper.run(lambda: self._pool.snapshots_beneath(name))

    async def names(self, shown: Callable[[str], bool]) -> list[str]:
        """The names of the exports there are at this moment, as far as they are to be shown."""
        return await self._keeper.run(lambda: [name for name in self._pool.names() if shown(name)])

    def _open_clone(self, name: str) -> Clone:
        clone = self._pool.open_clone(name)
        _ = clone.fast_zero  # finding that out may wait for the disk: here, and not on the loop
        self._boots.opened(clone)
        return clone

    def _close_clone(self, clone: Clone) -> None:
        self._boots.closing(clone)
        clone.close()


@contextlib.asynccontextmanager
async def _turn(turns: Turns, name: str) -> AsyncIterator[None]:
    """Be the only one who has this name's lock of these."""
    lock, interested = turns.setdefault(name, (asyncio.Lock(), set()))
    me = object()
    interested.add(me)
    try:
        async with lock:
            yield
    finally:
        interested.discard(me)
        if not interested:
            del turns[name]
