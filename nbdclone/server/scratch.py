"""What all connections of an event loop share."""

from __future__ import annotations

from functools import partial
from mmap import mmap

from nbdclone.server.budget import Budget
from nbdclone.server.buffers import BufferPool
from nbdclone.server.busy import Busy
from nbdclone.server.input import ReceiveBuffer
from nbdclone.server.offload import Offload
from nbdclone.server.output import Gather
from nbdclone.server.quiet import QuietLog


class Scratch:
    """What all connections of an event loop share, one pass at a time."""

    def __init__(self, budget: Budget, quiet: QuietLog, offload: Offload, bulk: Offload, busy: Busy) -> None:
        self.received = ReceiveBuffer()
        self.gather = Gather()
        self.buffers = BufferPool(self._discard)
        self.budget = budget
        self.quiet = quiet
        self.offload = offload
        self.busy = busy
        self.bulk = bulk  # for what is large: a few at a time, or all others would wait for memory with them

    def _discard(self, buffer: mmap) -> None:
        """Let a thread drop it, where that is the last one who does."""
        self.bulk.submit(partial(id, buffer), lambda _result, _error: None)
