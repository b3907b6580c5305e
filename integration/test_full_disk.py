"""Law 8 on file systems that are full: a server and its clients on a small loop-mounted ext4, XFS and btrfs, and tmpfs.

A full disk fails the writes that need space. Reads, rewrites, flushes and trims go on in every clone, and so do the
writes, on the same connection, when something was deleted; a kill and a restart in between lose nothing that was
flushed; listing and removing work, and removing makes space.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from integration.packages import program, require
from integration.served import Served, make_pool, nbdclone, served
from nbdclone.client import Client
from nbdclone.errors import ServerRefused
from nbdclone.protocol.wire import ENOSPC

pytestmark = pytest.mark.timeout(300)

MIB = 1 << 20
BLOCK = 4096
CHUNK = 256 << 10
IMAGE_SIZE = 4 * MIB
SIZE = 512 * MIB  # of a clone: five segments, and more than the disk has
CLONES = ("one", "two", "three")
# mkfs, the size that is the smallest or a little more, and what keeps it from holding back space for root.
KINDS = {
    "ext4": (("mke2fs", "-q", "-t", "ext4", "-m", "0"), 96 * MIB, ("e2fsprogs",)),
    "xfs": (("mkfs.xfs", "-q", "-f"), 320 * MIB, ("xfsprogs",)),
    "btrfs": (("mkfs.btrfs", "-q", "-f", "-m", "single"), 160 * MIB, ("btrfs-progs",)),
    "tmpfs": ((), 48 * MIB, ()),
}


def run(*args: str | Path) -> None:
    subprocess.run([program(str(args[0])), *map(str, args[1:])], check=True, capture_output=True, timeout=60)


def known_kinds() -> list[str]:
    """What this machine's kernel has, or has as a module; ext4 and tmpfs it has to have."""
    with suppress(subprocess.CalledProcessError, FileNotFoundError):
        run("modprobe", "-a", "xfs", "btrfs")
    known = Path("/proc/filesystems").read_text().split()
    return [kind for kind in KINDS if kind in known or kind in ("ext4", "tmpfs")]


@pytest.fixture(params=known_kinds())
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Where a file is never written in place, a rewrite needs space too, and so does a flush: that has a test of its own.
writing_in_place = pytest.mark.parametrize("kind", [kind for kind in known_kinds() if kind != "btrfs"], indirect=True)


