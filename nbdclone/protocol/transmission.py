"""Transmission: how a server judges requests and builds replies, and all of the client's side.

The server's half is functions, since it has no state between messages: ``requests`` takes all that is in a buffer in
one pass, ``request_error`` judges each request, the builders make replies. A server that packs replies into a buffer of
its own uses the same structs::

    simple reply            SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, error, cookie)
                            then, for a successful read, its data
    read, in chunks         layout.read.pack_into(buffer, at, layout.magic, REPLY_FLAG_DONE,
                                REPLY_TYPE_OFFSET_DATA, cookie, OFFSET_DATA.size + length, offset)
                            then its data

The client's half, ``ClientTransmission``, remembers what was asked, and believes no reply beyond that.
"""

from __future__ import annotations

from collections.abc import Collection
from struct import error as struct_error
from typing import Final, NamedTuple

from nbdclone.errors import LocalProtocolError, RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.block_status import max_status_size, status_filter
from nbdclone.protocol.pending import Completed, Pending
from nbdclone.protocol.wire import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    ENOSPC,
    EOVERFLOW,
    EPERM,
    ERROR,
    ERROR_OFFSET,
    EXTENDED,
    EXTENDED_COOKIE,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_READ_ONLY,
    FLAG_SEND_CACHE,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    MAX_PAYLOAD,
    OFFSET_DATA,
    OFFSET_HOLE,
    REPLY_FLAG_DONE,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_IS_ERROR,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    REQUEST,
    REQUEST_MAGIC,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED,
    ChunkLayout,
    Cookie,
    ExportInfo,
    Mode,
    encode_text,
)

Buffer = bytes | bytearray | memoryview


class _Rule(NamedTuple):
    """What the specification says of one command. ``past_end`` is None where there is no range."""

    writes: bool
    exposed_by: int  # the transmission flag without which no client sends it; 0: always there
    flags: int  # the command flags documented for it
    past_end: int | None


_RULES: Final[dict[int, _Rule]] = {
    CMD_READ: _Rule(False, 0, CMD_FLAG_FUA | CMD_FLAG_DF, EINVAL),
    CMD_WRITE: _Rule(True, 0, CMD_FLAG_FUA, ENOSPC),
    CMD_FLUSH: _Rule(False, FLAG_SEND_FLUSH, CMD_FLAG_FUA, None),
    CMD_TRIM: _Rule(True, FLAG_SEND_TRIM, CMD_FLAG_FUA, EINVAL),
    CMD_CACHE: _Rule(False, FLAG_SEND_CACHE, CMD_FLAG_FUA, EINVAL),
    CMD_WRITE_ZEROES: _Rule(
        True,
        FLAG_SEND_WRITE_ZEROES,
        CMD_FLAG_FUA | CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
        ENOSPC,
    ),
    CMD_BLOCK_STATUS: _Rule(False, 0, CMD_FLAG_FUA | CMD_FLAG_REQ_ONE | CMD_FLAG_PAYLOAD_LEN, EINVAL),
}


def request_error(info: ExportInfo, structured: bool, flags: int, command: int, offset: int, length: int) -> int:
    """The error number with which a request is to be refused, or 0 if it may be run.

    ``info`` is the export as it was negotiated. What holds whatever the rest of the request says comes
    first: an unknown command is EINVAL; a write to a read-only export is EPERM, wherever it points and
    whatever its flags; then flags and commands that were not offered, then the range. A length of 0 is
    EINVAL (the specification leaves it open), so no reply has an empty chunk of data. NBD_CMD_DISC has no
    reply, and is never refused. NBD_CMD_BLOCK_STATUS without a metadata context is
    EINVAL too, and the caller's to refuse: it takes structured replies, but these do not tell. One with a payload is
    judged but for its range, which stands in there. ``structured`` is true with extended headers too.
    """
    if not flags and 0 < length <= MAX_PAYLOAD and offset + length <= info.size:
        if command == CMD_READ:
            return 0
        if command == CMD_WRITE and not info.flags & FLAG_READ_ONLY:
            return 0
    rule = _RULES.get(command)
    if rule is None:
        return 0 if command == CMD_DISC else EINVAL
    if command == CMD_BLOCK_STATUS and not structured:
        return EINVAL
    if rule.writes and info.flags & FLAG_READ_ONLY:
        return EPERM
    if flags & ~(rule.flags & _offered_flags(info.flags, structured)):
        return EINVAL
    if rule.exposed_by & ~info.flags:
        return EINVAL
    if flags & CMD_FLAG_PAYLOAD_LEN:
        return 0
    error = _range_error(rule, info.size, structured, command, offset, length)
    if not error and flags & CMD_FLAG_DF and length > info.maximum_payload:
        return EOVERFLOW  # no chunk may be as long
    return error


