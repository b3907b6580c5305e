"""A pool, and verbs that the tests register: here, and in every process that is started."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import sampleverbs
import uvloop
from serving import BASE, CLONES, make_pool

from nbdclone.control.verbs import VERBS
from nbdclone.store.pool import Pool


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """One base of random bytes, and clones of it."""
    return make_pool(tmp_path, BASE, *CLONES)


@pytest.fixture(autouse=True)
def _samples(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python imports sitecustomize when it starts."""
    for verb in sampleverbs.SAMPLES:
        monkeypatch.setitem(VERBS, verb.name, verb)
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text("import sampleverbs\nsampleverbs.register()\n")
    monkeypatch.syspath_prepend(str(site))
