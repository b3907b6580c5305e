"""Runs in a guest: a server, and clients that write to a clone. The pool is on a disk whose writes are logged outside.

    power_writer.py POOL IMAGE DEVICE ACKNOWLEDGEMENTS SEED

Right after each acknowledged flush, or write with FUA, a mark goes to a place of its own on the same disk, past the
pool's file system and its cache: where the log has the mark, it was acknowledged. At the end the history of all
requests is written beside the marks.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import stat
import sys
from pathlib import Path

from nbdclone.client import Client
from nbdclone.server.server import Server
from nbdclone.store.layer import SEGMENT_SIZE
from nbdclone.store.pool import Pool

SECTOR = 512
MIB = 1 << 20

# The disk: a file system, the marks, the history.
MARKS = 32 * MIB
HISTORY = 33 * MIB
DISK_SIZE = 40 * MIB
MARK = b"acknowledged"

# The clone: its base is shorter, and it ends in its second segment. The parts of it that are used: (offset, length).
BASE_SIZE = MIB
WINDOWS = ((0, MIB), (SEGMENT_SIZE - MIB // 4, MIB // 2))
SIZE = SEGMENT_SIZE + MIB // 4

SESSIONS = 3  # the server is stopped and started in between
WRITERS = 3
SHARED = 1024  # sectors at the beginning, where the writers' places alternate within blocks
PLACE = 5  # sectors of such a place
# Which part of the requests flush, or have FUA: so few that the kernel writes much by itself in between.
FLUSHES = 0.03
FUA = 0.01
SECTORS = sum(length for _, length in WINDOWS) // SECTOR  # numbered without a gap


def content(sector: int, version: int) -> bytes:
    """What a sector holds that was written as this version of it: both can be told from it. The base's is 1."""
    return (sector.to_bytes(8) + version.to_bytes(8)) * (SECTOR // 16)


def on_disk(position: int) -> int:
    """Where on the clone a byte of the numbered sectors is."""
    (_, first), (second_at, _) = WINDOWS
    return position if position < first else position - first + second_at


class Device:
    """The disk itself, written to directly."""

    def __init__(self, path: str) -> None:
        # A rehearsal has a file, on a file system that may not know O_DIRECT.
        direct = os.O_DIRECT if stat.S_ISBLK(os.stat(path).st_mode) else 0
        self._fd = os.open(path, os.O_RDWR | direct)

    def write(self, data: bytes, offset: int) -> None:
        with mmap.mmap(-1, -(-len(data) // SECTOR) * SECTOR) as aligned:
            aligned[: len(data)] = data
            assert os.pwrite(self._fd, aligned, offset) == len(aligned)

    def sync(self) -> None:
        os.fsync(self._fd)


class Writers:
    """What they do, and the history of it: lines of a word and numbers."""

    def __init__(self, device: Device, rng: random.Random, acknowledgements: int) -> None:
        self.history: list[str] = []
        self._device = device
        self._rng = rng
        self._session = -(-acknowledgements // SESSIONS)
        self._latest = 1
        self._marks = 0

    async def made(self) -> None:
        """The pool and the clone are there, and are so after a power cut."""
        await self._mark("flushed", self._send("flush"))

    async def session(self, pool: Pool) -> None:
        """Start a server, write through it, and stop it."""
        last = self._marks + self._session
        async with Server(pool, sockets=["socket"]) as server:
            uri = server.uris[0].replace("nbd+unix:///", "nbd+unix:///clone")
            async with await Client.connect(uri) as one, await Client.connect(uri) as two:
                clients = (one, two, two)
                await asyncio.gather(*(self._write(clients[writer], writer, last) for writer in range(WRITERS)))
            sent = self._send("flush")  # a server that has stopped has flushed
        await self._mark("flushed", sent)

    async def _write(self, client: Client, writer: int, last: int) -> None:
        """Write, zero, trim and flush, until there are so many marks."""
        rng = random.Random(self._rng.random())
        while self._marks < last:
            chance = rng.random()
            if chance < FLUSHES:
                sent = self._send("flush")
                await client.flush()
                await self._mark("flushed", sent)
                continue
            first, count = place(rng, writer)
            position, length = first * SECTOR, count * SECTOR
            if rng.random() < 0.25:  # not whole sectors
                position += rng.randrange(SECTOR)
                length = max(length - SECTOR - rng.randrange(SECTOR), 1)
            fua = rng.random() < FUA
            self._latest += 1
            sent = self._send("zero" if chance < 0.3 else "write", self._latest, position, length)
            if chance < 0.2:
                await client.trim(length, on_disk(position), fua=fua)
            elif chance < 0.3:
                await client.zero(length, on_disk(position), fua=fua, no_hole=rng.random() < 0.3)
            else:
                await client.pwrite(data(self._latest, position, length), on_disk(position), fua=fua)
            if fua:
                await self._mark("durable", sent)
            else:
                self._send("done", sent)

    def _send(self, what: str, *numbers: int) -> int:
        """Add a line to the history; its number."""
        self.history.append(" ".join([what, *map(str, numbers)]))
        return len(self.history) - 1

    async def _mark(self, what: str, sent: int) -> None:
        number, self._marks = self._marks, self._marks + 1
        self._send(what, sent, number)
        mark = MARK + number.to_bytes(4)
        await asyncio.to_thread(self._device.write, mark, MARKS + number * SECTOR)


def place(rng: random.Random, writer: int) -> tuple[int, int]:
    """Some of the writer's own sectors, all in one window: (first, count)."""
    if rng.random() < 0.6:
        place = rng.randrange(SHARED // PLACE // WRITERS) * WRITERS + writer
        start, size = place * PLACE, PLACE
    else:
        part = WINDOWS[0][1] // SECTOR - SHARED, WINDOWS[1][1] // SECTOR
        which = rng.randrange(2)
        size = part[which] // WRITERS
        start = SHARED + which * part[0] + writer * size
    first = rng.randrange(size)
    count = 1 + int((size - first) * rng.random() ** 4)
    return start + first, min(count, size - first)


def data(version: int, position: int, length: int) -> bytes:
    """What is written there as this version."""
    sectors = range(position // SECTOR, -(-(position + length) // SECTOR))
    return b"".join(content(sector, version) for sector in sectors)[position % SECTOR :][:length]


def main(pool_path: str, image: str, device_path: str, acknowledgements: str, seed: str) -> None:
    device = Device(device_path)
    pool = Pool.open(pool_path, create=True)
    pool.import_base(Path(image), "base")
    pool.create_clones("base", ["clone"], size=SIZE)
    writers = Writers(device, random.Random(int(seed)), int(acknowledgements))
    asyncio.run(writers.made())
    for _ in range(SESSIONS):
        asyncio.run(writers.session(pool))
    text = "\n".join(writers.history).encode()
    assert len(text) < DISK_SIZE - HISTORY
    device.write(text, HISTORY)
    device.sync()


if __name__ == "__main__":
    main(*sys.argv[1:])
