"""Small streams for tests: written, read back, and forged so that their hashes are right again."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace

import zstandard
from blake3 import blake3

from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.stream import FRAME, HASH_SIZE, PREAMBLE, Run, StreamReader, StreamWriter
from nbdclone.store.stream_head import Head, SentBase, SentLayer

SIZE = 64 * BLOCK_SIZE
BASE = SentBase(id=b"b" * 16, fingerprint=b"f" * 32, size=SIZE, created=5, name="debian")


def layer(number: int, size: int = SIZE) -> SentLayer:
    return SentLayer(bytes([number]) * 16, size, SIZE, 7, f"snap{number}", "debian")


SAMPLE = Head("web1", 9, BASE, False, BASE.id, "debian", (layer(1), layer(2)))
# What is in it: (section, offset, bytes or a length of zeros).
CONTENT: list[tuple[int, int, bytes | int]] = [
    (0, 0, b"abcd" * 1024),
    (0, 3 * BLOCK_SIZE, 5 * BLOCK_SIZE),
    (0, 9 * BLOCK_SIZE, bytes(range(256)) * 32),
    (1, BLOCK_SIZE, b"z" * BLOCK_SIZE),
]


def written(head: Head = SAMPLE, content: list[tuple[int, int, bytes | int]] = CONTENT) -> bytes:
    """A stream of this content; sections and runs before where the head begins are left out by the caller."""
    sink = io.BytesIO()
    writer = StreamWriter(sink, head)
    for section in range(head.section, len(head.sections)):
        writer.begin(section, head.offset if section == head.section else 0)
        for where, offset, what in content:
            if where == section and isinstance(what, bytes):
                writer.data(offset, what)
            elif where == section and isinstance(what, int):
                writer.zeros(offset, what)
    writer.finish()
    assert writer.written == len(sink.getvalue())
    return sink.getvalue()


def kept(run: Run) -> tuple[int, int, bytes | int]:
    """A run as it is in a list of contents."""
    return run.section, run.offset, run.length if run.data is None else bytes(run.data)


def read_back(stream: bytes) -> tuple[Head, list[tuple[int, int, bytes | int]]]:
    reader = StreamReader(io.BytesIO(stream))
    return reader.head, [kept(run) for run in reader.runs()]


def frames_of(stream: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The frames of a whole stream: type and payload, unpacked."""
    at = PREAMBLE.size
    while at < len(stream):
        kind, stored, unpacked = FRAME.unpack_from(stream, at)
        at += FRAME.size
        payload = stream[at : at + stored]
        yield kind, payload if stored == unpacked else zstandard.decompress(payload)
        at += stored + HASH_SIZE


def forged(stream: bytes, frames: list[tuple[bytes, bytes]]) -> bytes:
    """A stream of these frames, with hashes that are right. A frame's payload is not packed."""
    result = bytearray(stream[: PREAMBLE.size])
    chain = blake3(result).digest()
    for kind, payload in frames:
        frame = FRAME.pack(kind, len(payload), len(payload)) + payload
        chain = blake3(chain + frame).digest()
        result += frame + chain
    return bytes(result)


def head_with(**changes: object) -> Head:
    return replace(SAMPLE, **changes)  # type: ignore[arg-type]
