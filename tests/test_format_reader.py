"""A second reader of the files, written from docs/format.md alone, against what the project itself reads and writes."""

import json
import os
import random
import re
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from blake3 import blake3

from nbdclone import Pool
from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import find_verb
from nbdclone.store.check import check_pool

BLOCK = 4096
CHUNK = 4 << 20
METADATA = 1 << 20
SPAN = 133169152  # bytes of the disk in one segment
SEGMENT = METADATA + SPAN
HEADERS = (0, 524288)
MAPS = (65536, 589824)
RECORDS = (131072, 655360)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
HEADER = struct.Struct(">8sIIQQQ16s16s32sQQH255sQ16sQ")
MAP = struct.Struct(">4sIQQ8s4064s")
RECORD = struct.Struct(">4sI8sQ")
ENTRY = struct.Struct(">Q16s")


class Refused(Exception):
    """The files are not what the document says they are."""


class Header:
    """One valid slot of the header."""

    def __init__(self, page: bytes) -> None:
        (
            self.magic,
            self.version,
            self.block_size,
            self.must_know,
            self.may_ignore,
            self.sequence,
            self.id,
            self.parent,
            self.fingerprint,
            self.size,
            self.created,
            length,
            name,
            self.quota,
            self.origin,
            overlap,
        ) = HEADER.unpack_from(page)
        self.parent_name = name[:length].decode(errors="replace")  # a hint
        self.overlap = overlap if self.must_know & 2 else None

    @classmethod
    def of(cls, page: bytes) -> "Header | None":
        if page[:8] != b"NBDDELTA" or zlib.crc32(page[:4092]) != int.from_bytes(page[4092:], "big"):
            return None
        return cls(page)


