"""Any fragmentation gives the same events, and garbage gives nothing but RemoteProtocolError."""

from __future__ import annotations

import pytest
import wirebytes as w
from hypothesis import given
from hypothesis import strategies as st

from nbdclone.errors import RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.client_handshake import ClientHandshake, ContextsSet, ExportDescribed, ExportList, Ready, Refused
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.handshake_events import FindSnapshots, ListExports, OpenExport
from nbdclone.protocol.pending import Completed
from nbdclone.protocol.requests import Request, request_layout
from nbdclone.protocol.transmission import ClientTransmission, request_error
from nbdclone.protocol.wire import ExportInfo, Mode, transmission_flags

INFO = ExportInfo("web1", 1 << 20, transmission_flags(False), "a disk")
cuts = st.lists(st.integers(0, 2000), max_size=30)

# The server's handshake

options = st.one_of(
    st.builds(w.option, st.integers(0, 12), st.binary(max_size=40)),
    st.just(w.option(w.LIST)),
    st.just(w.option(w.STRUCTURED_REPLY)),
    st.just(w.option(w.EXTENDED_HEADERS)),
    st.builds(
        lambda number, name, infos: w.option(number, w.export_request(name, *infos)),
        st.sampled_from([w.INFO, w.GO]),
        st.sampled_from([b"web1", b"nobody", b"", b"\xff", b"x" * 5000]),
        st.lists(st.integers(0, 5), max_size=5),
    ),
    st.builds(
        lambda number, name, queries: w.option(number, w.context_request(name, *queries)),
        st.sampled_from([w.LIST_CONTEXTS, w.SET_CONTEXTS]),
        st.sampled_from([b"web1", b"nobody", b"\xff"]),
        st.lists(
            st.sampled_from([b"base:", b"base:allocation", b"qemu:allocation-depth", b"x", b"y:\xff"]), max_size=3
        ),
    ),
    st.builds(w.option, st.just(w.EXPORT_NAME), st.sampled_from([b"web1", b"nobody", b"a\0b"])),
)
client_streams = st.builds(
    lambda flags, parts, tail: w.client_flags(flags) + b"".join(parts) + tail,
    st.sampled_from([0, 1, 2, 3, 3, 3, 3, 4]),
    st.lists(options, max_size=8),
    st.one_of(st.just(b""), st.binary(max_size=60)),
)


def serve(pieces: list[bytes]) -> tuple[list[object], bytes]:
    """All that a server makes of the pieces: its events, its end, and what it sent."""
    server = ServerHandshake()
    seen: list[object] = []
    rest = b""
    try:
        for index, piece in enumerate(pieces):
            server.receive_data(piece)
            while (event := server.next_event()) is not None:
                seen.append(event)
                answer(server, event)
            if server.finished:
                rest = server.trailing_data() + b"".join(pieces[index + 1 :])
                break
    except RemoteProtocolError as error:
        seen.append(str(error))
        assert server.closed
    return [*seen, server.finished, server.closed, rest], b"".join(server.data_to_send())


def answer(server: ServerHandshake, event: object) -> None:
    match event:
        case ListExports():
            server.send_list([("web1", "a disk")])
        case FindSnapshots():
            server.send_contexts(["golden"])
        case OpenExport("web1"):
            server.accept_export(INFO)
        case OpenExport():
            server.refuse_export("no")


@given(client_streams, cuts)
def test_a_server_sees_the_same_options_in_any_fragmentation(stream: bytes, cuts: list[int]) -> None:
    whole = serve([stream])
    assert serve(list(w.in_pieces(stream, cuts))) == whole
    assert serve([bytes([byte]) for byte in stream]) == whole


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_garbage_to_a_server_raises_nothing_but_the_peers_fault(pieces: list[bytes]) -> None:
    serve([w.client_flags(), *pieces])
    serve(pieces)


# The client's handshake

