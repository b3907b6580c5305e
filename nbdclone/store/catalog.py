"""What is in a pool: every base, clone and snapshot, with what can be known of it without opening it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nbdclone.errors import NBDCloneError, NotFound
from nbdclone.store.delta_file import NO_PARENT, Header, read_header
from nbdclone.store.image import BaseRecord, Identity
from nbdclone.store.locks import describe_process, holders
from nbdclone.store.names import split_name
from nbdclone.store.places import EPHEMERAL, Places, Snapshot

Locks = Mapping[tuple[int, int], int]

# What is wrong with an entry may be that it goes, or what it stands on, while it is looked at: then it is looked again,
# so often at the most.
LOOKS = 5


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """A base. Sizes in bytes, ``created`` in Unix seconds, ``allocated`` as the file system counts it. ``clones`` are
    all that need it, those of its clones' snapshots too.
    """

    kind: ClassVar[str] = "base"

    name: str
    id: str
    size: int
    allocated: int
    created: float
    fingerprint: str
    source: str
    clones: tuple[str, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CloneInfo:
    """A clone. ``allocated`` is what its delta takes on the disk, and ``quota`` what it may; ``in_use_by`` says who has
    it open, in words. ``parent`` is the base or the snapshot beneath its delta, None if it was cut free; ``base`` is at
    the bottom. ``snapshots``: its own, oldest first. ``ephemeral``: it goes when its time is over.
    """

    kind: ClassVar[str] = "clone"

    name: str
    id: str
    size: int
    allocated: int
    created: float
    parent: str | None
    quota: int | None = None
    in_use_by: str | None = None
    error: str | None = None
    base: str | None = None
    snapshots: tuple[str, ...] = ()
    ephemeral: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot, ``clone@name``. ``allocated``: what its layer takes. ``parent`` and ``base`` as of a clone."""

    kind: ClassVar[str] = "snapshot"

    name: str
    id: str
    size: int
    allocated: int
    created: float
    parent: str | None
    base: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LayerInfo(SnapshotInfo):
    """A layer whose snapshot was removed, and that something stands on; its name is its id."""

    kind: ClassVar[str] = "layer"


Info = BaseInfo | CloneInfo | SnapshotInfo


