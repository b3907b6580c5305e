"""Requests as a server takes them out of what it received: with compact headers, or with extended ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdclone.errors import RemoteProtocolError
from nbdclone.protocol.wire import (
    CMD_FLAG_PAYLOAD_LEN,
    CMD_WRITE,
    EXTENDED_COOKIE,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    MAX_PAYLOAD,
    REQUEST,
    REQUEST_MAGIC,
    Cookie,
    Mode,
)

if TYPE_CHECKING:
    from mmap import mmap

    Received = bytes | bytearray | memoryview | mmap

# Requests that are taken at once, before the server looks at the time: a client that sends thousands ahead would have
# it to itself for as long as it takes to run them.
MAX_BURST: Final = 32
_BURST: Final = range(MAX_BURST)

REQUEST_SIZE: Final = REQUEST.size
EXTENDED_REQUEST_SIZE: Final = EXTENDED_REQUEST.size

Request = tuple[int, int, Cookie, int, int, int]
"""flags, type, cookie, offset, length, and where in the buffer the payload, if there is one, starts.

With extended headers the cookie is EXTENDED_COOKIE, packed. NBD_CMD_WRITE comes without NBD_CMD_FLAG_PAYLOAD_LEN, which
says nothing more there; on other commands the flag says that ``length`` is the payload's.
"""


def parse_requests(buffer: Received, start: int, end: int, requests: list[Request]) -> int:
    """Take the complete requests in ``buffer[start:end]``, MAX_BURST at most, and append them to ``requests``.

    A write is complete when its payload is all there. Returns the position of the first byte that was
    not taken: what stands there is the beginning of a request, or a whole one if MAX_BURST were taken. A client sends
    nothing after NBD_CMD_DISC; what follows one is parsed like anything else, and is the caller's to ignore.

    Raises:
        RemoteProtocolError: a request without its magic number, or a payload above ``MAX_PAYLOAD``. The
            requests before it have been appended; the connection cannot be used any further.
    """
    unpack = REQUEST.unpack_from
    append = requests.append
    last = end - REQUEST_SIZE
    for _ in _BURST:
        if start > last:
            break
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


def parse_extended_requests(buffer: Received, start: int, end: int, requests: list[Request]) -> int:
    """The same with extended headers, where any request may have a payload.

    A write has one in any case: some clients leave out the flag that says so.
    """
    unpack = EXTENDED_REQUEST.unpack_from
    unpack_cookie = EXTENDED_COOKIE.unpack
    append = requests.append
    last = end - EXTENDED_REQUEST_SIZE
    for _ in _BURST:
        if start > last:
            break
        magic, flags, command, cookie, length = unpack(buffer, start)
        if magic != EXTENDED_REQUEST_MAGIC:
            raise RemoteProtocolError(f"a request starts with 0x{magic:08x}, not with its magic number")
        _cookie, offset = unpack_cookie(cookie)
        payload_start = following = start + EXTENDED_REQUEST_SIZE
        if command == CMD_WRITE or flags & CMD_FLAG_PAYLOAD_LEN:
            if length > MAX_PAYLOAD:
                raise RemoteProtocolError(f"a payload of {length} bytes: the limit is {MAX_PAYLOAD}")
            following = payload_start + length
            if following > end:
                break
            if command == CMD_WRITE:
                flags &= ~CMD_FLAG_PAYLOAD_LEN
        start = following
        append((flags, command, cookie, offset, length, payload_start))
    return start


def compact_head(buffer: Received, start: int) -> Request:
    """The request at ``start``, whose header is all there."""
    _magic, flags, command, cookie, offset, length = REQUEST.unpack_from(buffer, start)
    return flags, command, cookie, offset, length, start + REQUEST_SIZE


def extended_head(buffer: Received, start: int) -> Request:
    """The same with extended headers."""
    _magic, flags, command, cookie, length = EXTENDED_REQUEST.unpack_from(buffer, start)
    _cookie, offset = EXTENDED_COOKIE.unpack(cookie)
    if command == CMD_WRITE:
        flags &= ~CMD_FLAG_PAYLOAD_LEN
    return flags, command, cookie, offset, length, start + EXTENDED_REQUEST_SIZE


class RequestLayout(NamedTuple):
    """How requests are taken in one mode: chosen once for a connection.

    Where ``parse`` stopped, and the ``size`` bytes of a header are there, ``head`` says what is coming: a request with
    a payload of its length, at most MAX_PAYLOAD.
    """

    size: int
    parse: Callable[[Received, int, int, list[Request]], int]
    head: Callable[[Received, int], Request]


_COMPACT: Final = RequestLayout(REQUEST_SIZE, parse_requests, compact_head)
_EXTENDED: Final = RequestLayout(EXTENDED_REQUEST_SIZE, parse_extended_requests, extended_head)


def request_layout(mode: Mode) -> RequestLayout:
    """How requests are taken in this mode."""
    return _EXTENDED if mode is Mode.EXTENDED else _COMPACT
