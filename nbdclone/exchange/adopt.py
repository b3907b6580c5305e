"""From a qcow2 overlay to a clone: the blocks that its chain has and its base has not, read through qemu-nbd."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from blake3 import blake3

from nbdclone.client import Client
from nbdclone.errors import InvalidImage, NameTaken, NotFound, ServerRefused, StorageError
from nbdclone.exchange.programs import in_turn, opened_by_qemu
from nbdclone.protocol.block_status import ALLOCATION, ALLOCATION_DEPTH, Descriptors
from nbdclone.protocol.wire import State
from nbdclone.store.adopting import (
    Chain,
    RawImage,
    find_base,
    read_chain,
    require_fits,
    require_whole,
    write_what_differs,
    write_zeros_that_differ,
)
from nbdclone.store.catalog import BaseInfo, CloneInfo
from nbdclone.store.clone import Clone
from nbdclone.store.image import CHUNK_SIZE, ZERO_CHUNK, Progress, Samples, chunk_count, chunk_hash, fingerprint_of
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.names import validate_name
from nbdclone.store.pool import Pool
from nbdclone.store.qemu import node

T = TypeVar("T")

WINDOW = 1 << 30  # so much of a disk is asked about at once
PIECE_SIZE = 1 << 20
IN_FLIGHT = 8  # pieces of that size


class Stretch(NamedTuple):
    """A part of a disk: does the chain of overlays have it, and does it read as zeros there?"""

    offset: int
    length: int
    owned: bool
    zero: bool


@dataclass(frozen=True, slots=True)
class Adopted:
    """The clone that was made; ``base_imported``: its base too; ``snapshots`` inside the images stayed behind."""

    clone: CloneInfo
    base: str
    base_imported: bool
    snapshots: int


def import_as_clone(
    pool: Pool,
    overlay: Path,
    name: str,
    *,
    with_base: bool = False,
    base_name: str | None = None,
    progress: Progress | None = None,
) -> Adopted:
    """Make a clone of what a qcow2 overlay says, over the base that was imported from the image at its bottom.

    The base is known by its content. ``with_base``: if there is none, it is imported first, as ``base_name`` (default:
    the file's name). The images are only read. Raises UsageError and its children, StorageError, OSError; there is no
    clone then, and the base, if it was imported, stays.
    """
    validate_name(name)
    if name in pool.names():
        raise NameTaken(f"there is a base or clone '{name}' in {pool.path} already")
    chain = read_chain(overlay)
    require_whole(chain)
    image: RawImage | OtherImage = (
        RawImage(chain.bottom) if chain.bottom_format == "raw" else OtherImage(chain.bottom, chain.bottom_format)
    )
    base = find_base(pool, chain.bottom, image, progress)
    imported = base is None
    if base is None:
        base = _import_base(pool, chain, with_base, base_name, progress)
    info = pool.info(base)
    assert isinstance(info, BaseInfo)
    size = require_fits(chain, info)
    [clone] = pool.create_clones(base, [name], size=size, fill=lambda clone: asyncio.run(_fill(clone, chain, progress)))
    return Adopted(clone, base, imported, sum(overlay.snapshots for overlay in chain.overlays))


def _import_base(pool: Pool, chain: Chain, with_base: bool, name: str | None, progress: Progress | None) -> str:
    if not with_base:
        raise NotFound(
            f"no base of this pool has the content of {chain.bottom}, which {chain.top.path} stands on: "
            f"'nbdclone import {shlex.quote(str(chain.bottom))}' makes one, and --with-base does it along with this"
        )
    return pool.import_base(chain.bottom, name, progress=progress).name


async def _fill(clone: Clone, chain: Chain, progress: Progress | None) -> None:
    """Write what the overlays have into the clone, which reads as its base up to now."""
    what = f"import of {chain.top.path}"
    try:
        async with opened_by_qemu(
            chain.opened(), what, read_only=True, contexts=(ALLOCATION, ALLOCATION_DEPTH)
        ) as disk:
            if disk.size != clone.size:
                raise InvalidImage(f"{chain.top.path} was changed while it was imported: stop what writes to it")
            async for stretch in _stretches(disk):
                offset, length, owned, zero = stretch
                if owned and zero:
                    write_zeros_that_differ(clone, offset, length)
                elif owned:
                    await in_turn(
                        _reads(disk, offset, length), IN_FLIGHT, lambda read: write_what_differs(clone, *read)
                    )
                if progress:
                    progress(offset + length, clone.size)
    except ServerRefused as error:
        raise StorageError(f"{what}: {error}") from None


def _reads(disk: Client, offset: int, length: int) -> Iterator[Coroutine[Any, Any, tuple[bytes, int]]]:
    """The reads that a range takes: each gives its data and its offset. All but the first begin with a whole piece."""

    async def read(start: int, count: int) -> tuple[bytes, int]:
        return await disk.pread(count, start), start

    stop = offset + length
    while offset < stop:
        count = min(PIECE_SIZE - offset % PIECE_SIZE, stop - offset)
        yield read(offset, count)
        offset += count


async def _stretches(disk: Client) -> AsyncIterator[Stretch]:
    """All of the disk, in order."""
    missing = {ALLOCATION, ALLOCATION_DEPTH} - set(disk.contexts.values())
    if missing:
        raise StorageError(f"this qemu-nbd does not tell {', '.join(sorted(missing))}: it takes qemu 5.2 or newer")
    for offset in range(0, disk.size, WINDOW):
        told = await disk.block_status(min(WINDOW, disk.size - offset), offset)
        for stretch in merge_status(offset, told[ALLOCATION], told[ALLOCATION_DEPTH]):
            yield stretch


def merge_status(offset: int, allocation: Descriptors, depth: Descriptors) -> Iterator[Stretch]:
    """What the two contexts tell of the same range, which begins at ``offset``, as one."""
    left = iter(allocation)
    right = iter(depth)
    zeros, owners = [0, 0], [0, 0]  # what is left of an extent of each: length, status
    while True:
        try:
            zeros = zeros if zeros[0] else list(next(left))
            owners = owners if owners[0] else list(next(right))
        except StopIteration:
            return
        length = min(zeros[0], owners[0])
        yield Stretch(offset, length, owners[1] > 0, bool(zeros[1] & State.ZERO))
        offset += length
        zeros[0] -= length
        owners[0] -= length


class OtherImage:
    """What :class:`nbdclone.store.adopting.RawImage` is, for an image that qemu has to read."""

    def __init__(self, path: Path, image_format: str) -> None:
        self._path = path
        self._opened = node(path, image_format)

    def _ask(self, question: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        async def ask() -> T:
            what = f"reading {self._path}"
            try:
                async with opened_by_qemu(self._opened, what, read_only=True, contexts=(ALLOCATION,)) as disk:
                    return await question(disk)
            except ServerRefused as error:
                raise StorageError(f"{what}: {error}") from None

        return asyncio.run(ask())

    def size(self) -> int:
        """In bytes, as a client sees it."""

        async def size(disk: Client) -> int:
            return disk.size

        return self._ask(size)

    def samples(self, offsets: tuple[int, ...]) -> Samples:
        """The samples at these places."""

        async def samples(disk: Client) -> Samples:
            whole = blake3()
            for offset in offsets:
                whole.update(await disk.pread(min(BLOCK_SIZE, disk.size - offset), offset))
            return Samples(offsets, whole.hexdigest())

        return self._ask(samples)

    def fingerprint(self, progress: Progress | None) -> bytes:
        """What an import would find."""

        async def fingerprint(disk: Client) -> bytes:
            hashes: list[bytes] = []
            for chunk in range(chunk_count(disk.size)):
                offset = chunk * CHUNK_SIZE
                length = min(CHUNK_SIZE, disk.size - offset)
                told = (await disk.block_status(length, offset))[ALLOCATION]
                zero = all(status & State.ZERO for _, status in told)
                hashes.append(ZERO_CHUNK if zero else chunk_hash(await disk.pread(length, offset)))
                if progress:
                    progress(offset + length, disk.size)
            return fingerprint_of(disk.size, iter(hashes))

        return self._ask(fingerprint)
