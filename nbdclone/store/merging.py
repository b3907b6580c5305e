"""Merging: a layer that has no name any more, and one child, becomes a part of that child.

    layers/X          <- layers/C <- clones/web1/delta          layers/P <- layers/C (with X's blocks) <- ...
    (no snapshot's)      or the clone's own delta          =>

The blocks that X has and C has not are copied up into C, in small steps; when they are durable, C's header says that
its parent is X's parent: that is the commit. Who has the chain open is told to open it anew, and X is removed. C may be
sealed: it gains blocks while others read it, who find the same bytes, whichever map they have seen. A merge that
was cut off is found again by looking: a layer without a name and with one child is work to be done.

Before anything, whoever was made from X and would be reset to it, is to be reset to X's parent from now on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from nbdclone.errors import NBDCloneError, NotFound
from nbdclone.store.clone import Clone
from nbdclone.store.copying import copy_up_all
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import NO_PARENT, Header, as_origin
from nbdclone.store.giving_back import GivingBack
from nbdclone.store.layer_manifest import adding_blocks
from nbdclone.store.opening import open_beneath
from nbdclone.store.places import Places
from nbdclone.store.removal import collect
from nbdclone.store.sealed import Sealed
from nbdclone.store.snapshots import origin_of

if TYPE_CHECKING:
    from nbdclone.control.verbs import Opened, Steps, Target

T = TypeVar("T")


class Merge(NamedTuple):
    """Work to be done: a layer, and its only child: a clone by its name, or another layer (then ``clone`` is None)."""

    layer: bytes
    child: bytes
    clone: str | None


class _Above(NamedTuple):
    """What is over the layers of a pool: names of snapshots, and those that stand right on them, (id, clone's name).

    The id of a clone's own delta counts as named: a snapshot that was cut off has made a layer of it.
    """

    children: dict[bytes, list[tuple[bytes, str | None]]]
    named: dict[bytes, list[str]]
    headers: dict[str, Header]  # of the clones


def look(places: Places) -> _Above:
    """Raises what makes a header unreadable: then nobody knows what it needs."""
    children: dict[bytes, list[tuple[bytes, str | None]]] = {}
    named: dict[bytes, list[str]] = {}
    headers: dict[str, Header] = {}
    for name in places.names_in(places.clones):
        try:
            header = headers[name] = places.header(places.delta(name))
        except NotFound:
            if (places.clones / name).is_dir():
                raise
            continue  # it was removed just now
        children.setdefault(header.parent_id, []).append((header.id, name))
        for snapshot, record in places.snapshots(name, header.id).items():
            named.setdefault(record.layer, []).append(f"{name}@{snapshot}")
        named.setdefault(header.id, []).append(name)
    own = {header.id for header in headers.values()}  # a snapshot that was cut off has given one a second name
    for layer_id in set(places.layer_ids()) - own:
        with contextlib.suppress(NotFound):
            header = places.header(places.layer(layer_id))
            children.setdefault(header.parent_id, []).append((layer_id, None))
    return _Above(children, named, headers)


def find_merges(places: Places) -> list[Merge]:
    """What is to be done in the pool. Raises StorageError and its children."""
    if not places.layer_ids():
        return []
    above = look(places)
    return [
        Merge(layer_id, *children[0])
        for layer_id in places.layer_ids()
        if layer_id not in above.named and len(children := above.children.get(layer_id, [])) == 1
    ]


def is_work(places: Places) -> bool:
    """Is there a layer without a name that could be merged, or that nobody needs? Raises StorageError, its children."""
    if not places.layer_ids():
        return False
    above = look(places)
    return any(
        layer_id not in above.named and len(above.children.get(layer_id, [])) < 2 for layer_id in places.layer_ids()
    )


def merge_all(target: Target, gently: bool = False) -> Steps:
    """Merge all layers that have lost their name, and have one child; what is in use stays for the next time.

    ``gently``: with a pause after each step for as long as it took.
    """
    places = target.pool.places
    merged, left, lowered = 0, [], []
    tried: set[bytes] = set()
    while work := [merge for merge in find_merges(places) if merge.layer not in tried]:
        merge = work[0]
        tried.add(merge.layer)
        layer = merge.layer.hex()
        try:
            lowered += yield from _lower_origins(target, merge.layer)
            if merge.clone is not None:
                yield from target.run("merge-into", {"name": merge.clone, "layer": layer})
            else:
                yield from _paced(merge_layers(target, merge), gently)
                for name in _clones_above(places, merge.child):
                    yield from target.run("relayer", {"name": name})
            merged += 1
            _collect(places)
        except (NBDCloneError, OSError) as error:
            left.append({"layer": layer, "why": str(error)})
    _collect(places)
    return {"merged": merged, "left": left, "origins_lowered": lowered}


def _paced(steps: Steps, gently: bool) -> Steps:
    """The same steps; the processor and the disk are others' for half of the time."""
    with contextlib.closing(steps):
        while True:
            began = time.monotonic()
            try:
                progress = next(steps)
            except StopIteration as end:
                return end.value
            if gently:
                time.sleep(time.monotonic() - began)
            yield progress


def merge_into(target: Target, name: str, layer: str) -> Steps:
    """Merge the layer right beneath a clone's delta, which has no name and no other child, into the delta."""
    places, layer_id = target.pool.places, bytes.fromhex(layer)
    merge = None
    with adding_blocks(places, layer_id), target.opened(name) as opened:
        clone = opened.clone
        copied = 0
        while True:
            seen, top = clone.restacked, len(clone.layers)
            merge = Merge(layer_id, clone.delta.header.id, name)
            beneath = clone.layers[-2] if top > 1 else None
            if not isinstance(beneath, Sealed) or beneath.header.id != layer_id or not _is_due(places, merge):
                return {"name": name, "merged": False, "copied": copied}
            _name_origin(places, opened, layer_id)
            giving = GivingBack(places, opened, layer_id, partial(_is_due, places, merge))
            copied += yield from copy_up_all(
                opened,
                f"removing a snapshot beneath '{name}'",
                origin=top - 1,
                holes=True,
                giving=giving,
            )
            # Both slots of the map: the layer is about to go.
            clone.delta.settle_all()
            with places.changing():  # before it is our turn to change the clone, as everywhere
                if opened.change(partial(_reparent, places, clone, seen, layer_id)):
                    break
        _relayer(places, clone, opened.change_here)
    return {"name": name, "merged": True, "copied": copied}


def _name_origin(places: Places, opened: Opened, layer_id: bytes) -> None:
    """Let the clone that is right over the layer, and would be reset to it, be reset to what is beneath that."""
    delta = opened.clone.delta
    with places.changing():
        if origin_of(delta.header) == layer_id:
            lower = as_origin(places.header(places.layer(layer_id)).parent_id)
            opened.change(lambda: delta.change_header(origin=lower))


def _reparent(places: Places, clone: Clone, seen: int, layer_id: bytes) -> bool:
    """Nobody changes the clone. False: a snapshot or the like came between."""
    if clone.restacked != seen:
        return False
    clone.delta.change_header(**header_over(clone.delta.header, places.header(places.layer(layer_id))))
    return True


def relayer(target: Target, name: str, origin: str | None = None, lower: str | None = None) -> Steps:
    """Let a clone that is open read through the layers that are beneath it by now.

    ``origin``, ``lower``: if it was made from the one, let it be made from the other, open or not.
    """
    places = target.pool.places
    done = False
    with target.if_open(name) as opened:
        if opened is not None and not opened.clone.read_only:
            done = _lower(places, opened.clone.delta, origin, lower)
            _relayer(places, opened.clone, opened.change_here)
            yield 1, 1
            return {"name": name, "relayered": True, "lowered": done}
    if origin is not None:
        with target.opened(name) as opened:
            done = _lower(places, opened.clone.delta, origin, lower)
    yield 1, 1
    return {"name": name, "relayered": False, "lowered": done}


def _lower(places: Places, delta: Delta, origin: str | None, lower: str | None) -> bool:
    with places.changing():
        if origin is None or lower is None or delta.header.origin.hex() != origin:
            return False
        delta.change_header(origin=as_origin(bytes.fromhex(lower)))
        return True


def _relayer(places: Places, clone: Clone, change_here: Callable[[Callable[[], None]], None]) -> None:
    layers = open_beneath(places, f"clone '{clone.name}'", clone.delta.header)
    try:
        change_here(lambda: clone.relayer(layers))
    except BaseException:
        for layer in layers:
            layer.close()
        raise


class _Alone:
    """A layer that gains blocks: nobody writes it but this process."""

    def __init__(self, clone: Clone) -> None:
        self.clone = clone

    def change(self, step: Callable[[], T]) -> T:
        return step()

    def change_here(self, step: Callable[[], T]) -> T:
        return step()


def merge_layers(target: Target, merge: Merge) -> Steps:
    """Merge a layer into its only child, which is a layer too. Raises InUse if either is being merged already."""
    places = target.pool.places
    child, what = places.layer(merge.child), f"layer {merge.child.hex()}"
    with adding_blocks(places, merge.layer), adding_blocks(places, merge.child):
        delta = Delta.open(child, what, places.fs, shared=True)
        try:
            layers = open_beneath(places, what, delta.header)
        except BaseException:
            delta.close()
            raise
        with Clone(what, [*layers, delta], places.fs) as clone:
            if not _is_due(places, merge):
                return 0
            alone = _Alone(clone)
            giving = GivingBack(
                places, alone, merge.layer, partial(_is_due, places, merge), partial(_look_anew, target, merge.child)
            )
            copied = yield from copy_up_all(alone, "removing a snapshot", origin=len(layers), holes=True, giving=giving)
            delta.settle_all()
            # A power cut from now on: all that the layer has is durably its child's, in both slots of its map.
            with places.changing():
                delta.change_header(**header_over(delta.header, places.header(places.layer(merge.layer))))
    return copied


def _look_anew(target: Target, layer_id: bytes) -> None:
    """Let all open clones that stand on the layer read through chains that they open now."""
    for name in _clones_above(target.pool.places, layer_id):
        for _ in target.run("relayer", {"name": name}):
            pass


def header_over(header: Header, merged: Header) -> dict[str, Any]:
    """What changes in a header when the parent is merged into it: it is over the parent's parent then."""
    seen = [overlap for overlap in (header.overlap, merged.overlap) if overlap is not None]
    return {
        "parent_id": merged.parent_id,
        "parent_name": merged.parent_name,
        "overlap": min(seen) if seen and merged.parent_id != NO_PARENT else None,
        "origin": as_origin(merged.parent_id) if header.origin == merged.id else header.origin,
        "fingerprint": merged.fingerprint,
    }


def _is_due(places: Places, merge: Merge) -> bool:
    return any((found.layer, found.child) == (merge.layer, merge.child) for found in find_merges(places))


def _lower_origins(target: Target, layer_id: bytes) -> Steps:
    """Whoever was made from the layer, and is not right over it, was made from its parent from now on: their names."""
    places = target.pool.places
    lower = places.header(places.layer(layer_id)).parent_id
    lowered = []
    for name, header in look(places).headers.items():
        if header.origin == layer_id:
            yield from target.run("relayer", {"name": name, "origin": layer_id.hex(), "lower": lower.hex()})
            lowered.append(name)
        elif header.parent_id == layer_id and header.origin == NO_PARENT:
            lowered.append(name)  # its origin is its parent, whichever that is
    return lowered


def _clones_above(places: Places, layer_id: bytes) -> Iterator[str]:
    above = look(places)
    found, waiting = [], [layer_id]
    while waiting:
        for child, clone in above.children.get(waiting.pop(), []):
            if clone is not None:
                found.append(clone)
            else:
                waiting.append(child)
    yield from found


def _collect(places: Places) -> None:
    """Remove the layers that nobody needs, as far as nobody reads them."""
    going: list[tuple[Path, Path]] = []
    with contextlib.ExitStack() as held, places.changing():
        collect(places, held, going)
    for _, trash in going:
        places.fs.remove_tree(trash, ignore_errors=True)
