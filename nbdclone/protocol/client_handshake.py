"""The handshake, on the client's side: questions are asked one at a time, and each is answered by an event.

The same shape as the server's side in ``handshake``: bytes in, events out, messages to send.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, Final

from nbdclone.errors import LocalProtocolError, RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.handshake import AHEAD_OF_TLS, HANDSHAKE_FLAGS
from nbdclone.protocol.handshake_events import Aborted, Negotiated, StartTLS
from nbdclone.protocol.option_data import OptionError, parse_name
from nbdclone.protocol.wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    GREETING,
    INFO_COUNT,
    INFO_TYPE,
    META_CONTEXT,
    OPTION,
    OPTION_REPLY,
    QUERY_COUNT,
    STRING_LENGTH,
    ExportInfo,
    HandshakeFlag,
    Info,
    Mode,
    Option,
    OptionReply,
    encode_string,
)


@dataclass(frozen=True, slots=True)
class Ready:
    """The server's greeting has been answered: ask with ``list_exports``, ``info``, ``go`` or ``abort``."""


@dataclass(frozen=True, slots=True)
class ExportList:
    """Answer to ``list_exports``: (name, description) of each."""

    exports: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ExportDescribed:
    """Answer to ``info``."""

    info: ExportInfo


@dataclass(frozen=True, slots=True)
class ContextsSet:
    """Answer to ``set_contexts``: (id, name) of each metadata context that the server selected."""

    contexts: tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class Opened:
    """Answer to ``go``: the transmission begins."""

    negotiated: Negotiated


@dataclass(frozen=True, slots=True)
class Refused:
    """The server refused an option: ``code`` is its NBD_REP_ERR_*. Something else may be asked."""

    option: int
    code: int
    message: str


ClientEvent = Ready | StartTLS | ExportList | ExportDescribed | ContextsSet | Opened | Refused | Aborted


@dataclass(slots=True)
class _Asked:
    """An option on its way, and what its replies have told so far."""

    option: int
    name: str = ""
    listed: list[tuple[str, str]] = field(default_factory=list)
    listed_bytes: int = 0
    wanted: frozenset[str] = frozenset()  # metadata contexts
    contexts: list[tuple[int, str]] = field(default_factory=list)
    size_and_flags: tuple[int, int] | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def info(self) -> ExportInfo:
        if self.size_and_flags is None:
            raise RemoteProtocolError("the server agreed to an export without telling its size")
        size, flags = self.size_and_flags
        fields = {"name": self.name} | self.details
        return ExportInfo(size=size, flags=flags, **fields)


