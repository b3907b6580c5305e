"""Transmission: requests and their replies, on the server's side and on the client's.

The server's half is functions, since it has no state between messages: ``parse_requests`` takes all
that is in a buffer in one pass, ``request_error`` judges each request, the builders make replies. A
server that packs replies into a buffer of its own uses the same structs::

    simple reply            SIMPLE_REPLY.pack_into(buffer, at, SIMPLE_REPLY_MAGIC, error, cookie)
                            then, for a successful read, its data
    read, structured        READ_CHUNK.pack_into(buffer, at, STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE,
                                REPLY_TYPE_OFFSET_DATA, cookie, OFFSET_DATA.size + length, offset)
                            then its data

The client's half, ``ClientTransmission``, remembers what was asked, and believes no reply beyond that.
"""

from __future__ import annotations

from collections.abc import Collection
from struct import error as struct_error
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdclone.errors import LocalProtocolError, RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.block_status import MAX_STATUS_CHUNK
from nbdclone.protocol.pending import Completed, Pending
from nbdclone.protocol.wire import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
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
    READ_CHUNK,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
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
    STRUCTURED_REPLY,
    STRUCTURED_REPLY_MAGIC,
    ExportInfo,
    encode_text,
)

if TYPE_CHECKING:
    from mmap import mmap

REQUEST_SIZE: Final = REQUEST.size

Buffer = bytes | bytearray | memoryview

Request = tuple[int, int, int, int, int, int]
"""flags, type, cookie, offset, length, and where in the buffer the payload of a write starts."""


def parse_requests(buffer: bytes | bytearray | memoryview | mmap, start: int, end: int, requests: list[Request]) -> int:
    """Take every complete request in ``buffer[start:end]`` and append it to ``requests``.

    A write is complete when its payload is all there. Returns the position of the first byte that was
    not taken: what stands there is the beginning of a request, see ``request_size``. A client sends
    nothing after NBD_CMD_DISC; what follows one is parsed like anything else, and is the caller's to ignore.

    Raises:
        RemoteProtocolError: a request without its magic number, or a write above ``MAX_PAYLOAD``. The
            requests before it have been appended; the connection cannot be used any further.
    """
    unpack = REQUEST.unpack_from
    append = requests.append
    last = end - REQUEST_SIZE
    while start <= last:
        magic, flags, command, cookie, offset, length = unpack(buffer, start)
        if magic != REQUEST_MAGIC:
            raise RemoteProtocolError(f"a request starts with 0x{magic:08x}, not with its magic number")
        payload_start = start + REQUEST_SIZE
        if command == CMD_WRITE:
            if length > MAX_PAYLOAD:
                raise RemoteProtocolError(f"a write of {length} bytes: the limit is {MAX_PAYLOAD}")
            following = payload_start + length
            if following > end:
                break
            start = following
        else:
            start = payload_start
        append((flags, command, cookie, offset, length, payload_start))
    return start


def request_size(buffer: bytes | bytearray | memoryview | mmap, start: int, end: int) -> int:
    """How many bytes the request at ``start`` takes with its payload, as far as ``buffer[start:end]`` shows.

    For a caller that makes room for the rest of what ``parse_requests`` left: at most ``MAX_PAYLOAD`` and
    a header.
    """
    if end - start < REQUEST_SIZE:
        return REQUEST_SIZE
    _magic, _flags, command, _cookie, _offset, length = REQUEST.unpack_from(buffer, start)
    return REQUEST_SIZE + length if command == CMD_WRITE and length <= MAX_PAYLOAD else REQUEST_SIZE


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
    CMD_BLOCK_STATUS: _Rule(False, 0, CMD_FLAG_FUA | CMD_FLAG_REQ_ONE, EINVAL),
}


def request_error(info: ExportInfo, structured: bool, flags: int, command: int, offset: int, length: int) -> int:
    """The error number with which a request is to be refused, or 0 if it may be run.

    ``info`` is the export as it was negotiated. What holds whatever the rest of the request says comes
    first: an unknown command is EINVAL; a write to a read-only export is EPERM, wherever it points and
    whatever its flags; then flags and commands that were not offered, then the range. A length of 0 is
    EINVAL (the specification leaves it open), so no reply has an empty chunk of data. NBD_CMD_DISC has no
    reply, and is never refused. NBD_CMD_BLOCK_STATUS without a metadata context is
    EINVAL too, and the caller's to refuse: it takes structured replies, but these do not tell.
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
    return _range_error(rule, info.size, structured, command, offset, length)


def _offered_flags(transmission_flags: int, structured: bool) -> int:
    """The command flags that a client may set, on the commands that know them."""
    offered = CMD_FLAG_NO_HOLE  # comes with WRITE_ZEROES itself
    if transmission_flags & FLAG_SEND_FUA:
        offered |= CMD_FLAG_FUA
    if transmission_flags & FLAG_SEND_FAST_ZERO:
        offered |= CMD_FLAG_FAST_ZERO
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


def simple_reply(cookie: int, error: int) -> bytes:
    """A simple reply; after one with error 0 to a read, the data follow."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)


