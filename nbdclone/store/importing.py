"""From a file to a base: recognise the format, copy no more than needed, hash what is there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from nbdclone.errors import FileTooLarge, InvalidImage, NotFound, StorageError
from nbdclone.store.fs import FileSystem
from nbdclone.store.image import (
    CHUNK_SIZE,
    HASH_SIZE,
    ZERO_CHUNK,
    BaseRecord,
    Identity,
    Progress,
    chunk_hash,
    data_ranges,
    fingerprint_of,
    hash_image,
    read_manifest,
    save,
    take_samples,
)
from nbdclone.store.layer import MAX_SIZE, MIN_SIZE, SECTOR_SIZE, zero_runs
from nbdclone.store.probe import claimed_size
from nbdclone.store.qemu import CHECK_PASSES, complaint_of, data_ends

# Where each format's magic bytes stand, and qemu-img's name for it.
_SIGNATURES = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
)
_PERCENT = re.compile(rb"\((\d+\.\d+)/100%\)")


def import_image(
    source: Path,
    directory: Path,
    fs: FileSystem,
    *,
    force: bool = False,
    immutable: bool = False,
    progress: Progress | None = None,
) -> BaseRecord:
    """Fill ``directory`` with a base made from ``source``: image, manifest and record, all durable.

    ``force`` takes an image although it seems truncated; ``immutable`` sets the flag of that name on it. Raises
    NotFound, InvalidImage, FileTooLarge, StorageError. The directory is the caller's to move into place or to remove.
    """
    target = directory / "image"
    source_fd = open_source(source)
    try:
        image_format = detect_format(source_fd)
        if image_format == "raw":
            before = os.fstat(source_fd)
            size = _usable_size(source_fd, source, force)
            hashes = _copy(source_fd, size, target, fs, progress)
            after = os.fstat(source_fd)
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise InvalidImage(f"{source} was changed while it was imported: stop what writes to it, and try again")
        else:
            _convert(source, image_format, target, progress, force)
            size, hashes = _take_converted(source, target, force, fs)
    finally:
        os.close(source_fd)
    return record_base(directory, size, hashes, str(source.absolute()), fs, immutable=immutable)


def make_base(directory: Path, source: str, fs: FileSystem) -> Iterator[tuple[int, int]]:
    """Make a base of the raw image that is in ``directory`` already: manifest and record, all durable.

    ``source`` says where it is from. In steps: yields (bytes done, bytes in all). Raises StorageError, OSError.
    """
    hashes: dict[int, bytes] = {}
    fd = fs.open(directory / "image", os.O_RDWR | os.O_CLOEXEC)
    try:
        size = fs.fstat(fd).st_size
        for chunk, digest in hash_image(fd, size):
            hashes[chunk] = digest
            yield min((chunk + 1) * CHUNK_SIZE, size), size
        _seal(fd, fs)
    finally:
        fs.close(fd)
    record_base(directory, size, hashes, source, fs)


def record_base(
    directory: Path,
    size: int,
    hashes: dict[int, bytes],
    source: str,
    fs: FileSystem,
    *,
    base_id: bytes | None = None,
    created: int | None = None,
    immutable: bool = False,
) -> BaseRecord:
    """Write the manifest and the record of the image in ``directory``, durably, with the hashes of its chunks.

    ``base_id``, ``created``: if it is a base that was made before. From here on, nobody writes to the image.
    """
    _write_manifest(directory / "manifest", hashes, size, fs)
    fingerprint = fingerprint_of(size, read_manifest(directory / "manifest", size))
    fd = fs.open(directory / "image", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if immutable:
            _forbid_changes(fd, fs)
        samples = take_samples(fd, size)
        identity = Identity.of(fs.fstat(fd))
    finally:
        fs.close(fd)
    base_id, created = base_id or uuid.uuid4().bytes, created or time.time_ns()
    record = BaseRecord(base_id, size, fingerprint, created, source, identity, samples)
    save(directory / "base.json", record.dump(), fs)
    return record


def detect_format(fd: int) -> str:
    """qemu-img's name of the image's format; ``raw`` for whatever has no known signature."""
    head = os.pread(fd, 512, 0)
    for offset, magic, name in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return name
    end = os.lseek(fd, 0, os.SEEK_END)
    if end >= 512 and os.pread(fd, 8, end - 512) == b"conectix":
        return "vpc"  # a VHD of fixed size: the raw image, and a footer of 512 bytes
    return "raw"


def open_source(source: Path, needed: str = "") -> int:
    """Open an image file or block device to be read. ``needed`` ends the messages: who needs it.

    Raises NotFound, InvalidImage.
    """
    try:
        # O_NONBLOCK: a FIFO is to be refused, not waited for.
        fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"{source}: no such file{needed}") from None
    except OSError as error:
        raise InvalidImage(f"{source} cannot be read: {os.strerror(error.errno or 0)}{needed}") from None
    kind = os.fstat(fd).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        os.close(fd)
        raise InvalidImage(f"{source} is neither a file nor a block device{needed}")
    return fd


def _usable_size(fd: int, source: Path, force: bool) -> int:
    size = os.lseek(fd, 0, os.SEEK_END)
    if size == 0:
        raise InvalidImage(f"{source} is empty")
    if size % SECTOR_SIZE:
        raise InvalidImage(
            f"{source} has {size} bytes, which is no whole number of 512-byte sectors: truncated, or not a disk image "
            f"(if it is right as it is, pad it: truncate -s %512 FILE)"
        )
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise InvalidImage(f"{source} has {size} bytes; a base has {MIN_SIZE} to {MAX_SIZE}")
    claim = claimed_size(fd)
    if claim and claim.size > size and not force:
        raise InvalidImage(
            f"{source} is truncated: it has {size} bytes, and its {claim.what} reaches to {claim.size} "
            f"(--force imports it all the same)"
        )
    return size


def _copy(source_fd: int, size: int, target: Path, fs: FileSystem, progress: Progress | None) -> dict[int, bytes]:
    """Copy a raw image and hash it in one pass. Where extents can be shared only the hashing reads."""
    fd = fs.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        shared = fs.reflink(fd, source_fd)
        _set_size(fd, size, fs)
        hashes: dict[int, bytes] = {}
        buffer = bytearray(CHUNK_SIZE)
        for start, end in data_ranges(source_fd, size):
            for offset in range(start, end, CHUNK_SIZE):
                view = memoryview(buffer)[: min(CHUNK_SIZE, size - offset)]
                if fs.pread_all(source_fd, [view], offset, len(view)) != len(view):
                    raise InvalidImage("the image shrank while it was imported")
                digest = hashes[offset // CHUNK_SIZE] = chunk_hash(view)
                if not shared and digest != ZERO_CHUNK:
                    for zero, first, last in zero_runs(view):
                        if not zero:
                            fs.pwrite_all(fd, view[first:last], offset + first)
                if progress:
                    progress(offset + len(view), size)
        if progress:
            progress(size, size)
        _seal(fd, fs)
    finally:
        fs.close(fd)
    return hashes


def _take_converted(source: Path, target: Path, force: bool, fs: FileSystem) -> tuple[int, dict[int, bytes]]:
    fd = fs.open(target, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = _usable_size(fd, source, force)
        buffer = bytearray(CHUNK_SIZE)
        hashes: dict[int, bytes] = {}
        for start, end in data_ranges(fd, size):
            for offset in range(start, end, CHUNK_SIZE):
                count = fs.pread_all(fd, [buffer], offset, min(CHUNK_SIZE, size - offset))
                hashes[offset // CHUNK_SIZE] = chunk_hash(memoryview(buffer)[:count])
        _seal(fd, fs)
    finally:
        fs.close(fd)
    return size, hashes


def _set_size(fd: int, size: int, fs: FileSystem) -> None:
    try:
        fs.ftruncate(fd, size)
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise FileTooLarge(f"an image of {size} bytes is larger than a file can be on the pool's file system") from None


def _seal(fd: int, fs: FileSystem) -> None:
    fs.fchmod(fd, 0o444)
    fs.sync(fd)


def _forbid_changes(fd: int, fs: FileSystem) -> None:
    try:
        fs.set_immutable(fd, True)
        fs.sync(fd)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise StorageError(
            f"the image cannot be made immutable ({reason}): that takes root, and a file system that knows it "
            f"(ext4, XFS, btrfs); without --immutable it is only read-only"
        ) from None


def _write_manifest(path: Path, hashes: dict[int, bytes], size: int, fs: FileSystem) -> None:
    """Each chunk's hash at its own place; chunks of zeros are holes of the manifest too."""
    fd = fs.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
    try:
        fs.ftruncate(fd, -(-size // CHUNK_SIZE) * HASH_SIZE)
        for chunk, digest in hashes.items():
            if digest != ZERO_CHUNK:
                fs.pwrite_all(fd, digest, chunk * HASH_SIZE)
        fs.sync(fd)
    finally:
        fs.close(fd)


def _convert(source: Path, image_format: str, target: Path, progress: Progress | None, force: bool) -> None:
    """Have qemu-img make a raw image of it. The work is its own; what it complains of is passed on."""
    program = shutil.which("qemu-img")
    if program is None:
        raise InvalidImage(
            f"{source} is a {image_format} image, and qemu-img, which converts it, is not installed "
            f"(Debian: apt install qemu-utils)"
        )
    name = os.path.abspath(source)  # so that qemu-img does not take a name with a colon for a protocol
    check = subprocess.run(
        [program, "check", "-f", image_format, "--output=json", name], capture_output=True, text=True, check=False
    )
    if check.returncode not in CHECK_PASSES:
        raise InvalidImage(f"{source} is damaged or truncated: {complaint_of(check.stderr, check.stdout)}")
    if not force:
        _require_whole(program, source, name, image_format)
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            [program, "convert", "-p", "-f", image_format, "-O", "raw", name, str(target)],
            stdout=subprocess.PIPE,
            stderr=complaints,
        )
        try:
            assert process.stdout is not None
            while piece := os.read(process.stdout.fileno(), 4096):
                if progress and (percent := _PERCENT.findall(piece)):
                    progress(int(float(percent[-1]) * 100), 10_000)
            if process.wait() != 0:
                complaints.seek(0)
                complaint = complaints.read().decode(errors="replace")
                kind = StorageError if "No space left" in complaint else InvalidImage
                raise kind(f"{source} cannot be converted: {complaint_of(complaint)}")
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


def _require_whole(program: str, source: Path, name: str, image_format: str) -> None:
    """Raises InvalidImage if data of the image, or of one that it stands on, would lie beyond the end of its file.

    qemu reads that as zeros. Its check lets the last cluster of a qcow2 or vmdk pass, and all of a vdi.
    """
    command = [program, "info", "-f", image_format, "--backing-chain", "--output=json", name]
    info = subprocess.run(command, capture_output=True, text=True, check=False)
    if info.returncode != 0:
        raise InvalidImage(f"{source} cannot be read: {complaint_of(info.stderr)}")
    chain = json.loads(info.stdout)
    ends = data_ends(program, ["-f", image_format, name], len(chain))
    if ends is None:
        raise InvalidImage(f"{source} cannot be read: qemu-img map fails")
    for image, end in zip(chain, ends, strict=True):
        details = image.get("format-specific", {}).get("data", {})
        if "data-file" in details or details.get("create-type", "monolithicSparse") != "monolithicSparse":
            continue  # the offsets are those of other files
        with contextlib.suppress(OSError), open(image["filename"], "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if end > size:
                raise InvalidImage(
                    f"{image['filename']} is truncated: it has {size} bytes, and its data reaches to {end} "
                    f"(--force imports it all the same)"
                )
