"""Everything that clients can do to a clone, at random and all at once, against a bytearray."""

from __future__ import annotations

import asyncio
import itertools
import random
from pathlib import Path

import pytest
from serving import MIB, Peer, connect, make_pool, serving, where

from nbdclone.client import Client
from nbdclone.protocol.wire import CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, Mode
from nbdclone.store.layer import SEGMENT_SIZE

# No whole number of blocks: its end lies within one, and within what the clones are made to touch.
IMAGE = random.Random("image").randbytes(MIB + 512)
WINDOW = 2 * MIB
# The beginning, where the base ends within the window; the seam of two segments; the end of the disk.
SIZE = SEGMENT_SIZE + 3 * MIB + 512
WINDOWS = {"start": 0, "seam": SEGMENT_SIZE - MIB - 77, "end": SIZE - WINDOW}
CONNECTIONS = 4


def initial(start: int) -> bytearray:
    return bytearray((IMAGE + bytes(SIZE - len(IMAGE)))[start : start + WINDOW])


def cut(rng: random.Random, start: int, end: int, count: int) -> list[tuple[int, int]]:
    """Divide a range at random places: (offset, length) of each part, most short and few long."""
    places = sorted({start, end, *(min(end, start + int((end - start) * rng.random() ** 3)) for _ in range(count))})
    return [(first, second - first) for first, second in itertools.pairwise(places)]


async def work(client: Client, rng: random.Random, expected: bytearray, origin: int, start: int, end: int) -> None:
    """Rounds of requests in flight together, each over its own part of [start, end) of the window."""

    async def one(at: int, length: int) -> None:
        before = bytes(expected[at : at + length])
        match rng.choice("rrwwwzt"):
            case "r":
                assert await client.pread(length, origin + at) == before
            case "w":
                kind = rng.random()
                # Also blocks of zeros, which are not stored, and data that begins with zeros and goes on.
                data = bytes(length) if kind < 0.15 else rng.randbytes(length)
                if 0.15 < kind < 0.3:
                    data = bytes(length - 1) + b"\1"
                expected[at : at + length] = data
                await client.pwrite(data, origin + at, fua=rng.random() < 0.1)
            case "z":
                expected[at : at + length] = bytes(length)
                await client.zero(length, origin + at, no_hole=rng.random() < 0.5)
            case "t":
                expected[at : at + length] = bytes(length)
                await client.trim(length, origin + at)

    for _ in range(12):
        await asyncio.gather(*[one(at, length) for at, length in cut(rng, start, end, 24)])
        if rng.random() < 0.3:
            await client.flush()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", WINDOWS)
async def test_many_connections_at_once_leave_what_a_bytearray_holds(tmp_path: Path, window: str, seed: int) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", "web2", size=SIZE)
    origin = WINDOWS[window]
    expected = initial(origin)
    rng = random.Random(f"{window} {seed}")
    # The connections' parts meet within blocks: neighbours share them.
    seams = [0, *sorted(rng.sample(range(1, WINDOW), CONNECTIONS - 1)), WINDOW]
    async with serving(pool, listen=[("127.0.0.1", 0)], sockets=[tmp_path / "nbd.sock"]) as server:
        clients = [await connect(server, "web1", number % 2, Mode(number % 3)) for number in range(CONNECTIONS)]
        await asyncio.gather(
            *[
                work(client, random.Random(rng.random()), expected, origin, start, end)
                for client, (start, end) in zip(clients, itertools.pairwise(seams), strict=True)
            ]
        )
        assert await clients[0].pread(WINDOW, origin) == expected
        await clients[0].flush()
        for client in clients:
            await client.close()
        assert await Client.list(where(server, "")) == ["base", "web1", "web2"]
    with pool.open_clone("web1") as clone:
        assert clone.pread(WINDOW, origin) == expected
    with pool.open_clone("web2") as clone:
        assert clone.pread(WINDOW, origin) == initial(origin)
    with pool.open_clone("base") as base:
        assert base.pread(base.size, 0) == IMAGE


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mode", Mode, ids=lambda mode: mode.name.lower())
async def test_pipelined_requests_that_overlap_take_effect_in_their_order(
    tmp_path: Path, seed: int, mode: Mode
) -> None:
    # The protocol promises no order, so each request waits for those that it overlaps; the others it overtakes.
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    rng = random.Random(seed)
    expected = initial(0)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=mode) as peer:
        in_flight: dict[int, tuple[int, int, bytes | None]] = {}

        async def hear() -> None:
            reply = await peer.reply()
            assert reply.error == 0
            at, length, data = in_flight.pop(reply.cookie)
            if data is not None:
                assert reply.data == data, f"a read of {length} at {at}"

        for cookie in range(1, 500):
            length = rng.choice([1, 512, 4096, 5000, 40_000, 70_000])
            at = rng.randrange(WINDOW - length)
            while len(in_flight) >= 32 or any(at < o + n and o < at + length for o, n, _ in in_flight.values()):
                await hear()
            command = rng.choice([CMD_READ, CMD_READ, CMD_WRITE, CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES, CMD_FLUSH])
            if command == CMD_FLUSH:
                in_flight[cookie] = (0, 0, None)
                await peer.send(peer.request(CMD_FLUSH, cookie=cookie))
                continue
            data = rng.randbytes(length) if command == CMD_WRITE else bytes(length)
            in_flight[cookie] = (at, length, bytes(expected[at : at + length]) if command == CMD_READ else None)
            flags = CMD_FLAG_FUA if command != CMD_READ and rng.random() < 0.1 else 0
            payload = data if command == CMD_WRITE else b""
            await peer.send(peer.request(command, at, length, cookie=cookie, flags=flags, payload=payload))
            if command != CMD_READ:
                expected[at : at + length] = data
        while in_flight:
            await hear()
        assert (await peer.run(CMD_READ, 0, WINDOW)).data == expected
    with pool.open_clone("web1") as clone:
        assert clone.pread(WINDOW, 0) == expected
