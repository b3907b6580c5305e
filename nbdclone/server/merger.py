"""In the background of a server: the layers of snapshots that were removed are merged into what is above them.

It looks at its start, and when a removal says that it may have left one: that changes the directory of layers.
"""

from __future__ import annotations

import asyncio
import logging

from nbdclone.errors import NBDCloneError
from nbdclone.server.jobs import Jobs
from nbdclone.store.merging import is_work
from nbdclone.store.pool import Pool

logger = logging.getLogger("nbdclone")

# How often the time of one directory is looked at: a microsecond of work.
LOOK_S = 2.0
# How soon what could not be merged, for it is in use or there is no room, is tried again.
AGAIN_S = 300.0


class Merger:
    """One for each server; ``run`` ends when it is cancelled."""

    def __init__(self, pool: Pool, jobs: Jobs) -> None:
        self._pool = pool
        self._jobs = jobs
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        seen, again = 0, 0.0
        while True:
            changed = await self._loop.run_in_executor(None, self._changed)
            if changed != seen or (again and self._loop.time() >= again):
                seen = changed
                again = 0.0 if await self._merge() else self._loop.time() + AGAIN_S
            await asyncio.sleep(LOOK_S)

    def _changed(self) -> int:
        try:
            return self._pool.places.layers.stat().st_mtime_ns
        except OSError:
            return 0

    async def _merge(self) -> bool:
        """Is all done that was to be done?"""
        try:
            if not await self._loop.run_in_executor(None, is_work, self._pool.places):
                return True
            async with self._jobs.begin("merge", {"gently": True}) as job:
                async for _progress in job.progress():
                    pass
                left = job.result()["left"]
        except (NBDCloneError, OSError) as error:
            logger.warning("merging layers: %s", error)
            return False
        for each in left:
            logger.warning("layer %s stays for now: %s", each["layer"], each["why"])
        return not left
