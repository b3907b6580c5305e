"""What can go wrong, and whose fault it is.

    NBDCloneError
    ├── UsageError                 the caller asked for something that cannot be: nothing was changed
    │   ├── InvalidName
    │   ├── NotFound
    │   ├── NameTaken
    │   ├── InUse                  dependants, a lock, another server: the message names who
    │   ├── InvalidImage           an image that cannot become a base
    │   └── InvalidStream          a stream of 'send' that is cut off, changed, or none
    ├── StorageError               files, disks: what is stored is not what it should be, or cannot be reached
    │   ├── CorruptDelta
    │   ├── UnsupportedFormat      made by a newer nbdclone
    │   ├── BaseChanged            a base is not what its clones were made from
    │   ├── FileTooLarge           the file system cannot hold a file of that size
    │   └── CloneFailed            a sync failed earlier: the clone takes no more writes until it is reopened
    ├── Interrupted                a verb was stopped before its end: it is undone, or can be gone on with
    ├── ProtocolError
    │   ├── RemoteProtocolError    the peer broke the protocol
    │   └── LocalProtocolError     this side was used in a way that would break it
    ├── ConnectionFailed           (client) also a ConnectionError
    └── ServerRefused              (client) the server answered an option or a request with an error

Every message is one line, states the facts, and is fit to be shown to a person as it is.
"""

from __future__ import annotations


class NBDCloneError(Exception):
    """The root of everything that nbdclone raises on purpose."""


class UsageError(NBDCloneError):
    """The caller asked for something that cannot be done. Nothing was changed."""


class InvalidName(UsageError):
    """A name that no base or clone can have."""


class NotFound(UsageError):
    """There is no base, clone, pool or file of that name."""


class NameTaken(UsageError):
    """A base or clone of that name exists already."""


class InUse(UsageError):
    """Somebody else holds it or depends on it; the message says who."""


class InvalidImage(UsageError):
    """An image that cannot become a base: empty, truncated, unreadable, of an unknown format."""


class InvalidStream(UsageError):
    """A stream of 'send' that is cut off, changed or makes no sense; or no stream at all."""


class StorageError(NBDCloneError):
    """What is stored is not what it should be, or cannot be reached."""


class CorruptDelta(StorageError):
    """A delta file whose header or map cannot be believed."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class UnsupportedFormat(StorageError):
    """A file that a newer version of nbdclone made."""


class BaseChanged(StorageError):
    """A base is not what it was when its clones were made."""


class FileTooLarge(StorageError):
    """The file system cannot hold a file as large as this disk needs."""


class CloneFailed(StorageError):
    """A sync of this clone failed: what the disk holds is unknown, so no more writes are taken."""


class Interrupted(NBDCloneError):
    """A verb was stopped before its end. It is undone, or the same verb goes on from where it was."""


class ProtocolError(NBDCloneError):
    """The NBD protocol was broken."""


class RemoteProtocolError(ProtocolError):
    """The peer sent something that the protocol forbids."""


class LocalProtocolError(ProtocolError):
    """This side was used in a way that would break the protocol."""


class ConnectionFailed(NBDCloneError, ConnectionError):
    """The connection could not be made, or was lost; what was in flight may or may not have been done."""


class ServerRefused(NBDCloneError):
    """The server answered with an error.

    ``code`` is the number on the wire: an option's reply type (``NBD_REP_ERR_*``) or a command's
    error (``NBD_E*``).
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
