"""What is asked of the servers, and what is to come out of it.

A new workload is a new line of the table; a new goal is a new line of the other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """One load on one export. ``rw`` is what fio calls it; ``block_size`` is in bytes."""

    name: str
    rw: str
    block_size: int
    depth: int
    read_percent: int | None = None
    synced: bool = False
    """Is each write followed by a flush? Then only servers whose flush is durable can be compared."""

    @property
    def title(self) -> str:
        size = f"{self.block_size >> 20}m" if self.block_size >= 1 << 20 else f"{self.block_size >> 10}k"
        kind = {"randread": "random read", "randwrite": "random write", "randrw": "mixed"}.get(self.rw, self.rw)
        if self.read_percent is not None:
            kind += f" {self.read_percent}/{100 - self.read_percent}"
        return f"{size} {kind}{', each synced' if self.synced else ''}, depth {self.depth}"


WORKLOADS = (
    Workload("randread-4k-1", "randread", 4096, 1),
    Workload("randread-4k-16", "randread", 4096, 16),
    Workload("randread-4k-64", "randread", 4096, 64),
    Workload("randwrite-4k-1", "randwrite", 4096, 1),
    Workload("randwrite-4k-16", "randwrite", 4096, 16),
    Workload("mixed-4k-16", "randrw", 4096, 16, read_percent=70),
    Workload("read-256k-4", "read", 256 << 10, 4),
    Workload("write-256k-4", "write", 256 << 10, 4),
    Workload("read-1m-8", "read", 1 << 20, 8),
    Workload("write-1m-8", "write", 1 << 20, 8),
    Workload("syncwrite-4k-1", "randwrite", 4096, 1, synced=True),
)

SUBJECT = "nbdclone"
REFERENCE = "qemu-nbd"


@dataclass(frozen=True, slots=True)
class Goal:
    """In the median of the rounds, SUBJECT makes at least ``ratio`` times the IOPS of REFERENCE."""

    workload: str
    ratio: float


GOALS = (
    Goal("randread-4k-16", 2.0),
    Goal("randwrite-4k-16", 2.0),
    Goal("read-1m-8", 1.0),
)
