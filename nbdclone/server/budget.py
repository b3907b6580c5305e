"""The memory that a server lends to all of its connections together, and whose turn it is when that is short.

What a connection holds for its peer (replies that it has not taken yet, payloads that are still coming, requests that
threads work on) is taken from one budget. While that lasts, nobody waits. When it is used up, a connection may still
hold its share, the budget divided by the number of connections, so that no number of others keeps it from going on; who
wants more waits, first come first served. A peer that neither takes nor sends what memory is held for loses its
connection while others wait: otherwise it could keep that memory for ever.

So all connections together hold at most twice the limit, and besides what one pass leaves behind, see ``session``.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Protocol

logger = logging.getLogger("nbdclone")

# Enough for a hundred busy clients that read at full depth in large pieces; idle ones hold nothing. A small machine
# gives a quarter of what it has.
MAX_MEMORY = 1 << 30
MACHINE_SHARE = 4
# The largest request must fit, with its reply, beside others.
MIN_MEMORY = 256 << 20
# How long a peer may leave its replies, or a payload that it began to send, where they are, while others wait.
STALL_S = 20.0
CHECK_INTERVAL_S = 1.0


def default_memory(workers: int = 1) -> int:
    """What a server of so many processes lends to its clients if nobody says, in bytes."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(MIN_MEMORY, min(max(MAX_MEMORY, workers * MIN_MEMORY), machine // MACHINE_SHARE))


class Borrower(Protocol):
    """A connection, as the budget sees it."""

    @property
    def label(self) -> str:
        """Who it is, for the log."""

    def resume(self) -> None:
        """There may be memory: go on with what waited for it."""

    def stalled_since(self) -> float | None:
        """Since when (loop time) the peer has not taken a reply, or sent a payload, whole; None if there is none."""

    def abandon(self) -> None:
        """End at once."""


class Budget:
    """The memory of all connections of one event loop. ``used`` and ``limit`` are in bytes."""

    def __init__(self, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        self.limit = limit
        self.used = 0
        self._loop = loop
        self._accounts: set[Account] = set()
        # Who waits, in their order: for how much, and since when.
        self._waiting: dict[Account, tuple[int, float]] = {}
        self._turn: Account | None = None  # whose turn it is, at the front of those who wait
        self._waking: asyncio.Handle | None = None
        self._checking: asyncio.TimerHandle | None = None

    def open(self, borrower: Borrower) -> Account:
        """An account for a connection; to be closed with it."""
        account = Account(self, borrower)
        self._accounts.add(account)
        return account

    @property
    def share(self) -> int:
        """What each connection may hold in any case."""
        return self.limit // max(1, len(self._accounts))

    def _close(self, account: Account) -> None:
        self._accounts.discard(account)
        self._waiting.pop(account, None)
        self._returned()

    def _returned(self) -> None:
        if self._waiting and self._waking is None:
            self._waking = self._loop.call_soon(self._wake)

    def _wait(self, account: Account, size: int) -> None:
        self._waiting.setdefault(account, (size, self._loop.time()))
        if self._checking is None:
            self._checking = self._loop.call_later(CHECK_INTERVAL_S, self._check)

    def _wake(self) -> None:
        """Let those go on whose turn it is. One who asks for more again stands at the end."""
        self._waking = None
        for _ in range(len(self._waiting)):
            account, (size, _since) = next(iter(self._waiting.items()))
            if not (self.used + size <= self.limit or account.held + size <= self.share):
                return
            del self._waiting[account]
            self._turn = account
            account.borrower.resume()
            self._turn = None
            if not self._waiting:
                return
        # All that wait now have asked for more. There may be enough of it, and nobody who gives any back: what is
        # answered at once holds none.
        self._returned()

    def _check(self) -> None:
        """End the connections that hold more than their share and move nothing, while others wait.

        If that does not help the first of those, since it wants more than is left beside all shares, then also those
        that hold most and move nothing, as far as it takes.
        """
        self._checking = None
        if not self._waiting:
            return
        self._checking = self._loop.call_later(CHECK_INTERVAL_S, self._check)
        latest = self._loop.time() - STALL_S
        size, since = next(iter(self._waiting.values()))
        missing = self.used + size - self.limit if since <= latest else 0
        for account in sorted(self._accounts, key=lambda account: -account.held):
            if account.held <= self.share and missing <= 0:
                return
            stalled = account.borrower.stalled_since()
            if stalled is not None and stalled <= latest:
                logger.warning(
                    "%s: ended: it left %d bytes unmoved for %d s while others waited for memory",
                    account.borrower.label,
                    account.held,
                    STALL_S,
                )
                missing -= account.held
                account.borrower.abandon()


class Account:
    """What one connection holds. ``held`` is in bytes."""

    __slots__ = ("borrower", "budget", "held")

    def __init__(self, budget: Budget, borrower: Borrower) -> None:
        self.budget = budget
        self.borrower = borrower
        self.held = 0

    def take(self, size: int) -> None:
        """Hold ``size`` bytes more. What is small is taken without asking; the bounds of a connection limit that."""
        self.held += size
        self.budget.used += size

    def give(self, size: int) -> None:
        """Hold so much less."""
        self.held -= size
        budget = self.budget
        budget.used -= size
        if budget._waiting:
            budget._returned()

    def allows(self, size: int) -> bool:
        """May ``size`` bytes more be taken now? Otherwise ``resume`` is called when it is this connection's turn."""
        budget = self.budget
        if budget.used + size <= budget.limit and (not budget._waiting or budget._turn is self):
            budget._turn = None  # one request, then the next one's turn
            return True
        if self.held + size <= budget.share:
            return True
        budget._wait(self, size)
        return False

    @property
    def over(self) -> bool:
        """Is memory short, and more than its share held here?"""
        budget = self.budget
        return budget.used >= budget.limit and self.held > budget.share

    def close(self) -> None:
        """The connection is over: nothing is held any more, and nothing waited for."""
        self.give(self.held)
        self.budget._close(self)
