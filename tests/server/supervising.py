"""Servers of several processes, and what can be seen of them."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from serving import open_files, until

from nbdclone.server.budget import MIN_MEMORY
from nbdclone.server.supervisor import Supervisor
from nbdclone.store.catalog import CloneInfo
from nbdclone.store.pool import Pool


@asynccontextmanager
async def supervised(pool: Pool, workers: int = 2, **where: Any) -> AsyncIterator[Supervisor]:
    """A server of so many processes; afterwards nothing of it must be left, nor anything of a connection before."""
    fds, tasks = open_files(), asyncio.all_tasks()
    where = where or {"sockets": [pool.path.parent / "nbd.sock"]}
    async with Supervisor(pool, workers=workers, worker_memory=MIN_MEMORY, **where) as server:
        yield server
        await until(lambda: not server._peers, lambda: f"connections that are not gone: {server._peers}")
        assert server._owners._claims == server._owners._connections == {}
        assert all(worker.load == 0 for worker in server._owners._workers.values())
    assert not children()
    await until(lambda: open_files() <= fds, lambda: f"files left open: {open_files() - fds}")
    assert asyncio.all_tasks() <= tasks
    assert not list(pool.path.glob("clones/*/live")), "a clone was not closed"


def children() -> list[int]:
    """The processes that this one has started; not those that multiprocessing keeps for other tests."""
    started = [int(pid) for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]
    return [pid for pid in started if b"multiprocessing" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


def holder(pool: Pool, name: str) -> int | None:
    """The process that has the clone open."""
    info = pool.info(name)
    assert isinstance(info, CloneInfo)
    found = re.match(r"process (\d+) ", info.in_use_by or "")
    return int(found[1]) if found else None


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
