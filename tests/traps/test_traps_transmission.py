"""What servers get wrong in the transmission, each as a test over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from bytewise import EINVAL, EIO, ENOSPC, EOVERFLOW, EPERM, SILENCE_S, Bytewise
from serving import BASE, BASE_SIZE, MIB, Disk, make_pool, serving, until
from wirebytes import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    request,
    simple,
)

from nbdclone.errors import StorageError
from nbdclone.server.server import Server
from nbdclone.store.pool import Pool

both_kinds_of_reply = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])

LARGEST = 49_865_728  # bytes of the largest request in the traces of the reference implementation
ADVERTISED = 32 * MIB
HARD_LIMIT = 64 * MIB
LONGEST = (1 << 32) - 1
NAMES = {
    READ: "read",
    WRITE: "write",
    FLUSH: "flush",
    TRIM: "trim",
    CACHE: "cache",
    WRITE_ZEROES: "write zeroes",
    BLOCK_STATUS: "block status",
}


@asynccontextmanager
async def talking(server: Server, structured: bool, export: str = "web1") -> AsyncIterator[Bytewise]:
    """A peer that can ask for all there is: with structured replies, block status too."""
    contexts = 1 if structured else 0
    async with await Bytewise.at(server, export, structured=structured, contexts=contexts) as peer:
        yield peer


def payload_of(command: int, length: int) -> bytes:
    return b"x" * length if command == WRITE else b""


# Beyond the end, and what is not known

BEYOND = {READ: EINVAL, TRIM: EINVAL, CACHE: EINVAL, BLOCK_STATUS: EINVAL, WRITE: ENOSPC, WRITE_ZEROES: ENOSPC}


@both_kinds_of_reply
@pytest.mark.parametrize("command", BEYOND, ids=NAMES.get)
async def test_beyond_the_end_each_command_has_its_error_and_the_connection_lives(
    pool: Pool, structured: bool, command: int
) -> None:
    async with serving(pool) as server, talking(server, structured) as peer:
        for offset, length in ((BASE_SIZE - 511, 512), (BASE_SIZE, 1), (BASE_SIZE, 4096), (BASE_SIZE + MIB, 4096)):
            payload = payload_of(command, length)
            expected = EINVAL if command == BLOCK_STATUS and not structured else BEYOND[command]
            assert (await peer.does(command, offset, length, payload=payload)).error == expected
            await peer.lives_on()
        assert (await peer.does(READ, BASE_SIZE - 512, 512)).data == BASE[-512:]


@both_kinds_of_reply
@pytest.mark.parametrize("command", BEYOND, ids=NAMES.get)
async def test_offset_and_length_do_not_wrap_in_64_bits(pool: Pool, structured: bool, command: int) -> None:
    async with serving(pool) as server, talking(server, structured) as peer:
        for offset, length in (((1 << 64) - 1, 1), ((1 << 64) - 512, 512), ((1 << 64) - 256, 512), (1 << 63, 512)):
            payload = payload_of(command, length)
            expected = EINVAL if command == BLOCK_STATUS and not structured else BEYOND[command]
            assert (await peer.does(command, offset, length, payload=payload)).error == expected
        await peer.lives_on()
        assert (await peer.does(READ, 0, BASE_SIZE)).data == BASE


@both_kinds_of_reply
@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES], ids=NAMES.get)
@pytest.mark.parametrize("flags", [0, FUA, FAST_ZERO, 1 << 15])
async def test_what_would_change_a_read_only_export_is_eperm(
    pool: Pool, structured: bool, command: int, flags: int
) -> None:
    """Whatever else is wrong with it."""
    async with serving(pool) as server, talking(server, structured, "base") as peer:
        for offset, length in ((0, 512), (0, 100_000), (BASE_SIZE, 512), ((1 << 64) - 1, 2)):
            payload = payload_of(command, length)
            assert (await peer.does(command, offset, length, flags=flags, payload=payload)).error == EPERM
            await peer.lives_on()
        assert (await peer.does(READ, 0, BASE_SIZE)).data == BASE


@both_kinds_of_reply
@pytest.mark.parametrize("export", ["web1", "base"])
@pytest.mark.parametrize("command", [8, 9, 255, 0x100, 0xFFFF])
async def test_an_unknown_command_is_einval(pool: Pool, structured: bool, export: str, command: int) -> None:
    async with serving(pool) as server, talking(server, structured, export) as peer:
        assert (await peer.does(command, 0, 512)).error == EINVAL
        assert (await peer.does(command, 1 << 40, LONGEST, flags=FUA)).error == EINVAL
        await peer.lives_on()


@both_kinds_of_reply
@pytest.mark.parametrize("command", NAMES, ids=NAMES.get)
async def test_an_unknown_flag_is_einval_on_every_command(pool: Pool, structured: bool, command: int) -> None:
    length = 0 if command == FLUSH else 512
    async with serving(pool) as server, talking(server, structured) as peer:
        for flags in (1 << 6, 1 << 15, FUA | 1 << 8):
            payload = payload_of(command, length)
            assert (await peer.does(command, 0, length, flags=flags, payload=payload)).error == EINVAL
            await peer.lives_on()


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        *[(WRITE, flag) for flag in (NO_HOLE, DF, REQ_ONE, FAST_ZERO)],
        *[(READ, flag) for flag in (NO_HOLE, REQ_ONE, FAST_ZERO)],
        *[(TRIM, flag) for flag in (NO_HOLE, DF, REQ_ONE, FAST_ZERO)],
        *[(WRITE_ZEROES, flag) for flag in (DF, REQ_ONE)],
        *[(BLOCK_STATUS, flag) for flag in (NO_HOLE, DF, FAST_ZERO)],
    ],
)
async def test_a_flag_of_another_command_is_einval(pool: Pool, command: int, flags: int) -> None:
    async with serving(pool) as server, talking(server, True) as peer:
        assert (await peer.does(command, 0, 512, flags=flags, payload=payload_of(command, 512))).error == EINVAL
        await peer.lives_on()


async def test_df_is_einval_where_structured_replies_were_not_agreed_on(pool: Pool) -> None:
    async with serving(pool) as server, talking(server, False) as peer:
        assert (await peer.does(READ, 0, 512, flags=DF)).error == EINVAL
        await peer.lives_on()


@pytest.mark.parametrize(
    ("command", "flags"),
    [(READ, FUA), (FLUSH, FUA), (CACHE, FUA), (BLOCK_STATUS, FUA), (READ, FAST_ZERO), (CACHE, FAST_ZERO)],
)
async def test_a_flag_that_was_never_advertised_is_einval(pool: Pool, command: int, flags: int) -> None:
    """A base advertises neither FUA nor FAST_ZERO."""
    length = 0 if command == FLUSH else 512
    async with serving(pool) as server, talking(server, True, "base") as peer:
        assert not peer.flags & (8 | 0x800)
        assert (await peer.does(command, 0, length, flags=flags)).error == EINVAL
        assert (await peer.does(command, 0, length)).error == 0
        await peer.lives_on()


# Payloads


@both_kinds_of_reply
@pytest.mark.parametrize("length", [1, 512, 33_000, 300_000, 3 * MIB])
async def test_on_every_error_of_a_write_its_payload_is_drained(tmp_path: Path, structured: bool, length: int) -> None:
    disk = Disk()
    pool = make_pool(tmp_path, BASE, "web1", fs=disk)
    # A payload that looks like requests: whoever takes any of it for one, answers it.
    trap = (request(READ, 0, 512, cookie=0xBAD) * (length // 28 + 1))[:length]
    async with serving(pool) as server:
        for export, offset, flags, number, error in (
            ("web1", BASE_SIZE - length + 1, 0, 0, ENOSPC),
            ("web1", (1 << 64) - 1, 0, 0, ENOSPC),
            ("web1", 0, DF, 0, EINVAL),
            ("web1", 0, 1 << 12, 0, EINVAL),
            ("base", 0, 0, 0, EPERM),
            ("web1", 0, 0, errno.EIO, EIO),
            ("web1", 0, 0, errno.ENOSPC, ENOSPC),
        ):
            async with talking(server, structured, export) as peer:
                disk.write_error = number
                await peer.send(
                    peer.asks(WRITE, offset, cookie=1, flags=flags, payload=trap), peer.asks(READ, MIB, 512, cookie=2)
                )
                replies = await peer.hears_replies(2)
                assert (replies[1].error, replies[2].data) == (error, BASE[MIB : MIB + 512])
                disk.write_error = 0
                await peer.lives_on()


@both_kinds_of_reply
@pytest.mark.parametrize("length", [ADVERTISED, LARGEST, HARD_LIMIT])
async def test_writes_and_reads_of_32_mib_and_more_are_accepted(tmp_path: Path, structured: bool, length: int) -> None:
    pool = make_pool(tmp_path, BASE, "web1", size=256 * MIB)
    payload = random.Random(length).randbytes(MIB) * (length // MIB + 1)
    payload = payload[:length]
    offset = 3 * MIB + 1537
    async with serving(pool) as server, talking(server, structured) as peer:
        assert (await peer.does(WRITE, offset, payload=payload)).error == 0
        heard = (await peer.does(READ, offset - 1, length)).data
        same = heard == BASE[offset - 1 : offset] + payload[:-1]  # not in the assertion: nobody reads 50 MB of diff
        assert same
        assert (await peer.does(READ, offset + length - 1, 2)).data == payload[-1:] + b"\0"


@pytest.mark.parametrize("length", [HARD_LIMIT + 1, LONGEST])
async def test_only_a_write_above_the_hard_limit_closes_the_connection(tmp_path: Path, length: int) -> None:
    pool = make_pool(tmp_path, BASE, "web1", size=8 << 30)
    async with serving(pool) as server:
        async with talking(server, False) as peer:
            await peer.send(request(READ, 0, 512, cookie=1), request(WRITE, 0, length, cookie=2))
            await peer.hears(simple(1, 0, BASE[:512]))
            assert await peer.is_closed()
        async with talking(server, False) as peer:
            await peer.lives_on()


@both_kinds_of_reply
async def test_a_read_above_the_hard_limit_is_an_error_and_the_connection_lives(
    tmp_path: Path, structured: bool
) -> None:
    pool = make_pool(tmp_path, BASE, "web1", size=8 << 30)
    async with serving(pool) as server, talking(server, structured) as peer:
        for length in (HARD_LIMIT + 1, LONGEST):
            assert (await peer.does(READ, 0, length)).error == (EOVERFLOW if structured else EINVAL)
            await peer.lives_on()


@both_kinds_of_reply
@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES, CACHE], ids=NAMES.get)
async def test_commands_without_a_payload_take_4_gib_less_1(tmp_path: Path, structured: bool, command: int) -> None:
    pool = make_pool(tmp_path, BASE, "web1", size=8 << 30)
    end = 512 + LONGEST
    async with serving(pool) as server, talking(server, structured) as peer:
        await peer.does(WRITE, end - 5, payload=b"within" + b"behind"[1:])
        await peer.does(WRITE, 2 << 30, payload=b"in the middle")
        assert (await peer.does(command, 512, LONGEST)).error == 0
        await peer.lives_on()
        kept = command == CACHE
        assert (await peer.does(READ, 0, 1024)).data == (BASE[:1024] if kept else BASE[:512] + bytes(512))
        assert (await peer.does(READ, 2 << 30, 13)).data == (b"in the middle" if kept else bytes(13))
        assert (await peer.does(READ, end - 5, 11)).data == (b"within" if kept else bytes(5) + b"n")[:5] + b"nehind"


# Structured replies


class Flawed(Disk):
    """A disk with a bad spot: what begins there, in any file, cannot be read."""

    spot = -1
    error: Exception = OSError(errno.EIO, "bad spot")

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if offset == self.spot:
            raise self.error
        return super().preadv(fd, buffers, offset, flags)


@asynccontextmanager
async def flawed(tmp_path: Path, spot: int) -> AsyncIterator[tuple[Flawed, Server]]:
    """A server of a clone that owns what is before ``spot``, and reads the rest from its base, which is broken there.

    So a read across the spot is two reads of files, of which the second fails.
    """
    disk = Flawed()
    pool = make_pool(tmp_path, BASE, "web1", fs=disk)
    async with serving(pool) as server:
        async with talking(server, False) as peer:
            await peer.does(WRITE, 0, payload=BASE[:spot])
        disk.spot = spot
        yield disk, server
        disk.spot = -1


@pytest.mark.parametrize(("spot", "length"), [(4096, 8192), (68 << 10, 128 << 10), (68 << 10, 3 * MIB)])
async def test_nothing_is_done_before_the_last_byte_was_read(tmp_path: Path, spot: int, length: int) -> None:
    """The errors of reads are structured, and no data come with DONE whose reading can still fail."""
    async with flawed(tmp_path, spot) as (disk, server), talking(server, True) as peer:
        reply = await peer.does(READ, 0, length)
        assert (reply.error, reply.text) == (EIO, "Input/output error")
        await peer.lives_on()
        disk.spot = -1
        assert (await peer.does(READ, 0, length)).data == BASE[:length]


@pytest.mark.parametrize(("spot", "length"), [(4096, 8192), (68 << 10, 128 << 10), (68 << 10, 3 * MIB)])
async def test_no_simple_reply_begins_before_the_last_byte_was_read(tmp_path: Path, spot: int, length: int) -> None:
    """After the header of success only closing would be honest: so the error is known before the header is sent."""
    async with flawed(tmp_path, spot) as (disk, server), talking(server, False) as peer:
        await peer.send(request(READ, 0, length, cookie=9))
        await peer.hears(simple(9, EIO))
        await peer.lives_on()
        disk.spot = -1
        assert (await peer.does(READ, 0, length)).data == BASE[:length]


@pytest.mark.parametrize("text", ["short", "e" * 5000, "ü" * 5000, "\0" * 2000, "🖴" * 999], ids=lambda text: text[:2])
async def test_the_text_of_an_error_has_at_most_1000_bytes(tmp_path: Path, text: str) -> None:
    async with flawed(tmp_path, 4096) as (disk, server), talking(server, True) as peer:
        disk.error = StorageError(text)
        reply = await peer.does(READ, 0, 8192)  # which holds the text against the limit
        assert reply.error == EIO
        assert reply.text
        await peer.lives_on()


def patchwork(size: int) -> Iterator[tuple[int, int, str]]:
    """A disk of own data, holes, and data of the base, in pieces of all sizes: (offset, length, which)."""
    rng = random.Random("patchwork")
    offset = 0
    while offset < size:
        length = min(rng.choice([1, 511, 4096, 4097, 9000, 40_000]), size - offset)
        yield offset, length, rng.choice(["own", "hole", "base"])
        offset += length


@pytest.mark.parametrize("flags", [0, DF])
async def test_data_chunks_are_never_empty_and_never_overlap_and_with_df_there_is_one(
    tmp_path: Path, flags: int
) -> None:
    size = MIB
    pool = make_pool(tmp_path, BASE, "web1", size=8 * MIB)
    async with serving(pool) as server, talking(server, True) as peer:
        expected = bytearray(BASE[:size])
        for offset, length, kind in patchwork(size):
            if kind == "own":
                expected[offset : offset + length] = b"w" * length
                await peer.does(WRITE, offset, payload=b"w" * length)
            elif kind == "hole":
                expected[offset : offset + length] = bytes(length)
                await peer.does(TRIM, offset, length)
        for offset, length in ((0, 65536), (1, 65536), (4095, 2), (12345, 100_000), (0, size)):
            reply = await peer.does(READ, offset, length, flags=flags)  # which looks at each chunk
            assert reply.data == expected[offset : offset + length]
            assert reply.chunks == 1 or not flags
        reply = await peer.does(READ, 3 * MIB, 4 * MIB, flags=flags)  # the base ends in the middle
        assert reply.data == BASE[3 * MIB :] + bytes(3 * MIB)
        assert reply.chunks == 1 or not flags


# The end


@both_kinds_of_reply
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("listener", [0, 1], ids=["tcp", "unix"])
async def test_disc_with_64_reads_in_flight_is_followed_by_all_64_replies(
    tmp_path: Path, structured: bool, cold: bool, listener: int
) -> None:
    disk = Disk()
    pool = make_pool(tmp_path, BASE, "web1", fs=disk)
    async with (
        serving(pool, listen=[("127.0.0.1", 0)], sockets=[tmp_path / "nbd.sock"]) as server,
        await Bytewise.at(server, structured=structured, listener=listener) as peer,
    ):
        disk.cold = range(BASE_SIZE if cold else 0)
        disk.reads.close()
        await peer.send(*[peer.asks(READ, n * 65536, 65536, cookie=n) for n in range(64)], request(DISC))
        if cold:
            await until(lambda: disk.reads.waiting > 0)
            await peer.hears_nothing()
        disk.reads.open()
        replies = await peer.hears_replies(64)
        assert all(replies[n].data == BASE[n * 65536 : (n + 1) * 65536] for n in range(64))
        assert await peer.is_closed()


@pytest.mark.parametrize("listener", [0, 1], ids=["tcp", "unix"])
async def test_a_server_that_shuts_down_answers_what_was_asked_and_then_closes(tmp_path: Path, listener: int) -> None:
    """It closes rather than say ESHUTDOWN: qemu would tell its guest of an error, and connects again when closed."""
    disk = Disk()
    pool = make_pool(tmp_path, BASE, "web1", fs=disk)
    async with serving(pool, listen=[("127.0.0.1", 0)], sockets=[tmp_path / "nbd.sock"]) as server:
        peer = await Bytewise.at(server, structured=True, listener=listener)
        disk.cold = range(BASE_SIZE)
        disk.reads.close()
        await peer.send(*[peer.asks(READ, n * 65536, 65536, cookie=n) for n in range(64)])
        await peer.send(peer.asks(WRITE, 0, cookie=64, payload=b"x" * 2 * MIB), peer.asks(FLUSH, cookie=65))
        await until(lambda: disk.reads.waiting > 0)
        await asyncio.sleep(SILENCE_S)  # in which all of that is taken
        leaving = asyncio.create_task(server.__aexit__(None, None, None))
        await asyncio.sleep(SILENCE_S)
        await peer.send(peer.asks(READ, 0, 512, cookie=66))  # too late: for another connection
        disk.reads.open()
        replies = await peer.hears_replies(66)
        assert all(not reply.error for reply in replies.values())
        assert all(replies[n].data == BASE[n * 65536 : (n + 1) * 65536] for n in range(32, 64))
        assert await peer.is_closed()
        peer.close()
        await leaving
    with Pool.open(pool.path).open_clone("web1") as clone:
        assert clone.pread(2 * MIB, 0) == b"x" * 2 * MIB


# The connection


def accepted_socket(peer: Bytewise) -> socket.socket:
    """The server's end of a connection, found among the descriptors of this process."""
    wanted = peer.sock.getsockname()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # no socket; one that listens; closed by now
            found = socket.socket(fileno=int(name))
            try:
                if found.getpeername() == wanted:
                    return found.dup()
            finally:
                found.detach()
    raise AssertionError("no such connection")


