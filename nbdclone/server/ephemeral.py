"""Clones that are made when a client asks for them, and removed when their time is over. docs/ephemeral.md.

The supervisor has the book of them: it makes them, counts them, and removes them when nobody has them open.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any

from nbdclone.control.failures import to_record
from nbdclone.errors import InUse, NameTaken, NBDCloneError, NotFound
from nbdclone.server.templates import PLUS, Template, Templates
from nbdclone.store.ephemeral import Mark, is_ephemeral, marks, new_mark
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

# How long a clone that lives while somebody is connected waits for him to come again: a client that reconnects, or a
# guest that is started again, finds what it wrote.
GRACE_S = 30.0
# When a clone that should have gone could not be removed: until it is tried again.
RETRY_S = 60.0


class Ephemerals:
    """The ephemeral clones of a pool that is served. ``owned`` says whether somebody has a clone open."""

    def __init__(
        self, pool: Pool, owned: Callable[[str], bool], begin_task: Callable[[Coroutine[Any, Any, None]], None]
    ) -> None:
        self._pool = pool
        self._owned = owned
        self._begin_task = begin_task
        self._loop = asyncio.get_running_loop()
        self._marks: dict[str, Mark] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._making = asyncio.Lock()
        self._stopped = False

    async def start(self) -> None:
        """Take up those that there are: what another server has left goes when its time is over, too."""
        self._marks = dict(await self._loop.run_in_executor(None, lambda: list(marks(self._pool.places))))
        self.look()

    def stop(self) -> None:
        """Remove none any more; the next server goes on."""
        self._stopped = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    async def make(self, asked: str, templates: Templates) -> dict[str, Any]:
        """Make the clone that a client has asked for: {"name": its name}, or {"error": what is wrong, as a record}."""
        template = templates.find(asked)
        try:
            if template is None:
                raise NotFound(f"there is no export {asked[:100]!r}")
            async with self._making:
                if asked in self._marks:
                    return {"name": asked}
                return {"name": await self._make(asked, template)}
        except (NBDCloneError, OSError) as error:
            return {"error": to_record(error)}

    async def _make(self, asked: str, template: Template) -> str:
        count = sum(mark.template == template.name for mark in self._marks.values())
        if count >= template.limit:
            raise InUse(f"{count} clones of template '{template.name}' are there, as many as there may be")
        name = asked if asked[-1] != PLUS else f"{asked[:-1]}-{secrets.token_hex(4)}"
        mark = new_mark(template.name, template.lifetime_s)

        def create() -> None:
            try:
                self._pool.create_clones(template.source, [name], quota=template.quota, mark=mark)
            except NameTaken:
                self._pool.require(name)  # another client has asked for it just now; or it is a base that was imported

        await self._loop.run_in_executor(None, create)
        logger.info("made the ephemeral clone '%s' of '%s'", name, template.source)
        self._marks[name] = mark
        # Until its first client has it open, it is as if he had just gone.
        self._arm(name)
        return name

    def claimed(self, name: str) -> None:
        """Somebody has it open: its time begins when he has gone."""
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def look(self) -> None:
        """Something was released: the time of those that nobody has open begins."""
        for name in self._marks:
            if not self._owned(name) and name not in self._timers:
                self._arm(name)

    def _arm(self, name: str, wait_s: float = 0.0) -> None:
        mark = self._marks[name]
        left = GRACE_S if mark.lifetime_s is None else mark.created + mark.lifetime_s - time.time()
        if not self._stopped:
            self._timers[name] = self._loop.call_later(max(left, wait_s, 0.0), self._expire, name)

    def _expire(self, name: str) -> None:
        self._timers.pop(name, None)
        if not self._owned(name) and not self._stopped:
            self._begin_task(self._remove(name))

    async def _remove(self, name: str) -> None:
        def remove() -> bool:
            if not is_ephemeral(self._pool.places, name):  # somebody keeps it, or removed it
                return False
            self._pool.remove([name], still=lambda: is_ephemeral(self._pool.places, name))
            return True

        try:
            if await self._loop.run_in_executor(None, remove):
                logger.info("removed the ephemeral clone '%s'", name)
            self._marks.pop(name, None)
        except NotFound:
            self._marks.pop(name, None)
        except (NBDCloneError, OSError) as error:
            logger.warning("the ephemeral clone '%s' stays for now: %s", name, error)
            if not self._owned(name) and name not in self._timers:
                self._arm(name, RETRY_S)
