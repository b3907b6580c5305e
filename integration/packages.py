"""The one list of Debian packages that the integration tests need.

What counts is that a program is there, not how it came there, so each package is known by the files that it is needed
for. `python -m integration.packages` prints the missing packages on one line, ready for `apt-get install`; it runs
before anything is installed, so this module imports nothing but the standard library.

The guests' own kernel is not in the list: installing it would touch this machine's /boot (see `guest/kernel.py`).
"""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

NEEDED = {
    "btrfs-progs": ("mkfs.btrfs",),
    "busybox-static": ("busybox",),
    "dosfstools": ("mkfs.fat",),
    "e2fsprogs": ("mke2fs", "e2fsck", "debugfs"),
    "fdisk": ("sfdisk",),
    "fio": ("fio",),
    "gcc": ("cc",),
    "libc6-dev": ("/usr/include/stdio.h",),
    "libnbd-bin": ("nbdcopy", "nbdinfo"),
    "mmdebstrap": ("mmdebstrap",),
    "mtools": ("mcopy",),
    "nbd-client": ("nbd-client",),
    "nbd-server": ("nbd-server",),
    "nbdkit": ("nbdkit",),
    "python3-libnbd": ("/usr/bin/nbdsh",),
    "qemu-system-x86": ("qemu-system-x86_64",),
    "qemu-utils": ("qemu-img", "qemu-io", "qemu-nbd"),
    "seabios": ("/usr/share/seabios/bios-256k.bin",),
    "syslinux": ("syslinux",),
    "syslinux-common": ("/usr/lib/syslinux/mbr/mbr.bin",),
    "xfsprogs": ("mkfs.xfs",),
}

# Half of these programs live where an ordinary user's PATH does not look.
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def program(name: str) -> str:
    """The full path of a program or file; FileNotFoundError when it is not there."""
    found = shutil.which(name, mode=os.F_OK, path=_SEARCH_PATH)
    if found is None:
        raise FileNotFoundError(f"{name} is not installed")
    return found


def missing(packages: tuple[str, ...] = tuple(NEEDED)) -> list[str]:
    """Those of the packages that lack something that the tests use."""

    def is_there(name: str) -> bool:
        return shutil.which(name, mode=os.F_OK, path=_SEARCH_PATH) is not None

    return [package for package in packages if not all(map(is_there, NEEDED[package]))]


def require(*packages: str) -> None:
    """Give the running test up when a package is missing."""
    if absent := " ".join(missing(packages)):
        give_up(f"missing packages: {absent} (apt-get install {absent})")


def give_up(reason: str) -> NoReturn:
    """Skip the running test, which this machine cannot run; but fail it in CI, where it would have checked nothing."""
    import pytest  # here, because the command line below has to work without it

    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


if __name__ == "__main__":
    print(*missing())
