"""What the disks of a pool have to read like: the oracle of the campaign in lifecycle.py.

A clone's writers are serial: each has one write under way at a time, on sectors that are its own. So whatever happens
to the clone, a snapshot, a kill, what it reads afterwards is, for each writer, the state after some number of its
writes; one that was under way may be there in part. :func:`Journal.require` says whether that holds of a content, and
of a number in the right span: at least what was acknowledged before, at most what was begun.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from nbdclone.store.layer import SEGMENT_SIZE

SECTOR = 512
# Two windows on the disk are written and looked at, the second across the border of two segments: (offset, length).
WINDOW = 256 << 10
WINDOWS = ((64 << 10, WINDOW), (SEGMENT_SIZE - WINDOW // 2, WINDOW))
SECTORS = 2 * WINDOW // SECTOR
SIZE = SEGMENT_SIZE + (4 << 20)
WRITERS = 2
# In the first window two writers share each block, in the second each has a half of it for itself.
HALF_BLOCK = 4
LONGEST = 64  # sectors of a write in the second window


def on_disk(sector: int) -> int:
    """The offset on the disk of a numbered sector of the windows."""
    window, position = divmod(sector * SECTOR, WINDOW)
    return WINDOWS[window][0] + position


def cut(content: bytes, size: int) -> bytes:
    """What is left of the windows on a disk that was made so small: zeros behind its end."""
    inside = [max(min(length, size - offset), 0) for offset, length in WINDOWS]
    first = 0
    parts = []
    for (_, length), count in zip(WINDOWS, inside, strict=True):
        parts.append(content[first : first + count].ljust(length, b"\0"))
        first += length
    return b"".join(parts)


def place(rng: random.Random, writer: int) -> tuple[int, int]:
    """Where a writer may write: (first sector, how many). Never across the two windows."""
    half = SECTORS // 2
    if rng.random() < 0.5:
        group = rng.randrange(half // HALF_BLOCK // WRITERS) * WRITERS + writer
        first = rng.randrange(HALF_BLOCK)
        return group * HALF_BLOCK + first, rng.randint(1, HALF_BLOCK - first)
    first = rng.randrange(half // WRITERS)
    begin = half + writer * (half // WRITERS)
    return begin + first, rng.randint(1, min(LONGEST, half // WRITERS - first))


def owner(sector: int) -> int:
    """The writer whose sector it is."""
    half = SECTORS // 2
    return sector // HALF_BLOCK % WRITERS if sector < half else (sector - half) // (half // WRITERS)


class Wrong(AssertionError):
    """A disk does not read as it has to."""


@dataclass
class Journal:
    """What one writer has written since its clone's content was last known: (first sector, data), in order."""

    writes: list[tuple[int, bytes]] = field(default_factory=list)
    acknowledged: int = 0

    def begin(self, sector: int, data: bytes) -> None:
        self.writes.append((sector, data))

    def acknowledge(self) -> None:
        self.acknowledged = len(self.writes)

    def require(self, writer: int, before: bytes, now: bytes, least: int, most: int) -> None:
        """``now`` is ``before`` with so many of the writes, between ``least`` and ``most``. Raises Wrong."""
        state = bytearray(before)
        for sector, data in self.writes[:least]:
            state[sector * SECTOR : sector * SECTOR + len(data)] = data
        wrong = {
            sector
            for sector in range(SECTORS)
            if owner(sector) == writer and _sector(state, sector) != _sector(now, sector)
        }
        first_wrong = sorted(wrong)
        for sector, data in self.writes[least:most]:
            if not wrong:
                return
            touched = range(sector, sector + len(data) // SECTOR)
            if wrong <= set(touched) and all(
                _sector(now, each) == data[(each - sector) * SECTOR :][:SECTOR] for each in wrong
            ):
                return  # this one was under way: a part of it is there
            state[sector * SECTOR : sector * SECTOR + len(data)] = data
            for each in touched:
                (wrong.discard if _sector(state, each) == _sector(now, each) else wrong.add)(each)
        if wrong:
            raise Wrong(
                f"writer {writer}: no number of its writes from {least} to {most} gives this: "
                f"{len(first_wrong)} sectors differ after {least} (the first: {first_wrong[:5]}), "
                f"{len(wrong)} after {most}: {sorted(wrong)[:5]}"
            )


@dataclass
class CloneModel:
    """A clone: its content when it was last known, and what was written since."""

    content: bytes
    origin: bytes
    size: int
    journals: list[Journal] = field(default_factory=lambda: [Journal() for _ in range(WRITERS)])

    def acknowledged(self) -> list[int]:
        return [journal.acknowledged for journal in self.journals]

    def begun(self) -> list[int]:
        return [len(journal.writes) for journal in self.journals]

    def require(self, now: bytes, least: Sequence[int], most: Sequence[int]) -> None:
        """What was read can be this clone's content. Raises Wrong."""
        for writer, journal in enumerate(self.journals):
            journal.require(writer, self.content, now, least[writer], most[writer])

    def known(self, content: bytes) -> None:
        """This is the content, and nobody is writing."""
        self.content = content
        self.journals = [Journal() for _ in range(WRITERS)]


def _sector(content: bytes | bytearray, number: int) -> bytes | bytearray:
    return content[number * SECTOR : (number + 1) * SECTOR]
