"""Requests in flight, as a client keeps them: what their replies have told so far, and whether that can be true."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection
from typing import NamedTuple

from nbdclone.errors import RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.block_status import Descriptors, parse_status
from nbdclone.protocol.wire import CMD_BLOCK_STATUS, CMD_FLAG_DF, CMD_FLAG_REQ_ONE, CMD_READ, ChunkLayout


class Completed(NamedTuple):
    """The answer to the request with this cookie.

    ``error`` is 0 or a number of NBD_E*, ``message`` what the server said about it (often nothing);
    ``data`` is what a successful read gave, and None otherwise; ``extents`` what a successful NBD_CMD_BLOCK_STATUS
    told, by the id of the context, and None otherwise.
    """

    cookie: int
    error: int
    message: str
    data: bytes | bytearray | None
    extents: dict[int, Descriptors] | None = None


class Pending:
    """A request in flight, and what the chunks of its reply have told so far.

    ``length`` is its effect length; ``contexts`` are the ids of those in which block status is to be told.
    """

    __slots__ = (
        "command",
        "content_chunks",
        "contexts",
        "data",
        "error",
        "extents",
        "flags",
        "length",
        "message",
        "offset",
        "seen",
    )

    def __init__(self, command: int, flags: int, offset: int, length: int, contexts: Collection[int] = ()) -> None:
        self.command = command
        self.contexts = contexts
        self.flags = flags
        self.offset = offset
        self.length = length
        self.data: bytes | bytearray | None = None
        self.seen: list[tuple[int, int]] = []  # what content chunks covered: apart, ascending, (start, end)
        self.content_chunks = 0
        self.extents: dict[int, Descriptors] = {}  # by the context's id
        self.error = 0
        self.message = ""

    def fail(self, error: int, message: str) -> None:
        """Remember an error chunk: the first one tells most."""
        if not self.error:
            self.error, self.message = error, message

    def cover(self, offset: int, size: int) -> int:
        """Note a content chunk at ``offset`` of the export; returns its place in the data of this read."""
        if self.command != CMD_READ:
            raise RemoteProtocolError(f"data in the reply to command {self.command}")
        start = offset - self.offset
        end = start + size
        if not 0 <= start < end <= self.length:
            raise RemoteProtocolError(
                f"{size} bytes at {offset} in the reply to a read of {self.length} at {self.offset}"
            )
        self.content_chunks += 1
        if self.content_chunks > 1 and self.flags & CMD_FLAG_DF:
            raise RemoteProtocolError("a read that was not to be fragmented is answered in pieces")
        self._merge(start, end)
        return start

    def _merge(self, start: int, end: int) -> None:
        seen = self.seen
        after = bisect(seen, (start, end))
        if (after and seen[after - 1][1] > start) or (after < len(seen) and seen[after][0] < end):
            raise RemoteProtocolError(f"a part of the read at {self.offset} is sent twice")
        first = after
        if after and seen[after - 1][1] == start:
            first, start = after - 1, seen[after - 1][0]
        if after < len(seen) and seen[after][0] == end:
            after, end = after + 1, seen[after][1]
        seen[first:after] = [(start, end)]
        if len(seen) > wire.MAX_FRAGMENTS:
            raise RemoteProtocolError(f"a read is answered in more than {wire.MAX_FRAGMENTS} pieces apart")

    def store(self, start: int, data: memoryview) -> None:
        """Keep ``data``, which belongs at ``start`` of what is read."""
        if len(data) == self.length:
            self.data = bytes(data)
            return
        if not isinstance(self.data, bytearray):
            self.data = bytearray(self.length)
        self.data[start : start + len(data)] = data

    def describe(self, payload: bytes, layout: ChunkLayout) -> None:
        """Note a chunk of block status in one of the contexts."""
        if self.command != CMD_BLOCK_STATUS:
            raise RemoteProtocolError(f"block status in the reply to command {self.command}")
        context, descriptors = parse_status(payload, self.length, bool(self.flags & CMD_FLAG_REQ_ONE), layout)
        if context not in self.contexts or context in self.extents:
            raise RemoteProtocolError(f"block status in context {context}, which was not asked for or was sent before")
        self.extents[context] = descriptors

    def complete(self, cookie: int) -> Completed:
        """The answer, when its last message has come.

        Raises:
            RemoteProtocolError: there should have been more.
        """
        if self.error:
            return Completed(cookie, self.error, self.message, None)
        if self.command == CMD_BLOCK_STATUS:
            if not self.contexts or len(self.extents) < len(self.contexts):
                raise RemoteProtocolError(f"block status in {len(self.extents)} of {len(self.contexts)} contexts")
            return Completed(cookie, 0, "", None, self.extents)
        if self.command != CMD_READ:
            return Completed(cookie, 0, "", None)
        if self.length and self.seen != [(0, self.length)]:
            raise RemoteProtocolError(f"the reply to the read at {self.offset} ends before its data")
        if self.data is None:
            self.data = bytes(self.length)  # nothing but holes, or nothing at all
        return Completed(cookie, 0, "", self.data)
