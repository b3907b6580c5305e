"""Hoisting: what many clones of a base have alike, at the same place, is put into one layer beneath them.

    base <- web1 [A][B][1]                 base <- layer [A][B] <- web1       [1]
         <- web2 [A][B]   [2]       =>                          <- web2          [2]
         <- web3    [B]      [3]                                <- web3 [a]         [3]    a: the base's
         <- web4                [4]             <- web4                            [4]

The blocks are found by their hashes, but nothing depends on these: the layer is made of some clone's blocks, and each
clone is moved onto it as onto another base (:mod:`nbdclone.store.moving`), which keeps what it reads, whatever the
layer has; then the clone gives back what is beneath it as well. Cut off, some clones are on the layer, and others are
not: the same again makes a layer of what these have alike. A layer with one clone is merged into that, and one that
nobody stands on goes, as those of snapshots that were removed.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from nbdclone.errors import NotFound, UsageError
from nbdclone.store.block_sets import ALL_BLOCKS, NO_BLOCKS, both, either, runs_of, to_bitmap, without
from nbdclone.store.common_layer import MOST_MEMBERS, Piece, make_layer
from nbdclone.store.delta_file import Header, place_of
from nbdclone.store.delta_map import DeltaMap
from nbdclone.store.fs import FileSystem, data_and_holes
from nbdclone.store.image import Image
from nbdclone.store.layer import (
    BLOCK_SHIFT,
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    MAX_LAYERS,
    SEGMENT_SIZE,
    Layer,
    paint_delta,
)
from nbdclone.store.moving import Move
from nbdclone.store.opening import open_top, with_beneath
from nbdclone.store.rebasing import open_base, part, together
from nbdclone.store.sharing import share
from nbdclone.store.space import disk_usage
from nbdclone.store.standing import find_chain

if TYPE_CHECKING:
    from nbdclone.control.verbs import Steps, Target
    from nbdclone.store.places import Places

# How many hashes are held at a time, of all clones together: some 20 MiB.
MAX_HASHES = 100_000
# How much of a clone is read at once.
READ_SIZE = 1 << 20
HASH_SIZE = 16
_ZEROS = bytes(BLOCK_SIZE)

Segments = dict[int, bytearray]


@dataclass(slots=True)
class _Candidate:
    """A clone as its file has it; the counts are of blocks that the layer would have."""

    name: str
    fd: int
    map: DeltaMap
    size: int
    alike: int = 0  # the same content
    owned: int = 0  # some content
    file_size: int = 0


@dataclass(slots=True)
class _Group:
    """Clones that stand on the same: the base, or a layer over it."""

    parent: Layer
    candidates: list[_Candidate]


@dataclass(slots=True)
class _Found:
    """What the layer is to be made of: by segment, the number of the clone, counted from 1, that has each block."""

    sources: Segments = field(default_factory=dict)
    count: int = 0

    def blocks(self, segment: int) -> bytes:
        """A byte for each block: 1 where it is in the layer."""
        return bytes(self.sources[segment]).translate(_ANY)


_ANY = bytes([0]) + b"\1" * 255


def hoist(
    target: Target, base: str, min_clones: int | None = None, dry_run: bool = False, dedupe: bool = False
) -> Steps:
    """Put into a layer of their own the blocks that ``min_clones`` clones have alike which stand directly on the base,
    or on the same layer over it (default: half of them), and move those clones onto it that take less space so. At most
    255 clones of each are looked at.

    Returns bytes: of the ``layer`` (all of them), and all deltas ``before`` and ``after`` (in a dry run: as far as that
    can be told); the names of the ``clones`` that were moved; and of each that was ``left_out`` its ``name`` and
    ``why``. Raises NotFound, UsageError if nothing could be moved, and what ``rebase`` raises. ``dedupe``: nothing is
    moved, the file system shares what is alike (:func:`nbdclone.store.sharing.share`).
    """
    places = target.pool.places
    if dedupe:
        if min_clones is not None:
            raise UsageError("--dedupe shares whatever is there twice: it takes no --min-clones")
        return (yield from share(places, base, dry_run))
    if min_clones is not None and min_clones < 2:
        raise UsageError("what one clone has alone is not shared: --min-clones is 2 or more")
    result: dict[str, Any] = {"base": base, "dry_run": dry_run}
    result |= {"layer": 0, "clones": [], "before": 0, "after": 0}
    with contextlib.ExitStack() as held:
        image = open_base(places, base)
        held.callback(image.close)
        groups = _groups(places, image, held)
        if not groups:
            raise UsageError(f"no two clones of base '{base}' stand on the same: nothing is shared")
        refused: dict[str, UsageError] = {}
        for number, group in enumerate(groups):
            hoisting = _hoist_group(target, image, group, min_clones, dry_run, refused, held)
            done = yield from part(hoisting, number, len(groups))
            for what, amount in done.items():
                result[what] += amount
    if refused and not result["clones"]:
        raise refused[min(refused)]
    return result | {"left_out": [{"name": name, "why": str(refused[name])} for name in sorted(refused)]}


def _hoist_group(
    target: Target,
    base: Image,
    group: _Group,
    min_clones: int | None,
    dry_run: bool,
    refused: dict[str, UsageError],
    held: contextlib.ExitStack,
) -> Generator[tuple[int, int], None, dict[str, Any]]:
    """``refused``: where those are noted that cannot be moved."""
    places, candidates = target.pool.places, group.candidates
    least = max(2, -(-len(candidates) // 2)) if min_clones is None else min_clones
    found = yield from part(_find(candidates, least, places.fs), 0, 3)
    moving = [each for each in candidates if each.alike > found.count - each.owned]
    saved = sum(each.alike - (found.count - each.owned) for each in moving) - found.count
    before = sum(each.file_size for each in candidates)
    if saved <= 0:
        return {"before": before, "after": before}
    size = found.count * BLOCK_SIZE
    result = {"clones": [each.name for each in moving], "before": before}
    if dry_run:
        return result | {"layer": size, "after": before - saved * BLOCK_SIZE}
    record, parent = base.record, group.parent
    widest = max(parent.size, *(each.size for each in candidates))
    header = Header(uuid.uuid4().bytes, parent.id, record.fingerprint, widest, time.time_ns(), base.name)
    making = make_layer(places, header, _pieces(candidates, found, places.fs), size, f"hoist of '{base.name}'", held)
    layer = yield from part(making, 1, 3)
    staging = held.enter_context(places.staging())
    bitmaps = {segment: to_bitmap(found.blocks(segment)) for segment in sorted(found.sources)}
    move = Move(parent.id, layer.header.id, record.id, base.name, record.fingerprint, None, bitmaps)
    move.save(staging / "move")
    path = str((staging / "move").relative_to(places.tmp))
    works = [_move_one(target, each.name, path, refused) for each in moving]
    yield from part(together(works), 2, 3)
    result["clones"] = [each.name for each in moving if each.name not in refused]
    allocated = disk_usage(places.layer(layer.header.id))
    after = sum(disk_usage(places.delta(each.name)) for each in candidates)
    return result | {"layer": allocated, "after": after + allocated}


def _move_one(target: Target, name: str, path: str, refused: dict[str, UsageError]) -> Steps:
    """One that was removed or changed meanwhile, is in use, or has not the quota, stays as it is: with others it has as
    much alike as before.
    """
    try:
        yield from target.run("move-clone", {"name": name, "move": path})
    except UsageError as error:
        refused[name] = error


def _groups(places: Places, base: Image, held: contextlib.ExitStack) -> list[_Group]:
    """The clones of the base that stand on the same as another, by what that is; open as long as ``held``.

    What a client changed after its last flush may be left out of their maps.
    """
    names: dict[bytes, list[str]] = {}
    for name in sorted(places.names_in(places.clones)):
        with contextlib.suppress(NotFound):  # it was removed, or renamed, just now
            on = find_chain(places, places.delta(name))
            if on.lowest.parent_id == base.record.id and len(on.layers) + 3 <= MAX_LAYERS:
                names.setdefault(on.header.parent_id, []).append(name)
    found = []
    for parent_id, clones in names.items():
        if len(clones) < 2:
            continue
        what = f"'{clones[0]}'"
        chain: list[Layer] = [base]
        if parent_id != base.record.id:  # open, so that none of it is given back meanwhile
            try:
                chain = with_beneath(places, what, open_top(places, parent_id, what))
            except NotFound:  # it is being merged into the last that is left
                continue
            for layer in chain:
                held.callback(layer.close)
        candidates = []
        for name in clones[:MOST_MEMBERS]:
            path = places.delta(name)
            with contextlib.suppress(NotFound):
                fd, header = held.enter_context(places.reading(path))
                if header.parent_id == parent_id:
                    pages = DeltaMap(path, fd, header.id, places.fs)
                    size = places.fs.fstat(fd).st_blocks * 512
                    candidates.append(_Candidate(name, fd, pages, header.size, file_size=size))
        if len(candidates) > 1:
            found.append(_Group(chain[-1], candidates))
    return found


def _find(candidates: Sequence[_Candidate], least: int, fs: FileSystem) -> Generator[tuple[int, int], None, _Found]:
    """Choose the blocks, behind the end of the base too. Reads what at least ``least`` clones own, once."""
    found = _Found()
    whole = max(each.size for each in candidates) // BLOCK_SIZE
    width = max(MAX_HASHES // len(candidates), 64)
    segments = -(-whole // BLOCKS_PER_SEGMENT)
    for segment in range(segments):
        inside = min(whole - segment * BLOCKS_PER_SEGMENT, BLOCKS_PER_SEGMENT)
        owned = [_owned(each, segment) for each in candidates]
        worth = _at_least(owned, least)
        for first in range(0, inside if worth != NO_BLOCKS else 0, width):
            window = NO_BLOCKS[:first] + ALL_BLOCKS[: min(width, inside - first)]
            window = both(worth, window.ljust(BLOCKS_PER_SEGMENT, b"\0"))
            hashes: dict[int, dict[bytes, list[int]]] = {}
            for number, (each, own) in enumerate(zip(candidates, owned, strict=True)):
                for block, digest in _hashes(each, both(own, window), segment, fs):
                    hashes.setdefault(block, {}).setdefault(digest, []).append(number)
            _choose(found, candidates, owned, segment, hashes, least)
            yield segment * SEGMENT_SIZE + (first << BLOCK_SHIFT), segments * SEGMENT_SIZE
        yield (segment + 1) * SEGMENT_SIZE, segments * SEGMENT_SIZE
    return found


def _owned(each: _Candidate, segment: int) -> bytes:
    # Of a last block that is a part of one, nobody knows the rest.
    inside = min(max(each.size // BLOCK_SIZE - segment * BLOCKS_PER_SEGMENT, 0), BLOCKS_PER_SEGMENT)
    state = each.map.read(segment, nowait=False)
    return paint_delta(segment, NO_BLOCKS, state.bitmap, 1, None)[:inside].ljust(BLOCKS_PER_SEGMENT, b"\0")


def _at_least(owned: Sequence[bytes], least: int) -> bytes:
    """The blocks that so many own."""
    # Counted as the levels of a sieve: level n has what at least n + 1 own.
    levels = [NO_BLOCKS] * least
    for own in owned:
        if own == NO_BLOCKS:
            continue
        for level in range(least - 1, 0, -1):
            levels[level] = either(levels[level], both(levels[level - 1], own))
        levels[0] = either(levels[0], own)
    return levels[-1]


def _hashes(each: _Candidate, blocks: bytes, segment: int, fs: FileSystem) -> Iterator[tuple[int, bytes]]:
    """(block of the segment, hash) of those blocks that hold something; holes are left out, for they take no space."""
    buffer = bytearray(READ_SIZE)
    for offset, length in runs_of(blocks, segment):
        start = place_of(offset >> BLOCK_SHIFT)
        shift = start - offset + segment * SEGMENT_SIZE
        at = start
        for hole, stop in data_and_holes(fs, each.fd, start, start + length, BLOCK_SIZE):
            for position in range(at, at if hole else stop, READ_SIZE):
                count = fs.pread_all(each.fd, [buffer], position, min(READ_SIZE, stop - position))
                for begin in range(0, count, BLOCK_SIZE):
                    block = bytes(buffer[begin : begin + BLOCK_SIZE])
                    if block != _ZEROS:
                        yield (position + begin - shift) >> BLOCK_SHIFT, blake3(block).digest(HASH_SIZE)
            at = stop


def _choose(
    found: _Found,
    candidates: Sequence[_Candidate],
    owned: Sequence[bytes],
    segment: int,
    hashes: dict[int, dict[bytes, list[int]]],
    least: int,
) -> None:
    for block, contents in hashes.items():
        who = max(contents.values(), key=len)
        if len(who) < least:
            continue
        found.sources.setdefault(segment, bytearray(BLOCKS_PER_SEGMENT))[block] = who[0] + 1
        found.count += 1
        for number in who:
            candidates[number].alike += 1
        for number, own in enumerate(owned):
            candidates[number].owned += own[block]


def _pieces(candidates: Sequence[_Candidate], found: _Found, fs: FileSystem) -> Iterator[Piece]:
    """What was found, each from the clone that was chosen for it."""
    for segment, sources in sorted(found.sources.items()):
        for number, each in enumerate(candidates, start=1):
            for offset, length in runs_of(_where(sources, number), segment):
                yield offset, length, partial(_read, fs, each.fd)


def _read(fs: FileSystem, fd: int, view: memoryview, offset: int) -> None:
    fs.pread_all(fd, [view], place_of(offset >> BLOCK_SHIFT), len(view))


def _where(sources: bytearray, number: int) -> bytes:
    """The blocks that come from that clone."""
    return without(ALL_BLOCKS, bytes(sources).translate(bytes(int(byte != number) for byte in range(256))))
