"""Rebase through a server: of clones that clients write to, and of those that nobody has open."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from serving import BASE, BASE_SIZE, where
from supervising import supervised

from nbdclone.client import Client
from nbdclone.control.client import run_verb
from nbdclone.errors import InUse
from nbdclone.store.pool import Pool

BLOCK = 4096


@pytest.fixture(name="pool")
def make_new(pool: Pool, tmp_path: Path) -> Pool:
    """With a base 'new' that differs in a tenth of the blocks."""
    rng = random.Random(1)
    image = bytearray(BASE)
    for block in rng.sample(range(BASE_SIZE // BLOCK), BASE_SIZE // BLOCK // 10):
        image[block * BLOCK : (block + 1) * BLOCK] = rng.randbytes(BLOCK)
    (tmp_path / "new.img").write_bytes(image)
    pool.import_base(tmp_path / "new.img", "new")
    return pool


@pytest.mark.parametrize("snapshot", [False, True])
async def test_a_clone_goes_to_another_base_while_its_client_writes(pool: Pool, snapshot: bool) -> None:
    if snapshot:
        pool.snapshot("web1@golden")
    expected = bytearray(BASE)
    async with supervised(pool) as server, await Client.connect(where(server, "web1")) as client:
        done = asyncio.Event()

        async def work() -> int:
            rng, count = random.Random(2), 0
            while not done.is_set() or count < 50:
                offset, data = rng.randrange(BASE_SIZE - 9000), rng.randbytes(rng.randrange(1, 9000))
                await client.pwrite(data, offset)
                expected[offset : offset + len(data)] = data
                at = rng.randrange(BASE_SIZE - 9000)
                assert await client.pread(9000, at) == expected[at : at + 9000]
                count += 1
            return count

        working = asyncio.create_task(work())
        arguments = {"names": ["web1", "web2"], "onto": "new"}
        result = await asyncio.to_thread(run_verb, pool, "rebase", arguments)
        done.set()
        await working
        assert [line["state"] for line in result["clones"]] == ["done", "done"]
        assert await client.pread(BASE_SIZE, 0) == expected
        await asyncio.to_thread(pool.remove, ["base"])  # nobody has it open any more
        assert await client.pread(BASE_SIZE, 0) == expected
    with pool.open_clone("web1") as disk:
        assert disk.pread(BASE_SIZE, 0) == expected
    with pool.open_clone("web2") as disk:
        assert disk.pread(BASE_SIZE, 0) == BASE


async def test_changes_are_not_kept_while_a_client_is_connected(pool: Pool) -> None:
    async with supervised(pool) as server, await Client.connect(where(server, "web1")) as client:
        arguments = {"names": ["web2", "web1"], "onto": "new", "keep_changes": True}
        with pytest.raises(InUse, match="clone 'web1' is in use"):
            await asyncio.to_thread(run_verb, pool, "rebase", arguments)
        assert await client.pread(BASE_SIZE, 0) == BASE
    with pool.open_clone("web2") as disk:
        assert disk.pread(BASE_SIZE, 0) == BASE
