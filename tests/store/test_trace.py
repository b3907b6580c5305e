"""Boot traces: what is recorded, what is kept of it, what is read ahead, and that a bad one does no harm."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdclone.errors import NotFound, StorageError, UnsupportedFormat, UsageError
from nbdclone.store import trace as trace_module
from nbdclone.store.check import check_pool
from nbdclone.store.clone import Clone
from nbdclone.store.fs import FileSystem
from nbdclone.store.image import Image
from nbdclone.store.pool import Pool
from nbdclone.store.trace import (
    CHECKSUM,
    GRAIN_SIZE,
    HEADER,
    MAX_GRAINS,
    STEP_GRAINS,
    TRACE_NAME,
    Recorder,
    Trace,
    directory_of_base,
    drop_trace,
    load_trace,
    save_trace,
    still_read,
    warm,
)

GRAINS = 160  # of the base: more than two steps
SIZE = GRAINS * GRAIN_SIZE
HOLE = range(100, 110)  # grains of it that are a hole
ID = bytes(range(16))


class Spy(FileSystem):
    """Knows what the kernel was asked to read, by the name of the file."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    def sync(self, fd: int) -> None:  # type: ignore[override]
        """What is made for one test need not outlive the machine."""

    datasync = sync  # type: ignore[assignment]

    def sync_directory(self, path: Path) -> None:
        pass

    def will_need(self, fd: int, offset: int, length: int) -> None:
        self.asked.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, offset, length))


@pytest.fixture
def spy() -> Spy:
    return Spy()