class Delta:
    """One delta: of a clone, or a layer, of which there are no records."""

    def __init__(self, path: Path, *, sealed: bool) -> None:
        self._sealed = sealed
        self._bitmaps: dict[int, bytes] = {}
        try:
            self.fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise Refused(f"{path} is missing") from None
        try:
            self.header = self._header()
            self.size = self.header.size
            if os.fstat(self.fd).st_size < file_size(self.size):
                raise Refused("the delta is cut short")
        except BaseException:
            os.close(self.fd)
            raise

    def has(self, block: int) -> bool:
        segment, within = divmod(block, SPAN // BLOCK)
        return block * BLOCK < self.size and is_set(self._bitmap(segment), within)

    def hides(self, block: int) -> bool:
        """Is nothing of what is beneath seen there?"""
        return self.header.overlap is not None and block >= self.header.overlap // BLOCK

    def _header(self) -> Header:
        slots = [Header.of(os.pread(self.fd, BLOCK, at)) for at in HEADERS]
        valid = [slot for slot in slots if slot is not None]
        if not valid:
            raise Refused("no slot of the header is valid")
        header = max(valid, key=lambda slot: slot.sequence)
        if header.version != 1 or header.must_know & ~3:
            raise Refused("a format that this reader does not know")
        if header.block_size != BLOCK:
            raise Refused(f"blocks of {header.block_size} bytes")
        return header

    def _bitmap(self, segment: int) -> bytes:
        if segment not in self._bitmaps:
            recorded = [] if self._sealed else self.recorded()  # before the map: a writer may be at work
            bitmap = bytearray(self._read_bitmap(segment))
            for block in recorded:
                if block // (SPAN // BLOCK) == segment:
                    within = block % (SPAN // BLOCK)
                    bitmap[within // 8] |= 128 >> within % 8
            self._bitmaps[segment] = bytes(bitmap)
        return self._bitmaps[segment]

    def recorded(self) -> list[int]:
        """The blocks that the records tell of, and that are as they say."""
        blocks = []
        for at in RECORDS if self.header.must_know & 1 else ():
            page = exactly(self.fd, BLOCK, at)
            magic, checksum, delta_id, count = RECORD.unpack_from(page)
            if (
                magic != b"NREC"
                or checksum != zlib.crc32(page[8:])
                or delta_id != self.header.id[:8]
                or count > (BLOCK - RECORD.size) // ENTRY.size
            ):
                continue
            for index in range(count):
                block, content = ENTRY.unpack_from(page, RECORD.size + index * ENTRY.size)
                if block * BLOCK < self.size:
                    place = block * BLOCK + (block * BLOCK // SPAN + 1) * METADATA
                    if blake3(exactly(self.fd, BLOCK, place)).digest()[:16] == content:
                        blocks.append(block)
        return blocks

    def _read_bitmap(self, segment: int) -> bytes:
        pages = [exactly(self.fd, BLOCK, segment * SEGMENT + at) for at in MAPS]
        valid = []
        for page in pages:
            magic, checksum, number, sequence, delta_id, bitmap = MAP.unpack(page)
            if (
                magic == b"NMAP"
                and checksum == zlib.crc32(page[8:])
                and number == segment
                and delta_id == self.header.id[:8]
            ):
                valid.append((sequence, bitmap))
        if valid:
            return max(valid, key=lambda slot: slot[0])[1]
        if any(page == bytes(BLOCK) for page in pages):
            return bytes(SPAN // BLOCK // 8)
        raise Refused(f"the map of segment {segment} is lost")


class Reader:
    """The disk of one clone or snapshot, from nothing but the files of its pool."""

    def __init__(self, pool: Path, name: str) -> None:
        clone, at, snapshot = name.partition("@")
        if not NAME.fullmatch(clone) or (at and not NAME.fullmatch(snapshot)):
            raise Refused(f"{name!r} is no name")
        self._deltas: list[Delta] = []  # from the top downwards
        self._image: int | None = None
        self.hashed = False  # whether the image had to be hashed
        try:
            top = self._add(pool / "clones" / clone / "delta", sealed=False)
            if at:
                top = self._snapshot(pool, clone, snapshot, top.header.id)
            self.header = top.header
            self.size = self.header.size
            self._go_down(pool)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._deltas:
            os.close(self._deltas.pop().fd)
        if self._image is not None:
            os.close(self._image)
            self._image = None

    def read(self, length: int, offset: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError("outside of the disk")
        pieces = []
        end = offset + length
        while offset < end:
            segment = offset // SPAN
            block = offset // BLOCK
            origin = self._origin(block)
            limit = min(end, (segment + 1) * SPAN)
            stop = offset - offset % BLOCK + BLOCK
            while stop < limit and self._origin(block + 1) is origin:
                block += 1
                stop += BLOCK
            stop = min(stop, limit)
            if origin is not None:
                pieces.append(exactly(origin.fd, stop - offset, offset + (segment + 1) * METADATA))
            else:
                pieces.append(self._beneath(stop - offset, offset))
            offset = stop
        return b"".join(pieces)

    def recorded(self) -> list[int]:
        return self._deltas[0].recorded()

    def _origin(self, block: int) -> Delta | None:
        """The delta that has the block; None: the base has it, or nothing."""
        for delta in self._deltas:
            if delta.has(block):
                return delta
            if delta.hides(block):
                return None
        return None

    def _beneath(self, length: int, offset: int) -> bytes:
        """What the base has there; zeros where it has ended, is not seen, or is not there at all."""
        seen = [delta.header.overlap // BLOCK * BLOCK for delta in self._deltas if delta.header.overlap is not None]
        data = b""
        if self._image is not None:
            data = os.pread(self._image, max(0, min([length, *(end - offset for end in seen)])), offset)
        return data.ljust(length, b"\0")

    def _add(self, path: Path, *, sealed: bool) -> Delta:
        delta = Delta(path, sealed=sealed)
        self._deltas.append(delta)
        return delta

    def _snapshot(self, pool: Path, clone: str, name: str, own_id: bytes) -> Delta:
        """Put the layer of a snapshot in the place of the clone's delta."""
        os.close(self._deltas.pop().fd)
        try:
            about = json.loads((pool / "clones" / clone / "snapshots" / name).read_text())
        except FileNotFoundError:
            raise Refused(f"there is no snapshot {name}") from None
        if about["layer"] == own_id.hex():
            raise Refused("it was cut off before it was one")
        return self._layer(pool, bytes.fromhex(about["layer"]))

    def _layer(self, pool: Path, layer_id: bytes) -> Delta:
        delta = self._add(pool / "layers" / layer_id.hex() / "delta", sealed=True)
        if delta.header.id != layer_id:
            raise Refused("another delta stands there")
        return delta

    def _go_down(self, pool: Path) -> None:
        header = self.header
        seen = {header.id}
        while header.parent != bytes(16):
            if header.parent in seen or len(seen) > 254:
                raise Refused("the chain has no end")
            seen.add(header.parent)
            if not (pool / "layers" / header.parent.hex() / "delta").exists():
                base = base_folder(pool, header)
                self._image = os.open(base / "image", os.O_RDONLY)
                self._check_base(base, header)
                return
            header = self._layer(pool, header.parent).header

    def _check_base(self, folder: Path, header: Header) -> None:
        assert self._image is not None
        about = json.loads((folder / "base.json").read_text())
        if about["format"] != 1:
            raise Refused("a base of another format")
        if bytes.fromhex(about["fingerprint"]) != header.fingerprint:
            raise Refused("the base is another one")
        size = about["size"]
        manifest = (folder / "manifest").read_bytes()
        if fingerprint(size, manifest) != header.fingerprint:
            raise Refused("the manifest is not that of the fingerprint")
        now = os.fstat(self._image)
        if about["identity"] != {
            "size": now.st_size,
            "inode": now.st_ino,
            "mtime_ns": now.st_mtime_ns,
            "ctime_ns": now.st_ctime_ns,
        }:
            self.hashed = True
            if now.st_size != size or hashes_of(self._image, size) != manifest:
                raise Refused("the image has changed")


def base_folder(pool: Path, header: Header) -> Path:
    for path in sorted((pool / "bases").glob("*/base.json")):
        with suppress(ValueError, KeyError):  # another base may be broken
            if bytes.fromhex(json.loads(path.read_text())["id"]) == header.parent:
                return path.parent
    raise Refused(f"no base with the id of {header.parent_name}")


def is_set(bitmap: bytes, block: int) -> bool:
    return bool(bitmap[block // 8] & 128 >> block % 8)


def exactly(fd: int, length: int, offset: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) != length:
        raise Refused("the delta is cut short")
    return data


def file_size(size: int) -> int:
    whole, rest = divmod(size, SPAN)
    return whole * SEGMENT + (METADATA + -(-rest // BLOCK) * BLOCK if rest else 0)


def hashes_of(fd: int, size: int) -> bytes:
    hashes = []
    for at in range(0, size, CHUNK):
        data = os.pread(fd, CHUNK, at)
        hashes.append(blake3(data).digest() if data.strip(b"\0") else bytes(32))
    return b"".join(hashes)


def fingerprint(size: int, manifest: bytes) -> bytes:
    return blake3(size.to_bytes(8, "big") + manifest).digest()


class Disk:
    """What a disk should hold: its pieces by number, zeros where there is none."""

    PIECE = 1000  # no divisor or multiple of anything in the format

    def __init__(self, size: int) -> None:
        self.size = size
        self.pieces: dict[int, bytearray] = {}

    def grown(self, size: int) -> "Disk":
        other = Disk(size)
        other.pieces = {number: bytearray(piece) for number, piece in self.pieces.items()}
        return other

    def write(self, data: bytes, offset: int) -> None:
        done = 0
        while done < len(data):
            number, within = divmod(offset + done, self.PIECE)
            part = data[done : done + self.PIECE - within]
            self.pieces.setdefault(number, bytearray(self.PIECE))[within : within + len(part)] = part
            done += len(part)

    def zero(self, offset: int, length: int) -> None:
        self.write(bytes(length), offset)

    def read(self, length: int, offset: int) -> bytes:
        first, within = divmod(offset, self.PIECE)
        last = -(-(offset + length) // self.PIECE)
        hole = bytes(self.PIECE)
        return b"".join(self.pieces.get(number, hole) for number in range(first, last))[within : within + length]


BASE_SIZE = 9 * (1 << 20) + 512  # ends inside of a chunk, and of a block; its second chunk is a hole


@pytest.fixture
def rng() -> random.Random:
    return random.Random(20)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "pool"


def import_image(store: Path, disk: Disk, name: str = "base") -> None:
    """Make the disk a base, from a sparse file."""
    source = store.parent / f"{name}.img"
    with source.open("wb") as file:
        file.truncate(disk.size)
        for number, piece in disk.pieces.items():
            file.seek(number * disk.PIECE)
            file.write(piece[: disk.size - number * disk.PIECE])
    Pool.open(str(store), create=True).import_base(str(source), name)


@pytest.fixture
def base(store: Path, rng: random.Random) -> Disk:
    """A base of data and holes, in the pool as `base`."""
    disk = Disk(BASE_SIZE)
    for offset, length in ((0, 300_000), (1 << 20, 4096), (2_000_001, 77), (3 << 20, 1 << 20), (8 << 20, 10_000)):
        disk.write(rng.randbytes(length), offset)
    disk.write(rng.randbytes(5000), BASE_SIZE - 5000)
    import_image(store, disk)
    return disk


def make_clone(store: Path, size: int | None = None, name: str = "clone") -> Pool:
    pool = Pool.open(str(store))
    pool.create_clones("base", [name], size=size)
    return pool


def delta_of(store: Path, name: str = "clone") -> Path:
    return store / "clones" / name / "delta"


def put(path: Path, data: bytes, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def get(path: Path, length: int, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


def edit_headers(path: Path, offset: int, field: bytes, slots: tuple[int, ...] = HEADERS) -> None:
    """Change a field of the header, and the checksum with it."""
    for at in slots:
        page = bytearray(get(path, BLOCK, at))
        page[offset : offset + len(field)] = field
        page[4092:] = zlib.crc32(page[:4092]).to_bytes(4, "big")
        put(path, page, at)


def whole(read: Callable[[int, int], bytes], disk: Disk) -> None:
    """All of the disk is as it should be, in steps that are no multiple of a block."""
    step = (1 << 20) + 7
    for offset in range(0, disk.size, step):
        length = min(step, disk.size - offset)
        if read(length, offset) != disk.read(length, offset):
            raise AssertionError(f"other bytes between {offset} and {offset + length}")


def both_read(store: Path, disk: Disk, name: str = "clone") -> None:
    with Reader(store, name) as reader:
        assert reader.size == disk.size
        whole(reader.read, disk)
    with Pool.open(str(store)).open_clone(name) as clone:
        assert clone.size == disk.size
        whole(clone.pread, disk)


@contextmanager
def refused_by_the_project() -> Iterator[None]:
    """An error of the store, known by its name: the API is the only thing taken from the project."""
    kinds = ["nothing was refused"]
    try:
        yield
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
    assert "StorageError" in kinds


def both_refuse(store: Path, offset: int = 0, name: str = "clone") -> None:
    """To open the clone, or to read the byte at the offset."""
    with pytest.raises(Refused), Reader(store, name) as reader:
        reader.read(1, offset)
    with refused_by_the_project(), Pool.open(str(store)).open_clone(name) as clone:
        clone.pread(1, offset)


def at_random(rng: random.Random, size: int) -> tuple[int, int]:
    """A range of the disk, as often on the borders of blocks as not."""
    offset, length = rng.randrange(size), rng.choice((1, 511, 512, 4096, 5000, 20_000, 65536))
    if rng.random() < 0.5:
        offset, length = offset // BLOCK * BLOCK, -(-length // BLOCK) * BLOCK
    return offset, min(length, size - offset)


# What was written is what is read


def test_a_new_clone_reads_as_its_base(store: Path, base: Disk) -> None:
    make_clone(store)
    both_read(store, base)


def test_a_clone_larger_than_its_base_ends_in_zeros(store: Path, base: Disk) -> None:
    size = BASE_SIZE + 3 * BLOCK
    make_clone(store, size)
    both_read(store, base.grown(size))


def test_writes_at_random_places_are_read_at_random_places(store: Path, base: Disk, rng: random.Random) -> None:
    size = BASE_SIZE + (2 << 20) + 512
    disk = base.grown(size)
    pool = make_clone(store, size)
    with pool.open_clone("clone") as clone:
        for turn in range(240):
            offset, length = at_random(rng, size)
            if turn % 3 == 2:
                clone.zero(offset, length, allocate=turn % 2 == 0)
                disk.zero(offset, length)
            else:
                data = rng.randbytes(length)
                clone.pwrite(data, offset)
                disk.write(data, offset)
            if turn % 40 == 39:
                clone.flush()
    with Reader(store, "clone") as reader, pool.open_clone("clone") as clone:
        for _ in range(300):
            offset, length = at_random(rng, size)
            expected = disk.read(length, offset)
            assert reader.read(length, offset) == expected
            assert clone.pread(length, offset) == expected
        assert reader.read(0, size) == b""
        with pytest.raises(ValueError, match="outside"):
            reader.read(1, size)
    both_read(store, disk)


def test_what_is_flushed_is_in_the_files_of_an_open_clone(store: Path, base: Disk, rng: random.Random) -> None:
    disk = base.grown(BASE_SIZE)
    with make_clone(store).open_clone("clone") as clone:
        for _ in range(6):
            for _ in range(10):
                offset, length = at_random(rng, BASE_SIZE)
                data = rng.randbytes(length)
                clone.pwrite(data, offset)
                disk.write(data, offset)
            clone.zero(offset, length // 2)
            disk.zero(offset, length // 2)
            clone.flush()
            with Reader(store, "clone") as reader:
                whole(reader.read, disk)
    both_read(store, disk)


def test_what_a_record_tells_is_read_after_each_flush_and_in_the_map_after_the_close(
    store: Path, base: Disk, rng: random.Random
) -> None:
    size = SPAN + (1 << 20)
    disk = base.grown(size)
    told = []
    with make_clone(store, size).open_clone("clone") as clone:
        for offset in (5000, SPAN - BLOCK, SPAN + 3 * BLOCK, 9 * BLOCK, 9 * BLOCK + 5):
            data = rng.randbytes(BLOCK)
            clone.pwrite(data, offset)
            disk.write(data, offset)
            clone.zero(offset + 20 * BLOCK, BLOCK)
            disk.zero(offset + 20 * BLOCK, BLOCK)
            clone.flush()
            with Reader(store, "clone") as reader:
                told.append(len(reader.recorded()))
                whole(reader.read, disk)
    assert max(told) > 2
    with Reader(store, "clone") as reader:
        assert reader.recorded() == []
    for at in RECORDS:
        assert get(delta_of(store), BLOCK, at) == bytes(BLOCK)
    both_read(store, disk)


def test_a_block_that_is_not_as_its_record_says_reads_from_below(store: Path, base: Disk, rng: random.Random) -> None:
    """What a crash leaves, and a power cut of it: a record of three blocks, of which one is torn."""
    blocks = (7, 9, BASE_SIZE // BLOCK)
    make_clone(store)
    disk = base.grown(BASE_SIZE)
    with Reader(store, "clone") as reader:
        delta_id = reader.header.id
    entries = []
    for block in blocks:
        data = rng.randbytes(BLOCK)
        put(delta_of(store), data, block * BLOCK + METADATA)
        entries.append((block, blake3(data).digest()[:16]))
        if block != 9:
            disk.write(data[: min(BLOCK, BASE_SIZE - block * BLOCK)], block * BLOCK)
    put(delta_of(store), b"torn", 9 * BLOCK + METADATA + 512)
    rest = delta_id[:8] + len(entries).to_bytes(8, "big") + b"".join(ENTRY.pack(*entry) for entry in entries)
    rest = rest.ljust(BLOCK - 8, b"\0")
    record = b"NREC" + zlib.crc32(rest).to_bytes(4, "big") + rest
    for at in RECORDS:
        put(delta_of(store), record, at)
        both_read(store, disk)  # and the project's own leaves it in the map
        with Reader(store, "clone") as reader:
            assert reader.recorded() == []
        both_read(store, disk)


@pytest.mark.parametrize("spoil", ["magic", "checksum", "id", "count", "feature"])
def test_a_record_that_is_not_valid_means_nothing(store: Path, base: Disk, rng: random.Random, spoil: str) -> None:
    make_clone(store)
    with Reader(store, "clone") as reader:
        delta_id = reader.header.id
    data = rng.randbytes(BLOCK)
    put(delta_of(store), data, 7 * BLOCK + METADATA)
    its_id = b"another1" if spoil == "id" else delta_id[:8]
    count = 170 if spoil == "count" else 1
    rest = (its_id + count.to_bytes(8, "big") + ENTRY.pack(7, blake3(data).digest()[:16])).ljust(BLOCK - 8, b"\0")
    checksum = zlib.crc32(rest) ^ (spoil == "checksum")
    put(delta_of(store), (b"NREX" if spoil == "magic" else b"NREC") + checksum.to_bytes(4, "big") + rest, RECORDS[0])
    if spoil == "feature":
        edit_headers(delta_of(store), 16, bytes(8))
    both_read(store, base)


def test_zeros_hide_the_data_of_the_base(store: Path, base: Disk) -> None:
    disk = base.grown(BASE_SIZE)
    with make_clone(store).open_clone("clone") as clone:
        for offset, length in ((100, 50), (8192, 4096), (20_000, 100_000), (3 << 20, 5 << 20), (BASE_SIZE - 700, 700)):
            clone.zero(offset, length)
            disk.zero(offset, length)
    both_read(store, disk)


@pytest.mark.parametrize("start", [-600, -512, -1, 0, 1, 100, 3000, 3584, 4000])
def test_a_write_near_the_end_of_the_base_keeps_what_is_around_it(
    store: Path, base: Disk, rng: random.Random, start: int
) -> None:
    size = BASE_SIZE + 4 * BLOCK
    disk = base.grown(size)
    data = rng.randbytes(700)
    with make_clone(store, size).open_clone("clone") as clone:
        clone.pwrite(data, BASE_SIZE + start)
    disk.write(data, BASE_SIZE + start)
    both_read(store, disk)


def test_a_disk_goes_on_over_the_border_of_a_segment(store: Path, base: Disk, rng: random.Random) -> None:
    size = 2 * SPAN + (1 << 20) + 512
    disk = base.grown(size)
    pool = make_clone(store, size)
    with pool.open_clone("clone") as clone:
        for offset in (5, SPAN - BLOCK, SPAN, SPAN + 3 * BLOCK - 1, 2 * SPAN - 1, size - 9000):
            data = rng.randbytes(9000)
            clone.pwrite(data, offset)
            disk.write(data, offset)
            clone.flush()
        clone.zero(SPAN - 5000, 7000)
        disk.zero(SPAN - 5000, 7000)
    both_read(store, disk)


def test_a_base_goes_on_over_the_border_of_a_segment(store: Path, rng: random.Random) -> None:
    size = SPAN + (1 << 20)
    base = Disk(size)
    base.write(rng.randbytes(50_000), 0)
    base.write(rng.randbytes(300_000), SPAN - 150_000)
    base.write(rng.randbytes(100), size - 100)
    import_image(store, base)
    disk = base.grown(size)
    with make_clone(store).open_clone("clone") as clone:
        data = rng.randbytes(20_001)
        clone.pwrite(data, SPAN - 10_000)
        disk.write(data, SPAN - 10_000)
        clone.zero(SPAN + 40_000, 50_000)
        disk.zero(SPAN + 40_000, 50_000)
    both_read(store, disk)


def test_clones_of_one_base_do_not_see_each_other(store: Path, base: Disk, rng: random.Random) -> None:
    disks = {}
    for name in ("one", "two.2", "three-3_c"):
        disk = disks[name] = base.grown(BASE_SIZE)
        data = rng.randbytes(30_000)
        with make_clone(store, name=name).open_clone(name) as clone:
            clone.pwrite(data, 250_000)
        disk.write(data, 250_000)
    for name, disk in disks.items():
        both_read(store, disk, name)


# Layers


def write_some(clone: object, disk: Disk, rng: random.Random, count: int = 6) -> None:
    for turn in range(count):
        offset, length = at_random(rng, disk.size)
        if turn % 3 == 2:
            clone.zero(offset, length)  # type: ignore[attr-defined]
            disk.zero(offset, length)
        else:
            data = rng.randbytes(length)
            clone.pwrite(data, offset)  # type: ignore[attr-defined]
            disk.write(data, offset)


@pytest.fixture
def chain(store: Path, base: Disk, rng: random.Random) -> dict[str, Disk]:
    """A clone with four snapshots, a clone of the second, and one of the last that is larger: what each should be."""
    disk = base.grown(BASE_SIZE)
    pool = make_clone(store)
    disks: dict[str, Disk] = {}
    for turn in range(4):
        with pool.open_clone("clone") as clone:
            write_some(clone, disk, rng)
        pool.snapshot(f"clone@{turn}")
        disks[f"clone@{turn}"] = disk.grown(disk.size)
    pool.create_clones("clone@1", ["other"])
    disks["other"] = disks["clone@1"].grown(disk.size)
    pool.create_clones("clone@3", ["larger"], size=BASE_SIZE + (1 << 20))
    disks["larger"] = disk.grown(BASE_SIZE + (1 << 20))
    disks["clone"] = disk
    for name in ("clone", "other", "larger"):
        with pool.open_clone(name) as clone:
            write_some(clone, disks[name], rng)
    return disks


def test_clones_and_snapshots_are_read_through_their_layers(store: Path, chain: dict[str, Disk]) -> None:
    for name, disk in chain.items():
        both_read(store, disk, name)


def test_a_layer_whose_space_is_given_back_is_hidden_by_what_is_above_it(
    store: Path, chain: dict[str, Disk], monkeypatch: pytest.MonkeyPatch
) -> None:
    for constant in ("copying.STEP", "copying.SPAN", "giving_back.STRETCH"):
        monkeypatch.setattr(f"nbdclone.store.{constant}", BLOCK)
    pool = Pool.open(str(store))
    pool.remove(["clone@2"])
    chain.pop("clone@2")
    merging = find_verb("merge").begin(LocalTarget(pool), {})
    before = {path: path.stat().st_blocks for path in store.glob("layers/*/delta")}
    for _ in range(8):
        next(merging)
    merging.close()
    (mark,) = store.glob("layers/*/going")
    layer = mark.with_name("delta")
    assert layer.stat().st_blocks < before[layer]
    for name, disk in chain.items():
        both_read(store, disk, name)


def test_after_a_rollback_and_a_reset_there_is_what_was(store: Path, base: Disk, chain: dict[str, Disk]) -> None:
    pool = Pool.open(str(store))
    pool.rollback("clone@0")
    both_read(store, chain["clone@0"])
    pool.reset("other")
    both_read(store, chain["clone@1"], "other")
    pool.reset("clone")
    both_read(store, base.grown(BASE_SIZE))
    with Reader(store, "clone") as reader, Reader(store, "other") as other:
        assert reader.header.origin == reader.header.parent
        assert other.header.parent_name == "clone@1"


def test_a_chain_without_one_of_its_layers_is_refused(store: Path, chain: dict[str, Disk]) -> None:
    about = json.loads((store / "clones" / "clone" / "snapshots" / "1").read_text())
    shutil.rmtree(store / "layers" / about["layer"])
    for name in ("clone", "other", "larger", "clone@3", "clone@1"):
        both_refuse(store, name=name)
    both_read(store, chain["clone@0"], "clone@0")


def test_another_delta_in_the_place_of_a_layer_is_refused(store: Path, chain: dict[str, Disk]) -> None:
    about = json.loads((store / "clones" / "clone" / "snapshots" / "1").read_text())
    layer = store / "layers" / about["layer"] / "delta"
    layer.unlink()
    shutil.copy(delta_of(store, "larger"), layer)
    for name in ("clone", "other", "clone@1", "clone@2"):
        both_refuse(store, name=name)


def test_a_snapshot_of_the_clones_own_delta_was_cut_off(store: Path, base: Disk) -> None:
    make_clone(store)
    with Reader(store, "clone") as reader:
        own = reader.header.id.hex()
    (store / "clones" / "clone" / "snapshots").mkdir()
    (store / "clones" / "clone" / "snapshots" / "cut").write_text(json.dumps({"layer": own, "created": 1}))
    (store / "layers" / own).mkdir(parents=True)
    os.link(delta_of(store), store / "layers" / own / "delta")
    with pytest.raises(Refused, match="cut off"):
        Reader(store, "clone@cut")
    assert "clone@cut" not in Pool.open(str(store)).names()
    both_read(store, base)


def test_of_a_delta_without_a_parent_the_rest_is_zeros(store: Path, written: Disk) -> None:
    """What a clone that was cut free of its base has: its own blocks."""
    own = Disk(written.size)
    with Pool.open(str(store)).open_clone("clone") as clone:
        offset = 0
        for extent in clone.extents(0, clone.size):
            if extent.depth == 1:
                own.write(written.read(extent.length, offset), offset)
            offset += extent.length
    edit_headers(delta_of(store), 56, bytes(16))
    both_read(store, own)


@pytest.mark.parametrize("overlap", [0, BLOCK, 3 << 20, BASE_SIZE // BLOCK * BLOCK, 2 * SPAN])
def test_nothing_of_the_parent_is_seen_behind_the_overlap(
    store: Path, base: Disk, rng: random.Random, overlap: int
) -> None:
    disk = base.grown(BASE_SIZE)
    pool = make_clone(store)
    pool.snapshot("clone@empty")
    edit_headers(delta_of(store), 16, (3).to_bytes(8, "big"))
    edit_headers(delta_of(store), 401, overlap.to_bytes(8, "big"))
    if overlap < BASE_SIZE:
        disk.zero(overlap, BASE_SIZE - overlap)
    both_read(store, disk)
    with pool.open_clone("clone") as clone:
        write_some(clone, disk, rng)
    both_read(store, disk)
    pool.snapshot("clone@cut")  # it holds for what is beneath the layer, and not for the layer
    both_read(store, disk, "clone@cut")
    with pool.open_clone("clone") as clone:
        write_some(clone, disk, rng)
    both_read(store, disk)
    both_read(store, base.grown(BASE_SIZE), "clone@empty")


def test_an_overlap_without_its_feature_means_nothing(store: Path, base: Disk) -> None:
    make_clone(store)
    edit_headers(delta_of(store), 401, BLOCK.to_bytes(8, "big"))
    both_read(store, base)


def test_the_manifest_of_a_layer_is_the_hashes_of_what_it_owns(store: Path, rng: random.Random) -> None:
    size = SPAN + (1 << 20)
    import_image(store, Disk(size))
    pool = make_clone(store)
    with pool.open_clone("clone") as clone:
        for offset in (5000, 60 << 20, SPAN - 9000, SPAN - (2 << 20), size - 512):
            clone.pwrite(rng.randbytes(7000)[: size - offset], offset)
        clone.zero(1 << 20, 8192)
    pool.snapshot("clone@one")
    assert list(check_pool(store, deep=True)) == []
    with Reader(store, "clone@one") as reader:
        [delta] = reader._deltas
        folder = store / "layers" / reader.header.id.hex()
        hashes = []
        for chunk in range(0, size, CHUNK):
            blocks = range(chunk // BLOCK, (chunk + CHUNK) // BLOCK)
            own = [block for block in blocks if delta.has(block)]
            bits = sum(1 << (blocks[-1] - block) for block in own).to_bytes(128, "big")
            places = [block * BLOCK + (block * BLOCK // SPAN + 1) * METADATA for block in own]
            content = b"".join(get(folder / "delta", BLOCK, place) for place in places)
            hashes.append(blake3(bits + content).digest() if own else bytes(32))
        about = json.loads((folder / "layer.json").read_text())
        assert bytes.fromhex(about["id"]) == reader.header.id
    assert (folder / "manifest").read_bytes() == b"".join(hashes)
    assert about["fingerprint"] == fingerprint(size, b"".join(hashes)).hex()
    assert (about["format"], about["size"]) == (1, size)
    assert sum(any(digest) for digest in hashes) == 3


# The layout


@pytest.mark.parametrize(
    "size",
    [BASE_SIZE, BASE_SIZE + 512, SPAN - 512, SPAN, SPAN + 512, 2 * SPAN, 3 * SPAN + BLOCK],
)
def test_a_delta_has_the_length_of_the_formula(store: Path, base: Disk, size: int) -> None:
    make_clone(store, size)
    assert delta_of(store).stat().st_size == file_size(size)


def test_a_byte_stands_where_the_formula_has_it(store: Path, base: Disk) -> None:
    size = 2 * SPAN + (1 << 20)
    places = (0, 4097, SPAN - 1, SPAN, 2 * SPAN - 1, 2 * SPAN, size - 1)
    with make_clone(store, size).open_clone("clone") as clone:
        for number, place in enumerate(places, 1):
            clone.pwrite(bytes([number]), place)
    for number, place in enumerate(places, 1):
        assert get(delta_of(store), 1, place + (place // 133169152 + 1) * 1048576) == bytes([number])


def test_the_header_says_what_the_project_says(store: Path, base: Disk) -> None:
    pool = make_clone(store, BASE_SIZE + BLOCK)
    about = pool.info("clone")
    with Reader(store, "clone") as reader:
        header = reader.header
    assert header.id.hex() == about.id
    assert header.parent.hex() == pool.info("base").id
    assert header.fingerprint.hex() == pool.info("base").fingerprint
    assert header.size == about.size == BASE_SIZE + BLOCK
    assert header.created / 1e9 == pytest.approx(about.created, abs=1e-3)
    assert header.parent_name == "base"
    for at in HEADERS:
        page = get(delta_of(store), BLOCK, at)
        assert not any(page[122 + len("base") : 4092])


def test_a_quota_stands_in_both_slots_of_the_header_and_means_nothing_to_a_reader(store: Path, written: Disk) -> None:
    pool = Pool.open(str(store))
    with pool.open_clone("clone"):
        pool.set_quota("clone", 5 << 20)
    for at in HEADERS:
        header = Header.of(get(delta_of(store), BLOCK, at))
        assert header is not None
        assert header.quota == 5 << 20
    both_read(store, written)
    pool.set_quota("clone", None)
    with Reader(store, "clone") as reader:
        assert reader.header.quota == 0


def test_the_manifest_is_the_hashes_of_the_image(store: Path, base: Disk) -> None:
    folder = store / "bases" / "base"
    hashes = b"".join(
        blake3(data).digest() if any(data) else bytes(32)
        for data in (base.read(min(CHUNK, BASE_SIZE - at), at) for at in range(0, BASE_SIZE, CHUNK))
    )
    assert (folder / "manifest").read_bytes() == hashes
    assert hashes[32:64] == bytes(32)
    about = json.loads((folder / "base.json").read_text())
    assert about["fingerprint"] == fingerprint(BASE_SIZE, hashes).hex()
    assert about["size"] == BASE_SIZE
    assert os.path.samefile(about["source"], store.parent / "base.img")
    whole(lambda length, offset: get(folder / "image", length, offset), base)


# What may be destroyed


@pytest.fixture
def written(store: Path, base: Disk, rng: random.Random) -> Disk:
    """A clone of two segments, closed, with its own blocks in both; the disk that it should be."""
    size = SPAN + (1 << 20)
    disk = base.grown(size)
    with make_clone(store, size).open_clone("clone") as clone:
        for offset in (10_000, SPAN - 3000, SPAN + 70_000):
            data = rng.randbytes(6000)
            clone.pwrite(data, offset)
            disk.write(data, offset)
            clone.flush()
    return disk


def junk(kind: str, rng: random.Random, page: bytes) -> bytes:
    if kind == "zeros":
        return bytes(BLOCK)
    if kind == "a bit":
        return page[:100] + bytes([page[100] ^ 1]) + page[101:]
    return rng.randbytes(BLOCK)


@pytest.mark.parametrize("kind", ["zeros", "garbage", "a bit"])
@pytest.mark.parametrize("slot", [0, 1])
def test_one_slot_of_everything_may_be_destroyed(
    store: Path, written: Disk, rng: random.Random, slot: int, kind: str
) -> None:
    delta = delta_of(store)
    for at in (HEADERS[slot], MAPS[slot], SEGMENT + MAPS[slot]):
        put(delta, junk(kind, rng, get(delta, BLOCK, at)), at)
    both_read(store, written)


@pytest.mark.parametrize("slot", [0, 1])
def test_a_clone_with_a_destroyed_slot_is_written_on(store: Path, written: Disk, rng: random.Random, slot: int) -> None:
    for at in (HEADERS[slot], MAPS[slot], SEGMENT + MAPS[slot]):
        put(delta_of(store), rng.randbytes(BLOCK), at)
    with Pool.open(str(store)).open_clone("clone") as clone:
        for offset in (SPAN - 5000, SPAN - 90_000, SPAN + 200_000):
            data = rng.randbytes(40_000)
            clone.pwrite(data, offset)
            written.write(data, offset)
            clone.flush()
            with Reader(store, "clone") as reader:
                whole(reader.read, written)
    both_read(store, written)


@pytest.mark.parametrize("kind", ["zeros", "garbage", "a bit"])
def test_without_a_header_a_clone_is_refused(store: Path, written: Disk, rng: random.Random, kind: str) -> None:
    delta = delta_of(store)
    for at in HEADERS:
        put(delta, junk(kind, rng, get(delta, BLOCK, at)), at)
    both_refuse(store)


@pytest.mark.parametrize("kind", ["garbage", "a bit"])
@pytest.mark.parametrize("segment", [0, 1])
def test_without_a_map_a_clone_is_refused(
    store: Path, written: Disk, rng: random.Random, segment: int, kind: str
) -> None:
    delta = delta_of(store)
    for at in MAPS:
        at += segment * SEGMENT
        put(delta, junk(kind, rng, get(delta, BLOCK, at)), at)
    both_refuse(store, segment * SPAN)


def test_maps_of_another_segment_are_refused(store: Path, written: Disk) -> None:
    for at in MAPS:
        put(delta_of(store), get(delta_of(store), BLOCK, at), SEGMENT + at)
    both_refuse(store, SPAN)


def test_maps_of_another_delta_are_refused(store: Path, written: Disk) -> None:
    with make_clone(store, name="other").open_clone("other") as other:
        other.pwrite(b"another one", 0)
    for at in MAPS:
        put(delta_of(store), get(delta_of(store, "other"), BLOCK, at), at)
    both_refuse(store)


@pytest.mark.parametrize("slot", [0, 1])
def test_a_first_map_cut_off_while_it_was_written_is_an_empty_one(store: Path, base: Disk, slot: int) -> None:
    make_clone(store)
    put(delta_of(store), b"NMAP and half of the rest", MAPS[slot])
    both_read(store, base)


def test_the_slot_with_the_higher_sequence_counts(store: Path, base: Disk) -> None:
    """Two slots that differ only in their sequence and in one bit."""
    disk = base.grown(BASE_SIZE)
    with make_clone(store).open_clone("clone") as clone:
        clone.pwrite(b"\xff" * 2 * BLOCK, 0)
    with Reader(store, "clone") as reader:
        delta_id = reader.header.id[:8]
    disk.write(b"\xff" * BLOCK, BLOCK)
    for high, low in (MAPS, MAPS[::-1]):
        for at, sequence, bits in ((high, 1 << 40, 0b01000000), (low, 1 << 39, 0b11000000)):
            body = struct.pack(">QQ8s4064s", 0, sequence, delta_id, bytes([bits]))
            put(delta_of(store), b"NMAP" + zlib.crc32(body).to_bytes(4, "big") + body, at)
        both_read(store, disk)


def test_what_stands_at_the_place_of_a_clear_bit_means_nothing(store: Path, base: Disk, rng: random.Random) -> None:
    size = BASE_SIZE + 8 * BLOCK
    disk = base.grown(size)
    pool = make_clone(store, size)
    put(delta_of(store), rng.randbytes(file_size(size) - METADATA), METADATA)
    both_read(store, disk)
    with pool.open_clone("clone") as clone:
        for offset, length in ((5000, 10), (40_000, 9000), (4 << 20, 4096), (BASE_SIZE + 50, 20), (size - 300, 200)):
            data = rng.randbytes(length)
            clone.pwrite(data, offset)
            disk.write(data, offset)
        for offset, length in ((80_001, 9000), (5 << 20, 8192), (BASE_SIZE - 100, 300), (size - 3 * BLOCK - 9, 6000)):
            clone.zero(offset, length)
            disk.zero(offset, length)
        whole(clone.pread, disk)
    both_read(store, disk)


@pytest.mark.parametrize("left", [0, BLOCK, METADATA, SEGMENT, SEGMENT + METADATA])
def test_a_delta_that_is_cut_short_is_refused(store: Path, written: Disk, left: int) -> None:
    os.truncate(delta_of(store), left)
    both_refuse(store, SPAN + 70_000)


# Other versions


def test_a_higher_version_is_left_alone(store: Path, written: Disk) -> None:
    edit_headers(delta_of(store), 8, (2).to_bytes(4, "big"))
    both_refuse(store)


def test_a_feature_that_must_be_known_is_left_alone(store: Path, written: Disk) -> None:
    edit_headers(delta_of(store), 16, (1 << 63).to_bytes(8, "big"))
    both_refuse(store)


def test_a_feature_that_may_be_ignored_is(store: Path, written: Disk) -> None:
    edit_headers(delta_of(store), 24, (1 << 63 | 1).to_bytes(8, "big"))
    both_read(store, written)


@pytest.mark.parametrize("slot", [0, 1])
def test_the_header_with_the_higher_sequence_counts(store: Path, written: Disk, slot: int) -> None:
    edit_headers(delta_of(store), 56, b"nobody's".ljust(16), (HEADERS[1 - slot],))  # no such parent
    edit_headers(delta_of(store), 32, (1 << 40).to_bytes(8, "big"), (HEADERS[slot],))
    both_read(store, written)
    edit_headers(delta_of(store), 32, (1 << 41).to_bytes(8, "big"), (HEADERS[1 - slot],))
    both_refuse(store)


# The base


def test_a_base_under_another_name_is_found_by_its_id(store: Path, written: Disk) -> None:
    (store / "bases" / "base").rename(store / "bases" / "renamed")
    both_read(store, written)


def test_a_base_with_another_id_is_not_the_parent(store: Path, written: Disk) -> None:
    edit_headers(delta_of(store), 56, b"nobody's".ljust(16))
    both_refuse(store)


def test_a_base_with_another_fingerprint_is_refused(store: Path, written: Disk) -> None:
    edit_headers(delta_of(store), 72, bytes(32))
    both_refuse(store)


def test_a_copy_of_the_pool_is_hashed_and_read(store: Path, base: Disk, rng: random.Random) -> None:
    disk = base.grown(BASE_SIZE)
    with make_clone(store).open_clone("clone") as clone:
        data = rng.randbytes(30_000)
        clone.pwrite(data, 12_345)
        disk.write(data, 12_345)
    with Reader(store, "clone") as reader:
        assert not reader.hashed
    copied = store.with_name("copied")
    shutil.copytree(store, copied)
    with Reader(copied, "clone") as reader:
        assert reader.hashed
    both_read(copied, disk)


@pytest.mark.parametrize("place", [0, 5 << 20, BASE_SIZE - 1])
def test_a_base_whose_image_has_changed_is_refused(store: Path, base: Disk, place: int) -> None:
    make_clone(store)
    image = store / "bases" / "base" / "image"
    image.chmod(0o644)
    put(image, bytes([get(image, 1, place)[0] ^ 1]), place)
    both_refuse(store)


def test_a_base_whose_image_has_grown_is_refused(store: Path, base: Disk) -> None:
    make_clone(store)
    image = store / "bases" / "base" / "image"
    image.chmod(0o644)
    os.truncate(image, BASE_SIZE + 512)
    both_refuse(store)