replies = st.one_of(
    st.builds(
        w.option_reply,
        st.sampled_from([3, 6, 7, 8, 10, 11]),
        st.sampled_from([1, 2, 3, 4, w.UNSUP]),
        st.binary(max_size=30),
    ),
    st.just(w.option_reply(w.STRUCTURED_REPLY, w.ACK)),
    st.just(w.option_reply(w.LIST, w.SERVER, w.listed(b"web1", b"a disk")) + w.option_reply(w.LIST, w.ACK)),
    st.just(w.option_reply(w.GO, w.UNSUP)),
    st.just(
        w.option_reply(w.SET_CONTEXTS, w.REP_CONTEXT, w.context(7, b"base:allocation"))
        + w.option_reply(w.SET_CONTEXTS, w.ACK)
    ),
    *(
        st.just(
            w.option_reply(number, w.REP_INFO, w.info_block_size(1, 4096, 1 << 25))
            + w.option_reply(number, w.REP_INFO, w.info_export(1 << 20, 3))
            + w.option_reply(number, w.ACK)
        )
        for number in (w.INFO, w.GO)
    ),
)
honest_start = w.greeting() + w.option_reply(w.EXTENDED_HEADERS, w.ACK)
older_start = w.greeting() + w.option_reply(w.EXTENDED_HEADERS, w.UNSUP) + w.option_reply(w.STRUCTURED_REPLY, w.ACK)
server_streams = st.builds(
    lambda start, parts, tail: start + b"".join(parts) + tail,
    st.sampled_from([honest_start, older_start, older_start, w.greeting(), w.greeting(0), b""]),
    st.lists(replies, max_size=6),
    st.binary(max_size=40),
)


def haggle(pieces: list[bytes]) -> tuple[list[object], bytes]:
    """All that a client makes of the pieces, which asks for a list, about an export, for a context, then to use it."""
    client = ClientHandshake()
    seen: list[object] = []
    rest = b""
    try:
        for index, piece in enumerate(pieces):
            client.receive_data(piece)
            while (event := client.next_event()) is not None:
                seen.append(event)
                match event:
                    case Ready():
                        client.list_exports()
                    case ExportList() | Refused(w.LIST):
                        client.info("web1")
                    case ExportDescribed() | Refused(w.INFO):
                        client.set_contexts("web1", ["base:allocation"])
                    case ContextsSet() | Refused(w.SET_CONTEXTS):
                        client.go("web1")
            if client.finished:
                rest = client.trailing_data() + b"".join(pieces[index + 1 :])
                break
    except RemoteProtocolError as error:
        seen.append(str(error))
        assert client.closed
    return [*seen, client.finished, client.closed, rest], b"".join(client.data_to_send())


@given(server_streams, cuts)
def test_a_client_sees_the_same_answers_in_any_fragmentation(stream: bytes, cuts: list[int]) -> None:
    whole = haggle([stream])
    assert haggle(list(w.in_pieces(stream, cuts))) == whole
    assert haggle([bytes([byte]) for byte in stream]) == whole


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_garbage_to_a_client_in_its_handshake_raises_nothing_but_the_peers_fault(pieces: list[bytes]) -> None:
    haggle(pieces)
    haggle([honest_start, *pieces])


# Requests

modes = st.sampled_from(Mode)
REQUESTS = {Mode.STRUCTURED: w.request, Mode.EXTENDED: w.extended_request}


