"""Giving back the space of a layer X while it is merged into C, which is right above it, and not only at the end.

What C has taken over hides what X has, so that X's blocks can be punched. But X's own map says still that they are X's:
who reads X without C reads zeros there. So before the first one goes, durably:

- no snapshot is called X, every record of one can be read, no clone is to be reset to X, and only C is right above it;
- the mark ``layers/X/going`` says that this stays so: X gets no name any more (a stream may name layers by their ids),
  and nothing is put on it. Who means to stand on X, or to read it without C, looks for the mark when it has X open.

And before each: C's blocks and both slots of C's map are durable; who in this process began to read before is done; and
nobody else has X open. That is looked at after C's map is in its file: who opens X later reads C's map later, and finds
C's blocks. Whoever has X open keeps all of it as it is, for so long.

Where C is a layer too, a server may have clones above it open, and these have X open for as long. So then, when C's map
is in its file, the number of looks at X is counted up, and all open clones above are told to open their chains anew.
After that nobody but who merges may have X open from a look with an earlier number. Whoever does keeps X as it is: a
reader of a snapshot, who is not told.

A power cut anywhere leaves X's blocks, or holes that C hides. C's map loses bits in :meth:`Clone.drop` alone: that
counts as a change of what lies beneath (``restacked``), after which nothing is punched that was found before; and it
syncs X first, whose zeros may be what C's block equals.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

from nbdclone.errors import NBDCloneError, StorageError
from nbdclone.store.copying import Changeable
from nbdclone.store.delta_file import MAP_SLOTS, PAGE_SIZE
from nbdclone.store.fs import data_and_holes
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.places import GOING, SNAPSHOTS, Places
from nbdclone.store.sealed import Sealed, look_at
from nbdclone.store.snapshots import origin_of

# So much is copied between two times that space is given back: each costs some syncs, for which clients' changes wait.
STRETCH = 64 << 20
# Holes that are made in one step: some milliseconds.
HOLES_AT_ONCE = 32
# How soon it is looked again whether somebody still reads, and for how long: a read takes as long as the disk does. If
# that is longer, the space comes with the next stretch.
READERS_S = 0.002
READERS_PATIENCE_S = 1.0


class GivingBack:
    """The space of one layer during one pass of a merge. ``is_due``: is the layer still to be merged into the clone's
    delta? ``look_anew``: let all open clones above it read through chains that they open now; None: there can be none.
    """

    def __init__(
        self,
        places: Places,
        opened: Changeable,
        layer_id: bytes,
        is_due: Callable[[], bool],
        look_anew: Callable[[], object] | None = None,
    ) -> None:
        self._places = places
        self._opened = opened
        self._layer_id = layer_id
        self._is_due = is_due
        self._look_anew = look_anew
        self._seen = opened.clone.restacked
        self._start = self._data = 0
        self._begun = False

    def copied(self, data: int, end: int) -> None:
        """So many bytes more were copied, and the delta has all that the layer had up to byte ``end`` of the disk."""
        self._data += data
        if self._data >= STRETCH:
            self.gave_back(end)

    def gave_back(self, end: int) -> bool:
        """Give back what there is up to there. False: not all, for somebody reads it, say."""
        self._data = 0
        # A full disk, say, or a clone that cannot be read, or was removed just now: what was copied is no less.
        with contextlib.suppress(NBDCloneError, OSError):
            self._give_back(end)
        return self._start >= end

    def _give_back(self, end: int) -> None:
        """As far as it can be done; what is left is the next time's."""
        places = self._places
        layer = self._layer()
        if layer is None or not (layer.is_alone() or (self._look_anew and places.fs.is_of_this_machine(layer.fd))):
            return
        self._begun = self._begun or begin(places, self._layer_id, self._is_due)
        if not self._begun or not self._is_due():
            return
        fd = places.fs.open_file(layer.path, os.O_RDWR)
        try:
            same = places.fs.still_there(layer.path, places.fs.fstat(layer.fd))
            # A place of the metadata that is always a hole.
            if same and places.fs.can_punch(fd, MAP_SLOTS[0] + PAGE_SIZE, PAGE_SIZE):
                while self._start < end and self._give_back_some(layer, fd, end):
                    pass
        finally:
            places.fs.close(fd)

    def _give_back_some(self, layer: Sealed, fd: int, end: int) -> bool:
        """False: not now."""
        opened = self._opened
        clone = opened.clone
        clone.delta.settle_all()  # most of it before anybody has to wait
        if (found := opened.change(partial(self._settle, layer, end))) is None:
            return False
        opened.change_here(lambda: None)  # what the event loop read before this is over
        if not _comes(clone.past_is_over) or not self._is_alone(layer):
            return False
        runs, stop = found
        data = self._data_of(layer, fd, runs)
        while some := list(islice(data, HOLES_AT_ONCE)):
            if not opened.change(partial(self._punch, layer, fd, some)):
                return False
        self._start = stop
        return True

    def _is_alone(self, layer: Sealed) -> bool:
        """Is nobody left who may read there what the delta has by now?"""
        if layer.is_alone():
            return True
        if self._look_anew is None:
            return False
        number = count_up(self._places, self._layer_id)
        try:
            self._look_anew()
            if _comes(lambda: layer.is_alone_before(number)):
                return True
        except (NBDCloneError, OSError):
            pass
        self._look_anew = None  # an export of a snapshot, say: it will not do so next time
        return False

    def _layer(self) -> Sealed | None:
        """The layer, if it is right beneath the delta, and nothing was put between, or dropped."""
        clone = self._opened.clone
        layer = clone.layers[-2] if len(clone.layers) > 1 else None
        if isinstance(layer, Sealed) and layer.id == self._layer_id and clone.restacked == self._seen:
            return layer
        return None

    def _settle(self, layer: Sealed, end: int) -> tuple[list[tuple[int, int]], int] | None:
        """Nobody changes the clone."""
        return self._opened.clone.settle_hidden(self._start, end) if self._layer() is layer else None

    def _data_of(self, layer: Sealed, fd: int, runs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The (place, length) in the layer's file of what is data there, of these runs of the disk."""
        for offset, length in runs:
            at = offset + (offset // SEGMENT_SIZE + 1) * layer.stride
            for hole, stop in data_and_holes(self._places.fs, fd, at, at + length, BLOCK_SIZE):
                if not hole:
                    yield at, stop - at
                at = stop

    def _punch(self, layer: Sealed, fd: int, holes: Sequence[tuple[int, int]]) -> bool:
        """Nobody changes the clone, so that nothing is dropped beside this. Not synced: see :meth:`Clone.drop`."""
        if self._layer() is not layer:
            return False
        for at, length in holes:
            self._places.fs.punch(fd, at, length)
        return True


def _comes(is_so: Callable[[], bool]) -> bool:
    """Wait for it, as long as readers may take."""
    deadline = time.monotonic() + READERS_PATIENCE_S
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(READERS_S)
    return True


def count_up(places: Places, layer_id: bytes) -> int:
    """Begin another number of looks at a layer that is marked: who opens it from now on takes that. Raises OSError."""
    mark = places.layer(layer_id).with_name(GOING)
    number = look_at(mark) + 1
    os.truncate(mark, number)
    return number


def begin(places: Places, layer_id: bytes, is_due: Callable[[], bool]) -> bool:
    """Say durably that nobody may stand on the layer any more but who does. False: it cannot be said.

    Also if the mark is there: who made it may have been killed before it was durable. Raises StorageError if a header
    cannot be read, OSError.
    """
    fs, layer = places.fs, places.layer(layer_id)
    with places.changing():
        if not is_due():
            return False
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
