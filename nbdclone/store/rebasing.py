"""Rebase: clones go from one base to another.

Keeping the content, each clone reads the same afterwards, and its delta is what it has otherwise than the new base (see
:mod:`nbdclone.store.moving`). Keeping the changes, the blocks that a clone owns stay, and the others are the new
base's: a change of headers alone.

A clone with snapshots beneath goes along with them: what is moved is the lowest layer of its chain, on which others may
stand; all of these have to be named.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdclone.errors import Interrupted, InUse, NotFound, UsageError
from nbdclone.store.catalog import Catalog
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import NO_PARENT, Header
from nbdclone.store.difference import compare_bases
from nbdclone.store.image import Image
from nbdclone.store.layer import BLOCK_SIZE, block_count
from nbdclone.store.moving import Move, lowest_layer, move_layer, plan_move, renew_above, write_header
from nbdclone.store.names import is_name, split_name
from nbdclone.store.opening import open_parent
from nbdclone.store.places import Places
from nbdclone.store.sealed import Sealed

if TYPE_CHECKING:
    from concurrent.futures import Future

    from nbdclone.control.verbs import Steps, Target

# What one clone counts in the progress of several.
PART = 1 << 20
# Clones at once: as many as keep two processors and a disk busy.
AT_ONCE = 4
PROGRESS_S = 0.05


@dataclass(slots=True)
class _Moved:
    """What is moved as one: a clone's delta that is directly over the base, or a layer with the clones above it."""

    header: Header
    layer: bytes | None
    clones: list[str] = field(default_factory=list)
    above: list[bytes] = field(default_factory=list)  # the layers between these and that one
    stale: bool = False  # it was moved, and what is above it does not say so yet


def rebase(target: Target, names: list[str], onto: str, keep_changes: bool = False, dry_run: bool = False) -> Steps:
    """Let clones stand on another base, ``onto``, of the same pool.

    What they read stays the same; or, with ``keep_changes``, the blocks that they changed, which nobody may have open
    then. Clones that stand on it already are passed over. ``dry_run``: say what it would take, and change nothing.

    Returns for each clone its ``state`` and, in bytes, ``before`` and ``after`` (its delta on the disk), ``copied``,
    ``conflicts`` (what both the clone and the new base have otherwise than the old one) and, of these, ``dropped``
    (they have the same). Raises NotFound, UsageError, InUse, BaseChanged.
    """
    places = target.pool.places
    with contextlib.ExitStack() as held:
        new = open_base(places, onto)
        held.callback(new.close)
        moved = _resolve(places, names, new)
        bases = _open_sources(places, moved, new, held)
        waiting = [each for each in moved if each.header.parent_id != new.record.id]
        if not waiting and not any(each.stale for each in moved):
            raise UsageError(f"{_some(names)}: on base '{onto}' already")
        for each in moved:
            if each.stale and not dry_run:
                yield from _renew_all(target, each, None, new)
        if keep_changes:
            _refuse_snapshots(places, waiting)
        if keep_changes and not dry_run:
            yield 0, 1
            _keep_changes(places, waiting, {old: _move(bases[old], new, {}) for old in bases})
            states = {name: "done" for each in waiting for name in each.clones}
            return _result(onto, [_line(name, states.get(name, "already")) for each in moved for name in each.clones])
        staging = held.enter_context(places.staging())
        total = len(bases) + len(waiting)
        moves: dict[bytes, tuple[Move, str]] = {}
        for number, (old_id, old) in enumerate(bases.items()):
            bitmaps = yield from part(compare_bases(old, new), number, total)
            move = _move(old, new, bitmaps)
            file = staging / f"move-{number}"
            move.save(file)
            moves[old_id] = move, str(file.relative_to(places.tmp))
        works = [
            _move_one(target, each, *moves[each.header.parent_id], new, dry_run)
            for each in moved
            if each.header.parent_id != new.record.id
        ]
        found = yield from part(together(works), len(bases), total, len(works))
        done = {line["name"]: line for lines in found for line in lines}
        reports = [done.get(name) or _line(name, "already") for each in moved for name in each.clones]
        if keep_changes:
            reports = [line | {"copied": 0, "after": line["before"]} for line in reports]
        return _result(onto, reports)


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


def _resolve(places: Places, names: Sequence[str], new: Image) -> list[_Moved]:
    """What is to be moved, in the order of the names. Raises UsageError and its children."""
    if not names:
        raise UsageError("no clone is named")
    found: dict[bytes, _Moved] = {}
    for name in dict.fromkeys(names):
        if split_name(name)[1] is not None:
            raise UsageError(f"'{name}' is a snapshot: name its clone, along with which it goes")
        if places.place(name).parent == places.bases:
            raise UsageError(f"'{name}' is a base: clones are rebased")
        header = places.header(places.delta(name))
        layers, lowest = lowest_layer(places, header)
        if lowest.parent_id == NO_PARENT:
            raise UsageError(f"'{name}' stands on no base: it was flattened")
        each = found.setdefault(lowest.id, _Moved(lowest, layers[-1] if layers else None))
        each.clones.append(name)
        each.above += [layer for layer in layers[:-1] if layer not in each.above]
        if layers and lowest.parent_id == new.record.id:
            each.stale = each.stale or header.fingerprint != new.record.fingerprint
    for each in found.values():
        if each.layer is not None and each.header.parent_id != new.record.id:
            _require_all_named(places, each, names)
    return list(found.values())


