"""Which worker has which export, and where connections go: the supervisor's book, without a socket in it.

An export belongs to one worker from the first claim to it until the last claim is released, which the worker does when
the clone is closed: so no two workers ever have it open. A connection claims one export at a time.

A worker's load is what it will be busy with: exports that it has, handshakes that it makes, clients under TLS that it
relays. How much an export is used is not known when it is given away, nor can it be moved later.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class _Worker:
    ready: bool = False  # may connections go to it?
    open: bool = True  # may it be given something new?
    exports: set[str] = field(default_factory=set)
    handshakes: set[int] = field(default_factory=set)
    relays: set[int] = field(default_factory=set)

    @property
    def load(self) -> int:
        return len(self.exports) + len(self.handshakes) + len(self.relays)


@dataclass(slots=True)
class _Connection:
    server: int | None  # the worker that makes its handshake or serves it, until that end is gone
    relay: int | None = None  # the worker that has its TLS, if it was moved
    claimed: str | None = None


class Owners:
    """Workers and connections have numbers, which are never used again."""

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}
        self._owners: dict[str, int] = {}
        self._claims: dict[str, set[int]] = {}
        self._connections: dict[int, _Connection] = {}

    # Workers

    def add(self, worker: int) -> None:
        """It is starting: exports may be given to it, whose connections then wait until it is ready."""
        self._workers[worker] = _Worker()

    def ready(self, worker: int) -> None:
        """It can make handshakes."""
        self._workers[worker].ready = True

    def close(self, worker: int) -> None:
        """It is dying, or to end: it is given nothing new, and keeps what it has."""
        self._workers[worker].open = False

    def remove(self, worker: int) -> tuple[list[str], list[int]]:
        """It is dead: what exports it had, and which connections are gone with it."""
        exports = sorted(self._workers.pop(worker).exports)
        for name in exports:
            for number in self._claims.pop(name):
                self._connections[number].claimed = None
            del self._owners[name]
        gone = []
        for number, connection in list(self._connections.items()):
            ends = ("relay", connection.relay), ("server", connection.server)
            if any(self.leave(number, relay=end == "relay") for end, at in ends if at == worker):
                gone.append(number)
        return exports, gone

    @property
    def available(self) -> list[int]:
        """The workers to which connections may go."""
        return [number for number, worker in self._workers.items() if worker.open and worker.ready]

    @property
    def open(self) -> bool:
        """Is there a worker that may be given something new?"""
        return any(worker.open for worker in self._workers.values())

    def exports_of(self, worker: int) -> list[str]:
        """The exports that it has."""
        return sorted(self._workers[worker].exports)

    def without_exports(self) -> bool:
        """Is there a worker, to be given something, that has no export yet?"""
        return any(worker.open and not worker.exports for worker in self._workers.values())

    def idle(self) -> list[int]:
        """The workers that have nothing to do."""
        busy = {at for connection in self._connections.values() for at in (connection.server, connection.relay)}
        busy |= set(self._owners.values())
        return [number for number in self.available if number not in busy]

    # Connections

    def arrive(self, number: int) -> int:
        """A new connection: the worker that makes its handshake. There must be one available."""
        worker = self._least_loaded(self.available)
        self._connections[number] = _Connection(worker)
        self._workers[worker].handshakes.add(number)
        return worker

    def enlist(self, number: int) -> None:
        """Something that claims an export as a connection does, and comes from no worker."""
        self._connections[number] = _Connection(None)

    def claim(self, number: int, name: str, *, here: bool = False) -> int:
        """The connection wants this export, and no other any more: the worker that has it, or will have it.

        A new one goes to the worker that asks, unless another has less to do; ``here``: to that one in any case. There
        must be one that is open.
        """
        connection = self._connections[number]
        if connection.claimed == name:
            return self._owners[name]
        asking = connection.server
        if asking in self._workers:
            self._workers[asking].handshakes.discard(number)
        if name not in self._owners:
            candidates = [number for number, worker in self._workers.items() if worker.open]
            if here and asking is not None:
                candidates = [asking]
            self._owners[name] = owner = self._least_loaded(candidates, asking)
            self._workers[owner].exports.add(name)
            self._claims[name] = set()
        self._claims[name].add(number)
        connection.claimed = name
        return self._owners[name]

    def move(self, number: int, worker: int, *, relayed: bool) -> None:
        """The connection goes on in this worker; ``relayed``: the one that had it keeps the end to the client."""
        connection = self._connections[number]
        if relayed and connection.server in self._workers:
            connection.relay = connection.server
            self._workers[connection.server].relays.add(number)
        connection.server = worker

    def release(self, number: int) -> None:
        """The connection's export is closed for it, and it may ask for another."""
        connection = self._connections[number]
        if connection.claimed is None:
            return
        claims = self._claims[connection.claimed]
        claims.discard(number)
        if not claims:
            del self._claims[connection.claimed]
            owner = self._owners.pop(connection.claimed)
            self._workers[owner].exports.discard(connection.claimed)
        connection.claimed = None
        if connection.server in self._workers:
            self._workers[connection.server].handshakes.add(number)

    def leave(self, number: int, *, relay: bool = False) -> bool:
        """One end of the connection is gone, the one that serves it or the ``relay``. Was it the last?"""
        connection = self._connections[number]
        if relay:
            if connection.relay in self._workers:
                self._workers[connection.relay].relays.discard(number)
            connection.relay = None
        else:
            self.release(number)
            if connection.server in self._workers:
                self._workers[connection.server].handshakes.discard(number)
            connection.server = None
        if connection.server is None and connection.relay is None:
            del self._connections[number]
            return True
        return False

    def has(self, name: str) -> bool:
        """Does a worker have this export, or will have it?"""
        return name in self._owners

    def __contains__(self, number: object) -> bool:
        return number in self._connections

    def _least_loaded(self, candidates: list[int], preferred: int | None = None) -> int:
        return min(candidates, key=lambda worker: (self._workers[worker].load, worker != preferred))
