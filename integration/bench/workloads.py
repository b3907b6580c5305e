"""What is asked of the servers: a line of the tables is a line here.

Lines of one family differ in size and depth; ``QUICK`` has at least one of each family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SUBJECT = "nbdclone"
REFERENCE = "qemu-nbd"

Transport = Literal["unix", "tcp", "tls"]
State = Literal["fresh", "rewritten", "checkerboard", "chain"]
Driver = Literal["fio", "nbdcopy", "qemu-img", "boot", "files"]

LAYERS = 32
MANY = 8

_KINDS = {"randread": "random read", "randwrite": "random write", "randrw": "mixed"}
_STATES = {
    "fresh": "",
    "rewritten": ", all written before",
    "checkerboard": ", every other block its own",
    "chain": f", {LAYERS} layers",
}
_TRANSPORTS = {"unix": "", "tcp": ", TCP", "tls": ", TLS over TCP"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One load. ``rw`` is what fio calls it; ``block_size`` is in bytes, 0 where the driver chooses."""

    name: str
    rw: str
    block_size: int
    depth: int
    family: str
    read_percent: int | None = None
    sync_every: int = 0
    """A flush after so many writes; 0: none."""
    once: bool = False
    """No block twice: it ends when the whole range was read or written, if the time has not passed before."""
    cold: bool = False
    """Is the page cache of all files of the server dropped before?"""
    state: State = "fresh"
    transport: Transport = "unix"
    clones: int = 1
    """That many clones, each with a client of its own, at once. Each is asked for its part of the size."""
    connections: int = 1
    """Of one client to one clone."""
    driver: Driver = "fio"
    label: str = ""
    """The title, where it does not follow from the rest."""

    @property
    def writes(self) -> bool:
        return self.rw in ("write", "randwrite", "randrw")

    @property
    def flushes(self) -> bool:
        """Does its speed hang on what a flush does?"""
        return self.sync_every > 0 or (self.driver == "nbdcopy" and self.writes)

    @property
    def is_real(self) -> bool:
        """Is it a machine's work, told in seconds, and measured only when asked for?"""
        return self.driver in ("boot", "files")

    @property
    def is_plain(self) -> bool:
        """Can a server without layers, TLS and clones do it, and does it say something there?"""
        return self.state == "fresh" and self.transport == "unix" and self.clones == 1 and not self.is_real

    @property
    def title(self) -> str:
        if self.label:
            return self.label
        parts = [f"{shown_size(self.block_size)} "]
        if self.once and not self.cold:
            parts.append("first " if self.writes else "")
        parts.append(_KINDS.get(self.rw, self.rw))
        if self.read_percent is not None:
            parts.append(f" {self.read_percent}/{100 - self.read_percent}")
        if self.sync_every:
            parts.append(", each synced" if self.sync_every == 1 else f", synced every {self.sync_every}")
        parts.append(f", depth {self.depth}")
        parts.append(", cold" if self.cold else "")
        parts.append(_STATES[self.state] + _TRANSPORTS[self.transport])
        parts.append(f", {self.clones} clones at once" if self.clones > 1 else "")
        parts.append(f", {self.connections} connections" if self.connections > 1 else "")
        return "".join(parts)


def shown_size(size: int) -> str:
    return f"{size >> 20}m" if size >= 1 << 20 else f"{size >> 10}k"


def _fio(name: str, rw: str, block_size: int, depth: int, family: str, **more: object) -> Workload:
    return Workload(name=name, rw=rw, block_size=block_size, depth=depth, family=family, **more)  # type: ignore[arg-type]


K4, K256, M1 = 4 << 10, 256 << 10, 1 << 20

