"""Rebase: clones go from one base to another.

Keeping the content, each clone reads the same afterwards, and its delta is what it has otherwise than the new base (see
:mod:`nbdclone.store.moving`). What several of them have so is put into one layer beneath them instead (see
:mod:`nbdclone.store.common_layer`). Keeping the changes, the blocks that a clone owns stay, and the others are the new
base's: a change of headers alone.

A clone with snapshots beneath goes along with them: what is moved is the lowest layer of its chain, on which others may
stand; all of these have to be named. A layer without a name may also stay behind, for the others (see
:mod:`nbdclone.store.standing`).
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nbdclone.errors import Interrupted, InUse, NotFound, UsageError
from nbdclone.store.block_sets import NO_BLOCKS, blocks_in, either, owned_by, runs_of, to_bitmap
from nbdclone.store.catalog import Catalog
from nbdclone.store.common_layer import MOST_MEMBERS, Common, Member, find_common, make_layer
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import Header
from nbdclone.store.delta_map import DeltaMap
from nbdclone.store.difference import compare_bases
from nbdclone.store.disk import Disk
from nbdclone.store.image import Image
from nbdclone.store.layer import BLOCK_SIZE, MAX_LAYERS, SEGMENT_SIZE, Layer, block_count
from nbdclone.store.moving import Move, move_layer, plan_move, renew_above, write_header
from nbdclone.store.names import is_name, split_name
from nbdclone.store.opening import open_parent, open_top, with_beneath
from nbdclone.store.places import Places
from nbdclone.store.sealed import Sealed
from nbdclone.store.space import disk_usage
from nbdclone.store.standing import Moved, changed_meanwhile, find_moved, some

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nbdclone.control.verbs import Steps, Target

# What one clone counts in the progress of several.
PART = 1 << 20
# Clones at once: as many as keep two processors and a disk busy.
AT_ONCE = 4
PROGRESS_S = 0.05


@dataclass(slots=True)
class _Group:
    """What stands on the same, and goes together: at most as many as a layer can have on it.

    ``chain``: what it stands on, open, from the base upwards.
    """

    chain: list[Layer]
    members: list[Moved]
    bitmaps: dict[int, bytes] = field(default_factory=dict)
    common: Common | None = None

    @property
    def base(self) -> Image:
        base = self.chain[0]
        assert isinstance(base, Image)
        return base


def rebase(target: Target, names: list[str], onto: str, keep_changes: bool = False, dry_run: bool = False) -> Steps:
    """Let clones stand on another base, ``onto``, of the same pool.

    What they read stays the same; or, with ``keep_changes``, the blocks that they changed, which nobody may have open
    then. What several of them would have to take over, is put into a layer beneath them (see
    :mod:`nbdclone.store.common_layer`). Clones that stand on it already are passed over. ``dry_run``: say what it would
    take, and change nothing.

    Returns for each clone its ``state`` and, in bytes, ``before`` and ``after`` (its delta on the disk), ``copied``,
    ``conflicts`` (what both the clone and the new base have otherwise than the old one) and, of these, ``dropped``
    (they have the same); and ``shared``, the bytes of the layers that were made. Raises NotFound, UsageError, InUse,
    BaseChanged.
    """
    places = target.pool.places
    with contextlib.ExitStack() as held:
        new = open_base(places, onto)
        held.callback(new.close)
        moved = find_moved(places, names, new)
        waiting = [each for each in moved if each.base != new.record.id]
        groups = _open_groups(places, waiting, new, held)
        if not waiting and not any(each.stale for each in moved):
            raise UsageError(f"{some(names)}: on base '{onto}' already")
        for each in moved:
            if each.stale and not dry_run:
                yield from _renew_all(target, each, None, new)
        if keep_changes:
            _refuse_to_change_others(places, waiting)
        if keep_changes and not dry_run:
            yield 0, 1
            _keep_changes(places, waiting, new)
            states = {name: "done" for each in waiting for name in each.clones}
            return _result(onto, [_line(name, states.get(name, "already")) for each in moved for name in each.clones])
        found, shared = yield from _keep_content(target, groups, new, dry_run, not keep_changes, held)
        done = {line["name"]: line for lines in found for line in lines}
        reports = [done.get(name) or _line(name, "already") for each in moved for name in each.clones]
        if keep_changes:
            reports = [line | {"copied": 0, "after": line["before"]} for line in reports]
        return _result(onto, reports, shared)


# What is asked for


def open_base(places: Places, onto: str) -> Image:
    """A base that is named in a command. Raises NotFound, UsageError, and what ``Image.open`` raises."""
    if "/" in onto:
        raise UsageError(f"'{onto}' is no base of this pool: clones go to bases of their own pool ('nbdclone import')")
    if split_name(onto)[1] is not None or (is_name(onto) and (places.clones / onto).is_dir()):
        raise UsageError(f"'{onto}' is no base: 'nbdclone promote {onto} NEWBASE' makes one of it")
    if not is_name(onto) or not (places.bases / onto).is_dir():
        raise NotFound(f"there is no base {onto[:100]!r} in {places.path}")
    return Image.open(onto, places.bases / onto, places.fs)


def _open_groups(places: Places, waiting: Sequence[Moved], new: Image, held: contextlib.ExitStack) -> list[_Group]:
    """What is left, by what it stands on, which is open as long as ``held``: so nobody removes or merges it."""
    found: dict[bytes, list[_Group]] = {}
    for each in waiting:
        groups = found.setdefault(each.header.parent_id, [])
        if not groups or len(groups[-1].members) == MOST_MEMBERS:
            groups.append(_Group(groups[0].chain if groups else _open_chain(places, each, new, held), []))
        groups[-1].members.append(each)
    return [group for groups in found.values() for group in groups]


def _open_chain(places: Places, moved: Moved, new: Image, held: contextlib.ExitStack) -> list[Layer]:
    what = f"'{moved.clones[0]}'"
    with moved.unchanged(places):
        if not moved.left:
            chain: list[Layer] = [open_parent(places, what, moved.header)]
        else:
            chain = with_beneath(places, what, open_top(places, moved.left[0], what))
    for layer in chain:
        held.callback(layer.close)
    old = chain[0]
    if not isinstance(old, Image):
        raise changed_meanwhile(moved.clones)
    if new.size < old.size:
        raise UsageError(
            f"base '{new.name}' has {new.size} bytes, less than the {old.size} of '{old.name}', on which "
            f"{some(moved.clones)} stands"
        )
    return chain


# Keeping the content


def _keep_content(
    target: Target, groups: Sequence[_Group], new: Image, dry_run: bool, share: bool, held: contextlib.ExitStack
) -> Generator[tuple[int, int], None, tuple[list[list[dict[str, Any]]], int]]:
    """The reports, for each that was moved, of its clones; and the size of the layers that were made."""
    places = target.pool.places
    staging = held.enter_context(places.staging())
    count = sum(len(group.members) for group in groups)
    total = 2 * len(groups) + count
    differences: dict[bytes, dict[int, bytes]] = {}
    works, shared = [], 0
    for number, group in enumerate(groups):
        old = group.base
        if old.record.id not in differences:
            differences[old.record.id] = yield from part(compare_bases(old, new), 2 * number, total)
        group.bitmaps = _with_layers(differences[old.record.id], group.chain)
        move = _move(group, new)
        if share and (common := _find_common(places, group, move)):
            group.common = common
            shared += common.size
            if not dry_run:
                making = _make_layer(places, group, move, new, held)
                layer = yield from part(making, 2 * number + 1, total)
                move = replace(move, target=layer.header.id, overlap=None)
                shared += disk_usage(places.layer(layer.header.id)) - common.size
            move = replace(move, bitmaps=common.left_of(move.bitmaps))
        file = staging / f"move-{number}"
        move.save(file)
        path = str(file.relative_to(places.tmp))
        works += [_move_one(target, each, move, path, new, dry_run) for each in group.members]
    found = yield from part(together(works), 2 * len(groups), total, len(works))
    if share:
        conflicts = [number for group in groups for number in _conflicts_of(group)]
        found = [
            lines if amount is None else [line | {"conflicts": amount} for line in lines]
            for lines, amount in zip(found, conflicts, strict=True)
        ]
    return found, shared


def _move(group: _Group, new: Image) -> Move:
    """Of all that is in the bitmaps, onto the new base."""
    old, record = group.base, new.record
    # What the new base has behind the end of the old one is not to be seen, also if the clone grows.
    seen = [block_count(old.size) * BLOCK_SIZE] if new.size > old.size else []
    seen += [layer.header.overlap for layer in _sealed(group.chain) if layer.header.overlap is not None]
    origins = group.members[0].origins
    source = group.chain[-1].id
    return Move(
        source, record.id, record.id, new.name, record.fingerprint, min(seen, default=None), group.bitmaps, origins
    )


def _sealed(chain: Sequence[Layer]) -> list[Sealed]:
    return [layer for layer in chain if isinstance(layer, Sealed)]


def _with_layers(bitmaps: dict[int, bytes], chain: Sequence[Layer]) -> dict[int, bytes]:
    """The blocks in which the new base may differ from a chain: from its base, and all that the layers have."""
    layers = _sealed(chain)
    found = dict(bitmaps)
    for segment in range(-(-max((layer.size for layer in layers), default=0) // SEGMENT_SIZE)):
        owned = owned_by(layers, segment)
        if owned is not NO_BLOCKS:
            found[segment] = to_bitmap(either(blocks_in(found.get(segment)), owned))
    return found


def _find_common(places: Places, group: _Group, move: Move) -> Common | None:
    """What is worth a layer, if their chains may be longer by one."""
    if len(group.members) < 2 or max(each.depth for each in group.members) + 2 > MAX_LAYERS:
        return None
    with contextlib.ExitStack() as held:
        members = []
        for each in group.members:
            path = each.path(places)
            with each.unchanged(places):
                fd, header = held.enter_context(places.reading(path))
            if header.id != each.header.id:  # a snapshot was made of it, or another has its name
                raise changed_meanwhile(each.clones)
            members.append(Member(header, DeltaMap(path, fd, header.id, places.fs)))
        return find_common(move, group.chain[-1].size, members)


def _make_layer(
    places: Places, group: _Group, move: Move, new: Image, held: contextlib.ExitStack
) -> Generator[tuple[int, int], None, Sealed]:
    assert group.common is not None
    common, record = group.common, new.record
    header = Header(
        uuid.uuid4().bytes, record.id, record.fingerprint, group.chain[-1].size, time.time_ns(), new.name,
        overlap=move.overlap,
    )  # fmt: skip
    source = Disk("what they stand on", group.chain, places.fs)
    pieces = (
        (offset, length, source.read_into)
        for segment, blocks in common.blocks.items()
        for offset, length in runs_of(blocks, segment)
    )
    what = f"rebase onto '{new.name}'"
    return (yield from make_layer(places, header, pieces, common.size, what, held))


def _conflicts_of(group: _Group) -> list[int | None]:
    """For each member; None: as it is reported."""
    return [None] * len(group.members) if group.common is None else list(group.common.conflicts)


def _move_one(
    target: Target, moved: Moved, move: Move, path: str, new: Image, dry_run: bool
) -> Generator[tuple[int, int], None, list[dict[str, Any]]]:
    if moved.layer is None:
        (name,) = moved.clones
        report = yield from target.run("move-clone", {"name": name, "move": path, "dry_run": dry_run})
        return [report]
    places = target.pool.places
    layer = places.layer(moved.layer)
    before = disk_usage(layer)
    if dry_run:
        yield 0, 1
        with (
            moved.unchanged(places),
            contextlib.closing(Sealed.open(layer, f"layer {moved.layer.hex()}", places.fs)) as sealed,
        ):
            plan = plan_move(move, sealed, sealed.header)
    else:
        with moved.unchanged(places):
            plan = yield from move_layer(places, moved.layer, move)
        yield from _renew_all(target, moved, move.origins, new)
    after = before + plan.to_copy if dry_run else disk_usage(layer)
    line = _line(moved.clones[0], "dry run" if dry_run else "done", before, after, plan.to_copy, plan.conflicts)
    return [line | {"name": name, "layer": moved.layer.hex()} for name in moved.clones]


def _renew_all(target: Target, moved: Moved, origins: Sequence[bytes] | None, new: Image) -> Steps:
    """What stands above a layer that was moved: the headers of layers, and the clones, which may be open."""
    places = target.pool.places
    with places.changing():
        for layer in moved.above:
            with contextlib.suppress(NotFound):  # it was merged, or removed, meanwhile
                renew_above(places, places.layer(layer), origins, new.record.id, new.record.fingerprint)
    made_of = None if origins is None else [origin.hex() for origin in origins]
    ids = {"successor": new.record.id.hex(), "fingerprint": new.record.fingerprint.hex()}
    for name in moved.clones:
        with contextlib.suppress(NotFound):
            yield from target.run("renew-clone", {"name": name, "origins": made_of, **ids})


# Keeping the changes


def _refuse_to_change_others(places: Places, moved: Sequence[Moved]) -> None:
    """Raises UsageError and its children.

    A snapshot is known by its id, to a backup of it for one: under that id it must read as it always did.
    """
    named = Catalog(places).named
    for each in moved:
        if each.left:
            raise InUse(
                f"{some(each.clones)}: others stand on the same layer, which goes along: name all of them, or keep the "
                f"content"
            )
        for layer in [*each.above, *([each.layer] if each.layer else [])]:
            if layer in named:
                raise UsageError(
                    f"{some(each.clones)}: snapshot '{named[layer]}' would change with it: remove it first, or keep "
                    f"the content"
                )


def _keep_changes(places: Places, moved: Sequence[Moved], new: Image) -> None:
    """The headers, of deltas and layers that nobody has open. Raises InUse, and nothing was changed."""
    fs, record = places.fs, new.record
    with contextlib.ExitStack() as held:
        for each in moved:
            for name in each.clones:
                held.callback(Delta.open(places.delta(name), f"clone '{name}'", fs).close)
            for layer in [*each.above, *([each.layer] if each.layer else [])]:
                path = places.layer(layer)
                fd = fs.open_file(path, 0)
                held.callback(fs.close, fd)
                fs.lock(fd, path, f"a snapshot beneath {some(each.clones)}")
        with places.changing():
            for each in moved:
                path = each.path(places)
                header = places.header(path)
                if header.parent_id != each.base:
                    raise changed_meanwhile(each.clones)
                # A power cut in here leaves some of them on the old base, and none half.
                # A larger clone sees nothing of the new base behind the end of a layer: nobody could keep that for it.
                end = block_count(header.size) * BLOCK_SIZE if each.layer and new.size > header.size else None
                move = Move(each.base, record.id, record.id, new.name, record.fingerprint, end, {}, each.origins)
                write_header(path, places, header, move.renewed(header))
                for above in [*map(places.layer, each.above), *(map(places.delta, each.clones) if each.layer else ())]:
                    renew_above(places, above, each.origins, record.id, record.fingerprint)


# What is told


def _line(
    name: str, state: str, before: int = 0, after: int = 0, copied: int = 0, conflicts: int = 0
) -> dict[str, Any]:
    return {
        "name": name,
        "state": state,
        "before": before,
        "after": after,
        "copied": copied,
        "conflicts": conflicts,
        "dropped": 0,
    }


def _result(onto: str, lines: list[dict[str, Any]], shared: int = 0) -> dict[str, Any]:
    return {"onto": onto, "clones": lines, "shared": shared}


def part(steps: Generator[tuple[int, int], None, Any], number: int, total: int, parts: int = 1) -> Steps:
    """The steps, as ``parts`` of ``total`` parts, from that number on."""
    with contextlib.closing(steps):
        while True:
            try:
                done, of = next(steps)
            except StopIteration as end:
                return end.value
            yield number * PART + min(done, of) * PART * parts // max(of, 1), total * PART


def together(works: Sequence[Generator[tuple[int, int], None, Any]]) -> Steps:
    """Make the steps of several works, some at once: while one waits for its disk, others copy. Their results in order.

    The first that raises interrupts the others, after the steps that they are at, and so does whoever closes this.
    """
    from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

    stop = threading.Event()
    progress = [0] * len(works)

    def work(number: int) -> Any:
        with contextlib.closing(works[number]) as steps:
            while not stop.is_set():
                try:
                    done, of = next(steps)
                except StopIteration as end:
                    progress[number] = PART
                    return end.value
                progress[number] = min(done, of) * PART // max(of, 1)
        raise Interrupted("it was interrupted: the same again goes on from here")

    with ThreadPoolExecutor(AT_ONCE) as threads:
        pending = [threads.submit(work, number) for number in range(len(works))]
        try:
            while wait(pending, PROGRESS_S, FIRST_EXCEPTION).not_done and not any(map(_failed, pending)):
                yield sum(progress), len(works) * PART
        finally:
            stop.set()
            for each in pending:
                each.cancel()
    failed = [each for each in pending if _failed(each)]
    # What was only interrupted says nothing of why.
    failed.sort(key=lambda each: isinstance(each.exception(), Interrupted))
    return [each.result() for each in failed or pending]


def _failed(each: Future[Any]) -> bool:
    return each.done() and not each.cancelled() and each.exception() is not None
