"""Both roles, joined in memory: a client and a server that keeps a small disk, and a link that may tamper.

The stream of an input is the number of requests, REQUEST bytes for each, and TAMPER bytes for each place where the link
changes something. Where it changes nothing neither side may find a fault, and every read has to give what was written.
"""

from __future__ import annotations

from itertools import pairwise
from struct import Struct

import wirebytes as w
from client_side import CONTEXT_NAMES, check_info
from feeding import Choices, Cut, agree

from nbdclone.errors import RemoteProtocolError
from nbdclone.protocol import wire
from nbdclone.protocol.block_status import merged, parse_status_filter, status_chunk
from nbdclone.protocol.client_handshake import ClientHandshake, Opened, Refused
from nbdclone.protocol.handshake import AHEAD_OF_TLS, ServerHandshake
from nbdclone.protocol.handshake_events import FindSnapshots, ListExports, OpenExport, StartTLS, TLSMode
from nbdclone.protocol.pending import Completed
from nbdclone.protocol.requests import Request, request_layout
from nbdclone.protocol.transmission import (
    ClientTransmission,
    error_chunk,
    hole_chunk,
    none_chunk,
    read_chunk_header,
    request_error,
    simple_reply,
)
from nbdclone.protocol.wire import EXTENDED, STRUCTURED, ExportInfo, Mode, transmission_flags

REQUEST = Struct(">BBHHB")  # command, flags, offset, length, what is written
TAMPER = Struct(">BHB")  # direction and what is done, after how many bytes, a byte for it
MAX_REQUESTS = 16
DISK_SIZE = 6 << 10
BLOCK = 256
# Of the offset and the length: a little more than the disk has, and no more than can be fed byte by byte.
OFFSET_MASK = (8 << 10) - 1
LENGTH_MASK = (1 << 10) - 1
TAMPER_MASK = (2 << 10) - 1  # of where: most conversations are not longer


def conversation(data: bytes) -> None:
    """A whole connection, from the greeting to the last reply, over a link that cuts, flips, drops and injects."""
    agree(data, _converse)


class Link:
    """One direction: what is written into it comes out in pieces, and changed where that was asked for."""

    def __init__(self, tampers: dict[int, tuple[int, int]], cut: Cut) -> None:
        self._tampers = tampers  # by how many bytes were written before: what is done, a byte for it
        self._cut = cut
        self._written = 0
        self._broken = False
        self.waiting = bytearray()

    def write(self, data: bytes) -> None:
        if not self._tampers:
            self.waiting += data
            return
        for byte in data:
            kind, value = self._tampers.get(self._written, (-1, 0))
            self._written += 1
            if self._broken or kind == 0:  # drop one
                continue
            self.waiting.append(byte ^ (value if kind == 1 else 0))
            if kind == 2:
                self.waiting.append(value)
            elif kind == 3:
                self.waiting += bytes([value]) * 64
            elif kind == 4:
                self._broken = True

    def pieces(self) -> list[bytes]:
        """All that waits."""
        pieces = list(self._cut(bytes(self.waiting)))
        self.waiting.clear()
        return pieces


