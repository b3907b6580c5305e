"""What a server is to the benchmark, and how one is started and ended.

A peer is prepared once. For each turn it makes fresh clones of the base in a directory of its own, serves them, and is
ended, by its process ids, before the next one has its turn.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.bench.processes import has_not_ended
from integration.bench.workloads import Transport, Workload

READY_DEADLINE_S = 30.0
STOP_DEADLINE_S = 60.0  # a server flushes what it has before it goes
PREPARE_DEADLINE_S = 600.0
POLL_S = 0.02
LOOPBACK = "127.0.0.1"


class PeerFailed(Exception):
    """A server could not be started, or died; with what it wrote to stderr."""


@dataclass(frozen=True, slots=True)
class Running:
    """Servers that run: their processes, and a URI for each clone."""

    pids: Sequence[int]
    uris: Sequence[str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one server process listens."""

    transport: Transport
    socket: Path
    port: int
    certificates: Path

    def uri(self, export: str) -> str:
        if self.transport == "unix":
            return f"nbd+unix:///{export}?socket={self.socket}"
        if self.transport == "tcp":
            return f"nbd://{LOOPBACK}:{self.port}/{export}"
        # fio's engine lets no URI name files, so its client has no certificates to verify with, or to show.
        return f"nbds://{LOOPBACK}:{self.port}/{export}?tls-verify-peer=0"

    def accepts(self) -> bool:
        """Does somebody accept connections there?"""
        is_unix = self.transport == "unix"
        with socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET) as sock:
            return sock.connect_ex(str(self.socket) if is_unix else (LOOPBACK, self.port)) == 0


class Peer(ABC):
    """A server of clones. ``name`` stands in the tables."""

    name: str
    programs: Sequence[str] = ()
    """What has to be installed for it."""
    durable_flush = True
    """Does an acknowledged flush survive a power cut? If not, its writes are another work."""
    is_floor = False
    """Has it no clones at all? Then it shows what the machine can do, and nothing is compared with it as a peer."""
    by_default = True
    serves_many = False
    """Does one process serve many clones? If not, each of them has a process of its own."""
    note = ""
    """What a reader of the table has to know."""

    def prepare(self, base: Path, directory: Path, certificates: Path) -> None:
        """Get ready to make clones of the raw image ``base``. ``directory`` is the peer's own, for the whole run."""
        self.base = base
        self.directory = directory
        self.certificates = certificates
        self.environment = dict(os.environ)

    @property
    def image(self) -> Path:
        """The file that its clones read what they have not changed from."""
        return self.base

    def lacks(self, workload: Workload) -> str:
        """Why it cannot do this at all; empty when it can."""
        return "it has no snapshots" if workload.state == "chain" else ""

    def add_layer(self, number: int) -> None:
        """Put a layer on the chain that is served as the export ``chain``; 0: begin it. Only if it lacks no chains."""
        raise NotImplementedError

    @abstractmethod
    def command(self, directory: Path, exports: Sequence[str], place: Place, workload: Workload) -> list[str]:
        """Make fresh clones in ``directory``; return the command that serves them under these names there."""

    @abstractmethod
    def version(self) -> str: ...

    def discard(self, exports: Sequence[str]) -> None:  # noqa: B027 - most have nothing to do
        """Remove what the last clones left outside their directory."""

    def pid_file(self, directory: Path) -> Path | None:
        """Where a server that goes to the background by itself says which process it is."""
        return None

    def settle(self, uris: Sequence[str]) -> None:  # noqa: B027 - most have nothing to do
        """Let the servers do what they do once after their start, and not while they are measured."""

    @contextlib.contextmanager
    def serving(self, directory: Path, workload: Workload) -> Iterator[Running]:
        """Serve fresh clones, as many as the workload wants, or the chain. Raises PeerFailed."""
        exports = [f"disk{number}" for number in range(workload.clones)]
        if workload.state == "chain":
            exports = ["chain"]
        groups = [exports] if self.serves_many else [[export] for export in exports]
        try:
            with contextlib.ExitStack() as stack:
                servers = [stack.enter_context(self._server(directory, group, workload)) for group in groups]
                uris = [
                    place.uri(export) for (_, place), group in zip(servers, groups, strict=True) for export in group
                ]
                self.settle(uris)
                yield Running([pid for pid, _ in servers], uris)
        finally:
            if workload.state != "chain":
                self.discard(exports)

    @contextlib.contextmanager
    def _server(self, parent: Path, exports: Sequence[str], workload: Workload) -> Iterator[tuple[int, Place]]:
        directory = parent / exports[0]
        directory.mkdir()
        # Not in `directory`: the path of a Unix socket has to be shorter than 108 bytes.
        short = Path(tempfile.mkdtemp(prefix="bench-"))
        place = Place(workload.transport, short / "socket", _free_port(), self.certificates)
        complaints = directory / "stderr"
        try:
            command = self.command(directory, exports, place, workload)
            # A server that keeps its overlay in a temporary file keeps it on the disk that all are measured on.
            environment = self.environment | {"TMPDIR": str(directory)}
            with open(complaints, "wb") as stderr:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr, env=environment
                )
            pid = process.pid
            try:
                pid = self._await_ready(process, place, directory)
                yield pid, place
                if not _is_running(process, pid):
                    raise PeerFailed(f"{self.name} ended during the measurement")
            finally:
                _end(process, pid)
        except PeerFailed as failure:
            said = complaints.read_text(errors="replace")[-2000:] if complaints.exists() else ""
            raise PeerFailed(f"{failure}\n{said}".strip()) from None
        finally:
            shutil.rmtree(short)
            shutil.rmtree(directory)

    def _await_ready(self, process: subprocess.Popen[bytes], place: Place, directory: Path) -> int:
        """Wait until connections are accepted; the process id of who does."""
        deadline = time.monotonic() + READY_DEADLINE_S
        pid_file = self.pid_file(directory)
        while True:
            if process.poll() is not None and (pid_file is None or process.returncode):
                raise PeerFailed(f"the server exited with status {process.returncode} before it was ready")
            if place.accepts() and (pid_file is None or (pid_file.exists() and pid_file.read_text().strip())):
                return process.pid if pid_file is None else int(pid_file.read_text())
            if time.monotonic() > deadline:
                raise PeerFailed(f"the server was not ready in {READY_DEADLINE_S:.0f} seconds")
            time.sleep(POLL_S)


def run(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run a command to its end. Raises PeerFailed."""
    done = subprocess.run(
        command, check=False, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=PREPARE_DEADLINE_S,
    )  # fmt: skip
    if done.returncode:
        raise PeerFailed(f"{' '.join(command)} exited with status {done.returncode}: {done.stderr.strip()}")


def first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _is_running(process: subprocess.Popen[bytes], pid: int) -> bool:
    return process.poll() is None if pid == process.pid else has_not_ended(pid)


def _end(process: subprocess.Popen[bytes], pid: int) -> None:
    """SIGTERM, time to flush, SIGKILL; for a server that went to the background too."""
    for which in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            if _is_running(process, pid):
                os.kill(pid, which)
        deadline = time.monotonic() + STOP_DEADLINE_S
        while _is_running(process, pid) and time.monotonic() < deadline:
            time.sleep(POLL_S)
    process.wait()
