"""Between this program and qemu's: Unix sockets in a directory that nobody else can enter."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote

from nbdclone.client import Client
from nbdclone.errors import ConnectionFailed, InUse, StorageError
from nbdclone.server.host import Options
from nbdclone.server.server import Server
from nbdclone.store.clone import Clone
from nbdclone.store.image import Progress
from nbdclone.store.pool import Pool
from nbdclone.store.qemu import as_name, complaint_of, find_program

T = TypeVar("T")

START_TIMEOUT_S = 30.0  # of qemu-nbd: it reads the image's first tables
STOP_TIMEOUT_S = 60.0  # it has flushed before
POLL_S = 0.01
PROGRESS_PARTS = 10_000  # qemu-img tells hundredths of a percent
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")
_LOCKED = re.compile(r"Failed to get .*lock")
_FULL = "No space left on device"


class ReadOnly(Clone):
    """The same disk, read-only; closing it leaves open what belongs to the other."""

    def __init__(self, clone: Clone) -> None:
        super().__init__(clone.name, clone.layers)
        self._delta = None

    def close(self) -> None:
        """Nothing here is ours."""


class _OneDisk(Pool):
    """What a server takes for a pool: one disk, which is open already, and settings that say nothing."""

    def __init__(self, directory: Path, clone: Clone) -> None:
        super().__init__(directory)
        self._clone = clone

    @contextmanager
    def served(self) -> Iterator[int]:
        yield -1

    def names(self) -> list[str]:
        return [self._clone.name]

    def require(self, name: str) -> None:
        pass

    def open_clone(self, name: str) -> Clone:
        return ReadOnly(self._clone)


@asynccontextmanager
async def served(clone: Clone) -> AsyncIterator[str]:
    """Serve an open clone, read-only, to whoever is told the URI that this gives."""
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as directory:
        socket = Path(directory, "socket")
        async with Server(_OneDisk(Path(directory), clone), sockets=[socket], options=Options(replay=False)):
            yield f"nbd+unix:///{quote(clone.name)}?socket={quote(str(socket))}"


async def qemu_img(arguments: Sequence[str], what: str, progress: Progress | None = None) -> None:
    """Run qemu-img to its end. Raises StorageError with ``what`` and its complaint; OSError(ENOSPC) for a full disk."""
    program = find_program("qemu-img", "makes images of other formats")
    with tempfile.TemporaryFile() as complaints:
        process = await asyncio.create_subprocess_exec(
            program, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=complaints
        )
        try:
            assert process.stdout is not None
            while piece := await process.stdout.read(4096):
                if progress and (percent := _PERCENT.findall(piece)):
                    progress(int(float(percent[-1]) * 100), PROGRESS_PARTS)
            if await process.wait() != 0:
                _fail(_text(complaints), what)
        finally:
            await _end(process)


@asynccontextmanager
async def opened_by_qemu(
    opened: dict[str, Any], what: str, *, read_only: bool, contexts: Sequence[str] = ()
) -> AsyncIterator[Client]:
    """An image that qemu-nbd has open, as ``opened`` says (:func:`nbdclone.store.qemu.node`), and a client of it.

    When it is left without an error, qemu-nbd has written and closed the image. Raises InUse if another program has it
    open, StorageError with ``what`` and the complaint.
    """
    program = find_program("qemu-nbd", "opens images of other formats")
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as directory, tempfile.TemporaryFile() as complaints:
        socket = str(Path(directory, "socket"))
        options = ["--read-only", "--allocation-depth"] if read_only else ["--discard=unmap"]
        process = await asyncio.create_subprocess_exec(
            program, *options, "--socket", socket, as_name(opened),
            stdin=asyncio.subprocess.DEVNULL, stdout=complaints, stderr=complaints,
        )  # fmt: skip
        try:
            async with await _connect(socket, process, complaints, what, contexts) as client:
                yield client
            try:
                if await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S) != 0:
                    _fail(_text(complaints), what)
            except TimeoutError:
                raise StorageError(f"{what}: qemu-nbd did not end in {STOP_TIMEOUT_S:.0f} s") from None
        finally:
            await _end(process)


async def _connect(
    socket: str, process: asyncio.subprocess.Process, complaints: Any, what: str, contexts: Sequence[str]
) -> Client:
    """Connect to qemu-nbd as soon as it listens: the socket is there a moment earlier."""
    deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while True:
        if process.returncode is not None:
            _fail(_text(complaints), what)
        try:
            return await Client.connect(socket, contexts=contexts)
        except ConnectionFailed as error:
            if asyncio.get_running_loop().time() > deadline:
                raise StorageError(f"{what}: qemu-nbd did not start in {START_TIMEOUT_S:.0f} s ({error})") from None
        await asyncio.sleep(POLL_S)


async def in_turn(work: Iterable[Coroutine[Any, Any, T]], limit: int, done: Callable[[T], object]) -> None:
    """Have up to ``limit`` of these under way; ``done`` gets each one's result in its turn. An error ends it."""
    under_way: deque[asyncio.Task[T]] = deque()
    left = iter(work)
    try:
        while (each := next(left, None)) is not None:
            under_way.append(asyncio.create_task(each))
            if len(under_way) == limit:
                done(await under_way.popleft())
        while under_way:
            done(await under_way.popleft())
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _fail(complaint: str, what: str) -> NoReturn:
    if _FULL in complaint:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if _LOCKED.search(complaint):
        raise InUse(f"{what}: it is open in another program (a running guest?): stop that first")
    raise StorageError(f"{what}: {complaint_of(complaint)}")


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
