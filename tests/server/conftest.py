"""The server is tested on the event loop that it is used with."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop
from serving import BASE, CLONES, make_pool

from nbdclone.server.host import SWITCH_INTERVAL_S
from nbdclone.store.pool import Pool

collect_ignore = [] if getattr(ssl, "HAS_PSK", False) else ["test_psk.py"]


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture(autouse=True, scope="session")
def switch_threads_as_the_server_does() -> Iterator[None]:
    """With Python's own 5 ms, the sixteen threads of a test and its gates can take turns that last for minutes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """One base of random bytes, and clones of it."""
    return make_pool(tmp_path, BASE, *CLONES)
