"""Flattening: a clone is cut free of all that is beneath it.

    bases/debian      <- clones/web1/delta           bases/debian
                                               =>    clones/web1/delta   (parent: none; it has all the data)

In small steps everything that is read from beneath is copied up, and when that is durable the delta's header says that
there is no parent: that is the commit. Interrupted before it, the clone is what it was, with a larger delta, and the
next time goes on from there. A hole beneath is none of the delta's blocks: it reads as zeros with no parent, too.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from nbdclone.errors import UsageError
from nbdclone.store.clone import Clone
from nbdclone.store.copying import copy_up_all
from nbdclone.store.delta_file import NO_PARENT
from nbdclone.store.moving import wait_for_readers
from nbdclone.store.names import split_name

if TYPE_CHECKING:
    from nbdclone.control.verbs import Steps, Target
    from nbdclone.store.places import Places

_NO_FINGERPRINT = bytes(32)


def require_clone(places: Places, name: str, verb: str) -> None:
    """Raises NotFound, and UsageError if it is a base or a snapshot."""
    if split_name(name)[1] is not None:
        raise UsageError(f"'{name}' is a snapshot, and never changes: {verb} is for clones")
    if places.place(name).parent == places.bases:
        raise UsageError(f"'{name}' is a base, and never changes: {verb} is for clones")


def flatten(target: Target, name: str) -> Steps:
    """Let a clone need nothing beneath it any more. Its snapshots stay over what they are over.

    Raises UsageError and its children, StorageError (no room: quota or disk), OSError, CloneFailed.
    """
    places = target.pool.places
    require_clone(places, name, "flatten")
    copied = 0
    with target.opened(name) as opened:
        clone = opened.clone
        was = clone.delta.header.parent_name if clone.delta.header.parent_id != NO_PARENT else None
        while clone.delta.header.parent_id != NO_PARENT or len(clone.layers) > 1:
            seen = clone.restacked
            copied += yield from copy_up_all(opened, f"flatten '{name}'")
            # Both slots of the map: a page that rots later must not let zeros be seen where the base was.
            clone.delta.settle_all()
            # A power cut from now on: all that has data beneath is durably the delta's, whatever the header says.
            with places.changing():  # before it is our turn to change the clone, as everywhere
                cut = opened.change(partial(_cut, clone, seen))
            if cut:
                opened.change_here(lambda: clone.relayer([]))
        wait_for_readers(clone)
        kept = [f"{name}@{snapshot}" for snapshot in places.snapshots(name, clone.delta.header.id)]
    return {"name": name, "was_over": was, "copied": copied, "snapshots_over_it": kept}


def _cut(clone: Clone, seen: int) -> bool:
    """Nobody changes the clone. False: a snapshot or the like came between, and all is to be looked at once more."""
    if clone.restacked != seen:
        return False
    clone.delta.change_header(
        parent_id=NO_PARENT, parent_name="", fingerprint=_NO_FINGERPRINT, origin=NO_PARENT, overlap=None
    )
    return True