class Catalog:
    """The content of a pool at one moment: what was asked once is remembered."""

    def __init__(self, places: Places, *, unnamed: bool = False) -> None:
        """``unnamed``: layers without a name are not passed over."""
        self._unnamed = unnamed
        self._places = places
        self._fs = places.fs
        self._forget()

    def _forget(self) -> None:
        self._bases: dict[bytes, str] | None = None
        self._named: dict[bytes, str] | None = None
        self._headers: dict[bytes, Header | None] = {}  # of layers
        self._needed: set[bytes] = set()  # the layers that were found beneath something
        self._layered = bool(self._places.layer_ids())

    def names(self) -> list[str]:
        """The names of all exports, sorted."""
        places = self._places
        clones = places.names_in(places.clones)
        snapshots: list[str] = []
        if self._layered:
            snapshots = [f"{clone}@{name}" for clone in clones for name in places.snapshots(clone)]
        return sorted({*places.names_in(places.bases), *clones, *snapshots})

    def entries(self) -> list[Info]:
        """All of it, sorted by name. What is damaged is listed with its ``error``."""
        found = self._look_at_all()
        for _ in range(LOOKS - 1):
            if not (wrong := _errors_of(found)):
                break
            self._forget()
            found = self._look_at_all()
            if wrong == _errors_of(found):
                break
        return found

    def _look_at_all(self) -> list[Info]:
        places = self._places
        clones = [self._clone(name) for name in sorted(places.names_in(places.clones))]
        snapshots = [
            self._snapshot(f"{clone.name}@{name}", snapshot)
            for clone in clones
            if clone.snapshots
            for name, snapshot in places.snapshots(clone.name, bytes.fromhex(clone.id)).items()
        ]
        children: dict[str | None, list[str]] = {}
        for clone in clones:
            children.setdefault(clone.base, []).append(clone.name)
        for snapshot in snapshots:  # a clone that was cut free may have some over the base still
            names = children.setdefault(snapshot.base, [])
            if (owner := split_name(snapshot.name)[0]) not in names:
                names.append(owner)
        bases = [self._base(name, tuple(children.get(name, ()))) for name in places.names_in(places.bases)]
        found: list[Info] = [*bases, *clones, *snapshots]
        needed = set(self._needed)
        for layer_id, name in self.named.items() if self._unnamed else ():
            if name == layer_id.hex():
                layer = self._snapshot(name, Snapshot(layer_id, 0), LayerInfo)
                if layer_id in needed or not layer.error:  # else it is about to go, after its base
                    found.append(layer)
        return sorted(found, key=lambda info: info.name)

    def info(self, name: str) -> Info:
        """One of them. Raises NotFound. What depends on a base is known when all clones were looked at."""
        found = self._info(name)
        for _ in range(LOOKS - 1):
            if not found.error:
                break
            self._forget()
            before, found = found, self._info(name)
            if found == before:
                break
        return found

    def _info(self, name: str) -> Info:
        if split_name(name)[1] is not None:
            return self._snapshot(name, self._places.snapshot(name))
        if self._places.place(name).parent == self._places.clones:
            return self._clone(name)
        for entry in self.entries():
            if entry.name == name:
                return entry
        raise NotFound(f"'{name}' was removed just now")

    def dependants(self, base: str) -> list[str]:
        """The clones that need a base."""
        return [entry.name for entry in self.entries() if isinstance(entry, CloneInfo) and entry.base == base]

    # One of a kind

    def _base(self, name: str, clones: tuple[str, ...]) -> BaseInfo:
        place = self._places.bases / name
        try:
            record = BaseRecord.load(place / "base.json")
            status = os.stat(place / "image")
        except (NBDCloneError, OSError) as error:
            return BaseInfo(name, "", 0, 0, 0.0, "", "", clones, error=str(error))
        return BaseInfo(
            name,
            record.id.hex(),
            record.size,
            status.st_blocks * 512,
            record.created / 1e9,
            record.fingerprint.hex(),
            record.source,
            clones,
            None if Identity.of(status) == record.identity else "changed, moved or copied: verified when it is opened",
        )

    def _clone(self, name: str) -> CloneInfo:
        path = f"{self._places.clones}/{name}/delta"  # a Path takes as long as the rest, for thousands of clones
        try:
            header, status = self._look(path)
        except (NBDCloneError, OSError) as error:
            return CloneInfo(name, "", 0, 0, 0.0, "", error=str(error))
        holder = self._locks.get((status.st_dev, status.st_ino))
        parent, base, missing = self._beneath(header)
        return CloneInfo(
            name,
            header.id.hex(),
            header.size,
            status.st_blocks * 512,
            header.created / 1e9,
            parent,
            header.quota or None,
            describe_process(holder) if holder is not None else None,
            missing,
            base,
            tuple(self._places.snapshots(name, header.id)) if self._layered else (),
            os.path.exists(f"{self._places.clones}/{name}/{EPHEMERAL}"),
        )

    def _snapshot(self, name: str, snapshot: Snapshot, kind: type[SnapshotInfo] = SnapshotInfo) -> SnapshotInfo:
        layer, created = snapshot.layer.hex(), snapshot.created / 1e9
        try:
            header, status = self._look(self._places.layer(snapshot.layer))
        except (NBDCloneError, OSError) as error:
            return kind(name, layer, 0, 0, created, "", error=str(error))
        parent, base, missing = self._beneath(header)
        return kind(name, layer, header.size, status.st_blocks * 512, created, parent, base, missing)

    @functools.cached_property
    def _locks(self) -> Locks:
        """Asked for once, by who needs it: the kernel's table has the locks of the whole machine."""
        return holders()

    # What is beneath

    def _beneath(self, header: Header) -> tuple[str | None, str | None, str | None]:
        """The name of the parent, the name of the base, and what is wrong."""
        if header.parent_id == NO_PARENT:
            return None, None, None
        parent = base = self._base_of(header)
        if parent is None and self._layered:
            return self._beneath_layers(header)
        missing = None if parent else f"its base '{header.parent_name}' ({header.parent_id.hex()}) is missing"
        return parent or header.parent_name, base, missing

    def _beneath_layers(self, header: Header) -> tuple[str | None, str | None, str | None]:
        """A layer without a name is passed over: its snapshot was removed."""
        parent: str | None = None
        seen = {header.id}
        while (below := self._layer(header.parent_id)) is not None and header.parent_id not in seen:
            parent = parent or self.named.get(header.parent_id)
            seen.add(header.parent_id)
            self._needed.add(header.parent_id)
            header = below
        if header.parent_id == NO_PARENT:
            return parent, None, None
        base = self._base_of(header)
        missing = None if base else f"what is beneath it, '{header.parent_name}' ({header.parent_id.hex()}), is missing"
        return parent or base or header.parent_name, base, missing

    @property
    def named(self) -> dict[bytes, str]:
        """The name of each layer that is a snapshot."""
        if self._named is None:
            places = self._places
            self._named = {layer_id: layer_id.hex() for layer_id in places.layer_ids()} if self._unnamed else {}
            self._named |= {
                snapshot.layer: f"{clone}@{name}"
                for clone in places.names_in(places.clones)
                for name, snapshot in places.snapshots(clone).items()
            }
        return self._named

    def _layer(self, layer_id: bytes) -> Header | None:
        if layer_id not in self._headers:
            self._headers[layer_id] = None
            with contextlib.suppress(NBDCloneError, OSError):
                self._headers[layer_id] = self._look(self._places.layer(layer_id))[0]
        return self._headers[layer_id]

    def _base_of(self, header: Header) -> str | None:
        if self._bases is None:
            self._bases = {}
            for name in self._places.names_in(self._places.bases):
                with contextlib.suppress(NBDCloneError):
                    self._bases[BaseRecord.load(self._places.bases / name / "base.json").id] = name
        return self._bases.get(header.parent_id)

    def _look(self, path: str | Path) -> tuple[Header, os.stat_result]:
        fd = self._fs.open_file(path, os.O_RDONLY)
        try:
            return read_header(fd, str(path), self._fs), self._fs.fstat(fd)
        finally:
            self._fs.close(fd)


def _errors_of(entries: Sequence[Info]) -> dict[str, str]:
    return {entry.name: entry.error for entry in entries if entry.error}
