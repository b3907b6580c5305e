"""Whether a stream fits a pool, and what is to be made of it there.

It fits if what it stands on is here: the base, told by its fingerprint (by whatever name and id), or comes with it; or
the layer that it is relative to. What is here of its layers already is taken as it is.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

from nbdclone.errors import BaseChanged, InUse, NameTaken, NBDCloneError, NotFound, UsageError
from nbdclone.store.changes import identity_of, owned_ranges
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import NO_PARENT, Header
from nbdclone.store.image import BaseRecord, Image
from nbdclone.store.layer import MAX_LAYERS, Layer
from nbdclone.store.names import is_name, split_name, validate_name
from nbdclone.store.opening import open_beneath, with_beneath
from nbdclone.store.places import Places
from nbdclone.store.sealed import Sealed
from nbdclone.store.space import known_needs
from nbdclone.store.stream_head import FINGERPRINT_SIZE, Head


@dataclass(slots=True)
class Plan:
    """What is to be made; to be closed: until then, nobody removes what it stands on.

    ``parent`` is the id of what the first layer that is made stands on, ``parent_name`` its name here. ``here`` is how
    many of the stream's layers, from the oldest, need not be made. ``clone`` is the clone to be; one that is here if
    ``adds``. ``new_base`` is what the base is to be called, if that is made.
    """

    head: Head
    clone: str
    adds: bool
    parent: bytes
    parent_name: str
    fingerprint: bytes
    here: int = 0
    new_base: str | None = None
    beneath: list[Layer] = field(default_factory=list)

    @property
    def snapshots(self) -> dict[str, bytes]:
        """The names that the clone gets, and their layers."""
        return {layer.snapshot: layer.id for layer in self.head.layers if layer.snapshot}

    def close(self) -> None:
        for layer in self.beneath:
            layer.close()
        self.beneath = []


def fit(places: Places, head: Head, name: str | None, base_name: str | None) -> Plan:
    """What is to be made of a stream; its clone is called ``name``, and its base ``base_name``, if that is made.

    Raises UsageError and its children, and what makes a base or layer unreadable.
    """
    for layer in head.layers:
        if layer.snapshot and not is_name(layer.snapshot):
            raise UsageError(f"the stream's snapshot {layer.snapshot[:40]!r} has a name that none can have here")
    if not head.layers[-1].snapshot or len({*_names(head)}) < len(_names(head)):
        raise UsageError("the stream's last layer is no snapshot, or two of them have one name")
    with contextlib.ExitStack() as held:
        here, beneath = _here(places, head)
        held.callback(_close, beneath)
        new_base = None
        if beneath:
            parent = identity_of(beneath[-1])
            parent_name = beneath[-1].name if isinstance(beneath[-1], Image) else ""
            fingerprint = _fingerprint(beneath[-1])
        elif head.base is not None:
            parent, parent_name, fingerprint = head.base.id, base_name or head.base.name, head.base.fingerprint
            new_base = parent_name
            validate_name(new_base)
            _require_new_base(places, head, new_base)
        else:
            parent, parent_name, fingerprint = NO_PARENT, "", bytes(FINGERPRINT_SIZE)
        if len(beneath) + len(head.layers) - here >= MAX_LAYERS:
            raise UsageError(f"the clone would have more than {MAX_LAYERS} layers")
        clone, adds = _clone_to_be(places, head, name)
        _require_names(places, head, clone, adds, new_base)
        held.pop_all()
    return Plan(head, clone, adds, parent, parent_name, fingerprint, here, new_base, beneath)


def _names(head: Head) -> list[str]:
    return [layer.snapshot for layer in head.layers if layer.snapshot]


def _fingerprint(layer: Layer) -> bytes:
    if isinstance(layer, Image):
        return layer.record.fingerprint
    assert isinstance(layer, Sealed)
    return layer.header.fingerprint


def _here(places: Places, head: Head) -> tuple[int, list[Layer]]:
    """How many of the layers are here, and the open chain that the rest is to stand on: empty if it is to be made."""
    for count in range(len(head.layers), 0, -1):
        sent = head.layers[count - 1]
        if (chain := _open_layer(places, sent.id)) is not None:
            if chain[-1].size != sent.size:
                _close(chain)
                raise UsageError(f"layer {sent.id.hex()} is here with another size: it is not what was sent")
            return count, chain
    if head.parent == NO_PARENT:
        return 0, []
    if head.incremental:
        chain = _open_layer(places, head.parent)
        if chain is None:
            raise NotFound(
                f"the stream stands on snapshot '{head.parent_name}' (layer {head.parent.hex()}), which is not in "
                f"{places.path}: receive that first, or send all of '{head.title}'"
            )
        if head.base and _fingerprint(chain[-1]) not in (head.base.fingerprint, bytes(FINGERPRINT_SIZE)):
            _close(chain)
            raise UsageError(f"snapshot '{head.parent_name}' stands on another base here than where it was sent")
        return 0, chain
    return 0, _open_base(places, head)


def _open_layer(places: Places, layer_id: bytes) -> list[Layer] | None:
    """The chain up to that layer; None if it is not here."""
    what = f"layer {layer_id.hex()}"
    try:
        top = Sealed.open(places.layer(layer_id), what, places.fs)
    except NotFound:
        return None
    if places.is_going(layer_id):  # looked at when it is open, as in open_top
        top.close()
        raise InUse(f"{what} is being merged into what is above it, as its snapshot was removed: try again later")
    try:
        return with_beneath(places, what, top)
    except BaseChanged:
        if layer_id in known_needs(places):
            raise
        raise InUse(f"{what} is being removed, as nobody needs it any more: try again") from None


def _close(chain: list[Layer]) -> None:
    for layer in chain:
        layer.close()


def _open_base(places: Places, head: Head) -> list[Layer]:
    """The base, told by its fingerprint; nothing if it comes with the stream. Raises NotFound."""
    base = head.base
    assert base is not None
    for name in sorted(places.names_in(places.bases), key=lambda name: name != base.name):
        with contextlib.suppress(NBDCloneError):
            record = BaseRecord.load(places.bases / name / "base.json")
            if record.fingerprint == base.fingerprint and record.size == base.size:
                return [Image.open(name, places.bases / name, places.fs)]
    if head.with_base:
        return []
    raise NotFound(
        f"the stream stands on base '{base.name}' ({base.size} bytes, fingerprint "
        f"{base.fingerprint.hex()[:16]}), which is not in {places.path}: import the same image, or send it with "
        f"--with-base"
    )


def _require_new_base(places: Places, head: Head, new_base: str) -> None:
    """Raises NameTaken; UsageError if another base has the same id."""
    if any((directory / new_base).exists() for directory in (places.bases, places.clones)):
        raise NameTaken(
            f"there is another '{new_base}' in {places.path} already: give the stream's base another name (--base-name)"
        )
    for name in places.names_in(places.bases):
        with contextlib.suppress(NBDCloneError):
            if head.base and BaseRecord.load(places.bases / name / "base.json").id == head.base.id:
                raise UsageError(f"base '{name}' has the id of the stream's base, and another content")


def _clone_to_be(places: Places, head: Head, name: str | None) -> tuple[str, bool]:
    """The clone's name, and whether it is here and the stream adds to it."""
    wanted = name or head.clone
    validate_name(wanted)
    # Of a snapshot of another clone, a clone was made: so it is here.
    own = head.incremental and split_name(head.parent_name)[0] == head.clone
    if name is not None or not own:
        return wanted, own and (places.clones / wanted).is_dir()
    having = [clone for clone in sorted(places.names_in(places.clones)) if _stands_on(places, clone, head.parent)]
    if wanted in having or not having:
        return wanted, wanted in having
    if len(having) > 1:
        raise UsageError(f"{', '.join(having)} have the snapshot that the stream stands on: say which (--name)")
    return having[0], True


