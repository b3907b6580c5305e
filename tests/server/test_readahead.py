"""Whoever reads one block after another from a cold disk is read ahead of; whoever reads here and there is not."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from serving import BASE, BASE_SIZE, MIB, Disk, Gate, Peer, connect, make_pool, serving, until

from nbdclone.protocol.wire import CMD_READ
from nbdclone.server import readahead
from nbdclone.server.readahead import MAX_READ, MAX_WINDOW, MIN_STREAK, MIN_WINDOW, SLACK, Readahead
from nbdclone.store.clone import Clone

KIB = 1 << 10


class Far:
    """A clone of 1 GiB that notes what it was asked to read ahead."""

    size = 1 << 30

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def prefetch(self, offset: int, length: int) -> None:
        self.asked.append((offset, length))


@pytest.fixture
def far() -> Far:
    return Far()


def follow(far: Far, reads: list[tuple[int, int]]) -> Readahead:
    ahead = Readahead(far)  # type: ignore[arg-type]
    for offset, length in reads:
        if job := ahead.note_cold(offset, length):
            job()
            ahead.job_done()
    return ahead


def row(start: int, length: int, count: int) -> list[tuple[int, int]]:
    return [(start + number * length, length) for number in range(count)]


def test_a_stream_is_read_ahead_in_windows_that_double_up_to_a_limit(far: Far) -> None:
    follow(far, row(100 * MIB, 128 * KIB, 800))
    assert far.asked[0] == (100 * MIB + MIN_STREAK, MIN_WINDOW)
    ends = [offset + length for offset, length in far.asked]
    assert [offset for offset, _ in far.asked[1:]] == ends[:-1]  # without gaps, and nothing twice
    assert max(length for _, length in far.asked) <= MAX_WINDOW
    assert 200 * MIB <= ends[-1] <= 200 * MIB + MAX_WINDOW


def test_random_reads_are_not_read_ahead_of(far: Far) -> None:
    seed = random.Random(1)
    follow(far, [(seed.randrange(far.size // 4096) * 4096, 64 * KIB) for _ in range(2000)])
    assert sum(length for _, length in far.asked) <= MIB


def test_a_few_short_reads_in_a_row_are_no_stream(far: Far) -> None:
    follow(far, row(0, 16 * KIB, MIN_STREAK // (16 * KIB) - 1))
    assert far.asked == []


def test_reading_the_same_again_is_no_stream(far: Far) -> None:
    follow(far, [(4096 * (number % 8), 4096) for number in range(500)])
    assert far.asked == []


def test_short_reads_some_way_apart_are_no_stream(far: Far) -> None:
    follow(far, [(SLACK // 2 * number, 4096) for number in range(MIN_STREAK // 4096 - 1)])
    assert far.asked == []


def test_requests_at_depth_may_come_out_of_order(far: Far) -> None:
    reads = row(0, 64 * KIB, 256)
    for first in range(0, len(reads), 4):
        reads[first : first + 4] = reversed(reads[first : first + 4])
    follow(far, reads)
    assert sum(far.asked[-1]) >= 16 * MIB


def test_a_stream_that_jumps_begins_anew(far: Far) -> None:
    ahead = follow(far, row(0, 128 * KIB, 100))
    far.asked.clear()
    assert ahead.note_cold(500 * MIB, 128 * KIB) is None
    job = ahead.note_cold(500 * MIB + 128 * KIB, 128 * KIB)
    assert job is not None
    job()
    assert far.asked == [(500 * MIB + 256 * KIB, MIN_WINDOW)]


def test_after_a_window_that_came_into_memory_the_next_cold_read_goes_on(far: Far) -> None:
    ahead = follow(far, row(0, 128 * KIB, 4))
    [*_, (offset, length)] = far.asked
    assert ahead.note_cold(offset + length + SLACK, 4096) is not None


def test_one_window_is_on_its_way_at_a_time(far: Far) -> None:
    ahead = Readahead(far)  # type: ignore[arg-type]
    jobs = [job for offset, length in row(0, 256 * KIB, 64) if (job := ahead.note_cold(offset, length))]
    assert len(jobs) == 1


def test_long_reads_are_left_to_the_kernel(far: Far) -> None:
    follow(far, row(0, MAX_READ + 4096, 100))
    assert far.asked == []


def test_nothing_is_read_beyond_the_end(far: Far) -> None:
    follow(far, row(far.size - 2 * MIB, 128 * KIB, 16))
    assert max(offset + length for offset, length in far.asked) == far.size


async def test_a_server_reads_ahead_of_cold_reads_and_never_of_warm_ones(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readahead, "MIN_WINDOW", 256 * KIB)
    disk = Disk()
    pool = make_pool(tmp_path, BASE, "web1", fs=disk)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(Clone, "prefetch", lambda _clone, offset, length: asked.append((offset, length)))
    async with serving(pool) as server, await connect(server, "web1") as client:
        for offset in range(0, BASE_SIZE, 128 * KIB):
            assert await client.pread(128 * KIB, offset) == BASE[offset : offset + 128 * KIB]
        assert asked == []
        disk.cold = range(BASE_SIZE)
        for offset in range(0, BASE_SIZE, 128 * KIB):
            assert await client.pread(128 * KIB, offset) == BASE[offset : offset + 128 * KIB]
        await until(lambda: bool(asked) and sum(asked[-1]) == BASE_SIZE)


async def test_the_clone_stays_open_while_it_is_read_ahead(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    pool = make_pool(tmp_path, BASE, "web1", fs=disk)
    gate = Gate()
    gate.close()
    monkeypatch.setattr(Clone, "prefetch", lambda *_: gate.go_through())
    disk.cold = range(BASE_SIZE)
    async with serving(pool) as server:
        async with await connect(server, "web1") as client:
            for offset in range(0, BASE_SIZE, 128 * KIB):
                await client.pread(128 * KIB, offset)
            await until(lambda: gate.waiting == 1)
        await asyncio.sleep(0.1)
        assert server._connections
        disk.cold = range(0)
        assert pool.info("web1").in_use_by  # type: ignore[union-attr]
        gate.open()
        await until(lambda: not server._connections)


async def test_read_ahead_that_fails_is_nobodys_error(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    pool = make_pool(tmp_path, BASE, "web1", fs=disk)
    failed: list[int] = []

    def fail(_clone: Clone, offset: int, _length: int) -> None:
        failed.append(offset)
        raise OSError(5, "no")

    monkeypatch.setattr(Clone, "prefetch", fail)
    disk.cold = range(BASE_SIZE)
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        for offset in range(0, BASE_SIZE, 128 * KIB):
            reply = await peer.run(CMD_READ, offset, 128 * KIB)
            assert (reply.error, reply.data) == (0, BASE[offset : offset + 128 * KIB])
        await until(lambda: len(failed) > 1)
