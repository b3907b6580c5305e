"""A server that is killed again and again while clients write: what was flushed is there, the rest is old or new.

SIGKILL is no power cut: the kernel keeps what was written. What is lost is everything that the server knew and had not
written, which is what this is about; power cuts are simulated in the tests of the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from integration.served import Served, make_pool, served, sha256_of_file
from nbdclone.client import Client
from nbdclone.errors import NBDCloneError
from nbdclone.store.pool import Pool

pytestmark = pytest.mark.timeout(120)

SEED = 20
ROUNDS = 25
LONGEST_ROUND_S = 0.15
SECTOR = 512
SECTORS = 4096
SHARED = 1024  # sectors at the beginning, where the writers' places alternate within blocks
PLACE = 5  # sectors of such a place
WRITERS = 3
ZEROS = 0


def content(sector: int, version: int) -> bytes:
    """What a sector holds that was written as this version of it: both can be told from it. The base's is 1."""
    return bytes(SECTOR) if version == ZEROS else (sector.to_bytes(8) + version.to_bytes(8)) * (SECTOR // 16)


class Model:
    """The versions that each sector may show. A sector has one writer, who has one request in flight."""

    def __init__(self) -> None:
        self.latest = 1
        self.versions: list[list[int]] = [[1] for _ in range(SECTORS)]  # all since the last crash, oldest first
        self.acknowledged = [1] * SECTORS  # how many of them
        self.durable = [0] * SECTORS  # the newest that is known to be, as an index

    def begin(self, first: int, count: int, *, zeros: bool) -> int:
        self.latest += 1
        version = ZEROS if zeros else self.latest
        for sector in range(first, first + count):
            self.versions[sector].append(version)
        return version

    def acknowledge(self, first: int, count: int, *, durable: bool) -> None:
        for sector in range(first, first + count):
            self.acknowledged[sector] = len(self.versions[sector])
            if durable:
                self.durable[sector] = len(self.versions[sector]) - 1

    def flushed(self, acknowledged: list[int]) -> None:
        """A flush has ended that began when so many versions were acknowledged."""
        self.durable = [max(old, count - 1) for old, count in zip(self.durable, acknowledged, strict=True)]

    def wrong_sectors(self, data: bytes, *, crashed: bool) -> list[tuple[int, list[int], bytes]]:
        """The sectors whose content cannot be, with what it could have been. What they hold now is where they go on."""
        wrong = []
        for sector in range(SECTORS):
            found = data[sector * SECTOR : (sector + 1) * SECTOR]
            oldest = self.durable[sector] if crashed else self.acknowledged[sector] - 1
            possible = self.versions[sector][oldest:]
            shown = [version for version in possible if content(sector, version) == found]
            if not shown:
                wrong.append((sector, possible, found[:16]))
            self.versions[sector] = shown[-1:] or [1]
        self.acknowledged = [1] * SECTORS
        self.durable = [0] * SECTORS
        return wrong


def place(rng: random.Random, writer: int) -> tuple[int, int]:
    """Some of the writer's own sectors: (first, count)."""
    if rng.random() < 0.6:
        place = rng.randrange(SHARED // PLACE // WRITERS) * WRITERS + writer
        start, size = place * PLACE, PLACE
    else:
        size = (SECTORS - SHARED) // WRITERS
        start = SHARED + writer * size
    first = rng.randrange(size)
    count = 1 + int((size - first) * rng.random() ** 4)
    return start + first, min(count, size - first)


async def write(client: Client, model: Model, rng: random.Random, writer: int) -> None:
    """Write, zero and flush until the server dies."""
    while True:
        chance = rng.random()
        if chance < 0.1:
            acknowledged = list(model.acknowledged)
            await client.flush()
            model.flushed(acknowledged)
            continue
        first, count = place(rng, writer)
        fua = rng.random() < 0.05
        version = model.begin(first, count, zeros=chance < 0.3)
        if chance < 0.2:
            await client.trim(count * SECTOR, first * SECTOR, fua=fua)
        elif chance < 0.3:
            await client.zero(count * SECTOR, first * SECTOR, fua=fua, no_hole=rng.random() < 0.3)
        else:
            data = b"".join(content(sector, version) for sector in range(first, first + count))
            await client.pwrite(data, first * SECTOR, fua=fua)
        model.acknowledge(first, count, durable=fua)


async def write_until(uri: str, model: Model, rng: random.Random, seconds: float, end: object) -> None:
    """Have all writers at work for a while, then ``end`` the server under them."""

    async def run(writer: int) -> None:
        with contextlib.suppress(NBDCloneError):
            async with await Client.connect(uri) as client:
                await write(client, model, random.Random(rng.random()), writer)

    writers = [asyncio.create_task(run(writer)) for writer in range(WRITERS)]
    await asyncio.sleep(seconds)
    assert callable(end)
    end()
    await asyncio.gather(*writers)


def test_after_every_kill_what_was_flushed_is_there_and_the_rest_is_old_or_new(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    image = tmp_path / "image.raw"
    image.write_bytes(b"".join(content(sector, 1) for sector in range(SECTORS)))
    pool = make_pool(tmp_path / "pool", image, "clone")
    model = Model()

    async def read(uri: str) -> bytes:
        async with await Client.connect(uri) as client:
            return await client.pread(SECTORS * SECTOR, 0)

    for round_number in range(ROUNDS):
        with served(pool) as server:
            uri = server.uri("clone")
            wrong = model.wrong_sectors(asyncio.run(read(uri)), crashed=True)
            assert not wrong, f"after round {round_number}: {wrong[:5]} and {len(wrong)} in all"
            asyncio.run(write_until(uri, model, rng, rng.random() * LONGEST_ROUND_S, server.kill))
    assert model.latest > 10 * ROUNDS, "hardly anything was written"

    # And at last one that is told to stop: it has flushed what it had acknowledged.
    with served(pool) as server:
        uri = server.uri("clone")
        assert model.wrong_sectors(asyncio.run(read(uri)), crashed=True) == []
        asyncio.run(write_until(uri, model, rng, LONGEST_ROUND_S, server.stop))
    with Pool.open(pool).open_clone("clone") as clone:
        assert model.wrong_sectors(clone.pread(SECTORS * SECTOR, 0), crashed=False) == []
    assert sha256_of_file(pool / "bases" / "base" / "image") == sha256_of_file(image)


def test_a_flush_after_a_kill_covers_what_was_acknowledged_before_the_kill(tmp_path: Path) -> None:
    """A client that reconnects, such as qemu, repeats what was not acknowledged. The rest it takes for written."""
    image = tmp_path / "image.raw"
    image.write_bytes(b"".join(content(sector, 1) for sector in range(8)))
    pool = make_pool(tmp_path / "pool", image, "clone")

    async def write_and_kill(server: Served) -> None:
        async with await Client.connect(server.uri("clone")) as client:
            await client.pwrite(content(0, 2), 0)
            server.kill()

    async def flush_and_read(server: Served) -> bytes:
        async with await Client.connect(server.uri("clone")) as client:
            await client.flush()
            return await client.pread(SECTOR, 0)

    with served(pool) as server:
        asyncio.run(write_and_kill(server))
    with served(pool) as server:
        assert asyncio.run(flush_and_read(server)) == content(0, 2)
