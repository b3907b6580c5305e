"""NBD's extended headers between nbdclone and a qemu that speaks them, each way round: requests beyond 4 GiB."""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from integration.clients.programs import GIB, KIB, MIB, WAYS, Qemu, listening, run_command, uri
from integration.served import Served
from nbdclone.client import Client
from nbdclone.errors import ServerRefused
from nbdclone.protocol.wire import EINVAL, ENOSPC, Mode, TransmissionFlag

pytestmark = pytest.mark.timeout(300)  # with the time to fetch qemu

LARGE = 10 * GIB  # as the clones of that name are
CONTEXTS = ("base:allocation", "qemu:allocation-depth", "nbdclone:origin")
DATA, HOLE = 0, 3

Request = tuple[str, int, int]  # what, offset, length


def requests(trace: str) -> list[Request]:
    """Those that qemu sent, but for flushes and the last one."""
    found = re.findall(r"nbd_send_request .*\.from = (\d+), \.len = (\d+), .*\.type = \d+ \(([a-z ]+)\)", trace)
    return [(what, int(offset), int(length)) for offset, length, what in found if what not in ("flush", "disconnect")]


@pytest.mark.parametrize("way", WAYS)
def test_qemu_and_the_server_agree_on_extended_headers(server: Served, newer_qemu: Qemu, clone: str, way: str) -> None:
    trace = newer_qemu.io(uri(server, clone, way), "write -P 7 1M 64k", "read -P 7 1M 64k", trace="nbd_*").stderr
    assert re.search(r"option reply 11 \(extended headers\), type 1 \(ack\)", trace)
    assert "structured reply" not in trace  # which it asks for where it is refused the other
    assert requests(trace) == [("write", MIB, 64 * KIB), ("read", MIB, 64 * KIB)]


def test_qemu_is_told_of_a_whole_disk_in_one_request(server: Served, newer_qemu: Qemu, large: str) -> None:
    there = uri(server, large)
    newer_qemu.io(there, "discard 0 32M", "write -P 7 9G 1M")
    command = [*newer_qemu.command("qemu-img"), "--trace", "nbd_*", "map", "--output=json", "-f", "raw", there]
    mapped = run_command(command)
    assert [(extent["start"], extent["length"], extent["data"]) for extent in json.loads(mapped.stdout)] == [
        (0, 9 * GIB, False),
        (9 * GIB, MIB, True),
        (9 * GIB + MIB, GIB - MIB, False),
    ]
    assert requests(mapped.stderr)[0] == ("block status", 0, LARGE)
    assert "block status (64-bit)" in mapped.stderr


def test_qemu_zeroes_more_than_4_gib_in_one_request(server: Served, newer_qemu: Qemu, large: str) -> None:
    there = uri(server, large)
    newer_qemu.io(there, "write -P 7 3M 1M", "write -P 8 6G 1M", "write -P 9 8G 1M")
    trace = newer_qemu.io(there, "write -z -n -u 4M 7G", trace="nbd_send_request").stderr
    assert requests(trace) == [("write zeroes", 4 * MIB, 7 * GIB)]
    newer_qemu.io(there, "read -P 7 3M 1M", "read -P 0 4M 28M", "read -P 0 6G 1M", "read -P 9 8G 1M")


@contextmanager
def storage_daemon(qemu: Qemu, server: Served, export: str, trace: Path) -> Iterator[str]:
    """qemu's own server over an export of ours: what it is asked to do, it asks for in turn."""
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as directory:
        path = Path(directory, "socket")
        source = f"server.type=unix,server.path={server.socket},export={export}"
        options = (
            *("--trace", f"nbd_send_request,file={trace}"),
            *("--blockdev", f"driver=nbd,node-name=disk,discard=unmap,{source}"),
            *("--nbd-server", f"addr.type=unix,addr.path={path}"),
            *("--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"),
        )
        with listening(path, *qemu.command("qemu-storage-daemon"), *options):
            yield f"nbd+unix:///disk?socket={path}"


