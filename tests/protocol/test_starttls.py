"""NBD_OPT_STARTTLS in both roles, in bytes alone: what may be asked before TLS, and what may not come ahead."""

from __future__ import annotations

import pytest
import wirebytes as w

from nbdclone.errors import LocalProtocolError, RemoteProtocolError
from nbdclone.protocol.client_handshake import ClientHandshake, ExportDescribed, Opened, Ready, Refused
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.handshake_events import Aborted, Event, ListExports, OpenExport, Purpose, StartTLS, TLSMode
from nbdclone.protocol.wire import ExportInfo, Mode, transmission_flags

WEB1 = ExportInfo("web1", 10 << 20, transmission_flags(False))
OFFERING = [TLSMode.ON, TLSMode.REQUIRED]


def greeted(mode: TLSMode, flags: int = w.FIXED | w.NO_ZEROES) -> ServerHandshake:
    server = ServerHandshake(mode)
    server.data_to_send()
    server.receive_data(w.client_flags(flags))
    assert server.next_event() is None
    return server


def secured(mode: TLSMode) -> ServerHandshake:
    server = greeted(mode)
    assert ask(server, w.STARTTLS) == StartTLS()
    assert replies(server) == [(w.STARTTLS, w.ACK)]
    server.tls_started()
    return server


def ask(server: ServerHandshake, number: int, data: bytes = b"") -> Event | None:
    server.receive_data(w.option(number, data))
    return server.next_event()


def replies(server: ServerHandshake) -> list[tuple[int, int]]:
    return [(number, reply) for number, reply, _data in w.option_replies(b"".join(server.data_to_send()))]


# The server


@pytest.mark.parametrize("data", [b"", b"x"])
def test_a_server_without_tls_answers_unsup_and_haggling_goes_on(data: bytes) -> None:
    server = greeted(TLSMode.OFF)
    assert ask(server, w.STARTTLS, data) is None
    assert replies(server) == [(w.STARTTLS, w.UNSUP)]
    assert ask(server, w.LIST) == ListExports()


@pytest.mark.parametrize("mode", OFFERING)
def test_starttls_is_acknowledged_and_haggling_goes_on_within_tls(mode: TLSMode) -> None:
    server = secured(mode)
    assert ask(server, w.LIST) == ListExports()
    server.send_list([])
    assert replies(server) == [(w.LIST, w.ACK)]
    assert ask(server, w.GO, w.export_request(b"web1")) == OpenExport("web1", Purpose.GO)
    server.accept_export(WEB1)
    assert server.finished is not None


@pytest.mark.parametrize("mode", OFFERING)
def test_starttls_is_taken_byte_by_byte(mode: TLSMode) -> None:
    server = greeted(mode)
    events = []
    for byte in w.option(w.STARTTLS):
        server.receive_data(bytes([byte]))
        events.append(server.next_event())
    assert events == [None] * 15 + [StartTLS()]
    assert server.next_event() is None, "nothing happens before TLS"


@pytest.mark.parametrize("mode", OFFERING)
def test_a_second_starttls_is_invalid_and_haggling_goes_on(mode: TLSMode) -> None:
    server = secured(mode)
    assert ask(server, w.STARTTLS) is None
    assert replies(server) == [(w.STARTTLS, w.INVALID)]
    assert ask(server, w.LIST) == ListExports()


@pytest.mark.parametrize("mode", OFFERING)
def test_starttls_with_data_is_invalid_and_can_be_asked_again(mode: TLSMode) -> None:
    server = greeted(mode)
    assert ask(server, w.STARTTLS, b"x") is None
    assert replies(server) == [(w.STARTTLS, w.INVALID)]
    assert ask(server, w.STARTTLS) == StartTLS()


@pytest.mark.parametrize("number", [0, w.LIST, w.INFO, w.GO, w.STRUCTURED_REPLY, w.SET_CONTEXTS, 99])
def test_before_a_required_tls_every_option_is_refused_whatever_its_data(number: int) -> None:
    server = greeted(TLSMode.REQUIRED)
    for data in (b"", w.export_request(b"web1"), b"\xff" * 1000):
        assert ask(server, number, data) is None
        assert replies(server) == [(number, w.TLS_REQD)]
    assert server.mode is Mode.SIMPLE
    assert ask(server, w.STARTTLS) == StartTLS()


