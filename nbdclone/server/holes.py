"""Reads that are zeros: told as holes, which take a few bytes on the wire and none of the client's time.

What counts is the content, not what the file system knows of holes: the data are in memory anyway, and a comparison
with zeros ends at the first byte that is none.
"""

from __future__ import annotations

import re

from nbdclone.protocol.transmission import hole_chunk, read_chunk_header
from nbdclone.protocol.wire import ADVERTISED_MAX_PAYLOAD, ChunkLayout, Cookie

# A long read is looked at in pieces of this size, and each that is zeros is (a part of) a hole. Each hole between data
# costs both sides system calls and work of their own: on a local socket, zeros of 64 KiB in turn with data took a
# server a third more time to tell than to send, and with 32 KiB the client a quarter more to hear. Longer ones gain
# everywhere, and these over a network.
GRAIN = 64 << 10

_ZEROS = bytes(GRAIN)
_RUN = re.compile(rb"(.)\1*", re.DOTALL)

Run = tuple[bool, int, int]
"""Zeros? And where it starts and ends, in bytes."""


def is_zero(view: memoryview) -> bool:
    """Is every byte zero? Of at most GRAIN bytes."""
    return _ZEROS.startswith(view)


def find_holes(view: memoryview, *, fragment: bool) -> list[Run] | None:
    """Divide ``view``, of any length but 0, into runs of zeros and of data. None: there is nothing but data.

    Without ``fragment`` it is all one or the other. With it, no run of data is longer than the payload that is
    announced, since no chunk may be.
    """
    runs = _find_runs(view, fragment)
    if len(view) <= ADVERTISED_MAX_PAYLOAD or not fragment:
        return runs
    return [
        (zeros, start, end if zeros else min(start + ADVERTISED_MAX_PAYLOAD, end))
        for zeros, begin, end in runs or [(False, 0, len(view))]
        for start in ([begin] if zeros else range(begin, end, ADVERTISED_MAX_PAYLOAD))
    ]


def _find_runs(view: memoryview, fragment: bool) -> list[Run] | None:
    firsts = view[::GRAIN].tobytes()
    if 0 not in firsts or (any(firsts) and not fragment):
        return None  # nearly all data end here
    kinds = bytes(not first and is_zero(view[at * GRAIN : (at + 1) * GRAIN]) for at, first in enumerate(firsts))
    size = len(view)
    if size % GRAIN and kinds.endswith(b"\0\1"):
        kinds = kinds[:-1] + b"\0"  # a rest that is too short to be a hole of its own
    if 1 not in kinds or (0 in kinds and not fragment):
        return None
    return [(bool(run[0][0]), run.start() * GRAIN, min(run.end() * GRAIN, size)) for run in _RUN.finditer(kinds)]


def lay_out(
    runs: list[Run], view: memoryview, start: int, cookie: Cookie, offset: int, layout: ChunkLayout
) -> tuple[list[memoryview], bytes]:
    """The reply to a read at ``offset`` whose data begin at ``start`` of ``view``: parts of ``view``, and what follows.

    Headers are written over the zeros that they tell of, and before ``start``, where there must be room for a page;
    those between data and data are parts of their own.
    """
    parts: list[memoryview] = []
    head = b""
    after_data = False
    for zeros, begin, end in runs:
        last = end == runs[-1][2]
        if zeros:
            head += hole_chunk(cookie, offset + begin, end - begin, last=last, layout=layout)
        else:
            head += read_chunk_header(cookie, offset + begin, end - begin, last=last, layout=layout)
            at = start + begin
            if after_data:
                parts.append(memoryview(head))
            else:
                at -= len(head)
                view[at : start + begin] = head
            parts.append(view[at : start + end])
            head = b""
        after_data = not zeros
    return parts, head
