"""Opening what is in a pool: a base, a snapshot, a clone with all the layers beneath it."""

from __future__ import annotations

import contextlib

from nbdclone.errors import BaseChanged, CorruptDelta, NBDCloneError, NotFound, StorageError
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import NO_PARENT, Header
from nbdclone.store.image import Image
from nbdclone.store.layer import MAX_LAYERS, Layer
from nbdclone.store.names import split_name
from nbdclone.store.places import Places
from nbdclone.store.sealed import Sealed


def open_disk(places: Places, name: str) -> Clone:
    """Open a clone for reading and writing, a base or a snapshot for reading.

    Raises NotFound, InUse (who has it), BaseChanged (base, clone and difference), CorruptDelta, UnsupportedFormat.
    """
    if split_name(name)[1] is not None:
        return Clone(name, open_snapshot(places, name), places.fs)
    place = places.place(name)
    if place.parent == places.bases:
        return Clone(name, [Image.open(name, place, places.fs)], places.fs)
    delta = Delta.open(place / "delta", f"clone '{name}'", places.fs)
    try:
        beneath = open_beneath(places, f"clone '{name}'", delta.header)
    except BaseException:
        delta.close()
        raise
    return Clone(name, [*beneath, delta], places.fs)


def open_snapshot(places: Places, name: str) -> list[Layer]:
    """The layers of a snapshot, from the bottom upwards. Raises NotFound, and what :func:`open_disk` raises."""
    what = f"snapshot '{name}'"
    layer_id = places.snapshot(name).layer
    try:
        return with_beneath(places, what, open_top(places, layer_id, what))
    except (NotFound, BaseChanged) as error:
        places.snapshot(name)  # or it was removed just now
        if isinstance(error, BaseChanged):
            raise
        raise StorageError(f"{what} is refused: {error}") from error


def with_beneath(places: Places, what: str, top: Sealed) -> list[Layer]:
    """A layer and those beneath it, from the bottom upwards. Raises what :func:`open_disk` does; it is closed then."""
    try:
        while True:
            try:
                return [*open_beneath(places, what, top.header), top]
            except (NBDCloneError, OSError):
                if not top.look_again():  # else what it stood on was merged into it
                    raise
    except BaseException:
        top.close()
        raise


def open_layer(places: Places, layer_id: bytes, what: str) -> Sealed:
    """Raises NotFound, InUse (it is being removed), CorruptDelta (also where it is another), UnsupportedFormat."""
    layer = Sealed.open(places.layer(layer_id), what, places.fs)
    if layer.header.id != layer_id:
        layer.close()
        raise CorruptDelta(str(layer.path), f"{what}: another delta stands there, {layer.header.id.hex()}")
    return layer


def open_top(places: Places, layer_id: bytes, what: str) -> Sealed:
    """A layer that is to be read without what is above it. Raises what :func:`open_layer` does, NotFound also if it is
    not whole any more.
    """
    layer = open_layer(places, layer_id, what)
    # Looked at when it is open: from then on nothing is punched in it (see :mod:`nbdclone.store.giving_back`).
    if places.is_going(layer_id):
        layer.close()
        raise NotFound(f"{what}: layer {layer_id.hex()} is being merged into what is above it, and not whole any more")
    return layer


def open_beneath(places: Places, what: str, header: Header) -> list[Layer]:
    """The layers beneath the delta with that header, from the bottom upwards. ``what`` begins the messages.

    A layer may be merged into the one above it meanwhile: then the chain is another.
    """
    while True:
        chain = _chain(places, header)
        try:
            return _open_beneath(places, what, header)
        except (NBDCloneError, OSError):
            if _chain(places, header) == chain:
                raise


def _chain(places: Places, header: Header) -> list[bytes]:
    """The ids of the layers, and of what is at the bottom."""
    found = [header.parent_id]
    with contextlib.suppress(NBDCloneError, OSError):
        while len(found) <= MAX_LAYERS and places.layer(found[-1]).exists():
            found.append(places.header(places.layer(found[-1])).parent_id)
    return found


def _open_beneath(places: Places, what: str, header: Header) -> list[Layer]:
    with contextlib.ExitStack() as held:
        found: list[Layer] = []
        seen = {header.id}
        while header.parent_id != NO_PARENT:
            if header.parent_id in seen or len(found) >= MAX_LAYERS - 1:
                raise CorruptDelta(str(places.path), f"{what} is beneath itself, or on more than {MAX_LAYERS} layers")
            seen.add(header.parent_id)
            try:
                layer = open_layer(places, header.parent_id, f"{what}: layer {header.parent_id.hex()}")
            except NotFound:
                base = open_parent(places, what, header)
                held.callback(base.close)
                found.append(base)
                break
            held.callback(layer.close)
            found.append(layer)
            header = layer.header
        held.pop_all()
    return found[::-1]


def open_parent(places: Places, what: str, header: Header) -> Image:
    """The base that is the parent. Raises BaseChanged and what else makes a base unreadable."""
    while True:
        try:
            parent = places.find_base(header.parent_id, header.parent_name)
        except NBDCloneError as error:
            raise type(error)(f"{what} is refused: its base '{header.parent_name}': {error}") from None
        if parent is None:
            kind = "layer" if "@" in header.parent_name else "base"
            raise BaseChanged(f"{what}: its {kind} '{header.parent_name}' ({header.parent_id.hex()}) is missing")
        try:
            base = Image.open(parent, places.bases / parent, places.fs)
            break
        except (NotFound, BaseChanged) as error:
            if (places.bases / parent).is_dir():  # else it was renamed just now
                raise type(error)(f"{what} is refused: {error}") from None
    if base.record.fingerprint != header.fingerprint:
        base.close()
        raise BaseChanged(
            f"{what} is refused: it was made when base '{parent}' had the fingerprint "
            f"{header.fingerprint.hex()[:16]}, and the base has {base.record.fingerprint.hex()[:16]} now"
        )
    return base