def test_before_a_required_tls_abort_is_taken() -> None:
    server = greeted(TLSMode.REQUIRED)
    assert ask(server, w.ABORT) == Aborted()
    assert replies(server) == [(w.ABORT, w.ACK)]


@pytest.mark.parametrize("flags", [0, w.FIXED])
def test_before_a_required_tls_export_name_is_fatal(flags: int) -> None:
    server = greeted(TLSMode.REQUIRED, flags)
    with pytest.raises(RemoteProtocolError, match="without TLS"):
        ask(server, w.EXPORT_NAME, b"web1")
    assert server.closed
    assert server.data_to_send() == []


def test_after_tls_export_name_opens_an_export() -> None:
    server = secured(TLSMode.REQUIRED)
    assert ask(server, w.EXPORT_NAME, b"web1") == OpenExport("web1", Purpose.EXPORT_NAME)


def test_where_tls_is_the_clients_choice_it_may_do_without() -> None:
    server = greeted(TLSMode.ON)
    assert ask(server, w.GO, w.export_request(b"web1")) == OpenExport("web1", Purpose.GO)
    server.accept_export(WEB1)
    assert server.finished is not None


def test_what_was_negotiated_before_tls_is_forgotten() -> None:
    server = greeted(TLSMode.ON)
    ask(server, w.STRUCTURED_REPLY)
    ask(server, w.SET_CONTEXTS, w.context_request(b"web1", b"base:allocation"))
    assert server.mode is Mode.STRUCTURED
    assert ask(server, w.STARTTLS) == StartTLS()
    server.tls_started()
    assert server.mode is Mode.SIMPLE
    server.data_to_send()
    assert ask(server, w.SET_CONTEXTS, w.context_request(b"web1", b"base:allocation")) is None
    assert replies(server) == [(w.SET_CONTEXTS, w.INVALID)], "structured replies are to be agreed on again"
    ask(server, w.STRUCTURED_REPLY)
    ask(server, w.GO, w.export_request(b"web1"))
    server.accept_export(WEB1)
    assert server.finished is not None
    assert server.finished.contexts == ()


def test_contexts_that_were_selected_before_tls_do_not_count() -> None:
    server = greeted(TLSMode.ON)
    ask(server, w.STRUCTURED_REPLY)
    ask(server, w.SET_CONTEXTS, w.context_request(b"web1", b"base:allocation"))
    assert ask(server, w.STARTTLS) == StartTLS()
    server.tls_started()
    ask(server, w.STRUCTURED_REPLY)
    ask(server, w.GO, w.export_request(b"web1"))
    server.accept_export(WEB1)
    assert server.finished is not None
    assert (server.finished.mode, server.finished.contexts) == (Mode.STRUCTURED, ())


@pytest.mark.parametrize("mode", OFFERING)
@pytest.mark.parametrize("ahead", [b"\x16", w.option(w.LIST), w.option(w.STARTTLS), b"I"])
def test_bytes_behind_starttls_in_the_same_segment_are_an_attack(mode: TLSMode, ahead: bytes) -> None:
    server = greeted(mode)
    server.receive_data(w.option(w.STARTTLS) + ahead)
    with pytest.raises(RemoteProtocolError, match="ahead of the TLS handshake"):
        server.next_event()
    assert server.closed
    assert server.data_to_send() == [], "it is not acknowledged either"


@pytest.mark.parametrize("mode", OFFERING)
def test_bytes_between_starttls_and_tls_are_an_attack(mode: TLSMode) -> None:
    server = greeted(mode)
    assert ask(server, w.STARTTLS) == StartTLS()
    with pytest.raises(RemoteProtocolError, match="ahead of the TLS handshake"):
        server.receive_data(w.option(w.LIST))
    assert server.closed


def test_a_server_cannot_start_tls_unasked() -> None:
    with pytest.raises(LocalProtocolError):
        greeted(TLSMode.ON).tls_started()


# The client


def asked(server_flags: int = w.FIXED | w.NO_ZEROES) -> ClientHandshake:
    """A client that wants TLS, greeted."""
    client = ClientHandshake(tls=True)
    client.receive_data(w.greeting(server_flags))
    return client


