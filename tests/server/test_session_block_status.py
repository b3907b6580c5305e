"""Block status over a socket: what a clone's parts are, to a client that asks."""

from __future__ import annotations

import errno
import functools
import os
import random
import struct
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from serving import Disk, Peer, go_data, make_pool, serving, until, where

from nbdclone.client import Client
from nbdclone.errors import LocalProtocolError, ServerRefused
from nbdclone.protocol import wire
from nbdclone.protocol.wire import CMD_BLOCK_STATUS, CMD_FLAG_DF, CMD_FLAG_FUA, CMD_FLAG_REQ_ONE, CMD_READ, EINVAL, EIO
from nbdclone.server import session
from nbdclone.server.server import Server
from nbdclone.store import clone as clone_module
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool

KIB = 1 << 10
NAMES = ("base:allocation", "qemu:allocation-depth", "nbdclone:origin")
IMAGE = bytes(64 * KIB) + b"d" * (64 * KIB) + bytes(128 * KIB)
SIZE = 512 * KIB
HOLE = 3

Chunks = dict[int, list[tuple[int, int]]]


@pytest.fixture
def sparse_pool(tmp_path: Path) -> Pool:
    """A clone that is twice as long as its base, of which a part is data."""
    return make_pool(tmp_path, IMAGE, "web1", size=SIZE)


async def connect(server: Server, export: str = "web1", contexts: Iterable[str] = NAMES) -> Client:
    return await Client.connect(where(server, export), contexts=list(contexts))


@asynccontextmanager
async def asking(server: Server, *contexts: bytes, selected_for: str = "web1") -> AsyncIterator[Peer]:
    """A peer that has opened web1 after selecting contexts."""
    async with await Peer.connect(server) as peer:
        await peer.greet()
        await peer.ask(wire.Option.STRUCTURED_REPLY)
        strings = [struct.pack(">I", len(string)) + string for string in (selected_for.encode(), *contexts)]
        await peer.ask(
            wire.Option.SET_META_CONTEXT, strings[0] + struct.pack(">I", len(contexts)) + b"".join(strings[1:])
        )
        assert (await peer.ask(wire.Option.GO, go_data("web1")))[-1][0] == wire.OptionReply.ACK
        yield peer


async def chunks(peer: Peer, cookie: int = 1) -> Chunks:
    """The reply to a question: the extents by the context's id."""
    told: Chunks = {}
    flags = 0
    while not flags:
        head = wire.STRUCTURED_REPLY.unpack(await peer.receive(wire.STRUCTURED_REPLY.size))
        magic, flags, kind, its_cookie, length = head
        assert (magic, kind, its_cookie) == (wire.STRUCTURED_REPLY_MAGIC, wire.REPLY_TYPE_BLOCK_STATUS, cookie)
        payload = await peer.receive(length)
        (context,) = struct.unpack_from(">I", payload)
        assert context not in told
        told[context] = list(struct.iter_unpack(">II", payload[4:]))
    return told


async def status(peer: Peer, offset: int, length: int, flags: int = 0) -> Chunks:
    await peer.send(peer.request(CMD_BLOCK_STATUS, offset, length, flags=flags))
    return await chunks(peer)


async def test_each_context_tells_its_own_story_of_a_clone(sparse_pool: Pool) -> None:
    async with serving(sparse_pool) as server, await connect(server) as client:
        await client.pwrite(b"w" * 8192, 32 * KIB)  # over a hole of the base
        await client.trim(16 * KIB, 80 * KIB)  # over its data
        await client.pwrite(b"w" * 4096, 384 * KIB)  # beyond it
        assert await client.block_status(SIZE, 0) == {
            "base:allocation": [
                *[(32 * KIB, HOLE), (8 * KIB, 0), (24 * KIB, HOLE), (16 * KIB, 0), (16 * KIB, HOLE), (32 * KIB, 0)],
                *[(256 * KIB, HOLE), (4 * KIB, 0), (124 * KIB, HOLE)],
            ],
            "qemu:allocation-depth": [
                *[(32 * KIB, 2), (8 * KIB, 1), (40 * KIB, 2), (16 * KIB, 1), (160 * KIB, 2)],
                *[(128 * KIB, 0), (4 * KIB, 1), (124 * KIB, 0)],
            ],
            "nbdclone:origin": [
                *[(32 * KIB, 1), (8 * KIB, 2), (40 * KIB, 1), (16 * KIB, 2), (160 * KIB, 1)],
                *[(128 * KIB, 0), (4 * KIB, 2), (124 * KIB, 0)],
            ],
        }


