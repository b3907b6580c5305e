"""Holds the connections of an export to its limits: whose turn it is, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from nbdclone.protocol.requests import Request
from nbdclone.protocol.wire import CMD_DISC, CMD_READ, CMD_WRITE, MAX_PAYLOAD
from nbdclone.server.limits import Limit, Meter

# Timers are no finer: what came together meanwhile is had at once.
MIN_WAIT_S = 0.001


class Customer(Protocol):
    """A connection that waits."""

    def unthrottle(self) -> None:
        """It is your turn: ask again."""


class Throttle:
    """The limits of one export. Connections that find nothing left wait in a row, and each has its turn."""

    def __init__(self, limit: Limit, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._meter = Meter(limit, loop.time())
        self._waiting: dict[Customer, None] = {}
        self._turn: Customer | None = None
        self._timer: asyncio.TimerHandle | None = None

    def change(self, limit: Limit) -> None:
        """Other limits from now on, for those too who wait."""
        self._meter.change(limit, self._loop.time())
        self._cancel()
        self._schedule()

    def admit(self, customer: Customer, requests: Sequence[Request]) -> int:
        """How many of the requests may be run now; they are paid for. For the others it waits."""
        for count, (_flags, command, _cookie, _offset, length, _payload) in enumerate(requests):
            if command != CMD_DISC:
                if not self.may_go_on(customer):
                    return count
                self.pay(command, length)
        return len(requests)

    def may_go_on(self, customer: Customer) -> bool:
        """May this connection run a request? If not, it waits in the row."""
        if (self._waiting and self._turn is not customer) or self._meter.wait_s(self._loop.time()):
            self._waiting[customer] = None
            self._schedule()
            return False
        return True

    def pay(self, command: int, length: int) -> None:
        """A request is run. One that is too long is refused, and does not cost more than the longest."""
        self._meter.take(min(length, MAX_PAYLOAD) if command in (CMD_READ, CMD_WRITE) else 0)

    def leave(self, customer: Customer) -> None:
        """This connection waits no more."""
        self._waiting.pop(customer, None)

    def close(self) -> None:
        """There are no limits any more."""
        self._cancel()
        waiting, self._waiting = self._waiting, {}
        for customer in waiting:
            customer.unthrottle()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _schedule(self) -> None:
        if self._waiting and self._timer is None:
            wait_s = self._meter.wait_s(self._loop.time())
            self._timer = self._loop.call_later(max(wait_s, MIN_WAIT_S) if wait_s else 0, self._wake)

    def _wake(self) -> None:
        """The first in the row has its turn; who finds nothing left again stands at the end."""
        self._timer = None
        if self._waiting and not self._meter.wait_s(self._loop.time()):
            customer = next(iter(self._waiting))
            del self._waiting[customer]
            self._turn = customer
            try:
                customer.unthrottle()
            finally:
                self._turn = None
        self._schedule()
