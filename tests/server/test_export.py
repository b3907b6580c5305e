"""A disk that is slow: what waits for it, and what does not. And how flushes are gathered."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path

import pytest
from serving import BASE, BASE_SIZE, MIB, Disk, Peer, connect, make_pool, serving, until

from nbdclone.protocol.wire import (
    CMD_DISC,
    CMD_FLAG_FUA,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EIO,
)
from nbdclone.server import export
from nbdclone.server import input as input_module
from nbdclone.server.reading import MAX_TOGETHER
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.writing import PIECE_SIZE


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def pool(tmp_path: Path, disk: Disk) -> Pool:
    return make_pool(tmp_path, BASE, "web1", "web2", fs=disk)


# Reads


async def test_a_cold_read_holds_back_no_other(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer, await connect(server, "web2") as other:
        disk.cold = range(BLOCK_SIZE)
        disk.reads.close()
        await peer.send(*[peer.request(CMD_READ, 0, 512, cookie=cookie) for cookie in range(3)])
        await until(lambda: disk.reads.waiting >= 1)  # short ones that come together are one job
        for cookie in range(10, 20):  # the connection's own
            assert (await peer.run(CMD_READ, 8192, 512, cookie=cookie)).data == BASE[8192:8704]
        assert await other.pread(512, 4096) == BASE[4096:4608]
        await other.pwrite(b"x" * 512, 4096)
        assert (await peer.run(CMD_WRITE, 4096, payload=b"y" * 512, cookie=20)).error == 0
        disk.reads.open()
        assert {reply.data for reply in (await peer.replies(3)).values()} == {BASE[:512]}


async def test_cold_reads_of_every_size_are_right(pool: Pool, disk: Disk) -> None:
    disk.cold = range(BASE_SIZE)
    async with serving(pool) as server, await connect(server, "web1") as client:
        for length in (1, 512, 4096, 65536, 65537, MIB, 3 * MIB):
            assert await client.pread(length, 100) == BASE[100 : 100 + length]


async def test_short_cold_reads_of_a_turn_go_to_threads_some_at_a_time_and_fail_alone(
    pool: Pool, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_module, "SLICE_S", 60)
    disk.cold = range(BASE_SIZE)
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        disk.reads.close()
        reads = [peer.request(CMD_READ, 4096 * n, 512, cookie=n) for n in range(3 * MAX_TOGETHER)]
        await peer.send(b"".join(reads))
        await until(lambda: disk.reads.waiting == 3)
        disk.reads.open()
        replies = await peer.replies(len(reads))
        assert {n: reply.data for n, reply in replies.items()} == {
            n: BASE[4096 * n : 4096 * n + 512] for n in range(len(reads))
        }
        disk.unreadable = range(4096, 8192)
        await peer.send(*[peer.request(CMD_READ, 4096 * n, 512, cookie=n) for n in range(3)])
        replies = await peer.replies(3)
        assert [replies[n].error for n in range(3)] == [0, EIO, 0]
        assert replies[2].data == BASE[8192:8704]


async def test_a_connection_that_goes_with_cold_reads_unbegun_or_under_way_leaves_nothing(
    pool: Pool, disk: Disk
) -> None:
    disk.cold = range(BASE_SIZE)
    async with serving(pool) as server:
        for ending in (b"garbage" * 10, b""):
            async with await Peer.open(server, "web1") as peer:
                disk.reads.close()
                reads = [peer.request(CMD_READ, 4096 * n, 512, cookie=n) for n in range(20)]
                await peer.send(b"".join([*reads, ending]))
                if not ending:
                    await until(lambda: disk.reads.waiting > 0)
            disk.reads.open()
        await until(lambda: not server._connections)
        assert server.scratch.budget.used == 0


async def test_where_nobody_can_say_what_is_in_memory_everything_is_read_right(pool: Pool, disk: Disk) -> None:
    disk.knows_nowait = False  # tmpfs, overlayfs, NFS
    async with serving(pool) as server, await connect(server, "web1") as client:
        for length in (1, 512, 65536, 65537, MIB, 3 * MIB):
            assert await client.pread(length, 100) == BASE[100 : 100 + length]
        await client.pwrite(b"x" * 5000, 100)
        assert await client.pread(5002, 99) == BASE[99:100] + b"x" * 5000 + BASE[5100:5101]


async def test_a_cold_map_holds_back_no_other(pool: Pool, disk: Disk) -> None:
    disk.cold = range(64 << 10, (64 << 10) + 1)  # the map page of the first segment
    disk.reads.close()
    async with serving(pool) as server, await Peer.open(server, "web1") as peer, await connect(server, "base") as base:
        await peer.send(peer.request(CMD_READ, 0, 512, cookie=1), peer.request(CMD_WRITE, 512, payload=b"x", cookie=2))
        await until(lambda: disk.reads.waiting == 2)
        assert await base.pread(512, 4096) == BASE[4096:4608]
        disk.reads.open()
        replies = await peer.replies(2)
        assert (replies[1].data, replies[2].error) == (BASE[:512], 0)
        assert (await peer.run(CMD_READ, 512, 1)).data == b"x"


async def test_reads_right_after_the_page_cache_was_dropped(tmp_path: Path) -> None:
    image = random.Random("cold").randbytes(16 * MIB)
    pool = make_pool(tmp_path, image, "web1")
    async with serving(pool) as server, await connect(server, "web1") as client, await connect(server, "web1") as other:
        expected = bytearray(image)
        for offset in range(0, 16 * MIB, 99_999):
            await client.pwrite(b"changed", offset)
            expected[offset : offset + 7] = b"changed"
        await client.flush()
        for file in (pool.path / "bases" / "base" / "image", pool.path / "clones" / "web1" / "delta"):
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        offsets = random.Random(1).sample(range(0, 16 * MIB - 8192, 4096), 500)
        reading = asyncio.gather(*[client.pread(8192, offset) for offset in offsets])
        slowest = 0.0
        while not reading.done():
            began = time.perf_counter()
            await other.pread(512, 0)
            slowest = max(slowest, time.perf_counter() - began)
        assert [bytes(expected[offset : offset + 8192]) for offset in offsets] == await reading
        assert slowest < 5.0
        assert await client.pread(16 * MIB, 0) == expected


# Changes


async def test_a_write_in_a_thread_holds_back_no_read_and_no_other_clone(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer, await connect(server, "web2") as other:
        disk.writes.close()
        await peer.send(peer.request(CMD_WRITE, 0, payload=b"x" * 2 * MIB, cookie=1))
        await until(lambda: disk.writes.waiting == 1)
        assert (await peer.run(CMD_READ, 3 * MIB, 512, cookie=2)).data == BASE[3 * MIB : 3 * MIB + 512]
        await other.pwrite(b"y" * 4096, 0)
        assert await other.pread(4096, 0) == b"y" * 4096
        disk.writes.open()
        assert (await peer.reply()).error == 0
        assert (await peer.run(CMD_READ, 0, 2 * MIB)).data == b"x" * 2 * MIB


async def test_changes_behind_a_slow_one_keep_their_order(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        disk.writes.close()
        await peer.send(
            peer.request(CMD_WRITE, 0, payload=b"1" * 2 * MIB, cookie=1),
            peer.request(CMD_WRITE, 0, payload=b"2" * MIB, cookie=2),
            peer.request(CMD_TRIM, 0, 512 << 10, cookie=3),
            peer.request(CMD_WRITE, 0, payload=b"4" * 4096, cookie=4),
            peer.request(CMD_WRITE_ZEROES, 0, 512, cookie=5),
            peer.request(CMD_WRITE, 100, payload=b"6" * 10, cookie=6),
        )
        await until(lambda: disk.writes.waiting == 1)
        disk.writes.open()
        assert [(await peer.reply()).cookie for _ in range(6)] == [1, 2, 3, 4, 5, 6]
        expected = bytearray(b"1" * 2 * MIB)
        expected[:MIB] = b"2" * MIB
        expected[: 512 << 10] = bytes(512 << 10)
        expected[:4096] = bytes(512) + b"4" * 3584
        expected[100:110] = b"6" * 10
        assert (await peer.run(CMD_READ, 0, 2 * MIB)).data == expected


async def test_parts_of_one_block_written_through_threads_and_the_loop_all_survive(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server:
        peers = [await Peer.open(server, "web1") for _ in range(8)]
        # The block is cold when the first write needs the rest of it; the others arrive while it is being read.
        disk.cold = range(BLOCK_SIZE)
        disk.reads.close()
        for number, peer in enumerate(peers):
            await peer.send(peer.request(CMD_WRITE, 512 * number, payload=bytes([number + 1]) * 256))
        await until(lambda: disk.reads.waiting == 1)
        disk.reads.open()
        for peer in peers:
            assert (await peer.reply()).error == 0
            peer.close()
        async with await connect(server, "web1") as client:
            expected = bytearray(BASE[:BLOCK_SIZE])
            for number in range(8):
                expected[512 * number : 512 * number + 256] = bytes([number + 1]) * 256
            assert await client.pread(BLOCK_SIZE, 0) == expected


async def test_after_a_write_that_stalled_the_loop_writes_go_through_threads_for_a_while(
    pool: Pool, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "STALL_S", -1.0)
    monkeypatch.setattr(export, "STALLED_FOR_S", 0.2)
    async with serving(pool) as server, await connect(server, "web1") as client:
        await client.pwrite(b"x" * 4096, 0)
        assert disk.writes.passed == 0
        await client.pwrite(b"y" * 4096, 0)
        assert disk.writes.passed == 1
        monkeypatch.undo()
        await asyncio.sleep(0.25)
        await client.pwrite(b"z" * 4096, 0)
        assert disk.writes.passed == 1
        assert await client.pread(4096, 0) == b"z" * 4096


async def test_writes_that_waited_for_one_in_a_thread_do_not_go_through_threads_for_ever(
    pool: Pool, disk: Disk
) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        disk.writes.close()
        large = peer.request(CMD_WRITE, 0, payload=b"1" * 2 * MIB, cookie=1)
        await peer.send(
            large, *[peer.request(CMD_WRITE, 4096 * n, payload=b"2" * 4096, cookie=n) for n in range(2, 202)]
        )
        await until(lambda: disk.writes.waiting == 1)
        passed = disk.writes.passed
        disk.writes.open()
        assert [(await peer.reply()).cookie for _ in range(201)] == [*range(1, 202)]
        # The large one in its pieces, with its marks; and one more after each MAX_ATTEMPTS, for the sake of the others.
        assert disk.writes.passed - passed <= 2 * MIB // PIECE_SIZE + 2 + 200 // export.MAX_ATTEMPTS
        passed = disk.writes.passed
        assert (await peer.run(CMD_WRITE, 0, payload=b"3" * 4096)).error == 0
        assert disk.writes.passed == passed


# Flushes


async def test_while_a_flush_hangs_reads_and_writes_go_on(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer, await connect(server, "web2") as other:
        await peer.run(CMD_WRITE, 0, payload=b"x" * 512)
        disk.syncs.close()
        await peer.send(peer.request(CMD_FLUSH, cookie=1))
        await until(lambda: disk.syncs.waiting == 1)
        assert (await peer.run(CMD_READ, 0, 512, cookie=2)).data == b"x" * 512
        assert (await peer.run(CMD_WRITE, 4096, payload=b"y" * 512, cookie=3)).error == 0
        assert (await peer.run(CMD_TRIM, 8192, 4096, cookie=4)).error == 0
        assert await other.pread(512, 4096) == BASE[4096:4608]
        disk.syncs.open()
        assert (await peer.reply()).cookie == 1


async def test_one_sync_serves_all_flushes_that_wait_for_it(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server:
        peers = [await Peer.open(server, "web1") for _ in range(4)]
        await peers[0].run(CMD_WRITE, 0, payload=b"x" * 4096)
        await peers[0].run(CMD_FLUSH)  # the map is marked and written: from here on a flush is one sync
        for peer in peers:
            await peer.run(CMD_WRITE, 0, payload=b"y" * 4096)
        disk.syncs.close()
        before = disk.syncs.passed
        await peers[0].send(peers[0].request(CMD_FLUSH))
        await until(lambda: disk.syncs.waiting == 1)
        await peers[0].run(CMD_WRITE, 0, payload=b"z" * 4096, cookie=99)
        for peer in peers:
            await peer.send(*[peer.request(CMD_FLUSH, cookie=cookie) for cookie in range(100, 150)])
        await asyncio.sleep(0.05)
        disk.syncs.open()
        for peer in peers:
            replies = await peer.replies(50 + (peer is peers[0]))
            assert {reply.error for reply in replies.values()} == {0}
            peer.close()
        assert disk.syncs.passed - before == 2


async def test_flushes_and_changes_that_wait_leave_threads_for_reads(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer, await connect(server, "web2") as other:
        await peer.run(CMD_WRITE, 0, payload=b"x" * 512)
        disk.syncs.close()
        await peer.send(*[peer.request(CMD_FLUSH, cookie=cookie) for cookie in range(100, 200)])
        await until(lambda: disk.syncs.waiting == 1)
        disk.writes.close()
        await peer.send(
            peer.request(CMD_WRITE, 0, payload=b"x" * 2 * MIB, cookie=200),
            *[peer.request(CMD_TRIM, 3 * MIB, 4096, cookie=cookie) for cookie in range(201, 300)],
        )
        await until(lambda: (disk.syncs.waiting, disk.writes.waiting) == (1, 1))
        disk.cold = range(MIB, 2 * MIB)
        async with asyncio.timeout(2):
            assert await other.pread(512, MIB) == BASE[MIB : MIB + 512]
        disk.syncs.open()
        disk.writes.open()
        assert {reply.error for reply in (await peer.replies(200)).values()} == {0}


async def test_a_flush_that_comes_while_one_runs_is_not_answered_by_it(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as one, await Peer.open(server, "web1") as two:
        await one.run(CMD_WRITE, 0, payload=b"x" * 4096)
        await one.run(CMD_FLUSH)
        await one.run(CMD_WRITE, 0, payload=b"y" * 4096)
        disk.syncs.close()
        await one.send(one.request(CMD_FLUSH))
        await until(lambda: disk.syncs.waiting == 1)
        assert (await two.run(CMD_WRITE, 4096, payload=b"z" * 4096, cookie=1)).error == 0
        await two.send(two.request(CMD_FLUSH, cookie=2))
        before = disk.syncs.passed
        disk.syncs.open()
        assert (await two.reply()).cookie == 2
        assert disk.syncs.passed - before >= 2  # the first flush's, and its own


@pytest.mark.parametrize("command", [CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM])
async def test_fua_is_answered_only_after_a_sync(pool: Pool, disk: Disk, command: int) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        disk.syncs.close()
        payload = b"x" * 4096 if command == CMD_WRITE else b""
        await peer.send(peer.request(command, 0, 4096, payload=payload, flags=CMD_FLAG_FUA, cookie=1))
        await until(lambda: disk.syncs.waiting == 1)
        assert (await peer.run(CMD_READ, 4096, 512, cookie=2)).cookie == 2  # nothing has come before it
        disk.syncs.open()
        assert (await peer.reply()).cookie == 1


async def test_a_large_write_with_fua_is_answered_only_after_a_sync(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        disk.syncs.close()
        await peer.send(peer.request(CMD_WRITE, 0, payload=b"x" * 2 * MIB, flags=CMD_FLAG_FUA))
        await until(lambda: disk.syncs.waiting == 1)
        disk.syncs.open()
        assert (await peer.reply()).error == 0


async def test_a_flush_covers_what_other_connections_wrote(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await connect(server, "web1") as one, await connect(server, "web1") as two:
        await one.flush()
        before = disk.syncs.passed
        await one.pwrite(b"x" * 4096, 0)
        await two.flush()
        assert disk.syncs.passed - before == 1
        await two.flush()
        assert disk.syncs.passed - before == 1  # nothing was written since


async def test_the_last_connection_to_leave_flushes(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server:
        async with await connect(server, "web1") as client:
            await client.flush()
            before = disk.syncs.passed
            await client.pwrite(b"x" * 4096, 0)
        assert disk.syncs.passed > before


async def test_who_comes_while_a_clone_is_being_closed_waits_and_finds_it_whole(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        await peer.run(CMD_WRITE, 0, payload=b"x" * 4096)
        disk.syncs.close()
        await peer.send(peer.request(CMD_DISC))
        await until(lambda: disk.syncs.waiting == 1)
        coming = asyncio.create_task(connect(server, "web1"))
        await asyncio.sleep(0.05)
        assert not coming.done()
        disk.syncs.open()
        async with await coming as client:
            assert await client.pread(4096, 0) == b"x" * 4096
