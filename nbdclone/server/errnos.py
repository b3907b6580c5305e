"""Which error number goes over the wire: decided here, and nowhere else."""

from __future__ import annotations

import errno
import os

from nbdclone.errors import CloneFailed, NBDCloneError, UsageError
from nbdclone.protocol.wire import EINVAL, EIO, ENOMEM, ENOSPC, ENOTSUP, EPERM

_BY_ERRNO = {
    errno.EPERM: EPERM,
    errno.EROFS: EPERM,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EOPNOTSUPP: ENOTSUP,
}


def nbd_errno(error: BaseException) -> int:
    """The NBD error number that says this; EIO for whatever the protocol has no number for."""
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
    """The error in a line, for a client's screen and for the log."""
    if isinstance(error, NBDCloneError):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return f"{type(error).__name__}: {error}"
