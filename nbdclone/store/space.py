"""What a pool takes on the disk, whose it is, and what would come free.

``own`` is what the files of one of them take, as the file system counts it; ``shared`` what it reads from beneath it,
which a copy would have to hold once more. For that the maps are put together from the bottom upwards, a bit for each
block that is data: holes are nobody's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from nbdclone.errors import NBDCloneError, NotFound
from nbdclone.store.catalog import BaseInfo, Catalog, CloneInfo
from nbdclone.store.delta_file import METADATA_SIZE, NO_PARENT, Header
from nbdclone.store.delta_map import DeltaMap, segments_with_data
from nbdclone.store.fs import FileSystem, data_and_holes
from nbdclone.store.layer import BLOCK_SIZE, BLOCKS_PER_SEGMENT, SEGMENT_SIZE, block_count
from nbdclone.store.names import split_name
from nbdclone.store.places import SNAPSHOTS, Places

# Of each segment where there are any: a bit for each block, the first the most significant, as in a map.
Bits = dict[int, int]


@dataclass(frozen=True, slots=True)
class Usage:
    """One of them; ``kind``: base, snapshot, layer (a snapshot whose name was removed) or clone. Sizes in bytes.

    ``size``: of the disk. ``own``: of its files on the disk. ``shared``: what it reads from beneath. ``freed``: what
    comes free if it alone is removed, at least; None: others need it.
    """

    kind: str
    name: str
    id: str
    size: int
    own: int
    shared: int
    freed: int | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Account:
    """``total``: all entries, and the ``rest``, which is the pool's own. ``copies``: what all of them would take if
    each was a sparse image of its own.
    """

    entries: tuple[Usage, ...]
    rest: int
    total: int
    copies: int


# What needs which layer


def layer_needs(
    places: Places,
    instead: Mapping[str, Header] | None = None,
    *,
    clones: Iterable[str] | None = None,
    strict: bool = False,
) -> dict[bytes, set[str]]:
    """By the id of each layer that is needed: the clones and snapshots that need it.

    ``instead``: headers that these clones would have. ``clones``: these alone are asked, with their snapshots. A clone
    needs what is beneath it, and what it can be reset to; a snapshot its layer, and what is beneath that. Raises
    StorageError; ``strict``: also where the record of a snapshot cannot be read, which may name any of them.
    """
    needed: dict[bytes, set[str]] = {}
    parents: dict[bytes, bytes | None] = {}  # None: it is no layer

    def parent_of(layer_id: bytes) -> bytes | None:
        if layer_id not in parents:
            parents[layer_id] = None
            with contextlib.suppress(NotFound):
                parents[layer_id] = places.header(places.layer(layer_id)).parent_id
        return parents[layer_id]

    for clone in places.names_in(places.clones) if clones is None else clones:
        try:
            own = places.header(places.delta(clone))
        except NotFound:
            continue
        header = (instead or {}).get(clone, own)
        tops = [(clone, header.parent_id), (clone, header.origin)]
        found = places.snapshots(clone, own.id, strict=strict)
        tops += [(f"{clone}@{name}", snapshot.layer) for name, snapshot in found.items()]
        for name, layer_id in tops:
            while name not in needed.get(layer_id, ()) and (parent := parent_of(layer_id)) is not None:
                needed.setdefault(layer_id, set()).add(name)
                layer_id = parent
    return needed


def known_needs(places: Places) -> dict[bytes, set[str]]:
    """The same; nothing if a clone cannot be read, for then no layer is removed: it may need any of them."""
    try:
        return layer_needs(places)
    except NBDCloneError:
        return {}


def only_needed_by(needs: Mapping[bytes, Collection[str]], names: Collection[str]) -> list[bytes]:
    """The layers that nobody needs if these go; a clone's snapshots go with it."""
    return [
        layer_id
        for layer_id, needing in needs.items()
        if all(name in names or split_name(name)[0] in names for name in needing)
    ]


