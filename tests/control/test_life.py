"""Snapshot, rollback, reset, rename, resize, rm and du: with a server whose clients are at work, and without one."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import BASE, until, where
from supervising import supervised

from nbdclone.client import Client
from nbdclone.control.client import run_verb
from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import InUse, NameTaken, NotFound, ServerRefused, UsageError
from nbdclone.server.supervisor import Supervisor
from nbdclone.store.pool import Pool

BLOCK = 4096
# Of their own: the server in this process needs those of the event loop.
THREADS = ThreadPoolExecutor(16)


async def run(pool: Pool, verb: str, **arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(THREADS, run_verb, pool, verb, arguments)


def run_here(pool: Pool, verb: str, **arguments: Any) -> Any:
    return drive(find_verb(verb).begin(LocalTarget(pool), arguments))


async def read(server: Supervisor, name: str) -> bytes:
    async with await Client.connect(where(server, name)) as client:
        return await client.pread(client.size, 0)


async def lose(client: Client) -> None:
    """The server has ended this connection."""
    with pytest.raises((ConnectionError, ServerRefused)):
        await client.pread(BLOCK, 0)


@asynccontextmanager
async def writing(client: Client) -> AsyncIterator[list[int]]:
    """Block n % 64 gets the number n, one after the other; how many were acknowledged."""
    written = [0]

    async def work() -> None:
        while True:
            number = written[0] + 1
            await client.pwrite(number.to_bytes(8, "big") * 512, number % 64 * BLOCK)
            written[0] = number

    task = asyncio.create_task(work())
    try:
        yield written
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def reach(written: list[int], more: int) -> None:
    wanted = written[0] + more
    await until(lambda: written[0] >= wanted)


# Snapshots


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_snapshot_of_a_clone_that_a_client_writes_holds_what_was_acknowledged(pool: Pool, workers: int) -> None:
    async with supervised(pool, workers) as server:
        async with await Client.connect(where(server, "web1")) as client:
            async with writing(client) as written:
                bounds = []
                for name in ("a", "b", "c"):
                    await reach(written, 100)
                    before = written[0]
                    made = await run(pool, "snapshot", name=f"web1@{name}")
                    assert (made["kind"], made["name"]) == ("snapshot", f"web1@{name}")
                    bounds.append((name, before, written[0] + 1))
            for name, before, after in bounds:
                found = await read(server, f"web1@{name}")
                numbers = [int.from_bytes(found[slot * BLOCK : slot * BLOCK + 8], "big") for slot in range(64)]
                assert before <= max(numbers) <= after
                assert all(number > max(numbers) - 64 for number in numbers)
                assert all(found[n % 64 * BLOCK :][:BLOCK] == n.to_bytes(8, "big") * 512 for n in numbers)
                assert found[64 * BLOCK :] == BASE[64 * BLOCK :]
        assert pool.names() == ["base", "web1", "web1@a", "web1@b", "web1@c", "web2"]


async def test_a_snapshot_is_a_read_only_export_and_clones_of_it_are_served(pool: Pool) -> None:
    async with supervised(pool, 2) as server, await Client.connect(where(server, "web1")) as client:
        await client.pwrite(b"golden" * 1000, 100)
        await run(pool, "snapshot", name="web1@golden")
        await client.pwrite(b"later!" * 1000, 100)
        golden = BASE[:100] + b"golden" * 1000 + BASE[6100:]
        async with await Client.connect(where(server, "web1@golden")) as other:
            assert other.read_only
            assert await other.pread(len(BASE), 0) == golden
        pool.create_clones("web1@golden", ["web3"])
        async with await Client.connect(where(server, "web3")) as third:
            await third.pwrite(b"x", 0)
            assert await third.pread(len(BASE), 0) == b"x" + golden[1:]
        assert await read(server, "web1@golden") == golden


async def test_a_snapshot_is_served_by_the_worker_of_its_clone(pool: Pool) -> None:
    run_here(pool, "snapshot", name="web1@a")
    async with supervised(pool, 2) as server:
        async with (
            await Client.connect(where(server, "web1@a")) as client,
            await Client.connect(where(server, "web1")) as other,
        ):
            assert await client.pread(10, 0) == await other.pread(10, 0) == BASE[:10]
            found = {export["name"]: export["worker"] for export in await server.exports()}
            assert found["web1"] == found["web1@a"]
        assert (await run(pool, "disconnect", name="web1@a"))["disconnected"] == []


@pytest.mark.parametrize(
    ("name", "error"), [("base@x", UsageError), ("web1", UsageError), ("web9@x", NotFound), ("web1@a", NameTaken)]
)
async def test_a_snapshot_that_cannot_be_is_refused(pool: Pool, name: str, error: type[Exception]) -> None:
    run_here(pool, "snapshot", name="web1@a")
    with pytest.raises(error):
        run_here(pool, "snapshot", name=name)
    async with supervised(pool, 1):
        with pytest.raises(error):
            await run(pool, "snapshot", name=name)
    assert pool.names() == ["base", "web1", "web1@a", "web2"]


# Rollback and reset


async def test_going_back_is_refused_while_a_client_is_connected_who_is_named(pool: Pool) -> None:
    run_here(pool, "snapshot", name="web1@a")
    async with supervised(pool, 1) as server, await Client.connect(where(server, "web1")) as client:
        await client.pwrite(b"mine", 0)
        for verb, name in (("rollback", "web1@a"), ("reset", "web1")):
            with pytest.raises(InUse, match=rf"'web1' is in use; connected: .*uid {os.geteuid()}"):
                await run(pool, verb, name=name)
            report = await run(pool, verb, name=name, dry_run=True)
            assert (report["done"], len(report["clients"]), report["name"]) == (False, 1, "web1")
        assert await client.pread(4, 0) == b"mine"


async def test_with_disconnect_clients_are_sent_away_and_come_back_to_what_it_was(pool: Pool) -> None:
    async with supervised(pool, 2) as server:
        client = await Client.connect(where(server, "web1"))
        other = await Client.connect(where(server, "web2"))
        await client.pwrite(b"golden", 0)
        await run(pool, "snapshot", name="web1@golden")
        await client.pwrite(b"wasted" * BLOCK, 0)
        report = await run(pool, "rollback", name="web1@golden", disconnect=True)
        assert (report["done"], report["to"], len(report["clients"])) == (True, "web1@golden", 1)
        assert report["freed"] >= 6 * BLOCK
        await lose(client)
        assert await read(server, "web1") == b"golden" + BASE[6:]
        report = await run(pool, "reset", name="web1", disconnect=True)
        assert (report["to"], report["later"]) == ("base", ["web1@golden"])
        assert await read(server, "web1") == BASE
        assert await read(server, "web1@golden") == b"golden" + BASE[6:]
        assert await other.pread(10, 0) == BASE[:10]
        await other.close()
        await client.close()


async def test_who_comes_while_a_clone_goes_back_waits_and_sees_what_it_is_then(pool: Pool) -> None:
    """Many that connect again at once, and write what they find: none of it is lost, or found in the other state."""
    run_here(pool, "snapshot", name="web1@a")
    stop = False
    seen: set[bytes] = set()
    async with supervised(pool, 2) as server:

        async def come_and_go() -> None:
            while not stop:
                try:
                    async with await Client.connect(where(server, "web1")) as client:
                        found = await client.pread(BLOCK, 0)
                        seen.add(found)
                        await client.pwrite(b"x" * BLOCK, 0)
                        assert await client.pread(BLOCK, 0) == b"x" * BLOCK
                except (ConnectionError, ServerRefused):
                    pass

        tasks = [asyncio.create_task(come_and_go()) for _ in range(4)]
        done = 0
        while done < 8:
            await asyncio.sleep(0.02)
            await run(pool, "rollback", name="web1@a", disconnect=True)
            done += 1
        stop = True
        await asyncio.gather(*tasks)
    assert seen <= {BASE[:BLOCK], b"x" * BLOCK}
    assert BASE[:BLOCK] in seen


# Rename


async def test_a_rename_waits_for_no_client_and_refuses_while_one_is_there(pool: Pool) -> None:
    run_here(pool, "snapshot", name="web1@a")
    async with supervised(pool, 2) as server:
        for name in ("web1", "web1@a"):
            async with await Client.connect(where(server, name)):
                with pytest.raises(InUse, match="'web1' is in use; connected: "):
                    await run(pool, "rename", old="web1", new="db1")
        async with await Client.connect(where(server, "web1")) as client:
            await client.pwrite(b"mine", 0)
            await run(pool, "rename", old="web1@a", new="web1@b")  # the clone itself may be in use
            assert await client.pread(4, 0) == b"mine"
            done = await run(pool, "rename", old="web1", new="db1", disconnect=True)
            assert len(done["clients"]) == 1
            await lose(client)
        assert await read(server, "db1") == b"mine" + BASE[4:]
        assert await read(server, "db1@b") == BASE
        with pytest.raises(ServerRefused):
            await Client.connect(where(server, "web1"))
        pool.create_clones("base", ["web1"])
        assert await read(server, "web1") == BASE
        await run(pool, "rename", old="base", new="debian")
        assert await read(server, "debian") == BASE
        with pytest.raises(NameTaken):
            await run(pool, "rename", old="db1", new="web1")
    assert pool.names() == ["db1", "db1@b", "debian", "web1", "web2"]


# Resize


async def test_a_clone_grows_under_its_client_and_the_next_sees_it(pool: Pool) -> None:
    size = 2 * len(BASE)
    async with supervised(pool, 1) as server, await Client.connect(where(server, "web1")) as client:
        async with writing(client) as written:
            await reach(written, 50)
            report = await run(pool, "resize", name="web1", size=size)
            assert (report["before"], report["size"], report["cut"]) == (len(BASE), size, 0)
            await reach(written, 50)
        assert client.size == len(BASE)
        async with await Client.connect(where(server, "web1")) as other:
            assert other.size == size
            assert await other.pread(len(BASE), len(BASE)) == bytes(len(BASE))
            await other.pwrite(b"at the end", size - 10)
            await other.flush()
        assert await client.pread(10, len(BASE) - 10) == BASE[-10:]
    with pool.open_clone("web1") as disk:
        assert disk.pread(10, size - 10) == b"at the end"


async def test_a_clone_shrinks_by_force_alone_and_without_clients(pool: Pool) -> None:
    size = len(BASE) - 10 * BLOCK
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"x" * 3 * BLOCK, size)
    async with supervised(pool, 1) as server:
        with pytest.raises(UsageError, match=f"lose its last {10 * BLOCK} bytes, {3 * BLOCK} of which it has written"):
            await run(pool, "resize", name="web1", size=size)
        async with await Client.connect(where(server, "web1")) as client:
            with pytest.raises(InUse, match="connected: "):
                await run(pool, "resize", name="web1", size=size, force=True)
            assert client.size == len(BASE)
        told = await run(pool, "resize", name="web1", size=size, dry_run=True)
        assert (told["done"], told["lost"]) == (False, 3 * BLOCK)
        assert pool.info("web1").size == len(BASE)
        report = await run(pool, "resize", name="web1", size=size, force=True)
        assert (report["done"], report["cut"], report["lost"]) == (True, 10 * BLOCK, 3 * BLOCK)
        assert await read(server, "web1") == BASE[:size]
        await run(pool, "resize", name="web1", size=len(BASE))
        assert await read(server, "web1") == BASE[:size] + bytes(10 * BLOCK)


async def test_snapshots_and_growth_at_once_do_not_wait_for_each_other_for_ever(pool: Pool) -> None:
    async with supervised(pool, 1) as server, await Client.connect(where(server, "web1")) as client:
        async with writing(client):
            work = [run(pool, "snapshot", name=f"web1@s{number}") for number in range(6)]
            work += [run(pool, "resize", name="web1", size=(2 + number) * len(BASE)) for number in range(6)]
            results = await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 60)
        assert all(isinstance(result, dict | UsageError) for result in results), results
    assert len(pool.names()) == 3 + 6


# What takes space


async def test_rm_names_the_clients_and_says_what_comes_free(pool: Pool) -> None:
    run_here(pool, "snapshot", name="web1@a")
    async with supervised(pool, 2) as server:
        for name in ("web1", "web1@a"):
            async with await Client.connect(where(server, name)):
                with pytest.raises(InUse, match=rf"nothing was removed; connected to '{name}': .*uid {os.geteuid()}"):
                    await run(pool, "rm", names=["web2", name])
        report = await run(pool, "rm", names=["web1"], dry_run=True)
        assert report["freed"] > 0
        assert len(report["layers"]) == 1
        assert not report["done"]
        assert "web1" in pool.names()
        assert await run(pool, "rm", names=["web1"]) == report | {"done": True}
        with pytest.raises(InUse, match="base 'base' is needed by 1"):
            await run(pool, "rm", names=["base"], dry_run=True)
        for names, error in ((["web9"], NotFound), ([], UsageError)):
            with pytest.raises(error):
                await run(pool, "rm", names=names)
    assert pool.names() == ["base", "web2"]


async def test_du_is_the_same_with_and_without_a_server(pool: Pool) -> None:
    with pool.open_clone("web1") as disk:
        disk.pwrite(os.urandom(9 * BLOCK), 0)
    here = run_here(pool, "du", names=[])
    assert {entry["name"] for entry in here["entries"]} == {"base", "web1", "web2"}
    async with supervised(pool, 1):
        there = await run(pool, "du", names=[])
    assert there["entries"] == here["entries"]
    assert [entry["name"] for entry in run_here(pool, "du", names=["web1"])["entries"]] == ["web1"]


def test_without_a_server_the_verbs_do_the_same(pool: Pool, tmp_path: Path) -> None:
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"mine", 0)
    run_here(pool, "snapshot", name="web1@a")
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"lost", 0)
        with pytest.raises(InUse, match="in use by this process"):
            run_here(pool, "rollback", name="web1@a")
    run_here(pool, "rollback", name="web1@a")
    run_here(pool, "rename", old="web1", new="db1")
    run_here(pool, "resize", name="db1", size=len(BASE) + BLOCK)
    with pool.open_clone("db1") as disk:
        assert disk.pread(disk.size, 0) == b"mine" + BASE[4:] + bytes(BLOCK)
    assert run_here(pool, "reset", name="db1", dry_run=True)["to"] == "base"
    run_here(pool, "reset", name="db1")
    run_here(pool, "rm", names=["db1", "web2", "base"])
    assert pool.names() == []