class ClientHandshake:
    """The client's side of one handshake: one question at a time, each answered by one event.

    With ``tls``, NBD_OPT_STARTTLS is asked before all else: ``StartTLS``, or ``Refused``, and then the handshake is
    closed. Extended headers are asked for before ``Ready``, and structured replies where the server does not have
    them; ``wanted`` is the most to ask for, and ``mode`` what was agreed on. ``go`` falls back to NBD_OPT_EXPORT_NAME,
    to which a server that has no such export answers by closing the connection.
    """

    def __init__(self, wanted: Mode = Mode.EXTENDED, *, tls: bool = False) -> None:
        self.finished: Negotiated | None = None
        self.closed = False
        self.mode = Mode.SIMPLE
        self._wanted = wanted
        self._tls = tls
        self._starting_tls = False
        self._received = bytearray()
        self._outgoing: list[bytes] = []
        self._server_flags: int | None = None
        self._asked: _Asked | None = None
        self._events: deque[ClientEvent] = deque()
        self._contexts: tuple[tuple[int, str], ...] = ()
        self._contexts_export = ""  # for which they were selected

    def data_to_send(self) -> list[bytes]:
        """The messages to send now, and forget them."""
        outgoing, self._outgoing = self._outgoing, []
        return outgoing

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the server sent. Call ``next_event`` after it, until it returns None.

        Raises:
            RemoteProtocolError: it was sent ahead of TLS.
        """
        if self._starting_tls:
            self.closed = True
            raise RemoteProtocolError(AHEAD_OF_TLS)
        if not self.closed:
            self._received += data

    def trailing_data(self) -> bytes:
        """The bytes behind the server's last reply, which belong to the transmission, and forget them."""
        if self.finished is None:
            raise LocalProtocolError("the handshake has not finished")
        trailing = bytes(self._received)
        self._received.clear()
        return trailing

    def next_event(self) -> ClientEvent | None:
        """What the server answered; None if that takes more bytes, or nothing was asked.

        Raises:
            RemoteProtocolError: the server broke the protocol, or does not speak it.
        """
        try:
            while not self._events and not self.closed and self.finished is None and self._take_message():
                pass
        except RemoteProtocolError:
            self.closed = True
            raise
        return self._events.popleft() if self._events else None

    def tls_started(self) -> None:
        """Answer ``StartTLS``: from now on, what is received and sent goes through TLS."""
        if not self._starting_tls:
            raise LocalProtocolError("TLS was not agreed on")
        self._starting_tls = False
        self._agree_on_mode(self._wanted)

    # What the client asks

    def list_exports(self) -> None:
        """Ask for the names of all exports. Answer: ``ExportList`` or ``Refused``."""
        self._ask(_Asked(Option.LIST))

    def info(self, name: str) -> None:
        """Ask about an export. Answer: ``ExportDescribed`` or ``Refused``."""
        self._ask(_Asked(Option.INFO, name), _export_request(name))

    def set_contexts(self, name: str, contexts: Collection[str]) -> None:
        """Select metadata contexts for an export, in the place of all before. Answer: ``ContextsSet`` or ``Refused``.

        They count for a ``go`` to the same export. What the server does not know is missing in its answer.
        """
        data = _context_request(name, contexts)
        if self.mode is not Mode.SIMPLE:
            self._contexts = ()
            self._ask(_Asked(Option.SET_META_CONTEXT, name, wanted=frozenset(contexts)), data)
        else:
            self._refuse(Option.SET_META_CONTEXT, "metadata contexts take structured replies or extended headers")

    def go(self, name: str) -> None:
        """Ask to use an export. Answer: ``Opened`` or ``Refused``, or the connection's end."""
        data = _export_request(name)
        if self._fixed_newstyle:
            self._ask(_Asked(Option.GO, name), data)
        else:
            self._ask(_Asked(Option.EXPORT_NAME, name), name.encode())

    def abort(self) -> None:
        """End the handshake in peace. Answer: ``Aborted``, or the connection's end."""
        self._ask(_Asked(Option.ABORT))

    @property
    def _fixed_newstyle(self) -> bool:
        return bool((self._server_flags or 0) & HandshakeFlag.FIXED_NEWSTYLE)

    def _ask(self, asked: _Asked, data: bytes = b"") -> None:
        self._require_ready()
        if asked.option == Option.EXPORT_NAME or self._fixed_newstyle:
            self._send_option(asked, data)
        else:
            self._refuse(asked.option, "the server knows only NBD_OPT_EXPORT_NAME")

    def _refuse(self, option: int, message: str) -> None:
        """Answer in the server's place what it cannot be asked."""
        self._require_ready()
        self._events.append(Refused(option, OptionReply.ERR_UNSUP, message))

    def _require_ready(self) -> None:
        if self._server_flags is None or self._asked or self._events or self.closed or self.finished:
            raise LocalProtocolError("the handshake is over, or waits for the server's answer")

    def _send_option(self, asked: _Asked, data: bytes = b"") -> None:
        self._asked = asked
        self._outgoing.append(OPTION.pack(wire.IHAVEOPT, asked.option, len(data)) + data)

    # What the server sends

    def _take_message(self) -> bool:
        """Handle one message of the server's; False if it is not all there."""
        if self._server_flags is None:
            return self._take_greeting()
        if self._asked is None:
            if self._received:
                raise RemoteProtocolError("the server speaks without having been asked")
            return False
        if self._asked.option == Option.EXPORT_NAME:
            return self._take_export_name_reply(self._asked)
        return self._take_option_reply(self._asked)

    def _take_greeting(self) -> bool:
        if len(self._received) < GREETING.size:
            return False
        password, magic, flags = GREETING.unpack_from(self._received)
        if password != wire.INIT_PASSWD:
            raise RemoteProtocolError("this is not an NBD server")
        if magic == wire.CLISERV_MAGIC:
            raise RemoteProtocolError("the server speaks the oldstyle negotiation, which is not supported")
        if magic != wire.IHAVEOPT:
            raise RemoteProtocolError(f"an unknown greeting, 0x{magic:016x}")
        del self._received[: GREETING.size]
        self._server_flags = flags & HANDSHAKE_FLAGS
        self._outgoing.append(CLIENT_FLAGS.pack(self._server_flags))
        if self._tls and not self._fixed_newstyle:
            self._refuse_tls(OptionReply.ERR_UNSUP, "the server knows only NBD_OPT_EXPORT_NAME")
        elif self._tls:
            self._send_option(_Asked(Option.STARTTLS))
        else:
            self._agree_on_mode(self._wanted if self._fixed_newstyle else Mode.SIMPLE)
        return True

    def _agree_on_mode(self, mode: Mode) -> None:
        """Ask for ``mode``; a refusal leads to the next lower one."""
        if mode is Mode.SIMPLE:
            self._events.append(Ready())
        else:
            self._send_option(_Asked(_MODE_OPTIONS[mode]))

    def _refuse_tls(self, reply: int, message: str) -> None:
        """There is no going on without: whoever sits in between could have refused it."""
        self._events.append(Refused(Option.STARTTLS, reply, message))
        self.closed = True

    def _take_export_name_reply(self, asked: _Asked) -> bool:
        no_zeroes = (self._server_flags or 0) & HandshakeFlag.NO_ZEROES
        end = EXPORT_NAME_REPLY.size + (0 if no_zeroes else wire.EXPORT_NAME_PADDING)
        if len(self._received) < end:
            return False
        asked.size_and_flags = EXPORT_NAME_REPLY.unpack_from(self._received)
        del self._received[:end]
        self._finish(asked)
        return True

    def _take_option_reply(self, asked: _Asked) -> bool:
        if len(self._received) < OPTION_REPLY.size:
            return False
        magic, option, reply, length = OPTION_REPLY.unpack_from(self._received)
        if magic != wire.REPLY_MAGIC:
            raise RemoteProtocolError(f"an option reply starts with 0x{magic:x}, not with its magic number")
        if option != asked.option:
            raise RemoteProtocolError(f"option {asked.option} was asked, and {option} is answered")
        if length > wire.MAX_REPLY_LENGTH:
            raise RemoteProtocolError(f"an option reply of {length} bytes: limit {wire.MAX_REPLY_LENGTH}")
        end = OPTION_REPLY.size + length
        if len(self._received) < end:
            return False
        payload = bytes(self._received[OPTION_REPLY.size : end])
        del self._received[:end]
        if reply & wire.OPTION_REPLY_ERROR:
            self._on_error(asked, reply, payload)
        else:
            handler = _CLIENT_REPLIES.get((asked.option, reply))
            if handler is None:
                raise RemoteProtocolError(f"option {option} is answered by reply type {reply}")
            handler(self, asked, payload)
        return True

    def _on_error(self, asked: _Asked, reply: int, payload: bytes) -> None:
        self._asked = None
        if asked.option == Option.EXTENDED_HEADERS:
            self._agree_on_mode(Mode.STRUCTURED)
        elif asked.option == Option.STRUCTURED_REPLY:
            self._agree_on_mode(Mode.SIMPLE)
        elif asked.option == Option.STARTTLS:
            self._refuse_tls(reply, _text(payload))
        elif asked.option == Option.GO and reply == OptionReply.ERR_UNSUP:
            if self.mode is Mode.EXTENDED:
                raise RemoteProtocolError("the server knows extended headers, but not NBD_OPT_GO")
            self._send_option(_Asked(Option.EXPORT_NAME, asked.name), asked.name.encode())
        else:
            self._events.append(Refused(asked.option, reply, _text(payload)))

    def _on_tls_granted(self, _asked: _Asked, payload: bytes) -> None:
        _refuse_payload(payload)
        if self._received:
            raise RemoteProtocolError(AHEAD_OF_TLS)
        self._answer(StartTLS(), payload)
        self._starting_tls = True

    def _on_mode(self, asked: _Asked, payload: bytes) -> None:
        self.mode = Mode.EXTENDED if asked.option == Option.EXTENDED_HEADERS else Mode.STRUCTURED
        self._answer(Ready(), payload)

    def _on_aborted(self, _asked: _Asked, payload: bytes) -> None:
        self._answer(Aborted(), payload)
        self.closed = True

    def _on_server(self, asked: _Asked, payload: bytes) -> None:
        asked.listed_bytes += OPTION_REPLY.size + len(payload)
        if asked.listed_bytes > wire.MAX_LIST_LENGTH:
            raise RemoteProtocolError(f"a list of exports of more than {wire.MAX_LIST_LENGTH} bytes")
        if len(payload) < STRING_LENGTH.size:
            raise RemoteProtocolError("a listed export without a name")
        (name_length,) = STRING_LENGTH.unpack_from(payload)
        name, description = (
            payload[STRING_LENGTH.size :][:name_length],
            payload[STRING_LENGTH.size + name_length :],
        )
        if len(name) < name_length:
            raise RemoteProtocolError(f"a listed name of {name_length} bytes in a reply of {len(payload)}")
        asked.listed.append((_remote_name(name), _text(description)))

    def _on_listed(self, asked: _Asked, payload: bytes) -> None:
        self._answer(ExportList(tuple(asked.listed)), payload)

    def _on_context(self, asked: _Asked, payload: bytes) -> None:
        if len(payload) < META_CONTEXT.size:
            raise RemoteProtocolError("a metadata context without its id")
        (number,) = META_CONTEXT.unpack_from(payload)
        name = _text(payload[META_CONTEXT.size :])
        if name not in asked.wanted or any(number == other or name == known for other, known in asked.contexts):
            raise RemoteProtocolError(f"metadata context {name!r}, id {number}: not asked for, or there already")
        asked.contexts.append((number, name))

    def _on_contexts_set(self, asked: _Asked, payload: bytes) -> None:
        self._contexts, self._contexts_export = tuple(asked.contexts), asked.name
        self._answer(ContextsSet(self._contexts), payload)

    def _on_info(self, asked: _Asked, payload: bytes) -> None:
        if len(payload) < INFO_TYPE.size:
            raise RemoteProtocolError("information about an export without its type")
        (info,) = INFO_TYPE.unpack_from(payload)
        text = payload[INFO_TYPE.size :]
        if info == Info.EXPORT:
            _type, *size_and_flags = _unpack_info(wire.INFO_EXPORT, payload)
            asked.size_and_flags = (size_and_flags[0], size_and_flags[1])
        elif info == Info.BLOCK_SIZE:
            asked.details |= _block_sizes(payload)
        elif info == Info.NAME:
            asked.details["name"] = _remote_name(text)
        elif info == Info.DESCRIPTION:
            asked.details["description"] = _text(text)

    def _on_described(self, asked: _Asked, payload: bytes) -> None:
        self._answer(ExportDescribed(asked.info()), payload)

    def _on_gone(self, asked: _Asked, payload: bytes) -> None:
        _refuse_payload(payload)
        self._finish(asked)

    def _answer(self, event: ClientEvent, payload: bytes) -> None:
        _refuse_payload(payload)
        self._asked = None
        self._events.append(event)

    def _finish(self, asked: _Asked) -> None:
        self._asked = None
        contexts = self._contexts if asked.name == self._contexts_export else ()
        self.finished = Negotiated(asked.info(), self.mode, contexts)
        self._events.append(Opened(self.finished))


