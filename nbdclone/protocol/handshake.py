"""The handshake ("fixed newstyle negotiation"): option haggling, on the server's side.

``receive_data`` takes bytes as they come, ``next_event`` says what they mean, methods answer,
``data_to_send`` gives the bytes to send, one object for each message. The peer's faults are raised by
``receive_data`` and ``next_event``, and close the handshake. ``client_handshake`` is the other side, alike.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, Final

from nbdclone.errors import LocalProtocolError, RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.block_status import listed_contexts, need_snapshots, selected_contexts
from nbdclone.protocol.handshake_events import (
    Aborted,
    Event,
    FindSnapshots,
    ListExports,
    Negotiated,
    OpenExport,
    Purpose,
    StartTLS,
    TLSMode,
)
from nbdclone.protocol.option_data import (
    OptionError,
    check_fields,
    list_replies,
    option_reply,
    parse_context_request,
    parse_export_request,
    parse_name,
    refuse_data,
)
from nbdclone.protocol.wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    INFO_TYPE,
    META_CONTEXT,
    OPTION,
    ExportInfo,
    HandshakeFlag,
    Info,
    Mode,
    Option,
    OptionReply,
    encode_string,
    encode_text,
)

AHEAD_OF_TLS: Final = "bytes came ahead of the TLS handshake"
HANDSHAKE_FLAGS: Final = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
# Messages that are given at once; to make so many of a long list is a tenth of a millisecond's work.
MESSAGES_AT_ONCE: Final = 64


class ServerHandshake:
    """The server's side of one handshake.

    While an event waits for its answer ``next_event`` returns None. The handshake is over when
    ``finished`` is set (the transmission starts with ``trailing_data``) or ``closed`` is true (send what
    ``data_to_send`` still gives, then close the connection).
    """

    def __init__(self, tls: TLSMode = TLSMode.OFF) -> None:
        self.finished: Negotiated | None = None
        self.closed = False
        self.mode = Mode.SIMPLE
        self._tls = tls
        self._in_tls = False
        self._received = bytearray()
        # Messages, and the rests of lists, which are made as they are sent, in the order of the options.
        self._outgoing: deque[Iterator[bytes]] = deque()
        self._send(GREETING.pack(wire.INIT_PASSWD, wire.IHAVEOPT, HANDSHAKE_FLAGS))
        self._client_flags: int | None = None
        self._option_count = 0
        self._unanswered: Event | None = None
        self._requested_infos: frozenset[int] = frozenset()
        self._contexts: tuple[tuple[int, str], ...] = ()
        self._contexts_export = ""  # for which they were selected

    def state(self) -> dict[str, Any]:
        """All that this handshake knows, as JSON can hold it, for another to go on from: ``resumed``.

        Raises:
            LocalProtocolError: there is something to send, it is over, or it waits for more than OpenExport's answer.
        """
        asked = self._unanswered
        if self._outgoing or self.closed or self.finished or not isinstance(asked, OpenExport | None):
            raise LocalProtocolError("a handshake cannot be moved at this point")
        return {
            "tls": self._tls.value,
            "in_tls": self._in_tls,
            "mode": self.mode.value,
            "client_flags": self._client_flags,
            "option_count": self._option_count,
            "contexts": self._contexts,
            "contexts_export": self._contexts_export,
            "asked": asked and (asked.name, asked.purpose.value, asked.wants_description),
            "requested_infos": sorted(self._requested_infos),
            "received": b64encode(self._received).decode(),
        }

    @classmethod
    def resumed(cls, state: dict[str, Any]) -> ServerHandshake:
        """The handshake whose ``state`` this is: to the client, the same. What it asked last is ``unanswered``."""
        handshake = cls(TLSMode(state["tls"]))
        handshake._outgoing.clear()  # it was greeted
        handshake._in_tls = state["in_tls"]
        handshake.mode = Mode(state["mode"])
        handshake._client_flags = state["client_flags"]
        handshake._option_count = state["option_count"]
        handshake._contexts = tuple((number, context) for number, context in state["contexts"])
        handshake._contexts_export = state["contexts_export"]
        if state["asked"]:
            name, purpose, wants_description = state["asked"]
            handshake._unanswered = OpenExport(name, Purpose(purpose), wants_description)
        handshake._requested_infos = frozenset(state["requested_infos"])
        handshake._received += b64decode(state["received"])
        return handshake

    @property
    def unanswered(self) -> Event | None:
        """The event that waits for its answer."""
        return self._unanswered

    def data_to_send(self) -> list[bytes]:
        """The next messages to send, and forget them; the first call gives the greeting. Call until there are none.

        Each is to be written by itself: nbd-client takes an option's reply to be what one read() gives.
        """
        return list(islice(self._messages(), MESSAGES_AT_ONCE))

    def _messages(self) -> Iterator[bytes]:
        while self._outgoing:
            while (message := next(self._outgoing[0], None)) is not None:
                yield message
            self._outgoing.popleft()

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent. Call ``next_event`` after it.

        Raises:
            RemoteProtocolError: the client sends on and on without waiting for an answer, or ahead of TLS.
            LocalProtocolError: the handshake has finished; this belongs to the transmission.
        """
        if self.closed:
            return
        if self.finished is not None:
            raise LocalProtocolError("the handshake has finished: these bytes belong to the transmission")
        if isinstance(self._unanswered, StartTLS):
            self.closed = True
            raise RemoteProtocolError(AHEAD_OF_TLS)
        if len(self._received) + len(data) > wire.MAX_PIPELINED:
            self.closed = True
            raise RemoteProtocolError(f"more than {wire.MAX_PIPELINED} bytes were sent ahead of their answers")
        self._received += data

    def trailing_data(self) -> bytes:
        """The bytes behind the last option, which belong to the transmission, and forget them."""
        if self.finished is None:
            raise LocalProtocolError("the handshake has not finished")
        trailing = bytes(self._received)
        self._received.clear()
        return trailing

    def next_event(self) -> Event | None:
        """What the client wants next; None if that takes more bytes, or an answer, or will never be.

        Raises:
            RemoteProtocolError: the client broke the protocol in a way that no reply can mend.
        """
        if self.closed or self.finished is not None or self._unanswered is not None:
            return None
        try:
            if self._client_flags is None and not self._take_client_flags():
                return None
            while (taken := self._take_option()) is not None:
                event = self._handle(*taken)
                if event is not None:
                    return event
        except RemoteProtocolError:
            self.closed = True
            raise
        return None

    def selected_for(self, export: str) -> tuple[tuple[int, str], ...]:
        """The metadata contexts, (id, name) of each, that the client has selected in case it opens that export."""
        return self._contexts if export == self._contexts_export else ()

    def tls_started(self) -> None:
        """Answer ``StartTLS``: from now on, what is received and sent goes through TLS."""
        if not isinstance(self._unanswered, StartTLS):
            raise LocalProtocolError("the client did not ask for TLS")
        self._unanswered = None
        self._in_tls = True

    # What the client sends

    def _take_client_flags(self) -> bool:
        if len(self._received) < CLIENT_FLAGS.size:
            return False
        (flags,) = CLIENT_FLAGS.unpack_from(self._received)
        del self._received[: CLIENT_FLAGS.size]
        if flags & ~HANDSHAKE_FLAGS:
            raise RemoteProtocolError(f"unknown client flags 0x{flags:x}")
        self._client_flags = flags
        return True

    def _take_option(self) -> tuple[int, bytes] | None:
        """The next option with all its data, or None while it is not all there."""
        if len(self._received) < OPTION.size:
            return None
        magic, option, length = OPTION.unpack_from(self._received)
        if magic != wire.IHAVEOPT:
            raise RemoteProtocolError(f"an option starts with 0x{magic:016x}, not with its magic number")
        if length > wire.MAX_OPTION_LENGTH:
            raise RemoteProtocolError(f"option {option} has {length} bytes: limit {wire.MAX_OPTION_LENGTH}")
        end = OPTION.size + length
        if len(self._received) < end:
            return None
        data = bytes(self._received[OPTION.size : end])
        del self._received[:end]
        self._option_count += wire.LIST_WEIGHT if option == Option.LIST else 1
        if self._option_count > wire.MAX_OPTIONS:
            raise RemoteProtocolError(f"more than {wire.MAX_OPTIONS} options")
        return option, data

    def _handle(self, option: int, data: bytes) -> Event | None:
        assert self._client_flags is not None
        insecure = self._tls is TLSMode.REQUIRED and not self._in_tls
        if option == Option.EXPORT_NAME:
            if insecure:
                raise RemoteProtocolError("NBD_OPT_EXPORT_NAME without TLS, which is required here")
            if self.mode is Mode.EXTENDED:
                raise RemoteProtocolError("NBD_OPT_EXPORT_NAME after extended headers were agreed on")
            return self._on_export_name(data)
        if not self._client_flags & HandshakeFlag.FIXED_NEWSTYLE:
            raise RemoteProtocolError(f"option {option} from a client that does not speak fixed newstyle")
        handler = _SERVER_OPTIONS.get(option)
        try:
            if insecure and option not in (Option.STARTTLS, Option.ABORT):
                raise OptionError(OptionReply.ERR_TLS_REQD, "this server requires TLS")
            if handler is None:
                raise OptionError(OptionReply.ERR_UNSUP, f"option {option} is not known here")
            return handler(self, option, data)
        except OptionError as error:
            self._send_error(option, error.reply, error.message)
            return None

    def _on_export_name(self, data: bytes) -> Event:
        try:
            name = parse_name(data)
        except OptionError as error:
            raise RemoteProtocolError(error.message) from None
        self._unanswered = OpenExport(name, Purpose.EXPORT_NAME)
        return self._unanswered

    def _on_abort(self, option: int, _data: bytes) -> Event:
        self._send_reply(option, OptionReply.ACK)
        self.closed = True
        return Aborted()

    def _on_start_tls(self, option: int, data: bytes) -> Event:
        if self._tls is TLSMode.OFF:
            raise OptionError(OptionReply.ERR_UNSUP, "this server does without TLS")
        refuse_data(data)
        if self._in_tls:
            raise OptionError(OptionReply.ERR_INVALID, "TLS was started before")
        if self._received:  # somebody between us and the client may have put them there: CVE-2021-3716
            raise RemoteProtocolError(AHEAD_OF_TLS)
        # "the server MUST NOT preserve any negotiation state": a stranger may have asked for it.
        self.mode = Mode.SIMPLE
        self._contexts, self._contexts_export = (), ""
        self._send_reply(option, OptionReply.ACK)
        self._unanswered = StartTLS()
        return self._unanswered

    def _on_list(self, _option: int, data: bytes) -> Event:
        refuse_data(data)
        self._unanswered = ListExports()
        return self._unanswered

    def _on_structured_reply(self, option: int, data: bytes) -> None:
        refuse_data(data)
        if self.mode is Mode.EXTENDED:
            raise OptionError(OptionReply.ERR_EXT_HEADER_REQD, "extended headers were agreed on before")
        self.mode = Mode.STRUCTURED
        self._send_reply(option, OptionReply.ACK)

    def _on_extended_headers(self, option: int, data: bytes) -> None:
        refuse_data(data)
        self.mode = Mode.EXTENDED
        self._send_reply(option, OptionReply.ACK)

    def _on_info_or_go(self, option: int, data: bytes) -> Event:
        name, self._requested_infos = parse_export_request(data)
        wants_description = Info.DESCRIPTION in self._requested_infos
        self._unanswered = OpenExport(name, Purpose(option), wants_description)
        return self._unanswered

    def _on_contexts(self, option: int, data: bytes) -> Event | None:
        """Whether there is such an export is told by NBD_OPT_GO: one that is not there is as one without snapshots."""
        listing = option == Option.LIST_META_CONTEXT
        if not listing:
            self._contexts = ()  # "including when this command fails"
        name, queries = self._context_request(data)
        if not listing:
            self._contexts_export = name
        asked = FindSnapshots(name, option, tuple(queries))
        if need_snapshots(queries, listing):
            self._unanswered = asked
            return asked
        self._answer_contexts(asked, ())
        return None

    def _answer_contexts(self, asked: FindSnapshots, snapshots: Collection[str]) -> None:
        if asked.option == Option.LIST_META_CONTEXT:
            contexts = tuple((0, name) for name in listed_contexts(asked.queries, snapshots))
        else:
            contexts = selected_contexts(asked.queries, snapshots)
            if len(contexts) > wire.MAX_CONTEXTS:
                message = f"{len(contexts)} contexts: the limit is {wire.MAX_CONTEXTS}"
                self._send_error(asked.option, OptionReply.ERR_TOO_BIG, message)
                return
            self._contexts = contexts
        for number, context in contexts:
            self._send_reply(asked.option, OptionReply.META_CONTEXT, META_CONTEXT.pack(number) + context.encode())
        self._send_reply(asked.option, OptionReply.ACK)

    def _context_request(self, data: bytes) -> tuple[str, list[str]]:
        if self.mode is Mode.SIMPLE:
            raise OptionError(
                OptionReply.ERR_INVALID, "structured replies or extended headers are to be agreed on before"
            )
        return parse_context_request(data)

    # What the server answers

    def send_list(self, exports: Iterable[tuple[str, str]]) -> None:
        """Answer ``ListExports`` with (name, description) of each; long descriptions are cut.

        Raises:
            LocalProtocolError: nothing was asked, or a name that cannot be sent; then nothing is sent.
        """
        if not isinstance(self._unanswered, ListExports):
            raise LocalProtocolError("the client did not ask for a list")
        exports = list(exports)
        for name, _description in exports:
            encode_string(name, wire.MAX_NAME_LENGTH)
        self._outgoing.append(list_replies(exports))
        self._unanswered = None

    def send_contexts(self, snapshots: Collection[str]) -> None:
        """Answer ``FindSnapshots`` with the names of those beneath that export; none if there is no such export.

        Raises:
            LocalProtocolError: nothing was asked.
        """
        asked = self._unanswered
        if not isinstance(asked, FindSnapshots):
            raise LocalProtocolError("the client did not ask for contexts")
        self._unanswered = None
        self._answer_contexts(asked, snapshots)

    def accept_export(self, info: ExportInfo) -> None:
        """Answer ``OpenExport``: the export is there. This finishes the handshake, unless INFO asked.

        ``info`` comes without SEND_DF and BLOCK_STATUS_PAYLOAD, which follow from what was agreed before.

        Raises:
            LocalProtocolError: no export was asked for, or ``info`` cannot be sent; then nothing is sent.
        """
        asked = self._asked_export()
        check_fields(info)
        contexts = self.selected_for(asked.name)
        if self.mode is not Mode.SIMPLE:
            info = replace(info, flags=info.flags | wire.FLAG_SEND_DF)
        if self.mode is Mode.EXTENDED and contexts:
            info = replace(info, flags=info.flags | wire.FLAG_BLOCK_STATUS_PAYLOAD)
        if asked.purpose is Purpose.EXPORT_NAME:
            self._send(self._export_name_reply(info))
        else:
            option = asked.purpose.value
            for payload in self._info_payloads(info):
                self._send_reply(option, OptionReply.INFO, payload)
            self._send_reply(option, OptionReply.ACK)
        self._unanswered = None
        if asked.purpose is not Purpose.INFO:
            self.finished = Negotiated(info, self.mode, contexts)

    def refuse_export(self, message: str, reply: int = wire.NBD_REP_ERR_UNKNOWN) -> None:
        """Answer ``OpenExport``: no, because of ``message``. ``reply`` is an NBD_REP_ERR_*.

        If EXPORT_NAME asked there is no way to say so: ``closed`` becomes true. Otherwise haggling goes on.

        Raises:
            LocalProtocolError: no export was asked for, or ``reply`` is not an error.
        """
        asked = self._asked_export()
        if not reply & wire.OPTION_REPLY_ERROR:
            raise LocalProtocolError(f"option reply {reply} is not an error")
        self._unanswered = None
        if asked.purpose is Purpose.EXPORT_NAME:
            self.closed = True
        else:
            self._send_error(asked.purpose.value, reply, message)

    def _asked_export(self) -> OpenExport:
        if not isinstance(self._unanswered, OpenExport):
            raise LocalProtocolError("the client did not ask for an export")
        return self._unanswered

    def _export_name_reply(self, info: ExportInfo) -> bytes:
        assert self._client_flags is not None
        reply = EXPORT_NAME_REPLY.pack(info.size, info.flags)
        if self._client_flags & HandshakeFlag.NO_ZEROES:
            return reply
        return reply + bytes(wire.EXPORT_NAME_PADDING)

    def _info_payloads(self, info: ExportInfo) -> list[bytes]:
        """NBD_REP_INFO's payloads; block sizes first, since qemu holds the size against them as it comes."""
        payloads = [
            wire.INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, info.minimum_block, info.preferred_block, info.maximum_payload),
            wire.INFO_EXPORT.pack(Info.EXPORT, info.size, info.flags),
        ]
        if Info.NAME in self._requested_infos:
            name = encode_string(info.name, wire.MAX_NAME_LENGTH)
            payloads.append(INFO_TYPE.pack(Info.NAME) + name)
        if Info.DESCRIPTION in self._requested_infos and info.description:
            text = encode_text(info.description, wire.MAX_LISTED_LENGTH)
            payloads.append(INFO_TYPE.pack(Info.DESCRIPTION) + text)
        return payloads

    def _send_reply(self, option: int, reply: int, payload: bytes = b"") -> None:
        self._send(option_reply(option, reply, payload))

    def _send(self, message: bytes) -> None:
        self._outgoing.append(iter((message,)))

    def _send_error(self, option: int, reply: int, message: str) -> None:
        self._send_reply(option, reply, encode_text(message, wire.MAX_ERROR_MESSAGE))


_SERVER_OPTIONS: Final[dict[int, Callable[[ServerHandshake, int, bytes], Event | None]]] = {
    Option.ABORT: ServerHandshake._on_abort,
    Option.LIST: ServerHandshake._on_list,
    Option.STARTTLS: ServerHandshake._on_start_tls,
    Option.INFO: ServerHandshake._on_info_or_go,
    Option.GO: ServerHandshake._on_info_or_go,
    Option.STRUCTURED_REPLY: ServerHandshake._on_structured_reply,
    Option.EXTENDED_HEADERS: ServerHandshake._on_extended_headers,
    Option.LIST_META_CONTEXT: ServerHandshake._on_contexts,
    Option.SET_META_CONTEXT: ServerHandshake._on_contexts,
}