@pytest.fixture
def disk(kind: str, tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, mounted for the test alone."""
    mkfs, size, packages = KINDS[kind]
    require(*packages)
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    mounted = tmp_path / "disk"
    mounted.mkdir()
    with ExitStack() as undo:
        try:
            if kind == "tmpfs":
                run("mount", "-t", "tmpfs", "-o", f"size={size}", "nbdclone-test", mounted)
            else:
                with open(tmp_path / "file-system", "xb") as file:
                    file.truncate(size)
                run(*mkfs, tmp_path / "file-system")
                run("mount", "-o", "loop", tmp_path / "file-system", mounted)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"{kind} cannot be mounted here: {error.stderr.decode(errors='replace').strip()}")
        undo.callback(run, "umount", mounted)
        yield mounted


class Written:
    """What a clone has to hold: the base, and over it what was acknowledged. What was refused may be there or not."""

    def __init__(self, base: bytes) -> None:
        self._base = base
        self.blocks: dict[int, set[bytes]] = {}  # by number of the block: what it may hold

    def has(self, offset: int, data: bytes, *, perhaps: bool = False) -> None:
        for at in range(0, len(data), BLOCK):
            block = (offset + at) // BLOCK
            before = self.may_hold(block) if perhaps else set()
            self.blocks[block] = {data[at : at + BLOCK], *before}

    def may_hold(self, block: int) -> set[bytes]:
        found = self.blocks.get(block)
        return found or {self._base[block * BLOCK :][:BLOCK].ljust(BLOCK, b"\0")}

    async def check(self, client: Client) -> None:
        """Every block of the base's part, and every one that was ever written."""
        for offset in range(0, IMAGE_SIZE, MIB):
            self.compare(offset, await client.pread(MIB, offset))
        for start in {block * BLOCK // CHUNK * CHUNK for block in self.blocks}:
            self.compare(start, await client.pread(CHUNK, start))

    def compare(self, offset: int, data: bytes) -> None:
        for at in range(0, len(data), BLOCK):
            block = (offset + at) // BLOCK
            assert data[at : at + BLOCK] in self.may_hold(block), f"block {block} holds {data[at : at + 16]!r}"


async def write(client: Client, model: Written, data: bytes, offset: int) -> bool:
    """Was it taken?"""
    try:
        await client.pwrite(data, offset)
    except ServerRefused as error:
        if error.code != ENOSPC:
            raise
        model.has(offset, data, perhaps=True)
        return False
    model.has(offset, data)
    return True


async def fill(client: Client, model: Written, rng: random.Random) -> int:
    """Write to new places until hardly a block is left; flush now and then, which never fails. How many were taken."""
    taken, misses, length = 0, 0, CHUNK
    while length >= BLOCK:
        offset = rng.randrange(IMAGE_SIZE // CHUNK, SIZE // CHUNK) * CHUNK
        if offset // BLOCK in model.blocks:
            continue
        if await write(client, model, rng.randbytes(length), offset):
            taken += 1
        else:
            misses += 1
            if misses % 3 == 0:
                length //= 4
        if rng.random() < 0.1:
            await client.flush()
    await client.flush()
    return taken


def fill_up(path: Path) -> None:
    """Leave nothing. What is written again after a sync is what the file system had kept in hand."""
    with open(path, "ab", buffering=0) as file:
        for _ in range(5):
            with suppress(OSError):
                while True:
                    file.write(bytes([1]) * BLOCK)
            os.sync()


async def rewrite(client: Client, model: Written, rng: random.Random) -> int:
    """What has its space is written over, and flushed."""
    for block in rng.sample(sorted(block for block, may in model.blocks.items() if len(may) == 1), 30):
        if not await write(client, model, rng.randbytes(BLOCK), block * BLOCK):
            raise AssertionError(f"block {block} has its space, and a write to it was refused")
    await client.flush()
    return 30


Step = Callable[[Client, Written, random.Random], Awaitable[int]]


class Story:
    """A pool on the disk, with clones that want more than it has, and what they have to hold."""

    def __init__(self, disk: Path, rng: random.Random) -> None:
        self.rng = rng
        self.ballast = disk / "ballast"
        image = disk.parent / "image"
        base = rng.randbytes(IMAGE_SIZE)
        image.write_bytes(base)
        self.pool = make_pool(disk / "pool", image, "spare")
        nbdclone("--pool", self.pool, "clone", "base", *CLONES, "--size", str(SIZE))
        self.ballast.write_bytes(rng.randbytes(6 * MIB))
        self.models = {name: Written(base) for name in CLONES}

    async def each(self, clients: dict[str, Client], step: Step, names: Sequence[str] = CLONES) -> list[int]:
        """Do the same in all clones at once."""
        seeds = [self.rng.random() for _ in names]
        return await asyncio.gather(
            *(
                step(clients[name], self.models[name], random.Random(seed))
                for name, seed in zip(names, seeds, strict=True)
            )
        )

    async def check(self, clients: dict[str, Client]) -> None:
        for name in CLONES:
            await self.models[name].check(clients[name])


@asynccontextmanager
async def connected(server: Served) -> AsyncIterator[dict[str, Client]]:
    """A client for each clone."""
    async with AsyncExitStack() as stack:
        yield {name: await stack.enter_async_context(await Client.connect(server.uri(name))) for name in CLONES}


@writing_in_place
def test_a_full_disk_refuses_what_needs_space_and_harms_nothing(disk: Path, kind: str) -> None:
    story = Story(disk, random.Random(8))

    async def until_it_is_full(server: Served) -> None:
        async with connected(server) as clients:
            # First some blocks in every segment, so that each clone has something to write over.
            for number in range(40):
                for name in CLONES:
                    data = story.rng.randbytes(BLOCK)
                    assert await write(clients[name], story.models[name], data, IMAGE_SIZE + number * (12 * MIB))
            # Two fill the disk; the third's maps, none of which was written before, have their space.
            assert sum(await story.each(clients, fill, CLONES[:2])) > 20
            await clients["three"].flush()
            await story.each(clients, fill)
            await story.check(clients)
            await story.each(clients, rewrite)
            await story.check(clients)
            for verb in (["ls"], ["tree"], ["info", "one"]):
                nbdclone("--pool", story.pool, *verb)
            server.kill()

    async def as_it_goes_on(server: Served) -> None:
        async with connected(server) as clients:
            await story.check(clients)
            # Space that others give back is there for the same connections.
            assert not await write(clients["two"], story.models["two"], story.rng.randbytes(2 * MIB), 500 * MIB)
            story.ballast.unlink()
            os.sync()  # XFS frees in the background
            assert sum(await story.each(clients, fill)) > 5
            # And so is what a clone gives back itself.
            one, model = clients["one"], story.models["one"]
            mine = sorted(block for block in model.blocks)[:400]
            for block in mine:
                await one.trim(BLOCK, block * BLOCK)
                model.has(block * BLOCK, bytes(BLOCK))
            await one.flush()
            for block in mine[:100]:
                assert await write(one, model, story.rng.randbytes(BLOCK), block * BLOCK)
            await one.flush()
            await story.check(clients)

    with served(story.pool) as server:
        asyncio.run(until_it_is_full(server))
    with served(story.pool) as server:
        asyncio.run(as_it_goes_on(server))


@writing_in_place
def test_on_a_full_disk_nothing_is_made_and_removing_makes_space(disk: Path, kind: str) -> None:
    story = Story(disk, random.Random(9))

    async def fill_one(server: Served) -> None:
        async with await Client.connect(server.uri("one")) as one:
            await fill(one, story.models["one"], story.rng)

    with served(story.pool) as server:
        asyncio.run(fill_one(server))
    fill_up(story.ballast)
    if kind != "xfs":  # it keeps room for its own records, and a new clone is hardly more than that
        refused = nbdclone(
            "--pool", story.pool, "clone", "base", *(f"more{number}" for number in range(9)), check=False
        )
        assert (refused.returncode, "no space left" in refused.stderr) == (1, True), refused.stderr
        assert "nothing was made" in refused.stderr
    nbdclone("--pool", story.pool, "quota", "two", "1G")
    before = os.statvfs(disk)
    nbdclone("--pool", story.pool, "rm", "one")
    os.sync()
    after = os.statvfs(disk)
    assert (after.f_bavail - before.f_bavail) * before.f_frsize > MIB
    assert sorted(os.listdir(story.pool / ".tmp")) == []
    nbdclone("--pool", story.pool, "clone", "base", "fresh")


def test_at_its_quota_a_clone_is_refused_and_another_is_not(disk: Path, kind: str) -> None:
    story = Story(disk, random.Random(10))
    limit = 3 * MIB
    nbdclone("--pool", story.pool, "quota", "one", "3M")

    async def check(server: Served) -> None:
        async with connected(server) as clients:
            one, model = clients["one"], story.models["one"]
            taken = await story.each(clients, fill_some)
            assert 6 < taken[0] < taken[1] == taken[2] == 32
            await rewrite(one, model, story.rng)
            # It is raised under the client, which goes on.
            nbdclone("--pool", story.pool, "quota", "one", "5M")
            assert await write(one, model, story.rng.randbytes(MIB), 300 * MIB)
            assert not await write(one, model, story.rng.randbytes(2 * MIB), 310 * MIB)
            await one.trim(MIB, 300 * MIB)
            model.has(300 * MIB, bytes(MIB))
            assert await write(one, model, story.rng.randbytes(MIB // 2), 320 * MIB)
            await one.flush()
            await story.check(clients)

    async def fill_some(client: Client, model: Written, rng: random.Random) -> int:
        taken = sum([await write(client, model, rng.randbytes(CHUNK), (IMAGE_SIZE + n * MIB)) for n in range(32)])
        await client.flush()
        return taken

    with served(story.pool) as server:
        asyncio.run(check(server))
        allocated = (story.pool / "clones" / "one" / "delta").stat().st_blocks * 512
        assert limit - CHUNK < allocated <= 5 * MIB + 64 * 1024


@writing_in_place
def test_qemu_io_hears_of_a_full_disk_and_goes_on_when_there_is_space(disk: Path, kind: str) -> None:
    require("qemu-utils")
    story = Story(disk, random.Random(11))

    def qemu_io(uri: str, *commands: str) -> str:
        words = [word for command in commands for word in ("-c", command)]
        return subprocess.run(
            [program("qemu-io"), "-f", "raw", *words, uri], check=False, capture_output=True, text=True, timeout=120
        ).stdout

    with served(story.pool) as server:
        said = qemu_io(server.uri("one"), "write -P 5 0 64k", f"write -P 6 {8 * MIB} 400M", "write -P 7 0 64k", "flush")
        assert said.count("No space left on device") == 1, said
        assert said.count("wrote 65536/65536") == 2, said
        assert "wrote 65536/65536" in qemu_io(server.uri("two"), "write -P 8 0 64k", "flush")
        story.ballast.unlink()
        said = qemu_io(server.uri("one"), "read -P 7 0 64k", f"write -P 9 {100 * MIB} 4M", f"read -P 9 {100 * MIB} 4M")
        assert "wrote 4194304/4194304" in said, said
        assert "fail" not in said, said


@pytest.mark.parametrize("kind", [kind for kind in known_kinds() if kind == "btrfs"], indirect=True)
def test_where_a_flush_needs_space_it_may_be_refused_and_the_next_one_does_it(disk: Path, kind: str) -> None:
    story = Story(disk, random.Random(12))
    model = story.models["one"]

    async def until_it_is_full(server: Served) -> None:
        async with await Client.connect(server.uri("one")) as one:
            try:
                await fill(one, model, story.rng)
            except ServerRefused as error:
                if error.code != ENOSPC:  # it is a flush, most often
                    raise
            await model.check(one)
            story.ballast.unlink()
            for _ in range(10):
                os.sync()  # what was deleted is free from the next commit on
                with suppress(ServerRefused):
                    await one.flush()
                    break
            else:
                raise AssertionError("no flush finds space")
            server.kill()

    async def check(server: Served) -> None:
        async with await Client.connect(server.uri("one")) as one:
            await model.check(one)

    with served(story.pool) as server:
        asyncio.run(until_it_is_full(server))
    with served(story.pool) as server:
        asyncio.run(check(server))
