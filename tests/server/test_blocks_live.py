"""Flatten, compact, and the removal of snapshots, by a running server whose clients go on."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from serving import BASE, MIB, Hasty, make_pool, until, where
from supervising import supervised

from nbdclone.client import Client
from nbdclone.control.client import run_verb
from nbdclone.errors import InUse
from nbdclone.server import merger
from nbdclone.store.pool import Pool


@pytest.fixture
def pool(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(merger, "LOOK_S", 0.05)
    return make_pool(tmp_path, BASE, "web1", "web2", fs=Hasty())


def change(pool: Pool, name: str, seed: int) -> None:
    rng = random.Random(seed)
    with pool.open_clone(name) as disk:
        for _ in range(20):
            disk.pwrite(rng.randbytes(9000), rng.randrange(disk.size - 9000))


class Guest:
    """A client that reads and writes all the time, and knows what it wrote."""

    def __init__(self, client: Client, model: bytearray) -> None:
        self._client = client
        self.model = model
        self._task = asyncio.create_task(self._work())

    async def _work(self) -> None:
        rng = random.Random(9)
        while True:
            offset, length = rng.randrange(len(self.model) - 9000), rng.choice([512, 4096, 9000])
            if rng.random() < 0.5:
                data = rng.randbytes(length) if rng.random() < 0.7 else BASE[offset : offset + length]
                self.model[offset : offset + length] = data
                await self._client.pwrite(data, offset)
            else:
                assert await self._client.pread(length, offset) == self.model[offset : offset + length]
            if rng.random() < 0.05:
                await self._client.flush()

    async def end(self) -> None:
        if self._task.done():
            await self._task
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def run(pool: Pool, verb: str, **arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, lambda: run_verb(pool, verb, arguments))


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


async def test_the_base_can_go_as_soon_as_its_clone_is_flat_while_the_client_goes_on(pool: Pool) -> None:
    pool.remove(["web2"])
    async with supervised(pool) as server:
        client = await Client.connect(where(server, "web1"))
        guest = Guest(client, bytearray(BASE))
        await asyncio.sleep(0.2)
        assert (await run(pool, "flatten", name="web1"))["was_over"] == "base"
        pool.remove(["base"])
        await asyncio.sleep(0.2)
        await guest.end()
        assert await client.pread(len(BASE) // 4, MIB) == guest.model[MIB : 2 * MIB]
        await client.close()
    assert read(pool, "web1") == guest.model


async def test_a_clone_with_clients_is_compacted_only_when_that_is_asked_for(pool: Pool) -> None:
    async with supervised(pool) as server:
        client = await Client.connect(where(server, "web1"))
        await client.pwrite(BASE[: 2 * MIB], 0)
        with pytest.raises(InUse, match=r"has 1 client.*--online"):
            await run(pool, "compact", name="web1")
        guest = Guest(client, bytearray(BASE))
        done = await run(pool, "compact", name="web1", online=True)
        await guest.end()
        await client.close()
        assert done["before"] - done["after"] > MIB
        assert done["dropped"] > MIB
    assert read(pool, "web1") == guest.model


async def test_a_removed_snapshot_is_merged_in_the_background_beneath_a_client(pool: Pool) -> None:
    for number in range(3):
        change(pool, "web1", number)
        pool.snapshot(f"web1@s{number}")
    before = read(pool, "web1")
    async with supervised(pool) as server:
        client = await Client.connect(where(server, "web1"))
        guest = Guest(client, bytearray(before))
        pool.remove(["web1@s1"])
        await until(lambda: len(pool.places.layer_ids()) == 2)
        pool.remove(["web1@s2"])
        await until(lambda: len(pool.places.layer_ids()) == 1)
        await asyncio.sleep(0.1)
        await guest.end()
        await client.close()
    assert read(pool, "web1") == guest.model
    assert pool.info("web1").parent == "web1@s0"  # type: ignore[union-attr]


async def test_a_server_goes_on_at_its_start_with_what_was_left(pool: Pool) -> None:
    change(pool, "web1", 1)
    pool.snapshot("web1@s")
    before = read(pool, "web1")
    pool.remove(["web1@s"])
    async with supervised(pool):
        await until(lambda: not pool.places.layer_ids())
    assert read(pool, "web1") == before
