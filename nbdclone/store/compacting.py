"""Compacting: a delta gives back what it need not have.

    delta  [A][B][0][C][ ]        delta  [ ][B][ ][C][ ]       A: as beneath; 0: zeros where there is data beneath,
    base   [A][b][x][c][d]   =>   base   [A][b][x][c][d]       which stay the delta's, as a hole

Blocks that read the same without the delta are dropped (``Clone.drop``), in batches, and their space is given back when
nobody can be reading it any more (``Clone.punch_dropped``). Blocks of zeros over something else become holes.
Interrupted, it has done a part; space whose blocks were dropped is given back by the next time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from nbdclone.errors import InUse
from nbdclone.store.clone import Clone
from nbdclone.store.delta_file import SEGMENT_SPAN
from nbdclone.store.disk import BLOCK_MASK
from nbdclone.store.flattening import require_clone
from nbdclone.store.fs import seek_extent
from nbdclone.store.layer import SEGMENT_SIZE

if TYPE_CHECKING:
    from nbdclone.control.verbs import Opened, Steps, Target

# What is compared in one step, and dropped in one: each drop syncs some times, and clients' changes wait for it.
STEP = 4 << 20
# How soon it is looked again whether somebody still reads. A read takes as long as the disk does.
READERS_S = 0.002


def compact(target: Target, name: str, online: bool = False) -> Steps:
    """Give back the space of blocks that equal what lies beneath, and of zeros. ``online``: although it has clients.

    Raises UsageError and its children, InUse if clients are connected, OSError, CloneFailed.
    """
    require_clone(target.pool.places, name, "compact")
    if not online and (clients := target.clients(name)):
        raise InUse(f"clone '{name}' has {len(clients)} client(s): 'compact --online' does it while they go on")
    with target.opened(name) as opened:
        clone = opened.clone
        before = _allocated(clone)
        dropped = zeros = 0
        end = clone.size & ~BLOCK_MASK  # of a last block that is a part of one, nobody knows the rest
        for segment in list(_touched(clone)):
            stop = min((segment + 1) * SEGMENT_SIZE, end)
            same: list[tuple[int, int]] = []
            for offset in range(segment * SEGMENT_SIZE, stop, STEP):
                alike, zero = clone.alike(offset, min(STEP, stop - offset))
                same += alike
                if zero:
                    zeros += opened.change(partial(clone.make_holes, zero))
                if sum(length for _, length in same) >= STEP:
                    dropped += _drop(opened, same)
                    same = []
                yield min(offset + STEP, stop), clone.size
            dropped += _drop(opened, same)
            opened.change_here(lambda: None)  # what the event loop read before this is over
            while not opened.change(partial(clone.punch_dropped, segment)):
                time.sleep(READERS_S)
            yield stop, clone.size
        opened.flush()
        after = _allocated(clone)
    return {"name": name, "before": before, "after": after, "dropped": dropped, "zeros": zeros}


def _drop(opened: Opened, runs: list[tuple[int, int]]) -> int:
    if not runs:
        return 0
    opened.flush()  # most of it before anybody has to wait
    return opened.change(partial(opened.clone.drop, runs))


def _allocated(clone: Clone) -> int:
    return os.fstat(clone.delta.fd).st_blocks * 512


def _touched(clone: Clone) -> Iterator[int]:
    """The segments of which the delta's file has anything."""
    delta, position = clone.delta, 0
    size = os.fstat(delta.fd).st_size
    while (position := seek_extent(delta._fs, delta.fd, position, os.SEEK_DATA, otherwise=position)) < size:
        segment = position // SEGMENT_SPAN
        yield segment
        position = (segment + 1) * SEGMENT_SPAN
