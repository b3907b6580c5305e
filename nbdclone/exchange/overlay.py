"""From a clone to a qcow2 overlay over its base's image: what the clone has of its own, and nothing else.

qemu-nbd writes it. What a cluster (64 KiB) has beside a clone's blocks (4 KiB), it takes from the base.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from nbdclone.client import Client
from nbdclone.errors import ServerRefused, UsageError
from nbdclone.exchange.programs import in_turn, opened_by_qemu, qemu_img
from nbdclone.protocol.wire import Errno
from nbdclone.store.clone import Clone
from nbdclone.store.exporting import whole_extents
from nbdclone.store.image import Image, Progress
from nbdclone.store.layer import NOWHERE
from nbdclone.store.qemu import node

PIECE_SIZE = 1 << 20
IN_FLIGHT = 8  # pieces of that size
BASE = 1  # the owner of what lies in the base


def base_image_of(clone: Clone, overlay: Path | None) -> str:
    """The path of the image of the clone's base: absolute, or as seen from where the overlay is. Raises UsageError."""
    image = os.path.realpath(_base_of(clone).directory / "image")
    if overlay is None:
        return image
    relative = os.path.relpath(image, os.path.realpath(overlay.parent))
    # qemu takes what stands before a colon for a protocol, unless there is a slash before it.
    return relative if ":" not in relative.split("/", 1)[0] else f"./{relative}"


def _base_of(clone: Clone) -> Image:
    base = clone.layers[0]
    if not isinstance(base, Image):
        raise UsageError(f"'{clone.name}' has no base to be linked to: export it without --link")
    return base


async def write_overlay(clone: Clone, path: Path, backing: str, progress: Progress | None = None) -> None:
    """Make the overlay at ``path``; ``backing`` is the name of the base's image to be written into it.

    Raises StorageError, OSError.
    """
    base = _base_of(clone)
    what = f"export of '{clone.name}' as an overlay"
    # -u: the name may be relative to where the overlay will be.
    create = ["create", "-q", "-f", "qcow2", "-u", "-F", "raw", "-b", backing, os.path.abspath(path), str(clone.size)]
    await qemu_img(create, what)
    below = node(base.directory / "image", "raw", **{"read-only": True})
    opened = node(path, "qcow2", backing=below)
    try:
        async with opened_by_qemu(opened, what, read_only=False) as disk:
            writes = (_write(clone, disk, *piece) for piece in own_pieces(clone, base.size))
            await in_turn(writes, IN_FLIGHT, lambda offset: progress and progress(offset, clone.size))
            await disk.flush()
    except ServerRefused as error:
        if error.code == Errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise


def own_pieces(clone: Clone, base_size: int) -> Iterator[tuple[bool, int, int]]:
    """Where the clone reads otherwise than its base does: (zeros?, offset, length) in order; data in short pieces."""
    for offset, extent in whole_extents(clone):
        stop = offset + extent.length
        if extent.origin == BASE:
            continue
        if extent.origin == NOWHERE and offset >= base_size:
            continue  # the overlay has zeros there as it is
        if extent.hole:
            yield True, offset, extent.length
            continue
        for start in range(offset, stop, PIECE_SIZE):
            yield False, start, min(PIECE_SIZE, stop - start)


async def _write(clone: Clone, disk: Client, zero: bool, offset: int, length: int) -> int:
    """Returns where the piece ends."""
    if zero:
        await disk.zero(length, offset)
    else:
        await disk.pwrite(clone.pread(length, offset), offset)
    return offset + length
