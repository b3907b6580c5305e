"""What lies between our disks and qemu's: how their extents are put together, and the work under way."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdclone.client import Client
from nbdclone.errors import InUse, ServerRefused, StorageError, UsageError
from nbdclone.exchange.adopt import Stretch, merge_status
from nbdclone.exchange.overlay import base_image_of, own_pieces
from nbdclone.exchange.programs import ReadOnly, in_turn, opened_by_qemu, served
from nbdclone.store.pool import Pool

MIB = 1 << 20


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    (tmp_path / "base.img").write_bytes(bytes(range(1, 251)) * 4096)
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "base.img", "base")
    pool.create_clones("base", ["web"], size=4 * MIB)
    return pool


def test_two_contexts_are_told_as_one() -> None:
    assert list(merge_status(1000, [(10, 0), (20, 3), (5, 2)], [(15, 0), (10, 1), (10, 2)])) == [
        Stretch(1000, 10, False, False),
        Stretch(1010, 5, False, True),
        Stretch(1015, 10, True, True),
        Stretch(1025, 5, True, True),
        Stretch(1030, 5, True, True),
    ]


def test_a_hole_that_is_not_known_to_be_zeros_is_data() -> None:
    assert list(merge_status(0, [(8, 1)], [(8, 1)])) == [Stretch(0, 8, True, False)]


def test_the_pieces_of_an_overlay_are_what_the_clone_has_of_its_own(pool: Pool) -> None:
    base_size = 250 * 4096
    with pool.open_clone("web") as clone:
        assert list(own_pieces(clone, base_size)) == []
        clone.pwrite(b"x" * 5000, 8192)
        clone.zero(65536, 8192)
        clone.pwrite(b"y" * (MIB + 4096), 2 * MIB)
        assert list(own_pieces(clone, base_size)) == [
            (False, 8192, 8192),
            (True, 65536, 8192),
            (False, 2 * MIB, MIB),
            (False, 3 * MIB, 4096),
        ]


def test_the_base_is_named_so_that_qemu_finds_it(pool: Pool, tmp_path: Path) -> None:
    image = tmp_path / "pool" / "bases" / "base" / "image"
    with pool.open_clone("web") as clone:
        assert base_image_of(clone, None) == str(image)
        assert base_image_of(clone, tmp_path / "out.qcow2") == "pool/bases/base/image"
        assert base_image_of(clone, tmp_path / "pool" / "x") == "bases/base/image"
    (tmp_path / "pool").rename(tmp_path / "a:b")
    with Pool.open(tmp_path / "a:b").open_clone("web") as clone:
        assert base_image_of(clone, tmp_path / "out.qcow2") == "./a:b/bases/base/image"


async def test_a_disk_is_served_read_only_and_stays_open(pool: Pool) -> None:
    with pool.open_clone("web") as clone:
        clone.pwrite(b"hello", 5)
        async with served(clone) as uri:
            for _ in range(2):
                async with await Client.connect(uri) as client:
                    assert client.read_only
                    assert await client.pread(5, 5) == b"hello"
                    with pytest.raises(ServerRefused):
                        await client.request(1, 0, 0, 5, b"wrong")
        assert clone.pread(5, 5) == b"hello"
        clone.pwrite(b"again", 5)


async def test_it_is_served_beside_the_pools_own_server(pool: Pool) -> None:
    with pool.served(), pool.open_clone("base") as base:
        async with served(base) as uri, await Client.connect(uri) as client:
            assert await client.pread(3, 0) == b"\1\2\3"


def test_what_is_shown_read_only_refuses_changes(pool: Pool) -> None:
    with pool.open_clone("web") as clone, ReadOnly(clone) as shown, pytest.raises(UsageError, match="read-only"):
        shown.pwrite(b"x", 0)


async def test_work_is_done_some_at_a_time_and_told_in_its_turn() -> None:
    running, most, told = 0, 0, []

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001 * (7 - number % 7))
        running -= 1
        return number

    await in_turn((work(number) for number in range(30)), 4, told.append)
    assert told == list(range(30))
    assert most == 4


async def test_the_first_error_ends_the_work_and_nothing_goes_on() -> None:
    begun, told = [], []

    async def work(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise UsageError("the third")
        await asyncio.sleep(0 if number < 3 else 60)
        return number

    def works() -> Iterator[Coroutine[Any, Any, int]]:
        return (work(number) for number in range(1000))

    with pytest.raises(UsageError, match="the third"):
        await in_turn(works(), 4, told.append)
    assert told == [0, 1, 2]
    assert len(begun) < 10
    assert len(asyncio.all_tasks()) == 1


SLOW = """#!{python}
import os, socket, sys, time
path = sys.argv[sys.argv.index("--socket") + 1]
with socket.socket(socket.AF_UNIX) as early:
    early.bind(path)  # and does not listen yet
    time.sleep(0.1)
os.unlink(path)
sys.exit("qemu-nbd: it was asked too early" if {fails} else "qemu-nbd: Failed to get shared lock")
"""


@pytest.mark.parametrize(("fails", "kind"), [(True, StorageError), (False, InUse)])
async def test_qemu_nbd_is_waited_for_and_what_it_complains_of_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool, kind: type[Exception]
) -> None:
    program = tmp_path / "qemu-nbd"
    program.write_text(SLOW.format(python=sys.executable, fails=fails))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(kind, match="too early" if fails else "is open in another program"):
        async with opened_by_qemu({}, "import", read_only=True):
            pytest.fail("there is nothing to be connected to")
