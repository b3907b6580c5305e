"""A log that strangers cannot fill: of things of one kind, one line in a while, and how many were not said."""

from __future__ import annotations

import logging
from collections.abc import Callable

# Often enough to see what goes on; a thousand refusals a second are one line in this time.
INTERVAL_S = 5.0


class QuietLog:
    """Warnings about what clients do. ``clock`` gives seconds; kinds are few: the code's own, and exports'."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float]) -> None:
        self._logger = logger
        self._clock = clock
        self._quiet_until: dict[str, float] = {}
        self._unsaid: dict[str, int] = {}

    def say(self, kind: str, message: str, *args: object) -> None:
        """Log a warning, unless one of this ``kind`` was logged a moment ago."""
        now = self._clock()
        if now < self._quiet_until.get(kind, now):
            self._unsaid[kind] = self._unsaid.get(kind, 0) + 1
            return
        self._quiet_until[kind] = now + INTERVAL_S
        if unsaid := self._unsaid.pop(kind, 0):
            message, args = message + " (and %d more of the kind since the last line)", (*args, unsaid)
        self._logger.warning(message, *args)