def freed_by(places: Places, names: Sequence[str], needs: Mapping[bytes, Collection[str]]) -> int:
    """How many bytes come free if these are removed, with the layers that nobody needs then: at least.

    What shares its extents with other files (XFS, btrfs) counts as none.
    """
    layers = [places.layer(layer_id).parent for layer_id in only_needed_by(needs, names)]
    own = [
        places.place(clone) if snapshot is None else places.clones / clone / SNAPSHOTS / snapshot
        for clone, snapshot in map(split_name, names)
        if snapshot is None or clone not in names
    ]
    return sum(freed_in(places.fs, directory) for directory in (*own, *layers))


def disk_usage(path: Path, without: Collection[Path] = ()) -> int:
    """What a file, or a directory and all in it, takes on the disk; what has two names counts once, what goes, not."""
    total, seen = 0, set()
    waiting = [path]
    while waiting:
        path = waiting.pop()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            status = path.lstat()
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                total += status.st_blocks * 512
            if path.is_dir() and not path.is_symlink():
                waiting += [child for child in path.iterdir() if child not in without]
    return total


def freed_in(fs: FileSystem, place: Path) -> int:
    """What comes free, at least, if this file, or this directory, is removed."""
    shared = 0
    inside = [Path(directory, name) for directory, _, names in os.walk(place) for name in names]
    for path in (place, *inside):
        with contextlib.suppress(OSError, NBDCloneError):
            if path.is_file():
                with opened(fs, path) as fd:
                    shared += fs.shared_bytes(fd)
    return max(disk_usage(place) - shared, 0)


