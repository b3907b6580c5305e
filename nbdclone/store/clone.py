"""A writable disk whose chain of layers changes, and whose delta takes blocks over and gives them up.

The chain may change while the disk is in use: a snapshot puts a new delta on top (:meth:`Clone.stack`), and the layers
beneath the top are exchanged for others of the same content (:meth:`Clone.relayer`). What the delta owns may change
with nothing changed for a reader: it takes blocks over (:meth:`Clone.copy_up`), and gives them up (:meth:`Clone.drop`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

from nbdclone.errors import UsageError
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import EMPTY_BITMAP
from nbdclone.store.disk import BLOCK_MASK, RUN, Chain, Era
from nbdclone.store.fs import data_and_holes
from nbdclone.store.layer import (
    BITMAP_SIZE,
    BLOCK_SHIFT,
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    MAX_LAYERS,
    NOWHERE,
    SEGMENT_SIZE,
    Layer,
    block_count,
    paint_delta,
    set_bits,
    uniform,
)
from nbdclone.store.sealed import Sealed
from nbdclone.store.writing import ZERO_BLOCK, WritableDisk, pieces

# How much is read, and written, at a time when blocks are copied up.
COPY_SIZE = 1 << 20
# How much one look at what the delta has takes in: some 10 ms, for which changes wait.
MOST_SEGMENTS = 16
MOST_RUNS = 1024


class Clone(WritableDisk):
    """A disk of ``size`` bytes. Offsets and lengths are bytes, of any alignment.

    ``layers`` is ordered from the base upwards; the disk is writable if the last is a Delta.
    """

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
                self._use(Chain([*layers, delta]))
                gone = (*old.retired, *old.layers[:-1])
                old.retired = gone if old.readers else ()
                self._left = [chain for chain in (*self._left, old) if chain.retired]
                self.restacked += 1
            if not old.readers:
                for layer in gone:
                    layer.close()
        finally:
            self._changing.release()

    def has_let_go(self) -> bool:
        """Are the layers closed that were exchanged, for nobody reads through them any more?"""
        return not any(chain.retired for chain in self._left)

    # What the delta owns

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
        self, chain: Chain, offset: int, length: int, beneath: dict[int, bytes]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """``beneath``: the owners without the delta, by segment; what is missing is put in."""
        assert not (offset | length) & BLOCK_MASK
        same: list[tuple[int, int]] = []
        zeros: list[tuple[int, int]] = []
        top = len(chain.layers)
        for start, count in pieces(offset, length):
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
        chain: Chain,
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
        below = Chain(chain.layers)
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
            elif block == ZERO_BLOCK:
                _add_run(zeros, offset + at, BLOCK_SIZE)

    def _beneath(self, chain: Chain, segment: int) -> bytes:
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
            # A merge punches what is beneath, and does not sync it: the zeros that are read there by now must be there
            # after a power cut, too. In the layers beneath that one it punches what others than the delta hide.
            for layer in self.layers[-2:-1]:
                if isinstance(layer, Sealed):
                    self._fs.sync(layer.fd)
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
                    self._era = Era()
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

    def settle_hidden(self, start: int, end: int) -> tuple[list[tuple[int, int]], int]:
        """Leave all that the delta has durably in its map, in both slots, and count those apart who read later.

        Returns what of [start, end) the delta has so, as (offset, length), each within a segment; and up to where was
        looked. It stays the delta's until the disk is :attr:`restacked`, or made smaller. Raises OSError, CloneFailed.
        """
        runs: list[tuple[int, int]] = []
        with self._changing:
            delta = self._writable()
            delta.begin_changes(nowait=False)
            delta.settle_all()
            with self._counting:
                self._past.append(self._era)
                self._era = Era()
            for segment in range(start // SEGMENT_SIZE, start // SEGMENT_SIZE + MOST_SEGMENTS):
                origin = segment * SEGMENT_SIZE
                stop = min(end, origin + SEGMENT_SIZE)
                if start >= end or len(runs) >= MOST_RUNS:
                    break
                owners = bytes(self._owners_of(self._chain, segment, nowait=False))
                if delta.settled(segment):
                    for run in RUN.finditer(owners, (start - origin) >> BLOCK_SHIFT, block_count(stop - origin)):
                        if run[0][0] == self._top:
                            runs.append((origin + (run.start() << BLOCK_SHIFT), len(run[0]) << BLOCK_SHIFT))
                start = stop
        return runs, start

    def past_is_over(self) -> bool:
        """Is nobody reading any more, in a thread, who began before the last :meth:`settle_hidden` or drop?"""
        with self._counting:
            self._past = [era for era in self._past if era.readers]
            return not self._past

    def punch_dropped(self, segment: int) -> bool:
        """Give back what space of the delta's file, in one segment, is that of blocks which are not the delta's.

        Blocks that were dropped have it, and writes that a crash cut off. False, and nothing was done: somebody still
        reads who began before a drop. To be called when no ``*_nowait`` can be at work any more that began before the
        last drop. Raises OSError, CloneFailed.
        """
        with self._changing:
            if not self.past_is_over():
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
            for run in RUN.finditer(owners, 0, last):
                if run[0][0] != self._top:
                    start, stop = (origin + (at << BLOCK_SHIFT) for at in run.span())
                    for hole, end in list(data_and_holes(self._fs, delta.fd, start, stop, BLOCK_SIZE)):
                        if not hole:
                            self._fs.punch(delta.fd, start, end - start)
                            delta.touched()
                        start = end
            return True


def _add_run(runs: list[tuple[int, int]], offset: int, length: int) -> None:
    """Add a run that comes behind those that are there, and is joined with the last of its segment."""
    if runs and sum(runs[-1]) == offset and offset % SEGMENT_SIZE:
        runs[-1] = (runs[-1][0], runs[-1][1] + length)
    else:
        runs.append((offset, length))
