"""Servers that have no clones: what the machine and the protocol leave room for. No peer is measured by them.

``raw`` is our own, in C: one raw file, as little as an NBD server can be. It reads the base itself, and writes to a
copy made once, in which each write goes to a block that is there and to a page that is cached: it is spared what a
first write costs a server of clones. nbdkit's ``null`` reads zeros and forgets what is written, its ``memory`` keeps
that in memory.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from integration.bench.machine import chill, warm
from integration.bench.peer import Peer, PeerFailed, Place, first_line
from integration.bench.workloads import Workload
from integration.packages import program

SOURCE = Path(__file__).with_name("raw_server.c")
COMPILE_DEADLINE_S = 60.0


class _Floor(Peer):
    is_floor = True

    def lacks(self, workload: Workload) -> str:
        if workload.transport == "tls":
            return "it has no TLS"
        if workload.state in ("chain", "checkerboard"):
            return "it has no layers"
        return "" if workload.is_plain or workload.is_real else "it says nothing new there"


class RawServer(_Floor):
    """raw_server.c over the base, or over a copy of it where something is written."""

    name = "raw"
    programs = ("cc",)
    note = "our own in C, one raw file: no layers, no first writes, no checks"

    def prepare(self, base: Path, directory: Path, certificates: Path) -> None:
        super().prepare(base, directory, certificates)
        self._program = directory / "raw_server"
        compile_raw_server(self._program)
        self._copy = copy_image(base, directory / "copy.raw")
        chill(self._copy)

    def command(self, directory: Path, exports: Sequence[str], place: Place, workload: Workload) -> list[str]:
        image = self.base
        if workload.is_real:  # a guest has to find its disk as it was
            image = copy_image(self.base, directory / "copy.raw")
        elif workload.writes:
            image = self._copy
            warm(image, in_pages=True)
        address = str(place.socket) if place.transport == "unix" else str(place.port)
        return [str(self._program), str(image), place.transport, address]

    def version(self) -> str:
        return first_line(program("cc"), "--version")


def copy_image(image: Path, target: Path) -> Path:
    """A copy that can be written to; a reflink where the file system makes one."""
    subprocess.run([program("cp"), "--reflink=auto", "--sparse=always", str(image), str(target)], check=True)
    target.chmod(0o600)
    return target


def compile_raw_server(target: Path) -> None:
    """Raises PeerFailed."""
    command = [program("cc"), "-O2", "-pthread", "-o", str(target), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_DEADLINE_S)
    if done.returncode:
        raise PeerFailed(f"{SOURCE.name} does not compile: {done.stderr}")


class NbdkitFloor(_Floor):
    """A plugin of nbdkit that has no file."""

    programs = ("nbdkit",)
    durable_flush = False

    def __init__(self, plugin: str) -> None:
        self.name = f"nbdkit {plugin}"
        self.by_default = plugin == "null"
        self.note = {"null": "reads zeros, forgets what is written", "memory": "in memory alone"}[plugin]
        self._plugin = plugin

    def lacks(self, workload: Workload) -> str:
        if workload.is_real or workload.cold:
            return "it has no file"
        return super().lacks(workload)

    def command(self, directory: Path, exports: Sequence[str], place: Place, workload: Workload) -> list[str]:
        where = ["--unix", str(place.socket)]
        if place.transport != "unix":
            where = ["--port", str(place.port)]
        serve = [program("nbdkit"), "--foreground", *where, "--exportname", exports[0]]
        return [*serve, self._plugin, str(self.base.stat().st_size)]

    def version(self) -> str:
        return first_line(program("nbdkit"), "--version").removeprefix("nbdkit").strip()


def has_compiler() -> bool:
    return shutil.which("cc") is not None
