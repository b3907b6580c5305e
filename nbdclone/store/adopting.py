"""From a qcow2 overlay to a clone, the part without qemu: what stands on what, and which base it is at the bottom.

Nothing is guessed. Each image of the chain must say the format of the one that it stands on, as qemu-img has demanded
since 6.1: in a raw image the guest may have written whatever qemu would take for another format.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdclone.errors import InUse, InvalidImage
from nbdclone.store.catalog import BaseInfo
from nbdclone.store.clone import Clone
from nbdclone.store.image import BaseRecord, Progress, Samples, fingerprint_of, hash_all
from nbdclone.store.importing import detect_format, open_source
from nbdclone.store.layer import BLOCK_SIZE, MAX_LAYERS, MAX_SIZE, SECTOR_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.qemu import CHECK_PASSES, Qcow2Header, as_name, complaint_of, data_ends, find_program, node

PIECE_SIZE = 1 << 20
_PROTOCOL = re.compile(r"[^/]*:")


@dataclass(frozen=True, slots=True)
class Overlay:
    """One of the images of a chain, of ``size`` bytes; it has ``snapshots`` of its own inside."""

    path: Path
    size: int
    snapshots: int


@dataclass(frozen=True, slots=True)
class Chain:
    """``overlays`` from the topmost down, and what they stand on: an image file of this format."""

    overlays: tuple[Overlay, ...]
    bottom: Path
    bottom_format: str

    @property
    def top(self) -> Overlay:
        return self.overlays[0]

    def opened(self) -> dict[str, Any]:
        """How qemu is told to open the overlays alone: what none of them has, is nowhere then."""
        below: dict[str, Any] | None = None
        for overlay in reversed(self.overlays):
            below = node(overlay.path, "qcow2", backing=below)
        assert below is not None
        return below


def read_chain(path: Path) -> Chain:
    """Follow the backing files of a qcow2 overlay. They are looked at, and nothing else is opened.

    Raises NotFound, InvalidImage: what cannot become a clone, and why.
    """
    overlays: list[Overlay] = []
    seen: set[tuple[int, int]] = set()
    path, expected = Path(os.path.abspath(path)), "qcow2"
    while True:
        fd = open_source(path, f", which {overlays[-1].path} stands on" if overlays else "")
        try:
            status = os.fstat(fd)
            if (status.st_dev, status.st_ino) in seen or len(seen) > MAX_LAYERS:
                raise InvalidImage(f"{path} stands on itself")
            seen.add((status.st_dev, status.st_ino))
            found = detect_format(fd)
            if found != expected:
                raise InvalidImage(_wrong_format(path, found, expected, overlays))
            if found != "qcow2":
                return Chain(tuple(overlays), path, found)
            header = Qcow2Header.read(fd, path)
        finally:
            os.close(fd)
        _require_plain(header, path)
        if header.backing is None:
            if not overlays:
                raise InvalidImage(f"{path} has no backing file: import it as a base, without --as-clone")
            return Chain(tuple(overlays), path, found)
        overlays.append(Overlay(path, header.size, header.snapshots))
        path, expected = _below(path, header)


def _wrong_format(path: Path, found: str, expected: str, overlays: list[Overlay]) -> str:
    if overlays:
        return f"{path} is a {found} image, and {overlays[-1].path}, which stands on it, says that it is {expected}"
    return f"{path} is a {found} image: only a qcow2 overlay can become a clone (without --as-clone it becomes a base)"


def _require_plain(header: Qcow2Header, path: Path) -> None:
    if header.encrypted:
        raise InvalidImage(f"{path} is encrypted: decrypt it first, with qemu-img convert")
    if header.data_file:
        raise InvalidImage(f"{path} keeps its data in another file: make one of both first, with qemu-img convert")
    if header.corrupt:
        raise InvalidImage(f"{path} is marked as corrupt: repair it first, with 'qemu-img check -r all'")


def _below(path: Path, header: Qcow2Header) -> tuple[Path, str]:
    """The file that the header names, and its format."""
    name = header.backing
    assert name is not None
    if "\0" in name or (_PROTOCOL.match(name) and not name.startswith("file:")):
        raise InvalidImage(f"{path} stands on {name[:100]!r}, which is no file of this machine")
    below = path.parent / name.removeprefix("file:")
    if header.backing_format is None:
        raise InvalidImage(
            f"{path} does not say the format of {below}, which it stands on; if that is a raw image: "
            f"qemu-img rebase -u -F raw -b {shlex.quote(name)} {shlex.quote(str(path))}"
        )
    return below, "raw" if header.backing_format in ("host_device", "file") else header.backing_format


def require_whole(chain: Chain) -> None:
    """Have qemu-img look at each of the overlays. Raises InvalidImage if one is damaged or truncated, InUse if it is
    open in another program.
    """
    program = find_program("qemu-img", "checks a qcow2 image")
    for overlay in chain.overlays:
        name = as_name(node(overlay.path, "qcow2", backing=None))
        check = subprocess.run([program, "check", "--output=json", name], capture_output=True, text=True, check=False)
        if "lock" in check.stderr and "Failed to get" in check.stderr:
            raise InUse(f"{overlay.path} is open in another program (a running guest?): stop that first")
        if check.returncode not in CHECK_PASSES:
            raise InvalidImage(
                f"{overlay.path} is damaged or truncated: {complaint_of(check.stderr, check.stdout)} "
                f"('qemu-img check -r all' may repair it)"
            )
        ends = data_ends(program, [name], 1)
        if ends is None:
            raise InvalidImage(f"{overlay.path} cannot be read: qemu-img map fails")
        size = overlay.path.stat().st_size if overlay.path.is_file() else MAX_SIZE
        if ends[0] > size:
            raise InvalidImage(f"{overlay.path} is truncated: it has {size} bytes, and its data reaches to {ends[0]}")


class RawImage:
    """What :func:`find_base` asks of the image at the bottom, where that is raw."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _ask(self, question: Callable[[int], Any]) -> Any:
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return question(fd)
        finally:
            os.close(fd)

    def size(self) -> int:
        """In bytes."""
        return int(self._ask(lambda fd: os.lseek(fd, 0, os.SEEK_END)))

    def samples(self, offsets: tuple[int, ...]) -> Samples:
        """The samples at these places."""
        found: Samples = self._ask(lambda fd: Samples.take(fd, offsets))
        return found

    def fingerprint(self, progress: Progress | None) -> bytes:
        """What an import would find."""
        size = self.size()
        found: bytes = self._ask(lambda fd: fingerprint_of(size, hash_all(fd, size, progress)))
        return found