async def test_a_base_tells_of_itself(sparse_pool: Pool) -> None:
    async with serving(sparse_pool) as server, await connect(server, "base") as client:
        assert await client.block_status(256 * KIB, 0) == {
            "base:allocation": [(64 * KIB, HOLE), (64 * KIB, 0), (128 * KIB, HOLE)],
            "qemu:allocation-depth": [(256 * KIB, 1)],
            "nbdclone:origin": [(256 * KIB, 1)],
        }


async def test_a_part_is_told_from_where_to_where_it_was_asked_for(sparse_pool: Pool) -> None:
    async with serving(sparse_pool) as server, asking(server, b"base:allocation") as peer:
        assert await status(peer, 64 * KIB - 10, 30) == {1: [(10, HOLE), (20, 0)]}
        assert await status(peer, SIZE - 1, 1) == {1: [(1, HOLE)]}
        assert await status(peer, 0, SIZE, CMD_FLAG_FUA) == {1: [(64 * KIB, HOLE), (64 * KIB, 0), (384 * KIB, HOLE)]}


async def test_who_asks_for_one_extent_gets_the_whole_of_it_in_each_context(sparse_pool: Pool) -> None:
    names = [name.encode() for name in NAMES]
    async with serving(sparse_pool) as server, asking(server, *names) as peer:
        await peer.run(wire.CMD_TRIM, 16 * KIB, 16 * KIB)
        assert await status(peer, 0, SIZE, CMD_FLAG_REQ_ONE) == {
            1: [(64 * KIB, HOLE)],
            2: [(16 * KIB, 2)],
            3: [(16 * KIB, 1)],
        }
        assert await status(peer, 0, 1000, CMD_FLAG_REQ_ONE) == {1: [(1000, HOLE)], 2: [(1000, 2)], 3: [(1000, 1)]}
        assert await status(peer, 16 * KIB, SIZE - 16 * KIB, CMD_FLAG_REQ_ONE) == {
            1: [(48 * KIB, HOLE)],
            2: [(16 * KIB, 1)],
            3: [(16 * KIB, 2)],
        }


@pytest.mark.parametrize(
    ("offset", "length", "flags"),
    [(0, 0, 0), (SIZE, 1, 0), (1, SIZE, 0), ((1 << 64) - 1, 2, 0), (0, 512, CMD_FLAG_DF), (0, 512, 1 << 7)],
)
async def test_a_question_that_makes_no_sense_is_einval_and_the_connection_lives_on(
    sparse_pool: Pool, offset: int, length: int, flags: int
) -> None:
    async with serving(sparse_pool) as server, asking(server, b"base:allocation") as peer:
        reply = await peer.run(CMD_BLOCK_STATUS, offset, length, flags=flags)
        assert (reply.error, reply.structured) == (EINVAL, True)
        assert await status(peer, 0, 512) == {1: [(512, HOLE)]}


async def test_without_a_context_for_this_export_a_question_is_einval(sparse_pool: Pool) -> None:
    async with serving(sparse_pool) as server:
        async with asking(server) as peer:
            assert (await peer.run(CMD_BLOCK_STATUS, 0, 512)).error == EINVAL
        async with asking(server, b"base:allocation", selected_for="base") as peer:
            assert (await peer.run(CMD_BLOCK_STATUS, 0, 512)).error == EINVAL
        async with await Peer.open(server, "web1", structured=False) as peer:
            assert (await peer.run(CMD_BLOCK_STATUS, 0, 512)).error == EINVAL


