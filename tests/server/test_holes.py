"""Which parts of a read are zeros, and how they are told."""

from __future__ import annotations

import random

import pytest

from nbdclone.protocol.pending import Completed
from nbdclone.protocol.transmission import ClientTransmission
from nbdclone.protocol.wire import (
    ADVERTISED_MAX_PAYLOAD,
    CMD_READ,
    EXTENDED,
    EXTENDED_COOKIE,
    STRUCTURED,
    ChunkLayout,
    Mode,
)
from nbdclone.server.buffers import PAGE
from nbdclone.server.holes import GRAIN, find_holes, is_zero, lay_out


def view_of(*parts: int | bytes) -> memoryview:
    """Zeros (how many) and data, put together."""
    return memoryview(b"".join(bytes(part) if isinstance(part, int) else part for part in parts))


def test_zeros_are_zeros_to_the_last_byte() -> None:
    for length in (1, 4096, 64 << 10):
        data = bytearray(length)
        assert is_zero(memoryview(data))
        for at in (0, length // 2, length - 1):
            data[at] = 1
            assert not is_zero(memoryview(data))
            data[at] = 0


@pytest.mark.parametrize("fragment", [True, False])
@pytest.mark.parametrize("length", [1, 512, 4096, GRAIN, 3 * GRAIN, 3 * GRAIN + 1])
def test_zeros_alone_are_one_hole(length: int, fragment: bool) -> None:
    assert find_holes(view_of(length), fragment=fragment) == [(True, 0, length)]


@pytest.mark.parametrize("fragment", [True, False])
@pytest.mark.parametrize(
    "parts", [(b"x",), (4096, b"x"), (b"x" * GRAIN, b"y" * GRAIN), (GRAIN - 1, b"x", GRAIN - 1, b"y")]
)
def test_data_alone_are_not_divided(parts: tuple[int | bytes, ...], fragment: bool) -> None:
    assert find_holes(view_of(*parts), fragment=fragment) is None


MIXED = (b"x" * GRAIN, GRAIN, GRAIN, b"y" * GRAIN, GRAIN, b"z")


def test_runs_of_zeros_and_data_alternate() -> None:
    assert find_holes(view_of(*MIXED), fragment=True) == [
        (False, 0, GRAIN),
        (True, GRAIN, 3 * GRAIN),
        (False, 3 * GRAIN, 4 * GRAIN),
        (True, 4 * GRAIN, 5 * GRAIN),
        (False, 5 * GRAIN, 5 * GRAIN + 1),
    ]


def test_who_wants_one_piece_gets_data_unless_all_is_zeros() -> None:
    assert find_holes(view_of(*MIXED), fragment=False) is None
    assert find_holes(view_of(GRAIN, b"x" * GRAIN), fragment=False) is None


def test_a_short_rest_is_part_of_what_is_before_it() -> None:
    assert find_holes(view_of(GRAIN, b"x" * GRAIN, 5), fragment=True) == [
        (True, 0, GRAIN),
        (False, GRAIN, 2 * GRAIN + 5),
    ]
    assert find_holes(view_of(b"x" * GRAIN, GRAIN, 5), fragment=True) == [
        (False, 0, GRAIN),
        (True, GRAIN, 2 * GRAIN + 5),
    ]
    assert find_holes(view_of(b"x" * GRAIN, 5), fragment=True) is None


@pytest.mark.parametrize(("mode", "layout"), [(Mode.STRUCTURED, STRUCTURED), (Mode.EXTENDED, EXTENDED)])
@pytest.mark.parametrize("seed", range(20))
def test_a_client_puts_together_what_was_divided(mode: Mode, layout: ChunkLayout, seed: int) -> None:
    rng = random.Random(seed)
    pieces = [rng.choice([bytes(GRAIN), b"x" * GRAIN, rng.randbytes(GRAIN)]) for _ in range(rng.randrange(1, 8))]
    data = b"".join([*pieces, bytes(rng.randrange(0, 9)), rng.randbytes(rng.randrange(0, 9))])
    offset = rng.randrange(1 << 40)
    client = ClientTransmission(mode)
    cookie, _buffers = client.send_request(CMD_READ, 0, offset, len(data))
    runs = find_holes(memoryview(data), fragment=True)
    if runs is None:
        return
    whole = [(start, end) for _zeros, start, end in runs]
    assert [0, *(end for _start, end in whole)] == [*(start for start, _end in whole), len(data)]
    buffer = bytearray(PAGE) + data
    opaque = cookie if mode is Mode.STRUCTURED else EXTENDED_COOKIE.pack(cookie, offset)
    parts, rest = lay_out(runs, memoryview(buffer), PAGE, opaque, offset, layout)
    sent = b"".join([*parts, rest])
    assert len(sent) < len(data) + layout.read.size
    completed: list[Completed] = []
    client.receive_data(sent, completed)
    assert completed == [Completed(cookie, 0, "", data)]


LARGE = b"x" * ADVERTISED_MAX_PAYLOAD


@pytest.mark.parametrize(
    ("parts", "runs"),
    [
        ((LARGE,), 1),
        ((LARGE, b"y"), 2),
        ((LARGE, LARGE), 2),
        ((LARGE, b"y", ADVERTISED_MAX_PAYLOAD, LARGE[1:]), 4),
        ((2 * ADVERTISED_MAX_PAYLOAD,), 1),
    ],
)
def test_no_chunk_of_data_is_longer_than_what_is_announced(parts: tuple[int | bytes, ...], runs: int) -> None:
    data = view_of(*parts)
    found = find_holes(data, fragment=True)
    assert len(found or "1") == runs
    if found is None:
        return
    assert all(zeros or end - start <= ADVERTISED_MAX_PAYLOAD for zeros, start, end in found)
    client = ClientTransmission(Mode.STRUCTURED)
    cookie, _buffers = client.send_request(CMD_READ, 0, 0, len(data))
    laid_out, rest = lay_out(found, memoryview(bytearray(PAGE) + data), PAGE, cookie, 0, STRUCTURED)
    completed: list[Completed] = []
    for part in [*laid_out, memoryview(rest)]:
        client.receive_data(part, completed)
    assert completed == [Completed(cookie, 0, "", data)]
