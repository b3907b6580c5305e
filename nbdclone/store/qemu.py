"""What of qemu's programs the store uses, and what the header of a qcow2 image says.

The header is read here, and not by qemu-img: opening an image to ask about it, qemu follows what it names.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdclone.errors import InvalidImage, UsageError

QCOW2_MAGIC = b"QFI\xfb"
# magic, version, where the name of the backing file is, its length, cluster bits, size, encryption, entries of the
# first table, where it is, the same of the reference counts, clusters of these, snapshots, where they are
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
# From version 3: what a reader must know, what it may, what it must to write, bits of a count, length of the header
_HEADER_3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")  # type, length; its data is padded to 8 bytes
_BACKING_FORMAT = 0xE2792ACA
_CORRUPT, _DATA_FILE = 1 << 1, 1 << 2
_MAX_NAME = 1023  # the most that the format allows
_MAX_EXTENSIONS = 64
# qemu-img check: 0 sound, 3 sound but with leaked clusters, 63 no check for this format.
CHECK_PASSES = (0, 3, 63)


def find_program(name: str, purpose: str) -> str:
    """The path of one of qemu's programs. Raises UsageError that says what it is needed for, and how to get it."""
    program = shutil.which(name)
    if program is None:
        raise UsageError(f"{name}, which {purpose}, is not installed (Debian: apt install qemu-utils)")
    return program


def complaint_of(stderr: str, report: str = "") -> str:
    """The last thing that qemu-img said, without its name; else what its report counts."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    if lines:
        return lines[-1].removeprefix("qemu-img: ").removeprefix("qemu-nbd: ")
    try:
        counts = json.loads(report)
    except ValueError:
        return "qemu-img check fails"
    return f"qemu-img check finds {counts.get('corruptions', 0)} corruptions and {counts.get('check-errors', 0)} errors"


def data_ends(program: str, arguments: Sequence[str], depth: int) -> list[int] | None:
    """By depth in a chain of so many images: how far into its file the data of each reaches. None if it cannot be told.

    ``arguments`` say which image, to ``qemu-img map``.
    """
    ends = [0] * depth
    command = [program, "map", "--output=json", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:  # an extent on each: there may be millions
            extent = json.loads(line.strip("[], \n") or "{}")
            # Also what reads as zeros: of an image that was copied with holes qemu-img looks at the file itself, and
            # finds zeros beyond the end of it.
            if extent.get("data") and "offset" in extent:
                ends[extent["depth"]] = max(ends[extent["depth"]], extent["offset"] + extent["length"])
    return ends if process.returncode == 0 else None


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """What is of interest of it: ``size`` in bytes, the name of the backing file and its format as they are written."""

    size: int
    backing: str | None
    backing_format: str | None
    encrypted: bool
    corrupt: bool
    data_file: bool
    snapshots: int

    @classmethod
    def read(cls, fd: int, path: Path) -> Qcow2Header:
        """Raises InvalidImage."""
        head = os.pread(fd, 1 << 16, 0)
        try:
            return cls._parse(head)
        except (struct.error, ValueError) as error:
            raise InvalidImage(f"{path} is no qcow2 image, or a damaged one ({error})") from None

    @classmethod
    def _parse(cls, head: bytes) -> Qcow2Header:
        magic, version, name_at, name_length, _, size, crypt, _, _, _, _, snapshots, _ = _HEADER.unpack_from(head)
        if magic != QCOW2_MAGIC or version not in (2, 3):
            raise ValueError("not of version 2 or 3")
        features, length = 0, _HEADER.size
        if version == 3:
            features, _, _, _, length = _HEADER_3.unpack_from(head, _HEADER.size)
        backing = None
        if name_at:
            if name_length > _MAX_NAME or name_at + name_length > len(head):
                raise ValueError("the name of its backing file is too long")
            backing = os.fsdecode(head[name_at : name_at + name_length])
        return cls(
            size,
            backing,
            _backing_format(head, length),
            bool(crypt),
            bool(features & _CORRUPT),
            bool(features & _DATA_FILE),
            snapshots,
        )


def _backing_format(head: bytes, at: int) -> str | None:
    for _ in range(_MAX_EXTENSIONS):
        kind, length = _EXTENSION.unpack_from(head, at)
        at += _EXTENSION.size
        if kind == _BACKING_FORMAT:
            return head[at : at + length].decode("ascii")
        if kind == 0:
            return None
        at += length + -length % 8
    raise ValueError("too many extensions")


def node(path: Path, image_format: str, **more: Any) -> dict[str, Any]:
    """How qemu is told to open a file as this format, and as no other, whatever is in it."""
    driver = "host_device" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    return {"driver": image_format, "file": {"driver": driver, "filename": os.path.abspath(path)}, **more}


def as_name(opened: dict[str, Any]) -> str:
    """The same as a file name for qemu's programs."""
    return "json:" + json.dumps(opened)
