"""What a greedy client leaves to the others: what is theirs by right, and by its limits."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.fairness import KINDS, QUIET, Quiet, Raw, greedy, percentile, request, target
from integration.served import Served, make_pool, served
from nbdclone.protocol.wire import Command

pytestmark = pytest.mark.alone

SECONDS = 0.3
TRIES = 3
# Of what a quiet client feels while the greedy one is at work on another server, for that takes the processor too. A
# client of 1,024 cold reads made it 28 ms before there were turns.
MAX_TIMES = 5
MAX_MORE_MS = 5
# A tenth of a second's burst in three seconds, and what a busy machine's timers are late.
LIMITED_S = 3.0
TOLERANCE = 0.08


@pytest.fixture(scope="module", name="servers")
def serve() -> Iterator[list[tuple[Served, Quiet, Path]]]:
    """A quiet client's, and another."""
    with contextlib.ExitStack() as stack:
        both = []
        for _ in range(2):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nbdclone-", dir="/var/tmp")))
            server, quiet = stack.enter_context(target(directory))
            both.append((server, quiet, directory / "pool"))
        yield both


@pytest.mark.parametrize("kind", ["many-reads", "medium-reads", "large-reads", "flushes", "many-cold-reads"])
@pytest.mark.parametrize("work", ["warm_read", "cold_read"])
def test_a_quiet_client_is_not_kept_waiting(servers: list[tuple[Served, Quiet, Path]], kind: str, work: str) -> None:
    (served, quiet, pool), (other, _quiet, other_pool) = servers
    apart, beside = [], []
    for _ in range(TRIES):
        with greedy(kind, other, other_pool):
            apart.append(percentile(quiet.feel(getattr(quiet, work), SECONDS), 0.99))
        with greedy(kind, served, pool):
            beside.append(percentile(quiet.feel(getattr(quiet, work), SECONDS), 0.99))
    print(f"{KINDS[kind].what}: p99 of a {work} beside those of another server {apart} ms, of its own {beside} ms")
    assert statistics.median(beside) < MAX_TIMES * statistics.median(apart) + MAX_MORE_MS


def ask_again_and_again(path: str, command: int, length: int, depth: int, until: float) -> int:
    """One connection with so many requests in flight: how many were answered."""
    message = request(command, 0, length) + (bytes(range(256)) * (length // 256) if command == Command.WRITE else b"")
    reply = 16 + (length if command == Command.READ else 0)
    with contextlib.closing(Raw(path, QUIET)) as client:
        client.sock.sendall(message * depth)
        answered = 0
        while True:
            client.receive(reply)
            if time.monotonic() > until:
                return answered
            answered += 1
            client.sock.sendall(message)


@pytest.fixture(scope="module", name="limited_pool")
def make_limited_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("limited")
    image = directory / "image.raw"
    image.write_bytes(bytes(range(256)) * 4096)
    return make_pool(directory / "pool", image, QUIET)


@pytest.mark.parametrize(("connections", "depth"), [(1, 1), (1, 64), (4, 16)])
@pytest.mark.parametrize("command", [Command.READ, Command.WRITE])
@pytest.mark.parametrize(("option", "rate", "length"), [("--iops", 1000, 4096), ("--bps", 16 << 20, 16 << 10)])
def test_limits_hold(
    limited_pool: Path, command: int, connections: int, depth: int, option: str, rate: int, length: int
) -> None:
    unit = 1 if option == "--iops" else length
    with served(limited_pool, option, str(rate)) as limited:
        until = time.monotonic() + LIMITED_S
        answered: list[int] = []
        threads = [
            threading.Thread(
                target=lambda: answered.append(ask_again_and_again(limited.socket, command, length, depth, until))
            )
            for _ in range(connections)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    measured = sum(answered) * unit / LIMITED_S
    print(f"{option} {rate}, {connections} x {depth} in flight: {measured:.0f}, {measured / rate - 1:+.1%}")
    assert len(answered) == connections
    assert abs(measured / rate - 1) < TOLERANCE