async def test_tcp_connections_have_nodelay_and_keepalive(pool: Pool) -> None:
    async with serving(pool, listen=[("127.0.0.1", 0)]) as server, await Bytewise.at(server) as peer:
        with accepted_socket(peer) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 60


@both_kinds_of_reply
@pytest.mark.parametrize("listener", [0, 1], ids=["tcp", "unix"])
async def test_reading_of_requests_goes_on_while_a_reply_is_blocked(
    tmp_path: Path, structured: bool, listener: int
) -> None:
    """128 writes, far more than the sockets hold, are taken and done while nobody takes a read of 32 MiB."""
    pool = make_pool(tmp_path, BASE, "web1", size=64 * MIB)
    size = 128 << 10
    async with (
        serving(pool, listen=[("127.0.0.1", 0)], sockets=[tmp_path / "nbd.sock"]) as server,
        await Bytewise.at(server, structured=structured, listener=listener) as peer,
        await Bytewise.at(server) as other,
    ):
        await peer.send(peer.asks(READ, 0, 32 * MIB, cookie=1000))
        for n in range(128):
            await peer.send(peer.asks(WRITE, 32 * MIB + n * size, cookie=n, payload=bytes([n + 1]) * size))
        await peer.send(peer.asks(FLUSH, cookie=1001))
        for n in range(128):  # done, and seen on another connection
            async with asyncio.timeout(10):
                while (await other.does(READ, 32 * MIB + n * size, size)).data != bytes([n + 1]) * size:
                    pass
        replies = await peer.hears_replies(130)
        assert not any(reply.error for reply in replies.values())
        assert replies[1000].data == BASE + bytes(28 * MIB)


@pytest.mark.parametrize("length", [1, 65536, MIB])
async def test_reading_of_requests_ends_at_a_bound_for_a_client_that_takes_no_replies(pool: Pool, length: int) -> None:
    async with serving(pool) as server, talking(server, False) as peer, talking(server, False) as other:
        asked = request(READ, 0, length) * 1000
        taken, idle = 0, 0
        while idle < 5:
            try:
                taken += peer.sock.send(asked[taken % len(asked) :])
                idle = 0
            except BlockingIOError:
                idle += 1
                await other.lives_on()
                await asyncio.sleep(SILENCE_S)
            else:
                await asyncio.sleep(0)
            assert taken < 28 * 1_000_000, "it takes and takes"
