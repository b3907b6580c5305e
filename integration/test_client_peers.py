"""The client against servers that other people wrote: nbdkit and qemu-nbd."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdclone.client import Client
from nbdclone.errors import ServerRefused
from nbdclone.protocol.wire import EINVAL, ENOSPC, EPERM

pytestmark = pytest.mark.timeout(60)
SIZE = 64 << 20
START_TIMEOUT_S = 10.0


def accepts(path: Path) -> bool:
    """Whether somebody listens there; the file alone appears before that."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


class Start:
    """Starts servers on ``path / "sock"``, each given by its command line, and ends them by their process ids."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, program: str, *arguments: str, name: str = "") -> str:
        """Returns the URI of the server when it accepts connections."""
        command = shutil.which(program)
        if command is None:
            pytest.skip(f"{program} is not installed")
        path = self.path / "sock"
        process = subprocess.Popen([command, *arguments])
        self.processes.append(process)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not accepts(path):
            assert process.poll() is None, f"{program} ended with status {process.returncode}"
            assert time.monotonic() < deadline, f"{program} did not start in {START_TIMEOUT_S} s"
            time.sleep(0.02)
        return f"nbd+unix:///{name}?socket={path}"

    def end(self) -> None:
        for process in self.processes:
            process.terminate()
            try:
                process.wait(START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    starter = Start(tmp_path)
    yield starter
    starter.end()


def nbdkit(start: Start, path: Path, *arguments: str) -> str:
    return start("nbdkit", "--foreground", "--exit-with-parent", "--unix", str(path / "sock"), *arguments)


def qemu_nbd(start: Start, path: Path, *arguments: str) -> str:
    image = path / "disk.raw"
    image.touch()
    os.truncate(image, SIZE)
    options = ("--persistent", "--shared=0", "--format=raw", "--export-name=disk", "--description=a disk")
    return start("qemu-nbd", *options, f"--socket={path / 'sock'}", *arguments, str(image), name="disk")


@pytest.fixture(params=["nbdkit", "nbdkit without structured replies", "nbdkit by export name", "qemu-nbd"])
def uri(request: pytest.FixtureRequest, start: Start, tmp_path: Path) -> str:
    match request.param:
        case "nbdkit without structured replies":
            return nbdkit(start, tmp_path, "--no-sr", "memory", str(SIZE))
        case "nbdkit by export name":
            return nbdkit(start, tmp_path, "--mask-handshake=0", "memory", str(SIZE))
        case "qemu-nbd":
            return qemu_nbd(start, tmp_path)
        case _:
            return nbdkit(start, tmp_path, "memory", str(SIZE))


async def test_everything_the_client_can_do_does_it(uri: str) -> None:
    async with await Client.connect(uri) as disk:
        assert disk.size == SIZE
        assert not disk.read_only
        await disk.pwrite(b"hello", 1000)
        await disk.pwrite(b"there", 2000, fua=True)
        await disk.zero(2, 1000)
        await disk.zero(512, 4096, fua=True, no_hole=True)
        await disk.trim(4096, 8192)
        await disk.flush()
        assert await disk.pread(5, 1000) == b"\0\0llo"
        assert await disk.pread(5, 2000) == b"there"


async def test_large_and_sparse_reads_come_back_as_written(uri: str) -> None:
    data = os.urandom(SIZE - 3)
    async with await Client.connect(uri) as disk:
        await disk.pwrite(data, 1)
        await disk.zero(1 << 20, 4 << 20)
        expected = bytearray(b"\0" + data + b"\0\0")
        expected[4 << 20 : 5 << 20] = bytes(1 << 20)
        assert await disk.pread(SIZE, 0) == expected


async def test_many_tasks_read_and_write_at_once(uri: str) -> None:
    async with await Client.connect(uri) as disk:
        blocks = {at: os.urandom(4096) for at in range(0, 4 << 20, 4096)}
        await asyncio.gather(*(disk.pwrite(block, at) for at, block in blocks.items()))
        read = await asyncio.gather(*(disk.pread(4096, at) for at in blocks))
        assert read == list(blocks.values())


async def test_errors_of_the_server_are_raised_and_the_connection_lives_on(uri: str) -> None:
    async with await Client.connect(uri) as disk:
        with pytest.raises(ServerRefused) as caught:
            await disk.pread(512, SIZE)
        assert caught.value.code == EINVAL
        with pytest.raises(ServerRefused) as caught:
            await disk.pwrite(bytes(512), SIZE - 1)
        assert caught.value.code in (ENOSPC, EINVAL)  # qemu-nbd says EINVAL
        with pytest.raises(ServerRefused):
            await disk.request(77, 0, 0, 0)
        assert await disk.pread(5, 0) == bytes(5)


async def test_a_read_only_export_says_so(start: Start, tmp_path: Path) -> None:
    async with await Client.connect(nbdkit(start, tmp_path, "--readonly", "memory", "1M")) as disk:
        assert disk.read_only
        with pytest.raises(ServerRefused, match="EPERM") as caught:
            await disk.pwrite(b"x", 0)
        assert caught.value.code == EPERM


async def test_exports_are_listed_described_and_refused(start: Start, tmp_path: Path) -> None:
    uri = qemu_nbd(start, tmp_path)
    assert await Client.list(uri) == ["disk"]
    info = await Client.describe(uri)
    assert (info.name, info.size, info.description) == ("disk", SIZE, "a disk")
    with pytest.raises(ServerRefused, match="nobody"):
        await Client.connect(uri, "nobody")


async def test_block_sizes_that_the_server_demands_are_kept(start: Start, tmp_path: Path) -> None:
    uri = nbdkit(start, tmp_path, "--filter=blocksize-policy", "memory", str(SIZE), "blocksize-minimum=4096",
                 "blocksize-preferred=65536", "blocksize-maximum=1M", "blocksize-error-policy=error")  # fmt: skip
    async with await Client.connect(uri) as disk:
        assert (disk.export.minimum_block, disk.export.maximum_payload) == (4096, 1 << 20)
        data = os.urandom(5 << 20)
        await disk.pwrite(data, 4096)
        assert await disk.pread(len(data), 4096) == data


async def test_the_block_status_of_other_servers_is_understood(start: Start, tmp_path: Path) -> None:
    uri = qemu_nbd(start, tmp_path, "--allocation-depth")
    contexts = ["base:allocation", "qemu:allocation-depth", "nbdclone:origin"]
    async with await Client.connect(uri, contexts=contexts) as disk:
        assert sorted(disk.contexts.values()) == contexts[:2]
        await disk.pwrite(b"x" * 65536, 1 << 20)
        assert await disk.block_status(SIZE, 0) == {
            "base:allocation": [(1 << 20, 3), (65536, 0), (SIZE - (1 << 20) - 65536, 3)],
            "qemu:allocation-depth": [(SIZE, 1)],
        }


@pytest.mark.parametrize("arguments", [("--no-sr",), ("--mask-handshake=0",)])
async def test_a_server_without_contexts_is_opened_without_them(
    start: Start, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    uri = nbdkit(start, tmp_path, *arguments, "memory", "1M")
    async with await Client.connect(uri, contexts=["base:allocation"]) as disk:
        assert disk.contexts == {}
        assert await disk.pread(5, 0) == bytes(5)


async def test_a_server_that_dies_is_a_lost_connection(start: Start, tmp_path: Path) -> None:
    uri = nbdkit(start, tmp_path, "--filter=delay", "memory", "1M", "rdelay=30")
    disk = await Client.connect(uri)
    reading = asyncio.create_task(disk.pread(512, 0))
    await asyncio.sleep(0.1)
    start.processes[0].kill()
    with pytest.raises(ConnectionError, match="lost"):
        await reading
    await disk.close()
