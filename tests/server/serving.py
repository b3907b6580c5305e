"""Servers over small pools in this process, a disk with a will of its own, and a client made of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from nbdclone.client import Address, Client
from nbdclone.protocol import wire
from nbdclone.protocol.wire import Mode, Option
from nbdclone.server.server import Server
from nbdclone.store.fs import FileSystem
from nbdclone.store.pool import Pool

MIB = 1 << 20
BASE_SIZE = 4 * MIB
BASE = random.Random("base").randbytes(BASE_SIZE)
CLONES = ("web1", "web2")
PATIENCE_S = 10.0  # what has not happened by then, does not happen


class Hasty(FileSystem):
    """Syncs nothing: what is made for one test need not outlive the machine."""

    def sync(self, fd: Any) -> None:
        pass

    datasync = sync

    def sync_directory(self, path: Path) -> None:
        pass


def make_pool(
    directory: Path, image: bytes, *clones: str, fs: FileSystem | None = None, size: int | None = None
) -> Pool:
    """A pool with ``image`` as its base "base"."""
    source = directory / "image.raw"
    source.write_bytes(image)
    pool = Pool.open(directory / "pool", create=True, fs=Hasty())
    pool.import_base(source, "base")
    source.unlink()
    if clones:
        pool.create_clones("base", clones, size=size)
    return pool if fs is None else Pool.open(directory / "pool", fs=fs)


@asynccontextmanager
async def serving(pool: Pool, **where: Any) -> AsyncIterator[Server]:
    """A server over the pool, on a Unix socket unless told where; afterwards it must have left nothing behind."""
    fds, threads, tasks = open_files(), threading.active_count(), asyncio.all_tasks()
    async with Server(pool, **(where or {"sockets": [pool.path.parent / "nbd.sock"]})) as server:
        yield server
    # Clients that the test has closed are closed by the event loop, in its own time.
    await until(lambda: open_files() <= fds, lambda: f"files left open: {open_files() - fds}")
    assert threading.active_count() <= threads
    assert asyncio.all_tasks() <= tasks


def open_files() -> set[tuple[str, str]]:
    """The descriptors of this process and what they are."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the one that the directory is listed with
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return {(fd, what) for fd, what in found if what != "/dev/null"}  # libuv keeps one, from its first stream on


def where(server: Server, export: str, listener: int = 0) -> str:
    """The URI of an export."""
    before, mark, after = server.uris[listener].partition("?")
    return f"{before}{export}{mark}{after}" if mark else f"{before}/{export}"


async def connect(server: Server, export: str, listener: int = 0, mode: Mode = Mode.EXTENDED) -> Client:
    return await Client.connect(where(server, export, listener), mode=mode)


async def until(condition: Callable[[], bool], what: Callable[[], str] = lambda: "it never came true") -> None:
    """Wait until a condition holds that nothing announces."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what()
        await asyncio.sleep(0.002)


class Gate:
    """What stands open, or holds every thread that comes by until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._lock = threading.Lock()
        self.waiting = 0
        self.passed = 0

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def go_through(self) -> None:
        with self._lock:
            self.waiting += 1
        assert self._open.wait(PATIENCE_S), "nobody opened the gate"
        with self._lock:
            self.waiting -= 1
            self.passed += 1


class Disk(Hasty):
    """A file system whose disk can be slow, full, or broken.

    ``cold`` is what is not in memory, by its place in the file, ``unreadable`` what cannot be read; without
    ``knows_nowait`` nobody can say. The gates hold threads only: what happens on the event loop's own thread must never
    come to one, and fails if it does.
    """

    def __init__(self) -> None:
        self.cold = self.unreadable = range(0)
        self.knows_nowait = True
        self.reads, self.writes, self.syncs = Gate(), Gate(), Gate()
        self.read_error = self.write_error = self.sync_error = self.punch_error = 0
        self._loop_thread = threading.get_ident()

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & self.NOWAIT and not self.knows_nowait:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if offset in self.cold:
            if flags & self.NOWAIT:
                raise BlockingIOError(errno.EAGAIN, "cold")
            self._wait(self.reads)
        self._fail(errno.EIO if offset in self.unreadable else self.read_error)
        return os.preadv(fd, buffers, offset, flags)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        if threading.get_ident() != self._loop_thread:
            self._wait(self.writes)
        self._fail(self.write_error)
        return os.pwrite(fd, data, offset)

    def datasync(self, fd: Any) -> None:
        self._wait(self.syncs)
        self._fail(self.sync_error)

    def punch(self, fd: int, offset: int, length: int) -> None:
        self._fail(self.punch_error)
        super().punch(fd, offset, length)

    def _wait(self, gate: Gate) -> None:
        assert threading.get_ident() != self._loop_thread, "the event loop waits for the disk"
        gate.go_through()

    def _fail(self, number: int) -> None:
        if number:
            raise OSError(number, os.strerror(number))