def _offered_flags(transmission_flags: int, structured: bool) -> int:
    """The command flags that a client may set, on the commands that know them."""
    offered = CMD_FLAG_NO_HOLE  # comes with WRITE_ZEROES itself
    if transmission_flags & FLAG_SEND_FUA:
        offered |= CMD_FLAG_FUA
    if transmission_flags & FLAG_SEND_FAST_ZERO:
        offered |= CMD_FLAG_FAST_ZERO
    if transmission_flags & FLAG_BLOCK_STATUS_PAYLOAD:
        offered |= CMD_FLAG_PAYLOAD_LEN
    if structured:
        offered |= CMD_FLAG_DF | CMD_FLAG_REQ_ONE
    return offered


def _range_error(rule: _Rule, size: int, structured: bool, command: int, offset: int, length: int) -> int:
    if rule.past_end is None:
        return EINVAL if offset or length else 0  # "reserved, and MUST be set to all-zero"
    if not length:
        return EINVAL
    if offset + length > size:
        return rule.past_end
    if command == CMD_READ and length > MAX_PAYLOAD:
        return EOVERFLOW if structured else EINVAL
    return 0


def simple_reply(cookie: Cookie, error: int) -> bytes:
    """A simple reply; after one with error 0 to a read, the data follow."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def read_chunk_header(
    cookie: Cookie, offset: int, length: int, *, last: bool = True, layout: ChunkLayout = STRUCTURED
) -> bytes:
    """A chunk of the reply to a read but for its ``length`` bytes of data, which follow."""
    flags = REPLY_FLAG_DONE if last else 0
    return layout.read.pack(layout.magic, flags, REPLY_TYPE_OFFSET_DATA, cookie, OFFSET_DATA.size + length, offset)


def hole_chunk(
    cookie: Cookie, offset: int, length: int, *, last: bool = True, layout: ChunkLayout = STRUCTURED
) -> bytes:
    """A chunk of the reply to a read: ``length`` bytes of zeros."""
    flags = REPLY_FLAG_DONE if last else 0
    return layout.hole.pack(layout.magic, flags, REPLY_TYPE_OFFSET_HOLE, cookie, OFFSET_HOLE.size, offset, length)


def none_chunk(cookie: Cookie, layout: ChunkLayout = STRUCTURED) -> bytes:
    """The whole of a reply in chunks that says no more than success."""
    return layout.header.pack(layout.magic, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, 0)


def error_chunk(cookie: Cookie, error: int, message: str, layout: ChunkLayout = STRUCTURED) -> bytes:
    """The whole of a reply in chunks that says ``error``, with a text that is cut where it is too long."""
    text = encode_text(message, wire.MAX_ERROR_MESSAGE)
    size = ERROR.size + len(text)
    head = layout.header.pack(layout.magic, REPLY_FLAG_DONE, REPLY_TYPE_ERROR, cookie, size)
    return head + ERROR.pack(error, len(text)) + text


class ClientTransmission:
    """The client's side of the transmission: any number of requests in flight, answered in any order.

    ``mode`` and ``contexts``, the ids of metadata contexts, are what the handshake agreed on. The memory it
    holds is that of the reads in flight.
    """

    def __init__(self, mode: Mode, contexts: Collection[int] = ()) -> None:
        self._mode = mode
        self._layout = EXTENDED if mode is Mode.EXTENDED else STRUCTURED
        self._contexts = frozenset(contexts)
        self._pending: dict[int, Pending] = {}
        self._last_cookie = 0
        self._head = bytearray()  # a message that is not all there yet, but for the data of a read
        self._reading = Pending(CMD_DISC, 0, 0, 0)  # whose data are being received
        self._reading_cookie = 0
        self._read_position = 0  # where in it the next byte belongs
        self._read_missing = 0  # how many bytes are still to come
        self._read_done = False  # whether they end its reply

    @property
    def in_flight(self) -> int:
        """How many requests wait for their reply."""
        return len(self._pending)

    def send_request(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: Buffer = b"",
        contexts: Collection[int] | None = None,
    ) -> tuple[int, list[Buffer]]:
        """A new request: its cookie, and the buffers to send, in this order.

        Whether the export offers the command and has the range is the server's to judge. NBD_CMD_DISC gets
        no reply. ``contexts`` limits NBD_CMD_BLOCK_STATUS to these, with a payload that takes extended headers.

        Raises:
            LocalProtocolError: a number that does not fit its field, a payload of another length.
        """
        if len(payload) != (length if command == CMD_WRITE else 0):
            raise LocalProtocolError(f"command {command} over {length} bytes with a payload of {len(payload)}")
        if contexts is not None and (command != CMD_BLOCK_STATUS or self._mode is not Mode.EXTENDED):
            raise LocalProtocolError("contexts are for block status, and take extended headers")
        cookie = self._last_cookie + 1
        try:
            if contexts is not None:
                payload = status_filter(length, contexts)
            header = self._header(command, flags, cookie, offset, len(payload) or length, bool(payload))
        except struct_error:
            raise LocalProtocolError(
                f"command {command}, flags {flags}, offset {offset}, length {length}: a number out of range"
            ) from None
        self._last_cookie = cookie
        if command != CMD_DISC:
            asked = self._contexts if contexts is None else frozenset(contexts)
            self._pending[cookie] = Pending(command, flags, offset, length, asked)
        return cookie, [header, payload] if payload else [header]

    def _header(self, command: int, flags: int, cookie: int, offset: int, length: int, has_payload: bool) -> bytes:
        if self._mode is not Mode.EXTENDED:
            return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
        if has_payload:
            flags |= CMD_FLAG_PAYLOAD_LEN
        packed = EXTENDED_COOKIE.pack(cookie, offset)
        return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags, command, packed, length)

    def receive_data(self, data: Buffer, completed: list[Completed]) -> None:
        """Take what the server sent, and append every reply that it completes to ``completed``.

        ``data`` may be reused afterwards.

        Raises:
            RemoteProtocolError: the server broke the protocol. What was completed before that has been
                appended; the connection cannot be used any further.
        """
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end:
            if self._read_missing:
                position = self._take_data(view, position, end, completed)
                continue
            if self._head:
                position = self._extend_head(view, position, end, completed)
                continue
            following = position + self._head_size(view, position, end)
            if following > end:
                self._head += view[position:]
                return
            self._take_head(view, position, completed)
            position = following

    def _extend_head(self, view: memoryview, position: int, end: int, completed: list[Completed]) -> int:
        head = self._head
        following = min(end, position + self._head_size(head, 0, len(head)) - len(head))
        head += view[position:following]
        if len(head) == self._head_size(head, 0, len(head)):
            self._head = bytearray()
            self._take_head(head, 0, completed)
        return following

    def _head_size(self, buffer: Buffer, position: int, end: int) -> int:
        """How long the message at ``position`` is without the data of a read, as far as it shows."""
        if end - position < SIMPLE_REPLY.size:
            return SIMPLE_REPLY.size
        magic, _error, _cookie = SIMPLE_REPLY.unpack_from(buffer, position)
        if magic == SIMPLE_REPLY_MAGIC and self._mode is not Mode.EXTENDED:
            return SIMPLE_REPLY.size
        layout = self._layout
        if magic != layout.magic or self._mode is Mode.SIMPLE:
            raise RemoteProtocolError(f"a reply starts with 0x{magic:08x}, not with its magic number")
        if end - position < layout.header.size:
            return layout.header.size
        _magic, _flags, kind, _cookie, length = layout.header.unpack_from(buffer, position)
        if kind == REPLY_TYPE_OFFSET_DATA:
            if length <= OFFSET_DATA.size:
                raise RemoteProtocolError(f"a chunk of data of {length} bytes, its offset included")
            return layout.read.size
        limit = max_status_size(layout) if kind == layout.status_type and self._contexts else wire.MAX_ERROR_CHUNK
        if length > limit:
            raise RemoteProtocolError(f"a chunk of type {kind} of {length} bytes: the limit is {limit}")
        return layout.header.size + int(length)

    def _take_head(self, buffer: Buffer, position: int, completed: list[Completed]) -> None:
        """Handle the message at ``position``, which is all there but for the data of a read."""
        magic, error, cookie = SIMPLE_REPLY.unpack_from(buffer, position)
        if magic == SIMPLE_REPLY_MAGIC:
            self._take_simple_reply(cookie, error, completed)
        else:
            self._take_chunk(buffer, position, completed)

    def _take_simple_reply(self, cookie: int, error: int, completed: list[Completed]) -> None:
        pending = self._find(cookie)
        if pending.command == CMD_READ and self._mode is not Mode.SIMPLE:
            raise RemoteProtocolError("a read is answered by a simple reply although structured were agreed on")
        if error or pending.command != CMD_READ or not pending.length:
            pending.error = error
            self._complete(cookie, completed)
        else:
            self._expect_data(cookie, pending, pending.offset, pending.length, True)

    def _take_chunk(self, buffer: Buffer, position: int, completed: list[Completed]) -> None:
        layout = self._layout
        _magic, flags, kind, cookie, length = layout.header.unpack_from(buffer, position)
        request_offset = None
        if self._mode is Mode.EXTENDED:
            cookie, request_offset = EXTENDED_COOKIE.unpack(cookie)
        pending = self._find(cookie)
        if request_offset not in (None, pending.offset):
            raise RemoteProtocolError(f"a reply to a request at {pending.offset} says {request_offset}")
        done = bool(flags & REPLY_FLAG_DONE)
        start = position + layout.header.size
        if kind == REPLY_TYPE_OFFSET_DATA:
            (offset,) = OFFSET_DATA.unpack_from(buffer, start)
            self._expect_data(cookie, pending, offset, length - OFFSET_DATA.size, done)
            return
        payload = bytes(buffer[start : start + length])
        if kind & REPLY_TYPE_IS_ERROR:
            pending.fail(*_parse_error(kind, payload, pending))
        elif kind == REPLY_TYPE_OFFSET_HOLE:
            pending.cover(*_parse_hole(payload))
        elif kind == layout.status_type:
            pending.describe(payload, layout)
        elif kind != REPLY_TYPE_NONE or length or not done:
            raise RemoteProtocolError(f"a chunk of type {kind}, length {length}, flags {flags}")
        if done:
            self._complete(cookie, completed)

    def _find(self, cookie: int) -> Pending:
        pending = self._pending.get(cookie)
        if pending is None:
            raise RemoteProtocolError(f"a reply to a request that is not in flight, cookie {cookie}")
        return pending

    def _complete(self, cookie: int, completed: list[Completed]) -> None:
        completed.append(self._pending.pop(cookie).complete(cookie))

    def _expect_data(self, cookie: int, pending: Pending, offset: int, size: int, done: bool) -> None:
        """``size`` bytes of the export from ``offset`` on follow."""
        self._read_position = pending.cover(offset, size)
        self._reading, self._reading_cookie = pending, cookie
        self._read_missing, self._read_done = size, done

    def _take_data(self, view: memoryview, position: int, end: int, completed: list[Completed]) -> int:
        following = min(end, position + self._read_missing)
        size = following - position
        self._reading.store(self._read_position, view[position:following])
        self._read_position += size
        self._read_missing -= size
        if not self._read_missing and self._read_done:
            self._complete(self._reading_cookie, completed)
        return following


def _parse_hole(payload: bytes) -> tuple[int, int]:
    """NBD_REPLY_TYPE_OFFSET_HOLE: its offset and size."""
    if len(payload) != OFFSET_HOLE.size:
        raise RemoteProtocolError(f"a hole is described by {len(payload)} bytes")
    offset, size = OFFSET_HOLE.unpack(payload)
    return offset, size


def _parse_error(kind: int, payload: bytes, pending: Pending) -> tuple[int, str]:
    """An error chunk, of a known type or not: its error number and its text."""
    rest_size = ERROR_OFFSET.size if kind == REPLY_TYPE_ERROR_OFFSET else 0
    if len(payload) < ERROR.size + rest_size:
        raise RemoteProtocolError(f"an error chunk of {len(payload)} bytes")
    error, message_length = ERROR.unpack_from(payload)
    message_end = ERROR.size + message_length
    if message_end + rest_size > len(payload) or message_length > wire.MAX_STRING_LENGTH:
        raise RemoteProtocolError(f"an error text of {message_length} bytes in a chunk of {len(payload)}")
    if not error:
        raise RemoteProtocolError("an error chunk whose error is 0")
    if kind == REPLY_TYPE_ERROR_OFFSET:
        (offset,) = ERROR_OFFSET.unpack_from(payload, message_end)
        if not 0 <= offset - pending.offset < max(pending.length, 1):
            raise RemoteProtocolError(f"an error at {offset}, outside its request")
    return error, payload[ERROR.size : message_end].decode("utf-8", "replace")
