"""How a session answers reads, and questions for block status: on the spot, or by a thread.

A part of the hot path. It is a class of its own for those who read the code: a session is one object with all of it.
That there is room for a reply was seen to before anything here is called.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from mmap import mmap
from typing import Any

from nbdclone.errors import NBDCloneError
from nbdclone.protocol.transmission import error_chunk, hole_chunk, read_chunk_header
from nbdclone.protocol.wire import (
    CMD_FLAG_DF,
    EXTENDED,
    OFFSET_DATA,
    OFFSET_HOLE,
    REPLY_FLAG_DONE,
    REPLY_TYPE_OFFSET_DATA,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED,
    Cookie,
    Mode,
)
from nbdclone.server.block_status import Contexts, block_status
from nbdclone.server.budget import Account
from nbdclone.server.buffers import MIN_BUFFER, PAGE, new_buffer
from nbdclone.server.errnos import describe, nbd_errno, tell
from nbdclone.server.export import Export
from nbdclone.server.holes import Run, find_holes, is_zero, lay_out
from nbdclone.server.output import Output
from nbdclone.server.peer import Peer
from nbdclone.server.readahead import Readahead
from nbdclone.server.scratch import Scratch

# A read of more than this gets a buffer of its own, page-aligned and sent from where it is; less is gathered. A shorter
# one is answered by one chunk: a hole if it is all zeros.
GATHERED_READ = 64 << 10
# More than this is copied in a thread: a millisecond of copying on the loop is a millisecond for everybody.
MAX_INLINE = 1 << 20
# So many short reads that have to wait for the disk are one job for a thread: handing over a job and its outcome costs
# more than the read. They are on their way to the disk together; the first waits for the last.
MAX_TOGETHER = 4


class Reading(ABC):
    """What of a session reads from the clone, and replies."""

    def __init__(
        self, peer: Peer, export: Export, mode: Mode, scratch: Scratch, account: Account, output: Output
    ) -> None:
        self._peer = peer
        self._export = export
        self._clone = export.clone
        self._structured = mode is not Mode.SIMPLE
        self._layout = EXTENDED if mode is Mode.EXTENDED else STRUCTURED
        self._read_header = self._layout.read.size if self._structured else SIMPLE_REPLY.size
        self._buffers = scratch.buffers
        self._scratch = scratch
        self._account = account
        self._output = output
        self._in_flight = 0  # requests that threads work on
        self._cold: list[tuple[int, Cookie, int, int]] = []  # short reads of this turn that are not in memory
        self._reading = 0  # bytes of replies that threads make
        self._readahead = Readahead(export.clone)
        self._lost = False

    @abstractmethod
    def _on_room(self) -> None:
        """A thread is done: there may be room for what waits."""

    @abstractmethod
    def _check_over(self) -> None:
        """A thread is done: this may have been the last thing to wait for."""

    def _read(self, flags: int, cookie: Cookie, offset: int, length: int, data: bytearray | None = None) -> None:
        """Answer a read, on the spot if it is in memory. ``data``: what a short one has found on the disk meanwhile."""
        header = self._read_header
        if length > GATHERED_READ:
            self._read_large(flags, cookie, offset, length)
            return
        output = self._output
        at = output.reserve(header + length)
        view = output.view[at + header : at + header + length]
        try:
            if data is None:
                self._clone.read_into_nowait(view, offset)
            else:
                view[:] = data
        except BlockingIOError:
            self._in_flight += 1
            self._reading += length
            self._account.take(length)
            self._cold.append((flags, cookie, offset, length))
        except (OSError, NBDCloneError) as error:
            self._fail(cookie, error)
        else:
            if not self._structured:
                SIMPLE_REPLY.pack_into(output.buffer, at, SIMPLE_REPLY_MAGIC, 0, cookie)
            elif not view[0] and length > OFFSET_HOLE.size and is_zero(view):  # where it is shorter than the data
                output.add(hole_chunk(cookie, offset, length, layout=self._layout))
                return
            else:
                layout = self._layout
                layout.read.pack_into(
                    output.buffer,
                    at,
                    layout.magic,
                    REPLY_FLAG_DONE,
                    REPLY_TYPE_OFFSET_DATA,
                    cookie,
                    OFFSET_DATA.size + length,
                    offset,
                )
            output.filled = at + header + length

    def _read_cold(self) -> None:
        """Let threads read what this turn did not find in memory."""
        cold, self._cold = self._cold, []
        for start in range(0, len(cold), MAX_TOGETHER):
            self._read_together(cold[start : start + MAX_TOGETHER])
        for _flags, _cookie, offset, length in cold:
            if ahead := self._readahead.note_cold(offset, length):
                self._read_ahead(ahead)

    def _read_together(self, reads: list[tuple[int, Cookie, int, int]]) -> None:
        clone = self._clone
        work = partial(clone.read_all, [(offset, length) for _flags, _cookie, offset, length in reads])

        def done(results: list[bytearray | Exception] | None, error: BaseException | None) -> None:
            for index, (flags, cookie, offset, length) in enumerate(reads):
                self._forget_cold(length)
                result = error if results is None else results[index]
                if not isinstance(result, bytearray):
                    assert result is not None
                    self._fail(cookie, result)
                elif not self._lost:
                    self._read(flags, cookie, offset, length, result)
            self._on_room()

        self._scratch.offload.submit(work, done, self._export)

    def _forget_cold(self, length: int) -> None:
        self._in_flight -= 1
        self._reading -= length
        self._account.give(length)

    def _read_large(self, flags: int, cookie: Cookie, offset: int, length: int) -> None:
        if length > MAX_INLINE:
            self._read_in_thread(flags, cookie, offset, length)
            return
        buffer = self._buffers.take(PAGE + length)
        view = memoryview(buffer)
        try:
            self._clone.read_into_nowait(view[PAGE : PAGE + length], offset)
        except BlockingIOError:
            self._read_in_thread(flags, cookie, offset, length, buffer)
        except (OSError, NBDCloneError) as error:
            self._buffers.give(buffer)
            self._fail(cookie, error)
        else:
            self._send_read(cookie, offset, length, view, buffer, self._holes(flags, view[PAGE : PAGE + length]))

    def _holes(self, flags: int, view: memoryview) -> list[Run] | None:
        """What of the data of a read is to be told as holes."""
        if not self._structured:
            return None
        return find_holes(view, fragment=len(view) > GATHERED_READ and not flags & CMD_FLAG_DF)

    def _send_read(
        self, cookie: Cookie, offset: int, length: int, view: memoryview, buffer: mmap, runs: list[Run] | None
    ) -> None:
        """Send a read whose data stand at the second page of their own buffer; the header goes right before them."""
        if runs is not None:
            parts, rest = lay_out(runs, view, PAGE, cookie, offset, self._layout)
            self._output.send_parts(parts, buffer)
            self._output.add(rest)
            return
        start = PAGE - self._read_header
        if self._structured:
            view[start:PAGE] = read_chunk_header(cookie, offset, length, layout=self._layout)
        else:
            SIMPLE_REPLY.pack_into(buffer, start, SIMPLE_REPLY_MAGIC, 0, cookie)
        self._output.send_owned(view[start : PAGE + length], buffer)

    def _read_in_thread(self, flags: int, cookie: Cookie, offset: int, length: int, buffer: mmap | None = None) -> None:
        size = PAGE + length
        bulky = length > MAX_INLINE
        if buffer is None:
            buffer = self._buffers.take_idle(size) if bulky else self._buffers.take(size)
        clone = self._clone
        held = max(length, MIN_BUFFER)
        self._in_flight += 1
        self._reading += held
        self._account.take(held)

        def work() -> tuple[mmap, list[Run] | None]:
            taken = buffer or new_buffer(size)
            data = memoryview(taken)[PAGE:size]
            clone.read_into(data, offset)
            return taken, self._holes(flags, data)

        def done(result: tuple[mmap, list[Run] | None] | None, error: BaseException | None) -> None:
            self._in_flight -= 1
            self._reading -= held
            self._account.give(held)
            taken, runs = result or (buffer, None)
            if taken and error is None and not self._lost:
                self._send_read(cookie, offset, length, memoryview(taken), taken, runs)
            elif taken:
                self._buffers.give(taken)
            if error is not None:
                self._fail(cookie, error)
            self._on_room()

        (self._scratch.bulk if bulky else self._scratch.offload).submit(work, done, self._export)
        if not bulky and (ahead := self._readahead.note_cold(offset, length)):
            self._read_ahead(ahead)

    def _read_ahead(self, work: Callable[[], None]) -> None:
        """Run what is advice: whether it succeeds is no matter, but the clone must be open until it is done."""

        def done(_result: Any, _error: BaseException | None) -> None:
            self._readahead.job_done()
            self._check_over()

        self._scratch.bulk.submit(work, done, self._export)

    def _tell_status(self, cookie: Cookie, offset: int, length: int, contexts: Contexts, one: bool, held: int) -> None:
        clone, layout = self._clone, self._layout
        self._in_flight += 1
        self._reading += held
        self._account.take(held)

        def done(chunks: list[bytes], error: BaseException | None) -> None:
            self._in_flight -= 1
            self._reading -= held
            self._account.give(held)
            if error is not None:
                self._fail(cookie, error)
            else:
                for chunk in chunks:
                    self._output.add(chunk)
            self._on_room()

        work = partial(block_status, clone, contexts, cookie, offset, length, one, layout)
        self._scratch.offload.submit(work, done, self._export)

    def _fail(self, cookie: Cookie, error: BaseException) -> None:
        """Gather the reply to a request that failed, and log it: a full disk fails thousands a second."""
        number = nbd_errno(error)
        if not self._lost:
            kind = f"failed {self._clone.name} {number}"  # no client gets more of them by connecting again
            self._scratch.quiet.say(kind, "%s: '%s': %s", self._peer, self._clone.name, describe(error))
        self._reply(cookie, number, tell(error, self._peer))

    def _reply(self, cookie: Cookie, error: int, message: str = "") -> None:
        """Gather the reply to a request that failed."""
        if self._structured:
            self._output.add(error_chunk(cookie, error, message, self._layout))
        else:
            self._output.simple_reply(cookie, error)
