"""Reading ahead of a client that reads one block after another, where the disk cannot follow.

The kernel reads ahead too, for each open file, and as far as the device's ``read_ahead_kb`` says: 128 KiB mostly. All
clones of a base share its file but for the descriptor, and on disks with few and slow operations (a spinning one, a
network's) 128 KiB at a time are a fraction of what they give. docs/decisions/0006-prefetch.md has the figures.

Only reads that have to wait are seen here: where everything comes from memory there is nothing to be done.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nbdclone.store.clone import Clone

# Cold reads in a row, in bytes, that make a stream: two or three of a guest's, which are of 128 KiB.
MIN_STREAK = 256 << 10
# Of longer reads the kernel reads as much ahead as they are long, in larger pages than advice makes: better alone.
MAX_READ = 256 << 10
# How far the next read may be from where it is expected: a client at depth has its requests out of order.
SLACK = 1 << 20
# What is read ahead at first, and, doubled each time, at the most: 50 ms of a disk that gives 160 MB/s, beside which
# the waits in between do not show. A client that stops has made so much be read for nothing.
MIN_WINDOW = 512 << 10
MAX_WINDOW = 8 << 20


class Readahead:
    """Follows the cold reads of one connection."""

    __slots__ = ("_ahead", "_clone", "_position", "_streak", "_window", "running")

    def __init__(self, clone: Clone) -> None:
        self._clone = clone
        self._position = 0  # where the stream is
        self._ahead = 0  # up to where it was read ahead
        self._streak = 0
        self._window = 0
        self.running = False  # a job is under way

    def note_cold(self, offset: int, length: int) -> Callable[[], None] | None:
        """A read has to wait for the disk. What is to be read ahead of it, as a job for a thread, if anything is.

        When the job is done, :meth:`job_done` is to be called; until then there is no other.
        """
        if length > MAX_READ:
            return None
        end = offset + length
        if not self._position - SLACK <= offset <= self._ahead + SLACK:
            self._position = self._ahead = end
            self._streak = length
            self._window = 0
            return None
        self._streak += min(max(end - self._position, 0), length)  # what is new of it
        self._position = max(self._position, end)
        self._ahead = max(self._ahead, end)
        if self.running or self._streak < MIN_STREAK or self._position + self._window // 2 < self._ahead:
            return None
        self._window = min(max(2 * self._window, MIN_WINDOW), MAX_WINDOW)
        start, stop = self._ahead, min(self._position + self._window, self._clone.size)
        if start >= stop:
            return None
        self._ahead = stop
        self.running = True
        return partial(self._clone.prefetch, start, stop - start)

    def job_done(self) -> None:
        self.running = False