@pytest.fixture
def pool(tmp_path: Path, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """One base with some data in each grain but a few, a clone of it, and boots that may be small."""
    monkeypatch.setattr(trace_module, "MIN_GRAINS", 2)
    source = tmp_path / "source.img"
    with open(source, "wb") as file:
        for grain in set(range(GRAINS)) - set(HOLE):
            file.seek(grain * GRAIN_SIZE)
            file.write(bytes([grain + 1]) * 4096)
        file.truncate(SIZE)
    pool = Pool.open(tmp_path / "pool", create=True, fs=spy)
    pool.import_base(source, "base")
    pool.create_clones("base", ["web1", "web2"])
    return pool


@pytest.fixture
def clone(pool: Pool) -> Iterator[Clone]:
    with pool.open_clone("web1") as clone:
        yield clone


def base_of(clone: Clone) -> Image:
    base = clone.layers[0]
    assert isinstance(base, Image)
    return base


def grains_read(recorder: Recorder) -> tuple[int, ...]:
    trace = recorder.stop()
    assert trace is not None
    return trace.grains


def warmed(clone: Clone, grains: tuple[int, ...], go_on: Any = lambda _count: True) -> int:
    base = base_of(clone)
    return warm(base.directory / "image", base.record.identity, grains, base.fs, go_on)


# Recording


def test_a_recording_has_each_grain_once_in_the_order_of_its_first_read(clone: Clone) -> None:
    recorder = Recorder(clone)
    for grain in (70, 3, 71, 3, 70, 0):
        clone.pread(512, grain * GRAIN_SIZE + 1024)
    assert grains_read(recorder) == (70, 3, 71, 0)


def test_every_way_of_reading_is_recorded(clone: Clone) -> None:
    recorder = Recorder(clone)
    clone.pread(4 * GRAIN_SIZE, GRAIN_SIZE // 2)
    clone.read_into_nowait(memoryview(bytearray(512)), 20 * GRAIN_SIZE)
    clone.write(memoryview(b"x" * 4096), 30 * GRAIN_SIZE + 4096)
    clone.read_into_nowait(memoryview(bytearray(3 * 4096)), 30 * GRAIN_SIZE)  # base, delta, base
    assert grains_read(recorder) == (0, 1, 2, 3, 4, 20, 30)


def test_what_is_read_from_the_delta_is_not_recorded(clone: Clone) -> None:
    clone.write(memoryview(b"x" * GRAIN_SIZE), 0)
    recorder = Recorder(clone)
    clone.pread(GRAIN_SIZE, 0)
    clone.read_into_nowait(memoryview(bytearray(GRAIN_SIZE)), 0)
    clone.pread(2 * GRAIN_SIZE, 8 * GRAIN_SIZE)
    assert grains_read(recorder) == (8, 9)


def test_holes_of_the_base_are_not_kept(clone: Clone) -> None:
    recorder = Recorder(clone)
    clone.pread(SIZE, 0)
    assert set(grains_read(recorder)) == set(range(GRAINS)) - set(HOLE)


def test_after_a_recording_the_clone_reads_as_before_it(clone: Clone) -> None:
    before = dict(vars(clone))
    recorder = Recorder(clone)
    clone.pread(2 * GRAIN_SIZE, 0)
    assert vars(clone)["_preadv"] is not before["_preadv"]
    recorder.stop()
    assert {name: vars(clone)[name] for name in ("_fs", "_preadv")} == {
        name: before[name] for name in ("_fs", "_preadv")
    }
    assert vars(clone).keys() == before.keys()


def test_a_look_at_the_disk_is_no_boot(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MIN_GRAINS", 3)
    recorder = Recorder(clone)
    clone.pread(2 * GRAIN_SIZE, 0)
    assert recorder.stop() is None


def test_a_copy_of_the_disk_is_no_boot_and_ends_the_recording(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MAX_GRAINS", 50)
    recorder = Recorder(clone)
    plain = base_of(clone).fs
    clone.pread(50 * GRAIN_SIZE, 0)
    assert vars(clone)["_fs"] is not plain
    clone.pread(GRAIN_SIZE, 50 * GRAIN_SIZE)
    assert vars(clone)["_fs"] is plain
    assert recorder.stop() is None


# The file


def test_a_trace_is_read_as_it_was_written(clone: Clone) -> None:
    trace = Trace(base_of(clone).record.id, 1_700_000_000_000_000_007, (5, 0, 2**28))
    save_trace(trace, base_of(clone))
    assert load_trace(base_of(clone).directory, trace.base_id) == trace
    assert os.listdir(base_of(clone).directory).count(TRACE_NAME) == 1


def test_no_trace_is_none(clone: Clone) -> None:
    assert load_trace(base_of(clone).directory) is None


def test_a_trace_of_another_base_is_refused(clone: Clone) -> None:
    save_trace(Trace(ID, 0, (1, 2)), base_of(clone))
    assert load_trace(base_of(clone).directory) is not None
    with pytest.raises(StorageError, match="of another base"):
        load_trace(base_of(clone).directory, base_of(clone).record.id)


def test_a_flip_of_any_bit_is_noticed() -> None:
    data = Trace(ID, 7, (1, 2, 3)).dump()
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((ValueError, UnsupportedFormat)):
            Trace.parse(bytes(flipped))


@pytest.mark.parametrize("length", [0, 7, HEADER.size, HEADER.size + 3, HEADER.size + 4, HEADER.size + 9, 1000])
def test_a_file_of_another_length_is_refused(clone: Clone, length: int) -> None:
    data = Trace(ID, 7, (1, 2, 3)).dump()
    (base_of(clone).directory / TRACE_NAME).write_bytes(data[:length].ljust(length, b"\0"))
    with pytest.raises(StorageError, match="damaged"):
        load_trace(base_of(clone).directory)


@pytest.mark.parametrize(
    ("grain_size", "count", "grains"),
    [
        pytest.param(4096, 1, [1], id="another grain size"),
        pytest.param(GRAIN_SIZE, 2, [1], id="fewer than it says"),
        pytest.param(GRAIN_SIZE, MAX_GRAINS + 1, [1] * (MAX_GRAINS + 1), id="too many"),
        pytest.param(GRAIN_SIZE, 1, [2**32 - 1], id="beyond any image"),
    ],
)
def test_numbers_that_cannot_be_are_refused_although_the_checksum_is_right(
    grain_size: int, count: int, grains: list[int]
) -> None:
    header = HEADER.pack(b"NBDTRACE", 1, grain_size, ID, 0, count)
    body = struct.pack(f">{len(grains)}I", *grains)
    with pytest.raises(ValueError, match=r"bad geometry|beyond any image"):
        Trace.parse(header + CHECKSUM.pack(zlib.crc32(body, zlib.crc32(header))) + body)


def test_a_trace_of_a_newer_version_is_told_from_a_damaged_one(clone: Clone) -> None:
    header = HEADER.pack(b"NBDTRACE", 2, 1, ID, 0, 0)
    (base_of(clone).directory / TRACE_NAME).write_bytes(header + b"another layout")
    with pytest.raises(UnsupportedFormat, match=r"boot\.trace: made by a newer nbdclone"):
        load_trace(base_of(clone).directory)


def test_what_is_no_file_is_refused_and_not_waited_for(clone: Clone) -> None:
    os.mkfifo(base_of(clone).directory / TRACE_NAME)
    with pytest.raises(StorageError, match="not a regular file"):
        load_trace(base_of(clone).directory)


def test_check_knows_the_trace_and_its_draft(pool: Pool, clone: Clone) -> None:
    save_trace(Trace(base_of(clone).record.id, 0, (1, 2)), base_of(clone))
    assert [finding.kind for finding in check_pool(pool.path, ["base"])] == []
    (base_of(clone).directory / f"{TRACE_NAME}.new").touch()
    assert [finding.kind for finding in check_pool(pool.path, ["base"])] == ["leftover"]
    (base_of(clone).directory / "boot.tracer").touch()
    assert "foreign" in [finding.kind for finding in check_pool(pool.path, ["base"])]


def test_a_dropped_trace_is_gone_and_dropping_again_says_so(clone: Clone) -> None:
    save_trace(Trace(ID, 0, (1, 2)), base_of(clone))
    assert drop_trace(base_of(clone).directory)
    assert load_trace(base_of(clone).directory) is None
    assert not drop_trace(base_of(clone).directory)


def test_a_base_goes_with_its_trace(pool: Pool) -> None:
    with pool.open_clone("web1") as clone:
        save_trace(Trace(ID, 0, (1, 2)), base_of(clone))
    pool.remove(["web1", "web2", "base"])
    assert os.listdir(pool.path / "bases") == []


@pytest.mark.parametrize("name", ["nosuch", "", ".", "..", "../bases/base", "x" * 200, "a\0b"])
def test_only_names_of_bases_have_traces(pool: Pool, name: str) -> None:
    with pytest.raises(NotFound, match="there is no base"):
        directory_of_base(pool.path, name)
    with pytest.raises(UsageError, match="is a clone"):
        directory_of_base(pool.path, "web1")
    assert directory_of_base(pool.path, "base").name == "base"


# Reading ahead


def test_grains_that_the_clone_has_as_its_own_are_left_out(clone: Clone) -> None:
    clone.write(memoryview(b"x" * 2 * GRAIN_SIZE), 4 * GRAIN_SIZE)
    clone.write(memoryview(b"x" * (GRAIN_SIZE - 4096)), 8 * GRAIN_SIZE)  # all but its last block
    assert still_read(Trace(ID, 0, (9, 8, 5, 4, 3, GRAINS, 2**28)), clone) == (9, 8, 3)


def test_neighbours_within_a_step_are_asked_for_in_one_and_steps_keep_their_order(clone: Clone, spy: Spy) -> None:
    late = tuple(range(20, 20 + STEP_GRAINS - 2))
    count = warmed(clone, (5, 3, *late, 4, 6, 0))
    pieces = [(3, 1), (5, 1), (20, len(late)), (0, 1), (4, 1), (6, 1)]
    assert spy.asked == [("image", first * GRAIN_SIZE, count * GRAIN_SIZE) for first, count in pieces]
    assert count == (STEP_GRAINS + 3) * GRAIN_SIZE


def test_whoever_is_asked_before_a_step_can_end_it(clone: Clone, spy: Spy) -> None:
    asked: list[int] = []

    def once(count: int) -> bool:
        asked.append(count)
        return len(asked) == 1

    assert warmed(clone, tuple(range(GRAINS)), once) == STEP_GRAINS * GRAIN_SIZE
    assert asked == [STEP_GRAINS * GRAIN_SIZE] * 2
    assert spy.asked == [("image", 0, STEP_GRAINS * GRAIN_SIZE)]


def test_another_image_of_that_name_is_not_read(clone: Clone, spy: Spy) -> None:
    image = base_of(clone).directory / "image"
    image.rename(image.with_name("image.old"))
    image.write_bytes(b"another")
    assert warmed(clone, (0, 1)) == 0
    assert spy.asked == []


def test_all_of_a_long_range_comes_into_memory(tmp_path: Path) -> None:
    fs = FileSystem()
    calls = []
    fs.fadvise = lambda *call: calls.append(call)  # type: ignore[method-assign, assignment]
    fd = os.open(tmp_path, os.O_RDONLY)
    fs.will_need(fd, 4096, 64 << 20)
    os.close(fd)
    assert all(length <= 1 << 20 for _, _, length, _ in calls)
    assert [start for _, start, _, _ in calls[1:]] == [start + length for _, start, length, _ in calls[:-1]]
    assert sum(length for _, _, length, _ in calls) == 64 << 20
    assert {advice for *_, advice in calls} == {os.POSIX_FADV_WILLNEED}


def test_the_samples_of_a_base_are_read_without_what_follows_them(pool: Pool, spy: Spy) -> None:
    calls: list[tuple[int, int]] = []

    def advise(fd: int, offset: int, length: int, advice: int) -> None:
        calls.append((length, advice))

    spy.fadvise = advise  # type: ignore[method-assign, assignment]
    pool.open_clone("base").close()
    assert calls == [(0, os.POSIX_FADV_RANDOM), (0, os.POSIX_FADV_NORMAL)]
