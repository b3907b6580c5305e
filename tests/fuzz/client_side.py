"""The client's side, fed with what a server might send."""

from __future__ import annotations

import wirebytes as w
from feeding import TLS_BEGINS, Choices, Cut, agree, text

from nbdclone.errors import RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.block_status import max_status_size
from nbdclone.protocol.client_handshake import (
    ClientEvent,
    ClientHandshake,
    ContextsSet,
    ExportDescribed,
    ExportList,
    Opened,
    Ready,
    Refused,
)
from nbdclone.protocol.handshake_events import Aborted, StartTLS
from nbdclone.protocol.pending import Completed
from nbdclone.protocol.transmission import ClientTransmission
from nbdclone.protocol.wire import ExportInfo, Mode

# As they were when this was imported: a defect that changes them is to be seen.
MAX_REPLY_LENGTH = wire.MAX_REPLY_LENGTH
MAX_ERROR_CHUNK = wire.MAX_ERROR_CHUNK
CONTEXT_NAMES = ("base:allocation", "qemu:allocation-depth", "nbdclone:origin")
# What the client asks, one after the other: letters of QUESTIONS.
PLANS = ("g", "cg", "licg", "lllg", "iig", "ccig", "a", "la")
QUESTIONS = {
    "l": lambda client, name: client.list_exports(),
    "i": lambda client, name: client.info(name),
    "c": lambda client, name: client.set_contexts(name, CONTEXT_NAMES),
    "g": lambda client, name: client.go(name),
    "a": lambda client, name: client.abort(),
}

# What is in flight: command, flags, offset, length. Their cookies are 1, 2, 3 and so on. No range touches another one's
# but that of the first two, where a reply to the wrong one would be noticed by its offset.
IN_FLIGHT = (
    (w.READ, 0, 0, 64),
    (w.READ, 0, 64, 4),
    (w.READ, w.DF, 8192, 64),
    (w.READ, 0, 65536, 256),
    (w.WRITE, w.FUA, 12288, 4),
    (w.FLUSH, 0, 0, 0),
    (w.TRIM, 0, 16384, 4096),
    (w.CACHE, 0, 20480, 4096),
    (w.WRITE_ZEROES, w.NO_HOLE, 24576, 4096),
    (w.BLOCK_STATUS, 0, 0, 65536),
    (w.BLOCK_STATUS, w.REQ_ONE, 65536, 65536),
    (w.READ, 0, 200000, 1),
)


def client_handshake(data: bytes) -> None:
    """A server's answers to a client that asks by one of several plans, with TLS or without."""
    agree(data, _haggle)


def client_transmission(data: bytes) -> None:
    """A server's replies to a client that has a request of each kind in flight."""
    agree(data, _take)


class Haggling:
    """A client in its handshake, and the one that drives it."""

    def __init__(self, choices: Choices) -> None:
        self.wanted = choices.pick(*reversed(Mode))
        self.tls = choices.pick(False, True)
        self.plan = choices.pick(*PLANS)
        self.name = choices.pick("web1", "", "\N{SNOWMAN}" * 1365)
        self.client = ClientHandshake(self.wanted, tls=self.tls)
        self.told: list[object] = []
        self.sent = bytearray()
        self.error = ""
        self.rest = b""
        self._asked = 0

    @property
    def over(self) -> bool:
        return bool(self.error or self.client.closed or self.client.finished)

    def feed(self, stream: bytes, cut: Cut) -> None:
        fed = 0
        try:
            for piece in cut(stream):
                self.client.receive_data(piece)
                fed += len(piece)
                while (event := self.client.next_event()) is not None:
                    self._note(event)
                self._check_size()
                if self.over:
                    break
        except RemoteProtocolError as error:
            assert self.client.closed
            self.error = text(error, self.told)
        self.sent += b"".join(self.client.data_to_send())
        if self.client.finished:
            self.rest = self.client.trailing_data() + stream[fed:]

    def ask(self) -> None:
        """Ask the next question of the plan, if there is one."""
        if self._asked < len(self.plan) and not self.over:
            question = self.plan[self._asked]
            self._asked += 1
            QUESTIONS[question](self.client, self.name)

    def _note(self, event: ClientEvent) -> None:
        self.told.append(event)
        match event:
            case ExportDescribed(info):
                check_info(info)
            case ExportList(exports):
                assert sum(len(name) + len(text) for name, text in exports) <= wire.MAX_LIST_LENGTH
            case ContextsSet(contexts):
                assert {name for _id, name in contexts} <= set(CONTEXT_NAMES)
                assert len({number for number, _name in contexts}) == len(contexts)
            case Opened(negotiated):
                check_info(negotiated.export)
                assert negotiated.mode <= self.wanted
                assert negotiated.mode is not Mode.SIMPLE or not negotiated.contexts
            case Refused(_option, code, message):
                assert code >= wire.OPTION_REPLY_ERROR
                assert len(message) <= wire.MAX_STRING_LENGTH
        if self.tls and StartTLS() not in self.told:
            assert isinstance(event, Refused)
            assert self.client.closed
        if not isinstance(event, StartTLS | Aborted | Opened):
            assert isinstance(event, Ready | ExportDescribed | ExportList | ContextsSet | Refused)
            self.ask()

    def _check_size(self) -> None:
        client = self.client
        waiting = client._received
        assert self.over or len(waiting) < wire.OPTION_REPLY.size + MAX_REPLY_LENGTH
        if (
            client._asked is not None
            and client._asked.option != w.EXPORT_NAME
            and len(waiting) >= wire.OPTION_REPLY.size
        ):
            assert wire.OPTION_REPLY.unpack_from(waiting)[3] <= MAX_REPLY_LENGTH
        assert len(client._events) <= 1
        if client._asked is not None:
            assert client._asked.listed_bytes <= wire.MAX_LIST_LENGTH
            assert len(client._asked.contexts) <= len(CONTEXT_NAMES)
            assert len(client._asked.details) <= len(("name", "description")) + len(("least", "preferred", "most"))


