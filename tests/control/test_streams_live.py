"""diff and receive of clones that a server has open: the same as without one."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import pytest
from serving import BASE, where
from supervising import supervised
from test_life import THREADS, lose, read, run, run_here

from nbdclone.client import Client
from nbdclone.commands.stream import _aside
from nbdclone.control.client import set_aside
from nbdclone.control.verbs import drive
from nbdclone.errors import InUse, NotFound, UsageError
from nbdclone.store import differing
from nbdclone.store.pool import Pool
from nbdclone.store.receiving import Receiving
from nbdclone.store.sending import Sending

BLOCK = 4096
NEW = b"n" * BLOCK


def extents(found: Any) -> list[tuple[int, int, str]]:
    assert found["changed"] == sum(extent["length"] for extent in found["extents"])
    return [(extent["offset"], extent["length"], extent["kind"]) for extent in found["extents"]]


async def in_thread(function: Any, *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(THREADS, function, *args)


async def test_a_diff_of_a_clone_that_is_open_has_what_its_client_has_just_written(pool: Pool) -> None:
    pool.snapshot("web1@one")
    async with supervised(pool) as server, await Client.connect(where(server, "web1")) as client:
        await client.pwrite(NEW, 3 * BLOCK)  # no flush
        await client.trim(2 * BLOCK, 8 * BLOCK)
        wanted = [(3 * BLOCK, BLOCK, "data"), (8 * BLOCK, 2 * BLOCK, "zero")]
        for a in ("base", "web1@one"):
            assert extents(await run(pool, "diff", a=a, b="web1")) == wanted
        assert extents(await run(pool, "diff", a="web1", b="base")) == [
            (3 * BLOCK, BLOCK, "data"),
            (8 * BLOCK, 2 * BLOCK, "data"),
        ]
        await client.pwrite(BASE[:BLOCK], 0)
        assert extents(await run(pool, "diff", a="base", b="web1"))[0] == (0, BLOCK, "data")
        told = {content: await run(pool, "diff", a="base", b="web1", content=content) for content in (False, True)}
        assert extents(told[True]) == wanted
        assert await run(pool, "diff", a="web1", b="web1") == {
            "a": "web1", "b": "web1", "size": len(BASE), "changed": 0, "extents": []
        }  # fmt: skip
    for content, found in told.items():
        assert run_here(pool, "diff", a="base", b="web1", content=content) == found


async def test_two_clones_that_are_open_in_two_workers_are_compared(pool: Pool) -> None:
    async with (
        supervised(pool) as server,
        await Client.connect(where(server, "web1")) as one,
        await Client.connect(where(server, "web2")) as two,
    ):
        assert len({export["worker"] for export in await server.exports()}) == 2
        await one.pwrite(NEW, 0)
        await one.pwrite(NEW, 5 * BLOCK)
        await two.pwrite(NEW, 5 * BLOCK)
        await two.pwrite(NEW, 7 * BLOCK)
        every = [(0, BLOCK, "data"), (5 * BLOCK, BLOCK, "data"), (7 * BLOCK, BLOCK, "data")]
        assert extents(await run(pool, "diff", a="web1", b="web2")) == every
        assert extents(await run(pool, "diff", a="web1", b="web2", content=True)) == [every[0], every[2]]


async def test_a_diff_beside_snapshots_of_the_clone_tells_all_of_it(pool: Pool) -> None:
    async with supervised(pool) as server, await Client.connect(where(server, "web1")) as client:
        await client.pwrite(NEW, 9 * BLOCK)

        async def snapshots() -> None:
            for number in range(10):
                await run(pool, "snapshot", name=f"web1@s{number}")

        making = asyncio.create_task(snapshots())
        while not making.done():
            assert extents(await run(pool, "diff", a="base", b="web1")) == [(9 * BLOCK, BLOCK, "data")]
        await making


def test_a_clone_whose_layers_are_exchanged_while_it_is_compared_is_looked_at_again(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pool.open_clone("web1") as disk:
        disk.pwrite(NEW, 9 * BLOCK)
        other = pool.open_clone("base")
        seen: list[object] = []

        class Opened:
            clone = disk

            def change(self, step: Any) -> Any:
                if not seen:
                    disk.restacked += 1  # as a snapshot does
                seen.append(step)
                return step()

        with other:
            for wanted in (None, [(9 * BLOCK, BLOCK, False)]):
                assert drive(differing._find(Opened(), disk.restacked, other, disk, False)) == wanted  # type: ignore[arg-type]


async def test_a_diff_is_refused_in_the_same_words(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def words(**arguments: Any) -> list[str]:
        """Without a server, and with one."""
        with pytest.raises(UsageError) as here:
            run_here(pool, "diff", **arguments)
        async with supervised(pool):
            with pytest.raises(type(here.value)) as there:
                await run(pool, "diff", **arguments)
        return [str(here.value), str(there.value)]

    (pool.path.parent / "other.img").write_bytes(BASE[::-1])
    pool.import_base(pool.path.parent / "other.img", "other")
    assert len(set(await words(a="other", b="web1"))) == 1
    assert len(set(await words(a="none", b="web1"))) == 1
    monkeypatch.setattr(differing, "MAX_EXTENTS", 1)
    with pool.open_clone("web1") as disk:
        disk.pwrite(NEW, 0)
        disk.pwrite(NEW, 2 * BLOCK)
    with pytest.raises(UsageError, match="more than 1 places"):
        run_here(pool, "diff", a="base", b="web1")


def stream_of(pool: Pool, name: str, since: str) -> bytes:
    stream = io.BytesIO()
    with Sending(pool.places, name, since=since) as sending:
        list(sending.run(stream))
    return stream.getvalue()


@pytest.fixture(name="increment")
def make_increment(pool: Pool) -> bytes:
    """What is sent of web1@two above web1@one; web1 is at web1@one again, and unchanged."""
    pool.snapshot("web1@one")
    with pool.open_clone("web1") as disk:
        disk.pwrite(NEW, 2 * BLOCK)
    pool.snapshot("web1@two")
    stream = stream_of(pool, "web1@two", "one")
    pool.rollback("web1@one")
    pool.remove(["web1@two"])
    return stream


def receive(pool: Pool, stream: bytes, *, disconnect: bool, force: bool = False) -> None:
    def aside(clone: str) -> Any:
        return _aside(pool, clone, disconnect=disconnect)

    list(Receiving(pool.places, io.BytesIO(stream), force=force, aside=aside).run())


async def test_a_stream_for_a_clone_with_clients_is_refused_and_says_how_it_is_taken(
    pool: Pool, increment: bytes
) -> None:
    async with supervised(pool) as server, await Client.connect(where(server, "web1")) as client:
        with pytest.raises(InUse, match=r"connected: .* would change the disk under them; 'receive --disconnect'"):
            await in_thread(lambda: receive(pool, increment, disconnect=False))
        assert await client.pread(len(BASE), 0) == BASE
        await in_thread(lambda: receive(pool, increment, disconnect=True))
        await lose(client)
        wanted = BASE[: 2 * BLOCK] + NEW + BASE[3 * BLOCK :]
        assert await read(server, "web1") == await read(server, "web1@two") == wanted


async def test_a_stream_for_a_clone_that_was_changed_is_refused_with_disconnect_too(
    pool: Pool, increment: bytes
) -> None:
    async with supervised(pool) as server:
        async with await Client.connect(where(server, "web1")) as client:
            await client.pwrite(NEW, 0)
        with pytest.raises(UsageError, match="was changed since"):
            await in_thread(lambda: receive(pool, increment, disconnect=True))
        assert await read(server, "web1") == NEW + BASE[BLOCK:]
        await in_thread(lambda: receive(pool, increment, disconnect=True, force=True))
        assert await read(server, "web1") == BASE[: 2 * BLOCK] + NEW + BASE[3 * BLOCK :]


async def test_who_connects_to_a_clone_that_is_set_aside_waits_until_it_is_there_again(pool: Pool) -> None:
    async with supervised(pool) as server:
        held = set_aside(pool, "web1", disconnect=False)
        await in_thread(held.__enter__)
        connecting = asyncio.create_task(Client.connect(where(server, "web1")))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(connecting), 0.3)
        with pool.open_clone("web1") as disk:  # nobody else has it
            disk.pwrite(NEW, 0)
        await in_thread(held.__exit__, None, None, None)
        async with await connecting as client:
            assert await client.pread(BLOCK, 0) == NEW
        with pytest.raises(NotFound):
            await in_thread(lambda: set_aside(pool, "none", disconnect=False).__enter__())
