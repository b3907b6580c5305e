"""What clients hear of a disk that is full or broken, and how they live on."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest
from serving import BASE, MIB, Disk, Peer, connect, make_pool, serving

from nbdclone.errors import BaseChanged, CloneFailed, NotFound, UsageError
from nbdclone.protocol.wire import (
    CMD_FLAG_FUA,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    EINVAL,
    EIO,
    ENOMEM,
    ENOSPC,
    EPERM,
)
from nbdclone.server import quiet
from nbdclone.server.errnos import describe, nbd_errno
from nbdclone.store.pool import Pool

both_kinds_of_reply = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def pool(tmp_path: Path, disk: Disk) -> Pool:
    return make_pool(tmp_path, BASE, "web1", "web2", fs=disk)


@both_kinds_of_reply
@pytest.mark.parametrize("length", [512, 4096, 100_000, 2 * MIB])
@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, ENOSPC), (errno.EDQUOT, ENOSPC), (errno.EIO, EIO)])
async def test_a_write_that_fails_is_answered_and_works_when_the_disk_does(
    pool: Pool, disk: Disk, structured: bool, length: int, number: int, error: int
) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1", structured=structured) as peer:
        disk.write_error = number
        assert (await peer.run(CMD_WRITE, 100, payload=b"x" * length)).error == error
        assert (await peer.run(CMD_READ, 3 * MIB, 512)).data == BASE[3 * MIB : 3 * MIB + 512]
        disk.write_error = 0
        assert (await peer.run(CMD_WRITE, 100, payload=b"y" * length)).error == 0
        assert (await peer.run(CMD_READ, 99, length + 2)).data == BASE[99:100] + b"y" * length + BASE[100 + length :][
            :1
        ]
        assert (await peer.run(CMD_FLUSH)).error == 0


@both_kinds_of_reply
@pytest.mark.parametrize("length", [512, 100_000, 2 * MIB])
async def test_a_read_that_fails_is_answered_and_works_when_the_disk_does(
    pool: Pool, disk: Disk, structured: bool, length: int
) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1", structured=structured) as peer:
        await peer.run(CMD_READ, 0, 512)
        disk.read_error = errno.EIO
        reply = await peer.run(CMD_READ, 0, length)
        assert (reply.error, reply.data) == (EIO, b"")
        assert reply.message == ("Input/output error" if structured else "")
        disk.read_error = 0
        assert (await peer.run(CMD_READ, 0, length)).data == BASE[:length]


async def test_a_trim_that_fails_is_answered(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        disk.punch_error = errno.EIO
        assert (await peer.run(CMD_TRIM, 0, 4096)).error == EIO
        assert (await peer.run(CMD_READ, 0, 512)).data == BASE[:512]


async def test_a_full_disk_fails_one_clone_and_no_read(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await connect(server, "web1") as one, await connect(server, "base") as base:
        await one.pwrite(b"x" * 4096, 0)
        disk.write_error = errno.ENOSPC
        for _ in range(3):
            with pytest.raises(Exception, match="ENOSPC"):
                await one.pwrite(b"y" * 4096, 8192)
        assert await one.pread(4096, 0) == b"x" * 4096
        assert await one.pread(4096, 8192) == BASE[8192:12288]
        assert await base.pread(4096, 0) == BASE[:4096]


async def test_after_a_sync_that_failed_the_clone_takes_no_writes_until_it_is_reopened(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server:
        async with await Peer.open(server, "web1") as peer, await connect(server, "web2") as other:
            assert (await peer.run(CMD_WRITE, 0, payload=b"x" * 4096)).error == 0
            disk.sync_error = errno.EIO
            assert (await peer.run(CMD_FLUSH)).error == EIO
            disk.sync_error = 0
            reply = await peer.run(CMD_WRITE, 0, payload=b"y" * 4096)
            assert (reply.error, "a sync failed (Input/output error)" in reply.message) == (EIO, True)
            assert (await peer.run(CMD_TRIM, 0, 4096)).error == EIO
            assert (await peer.run(CMD_FLUSH)).error == EIO  # not "durable" because a second sync found nothing to do
            assert (await peer.run(CMD_READ, 4096, 512)).data == BASE[4096:4608]
            await other.pwrite(b"z" * 4096, 0)
            await other.flush()
        async with await connect(server, "web1") as again:
            await again.pwrite(b"y" * 4096, 0)
            await again.flush()
            assert await again.pread(4096, 0) == b"y" * 4096


async def test_fua_and_every_flush_that_waited_hear_of_a_sync_that_failed(pool: Pool, disk: Disk) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        disk.sync_error = errno.EIO
        disk.syncs.close()
        await peer.send(
            peer.request(CMD_WRITE, 0, payload=b"x" * 4096, flags=CMD_FLAG_FUA, cookie=0),
            *[peer.request(CMD_FLUSH, cookie=cookie) for cookie in range(1, 20)],
        )
        disk.syncs.open()
        assert {reply.error for reply in (await peer.replies(20)).values()} == {EIO}


async def test_a_clone_whose_close_fails_says_so_in_the_log(
    pool: Pool, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(pool) as server:
        async with await connect(server, "web1") as client:
            await client.pwrite(b"x" * 4096, 0)
            disk.sync_error = errno.EIO
        assert "closing 'web1': " in caplog.text
        disk.sync_error = 0
        async with await connect(server, "web1") as client:
            assert await client.pread(4096, 4096) == BASE[4096:8192]


async def test_the_log_tells_of_failures_once_in_a_while(
    pool: Pool, disk: Disk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(pool) as server, await Peer.open(server, "web1") as peer:
        disk.write_error = errno.ENOSPC
        for _ in range(20):
            await peer.run(CMD_WRITE, 0, payload=b"x" * 4096)
        assert caplog.text.count("No space left on device") == 1
        for _ in range(5):  # nor do other connections fill it
            async with await Peer.open(server, "web1") as other:
                await other.run(CMD_WRITE, 0, payload=b"x" * 4096)
        assert caplog.text.count("No space left on device") == 1
        disk.write_error = errno.EIO
        await peer.run(CMD_WRITE, 0, payload=b"x" * 4096)
        assert caplog.text.count("Input/output error") == 1  # another thing
        disk.write_error = errno.ENOSPC
        monkeypatch.setattr(quiet, "INTERVAL_S", 0.0)
        server.scratch.quiet._quiet_until.clear()
        for _ in range(3):
            await peer.run(CMD_WRITE, 0, payload=b"x" * 4096)
        assert caplog.text.count("No space left on device") == 4


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, ""), ENOSPC),
        (OSError(errno.EFBIG, ""), ENOSPC),
        (OSError(errno.EROFS, ""), EPERM),
        (OSError(errno.EOPNOTSUPP, ""), EIO),
        (OSError(errno.ENOMEM, ""), ENOMEM),
        (OSError(errno.EINVAL, ""), EINVAL),
        (OSError(errno.ESTALE, ""), EIO),
        (OSError("without a number"), EIO),
        (MemoryError(), ENOMEM),
        (CloneFailed(""), EIO),
        (BaseChanged(""), EIO),
        (UsageError(""), EINVAL),
        (RuntimeError(), EIO),
    ],
)
def test_every_error_has_its_number(error: Exception, number: int) -> None:
    assert nbd_errno(error) == number


def test_errors_are_described_without_paths_of_the_system_and_in_one_line() -> None:
    assert describe(OSError(errno.ENOSPC, "x", "/some/file")) == "No space left on device"
    assert describe(NotFound("there is no clone 'x'")) == "there is no clone 'x'"
    assert describe(ValueError("odd")) == "ValueError: odd"


async def test_at_its_quota_a_clone_is_refused_in_words_and_another_is_not(pool: Pool) -> None:
    await asyncio.to_thread(pool.set_quota, "web1", MIB)
    async with serving(pool) as server, await Peer.open(server, "web1") as peer, await connect(server, "web2") as other:
        assert (await peer.run(CMD_WRITE, 0, payload=b"x" * 4096)).error == 0
        for length in (2 * MIB, MIB):  # in a thread from the start, and on the loop at first
            reply = await peer.run(CMD_WRITE, 0, payload=b"x" * length)
            assert (reply.error, reply.message) == (ENOSPC, "Disk quota exceeded")
        assert (await peer.run(CMD_WRITE, 0, payload=b"y" * 4096)).error == 0
        assert (await peer.run(CMD_TRIM, 0, 4096)).error == 0
        assert (await peer.run(CMD_FLUSH)).error == 0
        assert (await peer.run(CMD_READ, 8192, 512)).data == BASE[8192:8704]
        await other.pwrite(b"z" * (2 * MIB), 0)
        await asyncio.to_thread(pool.set_quota, "web1", 3 * MIB)
        assert (await peer.run(CMD_WRITE, 0, payload=b"x" * (2 * MIB))).error == 0
