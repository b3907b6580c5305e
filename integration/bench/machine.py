"""Where it was measured, and the disk that it is measured on."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from mmap import MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from pathlib import Path

IN_MEMORY = ("tmpfs", "ramfs")
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    cores: int
    memory_gb: float
    kernel: str
    file_system: str

    @classmethod
    def here(cls, directory: Path) -> Machine:
        """This machine, with the file system that ``directory`` is on."""
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return cls(
            models[0].partition(":")[2].strip() if models else platform.machine(),
            len(os.sched_getaffinity(0)),
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
            f"{platform.system()} {platform.release()}",
            file_system_of(directory),
        )


def file_system_of(directory: Path) -> str:
    """The type of the file system at ``directory``: ext4, xfs, tmpfs, ..."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0]
    return "unknown"  # btrfs: its subvolumes have device numbers of their own


def make_random_image(path: Path, size: int) -> None:
    """Random data: no server may gain by finding zeros."""
    with open(path, "wb") as file:
        for done in range(0, size, CHUNK):
            file.write(os.urandom(min(CHUNK, size - done)))
        file.flush()
        os.fsync(file.fileno())


def chill(path: Path) -> None:
    """Drop a file, which was synced, from the page cache: however it was written, it then comes back the same way."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def touch_memory(size: int) -> None:
    """Use ``size`` bytes of memory once, or half of what is free, and give them back.

    Memory that a virtual machine has never used, or has left free for two seconds (where its balloon reports free
    pages), is brought in by its host at the first touch, for ten times the cost of a page that is there. Whoever comes
    first would pay for it in the page cache that its writes go to; and large folios, which are made of what was free
    in one piece, pay where small pages do not.
    """
    size = min(size, available_memory() // 2)
    with contextlib.closing(mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS)) as memory:
        memory.madvise(MADV_NOHUGEPAGE)
        for start in range(0, size, CHUNK):
            piece = memoryview(memory)[start : start + CHUNK : PAGESIZE]
            piece[:] = b"\1" * len(piece)
            piece.release()


def available_memory() -> int:
    """Bytes, as the kernel estimates them (MemAvailable in man 5 proc)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def warm(path: Path, *, in_pages: bool = False) -> None:
    """Read a file through, so that it is in the page cache; if it was not, page by page or in larger folios.

    Linux reads ahead in large folios, which is good for reading. A write of 4 KiB into one that is there took ten times
    as long as one into a page (Linux 6.18, ext4).
    """
    buffer = bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        if in_pages:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        while file.readinto(buffer):
            pass
