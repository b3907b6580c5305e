"""The servers that people use for clones, and how each is run: one class for each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from integration.bench.floors import NbdkitFloor, RawServer
from integration.bench.peer import LOOPBACK, Peer, Place, first_line, run
from integration.bench.workloads import Workload
from integration.packages import program

REPOSITORY = Path(__file__).resolve().parents[2]
CHAIN = "chain"


# A worker has started in 0.2 s of processor time.
SETTLE_S = 0.6


class Nbdclone(Peer):
    """nbdclone as its users run it: a pool, `nbdclone clone`, `nbdclone serve`. ``tree`` is the checkout to run."""

    name = "nbdclone"
    serves_many = True

    def __init__(self, tree: Path = REPOSITORY, name: str = name, options: Sequence[str] = ()) -> None:
        self.name = name
        self._tree = tree
        self._options = options
        self._snapshots: bool | None = None

    def prepare(self, base: Path, directory: Path, certificates: Path) -> None:
        super().prepare(base, directory, certificates)
        self.environment["PYTHONPATH"] = str(self._tree)
        self._pool = directory / "pool"
        self._run("import", str(base), "--name", "base")

    @property
    def image(self) -> Path:
        return self._pool / "bases" / "base" / "image"

    def settle(self, uris: Sequence[str]) -> None:
        """The first client of an export lets the server start one more process, which takes a part of a second."""
        for uri in uris:
            subprocess.run([program("nbdinfo"), "--size", uri], capture_output=True, check=False)
        time.sleep(SETTLE_S)

    def lacks(self, workload: Workload) -> str:
        return "" if workload.state != CHAIN or self._has_snapshots() else super().lacks(workload)

    def add_layer(self, number: int) -> None:
        if number == 0:
            self._run("clone", "base", CHAIN)
        else:
            self._run("snapshot", f"{CHAIN}@layer{number}")

    def command(self, directory: Path, exports: Sequence[str], place: Place, workload: Workload) -> list[str]:
        if workload.state != CHAIN:
            self._run("clone", "base", *exports)
        where = ["--socket", str(place.socket)]
        if place.transport != "unix":
            where = ["--listen", f"{LOOPBACK}:{place.port}"]
        if place.transport == "tls":
            where += ["--tls-certificates", str(place.certificates), "--no-tls-verify-peer"]
        return self._command("serve", *where, *self._options)

    def discard(self, exports: Sequence[str]) -> None:
        self._run("rm", *exports)

    def version(self) -> str:
        said = self._help("--version")
        return f"{said.stdout.removeprefix('nbdclone').strip()}, Python {sys.version.split()[0]}"

    def _has_snapshots(self) -> bool:
        if self._snapshots is None:
            self._snapshots = self._help("snapshot", "--help").returncode == 0
        return self._snapshots

    def _help(self, *args: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(self._tree)}
        command = [sys.executable, "-P", "-m", "nbdclone", *args]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    def _command(self, *args: str) -> list[str]:
        return [sys.executable, "-P", "-m", "nbdclone", "--pool", str(self._pool), *args]

    def _run(self, *args: str) -> None:
        run(self._command(*args), self.environment)


class QemuNbd(Peer):
    """qemu-nbd over a qcow2 overlay, in its default cache mode, writeback: what was not flushed may be lost."""

    name = "qemu-nbd"
    programs = ("qemu-nbd", "qemu-img")

    def lacks(self, workload: Workload) -> str:
        return ""

    def add_layer(self, number: int) -> None:
        self._chain = self.directory / f"layer{number}.qcow2"
        below = ["-F", "raw", "-b", str(self.base)]
        if number:
            below = ["-F", "qcow2", "-b", str(self.directory / f"layer{number - 1}.qcow2")]
        self._create(*below, str(self._chain))

    def command(self, directory: Path, exports: Sequence[str], place: Place, workload: Workload) -> list[str]:
        overlay = self._chain if workload.state == CHAIN else directory / "overlay.qcow2"
        if workload.state != CHAIN:
            self._create("-F", "raw", "-b", str(self.base), str(overlay))
        where = ["--socket", str(place.socket)]
        if place.transport != "unix":
            where = ["--bind", LOOPBACK, "--port", str(place.port)]
        if place.transport == "tls":
            made = f"tls-creds-x509,id=tls0,endpoint=server,verify-peer=no,dir={place.certificates}"
            where += ["--object", made, "--tls-creds", "tls0"]
        (export,) = exports
        serve = [program("qemu-nbd"), "--persistent", *where, "--export-name", export]
        return [*serve, "--format", "qcow2", "--shared", "8", str(overlay)]

    def version(self) -> str:
        return first_line(program("qemu-nbd"), "--version").removeprefix(program("qemu-nbd")).strip()

    def _create(self, *args: str) -> None:
        run([program("qemu-img"), "create", "-q", "-f", "qcow2", *args], self.environment)


class NbdkitCow(Peer):
    """nbdkit's cow filter over its file plugin. The overlay is a temporary file, gone at exit; a flush does nothing."""

    name = "nbdkit cow"
    programs = ("nbdkit",)
    durable_flush = False
    note = "its overlay is gone when it ends, and a flush does nothing"

    def command(self, directory: Path, exports: Sequence[str], place: Place, workload: Workload) -> list[str]:
        where = ["--unix", str(place.socket)]
        if place.transport != "unix":
            where = ["--ipaddr", LOOPBACK, "--port", str(place.port)]
        if place.transport == "tls":
            where += ["--tls=require", f"--tls-certificates={place.certificates}"]
        (export,) = exports
        serve = [program("nbdkit"), "--foreground", *where, "--exportname", export]
        return [*serve, "--filter", "cow", "file", str(self.base)]

    def version(self) -> str:
        return first_line(program("nbdkit"), "--version").removeprefix("nbdkit").strip()


class NbdServer(Peer):
    """nbd-server with copyonwrite. The file of differences belongs to one connection and is removed at its end."""

    name = "nbd-server"
    programs = ("nbd-server",)
    durable_flush = False
    serves_many = True
    note = "what was written is gone when the client disconnects, and a flush saves nothing"

    def lacks(self, workload: Workload) -> str:
        if workload.state in ("rewritten", "checkerboard"):
            return "what was written is gone when the client disconnects"
        if workload.connections > 1:
            return "each connection has a clone of its own"
        if workload.transport == "tls":
            return "it takes no client without a certificate, and fio has none to show"
        return super().lacks(workload)

    def command(self, directory: Path, exports: Sequence[str], place: Place, workload: Workload) -> list[str]:
        generic = [f"unixsock = {place.socket}"]
        if place.transport != "unix":
            generic = [f"listenaddr = {LOOPBACK}", f"port = {place.port}"]
        lines = ["[generic]", *generic]
        for export in exports:
            lines += [f"[{export}]", f"exportname = {self.base}", "copyonwrite = true", f"cowdir = {directory}"]
            lines += ["flush = true"]
        configuration = directory / "config"
        configuration.write_text("\n".join(lines) + "\n")
        return [program("nbd-server"), "-C", str(configuration), "-p", str(self.pid_file(directory))]

    def pid_file(self, directory: Path) -> Path:
        return directory / "pid"

    def version(self) -> str:
        return first_line(program("nbd-server"), "-V").removeprefix("This is nbd-server version").strip()


def all_peers() -> list[Peer]:
    """nbdclone, its peers, and the floors."""
    return [Nbdclone(), QemuNbd(), NbdkitCow(), NbdServer(), RawServer(), NbdkitFloor("null"), NbdkitFloor("memory")]
