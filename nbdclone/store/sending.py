"""``send``: a snapshot, with the layers that it stands on, as a stream.

A clone may be written to and snapshots may come meanwhile: what is sent is sealed. Its layers are held open, so that
nothing of them goes; that one gains blocks by a merge makes no difference to what is read through it.
"""

from __future__ import annotations

import base64
import errno
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nbdclone.errors import NotFound, UsageError
from nbdclone.store.changes import identity_of, owned_ranges
from nbdclone.store.clone import Clone
from nbdclone.store.delta_file import NO_PARENT
from nbdclone.store.fs import FileSystem, data_and_holes
from nbdclone.store.image import Image
from nbdclone.store.layer import BLOCK_SIZE, NOWHERE, SEGMENT_SIZE, Layer
from nbdclone.store.merging import header_over
from nbdclone.store.names import split_name, validate_snapshot_name
from nbdclone.store.opening import open_disk
from nbdclone.store.places import Places
from nbdclone.store.sealed import Sealed
from nbdclone.store.stream import FRAME_DATA, Sink, StreamWriter
from nbdclone.store.stream_head import Head, SentBase, SentLayer

# Token: version, with the base?, section, offset in it, stream's id, last layer's id, parent's id; its CRC-32.
_TOKEN = struct.Struct(">BBHQ16s16s16s")
_TOKEN_VERSION = 1
_CHECKSUM = struct.Struct(">I")


@dataclass(frozen=True, slots=True)
class Token:
    """Where a stream was cut off: what a receiver has of it, for the sender to go on from there."""

    stream_id: bytes
    layer: bytes
    parent: bytes
    with_base: bool
    section: int
    offset: int

    @classmethod
    def of(cls, head: Head, section: int, offset: int) -> Token:
        return cls(head.stream_id, head.layers[-1].id, head.parent, head.with_base, section, offset)

    def __str__(self) -> str:
        place = (_TOKEN_VERSION, self.with_base, self.section, self.offset)
        packed = _TOKEN.pack(*place, self.stream_id, self.layer, self.parent)
        return base64.urlsafe_b64encode(packed + _CHECKSUM.pack(zlib.crc32(packed))).decode()

    @classmethod
    def parse(cls, text: str) -> Token:
        """Raises UsageError."""
        try:
            content = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
            packed, checksum = content[: _TOKEN.size], content[_TOKEN.size :]
            if checksum != _CHECKSUM.pack(zlib.crc32(packed)):
                raise ValueError("its checksum is wrong")
            version, with_base, section, offset, stream_id, layer, parent = _TOKEN.unpack(packed)
        except (ValueError, struct.error):
            raise UsageError("this is no token of 'nbdclone receive --token', or not all of it") from None
        if version != _TOKEN_VERSION:
            raise UsageError("the token was made by a newer nbdclone")
        return cls(stream_id, layer, parent, bool(with_base), section, offset)


class Sending:
    """A snapshot that is about to be sent; to be closed. ``head`` says what the stream will be of."""

    def __init__(self, places: Places, name: str, *, since: str | None = None, with_base: bool = False) -> None:
        """``name`` is ``clone@snapshot``. ``since``: another snapshot beneath it, ``clone@snapshot`` or the clone's own
        ``snapshot``: only what is above that is sent.

        Raises UsageError and its children, BaseChanged, CorruptDelta, UnsupportedFormat, OSError.
        """
        clone, _ = validate_snapshot_name(name)
        if since is not None and split_name(since)[1] is None:
            since = f"{clone}@{since}"
        if since is not None and with_base:
            raise UsageError("a base goes with all that is above it: --with-base and --from exclude one another")
        parent = places.snapshot(since).layer if since is not None else None
        self._open(places, name, parent, since or "", with_base)

    @classmethod
    def resume(cls, places: Places, token: Token) -> Sending:
        """Go on with a stream that was cut off. Raises UsageError if it cannot be told the same way any more."""
        name = _snapshot_of_layer(places, token.layer)
        sending = cls.__new__(cls)
        sending._open(places, name, token.parent, "", token.with_base)
        head = sending.head
        if head.stream_id != token.stream_id or token.section >= len(head.sections):
            sending.close()
            raise UsageError(f"the layers of '{name}' are not those that were sent before: send it from the start")
        sending.head = replace(head, section=token.section, offset=token.offset)
        return sending

    def _open(self, places: Places, name: str, parent: bytes | None, parent_name: str, with_base: bool) -> None:
        self._fs = places.fs
        self._disk = open_disk(places, name)
        try:
            self.head, self._layers = _describe(places, self._disk, parent, parent_name, with_base)
        except BaseException:
            self._disk.close()
            raise

    def run(self, sink: Sink) -> Iterator[tuple[int, int]]:
        """Write the stream. Yields (bytes done, about how many there are). Raises OSError."""
        writer = StreamWriter(sink, self.head)
        for section, layer in enumerate(self._layers):
            if section < self.head.section:
                continue
            start = self.head.offset if section == self.head.section else 0
            writer.begin(section, start)
            for offset, length, hole in _runs_of(layer, start, self._fs):
                if hole:
                    if not isinstance(layer, Image):  # an image has zeros where nothing else is said
                        writer.zeros(offset, length)
                    continue
                for at in range(offset, offset + length, FRAME_DATA):
                    writer.data(at, _read(layer, at, min(FRAME_DATA, offset + length - at), self._fs))
                    yield writer.totals.data, max(self.head.expected, writer.totals.data)
        writer.finish()
        yield writer.totals.data, writer.totals.data

    def close(self) -> None:
        """Let go of the layers."""
        self._disk.close()

    def __enter__(self) -> Sending:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _describe(
    places: Places, disk: Clone, parent: bytes | None, parent_name: str, with_base: bool
) -> tuple[Head, Sequence[Layer | _Merged]]:
    """The head of the stream, and the layers of its sections."""
    clone = split_name(disk.name)[0]
    bottom = disk.layers[0]
    image = bottom if isinstance(bottom, Image) else None
    if with_base and image is None:
        raise UsageError(f"'{disk.name}' stands on no base: it was cut free of it")
    base = None
    if image is not None:
        record = image.record
        base = SentBase(record.id, record.fingerprint, record.size, record.created, image.name)
    ids = [identity_of(layer) for layer in disk.layers]
    if parent is None or parent == NO_PARENT or (base and parent == base.id):
        first = 1 if base else 0
        parent, parent_name = (base.id, base.name) if base else (NO_PARENT, "")
    elif parent in ids[:-1]:
        first = ids.index(parent) + 1
    elif parent == ids[-1]:
        raise UsageError(f"'{disk.name}' and '{parent_name}' are the same: there is nothing to send")
    else:
        raise UsageError(f"'{parent_name or parent.hex()}' is not beneath '{disk.name}': see 'nbdclone tree'")
    sent = _as_merged(places, disk.layers[first:])
    names = {snapshot.layer: name for name, snapshot in places.snapshots(clone).items()}
    names[ids[-1]] = split_name(disk.name)[1] or ""  # of two names for it, the one that was asked for
    sections: list[Layer | _Merged] = [image, *sent] if with_base and image else [*sent]
    fds = [layer.fd for section in sections for layer in (section.parts if isinstance(section, _Merged) else [section])]
    expected = sum(places.fs.fstat(fd).st_blocks * 512 for fd in fds)
    head = Head(
        clone=clone,
        created=time.time_ns(),
        base=base,
        with_base=with_base,
        parent=parent,
        parent_name=parent_name or _name_of_layer(places, parent),
        layers=tuple(
            SentLayer(
                layer.header.id,
                layer.size,
                layer.header.overlap,
                layer.header.created,
                names.get(layer.header.id, ""),
                layer.header.parent_name,
            )
            for layer in sent
        ),
        expected=expected,
    )
    return head, sections


