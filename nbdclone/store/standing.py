"""Who stands on what: which part of a clone's chain goes along when the clone goes to another base.

    base <- [layer of web1@one] <- [web1]        the layer and what is above it: it is the clone's own
    base <- [layer of hoist] <- web1, web2       web1 alone: its delta; the layer stays for web2. Both: the layer

What goes is the lowest layer that nobody else stands on, with all that is above it. What stays beneath has no name:
what a snapshot has is to be moved along with it, or the snapshot would keep the old base.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nbdclone.errors import InUse, NBDCloneError, NotFound, StorageError, UsageError
from nbdclone.store.delta_file import NO_PARENT, Header
from nbdclone.store.image import Image
from nbdclone.store.names import split_name
from nbdclone.store.places import Places


@dataclass(frozen=True, slots=True)
class Chain:
    """A delta, and the layers beneath it, by their headers, from the top downwards."""

    headers: tuple[Header, ...]

    @property
    def header(self) -> Header:
        """Of the delta itself."""
        return self.headers[0]

    @property
    def lowest(self) -> Header:
        """Of the lowest: the one that names the base."""
        return self.headers[-1]

    @property
    def ids(self) -> list[bytes]:
        """Its own, those of the layers and that of the base."""
        return [*(header.id for header in self.headers), self.lowest.parent_id]

    @property
    def layers(self) -> list[bytes]:
        """The ids of those beneath it."""
        return [header.parent_id for header in self.headers[:-1]]


def find_chain(places: Places, path: Path) -> Chain:
    """What a delta stands on, from its file. Raises NotFound, StorageError.

    Read until twice the same: a layer may be merged into the one above it meanwhile.
    """
    found = chain_beneath(places, places.header(path))
    while (again := chain_beneath(places, places.header(path))) != found:
        found = again
    return found


def chain_beneath(places: Places, header: Header) -> Chain:
    """The same, of the delta with that header: to be called when changing."""
    found, seen = [header], {header.id}
    while header.parent_id != NO_PARENT:
        try:
            header = places.header(places.layer(header.parent_id))
        except NotFound:  # it is a base
            break
        if header.id in seen:
            raise StorageError(f"layer {header.id.hex()} is beneath itself")
        seen.add(header.id)
        found.append(header)
    return Chain(tuple(found))


@dataclass(slots=True)
class Moved:
    """What is moved as one: a clone's delta, or a layer with all that is above it.

    ``chain``: it, and what stays beneath it.
    """

    chain: Chain
    layer: bytes | None
    clones: list[str] = field(default_factory=list)
    above: list[bytes] = field(default_factory=list)  # the layers between these clones, their snapshots, and that one
    depth: int = 1  # of the longest chain that it is the lowest of
    stale: bool = False  # it was moved, and what is above it does not say so yet

    @property
    def header(self) -> Header:
        return self.chain.header

    @property
    def left(self) -> list[bytes]:
        """The layers beneath it, which stay, from the top downwards."""
        return self.chain.layers

    @property
    def base(self) -> bytes:
        """The id of the base at the bottom."""
        return self.chain.lowest.parent_id

    @property
    def origins(self) -> tuple[bytes, ...]:
        """What a clone that was made from any of these is made from the new base from now on."""
        return (self.base, *self.left)

    def path(self, places: Places) -> Path:
        """Its file."""
        return places.layer(self.layer) if self.layer else places.delta(self.clones[0])

    @contextlib.contextmanager
    def unchanged(self, places: Places) -> Iterator[None]:
        """What fails in here, because another verb changed what it stands on, or removed it, is said to be that."""
        try:
            yield
        except NBDCloneError:
            now = None
            with contextlib.suppress(NotFound):
                now = find_chain(places, self.path(places)).ids
            if now == self.chain.ids:
                raise
            raise changed_meanwhile(self.clones) from None


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
        chain = find_chain(places, places.delta(name))
        layers, base = chain.layers, chain.lowest.parent_id
        if base == NO_PARENT:
            raise UsageError(f"'{name}' stands on no base: it was flattened")
        is_there = base == new.record.id
        going = layers
        if layers and not is_there:
            standing = standing or _Standing(places, names)
            going = layers[: standing.count_going(name, layers)]
        layer = going[-1] if going else None
        rest = Chain(chain.headers[len(going) :])
        each = found.setdefault(rest.header.id, Moved(rest, layer))
        each.clones.append(name)
        each.above += [other for other in going[:-1] if other not in each.above]
        each.depth = max(each.depth, len(going) + 1)
        if layers and is_there:
            each.stale = each.stale or chain.header.fingerprint != new.record.fingerprint
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
                chain = find_chain(places, places.delta(clone))
                chains = [chain.layers]
                for snapshot in places.snapshots(clone, chain.header.id).values():
                    self._named.add(snapshot.layer)
                    chains.append([snapshot.layer, *find_chain(places, places.layer(snapshot.layer)).layers])
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


def some(names: Sequence[str]) -> str:
    """Names as a message gives them: ten, and how many more."""
    shown = ", ".join(f"'{name}'" for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def changed_meanwhile(names: Sequence[str]) -> InUse:
    """What to raise if these do not stand any more on what they did: another verb was there."""
    return InUse(f"{some(names)}: what it stands on was changed meanwhile: ask again")
