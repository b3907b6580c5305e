"""A small NBD client for asyncio: many requests in flight on one connection, from any number of tasks.

async with await Client.connect("nbd+unix:///web1?socket=/run/nbd.sock") as disk:
    await disk.pwrite(b"data", 4096)
    await disk.flush()
"""

from __future__ import annotations

import ssl
from collections.abc import Collection, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Final, Self, cast

from nbdclone.address import Address
from nbdclone.client_connection import Connection, again, answer_of, connect, name_of, say_goodbye
from nbdclone.errors import (
    LocalProtocolError,
    NBDCloneError,
    ServerRefused,
)
from nbdclone.protocol import wire
from nbdclone.protocol.block_status import Descriptors, merged
from nbdclone.protocol.client_handshake import (
    ContextsSet,
    ExportDescribed,
    ExportList,
    Opened,
)
from nbdclone.protocol.handshake_events import Negotiated
from nbdclone.protocol.pending import Completed
from nbdclone.protocol.transmission import Buffer
from nbdclone.protocol.wire import Command, CommandFlag, Errno, ExportInfo, Mode, TransmissionFlag

CONNECT_TIMEOUT_S: Final = 30.0  # connecting and the handshake together
MAX_PIECE: Final = wire.ADVERTISED_MAX_PAYLOAD  # the payload that every server takes
MAX_RANGE: Final = 1 << 30  # bytes of one request without a payload
MAX_EXTENDED_RANGE: Final = 1 << 63  # the same with extended headers: all of any disk

Names = list[str]
Pieces = list[tuple[int, int, Buffer]]  # offset, length, payload
Answers = list[bytes | bytearray | None]  # the data of each, where it was a read


