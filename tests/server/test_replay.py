"""Boots that are recorded and replayed: when, how often, and that a server ends all the same."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from pathlib import Path

import pytest
from serving import BASE_SIZE, CLONES, Gate, Hasty, connect, make_pool, serving, until

from nbdclone.server import replay
from nbdclone.server.host import Options
from nbdclone.store import trace as trace_module
from nbdclone.store.pool import Pool
from nbdclone.store.trace import GRAIN_SIZE, TRACE_NAME, Trace, load_trace

GRAINS = BASE_SIZE // GRAIN_SIZE
IMAGE = b"".join(bytes([grain]) * GRAIN_SIZE for grain in range(1, GRAINS + 1))


class Disk(Hasty):
    """Knows what it was asked to read into memory of the base; the gate holds whoever asks."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.gate = Gate()

    def will_need(self, fd: int, offset: int, length: int) -> None:
        self.gate.go_through()
        self.asked.append((offset // GRAIN_SIZE, length // GRAIN_SIZE))


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def pool(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(trace_module, "MIN_GRAINS", 2)
    return make_pool(tmp_path, IMAGE, *CLONES, fs=disk)


def base_directory(pool: Pool) -> Path:
    return pool.path / "bases" / "base"


def base_id(pool: Pool) -> bytes:
    return bytes.fromhex(pool.info("base").id)


def leave_trace(pool: Pool, *grains: int) -> None:
    (base_directory(pool) / TRACE_NAME).write_bytes(Trace(base_id(pool), 1, grains).dump())


def recorded(pool: Pool) -> tuple[int, ...]:
    trace = load_trace(base_directory(pool), base_id(pool))
    return () if trace is None else trace.grains


def has_trace(pool: Pool) -> bool:
    return (base_directory(pool) / TRACE_NAME).exists()


# Recording


async def test_the_first_boot_is_recorded_until_its_client_goes(pool: Pool) -> None:
    async with serving(pool) as server:
        async with await connect(server, "web1") as client:
            for grain in (9, 2, 9, 5):
                await client.pread(4096, grain * GRAIN_SIZE)
            assert not has_trace(pool)
        await until(lambda: has_trace(pool))
    assert recorded(pool) == (9, 2, 5)


async def test_a_recording_ends_after_a_while_and_the_clone_is_served_on(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "RECORD_S", 0.2)
    async with serving(pool) as server, await connect(server, "web1") as client:
        await client.pread(2 * GRAIN_SIZE, 0)
        await until(lambda: has_trace(pool))
        assert await client.pread(512, 7 * GRAIN_SIZE) == bytes([8]) * 512
    assert recorded(pool) == (0, 1)


async def test_a_server_that_stops_keeps_what_it_recorded(pool: Pool) -> None:
    async with serving(pool) as server:
        client = await connect(server, "web1")
        await client.pread(3 * GRAIN_SIZE, 0)
    with contextlib.suppress(OSError):
        await client.close()
    assert recorded(pool) == (0, 1, 2)


async def test_of_clones_that_start_at_once_one_is_recorded(pool: Pool) -> None:
    async with serving(pool) as server, await connect(server, "web1") as first:
        async with await connect(server, "web2") as second:
            await second.pread(4 * GRAIN_SIZE, 0)
        await until(lambda: len(server._connections) == 1)
        assert not has_trace(pool)
        await first.pread(2 * GRAIN_SIZE, 8 * GRAIN_SIZE)
    assert recorded(pool) == (8, 9)


async def test_what_is_read_of_a_base_itself_is_not_recorded(pool: Pool) -> None:
    async with serving(pool) as server, await connect(server, "base") as client:
        await client.pread(BASE_SIZE, 0)
    assert not has_trace(pool)


async def test_without_replay_nothing_is_recorded_and_nothing_read_ahead(pool: Pool, disk: Disk) -> None:
    async with serving(pool, sockets=[pool.path.parent / "nbd.sock"], options=Options(replay=False)) as server:
        async with await connect(server, "web1") as client:
            await client.pread(4 * GRAIN_SIZE, 0)
        assert not has_trace(pool)
        leave_trace(pool, 1, 2)
        async with await connect(server, "web1") as client:
            await client.pread(4 * GRAIN_SIZE, 0)
    assert disk.asked == []


async def test_a_base_that_cannot_be_written_is_served_without_a_trace(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(replay, "save_trace", refuse)
    async with serving(pool) as server, await connect(server, "web1") as client:
        assert await client.pread(512, GRAIN_SIZE) == bytes([2]) * 512
        await client.pread(4 * GRAIN_SIZE, 0)
    assert "what a boot reads cannot be kept" in caplog.text
    assert not has_trace(pool)


# Replaying


async def test_a_clone_that_starts_has_its_boot_read_ahead_in_steps(
    pool: Pool, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "STEP_GRAINS", 3)
    leave_trace(pool, 9, 2, 8, 40, 1)
    async with serving(pool) as server, await connect(server, "web1") as client:
        await until(lambda: len(disk.asked) == 4)
        assert await client.pread(512, 0) == bytes([1]) * 512
    assert disk.asked == [(2, 1), (8, 2), (1, 1), (40, 1)]


async def test_what_the_clone_has_as_its_own_is_not_read_ahead(pool: Pool, disk: Disk) -> None:
    with pool.open_clone("web1") as clone:
        clone.pwrite(b"x" * GRAIN_SIZE, 2 * GRAIN_SIZE)
    leave_trace(pool, 1, 2, 3)
    async with serving(pool) as server, await connect(server, "web1"):
        await until(lambda: len(disk.asked) == 2)
    assert disk.asked == [(1, 1), (3, 1)]


async def test_clones_that_start_at_once_have_it_read_ahead_once(
    pool: Pool, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_trace(pool, 1, 2)
    async with serving(pool) as server:
        clients = await asyncio.gather(*[connect(server, name) for name in CLONES * 3])
        await until(lambda: bool(disk.asked))
        for client in clients:
            await client.close()
        assert disk.asked == [(1, 2)]
        await until(lambda: not server._connections)
        monkeypatch.setattr(replay, "REPLAY_AGAIN_S", 0.0)
        async with await connect(server, "web2"):
            await until(lambda: len(disk.asked) == 2)


async def test_a_clone_is_served_and_closed_while_its_boot_is_read_ahead(pool: Pool, disk: Disk) -> None:
    leave_trace(pool, 1, 2)
    disk.gate.close()
    async with serving(pool) as server:
        async with await connect(server, "web1") as client:
            await until(lambda: disk.gate.waiting == 1)
            assert await client.pread(512, 0) == bytes([1]) * 512
            await client.pwrite(b"x" * 512, GRAIN_SIZE)
        await until(lambda: not server._connections)
        pool.remove(["web1"])  # nobody has it
        disk.gate.open()


async def test_a_server_that_stops_does_not_finish_a_replay(
    pool: Pool, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "STEP_GRAINS", 1)
    leave_trace(pool, *range(GRAINS))
    disk.gate.close()
    opener = threading.Timer(0.3, disk.gate.open)
    async with serving(pool) as server:
        async with await connect(server, "web1"):
            await until(lambda: disk.gate.waiting == 1)
        await until(lambda: not server._connections)
        opener.start()
    opener.join()
    assert disk.asked == [(0, 1)]


async def test_no_more_is_read_ahead_than_a_part_of_the_memory_that_there_is(
    pool: Pool, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "STEP_GRAINS", 2)
    monkeypatch.setattr(replay, "available_memory", lambda: 5 * GRAIN_SIZE * replay.MEMORY_SHARE)
    leave_trace(pool, *range(10))
    ended = asyncio.Event()
    monkeypatch.setattr(replay.logger, "info", lambda *_: ended.set())
    async with serving(pool) as server, await connect(server, "web1"):
        async with asyncio.timeout(10):
            await ended.wait()
    assert disk.asked == [(0, 2), (2, 2)]


def test_memory_that_cannot_be_told_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 20 < replay.available_memory() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(replay, "_MEMINFO", tmp_path / "missing")
    assert replay.available_memory() == 0


@pytest.mark.parametrize("bad", [b"", b"NBDTRACE and no more", b"another base's"])
async def test_a_bad_trace_is_told_of_and_replaced_by_the_next_boot(
    pool: Pool, disk: Disk, caplog: pytest.LogCaptureFixture, bad: bytes
) -> None:
    content = Trace(bytes(16), 1, (1, 2)).dump() if bad == b"another base's" else bad
    (base_directory(pool) / TRACE_NAME).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        async with serving(pool) as server, await connect(server, "web1") as client:
            assert await client.pread(3 * GRAIN_SIZE, 0) == IMAGE[: 3 * GRAIN_SIZE]
    assert "another boot will be recorded" in caplog.text
    assert disk.asked == []
    assert recorded(pool) == (0, 1, 2)


async def test_a_newer_trace_is_left_as_it_is(pool: Pool, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    newer = Trace(base_id(pool), 1, (1, 2)).dump()
    newer = newer[:8] + (2).to_bytes(4, "big") + newer[12:]
    (base_directory(pool) / TRACE_NAME).write_bytes(newer)
    async with serving(pool) as server, await connect(server, "web1") as client:
        await client.pread(3 * GRAIN_SIZE, 0)
    assert "newer nbdclone" in caplog.text
    assert (base_directory(pool) / TRACE_NAME).read_bytes() == newer
