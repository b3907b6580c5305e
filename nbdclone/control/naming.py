"""The verbs ``snapshot``, ``rollback``, ``reset`` and ``rename``: the points of a clone's life, and names."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from nbdclone.control.verbs import Steps, Target
from nbdclone.errors import NameTaken, UsageError
from nbdclone.store.names import split_name, validate_name, validate_snapshot_name
from nbdclone.store.renaming import rename
from nbdclone.store.snapshots import go_back, look_back, take_snapshot

# How soon it is noticed that nobody wants a clone to be set aside any more.
ASIDE_S = 0.01


def snapshot(target: Target, name: str) -> Steps:
    """Make the snapshot ``clone@name``; clients' changes wait for some milliseconds."""
    clone, wanted = validate_snapshot_name(name)
    places = target.pool.places
    if places.place(clone).parent == places.bases:
        raise UsageError(f"'{clone}' is a base, and never changes: clones are made of it as it is")
    if wanted in places.snapshots(clone):
        raise NameTaken(f"there is a snapshot '{name}' already")
    yield 0, 1
    with target.opened(clone) as opened:
        take_snapshot(places, opened.clone, wanted, opened.change)
        made = target.pool.info(name)
    return {"kind": made.kind} | asdict(made)


def seal(target: Target, name: str) -> Steps:
    """Make a layer of what a clone is now, without a name: for who opens it at once. Returns its id."""
    yield 0, 1
    with target.opened(name) as opened:
        layer_id = take_snapshot(target.pool.places, opened.clone, None, opened.change)
    return {"name": name, "layer": layer_id.hex()}


def rollback(target: Target, name: str, disconnect: bool = False, dry_run: bool = False) -> Steps:
    """Let a clone be as its snapshot ``clone@name`` is; with ``disconnect`` also while clients have it."""
    return (yield from _go_back(target, *validate_snapshot_name(name), disconnect, dry_run))


def reset(target: Target, name: str, disconnect: bool = False, dry_run: bool = False) -> Steps:
    """Let a clone be as what it was made from is; with ``disconnect`` also while clients have it."""
    validate_name(name)
    return (yield from _go_back(target, name, None, disconnect, dry_run))


def _go_back(target: Target, clone: str, wanted: str | None, disconnect: bool, dry_run: bool) -> Steps:
    places = target.pool.places
    report: dict[str, Any] = asdict(look_back(places, clone, wanted))
    report |= {"layers": list(report["layers"]), "later": list(report["later"])}
    report |= {"clients": target.clients(clone), "done": not dry_run}
    yield 0, 1
    if not dry_run:
        with target.alone([clone], disconnect=disconnect):
            go_back(places, clone, wanted)
    return report


def set_aside(target: Target, name: str, disconnect: bool = False) -> Steps:
    """Have a clone closed, and who connects wait, until this is interrupted: for who does something to its files.

    Yields when it is closed, and then again and again. Raises InUse that names the clients; with ``disconnect`` these
    are sent away.
    """
    validate_name(name)
    target.pool.require(name)
    with target.alone([name], disconnect=disconnect):
        while True:
            yield 0, 1
            time.sleep(ASIDE_S)


def rename_one(target: Target, old: str, new: str, disconnect: bool = False) -> Steps:
    """Give a base, clone or snapshot another name. Clients that have it under the old one are in the way, or leave."""
    pool = target.pool
    pool.require(old)
    names = [old]
    if split_name(old)[1] is None and pool.places.place(old).parent == pool.places.clones:
        names += [f"{old}@{name}" for name in pool.places.snapshots(old)]
    clients = [client for name in names for client in target.clients(name)]
    yield 0, 1
    with target.alone(names, disconnect=disconnect):
        rename(pool.places, old, new)
    return {"old": old, "new": new, "clients": clients}
