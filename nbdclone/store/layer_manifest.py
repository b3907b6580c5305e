"""The manifest of a sealed layer: a hash for each 4 MiB of the disk of what the layer has there.

Beside a layer's delta stand ``manifest``, 32 bytes for each chunk, and ``layer.json``, which says what all of it hashes
to. Taking a snapshot makes neither, for that is constant time: the first deep check does, and those after it compare.

A layer may gain blocks (in a merge): who adds them calls :func:`forget_manifest` before the first one, with the lock
``layers/ID/writer`` held, which a deep check holds while it hashes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from nbdclone.errors import NotFound, UnsupportedFormat
from nbdclone.store.delta_file import Header, place_of
from nbdclone.store.delta_map import DeltaMap, segments_with_data
from nbdclone.store.fs import FileSystem
from nbdclone.store.image import (
    CHUNK_SIZE,
    HASH_SIZE,
    UNREADABLE,
    ZERO_CHUNK,
    Progress,
    append_chunk,
    chunk_count,
    fingerprint_of,
    read_manifest,
    save,
)
from nbdclone.store.layer import BITMAP_SIZE, BLOCK_SIZE, BLOCKS_PER_SEGMENT
from nbdclone.store.places import Places
from nbdclone.store.records import hex_bytes, load_record

FORMAT = 1
MANIFEST = "manifest"
RECORD = "layer.json"
# Held by who adds blocks to a layer, and by who hashes it.
WRITER = "writer"
BLOCKS_PER_CHUNK = CHUNK_SIZE // BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What ``layer.json`` holds. ``fingerprint``: of size and manifest, as a base's. ``hashed``: when, Unix ns."""

    id: bytes
    size: int
    fingerprint: bytes
    hashed: int

    def dump(self) -> bytes:
        fields = {
            "format": FORMAT,
            "id": self.id.hex(),
            "size": self.size,
            "fingerprint": self.fingerprint.hex(),
            "hashed": self.hashed,
        }
        return json.dumps(fields).encode() + b"\n"

    @classmethod
    def load(cls, path: Path, fs: FileSystem) -> LayerRecord:
        """Raises NotFound, StorageError, UnsupportedFormat."""

        def parse(fields: dict[str, Any]) -> LayerRecord:
            if int(fields["format"]) > FORMAT:
                raise UnsupportedFormat(f"{path}: made by a newer nbdclone (format {fields['format']})")
            return cls(
                hex_bytes(16, fields["id"]),
                int(fields["size"]),
                hex_bytes(HASH_SIZE, fields["fingerprint"]),
                int(fields["hashed"]),
            )

        return load_record(path, fs, "not a layer's record", parse)


def forget_manifest(places: Places, layer_id: bytes) -> None:
    """A layer is about to gain blocks: durably without a manifest from now on, until the next deep check.

    To be called with ``layers/ID/writer`` held, before the first block is added. The record goes first: a manifest
    without it means nothing. Raises OSError.
    """
    directory = places.layer(layer_id).parent
    for name in (RECORD, MANIFEST):
        with contextlib.suppress(FileNotFoundError):
            places.fs.unlink(directory / name)
            places.fs.sync_directory(directory)


@contextlib.contextmanager
def adding_blocks(places: Places, layer_id: bytes) -> Iterator[None]:
    """Be the only one who adds blocks to a layer, which has no manifest from now on.

    Raises InUse, NotFound, OSError.
    """
    fs, path = places.fs, places.layer(layer_id).with_name(WRITER)
    try:
        fd = fs.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except FileNotFoundError:
        raise NotFound(f"layer {layer_id.hex()} is not there any more") from None
    try:
        fs.lock(fd, path, f"layer {layer_id.hex()}")
        forget_manifest(places, layer_id)
        yield
    finally:
        fs.close(fd)


def record_manifest(fs: FileSystem, directory: Path, header: Header, hashes: list[tuple[int, bytes]]) -> None:
    """Write down, durably, what a layer's chunks hash to: the manifest, and then the record that makes it count."""
    write_manifest(fs, directory, header, hashes)
    fingerprint = fingerprint_of(header.size, spread(hashes, chunk_count(header.size)))
    save(directory / RECORD, LayerRecord(header.id, header.size, fingerprint, time.time_ns()).dump(), fs)


