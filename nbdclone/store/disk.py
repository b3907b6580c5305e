"""A chain of layers as one disk: read from whoever owns a block.

For each segment that is in use, one byte per block says which layer owns it (0: nobody, the block reads as zeros). It
is put together when the segment is first touched, from the maps of all layers, and from then on the depth of the chain
does not show: a read looks up its owner and goes straight to that file.

The chain may be exchanged while the disk is in use: a read finishes with the chain that it began with.

Every operation stands twice, here and in ``writing.py``, in effect: ``*_nowait`` never waits for a disk and raises
BlockingIOError where it would have to, for an event loop to try first; the plain one waits, for a thread. A
``*_nowait`` that raised may have been done in part; doing the whole operation again finishes it.

Thread-safe. Reads go on beside changes.
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections.abc import Iterator, Sequence
from itertools import islice

from nbdclone.errors import NBDCloneError, UsageError
from nbdclone.store.delta_file import NO_PARENT
from nbdclone.store.fs import FILE_SYSTEM, FileSystem, data_and_holes
from nbdclone.store.layer import (
    BLOCK_SHIFT,
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    MAX_LAYERS,
    NOWHERE,
    SEGMENT_SIZE,
    Extent,
    Layer,
    uniform,
)

BLOCK_MASK = BLOCK_SIZE - 1
# How many stretches of a disk are looked at for one question about its extents: some 10 us of a thread each.
MAX_EXTENTS = 4096
# A row of blocks of one owner.
RUN = re.compile(rb"(.)\1*", re.DOTALL)


class Chain:
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


class Era:
    """A time between two drops: how many readers in threads, who began in it, are under way."""

    __slots__ = ("readers",)

    def __init__(self) -> None:
        self.readers = 0


class Disk:
    """The reading of a disk of ``size`` bytes. Offsets and lengths are bytes, of any alignment.

    ``layers`` is ordered from the base upwards.
    """

    def __init__(self, name: str, layers: Sequence[Layer], fs: FileSystem = FILE_SYSTEM) -> None:
        assert 0 < len(layers) <= MAX_LAYERS
        self.name = name
        self.size = layers[-1].size
        self._fs = fs
        self._preadv = fs.preadv
        self._nowait = fs.NOWAIT
        self._use(Chain(layers))
        self._counting = threading.Lock()
        self._era = Era()
        self._past: list[Era] = []  # eras before, as far as they have readers
        self._left: list[Chain] = []  # chains before, as far as they have
        # How often blocks came to be read from another layer than before, by no write: who works on all of them in
        # steps sees by it that he has to look once more.
        self.restacked = 0

    def _use(self, chain: Chain) -> None:
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
            for run in RUN.finditer(owners):
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
    def _reading(self) -> Iterator[Chain]:
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
            for layer in retired:  # nobody comes any more: it is not the disk's chain
                layer.close()
            if retired:
                chain.retired = ()

    @contextlib.contextmanager
    def holding(self) -> Iterator[tuple[Layer, ...]]:
        """The layers at present, which are not closed meanwhile."""
        with self._reading() as chain:
            yield chain.layers

    def _read(self, chain: Chain, view: memoryview, offset: int, nowait: bool) -> None:
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

    def _runs(self, chain: Chain, offset: int, length: int, nowait: bool) -> Iterator[tuple[int, int, int]]:
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
            for run in RUN.finditer(owners):
                start = max(offset, begin + (run.start() << BLOCK_SHIFT))
                yield run[0][0], start, min(stop, begin + (run.end() << BLOCK_SHIFT)) - start
            offset = stop

    def _owners_of(self, chain: Chain, segment: int, nowait: bool) -> bytes | bytearray:
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

    def _stretches(self, chain: Chain, offset: int, length: int) -> Iterator[Extent]:
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

    def _require_inside(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise UsageError(f"'{self.name}' has {self.size} bytes: [{offset}, {offset + length}) is outside")


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
