"""Metadata contexts and block status, on both sides: haggling, chunks, and a server's lies about them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import pytest
import wirebytes as w

from nbdclone.errors import LocalProtocolError, RemoteProtocolError
from nbdclone.protocol import block_status, wire
from nbdclone.protocol.block_status import CONTEXTS, merged, parse_status_filter, status_chunk, status_filter
from nbdclone.protocol.client_handshake import ClientHandshake, ContextsSet, Opened, Ready, Refused
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.handshake_events import FindSnapshots, OpenExport
from nbdclone.protocol.pending import Completed
from nbdclone.protocol.transmission import ClientTransmission
from nbdclone.protocol.wire import ExportInfo, Mode, transmission_flags

WEB1 = ExportInfo("web1", 10 << 20, transmission_flags(False))
ALL = [b"base:allocation", b"qemu:allocation-depth", b"nbdclone:origin"]
BOTH_OPTIONS = pytest.mark.parametrize("number", [w.LIST_CONTEXTS, w.SET_CONTEXTS])


def greeted(*, structured: bool = True) -> ServerHandshake:
    server = ServerHandshake()
    server.receive_data(w.client_flags() + (w.option(w.STRUCTURED_REPLY) if structured else b""))
    assert server.next_event() is None
    server.data_to_send()
    return server


def ask(
    server: ServerHandshake, number: int, data: bytes, snapshots: Sequence[str] = ()
) -> list[tuple[int, int, bytes]]:
    """The replies to an option about contexts, of an export with these snapshots beneath it."""
    server.receive_data(w.option(number, data))
    if (event := server.next_event()) is not None:
        assert isinstance(event, FindSnapshots)
        assert server.next_event() is None
        assert server.data_to_send() == []
        server.send_contexts(snapshots)
    return w.option_replies(b"".join(server.data_to_send()))


def names(replies: list[tuple[int, int, bytes]]) -> list[bytes]:
    """The names of the contexts in replies that end well."""
    assert replies[-1][1:] == (w.ACK, b"")
    assert all(reply == w.REP_CONTEXT for _number, reply, _data in replies[:-1])
    return [data[4:] for _number, _reply, data in replies[:-1]]


def go(server: ServerHandshake, name: bytes = b"web1", number: int = w.GO) -> tuple[tuple[int, str], ...]:
    """Open the export; the contexts that come with it."""
    server.receive_data(w.option(number, name if number == w.EXPORT_NAME else w.export_request(name)))
    assert isinstance(server.next_event(), OpenExport)
    server.accept_export(WEB1)
    assert server.finished is not None
    return server.finished.contexts


# NBD_OPT_LIST_META_CONTEXT


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], ALL),
        ([b"base:"], ALL[:1]),
        ([b"qemu:"], ALL[1:2]),
        ([b"nbdclone:"], ALL[2:]),
        ([b"base:allocation"], ALL[:1]),
        ([b"qemu:allocation-depth", b"base:", b"base:allocation"], ALL[:2]),
        ([b"base:unheard-of", b"qemu:dirty-bitmap:b0"], []),
        ([b"x-strange:thing", b"nbdclone:origin"], ALL[2:]),
        ([b"qemu:alloc", b"nbdclone:origin:"], []),
    ],
)
def test_list_gives_what_matches_once_and_ignores_what_it_does_not_know(
    queries: list[bytes], expected: list[bytes]
) -> None:
    server = greeted()
    replies = ask(server, w.LIST_CONTEXTS, w.context_request(b"web1", *queries))
    assert names(replies) == expected
    assert all(data[:4] == bytes(4) for _number, _reply, data in replies[:-1]), "ids are reserved here"
    assert go(server) == (), "a list selects nothing"


# NBD_OPT_SET_META_CONTEXT


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], []),
        ([b"base:allocation"], ALL[:1]),
        ([*ALL, *ALL], ALL),
        ([b"base:", b"qemu:", b"nbdclone:"], []),
        ([b"base:unheard-of", b"x-strange:thing", b"qemu:allocation-depth"], ALL[1:2]),
    ],
)
def test_set_selects_what_is_named_in_full_once_and_ignores_the_rest(
    queries: list[bytes], expected: list[bytes]
) -> None:
    server = greeted()
    replies = ask(server, w.SET_CONTEXTS, w.context_request(b"web1", *queries))
    assert names(replies) == expected
    ids = [struct.unpack_from(">I", data)[0] for _number, _reply, data in replies[:-1]]
    assert len(set(ids)) == len(ids)
    assert go(server) == tuple(zip(ids, [name.decode() for name in expected], strict=True))


# Contexts of snapshots

SNAPSHOTS = ["golden", "old"]
SINCE = [b"nbdclone:changed-since=golden", b"nbdclone:changed-since=old"]
BITMAPS = [b"qemu:dirty-bitmap:golden", b"qemu:dirty-bitmap:old"]
OF_SNAPSHOTS = [SINCE[0], BITMAPS[0], SINCE[1], BITMAPS[1]]


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ([], [*ALL, *OF_SNAPSHOTS]),
        ([b"base:"], ALL[:1]),
        ([b"qemu:"], [ALL[1], *BITMAPS]),
        ([b"nbdclone:"], [ALL[2], *SINCE]),
        ([b"qemu:dirty-bitmap:"], BITMAPS),
        ([b"nbdclone:changed-since="], SINCE),
        ([b"qemu:dirty-bitmap:old", b"qemu:dirty-bitmap:new"], BITMAPS[1:]),
        (
            [b"nbdclone:changed-since=old", b"qemu:dirty-bitmap:", b"base:allocation"],
            [ALL[0], BITMAPS[0], *SINCE[1:], BITMAPS[1]],
        ),
        (
            [b"nbdclone:changed-since", b"qemu:dirty-bitmap", b"qemu:dirty-bitmap:gold", b"nbdclone:changed-since=Old"],
            [],
        ),
    ],
)
def test_list_tells_of_the_snapshots_beneath_the_export(queries: list[bytes], expected: list[bytes]) -> None:
    server = greeted()
    replies = ask(server, w.LIST_CONTEXTS, w.context_request(b"web1", *queries), SNAPSHOTS)
    assert names(replies) == expected
    assert all(data[:4] == bytes(4) for _number, _reply, data in replies[:-1])
    assert go(server) == ()


def test_set_selects_the_snapshots_that_are_there_and_named_in_full() -> None:
    server = greeted()
    queries = [BITMAPS[1], b"qemu:dirty-bitmap:new", b"qemu:dirty-bitmap:", b"qemu:", ALL[0], SINCE[0], BITMAPS[1]]
    replies = ask(server, w.SET_CONTEXTS, w.context_request(b"web1", *queries), SNAPSHOTS)
    assert names(replies) == [ALL[0], SINCE[0], BITMAPS[1]]
    ids = [struct.unpack_from(">I", data)[0] for _number, _reply, data in replies[:-1]]
    assert len({0, *ids}) == 4
    assert go(server) == tuple(zip(ids, [name.decode() for name in (ALL[0], SINCE[0], BITMAPS[1])], strict=True))


def test_the_snapshots_are_asked_for_only_where_the_answer_depends_on_them() -> None:
    for number, query, depends in [
        (w.LIST_CONTEXTS, b"base:", False),
        (w.LIST_CONTEXTS, b"nbdclone:origin", False),
        (w.LIST_CONTEXTS, b"qemu:", True),
        (w.LIST_CONTEXTS, b"nbdclone:changed-since=", True),
        (w.SET_CONTEXTS, b"qemu:", False),
        (w.SET_CONTEXTS, b"qemu:dirty-bitmap:", False),
        (w.SET_CONTEXTS, b"qemu:dirty-bitmap:x", True),
        (w.SET_CONTEXTS, b"nbdclone:changed-since=x", True),
    ]:
        server = greeted()
        server.receive_data(w.option(number, w.context_request(b"web1", query)))
        asked = FindSnapshots("web1", number, (query.decode(),))
        assert server.next_event() == (asked if depends else None)


def test_a_set_that_needs_the_snapshots_clears_what_was_set_before_they_are_known() -> None:
    server = greeted()
    ask(server, w.SET_CONTEXTS, w.context_request(b"web1", b"base:allocation"))
    assert names(ask(server, w.SET_CONTEXTS, w.context_request(b"web1", BITMAPS[0]), [])) == []
    assert go(server) == ()


def test_more_contexts_than_are_told_at_once_are_too_big_and_nothing_is_selected() -> None:
    many = [f"s{number}" for number in range(wire.MAX_CONTEXTS + 1)]
    wanted = [f"qemu:dirty-bitmap:{name}".encode() for name in many]
    server = greeted()
    most = ask(server, w.SET_CONTEXTS, w.context_request(b"web1", *wanted[1:]), many)
    assert names(most) == wanted[1:]
    [(_number, reply, _text)] = ask(server, w.SET_CONTEXTS, w.context_request(b"web1", *wanted), many)
    assert reply == w.TOO_BIG
    assert go(server) == ()


def test_contexts_that_nobody_asked_for_are_the_servers_own_fault() -> None:
    with pytest.raises(LocalProtocolError, match="contexts"):
        greeted().send_contexts([])


@BOTH_OPTIONS
def test_without_structured_replies_there_are_no_contexts(number: int) -> None:
    server = greeted(structured=False)
    [(_number, reply, _text)] = ask(server, number, w.context_request(b"web1", b"base:allocation"))
    assert reply == w.INVALID
    server.receive_data(w.option(w.STRUCTURED_REPLY))
    assert server.next_event() is None
    assert go(server) == ()


@BOTH_OPTIONS
@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack(">I", 4),
        struct.pack(">I", 5) + b"web1" + bytes(4),
        struct.pack(">I", 0xFFFFFFFF) + b"web1" + bytes(4),
        struct.pack(">I", 4) + b"web1",
        struct.pack(">I", 4) + b"web1" + struct.pack(">I", 1),
        struct.pack(">I", 4) + b"web1" + struct.pack(">II", 1, 9) + b"base:",
        w.context_request(b"web1", b"base:allocation") + b"x",
        w.context_request(b"web1", b"no colon"),
        w.context_request(b"web1", b":no namespace"),
        w.context_request(b"web1", b""),
        w.context_request(b"web1", b"base:\xff"),
        w.context_request(b"web1", b"base:a\0b"),
        w.context_request(b"web1", b"base:" + b"x" * 4096),
        w.context_request(b"we\xff", b"base:allocation"),
    ],
)
def test_a_request_that_makes_no_sense_is_invalid_and_haggling_goes_on(number: int, data: bytes) -> None:
    server = greeted()
    [(_number, reply, _text)] = ask(server, number, data)
    assert reply == w.INVALID
    assert names(ask(server, number, w.context_request(b"web1", b"base:allocation"))) == [b"base:allocation"]


@BOTH_OPTIONS
def test_too_many_queries_are_too_big(number: int) -> None:
    server = greeted()
    most = [b"x-strange:thing"] * wire.MAX_QUERIES
    assert names(ask(server, number, w.context_request(b"web1", *most))) == []
    [(_number, reply, _text)] = ask(server, number, w.context_request(b"web1", *most, b"base:allocation"))
    assert reply == w.TOO_BIG


@pytest.mark.parametrize("again", [b"", w.context_request(b"web1"), w.context_request(b"web1", b"none")])
def test_another_set_replaces_what_was_selected_even_if_it_fails(again: bytes) -> None:
    server = greeted()
    ask(server, w.SET_CONTEXTS, w.context_request(b"web1", b"base:allocation"))
    ask(server, w.SET_CONTEXTS, again)
    assert go(server) == ()


@pytest.mark.parametrize("number", [w.GO, w.EXPORT_NAME])
def test_contexts_belong_to_the_export_that_they_were_selected_for(number: int) -> None:
    server = greeted()
    ask(server, w.SET_CONTEXTS, w.context_request(b"web2", b"base:allocation"))
    assert go(server, b"web1", number) == ()
    server = greeted()
    ask(server, w.SET_CONTEXTS, w.context_request(b"web1", b"base:allocation"))
    assert go(server, b"web1", number) == ((1, "base:allocation"),)


def test_a_list_between_changes_nothing() -> None:
    server = greeted()
    ask(server, w.SET_CONTEXTS, w.context_request(b"web1", b"base:allocation"))
    ask(server, w.LIST_CONTEXTS, w.context_request(b"web2"))
    assert go(server) == ((1, "base:allocation"),)


# A client that haggles


def joined() -> tuple[ClientHandshake, ServerHandshake]:
    client, server = ClientHandshake(), ServerHandshake()
    assert exchange(client, server) == [Ready()]
    return client, server


def exchange(client: ClientHandshake, server: ServerHandshake) -> list[object]:
    events: list[object] = []
    while (to_client := server.data_to_send()) or (to_server := client.data_to_send()):
        if to_client:
            for message in to_client:
                client.receive_data(message)
            while (event := client.next_event()) is not None:
                events.append(event)
            continue
        for message in to_server:
            server.receive_data(message)
        while isinstance(server.next_event(), OpenExport):
            server.accept_export(WEB1)
    return events


def test_a_client_and_a_server_agree_on_contexts() -> None:
    client, server = joined()
    client.set_contexts("web1", ["nbdclone:origin", "base:allocation", "x-strange:thing"])
    selected = ((1, "base:allocation"), (3, "nbdclone:origin"))
    assert exchange(client, server) == [ContextsSet(selected)]
    client.go("web1")
    [event] = exchange(client, server)
    assert isinstance(event, Opened)
    assert event.negotiated == server.finished
    assert event.negotiated.contexts == selected


def test_a_client_forgets_contexts_of_another_export() -> None:
    client, server = joined()
    client.set_contexts("web2", ["base:allocation"])
    exchange(client, server)
    client.go("web1")
    exchange(client, server)
    assert client.finished is not None
    assert client.finished.contexts == ()


def test_without_structured_replies_a_client_does_not_ask() -> None:
    client = ClientHandshake()
    client.receive_data(
        w.greeting() + w.option_reply(w.EXTENDED_HEADERS, w.UNSUP) + w.option_reply(w.STRUCTURED_REPLY, w.UNSUP)
    )
    assert client.next_event() == Ready()
    client.data_to_send()
    client.set_contexts("web1", ["base:allocation"])
    assert isinstance(client.next_event(), Refused)
    assert client.data_to_send() == []


@pytest.mark.parametrize(
    ("name", "contexts"), [("web1", ["\ud800:"]), ("web1", ["base:" + "x" * 4096]), ("a\0b", ["base:allocation"])]
)
def test_a_question_that_cannot_be_sent_is_the_callers_fault(name: str, contexts: list[str]) -> None:
    client, _server = joined()
    with pytest.raises(LocalProtocolError):
        client.set_contexts(name, contexts)
    assert client.data_to_send() == []


@pytest.mark.parametrize(
    "payloads",
    [
        [b"", b""],
        [b"abc"],
        [w.context(1, b"x-strange:thing")],
        [w.context(1, b"base:allocation"), w.context(2, b"base:allocation")],
        [w.context(1, b"base:allocation"), w.context(1, b"nbdclone:origin")],
    ],
)
def test_contexts_that_were_not_asked_for_or_come_twice_are_the_servers_fault(payloads: list[bytes]) -> None:
    client, _server = joined()
    client.set_contexts("web1", ["base:allocation", "nbdclone:origin"])
    client.receive_data(b"".join(w.option_reply(w.SET_CONTEXTS, w.REP_CONTEXT, payload) for payload in payloads))
    with pytest.raises(RemoteProtocolError):
        client.next_event()


# Chunks


def test_a_chunk_is_laid_out_as_the_specification_says() -> None:
    extents = [(4096, 0), (0xFFFFFFFF, 3)]
    assert status_chunk(7, 2, extents, last=False) == w.status_chunk(7, 2, *extents, flags=0)
    assert status_chunk(7, 2, extents, last=True) == w.status_chunk(7, 2, *extents)


def test_neighbours_of_one_status_are_merged() -> None:
    assert merged([(1, 0), (2, 0), (3, 3), (4, 0), (5, 0)]) == [(3, 0), (3, 3), (9, 0)]
    assert merged([]) == []


def test_ids_and_names_of_contexts_are_unique() -> None:
    assert len(dict(CONTEXTS)) == len({name for _id, name in CONTEXTS}) == len(CONTEXTS)


# A client that takes them


def asking(*, flags: int = 0, contexts: tuple[int, ...] = (1, 3)) -> ClientTransmission:
    """A client that asked about 1000 bytes at 100; the cookie is 1."""
    client = ClientTransmission(Mode.STRUCTURED, contexts)
    client.send_request(w.BLOCK_STATUS, flags, 100, 1000)
    return client


def receive(client: ClientTransmission, *messages: bytes) -> list[Completed]:
    completed: list[Completed] = []
    client.receive_data(b"".join(messages), completed)
    return completed


def test_a_reply_has_a_chunk_for_each_context_in_any_order() -> None:
    first, second = [(400, 0), (500, 3), (7000, 0)], [(10, 2)]
    chunks = w.status_chunk(1, 3, *second, flags=0), w.status_chunk(1, 1, *first)
    assert receive(asking(), *chunks) == [Completed(1, 0, "", None, {1: first, 3: second})]


def test_a_large_chunk_comes_in_pieces() -> None:
    client = ClientTransmission(Mode.STRUCTURED, [1])
    client.send_request(w.BLOCK_STATUS, 0, 0, 1 << 20)
    extents = [(8, number & 1) for number in range(1 << 17)]
    completed: list[Completed] = []
    for piece in w.in_pieces(w.status_chunk(1, 1, *extents), range(0, 2 << 20, 60_000)):
        client.receive_data(piece, completed)
    assert completed == [Completed(1, 0, "", None, {1: extents})]


def test_an_error_ends_it_whatever_was_told_before() -> None:
    chunks = w.status_chunk(1, 1, (400, 0), flags=0), w.error_chunk(1, 5, b"broken")
    assert receive(asking(), *chunks) == [Completed(1, 5, "broken", None)]


def test_an_error_may_be_a_simple_reply() -> None:
    assert receive(asking(), w.simple(1, 22)) == [Completed(1, 22, "", None)]


@pytest.mark.parametrize(
    "lie",
    [
        lambda: w.simple(1),  # success that tells nothing
        lambda: w.chunk(w.NONE, 1),
        lambda: w.status_chunk(1, 1, (400, 0)),  # one context of two
        lambda: w.status_chunk(1, 2, (400, 0), flags=0),  # a context that was not selected
        lambda: w.status_chunk(1, 1, (400, 0), flags=0) * 2,
        lambda: w.status_chunk(1, 1, flags=0),  # no extent
        lambda: w.status_chunk(1, 1, (0, 0), flags=0),
        lambda: w.status_chunk(1, 1, (1000, 0), (1, 3), flags=0),  # the last begins beyond the range
        lambda: w.chunk(w.STATUS, 1, bytes(3), flags=0),
        lambda: w.chunk(w.STATUS, 1, bytes(4 + 9), flags=0),
        lambda: w.chunk(w.STATUS, 1, bytes(block_status.max_status_size(wire.STRUCTURED) + 1), flags=0)[:20],
        lambda: w.data_chunk(1, 100, b"data"),
        lambda: w.hole_chunk(1, 100, 10),
    ],
)
def test_a_reply_that_does_not_fit_its_question_is_the_servers_fault(lie: Callable[[], bytes]) -> None:
    with pytest.raises(RemoteProtocolError):
        receive(asking(), lie())


@pytest.mark.parametrize("extents", [[(400, 0), (1, 3)], [(1001, 0)]])
def test_who_asks_for_one_extent_gets_one_within_the_range(extents: list[tuple[int, int]]) -> None:
    with pytest.raises(RemoteProtocolError):
        receive(asking(flags=w.REQ_ONE, contexts=(1,)), w.status_chunk(1, 1, *extents))
    told = receive(asking(flags=w.REQ_ONE, contexts=(1,)), w.status_chunk(1, 1, (1000, 3)))
    assert told == [Completed(1, 0, "", None, {1: [(1000, 3)]})]


def test_status_in_the_reply_to_something_else_is_the_servers_fault() -> None:
    client = ClientTransmission(Mode.STRUCTURED, [1])
    client.send_request(w.READ, 0, 100, 1000)
    with pytest.raises(RemoteProtocolError):
        receive(client, w.status_chunk(1, 1, (1000, 0)))


def test_large_chunks_are_taken_from_nobody_with_whom_no_context_was_agreed() -> None:
    client = asking(contexts=())
    with pytest.raises(RemoteProtocolError, match="limit"):
        receive(client, w.chunk(w.STATUS, 1, bytes(4 + 8 * 1000))[:20])
    with pytest.raises(RemoteProtocolError):
        receive(asking(contexts=()), w.simple(1))


# With extended headers


def asking_extended(*, flags: int = 0, some: tuple[int, ...] | None = None) -> ClientTransmission:
    """A client with contexts 1 and 3 that asked about 2^40 bytes at 100; the cookie is 1."""
    client = ClientTransmission(Mode.EXTENDED, [1, 3])
    client.send_request(w.BLOCK_STATUS, flags, 100, 1 << 40, contexts=some)
    return client


def test_an_extended_chunk_is_laid_out_as_the_specification_says() -> None:
    extents = [(1 << 40, 0), ((1 << 64) - 1, (1 << 64) - 1)]
    cookie = w.extended_cookie(7, 100)
    chunk = status_chunk(cookie, 2, extents, last=False, layout=wire.EXTENDED)
    assert chunk == w.extended_status_chunk(7, 100, 2, *extents, flags=0)


def test_extended_extents_are_long() -> None:
    first, second = [(1 << 39, 0), (1 << 62, 3)], [(1 << 40, 1 << 63)]
    chunks = w.extended_status_chunk(1, 100, 3, *second, flags=0), w.extended_status_chunk(1, 100, 1, *first)
    assert receive(asking_extended(), *chunks) == [Completed(1, 0, "", None, {1: first, 3: second})]


def test_a_question_in_some_of_the_contexts_has_them_in_its_payload() -> None:
    client = ClientTransmission(Mode.EXTENDED, [1, 3])
    _cookie, buffers = client.send_request(w.BLOCK_STATUS, w.REQ_ONE, 100, 1 << 40, contexts=[3])
    payload = struct.pack(">QI", 1 << 40, 3)
    assert b"".join(buffers) == w.extended_request(w.BLOCK_STATUS, 100, flags=w.REQ_ONE, payload=payload)
    assert receive(client, w.extended_status_chunk(1, 100, 3, (1 << 40, 1))) == [
        Completed(1, 0, "", None, {3: [(1 << 40, 1)]})
    ]


@pytest.mark.parametrize(
    ("mode", "command"), [(Mode.STRUCTURED, w.BLOCK_STATUS), (Mode.EXTENDED, w.READ), (Mode.EXTENDED, w.WRITE)]
)
def test_contexts_in_a_request_that_cannot_have_them_are_the_callers_fault(mode: Mode, command: int) -> None:
    client = ClientTransmission(mode, [1])
    with pytest.raises(LocalProtocolError):
        client.send_request(command, 0, 0, 0, contexts=[1])
    assert client.in_flight == 0


@pytest.mark.parametrize(
    "lie",
    [
        w.extended_chunk(w.NONE, 1, 100),
        w.extended_status_chunk(1, 100, 1, (400, 0)),  # one context of two
        w.extended_status_chunk(1, 100, 2, (400, 0), flags=0),
        w.extended_status_chunk(1, 104, 1, (400, 0), flags=0),  # another offset than the request's
        w.extended_status_chunk(1, 100, 1, (400, 0), flags=0, count=2),
        w.extended_status_chunk(1, 100, 1, (400, 0), (400, 3), flags=0, count=1),
        w.extended_status_chunk(1, 100, 1, flags=0),
        w.extended_status_chunk(1, 100, 1, (0, 0), flags=0),
        w.extended_status_chunk(1, 100, 1, (1 << 40, 0), (1, 3), flags=0),
        w.extended_chunk(w.STATUS, 1, 100, struct.pack(">III", 1, 400, 0), flags=0),
        w.extended_chunk(w.STATUS_EXT, 1, 100, bytes(8 + 15), flags=0),
        struct.pack(">IHHQQQ", 0x6E8A278C, 0, w.STATUS_EXT, 1, 100, 8 + 16 * ((1 << 20) + 1)),
        w.status_chunk(1, 1, (400, 0), flags=0),
    ],
)
def test_an_extended_reply_that_does_not_fit_its_question_is_the_servers_fault(lie: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        receive(asking_extended(), lie)


def test_who_asks_in_one_context_takes_no_other() -> None:
    with pytest.raises(RemoteProtocolError):
        receive(asking_extended(some=(3,)), w.extended_status_chunk(1, 100, 1, (400, 0), flags=0))


def test_a_filter_is_a_length_and_ids() -> None:
    assert status_filter(5, [1, 3]) == struct.pack(">QII", 5, 1, 3)
    assert parse_status_filter(struct.pack(">QII", 1 << 63, 3, 1), [1, 2, 3]) == (1 << 63, [3, 1])


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        bytes(7),
        struct.pack(">Q", 5),  # no context
        struct.pack(">QI", 5, 2),  # one that was not selected
        struct.pack(">QI", 5, 99),
        struct.pack(">QII", 5, 1, 1),
        struct.pack(">QIII", 5, 1, 3, 1),
        struct.pack(">QIB", 5, 1, 0),
        struct.pack(">QI", 5, 1)[:-1],
    ],
)
def test_what_is_no_filter_is_none(payload: bytes) -> None:
    assert parse_status_filter(payload, [1, 3]) is None