def write_manifest(fs: FileSystem, directory: Path, header: Header, hashes: list[tuple[int, bytes]]) -> None:
    """The manifest alone, durably and in one step."""
    draft = directory / f"{MANIFEST}.{uuid.uuid4().hex}.new"
    try:
        fd = fs.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        try:
            fs.ftruncate(fd, chunk_count(header.size) * HASH_SIZE)
            for chunk, digest in hashes:
                fs.pwrite_all(fd, digest, chunk * HASH_SIZE)
            fs.sync(fd)
        finally:
            fs.close(fd)
        fs.rename(draft, directory / MANIFEST)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    fs.sync_directory(directory)


def spread(hashes: list[tuple[int, bytes]], count: int) -> Iterator[bytes]:
    """The whole manifest, with zeros for the chunks that are not told."""
    chunk = 0
    for number, digest in hashes:
        yield from itertools.repeat(ZERO_CHUNK, number - chunk)
        yield digest
        chunk = number + 1
    yield from itertools.repeat(ZERO_CHUNK, count - chunk)


def differing_chunks(path: Path, size: int, hashes: list[tuple[int, bytes]]) -> list[tuple[int, int]]:
    """The (offset, length) of what is not as the manifest file says; neighbours are one. Raises OSError."""
    found: list[tuple[int, int]] = []
    count = chunk_count(size)
    for chunk, (now, then) in enumerate(zip(spread(hashes, count), read_manifest(path, size), strict=True)):
        if now != then:
            append_chunk(found, chunk, size)
    return found


def hash_layer(
    fs: FileSystem, fd: int, path: Path, header: Header, progress: Progress | None = None
) -> list[tuple[int, bytes]]:
    """The (chunk, hash) of each chunk of which the layer has something, in order.

    The hash is BLAKE3 over the bits of the map for the chunk's 1,024 blocks (128 bytes), and then the content of those
    that are set. What cannot be read has UNREADABLE for a hash. Raises CorruptDelta (a map that is lost), OSError.
    """
    deltas = DeltaMap(path, fd, header.id, fs)
    bits: dict[int, int] = {}  # by chunk
    for segment in segments_with_data(fs, fd, header.size):
        bitmap = int.from_bytes(deltas.read(segment, nowait=False).bitmap, "big")
        _add_bits(bits, segment * BLOCKS_PER_SEGMENT, bitmap)
    found: list[tuple[int, bytes]] = []
    for chunk in sorted(bits):
        found.append((chunk, _hash_chunk(fs, fd, chunk, bits[chunk])))
        if progress:
            progress(min((chunk + 1) * CHUNK_SIZE, header.size), header.size)
    return found


def _add_bits(bits: dict[int, int], first: int, bitmap: int) -> None:
    """Add a bitmap whose first bit is block ``first`` of the disk to the bits of the chunks that it touches."""
    length = BITMAP_SIZE * 8
    block = first
    while bitmap and block < first + length:
        chunk, within = divmod(block, BLOCKS_PER_CHUNK)
        count = min(BLOCKS_PER_CHUNK - within, first + length - block)
        part = bitmap >> (length - (block - first) - count) & ((1 << count) - 1)
        if part:
            bits[chunk] = bits.get(chunk, 0) | part << (BLOCKS_PER_CHUNK - within - count)
        block += count


def _hash_chunk(fs: FileSystem, fd: int, chunk: int, bits: int) -> bytes:
    whole = blake3(bits.to_bytes(BLOCKS_PER_CHUNK // 8, "big"))
    marks = f"{bits:0{BLOCKS_PER_CHUNK}b}"
    first = 0
    while (first := marks.find("1", first)) >= 0:
        block = chunk * BLOCKS_PER_CHUNK + first
        end = marks.find("0", first)
        count = (end if end >= 0 else BLOCKS_PER_CHUNK) - first
        # A row of blocks that is one in the file, too: within one segment.
        count = min(count, BLOCKS_PER_SEGMENT - block % BLOCKS_PER_SEGMENT)
        data = bytearray(count * BLOCK_SIZE)
        try:
            fs.pread_all(fd, [data], place_of(block), len(data))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return UNREADABLE
        whole.update(data)
        first += count
    return whole.digest()
