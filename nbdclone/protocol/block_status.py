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
    BLOCK_STATUS,
    DESCRIPTOR,
    MAX_DESCRIPTORS,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
)

ALLOCATION: Final = "base:allocation"  # NBD_STATE_*: of the specification
ALLOCATION_DEPTH: Final = "qemu:allocation-depth"  # 0 nowhere, 1 the topmost layer, 2 and up those under it: of qemu
ORIGIN: Final = "nbdclone:origin"  # 0 nowhere, 1 the base, 2 and up the layers above it: of this server

CONTEXTS: Final = ((1, ALLOCATION), (2, ALLOCATION_DEPTH), (3, ORIGIN))
"""The contexts of this server, the same for every export: (id, name) of each."""

MAX_STATUS_CHUNK: Final = BLOCK_STATUS.size + MAX_DESCRIPTORS * DESCRIPTOR.size

Descriptors = list[tuple[int, int]]
"""(length in bytes, status) of consecutive extents."""


def listed_contexts(queries: Collection[str]) -> list[str]:
    """The contexts that match one of the queries of NBD_OPT_LIST_META_CONTEXT; without queries, all there are.

    A namespace and a colon alone mean all of that namespace. What is not known is no error.
    """
    names = [name for _id, name in CONTEXTS]
    if not queries:
        return names
    return [name for name in names if name in queries or name[: name.index(":") + 1] in queries]


def status_chunk(cookie: int, context: int, descriptors: Collection[tuple[int, int]], *, last: bool) -> bytes:
    """A chunk of the reply to NBD_CMD_BLOCK_STATUS; the reply has one for each context that was selected.

    There is at least one descriptor, and none is of length 0.
    """
    length = BLOCK_STATUS.size + len(descriptors) * DESCRIPTOR.size
    flags = REPLY_FLAG_DONE if last else 0
    head = STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, flags, REPLY_TYPE_BLOCK_STATUS, cookie, length)
    numbers = Struct(f">{2 * len(descriptors)}I").pack(*chain.from_iterable(descriptors))
    return head + BLOCK_STATUS.pack(context) + numbers


def merged(descriptors: Iterable[tuple[int, int]]) -> Descriptors:
    """The same with neighbours of one status made one."""
    result: Descriptors = []
    for length, status in descriptors:
        if result and result[-1][1] == status:
            result[-1] = (result[-1][0] + length, status)
        else:
            result.append((length, status))
    return result


def parse_status(payload: bytes, length: int, one: bool) -> tuple[int, Descriptors]:
    """The payload of a chunk in the reply to a request over ``length`` bytes: the context's id, the descriptors.

    Raises:
        RemoteProtocolError: it is none, or tells more than the request asked for; ``one`` is NBD_CMD_FLAG_REQ_ONE.
    """
    size = len(payload) - BLOCK_STATUS.size
    if size < DESCRIPTOR.size or size % DESCRIPTOR.size:
        raise RemoteProtocolError(f"a chunk of block status of {len(payload)} bytes")
    (context,) = BLOCK_STATUS.unpack_from(payload)
    descriptors: Descriptors = list(DESCRIPTOR.iter_unpack(payload[BLOCK_STATUS.size :]))
    if not all(count for count, _status in descriptors):
        raise RemoteProtocolError("an extent of no length")
    if one and (len(descriptors) > 1 or descriptors[0][0] > length):
        raise RemoteProtocolError("more than the one extent that was asked for")
    if sum(count for count, _status in descriptors[:-1]) >= length:
        raise RemoteProtocolError("extents beyond the range that was asked for")
    return context, descriptors
