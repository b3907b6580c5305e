"""Clients that mean harm, and a quiet one beside them, which has to be served all the same."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from integration.bench.processes import memory_mb
from integration.hostile import ATTACKS, feel_beside, target
from integration.served import Served

pytestmark = pytest.mark.alone

SECONDS = 2.0
# Generous: the machines of CI are slow and shared. Without its bounds the server fails by far more: the quiet client
# then gets no answer in the whole time, or the server takes several GB.
MAX_P99_MS = 250.0
MAX_MEMORY = 512 << 20  # of which twice may be held, and the process itself
MAX_RSS_MB = 1500.0
FILES = 12_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, hard), hard))
    with target(tmp_path_factory.mktemp("hostile"), "--max-memory", str(MAX_MEMORY)) as server:
        yield server
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_quiet_client_is_served_beside(attack: str, server: Served) -> None:
    beside = feel_beside(attack, server, SECONDS)
    after = feel_beside("", server, SECONDS / 2)
    assert beside.requests > 20
    assert beside.p99_ms < MAX_P99_MS
    assert after.p99_ms < MAX_P99_MS
    assert max(beside.server_mb, memory_mb(server.pid, "VmRSS")) < MAX_RSS_MB


def test_strangers_do_not_fill_the_log(server: Served) -> None:
    assert len(server.stderr.read_text().splitlines()) < 100