@contextlib.contextmanager
def opened(fs: FileSystem, path: Path) -> Iterator[int]:
    """A file to be read. Raises StorageError, OSError."""
    fd = fs.open_file(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        fs.close(fd)


# What the maps say


def marked_bits(fs: FileSystem, fd: int, path: Path, header: Header) -> Bits:
    """The blocks that a delta says are its own. Raises CorruptDelta, OSError."""
    pages = DeltaMap(path, fd, header.id, fs)
    found: Bits = {}
    for segment in segments_with_data(fs, fd, header.size):
        bits = int.from_bytes(pages.read(segment, nowait=False).bitmap, "big") & first_bits(header.size, segment)
        if bits:
            found[segment] = bits
    return found


def first_bits(size: int, segment: int) -> int:
    """The blocks of a segment that are within the first ``size`` bytes of a disk."""
    count = min(max(block_count(size) - segment * BLOCKS_PER_SEGMENT, 0), BLOCKS_PER_SEGMENT)
    return _run(0, count)


def _run(first: int, count: int) -> int:
    return ((1 << count) - 1) << (BLOCKS_PER_SEGMENT - first - count)


def _data_bits(fs: FileSystem, fd: int, size: int, stride: int, segments: Iterable[int]) -> Bits:
    """The blocks that are not holes in the file."""
    found: Bits = {}
    for segment in segments:
        begin = segment * SEGMENT_SIZE + (segment + 1) * stride
        start, stop, bits = begin, begin + min(SEGMENT_SIZE, size - segment * SEGMENT_SIZE), 0
        for hole, end in data_and_holes(fs, fd, start, stop, BLOCK_SIZE):
            if not hole:
                bits |= _run((start - begin) // BLOCK_SIZE, block_count(end - start))
            start = end
        if bits:
            found[segment] = bits
    return found


@dataclass(slots=True)
class _Node:
    """A base or layer, as those above it see it: ``bits`` of the segments where it has any of its own."""

    bits: Bits
    parent: _Node | None = None
    overlap: int | None = None
    total: int = 0
    segments: set[int] = field(default_factory=set)

    def visible(self, segment: int) -> int:
        """The blocks that are data, in it or beneath it."""
        node, mask = self, -1
        while segment not in node.bits:
            if node.overlap is not None:
                mask &= first_bits(node.overlap, segment)
            if node.parent is None:
                return 0
            node = node.parent
        return node.bits[segment] & mask


def _seen_beneath(parent: _Node | None, overlap: int | None, marked: Bits) -> int:
    """How many blocks are read from the parent by what stands on it, and has these of its own."""
    if parent is None:
        return 0
    if overlap is None:
        return parent.total - sum((parent.visible(segment) & bits).bit_count() for segment, bits in marked.items())
    return sum(
        (parent.visible(segment) & first_bits(overlap, segment) & ~marked.get(segment, 0)).bit_count()
        for segment in parent.segments
    )


class _Accounts:
    """Looks at one file after the other, what is beneath before what is above."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._fs = places.fs
        self._catalog = Catalog(places)
        self.infos = self._catalog.entries()
        self._needs = known_needs(places)
        self._nodes: dict[bytes, _Node] = {}
        self._shared: dict[bytes, int] = {}  # in blocks, of each layer

    def run(self, names: Sequence[str]) -> Generator[tuple[int, int], None, list[Usage]]:
        layers = [layer_id for layer_id in self._places.layer_ids() if not names or self._is_named(layer_id, names)]
        infos = [
            info for info in self.infos if info.kind != "snapshot" and (not names or info.name in names)
        ]  # snapshots are layers
        found: list[Usage] = []
        looks: list[tuple[Path, Callable[[], Usage]]] = [
            (self._places.bases / info.name, partial(self._base, info))
            if isinstance(info, BaseInfo)
            else (self._places.clones / info.name, partial(self._clone, info))
            for info in infos
        ]
        looks += [(self._places.layer(layer_id).parent, partial(self._layer, layer_id)) for layer_id in layers]
        for number, (place, look) in enumerate(looks, start=1):
            try:
                usage = look()
                if usage.error and not place.is_dir():
                    raise NotFound(f"{place} is missing")
                found.append(usage)
            except NotFound:  # it was removed, renamed or merged just now
                if names:
                    raise
            yield number, len(looks)
        order = ["base", "clone", "snapshot", "layer"]
        return sorted(found, key=lambda usage: (order.index(usage.kind), usage.name))

    def _is_named(self, layer_id: bytes, names: Sequence[str]) -> bool:
        return self._catalog.named.get(layer_id) in names or layer_id.hex() in names

    def _base(self, info: BaseInfo) -> Usage:
        directory = self._places.bases / info.name
        freed = None if info.clones else freed_in(self._fs, directory)
        return Usage("base", info.name, info.id, info.size, disk_usage(directory), 0, freed, info.error)

    def _clone(self, info: object) -> Usage:
        assert isinstance(info, CloneInfo)
        directory = self._places.clones / info.name
        layers = [snapshot.layer for snapshot in self._places.snapshots(info.name).values()]
        others = any(split_name(name)[0] != info.name for layer in layers for name in self._needs.get(layer, ()))
        freed = None if others else freed_by(self._places, [info.name], self._needs)
        shared, error = 0, info.error
        if error is None:
            try:
                header, marked = self._marked(self._places.delta(info.name))
                shared = _seen_beneath(self._node(header.parent_id), header.overlap, marked)
            except (NBDCloneError, OSError) as problem:
                error = str(problem)
        return Usage("clone", info.name, info.id, info.size, disk_usage(directory), shared * BLOCK_SIZE, freed, error)

    def _layer(self, layer_id: bytes) -> Usage:
        path = self._places.layer(layer_id)
        name = self._catalog.named.get(layer_id)
        freed = freed_by(self._places, [name], self._needs) if name is not None else None
        size, error = 0, None
        try:
            size = self._places.header(path).size
            self._node(layer_id)
        except (NBDCloneError, OSError) as problem:
            error = str(problem)
        shared = self._shared.get(layer_id, 0) * BLOCK_SIZE
        kind, shown = ("layer", layer_id.hex()) if name is None else ("snapshot", name)
        return Usage(kind, shown, layer_id.hex(), size, disk_usage(path.parent), shared, freed, error)

    def _marked(self, path: Path) -> tuple[Header, Bits]:
        with self._places.reading(path) as (fd, header):
            return header, marked_bits(self._fs, fd, path, header)

    def _node(self, node_id: bytes) -> _Node | None:
        """A base or layer, with all that is beneath it."""
        waiting: list[bytes] = []
        while node_id not in self._nodes and self._places.layer(node_id).exists() and node_id not in waiting:
            waiting.append(node_id)
            node_id = self._places.header(self._places.layer(node_id)).parent_id
        below = self._nodes.get(node_id)
        if below is None and node_id != NO_PARENT:
            below = self._base_node(node_id)
        for layer_id in reversed(waiting):
            below = self._nodes[layer_id] = self._layer_node(layer_id, below)
        return below

    def _base_node(self, base_id: bytes) -> _Node | None:
        for info in self.infos:
            if isinstance(info, BaseInfo) and info.id == base_id.hex():
                fd = self._open_base(base_id, info.name)
                try:
                    bits = _data_bits(self._fs, fd, info.size, 0, range(-(-info.size // SEGMENT_SIZE)))
                finally:
                    self._fs.close(fd)
                node = _Node(bits, segments=set(bits), total=sum(map(int.bit_count, bits.values())))
                self._nodes[base_id] = node
                return node
        return None

    def _open_base(self, base_id: bytes, once: str) -> int:
        """Its image, which may be renamed meanwhile. Raises NotFound, OSError."""
        while (name := self._places.find_base(base_id, once)) is not None:
            directory = self._places.bases / name
            try:
                return self._fs.open_file(directory / "image", os.O_RDONLY)
            except FileNotFoundError:
                if directory.is_dir():
                    raise
        raise NotFound(f"base '{once}' was removed just now")

    def _layer_node(self, layer_id: bytes, below: _Node | None) -> _Node:
        path = self._places.layer(layer_id)
        header, marked = self._marked(path)
        with opened(self._fs, path) as fd:
            data = _data_bits(self._fs, fd, header.size, METADATA_SIZE, marked)
        node = _Node({}, below, header.overlap, segments=set(marked) | (below.segments if below else set()))
        beneath = {segment: node.visible(segment) for segment in marked}
        self._shared[layer_id] = shared = _seen_beneath(below, header.overlap, marked)
        own = {segment: data.get(segment, 0) & bits for segment, bits in marked.items()}
        node.bits = {segment: own[segment] | (beneath[segment] & ~bits) for segment, bits in marked.items()}
        node.total = shared + sum(map(int.bit_count, own.values()))
        return node


def account(places: Places, names: Sequence[str] = ()) -> Generator[tuple[int, int], None, Account]:
    """What everything in the pool takes, or these alone; yields (done, in all) after each.

    A clone that is being written is counted as of its last flush. Raises NotFound, StorageError.
    """
    accounts = _Accounts(places)
    known = {info.name for info in accounts.infos} | {layer_id.hex() for layer_id in places.layer_ids()}
    for name in names:
        if name not in known:
            raise NotFound(f"there is no base, clone, snapshot or layer {name[:200]!r} in {places.path}")
    entries = yield from accounts.run(names)
    rest = 0
    if not names:
        listed = {
            directory / name
            for directory in (places.bases, places.clones, places.layers)
            if directory.is_dir()
            for name in os.listdir(directory)
        }
        listed &= {
            *(places.bases / usage.name for usage in entries if usage.kind == "base"),
            *(places.clones / usage.name for usage in entries if usage.kind == "clone"),
            *(places.layers / usage.id for usage in entries if usage.kind in ("snapshot", "layer")),
        }
        rest = disk_usage(places.path, without=listed)
    copies = sum(usage.own + usage.shared for usage in entries if usage.kind != "layer")
    return Account(tuple(entries), rest, rest + sum(usage.own for usage in entries), copies)
