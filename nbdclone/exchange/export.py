"""From a base or clone to an image file of any format."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nbdclone.errors import StorageError, UsageError
from nbdclone.exchange.overlay import base_image_of, write_overlay
from nbdclone.exchange.programs import qemu_img, served
from nbdclone.store.clone import Clone
from nbdclone.store.exporting import Draft, open_for_reading, space_told, write_raw
from nbdclone.store.image import Progress
from nbdclone.store.pool import Pool
from nbdclone.store.qemu import complaint_of, find_program

# By the ending of a file's name; whatever has another is raw.
SUFFIXES = {
    ".qcow2": "qcow2",
    ".vmdk": "vmdk",
    ".vhdx": "vhdx",
    ".vdi": "vdi",
    ".vhd": "vpc",
    ".vpc": "vpc",
}
FORMATS = ("raw", *dict.fromkeys(SUFFIXES.values()))
# A VHD has the size that its geometry allows, unless it is told to have the right one.
_OPTIONS = {"vpc": ("-o", "force_size=on")}


@dataclass(frozen=True, slots=True)
class Exported:
    """What was made: sizes in bytes, ``allocated`` as the file system counts it; ``backing`` as an overlay names it."""

    name: str
    file: str
    format: str
    size: int
    allocated: int
    backing: str | None = None


def format_of(file: Path, image_format: str | None, *, link: bool) -> str:
    """The format to write. Raises UsageError."""
    if image_format is not None and image_format not in FORMATS:
        raise UsageError(f"{image_format!r} is no format that is known here: {', '.join(FORMATS)}")
    if link and image_format not in (None, "qcow2"):
        raise UsageError(f"only a qcow2 can be linked to a base, not a {image_format}")
    return "qcow2" if link else image_format or SUFFIXES.get(file.suffix.lower(), "raw")


def export_image(
    pool: Pool,
    name: str,
    file: Path,
    *,
    image_format: str | None = None,
    link: bool = False,
    relative: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a base, clone or snapshot to an image file, whole or not at all.

    ``image_format`` is one of FORMATS (default: by the file's name, else raw). ``link``: a qcow2 overlay whose backing
    file is the base's image, named by its absolute path or, with ``relative``, as seen from the file. ``force``: a file
    there is replaced. ``progress(done, total)`` is called as it goes. Raises what ``Pool.open_clone`` raises,
    UsageError, StorageError (also for a full disk), OSError; there is no file then.
    """
    chosen = format_of(file, image_format, link=link)
    backing = None
    with open_for_reading(pool, name) as clone, Draft(file, pool, force=force) as draft:
        with space_told(clone, draft.target.parent):
            if link:
                backing = base_image_of(clone, draft.target if relative else None)
                asyncio.run(write_overlay(clone, draft.path, backing, progress))
            elif chosen == "raw":
                write_raw(clone, draft.path, progress)
            else:
                asyncio.run(_convert(clone, chosen, draft.path, progress))
                _require_size(clone, chosen, draft.path)
            draft.publish()
        status = draft.target.stat()
        return Exported(name, str(file), chosen, clone.size, status.st_blocks * 512, backing)


async def _convert(clone: Clone, image_format: str, path: Path, progress: Progress | None) -> None:
    async with served(clone) as uri:
        options = _OPTIONS.get(image_format, ())
        command = ["convert", "-p", "-f", "raw", "-O", image_format, *options, uri, os.path.abspath(path)]
        await qemu_img(command, f"export of '{clone.name}' as {image_format}", progress)


def _require_size(clone: Clone, image_format: str, path: Path) -> None:
    """Some formats know no disk of just any size. Raises StorageError."""
    program = find_program("qemu-img", "makes images of other formats")
    command = [program, "info", "-f", image_format, "--output=json", os.path.abspath(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode != 0:
        raise StorageError(f"export of '{clone.name}' as {image_format}: {complaint_of(told.stderr)}")
    if (size := json.loads(told.stdout)["virtual-size"]) != clone.size:
        raise StorageError(
            f"a {image_format} cannot hold the {clone.size} bytes of '{clone.name}': it would have {size}; "
            f"give another --format"
        )