async def test_the_storage_daemon_passes_on_what_is_larger_than_4_gib(
    server: Served, newer_qemu: Qemu, large: str, tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(MIB)
    trace = tmp_path / "trace"
    with storage_daemon(newer_qemu, server, large, trace) as there:
        async with await Client.connect(there, contexts=["base:allocation"]) as disk:
            assert disk.mode is Mode.EXTENDED
            for offset in (0, 5 * GIB, 9 * GIB):
                await disk.pwrite(data, offset)
            await disk.zero(5 * GIB - 4096, 4096)
            await disk.trim(4 * GIB + 4096, 5 * GIB)
            await disk.flush()
            assert await disk.pread(8192, 0) == data[:4096] + bytes(4096)
            assert await disk.pread(MIB, 5 * GIB) == await disk.pread(MIB, 9 * GIB - MIB) == bytes(MIB)
            assert await disk.pread(MIB, 9 * GIB) == bytes(4096) + data[4096:]
            told = await disk.block_status(LARGE, 0)
    assert told["base:allocation"][0] == (4096, DATA)
    asked = requests(trace.read_text())
    assert ("write zeroes", 4096, 5 * GIB - 4096) in asked
    assert ("trim", 5 * GIB, 4 * GIB + 4096) in asked
    assert ("block status", 0, LARGE) in asked
    async with await Client.connect(uri(server, large), contexts=["base:allocation"]) as disk:
        assert await disk.block_status(LARGE, 0) == {
            "base:allocation": [(4096, DATA), (9 * GIB, HOLE), (MIB - 4096, DATA), (GIB - MIB, HOLE)]
        }


# The client against qemu-nbd


@pytest.fixture
def disk_of_qemu_nbd(newer_qemu: Qemu, tmp_path: Path) -> Iterator[str]:
    """An empty raw disk of 10 GiB; its URI."""
    image = tmp_path / "disk.raw"
    image.touch()
    os.truncate(image, LARGE)
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as directory:
        path = Path(directory, "socket")
        options = ("--persistent", "--shared=0", "--format=raw", "--discard=unmap", "--export-name=disk")
        command = [*newer_qemu.command("qemu-nbd"), *options, "--allocation-depth", f"--socket={path}", str(image)]
        with listening(path, *command):
            yield f"nbd+unix:///disk?socket={path}"


@pytest.mark.parametrize("mode", Mode)
async def test_the_client_does_the_same_with_qemu_nbd_in_every_mode(disk_of_qemu_nbd: str, mode: Mode) -> None:
    data = random.Random(1).randbytes(3 * MIB)
    contexts = CONTEXTS if mode is not Mode.SIMPLE else ()
    async with await Client.connect(disk_of_qemu_nbd, contexts=contexts, mode=mode) as disk:
        assert (disk.mode, disk.size) == (mode, LARGE)
        await disk.pwrite(data, 5 * GIB - MIB, fua=True)
        await disk.pwrite(data, LARGE - len(data))
        await disk.zero(MIB, 5 * GIB, fua=True, no_hole=True)
        await disk.zero(4 * GIB, 3 * MIB)
        await disk.trim(5 * GIB - 4 * MIB, 5 * GIB + MIB)
        await disk.cache(32 * MIB, 5 * GIB)  # the most that qemu-nbd takes
        await disk.flush()
        assert await disk.pread(3 * MIB, 5 * GIB - MIB) == data[:MIB] + bytes(2 * MIB)
        assert await disk.pread(len(data), LARGE - len(data)) == data
        assert await disk.pread(64 * MIB, 5 * GIB - 32 * MIB) == bytes(31 * MIB) + data[:MIB] + bytes(32 * MIB)
        if contexts:
            told = await disk.block_status(LARGE, 0)
            assert told.keys() == {"base:allocation", "qemu:allocation-depth"}
            assert told["qemu:allocation-depth"] == [(LARGE, 1)]
            offset, data_at = 0, []
            for length, status in told["base:allocation"]:
                data_at += [(offset, length)] if status == DATA else []
                offset += length
            assert offset == LARGE
            assert data_at[0] == (5 * GIB - MIB, MIB)
            assert data_at[-1] == (LARGE - len(data), len(data))


async def test_the_client_asks_qemu_nbd_about_one_of_several_contexts(disk_of_qemu_nbd: str) -> None:
    async with await Client.connect(disk_of_qemu_nbd, contexts=CONTEXTS) as disk:
        assert disk.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD
        told = await disk.block_status(LARGE, 0, contexts=["qemu:allocation-depth"])
        assert told == {"qemu:allocation-depth": [(LARGE, 1)]}


async def test_the_client_hears_qemu_nbds_errors_in_extended_replies(disk_of_qemu_nbd: str) -> None:
    async with await Client.connect(disk_of_qemu_nbd, contexts=CONTEXTS) as disk:
        for refused in (
            disk.pread(512, LARGE),
            disk.pwrite(bytes(512), LARGE - 1),
            disk.zero(5 * GIB, 6 * GIB),
            disk.trim(5 * GIB, 6 * GIB),
            disk.request(77, 0, 0, 0),
        ):
            with pytest.raises(ServerRefused) as caught:
                await refused
            assert caught.value.code in (EINVAL, ENOSPC)
            assert await disk.pread(512, 0) == bytes(512)
