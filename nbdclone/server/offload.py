"""Threads for what may wait for a disk: cold reads, syncs, holes, opening and closing.

A job is a function; its outcome is handed to a callback on the event loop. No future and no task per job: a job costs
two queue operations, and the outcomes of all jobs that end while the loop is busy cost it one wake-up.

Jobs have owners: the threads are given a few more jobs than there are threads, and whenever one is done, the owner
whose turn it is gives the next. While others have jobs too, an owner has half of the threads at most, and their
outcomes are handed on in turn: so the one job of the other finds a thread that has nothing to do, and its outcome waits
for one of those of whoever has a thousand.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger("nbdclone")

# As many cold reads go to the disk at once; beyond that, disks that gain from depth gain little, and memory is bounded.
MAX_THREADS = 16
# Jobs that wait in front of the threads, so that none of them has to wait for the loop.
AHEAD = 4
# While another owner has had a job so lately, none has more of them given than its share: the threads that it leaves
# take the other's at once. Threads that have read also contend with the event loop for the interpreter.
CROWDED_FOR_S = 0.05
CROWDED_SHARE = 2
# How long outcomes are handed on before others have their turn on the loop.
SLICE_S = 0.0001

Done = Callable[[Any, BaseException | None], None]
Job = tuple[Callable[[], Any], Done, object]
Outcome = tuple[Done, Any, BaseException | None, object]


class Offload:
    """A few threads, started as they are needed. ``close`` waits for the jobs that were given before."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_threads: int = MAX_THREADS) -> None:
        self._loop = loop
        self._max_threads = max_threads
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._limit = max_threads + AHEAD
        # Jobs that the threads have, or have done and nobody has heard of: all, and those of each owner.
        self._given = 0
        self._given_of: Counter[object] = Counter()
        # The jobs of each owner that are not given yet; whose turn it is, comes first. The loop's alone.
        self._queued: dict[object, deque[Job]] = {}
        self._last: object = None
        self._crowded_until = 0.0
        self._outcomes: deque[Outcome] = deque()  # as the threads left them
        self._heard: dict[object, deque[Outcome]] = {}  # the same by owner, in turn
        self._waking = False
        self._threads: list[threading.Thread] = []
        self._unfinished = 0

    def submit(self, work: Callable[[], Any], done: Done, owner: object = None) -> None:
        """Run ``work`` in a thread, then ``done(result, error)`` on the loop: one of the two is None.

        When there is more to do than there are threads, each ``owner`` has its turn, with one job.
        """
        self._unfinished += 1
        if self._unfinished > len(self._threads) < self._max_threads:
            thread = threading.Thread(target=self._work, name=f"nbdclone-{len(self._threads)}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no more threads to give
                if not self._threads:
                    self._unfinished -= 1
                    self._loop.call_soon(done, None, OSError(errno.EAGAIN, str(error)))
                    return
            else:
                self._threads.append(thread)
        now = perf_counter()
        if owner is not self._last:
            self._last = owner
            self._crowded_until = now + CROWDED_FOR_S
        self._queued.setdefault(owner, deque()).append((work, done, owner))
        self._give()

    def _give(self) -> None:
        """Give the threads of the jobs that wait as many as they may have, each owner's in its turn."""
        share = self._limit
        if self._queued and perf_counter() < self._crowded_until:
            share //= CROWDED_SHARE
        passed = 0
        while self._given < self._limit and passed < len(self._queued):
            owner = next(iter(self._queued))
            jobs = self._queued.pop(owner)
            if self._given_of[owner] < share:
                self._given += 1
                self._given_of[owner] += 1
                self._jobs.put(jobs.popleft())
                passed = 0
            else:
                passed += 1
            if jobs:
                self._queued[owner] = jobs  # at the end of the row

    async def run(self, work: Callable[[], T], *, abandoned: Callable[[T], Any] | None = None) -> T:
        """The same for a coroutine.

        The work is finished even if the one who waits is cancelled; its result then goes to ``abandoned``, in a thread.
        """
        future: asyncio.Future[T] = self._loop.create_future()

        def dispose(result: T) -> None:
            if abandoned is not None:
                self.submit(lambda: abandoned(result), lambda _result, _error: None)

        def done(result: T, error: BaseException | None) -> None:
            if future.cancelled():
                if error is None:
                    dispose(result)
            elif error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self.submit(work, done)
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled() and future.exception() is None:  # cancelled after the work was done
                dispose(future.result())
            raise

    def close(self) -> None:
        """Let the threads finish what they were given, and what follows from it, and end them."""
        while self._threads:
            ending, self._threads = self._threads, []
            for jobs in self._queued.values():
                for job in jobs:
                    self._given += 1
                    self._given_of[job[2]] += 1
                    self._jobs.put(job)
            self._queued.clear()
            for _ in ending:
                self._jobs.put(None)
            for thread in ending:
                thread.join()
            while self._outcomes or self._heard:
                self._deliver()  # a result that nobody waits for any more is one more job

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, done, owner = job
            outcome: Outcome
            try:
                outcome = (done, work(), None, owner)
            except BaseException as error:
                outcome = (done, None, error, owner)
            self._outcomes.append(outcome)
            # The loop resets the flag before it looks at the outcomes: what is added after that wakes it again.
            if not self._waking:
                self._waking = True
                self._loop.call_soon_threadsafe(self._deliver)
            del job, work, done, outcome, owner  # or the buffers in them would live until the next job

    def _deliver(self) -> None:
        self._waking = False
        until = perf_counter() + SLICE_S
        heard = self._heard
        while self._outcomes or heard:
            while self._outcomes:
                outcome = self._outcomes.popleft()
                heard.setdefault(outcome[3], deque()).append(outcome)
            owner = next(iter(heard))
            outcomes = heard.pop(owner)
            done, result, error, _owner = outcomes.popleft()
            if outcomes:
                heard[owner] = outcomes  # at the end of the row
            self._unfinished -= 1
            self._given -= 1
            self._given_of[owner] -= 1
            if not self._given_of[owner]:
                del self._given_of[owner]
            self._give()
            try:
                done(result, error)
            except Exception:
                logger.exception("a defect of the server")
            if perf_counter() > until:
                if (self._outcomes or heard) and not self._waking:
                    self._waking = True
                    self._loop.call_soon(self._deliver)
                return
