"""Sharing: what stands twice over a base, at whatever place, has its space once, where the file system can do that.

    bases/debian/image     [A][B][C]                        [A][B][C]
    clones/web1/delta               [D][E][F]                        [D][E][F]
    clones/web2/delta      [x][A][B][C]   [D][E][F]         [x] ^  ^  ^     ^  ^  ^    shared; only [x] is its own

XFS and btrfs can. All that holds data is read once, the base's image first; a table has the hash and the place of each
block, and where a hash comes again, the bytes around both places are compared, for as long as they are the same. That
run is given to the kernel, which compares it again while nobody can change either file, and only then lets the later
one have the extents of the earlier one. So this may be done to clones that are open and written to: nothing of what
anybody reads, nor of what a flush made durable, depends on what was found here. The image of the base is never changed.

What is shared is copied by the file system when it is written to: a write to a block that a clone has had before may
then meet a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blake3 import blake3

from nbdclone.errors import NotFound, UsageError
from nbdclone.store.block_sets import NO_BLOCKS, runs_of
from nbdclone.store.delta_file import METADATA_SIZE, SEGMENT_SPAN, place_of
from nbdclone.store.delta_map import DeltaMap
from nbdclone.store.fs import CANNOT_SHARE, FileSystem, data_and_holes
from nbdclone.store.image import Image
from nbdclone.store.layer import BLOCK_SHIFT, BLOCK_SIZE, BLOCKS_PER_SEGMENT, paint_delta
from nbdclone.store.rebasing import open_base
from nbdclone.store.standing import find_chain

if TYPE_CHECKING:
    from nbdclone.control.verbs import Steps
    from nbdclone.store.places import Places

# Blocks that the table has at most: some 120 MiB of memory, and 4 GiB of data. Of more data it has one block in two,
# in four, and so on: runs that are longer than that are found all the same.
MAX_HASHES = 1 << 20
# Of a hash of 64 bits: that two blocks among some million have the same by chance costs one comparison.
HASH_SIZE = 8
# How much is read at once, and of a run compared at once.
READ_SIZE = 1 << 20
PIECE_SIZE = 64 << 10
# A run that is shorter stays: each makes files of more extents, and saves less than it costs to read them.
MIN_RUN = 4 * BLOCK_SIZE
# How much the kernel is given in one call: requests of clients to the two files wait for it. It takes 16 MiB.
MAX_CALL = 4 << 20
# What is shared by way of trial: whole blocks of any file system.
TRIAL_SIZE = 64 << 10
# What the kernel says of files or ranges that are not to be shared: another file system, another kind of extents, a
# file of somebody else, or one that is swapped to. They stay as they are.
_REFUSED = CANNOT_SHARE | {errno.EXDEV, errno.EPERM, errno.EACCES, errno.ETXTBSY}
_ZEROS = bytes(BLOCK_SIZE)
_NUMBER_SHIFT = 48  # of a file, above a place in it


@dataclass(slots=True)
class _File:
    """The base's image, or a delta with its map. ``blocks`` are those of the disk, whole ones."""

    fd: int
    blocks: int
    map: DeltaMap | None = None

    def stretches(self, fs: FileSystem) -> Iterator[tuple[int, int]]:
        """The (start, stop) in the file of what holds data of its own. Raises CorruptDelta, OSError."""
        for start, stop in self._owned():
            at = start
            for hole, end in data_and_holes(fs, self.fd, start, stop, BLOCK_SIZE):
                if not hole:
                    yield at, end
                at = end

    def _owned(self) -> Iterator[tuple[int, int]]:
        if self.map is None:
            yield 0, self.blocks * BLOCK_SIZE
            return
        for segment in range(-(-self.blocks // BLOCKS_PER_SEGMENT)):
            bitmap = self.map.read(segment, nowait=False).bitmap
            for offset, length in runs_of(paint_delta(segment, NO_BLOCKS, bitmap, 1, None), segment):
                start = place_of(offset >> BLOCK_SHIFT)
                yield start, start + length

    def data_around(self, place: int) -> tuple[int, int]:
        """Between which places of the file there is nothing but data of the disk, around this one."""
        if self.map is None:
            return 0, self.blocks * BLOCK_SIZE
        start = place - place % SEGMENT_SPAN
        return start + METADATA_SIZE, min(start + SEGMENT_SPAN, place_of(self.blocks - 1) + BLOCK_SIZE)


@dataclass(slots=True)
class _Table:
    """Where blocks were seen first, by their hashes: of those that are divisible by ``one_in``."""

    places: dict[int, int] = field(default_factory=dict)
    one_in: int = 1

    def find_or_add(self, block: bytes, number: int, place: int) -> tuple[int, int] | None:
        """(number of the file, place) where the block was seen; None if it was not, and from now on it was."""
        key = int.from_bytes(blake3(block).digest(HASH_SIZE), "big")
        if key % self.one_in:
            return None
        seen = self.places.setdefault(key, number << _NUMBER_SHIFT | place)
        if seen != number << _NUMBER_SHIFT | place:
            return seen >> _NUMBER_SHIFT, seen & (1 << _NUMBER_SHIFT) - 1
        while len(self.places) > MAX_HASHES:
            self.one_in *= 2
            for key in [key for key in self.places if key % self.one_in]:
                del self.places[key]
        return None


@dataclass(frozen=True, slots=True)
class _Run:
    """The same bytes in two files, or twice in one."""

    source: _File
    source_place: int
    target: _File
    place: int
    length: int


def share(places: Places, base: str, dry_run: bool = False) -> Steps:
    """Let the file system share what is alike in the deltas and layers over a base, and in its image.

    Returns bytes: found ``alike`` and not shared yet, and ``shared`` now, as the kernel has it (what was changed
    meanwhile is not); and that of the blocks one in ``one_in`` was looked up. Raises NotFound, UsageError (where the
    file system cannot do it, too), CorruptDelta, OSError.
    """
    fs = places.fs
    with contextlib.ExitStack() as held:
        image = open_base(places, base)
        held.callback(image.close)
        _require_sharing(places)
        unit = max(os.statvfs(places.path).f_bsize, BLOCK_SIZE)
        files = _files(places, image, held)
        table = _Table()
        alike = shared = done = 0
        total = sum(fs.fstat(file.fd).st_blocks * 512 for file in files)
        steps = _find(files, table, unit, fs)
        with contextlib.closing(steps):
            for found in steps:
                if isinstance(found, int):
                    done += found
                    yield min(done, total), total
                    continue
                for piece in _pieces(found):
                    if not _is_shared(piece, fs):
                        alike += piece.length
                        shared += 0 if dry_run else _share(piece, fs)
                    yield min(done, total), total
        return {"base": base, "alike": alike, "shared": shared, "one_in": table.one_in, "dry_run": dry_run}


def _require_sharing(places: Places) -> None:
    """Raises UsageError unless the pool's file system does it: which one can, is seen by trying."""
    fs = places.fs
    with places.staging() as staging, contextlib.ExitStack() as held:
        fds = []
        for name in ("one", "other"):
            fds.append(fs.open(staging / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            held.callback(fs.close, fds[-1])
            fs.pwrite_all(fds[-1], b"\1" * TRIAL_SIZE, 0)
        try:
            fs.dedupe(fds[0], 0, fds[1], 0, TRIAL_SIZE)
        except OSError as error:
            if error.errno not in CANNOT_SHARE:
                raise
            raise UsageError(
                f"{places.path}: this file system cannot share extents: XFS with reflink, and btrfs, can"
            ) from None


def _files(places: Places, base: Image, held: contextlib.ExitStack) -> list[_File]:
    """The image, the layers and the deltas of clones above it, in this order, open as long as ``held``."""
    clones, layers = [], set()
    for name in sorted(places.names_in(places.clones)):
        path = places.delta(name)
        with contextlib.suppress(NotFound):  # it was removed just now
            own = find_chain(places, path)
            if own.lowest.parent_id == base.record.id:
                clones.append(path)
                layers.update(own.layers)
            for snapshot in places.snapshots(name, own.header.id).values():
                chain = find_chain(places, places.layer(snapshot.layer))
                if chain.lowest.parent_id == base.record.id:
                    layers.update([snapshot.layer, *chain.layers])
    # Of a last block that is a part of one, nobody knows the rest.
    files = [_File(base.fd, base.size // BLOCK_SIZE)]
    for path in [*map(places.layer, sorted(layers)), *clones]:
        with contextlib.suppress(NotFound):
            fd, header = held.enter_context(places.reading(path))
            files.append(_File(fd, -(-header.size // BLOCK_SIZE), DeltaMap(path, fd, header.id, places.fs)))
    return files


# What is alike


def _find(files: Sequence[_File], table: _Table, unit: int, fs: FileSystem) -> Generator[int | _Run, None, None]:
    """Yields runs of the same bytes, no target's twice; and after each read how many bytes were looked at."""
    buffer = bytearray(READ_SIZE)
    for number, file in enumerate(files):
        for start, stop in file.stretches(fs):
            position = free = start  # what is before ``free`` is in a run already
            while position < stop:
                count = fs.pread_all(file.fd, [buffer], position, min(READ_SIZE, stop - position))
                count -= count % BLOCK_SIZE
                if not count:  # the file was made shorter
                    break
                for place in range(position, position + count, BLOCK_SIZE):
                    block = bytes(buffer[place - position : place - position + BLOCK_SIZE])
                    if place < free or block == _ZEROS:
                        continue
                    seen = table.find_or_add(block, number, place)
                    if seen is not None and file.map is not None:  # the image is the source of others only
                        source = files[seen[0]]
                        run = _run(_Run(source, seen[1], file, place, 0), free, stop, fs)
                        run = _in_units(run, unit)
                        if run.length >= MIN_RUN:
                            yield run
                            free = run.place + run.length
                ahead = max(position + count, free)
                yield ahead - position
                position = ahead


def _run(hit: _Run, first: int, stop: int, fs: FileSystem) -> _Run:
    """How far the bytes are the same around the place of a hit, in the target's [first, stop)."""
    floor, ceiling = hit.source.data_around(hit.source_place)
    apart = hit.place - hit.source_place
    back = _alike(hit, -min(hit.place - first, hit.source_place - floor), fs)
    place, source_place = hit.place - back, hit.source_place - back
    limit = min(stop - hit.place, ceiling - hit.source_place)
    if hit.source.fd == hit.target.fd:
        limit = min(limit, apart - back)  # a range is not shared with what it overlaps
    return _Run(hit.source, source_place, hit.target, place, back + _alike(hit, max(limit, 0), fs))


def _alike(hit: _Run, limit: int, fs: FileSystem) -> int:
    """How many bytes are the same from the hit on, whole blocks, ``limit`` at most; below 0: before the hit."""
    backwards, limit = limit < 0, abs(limit)
    one, other = bytearray(PIECE_SIZE), bytearray(PIECE_SIZE)
    done = 0
    while done < limit:
        size = min(PIECE_SIZE, limit - done)
        ahead = -done - size if backwards else done
        fs.pread_all(hit.source.fd, [one], hit.source_place + ahead, size)
        fs.pread_all(hit.target.fd, [other], hit.place + ahead, size)
        if memoryview(one)[:size] == memoryview(other)[:size]:
            done += size
            continue
        for at in range(0, size, BLOCK_SIZE):
            at = size - BLOCK_SIZE - at if backwards else at
            if one[at : at + BLOCK_SIZE] != other[at : at + BLOCK_SIZE]:
                break
            done += BLOCK_SIZE
        break
    return done


def _in_units(run: _Run, unit: int) -> _Run:
    """What of the run is whole blocks of the file system, which may be larger than ours."""
    cut = -run.place % unit
    length = max(run.length - cut, 0)
    if (run.place - run.source_place) % unit:
        length = 0
    return _Run(run.source, run.source_place + cut, run.target, run.place + cut, length - length % unit)


# What is done about it


def _pieces(run: _Run) -> Iterator[_Run]:
    for at in range(0, run.length, MAX_CALL):
        length = min(MAX_CALL, run.length - at)
        yield _Run(run.source, run.source_place + at, run.target, run.place + at, length)


def _is_shared(run: _Run, fs: FileSystem) -> bool:
    places = fs.places_on_disk(run.target.fd, run.place, run.length)
    return places is not None and places == fs.places_on_disk(run.source.fd, run.source_place, run.length)


def _share(run: _Run, fs: FileSystem) -> int:
    """How many bytes are shared now: none behind the first that differ, or that the kernel refuses."""
    done = 0
    while done < run.length:
        try:
            count = fs.dedupe(
                run.source.fd, run.source_place + done, run.target.fd, run.place + done, run.length - done
            )
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            break
        if not count:
            break
        done += count
    return done
