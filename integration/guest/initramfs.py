"""A system for one test: busybox and nbd-client in an initramfs, run by Debian's cloud kernel."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from integration.guest.kernel import Kernel
from integration.packages import program

PROGRAMS = ("busybox", "dd", "nbd-client", "mke2fs", "e2fsck")
MODULES = ("virtio_pci", "virtio_net", "nbd", "crc32c_generic", "ext4")
INIT = Path(__file__).with_name("init")
FUNCTIONS = Path(__file__).with_name("functions")


def write_initramfs(
    path: Path,
    kernel: Kernel,
    script: str,
    files: Mapping[str, bytes] | None = None,
    *,
    programs: Iterable[str] = (),
    modules: Iterable[str] = (),
) -> Path:
    """Write an initramfs whose init sets up the network and runs `script` with `sh -e`.

    The guest reaches this machine's 127.0.0.1 as 10.0.2.2. `files` are put beside, under the names given; `programs`
    and `modules` are those that it needs besides the usual ones.
    """
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.file("init", INIT.read_bytes())
    archive.file("functions", FUNCTIONS.read_bytes())
    archive.file("script", script.encode())
    for name, content in (files or {}).items():
        archive.file(name, content)
    for name in (*PROGRAMS, *programs):
        executable = Path(program(name))
        archive.file(f"bin/{name}", executable.read_bytes())
        for library in libraries(executable):
            archive.file(str(library).lstrip("/"), library.read_bytes())
    archive.file("etc/mke2fs.conf", Path("/etc/mke2fs.conf").read_bytes())
    order = kernel.load_order(*MODULES, *modules)
    for module in order:
        archive.file(f"modules/{module.name}", module.read_bytes())
    archive.file("modules/order", "\n".join(module.name for module in order).encode())
    path.write_bytes(archive.finish())
    return path


def libraries(executable: Path, search: str = "") -> list[Path]:
    """The shared libraries and the loader that a program needs: none when it is static.

    ``search``: directories, joined by colons, that come before the usual ones.
    """
    environment = {**os.environ, "LD_LIBRARY_PATH": search} if search else None
    ldd = subprocess.run(
        ["ldd", str(executable)], check=False, capture_output=True, text=True, timeout=30, env=environment
    )
    return [Path(found) for found in re.findall(r"(/\S+) \(0x", ldd.stdout)]


class Archive:
    """A cpio archive in the "newc" format, the one that the kernel unpacks.

    Written here and not by cpio(1), because a device node can be described by anyone but made only by root.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._content = bytearray()

    def file(self, name: str, content: bytes) -> None:
        self._add(name, stat.S_IFREG | 0o755, content)

    def device(self, name: str, major: int, minor: int) -> None:
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        self._add("TRAILER!!!", 0)
        return bytes(self._content)

    def _add(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        if name in self._names:
            return
        parent = str(Path(name).parent)
        if parent != ".":
            self._add(parent, stat.S_IFDIR | 0o755)
        self._names.add(name)
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device of the file (2), device it stands for (2), name, checksum
        fields = (len(self._names), mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0)
        self._content += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._content += content
        self._pad()

    def _pad(self) -> None:
        self._content += bytes(-len(self._content) % 4)
