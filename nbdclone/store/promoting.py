"""Promote: what a clone or snapshot reads becomes a base of its own; it and all others go on as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import TYPE_CHECKING

from nbdclone.errors import InUse, NotFound, UsageError
from nbdclone.store.clone import Clone
from nbdclone.store.exporting import raw_steps
from nbdclone.store.importing import make_base
from nbdclone.store.names import split_name, validate_name
from nbdclone.store.opening import open_top, with_beneath
from nbdclone.store.places import Places

if TYPE_CHECKING:
    from nbdclone.control.verbs import Steps, Target


def promote(target: Target, name: str, new: str) -> Steps:
    """Make the base ``new`` of a snapshot; or of a clone as it is now, which is sealed for it.

    Where the file system can share extents nothing is copied, but all of it is read once: a base has a hash of each of
    its pieces. Costs what a flattened copy costs. Raises UsageError and its children, StorageError; nothing was made.
    """
    places = target.pool.places
    validate_name(new)
    places.require_free([new])
    clone, snapshot = split_name(name)
    if snapshot is None:
        if places.place(clone).parent == places.bases:
            raise UsageError(f"'{clone}' is a base already")
        disk = yield from sealed(places, target, clone)
    else:
        disk = target.pool.open_clone(name)
    with disk:
        yield from _copy(places, disk, name, new)
    info = target.pool.info(new)
    return {"kind": "base", "name": new, "source": name, "size": info.size, "allocated": info.allocated}


def sealed(places: Places, target: Target, clone: str) -> Generator[tuple[int, int], None, Clone]:
    """What the clone is now, open. Nothing names the layer that is made for it: whatever becomes of us, it is merged
    again, and may be as soon as it is there: so that once in a while it is gone, or on its way, before it is opened.
    """
    while True:
        made = yield from target.run("seal", {"name": clone})
        with contextlib.suppress(NotFound, InUse):
            top = open_top(places, bytes.fromhex(made["layer"]), f"clone '{clone}'")
            return Clone(clone, with_beneath(places, f"clone '{clone}'", top), places.fs)


def _copy(places: Places, disk: Clone, name: str, new: str) -> Steps:
    with places.no_space_left(f"promote of '{name}'"), places.staging() as staging:
        draft = staging / new
        places.fs.mkdir(draft)
        for done, total in raw_steps(disk, draft / "image", places.fs):
            yield done, 2 * total
        for done, total in make_base(draft, f"{name} of this pool", places.fs):
            yield total + done, 2 * total
        places.fs.sync_directory(draft)
        with places.changing():
            places.require_free([new])
            places.fs.rename(draft, places.bases / new)
        places.fs.sync_directory(places.bases)
