"""Limits that no other test meets: what is beyond them waits, is done in part, or is refused in a line."""

from __future__ import annotations

import os

import pytest
from serving import MIB, Peer, serving, until

from nbdclone.errors import UsageError
from nbdclone.protocol.requests import Request
from nbdclone.protocol.wire import CMD_CACHE, CMD_READ, Mode
from nbdclone.server import budget, session
from nbdclone.server.server import Server
from nbdclone.store.clone import Clone
from nbdclone.store.pool import Pool


@pytest.mark.parametrize(
    ("machine", "lent"), [(64 << 30, 1 << 30), (4 << 30, 1 << 30), (2 << 30, 512 << 20), (1 << 29, 256 << 20)]
)
def test_a_server_lends_a_quarter_of_the_machine_within_bounds(
    machine: int, lent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": machine // 4096}.__getitem__)
    assert budget.default_memory() == lent


def test_a_server_that_may_not_lend_enough_does_not_begin(pool: Pool) -> None:
    Server(pool, max_memory=budget.MIN_MEMORY)
    with pytest.raises(UsageError, match=f"the least is {budget.MIN_MEMORY}"):
        Server(pool, max_memory=budget.MIN_MEMORY - 1)


async def test_of_a_long_cache_hint_only_the_beginning_is_read(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_PREFETCH", MIB)
    asked = []
    monkeypatch.setattr(Clone, "prefetch", lambda clone, offset, length: asked.append((offset, length)))
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        for length in (4096, 3 * MIB):
            assert (await peer.run(CMD_CACHE, 512, length)).error == 0
    assert asked == [(512, 4096), (512, MIB)]


async def test_no_more_is_received_while_replies_wait_in_too_many_pieces(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_PIECES", 8)
    monkeypatch.setattr(session, "MAX_UNSENT", 1 << 40)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.SIMPLE) as peer:
        [connection] = server._connections
        theirs = connection._session
        assert theirs is not None
        taken = 0
        run = theirs.run

        def count(requests: list[Request], buffer: memoryview) -> int:
            nonlocal taken
            taken += len(requests)
            return run(requests, buffer)

        monkeypatch.setattr(theirs, "run", count)
        sent = 0
        while theirs._input.active:
            await peer.send(peer.request(CMD_READ, 0, 100_000, cookie=sent))
            sent += 1
            await until(lambda expected=sent: taken == expected)  # type: ignore[misc]
        assert 8 <= theirs._output.pieces <= 8 + 2
        for _ in range(sent):
            assert len((await peer.reply()).data) == 100_000
        await until(lambda: theirs._input.active)
