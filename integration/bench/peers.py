"""The servers, and how each is run: one class for each.

A peer is prepared once. For each measurement it makes a fresh clone of the base in a directory of its own, serves it
on a Unix socket, and is ended, by its process id, before the next one has its turn.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.packages import program

REPOSITORY = Path(__file__).resolve().parents[2]

READY_DEADLINE_S = 30.0
STOP_DEADLINE_S = 60.0  # a server flushes what it has before it goes
PREPARE_DEADLINE_S = 600.0


class PeerFailed(Exception):
    """A server could not be started, or died; with what it wrote to stderr."""


@dataclass(frozen=True, slots=True)
class Running:
    pid: int
    uri: str


class Peer(ABC):
    """A server of clones. ``name`` stands in the tables."""

    name: str
    programs: Sequence[str] = ()
    """What has to be installed for it."""
    durable_flush = True
    """Does an acknowledged flush survive a power cut? If not, its synced writes are not comparable."""

    def prepare(self, base: Path, directory: Path) -> None:
        """Get ready to make clones of the raw image ``base``. ``directory`` is the peer's own, for the whole run."""
        self.base = base
        self.directory = directory
        self.environment = dict(os.environ)

    @property
    def image(self) -> Path:
        """The file that its clones read what they have not changed from."""
        return self.base

    @abstractmethod
    def command(self, directory: Path, socket_path: Path) -> list[str]:
        """Make a fresh clone in ``directory``; return the command that serves it as ``export`` on the socket."""

    @abstractmethod
    def version(self) -> str: ...

    @property
    def export(self) -> str:
        return "disk"

    def discard(self) -> None:  # noqa: B027 - most have nothing to do
        """Remove what the last clone left outside its directory."""

    @contextlib.contextmanager
    def serving(self, directory: Path) -> Iterator[Running]:
        """Serve a fresh clone. Raises PeerFailed."""
        # Not in `directory`: the path of a Unix socket has to be shorter than 108 bytes.
        with tempfile.TemporaryDirectory(prefix="bench-") as short:
            socket_path = Path(short, "socket")
            command = self.command(directory, socket_path)
            # A server that keeps its overlay in a temporary file keeps it on the disk that all are measured on.
            environment = self.environment | {"TMPDIR": str(directory)}
            complaints = directory / "stderr"
            with open(complaints, "wb") as stderr:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=environment
                )
            try:
                _await_socket(process, socket_path)
                yield Running(process.pid, f"nbd+unix:///{self.export}?socket={socket_path}")
                if process.poll() is not None:
                    raise PeerFailed(f"{self.name} exited with status {process.returncode} during the measurement")
            except PeerFailed as failure:
                raise PeerFailed(f"{failure}\n{complaints.read_text(errors='replace')[-2000:]}") from None
            finally:
                _end(process)
                self.discard()


class Nbdclone(Peer):
    """nbdclone as its users run it: a pool, `nbdclone clone`, `nbdclone serve`. ``tree`` is the checkout to run."""

    name = "nbdclone"

    def __init__(self, tree: Path = REPOSITORY, name: str = name) -> None:
        self.name = name
        self._tree = tree

    def prepare(self, base: Path, directory: Path) -> None:
        super().prepare(base, directory)
        self.environment["PYTHONPATH"] = str(self._tree)
        self._pool = directory / "pool"
        self._run("import", str(base), "--name", "base")

    @property
    def image(self) -> Path:
        return self._pool / "bases" / "base" / "image"

    def command(self, directory: Path, socket_path: Path) -> list[str]:
        self._run("clone", "base", self.export)
        return self._command("serve", "--socket", str(socket_path))

    def discard(self) -> None:
        self._run("rm", self.export)

    def version(self) -> str:
        said = subprocess.run(
            [sys.executable, "-m", "nbdclone", "--version"],
            env=os.environ | {"PYTHONPATH": str(self._tree)}, cwd="/", capture_output=True, text=True, check=True,
        )  # fmt: skip
        return f"{said.stdout.removeprefix('nbdclone').strip()}, Python {sys.version.split()[0]}"

    def _command(self, *args: str) -> list[str]:
        return [sys.executable, "-P", "-m", "nbdclone", "--pool", str(self._pool), *args]

    def _run(self, *args: str) -> None:
        _run(self._command(*args), self.environment)


class QemuNbd(Peer):
    """qemu-nbd over a qcow2 overlay, in its default cache mode, writeback: what was not flushed may be lost."""

    name = "qemu-nbd"
    programs = ("qemu-nbd", "qemu-img")

    def command(self, directory: Path, socket_path: Path) -> list[str]:
        overlay = directory / "overlay.qcow2"
        create = [program("qemu-img"), "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(self.base), str(overlay)]
        _run(create, self.environment)
        serve = [program("qemu-nbd"), "--persistent", "--socket", str(socket_path), "--export-name", self.export]
        return [*serve, "--format", "qcow2", "--shared", "8", str(overlay)]

    def version(self) -> str:
        return _first_line(program("qemu-nbd"), "--version").removeprefix(program("qemu-nbd")).strip()


class NbdkitCow(Peer):
    """nbdkit's cow filter over its file plugin. The overlay is a temporary file, gone at exit; a flush does nothing."""

    name = "nbdkit cow"
    programs = ("nbdkit",)
    durable_flush = False

    def command(self, directory: Path, socket_path: Path) -> list[str]:
        serve = [program("nbdkit"), "--foreground", "--unix", str(socket_path), "--exportname", self.export]
        return [*serve, "--filter", "cow", "file", str(self.base)]

    def version(self) -> str:
        return _first_line(program("nbdkit"), "--version").removeprefix("nbdkit").strip()


def all_peers() -> list[Peer]:
    return [Nbdclone(), QemuNbd(), NbdkitCow()]


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, check=False, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PREPARE_DEADLINE_S,
    )  # fmt: skip
    if done.returncode:
        raise PeerFailed(f"{' '.join(command)} exited with status {done.returncode}: {done.stderr.strip()}")


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def _await_socket(process: subprocess.Popen[bytes], path: Path) -> None:
    """Wait until somebody accepts connections on the socket."""
    deadline = time.monotonic() + READY_DEADLINE_S
    while True:
        if process.poll() is not None:
            raise PeerFailed(f"the server exited with status {process.returncode} before it was ready")
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            return
        if time.monotonic() > deadline:
            raise PeerFailed(f"the server was not ready in {READY_DEADLINE_S:.0f} seconds")
        time.sleep(0.02)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, time to flush, SIGKILL."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
