"""A chain of layers as one disk: read from whoever owns a block, write to the delta on top.

For each segment that is in use, one byte per block says which layer owns it (0: nobody, the block reads as zeros). It
is put together when the segment is first touched, from the maps of all layers, and from then on the depth of the chain
does not show: a read looks up its owner and goes straight to that file.

The chain may change while the disk is in use: a snapshot puts a new delta on top (:meth:`Clone.stack`), and the layers
beneath the top are exchanged for others of the same content (:meth:`Clone.relayer`). A read finishes with the chain
that it began with.

Every operation stands here twice, in effect: ``*_nowait`` never waits for a disk and raises BlockingIOError where it
would have to, for an event loop to try first; the plain one waits, for a thread. A ``*_nowait`` that raised may have
been done in part; doing the whole operation again finishes it.

Thread-safe. Changes exclude one another (``_changing``), which is what makes two unaligned writes into one block both
survive; reads and flushes go on beside them.
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType

from nbdclone.errors import NBDCloneError, UsageError
from nbdclone.store.delta import Delta, set_bits
from nbdclone.store.delta_file import EMPTY_BITMAP, NO_PARENT
from nbdclone.store.fs import FILE_SYSTEM, FileSystem, data_and_holes
from nbdclone.store.layer import (
    BITMAP_SIZE,
    BLOCK_SHIFT,
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    MAX_LAYERS,
    NOWHERE,
    SEGMENT_SIZE,
    Extent,
    Layer,
    block_count,
    may_hold_zeros,
    paint_delta,
    uniform,
    zero_runs,
)

BLOCK_MASK = BLOCK_SIZE - 1
# How many stretches of a disk are looked at for one question about its extents: some 10 us of a thread each.
MAX_EXTENTS = 4096
# How much is read, and written, at a time when blocks are copied up.
COPY_SIZE = 1 << 20
_RUN = re.compile(rb"(.)\1*", re.DOTALL)
_SOMEWHERE = re.compile(rb"[^\0]+")
_ZERO_BLOCK = bytes(BLOCK_SIZE)

Buffer = bytes | bytearray | memoryview


class _Chain:
    """The layers of a disk, and its map of owners. ``readers`` are under way in threads; it is closed after them."""

    __slots__ = ("fds", "layers", "owners", "readers", "retired", "strides")

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = tuple(layers)
        # By owner; NOWHERE is never looked up.
        self.fds = [-1, *(layer.fd for layer in layers)]
        self.strides = [0, *(layer.stride for layer in layers)]
        self.owners: dict[int, bytes | bytearray] = {}
        self.readers = 0
        self.retired: tuple[Layer, ...] = ()  # to be closed after the last reader

    @property
    def parent_id(self) -> bytes:
        """The id of what the delta on top stands on."""
        return self.layers[-2].id if len(self.layers) > 1 else NO_PARENT

    def push(self, layer: Layer, sealed: Layer) -> None:
        """Put a layer on top, beneath which is ``sealed``: the same file as what was there, under the same number."""
        self.fds.append(layer.fd)
        self.strides.append(layer.stride)
        self.layers = (*self.layers[:-1], sealed, layer)


class _Era:
    """A time between two drops: how many readers in threads, who began in it, are under way."""

    __slots__ = ("readers",)

    def __init__(self) -> None:
        self.readers = 0


class Clone:
    """A disk of ``size`` bytes. Offsets and lengths are bytes, of any alignment.

    ``layers`` is ordered from the base upwards; the disk is writable if the last is a Delta.
    """

    def __init__(self, name: str, layers: Sequence[Layer], fs: FileSystem = FILE_SYSTEM) -> None:
        assert 0 < len(layers) <= MAX_LAYERS
        top = layers[-1]
        self.name = name
        self.size = top.size
        self._delta = top if isinstance(top, Delta) else None
        self._fs = fs
        self._preadv = fs.preadv
        self._pwrite = fs.pwrite
        self._nowait = fs.NOWAIT
        self._use(_Chain(layers))
        self._changing = threading.Lock()
        self._counting = threading.Lock()
        self._era = _Era()
        self._past: list[_Era] = []  # eras before, as far as they have readers
        self._closed = False
        # How often blocks came to be read from another layer than before, by no write: who works on all of them in
        # steps sees by it that he has to look once more.
        self.restacked = 0

    def _use(self, chain: _Chain) -> None:
        self._chain = chain
        self._top = len(chain.layers)
        # The same again, for what is on the hot path.
        self._fds = chain.fds
        self._strides = chain.strides
        self._owners = chain.owners

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The chain at present, from the bottom upwards."""
        return self._chain.layers

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

    # Reading

    def read_through(self, fs: FileSystem) -> None:
        """Use another view of the same file system from now on: one that watches what is read, for a while."""
        self._fs = fs
        self._preadv = fs.preadv

    def reads_base(self, offset: int, length: int) -> bool:
        """Is any of the range read from the layer at the bottom? May wait for the disk. Raises OSError."""
        with self._reading() as chain:
            return any(owner == 1 for owner, _, _ in self._runs(chain, offset, length, nowait=False))

    def pread(self, length: int, offset: int) -> bytes:
        """Read ``length`` bytes at ``offset``. Raises UsageError beyond the end, OSError."""
        self._require_inside(offset, length)
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset``; the range must be inside the disk. Raises OSError."""
        with self._reading() as chain:
            self._read(chain, view, offset, nowait=False)

    def read_all(self, ranges: Sequence[tuple[int, int]]) -> list[bytearray | Exception]:
        """Read some short ranges, (offset, length) inside the disk, that are on their way together: data or error of
        each.
        """
        if len(ranges) > 1:
            with contextlib.suppress(OSError, NBDCloneError):
                for offset, length in ranges:
                    self.prefetch(offset, length)
        found: list[bytearray | Exception] = []
        for offset, length in ranges:
            data = bytearray(length)
            try:
                self.read_into(memoryview(data), offset)
            except (OSError, NBDCloneError) as error:
                found.append(error)
            else:
                found.append(data)
        return found

    def read_into_nowait(self, view: memoryview, offset: int) -> None:
        """The same without waiting for a disk. Raises BlockingIOError where it would."""
        segment, within = divmod(offset, SEGMENT_SIZE)
        owners = self._owners.get(segment)
        length = len(view)
        first = within >> BLOCK_SHIFT
        end = (within + length + BLOCK_MASK) >> BLOCK_SHIFT
        if owners is not None and end <= BLOCKS_PER_SEGMENT:
            owner = owners[first]
            count = end - first
            if owner and (count == 1 or owners.count(owner, first, end) == count):
                position = offset + (segment + 1) * self._strides[owner]
                try:
                    if self._preadv(self._fds[owner], (view,), position, self._nowait) == length:
                        return
                except OSError as error:
                    if error.errno != errno.EOPNOTSUPP:  # tmpfs, for one: it knows no RWF_NOWAIT
                        raise
                raise BlockingIOError(errno.EAGAIN, "not in memory, or only a part")
            self._read_runs_nowait(view, offset, bytes(owners[first:end]))
            return
        self._read(self._chain, view, offset, nowait=True)

    def _read_runs_nowait(self, view: memoryview, offset: int, owners: bytes) -> None:
        """A range within one segment whose blocks have these owners: what ``_read`` does, with less for each run."""
        preadv, fds, strides, nowait = self._preadv, self._fds, self._strides, self._nowait
        lead = offset & BLOCK_MASK
        shift = offset // SEGMENT_SIZE + 1
        try:
            for run in _RUN.finditer(owners):
                first, end = run.span()
                owner = owners[first]
                start = (first << BLOCK_SHIFT) - lead if first else 0
                part = view[start : (end << BLOCK_SHIFT) - lead]
                if owner == NOWHERE:
                    part[:] = bytes(len(part))
                elif preadv(fds[owner], (part,), offset + start + shift * strides[owner], nowait) != len(part):
                    raise BlockingIOError(errno.EAGAIN, "only a part is in memory")
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            raise BlockingIOError(errno.EAGAIN, "this file system cannot say whether it would wait") from None

    @contextlib.contextmanager
    def _reading(self) -> Iterator[_Chain]:
        """The chain, for a reader in a thread: it is not closed before him."""
        with self._counting:
            chain, era = self._chain, self._era
            chain.readers += 1
            era.readers += 1
        try:
            yield chain
        finally:
            with self._counting:
                era.readers -= 1
                chain.readers -= 1
                retired = () if chain.readers else chain.retired
                chain.retired = () if retired else chain.retired
            for layer in retired:
                layer.close()

    @contextlib.contextmanager
    def holding(self) -> Iterator[tuple[Layer, ...]]:
        """The layers at present, which are not closed meanwhile."""
        with self._reading() as chain:
            yield chain.layers

    def _read(self, chain: _Chain, view: memoryview, offset: int, nowait: bool) -> None:
        done = 0
        for owner, position, length in self._runs(chain, offset, len(view), nowait):
            part = view[done : done + length]
            done += length
            if owner == NOWHERE:
                part[:] = bytes(length)
                continue
            at = position + (position // SEGMENT_SIZE + 1) * chain.strides[owner]
            if nowait:
                if self._fs.preadv_nowait(chain.fds[owner], (part,), at) != length:
                    raise BlockingIOError(errno.EAGAIN, "only a part is in memory")
                continue
            count = self._fs.pread_all(chain.fds[owner], [part], at, length)
            if count < length:
                # The end of a base that is no whole number of blocks; or a file that is shorter than it was.
                if chain.strides[owner] or at + count < chain.layers[owner - 1].size:
                    raise OSError(errno.EIO, f"'{self.name}': layer {owner} ends at byte {at + count} of its file")
                part[count:] = bytes(length - count)

    def _runs(self, chain: _Chain, offset: int, length: int, nowait: bool) -> Iterator[tuple[int, int, int]]:
        """The range as (owner, offset, length), each within one segment, in order."""
        end = offset + length
        while offset < end:
            segment = offset // SEGMENT_SIZE
            origin = segment * SEGMENT_SIZE
            stop = min(end, origin + SEGMENT_SIZE)
            first, last = (offset - origin) >> BLOCK_SHIFT, (stop - origin + BLOCK_MASK) >> BLOCK_SHIFT
            # A copy: a write beside this may change the map between the finding of a run and the look at its owner.
            owners = bytes(self._owners_of(chain, segment, nowait)[first:last])
            begin = origin + (first << BLOCK_SHIFT)
            # Nearly always; the search takes half a millisecond for a segment.
            if owners == bytes(owners[:1]) * len(owners):
                yield owners[0], offset, stop - offset
                offset = stop
                continue
            for run in _RUN.finditer(owners):
                start = max(offset, begin + (run.start() << BLOCK_SHIFT))
                yield run[0][0], start, min(stop, begin + (run.end() << BLOCK_SHIFT)) - start
            offset = stop

    def _owners_of(self, chain: _Chain, segment: int, nowait: bool) -> bytes | bytearray:
        owners = chain.owners.get(segment)
        if owners is None:
            painted = uniform(NOWHERE)
            for index, layer in enumerate(chain.layers, start=1):
                painted = layer.paint(segment, painted, index, nowait)
            if painted == uniform(painted[0]):
                painted = uniform(painted[0])
            # Another thread may have been here first, and may have changed its map since: the first one stays.
            owners = chain.owners.setdefault(segment, painted)
        return owners

    def prefetch(self, offset: int, length: int) -> None:
        """Ask the kernel to bring the range into memory."""
        with self._reading() as chain:
            for owner, position, count in self._runs(chain, offset, length, nowait=False):
                if owner != NOWHERE:
                    at = position + (position // SEGMENT_SIZE + 1) * chain.strides[owner]
                    self._fs.will_need(chain.fds[owner], at, count)

    def extents(self, offset: int, length: int, limit: int = MAX_EXTENTS) -> Iterator[Extent]:
        """Tell, in order and without gaps, from where the range is read; neighbours that are alike are one.

        Waits for the disk, and looks no further than it is asked to go on. It may end before the range does, after
        ``limit`` steps, but not before it told something. A change that runs beside it is told, or not. Raises
        UsageError beyond the end, OSError.
        """
        with self.surveyed(offset, length, limit) as (_layers, extents):
            yield from extents

    @contextlib.contextmanager
    def surveyed(
        self, offset: int, length: int, limit: int = MAX_EXTENTS
    ) -> Iterator[tuple[tuple[Layer, ...], Iterator[Extent]]]:
        """The same extents, and the layers to which their origins belong, also if the chain is exchanged meanwhile.

        If a snapshot puts a new delta on top meanwhile, the origin of what is written then is above all these layers.
        """
        self._require_inside(offset, length)
        with self._reading() as chain:
            yield chain.layers, _joined(islice(self._stretches(chain, offset, length), limit))

    def _stretches(self, chain: _Chain, offset: int, length: int) -> Iterator[Extent]:
        """The same, unbounded and unmerged: each within one segment and one layer."""
        for owner, start, count in self._runs(chain, offset, length, nowait=False):
            if owner == NOWHERE:
                yield Extent(count, NOWHERE, 0, True)
                continue
            depth = len(chain.layers) - owner + 1
            shift = (start // SEGMENT_SIZE + 1) * chain.strides[owner]
            stop = start + count
            # Whole blocks, and data rather than a hole where a block is a bit of both. A hole that is filled at this
            # moment was one when the question came; a block that was written before is data by its file already.
            for hole, end in data_and_holes(self._fs, chain.fds[owner], start + shift, stop + shift, BLOCK_SIZE):
                yield Extent(end - shift - start, owner, depth, hole)
                start = end - shift

    # Changing

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
                for start, count in _pieces(offset, length):
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
            self._write_partial(memoryview(_ZERO_BLOCK)[:length], offset, nowait=False)
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

    # The chain

    def stack(self, commit: Callable[[], Delta], layer: Path) -> None:
        """Make the delta a layer, and go on with another on top of it: what a snapshot does to an open disk.

        Changes wait meanwhile, reads go on. When the delta is settled, and nobody changes it, ``commit`` puts the new
        delta in its place in the pool, and returns it, open; the old one is the layer at ``layer`` then. If ``commit``
        raises, nothing happened. Constant time: the map of owners stays as it is.
        """
        with self._changing:
            delta = self._writable()
            if self._top >= MAX_LAYERS:
                raise UsageError(
                    f"'{self.name}' has {MAX_LAYERS} layers, as many as there may be: remove a snapshot first"
                )
            delta.settle_all()
            new = commit()
            self._chain.push(new, delta.seal(layer))
            self._delta = new
            self._top += 1
            self.restacked += 1

    def resize(self, size: int) -> None:
        """Make the disk larger or smaller, durably. What is new reads as zeros, also what a smaller disk had there.

        Nobody may read behind the new end any more: a disk that somebody uses is made larger, and not smaller. In the
        turn of the changes. Raises OSError (the disk is as it was, or has its new size), FileTooLarge, CloneFailed.
        """
        with self._changing:
            delta = self._writable()
            delta.begin_changes(nowait=False)
            end = min(size, self.size)
            overlap = delta.header.overlap
            seen = max((layer.size for layer in self.layers[:-1]), default=0)
            if end < (seen if overlap is None else min(overlap, seen)):
                # What is beneath is not to be seen from there on; the last block, if it is a part, is the delta's then.
                overlap = end & ~BLOCK_MASK
                if end > overlap:
                    self._copy_block(overlap)
            segment, within = divmod(end, SEGMENT_SIZE)
            owners = bytes(self._owners_of(self._chain, segment, nowait=False)[: block_count(within)])
            # Before the header changes, or a power cut would take the block that the overlap has not any more. And a
            # delta that gets smaller has all that it has in its map.
            delta.settle_all()
            delta.resize(size, overlap)
            # Not taken out of the map: a reader that was about to put it there would put it as it was.
            self._owners[segment] = owners + uniform(NOWHERE)[len(owners) :]
            for behind in [behind for behind in self._owners if behind > segment]:
                del self._owners[behind]
            self.size = size

    def _copy_block(self, offset: int) -> None:
        """Make the delta own one block with the content that it has."""
        segment, within = divmod(offset, SEGMENT_SIZE)
        owner = self._owners_of(self._chain, segment, nowait=False)[within >> BLOCK_SHIFT]
        if owner not in (self._top, NOWHERE):
            block = bytearray(BLOCK_SIZE)
            self._read_block(block, offset, nowait=False)
            self._write_blocks(memoryview(block), offset, nowait=False)
            self._writable().note_marks()

    def relayer(self, layers: Sequence[Layer]) -> None:
        """Exchange the layers beneath the delta for others with which the disk has the same content.

        To be called where no ``*_nowait`` runs: on the event loop. Raises BlockingIOError if a change is under way. The
        layers that were there are closed when nobody reads through them any more.
        """
        if not self._changing.acquire(blocking=False):
            raise BlockingIOError(errno.EAGAIN, "a change is under way")
        try:
            old, delta = self._chain, self._writable()
            with self._counting:
                self._use(_Chain([*layers, delta]))
                gone = (*old.retired, *old.layers[:-1])
                old.retired = gone if old.readers else ()
                self.restacked += 1
            if not old.readers:
                for layer in gone:
                    layer.close()
        finally:
            self._changing.release()

    def copy_up(self, offset: int, length: int, *, holes: bool = False, origin: int | None = None) -> int:
        """Make the delta own these whole blocks with the content that they have. Returns how many bytes it took over.

        Nothing changes for a reader. ``origin``: only what is read from that layer (1 is the one at the bottom). What
        beneath is a hole stays there, unless ``holes`` is set: then it becomes one of the delta's. Not durable before a
        flush. Raises OSError (EDQUOT, ENOSPC), CloneFailed.
        """
        if offset + length == self.size:  # the last block goes whole, although the disk may end within it
            length = block_count(self.size) * BLOCK_SIZE - offset
        assert not (offset | length) & BLOCK_MASK
        taken = 0
        buffer = memoryview(bytearray(min(length, COPY_SIZE)))
        try:
            with self._changing:
                self._writable().begin_changes(nowait=False)
                start = offset
                for extent in list(self._stretches(self._chain, offset, length)):
                    wanted = extent.origin not in (self._top, NOWHERE) and origin in (None, extent.origin)
                    if wanted and extent.hole and holes:
                        self._zero_blocks(start, extent.length, nowait=False, allocate=False)
                        taken += extent.length
                    elif wanted and not extent.hole:
                        for at in range(start, start + extent.length, COPY_SIZE):
                            part = buffer[: min(COPY_SIZE, start + extent.length - at)]
                            self._read_block(part, at, nowait=False)
                            self._write_blocks(part, at, nowait=False)
                            taken += len(part)
                    start += extent.length
        finally:
            self.note_marks()
        return taken

    def alike(self, offset: int, length: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Of these whole blocks, those that the delta could give up, as (offset, length): those of its data that read
        the same without it; and those of its data that are zeros, and not the same.
        """
        with self._reading() as chain:
            return self._alike(chain, offset, length, {})

    def _alike(
        self, chain: _Chain, offset: int, length: int, beneath: dict[int, bytes]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """``beneath``: the owners without the delta, by segment; what is missing is put in."""
        assert not (offset | length) & BLOCK_MASK
        same: list[tuple[int, int]] = []
        zeros: list[tuple[int, int]] = []
        top = len(chain.layers)
        for start, count in _pieces(offset, length):
            for extent in self._stretches(chain, start, count):
                for at in range(start, start + extent.length, COPY_SIZE):
                    if extent.origin != top or extent.hole:
                        break
                    end = min(at + COPY_SIZE, start + extent.length)
                    self._compare(chain, at, end - at, beneath, same, zeros)
                start += extent.length
        return same, zeros

    def _compare(
        self,
        chain: _Chain,
        offset: int,
        length: int,
        beneath: dict[int, bytes],
        same: list[tuple[int, int]],
        zeros: list[tuple[int, int]],
    ) -> None:
        """The same for blocks of the delta within one segment, which are data."""
        segment = offset // SEGMENT_SIZE
        if segment not in beneath:
            beneath[segment] = self._beneath(chain, segment)
        below = _Chain(chain.layers)
        below.owners[segment] = beneath[segment]
        mine, other = bytearray(length), bytearray(length)
        self._read(chain, memoryview(mine), offset, nowait=False)
        self._read(below, memoryview(other), offset, nowait=False)
        if mine == other:
            _add_run(same, offset, length)
            return
        for at in range(0, length, BLOCK_SIZE):
            block = mine[at : at + BLOCK_SIZE]
            if block == other[at : at + BLOCK_SIZE]:
                _add_run(same, offset + at, BLOCK_SIZE)
            elif block == _ZERO_BLOCK:
                _add_run(zeros, offset + at, BLOCK_SIZE)

    def _beneath(self, chain: _Chain, segment: int) -> bytes:
        """The owners of the segment as they would be if the delta had no block."""
        owners = uniform(NOWHERE)
        for index, layer in enumerate(chain.layers[:-1], start=1):
            owners = layer.paint(segment, owners, index, nowait=False)
        return paint_delta(segment, owners, EMPTY_BITMAP, len(chain.layers), self._writable().header.overlap)

    def drop(self, runs: Sequence[tuple[int, int]]) -> int:
        """Let the delta give up the blocks of these runs, (offset, length), as far as they read the same without it.

        Nothing changes for a reader. Returns how many bytes it gave up, durably: their space is given back by
        :meth:`punch_dropped`. Syncs several times, so that clients' changes wait for as long. Raises OSError,
        CloneFailed, and nothing was given up.
        """
        with self._changing:
            delta = self._writable()
            if self._chain.parent_id != delta.header.parent_id:
                return 0  # it is being moved to another parent: what is alike here need not be alike there
            delta.begin_changes(nowait=False)
            beneath: dict[int, bytes] = {}
            owners: dict[int, bytearray] = {}
            given: dict[int, bytearray] = {}
            dropped = 0
            for offset, length in runs:
                for at, count in self._alike(self._chain, offset, length, beneath)[0]:
                    segment, within = divmod(at, SEGMENT_SIZE)
                    first, end = within >> BLOCK_SHIFT, (within + count) >> BLOCK_SHIFT
                    if segment not in owners:
                        owners[segment] = bytearray(self._owners[segment])
                        given[segment] = bytearray(BITMAP_SIZE)
                    owners[segment][first:end] = beneath[segment][first:end]
                    set_bits(given[segment], first, end - 1)
                    dropped += count
            if dropped:
                delta.give_up(given)
                # The map is durable, in one slot at least: from here on it is done.
                self._owners.update(owners)
                with self._counting:
                    self._past.append(self._era)
                    self._era = _Era()
                self.restacked += 1
                delta.settle_all()
        return dropped

    def make_holes(self, runs: Sequence[tuple[int, int]]) -> int:
        """Make holes of those blocks of these runs that are the delta's, and zeros. Returns how many bytes."""
        made = 0
        with self._changing:
            self._writable().begin_changes(nowait=False)
            beneath: dict[int, bytes] = {}
            for offset, length in runs:
                for at, count in self._alike(self._chain, offset, length, beneath)[1]:
                    self._zero_blocks(at, count, nowait=False, allocate=False)
                    made += count
        return made

    def punch_dropped(self, segment: int) -> bool:
        """Give back what space of the delta's file, in one segment, is that of blocks which are not the delta's.

        Blocks that were dropped have it, and writes that a crash cut off. False, and nothing was done: somebody still
        reads who began before a drop. To be called when no ``*_nowait`` can be at work any more that began before the
        last drop. Raises OSError, CloneFailed.
        """
        with self._changing:
            with self._counting:
                self._past = [era for era in self._past if era.readers]
                if self._past:
                    return False
            delta = self._writable()
            delta.begin_changes(nowait=False)
            owners = bytes(self._owners_of(self._chain, segment, nowait=False))
            # Both slots of the map durably say that the blocks are not the delta's: else a page that rots, or is torn,
            # would bring back the other, and with it holes in the place of what lies beneath.
            if not delta.settled(segment):
                delta.settle_all()
                if not delta.settled(segment):
                    return True
            last = min(BLOCKS_PER_SEGMENT, block_count(self.size) - segment * BLOCKS_PER_SEGMENT)
            origin = segment * SEGMENT_SIZE + (segment + 1) * delta.stride
            for run in _RUN.finditer(owners, 0, last):
                if run[0][0] != self._top:
                    start, stop = (origin + (at << BLOCK_SHIFT) for at in run.span())
                    for hole, end in list(data_and_holes(self._fs, delta.fd, start, stop, BLOCK_SIZE)):
                        if not hole:
                            self._fs.punch(delta.fd, start, end - start)
                            delta.touched()
                        start = end
            return True

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
            for start, count in _pieces(offset, length):
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
            written = self._pwrite(delta.fd, view, position)
            if written != length:
                self._store_rest(view, written, offset, nowait)
            # Marked after the bytes are in the file: a flush that sees the mark has its data sync ahead of it.
            if fresh:
                self._take(segment, first, first + count)
        finally:  # also when it failed: in blocks that were ours already, some of it may be read from now on
            delta.touched()

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
        for run in _RUN.finditer(self._owners[segment], first, end):
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

    def _require_inside(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise UsageError(f"'{self.name}' has {self.size} bytes: [{offset}, {offset + length}) is outside")

    def __enter__(self) -> Clone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _add_run(runs: list[tuple[int, int]], offset: int, length: int) -> None:
    """Add a run that comes behind those that are there, and is joined with the last of its segment."""
    if runs and sum(runs[-1]) == offset and offset % SEGMENT_SIZE:
        runs[-1] = (runs[-1][0], runs[-1][1] + length)
    else:
        runs.append((offset, length))


def _joined(extents: Iterator[Extent]) -> Iterator[Extent]:
    """The same with neighbours that are alike as one."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and last[1:] == extent[1:]:
            last = last._replace(length=last.length + extent.length)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
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
