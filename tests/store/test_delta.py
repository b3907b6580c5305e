"""The delta's format: what is written is read, and what is torn, rotten, newer or not a delta is never believed."""

from __future__ import annotations

import errno
import os
import random
import struct
import uuid
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from powercut import open_clone, simulated_disk
from words import refusal

from nbdclone.errors import CloneFailed, CorruptDelta, FileTooLarge, NotFound, UnsupportedFormat
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import (
    CHECKSUM,
    HEADER_SLOTS,
    MAP_SLOTS,
    METADATA_SIZE,
    PAGE_SIZE,
    SEGMENT_SPAN,
    Header,
    decode_map_page,
    encode_map_page,
    file_size,
)
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import (
    BITMAP_SIZE,
    BLOCK_SIZE,
    BLOCKS_PER_SEGMENT,
    MAX_SIZE,
    MIN_SIZE,
    SECTOR_SIZE,
    SEGMENT_SIZE,
    uniform,
)

HEADER = Header(b"i" * 16, b"p" * 16, b"f" * 32, 1 << 20, 1_700_000_000_000_000_000, "debian-12", 7)


def reseal(page: bytes) -> bytes:
    """The page with the checksum of what it holds."""
    return page[: -CHECKSUM.size] + CHECKSUM.pack(zlib.crc32(page[: -CHECKSUM.size]))


# Pages


@given(
    sizes=st.integers(MIN_SIZE // SECTOR_SIZE, MAX_SIZE // SECTOR_SIZE),
    identity=st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16)),
    fingerprint=st.binary(min_size=32, max_size=32),
    numbers=st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", fullmatch=True),
)
def test_a_header_is_read_as_it_was_written(
    sizes: int, identity: tuple[bytes, bytes], fingerprint: bytes, numbers: tuple[int, int], name: str
) -> None:
    header = Header(*identity, fingerprint, sizes * SECTOR_SIZE, numbers[0], name, numbers[1])
    page = header.encode()
    assert len(page) == PAGE_SIZE
    assert Header.decode(page, "delta") == header


@given(
    segment=st.integers(0, 2**64 - 1),
    sequence=st.integers(0, 2**64 - 1),
    bitmap=st.binary(min_size=BITMAP_SIZE, max_size=BITMAP_SIZE),
    owner=st.binary(min_size=16, max_size=16),
)
@settings(suppress_health_check=[HealthCheck.large_base_example, HealthCheck.data_too_large, HealthCheck.too_slow])
def test_a_map_page_is_read_as_it_was_written_and_nowhere_else(
    segment: int, sequence: int, bitmap: bytes, owner: bytes
) -> None:
    page = encode_map_page(segment, sequence, owner, bitmap)
    assert len(page) == PAGE_SIZE
    assert decode_map_page(page, segment, owner) == (sequence, bitmap)
    assert decode_map_page(page, segment ^ 1, owner) is None
    assert decode_map_page(page, segment, bytes([owner[0] ^ 1]) + owner[1:]) is None


@pytest.mark.parametrize("size", [0, 512, 4096 + 100, MAX_SIZE + 512])
def test_a_header_with_an_impossible_size_is_corrupt(size: int) -> None:
    with pytest.raises(CorruptDelta, match="makes no sense"):
        Header.decode(replace(HEADER, size=size).encode(), "delta")


@pytest.mark.parametrize(("offset", "value"), [(8, 2), (16, 4), (16, 1 << 31)], ids=["version", "feature", "features"])
def test_a_header_of_a_newer_version_says_so(offset: int, value: int) -> None:
    page = bytearray(HEADER.encode())
    struct.pack_into(">I" if offset == 8 else ">Q", page, offset, value)
    with pytest.raises(UnsupportedFormat, match="made by a newer nbdclone"):
        Header.decode(reseal(bytes(page)), "delta")


def test_a_feature_that_may_be_ignored_is_ignored() -> None:
    page = bytearray(HEADER.encode())
    struct.pack_into(">Q", page, 24, 1 << 63)
    assert Header.decode(reseal(bytes(page)), "delta") == HEADER


# The file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A delta of 1 MiB without blocks."""
    return made(tmp_path / "delta", HEADER)


def made(path: Path, header: Header) -> Path:
    Delta.create(path, header)
    return path


def opened(path: Path, fs: FileSystem | None = None) -> Delta:
    return Delta.open(path, "clone 'web1'", fs or FileSystem())


def store(delta: Delta, block: int, content: bytes) -> None:
    """Write a block as a clone does."""
    segment, within = divmod(block, BLOCKS_PER_SEGMENT)
    os.pwrite(delta.fd, content, block * BLOCK_SIZE + (segment + 1) * METADATA_SIZE)
    delta.mark(segment, within, within)
    delta.touched()


