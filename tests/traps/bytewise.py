"""A client that sends bytes written out by hand, and holds every byte that it hears against the specification."""

from __future__ import annotations

import asyncio
import struct
from typing import NamedTuple, Self

from serving import BASE, Peer, Reachable
from wirebytes import (
    ACK,
    DATA,
    DONE,
    ERROR,
    ERROR_OFFSET,
    FIXED,
    GO,
    HOLE,
    NO_ZEROES,
    READ,
    REP_CONTEXT,
    REP_INFO,
    SET_CONTEXTS,
    STATUS,
    STRUCTURED_REPLY,
    client_flags,
    context_request,
    export_request,
    greeting,
    option,
    option_reply,
    request,
)

OPTION_REPLY_MAGIC = bytes.fromhex("0003e889045565a9")
SIMPLE_MAGIC, STRUCTURED_MAGIC = 0x67446698, 0x668E33EF
IS_ERROR = 1 << 31  # of an option's reply
# qemu drops the connection when the text of an error is longer.
MAX_ERROR_TEXT = 1000
# How long a server that should be silent is listened to: one that is not answers within a millisecond.
SILENCE_S = 0.05

EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 5, 22, 28, 75, 95

# HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES, CAN_MULTI_CONN, SEND_CACHE, SEND_FAST_ZERO
CLONE_FLAGS = 1 | 4 | 8 | 0x20 | 0x40 | 0x100 | 0x400 | 0x800
# HAS_FLAGS, READ_ONLY, SEND_FLUSH, CAN_MULTI_CONN, SEND_CACHE
BASE_FLAGS = 1 | 2 | 4 | 0x100 | 0x400
SEND_DF = 0x80

Extents = list[tuple[int, int]]


class Heard(NamedTuple):
    """The whole reply to a request: ``data`` of a read, ``extents`` of block status by the context's id."""

    cookie: int
    error: int
    data: bytes = b""
    extents: dict[int, Extents] | None = None
    text: str = ""
    chunks: int = 0  # 0: it was a simple reply


