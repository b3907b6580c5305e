"""One connection from its first byte to its last: the handshake, then a session."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from nbdclone.errors import NBDCloneError, RemoteProtocolError
from nbdclone.protocol.block_status import snapshot_in
from nbdclone.protocol.handshake import ServerHandshake
from nbdclone.protocol.handshake_events import FindSnapshots, ListExports, OpenExport, Purpose, StartTLS
from nbdclone.protocol.wire import NBD_REP_ERR_POLICY, NBD_REP_ERR_UNKNOWN, ExportInfo, transmission_flags
from nbdclone.server.access import refused_by
from nbdclone.server.block_status import Context, Contexts
from nbdclone.server.errnos import describe, refusal
from nbdclone.server.export import Export
from nbdclone.server.peer import Peer
from nbdclone.server.relay import Relay
from nbdclone.server.session import Session
from nbdclone.server.tls import AnySocket, TLSSocket
from nbdclone.store.names import split_name

if TYPE_CHECKING:
    from nbdclone.server.host import Host

logger = logging.getLogger("nbdclone")

# How long a client may take over its part of the handshake. Real ones take milliseconds.
HANDSHAKE_DEADLINE_S = 10.0
RECEIVE_SIZE = 64 << 10
# How long, at a shutdown, a client may go on sending requests that are not taken any more.
LINGER_S = 1.0


class Opener(Protocol):
    """What a connection gets its export from."""

    async def acquire(self, name: str, *, refused: bool = False) -> Export:
        """The export of that name, to be given back. Raises NBDCloneError, OSError; Elsewhere.

        ``refused``: the name is one that nobody asked for, and is only looked for.
        """

    async def release(self, export: Export) -> None:
        """Give it back."""

    async def names(self, shown: Callable[[str], bool]) -> list[str]:
        """The names of the exports there are, as far as they are to be shown."""

    async def snapshots_beneath(self, name: str) -> dict[str, bytes]:
        """The snapshots on which an export stands: of each the layer's id, by its name. None if there is no
        export. Raises StorageError, OSError.
        """


class Elsewhere(Exception):
    """Another process has the export. ``take`` gives it the connection: its socket, of which a copy is made, the state
    to go on from, and whether this process stays in between, with the TLS that cannot be moved."""

    def __init__(self, take: Callable[[socket.socket, dict[str, Any], bool], None]) -> None:
        super().__init__()
        self.take = take


class Connection:
    """A client's connection; ``serve`` is its whole life, and the task that runs it owns everything in it.

    ``moved`` is the state in which another process gave it away.
    """

    def __init__(
        self, sock: socket.socket, peer: Peer, exports: Opener, server: Host, moved: dict[str, Any] | None = None
    ) -> None:
        self._raw = sock
        self._sock: AnySocket = sock  # the same, or what TLS makes of it
        self._peer = peer
        self._exports = exports
        self._server = server
        self._loop = asyncio.get_running_loop()
        if moved is None:
            self._handshake = ServerHandshake(server.tls_mode)
        else:
            self._handshake = ServerHandshake.resumed(moved["handshake"])
        self._deadline = self._loop.time() + (HANDSHAKE_DEADLINE_S if moved is None else moved["time_left_s"])
        self._session: Session | None = None
        self._export: Export | None = None
        self._contexts: Contexts = ()  # that were selected for it
        self._relay: Relay | None = None
        self._task: asyncio.Task[None] | None = None
        self._drained = False  # it is the server that ends this connection

    async def serve(self) -> None:
        """Serve the client until it goes. Whatever happens stays with this connection."""
        self._task = asyncio.current_task()
        try:
            if not self._drained:
                await self._serve()
        except (OSError, TimeoutError) as error:
            logger.debug("%s: handshake ended: %s", self._peer, str(error) or "deadline")
        except RemoteProtocolError as error:
            self._server.scratch.quiet.say("handshake", "%s: %s", self._peer, error)
        except Exception:
            logger.exception("%s: a defect of the server", self._peer)
        finally:
            # The export first: a client that sees its connection closed may count on the clone being free.
            try:
                if self._export is not None:
                    await asyncio.shield(self._exports.release(self._export))
                ended_here = self._drained if self._session else self._relay is not None and self._relay.delivered
                if ended_here:
                    await self._linger()
            finally:
                self._sock.close()

    @property
    def export_name(self) -> str | None:
        """The export that it has."""
        return None if self._export is None else self._export.clone.name

    @property
    def task(self) -> asyncio.Task[None] | None:
        """What ends when it has ended."""
        return self._task

    @property
    def since(self) -> float:
        """When it came, in Unix seconds."""
        return self._peer.since

    def record(self) -> dict[str, Any]:
        """Who the client is, as JSON can hold it."""
        record = self._peer.record()
        return {"peer": record.pop("label"), **record}

    def drain(self) -> None:
        """Answer what was asked and end; a handshake ends at once. One that is relayed ends when its owner ends it."""
        self._drained = True
        if self._session is not None:
            self._session.drain()
        elif self._task is not None and self._relay is None:
            self._task.cancel()

    def abandon(self) -> None:
        """End at once."""
        if self._session is not None:
            self._session.abandon()
        elif self._task is not None:
            self._task.cancel()

    async def _linger(self) -> None:
        """Give the last replies time to arrive: closing a TCP socket that holds unread requests throws them away."""
        if self._raw.family == socket.AF_UNIX:
            return
        with contextlib.suppress(OSError, TimeoutError):
            self._sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(LINGER_S):
                while await self._loop.sock_recv(self._raw, RECEIVE_SIZE):
                    pass

    async def _serve(self) -> None:
        handshake = self._handshake
        while handshake.finished is None:
            event = handshake.next_event() or handshake.unanswered  # the latter has been moved with it
            if isinstance(event, ListExports):
                handshake.send_list([(name, "") for name in await self._exports.names(self._may_have)])
            elif isinstance(event, FindSnapshots):
                with self._own_time():
                    handshake.send_contexts(await self._snapshots(event.export))
            elif isinstance(event, OpenExport):
                try:
                    await self._answer(handshake, event)
                except Elsewhere as elsewhere:
                    await self._move(handshake, elsewhere)
                    return
            async with asyncio.timeout_at(self._deadline):
                await self._send_all(handshake)
                if handshake.closed:
                    return
                if isinstance(event, StartTLS):
                    await self._start_tls()
                    handshake.tls_started()
                elif event is None and handshake.finished is None:
                    data = await self._receive()
                    if not data:
                        return
                    handshake.receive_data(data)
        assert self._export is not None
        agreed, scratch = handshake.finished, self._server.scratch
        self._session = Session(self._sock, self._peer, self._export, agreed, self._contexts, scratch, self._loop)
        if self._drained:  # while the last option was answered
            self._session.drain()
        await self._session.serve(handshake.trailing_data())

    async def _move(self, handshake: ServerHandshake, elsewhere: Elsewhere) -> None:
        """Give the connection to the process that has the export, or relay to it what comes out of TLS."""
        async with asyncio.timeout_at(self._deadline):
            await self._send_all(handshake)
        state = {"handshake": handshake.state(), "time_left_s": self._deadline - self._loop.time()}
        state["peer"] = self._peer.record()
        if not isinstance(self._sock, TLSSocket):
            elsewhere.take(self._raw, state, False)
            return
        near, far = socket.socketpair()
        with far:
            elsewhere.take(far, state, True)
        scratch = self._server.scratch.received.view
        self._relay = Relay(self._sock, self._raw, self._peer.label, near, scratch, self._loop)
        await self._relay.run()

    async def _send_all(self, handshake: ServerHandshake) -> None:
        while messages := handshake.data_to_send():
            for message in messages:
                await self._send(message)
            await asyncio.sleep(0)  # a list of thousands is sent between what others do

    async def _send(self, message: bytes) -> None:
        if isinstance(self._sock, TLSSocket):
            await self._sock.sendall(message)
        else:
            await self._loop.sock_sendall(self._sock, message)

    async def _receive(self) -> bytes:
        if isinstance(self._sock, TLSSocket):
            return await self._sock.recv(RECEIVE_SIZE)
        return await self._loop.sock_recv(self._sock, RECEIVE_SIZE)

    async def _start_tls(self) -> None:
        assert self._server.tls is not None
        self._sock = secured = TLSSocket(self._raw, self._server.tls, self._loop)
        await secured.handshake()
        self._peer = replace(self._peer, subject=secured.subject or None, tls=secured.version)
        logger.debug("%s: %s, certificate: %r", self._peer, secured.version, secured.subject)

    async def _answer(self, handshake: ServerHandshake, event: OpenExport) -> None:
        """Open the export that the client names."""
        with self._own_time():
            await self._open(handshake, event)

    @contextlib.contextmanager
    def _own_time(self) -> Iterator[None]:
        """The time that this takes is not the client's."""
        began = self._loop.time()
        try:
            yield
        finally:
            self._deadline += self._loop.time() - began

    async def _snapshots(self, export: str) -> list[str]:
        """The snapshots beneath an export, as far as this client may know that they are there.

        Who may not have the export gets the answer for one that is not there, as slowly (see ``_open``).
        """
        decoy = self._server.settings.access.decoy(export)
        found = await self._beneath(export if self._may_have(export) else decoy)
        clone = split_name(export)[0]
        return [name for name in found if self._may_have(f"{clone}@{name}")]

    async def _bind(self, export: str, contexts: Sequence[tuple[int, str]]) -> Contexts:
        """The contexts, with what their names mean at this moment: another snapshot may be made under one later."""
        since = {name: snapshot_in(name) for _id, name in contexts}
        found = await self._beneath(export) if any(since.values()) else {}
        return tuple(Context(number, name, found.get(since[name] or "", b"")) for number, name in contexts)

    async def _beneath(self, export: str) -> dict[str, bytes]:
        """The snapshots beneath an export; where that cannot be read, none are told of."""
        try:
            return await self._exports.snapshots_beneath(export)
        except (NBDCloneError, OSError) as error:
            self._log_refusal(export, describe(error), NBD_REP_ERR_POLICY)
            return {}

    async def _open(self, handshake: ServerHandshake, event: OpenExport) -> None:
        # Who may not have it must not learn that it is there, by the time that the answer takes either: another name is
        # looked for in its place, which nobody has, and all else is as if there was no such export.
        access = self._server.settings.access
        decoy = access.decoy(event.name)
        rule = access.refusing_rule(event.name, self._peer)
        try:
            if rule is None:
                export = await self._exports.acquire(event.name)
            else:
                export = await self._exports.acquire(decoy, refused=True)
        except (NBDCloneError, OSError) as error:
            text, reply = refusal(error, event.name, self._peer)
            self._log_refusal(event.name, describe(error) if rule is None else refused_by(rule, self._peer), reply)
            handshake.refuse_export(text, reply)
        else:
            self._export = export
            self._contexts = await self._bind(event.name, handshake.selected_for(event.name))
            clone = export.clone
            handshake.accept_export(ExportInfo(event.name, clone.size, transmission_flags(clone.read_only)))
            if event.purpose is Purpose.INFO:
                self._export = None
                await asyncio.shield(self._exports.release(export))

    def _log_refusal(self, name: str, reason: str, reply: int) -> None:
        """Missing exports and those that are not for this client are of one kind: neither silences the other alone."""
        kind = "unknown" if reply == NBD_REP_ERR_UNKNOWN else f"broken {name}"  # there is one of that name
        self._server.scratch.quiet.say(kind, "%s: export %r: %s", self._peer, name[:100], reason)

    def _may_have(self, name: str) -> bool:
        return self._server.settings.access.refusing_rule(name, self._peer) is None
