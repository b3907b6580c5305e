"""In which blocks two bases differ.

Found once for all clones that go from one to the other. Where both manifests can be believed, only the chunks whose
hashes differ are read; else all that holds data in either. What is known is a bitmap of 4064 bytes for each segment
that has a block in which they differ: 32 MiB at most for a base of 1 TiB.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Generator, Iterable, Iterator, Mapping

from nbdclone.errors import StorageError
from nbdclone.store.image import CHUNK_SIZE, Image, chunk_count, data_ranges, fingerprint_of, read_manifest
from nbdclone.store.layer import (
    BITMAP_SIZE,
    BLOCK_SHIFT,
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    NOWHERE,
    SEGMENT_SIZE,
    Layer,
    block_count,
    paint_bitmap,
    uniform,
)

# Of a chunk that differs, pieces of this size are compared before their blocks are.
PIECE_SIZE = 64 << 10
# The blocks of a segment, a byte for each: 1 where it is among them. As the owners in a chain's map.
NO_BLOCKS = uniform(NOWHERE)
ALL_BLOCKS = uniform(1)
_SET = re.compile(rb"\x01+")
_AS_DIGITS = bytes.maketrans(b"\0\1", b"01")

Bitmaps = Mapping[int, bytes]


def blocks_in(bitmap: bytes | None) -> bytes:
    """A byte for each block of the segment: 1 where its bit is set."""
    return NO_BLOCKS if bitmap is None else paint_bitmap(NO_BLOCKS, bitmap, 1)


def to_bitmap(blocks: bytes) -> bytes:
    """The other way."""
    return int(blocks.translate(_AS_DIGITS), 2).to_bytes(BITMAP_SIZE, "big")


def owned_by(layers: Iterable[Layer], segment: int) -> bytes:
    """Which blocks of the segment any of the layers holds itself. Waits for the disk."""
    owned = NO_BLOCKS
    for layer in layers:
        owned = either(owned, layer.paint(segment, NO_BLOCKS, 1, nowait=False))
    return owned


def either(one: bytes, other: bytes) -> bytes:
    """The blocks that are in one or the other."""
    return _combined(int.from_bytes(one, "little") | int.from_bytes(other, "little"))


def both(one: bytes, other: bytes) -> bytes:
    """The blocks that are in both."""
    return _combined(int.from_bytes(one, "little") & int.from_bytes(other, "little"))


def without(one: bytes, other: bytes) -> bytes:
    """The blocks of one that are not in the other."""
    return _combined(int.from_bytes(one, "little") & ~int.from_bytes(other, "little"))


def _combined(number: int) -> bytes:
    return number.to_bytes(BLOCKS_PER_SEGMENT, "little")


def runs_of(blocks: bytes, segment: int) -> Iterator[tuple[int, int]]:
    """The (offset, length) on the disk of each run of blocks, in order."""
    start = segment * SEGMENT_SIZE
    for run in _SET.finditer(blocks):
        yield start + (run.start() << BLOCK_SHIFT), (run.end() - run.start()) << BLOCK_SHIFT


def compare_bases(old: Image, new: Image) -> Generator[tuple[int, int], None, dict[int, bytes]]:
    """Find the blocks of ``old`` that ``new`` has not alike: a bitmap for each segment that has some.

    Behind the end of a base there are zeros. Yields (done, total) bytes after each chunk. Raises OSError.
    """
    chunks = _differing_chunks(old, new)
    found: dict[int, bytearray] = {}
    end = block_count(old.size) * BLOCK_SIZE
    buffers = bytearray(CHUNK_SIZE), bytearray(CHUNK_SIZE)
    for number, chunk in enumerate(chunks, start=1):
        offset = chunk * CHUNK_SIZE
        for base, buffer in zip((old, new), buffers, strict=True):
            wanted = min(max(min(base.size, end) - offset, 0), CHUNK_SIZE)
            count = base.fs.pread_all(base.fd, [buffer], offset, wanted) if wanted else 0
            buffer[count:] = bytes(CHUNK_SIZE - count)
        if buffers[0] != buffers[1]:
            for block in _differing_blocks(*buffers):
                segment, within = divmod((offset >> BLOCK_SHIFT) + block, BLOCKS_PER_SEGMENT)
                bitmap = found.setdefault(segment, bytearray(BITMAP_SIZE))
                bitmap[within >> 3] |= 0x80 >> (within & 7)
        yield number * CHUNK_SIZE, len(chunks) * CHUNK_SIZE
    return {segment: bytes(bitmap) for segment, bitmap in found.items()}


def _differing_blocks(one: bytearray, other: bytearray) -> Iterator[int]:
    for start in range(0, CHUNK_SIZE, PIECE_SIZE):
        if one[start : start + PIECE_SIZE] != other[start : start + PIECE_SIZE]:
            for at in range(start, start + PIECE_SIZE, BLOCK_SIZE):
                if one[at : at + BLOCK_SIZE] != other[at : at + BLOCK_SIZE]:
                    yield at >> BLOCK_SHIFT


def _differing_chunks(old: Image, new: Image) -> list[int]:
    """The chunks of the old one that may differ."""
    with contextlib.suppress(OSError, StorageError):
        if _has_manifest(old) and _has_manifest(new):
            # A last chunk that is longer in one of them has another hash there, and is read.
            hashes = zip(_manifest(old), _manifest(new), strict=False)
            found = [chunk for chunk, (one, other) in enumerate(hashes) if one != other]
            return [*found, *range(chunk_count(new.size), chunk_count(old.size))]
    return sorted({*_chunks_with_data(old), *_chunks_with_data(new)} & {*range(chunk_count(old.size))})


def _manifest(base: Image) -> Iterator[bytes]:
    return read_manifest(base.directory / "manifest", base.size)


def _has_manifest(base: Image) -> bool:
    """Is there one, and is it that of the content which the base was found to have?"""
    return fingerprint_of(base.size, _manifest(base)) == base.record.fingerprint


def _chunks_with_data(base: Image) -> Iterator[int]:
    for start, end in data_ranges(base.fd, base.size):
        yield from range(start // CHUNK_SIZE, -(-end // CHUNK_SIZE))
