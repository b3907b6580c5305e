"""The verbs ``resize``, ``rm`` and ``du``: what takes space, and gives it back."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nbdclone.control.clients import describe_clients
from nbdclone.control.verbs import Steps, Target
from nbdclone.errors import InUse, UsageError
from nbdclone.store.removal import require_removable
from nbdclone.store.resizing import grow, own_behind, require_size, resize, size_of
from nbdclone.store.space import account, freed_by, known_needs, only_needed_by


def resize_clone(target: Target, name: str, size: int, force: bool = False, dry_run: bool = False) -> Steps:
    """Change the size of a clone. Larger at any time; smaller with ``force``, and while nobody is connected."""
    places = target.pool.places
    require_size(size)
    before = size_of(places, name)
    lost = own_behind(places, name, size)
    report = {
        "name": name,
        "before": before,
        "size": size,
        "cut": max(before - size, 0),
        "lost": lost,
        "clients": target.clients(name),
        "done": not dry_run,
    }
    if size < before and not (force or dry_run):
        raise UsageError(
            f"'{name}' would lose its last {before - size} bytes, {lost} of which it has written itself: "
            f"shrink the file system on it first, and then say --force"
        )
    yield 0, 1
    if dry_run:
        return report
    if size >= before:
        with target.opened(name) as opened:
            opened.flush()
            # The pool's lock first, as a snapshot takes it: both wait for the turn of the changes with it.
            with places.changing():
                opened.change(lambda: grow(opened.clone, size))
    else:
        with target.alone([name]):
            resize(places, name, size)
    return report


def remove_all(target: Target, names: list[str], dry_run: bool = False) -> Steps:
    """Remove bases, clones and snapshots, all or none."""
    pool = target.pool
    if not names:
        raise UsageError("nothing is named that is to be removed")
    for name in names:
        pool.require(name)
    clients = [(name, client) for name in names for client in target.clients(name)]
    if clients:
        connected = "; ".join(
            f"'{name}': {describe_clients([client for other, client in clients if other == name])}"
            for name in dict.fromkeys(name for name, _ in clients)
        )
        raise InUse(f"in use, and nothing was removed; connected to {connected}")
    require_removable(pool.places, names)
    report: dict[str, Any] = {"names": names}
    needs = known_needs(pool.places)
    report["freed"] = freed_by(pool.places, names, needs)
    report["layers"] = sorted(layer_id.hex() for layer_id in only_needed_by(needs, names))
    report["done"] = not dry_run
    yield 0, 1
    if not dry_run:
        pool.remove(names)
    return report


def measure(target: Target, names: list[str]) -> Steps:
    """Say what everything in the pool takes, or these alone."""
    found = yield from account(target.pool.places, names)
    return asdict(found) | {"entries": [asdict(entry) for entry in found.entries]}
