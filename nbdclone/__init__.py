"""nbdclone: linked clones of disk images, served over NBD.

Pool, Clone     the store: import bases, make clones, read and write them
Server, serve   the NBD server over a pool; ServerTLS: how it does TLS
Client          an asyncio NBD client
NBDCloneError   the root of all errors; the others are in ``nbdclone.errors``
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nbdclone.errors import NBDCloneError

if TYPE_CHECKING:
    from nbdclone.client import Client
    from nbdclone.server.host import Options
    from nbdclone.server.limits import Limit
    from nbdclone.server.server import Server, serve
    from nbdclone.server.tls import ServerTLS
    from nbdclone.store.catalog import BaseInfo, CloneInfo
    from nbdclone.store.clone import Clone
    from nbdclone.store.pool import Pool

__version__ = "0.1.0"

__all__ = [
    "BaseInfo",
    "Client",
    "Clone",
    "CloneInfo",
    "Limit",
    "NBDCloneError",
    "Options",
    "Pool",
    "Server",
    "ServerTLS",
    "serve",
]

# Loaded at first use: who wants the client does not wait for the store, and the command line waits for neither.
_HOMES = {
    "BaseInfo": "nbdclone.store.catalog",
    "Client": "nbdclone.client",
    "Clone": "nbdclone.store.clone",
    "CloneInfo": "nbdclone.store.catalog",
    "Limit": "nbdclone.server.limits",
    "Options": "nbdclone.server.host",
    "Pool": "nbdclone.store.pool",
    "Server": "nbdclone.server.server",
    "ServerTLS": "nbdclone.server.tls",
    "serve": "nbdclone.server.server",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
