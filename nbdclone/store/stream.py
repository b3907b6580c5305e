"""The stream of ``send`` and ``receive``: layers as a row of bytes, for a pipe, a file, another machine.

docs/stream.md is the format. In short: a preamble, and frames. A frame has a type of four letters, a payload (zstd
where that makes it smaller), and the BLAKE3 hash of all that came so far, up to its own end: so nothing can be changed,
cut out, put in or put elsewhere unnoticed, and the last frame's hash is that of the whole.

    HEAD   what it is (stream_head.py)
    PART   from here on, runs of that section: the base's image or a layer
    RUNS   runs of the disk in the order of their offsets: with their bytes, or zeros
    DONE   how much there was; a stream without it was cut off

Pure: file objects in, records out. The hashes keep away accidents, not a person who can write to the stream: whoever
can, may put in any disk content, but no more than that. Whatever it says, the reader takes the memory of a few
frames (MAX_PAYLOAD), and raises nothing but InvalidStream, UnsupportedFormat, and what reading its file raises.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import zstandard
from blake3 import blake3

from nbdclone.errors import InvalidStream, UnsupportedFormat
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.stream_head import Head

VERSION = 1
MAGIC = b"NBDSTRM\n"
# Preamble: magic, version, bit set of features that a reader must know.
PREAMBLE = struct.Struct(">8sII")
# Frame: type, bytes of its payload as it stands here, bytes of it when unpacked. Then the payload, and the hash.
FRAME = struct.Struct(">4sII")
HASH_SIZE = 32
HEAD, PART, RUNS, DONE = b"HEAD", b"PART", b"RUNS", b"DONE"
# PART: number of the section, offset in it from which on its runs follow.
PART_PAYLOAD = struct.Struct(">QQ")
# RUNS: how many; for each its offset, length and kind; then the bytes of those that have any, one after another.
RUN_COUNT = struct.Struct(">I")
RUN = struct.Struct(">QII")
BYTES, ZEROS = 1, 0
# DONE: how many runs, bytes in runs that have bytes, bytes in runs of zeros.
DONE_PAYLOAD = struct.Struct(">QQQ")

# The most that a frame's payload may be, stored or unpacked. A reader holds one frame of each: 4 MiB.
MAX_PAYLOAD = 2 << 20
# What a writer collects for a frame: more makes it hardly smaller, and what is cut off inside of one is sent again.
FRAME_DATA = 1 << 20
FRAME_RUNS = 4096
# A run of zeros costs a stream nothing, and who receives it two pages of map in 127 MiB: a long one is sent in pieces.
MAX_RUN = 128 << 20
# zstd's own default: 4 to 5 times the speed of level 9 for some percent in size.
LEVEL = 3


class Source(Protocol):
    """What a stream is read from."""

    def read(self, size: int, /) -> bytes | None: ...


class Sink(Protocol):
    """What a stream is written to: all of it, or it raises."""

    def write(self, data: bytes, /) -> object: ...


class Run(NamedTuple):
    """A run of section ``section``: ``length`` bytes at ``offset``. ``data`` is None where they are zeros."""

    section: int
    offset: int
    length: int
    data: memoryview | None


class Totals(NamedTuple):
    """How much a stream held: runs, bytes of data, bytes of zeros."""

    runs: int = 0
    data: int = 0
    zeros: int = 0

    def plus(self, length: int, zeros: bool) -> Totals:
        return Totals(self.runs + 1, self.data + (0 if zeros else length), self.zeros + (length if zeros else 0))


class StreamWriter:
    """Writes a stream of what ``head`` says. Runs are given in order: by section, by offset in it; then ``finish``.

    Writes the head at once. Raises what ``sink`` raises.
    """

    def __init__(self, sink: Sink, head: Head, level: int = LEVEL) -> None:
        self.written = 0
        """Bytes of the stream."""
        self.totals = Totals()
        self._sink = sink
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=False)
        self._runs: list[tuple[int, int, int]] = []
        self._data = bytearray()
        preamble = PREAMBLE.pack(MAGIC, VERSION, 0)
        self._chain = blake3(preamble).digest()
        self._emit(preamble)
        self._write_frame(HEAD, head.encode())

    def begin(self, section: int, offset: int = 0) -> None:
        """From here on, runs of that section, from ``offset`` on."""
        self._write_runs()
        self._write_frame(PART, PART_PAYLOAD.pack(section, offset))

    def data(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Bytes of the disk: whole blocks, but for the last of a disk."""
        view = memoryview(data)
        while view:
            piece = view[: FRAME_DATA - len(self._data)]
            self._add(offset, len(piece), BYTES)
            self._data += piece
            offset += len(piece)
            view = view[len(piece) :]
            if len(self._data) >= FRAME_DATA:
                self._write_runs()

    def zeros(self, offset: int, length: int) -> None:
        """A range that the section has, and that reads as zeros."""
        while length:
            count = min(length, MAX_RUN)
            self._add(offset, count, ZEROS)
            offset += count
            length -= count

    def flush(self) -> None:
        """Write what was collected for a frame."""
        self._write_runs()

    def finish(self) -> Totals:
        """The end. What was sent in all."""
        self._write_runs()
        self._write_frame(DONE, DONE_PAYLOAD.pack(*self.totals))
        return self.totals

    def _add(self, offset: int, length: int, kind: int) -> None:
        if self._runs and kind == BYTES:
            start, count, before = self._runs[-1]
            if before == BYTES and start + count == offset:
                self._runs[-1] = (start, count + length, kind)
                return
        if len(self._runs) == FRAME_RUNS:
            self._write_runs()
        self._runs.append((offset, length, kind))

    def _write_runs(self) -> None:
        if not self._runs:
            return
        for _, length, kind in self._runs:
            self.totals = self.totals.plus(length, zeros=kind == ZEROS)
        table = b"".join([RUN_COUNT.pack(len(self._runs)), *(RUN.pack(*run) for run in self._runs)])
        self._write_frame(RUNS, table + self._data)
        self._runs.clear()
        self._data = bytearray()

    def _write_frame(self, kind: bytes, payload: bytes) -> None:
        stored = self._compressor.compress(payload)
        if len(stored) >= len(payload):
            stored = payload
        frame = FRAME.pack(kind, len(stored), len(payload)) + stored
        self._chain = blake3(self._chain).update(frame).digest()
        self._emit(frame + self._chain)

    def _emit(self, data: bytes) -> None:
        self._sink.write(data)
        self.written += len(data)


