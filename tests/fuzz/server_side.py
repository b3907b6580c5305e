"""The server's side, fed with what a client might send."""

from __future__ import annotations

import wirebytes as w
from feeding import TLS_BEGINS, Choices, Cut, agree, text

from nbdclone.errors import RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.block_status import parse_status_filter
from nbdclone.protocol.handshake import AHEAD_OF_TLS, ServerHandshake
from nbdclone.protocol.handshake_events import Event, FindSnapshots, ListExports, OpenExport, Purpose, StartTLS, TLSMode
from nbdclone.protocol.requests import MAX_BURST, Request, request_layout
from nbdclone.protocol.transmission import request_error
from nbdclone.protocol.wire import ExportInfo, Mode, transmission_flags

GREETING_SIZE = 18
MAX_SENT = 20 + 4 + wire.MAX_NAME_LENGTH + wire.MAX_LISTED_LENGTH  # of one reply: a listed export is the longest
# As they were when this was imported: a defect that changes them is to be seen.
MAX_OPTION_LENGTH = wire.MAX_OPTION_LENGTH
MAX_PAYLOAD = wire.MAX_PAYLOAD
MAX_CONTEXTS = wire.MAX_CONTEXTS
ERRORS = {0, wire.EPERM, wire.EINVAL, wire.ENOSPC, wire.EOVERFLOW}
KNOWN_FLAGS = w.FUA | w.NO_HOLE | w.DF | w.REQ_ONE | w.FAST_ZERO | w.PAYLOAD_LEN


def server_handshake(data: bytes) -> None:
    """A client's options, in each of the three modes of TLS; exports are listed, accepted and refused."""
    agree(data, _haggle)


def server_transmission(data: bytes) -> None:
    """A client's requests, with compact headers or extended ones, as they are taken and judged."""
    agree(data, _take)


class Haggling:
    """A server in its handshake, and the one that drives it: the answers follow a pattern."""

    def __init__(self, choices: Choices, mode: TLSMode) -> None:
        self.mode = mode
        self.server = ServerHandshake(mode)
        self.told: list[object] = []
        self.sent = bytearray()
        self.error = ""
        self.rest = b""
        self._exports = choices.pick(0, 2, 70)
        self._answers = choices.pick(*range(64))

    @property
    def over(self) -> bool:
        return bool(self.error or self.server.closed or self.server.finished)

    def feed(self, stream: bytes, cut: Cut) -> None:
        """Feed it all of a stream that TLS does not cut in two."""
        fed = 0
        try:
            for piece in cut(stream):
                self.server.receive_data(piece)
                fed += len(piece)
                while (event := self.server.next_event()) is not None:
                    self._note(event)
                self._send()
                if self.over:
                    break
        except RemoteProtocolError as error:
            assert self.server.closed
            self.error = text(error, self.told)
        self._send()
        if self.server.finished:
            self.rest = self.server.trailing_data() + stream[fed:]

    def _note(self, event: Event) -> None:
        secure = StartTLS() in self.told
        assert (
            secure
            or self.mode is not TLSMode.REQUIRED
            or not isinstance(event, ListExports | FindSnapshots | OpenExport)
        )
        self.told.append(event)
        accepted = self._answers >> (len(self.told) % 6) & 1
        match event:
            case ListExports():
                self.server.send_list([(f"web{number}", "a disk" * 400) for number in range(self._exports)])
            case FindSnapshots():
                self.server.send_contexts([f"s{number}" for number in range(self._exports)])
            case OpenExport(name) if accepted:
                assert len(name.encode()) <= wire.MAX_NAME_LENGTH
                self.server.accept_export(ExportInfo(name, 1 << 30, transmission_flags(False), "a disk"))
            case OpenExport():
                self.server.refuse_export("no such export")

    def _send(self) -> None:
        while messages := self.server.data_to_send():
            for message in messages:
                assert 0 < len(message) <= MAX_SENT
                self.sent += message
        # What stays is an option that is not all there, and not too long, unless something waits for its answer.
        received = self.server._received
        assert self.over or len(received) < wire.OPTION.size + MAX_OPTION_LENGTH
        if self.server._client_flags is not None and len(received) >= wire.OPTION.size and not self.over:
            assert wire.OPTION.unpack_from(received)[2] <= MAX_OPTION_LENGTH
        assert len(self.server._contexts) <= MAX_CONTEXTS