def _require_all_named(places: Places, moved: _Moved, names: Sequence[str]) -> None:
    """Raises InUse if a clone stands on the layer that is not named; notes the layers of all snapshots above it."""
    assert moved.layer is not None
    others = []
    for clone in places.names_in(places.clones):
        header = places.header(places.delta(clone))
        tops = [lowest_layer(places, header)[0]]
        for snapshot in places.snapshots(clone, header.id).values():
            tops.append([snapshot.layer, *lowest_layer(places, places.header(places.layer(snapshot.layer)))[0]])
        on_it = [chain for chain in tops if moved.layer in chain]
        if on_it and clone not in names:
            others.append(clone)
        for chain in on_it:
            moved.above += [layer for layer in chain if layer not in (moved.layer, *moved.above)]
    if others:
        raise InUse(
            f"{_some(moved.clones)} and {_some(sorted(others))} stand on the same snapshot, which goes along: "
            f"name all of them"
        )


def _open_sources(
    places: Places, moved: Sequence[_Moved], new: Image, held: contextlib.ExitStack
) -> dict[bytes, Image]:
    """The bases that are left, by id, open as long as ``held``: so nobody removes them meanwhile."""
    bases: dict[bytes, Image] = {}
    for each in moved:
        parent = each.header.parent_id
        if parent != new.record.id and parent not in bases:
            old = bases[parent] = open_parent(places, f"'{each.clones[0]}'", each.header)
            held.callback(old.close)
            if new.size < old.size:
                raise UsageError(
                    f"base '{new.name}' has {new.size} bytes, less than the {old.size} of '{old.name}', on which "
                    f"{_some(each.clones)} stands"
                )
    return bases


def _move(old: Image, new: Image, bitmaps: dict[int, bytes]) -> Move:
    # What the new base has behind the end of the old one is not to be seen, also if the clone grows.
    overlap = block_count(old.size) * BLOCK_SIZE if new.size > old.size else None
    return Move(old.record.id, new.record.id, new.name, new.record.fingerprint, overlap, bitmaps)


# Keeping the content


def _move_one(
    target: Target, moved: _Moved, move: Move, path: str, new: Image, dry_run: bool
) -> Generator[tuple[int, int], None, list[dict[str, Any]]]:
    if moved.layer is None:
        (name,) = moved.clones
        report = yield from target.run("move-clone", {"name": name, "move": path, "dry_run": dry_run})
        return [report]
    places = target.pool.places
    layer = places.layer(moved.layer)
    before = _allocated(layer)
    if dry_run:
        yield 0, 1
        with contextlib.closing(Sealed.open(layer, f"layer {moved.layer.hex()}", places.fs)) as sealed:
            plan = plan_move(move, sealed, sealed.header)
    else:
        plan = yield from move_layer(places, moved.layer, move)
        yield from _renew_all(target, moved, move.source, new)
    after = before + plan.to_copy if dry_run else _allocated(layer)
    line = _line(moved.clones[0], "dry run" if dry_run else "done", before, after, plan.to_copy, plan.conflicts)
    return [line | {"name": name, "layer": moved.layer.hex()} for name in moved.clones]


def _renew_all(target: Target, moved: _Moved, source: bytes | None, new: Image) -> Steps:
    """What stands above a layer that was moved: the headers of layers, and the clones, which may be open."""
    places = target.pool.places
    with places.changing():
        for layer in moved.above:
            renew_above(places, places.layer(layer), source, new.record.id, new.record.fingerprint)
    ids = {"successor": new.record.id.hex(), "fingerprint": new.record.fingerprint.hex()}
    for name in moved.clones:
        yield from target.run("renew-clone", {"name": name, "source": source.hex() if source else None, **ids})


# Keeping the changes


def _refuse_snapshots(places: Places, moved: Sequence[_Moved]) -> None:
    """A snapshot is known by its id, to a backup of it for one: under that id it must read as it always did."""
    named = Catalog(places).named
    for each in moved:
        for layer in [*each.above, *([each.layer] if each.layer else [])]:
            if layer in named:
                raise UsageError(
                    f"{_some(each.clones)}: snapshot '{named[layer]}' would change with it: remove it first, or keep "
                    f"the content"
                )


def _keep_changes(places: Places, moved: Sequence[_Moved], moves: dict[bytes, Move]) -> None:
    """The headers, of deltas and layers that nobody has open. Raises InUse, and nothing was changed."""
    fs = places.fs
    with contextlib.ExitStack() as held:
        for each in moved:
            for name in each.clones:
                held.callback(Delta.open(places.delta(name), f"clone '{name}'", fs).close)
            for layer in [*each.above, *([each.layer] if each.layer else [])]:
                path = places.layer(layer)
                fd = fs.open_file(path, 0)
                held.callback(fs.close, fd)
                fs.lock(fd, path, f"a snapshot beneath {_some(each.clones)}")
        with places.changing():
            for each in moved:
                move = moves[each.header.parent_id]
                path = places.layer(each.layer) if each.layer else places.delta(each.clones[0])
                header = places.header(path)
                if header.parent_id != move.source:
                    raise InUse(f"{_some(each.clones)}: what it stands on was changed meanwhile: ask again")
                # A power cut in here leaves some of them on the old base, and none half.
                write_header(path, places, header, replace(move, overlap=None).renewed(header))
                for above in [*map(places.layer, each.above), *(map(places.delta, each.clones) if each.layer else ())]:
                    renew_above(places, above, move.source, move.target, move.fingerprint)


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


def _result(onto: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {"onto": onto, "clones": lines}


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


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
