"""In which blocks two bases differ.

Found once for all clones that go from one to the other. Where both manifests can be believed, only the chunks whose
hashes differ are read; else all that holds data in either. What is known is a bitmap of 4064 bytes for each segment
that has a block in which they differ: 32 MiB at most for a base of 1 TiB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator

from nbdclone.errors import StorageError
from nbdclone.store.image import CHUNK_SIZE, Image, chunk_count, data_ranges, fingerprint_of, read_manifest
from nbdclone.store.layer import BITMAP_SIZE, BLOCK_SHIFT, BLOCK_SIZE, BLOCKS_PER_SEGMENT, block_count, set_bits

# Of a chunk that differs, pieces of this size are compared before their blocks are.
PIECE_SIZE = 64 << 10


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
        for at in differing_blocks(*buffers):
            segment, within = divmod((offset + at) >> BLOCK_SHIFT, BLOCKS_PER_SEGMENT)
            set_bits(found.setdefault(segment, bytearray(BITMAP_SIZE)), within, within)
        yield number * CHUNK_SIZE, len(chunks) * CHUNK_SIZE
    return {segment: bytes(bitmap) for segment, bitmap in found.items()}


def differing_blocks(one: bytes | bytearray, other: bytes | bytearray) -> Iterator[int]:
    """Where the blocks begin in which two pieces of the same length differ; the last block may be partial."""
    if one == other:
        return
    for start in range(0, len(one), PIECE_SIZE):
        if one[start : start + PIECE_SIZE] != other[start : start + PIECE_SIZE]:
            for at in range(start, min(start + PIECE_SIZE, len(one)), BLOCK_SIZE):
                if one[at : at + BLOCK_SIZE] != other[at : at + BLOCK_SIZE]:
                    yield at


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
