"""Option haggling as a client: against messages written by hand, and joined to the server's side in memory."""

from __future__ import annotations

import struct

import pytest
import wirebytes as w

from nbdclone.errors import LocalProtocolError, RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.client_handshake import (
    ClientEvent,
    ClientHandshake,
    ExportDescribed,
    ExportList,
    Opened,
    Ready,
    Refused,
)
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.handshake_events import Aborted, ListExports, OpenExport, Purpose
from nbdclone.protocol.wire import ExportInfo, Mode, TransmissionFlag, transmission_flags

EXPORTS = {
    "web1": ExportInfo("web1", 10 << 20, transmission_flags(False), "the first web server"),
    "größe": ExportInfo("größe", 0, transmission_flags(True)),
}
STRUCTURED_ACK = w.option_reply(w.STRUCTURED_REPLY, w.ACK)
EXTENDED_ACK = w.option_reply(w.EXTENDED_HEADERS, w.ACK)


def joined() -> tuple[ClientHandshake, ServerHandshake]:
    client, server = ClientHandshake(), ServerHandshake()
    assert exchange(client, server) == [Ready()]
    return client, server


def exchange(client: ClientHandshake, server: ServerHandshake) -> list[ClientEvent]:
    """Carry messages back and forth until both are silent; returns the client's events."""
    events: list[ClientEvent] = []
    while True:
        to_client, to_server = server.data_to_send(), client.data_to_send()
        if not to_client and not to_server:
            return events
        for message in to_client:
            client.receive_data(message)
            while (event := client.next_event()) is not None:
                events.append(event)
        for message in to_server:
            server.receive_data(message)
            serve(server)


def serve(server: ServerHandshake) -> None:
    while (event := server.next_event()) is not None:
        match event:
            case ListExports():
                server.send_list((info.name, info.description) for info in EXPORTS.values())
            case OpenExport(name, _purpose):
                if name in EXPORTS:
                    server.accept_export(EXPORTS[name])
                else:
                    server.refuse_export(f"there is no {name}")
            case Aborted():
                pass


def test_extended_headers_are_agreed_on_before_anything_is_asked() -> None:
    client, server = joined()
    assert client.mode is server.mode is Mode.EXTENDED


def test_a_list_comes_through_whole() -> None:
    client, server = joined()
    client.list_exports()
    assert exchange(client, server) == [ExportList((("web1", "the first web server"), ("größe", "")))]


@pytest.mark.parametrize("name", list(EXPORTS))
def test_info_and_go_tell_all_there_is_to_know(name: str) -> None:
    client, server = joined()
    info = EXPORTS[name]
    expected = ExportInfo(name, info.size, info.flags | TransmissionFlag.SEND_DF, info.description)
    client.info(name)
    assert exchange(client, server) == [ExportDescribed(expected)]
    client.go(name)
    [event] = exchange(client, server)
    assert client.finished is not None
    assert event == Opened(client.finished)
    assert client.finished == server.finished
    assert client.finished.export == expected


def test_a_refusal_carries_code_and_text_and_something_else_may_be_asked() -> None:
    client, server = joined()
    client.go("nobody")
    assert exchange(client, server) == [Refused(w.GO, w.UNKNOWN, "there is no nobody")]
    client.go("web1")
    assert isinstance(exchange(client, server)[0], Opened)


@pytest.mark.parametrize("reply", [*(kind for kind in wire.OptionReply if kind >= 1 << 31), (1 << 31) + 77])
def test_a_refusal_of_any_kind_is_passed_on_but_for_unsup_to_go(reply: int) -> None:
    client = going()
    event = answer(client, w.option_reply(w.GO, reply, b"no"))
    if reply == wire.OptionReply.ERR_UNSUP:
        assert event is None
        assert client.data_to_send() == [w.option(w.EXPORT_NAME, b"web1")]
    else:
        assert event == Refused(w.GO, reply, "no")


def test_abort_ends_both_sides() -> None:
    client, server = joined()
    client.abort()
    assert exchange(client, server) == [Aborted()]
    assert client.closed
    assert server.closed


# Against a server written by hand


def greeted(flags: int = w.FIXED | w.NO_ZEROES) -> ClientHandshake:
    """A client to which the server said hello, and agreed to structured replies where it could."""
    client = ClientHandshake()
    client.receive_data(w.greeting(flags))
    if flags & w.FIXED:
        assert client.next_event() is None
        assert client.data_to_send() == [w.client_flags(flags), w.option(w.EXTENDED_HEADERS)]
        client.receive_data(w.option_reply(w.EXTENDED_HEADERS, w.UNSUP))
        assert client.next_event() is None
        assert client.data_to_send() == [w.option(w.STRUCTURED_REPLY)]
        client.receive_data(STRUCTURED_ACK)
    assert client.next_event() == Ready()
    return client


def going(name: str = "web1") -> ClientHandshake:
    client = greeted()
    client.go(name)
    assert client.data_to_send() == [w.option(w.GO, w.export_request(name.encode(), 1, 2, 3))]
    return client


def answer(client: ClientHandshake, *messages: bytes) -> ClientEvent | None:
    client.receive_data(b"".join(messages))
    return client.next_event()


