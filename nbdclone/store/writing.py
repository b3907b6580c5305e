"""The changing of a disk: writes, zeros and flushes of the delta on top.

Thread-safe. Changes exclude one another (``_changing``), which is what makes two unaligned writes into one block both
survive; reads and flushes go on beside them.
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from nbdclone.errors import UsageError
from nbdclone.store.delta import Delta
from nbdclone.store.disk import BLOCK_MASK, RUN, Disk
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.layer import (
    BLOCK_SHIFT,
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    NOWHERE,
    SEGMENT_SIZE,
    Layer,
    block_count,
    may_hold_zeros,
    uniform,
    zero_runs,
)

# ext4 caches what comes in one write in one large folio, and walks through all blocks of that folio with each later
# write into it: 4 KiB into one of 1 MiB cost it 17 us, into one of 64 KiB 3.5, into one of 4 KiB 2. So a large write
# goes in pieces, as aligned as folios are: a MiB of it takes 30 us more (`python -m integration.bench.folios`).
PIECE_SIZE = 64 << 10
ZERO_BLOCK = bytes(BLOCK_SIZE)
_SOMEWHERE = re.compile(rb"[^\0]+")

Buffer = bytes | bytearray | memoryview


class WritableDisk(Disk):
    """A disk that is writable if the last of its layers is a Delta."""

    def __init__(self, name: str, layers: Sequence[Layer], fs: FileSystem = FILE_SYSTEM) -> None:
        super().__init__(name, layers, fs)
        top = layers[-1]
        self._delta = top if isinstance(top, Delta) else None
        self._pwrite = fs.pwrite
        self._changing = threading.Lock()
        self._closed = False

    @property
    def delta(self) -> Delta:
        """The delta on top. Raises UsageError if the disk is read-only."""
        return self._writable()

    @property
    def read_only(self) -> bool:
        return self._delta is None

    @property
    def fast_zero(self) -> bool:
        """Is making zeros quicker here than writing them?"""
        return self._delta is not None and self._delta.can_punch

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of ``data`` at ``offset``. Raises UsageError if read-only or beyond the end, OSError."""
        self._require_inside(offset, len(data))
        self.write(memoryview(data), offset)

    def write(self, view: memoryview, offset: int) -> None:
        """Write ``view``; the range must be inside the disk. Raises OSError, CloneFailed.

        ENOSPC (the disk is full) and EDQUOT (the clone's quota): each sector holds what it held, or what was written.
        """
        try:
            self._write(view, offset, nowait=False)
        finally:  # also what got in before it failed: it is read from now on
            self.note_marks()

    def note_marks(self) -> None:
        """Keep what was written from being lost with this process: once for several calls of :meth:`write_nowait`."""
        if self._delta is not None:
            self._delta.note_marks()

    def write_nowait(self, view: memoryview, offset: int) -> None:
        """The same without waiting for a disk to be read. Raises BlockingIOError where it would.

        To be acknowledged after :meth:`note_marks`.
        """
        self._write(view, offset, nowait=True)

    def zero(self, offset: int, length: int, *, allocate: bool = False) -> None:
        """Make the range read as zeros, and give its space back; with ``allocate`` take space for it instead.

        The range must be inside the disk. Raises OSError, CloneFailed.
        """
        if offset + length == self.size:  # the last block goes whole, although the disk may end within it
            length = block_count(self.size) * BLOCK_SIZE - offset
        try:
            with self._changing:
                self._writable().begin_changes(nowait=False)
                without_space: list[tuple[int, int]] = []
                for start, count in pieces(offset, length):
                    try:
                        self._zero_piece(start, count, allocate)
                    except OSError as error:
                        if allocate or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                            raise
                        without_space.append((start, count))
                # A map that is new takes space; the segments after it may have given back some.
                for start, count in without_space:
                    self._zero_piece(start, count, allocate)
        finally:
            self.note_marks()

    def _zero_piece(self, offset: int, length: int, allocate: bool) -> None:
        if offset & BLOCK_MASK or length < BLOCK_SIZE:
            self._write_partial(memoryview(ZERO_BLOCK)[:length], offset, nowait=False)
        else:
            self._zero_blocks(offset, length, nowait=False, allocate=allocate)

    def look_at_quota(self) -> None:
        """The quota was changed: hold to it from the next write on, and not only when the lease is used up."""
        with self._changing:
            if self._delta is not None:
                self._delta.quota.lease = 0

    def flush(self) -> None:
        """Make durable every write that was finished before the call. Raises OSError, CloneFailed."""
        if self._delta:
            self._delta.flush()

    def close(self) -> None:
        """Flush, close the files, let go of the locks. Once closed, closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._delta:
                self._delta.finish()
        finally:
            for layer in (*self._chain.layers, *self._chain.retired):
                layer.close()

    def _write(self, view: memoryview, offset: int, nowait: bool) -> None:
        if not self._changing.acquire(not nowait):
            raise BlockingIOError(errno.EAGAIN, "another change is under way, which may wait for a disk")
        try:
            (self._delta or self._writable()).begin_changes(nowait)
            length = len(view)
            if not (offset | length) & BLOCK_MASK and offset % SEGMENT_SIZE + length <= SEGMENT_SIZE:
                self._write_blocks(view, offset, nowait)
                return
            done = 0
            for start, count in pieces(offset, length):
                part = view[done : done + count]
                done += count
                if start & BLOCK_MASK or count < BLOCK_SIZE:
                    self._write_partial(part, start, nowait)
                else:
                    self._write_blocks(part, start, nowait)
        finally:
            self._changing.release()

    def _write_blocks(self, view: memoryview, offset: int, nowait: bool) -> None:
        """Write whole blocks within one segment; those that hold only zeros become holes."""
        if not may_hold_zeros(view):
            self._store(view, offset, nowait)
            return
        for zero, start, end in zero_runs(view):
            if zero:
                self._zero_blocks(offset + start, end - start, nowait, allocate=False)
            else:
                self._store(view[start:end], offset + start, nowait)

    def _store(self, view: memoryview, offset: int, nowait: bool) -> None:
        segment, within = divmod(offset, SEGMENT_SIZE)
        owners = self._owners.get(segment)
        if owners is None:
            owners = self._owners_of(self._chain, segment, nowait)
        delta = self._delta
        assert delta is not None
        length = len(view)
        position = offset + (segment + 1) * delta.stride
        first = within >> BLOCK_SHIFT
        count = length >> BLOCK_SHIFT
        if delta.young and (count > 1 or offset >> BLOCK_SHIFT in delta.young):
            self._settle(offset >> BLOCK_SHIFT, count, nowait)
        if count == 1:
            fresh = owners[first] != self._top
        else:
            fresh = owners.count(self._top, first, first + count) != count
        if fresh:
            delta.reserve(segment, nowait)
        # Also where the block is ours: it may be a hole.
        quota = delta.quota
        quota.lease -= length
        if quota.lease < 0:
            quota.renew(position, length, nowait)
        try:
            if length <= PIECE_SIZE:
                written = self._pwrite(delta.fd, view, position)
            else:
                written = self._pwrite_pieces(delta.fd, view, position)
            if written != length:
                self._store_rest(view, written, offset, nowait)
            # Marked after the bytes are in the file: a flush that sees the mark has its data sync ahead of it.
            if fresh:
                self._take(segment, first, first + count)
        finally:  # also when it failed: in blocks that were ours already, some of it may be read from now on
            delta.touched()

    def _pwrite_pieces(self, fd: int, view: memoryview, position: int) -> int:
        """Write in pieces: how much the kernel took. Raises OSError if it took nothing."""
        done, length = 0, len(view)
        while done < length:
            count = min(PIECE_SIZE - (position + done) % PIECE_SIZE, length - done)
            try:
                written = self._pwrite(fd, view[done : done + count], position + done)
            except OSError:
                if done:
                    break  # who writes the rest meets it again
                raise
            done += written
            if written != count:
                break
        return done

    def _store_rest(self, view: memoryview, written: int, offset: int, nowait: bool) -> None:
        """Write what the kernel did not take at once, mostly because the disk is full."""
        segment, within = divmod(offset, SEGMENT_SIZE)
        delta = self._writable()
        try:
            self._fs.pwrite_all(delta.fd, view[written:], offset + (segment + 1) * delta.stride + written)
        except OSError:
            if nowait:
                raise BlockingIOError(errno.EAGAIN, "making a hole of what was written may wait") from None
            self._give_back(segment, within >> BLOCK_SHIFT, (within + len(view)) >> BLOCK_SHIFT)
            raise

    def _give_back(self, segment: int, first: int, end: int) -> None:
        """Make holes where blocks [first, end) are not ours: a change that failed has left there what nobody reads."""
        start = (segment + 1) * self._writable().stride + segment * SEGMENT_SIZE
        for run in RUN.finditer(self._owners[segment], first, end):
            if run[0][0] != self._top:
                with contextlib.suppress(OSError):
                    self._fs.punch(
                        self._writable().fd, start + (run.start() << BLOCK_SHIFT), len(run[0]) << BLOCK_SHIFT
                    )

    def _zero_blocks(self, offset: int, length: int, nowait: bool, allocate: bool) -> None:
        """Zero whole blocks within one segment. Blocks that are nowhere stay there, unless they are to be allocated."""
        segment, within = divmod(offset, SEGMENT_SIZE)
        owners = self._owners_of(self._chain, segment, nowait)
        if owners is uniform(NOWHERE) and not allocate:
            return  # untouched: looking for something in it takes 0.2 ms, and a disk may have 100,000 such segments
        delta = self._writable()
        first, end = within >> BLOCK_SHIFT, (within + length) >> BLOCK_SHIFT
        spans = [(first, end)] if allocate else [run.span() for run in _SOMEWHERE.finditer(owners, first, end)]
        clear = self._fs.zero_allocated if allocate else self._fs.punch
        if nowait and owners.count(self._top, first, end):
            # Some file systems write out, and wait for, what is dirty in the range before they make a hole of it.
            raise BlockingIOError(errno.EAGAIN, "making a hole of data may wait")
        for first, end in spans:
            # Also where the block is not ours yet: what lies at its place may be the bytes of a write that a crash
            # left unmarked. As with data, the hole is made before the mark, and a flush syncs it before the map.
            position = (segment + 1) * delta.stride + segment * SEGMENT_SIZE + (first << BLOCK_SHIFT)
            if delta.young:
                self._settle(segment * BLOCKS_PER_SEGMENT + first, end - first, nowait)
            fresh = owners.count(self._top, first, end) != end - first
            if fresh:
                delta.reserve(segment, nowait)
            if allocate or not delta.can_punch:
                delta.quota.take(position, (end - first) << BLOCK_SHIFT, nowait)
            try:
                clear(delta.fd, position, (end - first) << BLOCK_SHIFT)
                if fresh:
                    self._take(segment, first, end)
            except OSError:
                if allocate:
                    self._give_back(segment, first, end)
                raise
            finally:
                delta.touched()

    def _write_partial(self, view: memoryview, offset: int, nowait: bool) -> None:
        """Write a part of one block. A block that is not ours yet is copied up with the new bytes in it."""
        segment, within = divmod(offset, SEGMENT_SIZE)
        owner = self._owners_of(self._chain, segment, nowait)[within >> BLOCK_SHIFT]
        lead = offset & BLOCK_MASK
        block = bytearray(BLOCK_SIZE)
        delta = self._writable()
        position = offset + (segment + 1) * delta.stride
        if owner == self._top:
            if nowait:  # the kernel would read the rest of the page from the disk: see that it need not
                self._read_block(block, offset - lead, nowait)
            if delta.young:
                self._settle(offset >> BLOCK_SHIFT, 1, nowait)
            delta.quota.take(position - lead, BLOCK_SIZE, nowait)
            try:
                self._fs.pwrite_all(delta.fd, view, position)
            finally:
                delta.touched()
            return
        self._read_block(block, offset - lead, nowait)
        block[lead : lead + len(view)] = view
        self._write_blocks(memoryview(block), offset - lead, nowait)

    def _read_block(self, block: bytearray | memoryview, offset: int, nowait: bool) -> None:
        """Read whole blocks; beyond the end of the disk, in its last block, there are zeros."""
        view = memoryview(block)
        count = min(len(view), self.size - offset)
        self._read(self._chain, view[:count], offset, nowait)
        view[count:] = bytes(len(view) - count)

    def _settle(self, block: int, count: int, nowait: bool) -> None:
        """Blocks [block, block + count) of the disk are about to be changed: see that they may be."""
        delta = self._writable()
        if not delta.young.isdisjoint(range(block, block + count)):
            delta.before_change(block, count, nowait)

    def _take(self, segment: int, first: int, end: int) -> None:
        """Make blocks [first, end) of the segment the delta's."""
        (self._delta or self._writable()).mark(segment, first, end - 1)
        if end - first == BLOCKS_PER_SEGMENT:
            self._owners[segment] = uniform(self._top)
            return
        owners = self._owners[segment]
        if not isinstance(owners, bytearray):
            owners = self._owners[segment] = bytearray(owners)
        if end - first == 1:
            owners[first] = self._top
        else:
            owners[first:end] = uniform(self._top)[: end - first]

    def _writable(self) -> Delta:
        if self._delta is None:
            raise UsageError(f"'{self.name}' is read-only")
        return self._delta

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The range as (offset, length): parts of one block, and rows of whole blocks within one segment."""
    end = offset + length
    while offset < end:
        lead = offset & BLOCK_MASK
        if lead or end - offset < BLOCK_SIZE:
            count = min(BLOCK_SIZE - lead, end - offset)
        else:
            count = min((end - offset) & ~BLOCK_MASK, SEGMENT_SIZE - offset % SEGMENT_SIZE)
        yield offset, count
        offset += count
