"""Requests as a server parses and judges them, and the replies that it builds."""

from __future__ import annotations

import mmap
import struct
from dataclasses import replace

import pytest
import wirebytes as w

from nbdclone.errors import RemoteProtocolError
from nbdclone.protocol import transmission, wire
from nbdclone.protocol.requests import MAX_BURST, Request, parse_extended_requests, parse_requests, request_layout
from nbdclone.protocol.transmission import request_error
from nbdclone.protocol.wire import ExportInfo, Mode, TransmissionFlag, transmission_flags

SIZE = 1 << 20
WRITABLE = ExportInfo("web1", SIZE, transmission_flags(False))
READ_ONLY = ExportInfo("base", SIZE, transmission_flags(True))
EPERM, EINVAL, ENOSPC, EOVERFLOW = 1, 22, 28, 75


def parse(data: bytes, start: int = 0) -> tuple[list[Request], int]:
    requests: list[Request] = []
    position = parse_requests(data, start, len(data), requests)
    return requests, position


def test_all_complete_requests_are_taken_in_one_pass() -> None:
    data = (
        w.request(w.READ, 4096, 512, cookie=1)
        + w.request(w.WRITE, 8192, 5, cookie=2, flags=w.FUA, payload=b"hello")
        + w.request(w.FLUSH, cookie=0xFFFFFFFFFFFFFFFF)
        + w.request(77, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, flags=0xFFFF, cookie=3)
    )
    requests, position = parse(b"??" + data, 2)
    assert requests == [
        (0, w.READ, 1, 4096, 512, 30),
        (w.FUA, w.WRITE, 2, 8192, 5, 58),
        (0, w.FLUSH, 0xFFFFFFFFFFFFFFFF, 0, 0, 91),
        (0xFFFF, 77, 3, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, 119),
    ]
    assert position == len(data) + 2


def test_no_more_than_a_burst_is_taken_at_once() -> None:
    data = w.request(w.READ, 0, 512) * (MAX_BURST + 5)
    requests, position = parse(data)
    assert len(requests) == MAX_BURST
    assert position == MAX_BURST * 28
    requests, position = parse(data, position)
    assert (len(requests), position) == (5, len(data))
    extended: list[Request] = []
    data = w.extended_request(w.READ, 0, 512) * (MAX_BURST + 5)
    assert parse_extended_requests(data, 0, len(data), extended) == MAX_BURST * 32
    assert len(extended) == MAX_BURST


def test_a_write_without_all_of_its_payload_waits() -> None:
    data = w.request(w.READ, 0, 1) + w.request(w.WRITE, 0, 100, payload=bytes(99))
    requests, position = parse(data)
    assert len(requests) == 1
    assert position == 28
    assert request_layout(Mode.SIMPLE).head(data, position) == (0, w.WRITE, 1, 0, 100, 56)


def test_a_write_that_ends_where_the_buffer_ends_is_taken() -> None:
    data = w.request(w.WRITE, 0, 4, payload=b"data")
    assert parse(data) == ([(0, w.WRITE, 1, 0, 4, 28)], len(data))


def test_half_a_header_waits() -> None:
    data = w.request(w.READ, 0, 1)
    for end in range(28):
        requests: list[Request] = []
        assert parse_requests(data, 0, end, requests) == 0
        assert requests == []


def test_what_lies_behind_the_end_is_not_looked_at() -> None:
    data = w.request(w.READ, 0, 1) + w.request(w.WRITE, 0, 4, payload=b"data")
    requests: list[Request] = []
    assert parse_requests(data, 0, len(data) - 1, requests) == 28
    assert len(requests) == 1


