"""Block status: what a clone tells of its extents, in the contexts that a client selected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from nbdclone.protocol.block_status import (
    ALLOCATION,
    ALLOCATION_DEPTH,
    ORIGIN,
    max_status_size,
    merged,
    status_chunk,
)
from nbdclone.protocol.wire import ChunkLayout, Cookie, State
from nbdclone.store.clone import MAX_EXTENTS, Clone
from nbdclone.store.layer import Extent

Contexts = tuple[tuple[int, str], ...]
"""(id, name) of each context that is to be told, at least one."""

_UNALLOCATED: Final = int(State.HOLE | State.ZERO)

# Data are data wherever they live: a client that copies a disk skips what is a hole.
_STATUS: Final[dict[str, Callable[[Extent], int]]] = {
    ALLOCATION: lambda extent: _UNALLOCATED if extent.hole else 0,
    ALLOCATION_DEPTH: lambda extent: extent.depth,
    ORIGIN: lambda extent: extent.origin,
}


def block_status(
    clone: Clone, contexts: Contexts, cookie: Cookie, offset: int, length: int, one: bool, layout: ChunkLayout
) -> list[bytes]:
    """The chunks of the reply to NBD_CMD_BLOCK_STATUS; ``one`` is NBD_CMD_FLAG_REQ_ONE.

    Waits for the disk. The range is inside the disk and not empty; where it has more than MAX_EXTENTS extents, the
    reply tells of the first of them. Raises OSError.
    """
    reads = [_STATUS[name] for _id, name in contexts]
    extents: list[Extent] = []
    unfinished = reads  # the contexts whose first extent may go on
    for extent in clone.extents(offset, length):
        extents.append(extent)
        unfinished = [read for read in unfinished if read(extent) == read(extents[0])]
        if one and not unfinished:
            break
    chunks: list[bytes] = []
    for (context, _name), read in zip(contexts, reads, strict=True):
        descriptors = merged((extent.length, read(extent)) for extent in extents)
        told = descriptors[:1] if one else descriptors
        chunks.append(status_chunk(cookie, context, told, last=len(chunks) == len(contexts) - 1, layout=layout))
    return chunks


def largest_reply(contexts: Contexts, one: bool, layout: ChunkLayout) -> int:
    """How many bytes the reply may have."""
    return len(contexts) * (layout.header.size + max_status_size(layout, 1 if one else MAX_EXTENTS))