class Client:
    """An export of an NBD server, opened. Made by ``connect``; an asynchronous context manager.

    ``export`` is what the server told about it, ``mode`` what kind of messages was agreed on, ``contexts`` are the
    names of the metadata contexts that it selected, by their ids. Whether a range lies in it and may be written is the
    server's to judge. Every method that sends a request raises:

        ServerRefused: the server answered with an error.
        ConnectionFailed: the connection was lost.
        RemoteProtocolError: the server broke the protocol.
        LocalProtocolError: the export does not offer this, or not for blocks as small.
    """

    def __init__(self, connection: Connection, negotiated: Negotiated) -> None:
        self._connection = connection
        self.export = negotiated.export
        self.size = negotiated.export.size
        self.flags = negotiated.export.flags
        self.read_only = negotiated.export.read_only
        self.mode = negotiated.mode
        self.contexts = dict(negotiated.contexts)
        largest = min(self.export.maximum_payload, MAX_PIECE)
        self._max_payload = max(largest - largest % self.export.minimum_block, self.export.minimum_block)
        max_range = MAX_EXTENDED_RANGE if self.mode is Mode.EXTENDED else MAX_RANGE
        self._max_range = max_range - max_range % self.export.minimum_block

    @classmethod
    async def connect(
        cls,
        uri: str,
        export: str = "",
        *,
        contexts: Collection[str] = (),
        mode: Mode = Mode.EXTENDED,
        tls: ssl.SSLContext | None = None,
        timeout: float | None = CONNECT_TIMEOUT_S,
    ) -> Self:
        """Open an export. ``uri`` is what ``Address.parse`` takes; ``export`` goes before the name in it.

        ``contexts`` are metadata contexts for ``block_status``; those that the server does not have are missing
        afterwards in the client's. ``mode`` is the most to ask for: a server that does not know it agrees on less.
        ``tls`` is how TLS is done, whatever the URI says; there is no going on without it. ``timeout`` is in seconds.

        Raises:
            UsageError: no such kind of URI, or something is wrong with the certificates that it names.
            ServerRefused: the server has no such export, or does not give it, or does without TLS.
            ConnectionFailed: there is no server, or it went away, or one side did not trust the other.
            RemoteProtocolError: it does not speak NBD as this client does.
        """
        address = Address.parse(uri)
        name = export or address.export

        async def go(connection: Connection) -> Self:
            if contexts:
                connection.handshake.set_contexts(name, contexts)
                with suppress(ServerRefused):  # a server without contexts, or without the export: the next answer tells
                    await answer_of(connection, ContextsSet, f"export {name!r}")
            connection.handshake.go(name)
            opened = await answer_of(connection, Opened, f"export {name!r}")
            return cls(connection, opened.negotiated)

        return await connect(uri, address, go, tls, timeout, mode)

    @staticmethod
    async def list(uri: str, *, tls: ssl.SSLContext | None = None, timeout: float | None = CONNECT_TIMEOUT_S) -> Names:
        """The names of the server's exports. ``uri`` and errors as in ``connect``."""

        async def ask(connection: Connection) -> Names:
            connection.handshake.list_exports()
            answer = await answer_of(connection, ExportList, "the list of exports")
            await say_goodbye(connection)
            return [name for name, _description in answer.exports]

        return await connect(uri, Address.parse(uri), ask, tls, timeout)

    @staticmethod
    async def describe(
        uri: str, export: str = "", *, tls: ssl.SSLContext | None = None, timeout: float | None = CONNECT_TIMEOUT_S
    ) -> ExportInfo:
        """What the server tells about an export, without opening it. Arguments and errors as in ``connect``."""
        address = Address.parse(uri)
        name = export or address.export

        async def ask(connection: Connection) -> ExportInfo:
            connection.handshake.info(name)
            answer = await answer_of(connection, ExportDescribed, f"export {name!r}")
            await say_goodbye(connection)
            return answer.info

        return await connect(uri, address, ask, tls, timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect in peace: the server finishes what is in flight, then closes the connection.

        Returns after CLOSE_TIMEOUT_S at the latest, with the connection closed in any case.
        """
        await self._connection.disconnect()

    async def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on."""
        pieces: Pieces = [(at, size, b"") for at, size in _split(offset, length, self._max_payload)]
        parts = [cast(bytes, part) for part in await self._run(Command.READ, 0, pieces)]
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    async def pwrite(self, data: Buffer, offset: int, *, fua: bool = False) -> None:
        """Write ``data`` at ``offset``; with ``fua`` it is durable afterwards."""
        view = memoryview(data).cast("B")
        ranges = _split(offset, len(view), self._max_payload)
        pieces: Pieces = [(at, size, view[at - offset : at - offset + size]) for at, size in ranges]
        await self._run(Command.WRITE, self._fua(fua), pieces)

    async def flush(self) -> None:
        """Make durable every write that was acknowledged before."""
        self._require(TransmissionFlag.SEND_FLUSH)
        await self.request(Command.FLUSH, 0, 0, 0)

    async def trim(self, length: int, offset: int, *, fua: bool = False) -> None:
        """Give up the content of a range."""
        self._require(TransmissionFlag.SEND_TRIM)
        await self._run_range(Command.TRIM, self._fua(fua), length, offset)

    async def zero(
        self, length: int, offset: int, *, fua: bool = False, no_hole: bool = False, fast: bool = False
    ) -> None:
        """Write zeros. ``no_hole`` keeps the range allocated; ``fast`` fails with ENOTSUP rather than be slow."""
        self._require(TransmissionFlag.SEND_WRITE_ZEROES)
        flags = self._fua(fua)
        if no_hole:
            flags |= CommandFlag.NO_HOLE
        if fast:
            self._require(TransmissionFlag.SEND_FAST_ZERO)
            flags |= CommandFlag.FAST_ZERO
        await self._run_range(Command.WRITE_ZEROES, flags, length, offset)

    async def cache(self, length: int, offset: int) -> None:
        """Tell the server that a range will be read soon."""
        self._require(TransmissionFlag.SEND_CACHE)
        # Some servers (qemu-nbd) take no more of it than of data.
        pieces: Pieces = [(at, size, b"") for at, size in _split(offset, length, self._max_payload)]
        await self._run(Command.CACHE, 0, pieces)

    async def block_status(
        self, length: int, offset: int, *, contexts: Collection[str] | None = None
    ) -> dict[str, Descriptors]:
        """What stands where in a range: in each of the contexts, (length, status) of consecutive extents.

        They cover the range, and neighbours differ. The status is a number that its context gives a meaning; in
        ``base:allocation`` the bits are HOLE (1) and ZERO (2). ``contexts`` limits the answer to some of those that
        were selected; a server that knows how is then asked for no more.
        """
        wanted = {number: name for number, name in self.contexts.items() if contexts is None or name in contexts}
        if not wanted or not set(contexts or ()) <= set(wanted.values()):
            raise LocalProtocolError(f"export {self.export.name!r} was opened without such metadata contexts")
        offered = self.mode is Mode.EXTENDED and self.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD
        asked = list(wanted) if contexts is not None and offered else None
        told: dict[str, Descriptors] = {name: [] for name in wanted.values()}
        end = offset + length
        while offset < end:
            size = min(end - offset, self._max_range)
            self._check_blocks(offset, size)
            waiter = await self._connection.submit(Command.BLOCK_STATUS, 0, offset, size, contexts=asked)
            extents = _completed(await waiter, Command.BLOCK_STATUS, offset, size).extents
            assert extents is not None
            # As far as all contexts tell: one may have been described further than another, or than was asked.
            size = min(size, *(sum(count for count, _status in extents[number]) for number in wanted))
            for number, name in wanted.items():
                told[name] += _first(extents[number], size)
            offset += size
        return {name: merged(descriptors) for name, descriptors in told.items()}

    async def request(
        self, command: int, flags: int, offset: int, length: int, payload: Buffer = b""
    ) -> bytes | bytearray | None:
        """One request as it is, neither checked nor split: for those who want to see what the server says to it.

        Returns the data of a read, and None otherwise.
        """
        waiter = await self._connection.submit(command, flags, offset, length, payload)
        return _result(await waiter, command, offset, length)

    async def _run_range(self, command: int, flags: int, length: int, offset: int) -> None:
        pieces: Pieces = [(at, size, b"") for at, size in _split(offset, length, self._max_range)]
        await self._run(command, flags, pieces)

    async def _run(self, command: int, flags: int, pieces: Pieces) -> Answers:
        """Have the pieces of one request in flight together, and wait for all of them whatever comes of one."""
        for offset, length, _payload in pieces:
            self._check_blocks(offset, length)
        waiters = [await self._connection.submit(command, flags, *piece) for piece in pieces]
        answers = [await waiter for waiter in waiters]
        return [
            _result(answer, command, offset, length)
            for answer, (offset, length, _payload) in zip(answers, pieces, strict=True)
        ]

    def _check_blocks(self, offset: int, length: int) -> None:
        if (offset | length) & (self.export.minimum_block - 1):
            raise LocalProtocolError(f"the export takes nothing but blocks of {self.export.minimum_block} bytes")

    def _require(self, flag: TransmissionFlag) -> None:
        if not self.flags & flag:
            raise LocalProtocolError(f"export {self.export.name!r} does not offer {flag.name}")

    def _fua(self, fua: bool) -> int:
        if not fua:
            return 0
        self._require(TransmissionFlag.SEND_FUA)
        return CommandFlag.FUA


def _split(offset: int, length: int, limit: int) -> Iterator[tuple[int, int]]:
    """The range in pieces of at most ``limit`` bytes: (offset, length) of each."""
    if length < 0:
        raise LocalProtocolError(f"a length of {length} bytes")
    end = offset + length
    while offset < end:
        size = min(limit, end - offset)
        yield offset, size
        offset += size


def _first(descriptors: Descriptors, length: int) -> Iterator[tuple[int, int]]:
    """The descriptors of the first ``length`` bytes."""
    for count, status in descriptors:
        if not length:
            return
        count = min(count, length)
        yield count, status
        length -= count


def _result(answer: Completed | NBDCloneError, command: int, offset: int, length: int) -> bytes | bytearray | None:
    return _completed(answer, command, offset, length).data


def _completed(answer: Completed | NBDCloneError, command: int, offset: int, length: int) -> Completed:
    """The answer to a request that succeeded; what failed is raised."""
    if isinstance(answer, NBDCloneError):
        raise again(answer)
    if answer.error:
        what = f"{name_of(Command, command)} of {length} bytes at {offset}"
        name = name_of(Errno, answer.error)
        raise ServerRefused(f"{what}: {name}{answer.message and ': '}{answer.message}", answer.error)
    return answer