def test_a_map_and_a_view_are_parsed_like_bytes() -> None:
    data = w.request(w.READ, 0, 1) * 3
    with mmap.mmap(-1, 4096) as buffer:
        buffer[: len(data)] = data
        requests: list[Request] = []
        assert parse_requests(buffer, 0, len(data), requests) == len(data)
    assert requests == parse(data)[0]
    requests.clear()
    parse_requests(memoryview(bytearray(data)), 0, len(data), requests)
    assert requests == parse(data)[0]


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x12560953, 0x21E41C71])
def test_a_request_without_its_magic_is_fatal_after_those_before_it(magic: int) -> None:
    data = w.request(w.READ, 0, 1) + struct.pack(">I", magic) + bytes(24)
    requests: list[Request] = []
    with pytest.raises(RemoteProtocolError, match="magic"):
        parse_requests(data, 0, len(data), requests)
    assert len(requests) == 1


def test_a_write_above_the_limit_is_fatal_before_its_payload_comes() -> None:
    with pytest.raises(RemoteProtocolError, match="limit"):
        parse(w.request(w.WRITE, 0, wire.MAX_PAYLOAD + 1))
    assert parse(w.request(w.WRITE, 0, wire.MAX_PAYLOAD)) == ([], 0)


def test_the_limit_lets_through_what_other_suites_send() -> None:
    assert wire.MAX_PAYLOAD > 49_865_728
    assert wire.MAX_PAYLOAD >= wire.ADVERTISED_MAX_PAYLOAD >= 32 << 20


# With extended headers


def parse_extended(data: bytes) -> tuple[list[Request], int]:
    requests: list[Request] = []
    position = parse_extended_requests(data, 0, len(data), requests)
    return requests, position


def test_extended_requests_have_long_lengths_and_payloads_on_any_command() -> None:
    data = (
        w.extended_request(w.TRIM, 4096, 1 << 63, cookie=1, flags=w.FUA)
        + w.extended_request(w.WRITE, 8192, cookie=2, flags=w.FUA, payload=b"hello")
        + w.extended_request(w.BLOCK_STATUS, 5, cookie=3, payload=bytes(12))
        + w.extended_request(77, 0, cookie=0xFFFFFFFFFFFFFFFF, payload=b"??")
        + w.extended_request(w.READ, 0, 512)
    )
    requests, position = parse_extended(data)
    assert requests == [
        (w.FUA, w.TRIM, w.extended_cookie(1, 4096), 4096, 1 << 63, 32),
        (w.FUA, w.WRITE, w.extended_cookie(2, 8192), 8192, 5, 64),
        (w.PAYLOAD_LEN, w.BLOCK_STATUS, w.extended_cookie(3, 5), 5, 12, 101),
        (w.PAYLOAD_LEN, 77, w.extended_cookie(0xFFFFFFFFFFFFFFFF, 0), 0, 2, 145),
        (0, w.READ, w.extended_cookie(1, 0), 0, 512, 179),
    ]
    assert position == len(data)


def test_an_extended_write_has_a_payload_although_it_does_not_say_so() -> None:
    data = w.extended_request(w.WRITE, 0, 4) + b"data" + w.extended_request(w.READ, 0, 1)
    requests, position = parse_extended(data)
    assert [request[:2] for request in requests] == [(0, w.WRITE), (0, w.READ)]
    assert position == len(data)


@pytest.mark.parametrize("command", [w.WRITE, w.READ, w.BLOCK_STATUS, w.DISC, 77])
def test_an_extended_request_waits_for_all_of_its_payload(command: int) -> None:
    before = w.extended_request(w.FLUSH)
    data = before + w.extended_request(command, 7, cookie=9, payload=bytes(40))
    for end in range(32, len(data)):
        requests, position = parse_extended(data[:end])
        assert len(requests) == 1
        assert position == 32
    layout = request_layout(Mode.EXTENDED)
    flags = 0 if command == w.WRITE else w.PAYLOAD_LEN
    assert layout.head(data, position) == (flags, command, w.extended_cookie(9, 7), 7, 40, 64)
    assert layout.size == 32


@pytest.mark.parametrize("command", [w.WRITE, w.READ, w.BLOCK_STATUS, 77])
def test_an_extended_payload_above_the_limit_is_fatal_before_it_comes(command: int) -> None:
    header = struct.pack(">IHHQQQ", 0x21E41C71, w.PAYLOAD_LEN, command, 1, 0, wire.MAX_PAYLOAD + 1)
    with pytest.raises(RemoteProtocolError, match="limit"):
        parse_extended(header)


