"""Other names. A name is that of a directory or of a file, and nothing else refers to it: a rename is one step.

What stands above a base or a snapshot knows it by its id. The name that its header has is for people, who see it only
when what has the id is missing.
"""

from __future__ import annotations

import contextlib
import os

from nbdclone.errors import NameTaken, UsageError
from nbdclone.store.names import split_name, validate_name, validate_snapshot_name
from nbdclone.store.places import SNAPSHOTS, Places


def rename(places: Places, old: str, new: str) -> None:
    """Give a base, a clone or a snapshot another name, durably; a clone's snapshots go with it.

    A clone must not be open. Raises NotFound, InvalidName, NameTaken, InUse, and nothing was changed.
    """
    if split_name(old)[1] is None:
        _rename_whole(places, old, new)
    else:
        _rename_snapshot(places, old, new)


def _rename_whole(places: Places, old: str, new: str) -> None:
    if split_name(new)[1] is not None:
        raise UsageError(f"'{old}' is no snapshot, and cannot be called '{new[:200]}'")
    validate_name(new)
    fs = places.fs
    with contextlib.ExitStack() as held, places.changing():
        place = places.place(old)
        places.require_free([new])
        if place.parent == places.clones:
            # Whoever has it open has a path in mind. One that is damaged, or whose delta is missing, can be renamed.
            with contextlib.suppress(FileNotFoundError):
                fd = fs.open_file(place / "delta", os.O_RDONLY)
                held.callback(fs.close, fd)
                fs.lock(fd, place / "delta", f"clone '{old}'")
        # A power cut leaves one name or the other.
        fs.rename(place, place.with_name(new))
        fs.sync_directory(place.parent)


def _rename_snapshot(places: Places, old: str, new: str) -> None:
    fs = places.fs
    clone, before = validate_snapshot_name(old)
    other, after = validate_snapshot_name(new)
    if other != clone:
        raise UsageError(f"'{old}' is a snapshot of '{clone}': it can be called '{clone}@...', and not '{new}'")
    with places.changing():
        places.snapshot(old)
        directory = places.clones / clone / SNAPSHOTS
        if (directory / after).exists():
            if after in places.snapshots(clone):
                raise NameTaken(f"there is a snapshot '{new}' already")
            fs.unlink(directory / after)  # what a snapshot left that was cut off, or nobody can read
        fs.rename(directory / before, directory / after)
        fs.sync_directory(directory)
