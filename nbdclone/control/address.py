"""The control socket of a pool: where it is, for both ends.

A socket's address holds 107 bytes, and a pool's path may be longer: so it is named by way of a descriptor of the pool's
directory. Who may connect is what the file's mode says: the owner of the server, and root.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from nbdclone.store.places import CONTROL_SOCKET, NEW_CONTROL_SOCKET

BACKLOG = 128
MODE = 0o600
# A server that does not answer the connection for so long hangs. It accepts by itself, whatever else it does.
CONNECT_TIMEOUT_S = 10.0


@contextlib.contextmanager
def _inside(pool: Path) -> Iterator[str]:
    fd = os.open(pool, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def listen(pool: Path) -> socket.socket:
    """Listen; what a dead server has left is replaced. To be called by the one who has the pool's lock. Raises OSError.

    Nobody can connect before it has its mode: a socket that does not listen refuses.
    """
    new = pool / NEW_CONTROL_SOCKET
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            new.unlink()
        with _inside(pool) as here:
            sock.bind(f"{here}/{NEW_CONTROL_SOCKET}")
        new.chmod(MODE)
        sock.listen(BACKLOG)
        sock.setblocking(False)
        new.rename(pool / CONTROL_SOCKET)
    except BaseException:
        sock.close()
        raise
    return sock


def remove(pool: Path) -> None:
    """Nobody listens any more."""
    with contextlib.suppress(OSError):
        (pool / CONTROL_SOCKET).unlink()


def connect(pool: Path) -> socket.socket | None:
    """A connection to the server of the pool; None where there is none, or none that this user may ask.

    Raises OSError.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_TIMEOUT_S)
        with _inside(pool) as here:
            sock.connect(f"{here}/{CONTROL_SOCKET}")
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError, PermissionError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock
