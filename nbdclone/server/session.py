"""The transmission phase of one connection: the hot path.

When the socket is readable, all that it holds is received into a buffer that all connections share, every whole request
in it is run, and the replies go out in one call. A request that can be answered from memory costs no task, no future
and no allocation that grows; what would wait for a disk goes to a thread, and its reply is sent when it is done.

What bounds the memory of a connection: a read, or a question for block status, starts only while less than
``MAX_UNTAKEN`` bytes of replies are unsent, and less than ``MAX_UNSENT`` unsent or being made (one of them more, at the
most), and waits otherwise; nothing more is received while one of the limits below is reached. Receiving goes on until
then, since a client may send a write before it reads what it asked for. What all connections hold together is bounded
by the ``Budget``: it is asked before a large reply is made or a large payload is received. What is gathered in one
pass, 256 KiB at most, is not asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from mmap import mmap
from time import perf_counter
from typing import Any

from nbdclone.errors import NBDCloneError, RemoteProtocolError
from nbdclone.protocol.block_status import parse_status_filter
from nbdclone.protocol.handshake_events import Negotiated
from nbdclone.protocol.requests import Request, request_layout
from nbdclone.protocol.transmission import request_error
from nbdclone.protocol.wire import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    ENOTSUP,
    MAX_PAYLOAD,
    Cookie,
    Mode,
)
from nbdclone.server.block_status import Contexts, largest_reply
from nbdclone.server.export import Export
from nbdclone.server.input import Input
from nbdclone.server.offload import Done
from nbdclone.server.output import Output, is_gone
from nbdclone.server.peer import Peer
from nbdclone.server.reading import GATHERED_READ, MAX_INLINE, Reading
from nbdclone.server.scratch import Scratch
from nbdclone.server.tls import AnySocket, TLSInput, TLSSocket

logger = logging.getLogger("nbdclone")

# A shorter read that is in memory, while nothing else is under way, is not worth a look at the clock.
LONG_READ = 16 << 10
# How much of one CACHE is taken: reading ahead of that, the first of it may have gone again when the client comes.
MAX_PREFETCH = 64 << 20
# How much is made zeros in one step: all that one request with compact headers can ask for. After each step the other
# changes of the clone that wait have their turn.
MAX_ZEROED = 1 << 32
# Bytes of replies that are made ahead: as many as keep a disk busy, but no more while the client leaves so many where
# they are. More of those would make no client faster, and cost the time and the memory of copying them.
MAX_UNSENT = 8 << 20
MAX_UNTAKEN = 1 << 20
# When no more is received. Each may be passed by what one receive brings: 256 KiB of requests, or one payload.
MAX_HELD_WRITES = 16 << 20  # bytes of payload that wait for threads
MAX_IN_FLIGHT = 1024  # requests that threads work on or will: the kernel's client has 128 at most
MAX_WAITING = 1024  # reads and questions that wait for room
# Bytes of replies that the client does not take: more than reads alone can make it, the longest being the last of them.
MAX_BACKLOG = MAX_UNSENT + MAX_PAYLOAD + (4 << 20)
MAX_PIECES = 4096  # the same, in pieces: each has its own small cost


class Session(Reading):
    """Serves one connection after its handshake, until either side ends it."""

    def __init__(
        self,
        sock: AnySocket,
        peer: Peer,
        export: Export,
        negotiated: Negotiated,
        contexts: Contexts,
        scratch: Scratch,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        # No more than 30 attributes: with 31, the dictionary of each of thousands of sessions takes 1.2 KiB more.
        mode = negotiated.mode
        account = scratch.budget.open(self)
        output = Output(
            sock,
            loop,
            scratch.gather,
            scratch.buffers,
            account,
            self._on_room,
            self._lose,
            export.clone.note_marks,  # no write is acknowledged before
            scratch.busy.sent,
        )
        super().__init__(peer, export, mode, scratch, account, output)
        self._info = negotiated.export
        self._contexts = contexts
        self._loop = loop
        self._sock = sock
        receiving = TLSInput if isinstance(sock, TLSSocket) else Input
        self._input = receiving(
            sock, loop, request_layout(mode), scratch.received, scratch.buffers, account, self, self._on_readable
        )
        # Gathers the reply to a request that succeeded and has nothing more to tell.
        self._succeed: Callable[[Cookie], None] = (
            output.extended_success if mode is Mode.EXTENDED else output.simple_reply
        )
        # What makes replies, and how large they are, until there is room.
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._flushing: list[Cookie] = []  # flushes of this turn
        self._held_writes = 0  # bytes of payload that threads write, or will
        self._going_on: asyncio.Handle | None = None  # when others had their turn
        self._prefetching = False  # a thread runs a CACHE
        self._throttled = False  # it waits for what the export's limits let it have
        self._draining = False  # no more requests: answer those there are, and end
        self._over: asyncio.Future[None] = loop.create_future()

    @property
    def label(self) -> str:
        """The client, for the log."""
        return str(self._peer)

    async def serve(self, trailing: bytes) -> None:
        """Serve until the connection ends and no thread works for it. ``trailing`` came with the handshake."""
        try:
            self._resume()
            if trailing:
                self._guarded(lambda: self._input.feed(trailing))
            await asyncio.shield(self._over)
        finally:
            self._lose()
            # Also when cancelled: the clone's files must stay open for as long as a thread works on them.
            while not self._over.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([self._over])
            self._account.close()

    def drain(self) -> None:
        """Take no more requests; answer those that were taken, then end. What comes later is for a new connection."""
        self._draining = True
        self._input.stop()
        self._check_over()

    def abandon(self) -> None:
        """End now, whatever is unanswered."""
        self._lose()

    def _on_readable(self) -> None:
        self._scratch.busy.received()
        self._guarded(self._input.receive)

    def _guarded(self, step: Callable[[], None]) -> None:
        """Run a step of the loop; whatever goes wrong ends this connection and no other."""
        try:
            step()
        except RemoteProtocolError as error:
            self._scratch.quiet.say("protocol", "%s: '%s': %s", self._peer, self._clone.name, error)
            self._output.push()
            self._lose()
        except OSError as error:
            logger.debug("%s: connection lost: %s", self._peer, error)
            self._lose()
        except Exception:
            logger.exception("%s: '%s': a defect of the server", self._peer, self._clone.name)
            self._lose()

    # Running

    def run(self, requests: list[Request], buffer: memoryview) -> int:
        """Run requests, and gather the replies of those that need not wait. How many: the others are to come again."""
        count = len(requests)
        if (throttle := self._export.throttle) is not None:
            count = throttle.admit(self, requests)
            if count < len(requests):
                self._hold_back()
                requests = requests[:count]
        self._run(requests, buffer)
        return count

    def _run(self, requests: list[Request], buffer: memoryview) -> None:
        info, structured = self._info, self._structured
        for flags, command, cookie, offset, length, payload in requests:
            if self._lost:
                return
            if error := request_error(info, structured, flags, command, offset, length):
                self._reply(cookie, error)
            elif command == CMD_READ:
                if self._waiting or not self._has_room(length):
                    self._waiting.append((length, partial(self._read, flags, cookie, offset, length)))
                else:
                    self._read(flags, cookie, offset, length)
            elif command == CMD_WRITE:
                self._write(flags, cookie, offset, buffer[payload : payload + length], None)
            elif command == CMD_DISC:
                self._draining = True
                self._input.stop()
                break
            elif flags & CMD_FLAG_PAYLOAD_LEN:
                self._run_filtered_status(flags, cookie, offset, buffer[payload : payload + length])
            else:
                self._run_other(flags, command, cookie, offset, length)

    def run_write(self, request: Request, payload: memoryview, buffer: mmap) -> None:
        """Run a request whose payload has a buffer of its own."""
        flags, command, cookie, offset, length, _ = request
        if (throttle := self._export.throttle) is not None:
            throttle.pay(command, length)
        if command != CMD_WRITE:  # none that there is takes so much
            self._run([(*request[:-1], 0)], payload)
            self.finish_turn()
            self._buffers.give(buffer)
            return
        if error := request_error(self._info, self._structured, flags, command, offset, length):
            self._buffers.give(buffer)
            self._reply(cookie, error)
        else:
            self._write(flags, cookie, offset, payload, buffer)
        self.finish_turn()

    def finish_turn(self) -> None:
        """Send the replies that were gathered, and begin the flush that was asked for."""
        if cookies := self._flushing:
            self._flushing = []
            self._export.flush(partial(self._flushed, cookies))
        if self._cold:
            self._read_cold()
        self._output.push()
        if self._waiting and self._fits(self._waiting[0][0]):  # for time alone
            self._go_on_soon()
        if self._full():
            self._input.stop()
        if self._draining:
            self._check_over()

    def _run_other(self, flags: int, command: int, cookie: Cookie, offset: int, length: int) -> None:
        clone = self._clone
        if command == CMD_FLUSH:
            self._in_flight += 1
            self._flushing.append(cookie)
        elif command == CMD_CACHE:
            # It is advice: more of it than the disk can follow is taken and forgotten.
            if self._prefetching:
                self._succeed(cookie)
                return
            self._prefetching = True
            self._in_flight += 1
            finish = self._finisher(cookie)

            def done(result: Any, error: BaseException | None) -> None:
                self._prefetching = False
                finish(result, error)

            self._scratch.offload.submit(lambda: clone.prefetch(offset, min(length, MAX_PREFETCH)), done, self._export)
        elif command in (CMD_TRIM, CMD_WRITE_ZEROES):
            allocate = bool(flags & CMD_FLAG_NO_HOLE)
            if flags & CMD_FLAG_FAST_ZERO and (allocate or not clone.fast_zero):
                self._reply(cookie, ENOTSUP)
                return
            self._in_flight += 1
            self._zero(offset, length, allocate, self._finisher(cookie, fua=bool(flags & CMD_FLAG_FUA)))
        elif command == CMD_BLOCK_STATUS and self._contexts:
            self._ask_status(flags, cookie, offset, length, self._contexts)
        else:  # block status without a context
            self._reply(cookie, EINVAL)

    def _zero(self, offset: int, length: int, allocate: bool, finish: Done) -> None:
        """Make the range zeros, step by step; what is left when the connection is lost stays as it is."""
        clone = self._clone
        step = min(length, MAX_ZEROED - offset % MAX_ZEROED)

        def done(_result: Any, error: BaseException | None) -> None:
            if error is None and step < length and not self._lost:
                self._zero(offset + step, length - step, allocate, finish)
            else:
                finish(None, error)

        self._export.change(lambda: clone.zero(offset, step, allocate=allocate), done)

    def _run_filtered_status(self, flags: int, cookie: Cookie, offset: int, payload: memoryview) -> None:
        """Block status in some of the contexts, which the payload names."""
        asked = parse_status_filter(payload, [context.id for context in self._contexts])
        if asked is None:
            self._reply(cookie, EINVAL, "not a length and ids of contexts that were selected, each once")
            return
        length, numbers = asked
        flags &= ~CMD_FLAG_PAYLOAD_LEN
        if error := request_error(self._info, self._structured, flags, CMD_BLOCK_STATUS, offset, length):
            self._reply(cookie, error)
        else:
            contexts = tuple(context for context in self._contexts if context.id in numbers)
            self._ask_status(flags, cookie, offset, length, contexts)

    def _ask_status(self, flags: int, cookie: Cookie, offset: int, length: int, contexts: Contexts) -> None:
        one = bool(flags & CMD_FLAG_REQ_ONE)
        size = largest_reply(contexts, one, self._layout)
        self._waiting.append((size, partial(self._tell_status, cookie, offset, length, contexts, one, size)))
        self._start_waiting()

    def _write(self, flags: int, cookie: Cookie, offset: int, view: memoryview, buffer: mmap | None) -> None:
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
                    self._succeed(cookie)
                return
        self._write_in_thread(flags, cookie, offset, view, buffer)

    def _write_in_thread(self, flags: int, cookie: Cookie, offset: int, view: memoryview, buffer: mmap | None) -> None:
        length = len(view)
        # Short ones, of which thousands may wait, are copied out of the shared buffer at their own size.
        kept = memoryview(bytes(view)) if buffer is None else view
        clone = self._clone
        self._in_flight += 1
        self._held_writes += length
        self._account.take(length)
        finish = self._finisher(cookie, fua=bool(flags & CMD_FLAG_FUA))

        def done(result: Any, error: BaseException | None) -> None:
            self._held_writes -= length
            self._account.give(length)
            self._give_back(buffer)
            finish(result, error)

        attempt = None if length > MAX_INLINE else partial(clone.write_nowait, kept, offset)
        self._export.change(partial(clone.write, kept, offset), done, attempt)

    def _give_back(self, buffer: mmap | None) -> None:
        if buffer is not None:
            self._buffers.give(buffer)

    def _flushed(self, cookies: list[Cookie], _result: Any, error: BaseException | None) -> None:
        """Answer the flushes of a turn: its writes came before the flush of them all began."""
        self._in_flight -= len(cookies)
        for cookie in cookies:
            if error is None:
                self._succeed(cookie)
            else:
                self._fail(cookie, error)
        self._on_room()

    # Answering

    def _finisher(self, cookie: Cookie, *, fua: bool = False) -> Done:
        """What ends a request that a thread worked on: its reply; with ``fua``, when a flush has followed it."""

        def done(_result: Any, error: BaseException | None) -> None:
            if fua and error is None:
                self._export.flush(self._finisher(cookie))
                return
            self._in_flight -= 1
            if error is None:
                self._succeed(cookie)
            else:
                self._fail(cookie, error)
            self._on_room()

        return done

    # Room

    def _full(self) -> bool:
        """Has the client asked for as much as is kept for it at once?"""
        return (
            self._held_writes >= MAX_HELD_WRITES
            or self._in_flight >= MAX_IN_FLIGHT
            or len(self._waiting) >= MAX_WAITING
            or self._output.backlog >= MAX_BACKLOG
            or self._output.pieces >= MAX_PIECES
            or self._account.over
            or self._throttled
        )

    def _has_room(self, size: int) -> bool:
        """May a reply of this size be made now? What may take long is, while it is this connection's turn."""
        if size < LONG_READ and not self._reading and not self._output.backlog:
            return True
        return perf_counter() < self._input.until and self._fits(size)

    def _fits(self, size: int) -> bool:
        """Is there room for a reply of this size?"""
        untaken = self._output.backlog
        if not untaken and not self._reading and size <= GATHERED_READ:
            return True
        return untaken < MAX_UNTAKEN and untaken + self._reading < MAX_UNSENT and self._account.allows(size)

    def has_memory(self, size: int) -> bool:
        """May a payload of this size be received now?"""
        if (throttle := self._export.throttle) is not None and not throttle.may_go_on(self):
            self._hold_back()
            return False
        return self._account.allows(size)

    def _hold_back(self) -> None:
        """Take no more until the export's limits let it."""
        self._throttled = True
        self._input.stop()

    def unthrottle(self) -> None:
        """Go on, as the export's limits let it now."""
        self._throttled = False
        self.resume()

    def stalled_since(self) -> float | None:
        """Since when the peer has neither taken its oldest reply nor sent a payload whole."""
        since = (self._output.blocked_since, self._input.blocked_since)
        return min((moment for moment in since if moment is not None), default=None)

    def resume(self) -> None:
        """Go on with what waited for memory, unless the peer has gone meanwhile."""
        if is_gone(self._sock):
            self._lose()
        else:
            self._guarded(self._resume)
            if self._input.active:  # a payload that waited must be asked for now, while it is this connection's turn
                self._guarded(self._input.receive)

    def _on_room(self) -> None:
        self._guarded(self._resume)

    def _resume(self) -> None:
        """Go on with what waited for room, as far as there is some."""
        self._start_waiting()
        if self._cold:
            self._read_cold()
        self._output.push()
        if not (self._draining or self._lost or self._full()):
            self._input.start()
        self._check_over()

    def _start_waiting(self) -> None:
        if not self._waiting:
            return
        until = self._input.begin_turn()
        while self._waiting and not self._lost and self._fits(self._waiting[0][0]):
            _size, begin = self._waiting.popleft()
            begin()
            if perf_counter() > until:
                self._go_on_soon()
                break

    def _go_on_soon(self) -> None:
        """Go on with what waits when others had their turn."""
        if self._going_on is None:
            self._going_on = self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """It is this connection's turn again, with what had room and no time."""
        self._going_on = None
        self._guarded(self._resume)

    def _lose(self) -> None:
        """The connection is gone. Threads that work for it are waited for; nobody hears of what they did."""
        self._lost = True
        if self._export.throttle is not None:
            self._export.throttle.leave(self)
        self._waiting.clear()
        cold, self._cold = self._cold, []
        for _flags, _cookie, _offset, length in cold:
            self._forget_cold(length)
        self._input.close()
        self._output.close()
        self._check_over()

    def _check_over(self) -> None:
        busy = self._in_flight or self._readahead.running
        idle = not (busy or self._waiting or self._output.backlog)
        if ((self._lost and not busy) or (self._draining and idle)) and not self._over.done():
            self._over.set_result(None)
