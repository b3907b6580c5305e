"""How much space one clone may take: counted by the file system, and looked at now and then.

What a delta takes is what fstat says of it (``st_blocks``, with what the kernel has not placed yet): data, maps, and
the file system's own lists of where they are. So there is no count of ours that a crash could leave wrong, nothing is
read at the opening, and what a trim gives back is there at once.

A write of n bytes takes n bytes at the most. So after one look as many bytes may be written unseen as there was room
for: that is the lease. Where it ends, the file is looked at again, and near the quota each time: there the file system
is asked how much of the range has no space yet, and a write to what is allocated already goes on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from nbdclone.store.fs import FileSystem

# How much is written before the file is looked at again: seldom enough to cost nothing, and often enough to see a quota
# that was changed, and what the file system has added of its own (ext4: up to 0.3 % if every block is an extent).
LEASE = 64 << 20


class Quota:
    """The quota of an open file. Not thread-safe: the changes of a clone exclude one another.

    ``limited``: there is one at present. ``limit(nowait)`` tells what it is by now, in bytes, 0 for none; it raises
    BlockingIOError if ``nowait`` and that is not in memory. Who is about to write
    ``length`` bytes takes them off ``lease``, and calls :meth:`renew` if that was not enough.
    """

    def __init__(self, fd: int, limited: bool, limit: Callable[[bool], int], fs: FileSystem) -> None:
        self.lease = 0 if limited else LEASE
        self._fd = fd
        self._limit = limit
        self._fs = fs

    def take(self, position: int, length: int, nowait: bool) -> None:
        """Be allowed to write these bytes of the file: whole blocks. Raises what :meth:`renew` raises."""
        self.lease -= length
        if self.lease < 0:
            self.renew(position, length, nowait)

    def renew(self, position: int, length: int, nowait: bool) -> None:
        """The lease did not suffice for these bytes: look at the file.

        Raises OSError (EDQUOT) if they take more than there is room for, and BlockingIOError if ``nowait``
        and it may wait: not where there is no quota, which a header in memory says.
        """
        limit = self._limit(nowait)
        if nowait and limit:
            raise BlockingIOError(errno.EAGAIN, "to look at a file may wait")
        room = limit - self._fs.fstat(self._fd).st_blocks * 512 if limit else LEASE
        self.lease = max(min(room, LEASE) - length, 0)
        if limit and length > room and self._fs.unallocated(self._fd, position, length) > max(room, 0):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