async def test_a_fragmented_disk_is_told_in_parts(sparse_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    limited = functools.partialmethod(clone_module.Clone.surveyed, limit=10)
    monkeypatch.setattr(clone_module.Clone, "surveyed", limited)
    async with serving(sparse_pool) as server:
        async with await connect(server) as client:
            for block in range(0, 64, 2):
                await client.pwrite(b"w" * BLOCK_SIZE, 256 * KIB + block * BLOCK_SIZE)
            told = await client.block_status(256 * KIB, 256 * KIB)
            assert told["base:allocation"] == [(BLOCK_SIZE, 0), (BLOCK_SIZE, HOLE)] * 32
            assert told["nbdclone:origin"] == [(BLOCK_SIZE, 2), (BLOCK_SIZE, 0)] * 32
        async with asking(server, b"base:allocation") as peer:
            assert len((await status(peer, 256 * KIB, 256 * KIB))[1]) == 10


async def test_a_range_as_long_as_can_be_asked_for_is_one_question(tmp_path: Path) -> None:
    size = 40 * SEGMENT_SIZE
    pool = make_pool(tmp_path, IMAGE, "web1", size=size)
    async with serving(pool) as server:
        async with asking(server, b"nbdclone:origin") as peer:
            assert await status(peer, 0, (1 << 32) - 1) == {3: [(256 * KIB, 1), ((1 << 32) - 1 - 256 * KIB, 0)]}
        async with await connect(server, contexts=["nbdclone:origin"]) as client:
            told = await client.block_status(size, 0)
            assert told == {"nbdclone:origin": [(256 * KIB, 1), (size - 256 * KIB, 0)]}


async def test_a_disk_that_fails_is_told_as_an_error(tmp_path: Path) -> None:
    class Broken(Disk):
        broken = False

        def lseek(self, fd: int, position: int, how: int) -> int:
            if self.broken:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return os.lseek(fd, position, how)

    disk = Broken()
    pool = make_pool(tmp_path, IMAGE, "web1", fs=disk)
    async with serving(pool) as server, asking(server, b"base:allocation") as peer:
        disk.broken = True
        reply = await peer.run(CMD_BLOCK_STATUS, 0, 512)
        assert (reply.error, reply.structured, reply.message) == (EIO, True, "Input/output error")
        disk.broken = False
        assert await status(peer, 0, 512) == {1: [(512, HOLE)]}


class Slow(Disk):
    """A disk on which looking for holes takes as long as the test wants."""

    def lseek(self, fd: int, position: int, how: int) -> int:
        self._wait(self.reads)
        return os.lseek(fd, position, how)


async def test_while_a_slow_disk_is_looked_at_others_are_served(tmp_path: Path) -> None:
    disk = Slow()
    pool = make_pool(tmp_path, IMAGE, "web1", fs=disk)
    async with serving(pool) as server, asking(server, b"base:allocation") as peer:
        disk.reads.close()
        await peer.send(peer.request(CMD_BLOCK_STATUS, 0, 4096, cookie=1), peer.request(CMD_READ, 0, 4096, cookie=2))
        assert (await peer.reply()).cookie == 2
        disk.reads.open()
        assert await chunks(peer) == {1: [(4096, HOLE)]}


async def test_after_disc_a_question_is_still_answered(tmp_path: Path) -> None:
    disk = Slow()
    pool = make_pool(tmp_path, IMAGE, "web1", fs=disk)
    async with serving(pool) as server, asking(server, b"base:allocation") as peer:
        disk.reads.close()
        await peer.send(peer.request(CMD_BLOCK_STATUS, 0, 4096), peer.request(wire.CMD_DISC))
        await until(lambda: disk.reads.waiting > 0)
        disk.reads.open()
        assert await chunks(peer) == {1: [(4096, HOLE)]}
        assert await peer.is_closed()


async def test_answers_that_are_being_made_count_as_unsent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_UNSENT", 100_000)  # room for three of 33 KB, and one more
    disk = Slow()
    pool = make_pool(tmp_path, IMAGE, "web1", fs=disk)
    async with serving(pool) as server, asking(server, b"base:allocation") as peer:
        disk.reads.close()
        await peer.send(*[peer.request(CMD_BLOCK_STATUS, 0, 4096, cookie=n) for n in range(50)])
        [running] = [connection._session for connection in server._connections if connection._session is not None]
        await until(lambda: len(running._waiting) + running._in_flight == 50)
        assert running._in_flight == 4
        disk.reads.open()
        assert [await any_chunk(peer) for _ in range(50)] == [{1: [(4096, HOLE)]}] * 50


async def any_chunk(peer: Peer) -> Chunks:
    """A reply of one chunk, whatever its cookie."""
    head = await peer.receive(wire.STRUCTURED_REPLY.size)
    payload = await peer.receive(wire.STRUCTURED_REPLY.unpack(head)[4])
    return {struct.unpack_from(">I", payload)[0]: list(struct.iter_unpack(">II", payload[4:]))}


async def test_what_was_acknowledged_before_the_question_is_in_its_answer(tmp_path: Path) -> None:
    """Random changes, each followed by a question: holes read as zeros, data and origins are where they belong."""
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    rng = random.Random("status")
    blocks = SIZE // BLOCK_SIZE
    async with serving(pool) as server, await connect(server) as client:
        for _ in range(60):
            first = rng.randrange(blocks)
            count = rng.randint(1, min(9, blocks - first))
            offset, length = first * BLOCK_SIZE, count * BLOCK_SIZE
            data = rng.random() < 0.5
            await (client.pwrite(b"w" * length, offset) if data else client.trim(length, offset))
            told = await client.block_status(length, offset)
            assert told["base:allocation"] == [(length, 0 if data else HOLE)]
            if data:
                assert told["nbdclone:origin"] == [(length, 2)]
        content = await client.pread(SIZE, 0)
        position = 0
        for length, state in (await client.block_status(SIZE, 0))["base:allocation"]:
            assert any(content[position : position + length]) == (state == 0)
            position += length
        assert position == SIZE


# The client


async def test_a_client_without_contexts_says_so(sparse_pool: Pool) -> None:
    async with serving(sparse_pool) as server:
        async with await connect(server, contexts=["x-strange:thing"]) as client:
            assert client.contexts == {}
            with pytest.raises(LocalProtocolError, match="contexts"):
                await client.block_status(512, 0)
            assert await client.pread(3, 0) == bytes(3)
        async with await connect(server, contexts=["base:allocation", "x-strange:thing"]) as client:
            assert list(client.contexts.values()) == ["base:allocation"]


async def test_a_client_with_contexts_is_told_that_there_is_no_such_export(sparse_pool: Pool) -> None:
    async with serving(sparse_pool) as server:
        with pytest.raises(ServerRefused, match="nobody"):
            await connect(server, "nobody")


async def test_a_client_passes_on_what_the_server_refuses(sparse_pool: Pool) -> None:
    async with serving(sparse_pool) as server, await connect(server) as client:
        with pytest.raises(ServerRefused, match="BLOCK_STATUS of 2 bytes") as refused:
            await client.block_status(2, SIZE - 1)
        assert refused.value.code == EINVAL
        assert await client.block_status(0, 0) == {name: [] for name in NAMES}


async def test_a_client_does_not_ask_about_less_than_a_block_of_the_export(sparse_pool: Pool) -> None:
    async with serving(sparse_pool) as server, await connect(server) as client:
        client.export = replace(client.export, minimum_block=512)
        for offset, length in ((1, 512), (512, 1)):
            with pytest.raises(LocalProtocolError, match="512"):
                await client.block_status(length, offset)
        statuses = dict(zip(NAMES, (3, 2, 1), strict=True))
        assert await client.block_status(512, 512) == {name: [(512, status)] for name, status in statuses.items()}
