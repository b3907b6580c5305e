"""Snapshots: a clone's delta becomes a layer, and the clone goes on with a new one.

The order of a snapshot ``web1@golden``, at each step of which the power may fail:

1. The delta is flushed; a new delta, whose parent is the old one's id, is made and durable in ``.tmp``.
2. The old delta's file gets a second name, ``layers/ID/delta``, and ``clones/web1/snapshots/golden`` says ID. Neither
   counts yet, for ID is still the id of the clone's own delta: who comes after a crash clears them away.
3. Nobody changes the clone; the delta is settled, so that its map alone says what it holds.
4. The new delta is renamed over ``clones/web1/delta``. That is the commit: ID is another's id now, and the name counts.

Going back is one step: a new delta over the layer is renamed over the clone's.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nbdclone.errors import NameTaken, NotFound, StorageError, UsageError
from nbdclone.store.catalog import Catalog
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import HEADER_SLOTS, NO_ORIGIN, NO_PARENT, PAGE_SIZE, RECORD_SLOTS, Header, as_origin
from nbdclone.store.fs import write_durably
from nbdclone.store.image import BaseRecord
from nbdclone.store.layer import MAX_LAYERS
from nbdclone.store.names import validate_name
from nbdclone.store.places import SNAPSHOTS, Places, Snapshot
from nbdclone.store.removal import collect, needed_layers
from nbdclone.store.resizing import create_over
from nbdclone.store.space import freed_in, layer_needs

# What a delta without blocks takes.
EMPTY_DELTA = PAGE_SIZE * (len(HEADER_SLOTS) + len(RECORD_SLOTS))


def origin_of(header: Header) -> bytes:
    """The id of what a clone was made from: a base's, a layer's, or NO_ORIGIN."""
    return header.origin if header.origin != NO_PARENT else as_origin(header.parent_id)


def successor(header: Header, parent_id: bytes, parent_name: str, **changes: object) -> Header:
    """The header of the delta that comes in the place of the one with ``header``, empty, over another parent."""
    return replace(
        header,
        id=uuid.uuid4().bytes,
        parent_id=parent_id,
        parent_name=parent_name,
        origin=origin_of(header),
        created=time.time_ns(),
        sequence=1,
        overlap=None,
        **changes,  # type: ignore[arg-type]
    )


def take_snapshot(
    places: Places, clone: Clone, snapshot: str | None, hold: Callable[[Callable[[], None]], None] = lambda step: step()
) -> bytes:
    """Make ``clone@snapshot`` of a clone that is open, and may be in use: changes wait for some milliseconds.

    Without a name: for the while. Such a layer is merged into what is above it, as that of a snapshot that was removed;
    who reads it goes on. Returns the layer's id.

    ``hold`` is given the one step that nobody may change the clone beside. Constant time, but for the flush of what was
    written before. Raises UsageError and its children (nothing was changed), OSError, CloneFailed.
    """
    if snapshot is not None:
        validate_name(snapshot)
    name = clone.name
    if clone.read_only:
        raise UsageError(f"'{name}' is read-only: snapshots are made of clones")
    if len(clone.layers) >= MAX_LAYERS:
        raise UsageError(f"'{name}' has {MAX_LAYERS} layers, as many as there may be: remove a snapshot first")
    clone.flush()  # most of it before anybody has to wait
    while (layer_id := _try_snapshot(places, clone, snapshot, hold)) is None:
        pass  # another snapshot, or another size or quota, came in between
    return layer_id


def _try_snapshot(
    places: Places, clone: Clone, snapshot: str | None, hold: Callable[[Callable[[], None]], None]
) -> bytes | None:
    """None, and nothing was changed, if the clone's delta is not any more what it was at the beginning."""
    name, fs = clone.name, places.fs
    own = places.clones / name
    what = f"{name}@{snapshot}" if snapshot else name
    with places.no_space_left(f"snapshot '{what}'"), places.staging() as staging:
        old = places.header(own / "delta")
        Delta.create(staging / "delta", successor(old, old.id, what), fs)
        if snapshot:
            write_durably(staging / "record", Snapshot(old.id, time.time_ns()).dump(), fs)
        fs.mkdir(staging / "layer")
        fs.link(own / "delta", staging / "layer" / "delta")
        fs.sync_directory(staging / "layer")
        new = Delta.open(staging / "delta", f"clone '{name}'", fs)
        committed = False
        try:
            with places.changing():
                _require_present(places, clone)
                if places.header(own / "delta") != old:
                    return None
                clear_cut_off(places, name, old.id)
                if snapshot in places.snapshots(name, old.id):
                    raise NameTaken(f"there is a snapshot '{name}@{snapshot}' already")
                try:
                    _place(places, staging, own, old.id, snapshot)

                    def commit() -> Delta:
                        nonlocal committed
                        fs.rename(staging / "delta", own / "delta")
                        committed = True
                        new.moved(own / "delta")
                        new.guard(lambda: fs.sync_directory(own))
                        return new

                    clone.delta.settle_all()  # once more, so that little is left to do while others wait
                    hold(lambda: clone.stack(commit, places.layer(old.id)))
                finally:
                    if not committed:
                        with contextlib.suppress(OSError, StorageError):
                            clear_cut_off(places, name, old.id)
        finally:
            if not committed:
                new.close()
    return old.id


def _place(places: Places, staging: Path, own: Path, layer_id: bytes, snapshot: str | None) -> None:
    """Give the layer and the snapshot their names, durably. They do not count yet."""
    fs = places.fs
    if not places.layers.is_dir():
        fs.mkdir(places.layers)
        fs.sync_directory(places.path)
    fs.rename(staging / "layer", places.layer(layer_id).parent)
    fs.sync_directory(places.layers)
    if snapshot is None:
        return
    if not (own / SNAPSHOTS).is_dir():
        fs.mkdir(own / SNAPSHOTS)
        fs.sync_directory(own)
    fs.rename(staging / "record", own / SNAPSHOTS / snapshot)
    fs.sync_directory(own / SNAPSHOTS)


