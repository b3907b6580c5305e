"""Messages as a peer would send them, written out by hand so that the tests do not trust the code under test."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

IHAVEOPT = b"IHAVEOPT"
EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO, STRUCTURED_REPLY = range(1, 9)
LIST_CONTEXTS, SET_CONTEXTS, EXTENDED_HEADERS = 9, 10, 11
ACK, SERVER, REP_INFO, REP_CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD, UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG, EXT_HEADER_REQD = range(
    (1 << 31) + 1, (1 << 31) + 11
)
FIXED, NO_ZEROES = 1, 2

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = 1, 2, 4, 8, 16, 32
DONE = 1
NONE, DATA, HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002


def client_flags(flags: int = FIXED | NO_ZEROES) -> bytes:
    return struct.pack(">I", flags)


def option(number: int, data: bytes = b"") -> bytes:
    return IHAVEOPT + struct.pack(">II", number, len(data)) + data


def export_request(name: bytes, *infos: int) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def context_request(name: bytes, *queries: bytes) -> bytes:
    strings = [struct.pack(">I", len(string)) + string for string in (name, *queries)]
    return strings[0] + struct.pack(">I", len(queries)) + b"".join(strings[1:])


def context(number: int, name: bytes) -> bytes:
    return struct.pack(">I", number) + name


def greeting(flags: int = FIXED | NO_ZEROES) -> bytes:
    return b"NBDMAGICIHAVEOPT" + struct.pack(">H", flags)


def option_reply(number: int, reply: int, data: bytes = b"") -> bytes:
    return bytes.fromhex("0003e889045565a9") + struct.pack(">III", number, reply, len(data)) + data


def info_export(size: int, flags: int) -> bytes:
    return struct.pack(">HQH", 0, size, flags)


def info_block_size(minimum: int, preferred: int, maximum: int) -> bytes:
    return struct.pack(">HIII", 3, minimum, preferred, maximum)


def listed(name: bytes, description: bytes = b"") -> bytes:
    return struct.pack(">I", len(name)) + name + description


def request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1, payload: bytes = b""
) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length) + payload


def extended_request(
    command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1, payload: bytes = b""
) -> bytes:
    """With a payload, its length and the flag that says so."""
    flags, length = (flags | PAYLOAD_LEN, len(payload)) if payload else (flags, length)
    return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length) + payload


def extended_cookie(cookie: int, offset: int) -> bytes:
    return struct.pack(">QQ", cookie, offset)


def simple(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie) + data


def chunk(kind: int, cookie: int, payload: bytes = b"", *, flags: int = DONE) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(payload)) + payload


def extended_chunk(kind: int, cookie: int, offset: int, payload: bytes = b"", *, flags: int = DONE) -> bytes:
    """``offset`` is the request's."""
    return struct.pack(">IHHQQQ", 0x6E8A278C, flags, kind, cookie, offset, len(payload)) + payload


def extended(chunks: bytes, offset: int) -> bytes:
    """Structured chunks of the reply to a request at ``offset``, as they are with extended headers."""
    converted = b""
    while chunks:
        _magic, flags, kind, cookie, length = struct.unpack_from(">IHHQI", chunks)
        converted += extended_chunk(kind, cookie, offset, chunks[20 : 20 + length], flags=flags)
        chunks = chunks[20 + length :]
    return converted


def data_chunk(cookie: int, offset: int, data: bytes, *, flags: int = DONE) -> bytes:
    return chunk(DATA, cookie, struct.pack(">Q", offset) + data, flags=flags)


def hole_chunk(cookie: int, offset: int, size: int, *, flags: int = DONE) -> bytes:
    return chunk(HOLE, cookie, struct.pack(">QI", offset, size), flags=flags)


def status_chunk(cookie: int, context: int, *extents: tuple[int, int], flags: int = DONE) -> bytes:
    payload = struct.pack(">I", context) + b"".join(struct.pack(">II", *extent) for extent in extents)
    return chunk(STATUS, cookie, payload, flags=flags)


def extended_status_chunk(
    cookie: int, offset: int, context: int, *extents: tuple[int, int], flags: int = DONE, count: int | None = None
) -> bytes:
    payload = struct.pack(">II", context, len(extents) if count is None else count)
    payload += b"".join(struct.pack(">QQ", *extent) for extent in extents)
    return extended_chunk(STATUS_EXT, cookie, offset, payload, flags=flags)


def error_chunk(cookie: int, error: int, message: bytes = b"", *, flags: int = DONE) -> bytes:
    return chunk(ERROR, cookie, struct.pack(">IH", error, len(message)) + message, flags=flags)


def error_offset_chunk(cookie: int, error: int, offset: int, message: bytes = b"", *, flags: int = DONE) -> bytes:
    payload = struct.pack(">IH", error, len(message)) + message + struct.pack(">Q", offset)
    return chunk(ERROR_OFFSET, cookie, payload, flags=flags)


def option_replies(stream: bytes) -> list[tuple[int, int, bytes]]:
    """(option, reply type, data) of each reply in what a server sent after its greeting."""
    replies = []
    while stream:
        assert stream[:8] == bytes.fromhex("0003e889045565a9")
        number, reply, length = struct.unpack_from(">III", stream, 8)
        assert len(stream) >= 20 + length
        replies.append((number, reply, stream[20 : 20 + length]))
        stream = stream[20 + length :]
    return replies


def in_pieces(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    """``data`` cut at these positions."""
    previous = 0
    for cut in [*sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]:
        yield data[previous:cut]
        previous = cut
