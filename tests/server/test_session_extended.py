"""Extended headers over a socket: long lengths, payloads on any command, replies that repeat the offset."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from serving import MIB, Disk, Hasty, Peer, go_data, make_pool, serving, until, where

from nbdclone.client import Client
from nbdclone.errors import LocalProtocolError, ServerRefused
from nbdclone.protocol import wire
from nbdclone.protocol.block_status import parse_status_filter
from nbdclone.protocol.wire import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_FUA,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    ENOSPC,
    EOVERFLOW,
    EPERM,
    MAX_PAYLOAD,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    REPLY_TYPE_ERROR,
    Mode,
    Option,
    OptionReply,
    TransmissionFlag,
)
from nbdclone.server import host, session
from nbdclone.server.input import DIRECT_WRITE
from nbdclone.server.server import Server
from nbdclone.store.pool import Pool

GIB = 1 << 30
SIZE = 40 * GIB
IMAGE = b"d" * MIB
NAMES = ["base:allocation", "qemu:allocation-depth", "nbdclone:origin"]


@asynccontextmanager
async def asking(server: Server, export: str = "web1", contexts: list[str] = NAMES) -> AsyncIterator[Peer]:
    """A peer that speaks extended headers and has selected contexts."""
    async with await Peer.connect(server) as peer:
        await peer.greet()
        await peer.agree(Mode.EXTENDED)
        strings = [struct.pack(">I", len(name)) + name.encode() for name in (export, *contexts)]
        data = strings[0] + struct.pack(">I", len(contexts)) + b"".join(strings[1:])
        assert (await peer.ask(Option.SET_META_CONTEXT, data))[-1][0] == OptionReply.ACK
        assert (await peer.ask(Option.GO, go_data(export)))[-1][0] == OptionReply.ACK
        yield peer


async def statuses(peer: Peer) -> dict[int, list[tuple[int, int]]]:
    """The reply to NBD_CMD_BLOCK_STATUS: the extents by the context's id."""
    told = {}
    flags = 0
    while not flags:
        flags, kind, _cookie, content = await peer.chunk()
        assert kind == REPLY_TYPE_BLOCK_STATUS_EXT
        context, count = struct.unpack_from(">II", content)
        told[context] = list(struct.iter_unpack(">QQ", content[8:]))
        assert len(told[context]) == count
    assert flags == REPLY_FLAG_DONE
    return told


async def test_every_reply_is_extended_and_repeats_the_offset(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.EXTENDED) as peer:
        payload = b"p" * 1000
        for number, (command, offset, length, error) in enumerate(
            [
                (CMD_WRITE, 5000, 0, 0),
                (CMD_READ, 5000, 1000, 0),
                (CMD_FLUSH, 0, 0, 0),
                (CMD_TRIM, 1 << 20, 5 * GIB, 0),
                (CMD_WRITE_ZEROES, 0, SIZE, 0),
                (CMD_CACHE, 0, SIZE, 0),
                (CMD_READ, SIZE, 1, EINVAL),
                (CMD_READ, 0, MAX_PAYLOAD + 1, EOVERFLOW),
                (CMD_TRIM, 4096, SIZE, EINVAL),
                (CMD_WRITE_ZEROES, 4096, (1 << 64) - 1, ENOSPC),
                (CMD_BLOCK_STATUS, 7, 1, EINVAL),  # no context
                (99, 3, 1, EINVAL),
            ]
        ):
            data = payload if command == CMD_WRITE else b""
            cookie = (1 << 64) - 1 - number
            reply = await peer.run(command, offset, length, cookie=cookie, payload=data)
            assert (reply.cookie, reply.error, reply.structured) == (cookie, error, True), command
            assert reply.data == (payload if command == CMD_READ and not error else b"")


async def test_a_write_of_any_length_arrives_with_the_flag_and_without(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.EXTENDED) as peer:
        for length in (1, 4096, DIRECT_WRITE - 32, DIRECT_WRITE, 3 * MIB + 5):
            for flag in (CMD_FLAG_PAYLOAD_LEN, 0):
                payload = bytes([1 + length % 255 + (flag and 1)]) * length
                cookie = wire.EXTENDED_COOKIE.pack(7, 12345)
                peer.offsets[7] = 12345
                flags = flag | CMD_FLAG_FUA
                head = wire.EXTENDED_REQUEST.pack(wire.EXTENDED_REQUEST_MAGIC, flags, CMD_WRITE, cookie, length)
                await peer.send(head + payload)
                assert not (await peer.reply()).error
                assert (await peer.run(CMD_READ, 12345, length)).data == payload


@pytest.mark.parametrize("length", [1, 12, 4096, DIRECT_WRITE, 2 * MIB])
async def test_a_payload_that_nobody_asked_for_is_dropped_and_refused(tmp_path: Path, length: int) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, asking(server) as peer:
        for command in (CMD_READ, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS, 99):
            request = peer.request(command, 512, payload=b"\x6e" * length)
            peer.reads.clear()
            await peer.send(request)
            assert (await peer.reply()).error == EINVAL, command
        assert (await peer.run(CMD_READ, 0, MIB)).data == IMAGE  # nothing was trimmed, and the connection is alive
        await peer.send(peer.request(CMD_DISC, payload=b"x" * length))
        assert await peer.is_closed()