def check_info(info: ExportInfo) -> None:
    """What a client was told about an export can be used without a further look."""
    assert 0 <= info.size < 1 << 64
    assert 1 <= info.minimum_block <= info.preferred_block <= info.maximum_payload
    assert len(info.name.encode()) <= wire.MAX_NAME_LENGTH
    assert len(info.description) <= wire.MAX_STRING_LENGTH


def _haggle(choices: Choices, stream: bytes, cut: Cut) -> list[object]:
    clear, *secure = stream.split(TLS_BEGINS, 1)
    haggling = Haggling(choices)
    client = haggling.client
    haggling.feed(clear, cut)
    if not haggling.over and haggling.told == [StartTLS()]:
        client.tls_started()
        haggling.feed(b"".join(secure), cut)
    return [*haggling.told, haggling.error, client.finished, client.closed, haggling.rest, bytes(haggling.sent)]


def start(mode: Mode, contexts: list[int]) -> tuple[ClientTransmission, bytes]:
    """A client with IN_FLIGHT in flight, and what it sent for them."""
    client = ClientTransmission(mode, contexts)
    sent = bytearray()
    for command, flags, offset, length in IN_FLIGHT:
        payload = b"data" if command == w.WRITE else b""
        _cookie, buffers = client.send_request(command, flags, offset, length, payload)
        sent += b"".join(buffers)
    if mode is Mode.EXTENDED and contexts:
        _cookie, buffers = client.send_request(w.BLOCK_STATUS, 0, 0, 1 << 40, contexts=contexts[:1])
        sent += b"".join(buffers)
    return client, bytes(sent)


def _take(choices: Choices, stream: bytes, cut: Cut) -> list[object]:
    mode = choices.pick(*Mode)
    contexts = choices.pick([1, 2, 3], [1], [])
    client, _sent = start(mode, contexts)
    longest = client._layout.header.size + (max_status_size(client._layout) if contexts else MAX_ERROR_CHUNK)
    completed: list[Completed] = []
    error = ""
    try:
        for piece in cut(stream):
            client.receive_data(piece, completed)
            assert client._head_size(client._head, 0, len(client._head)) <= longest
            assert len(client._head) < longest
    except RemoteProtocolError as caught:
        error = str(caught)
    _check_pending(client)
    for answer in completed:
        _check_answer(answer, contexts)
    assert len({answer.cookie for answer in completed}) == len(completed)
    return [*completed, client.in_flight, error]


def _check_pending(client: ClientTransmission) -> None:
    for pending in client._pending.values():
        assert pending.data is None or len(pending.data) == pending.length
        assert len(pending.seen) <= wire.MAX_FRAGMENTS
        assert len(pending.message) <= wire.MAX_STRING_LENGTH
        assert len(pending.extents) <= len(pending.contexts)


def _check_answer(answer: Completed, contexts: list[int]) -> None:
    if answer.cookie > len(IN_FLIGHT):
        command, flags, length, contexts = w.BLOCK_STATUS, 0, 1 << 40, contexts[:1]
    else:
        command, flags, _offset, length = IN_FLIGHT[answer.cookie - 1]
    assert (answer.data is not None) == (command == w.READ and not answer.error)
    assert answer.data is None or len(answer.data) == length
    assert (answer.extents is not None) == (command == w.BLOCK_STATUS and not answer.error)
    if answer.extents is None:
        return
    assert set(answer.extents) == set(contexts)
    for extents in answer.extents.values():
        assert all(size for size, _status in extents)
        assert sum(size for size, _status in extents[:-1]) < length
        assert not flags & w.REQ_ONE or (len(extents) == 1 and extents[0][0] <= length)
