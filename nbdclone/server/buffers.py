"""Page-aligned buffers, kept and used again.

Copies between page-aligned memory and the page cache cost half of what they cost at other alignments (4K aliasing),
and pages that were touched before do not fault: so anonymous mappings, by powers of two, that come back after use.
"""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap

PAGE = 4096
# Below this a copy is cheap enough to go through the buffers that all connections share.
MIN_BUFFER = 64 << 10
# Buffers that wait for their next use, in bytes. Enough for a dozen busy connections; the rest goes back to the system.
MAX_IDLE = 32 << 20


def new_buffer(size: int) -> mmap:
    """A buffer for a pool, in any thread. A large one may wait for others that are touched for the first time."""
    return mmap(-1, _rounded(size))


def _rounded(size: int) -> int:
    return max(MIN_BUFFER, 1 << (size - 1).bit_length())


class BufferPool:
    """Hands out buffers and takes them back. Not thread-safe: the event loop's own.

    ``discard`` gets those that are not kept: unmapping one takes a millisecond for each 10 MiB.
    """

    def __init__(self, discard: Callable[[mmap], None] = lambda _buffer: None) -> None:
        self._discard = discard
        self._idle: dict[int, list[mmap]] = {}
        self._idle_bytes = 0

    def take(self, size: int) -> mmap:
        """A buffer of at least ``size`` bytes, aligned to a page, with anything in it."""
        return self.take_idle(size) or new_buffer(size)

    def take_idle(self, size: int) -> mmap | None:
        """The same if one is waiting for its next use."""
        rounded = _rounded(size)
        waiting = self._idle.get(rounded)
        if not waiting:
            return None
        self._idle_bytes -= rounded
        return waiting.pop()

    def give(self, buffer: mmap) -> None:
        """Take a buffer back. Nobody may use it, or a view of it, any more."""
        size = len(buffer)
        if self._idle_bytes + size > MAX_IDLE:
            self._discard(buffer)
            return
        self._idle_bytes += size
        self._idle.setdefault(size, []).append(buffer)