def read_chunk_header(cookie: int, offset: int, length: int) -> bytes:
    """The whole of a structured reply to a read but for its ``length`` bytes of data, which follow."""
    return READ_CHUNK.pack(
        STRUCTURED_REPLY_MAGIC,
        REPLY_FLAG_DONE,
        REPLY_TYPE_OFFSET_DATA,
        cookie,
        OFFSET_DATA.size + length,
        offset,
    )


def none_chunk(cookie: int) -> bytes:
    """The whole of a structured reply that says no more than success."""
    return STRUCTURED_REPLY.pack(STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, 0)


def error_chunk(cookie: int, error: int, message: str) -> bytes:
    """The whole of a structured reply that says ``error``, with a text that is cut where it is too long."""
    text = encode_text(message, wire.MAX_ERROR_MESSAGE)
    head = STRUCTURED_REPLY.pack(
        STRUCTURED_REPLY_MAGIC, REPLY_FLAG_DONE, REPLY_TYPE_ERROR, cookie, ERROR.size + len(text)
    )
    return head + ERROR.pack(error, len(text)) + text


class ClientTransmission:
    """The client's side of the transmission: any number of requests in flight, answered in any order.

    ``structured`` and ``contexts``, the ids of metadata contexts, are what the handshake agreed on. The memory it
    holds is that of the reads in flight.
    """

    def __init__(self, structured: bool, contexts: Collection[int] = ()) -> None:
        self._structured = structured
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
        self, command: int, flags: int, offset: int, length: int, payload: Buffer = b""
    ) -> tuple[int, list[Buffer]]:
        """A new request: its cookie, and the buffers to send, in this order.

        Whether the export offers the command and has the range is the server's to judge. NBD_CMD_DISC gets
        no reply.

        Raises:
            LocalProtocolError: a number that does not fit its field, a payload of another length.
        """
        if len(payload) != (length if command == CMD_WRITE else 0):
            raise LocalProtocolError(f"command {command} over {length} bytes with a payload of {len(payload)}")
        cookie = self._last_cookie + 1
        try:
            header = REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, offset, length)
        except struct_error:
            raise LocalProtocolError(
                f"command {command}, flags {flags}, offset {offset}, length {length}: a number out of range"
            ) from None
        self._last_cookie = cookie
        if command != CMD_DISC:
            self._pending[cookie] = Pending(command, flags, offset, length)
        return cookie, [header, payload] if length and command == CMD_WRITE else [header]

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
        if magic == SIMPLE_REPLY_MAGIC:
            return SIMPLE_REPLY.size
        if magic != STRUCTURED_REPLY_MAGIC or not self._structured:
            raise RemoteProtocolError(f"a reply starts with 0x{magic:08x}, not with its magic number")
        if end - position < STRUCTURED_REPLY.size:
            return STRUCTURED_REPLY.size
        _magic, _flags, kind, _cookie, length = STRUCTURED_REPLY.unpack_from(buffer, position)
        if kind == REPLY_TYPE_OFFSET_DATA:
            if length <= OFFSET_DATA.size:
                raise RemoteProtocolError(f"a chunk of data of {length} bytes, its offset included")
            return READ_CHUNK.size
        limit = MAX_STATUS_CHUNK if kind == REPLY_TYPE_BLOCK_STATUS and self._contexts else wire.MAX_ERROR_CHUNK
        if length > limit:
            raise RemoteProtocolError(f"a chunk of type {kind} of {length} bytes: the limit is {limit}")
        size: int = STRUCTURED_REPLY.size + length
        return size

    def _take_head(self, buffer: Buffer, position: int, completed: list[Completed]) -> None:
        """Handle the message at ``position``, which is all there but for the data of a read."""
        magic, error, cookie = SIMPLE_REPLY.unpack_from(buffer, position)
        if magic == SIMPLE_REPLY_MAGIC:
            self._take_simple_reply(cookie, error, completed)
        else:
            self._take_chunk(buffer, position, completed)

    def _take_simple_reply(self, cookie: int, error: int, completed: list[Completed]) -> None:
        pending = self._find(cookie)
        if pending.command == CMD_READ and self._structured:
            raise RemoteProtocolError("a read is answered by a simple reply although structured were agreed on")
        if error or pending.command != CMD_READ or not pending.length:
            pending.error = error
            self._complete(cookie, completed)
        else:
            self._expect_data(cookie, pending, pending.offset, pending.length, True)

    def _take_chunk(self, buffer: Buffer, position: int, completed: list[Completed]) -> None:
        _magic, flags, kind, cookie, length = STRUCTURED_REPLY.unpack_from(buffer, position)
        pending = self._find(cookie)
        done = bool(flags & REPLY_FLAG_DONE)
        start = position + STRUCTURED_REPLY.size
        if kind == REPLY_TYPE_OFFSET_DATA:
            (offset,) = OFFSET_DATA.unpack_from(buffer, start)
            self._expect_data(cookie, pending, offset, length - OFFSET_DATA.size, done)
            return
        payload = bytes(buffer[start : start + length])
        if kind & REPLY_TYPE_IS_ERROR:
            pending.fail(*_parse_error(kind, payload, pending))
        elif kind == REPLY_TYPE_OFFSET_HOLE:
            pending.cover(*_parse_hole(payload))
        elif kind == REPLY_TYPE_BLOCK_STATUS:
            pending.describe(payload, self._contexts)
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
        completed.append(self._pending.pop(cookie).complete(cookie, self._contexts))

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