def test_an_oldstyle_server_is_named_as_such() -> None:
    client = ClientHandshake()
    oldstyle = b"NBDMAGIC" + bytes.fromhex("0000420281861253") + struct.pack(">QI", 1 << 20, 1) + bytes(124)
    with pytest.raises(RemoteProtocolError, match="oldstyle"):
        answer(client, oldstyle)
    assert client.closed


def test_a_server_of_another_kind_is_named_as_such() -> None:
    with pytest.raises(RemoteProtocolError, match="not an NBD server"):
        answer(ClientHandshake(), b"SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n")


def test_unknown_handshake_flags_are_ignored() -> None:
    client = ClientHandshake()
    client.receive_data(w.greeting(0xFFFF))
    assert client.next_event() is None
    assert client.data_to_send()[0] == w.client_flags(w.FIXED | w.NO_ZEROES)


@pytest.mark.parametrize("refusal", [w.UNSUP, w.POLICY, w.INVALID, w.EXT_HEADER_REQD])
def test_a_server_without_structured_replies_is_taken_as_it_is(refusal: int) -> None:
    client = ClientHandshake()
    refusals = [w.option_reply(option, refusal, b"what?") for option in (w.EXTENDED_HEADERS, w.STRUCTURED_REPLY)]
    assert answer(client, w.greeting(), *refusals) == Ready()
    assert client.mode is Mode.SIMPLE


@pytest.mark.parametrize("wanted", Mode)
def test_no_more_is_asked_for_than_is_wanted(wanted: Mode) -> None:
    client = ClientHandshake(wanted)
    client.receive_data(w.greeting())
    options = {Mode.SIMPLE: [], Mode.STRUCTURED: [w.STRUCTURED_REPLY], Mode.EXTENDED: [w.EXTENDED_HEADERS]}[wanted]
    assert (client.next_event() == Ready()) == (not options)
    assert client.data_to_send() == [w.client_flags(), *map(w.option, options)]
    if options:
        assert answer(client, *(w.option_reply(number, w.ACK) for number in options)) == Ready()
    assert client.mode is wanted


def test_a_server_with_extended_headers_must_know_go() -> None:
    client = ClientHandshake()
    assert answer(client, w.greeting(), EXTENDED_ACK) == Ready()
    client.go("web1")
    with pytest.raises(RemoteProtocolError, match="NBD_OPT_GO"):
        answer(client, w.option_reply(w.GO, w.UNSUP))


def test_go_falls_back_to_export_name() -> None:
    client = going()
    assert answer(client, w.option_reply(w.GO, w.UNSUP)) is None
    assert client.data_to_send() == [w.option(w.EXPORT_NAME, b"web1")]
    event = answer(client, struct.pack(">QH", 4096, 3) + b"rest")
    assert isinstance(event, Opened)
    assert event.negotiated.export == ExportInfo("web1", 4096, 3)
    assert event.negotiated.mode is Mode.STRUCTURED
    assert client.trailing_data() == b"rest"
    assert client.trailing_data() == b""


@pytest.mark.parametrize("flags", [0, w.NO_ZEROES])
def test_a_server_without_fixed_newstyle_is_asked_by_export_name_at_once(flags: int) -> None:
    client = greeted(flags)
    assert client.data_to_send() == [w.client_flags(flags)]
    client.list_exports()
    refused = client.next_event()
    assert isinstance(refused, Refused)
    assert refused.code == w.UNSUP
    client.go("web1")
    assert client.data_to_send() == [w.option(w.EXPORT_NAME, b"web1")]
    padding = bytes(0 if flags else 124)
    event = answer(client, struct.pack(">QH", 4096, 1) + padding)
    assert isinstance(event, Opened)
    assert client.trailing_data() == b""


def test_information_that_is_not_understood_is_ignored() -> None:
    event = answer(
        going(),
        w.option_reply(w.GO, w.REP_INFO, b"\xff\xffwhatever"),
        w.option_reply(w.GO, w.REP_INFO, w.info_export(512, 1)),
        w.option_reply(w.GO, w.ACK),
    )
    assert isinstance(event, Opened)
    assert event.negotiated.export == ExportInfo("web1", 512, 1)


def test_the_servers_name_and_sizes_count() -> None:
    event = answer(
        going(),
        w.option_reply(w.GO, w.REP_INFO, b"\0\1canonical"),
        w.option_reply(w.GO, w.REP_INFO, b"\0\2what it is"),
        w.option_reply(w.GO, w.REP_INFO, w.info_block_size(512, 65536, 1 << 20)),
        w.option_reply(w.GO, w.REP_INFO, w.info_export(512, 1)),
        w.option_reply(w.GO, w.ACK),
    )
    assert isinstance(event, Opened)
    assert event.negotiated.export == ExportInfo("canonical", 512, 1, "what it is", 512, 65536, 1 << 20)


