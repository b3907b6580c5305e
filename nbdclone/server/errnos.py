"""What a client is told when something goes wrong, number and text: decided here, and nowhere else."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from nbdclone.errors import CloneFailed, InvalidName, NBDCloneError, NotFound, UsageError
from nbdclone.protocol.wire import (
    EINVAL,
    EIO,
    ENOMEM,
    ENOSPC,
    EPERM,
    NBD_REP_ERR_POLICY,
    NBD_REP_ERR_UNKNOWN,
)

if TYPE_CHECKING:
    from nbdclone.server.peer import Peer

_BY_ERRNO = {
    errno.EPERM: EPERM,
    errno.EROFS: EPERM,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
}


def nbd_errno(error: BaseException) -> int:
    """The NBD error number that says this; EIO for whatever the protocol has no number for.

    ENOTSUP is none of them: it is for a FAST_ZERO that would be slow, and told before anything is tried.
    """
    if isinstance(error, MemoryError):
        return ENOMEM
    if isinstance(error, CloneFailed):
        return EIO
    if isinstance(error, UsageError):
        return EINVAL
    if isinstance(error, OSError):
        return _BY_ERRNO.get(error.errno or 0, EIO)
    return EIO


def describe(error: BaseException) -> str:
    """The error in a line, with all the facts: for the log."""
    if isinstance(error, NBDCloneError):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"{type(error).__name__}: {error}"


def tell(error: BaseException, peer: Peer) -> str:
    """What the client is told of a request that failed: strangers hear nothing of files and processes."""
    if peer.trusted or (isinstance(error, OSError) and error.errno):
        return describe(error)
    return "this request failed: see the server's log"


def refusal(error: BaseException, export_name: str, peer: Peer) -> tuple[str, int]:
    """What the client is told that cannot have an export: the text, and the type of the reply.

    Whether there is no such export or the client is not to know of it, nothing but the name that it gave goes into the
    text. Why an export cannot be opened is for whoever may read the log.
    """
    if not export_name:
        return "give an export's name: there is no default export", NBD_REP_ERR_UNKNOWN
    if isinstance(error, (NotFound, InvalidName)):
        return f"there is no base or clone {export_name[:100]!r}", NBD_REP_ERR_UNKNOWN
    if peer.trusted:
        return describe(error), NBD_REP_ERR_POLICY
    return "this export cannot be opened: see the server's log", NBD_REP_ERR_POLICY