def _stands_on(places: Places, clone: str, layer_id: bytes) -> bool:
    """Is the layer a snapshot of the clone, or what its delta is above?"""
    if any(snapshot.layer == layer_id for snapshot in places.snapshots(clone).values()):
        return True
    with contextlib.suppress(NBDCloneError, OSError):
        return places.header(places.delta(clone)).parent_id == layer_id
    return False


def _require_names(places: Places, head: Head, clone: str, adds: bool, new_base: str | None) -> None:
    """Raises NameTaken if something else has a name that is to be."""
    if not adds:
        if clone == new_base:
            raise NameTaken(f"the clone and its base would both be called '{clone}': give it another (--name)")
        for directory, kind in ((places.bases, "base"), (places.clones, "clone")):
            if (directory / clone).exists():
                raise NameTaken(f"there is a {kind} '{clone}' in {places.path} already: give it another (--name)")
        return
    known = places.snapshots(clone)
    for layer in head.layers:
        if layer.snapshot in known and known[layer.snapshot].layer != layer.id:
            raise NameTaken(f"'{clone}@{layer.snapshot}' is another snapshot here than in the stream")


def require_unchanged(places: Places, plan: Plan, *, force: bool) -> Header:
    """The header of the clone's delta, which the stream will take the place of.

    Raises InUse that names who has it open; UsageError, unless ``force``, if it was changed since the snapshot that
    the stream stands on; NotFound if it never stood on that, or has all of the stream already.
    """
    head = plan.head
    delta = Delta.open(places.delta(plan.clone), f"clone '{plan.clone}'", places.fs)
    try:
        header = delta.header
        beneath = open_beneath(places, f"clone '{plan.clone}'", header)
        try:
            ids = [identity_of(layer) for layer in beneath]
            size = beneath[-1].size if beneath else header.size
        finally:
            _close(beneath)
        names = {snapshot.layer: name for name, snapshot in places.snapshots(plan.clone, header.id).items()}
        if head.layers[-1].id in ids and head.layers[-1].id in names:
            raise UsageError(f"'{plan.clone}' has what the stream is of already: '{head.title}'")
        if head.parent not in ids and head.parent not in names:
            raise NotFound(f"'{plan.clone}' never stood on '{head.parent_name}', which the stream is relative to")
        if not force:
            _require_still_there(plan, size, ids, names, delta)
        return header
    finally:
        delta.close()


def _require_still_there(plan: Plan, size: int, ids: list[bytes], names: dict[bytes, str], delta: Delta) -> None:
    since = f"since '{plan.head.parent_name}', which the stream is relative to"
    way_out = "--force rolls it back"
    expected = {plan.head.parent, *(layer.id for layer in plan.head.layers)}
    # Or on a layer beneath these, and unchanged: it was to follow, and a power cut came between the names of the
    # snapshots and its new delta (``Receiving._follow``); or it was rolled back. It has nothing that could be lost.
    expected.update(layer.id for layer in plan.beneath if isinstance(layer, Sealed))
    top = ids[-1] if ids else NO_PARENT
    if top not in expected:
        shown = f" (it has '{plan.clone}@{names[top]}')" if top in names else ""
        raise UsageError(f"clone '{plan.clone}' has gone on {since}{shown}: {way_out}")
    changed = sum(length for _, length in owned_ranges(delta))
    if changed or delta.header.overlap is not None or delta.size != size:
        raise UsageError(f"clone '{plan.clone}' was changed {since} ({changed} bytes): {way_out}")
