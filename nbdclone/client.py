"""A small NBD client for asyncio: many requests in flight on one connection, from any number of tasks.

async with await Client.connect("nbd+unix:///web1?socket=/run/nbd.sock") as disk:
    await disk.pwrite(b"data", 4096)
    await disk.flush()
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import suppress
from enum import IntEnum
from mmap import mmap
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar, cast

from nbdclone.address import Address
from nbdclone.credentials import client_context, psk_client_context, reason
from nbdclone.errors import (
    ConnectionFailed,
    LocalProtocolError,
    NBDCloneError,
    ProtocolError,
    ServerRefused,
)
from nbdclone.protocol import wire
from nbdclone.protocol.block_status import Descriptors, merged
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
from nbdclone.protocol.handshake import Negotiated, StartTLS
from nbdclone.protocol.pending import Completed
from nbdclone.protocol.transmission import Buffer, ClientTransmission
from nbdclone.protocol.wire import Command, CommandFlag, Errno, ExportInfo, Mode, OptionReply, TransmissionFlag

CONNECT_TIMEOUT_S: Final = 30.0  # connecting and the handshake together
CLOSE_TIMEOUT_S: Final = 5.0  # for the server to close the connection after NBD_CMD_DISC
RECEIVE_BUFFER: Final = 256 << 10  # a Unix socket hands over about 200 KiB at a time
FLUSH_ABOVE: Final = 64 << 10  # smaller requests of one turn of the loop are sent together
MAX_PIECE: Final = wire.ADVERTISED_MAX_PAYLOAD  # the payload that every server takes
MAX_RANGE: Final = 1 << 30  # bytes of one request without a payload
MAX_EXTENDED_RANGE: Final = 1 << 63  # the same with extended headers: all of any disk

Names = list[str]
Pieces = list[tuple[int, int, Buffer]]  # offset, length, payload
Answers = list[bytes | bytearray | None]  # the data of each, where it was a read
_Result = TypeVar("_Result")
_Event = TypeVar("_Event", ContextsSet, ExportList, ExportDescribed, Opened, Ready, StartTLS)


class _Connection(asyncio.BufferedProtocol):
    """One connection: the protocol core between a transport and the tasks that wait for answers."""

    def __init__(self, mode: Mode, *, tls: bool) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.handshake = ClientHandshake(mode, tls=tls)
        self.failure: NBDCloneError | None = None
        self._buffer = memoryview(mmap(-1, RECEIVE_BUFFER))  # page-aligned, which the kernel copies into faster
        self._transport: asyncio.Transport | None = None
        self._transmission: ClientTransmission | None = None
        self._events: deque[ClientEvent] = deque()
        self._waiters: dict[int, asyncio.Future[Completed | NBDCloneError]] = {}
        self._progress = asyncio.Event()  # set when an event came, writing may go on, or all is lost
        self._paused = False
        self._outgoing: list[Buffer] = []
        self._outgoing_bytes = 0

    # What the transport calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._receive(self._buffer[:nbytes])
        except ProtocolError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(ConnectionFailed(f"the connection was lost: {reason(exc) if exc else 'the server closed it'}"))
        if not self.lost.done():
            self.lost.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._progress.set()

    def _receive(self, data: Buffer) -> None:
        if self._transmission is not None:
            self._transmit(self._transmission, data)
            return
        self.handshake.receive_data(data)
        self.pump_handshake()
        if self.handshake.finished is not None:
            negotiated = self.handshake.finished
            contexts = [number for number, _name in negotiated.contexts]
            self._transmission = ClientTransmission(negotiated.mode, contexts)
            self._transmit(self._transmission, self.handshake.trailing_data())

    def _transmit(self, transmission: ClientTransmission, data: Buffer) -> None:
        completed: list[Completed] = []
        try:
            transmission.receive_data(data, completed)
        finally:
            for answer in completed:
                waiter = self._waiters.pop(answer.cookie)
                if not waiter.done():  # its task may have been cancelled
                    waiter.set_result(answer)

    def _fail(self, failure: NBDCloneError) -> None:
        """Nothing more comes of this connection: tell everyone who waits. The first reason counts."""
        if self.failure is None:
            self.failure = failure
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_result(self.failure)
        self._waiters.clear()
        self._progress.set()
        if self._transport is not None:
            self._transport.abort()

    # What the client calls

    async def next_event(self) -> ClientEvent:
        """The next event of the handshake."""
        while not self._events:
            await self._wait_for_progress()
        return self._events.popleft()

    def pump_handshake(self) -> None:
        """Bring out the handshake's events and what it has to send."""
        while (event := self.handshake.next_event()) is not None:
            if isinstance(event, StartTLS):  # what comes next is OpenSSL's to judge, when it is there
                assert self._transport is not None
                self._transport.pause_reading()
            self._events.append(event)
            self._progress.set()
        for message in self.handshake.data_to_send():
            self._send([message])

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Go on through TLS. Raises OSError."""
        transport = self._transport
        assert transport is not None
        # Of a Unix socket nobody knows the server's name: then it is this machine's, if the context asks for one.
        name = host or ("localhost" if context.check_hostname else None)
        try:
            self._transport = await asyncio.get_running_loop().start_tls(transport, self, context, server_hostname=name)
        except BaseException:
            transport.abort()
            self._transport = None  # it is not this connection's any more, and will not tell it of its end
            raise
        self.handshake.tls_started()

    async def submit(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        payload: Buffer = b"",
        contexts: Collection[int] | None = None,
    ) -> asyncio.Future[Completed | NBDCloneError]:
        """Send a request as soon as the transport takes it; the future gives its answer, or why there is none."""
        while self._paused:
            await self._wait_for_progress()
        if self.failure is not None:
            raise _again(self.failure)
        if self._transmission is None:
            raise LocalProtocolError("the handshake has not finished")
        cookie, buffers = self._transmission.send_request(command, flags, offset, length, payload, contexts)
        waiter = self._waiters[cookie] = asyncio.get_running_loop().create_future()
        self._send(buffers)
        return waiter

    async def disconnect(self) -> None:
        """Tell the server that nothing more comes, and wait for it to close the connection."""
        try:
            if self.failure is None and self._transmission is not None:
                _cookie, buffers = self._transmission.send_request(Command.DISC, 0, 0, 0)
                self._send(buffers)
                await asyncio.wait([self.lost], timeout=CLOSE_TIMEOUT_S)
        finally:
            await self.drop()

    async def drop(self) -> None:
        """Close the connection at once, if there is one, and see it closed."""
        self._fail(ConnectionFailed("the connection has been closed"))
        if self._transport is not None:
            await asyncio.wait([self.lost])

    async def _wait_for_progress(self) -> None:
        if self.failure is not None:
            raise _again(self.failure)
        self._progress.clear()
        await self._progress.wait()

    def _send(self, buffers: list[Buffer]) -> None:
        """Send together what the tasks of one turn of the loop ask for: one system call instead of many."""
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing += buffers
        self._outgoing_bytes += sum(map(len, buffers))
        if self._outgoing_bytes >= FLUSH_ABOVE:
            self._flush()

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        large, self._outgoing_bytes = self._outgoing_bytes >= FLUSH_ABOVE, 0
        if self._transport is None or self._transport.is_closing() or not outgoing:
            return
        if large:
            for buffer in outgoing:
                self._transport.write(buffer)
        else:
            self._transport.write(b"".join(outgoing))


class Client:
    """An export of an NBD server, opened. Made by ``connect``; an asynchronous context manager.

    ``export`` is what the server told about it, ``mode`` what kind of messages was agreed on, ``contexts`` are the
    names of the metadata contexts that it selected, by their ids. Whether a range lies in it and may be written is the
    server's to judge. Every method that sends a request raises:

        ServerRefused: the server answered with an error.
        ConnectionFailed: the connection was lost.
        RemoteProtocolError: the server broke the protocol.
        LocalProtocolError: the export does not offer this, or not for blocks as small.
    """

    def __init__(self, connection: _Connection, negotiated: Negotiated) -> None:
        self._connection = connection
        self.export = negotiated.export
        self.size = negotiated.export.size
        self.flags = negotiated.export.flags
        self.read_only = negotiated.export.read_only
        self.mode = negotiated.mode
        self.contexts = dict(negotiated.contexts)
        largest = min(self.export.maximum_payload, MAX_PIECE)
        self._max_payload = max(largest - largest % self.export.minimum_block, self.export.minimum_block)
        max_range = MAX_EXTENDED_RANGE if self.mode is Mode.EXTENDED else MAX_RANGE
        self._max_range = max_range - max_range % self.export.minimum_block

    @classmethod
    async def connect(
        cls,
        uri: str,
        export: str = "",
        *,
        contexts: Collection[str] = (),
        mode: Mode = Mode.EXTENDED,
        tls: ssl.SSLContext | None = None,
        timeout: float | None = CONNECT_TIMEOUT_S,
    ) -> Self:
        """Open an export. ``uri`` is what ``Address.parse`` takes; ``export`` goes before the name in it.

        ``contexts`` are metadata contexts for ``block_status``; those that the server does not have are missing
        afterwards in the client's. ``mode`` is the most to ask for: a server that does not know it agrees on less.
        ``tls`` is how TLS is done, whatever the URI says; there is no going on without it. ``timeout`` is in seconds.

        Raises:
            UsageError: no such kind of URI, or something is wrong with the certificates that it names.
            ServerRefused: the server has no such export, or does not give it, or does without TLS.
            ConnectionFailed: there is no server, or it went away, or one side did not trust the other.
            RemoteProtocolError: it does not speak NBD as this client does.
        """
        address = Address.parse(uri)
        name = export or address.export

        async def go(connection: _Connection) -> Self:
            if contexts:
                connection.handshake.set_contexts(name, contexts)
                with suppress(ServerRefused):  # a server without contexts, or without the export: the next answer tells
                    await _answer(connection, ContextsSet, f"export {name!r}")
            connection.handshake.go(name)
            opened = await _answer(connection, Opened, f"export {name!r}")
            return cls(connection, opened.negotiated)

        return await _connect(uri, address, go, tls, timeout, mode)

    @staticmethod
    async def list(uri: str, *, tls: ssl.SSLContext | None = None, timeout: float | None = CONNECT_TIMEOUT_S) -> Names:
        """The names of the server's exports. ``uri`` and errors as in ``connect``."""

        async def ask(connection: _Connection) -> Names:
            connection.handshake.list_exports()
            answer = await _answer(connection, ExportList, "the list of exports")
            await _say_goodbye(connection)
            return [name for name, _description in answer.exports]

        return await _connect(uri, Address.parse(uri), ask, tls, timeout)

    @staticmethod
    async def describe(
        uri: str, export: str = "", *, tls: ssl.SSLContext | None = None, timeout: float | None = CONNECT_TIMEOUT_S
    ) -> ExportInfo:
        """What the server tells about an export, without opening it. Arguments and errors as in ``connect``."""
        address = Address.parse(uri)
        name = export or address.export

        async def ask(connection: _Connection) -> ExportInfo:
            connection.handshake.info(name)
            answer = await _answer(connection, ExportDescribed, f"export {name!r}")
            await _say_goodbye(connection)
            return answer.info

        return await _connect(uri, address, ask, tls, timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect in peace: the server finishes what is in flight, then closes the connection.

        Returns after ``CLOSE_TIMEOUT_S`` at the latest, with the connection closed in any case.
        """
        await self._connection.disconnect()

    async def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on."""
        pieces: Pieces = [(at, size, b"") for at, size in _split(offset, length, self._max_payload)]
        parts = [cast(bytes, part) for part in await self._run(Command.READ, 0, pieces)]
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    async def pwrite(self, data: Buffer, offset: int, *, fua: bool = False) -> None:
        """Write ``data`` at ``offset``; with ``fua`` it is durable afterwards."""
        view = memoryview(data).cast("B")
        ranges = _split(offset, len(view), self._max_payload)
        pieces: Pieces = [(at, size, view[at - offset : at - offset + size]) for at, size in ranges]
        await self._run(Command.WRITE, self._fua(fua), pieces)

    async def flush(self) -> None:
        """Make durable every write that was acknowledged before."""
        self._require(TransmissionFlag.SEND_FLUSH)
        await self.request(Command.FLUSH, 0, 0, 0)

    async def trim(self, length: int, offset: int, *, fua: bool = False) -> None:
        """Give up the content of a range."""
        self._require(TransmissionFlag.SEND_TRIM)
        await self._run_range(Command.TRIM, self._fua(fua), length, offset)

    async def zero(
        self, length: int, offset: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> None:
        """Write zeros. ``no_hole`` keeps the range allocated; ``fast`` fails with ENOTSUP rather than be slow."""
        self._require(TransmissionFlag.SEND_WRITE_ZEROES)
        flags = self._fua(fua)
        if no_hole:
            flags |= CommandFlag.NO_HOLE
        if fast:
            self._require(TransmissionFlag.SEND_FAST_ZERO)
            flags |= CommandFlag.FAST_ZERO
        await self._run_range(Command.WRITE_ZEROES, flags, length, offset)

    async def cache(self, length: int, offset: int) -> None:
        """Tell the server that a range will be read soon."""
        self._require(TransmissionFlag.SEND_CACHE)
        # Some servers (qemu-nbd) take no more of it than of data.
        pieces: Pieces = [(at, size, b"") for at, size in _split(offset, length, self._max_payload)]
        await self._run(Command.CACHE, 0, pieces)

    async def block_status(
        self, length: int, offset: int, *, contexts: Collection[str] | None = None
    ) -> dict[str, Descriptors]:
        """What stands where in a range: in each of the contexts, (length, status) of consecutive extents.

        They cover the range, and neighbours differ. The status is a number that its context gives a meaning; in
        ``base:allocation`` the bits are HOLE (1) and ZERO (2). ``contexts`` limits the answer to some of those that
        were selected; a server that knows how is then asked for no more.
        """
        wanted = {number: name for number, name in self.contexts.items() if contexts is None or name in contexts}
        if not wanted or not set(contexts or ()) <= set(wanted.values()):
            raise LocalProtocolError(f"export {self.export.name!r} was opened without such metadata contexts")
        offered = self.mode is Mode.EXTENDED and self.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD
        asked = list(wanted) if contexts is not None and offered else None
        told: dict[str, Descriptors] = {name: [] for name in wanted.values()}
        end = offset + length
        while offset < end:
            size = min(end - offset, self._max_range)
            self._check_blocks(offset, size)
            waiter = await self._connection.submit(Command.BLOCK_STATUS, 0, offset, size, contexts=asked)
            extents = _completed(await waiter, Command.BLOCK_STATUS, offset, size).extents
            assert extents is not None
            # As far as all contexts tell: one may have been described further than another, or than was asked.
            size = min(size, *(sum(count for count, _status in extents[number]) for number in wanted))
            for number, name in wanted.items():
                told[name] += _first(extents[number], size)
            offset += size
        return {name: merged(descriptors) for name, descriptors in told.items()}

    async def request(
        self, command: int, flags: int, offset: int, length: int, payload: Buffer = b""
    ) -> bytes | bytearray | None:
        """One request as it is, neither checked nor split: for those who want to see what the server says to it.

        Returns the data of a read, and None otherwise.
        """
        waiter = await self._connection.submit(command, flags, offset, length, payload)
        return _result(await waiter, command, offset, length)

    async def _run_range(self, command: int, flags: int, length: int, offset: int) -> None:
        pieces: Pieces = [(at, size, b"") for at, size in _split(offset, length, self._max_range)]
        await self._run(command, flags, pieces)

    async def _run(self, command: int, flags: int, pieces: Pieces) -> Answers:
        """Have the pieces of one request in flight together, and wait for all of them whatever comes of one."""
        for offset, length, _payload in pieces:
            self._check_blocks(offset, length)
        waiters = [await self._connection.submit(command, flags, *piece) for piece in pieces]
        answers = [await waiter for waiter in waiters]
        return [
            _result(answer, command, offset, length)
            for answer, (offset, length, _payload) in zip(answers, pieces, strict=True)
        ]

    def _check_blocks(self, offset: int, length: int) -> None:
        if (offset | length) & (self.export.minimum_block - 1):
            raise LocalProtocolError(f"the export takes nothing but blocks of {self.export.minimum_block} bytes")

    def _require(self, flag: TransmissionFlag) -> None:
        if not self.flags & flag:
            raise LocalProtocolError(f"export {self.export.name!r} does not offer {flag.name}")

    def _fua(self, fua: bool) -> int:
        if not fua:
            return 0
        self._require(TransmissionFlag.SEND_FUA)
        return CommandFlag.FUA


async def _connect(
    uri: str,
    address: Address,
    ask: Callable[[_Connection], Awaitable[_Result]],
    tls: ssl.SSLContext | None,
    timeout: float | None,
    mode: Mode = Mode.EXTENDED,
) -> _Result:
    """Connect and ``ask``; on any failure, cancellation included, leave nothing open."""
    if tls is None and address.tls:
        tls = _context(address)
    connection = _Connection(mode, tls=tls is not None)
    try:
        async with asyncio.timeout(timeout):
            await _dial(connection, address)
            if tls is not None:
                await _answer(connection, StartTLS, uri)
                await connection.start_tls(tls, address.hostname or address.host)
            await _answer(connection, Ready, uri)
            try:
                return await ask(connection)
            except ServerRefused:
                await _say_goodbye(connection)
                raise
    except BaseException as error:
        await connection.drop()
        if isinstance(error, OSError) and not isinstance(error, NBDCloneError):
            raise ConnectionFailed(f"{uri}: {_why(error, timeout)}") from error
        raise


def _why(error: OSError, timeout: float | None) -> str:
    return f"no answer within {timeout} s" if isinstance(error, TimeoutError) and not str(error) else reason(error)


def _context(address: Address) -> ssl.SSLContext:
    """How TLS is done, as far as the URI says."""
    if address.psk_file:
        return psk_client_context(Path(address.psk_file), address.username)
    context = client_context(
        Path(address.certificates) if address.certificates else None, verify_peer=address.verify_peer
    )
    if address.path and not address.hostname:
        context.check_hostname = False  # a Unix socket has no name: the CA's word has to do
    return context


async def _dial(connection: _Connection, address: Address) -> None:
    loop = asyncio.get_running_loop()
    if address.path:
        await loop.create_unix_connection(lambda: connection, address.path)
    else:
        await loop.create_connection(lambda: connection, address.host, address.port)


async def _answer(connection: _Connection, kind: type[_Event], subject: str) -> _Event:
    """The server's answer to what was just asked about ``subject``."""
    connection.pump_handshake()
    try:
        event = await connection.next_event()
    except ConnectionFailed as error:
        raise ConnectionFailed(f"{subject}: {error}") from None
    if isinstance(event, Refused):
        name = _name_of(OptionReply, event.code)
        raise ServerRefused(f"{subject}: {name}{event.message and ': '}{event.message}", event.code)
    assert isinstance(event, kind)
    return event


async def _say_goodbye(connection: _Connection) -> None:
    """End a handshake that leads to no transmission."""
    with suppress(ProtocolError, ConnectionFailed, TimeoutError):  # some servers just close
        connection.handshake.abort()
        connection.pump_handshake()
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await connection.next_event()
    await connection.drop()


def _split(offset: int, length: int, limit: int) -> Iterator[tuple[int, int]]:
    """The range in pieces of at most ``limit`` bytes: (offset, length) of each."""
    if length < 0:
        raise LocalProtocolError(f"a length of {length} bytes")
    end = offset + length
    while offset < end:
        size = min(limit, end - offset)
        yield offset, size
        offset += size


def _first(descriptors: Descriptors, length: int) -> Iterator[tuple[int, int]]:
    """The descriptors of the first ``length`` bytes."""
    for count, status in descriptors:
        if not length:
            return
        count = min(count, length)
        yield count, status
        length -= count


def _result(answer: Completed | NBDCloneError, command: int, offset: int, length: int) -> bytes | bytearray | None:
    return _completed(answer, command, offset, length).data


def _completed(answer: Completed | NBDCloneError, command: int, offset: int, length: int) -> Completed:
    """The answer to a request that succeeded; what failed is raised."""
    if isinstance(answer, NBDCloneError):
        raise _again(answer)
    if answer.error:
        what = f"{_name_of(Command, command)} of {length} bytes at {offset}"
        name = _name_of(Errno, answer.error)
        raise ServerRefused(f"{what}: {name}{answer.message and ': '}{answer.message}", answer.error)
    return answer


def _name_of(enumeration: type[IntEnum], number: int) -> str:
    """The number as the specification calls it, where it does."""
    try:
        return enumeration(number).name
    except ValueError:
        return f"{enumeration.__name__} {number}"


def _again(failure: NBDCloneError) -> NBDCloneError:
    """The same failure, to be raised in another task: each has a traceback of its own."""
    return type(failure)(*failure.args)
