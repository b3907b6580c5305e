"""What the targets have in common: how an input is laid out, and that cutting it in another way changes nothing.

An input is HEADER_SIZE bytes, and then the stream that the peer sends. Of the header, two bytes choose what the side
under test is set up for, and two are sizes of pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle, zip_longest
from typing import TypeVar

from nbdclone.errors import RemoteProtocolError
from nbdclone.protocol.handshake import AHEAD_OF_TLS

HEADER_SIZE = 4
# What follows this in a stream comes through TLS. A server or a client that does not begin TLS there sees no more.
TLS_BEGINS = b"<TLS>"

T = TypeVar("T")
Cut = Callable[[bytes], Iterator[bytes]]
Side = Callable[["Choices", bytes, Cut], list[object]]
"""Sets up a side by the choices, feeds it the stream in the pieces of the cut, and returns all that it made of it."""


class Disagreement(AssertionError):
    """The same bytes meant something else when they came in other pieces."""


class Choices:
    """A number, taken apart into choices."""

    def __init__(self, number: int) -> None:
        self._number = number

    def pick(self, *options: T) -> T:
        self._number, index = divmod(self._number, len(options))
        return options[index]


def whole(stream: bytes) -> Iterator[bytes]:
    if stream:
        yield stream


def bytewise(stream: bytes) -> Iterator[bytes]:
    for position in range(len(stream)):
        yield stream[position : position + 1]


def in_pieces(sizes: bytes) -> Cut:
    """Pieces of these sizes, and one more, in turn."""

    def cut(stream: bytes) -> Iterator[bytes]:
        position = 0
        for size in cycle(sizes):
            if position >= len(stream):
                return
            yield stream[position : position + size + 1]
            position += size + 1

    return cut


def agree(data: bytes, side: Side) -> None:
    """Feed the side the input whole, byte by byte and in pieces.

    Raises:
        Disagreement: it did not make the same of it.
    """
    if len(data) < HEADER_SIZE:
        return
    number, sizes, stream = int.from_bytes(data[:2], "big"), data[2:HEADER_SIZE], data[HEADER_SIZE:]
    expected = side(Choices(number), stream, whole)
    for cut in (bytewise, in_pieces(sizes)):
        got = side(Choices(number), stream, cut)
        if got != expected:
            raise Disagreement(_difference(expected, got))


def _difference(expected: list[object], got: list[object]) -> str:
    """The first of what differs."""
    for a, b in zip_longest(expected, got):
        if a != b:
            return f"whole: {repr(a)[:1000]}\nin pieces: {repr(b)[:1000]}"
    return "nothing"


def text(error: RemoteProtocolError, told: list[object]) -> str:
    """The error as a part of the outcome.

    Bytes ahead of TLS may be seen before it is agreed on, or after: all that was told is the same but for that.
    """
    if str(error) == AHEAD_OF_TLS and told and type(told[-1]).__name__ == "StartTLS":
        told.pop()
    return str(error)