@pytest.mark.parametrize("magic", [0, 0x25609513, 0x6E8A278C])
def test_an_extended_request_without_its_magic_is_fatal_after_those_before_it(magic: int) -> None:
    requests: list[Request] = []
    data = w.extended_request(w.READ, 0, 1) + struct.pack(">I", magic) + bytes(28)
    with pytest.raises(RemoteProtocolError, match="magic"):
        parse_extended_requests(data, 0, len(data), requests)
    assert len(requests) == 1


# request_error

EDGES = [
    # (command, offset, length, error)
    (w.READ, 0, 1, 0),
    (w.READ, SIZE - 1, 1, 0),
    (w.READ, 0, SIZE, 0),
    (w.READ, SIZE, 1, EINVAL),
    (w.READ, SIZE - 1, 2, EINVAL),
    (w.READ, (1 << 64) - 1, 2, EINVAL),
    (w.WRITE, 0, SIZE, 0),
    (w.WRITE, SIZE - 1, 2, ENOSPC),
    (w.WRITE, (1 << 64) - 1, 2, ENOSPC),
    (w.TRIM, 0, SIZE, 0),
    (w.TRIM, SIZE - 1, 2, EINVAL),
    (w.CACHE, 0, SIZE, 0),
    (w.CACHE, SIZE - 1, 2, EINVAL),
    (w.CACHE, (1 << 64) - 1, 0xFFFFFFFF, EINVAL),
    (w.WRITE_ZEROES, 0, SIZE, 0),
    (w.WRITE_ZEROES, SIZE - 1, 2, ENOSPC),
    (w.WRITE_ZEROES, (1 << 64) - 1, 0xFFFFFFFF, ENOSPC),
    (w.FLUSH, 0, 0, 0),
    (w.FLUSH, 1, 0, EINVAL),
    (w.FLUSH, 0, 1, EINVAL),
    (w.READ, 0, 0, EINVAL),
    (w.WRITE, 0, 0, EINVAL),
    (w.TRIM, 0, 0, EINVAL),
    (w.CACHE, 0, 0, EINVAL),
    (w.WRITE_ZEROES, 0, 0, EINVAL),
    (w.DISC, 0, 0, 0),
    (w.DISC, 5, 7, 0),
    (w.BLOCK_STATUS, 0, 0, EINVAL),
    (w.BLOCK_STATUS, SIZE - 1, 2, EINVAL),
    (w.BLOCK_STATUS, (1 << 64) - 1, 0xFFFFFFFF, EINVAL),
    (8, 0, 512, EINVAL),
    (0xFFFF, 0, 0, EINVAL),
]


@pytest.mark.parametrize(("command", "offset", "length", "error"), EDGES)
@pytest.mark.parametrize("structured", [False, True])
def test_the_range_decides_the_error(command: int, offset: int, length: int, error: int, structured: bool) -> None:
    assert request_error(WRITABLE, structured, 0, command, offset, length) == error


@pytest.mark.parametrize(("offset", "length"), [(0, 512), (SIZE, 512), (0, 0), (0, 0xFFFFFFFF)])
@pytest.mark.parametrize("command", [w.WRITE, w.TRIM, w.WRITE_ZEROES])
@pytest.mark.parametrize("flags", [0, w.FUA, 0xFFFF])
def test_a_write_to_a_read_only_export_is_eperm_whatever_else_is_wrong(
    command: int, offset: int, length: int, flags: int
) -> None:
    assert request_error(READ_ONLY, True, flags, command, offset, length) == EPERM


@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        (w.READ, 0, SIZE, 0),
        (w.READ, 1, SIZE, EINVAL),
        (w.CACHE, 0, 512, 0),
        (w.FLUSH, 0, 0, 0),
        (w.BLOCK_STATUS, 0, 512, 0),
    ],
)
def test_a_read_only_export_answers_what_does_not_write(command: int, offset: int, length: int, error: int) -> None:
    assert request_error(READ_ONLY, True, 0, command, offset, length) == error


