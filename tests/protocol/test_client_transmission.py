"""Replies as a client takes them: honest ones in every shape, and lies of every kind."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import pytest
import wirebytes as w

from nbdclone.errors import LocalProtocolError, RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.pending import Completed
from nbdclone.protocol.transmission import ClientTransmission
from nbdclone.protocol.wire import Mode


def client_with(
    command: int, offset: int, length: int, *, flags: int = 0, structured: bool = True
) -> ClientTransmission:
    """A client with one request in flight, whose cookie is 1."""
    client = ClientTransmission(Mode(structured))
    cookie, _buffers = client.send_request(command, flags, offset, length, bytes(length if command == w.WRITE else 0))
    assert cookie == 1
    return client


def receive(client: ClientTransmission, *messages: bytes) -> list[Completed]:
    completed: list[Completed] = []
    client.receive_data(b"".join(messages), completed)
    return completed


def test_a_request_is_its_header_and_its_payload_as_it_is() -> None:
    client = ClientTransmission(Mode.STRUCTURED)
    payload = bytearray(b"hello")
    cookie, buffers = client.send_request(w.WRITE, w.FUA, 4096, 5, payload)
    assert buffers[0] == w.request(w.WRITE, 4096, 5, flags=w.FUA, cookie=cookie)
    assert buffers[1] is payload
    other, buffers = client.send_request(w.READ, 0, 0, 512)
    assert other != cookie
    assert buffers == [w.request(w.READ, 0, 512, cookie=other)]
    assert client.in_flight == 2


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "payload"),
    [
        (w.WRITE, 0, 0, 5, b"four"),
        (w.READ, 0, 0, 5, b"wrong"),
        (w.READ, 0, -1, 5, b""),
        (w.READ, 0, 1 << 64, 5, b""),
        (w.READ, 0, 0, -1, b""),
        (w.READ, 0, 0, 1 << 32, b""),
        (w.READ, 1 << 16, 0, 1, b""),
        (1 << 16, 0, 0, 1, b""),
    ],
)
def test_a_request_that_does_not_fit_the_wire_is_the_callers_fault(
    command: int, flags: int, offset: int, length: int, payload: bytes
) -> None:
    client = ClientTransmission(Mode.STRUCTURED)
    with pytest.raises(LocalProtocolError):
        client.send_request(command, flags, offset, length, payload)
    assert client.in_flight == 0


def test_disc_gets_no_reply() -> None:
    client = ClientTransmission(Mode.STRUCTURED)
    _cookie, buffers = client.send_request(w.DISC, 0, 0, 0)
    assert len(buffers) == 1
    assert client.in_flight == 0


# Honest replies


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("command", [w.WRITE, w.FLUSH, w.TRIM, w.CACHE, w.WRITE_ZEROES])
def test_a_simple_reply_completes_what_does_not_read(command: int, structured: bool) -> None:
    client = client_with(command, 0, 512, structured=structured)
    assert receive(client, w.simple(1)) == [Completed(1, 0, "", None)]
    assert client.in_flight == 0
    client = client_with(command, 0, 512, structured=structured)
    assert receive(client, w.simple(1, 28)) == [Completed(1, 28, "", None)]


@pytest.mark.parametrize("number", [*wire.Errno, 77, 0xFFFFFFFF])
def test_an_error_of_any_number_is_passed_on_and_the_connection_lives(number: int) -> None:
    client = client_with(w.WRITE, 0, 512)
    assert receive(client, w.simple(1, number)) == [Completed(1, number, "", None)]
    cookie, _buffers = client.send_request(w.FLUSH, 0, 0, 0)
    assert receive(client, w.simple(cookie)) == [Completed(cookie, 0, "", None)]


def test_a_simple_reply_to_a_read_brings_its_data_unless_it_failed() -> None:
    client = client_with(w.READ, 4096, 5, structured=False)
    assert receive(client, w.simple(1, 0, b"hello")) == [Completed(1, 0, "", b"hello")]
    client = client_with(w.READ, 4096, 5, structured=False)
    assert receive(client, w.simple(1, 5)) == [Completed(1, 5, "", None)]


HONEST: dict[str, list[bytes]] = {
    "one chunk": [w.data_chunk(1, 100, b"abcdefgh")],
    "data, then none": [w.data_chunk(1, 100, b"abcdefgh", flags=0), w.chunk(w.NONE, 1)],
    "ascending": [w.data_chunk(1, 100, b"abc", flags=0), w.data_chunk(1, 103, b"defgh")],
    "descending": [w.data_chunk(1, 103, b"defgh", flags=0), w.data_chunk(1, 100, b"abc")],
    "closing a gap": [
        w.data_chunk(1, 106, b"gh", flags=0),
        w.data_chunk(1, 100, b"ab", flags=0),
        w.data_chunk(1, 102, b"cdef"),
    ],
    "an unknown flag": [w.data_chunk(1, 100, b"abcdefgh", flags=0x8001)],
}


@pytest.mark.parametrize("messages", HONEST.values(), ids=HONEST)
def test_chunks_of_a_read_are_put_in_order(messages: list[bytes]) -> None:
    client = client_with(w.READ, 100, 8)
    assert receive(client, *messages) == [Completed(1, 0, "", b"abcdefgh")]


def test_holes_read_as_zeros() -> None:
    client = client_with(w.READ, 100, 8)
    messages = [w.hole_chunk(1, 100, 2, flags=0), w.data_chunk(1, 102, b"abcd", flags=0), w.hole_chunk(1, 106, 2)]
    assert receive(client, *messages) == [Completed(1, 0, "", b"\0\0abcd\0\0")]
    client = client_with(w.READ, 100, 8)
    assert receive(client, w.hole_chunk(1, 100, 8)) == [Completed(1, 0, "", bytes(8))]


def test_chunks_of_different_replies_may_be_mixed() -> None:
    client = client_with(w.READ, 0, 4)
    client.send_request(w.READ, 0, 8, 4)
    client.send_request(w.FLUSH, 0, 0, 0)
    messages = [
        w.data_chunk(2, 8, b"he", flags=0),
        w.data_chunk(1, 0, b"lo", flags=0),
        w.simple(3),
        w.data_chunk(2, 10, b"re"),
        w.data_chunk(1, 2, b"st"),
    ]
    assert receive(client, *messages) == [
        Completed(3, 0, "", None),
        Completed(2, 0, "", b"here"),
        Completed(1, 0, "", b"lost"),
    ]


def test_an_error_chunk_fails_the_whole_read() -> None:
    client = client_with(w.READ, 0, 8)
    messages = [w.data_chunk(1, 0, b"abcd", flags=0), w.error_chunk(1, 5, b"no disk", flags=0), w.chunk(w.NONE, 1)]
    assert receive(client, *messages) == [Completed(1, 5, "no disk", None)]


def test_the_first_of_many_errors_counts_and_data_may_follow_it() -> None:
    client = client_with(w.READ, 100, 8)
    messages = [
        w.error_offset_chunk(1, 5, 104, b"bad sector", flags=0),
        w.error_offset_chunk(1, 12, 107, flags=0),
        w.data_chunk(1, 100, b"abcd"),
    ]
    assert receive(client, *messages) == [Completed(1, 5, "bad sector", None)]


def test_an_error_of_an_unknown_type_is_an_error_still() -> None:
    client = client_with(w.READ, 100, 8)
    payload = struct.pack(">IH", 5, 3) + b"odd" + b"more fields"
    assert receive(client, w.chunk(0x8765, 1, payload)) == [Completed(1, 5, "odd", None)]


def test_an_error_text_that_is_no_utf8_is_readable_still() -> None:
    client = client_with(w.WRITE, 0, 8)
    assert receive(client, w.error_chunk(1, 28, b"\xfffull")) == [Completed(1, 28, "\ufffdfull", None)]


def test_an_error_text_of_4096_bytes_is_taken() -> None:
    client = client_with(w.WRITE, 0, 8)
    assert receive(client, w.error_chunk(1, 28, b"x" * 4096)) == [Completed(1, 28, "x" * 4096, None)]


def test_a_read_of_nothing_brings_nothing() -> None:
    assert receive(client_with(w.READ, 0, 0), w.chunk(w.NONE, 1)) == [Completed(1, 0, "", b"")]
    assert receive(client_with(w.READ, 0, 0, structured=False), w.simple(1)) == [Completed(1, 0, "", b"")]


def test_what_came_before_a_lie_is_kept() -> None:
    client = client_with(w.WRITE, 0, 8)
    completed: list[Completed] = []
    with pytest.raises(RemoteProtocolError):
        client.receive_data(w.simple(1) + bytes(16), completed)
    assert completed == [Completed(1, 0, "", None)]


# Lies

READ_LIES: dict[str, list[bytes]] = {
    "no magic": [bytes(16)],
    "a request": [w.request(w.READ)],
    "a simple reply": [w.simple(1)],
    "a simple error": [w.simple(1, 5)],
    "an unknown cookie": [w.data_chunk(2, 100, b"abcdefgh")],
    "an unknown cookie's simple reply": [w.simple(2)],
    "two replies": [w.data_chunk(1, 100, b"abcdefgh"), w.data_chunk(1, 100, b"abcdefgh")],
    "before the request": [w.data_chunk(1, 99, b"abcdefgh")],
    "before the request, more to come": [w.data_chunk(1, 99, b"ab", flags=0)],
    "past the request": [w.data_chunk(1, 101, b"abcdefgh")],
    "more than the request": [w.data_chunk(1, 100, b"abcdefghi")],
    "far away": [w.data_chunk(1, 1 << 63, b"abcdefgh")],
    "data without an offset": [w.chunk(w.DATA, 1, b"abc")],
    "empty data": [w.data_chunk(1, 100, b"")],
    "huge data": [struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 1, 0xFFFFFFFF, 100)],
    "the same twice": [w.data_chunk(1, 100, b"abcd", flags=0), w.data_chunk(1, 100, b"abcd", flags=0)],
    "overlapping behind": [w.data_chunk(1, 100, b"abcd", flags=0), w.data_chunk(1, 103, b"abcd", flags=0)],
    "overlapping before": [w.data_chunk(1, 103, b"abcd", flags=0), w.data_chunk(1, 100, b"abcd", flags=0)],
    "overlapping within": [w.data_chunk(1, 100, b"abcdefgh", flags=0), w.hole_chunk(1, 103, 1, flags=0)],
    "overlapping around": [w.hole_chunk(1, 103, 1, flags=0), w.data_chunk(1, 100, b"abcdefgh", flags=0)],
    "too little": [w.data_chunk(1, 100, b"abcd")],
    "a gap": [w.data_chunk(1, 100, b"abcd", flags=0), w.data_chunk(1, 105, b"abc")],
    "nothing": [w.chunk(w.NONE, 1)],
    "none that is not the last": [w.chunk(w.NONE, 1, flags=0)],
    "none with a payload": [w.chunk(w.NONE, 1, b"x")],
    "a short hole": [w.chunk(w.HOLE, 1, bytes(11))],
    "a long hole": [w.chunk(w.HOLE, 1, bytes(13))],
    "an empty hole": [w.hole_chunk(1, 100, 0)],
    "a hole past the request": [w.hole_chunk(1, 100, 0xFFFFFFFF)],
    "a block status": [w.chunk(5, 1, bytes(12))],
    "an unknown type": [w.chunk(77, 1, b"")],
    "an error of 0": [w.error_chunk(1, 0)],
    "a short error": [w.chunk(w.ERROR, 1, bytes(5))],
    "an error text that is not there": [w.chunk(w.ERROR, 1, struct.pack(">IH", 5, 9) + b"x")],
    "an error text over 4096": [w.error_chunk(1, 5, b"x" * 4097)],
    "a huge error": [struct.pack(">IHHQI", 0x668E33EF, 1, w.ERROR, 1, 0xFFFFFFFF)],
    "a short error with offset": [w.chunk(w.ERROR_OFFSET, 1, bytes(13))],
    "an offset eaten by its text": [w.chunk(w.ERROR_OFFSET, 1, struct.pack(">IH", 5, 5) + bytes(8))],
    "an error before the request": [w.error_offset_chunk(1, 5, 99)],
    "an error past the request": [w.error_offset_chunk(1, 5, 108)],
}


@pytest.mark.parametrize("messages", READ_LIES.values(), ids=READ_LIES)
def test_a_lying_reply_to_a_read_is_the_servers_fault(messages: list[bytes]) -> None:
    with pytest.raises(RemoteProtocolError):
        receive(client_with(w.READ, 100, 8), *messages)


@pytest.mark.parametrize("messages", READ_LIES.values(), ids=READ_LIES)
def test_a_lie_in_single_bytes_is_a_lie_still(messages: list[bytes]) -> None:
    client = client_with(w.READ, 100, 8)

    def in_single_bytes() -> None:
        for byte in b"".join(messages):
            receive(client, bytes([byte]))

    with pytest.raises(RemoteProtocolError):
        in_single_bytes()


@pytest.mark.parametrize("message", [w.data_chunk(1, 0, b"abcdefgh"), w.hole_chunk(1, 0, 8)])
@pytest.mark.parametrize("command", [w.WRITE, w.TRIM, w.WRITE_ZEROES, w.FLUSH])
def test_data_for_what_does_not_read_is_a_lie(command: int, message: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        receive(client_with(command, 0, 8), message)


@pytest.mark.parametrize(
    "message",
    [w.chunk(w.NONE, 1, b"x"), w.chunk(w.NONE, 1, flags=0), w.error_chunk(1, 0), w.chunk(5, 1, bytes(12)), w.simple(2)],
)
def test_a_lying_reply_to_a_write_is_the_servers_fault(message: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        receive(client_with(w.WRITE, 100, 8), message)


def test_a_structured_reply_that_was_not_agreed_on_is_a_lie() -> None:
    with pytest.raises(RemoteProtocolError):
        receive(client_with(w.READ, 0, 8, structured=False), w.data_chunk(1, 0, b"abcdefgh"))


def test_df_allows_one_chunk_of_content() -> None:
    whole = [w.data_chunk(1, 0, b"abcdefgh", flags=0), w.chunk(w.NONE, 1)]
    assert receive(client_with(w.READ, 0, 8, flags=w.DF), *whole) == [Completed(1, 0, "", b"abcdefgh")]
    with pytest.raises(RemoteProtocolError, match="fragmented"):
        receive(client_with(w.READ, 0, 8, flags=w.DF), w.data_chunk(1, 0, b"abcd", flags=0), w.hole_chunk(1, 4, 4))


def test_a_read_in_too_many_pieces_apart_is_cut_off() -> None:
    length = 4 * wire.MAX_FRAGMENTS
    client = client_with(w.READ, 0, length)
    receive(client, *(w.hole_chunk(1, 2 * i, 1, flags=0) for i in range(wire.MAX_FRAGMENTS)))
    with pytest.raises(RemoteProtocolError, match="pieces"):
        receive(client, w.hole_chunk(1, length - 1, 1, flags=0))


def peak_of(action: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_huge_claim_allocates_nothing() -> None:
    claims = [
        struct.pack(">IHHQIQ", 0x668E33EF, 1, w.DATA, 1, 0xFFFFFFFF, 0),
        struct.pack(">IHHQI", 0x668E33EF, 1, w.ERROR, 1, 0xFFFFFFFF) + bytes(100),
        struct.pack(">IHHQI", 0x668E33EF, 1, w.HOLE, 1, 0xFFFFFFFF) + bytes(100),
        w.hole_chunk(1, 0, 0xFFFFFFFF),
    ]
    for claim in claims:
        client = client_with(w.READ, 0, 4096)

        def lie(client: ClientTransmission = client, claim: bytes = claim) -> None:
            with pytest.raises(RemoteProtocolError):
                receive(client, claim)

        assert peak_of(lie) < 1 << 20


def test_endless_error_chunks_take_no_memory() -> None:
    client = client_with(w.READ, 0, 4096)
    chunk = w.error_offset_chunk(1, 5, 0, b"x" * 1000, flags=0)

    def errors() -> None:
        for _ in range(1000):
            receive(client, chunk)

    assert peak_of(errors) < 256 << 10


def test_a_large_read_in_small_packets_takes_its_own_size() -> None:
    length = 1 << 20
    client = client_with(w.READ, 0, length)
    stream = w.data_chunk(1, 0, bytes(length))
    completed: list[Completed] = []

    def trickle() -> None:
        view = memoryview(stream)
        for start in range(0, len(stream), 100):
            client.receive_data(view[start : start + 100], completed)

    assert peak_of(trickle) < 2 * length
    assert completed == [Completed(1, 0, "", bytes(length))]


# With extended headers


def extended_client(command: int, offset: int, length: int) -> ClientTransmission:
    """A client with one request in flight, whose cookie is 1."""
    client = ClientTransmission(Mode.EXTENDED, [1, 3])
    client.send_request(command, 0, offset, length, bytes(length if command == w.WRITE else 0))
    return client


def test_an_extended_request_says_that_it_has_a_payload() -> None:
    client = ClientTransmission(Mode.EXTENDED)
    payload = bytearray(b"hello")
    _cookie, buffers = client.send_request(w.WRITE, w.FUA, 4096, 5, payload)
    assert b"".join(buffers) == w.extended_request(w.WRITE, 4096, flags=w.FUA, payload=b"hello")
    assert buffers[1] is payload
    _cookie, buffers = client.send_request(w.TRIM, 0, 512, (1 << 64) - 512)
    assert buffers == [w.extended_request(w.TRIM, 512, (1 << 64) - 512, cookie=2)]
    with pytest.raises(LocalProtocolError):
        client.send_request(w.TRIM, 0, 0, 1 << 64)


@pytest.mark.parametrize("command", [w.WRITE, w.FLUSH, w.TRIM, w.CACHE, w.WRITE_ZEROES])
def test_an_extended_chunk_completes_what_does_not_read(command: int) -> None:
    assert receive(extended_client(command, 7, 512), w.extended_chunk(w.NONE, 1, 7)) == [Completed(1, 0, "", None)]
    error = w.extended(w.error_chunk(1, 28, b"full"), 7)
    assert receive(extended_client(command, 7, 512), error) == [Completed(1, 28, "full", None)]


def test_an_extended_read_is_put_together_from_chunks_that_repeat_its_offset() -> None:
    chunks = w.data_chunk(1, 104, b"efgh", flags=0) + w.hole_chunk(1, 100, 4, flags=0) + w.data_chunk(1, 108, b"ij")
    [answer] = receive(extended_client(w.READ, 100, 10), w.extended(chunks, 100))
    assert answer == Completed(1, 0, "", bytes(4) + b"efghij")


EXTENDED_LIES = {
    "a simple reply": w.simple(1),
    "a structured chunk": w.data_chunk(1, 100, b"abcdefgh"),
    "an offset that is not the request's": w.extended(w.data_chunk(1, 100, b"abcdefgh"), 104),
    "an error with another offset": w.extended(w.error_chunk(1, 5, b"no"), 104),
    "another cookie": w.extended(w.data_chunk(2, 100, b"abcdefgh"), 100),
    "data beyond the request": w.extended(w.data_chunk(1, 100, b"abcdefghi"), 100),
    "a length of 64 bits": struct.pack(">IHHQQQ", 0x6E8A278C, 1, w.DATA, 1, 100, 1 << 63) + struct.pack(">Q", 100),
    "an error of 64 bits": struct.pack(">IHHQQQ", 0x6E8A278C, 1, w.ERROR, 1, 100, 1 << 32),
    "nothing": w.extended_chunk(w.NONE, 1, 100),
    "block status": w.extended_status_chunk(1, 100, 1, (8, 0)),
    "block status of structured replies": w.extended_chunk(w.STATUS, 1, 100, bytes(12)),
}


@pytest.mark.parametrize("lie", EXTENDED_LIES)
def test_a_lie_with_extended_headers_is_the_servers_fault(lie: str) -> None:
    with pytest.raises(RemoteProtocolError):
        receive(extended_client(w.READ, 100, 8), EXTENDED_LIES[lie])


@pytest.mark.parametrize("mode", [Mode.SIMPLE, Mode.STRUCTURED])
def test_extended_chunks_that_were_not_agreed_on_are_a_lie(mode: Mode) -> None:
    client = ClientTransmission(mode)
    client.send_request(w.READ, 0, 0, 8)
    with pytest.raises(RemoteProtocolError, match="magic"):
        receive(client, w.extended(w.data_chunk(1, 0, b"abcdefgh"), 0))
