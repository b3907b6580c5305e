"""A connection of the client: made, asked, and the protocol core between its transport and the tasks that wait."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from enum import IntEnum
from mmap import mmap
from pathlib import Path
from typing import Final, TypeVar, cast

from nbdclone.address import Address
from nbdclone.credentials import client_context, psk_client_context, reason
from nbdclone.errors import ConnectionFailed, LocalProtocolError, NBDCloneError, ProtocolError, ServerRefused
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
from nbdclone.protocol.handshake_events import StartTLS
from nbdclone.protocol.pending import Completed
from nbdclone.protocol.transmission import Buffer, ClientTransmission
from nbdclone.protocol.wire import Command, Mode, OptionReply

CLOSE_TIMEOUT_S: Final = 5.0  # for the server to close the connection after NBD_CMD_DISC
RECEIVE_BUFFER: Final = 256 << 10  # a Unix socket hands over about 200 KiB at a time
FLUSH_ABOVE: Final = 64 << 10  # smaller requests of one turn of the loop are sent together

Result = TypeVar("Result")
_Event = TypeVar("_Event", ContextsSet, ExportList, ExportDescribed, Opened, Ready, StartTLS)


class Connection(asyncio.BufferedProtocol):
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
            raise again(self.failure)
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
            raise again(self.failure)
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


async def connect(
    uri: str,
    address: Address,
    ask: Callable[[Connection], Awaitable[Result]],
    tls: ssl.SSLContext | None,
    timeout: float | None,
    mode: Mode = Mode.EXTENDED,
) -> Result:
    """Connect and ``ask``; on any failure, cancellation included, leave nothing open."""
    if tls is None and address.tls:
        tls = _context(address)
    connection = Connection(mode, tls=tls is not None)
    try:
        async with asyncio.timeout(timeout):
            await _dial(connection, address)
            if tls is not None:
                await answer_of(connection, StartTLS, uri)
                await connection.start_tls(tls, address.hostname or address.host)
            await answer_of(connection, Ready, uri)
            try:
                return await ask(connection)
            except ServerRefused:
                await say_goodbye(connection)
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


async def _dial(connection: Connection, address: Address) -> None:
    loop = asyncio.get_running_loop()
    if address.path:
        await loop.create_unix_connection(lambda: connection, address.path)
    else:
        await loop.create_connection(lambda: connection, address.host, address.port)


async def answer_of(connection: Connection, kind: type[_Event], subject: str) -> _Event:
    """The server's answer to what was just asked about ``subject``."""
    connection.pump_handshake()
    try:
        event = await connection.next_event()
    except ConnectionFailed as error:
        raise ConnectionFailed(f"{subject}: {error}") from None
    if isinstance(event, Refused):
        name = name_of(OptionReply, event.code)
        raise ServerRefused(f"{subject}: {name}{event.message and ': '}{event.message}", event.code)
    assert isinstance(event, kind)
    return event


async def say_goodbye(connection: Connection) -> None:
    """End a handshake that leads to no transmission."""
    with suppress(ProtocolError, ConnectionFailed, TimeoutError):  # some servers just close
        connection.handshake.abort()
        connection.pump_handshake()
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await connection.next_event()
    await connection.drop()


def name_of(enumeration: type[IntEnum], number: int) -> str:
    """The number as the specification calls it, where it does."""
    try:
        return enumeration(number).name
    except ValueError:
        return f"{enumeration.__name__} {number}"


def again(failure: NBDCloneError) -> NBDCloneError:
    """The same failure, to be raised in another task: each has a traceback of its own."""
    return type(failure)(*failure.args)
