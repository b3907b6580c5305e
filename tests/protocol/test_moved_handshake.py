"""A handshake that goes on elsewhere: the client cannot tell."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import wirebytes as w

from nbdclone.errors import LocalProtocolError, RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.handshake_events import FindSnapshots, ListExports, OpenExport, Purpose, StartTLS, TLSMode
from nbdclone.protocol.wire import ExportInfo, transmission_flags

INFO = ExportInfo("web1", 10 << 20, transmission_flags(False), "the first web server")
CONTEXT = b"base:allocation"

# What clients say, from their flags on; "web1" is there, nothing else is.
CONVERSATIONS = {
    "libnbd": w.client_flags()
    + w.option(w.EXTENDED_HEADERS)
    + w.option(w.LIST_CONTEXTS, w.context_request(b"web1"))
    + w.option(w.SET_CONTEXTS, w.context_request(b"web1", CONTEXT, b"x:y"))
    + w.option(w.INFO, w.export_request(b"web1", 1, 2))
    + w.option(w.GO, w.export_request(b"web1", 1, 2, 3))
    + b"what follows",
    "structured, and another export than the contexts were for": w.client_flags()
    + w.option(w.STRUCTURED_REPLY)
    + w.option(w.SET_CONTEXTS, w.context_request(b"other", CONTEXT))
    + w.option(w.GO, w.export_request(b"web1", 2)),
    "a name in vain, and an option that nobody knows": w.client_flags(w.FIXED)
    + w.option(w.GO, w.export_request(b"none"))
    + w.option(77, b"data")
    + w.option(w.LIST)
    + w.option(w.EXPORT_NAME, b"web1")
    + bytes(300),
    "not fixed newstyle": w.client_flags(0) + w.option(w.EXPORT_NAME, b"web1"),
    "ends it": w.client_flags() + w.option(w.GO, w.export_request(b"none")) + w.option(w.ABORT),
    "breaks it": w.client_flags() + w.option(w.INFO, w.export_request(b"web1")) + b"GET / HTTP/1.1 and so on",
}


def moved(server: ServerHandshake) -> ServerHandshake:
    """The same elsewhere, by way of JSON."""
    return ServerHandshake.resumed(json.loads(json.dumps(server.state())))


def converse(
    data: bytes, cut: int, move: Callable[[ServerHandshake], ServerHandshake], *, at_answers: bool = False
) -> list[object]:
    """All that is to be seen of a conversation that is cut in two, with a move at the cut, or before each answer."""
    server = ServerHandshake()
    seen: list[object] = list(server.data_to_send())
    try:
        for piece in (data[:cut], data[cut:]):
            if server.finished:
                seen.append(piece)
                continue
            server.receive_data(piece)
            while (event := server.next_event()) is not None:
                seen += [event, *server.data_to_send()]
                if isinstance(event, OpenExport):
                    if at_answers:
                        server = move(server)
                        assert server.unanswered == event
                    if event.name == "web1":
                        server.accept_export(INFO)
                    else:
                        server.refuse_export("there is none")
                elif isinstance(event, ListExports):
                    server.send_list([("web1", "")])
                elif isinstance(event, FindSnapshots):
                    server.send_contexts(["golden"])
                seen += server.data_to_send()
            seen += server.data_to_send()
            if not (server.finished or server.closed):
                server = move(server)
        if server.finished:
            seen += [server.finished, server.trailing_data()]
    except RemoteProtocolError as error:
        seen.append(str(error))
    return seen


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_handshake_that_is_moved_after_any_byte_goes_on_the_same(name: str) -> None:
    data = CONVERSATIONS[name]
    for cut in range(len(data) + 1):
        assert converse(data, cut, moved) == converse(data, cut, lambda server: server)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_handshake_that_is_moved_at_each_export_goes_on_the_same(name: str) -> None:
    data = CONVERSATIONS[name]
    assert converse(data, len(data), moved, at_answers=True) == converse(data, len(data), lambda server: server)


def test_the_bytes_behind_the_last_option_move_with_it() -> None:
    server = ServerHandshake()
    server.data_to_send()
    server.receive_data(w.client_flags() + w.option(w.GO, w.export_request(b"web1")) + bytes(range(256)))
    assert server.next_event() == OpenExport("web1", Purpose.GO)
    server = moved(server)
    assert server.next_event() is None
    server.accept_export(INFO)
    assert server.finished is not None
    assert server.trailing_data() == bytes(range(256))


def test_options_are_counted_on() -> None:
    server = ServerHandshake()
    server.data_to_send()
    server.receive_data(w.client_flags())
    for _ in range(wire.MAX_OPTIONS):
        server.receive_data(w.option(99))
        assert server.next_event() is None
        server.data_to_send()
        server = moved(server)
    server.receive_data(w.option(99))
    with pytest.raises(RemoteProtocolError, match="options"):
        server.next_event()


def test_what_is_sent_ahead_stays_limited() -> None:
    server = ServerHandshake()
    server.data_to_send()
    server.receive_data(w.client_flags() + w.option(w.GO, w.export_request(b"web1")))
    server.next_event()
    server = moved(server)
    server.receive_data(bytes(wire.MAX_PIPELINED))
    server = moved(server)
    with pytest.raises(RemoteProtocolError, match="ahead"):
        server.receive_data(b"x")


def in_tls(mode: TLSMode) -> ServerHandshake:
    server = ServerHandshake(mode)
    server.data_to_send()
    server.receive_data(w.client_flags() + w.option(w.STARTTLS))
    assert isinstance(server.next_event(), StartTLS)
    server.data_to_send()
    server.tls_started()
    return server


def test_who_is_in_tls_stays_in_tls() -> None:
    for mode in (TLSMode.ON, TLSMode.REQUIRED):
        server = moved(in_tls(mode))
        server.receive_data(w.option(w.STARTTLS))
        assert server.next_event() is None
        assert w.option_replies(b"".join(server.data_to_send()))[0][1] == w.INVALID
        server.receive_data(w.option(w.GO, w.export_request(b"web1")))
        assert server.next_event() == OpenExport("web1", Purpose.GO)


def test_who_is_not_in_tls_does_not_get_there_by_moving() -> None:
    server = ServerHandshake(TLSMode.REQUIRED)
    server.data_to_send()
    server.receive_data(w.client_flags())
    server.next_event()
    server = moved(server)
    server.receive_data(w.option(w.GO, w.export_request(b"web1")))
    assert server.next_event() is None
    assert w.option_replies(b"".join(server.data_to_send()))[0][1] == w.TLS_REQD


def test_it_cannot_be_moved_before_its_answers_are_sent_nor_when_it_is_over() -> None:
    server = ServerHandshake()
    with pytest.raises(LocalProtocolError):  # the greeting
        server.state()
    server.data_to_send()
    for number, event in ((w.LIST, ListExports), (w.ABORT, None)):
        server = ServerHandshake()
        server.data_to_send()
        server.receive_data(w.client_flags() + w.option(number))
        found = server.next_event()
        assert event is None or isinstance(found, event)
        server.data_to_send()
        with pytest.raises(LocalProtocolError):
            server.state()
