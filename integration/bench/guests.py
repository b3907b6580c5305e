"""Real work: a machine, emulated by qemu, has its disk on a clone.

The emulation takes most of the time and both cores, so the ratios are near 1. What these lines are to show is whether
the servers differ where people would notice it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from integration.bench.measure import Measurement
from integration.bench.peer import Peer, Running
from integration.bench.processes import PeakMemory, cpu_seconds
from integration.bench.workloads import Workload
from integration.guest.debian_disk import debian_disk
from integration.guest.initramfs import write_initramfs
from integration.guest.kernel import kernel
from integration.guest.qemu import Guest, GuestError, guest
from integration.packages import missing

DEADLINE_S = 300.0
PACKAGES = (
    "busybox-static", "dosfstools", "e2fsprogs", "fdisk", "mmdebstrap", "mtools", "nbd-client", "qemu-system-x86",
    "seabios", "syslinux", "syslinux-common",
)  # fmt: skip

__all__ = ["GuestError", "take_turn"]

# Files of up to 32 KiB, as a package's mostly are, through the disk's own tar; the time is the guest's own.
COPY_FILES = """
mount -t ext4 -o relatime /dev/vda2 /mnt
cd /mnt
find usr etc var -type f -size -64 > files
echo "== files"
wc -l < files
mkdir copy
read began _ < /proc/uptime
chroot . /bin/sh -c "tar -c -T files | tar -x -C copy"
sync
read ended _ < /proc/uptime
echo "== times"
echo "$began $ended"
"""


def disk() -> Path:
    """The raw image that the guests' clones are clones of: a Debian, made when it is not in the cache."""
    return debian_disk()


def missing_packages() -> list[str]:
    return missing(PACKAGES)


def take_turn(peer: Peer, workload: Workload, directory: Path) -> Measurement:
    """``iops`` is how often it could be done in a second. Raises PeerFailed, GuestError."""
    with peer.serving(directory, workload) as server, PeakMemory(server.pids) as peak:
        before = sum(map(cpu_seconds, server.pids))
        seconds = _boot(server, directory) if workload.driver == "boot" else _copy_files(server, directory)
        spent = sum(map(cpu_seconds, server.pids)) - before
    return Measurement(1 / seconds, 0.0, None, None, cpu_us=spent * 1e6, peak_rss_mb=peak.mb)


def _boot(server: Running, directory: Path) -> float:
    """Seconds from the power switch to the last words of the service that speaks when everything is up."""
    began = time.monotonic()
    hints = ("-smbios", "type=1,serial=bench,family=stays-up")
    with guest(*_drive(server), *hints, console=directory / "console.txt") as machine:
        machine.wait_until_done(DEADLINE_S)
        return time.monotonic() - began


def _copy_files(server: Running, directory: Path) -> float:
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        initramfs = write_initramfs(Path(temporary, "initramfs"), kernel(), COPY_FILES, modules=("virtio_blk",))
        with guest(*kernel().boots(initramfs), *_drive(server), console=directory / "console.txt") as machine:
            return _times(machine)


def _times(machine: Guest) -> float:
    (line,) = machine.wait_until_done(DEADLINE_S).section("times")
    began, ended = map(float, line.split())
    return ended - began


def _drive(server: Running) -> tuple[str, ...]:
    return ("-drive", f"file={server.uris[0]},format=raw,if=virtio")
