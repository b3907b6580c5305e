"""A base: an immutable raw image, and the record that says what it must hold.

A base is a directory of the pool:

    image      the raw image, read-only
    manifest   a BLAKE3 hash of 32 bytes for each chunk of 4 MiB of it; all zeros for a chunk of zeros
    base.json  its id, size, fingerprint, and the identity of the image file when it was last known to be right

The fingerprint is the BLAKE3 hash of the size and the manifest: it names the content. Hashing the content at each open
would make opening linear in what is not touched; so the file's identity (size, inode, mtime, ctime) and eight sampled
blocks are compared, and only where one differs is the content hashed and compared.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from nbdclone.errors import BaseChanged, NotFound, StorageError, UnsupportedFormat
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.layer import BLOCK_SIZE, BLOCKS_PER_SEGMENT, MAX_SIZE, block_count, is_zero, uniform
from nbdclone.store.records import hex_bytes

FORMAT = 1
# Large enough that the manifest of a 1 TiB base is 8 MiB, small enough that a mismatch names a place worth naming.
CHUNK_SIZE = 4 << 20
HASH_SIZE = 32
ZERO_CHUNK = bytes(HASH_SIZE)
# Stands for the hash of a chunk that cannot be read; no chunk has it.
UNREADABLE = b"\xff" * HASH_SIZE
# base.json is about a thousand bytes; a larger one is not ours.
MAX_RECORD_SIZE = 1 << 16
# Blocks that each open compares, against damage that the file system knows nothing of: 20 us when they are in memory.
SAMPLES = 8

# Records that clones share: of so many bases, those opened last. One is a kilobyte.
KEPT_RECORDS = 64

# Held while content is hashed: many clones of a base may be opened at once.
_verifying = threading.RLock()

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, slots=True)
class Identity:
    """What the file system says of an image file: cheap to compare, and different after any change or copy."""

    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        return cls(status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Samples:
    """Some blocks of the image, and the hash of them all in their order: BLAKE3, in hex. The last may be shorter."""

    offsets: tuple[int, ...]
    hash: str

    @classmethod
    def take(cls, fd: int, offsets: Sequence[int]) -> Samples:
        whole = blake3()
        for offset in offsets:
            whole.update(os.pread(fd, BLOCK_SIZE, offset))
        return cls(tuple(offsets), whole.hexdigest())

    @classmethod
    def load(cls, fields: dict[str, Any] | None) -> Samples | None:
        if fields is None:
            return None
        offsets = tuple(int(offset) for offset in fields["offsets"])
        if len(offsets) > SAMPLES or not all(0 <= offset <= MAX_SIZE for offset in offsets):
            raise ValueError("places beyond any image")
        return cls(offsets, str(fields["hash"]))


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """What ``base.json`` holds. ``size`` is in bytes, ``created`` in ns of Unix time.

    A record that was made before there were samples has none.
    """

    id: bytes
    size: int
    fingerprint: bytes
    created: int
    source: str
    identity: Identity
    samples: Samples | None = None

    def dump(self) -> bytes:
        fields = asdict(self) | {"format": FORMAT, "id": self.id.hex(), "fingerprint": self.fingerprint.hex()}
        return json.dumps(fields, indent=1).encode() + b"\n"

    @classmethod
    def load(cls, path: Path) -> BaseRecord:
        """Read and check a record. Raises NotFound, UnsupportedFormat or StorageError."""
        try:
            with open(FILE_SYSTEM.open_file(path, os.O_RDONLY), "rb") as file:
                fields: dict[str, Any] = json.loads(file.read(MAX_RECORD_SIZE))
            if fields["format"] > FORMAT:
                raise UnsupportedFormat(
                    f"{path}: made by a newer nbdclone (format {fields['format']}, this one knows {FORMAT})"
                )
            return cls(
                id=hex_bytes(16, fields["id"]),
                size=int(fields["size"]),
                fingerprint=hex_bytes(HASH_SIZE, fields["fingerprint"]),
                created=int(fields["created"]),
                source=str(fields["source"]),
                identity=Identity(**{name: int(fields["identity"][name]) for name in Identity.__slots__}),
                samples=Samples.load(fields.get("samples")),
            )
        except FileNotFoundError:
            raise NotFound(f"{path}: no such base") from None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise StorageError(f"{path}: damaged ({type(error).__name__}: {' '.join(str(error).split())})") from None

    def is_known(self, fd: int, identity: Identity) -> bool:
        """Is the image, as far as can be told without reading it all, the one that was known to be right?"""
        if identity != self.identity or identity.size != self.size:
            return False
        return self.samples is None or Samples.take(fd, self.samples.offsets) == self.samples


@functools.lru_cache(maxsize=KEPT_RECORDS)
def _kept(record: BaseRecord) -> BaseRecord:
    """The record, or one like it that others hold: ten thousand clones of a base hold one."""
    return record


class Image:
    """The layer at the bottom of a chain: a base's image, opened read-only and shared by all who read it."""

    stride = 0

    def __init__(self, name: str, directory: Path, record: BaseRecord, fd: int, fs: FileSystem) -> None:
        self.name = name
        self.directory = directory
        self.record = record
        self.fd = fd
        self.size = record.size
        self.fs = fs

    @classmethod
    def open(cls, name: str, directory: Path, fs: FileSystem = FILE_SYSTEM) -> Image:
        """Open a base and see that it is what was imported.

        Costs a dozen system calls when the file's identity and its samples are the recorded ones, a hash of the content
        otherwise (after the pool was copied, say). Raises NotFound, StorageError, or BaseChanged with the difference.
        """
        record = BaseRecord.load(directory / "base.json")
        path = directory / "image"
        try:
            fd = fs.open_file(path, os.O_RDONLY)
        except FileNotFoundError:
            _require_there(name, directory)
            raise BaseChanged(f"base '{name}' is not there any more: {path} is missing") from None
        try:
            fs.lock(fd, path, f"base '{name}'", shared=True)
            status = fs.fstat(fd)
            if not fs.still_there(path, status):
                _require_there(name, directory)
                raise BaseChanged(f"base '{name}' was replaced just now ({path})")
            identity = Identity.of(status)
            # The samples alone: what the kernel read ahead of them would put all later reading of the file out of step.
            fs.fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            known = record.is_known(fd, identity)
            fs.fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)
            if not known:
                with _verifying:  # one hashes; the others find what it recorded
                    record = BaseRecord.load(directory / "base.json")
                    if not record.is_known(fd, identity):
                        _verify(fd, name, directory, record)
                        record = replace(record, identity=identity, samples=take_samples(fd, record.size))
                        _renew(directory, record, fs)
        except BaseException:
            fs.close(fd)
            raise
        return cls(name, directory, _kept(record), fd, fs)

    @property
    def id(self) -> bytes:
        return self.record.id

    def paint(self, segment: int, owners: bytes, index: int, nowait: bool) -> bytes:
        blocks = min(max(block_count(self.size) - segment * BLOCKS_PER_SEGMENT, 0), BLOCKS_PER_SEGMENT)
        return uniform(index)[:blocks] + owners[blocks:]

    def close(self) -> None:
        self.fs.close(self.fd)


