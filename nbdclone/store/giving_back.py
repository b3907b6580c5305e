"""Giving back the space of a layer X while it is merged into C, which is right above it, and not only at the end.

What C has taken over hides what X has, so that X's blocks can be punched. But X's own map says still that they are X's:
who reads X without C reads zeros there. So before the first one goes, durably:

- no snapshot is called X, every record of one can be read, no clone is to be reset to X, and that is on the disk;
- the mark ``layers/X/going`` says that X gets no name any more and nothing is put on it but C (a stream may name
  layers by their ids; a reset after a crash may find an origin that was lowered, and was not synced).

And before each: C's blocks and both slots of C's map are durable; who in this process began to read before is done; and
nobody else has X open. That is looked at after C's map is in its file: who opens X later reads C's map later, and finds
C's blocks. The layer is synced after it, with C not changed meanwhile: else C could give up zeros because X has zeros
there, and a power cut bring back what X had.

A power cut anywhere leaves X's blocks, or holes that C hides.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from nbdclone.errors import StorageError
from nbdclone.store.clone import Clone
from nbdclone.store.copying import Changeable
from nbdclone.store.delta_file import MAP_SLOTS, PAGE_SIZE
from nbdclone.store.places import GOING, SNAPSHOTS, Places
from nbdclone.store.sealed import Sealed
from nbdclone.store.snapshots import origin_of

T = TypeVar("T")

# So much is copied between two times that space is given back: each costs some syncs, for which clients' changes wait.
STRETCH = 64 << 20
# How soon it is looked again whether somebody still reads. A read takes as long as the disk does.
READERS_S = 0.002


class GivingBack:
    """The space of one layer during one pass of a merge. ``is_due``: is the layer still to be merged into the clone's
    delta? To be asked when changing.
    """

    def __init__(self, places: Places, opened: Changeable, layer_id: bytes, is_due: Callable[[], bool]) -> None:
        self._places = places
        self._opened = opened
        self._layer_id = layer_id
        self._is_due = is_due
        self._seen = opened.clone.restacked
        self._start = self._copied = 0
        self._begun = False

    def copied(self, done: int, end: int) -> None:
        """The delta has all that the layer had up to byte ``end`` of the disk; so much was copied in all."""
        if done - self._copied >= STRETCH:
            start, self._start, self._copied = self._start, end, done
            self._give_back(start, end)

    def _give_back(self, start: int, end: int) -> None:
        places, opened = self._places, self._opened
        clone = opened.clone
        layer = self._layer(clone)
        if layer is None or not layer.is_alone():
            return
        try:
            self._begun = self._begun or begin(places, self._layer_id)
            if not self._begun:
                return
            fd = places.fs.open_file(layer.path, os.O_RDWR)
        except OSError:  # a full disk, say: what was copied is no less for that
            return
        try:
            same = places.fs.still_there(layer.path, places.fs.fstat(layer.fd))
            # A place of the metadata that is always a hole.
            if not same or not places.fs.can_punch(fd, MAP_SLOTS[0] + PAGE_SIZE, PAGE_SIZE):
                return
            opened.change(clone.begin_era)
            opened.change_here(lambda: None)  # what the event loop read before this is over
            while not self._punch(partial(self._step, layer, fd, start, end)):
                time.sleep(READERS_S)
        finally:
            places.fs.close(fd)

    def _layer(self, clone: Clone) -> Sealed | None:
        layer = clone.layers[-2] if len(clone.layers) > 1 else None
        if isinstance(layer, Sealed) and layer.id == self._layer_id and clone.restacked == self._seen:
            return layer
        return None

    def _punch(self, step: Callable[[], bool]) -> bool:
        with self._places.changing():  # before it is our turn to change the clone, as everywhere
            return not self._is_due() or self._opened.change(step)

    def _step(self, layer: Sealed, fd: int, start: int, end: int) -> bool:
        """Nobody changes the clone. False: somebody still reads."""
        clone = self._opened.clone
        return self._layer(clone) is not layer or clone.punch_hidden(layer, fd, start, end)


def begin(places: Places, layer_id: bytes) -> bool:
    """Say durably that nobody may stand on the layer any more but who does. False: it cannot be said.

    Also if the mark is there: who made it may have been killed before it was durable. Raises StorageError if a header
    cannot be read, OSError.
    """
    fs, layer = places.fs, places.layer(layer_id)
    with places.changing():
        clones = places.names_in(places.clones)
        for name in clones:
            header = places.header(places.delta(name))
            if origin_of(header) == layer_id:
                return False
            try:
                records = places.snapshots(name, header.id, strict=True)
            except StorageError:  # this may be the layer's name
                return False
            if any(record.layer == layer_id for record in records.values()):
                return False
        # Who removed the name may have been killed before it was gone from the disk.
        for directory in (places.clones, *(places.clones / name / SNAPSHOTS for name in clones)):
            if directory.is_dir():
                fs.sync_directory(directory)
        mark = layer.with_name(GOING)
        fs.close(fs.open(mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        fs.sync_directory(mark.parent)
    return True
