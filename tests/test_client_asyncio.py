"""The asyncio client against a small server in the same process: a bytearray behind the protocol core."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from nbdclone import client as client_module
from nbdclone import client_connection
from nbdclone.client import Address, Client
from nbdclone.errors import ConnectionFailed, LocalProtocolError, RemoteProtocolError, ServerRefused, UsageError
from nbdclone.protocol import wire
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.handshake_events import Aborted, ListExports, OpenExport
from nbdclone.protocol.requests import MAX_BURST, Request, request_layout
from nbdclone.protocol.transmission import (
    error_chunk,
    none_chunk,
    read_chunk_header,
    request_error,
    simple_reply,
)
from nbdclone.protocol.wire import EXTENDED, STRUCTURED, ExportInfo, Mode, TransmissionFlag, transmission_flags

pytestmark = pytest.mark.timeout(30)
SIZE = 1 << 20
DISK = ExportInfo("disk", SIZE, transmission_flags(False), "a fake")


@dataclass
class FakeServer:
    """One export, "disk". ``hold`` keeps replies back; ``log`` has (command, flags, offset, length) of each request."""

    uri: str = ""
    info: ExportInfo = DISK
    mode: Mode = Mode.EXTENDED  # the most that it knows
    hold: asyncio.Event | None = None
    stop_reading: asyncio.Event | None = None
    last_words: bytes | None = None  # sent instead of the first reply, before the connection is dropped
    log: list[tuple[int, int, int, int]] = field(default_factory=list)
    connections: int = 0
    goodbyes: int = 0  # of handshakes that were ended by NBD_OPT_ABORT
    memory: bytearray = field(default_factory=lambda: bytearray(SIZE))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            if (rest := await self._haggle(reader, writer)) is not None:
                await self._transmit(reader, writer, rest)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.connections -= 1
            writer.close()

    async def _haggle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | None:
        server = ServerHandshake()
        while not server.closed and not server.finished:
            self._send(server, writer)
            data = await reader.read(1 << 16)
            if not data:
                return None
            for known, unknown in self._unknown_options():
                data = data.replace(b"IHAVEOPT\0\0\0" + known, b"IHAVEOPT\0\0\0" + unknown)
            server.receive_data(data)
            while (event := server.next_event()) is not None:
                self._answer(server, event)
        self._send(server, writer)
        return server.trailing_data() if server.finished else None

    def _send(self, server: ServerHandshake, writer: asyncio.StreamWriter) -> None:
        for message in server.data_to_send():
            for known, unknown in self._unknown_options():
                message = message.replace(b"\x65\xa9\0\0\0" + unknown, b"\x65\xa9\0\0\0" + known)
            writer.write(message)

    def _unknown_options(self) -> list[tuple[bytes, bytes]]:
        """The options that this server pretends not to know, and numbers that nobody knows for them."""
        return [(b"\x0b", b"\x64"), (b"\x08", b"\x63")][: Mode.EXTENDED - self.mode]

    def _answer(self, server: ServerHandshake, event: object) -> None:
        match event:
            case ListExports():
                server.send_list([("disk", "a fake"), ("größe", "")])
            case OpenExport("disk"):
                server.accept_export(self.info)
            case OpenExport(name):
                server.refuse_export(f"there is no {name}")
            case Aborted():
                self.goodbyes += 1

    async def _transmit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, buffer: bytes) -> None:
        while True:
            requests: list[Request] = []
            taken = request_layout(self.mode).parse(buffer, 0, len(buffer), requests)
            for request in requests:
                flags, command, _cookie, offset, length, payload_start = request
                self.log.append((command, flags, offset, length))
                if command == wire.CMD_DISC:
                    return
                if self.hold is not None:
                    await self.hold.wait()
                if self.last_words is not None:
                    writer.write(self.last_words)
                    return
                writer.write(self._run(request, buffer[payload_start : payload_start + length]))
                await writer.drain()
            if self.stop_reading is not None:
                await self.stop_reading.wait()
            if len(requests) == MAX_BURST:  # there may be more of them
                buffer = buffer[taken:]
                continue
            more = await reader.read(1 << 20)
            if not more:
                return
            buffer = buffer[taken:] + more

    def _run(self, request: Request, payload: bytes) -> bytes:
        flags, command, cookie, offset, length, _payload_start = request
        layout = EXTENDED if self.mode is Mode.EXTENDED else STRUCTURED
        in_chunks = self.mode is not Mode.SIMPLE
        if error := request_error(self.info, in_chunks, flags, command, offset, length):
            return error_chunk(cookie, error, "refused", layout) if in_chunks else simple_reply(cookie, error)
        end = offset + length
        if command == wire.CMD_READ:
            head = read_chunk_header(cookie, offset, length, layout=layout) if in_chunks else simple_reply(cookie, 0)
            return head + self.memory[offset:end]
        if command == wire.CMD_WRITE:
            self.memory[offset:end] = payload
        elif command in (wire.CMD_TRIM, wire.CMD_WRITE_ZEROES):
            self.memory[offset:end] = bytes(length)
        return none_chunk(cookie, layout) if in_chunks else simple_reply(cookie, 0)


@asynccontextmanager
async def running(server: FakeServer, path: Path) -> AsyncIterator[FakeServer]:
    """The server on a Unix socket; afterwards every connection must be closed."""
    sock = path / "nbd.sock"
    server.uri = f"nbd+unix:///disk?socket={sock}"
    listener = await asyncio.start_unix_server(server.serve, sock)
    try:
        yield server
    finally:
        listener.close()
        await listener.wait_closed()
        deadline = time.monotonic() + 5
        while server.connections:
            assert time.monotonic() < deadline, f"{server.connections} connections are still open"
            await asyncio.sleep(0.01)


@pytest.fixture(params=Mode, ids=lambda mode: mode.name.lower())
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[FakeServer]:
    async with running(FakeServer(mode=request.param), tmp_path) as running_server:
        yield running_server


async def test_what_is_written_is_read(server: FakeServer) -> None:
    async with await Client.connect(server.uri) as disk:
        assert (disk.size, disk.read_only, disk.mode) == (SIZE, False, server.mode)
        await disk.pwrite(b"hello", 1000)
        assert await disk.pread(5, 1000) == b"hello"
        assert type(await disk.pread(5, 1000)) is bytes
        await disk.trim(2, 1000)
        await disk.zero(1, 1004)
        await disk.cache(5, 1000)
        await disk.flush()
        assert await disk.pread(5, 1000) == b"\0\0ll\0"


async def test_flags_reach_the_server(server: FakeServer) -> None:
    async with await Client.connect(server.uri) as disk:
        await disk.pwrite(b"x", 0, fua=True)
        await disk.trim(512, 0, fua=True)
        await disk.zero(512, 0, fua=True, no_hole=True, fast=True)
    assert server.log == [
        (wire.CMD_WRITE, 1, 0, 1),
        (wire.CMD_TRIM, 1, 0, 512),
        (wire.CMD_WRITE_ZEROES, 1 | 2 | 16, 0, 512),
        (wire.CMD_DISC, 0, 0, 0),
    ]


async def test_nothing_is_asked_for_no_bytes(server: FakeServer) -> None:
    async with await Client.connect(server.uri) as disk:
        assert await disk.pread(0, 0) == b""
        await disk.pwrite(b"", 0)
        await disk.trim(0, 0)
    assert [entry[0] for entry in server.log] == [wire.CMD_DISC]


async def test_exports_are_listed_and_described(server: FakeServer) -> None:
    assert await Client.list(server.uri) == ["disk", "größe"]
    info = await Client.describe(server.uri)
    assert (info.name, info.size, info.description) == ("disk", SIZE, "a fake")


async def test_an_export_that_is_not_there_is_refused_with_its_name(server: FakeServer) -> None:
    with pytest.raises(ServerRefused, match=r"export 'nobody': ERR_UNKNOWN: there is no nobody") as caught:
        await Client.connect(server.uri, "nobody")
    assert caught.value.code == wire.NBD_REP_ERR_UNKNOWN
    assert server.goodbyes == 1


async def test_an_error_names_command_range_and_number(server: FakeServer) -> None:
    async with await Client.connect(server.uri) as disk:
        with pytest.raises(ServerRefused, match=f"WRITE of 2 bytes at {SIZE - 1}: ENOSPC") as caught:
            await disk.pwrite(b"xx", SIZE - 1)
        assert caught.value.code == wire.ENOSPC
        with pytest.raises(ServerRefused, match=f"READ of 512 bytes at {SIZE}: EINVAL"):
            await disk.pread(512, SIZE)
        with pytest.raises(ServerRefused, match="Command 77 of 0 bytes at 0: EINVAL"):
            await disk.request(77, 0, 0, 0)
        assert await disk.pread(1, 0) == b"\0", "the connection lives on"


async def test_requests_of_many_tasks_are_in_flight_together(server: FakeServer) -> None:
    server.memory[:] = os.urandom(SIZE)
    async with await Client.connect(server.uri) as disk:
        blocks = await asyncio.gather(*(disk.pread(4096, at) for at in range(0, SIZE, 4096)))
    assert b"".join(blocks) == server.memory


async def test_a_cancelled_request_leaves_the_others_alone(server: FakeServer) -> None:
    server.hold = asyncio.Event()
    server.memory[:3] = b"abc"
    async with await Client.connect(server.uri) as disk:
        cancelled = asyncio.create_task(disk.pread(1, 0))
        other = asyncio.create_task(disk.pread(1, 1))
        await until(lambda: bool(server.log))
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        server.hold.set()
        assert await other == b"b"
        assert await disk.pread(1, 2) == b"c"


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for does not know of this test
        await asyncio.sleep(0.001)


async def test_large_requests_are_split_at_the_servers_maximum(server: FakeServer) -> None:
    server.info = replace(server.info, maximum_payload=100_000, minimum_block=512)
    data = os.urandom(512 * 1000)
    async with await Client.connect(server.uri) as disk:
        await disk.pwrite(data, 512)
        assert await disk.pread(len(data), 512) == data
    lengths = [length for command, _flags, _offset, length in server.log if command in (wire.CMD_READ, wire.CMD_WRITE)]
    piece = 100_000 // 512 * 512
    assert max(lengths) == piece
    assert len(lengths) == 2 * -(-len(data) // piece)


async def test_ranges_without_payload_are_split_unless_headers_are_extended(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_RANGE", 1000)
    async with await Client.connect(server.uri) as disk:
        await disk.trim(2500, 7)
    pieces = [(7, 1000), (1007, 1000), (2007, 500)] if server.mode is not Mode.EXTENDED else [(7, 2500)]
    assert server.log[:-1] == [(wire.CMD_TRIM, 0, *piece) for piece in pieces]


async def test_an_error_in_one_piece_is_raised_after_all_are_answered(server: FakeServer) -> None:
    server.info = replace(server.info, maximum_payload=4096)
    async with await Client.connect(server.uri) as disk:
        with pytest.raises(ServerRefused, match="ENOSPC"):
            await disk.pwrite(bytes(12288), SIZE - 4096)
        assert len(server.log) == 3


async def test_blocks_smaller_than_the_server_takes_are_not_sent(server: FakeServer) -> None:
    server.info = replace(server.info, minimum_block=512)
    async with await Client.connect(server.uri) as disk:
        for offset, length in ((0, 511), (1, 512)):
            with pytest.raises(LocalProtocolError, match="512"):
                await disk.pread(length, offset)
        assert len(await disk.pread(512, 512)) == 512


async def test_what_was_not_offered_is_not_sent(server: FakeServer) -> None:
    server.info = replace(server.info, flags=TransmissionFlag.HAS_FLAGS)
    async with await Client.connect(server.uri) as disk:
        attempts: list[tuple[str, Callable[[], Awaitable[None]]]] = [
            ("SEND_FLUSH", disk.flush),
            ("SEND_TRIM", lambda: disk.trim(512, 0)),
            ("SEND_WRITE_ZEROES", lambda: disk.zero(512, 0)),
            ("SEND_CACHE", lambda: disk.cache(512, 0)),
            ("SEND_FUA", lambda: disk.pwrite(b"x", 0, fua=True)),
        ]
        for name, attempt in attempts:
            with pytest.raises(LocalProtocolError, match=name):
                await attempt()
        with pytest.raises(LocalProtocolError):
            await disk.pread(-1, 0)
        with pytest.raises(LocalProtocolError):
            await disk.pread(1, -1)
    assert [entry[0] for entry in server.log] == [wire.CMD_DISC]


async def test_a_lost_connection_wakes_everyone_who_waits(server: FakeServer) -> None:
    server.hold = asyncio.Event()
    server.last_words = b""
    disk = await Client.connect(server.uri)
    waiting = [asyncio.create_task(disk.pread(512, 0)) for _ in range(10)]
    await until(lambda: bool(server.log))
    server.hold.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, ConnectionFailed) for result in results)
    assert len({id(result) for result in results}) == len(results)
    with pytest.raises(ConnectionError, match="lost"):
        await disk.pread(512, 0)
    await disk.close()
    await disk.close()


async def test_a_lie_wakes_everyone_who_waits_and_closes_the_connection(server: FakeServer) -> None:
    server.last_words = simple_reply(12345, 0)
    disk = await Client.connect(server.uri)
    results = await asyncio.gather(disk.pread(512, 0), disk.flush(), return_exceptions=True)
    assert [type(result) for result in results] == [RemoteProtocolError] * 2
    await until(lambda: not server.connections)
    with pytest.raises(RemoteProtocolError):
        await disk.flush()
    await disk.close()


async def test_close_wakes_what_is_in_flight_at_the_latest_when_the_server_does_not_answer(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_connection, "CLOSE_TIMEOUT_S", 0.05)
    server.hold = asyncio.Event()
    disk = await Client.connect(server.uri)
    waiting = asyncio.create_task(disk.pread(512, 0))
    await until(lambda: bool(server.log))
    await disk.close()
    with pytest.raises(ConnectionFailed, match="closed"):
        await waiting
    server.hold.set()


async def test_close_lets_the_server_answer_what_is_in_flight(server: FakeServer) -> None:
    server.memory[:4] = b"last"
    disk = await Client.connect(server.uri)
    waiting = asyncio.create_task(disk.pread(4, 0))
    await asyncio.sleep(0)
    await disk.close()
    assert await waiting == b"last"
    with pytest.raises(ConnectionFailed):
        await disk.flush()


async def test_cancelling_close_closes_all_the_same(server: FakeServer) -> None:
    server.hold = asyncio.Event()
    disk = await Client.connect(server.uri)
    waiting = asyncio.create_task(disk.pread(512, 0))
    await until(lambda: bool(server.log))
    closing = asyncio.create_task(disk.close())
    await asyncio.sleep(0.01)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(ConnectionFailed):
        await waiting
    server.hold.set()


async def test_writes_wait_while_the_server_does_not_read(server: FakeServer) -> None:
    """What a transport would take is bounded: of 64 MiB of writes only a little may leave the tasks."""
    async with await Client.connect(server.uri) as disk:
        piece = bytes(256 << 10)
        server.stop_reading = asyncio.Event()
        writing = [asyncio.create_task(disk.pwrite(piece, 0)) for _ in range(256)]
        await asyncio.sleep(0.2)
        in_flight = disk._connection._transmission
        assert in_flight is not None
        assert 0 < in_flight.in_flight < 8
        server.stop_reading.set()
        await asyncio.gather(*writing)
    assert len(server.log) == 257


# Connecting


async def test_tcp_works_like_a_unix_socket() -> None:
    fake = FakeServer()
    listener = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with await Client.connect(f"nbd://127.0.0.1:{port}/disk") as disk:
        assert await disk.pread(3, 0) == bytes(3)
    listener.close()
    await listener.wait_closed()


async def test_a_server_that_is_not_there_is_a_failed_connection(tmp_path: Path) -> None:
    with pytest.raises(ConnectionFailed, match=r"nbd\.sock"):
        await Client.connect(f"nbd+unix:///?socket={tmp_path}/nbd.sock")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionFailed, match=str(errno.ECONNREFUSED)):
            await Client.connect(f"nbd://127.0.0.1:{unused.getsockname()[1]}")


async def _listening(
    path: Path, behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await behave(reader, writer)
        finally:
            writer.close()

    return await asyncio.start_unix_server(serve, path / "nbd.sock")


async def test_a_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b"", "the client closes its socket"

    listener = await _listening(tmp_path, be_silent)
    with pytest.raises(ConnectionFailed, match=r"no answer within 0\.05 s"):
        await Client.connect(str(tmp_path / "nbd.sock"), timeout=0.05)
    listener.close()
    await listener.wait_closed()


async def test_cancelling_connect_closes_the_socket(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        closed.set()

    listener = await _listening(tmp_path, be_silent)
    connecting = asyncio.create_task(Client.connect(str(tmp_path / "nbd.sock")))
    await asyncio.sleep(0.05)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    await asyncio.wait_for(closed.wait(), 5)
    listener.close()
    await listener.wait_closed()


@pytest.mark.parametrize(
    ("greeting", "kind", "text"),
    [
        (b"", ConnectionFailed, "server closed it"),
        (b"HTTP/1.1 400 Bad Request\r\n", RemoteProtocolError, "not an NBD server"),
        (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53" + bytes(136), RemoteProtocolError, "oldstyle"),
    ],
)
async def test_a_server_of_another_kind_is_named(
    tmp_path: Path, greeting: bytes, kind: type[Exception], text: str
) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)

    listener = await _listening(tmp_path, greet)
    with pytest.raises(kind, match=text):
        await Client.connect(str(tmp_path / "nbd.sock"))
    listener.close()
    await listener.wait_closed()


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("nbd://example.org", Address("example.org", 10809, "", "")),
        ("nbd://example.org:1234/web1", Address("example.org", 1234, "", "web1")),
        ("nbd://[::1]/a%20b/c", Address("::1", 10809, "", "a b/c")),
        ("nbd+unix:///web1?socket=/run/nbd.sock", Address("", 0, "/run/nbd.sock", "web1")),
        ("nbd+unix:///?socket=/run/a%20b", Address("", 0, "/run/a b", "")),
        ("nbd+unix://?socket=/run/nbd.sock", Address("", 0, "/run/nbd.sock", "")),
        ("nbd+unix:///?socket=%00/abstract", Address("", 0, "\0/abstract", "")),
        ("nbd://example.org//disk?x-speed=5", Address("example.org", 10809, "", "/disk")),
        ("/run/nbd.sock", Address("", 0, "/run/nbd.sock", "")),
    ],
)
def test_addresses_are_read_as_other_clients_read_them(uri: str, address: Address) -> None:
    assert Address.parse(uri) == address


@pytest.mark.parametrize(
    "uri", ["http://example.org/x", "nbd://", "nbd:///x", "nbd+unix:///x", "nbd://host:port/x", "nbd://host:99999/x"]
)
def test_what_is_no_address_is_the_users_mistake(uri: str) -> None:
    with pytest.raises(UsageError):
        Address.parse(uri)