def clear_cut_off(places: Places, name: str, own_id: bytes) -> None:
    """Remove what a snapshot left that did not come to its commit: its names. To be called when changing.

    Before the clone's delta gets another id: for then they would count. Raises StorageError if others need what has
    that id: then the clone is a copy of another, made by hand before that one had a snapshot.
    """
    fs = places.fs
    layer = places.layer(own_id).parent
    if layer.is_dir() and (above := needed_layers(places, places.names_in(places.clones)).get(own_id)):
        raise StorageError(
            f"clone '{name}' has the id of a layer that {sorted(above)[0]!r} needs: it is a copy of that"
        )
    directory = places.clones / name / SNAPSHOTS
    if directory.is_dir():
        removed = False
        for entry in os.listdir(directory):
            with contextlib.suppress(Exception):
                if Snapshot.load(directory / entry, fs).layer == own_id:
                    fs.unlink(directory / entry)
                    removed = True
        if removed:
            fs.sync_directory(directory)
    if layer.is_dir():
        fs.remove_tree(layer)
        fs.sync_directory(places.layers)


@dataclass(frozen=True, slots=True)
class Return:
    """What it means that a clone goes back: to what (a snapshot, or what it was made from), of which ``size``; how many
    bytes come ``freed``, at least: the delta's, and those of ``layers`` that nobody needs afterwards. ``later``: the
    snapshots since then, which stay.
    """

    name: str
    to: str
    size: int
    freed: int
    layers: tuple[str, ...]
    later: tuple[str, ...]


def look_back(places: Places, name: str, snapshot: str | None) -> Return:
    """What :func:`go_back` would do. Raises NotFound, UsageError, StorageError."""
    own = _own_directory(places, name)
    header = places.header(own / "delta")
    target, shown, size, _ = _target(places, name, header, snapshot)
    then = replace(header, parent_id=target, origin=origin_of(header))
    layers = sorted(layer_needs(places).keys() - layer_needs(places, {name: then}).keys())
    freed = max(freed_in(places.fs, own / "delta") - EMPTY_DELTA, 0)
    freed += sum(freed_in(places.fs, places.layer(layer_id).parent) for layer_id in layers)
    since = places.snapshot(f"{name}@{snapshot}").created if snapshot is not None else 0
    found = places.snapshots(name, header.id)
    later = tuple(f"{name}@{other}" for other, record in found.items() if record.created > since)
    return Return(name, shown, size, freed, tuple(layer_id.hex() for layer_id in layers), later)


def go_back(places: Places, name: str, snapshot: str | None) -> None:
    """Let a clone be as its snapshot is; None: as what it was made from is. What it changed since is gone.

    Constant time. Raises NotFound, InUse that names who has the clone open, and nothing was changed.
    """
    fs = places.fs
    own = _own_directory(places, name)
    what = f"rollback of '{name}'" if snapshot else f"reset of '{name}'"
    going: list[tuple[Path, Path]] = []
    with places.no_space_left(what), places.staging() as staging, contextlib.ExitStack() as held:
        delta = Delta.open(own / "delta", f"clone '{name}'", fs)
        try:
            # With another fingerprint: a clone that was cut free of its base is over it again, or moved over another.
            target, shown, size, fingerprint = _target(places, name, delta.header, snapshot)
            header = successor(delta.header, target, shown, size=size, fingerprint=fingerprint)
            create_over(places, staging / "delta", header, what)
            with places.changing():
                _target(places, name, delta.header, snapshot)  # it may have been removed meanwhile
                clear_cut_off(places, name, delta.header.id)
                fs.rename(staging / "delta", own / "delta")
                fs.sync_directory(own)
                collect(places, held, going)
            delta.discard()
        finally:
            delta.close()
    for _, trash in going:
        fs.remove_tree(trash, ignore_errors=True)


def _own_directory(places: Places, name: str) -> Path:
    own = places.place(name)
    if own.parent == places.bases:
        raise UsageError(f"'{name}' is a base, and never changes")
    return own


def _target(places: Places, name: str, header: Header, snapshot: str | None) -> tuple[bytes, str, int, bytes]:
    """The id and name of the parent to be, the size of the disk, and the fingerprint of the base at the bottom."""
    if snapshot is not None:
        layer = places.snapshot(f"{name}@{snapshot}").layer
        beneath = places.header(places.layer(layer))
        return layer, f"{name}@{snapshot}", beneath.size, beneath.fingerprint
    origin = origin_of(header)
    while places.is_going(origin):  # a power cut brought back what was lowered
        origin = as_origin(places.header(places.layer(origin)).parent_id)
    if origin == NO_ORIGIN:
        raise UsageError(f"'{name}' was not made from anything that is still there: it cannot be reset")
    if places.layer(origin).exists():
        beneath = places.header(places.layer(origin))
        shown = Catalog(places).named.get(origin, "")
        return origin, shown, max(beneath.size, header.size), beneath.fingerprint
    base = places.find_base(origin, header.parent_name)
    if base is None:
        raise NotFound(f"what '{name}' was made from ({origin.hex()}) is not there any more")
    record = BaseRecord.load(places.bases / base / "base.json")
    return origin, base, max(record.size, header.size), record.fingerprint


def _require_present(places: Places, clone: Clone) -> None:
    path = places.delta(clone.name)
    if not places.fs.still_there(path, places.fs.fstat(clone.delta.fd)):
        raise NotFound(f"clone '{clone.name}' was removed just now ({path})")
