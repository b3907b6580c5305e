"""Block status: what a clone tells of its extents, in the contexts that a client selected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from nbdclone.protocol.block_status import (
    ALLOCATION,
    ALLOCATION_DEPTH,
    ORIGIN,
    STATE_DIRTY,
    Descriptors,
    add_merged,
    max_status_size,
    status_chunk,
)
from nbdclone.protocol.wire import ChunkLayout, Cookie, State
from nbdclone.store.clone import Clone
from nbdclone.store.disk import MAX_EXTENTS
from nbdclone.store.layer import Extent, Layer
from nbdclone.store.since import changes_since


class Context(NamedTuple):
    """A context that a client selected. ``since``, if it tells changes: the id of the layer since which."""

    id: int
    name: str
    since: bytes = b""


Contexts = tuple[Context, ...]
"""What is to be told, at least one."""

_UNALLOCATED: Final = int(State.HOLE | State.ZERO)

# Data are data wherever they live: a client that copies a disk skips what is a hole.
_STATUS: Final[dict[str, Callable[[Extent], int]]] = {
    ALLOCATION: lambda extent: _UNALLOCATED if extent.hole else 0,
    ALLOCATION_DEPTH: lambda extent: extent.depth,
    ORIGIN: lambda extent: extent.origin,
}

_Reader = Callable[[int, Extent], Iterable[tuple[int, int]]]


def _reader(context: Context, layers: Sequence[Layer]) -> _Reader:
    """Says what the context tells of an extent at an offset: descriptors."""
    if status := _STATUS.get(context.name):
        return lambda _offset, extent: ((extent.length, status(extent)),)
    parts = changes_since(context.since, layers)
    return lambda offset, extent: ((length, STATE_DIRTY if changed else 0) for length, changed in parts(offset, extent))


def block_status(
    clone: Clone, contexts: Contexts, cookie: Cookie, offset: int, length: int, one: bool, layout: ChunkLayout
) -> list[bytes]:
    """The chunks of the reply to NBD_CMD_BLOCK_STATUS; ``one`` is NBD_CMD_FLAG_REQ_ONE.

    Waits for the disk. The range is inside the disk and not empty; where it has more than MAX_EXTENTS extents, the
    reply tells of the first of them. Raises OSError.
    """
    with clone.surveyed(offset, length) as (layers, extents):
        told = _descriptors([_reader(context, layers) for context in contexts], offset, extents, one)
    last = len(contexts) - 1
    return [
        status_chunk(cookie, context.id, descriptors[:1] if one else descriptors, last=index == last, layout=layout)
        for index, (context, descriptors) in enumerate(zip(contexts, told, strict=True))
    ]


def _descriptors(readers: Sequence[_Reader], offset: int, extents: Iterator[Extent], one: bool) -> list[Descriptors]:
    """What each reader tells of the extents; ``one``: no further than it takes to know the first of each."""
    found: list[Descriptors] = [[] for _ in readers]
    unfinished = list(zip(readers, found, strict=True))
    for extent in extents:
        for read, descriptors in unfinished:
            add_merged(descriptors, read(offset, extent))
        offset += extent.length
        if one:
            unfinished = [item for item in unfinished if len(item[1]) == 1]
            if not unfinished:
                break
    return found


def largest_reply(contexts: Contexts, one: bool, layout: ChunkLayout) -> int:
    """How many bytes the reply may have."""
    return len(contexts) * (layout.header.size + max_status_size(layout, 1 if one else MAX_EXTENTS))