class Server:
    """The server's side, with its disk."""

    def __init__(self, choices: Choices) -> None:
        self.handshake = ServerHandshake(choices.pick(*TLSMode))
        self.disk = bytearray(DISK_SIZE)
        self.read_only = choices.pick(False, False, False, True)
        self._swaps = choices.pick(False, True)
        self._held = b""
        self._buffer = bytearray()
        self._outgoing = bytearray()
        self.over = False

    def receive(self, pieces: list[bytes]) -> None:
        for index, piece in enumerate(pieces):
            if self.handshake.finished is None:
                self.handshake.receive_data(piece)
                self._haggle(index == len(pieces) - 1)
            else:
                self._buffer += piece
            if self.handshake.finished is not None and not self.over:
                self._run_requests(self.handshake.finished.mode)

    def data_to_send(self) -> bytes:
        while messages := self.handshake.data_to_send():
            self._outgoing += b"".join(messages)
        sent = bytes(self._outgoing)
        self._outgoing.clear()
        return sent

    def _haggle(self, last: bool) -> None:
        while (event := self.handshake.next_event()) is not None:
            match event:
                case ListExports():
                    self.handshake.send_list([("web1", "a disk")])
                case FindSnapshots():
                    self.handshake.send_contexts(["golden"])
                case OpenExport("web1"):
                    flags = transmission_flags(self.read_only)
                    self.handshake.accept_export(ExportInfo("web1", DISK_SIZE, flags, "a disk"))
                case OpenExport():
                    self.handshake.refuse_export("no such export")
                case StartTLS() if last:
                    self.handshake.tls_started()
        self.over = self.handshake.closed
        if self.handshake.finished is not None:
            self._buffer += self.handshake.trailing_data()

    def _run_requests(self, mode: Mode) -> None:
        requests: list[Request] = []
        position = 0
        try:
            position = request_layout(mode).parse(self._buffer, 0, len(self._buffer), requests)
        except RemoteProtocolError:
            self._run_until_disc(requests)
            if not self.over:
                raise
        else:
            self._run_until_disc(requests)
        del self._buffer[:position]

    def _run_until_disc(self, requests: list[Request]) -> None:
        for request in requests:
            if request[1] == w.DISC:
                self.over = True
                self._outgoing += self._held
                return
            self._reply(self._run(request))

    def _reply(self, reply: bytes) -> None:
        """Every second reply goes out before the one that it should follow, where that was chosen."""
        if self._swaps and not self._held:
            self._held = reply
        else:
            self._outgoing += reply + self._held
            self._held = b""

    def _run(self, request: Request) -> bytes:
        negotiated = self.handshake.finished
        assert negotiated is not None
        mode, info = negotiated.mode, negotiated.export
        flags, command, cookie, offset, length, start = request
        selected = [number for number, _name in negotiated.contexts]
        error = request_error(info, mode is not Mode.SIMPLE, flags, command, offset, length)
        if not error and flags & w.PAYLOAD_LEN:
            parsed = parse_status_filter(bytes(self._buffer[start : start + length]), selected)
            length, selected = parsed or (0, [])
            flags &= ~w.PAYLOAD_LEN
            error = request_error(info, True, flags, command, offset, length)
        if command == w.BLOCK_STATUS and not selected:
            error = error or wire.EINVAL
        if error:
            if mode is Mode.SIMPLE:
                return simple_reply(cookie, error)
            return error_chunk(cookie, error, "no", _layout(mode))
        payload = bytes(self._buffer[start : start + length]) if command == w.WRITE else b""
        return self._answer(mode, request[:4], length, payload, selected)

    def _answer(
        self, mode: Mode, head: tuple[int, int, int | bytes, int], length: int, payload: bytes, selected: list[int]
    ) -> bytes:
        flags, command, cookie, offset = head
        layout = _layout(mode)
        change(self.disk, command, offset, length, payload)
        if command == w.READ and mode is Mode.SIMPLE:
            return simple_reply(cookie, 0) + bytes(self.disk[offset : offset + length])
        if command == w.READ:
            return self._read(cookie, offset, length, bool(flags & w.DF), mode)
        if command == w.BLOCK_STATUS:
            extents = self._extents(offset, length, bool(flags & w.REQ_ONE))
            return b"".join(
                status_chunk(cookie, number, extents, last=number == selected[-1], layout=layout) for number in selected
            )
        return none_chunk(cookie, layout) if mode is Mode.EXTENDED else simple_reply(cookie, 0)

    def _blocks(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """Offset, length, and whether it is zeros, of what is in each block."""
        cuts = [offset, *range(offset - offset % BLOCK + BLOCK, offset + length, BLOCK), offset + length]
        return [(a, b - a, not any(self.disk[a:b])) for a, b in pairwise(cuts)]

    def _read(self, cookie: int | bytes, offset: int, length: int, whole: bool, mode: Mode) -> bytes:
        layout = _layout(mode)
        pieces = [(offset, length, False)] if whole else self._blocks(offset, length)
        reply = bytearray()
        for at, size, hole in pieces:
            last = at + size == offset + length
            if hole:
                reply += hole_chunk(cookie, at, size, last=last, layout=layout)
            else:
                reply += read_chunk_header(cookie, at, size, last=last, layout=layout) + self.disk[at : at + size]
        return bytes(reply)

    def _extents(self, offset: int, length: int, one: bool) -> list[tuple[int, int]]:
        extents = merged((size, 3 if hole else 0) for _at, size, hole in self._blocks(offset, length))
        return extents[:1] if one else extents


class Client:
    """The client's side, and what the disk should hold at each of its requests."""

    def __init__(self, choices: Choices, requests: list[tuple[int, ...]]) -> None:
        self.handshake = ClientHandshake(choices.pick(*reversed(Mode)), tls=choices.pick(False, True))
        self.completed: list[Completed] = []
        self.told: list[object] = []
        self.over = False
        self.transmission: ClientTransmission | None = None
        self._plan = list(choices.pick("g", "cg", "licg", "lcixcg"))
        self._requests = requests
        self._outgoing = bytearray()
        self.expected: dict[int, bytes] = {}
        self.asked = 0

    def receive(self, pieces: list[bytes]) -> None:
        for index, piece in enumerate(pieces):
            if self.transmission is not None:
                self.transmission.receive_data(piece, self.completed)
                continue
            self.handshake.receive_data(piece)
            self._haggle(index == len(pieces) - 1)

    def data_to_send(self) -> bytes:
        sent = b"".join(self.handshake.data_to_send()) + bytes(self._outgoing)
        self._outgoing.clear()
        return sent

    def _haggle(self, last: bool) -> None:
        while (event := self.handshake.next_event()) is not None:
            self.told.append(event)
            if isinstance(event, Opened):
                self._begin(event)
            elif isinstance(event, StartTLS):
                if last:
                    self.handshake.tls_started()
            elif self._plan and not self.handshake.closed:
                self._ask(self._plan.pop(0))
        self.over = self.handshake.closed

    def _ask(self, question: str) -> None:
        match question:
            case "l":
                self.handshake.list_exports()
            case "i":
                self.handshake.info("web1")
            case "x":
                self.handshake.info("nobody")
            case "c":
                self.handshake.set_contexts("web1", CONTEXT_NAMES[:2])
            case "g":
                self.handshake.go("web1")

    def _begin(self, opened: Opened) -> None:
        """The whole of what is asked goes out at once."""
        info, mode, contexts = opened.negotiated.export, opened.negotiated.mode, opened.negotiated.contexts
        check_info(info)
        selected = [number for number, _name in contexts]
        client = self.transmission = ClientTransmission(mode, selected)
        disk = bytearray(DISK_SIZE)
        for command, flags, offset, length, fill in self._requests:
            command, flags = command % 10, flags & ~w.PAYLOAD_LEN
            offset, length = offset & OFFSET_MASK, length & LENGTH_MASK
            filtered = [1, 2, 9][: fill % 4] if command == w.BLOCK_STATUS and mode is Mode.EXTENDED and fill else None
            payload = bytes([fill]) * length if command == w.WRITE else b""
            cookie, buffers = client.send_request(command, flags, offset, length, payload, contexts=filtered)
            self._outgoing += b"".join(buffers)
            if command == w.DISC:
                break
            self.asked += 1
            if not request_error(info, mode is not Mode.SIMPLE, flags, command, offset, length):
                change(disk, command, offset, length, payload)
                if command == w.READ:
                    self.expected[cookie] = bytes(disk[offset : offset + length])
        else:
            self._outgoing += b"".join(client.send_request(w.DISC, 0, 0, 0)[1])
        client.receive_data(self.handshake.trailing_data(), self.completed)


def change(disk: bytearray, command: int, offset: int, length: int, payload: bytes) -> None:
    """What a request that may be run does to a disk."""
    if command == w.WRITE:
        disk[offset : offset + length] = payload
    elif command in (w.TRIM, w.WRITE_ZEROES):
        disk[offset : offset + length] = bytes(length)


def _layout(mode: Mode) -> wire.ChunkLayout:
    return EXTENDED if mode is Mode.EXTENDED else STRUCTURED


def _converse(choices: Choices, stream: bytes, cut: Cut) -> list[object]:
    count = min(stream[0] if stream else 0, MAX_REQUESTS)
    body = stream[1:]
    requests = _records(REQUEST, body[: count * REQUEST.size])
    tampers = _records(TAMPER, body[len(requests) * REQUEST.size :])
    server, client = Server(choices), Client(choices, requests)
    done: tuple[dict[int, tuple[int, int]], ...] = ({}, {})
    for what, at, byte in tampers:
        done[what & 1][at & TAMPER_MASK] = (what >> 1 & 7, byte)
    links = [Link(tampering, cut) for tampering in done]
    errors = ["", ""]
    ends = (server, client)  # the first link leads to the server
    moving = True
    while moving:
        moving = False
        for way, end in enumerate(ends):
            if not errors[way]:
                try:
                    end.receive(links[way].pieces())
                except RemoteProtocolError as error:
                    errors[way] = str(error)
            sent = end.data_to_send()
            links[1 - way].write(sent)
            moving = moving or bool(sent)
    if AHEAD_OF_TLS in errors:  # what was sent before that was noticed depends on when it came
        return [AHEAD_OF_TLS]
    if not tampers:
        _check_honest(server, client, errors)
    return [client.told, client.completed, errors, server.over, client.over, bytes(server.disk)]


def _records(layout: Struct, data: bytes) -> list[tuple[int, ...]]:
    return list(layout.iter_unpack(data[: len(data) - len(data) % layout.size]))


def _check_honest(server: Server, client: Client, errors: list[str]) -> None:
    assert errors == ["", ""]
    refused = [event for event in client.told if isinstance(event, Refused)]
    if client.transmission is None:
        assert refused  # for want of TLS, or because it was required
        return
    assert server.over
    assert len(client.completed) == client.asked
    assert client.transmission.in_flight == 0
    for answer in client.completed:
        assert answer.data is None or answer.data == client.expected[answer.cookie]
    assert sum(answer.data is not None for answer in client.completed) == len(client.expected)
