"""How many connections there may be: in all, and from one address."""

from __future__ import annotations

from collections import Counter
from ipaddress import IPv6Network

from nbdclone.server.peer import Peer

# What one server takes on. A connection that does nothing costs a few KiB; the limit is there to be a limit.
MAX_CONNECTIONS = 8192
# Whoever has an IPv6 address has the 2**64 beside it.
HOST_PREFIX = 64


class Admission:
    """Counts connections. ``per_address`` (default: half of ``limit``) keeps one address from keeping all others out.

    TCP clients are told apart by their IP address (IPv6: by its /64), those of Unix sockets by their user.
    """

    def __init__(self, limit: int = MAX_CONNECTIONS, per_address: int | None = None) -> None:
        self._limit = limit
        self._per_address = max(1, limit // 2) if per_address is None else per_address
        self._total = 0
        self._counts: Counter[str] = Counter()

    def enter(self, peer: Peer) -> str | None:
        """Count a connection, or say why there is no room for it."""
        where = _where(peer)
        count = self._counts.get(where, 0)
        if self._total >= self._limit or count >= self._per_address:
            return (
                f"{where} has {count} connections (limit {self._per_address}), "
                f"all together {self._total} (limit {self._limit})"
            )
        self._total += 1
        self._counts[where] += 1
        return None

    def leave(self, peer: Peer) -> None:
        """One that entered is gone."""
        where = _where(peer)
        self._total -= 1
        self._counts[where] -= 1
        if not self._counts[where]:
            del self._counts[where]


def _where(peer: Peer) -> str:
    if peer.address is None:
        return f"uid {peer.uid}"
    if peer.address.version == 6:
        return str(IPv6Network((int(peer.address), HOST_PREFIX), strict=False))
    return str(peer.address)