def find_base(pool: Pool, path: Path, image: Any, progress: Progress | None = None) -> str | None:
    """The name of the base that has the content of the image at ``path``; None if there is none.

    ``image`` has the methods of :class:`RawImage`. It is hashed as a whole only if there is a base of its size that has
    the same blocks where that base was sampled; the very file of a base is not.
    """
    bases = [base for base in pool.entries() if isinstance(base, BaseInfo) and base.id]  # else damaged
    for base in bases:
        if os.path.samefile(path, pool.path / "bases" / base.name / "image"):
            return base.name
    size = image.size()
    alike: dict[bytes, str] = {}
    for base in bases:
        if base.size == size:
            record = BaseRecord.load(pool.path / "bases" / base.name / "base.json")
            if record.samples is None or image.samples(record.samples.offsets) == record.samples:
                alike.setdefault(record.fingerprint, base.name)
    return alike.get(image.fingerprint(progress)) if alike else None


def require_fits(chain: Chain, base: BaseInfo) -> int:
    """The size of the clone. Raises InvalidImage."""
    size = chain.top.size
    if size % SECTOR_SIZE or size < base.size:
        raise InvalidImage(
            f"{chain.top.path} has {size} bytes, and '{base.name}', its base, {base.size}: a clone is not smaller than "
            f"its base; make it as large first: qemu-img resize {shlex.quote(str(chain.top.path))} {base.size}"
        )
    return size


def write_what_differs(clone: Clone, data: bytes, offset: int) -> None:
    """Write the blocks, and parts of blocks, in which the clone does not read as ``data`` yet. Raises OSError."""
    known = clone.pread(len(data), offset)
    if known == data:
        return
    at, start = 0, None  # where the blocks begin that differ and are not written yet
    while at < len(data):
        end = min(at + BLOCK_SIZE - (offset + at) % BLOCK_SIZE, len(data))
        if known[at:end] != data[at:end]:
            start = at if start is None else start
        elif start is not None:
            clone.pwrite(data[start:at], offset + start)
            start = None
        at = end
    if start is not None:
        clone.pwrite(data[start:], offset + start)


def write_zeros_that_differ(clone: Clone, offset: int, length: int) -> None:
    """The same for a range of zeros; what is a hole in the base is not read. Raises OSError."""
    stop = offset + length
    while offset < stop:
        for extent in list(clone.extents(offset, min(stop - offset, SEGMENT_SIZE))):
            if not extent.hole:
                for start in range(offset, offset + extent.length, PIECE_SIZE):
                    write_what_differs(clone, bytes(min(PIECE_SIZE, offset + extent.length - start)), start)
            offset += extent.length
