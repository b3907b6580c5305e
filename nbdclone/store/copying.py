"""Copying up in small steps: what flattening a clone and merging a layer have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from nbdclone.errors import StorageError
from nbdclone.store.clone import Clone
from nbdclone.store.layer import NOWHERE

T = TypeVar("T")

# What is copied in one step: clients' changes wait meanwhile, for some milliseconds.
STEP = 1 << 20
# And how far one step looks: scattered blocks do not get a turn each.
SPAN = 16 << 20
# What is copied of a layer, where the disk has no room for all of it, before its space is given back.
AT_ONCE = 64 * STEP


class Changeable(Protocol):
    """A clone that is open, of which ``control.verbs.Opened`` is one."""

    @property
    def clone(self) -> Clone: ...

    def change(self, step: Callable[[], T]) -> T: ...

    def change_here(self, step: Callable[[], T]) -> T: ...


class Piece(NamedTuple):
    """A stretch of the disk with this many bytes of data and of holes to be copied."""

    offset: int
    length: int
    data: int
    holes: int


def pieces(clone: Clone, origin: int | None = None) -> Iterator[Piece]:
    """What is read from layers beneath the delta (or from the one of that number), in pieces for one step each."""
    top, start, end, data, holes, offset = len(clone.layers), 0, 0, 0, 0, 0
    while offset < clone.size:
        for extent in list(clone.extents(offset, clone.size - offset)):
            wanted = extent.origin not in (top, NOWHERE) and origin in (None, extent.origin)
            at, offset = offset, offset + extent.length
            while wanted and at < offset:
                if data + holes and (data >= STEP or at - start >= SPAN):
                    yield Piece(start, end - start, data, holes)
                    data = holes = 0
                if not data + holes:
                    start = at
                count = min(offset - at, SPAN if extent.hole else STEP - data % STEP)
                data, holes = (data, holes + count) if extent.hole else (data + count, holes)
                at = end = at + count
    if data + holes:
        yield Piece(start, end - start, data, holes)


class Giving(Protocol):
    """Who gives back the space of what was copied, where it lay before, while the rest is copied."""

    def copied(self, data: int, end: int) -> None:
        """So many bytes more were copied, and nothing is left up to byte ``end`` of the disk."""

    def gave_back(self, end: int) -> bool:
        """Give back all of it now, up to byte ``end``, also from times before. False: not all can be."""


def copy_up_all(
    opened: Changeable,
    what: str,
    *,
    origin: int | None = None,
    holes: bool = False,
    giving: Giving | None = None,
) -> Generator[tuple[int, int], None, int]:
    """Copy up all that is read from beneath, or from one layer, in steps; yields and returns bytes.

    Raises StorageError if there is no room for it: before anything was done, or, if there is less by then, with what
    was copied left in place: nothing is lost by that, and it is not copied again. With ``giving`` there has to be room
    for a part at a time.
    """
    clone = opened.clone
    total = sum(piece.data + (piece.holes if holes else 0) for piece in pieces(clone, origin))
    left = sum(piece.data for piece in pieces(clone, origin))
    _require_quota(clone, what, left)
    done = room = 0
    for piece in pieces(clone, origin):
        if piece.data or holes:
            if piece.data > room:
                room = _room(clone, what, max(left, piece.data), giving, piece.offset)
            step = partial(clone.copy_up, piece.offset, piece.length, holes=holes, origin=origin)
            try:
                done += opened.change(step)
            except OSError as error:
                raise StorageError(f"{what}: {error.strerror}; nothing is lost, and it can be done again") from error
            left, room = left - piece.data, room - piece.data
            if giving is not None:
                giving.copied(piece.data, piece.offset + piece.length)
            yield min(done, total), total
    return done


def _require_quota(clone: Clone, what: str, needed: int) -> None:
    delta: Any = clone.delta
    taken = os.fstat(delta.fd).st_blocks * 512
    if (quota := delta.header.quota) and taken + needed > quota:
        raise StorageError(
            f"{what} takes {needed} bytes more, and '{clone.name}' may have {quota}, of which it has {taken}: "
            f"nothing was done; raise its quota first"
        )


def _room(clone: Clone, what: str, needed: int, giving: Giving | None, end: int) -> int:
    """How much may be copied before the next look: all, or with ``giving`` a part, which is to come back before more
    is copied. Clients are left as much again. Raises StorageError.
    """
    status = os.statvfs(clone.delta.path)
    free = status.f_bavail * status.f_frsize
    if needed <= free:
        return needed
    if giving is not None and giving.gave_back(end) and free // 2 >= STEP:
        return min(free // 2, AT_ONCE)
    raise StorageError(f"{what} takes {needed} bytes, and {free} are free: nothing is lost, and it can be done again")
