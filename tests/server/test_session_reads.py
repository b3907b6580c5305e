"""Reads over a socket in every mode: what is data, what is told as a hole."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from serving import MIB, Disk, Peer, make_pool, serving, until

from nbdclone.protocol.wire import (
    ADVERTISED_MAX_PAYLOAD,
    CMD_FLAG_DF,
    CMD_READ,
    CMD_WRITE,
    EOVERFLOW,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    Mode,
)
from nbdclone.server import session
from nbdclone.server.holes import GRAIN

KIB = 1 << 10
DATA, HOLE = REPLY_TYPE_OFFSET_DATA, REPLY_TYPE_OFFSET_HOLE
SIZE = 16 * MIB
# Data, a hole, data, then nothing but zeros.
NOISE = random.Random("reads").randbytes(MIB)
IMAGE = NOISE + bytes(MIB) + NOISE + bytes(SIZE - 3 * MIB)
in_chunks = pytest.mark.parametrize("mode", [Mode.STRUCTURED, Mode.EXTENDED], ids=["structured", "extended"])


@in_chunks
@pytest.mark.parametrize("flags", [0, CMD_FLAG_DF])
async def test_zeros_are_one_hole(tmp_path: Path, mode: Mode, flags: int) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1")
    async with serving(pool) as server, await Peer.open(server, "web1", mode=mode) as peer:
        for length in (13, 512, 4096, 64 * KIB, 64 * KIB + 1, MIB, 2 * MIB, 5 * MIB + 7):
            reply = await peer.run(CMD_READ, 4 * MIB + 3, length, flags=flags)
            assert reply.data == bytes(length)
            assert peer.pieces == [(HOLE, 4 * MIB + 3, length)]


@in_chunks
async def test_what_is_as_short_as_a_hole_is_sent_as_data(tmp_path: Path, mode: Mode) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1")
    async with serving(pool) as server, await Peer.open(server, "web1", mode=mode) as peer:
        for length in (1, 4, 12):
            assert (await peer.run(CMD_READ, 4 * MIB, length)).data == bytes(length)
            assert peer.pieces == [(DATA, 4 * MIB, length)]


async def test_a_client_without_structured_replies_gets_zeros(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1")
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.SIMPLE) as peer:
        for length in (512, 64 * KIB, MIB, 2 * MIB):
            assert (await peer.run(CMD_READ, 4 * MIB, length)).data == bytes(length)


@in_chunks
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
async def test_a_long_read_is_divided_and_one_that_must_not_be_is_not(tmp_path: Path, mode: Mode, cold: bool) -> None:
    disk = Disk()
    pool = make_pool(tmp_path, IMAGE, "web1", fs=disk)
    disk.cold = range(SIZE if cold else 0)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=mode) as peer:
        at, length = MIB - 40_000, MIB + 100_000
        expected = IMAGE[at : at + length]
        assert (await peer.run(CMD_READ, at, length)).data == expected
        assert [kind for kind, _at, _length in peer.pieces] == [DATA, HOLE, DATA]
        assert all(size >= GRAIN for kind, _at, size in peer.pieces if kind == HOLE)
        assert (await peer.run(CMD_READ, at, length, flags=CMD_FLAG_DF)).data == expected
        assert peer.pieces == [(DATA, at, length)]
        at = 3 * MIB - 40_000
        assert (await peer.run(CMD_READ, at, 2 * MIB)).data == IMAGE[at : at + 2 * MIB]
        assert [kind for kind, _at, _length in peer.pieces] == [DATA, HOLE]


@in_chunks
async def test_a_short_read_is_not_divided(tmp_path: Path, mode: Mode) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1")
    async with serving(pool) as server, await Peer.open(server, "web1", mode=mode) as peer:
        assert (await peer.run(CMD_READ, MIB - 512, 64 * KIB)).data == NOISE[-512:] + bytes(64 * KIB - 512)
        assert peer.pieces == [(DATA, MIB - 512, 64 * KIB)]


@in_chunks
async def test_any_mixture_is_told_as_it_is_to_a_client_that_reads_late(tmp_path: Path, mode: Mode) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1")
    rng = random.Random(5)
    expected = bytearray(IMAGE)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=mode) as peer:
        for _ in range(60):
            at, length = rng.randrange(SIZE - 90_000), rng.choice([1, 4096, 33_000, 90_000])
            expected[at : at + length] = payload = rng.randbytes(length)
            assert not (await peer.run(CMD_WRITE, at, payload=payload)).error
        reads = {}
        for cookie in range(1, 40):
            length = rng.choice([4096, 200_000, MIB, 3 * MIB])
            reads[cookie] = rng.randrange(SIZE - length), length
            await peer.send(peer.request(CMD_READ, *reads[cookie], cookie=cookie))
        for cookie, reply in (await peer.replies(len(reads))).items():
            at, length = reads[cookie]
            assert reply.data == expected[at : at + length], (at, length)


@in_chunks
async def test_a_client_that_reads_nothing_has_no_buffers_of_holes_held_for_it(
    tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One block of data in 16 MiB of zeros: what waits to be sent is small, and must not keep the read's whole buffer.
    monkeypatch.setattr(session, "MAX_UNSENT", MIB)
    pool = make_pool(tmp_path, bytes(4 * MIB) + NOISE[: 64 * KIB] + bytes(12 * MIB - 64 * KIB), "web1")
    async with serving(pool) as server, await Peer.open(server, "web1", mode=mode) as peer:
        given = []
        give = server.scratch.buffers.give
        monkeypatch.setattr(server.scratch.buffers, "give", lambda buffer: (given.append(len(buffer)), give(buffer)))
        count = 12  # more than the socket takes
        for cookie in range(1, count + 1):
            await peer.send(peer.request(CMD_READ, 0, 16 * MIB, cookie=cookie))
        await until(lambda: sum(size > 8 * MIB for size in given) == count)
        for reply in (await peer.replies(count)).values():
            assert reply.data.count(0) > 15 * MIB
            assert reply.data[4 * MIB : 4 * MIB + 64 * KIB] == NOISE[: 64 * KIB]


@in_chunks
async def test_a_read_longer_than_what_is_announced_comes_in_chunks_that_are_not(tmp_path: Path, mode: Mode) -> None:
    announced = ADVERTISED_MAX_PAYLOAD
    size = announced + 5 * MIB
    pool = make_pool(tmp_path, NOISE * (size // MIB), "web1")
    async with serving(pool) as server, await Peer.open(server, "web1", mode=mode) as peer:
        reply = await peer.run(CMD_READ, 0, size)
        assert reply.data == NOISE * (size // MIB)
        assert peer.pieces == [(DATA, 0, announced), (DATA, announced, size - announced)]
        assert (await peer.run(CMD_READ, 0, announced + 1, flags=CMD_FLAG_DF)).error == EOVERFLOW
        await peer.run(CMD_READ, 1, announced, flags=CMD_FLAG_DF)
        assert peer.pieces == [(DATA, 1, announced)]
