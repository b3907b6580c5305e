"""What was changed since a snapshot, over a socket: who is told, and what, while the clone lives on."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from moving import Moving
from serving import BASE, Peer, make_pool, option, serving, until, where

from nbdclone.client import Client
from nbdclone.errors import ServerRefused
from nbdclone.protocol import wire
from nbdclone.protocol.wire import CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE
from nbdclone.server.server import Server
from nbdclone.store.image import Image
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.snapshots import take_snapshot

SIZE = len(BASE)
SINCE = "nbdclone:changed-since=golden"
BITMAP = "qemu:dirty-bitmap:golden"
CLEAN, DIRTY = 0, 1


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """A clone with two snapshots: block 1 is written before the first, 2 after it, 3 after the second."""
    pool = make_pool(tmp_path, BASE, "web1", "web2")
    for block, name in enumerate(["golden", "later", None], start=1):
        with pool.open_clone("web1") as disk:
            disk.pwrite(b"w" * BLOCK_SIZE, block * BLOCK_SIZE)
        if name:
            pool.snapshot(f"web1@{name}")
    return pool


async def connect(server: Server, *contexts: str, export: str = "web1") -> Client:
    return await Client.connect(where(server, export), contexts=contexts)


async def dirty(client: Client, context: str = BITMAP) -> list[int]:
    """The blocks that are dirty."""
    found: list[int] = []
    offset = 0
    for length, status in (await client.block_status(client.size, 0))[context]:
        assert status in (CLEAN, DIRTY)
        found += range(offset // BLOCK_SIZE, (offset + length) // BLOCK_SIZE) if status else ()
        offset += length
    assert offset == client.size
    return found


def request(export: str, queries: Sequence[str]) -> bytes:
    strings = [struct.pack(">I", len(text)) + text.encode() for text in (export, *queries)]
    return strings[0] + struct.pack(">I", len(queries)) + b"".join(strings[1:])


async def listed(server: Server, export: str, *queries: str) -> list[str]:
    async with await Peer.connect(server) as peer:
        await peer.greet()
        await peer.ask(wire.Option.STRUCTURED_REPLY)
        replies = await peer.ask(wire.Option.LIST_META_CONTEXT, request(export, queries))
        assert replies[-1] == (wire.OptionReply.ACK, b"")
        return [data[4:].decode() for _kind, data in replies[:-1]]


async def test_what_was_changed_since_each_snapshot_is_told(pool: Pool) -> None:
    later = "qemu:dirty-bitmap:later"
    async with serving(pool) as server:
        async with await connect(server, SINCE, BITMAP, later, "base:allocation") as client:
            assert set(client.contexts.values()) == {SINCE, BITMAP, later, "base:allocation"}
            assert await dirty(client) == await dirty(client, SINCE) == [2, 3]
            assert await dirty(client, later) == [3]
            await client.pwrite(b"x", 9 * BLOCK_SIZE + 5)
            await client.trim(2 * BLOCK_SIZE, 20 * BLOCK_SIZE)
            assert await dirty(client) == await dirty(client, SINCE) == [2, 3, 9, 20, 21]
            assert await dirty(client, later) == [3, 9, 20, 21]
        async with await connect(server, BITMAP, export="web1@later") as client:
            assert await dirty(client) == [2]


async def test_an_export_offers_the_snapshots_that_it_stands_on_and_no_others(pool: Pool) -> None:
    bitmaps = ["qemu:dirty-bitmap:golden", "qemu:dirty-bitmap:later"]
    async with serving(pool) as server:
        assert await listed(server, "web1", "qemu:dirty-bitmap:") == bitmaps
        assert await listed(server, "web1", "nbdclone:") == [
            *["nbdclone:origin", "nbdclone:changed-since=golden", "nbdclone:changed-since=later"]
        ]
        assert len(await listed(server, "web1")) == 7
        assert await listed(server, "web1@later", "qemu:dirty-bitmap:") == bitmaps[:1]
        for export in ("web1@golden", "web2", "base", "nobody", "nobody@golden"):
            assert await listed(server, export, "qemu:dirty-bitmap:") == []
            assert len(await listed(server, export)) == 3
        with pytest.raises(ServerRefused):
            await connect(server, BITMAP, export="nobody")
        async with await connect(server, BITMAP, "qemu:dirty-bitmap:nothing", "qemu:dirty-bitmap:") as client:
            assert list(client.contexts.values()) == [BITMAP]
        async with await connect(server, BITMAP, export="web1@golden") as client:
            assert client.contexts == {}


async def test_what_a_rollback_has_left_is_not_offered_any_more(pool: Pool) -> None:
    pool.rollback("web1@golden")
    async with serving(pool) as server:
        assert await listed(server, "web1", "qemu:dirty-bitmap:") == [BITMAP]
        async with await connect(server, BITMAP) as client:
            assert await dirty(client) == []


async def test_a_snapshot_meanwhile_changes_no_answer_and_is_offered_to_those_who_come_later(pool: Pool) -> None:
    async with serving(pool) as server, await connect(server, BITMAP) as client:
        export = server._exports._open["web1"]  # type: ignore[attr-defined]
        take_snapshot(pool.places, export.clone, "newest")
        assert await dirty(client) == [2, 3]
        await client.pwrite(b"x" * BLOCK_SIZE, 7 * BLOCK_SIZE)
        assert await dirty(client) == [2, 3, 7]
        async with await connect(server, "qemu:dirty-bitmap:newest", BITMAP) as other:
            assert await dirty(other, "qemu:dirty-bitmap:newest") == [7]
            assert await dirty(other) == [2, 3, 7]


async def test_when_the_snapshot_is_gone_all_is_dirty_to_those_who_have_the_context(pool: Pool) -> None:
    async with serving(pool) as server, await connect(server, BITMAP) as client:
        export = server._exports._open["web1"]  # type: ignore[attr-defined]
        pool.remove(["web1@golden"])
        assert await dirty(client) == [2, 3], "its layer is there still, and tells"
        assert await listed(server, "web1", "qemu:dirty-bitmap:") == ["qemu:dirty-bitmap:later"]
        export.clone.copy_up(0, SIZE)
        export.clone.relayer([Image.open("base", pool.places.bases / "base", pool.places.fs)])
        assert await dirty(client) == list(range(SIZE // BLOCK_SIZE))


async def test_another_snapshot_of_the_name_is_not_the_one_that_was_selected(pool: Pool) -> None:
    async with serving(pool) as server, await connect(server, "qemu:dirty-bitmap:later") as client:
        export = server._exports._open["web1"]  # type: ignore[attr-defined]
        pool.remove(["web1@later"])
        take_snapshot(pool.places, export.clone, "later")
        assert await dirty(client, "qemu:dirty-bitmap:later") == [3]
        async with await connect(server, "qemu:dirty-bitmap:later") as other:
            assert await dirty(other, "qemu:dirty-bitmap:later") == []


async def test_a_snapshot_that_goes_between_its_selection_and_the_export_leaves_all_dirty(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        await peer.ask(wire.Option.STRUCTURED_REPLY)
        [(_kind, data), _ack] = await peer.ask(wire.Option.SET_META_CONTEXT, request("web1", [BITMAP]))
        pool.remove(["web1@golden"])
        go = struct.pack(">I4sH", 4, b"web1", 0)
        assert (await peer.ask(wire.Option.GO, go))[-1][0] == wire.OptionReply.ACK
        await peer.send(peer.request(CMD_BLOCK_STATUS, 0, SIZE))
        *_head, payload = await peer.chunk()
        assert payload == data[:4] + struct.pack(">II", SIZE, DIRTY)


async def test_who_asks_for_one_extent_gets_the_first_whole(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        await peer.ask(wire.Option.STRUCTURED_REPLY)
        await peer.ask(wire.Option.SET_META_CONTEXT, request("web1", [BITMAP]))
        await peer.ask(wire.Option.GO, struct.pack(">I4sH", 4, b"web1", 0))
        for offset, expected in ((0, (2 * BLOCK_SIZE, CLEAN)), (2 * BLOCK_SIZE + 5, (2 * BLOCK_SIZE - 5, DIRTY))):
            await peer.send(peer.request(CMD_BLOCK_STATUS, offset, SIZE - offset, flags=CMD_FLAG_REQ_ONE))
            *_head, payload = await peer.chunk()
            assert payload[4:] == struct.pack(">II", *expected)


async def test_what_came_behind_the_end_of_the_snapshot_is_dirty_although_nobody_wrote_it(pool: Pool) -> None:
    with pool.open_clone("web1") as disk:
        disk.resize(SIZE + 10 * BLOCK_SIZE)
    async with serving(pool) as server, await connect(server, BITMAP) as client:
        end = SIZE // BLOCK_SIZE
        assert await dirty(client) == [2, 3, *range(end, end + 10)]


async def test_a_connection_that_moves_to_where_the_export_is_is_told_the_same(pool: Pool) -> None:
    async with (
        Moving(pool, sockets=[pool.path.parent / "nbd.sock"]) as server,
        await connect(server, BITMAP, "base:allocation") as client,
    ):
        assert server.moves == 1
        assert await dirty(client) == [2, 3]


ACCESS = """
[access."web1*later"]
uids = []
[access.web2]
uids = []
"""


async def test_snapshots_that_are_not_for_a_client_are_not_told_of(pool: Pool) -> None:
    pool.snapshot("web2@secret")
    pool.settings_path.write_text(ACCESS)
    async with serving(pool) as server:
        assert await listed(server, "web1", "qemu:dirty-bitmap:") == [BITMAP]
        for export in ("web2", "web1@later"):
            assert await listed(server, export, "qemu:dirty-bitmap:") == []
        async with await connect(server, "qemu:dirty-bitmap:later") as client:
            assert client.contexts == {}


async def test_a_clone_that_cannot_be_read_has_no_snapshots_and_haggling_goes_on(pool: Pool) -> None:
    pool.places.delta("web1").write_bytes(bytes(1 << 20))
    async with serving(pool) as server:
        assert await listed(server, "web1", "qemu:dirty-bitmap:") == []
        async with await connect(server, "base:allocation", BITMAP, export="web2") as client:
            assert list(client.contexts.values()) == ["base:allocation"]


async def test_an_option_that_comes_ahead_of_the_answer_is_answered_after_it(pool: Pool) -> None:
    async with serving(pool) as server, await Peer.connect(server) as peer:
        await peer.greet()
        await peer.ask(wire.Option.STRUCTURED_REPLY)
        asked = option(wire.Option.LIST_META_CONTEXT, request("web1", ["qemu:dirty-bitmap:"]))
        await peer.send(asked, option(wire.Option.LIST), asked)
        answers = [await peer.answer() for _ in range(3)]
        assert answers[0] == answers[2]
        assert [len(answer) for answer in answers] == [3, 6, 3]


async def test_random_writes_trims_and_snapshots_are_copied_by_what_is_dirty(pool: Pool) -> None:
    """A copy of the snapshot, brought up to date with nothing but what is dirty since it, is the disk."""
    rng = random.Random(5)
    async with serving(pool) as server, await connect(server, BITMAP) as client:
        async with await connect(server, export="web1@golden") as golden:
            backup = bytearray(await golden.pread(SIZE, 0))
        export = server._exports._open["web1"]  # type: ignore[attr-defined]
        for number in range(60):
            offset, length = rng.randrange(SIZE - 40_000), rng.randint(1, 40_000)
            await client.pwrite(rng.randbytes(length), offset)
            await client.trim(length, rng.randrange(SIZE - 40_000))
            if number % 15 == 7:
                await until(lambda: not export.changing)
                take_snapshot(pool.places, export.clone, f"s{number}")
        told = set(await dirty(client))
        assert len(told) < SIZE // BLOCK_SIZE
        now = await client.pread(SIZE, 0)
        for block in told:
            at = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            backup[at] = now[at]
        assert backup == now
