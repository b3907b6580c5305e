"""Block status: the metadata contexts of this server, and the chunks that tell a disk's extents in one of them.

An extent is described by its length in bytes and its status, a number that means something in its context only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import chain
from struct import Struct
from typing import Final

from nbdclone.errors import RemoteProtocolError
from nbdclone.protocol.wire import (
    EXTENDED,
    MAX_DESCRIPTORS,
    REPLY_FLAG_DONE,
    STATUS_CONTEXT,
    STATUS_LENGTH,
    STRUCTURED,
    ChunkLayout,
    Cookie,
)

ALLOCATION: Final = "base:allocation"  # NBD_STATE_*: of the specification
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"  # 0 nowhere, 1 the topmost layer, 2 and up those under it: of qemu
ORIGIN: Final = "nbdclone:origin"  # 0 nowhere, 1 the base, 2 and up the layers above it: of this server

CONTEXTS: Final = ((1, ALLOCATION), (2, ALLOCATION_DEPTH), (3, ORIGIN))
"""The contexts of this server that every export has: (id, name) of each."""

# And for each snapshot that is beneath an export two that say the same: STATE_DIRTY where it was changed since.
CHANGED_SINCE: Final = "nbdclone:changed-since="  # of this server
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"  # of qemu, whose backup tools know it
STATE_DIRTY: Final = 1

Descriptors = list[tuple[int, int]]
"""(length in bytes, status) of consecutive extents."""


def offered_contexts(snapshots: Iterable[str]) -> list[str]:
    """The names of all contexts of an export that has these snapshots beneath it."""
    changes = [prefix + name for name in snapshots for prefix in (CHANGED_SINCE, DIRTY_BITMAP)]
    return [name for _id, name in CONTEXTS] + changes


def snapshot_in(context: str) -> str | None:
    """The snapshot since which a context tells the changes; None if it is of another kind."""
    for prefix in (CHANGED_SINCE, DIRTY_BITMAP):
        if context.startswith(prefix):
            return context.removeprefix(prefix)
    return None


def _wildcards(context: str) -> Iterable[str]:
    """The queries of a list that mean it among others: its namespace, and its kind if it has several of that."""
    yield context[: context.index(":") + 1]
    if name := snapshot_in(context):
        yield context.removesuffix(name)


_OF_SNAPSHOTS: Final = frozenset(
    wildcard for prefix in (CHANGED_SINCE, DIRTY_BITMAP) for wildcard in _wildcards(f"{prefix}any")
)


def need_snapshots(queries: Collection[str], listing: bool) -> bool:
    """Does it take the snapshots of the export to answer these queries, of NBD_OPT_LIST_META_CONTEXT or _SET_?"""
    if any(snapshot_in(query) for query in queries):
        return True
    return listing and (not queries or not _OF_SNAPSHOTS.isdisjoint(queries))


def listed_contexts(queries: Collection[str], snapshots: Iterable[str] = ()) -> list[str]:
    """The contexts that match one of the queries of NBD_OPT_LIST_META_CONTEXT; without queries, all there are.

    A namespace and a colon alone mean all of that namespace, a prefix of several names all of those. What is not known
    is no error.
    """
    names = offered_contexts(snapshots)
    if not queries:
        return names
    wanted = set(queries)
    return [name for name in names if name in wanted or not wanted.isdisjoint(_wildcards(name))]


def selected_contexts(queries: Collection[str], snapshots: Iterable[str] = ()) -> tuple[tuple[int, str], ...]:
    """The (id, name) of those that NBD_OPT_SET_META_CONTEXT names in full."""
    wanted = set(queries)
    return tuple(item for item in enumerate(offered_contexts(snapshots), start=1) if item[1] in wanted)


def max_status_size(layout: ChunkLayout, extents: int = MAX_DESCRIPTORS) -> int:
    """How many bytes a chunk of block status has after its header, with so many extents."""
    size: int = layout.status.size + extents * layout.descriptor.size
    return size


def status_chunk(
    cookie: Cookie,
    context: int,
    descriptors: Collection[tuple[int, int]],
    *,
    last: bool,
    layout: ChunkLayout = STRUCTURED,
) -> bytes:
    """A chunk of the reply to NBD_CMD_BLOCK_STATUS; the reply has one for each context that was selected.

    There is at least one descriptor, and none is of length 0.
    """
    count = len(descriptors)
    flags = REPLY_FLAG_DONE if last else 0
    head = layout.header.pack(layout.magic, flags, layout.status_type, cookie, max_status_size(layout, count))
    start = layout.status.pack(context, count) if layout is EXTENDED else layout.status.pack(context)
    number = layout.descriptor.format[-1]
    return head + start + Struct(f">{2 * count}{number}").pack(*chain.from_iterable(descriptors))


def status_filter(length: int, contexts: Collection[int]) -> bytes:
    """The payload of a NBD_CMD_BLOCK_STATUS that asks about ``length`` bytes in some of the contexts."""
    return STATUS_LENGTH.pack(length) + b"".join(STATUS_CONTEXT.pack(context) for context in contexts)


def parse_status_filter(payload: bytes | memoryview, selected: Collection[int]) -> tuple[int, list[int]] | None:
    """Such a payload: effect length, ids. None if it is none, or names what was not ``selected``, or names it twice."""
    count, rest = divmod(len(payload) - STATUS_LENGTH.size, STATUS_CONTEXT.size)
    if rest or not 0 < count <= len(selected):
        return None
    (length,) = STATUS_LENGTH.unpack_from(payload)
    contexts = [context for (context,) in STATUS_CONTEXT.iter_unpack(payload[STATUS_LENGTH.size :])]
    if len(set(contexts)) < count or not set(contexts) <= set(selected):
        return None
    return length, contexts


def merged(descriptors: Iterable[tuple[int, int]]) -> Descriptors:
    """The same with neighbours of one status made one."""
    result: Descriptors = []
    add_merged(result, descriptors)
    return result


def add_merged(result: Descriptors, descriptors: Iterable[tuple[int, int]]) -> None:
    """Put what follows at the end of what is merged already, neighbours of one status made one."""
    for length, status in descriptors:
        if result and result[-1][1] == status:
            result[-1] = (result[-1][0] + length, status)
        else:
            result.append((length, status))


def parse_status(payload: bytes, length: int, one: bool, layout: ChunkLayout = STRUCTURED) -> tuple[int, Descriptors]:
    """The payload of a chunk in the reply to a request over ``length`` bytes: the context's id, the descriptors.

    Raises:
        RemoteProtocolError: it is none, or tells more than the request asked for; ``one`` is NBD_CMD_FLAG_REQ_ONE.
    """
    size = len(payload) - layout.status.size
    if size < layout.descriptor.size or size % layout.descriptor.size:
        raise RemoteProtocolError(f"a chunk of block status of {len(payload)} bytes")
    context, *counts = layout.status.unpack_from(payload)
    descriptors: Descriptors = list(layout.descriptor.iter_unpack(payload[layout.status.size :]))
    if counts and counts != [len(descriptors)]:
        raise RemoteProtocolError(f"{counts[0]} extents are announced, and {len(descriptors)} sent")
    if not all(count for count, _status in descriptors):
        raise RemoteProtocolError("an extent of no length")
    if one and (len(descriptors) > 1 or descriptors[0][0] > length):
        raise RemoteProtocolError("more than the one extent that was asked for")
    if sum(count for count, _status in descriptors[:-1]) >= length:
        raise RemoteProtocolError("extents beyond the range that was asked for")
    return context, descriptors