class Reply(NamedTuple):
    cookie: int
    error: int
    data: bytes
    structured: bool
    message: str = ""


class Reachable(Protocol):
    """A server, or all that is known of one in another process."""

    uris: list[str]


class Peer:
    """A client that sends the bytes it is told to, and reads no more than it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.mode = Mode.SIMPLE
        self.reads: dict[int, tuple[int, int]] = {}  # (offset, length) of the reads asked for, by their cookies
        self.offsets: dict[int, int] = {}  # of the last requests, by their cookies
        self.pieces: list[tuple[int, int, int]] = []  # (type, offset, length) of the chunks of the last read's reply
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def connect(cls, server: Reachable, listener: int = 0) -> Self:
        address = Address.parse(server.uris[listener])
        sock = socket.socket(socket.AF_UNIX if address.path else socket.AF_INET)
        sock.setblocking(False)
        peer = cls(sock)
        await peer._loop.sock_connect(sock, address.path or (address.host, address.port))
        return peer

    @classmethod
    async def open(
        cls, server: Reachable, export: str, *, structured: bool = True, mode: Mode | None = None, listener: int = 0
    ) -> Self:
        """Connect, and haggle until the export is open. ``mode`` goes before ``structured``."""
        peer = await cls.connect(server, listener)
        try:
            await peer.greet()
            await peer.agree(Mode(structured) if mode is None else mode)
            assert (await peer.ask(Option.GO, go_data(export)))[-1][0] == wire.OptionReply.ACK
        except BaseException:
            peer.close()
            raise
        return peer

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    async def send(self, *messages: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._loop.sock_sendall(self.sock, b"".join(messages))

    async def receive(self, count: int) -> bytes:
        """Exactly so many bytes."""
        data = bytearray()
        async with asyncio.timeout(PATIENCE_S):
            while len(data) < count:
                piece = await self._loop.sock_recv(self.sock, count - len(data))
                if not piece:
                    raise EOFError(f"closed after {len(data)} of {count} bytes")
                data += piece
        return bytes(data)

    async def is_closed(self) -> bool:
        """Does the server say nothing more, and close the connection?"""
        async with asyncio.timeout(PATIENCE_S):
            try:
                return not await self._loop.sock_recv(self.sock, 1)
            except ConnectionResetError:  # it left something unread
                return True

    # The handshake

    async def greet(self, flags: int = 3) -> None:
        greeting = await self.receive(wire.GREETING.size)
        assert wire.GREETING.unpack(greeting) == (wire.INIT_PASSWD, wire.IHAVEOPT, 3)
        await self.send(wire.CLIENT_FLAGS.pack(flags))

    async def agree(self, mode: Mode) -> None:
        """Ask for a mode, which must be granted."""
        self.mode = mode
        if mode is not Mode.SIMPLE:
            number = Option.EXTENDED_HEADERS if mode is Mode.EXTENDED else Option.STRUCTURED_REPLY
            assert (await self.ask(number))[-1][0] == wire.OptionReply.ACK

    async def ask(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option; (type, data) of each reply up to the last."""
        await self.send(option(number, data))
        return await self.answer()

    async def answer(self) -> list[tuple[int, bytes]]:
        replies = []
        while True:
            _magic, _option, kind, length = wire.OPTION_REPLY.unpack(await self.receive(wire.OPTION_REPLY.size))
            replies.append((kind, await self.receive(length)))
            if kind == wire.OptionReply.ACK or kind & wire.OPTION_REPLY_ERROR:
                return replies

    # The transmission

    def request(
        self, command: int, offset: int = 0, length: int = 0, *, cookie: int = 1, flags: int = 0, payload: bytes = b""
    ) -> bytes:
        """A request's bytes; not sent yet."""
        self.offsets[cookie] = offset
        if command == wire.CMD_READ:
            self.reads[cookie] = offset, length
        length = len(payload) or length
        if self.mode is Mode.EXTENDED:
            flags |= wire.CMD_FLAG_PAYLOAD_LEN if payload else 0
            packed = wire.EXTENDED_COOKIE.pack(cookie, offset)
            return wire.EXTENDED_REQUEST.pack(wire.EXTENDED_REQUEST_MAGIC, flags, command, packed, length) + payload
        return wire.REQUEST.pack(wire.REQUEST_MAGIC, flags, command, cookie, offset, length) + payload

    async def reply(self) -> Reply:
        """The next reply, of any kind; its chunks must follow one another."""
        head = await self.receive(wire.SIMPLE_REPLY.size)
        magic, error, cookie = wire.SIMPLE_REPLY.unpack(head)
        if magic == wire.SIMPLE_REPLY_MAGIC:
            assert self.mode is not Mode.EXTENDED
            _offset, length = self.reads.pop(cookie, (0, 0))
            return Reply(cookie, error, await self.receive(0 if error else length), False)
        self.pieces = []
        data = bytearray()
        flags = kind = 0
        while not flags & wire.REPLY_FLAG_DONE:
            flags, kind, cookie, content = await self.chunk(head)
            head = b""
            offset, length = self.reads.get(cookie, (0, 0))
            if kind == wire.REPLY_TYPE_ERROR:
                assert flags & wire.REPLY_FLAG_DONE
                self.reads.pop(cookie, None)
                error, size = wire.ERROR.unpack_from(content)
                text = content[wire.ERROR.size :]
                assert len(text) == size
                return Reply(cookie, error, b"", True, text.decode())
            if kind == wire.REPLY_TYPE_NONE:
                assert (flags, content, length) == (wire.REPLY_FLAG_DONE, b"", 0)
                break
            if kind == wire.REPLY_TYPE_OFFSET_HOLE:
                at, size = wire.OFFSET_HOLE.unpack(content)
                content = bytes(size)
            else:
                assert kind == wire.REPLY_TYPE_OFFSET_DATA
                (at,) = wire.OFFSET_DATA.unpack_from(content)
                content = content[wire.OFFSET_DATA.size :]
            assert content
            assert at == offset + len(data)  # in order, and without gaps
            data += content
            self.pieces.append((kind, at, len(content)))
        _offset, length = self.reads.pop(cookie, (0, 0))
        assert len(data) == length
        return Reply(cookie, 0, bytes(data), True)

    async def chunk(self, head: bytes = b"") -> tuple[int, int, int, bytes]:
        """Flags, type, cookie and payload of the next chunk, which begins with ``head``."""
        layout = wire.EXTENDED if self.mode is Mode.EXTENDED else wire.STRUCTURED
        head += await self.receive(layout.header.size - len(head))
        magic, flags, kind, cookie, length = layout.header.unpack(head)
        if self.mode is Mode.EXTENDED:
            cookie, offset = wire.EXTENDED_COOKIE.unpack(cookie)
            assert offset == self.offsets[cookie]
        assert magic == layout.magic
        assert not flags & ~wire.REPLY_FLAG_DONE
        return flags, kind, cookie, await self.receive(length)

    async def replies(self, count: int) -> dict[int, Reply]:
        """So many replies, by their cookies."""
        replies = [await self.reply() for _ in range(count)]
        assert len({reply.cookie for reply in replies}) == count
        return {reply.cookie: reply for reply in replies}

    async def run(self, command: int, offset: int = 0, length: int = 0, **more: Any) -> Reply:
        """Send one request and wait for its reply."""
        await self.send(self.request(command, offset, length, **more))
        return await self.reply()


async def connect_from(server: Reachable, host: str, listener: int = 0) -> Peer:
    """Connect by TCP from another of this machine's addresses, such as 127.0.0.2."""
    address = Address.parse(server.uris[listener])
    sock = socket.socket(socket.AF_INET)
    sock.setblocking(False)
    sock.bind((host, 0))
    await asyncio.get_running_loop().sock_connect(sock, (address.host, address.port))
    return Peer(sock)


def option(number: int, data: bytes = b"") -> bytes:
    return wire.OPTION.pack(wire.IHAVEOPT, number, len(data)) + data


def go_data(export: str, *infos: int) -> bytes:
    """The data of NBD_OPT_GO and NBD_OPT_INFO."""
    name = export.encode()
    return struct.pack(f">I{len(name)}sH{len(infos)}H", len(name), name, len(infos), *infos)