@pytest.mark.parametrize("command", [w.READ, w.WRITE, w.TRIM, w.CACHE, w.WRITE_ZEROES, w.FLUSH])
def test_fua_is_accepted_on_every_command_where_it_was_offered(command: int) -> None:
    length = 0 if command == w.FLUSH else 512
    assert request_error(WRITABLE, False, w.FUA, command, 0, length) == 0
    without = replace(WRITABLE, flags=WRITABLE.flags & ~TransmissionFlag.SEND_FUA)
    assert request_error(without, False, w.FUA, command, 0, length) == EINVAL
    assert request_error(without, False, 0, command, 0, length) == 0


KNOWN_FLAGS = {w.READ: w.FUA | w.DF, w.BLOCK_STATUS: w.FUA | w.REQ_ONE, w.WRITE_ZEROES: w.FUA | w.NO_HOLE | w.FAST_ZERO}


@pytest.mark.parametrize("command", [w.READ, w.WRITE, w.TRIM, w.CACHE, w.WRITE_ZEROES, w.FLUSH, w.BLOCK_STATUS])
@pytest.mark.parametrize("bit", range(16))
def test_a_flag_that_the_command_does_not_know_is_einval(command: int, bit: int) -> None:
    known = KNOWN_FLAGS.get(command, w.FUA)
    length = 0 if command == w.FLUSH else 512
    expected = 0 if known >> bit & 1 else EINVAL
    assert request_error(WRITABLE, True, 1 << bit, command, 0, length) == expected


def test_block_status_needs_structured_replies() -> None:
    assert request_error(WRITABLE, True, w.REQ_ONE, w.BLOCK_STATUS, 0, 512) == 0
    assert request_error(WRITABLE, False, 0, w.BLOCK_STATUS, 0, 512) == EINVAL


def test_a_payload_is_for_block_status_alone_and_only_where_it_was_offered() -> None:
    offered = replace(WRITABLE, flags=WRITABLE.flags | TransmissionFlag.BLOCK_STATUS_PAYLOAD)
    assert request_error(WRITABLE, True, w.PAYLOAD_LEN, w.BLOCK_STATUS, 0, 12) == EINVAL
    assert request_error(offered, True, w.PAYLOAD_LEN | w.REQ_ONE, w.BLOCK_STATUS, 0, 12) == 0
    assert request_error(offered, True, w.PAYLOAD_LEN, w.BLOCK_STATUS, SIZE * 2, 0) == 0  # its range is in the payload
    for command in (w.READ, w.WRITE, w.FLUSH, w.TRIM, w.CACHE, w.WRITE_ZEROES, 77):
        assert request_error(offered, True, w.PAYLOAD_LEN, command, 0, 512) == EINVAL


def test_df_needs_structured_replies() -> None:
    assert request_error(WRITABLE, True, w.DF, w.READ, 0, 512) == 0
    assert request_error(WRITABLE, False, w.DF, w.READ, 0, 512) == EINVAL


def test_fast_zero_needs_to_have_been_offered() -> None:
    without = replace(WRITABLE, flags=WRITABLE.flags & ~TransmissionFlag.SEND_FAST_ZERO)
    assert request_error(WRITABLE, True, w.FAST_ZERO | w.NO_HOLE, w.WRITE_ZEROES, 0, 512) == 0
    assert request_error(without, True, w.FAST_ZERO, w.WRITE_ZEROES, 0, 512) == EINVAL


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (w.TRIM, TransmissionFlag.SEND_TRIM),
        (w.CACHE, TransmissionFlag.SEND_CACHE),
        (w.WRITE_ZEROES, TransmissionFlag.SEND_WRITE_ZEROES),
        (w.FLUSH, TransmissionFlag.SEND_FLUSH),
    ],
)
def test_a_command_that_was_never_offered_is_einval(command: int, flag: TransmissionFlag) -> None:
    without = replace(WRITABLE, flags=WRITABLE.flags & ~flag)
    assert request_error(without, True, 0, command, 0, 0 if command == w.FLUSH else 512) == EINVAL