def flush_with_two_syncs(delta: Delta) -> None:
    """As if there were too many new blocks for a record."""
    delta._young.lose_count()
    delta.flush()


def blocks_of(delta: Delta, segment: int = 0) -> set[int]:
    owners = delta.paint(segment, uniform(0), 1, nowait=False)
    return {block for block, owner in enumerate(owners) if owner}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (4096, METADATA_SIZE + 4096),
        (4096 + 512, METADATA_SIZE + 8192),
        (SEGMENT_SIZE - 512, SEGMENT_SPAN),
        (SEGMENT_SIZE, SEGMENT_SPAN),
        (SEGMENT_SIZE + 512, SEGMENT_SPAN + METADATA_SIZE + 4096),
        (10 * SEGMENT_SIZE, 10 * SEGMENT_SPAN),
    ],
)
def test_the_file_is_as_long_as_its_segments(tmp_path: Path, size: int, expected: int) -> None:
    assert file_size(size) == expected
    path = made(tmp_path / "delta", replace(HEADER, size=size))
    assert path.stat().st_size == expected


@given(size=st.integers(MIN_SIZE, MAX_SIZE))
def test_each_byte_of_a_disk_has_its_place_in_the_file(size: int) -> None:
    last = size - 1
    place = last + (last // SEGMENT_SIZE + 1) * METADATA_SIZE
    assert place < file_size(size) <= place + BLOCK_SIZE


def test_a_new_delta_has_no_blocks_and_takes_little_space(path: Path) -> None:
    with closing(opened(path)) as delta:
        assert delta.header == HEADER
        assert blocks_of(delta) == set()
    assert path.stat().st_blocks * 512 <= 16 << 10


def test_a_delta_is_not_made_over_another(path: Path) -> None:
    with pytest.raises(FileExistsError):
        Delta.create(path, HEADER)


def test_flushes_go_to_the_two_slots_in_turn(path: Path) -> None:
    def pages() -> list[bytes]:
        content = path.read_bytes()
        return [content[slot : slot + PAGE_SIZE] for slot in MAP_SLOTS]

    with closing(opened(path)) as delta:
        before = pages()
        changed: list[int] = []
        for block in range(6):
            store(delta, block, b"x" * BLOCK_SIZE)
            flush_with_two_syncs(delta)
            after = pages()
            changed += [slot for slot in (0, 1) if before[slot] != after[slot]]
            before = after
        # The first page goes to both, for the other slot holds nothing; then each goes over the older of the two.
        assert changed == [0, 1, 1, 0, 1, 0, 1]
    sequences = [decoded[0] for page in pages() if (decoded := decode_map_page(page, 0, HEADER.id))]
    assert sorted(sequences) == [5, 6]


def test_a_quiet_page_stands_in_both_slots_after_a_close(path: Path) -> None:
    delta = opened(path)
    store(delta, 5, b"x" * BLOCK_SIZE)
    delta.finish()
    delta.close()
    content = path.read_bytes()
    first, second = (content[slot : slot + PAGE_SIZE] for slot in MAP_SLOTS)
    assert first == second != bytes(PAGE_SIZE)


def test_marks_across_a_segment_are_exactly_those_given(tmp_path: Path) -> None:
    rng = random.Random(1)
    with closing(opened(made(tmp_path / "delta", replace(HEADER, size=3 * SEGMENT_SIZE)))) as delta:
        expected: set[int] = set()
        for _ in range(200):
            first = rng.randrange(BLOCKS_PER_SEGMENT)
            last = min(first + rng.choice([0, 1, 7, 8, 9, 300]), BLOCKS_PER_SEGMENT - 1)
            delta.mark(1, first, last)
            expected |= set(range(first, last + 1))
        assert blocks_of(delta, 1) == expected
        assert blocks_of(delta, 0) == blocks_of(delta, 2) == set()
        delta.mark(2, 0, BLOCKS_PER_SEGMENT - 1)
        assert delta.paint(2, uniform(0), 1, nowait=False) == uniform(1)
        delta.flush()


def test_the_space_for_the_map_is_taken_once_and_before_it_is_written(path: Path) -> None:
    calls: list[tuple[int, int]] = []

    class Watched(FileSystem):
        def allocate(self, fd: int, offset: int, length: int) -> None:  # type: ignore[override]
            if os.path.sameopenfile(fd, delta.fd):  # and not the live map's
                calls.append((offset, length))
            os.posix_fallocate(fd, offset, length)

    with closing(opened(path, Watched())) as delta:
        before = path.stat().st_blocks
        delta.reserve(0, nowait=False)
        assert calls == [(slot, PAGE_SIZE) for slot in MAP_SLOTS]
        assert path.stat().st_blocks * 512 >= before * 512 + 2 * PAGE_SIZE
        delta.mark(0, 2, 2)
        delta.reserve(0, nowait=False)
        flush_with_two_syncs(delta)
        assert len(calls) == 2
    with closing(opened(path, Watched())) as delta:
        delta.reserve(0, nowait=False)
        assert len(calls) == 2, "the pages are there already"


def test_a_copy_of_a_delta_that_has_a_hole_for_a_map_page_gets_its_space_again(path: Path, tmp_path: Path) -> None:
    with closing(opened(path)) as delta:
        delta.reserve(0, nowait=False)
        delta.mark(0, 1, 1)
        flush_with_two_syncs(delta)  # the first page; then it is killed, and the file copied without its zeros
        page = os.pread(delta.fd, PAGE_SIZE, MAP_SLOTS[0])
    copy = made(tmp_path / "copy", HEADER)
    with open(copy, "r+b") as file:
        os.pwrite(file.fileno(), page, MAP_SLOTS[0])
    before = copy.stat().st_blocks
    with closing(opened(copy)) as delta:
        assert blocks_of(delta) == {1}
        delta.reserve(0, nowait=False)
    assert copy.stat().st_blocks > before


def test_a_full_disk_at_the_first_block_notes_nothing_and_goes_on_when_there_is_space(path: Path) -> None:
    class Full(FileSystem):
        full = True

        def allocate(self, fd: int, offset: int, length: int) -> None:  # type: ignore[override]
            if self.full:
                raise OSError(errno.ENOSPC, "no space left")
            os.posix_fallocate(fd, offset, length)

    fs = Full()
    with closing(opened(path, fs)) as delta:
        clone = Clone("clone", [delta], fs)
        with pytest.raises(OSError, match="no space"):
            clone.pwrite(b"x" * BLOCK_SIZE, BLOCK_SIZE)
        assert blocks_of(delta) == set()
        assert os.pread(delta.fd, 1, METADATA_SIZE + BLOCK_SIZE) == b"\0", "the data has to wait for the map's space"
        delta.flush()
        fs.full = False
        clone.pwrite(b"x" * BLOCK_SIZE, 2 * BLOCK_SIZE)
        delta.flush()
    with closing(opened(path)) as delta:
        assert blocks_of(delta) == {2}


def test_a_full_disk_while_the_map_is_written_leaves_the_flush_to_be_tried_again(path: Path) -> None:
    class Full(FileSystem):
        full = False

        def pwrite(self, fd: int, data: bytes, offset: int) -> int:  # type: ignore[override]
            if self.full:
                raise OSError(errno.ENOSPC, "no space left")
            return os.pwrite(fd, data, offset)

    fs = Full()
    with closing(opened(path, fs)) as delta:
        store(delta, 1, b"1" * BLOCK_SIZE)
        fs.full = True
        for _ in range(2):
            with pytest.raises(OSError, match="no space"):
                delta.flush()
        assert blocks_of(delta) == {1}
        fs.full = False
        delta.flush()
    with closing(opened(path)) as delta:
        assert blocks_of(delta) == {1}


@pytest.mark.parametrize("failing", [1, 2], ids=["data", "map"])
def test_after_a_failed_sync_a_clone_takes_no_more_until_it_is_reopened(failing: int) -> None:
    fs = simulated_disk()
    clone = open_clone(fs)
    clone.pwrite(b"x" * BLOCK_SIZE, 0)
    clone.pwrite(b"x", 0)  # changed again: two syncs
    syncs = 0

    def fail(what: str) -> None:
        nonlocal syncs
        syncs += what == "sync"
        if what == "sync" and syncs == failing:
            raise OSError(errno.EIO, "the disk does not answer")

    fs.on_step = fail
    with pytest.raises(OSError, match="does not answer"):
        clone.flush()
    for change in (
        lambda: clone.pwrite(b"y", 0),
        lambda: clone.write_nowait(memoryview(b"y"), 0),
        lambda: clone.zero(0, BLOCK_SIZE),
        clone.flush,
        clone.close,
    ):
        with pytest.raises(CloneFailed, match=r"/delta: a sync failed \(Input/output error\).*reopened"):
            change()
    with open_clone(fs) as clone:
        clone.pwrite(b"z" * BLOCK_SIZE, 0)
    assert open_clone(fs.crash(random.Random(0))).pread(1, 0) == b"z"


def test_reads_go_on_after_a_failed_sync(path: Path) -> None:
    fs = simulated_disk()
    clone = open_clone(fs)
    clone.pwrite(b"x" * BLOCK_SIZE, 0)
    fs.on_step = lambda what: (_ for _ in ()).throw(OSError(errno.EIO, "no")) if what == "sync" else None
    with pytest.raises(OSError, match="no"):
        clone.flush()
    assert clone.pread(2, 0) == b"xx"


# What is no delta


@given(content=st.binary(max_size=3 * PAGE_SIZE), pad=st.sampled_from([0, METADATA_SIZE, 2 * METADATA_SIZE]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_is_refused_in_words(tmp_path: Path, content: bytes, pad: int) -> None:
    path = tmp_path / "garbage"
    path.write_bytes(content.ljust(pad, b"\0"))
    with pytest.raises(CorruptDelta, match="garbage"):
        opened(path)


@given(
    where=st.sampled_from([*HEADER_SLOTS, *MAP_SLOTS]),
    patch=st.binary(min_size=1, max_size=300),
    at=st.integers(0, 3795),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_patched_delta_opens_or_is_refused_in_words(tmp_path: Path, where: int, patch: bytes, at: int) -> None:
    path = tmp_path / f"delta-{uuid.uuid4().hex}"
    Delta.create(path, HEADER)
    with open(path, "r+b") as file:
        for slot in HEADER_SLOTS if where in HEADER_SLOTS else MAP_SLOTS:
            page = bytearray(os.pread(file.fileno(), PAGE_SIZE, slot))
            page[at : at + len(patch)] = patch
            os.pwrite(file.fileno(), reseal(bytes(page)) if where == HEADER_SLOTS[0] else page, slot)

    def read() -> None:
        with closing(opened(path)) as delta:
            blocks_of(delta)

    refusal(read)
    path.unlink()


@pytest.mark.parametrize("length", [0, 1, 511, 4095, 4096, METADATA_SIZE, METADATA_SIZE + (1 << 20) - 1])
def test_a_truncated_delta_is_refused(path: Path, length: int) -> None:
    os.truncate(path, length)
    with pytest.raises(
        CorruptDelta, match=rf"{path}: (truncated: {length} bytes of 2097152|not a delta|its header fails)"
    ):
        opened(path)


def test_a_delta_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="clone 'web1' is not there"):
        opened(tmp_path / "delta")


def test_a_refused_delta_is_not_kept_open(path: Path) -> None:
    os.truncate(path, 10)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CorruptDelta):
        opened(path)
    assert set(os.listdir("/proc/self/fd")) == before


def file_system_of(path: Path) -> str:
    best = max(
        (line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()),
        key=lambda mount: len(mount[0]) if str(path).startswith(mount[0].rstrip("/") + "/") else -1,
    )
    return best[1]


def test_a_disk_too_large_for_ext4_is_refused_with_what_to_do(tmp_path: Path) -> None:
    if file_system_of(tmp_path) != "ext4":
        pytest.skip("the limit is ext4's")
    with pytest.raises(FileTooLarge, match=r"ext4: 16 TiB less 4 KiB.*smaller size, or XFS"):
        Delta.create(tmp_path / "large", replace(HEADER, size=1 << 44))


def test_a_disk_of_16_tib_works_where_files_may_be_that_large() -> None:
    path = Path(f"/dev/shm/nbdclone-test-{uuid.uuid4().hex}")
    if not os.path.ismount("/dev/shm"):
        pytest.skip("there is no tmpfs at /dev/shm")
    size = MAX_SIZE
    try:
        Delta.create(path, replace(HEADER, size=size))
        delta = opened(path)
        with Clone("large", [delta]) as clone:
            clone.pwrite(b"end", size - 3)
        with Clone("large", [opened(path)]) as clone:
            assert clone.pread(4, size - 4) == b"\0end"
    finally:
        path.unlink(missing_ok=True)


def test_a_clone_on_a_file_system_that_cannot_say_whether_it_would_wait_is_read_by_waiting() -> None:
    """tmpfs answers RWF_NOWAIT with EOPNOTSUPP: to the caller that is no error but a reason to use a thread."""
    path = Path(f"/dev/shm/nbdclone-test-{uuid.uuid4().hex}")
    if not os.path.ismount("/dev/shm"):
        pytest.skip("there is no tmpfs at /dev/shm")
    try:
        Delta.create(path, HEADER)
        with Clone("on tmpfs", [opened(path)]) as clone:
            view = memoryview(bytearray(512))
            for _ in range(2):  # before the map is in memory, and after
                try:
                    clone.read_into_nowait(view, 0)
                except BlockingIOError:
                    clone.read_into(view, 0)
                assert view == bytes(512)
                try:
                    clone.write_nowait(memoryview(b"part"), 512)
                except BlockingIOError:
                    clone.pwrite(b"part", 512)
            assert clone.pread(4, 512) == b"part"
    finally:
        path.unlink(missing_ok=True)