class _Merged:
    """Layers whose merge is under way, as the one on top will be: the others may be read only through it."""

    def __init__(self, parts: Sequence[Sealed], fs: FileSystem) -> None:
        self.parts = parts
        self.size = parts[-1].size
        self.header = parts[-1].header
        for part in reversed(parts[:-1]):
            self.header = replace(self.header, **header_over(self.header, part.header))
        self.disk = Clone("layers", parts, fs)  # not closed: the layers are those of the disk that is sent

    def runs(self, begin: int) -> Iterator[tuple[int, int, bool]]:
        """What any of them holds, as :func:`_runs_of`."""
        offset = begin
        while offset < self.size:
            stop = min(self.size, offset - offset % SEGMENT_SIZE + SEGMENT_SIZE)
            for extent in self.disk.extents(offset, stop - offset):
                if extent.origin != NOWHERE:
                    yield offset, extent.length, extent.hole
                offset += extent.length


def _as_merged(places: Places, layers: Sequence[Layer]) -> list[Sealed | _Merged]:
    """The layers, which are open; one that is merged into the next counts as a part of that."""
    found: list[Sealed | _Merged] = []
    parts: list[Sealed] = []
    for layer in layers:
        assert isinstance(layer, Sealed)
        parts.append(layer)
        if not places.is_going(layer.id):
            found.append(layer if len(parts) == 1 else _Merged(parts, places.fs))
            parts = []
    assert not parts, "a snapshot's layer is going"
    return found


def _snapshot_of_layer(places: Places, layer: bytes) -> str:
    if name := _name_of_layer(places, layer):
        return name
    raise NotFound(f"the snapshot that the token is of (layer {layer.hex()}) is not here any more")


def _name_of_layer(places: Places, layer: bytes) -> str:
    """``clone@snapshot``, or nothing if no snapshot is of that layer."""
    for clone in sorted(places.names_in(places.clones)):
        for name, snapshot in places.snapshots(clone).items():
            if snapshot.layer == layer:
                return f"{clone}@{name}"
    return ""


def _runs_of(layer: Layer | _Merged, begin: int, fs: FileSystem) -> Iterator[tuple[int, int, bool]]:
    """The (offset, length, is it a hole?) of all that the layer holds from ``begin`` on, each within a segment."""
    if isinstance(layer, _Merged):
        yield from layer.runs(begin)
        return
    for offset, length in owned_ranges(layer):
        offset, stop = max(offset, begin), offset + length
        while offset < stop:
            end = min(stop, offset - offset % SEGMENT_SIZE + SEGMENT_SIZE)
            shift = (offset // SEGMENT_SIZE + 1) * layer.stride
            # Up to whole blocks: the end of a disk may be within one.
            for hole, edge in data_and_holes(fs, layer.fd, offset + shift, end + shift, BLOCK_SIZE):
                yield offset, edge - shift - offset, hole
                offset = edge - shift


def _read(layer: Layer | _Merged, offset: int, length: int, fs: FileSystem) -> memoryview:
    """Bytes of the layer's own."""
    if isinstance(layer, _Merged):
        return memoryview(layer.disk.pread(length, offset))
    buffer = memoryview(bytearray(length))
    at = 0
    while at < length:
        count = min(length - at, SEGMENT_SIZE - (offset + at) % SEGMENT_SIZE)
        place = offset + at + ((offset + at) // SEGMENT_SIZE + 1) * layer.stride
        if fs.pread_all(layer.fd, [buffer[at : at + count]], place, count) != count:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        at += count
    return buffer
