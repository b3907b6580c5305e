"""What a stream says of itself before anything else: whose layers it holds, and what they stand on.

On the wire it is JSON; docs/stream.md has the keys. Everything in it is checked here, for it may come from anybody.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from blake3 import blake3

from nbdclone.errors import InvalidStream
from nbdclone.store.layer import BLOCK_SIZE, MAX_LAYERS, MAX_SIZE, MIN_SIZE, SECTOR_SIZE

ID_SIZE = 16
FINGERPRINT_SIZE = 32
NO_PARENT = bytes(ID_SIZE)
# "web1@golden" twice over; the header of a delta has room for as many bytes.
MAX_TEXT = 255
# Times are ns since 1970 in 8 bytes, and so are counts of bytes.
MAX_NUMBER = (1 << 63) - 1
# The base is a layer, too, and so is what the clone that is made of it writes to.
MAX_SENT_LAYERS = MAX_LAYERS - 2


@dataclass(frozen=True, slots=True)
class SentBase:
    """The base at the bottom. ``size`` in bytes, ``created`` in ns since 1970."""

    id: bytes
    fingerprint: bytes
    size: int
    created: int
    name: str


@dataclass(frozen=True, slots=True)
class SentLayer:
    """A layer: the delta that a snapshot sealed. ``overlap``: how many bytes of what lies beneath are seen through it,
    in whole blocks; None: all.

    ``snapshot`` is what the clone calls it; empty if that is another clone's snapshot.
    """

    id: bytes
    size: int
    overlap: int | None
    created: int
    snapshot: str
    parent_name: str


@dataclass(frozen=True, slots=True)
class Head:
    """What the stream is of.

    ``layers`` are those that are sent, from the oldest to that of the snapshot; ``parent`` is the id of what the first
    of them stands on: the base, a layer (the stream is incremental), or NO_PARENT. A stream ``with_base`` has the
    base's image before them: section 0. ``expected`` is about how many bytes of data there are, for a progress bar.
    It begins at ``section`` and ``offset``: not at 0 if it goes on where another was cut off.
    """

    clone: str
    created: int
    base: SentBase | None
    with_base: bool
    parent: bytes
    parent_name: str
    layers: tuple[SentLayer, ...]
    expected: int = 0
    section: int = 0
    offset: int = 0

    @property
    def incremental(self) -> bool:
        """Does it stand on a layer, rather than on a base or on nothing?"""
        return self.parent != (self.base.id if self.base else NO_PARENT)

    @property
    def sections(self) -> tuple[int, ...]:
        """The sizes of what follows, in bytes: the base's image if it is there, and the layers."""
        image = (self.base.size,) if self.base and self.with_base else ()
        return image + tuple(layer.size for layer in self.layers)

    @property
    def title(self) -> str:
        """The snapshot that it is of, for people."""
        return f"{self.clone}@{self.layers[-1].snapshot}"

    @property
    def stream_id(self) -> bytes:
        """16 bytes: alike for streams of the same layers on the same parent, wherever they begin."""
        alike = replace(self, clone="", created=0, parent_name="", expected=0, section=0, offset=0)
        if alike.base:
            alike = replace(alike, base=replace(alike.base, name="", created=0))
        alike = replace(alike, layers=tuple(replace(each, snapshot="", parent_name="") for each in alike.layers))
        return blake3(alike.encode()).digest()[:ID_SIZE]

    def encode(self) -> bytes:
        return json.dumps(asdict(self), default=bytes.hex, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def decode(cls, content: bytes) -> Head:
        """Raises InvalidStream."""
        try:
            fields = json.loads(content)
            head = cls(
                clone=_text(fields["clone"]),
                created=_number(fields["created"]),
                base=_base(fields["base"]) if fields["base"] is not None else None,
                with_base=_truth(fields["with_base"]),
                parent=_bytes(fields["parent"], ID_SIZE),
                parent_name=_text(fields["parent_name"]),
                layers=tuple(_layer(each) for each in fields["layers"]),
                expected=_number(fields["expected"]),
                section=_number(fields["section"]),
                offset=_number(fields["offset"]),
            )
            head._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:MAX_TEXT]
            raise InvalidStream(f"the head of the stream makes no sense ({type(error).__name__}: {reason})") from None
        return head

    def _check(self) -> None:
        if not 0 < len(self.layers) <= MAX_SENT_LAYERS:
            raise ValueError(f"{len(self.layers)} layers")
        ids = [layer.id for layer in self.layers] + [self.parent]
        if len(set(ids)) < len(ids) or NO_PARENT in ids[:-1] or (self.base and self.base.id in ids[:-1]):
            raise ValueError("a layer stands on itself")
        if self.parent == NO_PARENT and self.base:
            raise ValueError("a base that nothing stands on")
        if self.with_base and (not self.base or self.incremental):
            raise ValueError("a base's image, and layers that do not stand on it")
        if self.section >= len(self.sections) or self.offset > self.sections[self.section]:
            raise ValueError("it begins behind its end")


def _base(fields: dict[str, Any]) -> SentBase:
    return SentBase(
        _bytes(fields["id"], ID_SIZE, nonzero=True),
        _bytes(fields["fingerprint"], FINGERPRINT_SIZE),
        _size(fields["size"]),
        _number(fields["created"]),
        _text(fields["name"]),
    )


def _layer(fields: dict[str, Any]) -> SentLayer:
    return SentLayer(
        _bytes(fields["id"], ID_SIZE, nonzero=True),
        _size(fields["size"]),
        _overlap(fields["overlap"]),
        _number(fields["created"]),
        _text(fields["snapshot"]),
        _text(fields["parent_name"]),
    )


def _bytes(value: Any, length: int, *, nonzero: bool = False) -> bytes:
    found = bytes.fromhex(value)
    if len(found) != length or (nonzero and not any(found)):
        raise ValueError(f"{value!r:.40} is not {length} bytes")
    return found


def _number(value: Any, most: int = MAX_NUMBER) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{value!r:.40} is not a number up to {most}")
    return value


def _size(value: Any) -> int:
    size = _number(value, MAX_SIZE)
    if size < MIN_SIZE or size % SECTOR_SIZE:
        raise ValueError(f"{size} is not the size of a disk")
    return size


def _overlap(value: Any) -> int | None:
    if value is None:
        return None
    overlap = _number(value, MAX_SIZE)
    if overlap % BLOCK_SIZE:
        raise ValueError(f"{overlap} bytes are no whole blocks")
    return overlap


def _text(value: Any) -> str:
    if type(value) is not str or len(value.encode()) > MAX_TEXT or not value.isprintable():
        raise ValueError(f"{value!r:.40} is not a name")
    return value


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r:.40} is neither true nor false")
    return value
