"""A desktop's day: thousands of requests of all sizes, many in flight at once, each read held against a bytearray.

TRACE_BYTES is how many bytes are read and written; ``make traces`` takes what the longer of the reference
implementation's own two traces writes.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from bytewise import Bytewise
from serving import MIB, make_pool, serving
from wirebytes import CACHE, FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES

LARGEST = 49_865_728  # bytes of the largest request in the traces of the reference implementation
SIZE = 50_000_000 // 4096 * 4096 + 4096  # of the disk; a third of it comes from the base
DEPTH = 128
# What a desktop's requests move beside the two that are as large as they come.
TRACE_BYTES = int(os.environ.get("TRACE_BYTES", "52_000_000"))
SMALLEST_TRACE = 1000  # requests
# The largest write comes late: it leaves little of the base to be seen.
LARGEST_READ_AT, LARGEST_WRITE_AT = 500, 900
# One request in so many has any size up to the largest.
RARE = 400
IMAGE = random.Random("desktop").randbytes(SIZE // 3 // 512 * 512)
FILL = random.Random("fill").randbytes(LARGEST + MIB)


class Step(NamedTuple):
    command: int
    offset: int
    length: int
    flags: int


def desktop(rng: random.Random, total: int) -> Iterator[Step]:
    """A trace: a few files that are read and written in sequence, the rest here and there, and now and then a flush."""
    moved = count = 0
    ends = [rng.randrange(SIZE // 2) for _ in range(6)]
    while moved < total or count < SMALLEST_TRACE:
        count += 1
        kind = rng.choices([READ, WRITE, FLUSH, TRIM, WRITE_ZEROES, CACHE], [44, 42, 6, 3, 3, 2])[0]
        if kind == FLUSH:
            yield Step(FLUSH, 0, 0, 0)
            continue
        if count in (LARGEST_READ_AT, LARGEST_WRITE_AT):
            yield Step(READ if count == LARGEST_READ_AT else WRITE, rng.randrange(SIZE - LARGEST), LARGEST, 0)
            continue
        if rng.randrange(RARE) == 0:
            length = round(512 * (LARGEST / 512) ** rng.random())
        else:
            length = rng.choice([512, 1024, 4096, 4096, 4096, 8192, 32768, 65536, 131072, 262144])
        if rng.random() < 0.15:  # of any length, anywhere
            length = rng.randint(1, length)
            offset = rng.randrange(SIZE - length)
        elif rng.random() < 0.5:
            file = rng.randrange(len(ends))
            offset = ends[file] if ends[file] + length <= SIZE else 0
            ends[file] = offset + length
        else:
            offset = rng.randrange((SIZE - length) // 512 + 1) * 512
        flags = FUA if kind in (WRITE, TRIM, WRITE_ZEROES) and rng.random() < 0.05 else 0
        moved += length if kind in (READ, WRITE) else 0
        yield Step(kind, offset, length, flags)


class Model:
    """The disk as it has to be, and what is under way. The protocol promises no order: what overlaps has to wait."""

    def __init__(self) -> None:
        self.content = bytearray(IMAGE.ljust(SIZE, b"\0"))
        self.in_flight: dict[int, Step] = {}
        self.counts: Counter[str] = Counter()
        self.answered = asyncio.Event()
        self.finished = False

    def has_room(self, step: Step) -> bool:
        return len(self.in_flight) < DEPTH and not any(
            step.offset < other.offset + other.length
            and other.offset < step.offset + step.length
            and not step.command == other.command == READ
            for other in self.in_flight.values()
        )

    async def send(self, peer: Bytewise, rng: random.Random, trace: Iterator[Step]) -> None:
        for cookie, step in enumerate(trace, start=1):
            while not self.has_room(step):
                self.answered.clear()
                await self.answered.wait()
            command, offset, length, flags = step
            payload = b""
            if command == WRITE:
                start = rng.randrange(MIB)
                payload = FILL[start : start + length] if rng.random() < 0.95 else bytes(length)
                self.content[offset : offset + length] = payload
            elif command in (TRIM, WRITE_ZEROES):
                self.content[offset : offset + length] = bytes(length)
            self.in_flight[cookie] = step
            self.counts["requests"] += 1
            self.counts["written" if command == WRITE else "read"] += length if command in (READ, WRITE) else 0
            self.counts["depth"] = max(self.counts["depth"], len(self.in_flight))
            self.counts["largest"] = max(self.counts["largest"], length if command in (READ, WRITE) else 0)
            await peer.send(peer.asks(command, offset, length, cookie=cookie, flags=flags, payload=payload))
        self.finished = True

    async def hear(self, peer: Bytewise) -> None:
        while not self.finished or self.in_flight:
            if not self.in_flight:
                await asyncio.sleep(0)
                continue
            reply = await peer.hears_reply()
            command, offset, length, _flags = step = self.in_flight.pop(reply.cookie)
            self.answered.set()
            assert not reply.error, step
            if command == READ:
                right = reply.data == memoryview(self.content)[offset : offset + length]
                assert right, step


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
async def test_every_read_of_a_long_trace_gives_what_was_written_last(tmp_path: Path, structured: bool) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    rng = random.Random(f"desktop {structured}")
    model = Model()
    began = time.monotonic()
    async with (
        serving(pool, sockets=[tmp_path / "nbd.sock"]) as server,
        await Bytewise.at(server, structured=structured) as peer,
    ):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(model.send(peer, rng, desktop(rng, TRACE_BYTES)))
            tasks.create_task(model.hear(peer))
        right = (await peer.does(READ, 0, SIZE)).data == model.content
        assert right
    counts = model.counts
    assert counts["requests"] >= SMALLEST_TRACE
    assert counts["largest"] == LARGEST
    assert counts["depth"] > DEPTH // 4
    print(f"{counts}, {time.monotonic() - began:.1f} s")
    with pool.open_clone("web1") as clone:
        right = clone.pread(SIZE, 0) == model.content
        assert right
