"""Option haggling as a server, against messages written by hand."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import wirebytes as w

from nbdclone.errors import LocalProtocolError, RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.handshake_events import Aborted, Event, ListExports, Negotiated, OpenExport, Purpose
from nbdclone.protocol.wire import ExportInfo, Mode, TransmissionFlag, transmission_flags

WEB1 = ExportInfo("web1", 10 << 20, transmission_flags(False), "the first web server")


def greeted(flags: int = w.FIXED | w.NO_ZEROES) -> ServerHandshake:
    server = ServerHandshake()
    assert server.data_to_send() == [w.greeting()]
    server.receive_data(w.client_flags(flags))
    assert server.next_event() is None
    return server


def ask(server: ServerHandshake, number: int, data: bytes = b"") -> Event | None:
    server.receive_data(w.option(number, data))
    return server.next_event()


def replies(server: ServerHandshake) -> list[tuple[int, int, bytes]]:
    return w.option_replies(b"".join(server.data_to_send()))


def only_reply(server: ServerHandshake) -> tuple[int, int]:
    [(number, reply, _data)] = replies(server)
    return number, reply


def test_the_greeting_offers_fixed_newstyle_and_no_zeroes() -> None:
    server = ServerHandshake()
    assert server.data_to_send() == [b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"]
    assert server.data_to_send() == []


@pytest.mark.parametrize("flags", [1 << 2, 1 << 31, 0xFFFFFFFF])
def test_unknown_client_flags_are_fatal(flags: int) -> None:
    server = ServerHandshake()
    server.receive_data(w.client_flags(flags))
    with pytest.raises(RemoteProtocolError, match="client flags"):
        server.next_event()
    assert server.closed
    assert server.next_event() is None


@pytest.mark.parametrize("number", [0, w.PEEK_EXPORT, w.STARTTLS, 12, 0xFFFFFFFF])
@pytest.mark.parametrize("data", [b"", bytes(1000), bytes(wire.MAX_OPTION_LENGTH)])
def test_an_option_that_is_not_known_is_drained_and_answered_unsup(number: int, data: bytes) -> None:
    server = greeted()
    assert ask(server, number, data) is None
    assert only_reply(server) == (number, w.UNSUP)
    assert ask(server, w.LIST) == ListExports()


@pytest.mark.parametrize("number", [w.LIST, w.STRUCTURED_REPLY, w.EXTENDED_HEADERS])
def test_data_where_none_is_allowed_is_invalid_and_haggling_goes_on(number: int) -> None:
    server = greeted()
    assert ask(server, number, b"x") is None
    assert only_reply(server) == (number, w.INVALID)
    assert server.mode is Mode.SIMPLE
    assert ask(server, w.LIST) == ListExports()


@pytest.mark.parametrize("data", [b"", b"farewell"])
def test_abort_is_acknowledged_with_or_without_data(data: bytes) -> None:
    server = greeted()
    assert ask(server, w.ABORT, data) == Aborted()
    assert only_reply(server) == (w.ABORT, w.ACK)
    assert server.closed
    assert server.finished is None
    server.receive_data(b"whatever follows is ignored")
    assert server.next_event() is None


def test_an_option_without_its_magic_is_fatal() -> None:
    server = greeted()
    server.receive_data(b"IHAVEOPX" + bytes(8))
    with pytest.raises(RemoteProtocolError, match="magic"):
        server.next_event()
    assert server.closed


def test_an_option_that_is_too_long_is_fatal_before_its_data_come() -> None:
    server = greeted()
    server.receive_data(b"IHAVEOPT" + struct.pack(">II", w.GO, wire.MAX_OPTION_LENGTH + 1))
    with pytest.raises(RemoteProtocolError, match="limit"):
        server.next_event()


def test_haggling_without_end_is_fatal() -> None:
    server = greeted()
    for _ in range(wire.MAX_OPTIONS):
        assert ask(server, w.STARTTLS) is None
    server.receive_data(w.option(w.STARTTLS))
    with pytest.raises(RemoteProtocolError, match="options"):
        server.next_event()


def test_a_client_that_sends_ahead_without_end_is_stopped() -> None:
    server = greeted()
    assert ask(server, w.LIST) == ListExports()
    server.receive_data(bytes(wire.MAX_PIPELINED))
    with pytest.raises(RemoteProtocolError, match="ahead"):
        server.receive_data(b"x")
    assert server.closed


# NBD_OPT_LIST


def test_a_list_counts_as_many_options() -> None:
    server = greeted()
    for _ in range(wire.MAX_OPTIONS // wire.LIST_WEIGHT):
        assert ask(server, w.LIST) == ListExports()
        server.send_list([("web1", "")])
        server.data_to_send()
    with pytest.raises(RemoteProtocolError, match="more than 256 options"):
        ask(server, w.LIST)
    assert server.closed


def test_list_gives_one_message_for_each_export_and_an_ack() -> None:
    server = greeted()
    assert ask(server, w.LIST) == ListExports()
    assert server.next_event() is None, "nothing happens before the answer"
    server.send_list([("web1", "first"), ("größe", "")])
    messages = server.data_to_send()
    assert [w.option_replies(message) for message in messages] == [
        [(w.LIST, w.SERVER, w.listed(b"web1", b"first"))],
        [(w.LIST, w.SERVER, w.listed("größe".encode()))],
        [(w.LIST, w.ACK, b"")],
    ]


def test_options_behind_a_list_are_answered_behind_it() -> None:
    server = greeted()
    server.receive_data(w.option(w.LIST) + w.option(99) + w.option(w.LIST) + w.option(w.ABORT))
    names = [f"web{number}" for number in range(100)]
    while (event := server.next_event()) == ListExports():
        server.send_list([(name, "") for name in names])
    assert event == Aborted()
    told = [w.option_replies(message)[0] for batch in iter(server.data_to_send, []) for message in batch]
    listed = [(w.LIST, w.SERVER, w.listed(name.encode())) for name in names] + [(w.LIST, w.ACK, b"")]
    assert told[:101] == listed
    assert told[101][:2] == (99, w.UNSUP)
    assert told[102:203] == listed
    assert told[203:] == [(w.ABORT, w.ACK, b"")]


def test_an_empty_list_is_an_ack_alone() -> None:
    server = greeted()
    ask(server, w.LIST)
    server.send_list([])
    assert only_reply(server) == (w.LIST, w.ACK)


def test_a_listed_description_is_cut_at_a_character_below_1024_bytes() -> None:
    server = greeted()
    ask(server, w.LIST)
    server.send_list([("web1", "é" * 2000)])
    (_number, _reply, data), _ack = replies(server)
    assert data[8:].decode() == "é" * 511


@pytest.mark.parametrize("name", ["a\0b", "x" * 4097, "\ud800"])
def test_a_name_that_cannot_be_sent_is_the_callers_fault_and_sends_nothing(name: str) -> None:
    server = greeted()
    ask(server, w.LIST)
    with pytest.raises(LocalProtocolError):
        server.send_list([("web1", ""), (name, "")])
    assert server.data_to_send() == []
    server.send_list([("web1", "")])
    assert len(replies(server)) == 2


# NBD_OPT_EXPORT_NAME


@pytest.mark.parametrize(("flags", "padding"), [(w.FIXED | w.NO_ZEROES, 0), (w.FIXED, 124), (0, 124), (w.NO_ZEROES, 0)])
def test_export_name_is_answered_by_ten_bytes_and_124_zeros_unless_agreed_otherwise(flags: int, padding: int) -> None:
    server = greeted(flags)
    assert ask(server, w.EXPORT_NAME, b"web1") == OpenExport("web1", Purpose.EXPORT_NAME)
    server.accept_export(WEB1)
    assert server.data_to_send() == [struct.pack(">QH", WEB1.size, WEB1.flags) + bytes(padding)]
    assert server.finished == Negotiated(WEB1, Mode.SIMPLE)
    assert not server.closed


def test_export_name_of_nothing_means_the_default_export() -> None:
    server = greeted()
    assert ask(server, w.EXPORT_NAME) == OpenExport("", Purpose.EXPORT_NAME)


def test_a_refused_export_name_closes_without_a_word() -> None:
    server = greeted()
    ask(server, w.EXPORT_NAME, b"nobody")
    server.refuse_export("no such export")
    assert server.closed
    assert server.data_to_send() == []
    assert server.finished is None


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\0b", b"x" * 4097])
def test_an_export_name_that_is_no_string_is_fatal(name: bytes) -> None:
    server = greeted()
    server.receive_data(w.option(w.EXPORT_NAME, name))
    with pytest.raises(RemoteProtocolError, match="export name"):
        server.next_event()
    assert server.closed


@pytest.mark.parametrize("number", [w.ABORT, w.LIST, w.INFO, w.GO, w.STRUCTURED_REPLY, w.STARTTLS, 99])
def test_a_client_without_fixed_newstyle_may_send_export_name_alone(number: int) -> None:
    server = greeted(0)
    server.receive_data(w.option(number))
    with pytest.raises(RemoteProtocolError, match="fixed newstyle"):
        server.next_event()


def test_export_name_after_structured_replies_tells_df() -> None:
    server = greeted()
    ask(server, w.STRUCTURED_REPLY)
    assert only_reply(server) == (w.STRUCTURED_REPLY, w.ACK)
    ask(server, w.EXPORT_NAME, b"web1")
    server.accept_export(WEB1)
    assert server.data_to_send() == [struct.pack(">QH", WEB1.size, WEB1.flags | TransmissionFlag.SEND_DF)]


# NBD_OPT_GO, NBD_OPT_INFO


def test_go_answers_block_sizes_before_the_export_although_nothing_was_asked() -> None:
    server = greeted()
    assert ask(server, w.GO, w.export_request(b"web1")) == OpenExport("web1", Purpose.GO)
    server.accept_export(WEB1)
    assert replies(server) == [
        (w.GO, w.REP_INFO, w.info_block_size(1, 4096, 32 << 20)),
        (w.GO, w.REP_INFO, w.info_export(WEB1.size, WEB1.flags)),
        (w.GO, w.ACK, b""),
    ]
    assert server.finished == Negotiated(WEB1, Mode.SIMPLE)


def test_go_tells_name_and_description_when_asked_and_ignores_what_it_does_not_know() -> None:
    server = greeted()
    wanted = w.export_request(b"", 2, 1, 77, 3, 0)
    assert ask(server, w.GO, wanted) == OpenExport("", Purpose.GO, wants_description=True)
    server.accept_export(WEB1)
    _sizes, _export, *rest = replies(server)
    assert rest == [
        (w.GO, w.REP_INFO, b"\x00\x01web1"),
        (w.GO, w.REP_INFO, b"\x00\x02the first web server"),
        (w.GO, w.ACK, b""),
    ]


def test_an_export_without_a_description_tells_none() -> None:
    server = greeted()
    ask(server, w.GO, w.export_request(b"x", 2))
    server.accept_export(ExportInfo("x", 512, 1))
    assert len(replies(server)) == 3


def test_every_reply_is_a_message_of_its_own() -> None:
    server = greeted()
    ask(server, w.GO, w.export_request(b"web1", 1, 2))
    server.accept_export(WEB1)
    messages = server.data_to_send()
    assert len(messages) == 5
    assert all(len(w.option_replies(message)) == 1 for message in messages)


def test_structured_replies_add_df_to_the_flags() -> None:
    server = greeted()
    ask(server, w.STRUCTURED_REPLY)
    ask(server, w.GO, w.export_request(b"web1"))
    server.accept_export(WEB1)
    flags = WEB1.flags | TransmissionFlag.SEND_DF
    assert (w.GO, w.REP_INFO, w.info_export(WEB1.size, flags)) in replies(server)
    assert server.finished is not None
    assert server.finished.mode is Mode.STRUCTURED
    assert server.finished.export.flags == flags


# NBD_OPT_EXTENDED_HEADERS


def test_extended_headers_add_df_to_the_flags_and_need_no_structured_replies() -> None:
    server = greeted()
    ask(server, w.EXTENDED_HEADERS)
    assert only_reply(server) == (w.EXTENDED_HEADERS, w.ACK)
    ask(server, w.GO, w.export_request(b"web1"))
    server.accept_export(WEB1)
    assert server.finished == Negotiated(replace(WEB1, flags=WEB1.flags | TransmissionFlag.SEND_DF), Mode.EXTENDED)


def test_extended_headers_take_the_place_of_structured_replies_and_not_the_other_way() -> None:
    server = greeted()
    for number, reply in [
        (w.STRUCTURED_REPLY, w.ACK),
        (w.EXTENDED_HEADERS, w.ACK),
        (w.STRUCTURED_REPLY, w.EXT_HEADER_REQD),
        (w.EXTENDED_HEADERS, w.ACK),
    ]:
        ask(server, number)
        assert only_reply(server) == (number, reply)
    assert server.mode is Mode.EXTENDED


def test_export_name_after_extended_headers_is_fatal() -> None:
    server = greeted()
    ask(server, w.EXTENDED_HEADERS)
    server.receive_data(w.option(w.EXPORT_NAME, b"web1"))
    with pytest.raises(RemoteProtocolError, match="EXPORT_NAME"):
        server.next_event()
    assert server.closed


@pytest.mark.parametrize("mode", [w.STRUCTURED_REPLY, w.EXTENDED_HEADERS])
@pytest.mark.parametrize("contexts", [b"base:allocation", b"base:nothing"])
@pytest.mark.parametrize("selected_for", [b"web1", b"web2"])
def test_a_payload_for_block_status_is_offered_with_extended_headers_and_contexts(
    mode: int, contexts: bytes, selected_for: bytes
) -> None:
    server = greeted()
    ask(server, mode)
    ask(server, w.SET_CONTEXTS, w.context_request(selected_for, contexts))
    ask(server, w.GO, w.export_request(b"web1"))
    server.accept_export(WEB1)
    assert server.finished is not None
    offered = bool(server.finished.export.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD)
    assert offered == (mode == w.EXTENDED_HEADERS and contexts == b"base:allocation" and selected_for == b"web1")


def test_info_does_not_finish_and_go_afterwards_tells_the_same() -> None:
    server = greeted()
    assert ask(server, w.INFO, w.export_request(b"web1", 1)) == OpenExport("web1", Purpose.INFO)
    server.accept_export(WEB1)
    told = replies(server)
    assert server.finished is None
    assert ask(server, w.GO, w.export_request(b"web1", 1)) == OpenExport("web1", Purpose.GO)
    server.accept_export(WEB1)
    assert [reply[1:] for reply in replies(server)] == [reply[1:] for reply in told]
    assert server.finished is not None


def test_a_refused_go_leaves_haggling_usable() -> None:
    server = greeted()
    ask(server, w.GO, w.export_request(b"nobody"))
    server.refuse_export("there is no nobody")
    assert replies(server) == [(w.GO, w.UNKNOWN, b"there is no nobody")]
    ask(server, w.GO, w.export_request(b"web1"))
    server.refuse_export("going down", wire.OptionReply.ERR_SHUTDOWN)
    assert only_reply(server) == (w.GO, w.SHUTDOWN)
    ask(server, w.GO, w.export_request(b"web1"))
    server.accept_export(WEB1)
    assert server.finished is not None
    assert not server.closed


@pytest.mark.parametrize("number", [w.INFO, w.GO])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\0\0",
        struct.pack(">I", 0xFFFFFFFF) + b"\0\0",
        struct.pack(">I", 5) + b"web1\0\0",
        struct.pack(">I", 3) + b"web1\0\0",
        struct.pack(">I", 4) + b"web1" + b"\0\2\0\1",
        struct.pack(">I", 4) + b"web1" + b"\0\1\0\1\0\1",
        struct.pack(">I", 4) + b"web1" + b"\xff\xff",
        struct.pack(">I", 4) + b"web1" + b"\0\1\0",
        w.export_request(b"\xff\xfe"),
        w.export_request(b"a\0b"),
    ],
)
def test_a_go_whose_inner_lengths_lie_is_invalid_and_haggling_goes_on(number: int, data: bytes) -> None:
    server = greeted()
    assert ask(server, number, data) is None
    assert only_reply(server) == (number, w.INVALID)
    assert ask(server, w.GO, w.export_request(b"web1")) == OpenExport("web1", Purpose.GO)


def test_names_up_to_4096_bytes_are_taken_and_longer_ones_are_too_big() -> None:
    server = greeted()
    assert ask(server, w.GO, w.export_request(b"x" * 4097)) is None
    assert only_reply(server) == (w.GO, w.TOO_BIG)
    assert ask(server, w.GO, w.export_request(b"x" * 4096)) == OpenExport("x" * 4096, Purpose.GO)


def test_an_error_text_is_cut_to_what_every_client_reads() -> None:
    server = greeted()
    ask(server, w.GO, w.export_request(b"web1"))
    server.refuse_export("é" * 3000)
    [(_number, _reply, data)] = replies(server)
    assert data.decode() == "é" * 500


def test_what_follows_the_last_option_belongs_to_the_transmission() -> None:
    server = greeted()
    server.receive_data(w.option(w.GO, w.export_request(b"web1")) + b"first request")
    assert server.next_event() == OpenExport("web1", Purpose.GO)
    server.receive_data(b" and more")
    with pytest.raises(LocalProtocolError):
        server.trailing_data()
    server.accept_export(WEB1)
    assert server.next_event() is None
    assert server.trailing_data() == b"first request and more"
    assert server.trailing_data() == b""
    with pytest.raises(LocalProtocolError):
        server.receive_data(b"too late")


def test_answers_that_nobody_asked_for_are_the_callers_fault() -> None:
    server = greeted()
    with pytest.raises(LocalProtocolError):
        server.send_list([])
    with pytest.raises(LocalProtocolError):
        server.accept_export(WEB1)
    with pytest.raises(LocalProtocolError):
        server.refuse_export("no")
    ask(server, w.LIST)
    with pytest.raises(LocalProtocolError):
        server.accept_export(WEB1)
    server.send_list([])
    ask(server, w.GO, w.export_request(b"web1"))
    with pytest.raises(LocalProtocolError):
        server.send_list([])
    with pytest.raises(LocalProtocolError, match="not an error"):
        server.refuse_export("no", w.ACK)
    assert only_reply(server) == (w.LIST, w.ACK)


@pytest.mark.parametrize(
    "info",
    [
        ExportInfo("x", -1, 1),
        ExportInfo("x", 1 << 64, 1),
        ExportInfo("x", 1, 1 << 16),
        ExportInfo("x", 1, 1, minimum_block=0),
        ExportInfo("x", 1, 1, maximum_payload=1 << 32),
        ExportInfo("a\0b", 1, 1),
    ],
)
def test_an_export_that_does_not_fit_the_wire_is_the_callers_fault_and_sends_nothing(info: ExportInfo) -> None:
    server = greeted()
    ask(server, w.GO, w.export_request(b"x", 1))
    with pytest.raises(LocalProtocolError):
        server.accept_export(info)
    assert server.data_to_send() == []
    server.accept_export(WEB1)
    assert server.finished is not None


def test_a_writable_export_offers_everything_but_df() -> None:
    flag = TransmissionFlag
    assert transmission_flags(read_only=False) == (
        flag.HAS_FLAGS
        | flag.SEND_FLUSH
        | flag.SEND_FUA
        | flag.SEND_TRIM
        | flag.SEND_WRITE_ZEROES
        | flag.CAN_MULTI_CONN
        | flag.SEND_CACHE
        | flag.SEND_FAST_ZERO
    )


def test_a_read_only_export_offers_nothing_that_writes() -> None:
    flag = TransmissionFlag
    assert transmission_flags(read_only=True) == (
        flag.HAS_FLAGS | flag.READ_ONLY | flag.SEND_FLUSH | flag.CAN_MULTI_CONN | flag.SEND_CACHE
    )
