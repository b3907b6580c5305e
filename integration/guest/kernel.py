"""Debian's cloud kernel and its modules, unpacked in the cache: nothing is installed on this machine."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from integration.guest.cache import cached
from integration.guest.qemu import KERNEL_OPTIONS


@dataclass(frozen=True)
class Kernel:
    image: Path
    modules: Path  # the directory with modules.builtin and, below it, the modules

    def boots(self, initramfs: Path) -> tuple[str, ...]:
        """The options of qemu that start it."""
        return ("-kernel", str(self.image), "-initrd", str(initramfs), "-append", KERNEL_OPTIONS)

    def load_order(self, *names: str) -> list[Path]:
        """The files of these modules and of those they need, each after what it needs.

        The dependencies are read from the modules themselves: the list of all of them, modules.dep, is only made
        where a kernel is installed.
        """
        path_of = {_module_name(path): path for path in self.modules.rglob("*.ko")}
        builtin = {_module_name(Path(line)) for line in (self.modules / "modules.builtin").read_text().split()}
        order: list[Path] = []

        def add(name: str) -> None:
            if name in builtin or path_of[name] in order:
                return
            for needed in _needs(path_of[name]):
                add(needed)
            order.append(path_of[name])

        for name in names:
            add(name)
        return order


def _module_name(path: Path) -> str:
    return path.stem.replace("-", "_")


def _needs(module: Path) -> list[str]:
    """The names in the module's own note `depends=virtio,virtio_ring`."""
    note = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    return note[1].decode().replace("-", "_").split(",") if note and note[1] else []


@cache
def kernel() -> Kernel:
    """The kernel for guests, fetched when it is not in the cache."""
    tree = cached("kernel", [Path(__file__).read_text()], _fetch)
    (image,) = tree.glob("boot/vmlinuz-*")
    (modules,) = tree.glob("lib/modules/*")
    return Kernel(image, modules)


def _fetch(directory: Path) -> None:
    _run("apt-get", "download", _current_package(), cwd=directory)
    (archive,) = directory.glob("*.deb")
    _run("dpkg-deb", "-x", str(archive), str(directory))
    archive.unlink()
    if not any(directory.rglob("*.ko")):
        raise RuntimeError(f"the modules in {archive.name} are compressed, as in Debian 13 and later")


def _current_package() -> str:
    """The package that linux-image-cloud-amd64 stands for today, such as linux-image-6.1.0-40-cloud-amd64."""
    package = _dependency()
    if package is None and os.geteuid() == 0:  # a fresh container has no package lists yet
        _run("apt-get", "update")
        package = _dependency()
    if package is None:
        raise RuntimeError("apt knows no linux-image-cloud-amd64: is this Debian, and has apt-get update been run?")
    return package


def _dependency() -> str | None:
    described = _run("apt-cache", "show", "linux-image-cloud-amd64", check=False)
    depends = re.search(r"^Depends: (linux-image-\S+)", described, re.M)
    return depends and depends[1]


def _run(*command: str, cwd: Path | None = None, check: bool = True) -> str:
    return subprocess.run(command, cwd=cwd, check=check, stdout=subprocess.PIPE, text=True, timeout=300).stdout
