"""Staying awake for the next request of a client that sends one after the other.

A loop that has nothing to do sleeps in the kernel, and a processor that has nothing to do halts. To wake both for the
next request takes longer than to answer it: in a virtual machine several times as long. So when requests come soon
after replies, the loop goes round for a moment before it sleeps, as qemu does (``poll-max-ns``) and KVM for its guests.
Whatever else there is to run on this processor goes first. Where that is in vain, it is not done any more for a while.
"""

from __future__ import annotations

import asyncio
import os
from time import monotonic

# The longest moment. Most of what a client needs between a reply and its next request is the time to wake it up: 10 to
# 30 us. What comes later than this is not worth a processor.
DEFAULT_LIMIT_US = 50
# A request that comes so soon after a reply may be one of many. It is longer than the moment: they come so late as long
# as both sides sleep in between.
SOON_S = 100e-6
# So many moments in vain, more than those that were not, are the end of it...
MAX_MISSES = 4
# ...for the time of so many requests.
PAUSE = 1000


class Busy:
    """One for each event loop. ``limit_us`` is the longest moment, 0 for never."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limit_us: int = DEFAULT_LIMIT_US) -> None:
        self._loop = loop
        self._limit = limit_us * 1e-6
        self._until = 0.0  # the end of the moment
        self._awake = False  # going round
        self._sent = 0.0  # when replies were sent last
        self._soon = False  # the last request came soon after them
        self._score = 0
        self._pause = 0

    def received(self) -> None:
        """Something came from a client."""
        if self._pause:
            self._pause -= 1
            self._soon = False
            return
        self._soon = monotonic() - self._sent < SOON_S
        if self._awake and self._score < MAX_MISSES:
            self._score += 1

    def sent(self) -> None:
        """Something was sent to a client."""
        self._sent = now = monotonic()
        if self._soon and self._limit:
            self._until = now + self._limit
            if not self._awake:
                self._awake = True
                self._loop.call_soon(self._go_round)

    def _go_round(self) -> None:
        if monotonic() < self._until:
            os.sched_yield()
            self._loop.call_soon(self._go_round)
            return
        self._awake = False
        self._score -= 1
        if self._score <= -MAX_MISSES:
            self._score = 0
            self._pause = PAUSE