def _require_there(name: str, directory: Path) -> None:
    if not directory.is_dir():
        raise NotFound(f"base '{name}' was removed or renamed just now")


def _renew(directory: Path, record: BaseRecord, fs: FileSystem) -> None:
    """Record the identity under which the content was found right, so that it is not hashed again.

    A crash here leaves the old record (the content is hashed once more) or the new one. A pool that cannot be
    written is no reason to refuse a base that is right.
    """
    try:
        save(directory / "base.json", record.dump(), fs)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT):
            raise


def thaw(fs: FileSystem, image: Path, name: str) -> None:
    """Make an image removable that was imported as immutable. Raises StorageError if this user may not."""
    with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as held:
        try:
            fd = fs.open_file(image, os.O_RDONLY)
        except StorageError:
            return  # no image
        held.callback(fs.close, fd)
        if not fs.is_immutable(fd):
            return
        try:
            fs.set_immutable(fd, False)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise StorageError(f"base '{name}' is immutable ({reason}): only root can remove it") from None


def thaw_bases(fs: FileSystem, directory: Path) -> None:
    """The same for all bases in a directory of ``.tmp``, as far as this user may. It may be gone already."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for name in os.listdir(directory):
            with contextlib.suppress(StorageError, NotADirectoryError):
                thaw(fs, directory / name / "image", name)


def save(path: Path, content: bytes, fs: FileSystem = FILE_SYSTEM) -> None:
    """Put ``content`` in the file's place atomically: a crash leaves the old file or the new one, whole."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")  # of our own: another may save the same now
    fd = fs.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        try:
            fs.pwrite_all(fd, content, 0)
            fs.sync(fd)  # before the rename: a name must never point at content that is not there
        finally:
            fs.close(fd)
        fs.rename(draft, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise
    fs.sync_directory(path.parent)


def chunk_count(size: int) -> int:
    """How many chunks an image of ``size`` bytes has; the last may be shorter."""
    return -(-size // CHUNK_SIZE)


def fingerprint_of(size: int, manifest: Iterator[bytes]) -> bytes:
    """The fingerprint: BLAKE3 over the size (8 bytes, big-endian) and the chunks' hashes in order."""
    whole = blake3(size.to_bytes(8, "big"))
    for digest in manifest:
        whole.update(digest)
    return whole.digest()


def chunk_hash(data: bytes | bytearray | memoryview) -> bytes:
    """The manifest's entry for a chunk: its BLAKE3 hash, or 32 zeros if it holds nothing but zeros."""
    if is_zero(data):
        return ZERO_CHUNK
    return blake3(data, max_threads=blake3.AUTO).digest()


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The (start, end) of each stretch of whole chunks that may hold data: what lies between is a hole."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                return
            start, end = position, size  # a file system or device that knows no holes
        start = max(start - start % CHUNK_SIZE, position)
        end = min(-(-end // CHUNK_SIZE) * CHUNK_SIZE, size)
        yield start, end
        position = end


def hash_image(
    fd: int, size: int, progress: Progress | None = None, *, lenient: bool = False
) -> Iterator[tuple[int, bytes]]:
    """Yield (chunk, hash) for each chunk of the image that is not a hole. Linear in the data, not in the size.

    ``lenient``: a chunk that the disk cannot read has UNREADABLE for a hash. Raises OSError.
    """
    buffer = bytearray(CHUNK_SIZE)
    for start, end in data_ranges(fd, size):
        for offset in range(start, end, CHUNK_SIZE):
            count = min(CHUNK_SIZE, size - offset)
            try:
                count = FILE_SYSTEM.pread_all(fd, [buffer], offset, count)
                digest = chunk_hash(memoryview(buffer)[:count])
            except OSError as error:
                if not lenient or error.errno != errno.EIO:
                    raise
                digest = UNREADABLE
            yield offset // CHUNK_SIZE, digest
            if progress:
                progress(offset + count, size)


def read_manifest(path: Path, size: int) -> Iterator[bytes]:
    """The hashes of a manifest file in order; a file that is too short gives zeros for the rest."""
    with open(FILE_SYSTEM.open_file(path, os.O_RDONLY), "rb", buffering=1 << 20) as file:
        for _ in range(chunk_count(size)):
            yield file.read(HASH_SIZE).ljust(HASH_SIZE, b"\0")


def hash_all(fd: int, size: int, progress: Progress | None = None, *, lenient: bool = False) -> Iterator[bytes]:
    """Yield what the manifest of the image is, chunk by chunk: what :func:`hash_image` yields, and the holes."""
    chunk = 0
    for number, digest in hash_image(fd, size, progress, lenient=lenient):
        yield from itertools.repeat(ZERO_CHUNK, number - chunk)
        yield digest
        chunk = number + 1
    yield from itertools.repeat(ZERO_CHUNK, chunk_count(size) - chunk)


def take_samples(fd: int, size: int) -> Samples:
    """The first block, the last, and others evenly between them, each moved up to the next data there is."""
    last = (size - 1) // BLOCK_SIZE
    offsets = {0, last * BLOCK_SIZE}
    for number in range(1, SAMPLES - 1):
        offset = number * last // (SAMPLES - 1) * BLOCK_SIZE
        with contextlib.suppress(OSError):  # nothing but a hole behind it, or a file system that knows none
            offset = os.lseek(fd, offset, os.SEEK_DATA)
        offsets.add(offset - offset % BLOCK_SIZE)
    return Samples.take(fd, sorted(offsets))


def compare(
    fd: int, size: int, manifest: Iterator[bytes], progress: Progress | None = None, *, lenient: bool = False
) -> tuple[bytes, list[tuple[int, int]]]:
    """Hash the content: its fingerprint, and the (offset, length) of where it is not what the manifest says.

    Takes memory for what differs alone; neighbours are one. ``lenient``: what cannot be read differs. Raises OSError.
    """
    whole = blake3(size.to_bytes(8, "big"))
    differing: list[tuple[int, int]] = []
    for chunk, (found, expected) in enumerate(
        zip(hash_all(fd, size, progress, lenient=lenient), manifest, strict=True)
    ):
        whole.update(found)
        if found != expected:
            append_chunk(differing, chunk, size)
    return whole.digest(), differing


def append_chunk(ranges: list[tuple[int, int]], chunk: int, size: int) -> None:
    """Add a chunk of ``size`` bytes of content to the (offset, length) of those before it; neighbours are one."""
    offset = chunk * CHUNK_SIZE
    length = min(CHUNK_SIZE, size - offset)
    if ranges and sum(ranges[-1]) == offset:
        offset, before = ranges.pop()
        length += before
    ranges.append((offset, length))


def _verify(fd: int, name: str, directory: Path, record: BaseRecord) -> None:
    """Hash the content and compare it with the manifest. Raises BaseChanged that says what differs."""
    what = f"base '{name}' was changed after its import ({directory / 'image'})"
    size = os.fstat(fd).st_size
    if size != record.size:
        kind = "truncated" if size < record.size else "grown"
        raise BaseChanged(f"{what}: it was {kind}, from {record.size} to {size} bytes")
    try:
        fingerprint, differing = compare(fd, size, read_manifest(directory / "manifest", size))
    except (FileNotFoundError, StorageError):  # the fingerprint alone decides
        fingerprint, differing = fingerprint_of(size, hash_all(fd, size)), []
    if fingerprint != record.fingerprint:
        raise BaseChanged(f"{what}: its content differs" + (f" in bytes {in_words(differing)}" if differing else ""))


def in_words(ranges: Sequence[tuple[int, int]]) -> str:
    """Ranges (offset, length) for a person: the first and last byte of each, three of them and how many more."""
    shown = ", ".join(f"{offset}-{offset + length - 1}" for offset, length in ranges[:3])
    return shown + (f" and {len(ranges) - 3} more" if len(ranges) > 3 else "")
