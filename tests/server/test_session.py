"""The transmission over a socket: what is answered, in every state that a connection can be in."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest
from serving import BASE, BASE_SIZE, MIB, Disk, Peer, connect, make_pool, serving, until

from nbdclone.protocol import wire
from nbdclone.protocol.wire import (
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
)
from nbdclone.store.pool import Pool

both_kinds_of_reply = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])


def large_pool(directory: Path, size: int = 256 * MIB) -> Pool:
    """A pool whose clone is larger than the largest request."""
    return make_pool(directory, BASE, "web1", size=size)


# Ending


@both_kinds_of_reply
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
async def test_after_disc_every_request_in_flight_is_answered(tmp_path: Path, structured: bool, cold: bool) -> None:
    disk = Disk()
    pool = make_pool(tmp_path, BASE, "web1", fs=disk)
    disk.cold = range(BASE_SIZE if cold else 0)
    async with serving(pool) as server, await Peer.open(server, "web1", structured=structured) as peer:
        disk.reads.close()
        reads = [peer.request(CMD_READ, i * 65536, 65536, cookie=i) for i in range(64)]
        await peer.send(*reads, peer.request(CMD_DISC))
        if cold:
            await until(lambda: disk.reads.waiting > 0)
        disk.reads.open()
        replies = await peer.replies(64)
        assert all(replies[i].data == BASE[i * 65536 : (i + 1) * 65536] for i in range(64))
        assert await peer.is_closed()


@both_kinds_of_reply
async def test_after_disc_changes_and_flushes_in_flight_are_answered(pool: Pool, structured: bool) -> None:
    async with serving(pool) as server:
        async with await Peer.open(server, "web1", structured=structured) as peer:
            payload = os.urandom(2 * MIB)  # more than is written on the event loop
            await peer.send(
                peer.request(CMD_WRITE, 0, payload=payload, cookie=1),
                peer.request(CMD_TRIM, 3 * MIB, 4096, cookie=2),
                peer.request(CMD_WRITE_ZEROES, 3 * MIB + 4096, 4096, cookie=3),
                peer.request(CMD_CACHE, 0, MIB, cookie=4),
                peer.request(CMD_FLUSH, cookie=5),
                peer.request(CMD_WRITE, 2 * MIB, payload=b"x" * 512, cookie=6, flags=CMD_FLAG_FUA),
                peer.request(CMD_DISC),
            )
            assert {reply.error for reply in (await peer.replies(6)).values()} == {0}
            assert await peer.is_closed()
        async with await connect(server, "web1") as disk:
            assert await disk.pread(len(payload), 0) == payload
            assert await disk.pread(8192, 3 * MIB) == bytes(8192)
            assert await disk.pread(512, 2 * MIB) == b"x" * 512


async def test_requests_behind_disc_are_not_run(pool: Pool) -> None:
    async with serving(pool) as server:
        async with await Peer.open(server, "web1") as peer:
            await peer.send(peer.request(CMD_DISC), peer.request(CMD_WRITE, 0, payload=b"x" * 512))
            assert await peer.is_closed()
        async with await connect(server, "web1") as disk:
            assert await disk.pread(512, 0) == BASE[:512]


@both_kinds_of_reply
async def test_after_an_end_without_disc_every_request_in_flight_is_answered(pool: Pool, structured: bool) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1", structured=structured) as peer:
        reads = [peer.request(CMD_READ, i * 65536, 65536, cookie=i) for i in range(64)]
        await peer.send(*reads)
        peer.sock.shutdown(socket.SHUT_WR)
        replies = await peer.replies(64)
        assert all(replies[i].data == BASE[i * 65536 : (i + 1) * 65536] for i in range(64))
        assert await peer.is_closed()


@pytest.mark.parametrize("length", [4096, 100_000])
async def test_a_write_that_ends_in_the_middle_is_not_run(pool: Pool, length: int) -> None:
    async with serving(pool) as server:
        async with await Peer.open(server, "web1") as peer:
            await peer.send(peer.request(CMD_WRITE, 0, payload=b"x" * length)[:-1])
            peer.sock.shutdown(socket.SHUT_WR)
            assert await peer.is_closed()
        async with await connect(server, "web1") as disk:
            assert await disk.pread(length, 0) == BASE[:length]


async def test_a_client_that_vanishes_with_requests_in_flight_leaves_its_export_free(pool: Pool) -> None:
    async with serving(pool) as server:
        async with await Peer.open(server, "web1") as peer:
            await peer.send(*[peer.request(CMD_READ, 0, 2 * MIB, cookie=i) for i in range(32)])
        await until(lambda: not server._connections)
        pool.remove(["web1"])


async def test_garbage_closes_that_connection_alone_and_is_logged(pool: Pool, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(pool) as server, await connect(server, "web1") as disk:
        async with await Peer.open(server, "web1") as peer:
            await peer.send(peer.request(CMD_WRITE, 0, payload=b"x" * 512), b"\xff" * 28)
            assert (await peer.reply()).error == 0  # what came before the garbage
            assert await peer.is_closed()
        assert "a request starts with 0xffffffff, not with its magic number" in caplog.text
        assert await disk.pread(512, 0) == b"x" * 512


# Sizes


async def test_a_write_above_64_mib_closes_the_connection(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(large_pool(tmp_path)) as server, await connect(server, "web1") as disk:
        async with await Peer.open(server, "web1") as peer:
            await peer.send(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, CMD_WRITE, 1, 0, 64 * MIB + 1))
            assert await peer.is_closed()
        assert "a write of 67108865 bytes: the limit is 67108864" in caplog.text
        assert await disk.pread(512, 0) == BASE[:512]


@both_kinds_of_reply
@pytest.mark.parametrize("length", [49_865_728, 64 * MIB])
async def test_the_largest_requests_work(tmp_path: Path, structured: bool, length: int) -> None:
    payload = random.Random(length).randbytes(MIB + 3) * (length // MIB + 1)
    payload = payload[:length]
    async with (
        serving(large_pool(tmp_path)) as server,
        await Peer.open(server, "web1", structured=structured) as peer,
    ):
        assert (await peer.run(CMD_WRITE, 100 * MIB + 1, payload=payload)).error == 0
        assert (await peer.run(CMD_READ, 100 * MIB + 1, length)).data == payload


@pytest.mark.parametrize("command", [CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE])
async def test_requests_without_payload_may_be_as_long_as_the_field_allows(tmp_path: Path, command: int) -> None:
    size = 5 << 30
    async with serving(large_pool(tmp_path, size)) as server, await Peer.open(server, "web1") as peer:
        assert (await peer.run(CMD_WRITE, size - 4096, payload=b"x" * 4096)).error == 0
        assert (await peer.run(command, 0, (1 << 32) - 1)).error == 0
        expected = BASE[:4096] if command == CMD_CACHE else bytes(4096)
        assert (await peer.run(CMD_READ, 0, 4096)).data == expected
        assert (await peer.run(CMD_READ, size - 4096, 4096)).data == b"x" * 4096


LENGTHS = [1, 511, 512, 4096, 32767, 32768, 32769, 65535, 65536, 65537, 262143, 262144, MIB - 1, MIB, MIB + 1, 3 * MIB]


@both_kinds_of_reply
@pytest.mark.parametrize("length", LENGTHS)
async def test_reads_and_writes_of_every_size_that_is_treated_its_own_way(
    pool: Pool, structured: bool, length: int
) -> None:
    payload = random.Random(length).randbytes(length)
    async with serving(pool) as server, await Peer.open(server, "web1", structured=structured) as peer:
        assert (await peer.run(CMD_READ, 100, length)).data == BASE[100 : 100 + length]
        assert (await peer.run(CMD_WRITE, 100, payload=payload)).error == 0
        assert (await peer.run(CMD_READ, 100, length)).data == payload
        around = await peer.run(CMD_READ, 0, length + 200)
        assert around.data == BASE[:100] + payload + BASE[100 + length : 200 + length]


@pytest.mark.parametrize("seed", range(4))
async def test_requests_arrive_in_pieces_cut_anywhere(pool: Pool, seed: int) -> None:
    rng = random.Random(seed)
    expected = bytearray(BASE)
    messages = []
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        for cookie in range(40):
            length = rng.choice([1, 100, 512, 4096, 40_000, 70_000])
            offset = rng.randrange(BASE_SIZE - length)
            payload = rng.randbytes(length)
            expected[offset : offset + length] = payload
            messages.append(peer.request(CMD_WRITE, offset, payload=payload, cookie=cookie))
        stream = b"".join(messages)
        while stream:
            # Mostly at the seams, where the parser has to stop and go on.
            cut = rng.choice([1, 2, 27, 28, 29, rng.randrange(1, 5000), rng.randrange(1, 200_000)])
            await peer.send(stream[:cut])
            stream = stream[cut:]
            if rng.random() < 0.3:
                await until(lambda: True)
        assert {reply.error for reply in (await peer.replies(40)).values()} == {0}
        assert (await peer.run(CMD_READ, 0, BASE_SIZE)).data == expected


async def test_a_stream_of_single_bytes_is_understood(pool: Pool) -> None:
    async with serving(pool, listen=[("127.0.0.1", 0)]) as server, await Peer.open(server, "web1") as peer:
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        write = peer.request(CMD_WRITE, 5, payload=b"hello", cookie=1)
        for byte in write + peer.request(CMD_READ, 0, 12, cookie=2):
            await peer.send(bytes([byte]))
        assert (await peer.replies(2))[2].data == BASE[:5] + b"hello" + BASE[10:12]


# Errors

END = BASE_SIZE
ERRORS = [
    # command, offset, length, flags, error on a clone
    (CMD_READ, END - 511, 512, 0, EINVAL),
    (CMD_READ, END, 1, 0, EINVAL),
    (CMD_READ, (1 << 64) - 1, 512, 0, EINVAL),
    (CMD_READ, (1 << 64) - 512, 512, 0, EINVAL),
    (CMD_READ, 0, 0, 0, EINVAL),
    (CMD_WRITE, END - 511, 512, 0, ENOSPC),
    (CMD_WRITE, END, 100_000, 0, ENOSPC),
    (CMD_WRITE, (1 << 64) - 512, 512, 0, ENOSPC),
    (CMD_WRITE, 0, 512, CMD_FLAG_DF, EINVAL),
    (CMD_WRITE, 0, 512, CMD_FLAG_NO_HOLE, EINVAL),
    (CMD_WRITE, 0, 100_000, 1 << 9, EINVAL),
    (CMD_TRIM, END - 511, 512, 0, EINVAL),
    (CMD_TRIM, 0, 512, CMD_FLAG_FAST_ZERO, EINVAL),
    (CMD_WRITE_ZEROES, END - 511, 512, 0, ENOSPC),
    (CMD_WRITE_ZEROES, 0, 512, CMD_FLAG_DF, EINVAL),
    (CMD_WRITE_ZEROES, 0, 4096, CMD_FLAG_FAST_ZERO | CMD_FLAG_NO_HOLE, ENOTSUP),
    (CMD_CACHE, END - 511, 512, 0, EINVAL),
    (CMD_FLUSH, 1, 0, 0, EINVAL),
    (CMD_FLUSH, 0, 512, 0, EINVAL),
    (7, 0, 512, 0, EINVAL),  # BLOCK_STATUS, which was not negotiated
    (8, 0, 512, 0, EINVAL),
    (0xFFFF, 0, 512, 0, EINVAL),
]


@both_kinds_of_reply
@pytest.mark.parametrize(("command", "offset", "length", "flags", "error"), ERRORS)
async def test_an_error_is_answered_its_payload_is_drained_and_the_connection_lives(
    pool: Pool, structured: bool, command: int, offset: int, length: int, flags: int, error: int
) -> None:
    payload = b"x" * length if command == CMD_WRITE else b""
    async with serving(pool) as server, await Peer.open(server, "web1", structured=structured) as peer:
        await peer.send(
            peer.request(command, offset, length, flags=flags, payload=payload, cookie=1),
            peer.request(CMD_READ, 0, 4096, cookie=2),
        )
        replies = await peer.replies(2)
        assert replies[1].error == error
        assert replies[2].data == BASE[:4096]


@both_kinds_of_reply
@pytest.mark.parametrize("command", [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES])
@pytest.mark.parametrize("length", [512, 100_000])
async def test_changes_of_a_base_answer_eperm_and_the_connection_lives(
    pool: Pool, structured: bool, command: int, length: int
) -> None:
    payload = b"x" * length if command == CMD_WRITE else b""
    async with serving(pool) as server, await Peer.open(server, "base", structured=structured) as peer:
        await peer.send(
            peer.request(command, 0, length, payload=payload, cookie=1), peer.request(CMD_READ, 0, 4096, cookie=2)
        )
        replies = await peer.replies(2)
        assert (replies[1].error, replies[2].data) == (EPERM, BASE[:4096])


@both_kinds_of_reply
async def test_a_read_above_the_hard_limit_is_refused_and_the_connection_lives(
    tmp_path: Path, structured: bool
) -> None:
    async with (
        serving(large_pool(tmp_path)) as server,
        await Peer.open(server, "web1", structured=structured) as peer,
    ):
        reply = await peer.run(CMD_READ, 0, 64 * MIB + 1)
        assert reply.error == (EOVERFLOW if structured else EINVAL)
        assert (await peer.run(CMD_READ, 0, 512)).data == BASE[:512]


async def test_no_hole_keeps_the_space_and_reads_as_zeros(pool: Pool) -> None:
    delta = pool.path / "clones" / "web1" / "delta"
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        before = delta.stat().st_blocks
        assert (await peer.run(CMD_WRITE_ZEROES, 0, MIB, flags=CMD_FLAG_NO_HOLE)).error == 0
        assert delta.stat().st_blocks - before >= MIB // 512
        assert (await peer.run(CMD_READ, 0, MIB)).data == bytes(MIB)
        assert (await peer.run(CMD_TRIM, 0, MIB)).error == 0
        assert delta.stat().st_blocks - before < MIB // 512
        assert (await peer.run(CMD_READ, 0, MIB)).data == bytes(MIB)


async def test_fast_zero_is_done_where_holes_can_be_made(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        assert (await peer.run(CMD_WRITE_ZEROES, 4096, 8192, flags=CMD_FLAG_FAST_ZERO)).error == 0
        assert (await peer.run(CMD_READ, 0, 16384)).data == BASE[:4096] + bytes(8192) + BASE[12288:16384]


async def test_write_zeroes_keeps_the_neighbours_of_a_part_of_a_block(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        assert (await peer.run(CMD_WRITE_ZEROES, 1000, 10_000)).error == 0
        assert (await peer.run(CMD_READ, 0, 16384)).data == BASE[:1000] + bytes(10_000) + BASE[11_000:16384]


async def test_what_one_connection_wrote_another_reads(pool: Pool) -> None:
    async with (
        serving(pool) as server,
        await connect(server, "web1") as one,
        await connect(server, "web1") as two,
        await connect(server, "web2") as other,
    ):
        await one.pwrite(b"one", 4096)
        assert await two.pread(3, 4096) == b"one"
        await two.trim(4096, 4096)
        assert await one.pread(3, 4096) == bytes(3)
        assert await other.pread(3, 4096) == BASE[4096:4099]