def request_streams(mode: Mode) -> st.SearchStrategy[bytes]:
    build = REQUESTS[mode]
    with_payload = [w.WRITE] if mode is Mode.STRUCTURED else [w.WRITE, w.READ, w.DISC, w.BLOCK_STATUS, 77]
    largest = (1 << 32) - 1 if mode is Mode.STRUCTURED else (1 << 64) - 1
    requests = st.one_of(
        st.builds(
            lambda flags, command, offset, payload: build(command, offset, len(payload), flags=flags, payload=payload),
            st.integers(0, 0xFFFF),
            st.sampled_from(with_payload),
            st.integers(0, (1 << 64) - 1),
            st.binary(max_size=100),
        ),
        st.builds(
            lambda flags, command, offset, length: build(command, offset, length, flags=flags),
            st.integers(0, 0xFFFF).map(lambda flags: flags & ~w.PAYLOAD_LEN),
            st.integers(0, 0xFFFF).filter(lambda command: command != w.WRITE),
            st.integers(0, (1 << 64) - 1),
            st.integers(0, largest),
        ),
    )
    return st.builds(lambda parts, tail: b"".join(parts) + tail, st.lists(requests, max_size=8), st.binary(max_size=60))


def parse(pieces: list[bytes], mode: Mode) -> tuple[list[tuple[tuple[object, ...], bytes]], object]:
    """The requests with their payloads, and the error or the bytes left."""
    layout = request_layout(mode)
    buffer = bytearray()
    taken: list[tuple[tuple[object, ...], bytes]] = []
    for piece in pieces:
        buffer += piece
        parsed: list[Request] = []
        failure = None
        position = 0
        try:
            position = layout.parse(buffer, 0, len(buffer), parsed)
        except RemoteProtocolError as error:
            failure = str(error)
        for flags, command, cookie, offset, length, start in parsed:
            has_payload = command == w.WRITE or (mode is Mode.EXTENDED and flags & w.PAYLOAD_LEN)
            payload = bytes(buffer[start : start + length]) if has_payload else b""
            assert len(payload) == (length if has_payload else 0)
            taken.append(((flags, command, cookie, offset, length), payload))
        if failure:
            return taken, failure
        if len(buffer) - position >= layout.size:
            assert 0 < layout.head(buffer, position)[4] <= wire.MAX_PAYLOAD
        del buffer[:position]
    return taken, bytes(buffer)


@pytest.mark.parametrize("mode", REQUESTS)
@given(data=st.data(), cuts=cuts)
def test_requests_are_the_same_in_any_fragmentation(mode: Mode, data: st.DataObject, cuts: list[int]) -> None:
    stream = data.draw(request_streams(mode))
    whole = parse([stream], mode)
    assert parse(list(w.in_pieces(stream, cuts)), mode) == whole
    assert parse([bytes([byte]) for byte in stream], mode) == whole


@given(st.lists(st.binary(max_size=200), max_size=20), modes)
def test_garbage_as_requests_raises_nothing_but_the_peers_fault(pieces: list[bytes], mode: Mode) -> None:
    parse(pieces, mode)
    magic = (0x21E41C71 if mode is Mode.EXTENDED else 0x25609513).to_bytes(4, "big")
    parse([magic + piece for piece in pieces], mode)


@given(
    st.booleans(),
    st.booleans(),
    st.integers(0, 0xFFFF),
    st.integers(0, 9),
    st.one_of(st.integers(0, 1 << 21), st.integers(0, (1 << 64) - 1)),
    st.one_of(st.integers(0, 1 << 21), st.integers(0, (1 << 64) - 1)),
)
def test_a_request_that_may_be_run_stays_within_the_export(
    read_only: bool, structured: bool, flags: int, command: int, offset: int, length: int
) -> None:
    info = ExportInfo("web1", 1 << 20, transmission_flags(read_only))
    error = request_error(info, structured, flags, command, offset, length)
    assert error in {0, 1, 22, 28, 75}
    if error or command == w.DISC:
        return
    assert command <= w.BLOCK_STATUS
    assert not flags & ~(w.FUA | w.NO_HOLE | w.DF | w.REQ_ONE | w.FAST_ZERO)
    assert not read_only or command in (w.READ, w.CACHE, w.FLUSH, w.BLOCK_STATUS)
    assert offset + length <= info.size
    assert length > 0 or command == w.FLUSH
    assert length <= wire.MAX_PAYLOAD