LARGE = ExportInfo("large", 1 << 40, transmission_flags(False))


def test_a_read_above_the_limit_says_so_as_its_kind_of_reply_can() -> None:
    over = wire.MAX_PAYLOAD + 1
    assert request_error(LARGE, True, 0, w.READ, 0, wire.MAX_PAYLOAD) == 0
    assert request_error(LARGE, True, 0, w.READ, 0, over) == EOVERFLOW
    assert request_error(LARGE, True, w.DF, w.READ, 0, over) == EOVERFLOW
    assert request_error(LARGE, False, 0, w.READ, 0, over) == EINVAL
    assert request_error(LARGE, True, 0, w.READ, (1 << 40) - 5, over) == EINVAL


def test_a_read_in_one_chunk_is_no_longer_than_what_is_announced() -> None:
    announced = LARGE.maximum_payload
    assert announced == 32 << 20
    assert request_error(LARGE, True, w.DF, w.READ, 0, announced) == 0
    assert request_error(LARGE, True, w.DF, w.READ, 0, announced + 1) == EOVERFLOW
    assert request_error(LARGE, True, 0, w.READ, 0, announced + 1) == 0
    assert request_error(LARGE, True, w.DF, w.READ, LARGE.size - announced, announced + 1) == EINVAL


@pytest.mark.parametrize("command", [w.TRIM, w.CACHE, w.WRITE_ZEROES, w.BLOCK_STATUS])
def test_only_payloads_are_limited(command: int) -> None:
    assert request_error(LARGE, True, 0, command, 0, 0xFFFFFFFF) == 0
    assert request_error(LARGE, True, 0, command, 0, LARGE.size) == 0


# Builders


def test_replies_are_laid_out_as_the_specification_says() -> None:
    assert transmission.simple_reply(7, 0) == w.simple(7)
    assert transmission.simple_reply(0xFFFFFFFFFFFFFFFF, 28) == w.simple(0xFFFFFFFFFFFFFFFF, 28)
    assert transmission.read_chunk_header(7, 4096, 5) + b"hello" == w.data_chunk(7, 4096, b"hello")
    assert transmission.none_chunk(7) == w.chunk(w.NONE, 7)
    assert transmission.hole_chunk(7, 4096, 512) == w.hole_chunk(7, 4096, 512)
    assert transmission.hole_chunk(7, 4096, 512, last=False) == w.hole_chunk(7, 4096, 512, flags=0)
    assert transmission.read_chunk_header(7, 4096, 2, last=False) + b"ab" == w.data_chunk(7, 4096, b"ab", flags=0)
    assert transmission.error_chunk(7, 5, "no disk") == w.error_chunk(7, 5, b"no disk")


def test_an_error_text_is_cut_to_1000_bytes_between_characters() -> None:
    assert transmission.error_chunk(7, 5, "é" * 600) == w.error_chunk(7, 5, "é".encode() * 500)
    assert transmission.error_chunk(7, 5, "x" + "é" * 600) == w.error_chunk(7, 5, b"x" + "é".encode() * 499)
    assert transmission.error_chunk(7, 5, "a\0b\ud800") == w.error_chunk(7, 5, "a\ufffdb?".encode())


def test_extended_chunks_repeat_the_offset_of_the_request() -> None:
    cookie, layout = w.extended_cookie(7, 4096), wire.EXTENDED
    data = transmission.read_chunk_header(cookie, 5000, 5, last=False, layout=layout) + b"hello"
    assert data == w.extended(w.data_chunk(7, 5000, b"hello", flags=0), 4096)
    assert transmission.hole_chunk(cookie, 5000, 9, layout=layout) == w.extended(w.hole_chunk(7, 5000, 9), 4096)
    assert transmission.none_chunk(cookie, layout) == w.extended_chunk(w.NONE, 7, 4096)
    assert transmission.error_chunk(cookie, 5, "no", layout) == w.extended(w.error_chunk(7, 5, b"no"), 4096)