def _haggle(choices: Choices, stream: bytes, cut: Cut) -> list[object]:
    clear, *secure = stream[: wire.MAX_PIPELINED].split(TLS_BEGINS, 1)
    haggling = Haggling(choices, choices.pick(*TLSMode))
    server = haggling.server
    haggling.feed(clear, cut)
    if not haggling.over and StartTLS() in haggling.told:
        server.tls_started()
        assert server.mode is Mode.SIMPLE
        haggling.feed(b"".join(secure), cut)
    outcome = [*haggling.told, haggling.error, server.finished, server.closed, haggling.rest]
    if haggling.error == AHEAD_OF_TLS:
        return outcome
    _check_replies(haggling)
    return [*outcome, bytes(haggling.sent)]


def _check_replies(haggling: Haggling) -> None:
    """What was sent can be read by a client."""
    finished = haggling.server.finished
    replies = bytes(haggling.sent[GREETING_SIZE:])
    opened = [event for event in haggling.told if isinstance(event, OpenExport)]
    if finished is not None and opened[-1].purpose is Purpose.EXPORT_NAME:
        size = len(wire.EXPORT_NAME_REPLY.pack(0, 0))
        padded = not replies.endswith(wire.EXPORT_NAME_REPLY.pack(finished.export.size, finished.export.flags))
        replies = replies[: len(replies) - size - (wire.EXPORT_NAME_PADDING if padded else 0)]
    for _option, reply, data in w.option_replies(replies):
        assert reply < wire.OPTION_REPLY_ERROR or len(data) <= wire.MAX_ERROR_MESSAGE
    if finished is not None:
        assert finished.mode is not Mode.SIMPLE or not finished.contexts
        assert len(set(finished.contexts)) == len(finished.contexts)


def _take(choices: Choices, stream: bytes, cut: Cut) -> list[object]:
    mode = choices.pick(*Mode)
    selected = choices.pick([], [1], [1, 2, 3])
    flags = transmission_flags(choices.pick(False, True))
    if mode is not Mode.SIMPLE:
        flags |= wire.FLAG_SEND_DF
    if mode is Mode.EXTENDED and selected:
        flags |= wire.FLAG_BLOCK_STATUS_PAYLOAD
    info = ExportInfo("web1", choices.pick(1 << 20, 0, 1 << 40, (1 << 64) - 1), flags)
    layout = request_layout(mode)
    buffer = bytearray()
    taken: list[object] = []
    for piece in cut(stream):
        buffer += piece
        full = True
        while full:
            requests: list[Request] = []
            error = ""
            position = 0
            try:
                position = layout.parse(buffer, 0, len(buffer), requests)
            except RemoteProtocolError as caught:
                error = str(caught)
            taken += [_judged(request, buffer, info, mode, selected) for request in requests]
            if error:
                return [*taken, error]
            del buffer[:position]
            full = len(requests) == MAX_BURST
            assert len(requests) <= MAX_BURST
        if len(buffer) >= layout.size:
            length = layout.head(buffer, 0)[4]
            assert 0 < length <= MAX_PAYLOAD
            assert len(buffer) < layout.size + length
    return [*taken, bytes(buffer)]


def _judged(request: Request, buffer: bytearray, info: ExportInfo, mode: Mode, selected: list[int]) -> object:
    """A request with its payload, and what is made of it."""
    flags, command, cookie, offset, length, start = request
    has_payload = command == w.WRITE or (mode is Mode.EXTENDED and flags & w.PAYLOAD_LEN)
    payload = bytes(buffer[start : start + length]) if has_payload else b""
    assert len(payload) == (length if has_payload else 0)
    structured = mode is not Mode.SIMPLE
    error = request_error(info, structured, flags, command, offset, length)
    contexts = selected
    if not error and command == w.BLOCK_STATUS and has_payload:
        assert selected
        parsed = parse_status_filter(payload, selected)
        if parsed is None:
            error = wire.EINVAL
        else:
            length, contexts = parsed
            assert contexts
            assert set(contexts) <= set(selected)
            error = request_error(info, structured, flags & ~w.PAYLOAD_LEN, command, offset, length)
    assert error in ERRORS
    if not error and command != w.DISC:
        assert command <= w.BLOCK_STATUS
        assert not flags & ~KNOWN_FLAGS
        assert not info.read_only or command in (w.READ, w.CACHE, w.FLUSH, w.BLOCK_STATUS)
        assert offset + length <= info.size
        assert length > 0 or command == w.FLUSH
        assert command not in (w.READ, w.WRITE) or length <= MAX_PAYLOAD
    return flags, command, cookie, offset, length, payload, error, contexts