# Replies

chunks = st.one_of(
    st.builds(w.simple, st.integers(1, 4), st.sampled_from([0, 0, 5])),
    st.builds(w.data_chunk, st.integers(1, 4), st.integers(98, 110), st.binary(max_size=9), flags=st.integers(0, 1)),
    st.builds(w.hole_chunk, st.integers(1, 4), st.integers(98, 110), st.integers(0, 9), flags=st.integers(0, 1)),
    st.builds(
        w.error_chunk, st.integers(1, 4), st.sampled_from([0, 5]), st.binary(max_size=9), flags=st.integers(0, 1)
    ),
    st.builds(w.error_offset_chunk, st.integers(1, 4), st.just(5), st.integers(98, 110), flags=st.integers(0, 1)),
    st.builds(
        w.status_chunk,
        st.integers(1, 5),
        st.sampled_from([7, 7, 9]),
        st.tuples(st.integers(0, 9), st.integers(0, 3)),
        flags=st.integers(0, 1),
    ),
    st.builds(w.chunk, st.integers(0, 6), st.integers(1, 5), st.binary(max_size=20), flags=st.integers(0, 1)),
    st.sampled_from(
        [w.data_chunk(1, 100, b"abcd"), w.data_chunk(2, 104, b"efgh"), w.simple(3), w.simple(1, 0, b"abcd")]
    ),
)
reply_streams = st.builds(
    lambda parts, tail: b"".join(parts) + tail, st.lists(chunks, max_size=8), st.binary(max_size=40)
)


# The same with extended headers, and the offset mostly that of the request
extended_chunks = st.one_of(
    st.builds(
        lambda message, offset: w.extended(message, offset) if message[:1] == b"\x66" else message,
        chunks,
        st.sampled_from([100, 100, 100, 104, 0]),
    ),
    st.builds(
        w.extended_status_chunk,
        st.integers(1, 5),
        st.sampled_from([100, 100, 104]),
        st.sampled_from([7, 7, 9]),
        st.tuples(st.integers(0, 9), st.integers(0, 3)),
        flags=st.integers(0, 1),
    ),
    st.builds(
        w.extended_chunk, st.integers(0, 6), st.integers(1, 5), st.sampled_from([100, 104]), st.binary(max_size=20)
    ),
)
extended_reply_streams = st.builds(
    lambda parts, tail: b"".join(parts) + tail, st.lists(extended_chunks, max_size=8), st.binary(max_size=40)
)


def take(pieces: list[bytes], mode: Mode) -> list[object]:
    """All that a client makes of the pieces, which has two reads, a write, a flush and a question in flight."""
    client = ClientTransmission(mode, [7])
    client.send_request(w.READ, 0, 100, 4)
    client.send_request(w.READ, 0, 104, 4)
    client.send_request(w.WRITE, 0, 100, 4, b"data")
    client.send_request(w.FLUSH, 0, 0, 0)
    client.send_request(w.BLOCK_STATUS, 0, 100, 4)
    completed: list[Completed] = []
    failure = None
    try:
        for piece in pieces:
            client.receive_data(piece, completed)
    except RemoteProtocolError as error:
        failure = str(error)
    for answer in completed:
        assert answer.data is None or len(answer.data) == 4
    return [*completed, failure]


@given(st.one_of(reply_streams, extended_reply_streams), cuts, modes)
def test_replies_are_the_same_in_any_fragmentation(stream: bytes, cuts: list[int], mode: Mode) -> None:
    whole = take([stream], mode)
    assert take(list(w.in_pieces(stream, cuts)), mode) == whole
    assert take([bytes([byte]) for byte in stream], mode) == whole


@given(st.lists(st.binary(max_size=200), max_size=20), modes)
def test_garbage_to_a_client_raises_nothing_but_the_peers_fault(pieces: list[bytes], mode: Mode) -> None:
    take(pieces, mode)