_CLIENT_REPLIES: Final[dict[tuple[int, int], Callable[[ClientHandshake, _Asked, bytes], None]]] = {
    (Option.STARTTLS, OptionReply.ACK): ClientHandshake._on_tls_granted,
    (Option.EXTENDED_HEADERS, OptionReply.ACK): ClientHandshake._on_mode,
    (Option.STRUCTURED_REPLY, OptionReply.ACK): ClientHandshake._on_mode,
    (Option.ABORT, OptionReply.ACK): ClientHandshake._on_aborted,
    (Option.LIST, OptionReply.SERVER): ClientHandshake._on_server,
    (Option.LIST, OptionReply.ACK): ClientHandshake._on_listed,
    (Option.SET_META_CONTEXT, OptionReply.META_CONTEXT): ClientHandshake._on_context,
    (Option.SET_META_CONTEXT, OptionReply.ACK): ClientHandshake._on_contexts_set,
    (Option.INFO, OptionReply.INFO): ClientHandshake._on_info,
    (Option.INFO, OptionReply.ACK): ClientHandshake._on_described,
    (Option.GO, OptionReply.INFO): ClientHandshake._on_info,
    (Option.GO, OptionReply.ACK): ClientHandshake._on_gone,
}

_MODE_OPTIONS: Final = {Mode.STRUCTURED: Option.STRUCTURED_REPLY, Mode.EXTENDED: Option.EXTENDED_HEADERS}
_WANTED_INFOS: Final = (Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


def _export_request(name: str) -> bytes:
    """The data of NBD_OPT_INFO and NBD_OPT_GO; the inverse of what the server's side parses."""
    encoded = encode_string(name, wire.MAX_NAME_LENGTH)
    infos = b"".join(INFO_TYPE.pack(info) for info in _WANTED_INFOS)
    return STRING_LENGTH.pack(len(encoded)) + encoded + INFO_COUNT.pack(len(_WANTED_INFOS)) + infos


def _context_request(name: str, contexts: Collection[str]) -> bytes:
    """The data of NBD_OPT_SET_META_CONTEXT; the inverse of what the server's side parses."""
    strings = [encode_string(name, wire.MAX_NAME_LENGTH)]
    strings += [encode_string(context, wire.MAX_STRING_LENGTH) for context in contexts]
    export, *queries = [STRING_LENGTH.pack(len(encoded)) + encoded for encoded in strings]
    return export + QUERY_COUNT.pack(len(queries)) + b"".join(queries)


def _refuse_payload(payload: bytes) -> None:
    if payload:
        raise RemoteProtocolError(f"NBD_REP_ACK with {len(payload)} bytes of data")


def _unpack_info(layout: Struct, payload: bytes) -> tuple[Any, ...]:
    if len(payload) != layout.size:
        raise RemoteProtocolError(f"export information of {len(payload)} bytes instead of {layout.size}")
    return layout.unpack(payload)


def _block_sizes(payload: bytes) -> dict[str, int]:
    _type, minimum, preferred, maximum = _unpack_info(wire.INFO_BLOCK_SIZE, payload)
    powers_of_two = minimum.bit_count() == preferred.bit_count() == 1
    if not (powers_of_two and minimum <= wire.MAX_MINIMUM_BLOCK and minimum <= preferred <= maximum):
        raise RemoteProtocolError(f"impossible block sizes: {minimum}, {preferred}, {maximum}")
    return {"minimum_block": minimum, "preferred_block": preferred, "maximum_payload": maximum}


def _remote_name(name: bytes) -> str:
    try:
        return parse_name(name)
    except OptionError as error:
        raise RemoteProtocolError(error.message) from None


def _text(payload: bytes) -> str:
    """A text for a person: what is wrong with it is replaced, what is too long is cut."""
    return payload[: wire.MAX_STRING_LENGTH].decode("utf-8", "replace")
