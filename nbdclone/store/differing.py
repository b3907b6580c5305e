"""The verb ``diff``: where one disk of a pool may differ from another, also of clones that a server has open.

The maps of a clone that is open are read where it is open, a segment at a time, in the queue of its changes: so what
was written and not flushed counts, and no layer goes while it is asked. If a snapshot, a merge or another base comes in
between, it is begun anew. Two clones are open in two places, perhaps: then the other one is sealed, as for ``promote``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from nbdclone.errors import InUse, UsageError
from nbdclone.store.changes import Change, changed_extents, changed_in, changed_segments, differing_in, joined, kinds_of
from nbdclone.store.clone import Clone
from nbdclone.store.names import split_name
from nbdclone.store.promoting import sealed

if TYPE_CHECKING:
    from nbdclone.control.verbs import Opened, Steps, Target
    from nbdclone.store.places import Places

# What an answer has of them: 60 bytes each, as JSON, of the 64 MiB that a line may have.
MAX_EXTENTS = 1_000_000


def diff(target: Target, a: str, b: str, content: bool = False) -> Steps:
    """Where ``b`` differs from ``a``: ``size`` of ``b``, ``changed`` bytes, and ``extents`` with offset, length, kind.

    With ``content`` both are read, and what is the same is left out; also of different bases. Raises NotFound,
    UsageError, and what makes one of them unreadable.
    """
    pool = target.pool
    for name in (a, b):
        pool.require(name)
    live = next((name for name in (b, a) if _is_clone(pool.places, name)), None)
    if live is not None:
        return (yield from target.run("diff-open", {"name": live, "a": a, "b": b, "content": content}))
    with pool.open_clone(a) as before, pool.open_clone(b) as after:
        found: list[Change] = []
        for change in changed_extents(before, after, content=content):
            found.append(change)
            _require_few(found, a, b)
            yield change.offset, after.size
    return _told(a, b, after.size, found)


def diff_open(target: Target, name: str, a: str, b: str, content: bool = False) -> Steps:
    """The same, where the clone ``name``, one of the two, is open or can be opened."""
    with target.opened(name) as opened, contextlib.ExitStack() as held:
        if a == b:
            return _told(a, b, opened.clone.size, [])
        other = held.enter_context((yield from _other(target, a if name == b else b)))
        before, after = (other, opened.clone) if name == b else (opened.clone, other)
        while True:
            seen = opened.clone.restacked
            found = yield from _find(opened, seen, before, after, content)
            if found is not None:
                _require_few(found, a, b)
                return _told(a, b, after.size, found)


def _other(target: Target, name: str) -> Generator[tuple[int, int], None, Clone]:
    """The other one, open: as it is now, if it is a clone."""
    places = target.pool.places
    if _is_clone(places, name):
        with contextlib.suppress(InUse):
            return target.pool.open_clone(name)
        return (yield from sealed(places, target, name))
    return target.pool.open_clone(name)


def _find(
    opened: Opened, seen: int, before: Clone, after: Clone, content: bool
) -> Generator[tuple[int, int], None, list[Change] | None]:
    """What differs; None if what the open clone stands on was exchanged meanwhile."""
    found: list[Change] = []
    size = after.size
    for segment in changed_segments(size):

        def look(segment: int = segment) -> list[tuple[int, int]] | None:
            if opened.clone.restacked != seen:
                return None
            return list(changed_in(before.layers, after.layers, segment, anyhow=content))

        ranges = opened.change(look)
        if ranges is None:
            return None
        # From here on it is read as clients read it: from whichever layers there are by then.
        found += kinds_of(after, differing_in(before, after, ranges) if content else ranges)
        yield segment + 1, len(changed_segments(size))
    return list(joined(found))


def _is_clone(places: Places, name: str) -> bool:
    return split_name(name)[1] is None and places.place(name).parent == places.clones


def _require_few(found: Sequence[Change], a: str, b: str) -> None:
    if len(found) > MAX_EXTENTS:
        raise UsageError(
            f"'{a}' and '{b}' differ in more than {MAX_EXTENTS} places: ask for what differs piece by piece, with the "
            f"contexts of block status"
        )


def _told(a: str, b: str, size: int, found: Sequence[Change]) -> dict[str, Any]:
    extents = [
        {"offset": change.offset, "length": change.length, "kind": "zero" if change.zero else "data"}
        for change in found
    ]
    return {"a": a, "b": b, "size": size, "changed": sum(change.length for change in found), "extents": extents}
