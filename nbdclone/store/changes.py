"""In what two disks of one pool differ, told from the maps of the layers that they do not share.

Its cost is that of reading those maps, one page for each 127 MiB of the disk and layer: neither the content nor the
layers that both stand on are looked at. So a block that was written with what it held before is told as changed;
``content`` compares, and reads what the maps tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from nbdclone.errors import UsageError
from nbdclone.store.block_sets import ALL_BLOCKS, NO_BLOCKS, either, owned_by, runs_of
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.difference import differing_blocks
from nbdclone.store.image import Image
from nbdclone.store.layer import BLOCK_SHIFT, BLOCK_SIZE, BLOCKS_PER_SEGMENT, SEGMENT_SIZE, Layer, block_count
from nbdclone.store.sealed import Sealed

# How much of both is read at once to be compared.
COMPARED_AT_ONCE = 1 << 20


class Change(NamedTuple):
    """A stretch of a disk that is not as on another; ``zero``: it takes no space now, and reads as zeros."""

    offset: int
    length: int
    zero: bool


def identity_of(layer: Layer) -> bytes:
    """The id of a base, a layer or a clone's delta."""
    if isinstance(layer, Image):
        return layer.record.id
    assert isinstance(layer, Sealed | Delta)
    return layer.header.id


def owned_ranges(layer: Layer) -> Iterator[tuple[int, int]]:
    """The (offset, length) of what the layer holds itself, in order; neighbours are one. Waits for the disk."""
    return _ranges_in([layer], [], layer.size)


def changed_ranges(a: Sequence[Layer], b: Sequence[Layer]) -> Iterator[tuple[int, int]]:
    """The (offset, length), in order, of where a disk with layers ``b`` may differ from one with layers ``a``.

    Within ``b``; all of it that is behind the end of ``a`` is told. Raises UsageError if they share no layer.
    """
    return _ranges_in(*_unshared(a, b), b[-1].size)


def _unshared(a: Sequence[Layer], b: Sequence[Layer]) -> tuple[list[Layer], list[tuple[int, int]]]:
    """The layers that only one has, and the ranges (start, end) in which they differ besides. Raises UsageError."""
    shared = 0
    for one, other in zip(a, b, strict=False):
        if identity_of(one) != identity_of(other):
            break
        shared += 1
    if not shared:
        raise UsageError("they have no layer in common, so that their maps cannot tell in what they differ")
    size = b[-1].size
    cut = [found for chain in (a, b) for found in cut_off(chain, shared)]
    if a[-1].size < size:
        cut.append((a[-1].size, size))
    return [*a[shared:], *b[shared:]], cut


def changed_segments(size: int) -> range:
    """The segments of a disk of that size, to be asked for one after the other (:func:`changed_in`)."""
    return range(-(-size // SEGMENT_SIZE))


def changed_in(
    a: Sequence[Layer], b: Sequence[Layer], segment: int, *, anyhow: bool = False
) -> Iterator[tuple[int, int]]:
    """What :func:`changed_ranges` tells of one segment; ``anyhow``: all of it, if they share no layer.

    Reads a page of each layer that they do not share, and nothing else.
    """
    start, size = segment * SEGMENT_SIZE, b[-1].size
    if anyhow and identity_of(a[0]) != identity_of(b[0]):
        yield start, min(SEGMENT_SIZE, size - start)
        return
    layers, further = _unshared(a, b)
    blocks = _blocks_in(layers, further, segment)
    for begin, length in runs_of(blocks, segment) if blocks is not NO_BLOCKS else ():
        if begin < size:
            yield begin, min(length, size - begin)


def cut_off(chain: Sequence[Layer], first: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of what lies beneath the layers from ``first`` on, and is not seen through them."""
    for beneath, layer in zip(chain[first - 1 :], chain[first:], strict=False):
        if isinstance(layer, Sealed | Delta) and layer.header.overlap is not None:
            yield layer.header.overlap, beneath.size


def _ranges_in(layers: Sequence[Layer], further: Sequence[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """What any of the layers holds, and what is in one of the ranges (start, end) too; up to ``size``."""
    begin = end = 0
    for segment in range(-(-size // SEGMENT_SIZE)):
        blocks = _blocks_in(layers, further, segment)
        for start, length in runs_of(blocks, segment) if blocks is not NO_BLOCKS else ():
            stop = min(start + length, size)
            if start >= stop:
                break
            if start != end:
                if end > begin:
                    yield begin, end - begin
                begin = start
            end = stop
    if end > begin:
        yield begin, end - begin


def _blocks_in(layers: Sequence[Layer], further: Sequence[tuple[int, int]], segment: int) -> bytes:
    """The same within a segment."""
    blocks = owned_by(layers, segment)
    for start, stop in further:
        first = min(max((start >> BLOCK_SHIFT) - segment * BLOCKS_PER_SEGMENT, 0), BLOCKS_PER_SEGMENT)
        last = min(max(block_count(stop) - segment * BLOCKS_PER_SEGMENT, 0), BLOCKS_PER_SEGMENT)
        if first < last:
            blocks = either(blocks, NO_BLOCKS[:first] + ALL_BLOCKS[first:last] + NO_BLOCKS[last:])
    return blocks


def changed_extents(a: Clone, b: Clone, *, content: bool = False) -> Iterator[Change]:
    """Where ``b`` differs from ``a``, in order, neighbours that are alike as one.

    With ``content``, what reads the same on both is left out; and if they have no layer in common, all of both is
    compared. Raises UsageError, OSError.
    """
    return joined(kinds_of(b, _differing(a, b) if content else changed_ranges(a.layers, b.layers)))


def joined(changes: Iterable[Change]) -> Iterator[Change]:
    """The same, with neighbours that are alike as one."""
    last: Change | None = None
    for change in changes:
        if last is not None and last.zero == change.zero and last.offset + last.length == change.offset:
            last = last._replace(length=last.length + change.length)
            continue
        if last is not None:
            yield last
        last = change
    if last is not None:
        yield last


def kinds_of(disk: Clone, ranges: Iterable[tuple[int, int]]) -> Iterator[Change]:
    """What the disk has in these ranges."""
    for offset, length in ranges:
        end = offset + length
        while offset < end:  # a long range is told in several answers
            for extent in disk.extents(offset, end - offset):
                yield Change(offset, extent.length, extent.hole)
                offset += extent.length


def _differing(a: Clone, b: Clone) -> Iterator[tuple[int, int]]:
    """Of the ranges that may differ, the blocks that do; and what is behind the end of ``a``."""
    alike = identity_of(a.layers[0]) == identity_of(b.layers[0])
    yield from differing_in(a, b, changed_ranges(a.layers, b.layers) if alike else [(0, b.size)])


def differing_in(a: Clone, b: Clone, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Of these ranges of ``b``, what does not read the same in ``a``."""
    for offset, length in ranges:
        end = offset + length
        for start in range(offset, end, COMPARED_AT_ONCE):
            stop = min(start + COMPARED_AT_ONCE, end)
            if stop > a.size:
                yield from _differing_blocks(a, b, start, max(start, a.size))
                yield max(start, a.size), stop - max(start, a.size)
            else:
                yield from _differing_blocks(a, b, start, stop)


def _differing_blocks(a: Clone, b: Clone, start: int, stop: int) -> Iterator[tuple[int, int]]:
    if start == stop:
        return
    for at in differing_blocks(a.pread(stop - start, start), b.pread(stop - start, start)):
        yield start + at, min(BLOCK_SIZE, stop - start - at)
