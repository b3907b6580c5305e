"""What servers get wrong about durability, and about making zeros, each as a test over a real socket.

The disk here forgets, when the power is cut, whatever was not synced.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from bytewise import ENOTSUP, Bytewise
from serving import BASE, BASE_SIZE, MIB, Disk, Hasty, make_pool, serving, until
from wirebytes import BLOCK_STATUS, CACHE, FAST_ZERO, FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES

from nbdclone.store.fs import data_and_holes
from nbdclone.store.pool import Pool

PAGE = 4096
Pages = dict[int, bytes]


def pages_of(fd: int) -> tuple[int, Pages]:
    """A sparse file: its length, and its pages that hold data."""
    size = os.fstat(fd).st_size
    pages: Pages = {}
    start = 0
    for hole, end in data_and_holes(Hasty(), fd, 0, size, PAGE):
        if not hole:
            pages.update((at, os.pread(fd, PAGE, at)) for at in range(start, end, PAGE))
        start = end
    return size, pages


class Forgetful(Hasty):
    """A disk that keeps of each file, over a power cut, what was in it when its last sync began."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[int, Pages]] = {}

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
        fd = os.open(path, flags, mode)
        if flags & os.O_RDWR:
            self.kept.setdefault(os.fspath(path), pages_of(fd))
        return fd

    def datasync(self, fd: int) -> None:  # type: ignore[override]
        self.kept[os.readlink(f"/proc/self/fd/{fd}")] = pages_of(fd)

    sync = datasync  # type: ignore[assignment]

    def cut_power(self, pool: Pool, directory: Path) -> Pool:
        """The pool as it is found afterwards, in another place; this one goes on."""
        shutil.copytree(pool.path, directory)
        for path, (size, pages) in self.kept.items():
            with open(directory / Path(path).relative_to(pool.path), "wb") as file:
                file.truncate(size)
                for at, page in pages.items():
                    os.pwrite(file.fileno(), page, at)
        return Pool.open(directory)

    def content(self, pool: Pool, directory: Path, length: int, offset: int) -> bytes:
        """What is read after a power cut now."""
        with self.cut_power(pool, directory).open_clone("web1") as clone:
            return clone.pread(length, offset)


@pytest.fixture
def disk() -> Forgetful:
    return Forgetful()


@pytest.fixture
def forgetful_pool(tmp_path: Path, disk: Forgetful) -> Pool:
    return make_pool(tmp_path, BASE, "web1", fs=disk)


async def test_a_flush_covers_the_writes_acknowledged_on_every_connection(
    forgetful_pool: Pool, disk: Forgetful, tmp_path: Path
) -> None:
    """That is what CAN_MULTI_CONN promises."""
    async with (
        serving(forgetful_pool, listen=[("127.0.0.1", 0)], sockets=[tmp_path / "nbd.sock"]) as server,
        await Bytewise.at(server, listener=0) as one,
        await Bytewise.at(server, listener=1) as two,
        await Bytewise.at(server, structured=True, listener=1) as three,
    ):
        assert one.flags & two.flags & three.flags & 0x100  # CAN_MULTI_CONN
        for number, writer in enumerate((one, two, three)):
            start = number * MIB
            text = b"written by %d" % number
            flusher = (two, three, one)[number]
            assert (await writer.does(WRITE, start, payload=text)).error == 0
            assert (await writer.does(TRIM, start + 65536, 8192)).error == 0
            assert (await writer.does(WRITE_ZEROES, start + 131072, 8192)).error == 0
            before = disk.content(forgetful_pool, tmp_path / f"before {number}", 200_000, start)
            assert before == BASE[start : start + 200_000]  # the disk is as forgetful as it says
            assert (await flusher.does(FLUSH)).error == 0
            after = disk.content(forgetful_pool, tmp_path / f"after {number}", 200_000, start)
            assert after[: len(text)] == text
            assert after[65536 : 65536 + 8192] == after[131072 : 131072 + 8192] == bytes(8192)


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
async def test_fua_is_accepted_on_every_command(pool: Pool, structured: bool) -> None:
    contexts = 1 if structured else 0
    async with serving(pool) as server, await Bytewise.at(server, structured=structured, contexts=contexts) as peer:
        assert peer.flags & 8  # SEND_FUA
        for command in (READ, TRIM, CACHE, WRITE_ZEROES, *[BLOCK_STATUS] * structured):
            assert (await peer.does(command, 4096, 4096, flags=FUA)).error == 0
        assert (await peer.does(WRITE, 4096, flags=FUA, payload=b"x" * 4096)).error == 0
        assert (await peer.does(FLUSH, flags=FUA)).error == 0
        await peer.lives_on()


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES], ids=["write", "trim", "write zeroes"])
@pytest.mark.parametrize(("offset", "length"), [(0, 4096), (100, 7), (65536, 300_000), (MIB, 2 * MIB)])
async def test_fua_means_durable_on_write_trim_and_write_zeroes(
    forgetful_pool: Pool, disk: Forgetful, tmp_path: Path, command: int, offset: int, length: int
) -> None:
    expected = b"w" * length if command == WRITE else bytes(length)
    payload = expected if command == WRITE else b""
    async with serving(forgetful_pool) as server, await Bytewise.at(server) as peer:
        assert (await peer.does(command, offset, length, payload=payload)).error == 0
        assert disk.content(forgetful_pool, tmp_path / "before", length, offset) == BASE[offset : offset + length]
        assert (await peer.does(command, offset, length, payload=payload, flags=FUA)).error == 0
        assert disk.content(forgetful_pool, tmp_path / "after", length, offset) == expected


