"""A server that is killed again and again while clients write: all that was acknowledged is there, the rest old or new.

SIGKILL is no power cut: the kernel keeps what was written. What is lost is everything that the server knew and had not
written, which is what this is about. Power cuts are in test_power.py, and simulated in the tests of the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from integration.served import Served, make_pool, served, sha256_of_file
from nbdclone.client import Client
from nbdclone.errors import NBDCloneError
from nbdclone.store.layer import SEGMENT_SIZE
from nbdclone.store.pool import Pool

KILLS = int(os.environ.get("KILLS", "25"))
SECONDS_FOR_A_KILL = 5  # at most, on a busy machine
SEED = 20
LONGEST_ROUND_S = 0.15
LONGEST_STOP_S = 0.1  # from the request to stop until the kill: a server that has written little is gone by then
CLONES = ("one", "two")
CONNECTIONS = 2  # to each clone
WRITERS = 3  # of each clone; some share a connection
SECTOR = 512
ZEROS = bytes(SECTOR)

# A writer has one request in flight and sectors of its own, which are numbered without a gap and lie in two windows: at
# the beginning of the disk, and around the border of its segments.
SECTORS = 4096
FIRST_WINDOW = 2048
SECOND_WINDOW_AT = SEGMENT_SIZE - 700 * SECTOR
SIZE = SECOND_WINDOW_AT + (SECTORS - FIRST_WINDOW) * SECTOR
SHARED = 1024  # sectors at the beginning, where the writers' places alternate within blocks
PLACE = 5  # sectors of such a place

pytestmark = pytest.mark.timeout(60 + KILLS * SECONDS_FOR_A_KILL)


def content(sector: int, version: int) -> bytes:
    """What a sector holds that was written as this version of it: both can be told from it. The base's is 1."""
    return (sector.to_bytes(8) + version.to_bytes(8)) * (SECTOR // 16)


def on_disk(position: int) -> int:
    """Where on the disk a byte of the numbered sectors is."""
    return position if position < FIRST_WINDOW * SECTOR else position - FIRST_WINDOW * SECTOR + SECOND_WINDOW_AT


class Model:
    """What each sector of a clone may hold: what was acknowledged last and, after it, what was sent since."""

    def __init__(self) -> None:
        self.latest = 1
        self._possible = [[content(sector, 1)] for sector in range(SECTORS)]

    def begin(self, position: int, data: bytes) -> range:
        """A write of bytes is sent: the sectors that it is about, each of which may be changed from now on."""
        self.latest += 1
        sectors = range(position // SECTOR, -(-(position + len(data)) // SECTOR))
        whole = bytearray(b"".join(self._possible[sector][-1] for sector in sectors))
        lead = position % SECTOR
        whole[lead : lead + len(data)] = data
        for at, sector in enumerate(sectors):
            self._possible[sector].append(bytes(whole[at * SECTOR : (at + 1) * SECTOR]))
        return sectors

    def acknowledge(self, sectors: range) -> None:
        for sector in sectors:
            del self._possible[sector][:-1]

    def wrong_sectors(self, data: bytes) -> list[tuple[int, list[bytes], bytes]]:
        """The sectors that hold what they cannot, with what they could. What each holds now is where it goes on."""
        wrong = []
        for sector, possible in enumerate(self._possible):
            found = data[sector * SECTOR : (sector + 1) * SECTOR]
            if found not in possible:
                wrong.append((sector, [each[:16] for each in possible], found[:16]))
            self._possible[sector] = [found]
        return wrong


def place(rng: random.Random, writer: int) -> tuple[int, int]:
    """Some of the writer's own sectors, all in one window: (first, count)."""
    if rng.random() < 0.6:
        place = rng.randrange(SHARED // PLACE // WRITERS) * WRITERS + writer
        start, size = place * PLACE, PLACE
    else:
        size = (SECTORS - SHARED) // WRITERS
        start = SHARED + writer * size
    first = rng.randrange(size)
    count = 1 + int((size - first) * rng.random() ** 4)
    return start + first, min(count, size - first)


async def write(client: Client, model: Model, rng: random.Random, writer: int, done: Counter[str]) -> None:
    """Write, zero, trim and flush until the server dies."""
    while True:
        chance = rng.random()
        if chance < 0.1:
            await client.flush()
            done["flushes"] += 1
            continue
        first, count = place(rng, writer)
        position, length = first * SECTOR, count * SECTOR
        if rng.random() < 0.25:  # not whole sectors
            position += rng.randrange(SECTOR)
            length = max(length - SECTOR - rng.randrange(SECTOR), 1)
        offset = on_disk(position)
        fua = rng.random() < 0.05
        if chance < 0.3:
            sectors = model.begin(position, bytes(length))
            if chance < 0.2:
                await client.trim(length, offset, fua=fua)
            else:
                await client.zero(length, offset, fua=fua, no_hole=rng.random() < 0.3)
        else:
            data = b"".join(content(sector, model.latest + 1) for sector in range(first, first + count + 1))
            data = data[position % SECTOR :][:length]
            sectors = model.begin(position, data)
            await client.pwrite(data, offset, fua=fua)
        model.acknowledge(sectors)
        done["trims" if chance < 0.2 else "zeroes" if chance < 0.3 else "writes"] += 1


async def write_until(
    server: Served, models: dict[str, Model], rng: random.Random, end: Callable[[], None]
) -> Counter[str]:
    """Have the writers of all clones at work for a while, then ``end`` the server under them. What they got done."""
    done: Counter[str] = Counter()

    async def run(client: Client, model: Model, writer: int, seed: float) -> None:
        with contextlib.suppress(NBDCloneError):
            await write(client, model, random.Random(seed), writer, done)

    async with contextlib.AsyncExitStack() as connected:
        writers = []
        for clone, model in models.items():
            clients = [await connected.enter_async_context(await connect(server, clone)) for _ in range(CONNECTIONS)]
            for writer in range(WRITERS):
                writers.append(asyncio.create_task(run(clients[writer % CONNECTIONS], model, writer, rng.random())))
        await asyncio.sleep(rng.random() * LONGEST_ROUND_S)
        await asyncio.to_thread(end)
        await asyncio.gather(*writers)
    return done


async def connect(server: Served, clone: str) -> Client:
    return await Client.connect(server.uri(clone))


def windows() -> Iterator[tuple[int, int]]:
    """Where on the disk the numbered sectors are: (length, offset) in bytes."""
    yield FIRST_WINDOW * SECTOR, 0
    yield (SECTORS - FIRST_WINDOW) * SECTOR, SECOND_WINDOW_AT


async def read(server: Served, clone: str) -> bytes:
    async with await connect(server, clone) as client:
        return b"".join([await client.pread(length, offset) for length, offset in windows()])


def make_image(image: Path) -> Path:
    data = b"".join(content(sector, 1) for sector in range(SECTORS))
    with open(image, "wb") as file:
        for length, offset in windows():
            file.seek(offset)
            file.write(data[:length])
            data = data[length:]
    return image


def require_acknowledged(server: Served, models: dict[str, Model], after: str) -> None:
    for clone, model in models.items():
        wrong = model.wrong_sectors(asyncio.run(read(server, clone)))
        assert not wrong, f"{clone}, after {after}: {wrong[:5]} and {len(wrong)} in all"


def kill_while_stopping(server: Served, seconds: float) -> None:
    """Tell it to stop, and do not wait until it has; though it may have by then."""
    os.kill(server.pid, signal.SIGTERM)
    time.sleep(seconds)
    server.kill()


def test_after_every_kill_what_was_acknowledged_is_there_and_the_rest_is_old_or_new(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    image = make_image(tmp_path / "image.raw")
    pool = make_pool(tmp_path / "pool", image, *CLONES)
    models = {clone: Model() for clone in CLONES}
    done: Counter[str] = Counter()

    kills = 0
    while kills < KILLS:
        with served(pool) as server:
            require_acknowledged(server, models, f"{kills} kills")
            stopping = partial(kill_while_stopping, server, rng.random() * LONGEST_STOP_S)
            end = stopping if rng.random() < 0.2 else server.kill
            done += asyncio.run(write_until(server, models, rng, end))
            kills += server.was_killed
    print(f"{kills} kills under {', '.join(f'{count} {what}' for what, count in done.items())}")
    assert all(done[what] > KILLS for what in ("writes", "trims", "zeroes", "flushes")), "hardly anything was written"

    # And at last one that is told to stop: it has flushed what it had acknowledged.
    with served(pool) as server:
        require_acknowledged(server, models, "the last kill")
        asyncio.run(write_until(server, models, rng, server.stop))
    for name, model in models.items():
        with Pool.open(pool).open_clone(name) as clone:
            assert model.wrong_sectors(b"".join(clone.pread(length, offset) for length, offset in windows())) == []
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