def test_a_client_asks_for_tls_before_all_else() -> None:
    client = asked()
    assert client.next_event() is None
    assert client.data_to_send() == [w.client_flags(), w.option(w.STARTTLS)]


@pytest.mark.parametrize("size", [1, 1000])
def test_a_client_haggles_within_tls(size: int) -> None:
    client = asked()
    events = []
    stream = w.option_reply(w.STARTTLS, w.ACK)
    for start in range(0, len(stream), size):
        client.receive_data(stream[start : start + size])
        events.append(client.next_event())
    assert events[-1] == StartTLS()
    client.data_to_send()
    assert client.next_event() is None
    client.tls_started()
    assert client.data_to_send() == [w.option(w.EXTENDED_HEADERS)]
    client.receive_data(w.option_reply(w.EXTENDED_HEADERS, w.ACK))
    assert client.next_event() == Ready()


@pytest.mark.parametrize("reply", [w.UNSUP, w.POLICY, w.INVALID])
def test_a_client_that_is_refused_tls_asks_for_nothing_more(reply: int) -> None:
    client = asked()
    client.receive_data(w.option_reply(w.STARTTLS, reply, b"no"))
    assert client.next_event() == Refused(w.STARTTLS, reply, "no")
    assert client.closed
    with pytest.raises(LocalProtocolError):
        client.go("web1")


@pytest.mark.parametrize("flags", [0, w.NO_ZEROES])
def test_a_client_does_not_do_without_tls_where_a_server_seems_too_old_for_it(flags: int) -> None:
    client = asked(flags)
    event = client.next_event()
    assert isinstance(event, Refused)
    assert event.option == w.STARTTLS
    assert client.closed


@pytest.mark.parametrize("ahead", [b"\x16", w.option_reply(w.STRUCTURED_REPLY, w.ACK)])
def test_bytes_behind_the_acknowledgement_are_an_attack(ahead: bytes) -> None:
    client = asked()
    client.receive_data(w.option_reply(w.STARTTLS, w.ACK) + ahead)
    with pytest.raises(RemoteProtocolError, match="ahead of the TLS handshake"):
        client.next_event()
    assert client.closed


def test_bytes_between_the_acknowledgement_and_tls_are_an_attack() -> None:
    client = asked()
    client.receive_data(w.option_reply(w.STARTTLS, w.ACK))
    assert client.next_event() == StartTLS()
    with pytest.raises(RemoteProtocolError, match="ahead of the TLS handshake"):
        client.receive_data(b"x")
    assert client.closed


@pytest.mark.parametrize("behind", [b"", b"ahead of TLS"])
def test_an_acknowledgement_with_data_breaks_the_protocol(behind: bytes) -> None:
    client = asked()
    client.receive_data(w.option_reply(w.STARTTLS, w.ACK, b"x") + behind)
    with pytest.raises(RemoteProtocolError, match="NBD_REP_ACK"):
        client.next_event()


def test_a_client_cannot_start_tls_that_was_not_agreed_on() -> None:
    with pytest.raises(LocalProtocolError):
        asked().tls_started()


@pytest.mark.parametrize("mode", OFFERING)
def test_both_sides_together(mode: TLSMode) -> None:
    client, server = ClientHandshake(tls=True), ServerHandshake(mode)
    seen: list[object] = []

    def carry() -> None:
        while (to_client := server.data_to_send()) + (to_server := client.data_to_send()):
            for message in to_client:
                client.receive_data(message)
                while (event := client.next_event()) is not None:
                    seen.append(event)
            for message in to_server:
                server.receive_data(message)
                while (asked := server.next_event()) is not None:
                    if isinstance(asked, OpenExport):
                        server.accept_export(WEB1)

    carry()
    assert seen == [StartTLS()]
    client.tls_started()
    server.tls_started()
    carry()
    assert seen == [StartTLS(), Ready()]
    client.info("web1")
    carry()
    client.go("web1")
    carry()
    described, opened = seen[2:]
    assert isinstance(described, ExportDescribed)
    assert isinstance(opened, Opened)
    assert opened.negotiated.mode is Mode.EXTENDED