@pytest.mark.parametrize("command", [WRITE, TRIM, WRITE_ZEROES, FLUSH], ids=["write", "trim", "write zeroes", "flush"])
async def test_nothing_durable_is_acknowledged_before_the_sync_is_over(tmp_path: Path, command: int) -> None:
    slow = Disk()
    pool = make_pool(tmp_path, BASE, "web1", fs=slow)
    async with serving(pool) as server, await Bytewise.at(server) as peer:
        await peer.does(WRITE, 0, payload=b"something to flush")
        slow.syncs.close()
        payload = b"x" * 4096 if command == WRITE else b""
        await peer.send(peer.asks(command, 0, 0 if command == FLUSH else 4096, flags=FUA, payload=payload))
        await until(lambda: slow.syncs.waiting > 0)
        await peer.hears_nothing()
        slow.syncs.open()
        assert (await peer.hears_reply()).error == 0


# Zeros


def allocated(pool: Pool) -> int:
    return (pool.path / "clones" / "web1" / "delta").stat().st_blocks * 512


async def test_no_hole_allocates_and_without_it_the_space_goes_back(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.at(server) as peer:
        before = allocated(pool)
        assert (await peer.does(WRITE_ZEROES, 0, 2 * MIB, flags=NO_HOLE)).error == 0
        assert allocated(pool) - before >= 2 * MIB
        assert (await peer.does(READ, 0, 2 * MIB)).data == bytes(2 * MIB)
        assert (await peer.does(WRITE_ZEROES, 0, MIB)).error == 0
        assert MIB <= allocated(pool) - before < 2 * MIB
        assert (await peer.does(TRIM, 0, 2 * MIB)).error == 0
        assert allocated(pool) - before < MIB
        assert (await peer.does(READ, 0, BASE_SIZE)).data == bytes(2 * MIB) + BASE[2 * MIB :]


class Holeless(Hasty):
    """A file system that cannot make holes, and counts what is done to its files."""

    changes = 0

    def can_punch(self, fd: int, offset: int, length: int) -> bool:
        return False

    def punch(self, fd: int, offset: int, length: int) -> None:
        self.changes += 1
        self._write_zeros(fd, offset, length)

    def zero_allocated(self, fd: int, offset: int, length: int) -> None:
        self.changes += 1
        super().zero_allocated(fd, offset, length)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:  # type: ignore[override]
        self.changes += 1
        return os.pwrite(fd, data, offset)


async def test_a_fast_zero_that_would_be_slow_is_enotsup_before_anything_is_touched(tmp_path: Path) -> None:
    holeless = Holeless()
    pool = make_pool(tmp_path, BASE, "web1", fs=holeless)
    async with serving(pool) as server, await Bytewise.at(server) as peer:
        await peer.does(WRITE, 0, payload=b"w" * 8192)
        before, space = holeless.changes, allocated(pool)
        for offset, length in ((0, 4096), (100, 5000), (0, BASE_SIZE), (MIB, 1)):
            for flags in (FAST_ZERO, FAST_ZERO | FUA, FAST_ZERO | NO_HOLE):
                assert (await peer.does(WRITE_ZEROES, offset, length, flags=flags)).error == ENOTSUP
        assert (holeless.changes, allocated(pool)) == (before, space)
        assert (await peer.does(READ, 0, BASE_SIZE)).data == b"w" * 8192 + BASE[8192:]
        assert (await peer.does(WRITE_ZEROES, 0, 4096)).error == 0  # slowly
        assert (await peer.does(READ, 0, 8192)).data == bytes(4096) + b"w" * 4096


async def test_a_fast_zero_that_is_fast_is_done(pool: Pool) -> None:
    async with serving(pool) as server, await Bytewise.at(server) as peer:
        assert peer.flags & 0x800  # SEND_FAST_ZERO
        for flags in (FAST_ZERO, FAST_ZERO | FUA):
            await peer.does(WRITE, 4096, payload=b"w" * 8192)
            assert (await peer.does(WRITE_ZEROES, 4096, 8192, flags=flags)).error == 0
            assert (await peer.does(READ, 0, 16384)).data == BASE[:4096] + bytes(8192) + BASE[12288:16384]