class StreamReader:
    """Reads a stream: its ``head`` at once, then its runs. Raises InvalidStream, UnsupportedFormat; see the module."""

    def __init__(self, source: Source) -> None:
        self.read = 0
        """Bytes of the stream so far."""
        self.totals = Totals()
        self._source = source
        preamble = self._exactly(PREAMBLE.size, "its first bytes")
        magic, version, features = PREAMBLE.unpack(preamble)
        if magic != MAGIC:
            raise InvalidStream("this is no stream of 'nbdclone send'")
        if version != VERSION or features:
            raise UnsupportedFormat(
                f"the stream was made by a newer nbdclone, or is damaged in its first bytes (format {version}, "
                f"features {features:#x}; this one knows format {VERSION})"
            )
        self._chain = blake3(preamble).digest()
        kind, payload = self._frame()
        if kind != HEAD:
            raise self._nonsense("it does not begin with its head")
        self.head = Head.decode(payload)
        self._sections = self.head.sections
        self._section = self.head.section - 1  # none has begun
        self._position = 0

    def runs(self) -> Iterator[Run]:
        """The runs, in order. Each was checked with the whole frame that it is in; ``data`` is good until the next.

        Ends when the end of the stream was seen: where it raises, what came before is as it was sent.
        """
        while True:
            kind, payload = self._frame()
            if kind == PART:
                self._begin(payload)
            elif kind == RUNS:
                yield from self._runs_in(payload)
            elif kind == DONE:
                return self._finish(payload)
            else:
                raise self._nonsense(f"a frame of type {kind!r}")

    def _begin(self, payload: bytes) -> None:
        if len(payload) != PART_PAYLOAD.size:
            raise self._nonsense("the begin of a section of another length")
        section, offset = PART_PAYLOAD.unpack(payload)
        expected = self.head.offset if section == self.head.section else 0
        if section != self._section + 1 or section >= len(self._sections) or offset != expected:
            raise self._nonsense(f"section {section} from byte {offset} on, out of turn")
        self._section, self._position = section, offset

    def _runs_in(self, payload: bytes) -> Iterator[Run]:
        if self._section < self.head.section:
            raise self._nonsense("runs of no section")
        if len(payload) < RUN_COUNT.size:
            raise self._nonsense("no runs in a frame of them")
        (count,) = RUN_COUNT.unpack_from(payload)
        at = RUN_COUNT.size + count * RUN.size
        if at > len(payload):
            raise self._nonsense("more runs than there are")
        table = list(RUN.iter_unpack(memoryview(payload)[RUN_COUNT.size : at]))
        position, size, taken = self._position, self._sections[self._section], 0
        for offset, length, kind in table:
            end = offset + length
            whole = not (offset % BLOCK_SIZE or (length % BLOCK_SIZE and end != size))
            if not (position <= offset < end <= size and whole and length <= MAX_RUN and kind in (BYTES, ZEROS)):
                raise self._nonsense(f"a run of {length} bytes at {offset} of {size}, kind {kind}, after {position}")
            taken += length if kind == BYTES else 0
            position = end
        if at + taken != len(payload):
            raise self._nonsense("runs of other lengths than their bytes")
        view = memoryview(payload)
        for offset, length, kind in table:
            self._position = offset + length
            self.totals = self.totals.plus(length, zeros=kind == ZEROS)
            if kind == ZEROS:
                yield Run(self._section, offset, length, None)
            else:
                yield Run(self._section, offset, length, view[at : at + length])
                at += length

    def _finish(self, payload: bytes) -> None:
        if self._section != len(self._sections) - 1:
            raise self._nonsense("an end before its last section")
        if payload != DONE_PAYLOAD.pack(*self.totals):
            raise self._nonsense("an end with other counts than came")

    def _frame(self) -> tuple[bytes, bytes]:
        """The next frame, whole and right: its type and its payload, unpacked."""
        start = self.read
        head = self._exactly(FRAME.size, "a frame")
        kind, stored, unpacked = FRAME.unpack(head)
        if max(stored, unpacked) > MAX_PAYLOAD or stored > unpacked:
            raise self._damaged(start)
        payload = self._exactly(stored, "a frame")
        chain = blake3(self._chain).update(head).update(payload).digest()
        if self._exactly(HASH_SIZE, "a frame") != chain:
            raise self._damaged(start)
        self._chain = chain
        return kind, payload if stored == unpacked else self._unpack(payload, unpacked)

    def _unpack(self, payload: bytes, length: int) -> bytes:
        try:
            # What is allocated is what the zstd frame says: it has to be what was looked at before.
            if zstandard.frame_content_size(payload) != length:
                raise self._nonsense("a packed frame of another length")
            unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_PAYLOAD)
            unpacked = unpacker.decompress(payload, max_output_size=length, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._nonsense(f"a frame that cannot be unpacked, {error}") from None
        if len(unpacked) != length:
            raise self._nonsense("a packed frame of another length")
        return unpacked

    def _exactly(self, count: int, what: str) -> bytes:
        pieces = []
        while count:
            piece = self._source.read(count)
            if not piece:
                raise InvalidStream(f"the stream was cut off: it ends after {self.read} bytes, inside or before {what}")
            self.read += len(piece)
            count -= len(piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _damaged(self, start: int) -> InvalidStream:
        return InvalidStream(
            f"the stream was changed, or something of it is missing, in or before the frame at {start}"
        )

    def _nonsense(self, what: str) -> InvalidStream:
        """Something that no writer writes, although the hashes are right."""
        return InvalidStream(f"the stream makes no sense before byte {self.read}: {what}")