WORKLOADS = (
    _fio("randread-4k-1", "randread", K4, 1, "random read"),
    _fio("randread-4k-16", "randread", K4, 16, "random read"),
    _fio("randread-4k-64", "randread", K4, 64, "random read"),
    _fio("randwrite-4k-1", "randwrite", K4, 1, "random write"),
    _fio("randwrite-4k-16", "randwrite", K4, 16, "random write"),
    _fio("randwrite-4k-64", "randwrite", K4, 64, "random write"),
    _fio("mixed-4k-16", "randrw", K4, 16, "mixed", read_percent=70),
    _fio("syncwrite-4k-1", "randwrite", K4, 1, "synced", sync_every=1),
    _fio("syncwrite16-4k-16", "randwrite", K4, 16, "synced", sync_every=16),
    _fio("read-256k-4", "read", K256, 4, "sequential read"),
    _fio("read-1m-8", "read", M1, 8, "sequential read"),
    _fio("write-256k-4", "write", K256, 4, "sequential write"),
    _fio("write-1m-8", "write", M1, 8, "sequential write"),
    _fio("cold-randread-4k-16", "randread", K4, 16, "cold", cold=True, once=True),
    _fio("cold-read-1m-8", "read", M1, 8, "cold", cold=True, once=True),
    _fio("first-randwrite-4k-16", "randwrite", K4, 16, "first write", once=True),
    _fio("rewrite-randwrite-4k-16", "randwrite", K4, 16, "rewrite", state="rewritten", once=True, label=(
        "4k random write, depth 16, all written before")),
    _fio("checkerboard-randread-4k-16", "randread", K4, 16, "checkerboard", state="checkerboard"),
    _fio("checkerboard-read-256k-4", "read", K256, 4, "checkerboard", state="checkerboard"),
    _fio("chain-randread-4k-16", "randread", K4, 16, "chain", state="chain"),
    _fio("chain-read-256k-4", "read", K256, 4, "chain", state="chain"),
    _fio("clones8-randread-4k-16", "randread", K4, 16, "clones", clones=MANY),
    _fio("clones8-randwrite-4k-16", "randwrite", K4, 16, "clones", clones=MANY),
    _fio("connections4-randread-4k-16", "randread", K4, 16, "connections", connections=4),
    _fio("connections4-randwrite-4k-16", "randwrite", K4, 16, "connections", connections=4),
    _fio("tcp-randread-4k-1", "randread", K4, 1, "tcp", transport="tcp"),
    _fio("tcp-randread-4k-16", "randread", K4, 16, "tcp", transport="tcp"),
    _fio("tcp-randwrite-4k-16", "randwrite", K4, 16, "tcp", transport="tcp"),
    _fio("tcp-read-1m-8", "read", M1, 8, "tcp", transport="tcp"),
    _fio("tls-randread-4k-16", "randread", K4, 16, "tls", transport="tls"),
    _fio("tls-randwrite-4k-16", "randwrite", K4, 16, "tls", transport="tls"),
    _fio("tls-read-1m-8", "read", M1, 8, "tls", transport="tls"),
    _fio("nbdcopy-from", "read", K256, 64, "nbdcopy", driver="nbdcopy", label="nbdcopy, a clone to null:"),
    _fio("nbdcopy-to", "write", K256, 64, "nbdcopy", driver="nbdcopy", once=True, label=(
        "nbdcopy --flush, a file into a clone")),
    _fio("qemu-img-read-4k-16", "randread", K4, 16, "qemu-img", driver="qemu-img", label=(
        "qemu-img bench, 4k read, depth 16")),
    _fio("qemu-img-write-4k-16", "randwrite", K4, 16, "qemu-img", driver="qemu-img", label=(
        "qemu-img bench, 4k write, depth 16")),
    _fio("boot", "randrw", 0, 0, "real", driver="boot", label="Debian boots from a clone"),
    _fio("files", "randrw", 0, 0, "real", driver="files", label=(
        "a guest copies thousands of small files in a clone, and syncs")),
)  # fmt: skip

QUICK = (
    "randread-4k-1", "randread-4k-16", "randwrite-4k-16", "mixed-4k-16", "syncwrite-4k-1", "read-1m-8", "write-1m-8",
    "cold-randread-4k-16", "first-randwrite-4k-16", "rewrite-randwrite-4k-16", "checkerboard-randread-4k-16",
    "chain-randread-4k-16", "clones8-randread-4k-16", "connections4-randread-4k-16", "tcp-randread-4k-16",
    "tls-randread-4k-16", "nbdcopy-from", "qemu-img-read-4k-16",
)  # fmt: skip
