"""What the disks of a family in pairs.py may read like, and the client that writes to one.

A writer is serial, on a part of the disk where both bases are alike and nobody else writes: a content of the clone is
that of its level, with some number of the writes; the one that was under way may be there in part.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from integration.lifemodel import Wrong
from nbdclone.client import Client
from nbdclone.errors import NBDCloneError

__all__ = ["LARGER", "SIZE", "SMALLER", "Disks", "Writer", "Wrong", "make_bases", "written"]

BLOCK, SECTOR = 4096, 512
SIZE = 2 << 20
LARGER, SMALLER = SIZE + (1 << 20), (1 << 20) + (512 << 10)
# (offset, length): where the writer writes; where the bases differ, in every block; where they are alike.
WRITTEN = 256 << 10, 256 << 10
OTHERWISE = 1 << 20, 32 * BLOCK
ALIKE = SMALLER - 8 * BLOCK, 16 * BLOCK  # across the end of a clone that was made smaller
LONGEST = 24  # sectors of a write
VERIFY_EVERY = 8  # writes
PAUSE_S = 0.001

Runs = Sequence[tuple[int, bytes]]


class _Disk(Protocol):
    def pwrite(self, data: bytes, offset: int) -> object: ...


def _contents() -> dict[str, bytes]:
    rng = random.Random("pairs")
    old = bytearray(SIZE)
    for offset in range(0, SIZE, 128 << 10):
        old[offset : offset + (64 << 10)] = rng.randbytes(64 << 10)
    offset, length = ALIKE
    old[offset : offset + length] = rng.randbytes(length)
    new = bytearray(old)
    offset, length = OTHERWISE
    new[offset : offset + length] = rng.randbytes(length)
    return {"old": bytes(old), "new": bytes(new)}


BASES = _contents()


def make_bases(directory: Path) -> None:
    """The two images."""
    for name, content in BASES.items():
        (directory / f"{name}.raw").write_bytes(content)


def written(disk: _Disk, runs: Runs) -> None:
    for offset, data in runs:
        disk.pwrite(data, offset)


class Disks:
    """The contents of a family's levels: B, the base; S, the snapshot; T, what is received; Q, the clone."""

    def __init__(self, rng: random.Random) -> None:
        other, alike = OTHERWISE[0], ALIKE[0]

        def some(offset: int, first: int, count: int) -> tuple[int, bytes]:
            return offset + first * BLOCK, rng.randbytes(count * BLOCK)

        self.own: dict[str, Runs] = {
            "S": [some(other, 0, 6), some(alike, 0, 4), some(WRITTEN[0], 0, 4)],
            "T": [some(other, 4, 4), some(alike, 2, 12)],
            "Q": [
                some(other, 12, 4),
                some(alike, 6, 2),
                (alike + 10 * BLOCK, bytes(2 * BLOCK)),
                # As in the base, so that there is something to compact, and across the end of a smaller one.
                (alike + 12 * BLOCK, BASES["old"][alike + 12 * BLOCK :][: 2 * BLOCK]),
            ],
        }

    def content(self, base: str, level: str) -> bytes:
        state = bytearray(BASES[base])
        for each in {"B": "", "S": "S", "T": "ST", "Q": "SQ"}[level]:
            for offset, data in self.own[each]:
                state[offset : offset + len(data)] = data
        return bytes(state)

    def explains(self, now: bytes, base: str, level: str, writer: Writer | None, least: int, most: int) -> bool:
        """Can this be the content of a disk of that level, with ``least`` to ``most`` of the writes?

        What is behind the end of a smaller one is gone, and what is behind the old end is zeros.
        """
        end = min(len(now), SIZE)
        state = bytearray(self.content(base, level))
        if any(now[SIZE:]):
            return False
        if now[SMALLER:end] != state[SMALLER:end] and not any(now[SMALLER:end]):
            end = SMALLER  # it was smaller for a while
        if now[: WRITTEN[0]] != state[: WRITTEN[0]] or now[sum(WRITTEN) : end] != state[sum(WRITTEN) : end]:
            return False
        return writer.explains(now, least, most) if writer else now[slice(*_W)] == state[slice(*_W)]

    def nearest(self, now: bytes, base: str, level: str) -> list[int]:
        """The first sectors that are otherwise, without the writer's."""
        state = self.content(base, level)
        wrong = [
            at // SECTOR
            for at in range(0, min(len(now), SIZE), SECTOR)
            if now[at : at + SECTOR] != state[at : at + SECTOR] and not _W[0] <= at < _W[1]
        ]
        return wrong[:10]


_W = (WRITTEN[0], sum(WRITTEN))


class Writer:
    """A client that writes, one write after the other, and reads back what it wrote."""

    def __init__(self, content: bytes, rng: random.Random) -> None:
        self._before = content[slice(*_W)]
        self._now = bytearray(self._before)
        self._rng = rng
        self._writes: list[tuple[int, bytes]] = []
        self.acknowledged = 0
        self.lost: str | None = None

    @property
    def begun(self) -> int:
        return len(self._writes)

    async def run(self, client: Client) -> None:
        """Until the connection goes, or it is told to stop."""
        try:
            while True:
                await self.some(client, VERIFY_EVERY)
                await asyncio.sleep(PAUSE_S)
        except (NBDCloneError, OSError) as error:
            self.lost = f"{type(error).__name__}: {error}"

    async def some(self, client: Client, count: int) -> None:
        """Write, and look whether all that was written is there. Raises Wrong, and what the client raises."""
        for _ in range(count):
            sectors = self._rng.randint(1, LONGEST)
            offset = self._rng.randrange(WRITTEN[1] // SECTOR - sectors) * SECTOR
            chance = self._rng.random()
            data = bytes(sectors * SECTOR) if chance < 0.2 else self._rng.randbytes(sectors * SECTOR)
            self._writes.append((offset, data))
            self._now[offset : offset + len(data)] = data
            if chance < 0.1:
                await client.trim(len(data), WRITTEN[0] + offset)
            elif chance < 0.2:
                await client.zero(len(data), WRITTEN[0] + offset)
            else:
                await client.pwrite(data, WRITTEN[0] + offset)
            self.acknowledged = self.begun
            await asyncio.sleep(0)
        if await client.pread(WRITTEN[1], WRITTEN[0]) != self._now:
            raise Wrong("a client does not read what it wrote")

    def explains(self, disk: bytes, least: int, most: int) -> bool:
        """Is this the writer's part after some number of its writes?"""
        now, state = disk[slice(*_W)], bytearray(self._before)
        for number, (offset, data) in enumerate(self._writes):
            end = offset + len(data)
            if number >= least and self._explained(now, state, offset, data):
                return True
            if number == most:
                return False
            state[offset:end] = data
        return now == state

    @staticmethod
    def _explained(now: bytes, state: bytearray, offset: int, data: bytes) -> bool:
        """This state, with none, all or some of the next write."""
        end = offset + len(data)
        if now[:offset] != state[:offset] or now[end:] != state[end:]:
            return False
        return all(
            now[at : at + SECTOR] in (state[at : at + SECTOR], data[at - offset : at - offset + SECTOR])
            for at in range(offset, end, SECTOR)
        )
