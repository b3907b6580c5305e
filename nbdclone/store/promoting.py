"""Promote: what a clone or snapshot reads becomes a base of its own; it and all others go on as they were."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from nbdclone.errors import UsageError
from nbdclone.store.exporting import raw_steps
from nbdclone.store.importing import make_base
from nbdclone.store.names import split_name, validate_name
from nbdclone.store.places import Places

if TYPE_CHECKING:
    from nbdclone.control.verbs import Steps, Target


def promote(target: Target, name: str, new: str) -> Steps:
    """Make the base ``new`` of a snapshot; or of a clone as it is now, of which a snapshot is taken for the while.

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
        snapshot = f"promote-{uuid.uuid4().hex[:8]}"
        yield from target.run("snapshot", {"name": f"{clone}@{snapshot}"})
        try:
            yield from _copy(places, target, f"{clone}@{snapshot}", new)
        finally:
            for _step in target.run("rm", {"names": [f"{clone}@{snapshot}"]}):
                pass  # not told: this may be the end of an interrupted one
    else:
        yield from _copy(places, target, name, new)
    info = target.pool.info(new)
    return {"kind": "base", "name": new, "source": name, "size": info.size, "allocated": info.allocated}


def _copy(places: Places, target: Target, name: str, new: str) -> Steps:
    no_space_left = places.no_space_left(f"promote of '{name}'")
    with target.pool.open_clone(name) as disk, no_space_left, places.staging() as staging:
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