@pytest.mark.parametrize("command", [CMD_READ, CMD_WRITE, CMD_BLOCK_STATUS, 99])
async def test_a_payload_over_the_limit_ends_the_connection(tmp_path: Path, command: int) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.EXTENDED) as peer:
        cookie = wire.EXTENDED_COOKIE.pack(7, 0)
        magic = wire.EXTENDED_REQUEST_MAGIC
        await peer.send(wire.EXTENDED_REQUEST.pack(magic, CMD_FLAG_PAYLOAD_LEN, command, cookie, MAX_PAYLOAD + 1))
        assert await peer.is_closed()


async def test_a_compact_request_ends_the_connection(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.EXTENDED) as peer:
        await peer.send(wire.REQUEST.pack(wire.REQUEST_MAGIC, 0, CMD_READ, 1, 0, 512) * 2)
        assert await peer.is_closed()


# Block status


async def test_block_status_has_long_extents_in_extended_chunks(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, asking(server) as peer:
        await peer.send(peer.request(CMD_BLOCK_STATUS, 4096, SIZE - 4096))
        data, hole = MIB - 4096, SIZE - MIB
        assert await statuses(peer) == {
            1: [(data, 0), (hole, 3)],
            2: [(data, 2), (hole, 0)],
            3: [(data, 1), (hole, 0)],
        }
        await peer.send(peer.request(CMD_BLOCK_STATUS, MIB, SIZE - MIB, flags=CMD_FLAG_REQ_ONE))
        assert await statuses(peer) == {1: [(hole, 3)], 2: [(hole, 0)], 3: [(hole, 0)]}


@pytest.mark.parametrize("ids", [[1], [3], [3, 1], [2, 3, 1]])
async def test_a_payload_limits_block_status_to_some_contexts(tmp_path: Path, ids: list[int]) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, asking(server) as peer:
        payload = struct.pack(f">Q{len(ids)}I", 2 * MIB, *ids)
        await peer.send(peer.request(CMD_BLOCK_STATUS, 4096, flags=CMD_FLAG_REQ_ONE, payload=payload))
        assert {context: extents[0][0] for context, extents in (await statuses(peer)).items()} == dict.fromkeys(
            ids, MIB - 4096
        )


@pytest.mark.parametrize(
    "payload",
    [
        struct.pack(">Q", MIB),
        struct.pack(">QI", MIB, 2),  # not selected
        struct.pack(">QI", MIB, 77),
        struct.pack(">QII", MIB, 1, 1),
        struct.pack(">QI", MIB, 1) + b"x",
        struct.pack(">QI", 0, 1),
        struct.pack(">QI", SIZE, 1),  # beyond the end
        struct.pack(">QI", (1 << 64) - 1, 1),
        struct.pack(">Q", MIB) + struct.pack(">I", 1) * 20_000,
        b"\0",
    ],
)
async def test_a_payload_that_is_no_filter_is_einval_and_the_connection_lives(tmp_path: Path, payload: bytes) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, asking(server, contexts=[NAMES[0], NAMES[2]]) as peer:
        await peer.send(peer.request(CMD_BLOCK_STATUS, 4096, cookie=5, payload=payload))
        flags, kind, cookie, content = await peer.chunk()
        assert (flags, kind, cookie) == (REPLY_FLAG_DONE, REPLY_TYPE_ERROR, 5)
        assert wire.ERROR.unpack_from(content)[0] == EINVAL
        await peer.send(peer.request(CMD_BLOCK_STATUS, 0, 512))
        assert set(await statuses(peer)) == {1, 3}


async def test_without_contexts_a_filter_is_refused(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.EXTENDED) as peer:
        reply = await peer.run(CMD_BLOCK_STATUS, 0, payload=struct.pack(">QI", MIB, 1))
        assert reply.error == EINVAL


# Our own client


async def connect(server: Server, export: str = "web1", mode: Mode = Mode.EXTENDED) -> Client:
    return await Client.connect(where(server, export), contexts=NAMES, mode=mode)


@pytest.mark.parametrize("mode", Mode)
async def test_the_client_does_the_same_in_every_mode(
    tmp_path: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    filters: list[bytes] = []

    def noted(payload: memoryview, selected: list[int]) -> tuple[int, list[int]] | None:
        filters.append(bytes(payload))
        return parse_status_filter(payload, selected)

    monkeypatch.setattr(session, "parse_status_filter", noted)
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, await connect(server, mode=mode) as disk:
        assert disk.mode is mode
        offered = bool(disk.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD)
        assert offered == (mode is Mode.EXTENDED)
        await disk.pwrite(b"x" * 100_000, 20 * GIB)
        await disk.pwrite(b"y" * 5, 30 * GIB)
        await disk.zero(9 * GIB, 15 * GIB, fua=True)
        await disk.trim(MIB, 0)
        await disk.cache(SIZE, 0)
        await disk.flush()
        assert await disk.pread(MIB, 0) == bytes(MIB)
        assert await disk.pread(100_000, 20 * GIB) == bytes(100_000)
        assert (await disk.pread(4096, 30 * GIB)).startswith(b"y" * 5)
        with pytest.raises(ServerRefused) as refused:
            await disk.zero(1, SIZE)
        assert refused.value.code == ENOSPC
        if mode is Mode.SIMPLE:
            assert disk.contexts == {}
            return
        told = await disk.block_status(SIZE, 0)
        assert told[NAMES[0]] == [(30 * GIB, 3), (4096, 0), (10 * GIB - 4096, 3)]
        for names in (NAMES[:1], NAMES[1:]):
            assert await disk.block_status(SIZE, 0, contexts=names) == {name: told[name] for name in names}
        expected = [struct.pack(">QI", SIZE, 1), struct.pack(">QII", SIZE, 2, 3)]
        assert filters == (expected if mode is Mode.EXTENDED else [])
        with pytest.raises(LocalProtocolError):
            await disk.block_status(SIZE, 0, contexts=["base:other"])


async def test_a_read_only_export_refuses_long_changes(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, IMAGE, "web1", size=SIZE)
    async with serving(pool) as server, await Peer.open(server, "base", mode=Mode.EXTENDED) as peer:
        assert (await peer.run(CMD_WRITE_ZEROES, 0, 1 << 60)).error == EPERM
        assert (await peer.run(CMD_WRITE, 0, payload=b"x" * DIRECT_WRITE)).error == EPERM


# Long changes


class Steps(Hasty):
    """Notes where holes are made, and how long."""

    def __init__(self) -> None:
        self.punched: list[tuple[int, int]] = []

    def punch(self, fd: int, offset: int, length: int) -> None:
        self.punched.append((offset, length))
        super().punch(fd, offset, length)


async def test_a_long_trim_lets_other_changes_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_ZEROED", MIB)
    disk = Disk()
    pool = make_pool(tmp_path, b"d" * 8 * MIB, "web1", fs=disk)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.EXTENDED) as peer:
        disk.writes.close()
        # Both wait for the gate in turn, at the first block, which the trim does not cover whole.
        await peer.send(peer.request(CMD_TRIM, 512, 8 * MIB - 512, cookie=1))
        await until(lambda: disk.writes.waiting == 1)
        await peer.send(peer.request(CMD_WRITE, 7 * MIB + 100, cookie=2, payload=b"w" * 1000))
        assert (await peer.run(CMD_READ, 0, 512, cookie=3)).cookie == 3  # so the write has been taken
        disk.writes.open()
        first, second = await peer.reply(), await peer.reply()
        assert (first.cookie, second.cookie) == (2, 1)
        assert not first.error
        assert not second.error
        assert (await peer.run(CMD_READ, 0, 8 * MIB)).data == b"d" * 512 + bytes(8 * MIB - 512)


async def test_the_steps_of_a_long_trim_begin_at_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_ZEROED", MIB)
    disk = Steps()
    pool = make_pool(tmp_path, b"d" * 4 * MIB, "web1", fs=disk)
    async with serving(pool) as server, await Peer.open(server, "web1", mode=Mode.EXTENDED) as peer:
        assert not (await peer.run(CMD_WRITE_ZEROES, 1000, 4 * MIB - 1000, flags=CMD_FLAG_FUA)).error
        assert (await peer.run(CMD_READ, 0, 4 * MIB)).data == b"d" * 1000 + bytes(4 * MIB - 1000)
    assert [length for _offset, length in disk.punched] == [MIB - 4096, MIB, MIB, MIB]


async def test_what_is_left_of_a_long_trim_is_not_waited_for_when_the_server_must_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_ZEROED", MIB)
    monkeypatch.setattr(host, "DRAIN_S", 0.05)
    disk = Disk()
    pool = make_pool(tmp_path, b"d" * 8 * MIB, "web1", fs=disk)
    abandon = Server._abandon

    def abandon_and_open(server: Server) -> None:
        abandon(server)
        disk.writes.open()

    monkeypatch.setattr(Server, "_abandon", abandon_and_open)
    async with serving(pool) as server:
        disk.writes.close()
        async with await Peer.open(server, "web1", mode=Mode.EXTENDED) as peer:
            await peer.send(peer.request(CMD_TRIM, 512, 8 * MIB - 512))
            await until(lambda: disk.writes.waiting == 1)
    with Pool.open(pool.path, fs=Hasty()).open_clone("web1") as clone:
        assert clone.pread(8 * MIB, 0) == b"d" * 512 + bytes(MIB - 512) + b"d" * 7 * MIB
