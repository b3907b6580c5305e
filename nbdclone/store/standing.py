"""Who stands on what: which part of a clone's chain goes along when the clone goes to another base.

    base <- [layer of web1@one] <- [web1]        the layer and what is above it: it is the clone's own
    base <- [layer of hoist] <- web1, web2       web1 alone: its delta; the layer stays for web2. Both: the layer

What goes is the lowest layer that nobody else stands on, with all that is above it. What stays beneath has no name:
what a snapshot has is to be moved along with it, or the snapshot would keep the old base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from nbdclone.errors import InUse, NotFound, StorageError, UsageError
from nbdclone.store.delta_file import NO_PARENT, Header
from nbdclone.store.image import Image
from nbdclone.store.names import split_name
from nbdclone.store.places import Places


@dataclass(slots=True)
class Moved:
    """What is moved as one: a clone's delta, or a layer with all that is above it.

    ``left``: the layers beneath it that stay, from the top downwards; ``lowest``: the header that names the base.
    """

    header: Header
    layer: bytes | None
    left: list[bytes]
    lowest: Header
    clones: list[str] = field(default_factory=list)
    above: list[bytes] = field(default_factory=list)  # the layers between these clones, their snapshots, and that one
    depth: int = 1  # of the longest chain that it is the lowest of
    stale: bool = False  # it was moved, and what is above it does not say so yet

    @property
    def base(self) -> bytes:
        """The id of the base at the bottom."""
        return self.lowest.parent_id

    @property
    def origins(self) -> tuple[bytes, ...]:
        """What a clone that was made from any of these is made from the new base from now on."""
        return (self.base, *self.left)


def find_moved(places: Places, names: Sequence[str], new: Image) -> list[Moved]:
    """What is to be moved onto ``new``, or is there, in the order of the names.

    Raises UsageError and its children: InUse if others stand on a snapshot that would have to go along.
    """
    if not names:
        raise UsageError("no clone is named")
    found: dict[bytes, Moved] = {}
    standing: _Standing | None = None
    for name in dict.fromkeys(names):
        if split_name(name)[1] is not None:
            raise UsageError(f"'{name}' is a snapshot: name its clone, along with which it goes")
        if places.place(name).parent == places.bases:
            raise UsageError(f"'{name}' is a base: clones are rebased")
        header = places.header(places.delta(name))
        layers, lowest = lowest_layer(places, header)
        if lowest.parent_id == NO_PARENT:
            raise UsageError(f"'{name}' stands on no base: it was flattened")
        is_there = lowest.parent_id == new.record.id
        going = layers
        if layers and not is_there:
            standing = standing or _Standing(places, names)
            going = layers[: standing.count_going(name, layers)]
        layer = going[-1] if going else None
        top = header if layer is None else places.header(places.layer(layer))
        each = found.setdefault(top.id, Moved(top, layer, layers[len(going) :], lowest))
        each.clones.append(name)
        each.above += [other for other in going[:-1] if other not in each.above]
        each.depth = max(each.depth, len(going) + 1)
        if layers and is_there:
            each.stale = each.stale or header.fingerprint != new.record.fingerprint
    for each in found.values():
        if standing is not None and each.layer is not None and each.base != new.record.id:
            standing.note_above(each)
    return list(found.values())


class _Standing:
    """The chains of all clones and snapshots of a pool, as lists of layers from the top downwards."""

    def __init__(self, places: Places, names: Sequence[str]) -> None:
        self._chains: list[list[bytes]] = []
        self._named: set[bytes] = set()
        self._others: dict[bytes, set[str]] = {}  # by layer: clones that stand on it, and that were not named
        for clone in places.names_in(places.clones):
            with contextlib.suppress(NotFound):  # it was removed just now
                header = places.header(places.delta(clone))
                chains = [lowest_layer(places, header)[0]]
                for snapshot in places.snapshots(clone, header.id).values():
                    self._named.add(snapshot.layer)
                    beneath = lowest_layer(places, places.header(places.layer(snapshot.layer)))[0]
                    chains.append([snapshot.layer, *beneath])
                self._chains += chains
                for layer in {layer for chain in chains for layer in chain} if clone not in names else ():
                    self._others.setdefault(layer, set()).add(clone)

    def count_going(self, name: str, layers: Sequence[bytes]) -> int:
        """How many of the layers beneath a clone, from the top downwards, go along with it. Raises InUse."""
        going = next((at for at, layer in enumerate(layers) if layer in self._others), len(layers))
        for layer in layers[going:]:
            if layer in self._named:
                raise InUse(
                    f"'{name}' and {some(sorted(self._others[layer]))} stand on the same snapshot, which goes along: "
                    f"name all of them"
                )
        return going

    def note_above(self, moved: Moved) -> None:
        """The layers of all snapshots above it, too."""
        for chain in self._chains:
            if moved.layer in chain:
                going = chain[: chain.index(moved.layer)]
                moved.above += [layer for layer in going if layer not in moved.above]
                moved.depth = max(moved.depth, len(going) + 2)


def lowest_layer(places: Places, header: Header) -> tuple[list[bytes], Header]:
    """The layers beneath a delta, from the top downwards, and the header of the lowest of all: above the base."""
    found: list[bytes] = []
    while header.parent_id != NO_PARENT and places.layer(header.parent_id).exists():
        if header.parent_id in found:
            raise StorageError(f"layer {header.parent_id.hex()} is beneath itself")
        found.append(header.parent_id)
        header = places.header(places.layer(header.parent_id))
    return found, header


def some(names: Sequence[str]) -> str:
    """Names as a message gives them: ten, and how many more."""
    shown = ", ".join(f"'{name}'" for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