class Bytewise(Peer):
    """Its methods fail on whatever the specification does not allow a server to say there."""

    structured = False
    size = 0
    flags = 0

    @classmethod
    async def greeted(cls, server: Reachable, flags: int = FIXED | NO_ZEROES, listener: int = 0) -> Self:
        """Connect, take the greeting, answer with these client flags."""
        peer = await cls.connect(server, listener)
        await peer.hears(greeting())
        await peer.send(client_flags(flags))
        peer._asked: dict[int, tuple[int, int]] = {}
        peer._parts: dict[int, list[tuple[int, bytes]]] = {}
        return peer

    @classmethod
    async def at(
        cls, server: Reachable, export: str = "web1", *, structured: bool = False, listener: int = 0, contexts: int = 0
    ) -> Self:
        """Connect, and haggle until the export is open; with the first ``contexts`` of the server's contexts."""
        peer = await cls.greeted(server, listener=listener)
        if structured:
            await peer.agrees_on_structured_replies()
        if contexts:
            await peer.selects(*CONTEXTS[:contexts], export=export)
        await peer.goes(export)
        return peer

    async def hears(self, *messages: bytes) -> None:
        """Exactly these bytes come next."""
        expected = b"".join(messages)
        heard = await self.receive(len(expected))
        if heard != expected:
            at = next(place for place, (one, other) in enumerate(zip(heard, expected, strict=True)) if one != other)
            raise AssertionError(f"at {at}: {heard[at : at + 40].hex(' ')}, not {expected[at : at + 40].hex(' ')}")

    async def hears_nothing(self) -> None:
        try:
            async with asyncio.timeout(SILENCE_S):
                heard = await self._loop.sock_recv(self.sock, 64)
        except TimeoutError:
            return
        raise AssertionError(f"heard {heard.hex(' ')}")

    # The handshake

    async def hears_option_reply(self, number: int) -> tuple[int, bytes]:
        """(type, data) of the next reply, which must be about this option; an error's data are a short text."""
        head = await self.receive(20)
        assert head[:8] == OPTION_REPLY_MAGIC
        about, kind, length = struct.unpack_from(">III", head, 8)
        assert about == number
        data = await self.receive(length)
        if kind & IS_ERROR:
            assert len(data) <= MAX_ERROR_TEXT
            data.decode()
        return kind, data

    async def is_refused(self, number: int, data: bytes = b"") -> int:
        """Send an option; the type of the error that is its one reply."""
        await self.send(option(number, data))
        kind, _text = await self.hears_option_reply(number)
        assert kind & IS_ERROR, f"option {number} was not refused: reply {kind}"
        return kind

    async def agrees_on_structured_replies(self) -> None:
        await self.send(option(STRUCTURED_REPLY))
        await self.hears(option_reply(STRUCTURED_REPLY, ACK))
        self.structured = True

    async def selects(self, *names: bytes, export: str = "web1") -> list[bytes]:
        """NBD_OPT_SET_META_CONTEXT; the contexts that were selected, as the server tells them: id, name."""
        await self.send(option(SET_CONTEXTS, context_request(export.encode(), *names)))
        told = []
        while True:
            kind, data = await self.hears_option_reply(SET_CONTEXTS)
            if kind == ACK:
                return told
            assert kind == REP_CONTEXT
            told.append(data)

    async def goes(self, export: str = "web1", number: int = GO) -> None:
        """NBD_OPT_GO (or INFO) asking for nothing; keeps size and flags."""
        await self.send(option(number, export_request(export.encode())))
        while True:
            kind, data = await self.hears_option_reply(number)
            if kind == ACK:
                break
            assert kind == REP_INFO
            if data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:])
        assert self.size

    # The transmission

    def asks(
        self, command: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0, payload: bytes = b""
    ) -> bytes:
        """A request's bytes, not sent yet; what a read will bring is kept in mind."""
        self._asked[cookie] = (offset, length if command == READ else 0)
        return request(command, offset, len(payload) or length, flags=flags, cookie=cookie, payload=payload)

    async def hears_reply(self) -> Heard:
        """The next reply that is whole: simple, or all of its chunks. Data must be there once and not be empty."""
        while True:
            (magic,) = struct.unpack(">I", await self.receive(4))
            if magic == SIMPLE_MAGIC:
                error, cookie = struct.unpack(">IQ", await self.receive(12))
                assert not (error and self.structured), "an error without a structure"
                _offset, length = self._asked.pop(cookie)
                assert not (length and self.structured), "a read without a structure"
                return Heard(cookie, error, b"" if error else await self.receive(length))
            assert magic == STRUCTURED_MAGIC
            assert self.structured
            flags, kind, cookie, length = struct.unpack(">HHQI", await self.receive(16))
            parts = self._parts.setdefault(cookie, [])
            parts.append((kind, await self.receive(length)))
            assert flags in (0, DONE)
            if flags == DONE:
                return self._whole(cookie, self._parts.pop(cookie))

    def _whole(self, cookie: int, parts: list[tuple[int, bytes]]) -> Heard:
        offset, length = self._asked.pop(cookie)
        failed = any(kind in (ERROR, ERROR_OFFSET) for kind, _payload in parts)
        if len(parts) == 1 and parts[0][0] == DATA and length and len(parts[0][1]) == 8 + length:  # the usual one
            assert parts[0][1][:8] == struct.pack(">Q", offset)
            return Heard(cookie, 0, parts[0][1][8:], {}, chunks=1)
        data, seen = bytearray(0 if failed else length), []
        error, text, extents = 0, "", {}
        for kind, payload in parts:
            if kind in (DATA, HOLE):
                (at,) = struct.unpack_from(">Q", payload)
                content = payload[8:] if kind == DATA else bytes(struct.unpack(">QI", payload)[1])
                start = at - offset
                assert content, "an empty chunk"
                assert 0 <= start < start + len(content) <= length, "data that were not asked for"
                assert not failed, "data for nothing"
                data[start : start + len(content)] = content
                seen.append((start, start + len(content)))
            elif kind == STATUS:
                (context,) = struct.unpack_from(">I", payload)
                assert context not in extents
                extents[context] = list(struct.iter_unpack(">II", payload[4:]))
            else:
                assert kind in (ERROR, ERROR_OFFSET)
                error, size = struct.unpack_from(">IH", payload)
                assert error
                assert size <= MAX_ERROR_TEXT
                assert len(payload) == 6 + size + (8 if kind == ERROR_OFFSET else 0)
                text = payload[6 : 6 + size].decode()
        places = [place for part in sorted(seen) for place in part]
        assert error or places[1:-1:2] == places[2::2], "data twice, or not at all"
        assert error or not length or (places[0], places[-1]) == (0, length), "not all of the data"
        return Heard(cookie, error, bytes(data), extents, text, len(parts))

    async def hears_replies(self, count: int) -> dict[int, Heard]:
        replies = [await self.hears_reply() for _ in range(count)]
        assert len({reply.cookie for reply in replies}) == count
        return {reply.cookie: reply for reply in replies}

    async def does(self, command: int, offset: int = 0, length: int = 0, **more: int | bytes) -> Heard:
        """Send one request and hear its reply."""
        await self.send(self.asks(command, offset, length, **more))
        return await self.hears_reply()

    async def lives_on(self, content: bytes = BASE[:512]) -> None:
        """The connection is in step: the next thing to be heard is the answer to what is asked now."""
        cookie = 0xA11FE
        assert await self.does(READ, 0, len(content), cookie=cookie) == Heard(
            cookie, 0, content, {} if self.structured else None, chunks=1 if self.structured else 0
        )


CONTEXTS = (b"base:allocation", b"qemu:allocation-depth", b"nbdclone:origin")
