"""The transmission phase of one connection: the hot path.

When the socket is readable, all that it holds is received into a buffer that all connections share, every whole request
in it is run, and the replies go out in one call. A request that can be answered from memory costs no task, no future
and no allocation that grows; what would wait for a disk goes to a thread, and its reply is sent when it is done.

What bounds the memory of a connection: a read starts only while less than ``MAX_UNSENT`` bytes of replies are unsent
or being read (one read more, at the most); writes that wait for a thread hold at most ``MAX_HELD_WRITES`` bytes (one
payload more); requests that wait are at most ``MAX_WAITING``. Beyond that no more is received until there is less.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from mmap import mmap
from time import perf_counter
from typing import Any

from nbdclone.errors import NBDCloneError, RemoteProtocolError
from nbdclone.protocol.handshake import Negotiated
from nbdclone.protocol.transmission import (
    REQUEST_SIZE,
    Request,
    error_chunk,
    parse_requests,
    read_chunk_header,
    request_error,
    request_size,
)
from nbdclone.protocol.wire import (
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    ENOTSUP,
    OFFSET_DATA,
    READ_CHUNK,
    REPLY_FLAG_DONE,
    REPLY_TYPE_OFFSET_DATA,
    REQUEST,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
)
from nbdclone.server.buffers import BufferPool
from nbdclone.server.errnos import describe, nbd_errno
from nbdclone.server.export import Export
from nbdclone.server.offload import Offload
from nbdclone.server.output import Gather, Output

logger = logging.getLogger("nbdclone")

PAGE = 4096
# The shared receiving buffer. A Unix socket hands over about 200 KiB at once, a TCP socket more when it lags behind.
RECEIVE_SIZE = 1 << 20
# The first request is put so that what follows its header starts on a page: a payload there is copied at full speed.
RECEIVE_AT = PAGE - REQUEST_SIZE
# A write of this size gets a buffer of its own and is received straight into it; a smaller one is run where it is.
DIRECT_WRITE = 32 << 10
# A read of more than this gets a buffer of its own, page-aligned and sent from where it is; less is gathered.
GATHERED_READ = 64 << 10
# More than this is copied in a thread: a millisecond of copying on the loop is a millisecond for everybody.
MAX_INLINE = 1 << 20
# How often one wake-up receives, for the sake of the other connections, while a payload is not complete.
MAX_RECEIVES = 16
MAX_UNSENT = 8 << 20
MAX_HELD_WRITES = 16 << 20
MAX_WAITING = 1024
# A full disk fails thousands of requests a second; the log says it once in this time for each connection.
LOG_INTERVAL_S = 5.0


class Scratch:
    """What all connections of an event loop share, one pass at a time."""

    def __init__(self) -> None:
        self.received = mmap(-1, RECEIVE_SIZE)
        self.received_view = memoryview(self.received)
        self.gather = Gather()
        self.buffers = BufferPool()


class _Payload:
    """A large write while it is being received: ``got`` of ``view`` is there."""

    __slots__ = ("buffer", "got", "request", "view")

    def __init__(self, request: Request, buffer: mmap, length: int) -> None:
        self.request = request
        self.buffer = buffer
        self.view = memoryview(buffer)[:length]
        self.got = 0


class Session:
    """Serves one connection after its handshake, until either side ends it."""

    def __init__(
        self,
        sock: socket.socket,
        peer: str,
        export: Export,
        negotiated: Negotiated,
        scratch: Scratch,
        offload: Offload,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._sock = sock
        self._peer = peer
        self._export = export
        self._clone = export.clone
        self._info = negotiated.export
        self._structured = negotiated.structured_replies
        self._read_header = READ_CHUNK.size if self._structured else SIMPLE_REPLY.size
        self._scratch = scratch
        self._buffers = scratch.buffers
        self._offload = offload
        self._loop = loop
        self._output = Output(sock, loop, scratch.gather, scratch.buffers, self._on_room, self._lose)
        self._carry = b""  # the beginning of a request that is not all there
        self._payload: _Payload | None = None
        self._waiting: deque[Request] = deque()  # reads, until there is room for their replies
        self._in_flight = 0  # requests that threads work on
        self._reading = 0  # bytes that threads read
        self._held_writes = 0  # bytes of payload that threads write, or will
        self._receiving = False
        self._draining = False  # no more requests: answer those there are, and end
        self._lost = False
        self._quiet_until = 0.0
        self._over: asyncio.Future[None] = loop.create_future()

    async def run(self, trailing: bytes) -> None:
        """Serve until the connection ends and no thread works for it. ``trailing`` came with the handshake."""
        try:
            self._resume()
            if trailing:
                self._carry = trailing
                self._guarded(self._take_carry)
            await asyncio.shield(self._over)
        finally:
            self._lose()
            # Also when cancelled: the clone's files must stay open for as long as a thread works on them.
            while not self._over.done():
                await asyncio.wait([self._over])

    def drain(self) -> None:
        """Take no more requests; answer those that were taken, then end. What comes later is for a new connection."""
        self._draining = True
        self._stop_receiving()
        self._check_over()

    def abandon(self) -> None:
        """End now, whatever is unanswered."""
        self._lose()

    # Receiving

    def _on_readable(self) -> None:
        self._guarded(self._receive)

    def _guarded(self, step: Callable[[], None]) -> None:
        """Run a step of the loop; whatever goes wrong ends this connection and no other."""
        try:
            step()
        except RemoteProtocolError as error:
            logger.warning("%s: '%s': %s", self._peer, self._clone.name, error)
            self._output.push()
            self._lose()
        except OSError as error:
            logger.debug("%s: connection lost: %s", self._peer, error)
            self._lose()
        except Exception:
            logger.exception("%s: '%s': a defect of the server", self._peer, self._clone.name)
            self._lose()

    def _receive(self) -> None:
        for _ in range(MAX_RECEIVES):
            if self._payload is not None:
                if not self._receive_payload(self._payload):
                    return
            elif not self._receive_requests():
                return
            if not self._receiving:
                return

    def _receive_requests(self) -> bool:
        """Receive into the shared buffer and run what came. False if the socket holds no more for now."""
        view = self._scratch.received_view
        start = RECEIVE_AT
        if carry := self._carry:
            start += len(carry)
            view[RECEIVE_AT:start] = carry
        try:
            count = self._sock.recv_into(view[start:])
        except (BlockingIOError, InterruptedError):
            return False
        if not count:
            self.drain()
            return False
        self._carry = b""
        self._take(start + count)
        return self._payload is not None

    def _take_carry(self) -> None:
        """Run what came along with the handshake."""
        carry, self._carry = self._carry, b""
        for at in range(0, len(carry), RECEIVE_SIZE // 2):
            piece = self._carry + carry[at : at + RECEIVE_SIZE // 2]
            self._scratch.received_view[RECEIVE_AT : RECEIVE_AT + len(piece)] = piece
            self._carry = b""
            self._take(RECEIVE_AT + len(piece))

    def _take(self, end: int) -> None:
        """Run every whole request in the shared buffer up to ``end``, and keep the rest."""
        received = self._scratch.received
        requests: list[Request] = []
        try:
            position = parse_requests(received, RECEIVE_AT, end, requests)
        finally:
            if requests:
                self._run(requests)
                self._output.push()
        if self._draining:
            self._check_over()
            return
        if position < end:
            rest = self._scratch.received_view[position:end]
            size = request_size(received, position, end)
            if size >= DIRECT_WRITE:
                self._begin_payload(rest, size - REQUEST_SIZE)
            else:
                self._carry = bytes(rest)

    def _begin_payload(self, rest: memoryview, length: int) -> None:
        _magic, flags, command, cookie, offset, _length = REQUEST.unpack_from(rest)
        payload = _Payload((flags, command, cookie, offset, length, 0), self._buffers.take(length), length)
        payload.got = len(rest) - REQUEST_SIZE
        payload.view[: payload.got] = rest[REQUEST_SIZE:]
        self._payload = payload

    def _receive_payload(self, payload: _Payload) -> bool:
        """Receive more of a large write, and run it when it is whole. False if the socket holds no more for now."""
        try:
            count = self._sock.recv_into(payload.view[payload.got :])
        except (BlockingIOError, InterruptedError):
            return False
        if not count:
            self.drain()
            return False
        payload.got += count
        if payload.got == len(payload.view):
            self._payload = None
            flags, command, cookie, offset, length, _ = payload.request
            if error := request_error(self._info, self._structured, flags, command, offset, length):
                self._reply(cookie, error)
                self._buffers.give(payload.buffer)
            else:
                self._write(flags, cookie, offset, payload.view, payload.buffer)
            self._output.push()
        return True

    # Running

    def _run(self, requests: list[Request]) -> None:
        view = self._scratch.received_view
        info, structured = self._info, self._structured
        for request in requests:
            if self._lost:
                return
            flags, command, cookie, offset, length, payload = request
            if error := request_error(info, structured, flags, command, offset, length):
                self._reply(cookie, error)
            elif command == CMD_READ:
                if self._waiting or self._output.backlog + self._reading >= MAX_UNSENT:
                    self._wait(request)
                else:
                    self._read(cookie, offset, length)
            elif command == CMD_WRITE:
                self._write(flags, cookie, offset, view[payload : payload + length], None)
            elif command == CMD_DISC:
                self._draining = True
                self._stop_receiving()
                return
            else:
                self._run_other(flags, command, cookie, offset, length)

    def _run_other(self, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        clone = self._clone
        if command == CMD_FLUSH:
            self._in_flight += 1
            self._export.flush(self._finisher(cookie))
        elif command == CMD_CACHE:
            self._in_flight += 1
            self._offload.submit(lambda: clone.prefetch(offset, length), self._finisher(cookie))
        elif command in (CMD_TRIM, CMD_WRITE_ZEROES):
            allocate = bool(flags & CMD_FLAG_NO_HOLE)
            if flags & CMD_FLAG_FAST_ZERO and (allocate or not clone.fast_zero):
                self._reply(cookie, ENOTSUP)
                return
            self._in_flight += 1
            work = lambda: clone.zero(offset, length, allocate=allocate)  # noqa: E731
            self._export.change(work, self._finisher(cookie, fua=bool(flags & CMD_FLAG_FUA)))
        else:  # a command that request_error let through and nobody runs
            self._reply(cookie, EINVAL)

    def _read(self, cookie: int, offset: int, length: int) -> None:
        """Answer a read, on the spot if it is short or in memory."""
        header = self._read_header
        if length > GATHERED_READ:
            self._read_large(cookie, offset, length)
            return
        output = self._output
        at = output.reserve(header + length)
        try:
            self._clone.read_into_nowait(output.view[at + header : at + header + length], offset)
        except BlockingIOError:
            self._read_in_thread(cookie, offset, length)
        except (OSError, NBDCloneError) as error:
            self._fail(cookie, error)
        else:
            if self._structured:
                READ_CHUNK.pack_into(
                    output.buffer,
                    at,
                    STRUCTURED_REPLY_MAGIC,
                    REPLY_FLAG_DONE,
                    REPLY_TYPE_OFFSET_DATA,
                    cookie,
                    OFFSET_DATA.size + length,
                    offset,
                )
            else:
                SIMPLE_REPLY.pack_into(output.buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)
            output.filled = at + header + length

    def _read_large(self, cookie: int, offset: int, length: int) -> None:
        if length > MAX_INLINE:
            self._read_in_thread(cookie, offset, length)
            return
        buffer = self._buffers.take(PAGE + length)
        view = memoryview(buffer)
        try:
            self._clone.read_into_nowait(view[PAGE : PAGE + length], offset)
        except BlockingIOError:
            self._read_in_thread(cookie, offset, length, buffer)
        except (OSError, NBDCloneError) as error:
            self._buffers.give(buffer)
            self._fail(cookie, error)
        else:
            self._send_read(cookie, offset, length, view, buffer)

    def _send_read(self, cookie: int, offset: int, length: int, view: memoryview, buffer: mmap) -> None:
        """Send a read whose data stand at the second page of their own buffer; the header goes right before them."""
        start = PAGE - self._read_header
        if self._structured:
            view[start:PAGE] = read_chunk_header(cookie, offset, length)
        else:
            SIMPLE_REPLY.pack_into(buffer, start, SIMPLE_REPLY_MAGIC, 0, cookie)
        self._output.send_owned(view[start : PAGE + length], buffer)

    def _read_in_thread(self, cookie: int, offset: int, length: int, buffer: mmap | None = None) -> None:
        taken = self._buffers.take(PAGE + length) if buffer is None else buffer
        view = memoryview(taken)
        clone = self._clone
        self._in_flight += 1
        self._reading += length

        def done(_result: Any, error: BaseException | None) -> None:
            self._in_flight -= 1
            self._reading -= length
            if error is not None or self._lost:
                self._buffers.give(taken)
                if error is not None:
                    self._fail(cookie, error)
            else:
                self._send_read(cookie, offset, length, view, taken)
            self._guarded(self._resume)

        self._offload.submit(lambda: clone.read_into(view[PAGE : PAGE + length], offset), done)

    def _write(self, flags: int, cookie: int, offset: int, view: memoryview, buffer: mmap | None) -> None:
        """Run a write, on the spot if nothing makes it wait. ``buffer`` is its own, to be given back, or None."""
        export = self._export
        if not export.changing and len(view) <= MAX_INLINE and not export.stalled:
            began = perf_counter()
            try:
                self._clone.write_nowait(view, offset)
            except BlockingIOError:
                pass
            except (OSError, NBDCloneError) as error:
                self._give_back(buffer)
                self._fail(cookie, error)
                return
            else:
                export.note_write_time(perf_counter() - began)
                self._give_back(buffer)
                if flags & CMD_FLAG_FUA:
                    self._in_flight += 1
                    export.flush(self._finisher(cookie))
                else:
                    self._output.simple_reply(cookie, 0)
                return
        self._write_in_thread(flags, cookie, offset, view, buffer)

    def _write_in_thread(self, flags: int, cookie: int, offset: int, view: memoryview, buffer: mmap | None) -> None:
        length = len(view)
        if buffer is None:
            buffer = self._buffers.take(length)
            kept = memoryview(buffer)[:length]
            kept[:] = view
        else:
            kept = view
        own = buffer
        clone = self._clone
        self._in_flight += 1
        self._held_writes += length
        finish = self._finisher(cookie, fua=bool(flags & CMD_FLAG_FUA))

        def done(result: Any, error: BaseException | None) -> None:
            self._held_writes -= length
            self._buffers.give(own)
            finish(result, error)

        self._export.change(lambda: clone.write(kept, offset), done)
        if self._held_writes >= MAX_HELD_WRITES:
            self._stop_receiving()

    def _give_back(self, buffer: mmap | None) -> None:
        if buffer is not None:
            self._buffers.give(buffer)

    # Answering

    def _finisher(self, cookie: int, *, fua: bool = False) -> Callable[[Any, BaseException | None], None]:
        """What ends a request that a thread worked on: its reply; with ``fua``, when a flush has followed it."""

        def done(_result: Any, error: BaseException | None) -> None:
            if fua and error is None:
                self._export.flush(self._finisher(cookie))
                return
            self._in_flight -= 1
            if error is None:
                self._output.simple_reply(cookie, 0)
            else:
                self._fail(cookie, error)
            self._guarded(self._resume)

        return done

    def _fail(self, cookie: int, error: BaseException) -> None:
        """Gather the reply to a request that failed, and log it, once in a while."""
        now = self._loop.time()
        if now >= self._quiet_until and not self._lost:
            self._quiet_until = now + LOG_INTERVAL_S
            logger.warning("%s: '%s': %s", self._peer, self._clone.name, describe(error))
        self._reply(cookie, nbd_errno(error), describe(error))

    def _reply(self, cookie: int, error: int, message: str = "") -> None:
        """Gather a reply without data."""
        if error and self._structured:
            self._output.add(error_chunk(cookie, error, message))
        else:
            self._output.simple_reply(cookie, error)

    # Room

    def _wait(self, request: Request) -> None:
        self._waiting.append(request)
        if len(self._waiting) >= MAX_WAITING:
            self._stop_receiving()

    def _on_room(self) -> None:
        self._guarded(self._resume)

    def _resume(self) -> None:
        """Go on with what waited for room, as far as there is some."""
        while self._waiting and self._output.backlog + self._reading < MAX_UNSENT and not self._lost:
            _flags, _command, cookie, offset, length, _ = self._waiting.popleft()
            self._read(cookie, offset, length)
        self._output.push()
        if (
            not (self._receiving or self._draining or self._lost)
            and len(self._waiting) <= MAX_WAITING // 2
            and self._held_writes < MAX_HELD_WRITES
        ):
            self._receiving = True
            self._loop.add_reader(self._sock.fileno(), self._on_readable)
        self._check_over()

    def _stop_receiving(self) -> None:
        if self._receiving:
            self._receiving = False
            self._loop.remove_reader(self._sock.fileno())

    def _lose(self) -> None:
        """The connection is gone. Threads that work for it are waited for; nobody hears of what they did."""
        self._lost = True
        self._stop_receiving()
        self._waiting.clear()
        if self._payload is not None:
            self._buffers.give(self._payload.buffer)
            self._payload = None
        self._output.close()
        self._check_over()

    def _check_over(self) -> None:
        idle = not (self._in_flight or self._waiting or self._output.backlog)
        if ((self._lost and not self._in_flight) or (self._draining and idle)) and not self._over.done():
            self._over.set_result(None)
