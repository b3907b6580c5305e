"""Removing bases, clones and snapshots, and the layers that nobody needs any more."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from nbdclone.errors import InUse, NBDCloneError, StorageError
from nbdclone.store.catalog import BaseInfo, Catalog, CloneInfo
from nbdclone.store.image import thaw
from nbdclone.store.names import split_name
from nbdclone.store.places import SNAPSHOTS, Places
from nbdclone.store.space import layer_needs


def remove(places: Places, names: Sequence[str], still: Callable[[], bool] = lambda: True) -> None:
    """Remove clones, bases and snapshots, all or none; if they are ``still`` to go when it is our turn.

    Raises NotFound; InUse, naming the dependants that are not removed along with it, or the process that has a clone
    open. Needs no space: on a full disk this is what makes some. The layer of a snapshot stays as long as something is
    above it.
    """
    _Removal(places, list(dict.fromkeys(names)), still).run()


def require_removable(places: Places, names: Sequence[str]) -> None:
    """Raise what :func:`remove` would raise of these, and change nothing."""
    _Removal(places, list(dict.fromkeys(names))).look()


class _Removal:
    def __init__(self, places: Places, names: list[str], still: Callable[[], bool] = lambda: True) -> None:
        self._places = places
        self._still = still
        self._fs = places.fs
        self._names = [name for name in names if split_name(name)[1] is None]
        self._snapshots = [name for name in names if split_name(name)[1] is not None]
        self._going: list[tuple[Path, Path]] = []

    def run(self) -> None:
        places, names = self._places, self._names
        places.tmp.mkdir(exist_ok=True)
        with contextlib.ExitStack() as held:
            held.callback(self._discard)  # once more when it is closed: NFS does not remove what is open
            with places.changing():
                if not self._still():
                    return
                places.clear_leftovers()
                found, layered = self._find(held)
                for name, place in zip(names, found, strict=True):
                    thaw(self._fs, place / "image", name)
                # Clones before bases: a power cut in between leaves no clone without its base. Straight into ``.tmp``,
                # without a directory of our own: that would take a block, and the disk may have none.
                found.sort(key=lambda place: place.parent == places.bases)
                pairs = [(place, places.tmp / uuid.uuid4().hex) for place in found]
                places.rename_all(pairs)
                self._going += pairs
                held.callback(self._discard)
                # Before another machine takes it for what the dead have left: else a power cut may bring a name back
                # when half of its files are gone.
                self._fs.sync_directory(places.clones)
                self._fs.sync_directory(places.bases)
                self._forget_snapshots()
                if layered:
                    collect(places, held, self._going)

    def look(self) -> None:
        with contextlib.ExitStack() as held, self._places.changing():
            self._find(held)

    def _find(self, held: contextlib.ExitStack) -> tuple[list[Path], bool]:
        """Where they are, locked, and whether there are layers. To be called when changing."""
        places = self._places
        found = [places.place(name) for name in self._names]
        for name in self._snapshots:
            places.snapshot(name)
        layered = bool(places.layer_ids())
        if layered or any(place.parent == places.bases for place in found):
            self._refuse_dependants()
        for name, place in zip(self._names, found, strict=True):
            self._hold(name, place, held)
        return found, layered

    def _discard(self) -> None:
        for _, trash in self._going:
            if trash.exists():
                self._fs.remove_tree(trash, ignore_errors=True)

    def _forget_snapshots(self) -> None:
        for name in self._snapshots:
            clone, snapshot = split_name(name)
            directory = self._places.clones / clone / SNAPSHOTS
            if directory.is_dir():  # it may have gone with its clone
                self._fs.unlink(directory / str(snapshot))
                self._fs.sync_directory(directory)
        if self._snapshots:  # a server looks at it, and sees that there may be a layer to be merged
            with contextlib.suppress(OSError):
                os.utime(self._places.layers)

    def _refuse_dependants(self) -> None:
        going = set(self._names)
        catalog = Catalog(self._places)
        entries = catalog.entries()
        for info in entries:
            if isinstance(info, CloneInfo) and not info.id and info.name not in going:
                raise InUse(
                    f"no base is removed while it cannot be told which one clone '{info.name}' needs: {info.error}"
                )
        needed = needed_layers(self._places, [name for name in self._clone_names() if name not in going])
        for info in entries:
            if info.name not in going:
                continue
            if isinstance(info, BaseInfo):
                dependants = [clone for clone in info.clones if clone not in going]
                if dependants:
                    raise InUse(f"base '{info.name}' is needed by {len(dependants)} clone(s): {_some(dependants)}")
            elif isinstance(info, CloneInfo):
                for snapshot, record in self._places.snapshots(info.name).items():
                    if above := needed.get(record.layer):
                        raise InUse(
                            f"clone '{info.name}' has the snapshot '{info.name}@{snapshot}', needed by {len(above)} "
                            f"clone(s): {_some(sorted(above))}"
                        )

    def _clone_names(self) -> list[str]:
        return self._places.names_in(self._places.clones)

    def _hold(self, name: str, place: Path, held: contextlib.ExitStack) -> None:
        """Lock what is about to be removed, so that nobody has it open and nobody opens it."""
        kind, file = ("base", "image") if place.parent == self._places.bases else ("clone", "delta")
        try:
            fd = self._open(place / file, kind == "clone")
        except FileNotFoundError:
            return  # a damaged one may be removed too
        except StorageError:
            if (place / file).is_file():  # it may be open elsewhere, and this user cannot see
                raise
            return
        held.callback(self._fs.close, fd)
        self._fs.lock(fd, place / file, f"{kind} '{name}'")
        directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        held.callback(os.close, directory)
        fcntl.flock(directory, fcntl.LOCK_EX)  # in ``.tmp`` it is ours, and not what the dead have left

    def _open(self, file: Path, to_write: bool) -> int:
        """``to_write``: if this user may. To lock what is open for reading takes a look at all locks of the system."""
        if to_write:
            with contextlib.suppress(StorageError):
                return self._fs.open_file(file, os.O_RDWR)
        return self._fs.open_file(file, os.O_RDONLY)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def needed_layers(places: Places, clones: Sequence[str], *, strict: bool = False) -> dict[bytes, set[str]]:
    """The layers beneath these clones and beneath their snapshots, and which clones need each. Raises StorageError.

    ``strict``: also where the record of a snapshot cannot be read; it may name any of them.
    """
    needs = layer_needs(places, clones=clones, strict=strict)
    return {layer_id: {split_name(name)[0] for name in names} for layer_id, names in needs.items()}


def collect(places: Places, held: contextlib.ExitStack, going: list[tuple[Path, Path]]) -> None:
    """Remove the layers that nothing is above and no snapshot names; to be called when changing.

    What is renamed away is added to ``going``, to be removed when ``held`` is closed. A layer that somebody reads stays
    until the next time, and so do all if one clone, or one record of a snapshot, cannot be read: it may need any.
    """
    fs = places.fs
    with contextlib.suppress(NBDCloneError):
        needed = needed_layers(places, places.names_in(places.clones), strict=True)
        for layer_id in places.layer_ids():
            if layer_id in needed:
                continue
            path = places.layer(layer_id)
            with contextlib.suppress(InUse, StorageError, OSError):
                if path.exists() and not _is_a_clones_own(places, layer_id):
                    fd = fs.open_file(path, os.O_RDONLY)
                    held.callback(fs.close, fd)
                    fs.lock(fd, path, f"layer {layer_id.hex()}")
                trash = places.tmp / uuid.uuid4().hex
                fs.rename(path.parent, trash)
                going.append((path.parent, trash))
        # Not synced: what a power cut brings back of them, nobody needs.


def _is_a_clones_own(places: Places, layer_id: bytes) -> bool:
    """Is it what a snapshot left that was cut off: a second name of a clone's delta?"""
    for clone in places.names_in(places.clones):
        with contextlib.suppress(NBDCloneError, OSError):
            if places.header(places.delta(clone)).id == layer_id:
                return True
    return False
