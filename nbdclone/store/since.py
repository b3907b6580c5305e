"""Which blocks of a disk in use were changed since one of the snapshots that it stands on.

The owner of a block tells: if its layer is above the snapshot's, the block was changed since. It is as exact as
:mod:`nbdclone.store.changes`, which reads the maps of the layers, and costs no more than to ask for the extents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from nbdclone.errors import NotFound
from nbdclone.store.changes import cut_off, identity_of
from nbdclone.store.delta_file import NO_PARENT
from nbdclone.store.layer import BLOCK_SIZE, MAX_LAYERS, MAX_SIZE, Extent, Layer, block_count
from nbdclone.store.names import is_name, split_name
from nbdclone.store.places import Places


class Teller(Protocol):
    """Says of an extent at ``offset`` which parts of it, of what lengths, were changed."""

    def __call__(self, offset: int, extent: Extent) -> Iterator[tuple[int, bool]]: ...


def snapshots_beneath(places: Places, name: str) -> dict[str, bytes]:
    """The snapshots of a clone on which it stands, oldest first, each with the id of its layer.

    ``name`` is the clone's, or that of one of its snapshots, which stands on those before it. What was left by a
    rollback is not beneath any more. Of a base, and of what is not there, there are none. Raises StorageError, OSError.
    """
    clone, snapshot = split_name(name)
    if not is_name(clone):
        return {}
    try:
        own = places.delta(clone) if snapshot is None else places.layer(places.snapshot(name).layer)
        header = places.header(own)
    except NotFound:
        return {}
    found = places.snapshots(clone)
    beneath: set[bytes] = set()
    while found and header.parent_id != NO_PARENT and header.parent_id not in beneath and len(beneath) < MAX_LAYERS:
        beneath.add(header.parent_id)
        try:
            header = places.header(places.layer(header.parent_id))
        except NotFound:  # a base: there are no snapshots beneath it
            break
    return {name: snapshot.layer for name, snapshot in found.items() if snapshot.layer in beneath}


def changes_since(layer_id: bytes, layers: Sequence[Layer]) -> Teller:
    """What was changed since the layer of that id was on top, in a disk with these layers.

    Nothing that was changed is missing. What was written with what it held before is told as changed, as is all that is
    behind the end of a smaller snapshot; and everything, if the layer is not there any more: its snapshot was removed,
    or the disk cut free of it.
    """
    index = next((at for at, layer in enumerate(layers, start=1) if identity_of(layer) == layer_id), None)
    if index is None:
        return lambda _offset, extent: iter([(extent.length, True)])
    # What is beneath the layers above, and not seen through them, whoever had it, and what is behind its end.
    gone = [*cut_off(layers, index), (layers[index - 1].size, MAX_SIZE)]
    hidden = [(start // BLOCK_SIZE * BLOCK_SIZE, block_count(end) * BLOCK_SIZE) for start, end in gone]
    return lambda offset, extent: _parts(offset, extent, index, hidden)


def _parts(offset: int, extent: Extent, index: int, hidden: Sequence[tuple[int, int]]) -> Iterator[tuple[int, bool]]:
    end = offset + extent.length
    if extent.origin > index:
        yield extent.length, True
        return
    edges = sorted({edge for span in hidden for edge in span if offset < edge < end})
    for edge in (*edges, end):
        yield edge - offset, any(start <= offset < stop for start, stop in hidden)
        offset = edge
