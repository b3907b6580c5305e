"""A layer without a name that several clones are put onto: it has once what all of them read there.

Hoisting makes one of what the clones own alike. Rebasing makes one of what the old base has and the new one has not:
each clone would have to take it over, and reads it from the layer instead.

    old <- web1 [1]             new <- layer [old's, where they differ] <- web1 [1]
        <- web2    [2]    =>                                            <- web2    [2]
        <- web3       [3]                                               <- web3       [3]

Made whole, and durable, before it has its place in the pool; until all clones are moved, whoever makes it keeps others
from merging it into the first of them. Cut off, it has as many clones as were moved by then: a layer with one clone is
merged into that, and one that nobody stands on goes, as those of snapshots that were removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress

from nbdclone.store.block_sets import NO_BLOCKS, blocks_in, both, to_bitmap, without
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import Header
from nbdclone.store.delta_map import DeltaMap
from nbdclone.store.layer import BLOCK_SIZE, BLOCKS_PER_SEGMENT, paint_delta
from nbdclone.store.layer_manifest import adding_blocks
from nbdclone.store.moving import Move, lacking
from nbdclone.store.opening import open_beneath
from nbdclone.store.places import Places
from nbdclone.store.sealed import Sealed

# How much is copied at once.
COPY_SIZE = 1 << 20
# Bytes on the disk that have to be saved before clones get a layer more: each look at the pool shows it, and it has a
# page of metadata for each segment.
WORTH = 1 << 20
# The most that stand on one: so that a byte can count them.
MOST_MEMBERS = 255

# A stretch of the disk, (offset, length), and who reads it into a view.
Piece = tuple[int, int, Callable[[memoryview, int], object]]


def make_layer(
    places: Places, header: Header, pieces: Iterable[Piece], total: int, what: str, held: contextlib.ExitStack
) -> Generator[tuple[int, int], None, Sealed]:
    """A layer with this header, of these whole blocks. Open as long as ``held``, so that nobody removes or merges it.

    ``total``: the bytes of all ``pieces``; ``what`` begins the messages. Raises StorageError.
    """
    fs = places.fs
    buffer = memoryview(bytearray(COPY_SIZE))
    done = 0
    with places.no_space_left(what), places.staging() as staging:
        draft = staging / "layer"
        fs.mkdir(draft)
        Delta.create(draft / "delta", header, fs)
        delta = Delta.open(draft / "delta", "the layer", fs)
        with Clone("the layer", [*open_beneath(places, what, header), delta], fs) as disk:
            for offset, length, read in pieces:
                for at in range(offset, offset + length, COPY_SIZE):
                    view = buffer[: min(COPY_SIZE, offset + length - at)]
                    read(view, at)
                    disk.pwrite(view, at)
                    done += len(view)
                    yield done, total
        fs.sync_directory(draft)
        with places.changing():
            if not places.layers.is_dir():
                fs.mkdir(places.layers)
                fs.sync_directory(places.path)
            # Open, and locked, before it has its name: for nobody stands on it yet.
            layer = Sealed.open(draft / "delta", "the layer", fs)
            held.callback(layer.close)
            # All of it is durable: a power cut leaves it there or not there. Then the name is made so, before a header
            # says it.
            fs.rename(draft, places.layer(header.id).parent)
            layer.path = places.layer(header.id)
            fs.sync_directory(places.layers)
            held.enter_context(adding_blocks(places, header.id))
    return layer


@dataclass(frozen=True, slots=True)
class Member:
    """A delta that is to stand on the layer, as its file has it: what a client changed since is not in its map yet."""

    header: Header
    map: DeltaMap

    def owned(self, segment: int) -> bytes:
        """A byte for each block: 1 where it is in the delta."""
        bitmap = self.map.read(segment, nowait=False).bitmap
        return paint_delta(segment, NO_BLOCKS, bitmap, 1, None)


@dataclass(slots=True)
class Common:
    """What a layer would have: by segment, a byte for each block. ``saved``: bytes that its members then need not have.

    ``conflicts``: for each member the bytes that it owns and in which source and target differ.
    """

    blocks: dict[int, bytes] = field(default_factory=dict)
    size: int = 0
    saved: int = 0
    conflicts: list[int] = field(default_factory=list)

    def left_of(self, bitmaps: Mapping[int, bytes]) -> dict[int, bytes]:
        """The bitmaps of a move without these blocks."""
        left = {
            segment: to_bitmap(without(blocks_in(bitmap), self.blocks.get(segment, NO_BLOCKS)))
            for segment, bitmap in bitmaps.items()
        }
        return {segment: bitmap for segment, bitmap in left.items() if any(bitmap)}


def find_common(move: Move, size: int, members: Sequence[Member]) -> Common | None:
    """What of the source is worth a layer over the target, if these are moved; None: nothing.

    A block is, if at least two of them would take it over, and more than own it: who owns it may have it as the target
    has, and cannot give it back where the layer hides that. ``size``: of the source; a last block that is a part of one
    is left out, for nobody knows the rest.
    """
    assert len(members) <= MOST_MEMBERS
    found = Common(conflicts=[0] * len(members))
    for segment in sorted(move.bitmaps):
        differing = blocks_in(move.bitmaps[segment])
        lack = own = 0
        for number, member in enumerate(members):
            owned = both(member.owned(segment), differing)
            found.conflicts[number] += owned.count(1) * BLOCK_SIZE
            own += int.from_bytes(owned, "little")
            lack += int.from_bytes(lacking(differing, owned, member.header, segment), "little")
        wanted = lack.to_bytes(BLOCKS_PER_SEGMENT, "little")
        whole = min(max(size // BLOCK_SIZE - segment * BLOCKS_PER_SEGMENT, 0), BLOCKS_PER_SEGMENT)
        counts = zip(wanted, own.to_bytes(BLOCKS_PER_SEGMENT, "little"), strict=True)
        blocks = bytes(many > 1 and many > few for many, few in counts)[:whole] + NO_BLOCKS[whole:]
        if count := blocks.count(1):
            found.blocks[segment] = blocks
            found.size += count * BLOCK_SIZE
            found.saved += (sum(compress(wanted, blocks)) - count) * BLOCK_SIZE
    return found if found.saved >= WORTH else None