LIES = {
    "no magic": b"\0" * 20,
    "another option": w.option_reply(w.LIST, w.ACK),
    "another option's ack": w.option_reply(w.GO, w.REP_INFO, w.info_export(1, 1)) + w.option_reply(w.INFO, w.ACK),
    "an unknown type": w.option_reply(w.GO, 77),
    "a type of another option": w.option_reply(w.GO, w.SERVER, w.listed(b"x")),
    "an endless reply": bytes.fromhex("0003e889045565a9") + struct.pack(">III", w.GO, w.REP_INFO, 0xFFFFFFFF),
    "an ack with data": w.option_reply(w.GO, w.ACK, b"x"),
    "an ack without a size": w.option_reply(w.GO, w.ACK),
    "information without its type": w.option_reply(w.GO, w.REP_INFO, b"\0"),
    "a short size": w.option_reply(w.GO, w.REP_INFO, b"\0\0\0"),
    "a long size": w.option_reply(w.GO, w.REP_INFO, w.info_export(1, 1) + b"x"),
    "short block sizes": w.option_reply(w.GO, w.REP_INFO, b"\0\3" + bytes(11)),
    "blocks of 0": w.option_reply(w.GO, w.REP_INFO, w.info_block_size(0, 4096, 1 << 20)),
    "blocks of 3": w.option_reply(w.GO, w.REP_INFO, w.info_block_size(3, 4096, 1 << 20)),
    "blocks of 128 KiB": w.option_reply(w.GO, w.REP_INFO, w.info_block_size(1 << 17, 1 << 17, 1 << 20)),
    "a payload below the preferred": w.option_reply(w.GO, w.REP_INFO, w.info_block_size(1, 4096, 512)),
    "preferred below the minimum": w.option_reply(w.GO, w.REP_INFO, w.info_block_size(4096, 512, 1 << 20)),
    "a name with NUL": w.option_reply(w.GO, w.REP_INFO, b"\0\1a\0b"),
    "a name that is no UTF-8": w.option_reply(w.GO, w.REP_INFO, b"\0\1\xff"),
}


@pytest.mark.parametrize("message", LIES.values(), ids=LIES)
def test_a_lying_answer_to_go_is_the_servers_fault(message: bytes) -> None:
    client = going()
    with pytest.raises(RemoteProtocolError):
        answer(client, message)
    assert client.closed
    assert client.finished is None
    assert client.next_event() is None


@pytest.mark.parametrize(
    "data", [b"", b"\0\0\0", struct.pack(">I", 5) + b"web1", struct.pack(">I", 0xFFFFFFFF), w.listed(b"\xff")]
)
def test_a_lying_list_is_the_servers_fault(data: bytes) -> None:
    client = greeted()
    client.list_exports()
    with pytest.raises(RemoteProtocolError):
        answer(client, w.option_reply(w.LIST, w.SERVER, data))


def test_a_list_without_end_is_cut_off() -> None:
    client = greeted()
    client.list_exports()
    message = w.option_reply(w.LIST, w.SERVER, w.listed(b"x" * 4000, b"y" * 60000))
    for _ in range(wire.MAX_LIST_LENGTH // len(message)):
        assert answer(client, message) is None
    with pytest.raises(RemoteProtocolError, match="list"):
        answer(client, message)


def test_an_option_reply_that_is_too_long_is_refused_before_it_comes() -> None:
    head = struct.Struct(">QIII")
    for length in (wire.MAX_REPLY_LENGTH, wire.MAX_REPLY_LENGTH + 1):
        client = greeted()
        client.list_exports()
        message = head.pack(wire.REPLY_MAGIC, w.LIST, w.SERVER, length)
        if length <= wire.MAX_REPLY_LENGTH:
            assert answer(client, message) is None
        else:
            with pytest.raises(RemoteProtocolError, match="limit"):
                answer(client, message)


def test_a_server_that_speaks_unasked_is_at_fault() -> None:
    client = greeted()
    with pytest.raises(RemoteProtocolError, match="asked"):
        answer(client, w.option_reply(w.LIST, w.ACK))


def test_a_refusal_without_good_text_is_readable_still() -> None:
    client = going()
    assert answer(client, w.option_reply(w.GO, (1 << 31) + 500, b"\xffno")) == Refused(
        w.GO, (1 << 31) + 500, "\ufffdno"
    )


def test_asking_too_early_twice_or_too_late_is_the_callers_fault() -> None:
    client = ClientHandshake()
    with pytest.raises(LocalProtocolError):
        client.list_exports()
    client = going()
    with pytest.raises(LocalProtocolError):
        client.list_exports()
    with pytest.raises(LocalProtocolError):
        client.trailing_data()
    answer(client, w.option_reply(w.GO, w.REP_INFO, w.info_export(1, 1)), w.option_reply(w.GO, w.ACK))
    with pytest.raises(LocalProtocolError):
        client.info("web1")


@pytest.mark.parametrize("name", ["a\0b", "x" * 4097, "\ud800"])
def test_a_name_that_cannot_be_sent_is_the_callers_fault(name: str) -> None:
    client = greeted()
    client.data_to_send()
    with pytest.raises(LocalProtocolError):
        client.go(name)
    assert client.data_to_send() == []


def test_purposes_have_the_numbers_of_their_options() -> None:
    assert [purpose.value for purpose in Purpose] == [w.EXPORT_NAME, w.INFO, w.GO]
