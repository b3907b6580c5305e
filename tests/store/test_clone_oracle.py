"""Law 2: whatever is done to a clone, it reads as a plain row of bytes would. And law 1: its base stays as it was."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mutation import mutate

from nbdclone.errors import CorruptDelta, UsageError
from nbdclone.store.clone import Clone
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import BLOCK_SIZE, SECTOR_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool

# The base ends within a block of the second segment; clones go on from there.
BASE_SIZE = SEGMENT_SIZE + 5 * BLOCK_SIZE + 1536
# Where something can go wrong: the begin, the border of the segments, the end of the base, and what follows.
WINDOWS = ((0, 3 * BLOCK_SIZE), (SEGMENT_SIZE - 3 * BLOCK_SIZE, SEGMENT_SIZE + 10 * BLOCK_SIZE))
numbers = itertools.count()
SIZES = (BASE_SIZE, BASE_SIZE + SECTOR_SIZE, BASE_SIZE + 2 * BLOCK_SIZE + 512, SEGMENT_SIZE + 8 * BLOCK_SIZE)


class Oracle:
    """The windows of a disk as bytes."""

    def __init__(self, size: int, base: Callable[[int, int], bytes]) -> None:
        self.windows = [(start, bytearray(base(start, min(end, size) - start))) for start, end in WINDOWS]

    def write(self, offset: int, data: bytes) -> None:
        for start, content in self.windows:
            if start <= offset and offset + len(data) <= start + len(content):
                content[offset - start : offset - start + len(data)] = data

    def compare(self, clone: Clone) -> None:
        for start, content in self.windows:
            found = read(clone, start, len(content), nowait=False)
            if found != content:
                at = next(index for index, byte in enumerate(found) if byte != content[index])
                raise AssertionError(f"byte {start + at} is {found[at]}, not {content[at]}")


@pytest.fixture(scope="module", name="base_pool")
def make_base_pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return pool_with_base(tmp_path_factory.mktemp("oracle"))


def pool_with_base(directory: Path) -> Pool:
    source = directory / "source.img"
    with open(source, "wb") as file:
        file.truncate(BASE_SIZE)
        for start, end in WINDOWS:
            length = min(end, BASE_SIZE) - start
            os.pwrite(file.fileno(), bytes(1 + at * 7 % 251 for at in range(length)), start)
            os.pwrite(file.fileno(), bytes(BLOCK_SIZE), start + BLOCK_SIZE)
    pool = Pool.open(directory / "pool", create=True)
    pool.import_base(source, "base")
    return pool


def base_digest(pool: Pool) -> str:
    with open(pool.path / "bases" / "base" / "image", "rb") as image:
        return hashlib.file_digest(image, "sha256").hexdigest()


def base_bytes(pool: Pool) -> Callable[[int, int], bytes]:
    def read(offset: int, length: int) -> bytes:
        with open(pool.path / "bases" / "base" / "image", "rb") as image:
            return os.pread(image.fileno(), length, offset).ljust(length, b"\0")

    return read


@st.composite
def ranges(draw: st.DrawFn, size: int) -> tuple[int, int]:
    """(offset, length) within one window: of any alignment, near a border of blocks, or of whole blocks."""
    start, end = draw(st.sampled_from(WINDOWS))
    end = min(end, size)
    kind = draw(st.sampled_from(["bytes", "sectors", "blocks"]))
    unit = {"bytes": 1, "sectors": SECTOR_SIZE, "blocks": BLOCK_SIZE}[kind]
    offset = start + unit * draw(st.integers(0, (end - start - 1) // unit))
    length = unit * draw(st.integers(0, (end - offset) // unit))
    return offset, length


contents = st.sampled_from(["random", "zeros", "zeros then data", "data then zeros"])


def fill(kind: str, length: int, seed: int) -> bytes:
    data = bytes(1 + (seed + at * 13) % 255 for at in range(length))
    half = length // 2
    if kind == "zeros":
        return bytes(length)
    if kind == "zeros then data":
        return bytes(half) + data[half:]
    return data[:half] + bytes(length - half) if kind == "data then zeros" else data


class ForgetfulFileSystem(FileSystem):
    """What must not wait is answered EAGAIN, now and then after a part: as with a cold cache."""

    def __init__(self) -> None:
        self.calls = 0

    def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:  # type: ignore[override]
        if flags & self.NOWAIT:
            self.calls += 1
            if self.calls % 3 == 0:
                raise BlockingIOError
            if self.calls % 3 == 1 and len(buffers[0]) > 512:
                return os.preadv(fd, [memoryview(buffers[0])[:512]], offset)
        return os.preadv(fd, buffers, offset)


def write(clone: Clone, data: bytes, offset: int, *, nowait: bool) -> None:
    if nowait:
        try:
            clone.write_nowait(memoryview(data), offset)
        except BlockingIOError:
            pass
        else:
            return
    clone.pwrite(data, offset)


def read(clone: Clone, offset: int, length: int, *, nowait: bool) -> bytes:
    view = memoryview(bytearray(b"?" * length))  # a buffer that was used before
    if nowait:
        try:
            clone.read_into_nowait(view, offset)
        except BlockingIOError:
            pass
        else:
            return bytes(view)
    clone.read_into(view, offset)
    return bytes(view)


class CloneMachine(RuleBasedStateMachine):
    pool: Pool

    @initialize(size=st.sampled_from(SIZES), forgetful=st.booleans())
    def make(self, size: int, forgetful: bool) -> None:
        self.name = f"clone-{next(numbers)}"
        self.size = size
        self.pool.create_clones("base", [self.name], size=size)
        self.fs = ForgetfulFileSystem() if forgetful else FileSystem()
        self.oracle = Oracle(size, base_bytes(self.pool))
        self.open()

    def open(self) -> None:
        self.clone = Pool.open(self.pool.path, fs=self.fs).open_clone(self.name)

    @rule(data=st.data(), kind=contents, seed=st.integers(0, 250), nowait=st.booleans())
    def write(self, data: st.DataObject, kind: str, seed: int, nowait: bool) -> None:
        offset, length = data.draw(ranges(self.size))
        content = fill(kind, length, seed)
        write(self.clone, content, offset, nowait=nowait)
        self.oracle.write(offset, content)

    @rule(data=st.data(), allocate=st.booleans())
    def zero(self, data: st.DataObject, allocate: bool) -> None:
        offset, length = data.draw(ranges(self.size))
        self.clone.zero(offset, length, allocate=allocate)
        self.oracle.write(offset, bytes(length))

    @rule(data=st.data(), nowait=st.booleans())
    def read(self, data: st.DataObject, nowait: bool) -> None:
        offset, length = data.draw(ranges(self.size))
        found = read(self.clone, offset, length, nowait=nowait)
        for start, content in self.oracle.windows:
            if start <= offset < start + len(content):
                assert found == content[offset - start : offset - start + length]

    @rule()
    def flush(self) -> None:
        self.clone.flush()

    @rule()
    def close_and_open(self) -> None:
        self.clone.close()
        self.open()

    @rule()
    def prefetch(self) -> None:
        self.clone.prefetch(0, self.size)

    @precondition(lambda self: hasattr(self, "clone"))
    @invariant()
    def reads_as_the_oracle(self) -> None:
        self.oracle.compare(self.clone)

    def teardown(self) -> None:
        if hasattr(self, "clone"):
            self.clone.close()
            with self.pool.open_clone(self.name) as clone:
                self.oracle.compare(clone)
            self.pool.remove([self.name])


def run_machine(pool: Pool, chosen: settings) -> None:
    run_state_machine_as_test(type("CloneMachine", (CloneMachine,), {"pool": pool}), settings=chosen)


def test_any_sequence_of_changes_reads_as_a_row_of_bytes_would(base_pool: Pool) -> None:
    before = base_digest(base_pool)
    run_machine(base_pool, settings())
    assert base_digest(base_pool) == before


operations = st.lists(
    st.tuples(
        st.sampled_from(["write", "nowait", "zero", "allocate"]), ranges(SIZES[0]), contents, st.integers(0, 250)
    ),
    max_size=12,
)


@given(operations=operations)
def test_any_list_of_writes_and_zeros_survives_closing(
    base_pool: Pool, operations: list[tuple[str, tuple[int, int], str, int]]
) -> None:
    name = f"list-{next(numbers)}"
    base_pool.create_clones("base", [name])
    oracle = Oracle(BASE_SIZE, base_bytes(base_pool))
    with base_pool.open_clone(name) as clone:
        for kind, (offset, length), content, seed in operations:
            data = bytes(length) if kind in ("zero", "allocate") else fill(content, length, seed)
            if kind in ("zero", "allocate"):
                clone.zero(offset, length, allocate=kind == "allocate")
            else:
                write(clone, data, offset, nowait=kind == "nowait")
            oracle.write(offset, data)
        oracle.compare(clone)
    with base_pool.open_clone(name) as clone:
        oracle.compare(clone)
    base_pool.remove([name])


@pytest.mark.parametrize(
    ("method", "old", "new"),
    [
        ("_write_partial", "self._read_block(block, offset - lead, nowait)\n        block[lead", "block[lead"),
        ("_read", "part[count:] = bytes(length - count)", "pass"),
        ("_read", "part[:] = bytes(length)", "pass"),
        ("_runs", "begin = origin + (first << BLOCK_SHIFT)", "begin = origin"),
        ("_store", "(segment + 1) * delta.stride", "1 * delta.stride"),
        ("_zero_blocks", "self._take(segment, first, end)", "pass"),
        ("_take", "mark(segment, first, end - 1)", "mark(segment, first, end - 2)"),
    ],
)
def test_the_oracle_notices_a_clone_that_is_broken(
    base_pool: Pool, monkeypatch: pytest.MonkeyPatch, method: str, old: str, new: str
) -> None:
    mutate(monkeypatch, Clone, method, old, new)
    with pytest.raises((AssertionError, ValueError, OSError, CorruptDelta)):
        run_machine(base_pool, settings(phases=[Phase.generate], report_multiple_bugs=False))


@pytest.mark.parametrize("size", [BLOCK_SIZE, BLOCK_SIZE + 512, SEGMENT_SIZE - 512, SEGMENT_SIZE, SEGMENT_SIZE + 512])
def test_the_last_bytes_of_a_disk_of_any_size_are_as_good_as_others(tmp_path: Path, size: int) -> None:
    (tmp_path / "source").write_bytes(b"base" * 1024)
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "source", "base")
    pool.create_clones("base", ["end"], size=size)
    for content in (b"x" * 700, b"y" * 512, b"z"):
        with pool.open_clone("end") as clone:
            clone.pwrite(content, size - len(content))
        with pool.open_clone("end") as clone:
            assert clone.pread(len(content), size - len(content)) == content
            for offset, length in ((size, 1), (size - 1, 2), (-1, 1), (0, size + 1)):
                with pytest.raises(UsageError):
                    clone.pread(length, offset)
                with pytest.raises(UsageError):
                    clone.pwrite(bytes(length), offset)


def test_a_base_can_be_read_and_not_written(base_pool: Pool) -> None:
    with base_pool.open_clone("base") as base:
        assert base.read_only
        assert base.pread(BLOCK_SIZE, 0) == base_bytes(base_pool)(0, BLOCK_SIZE)
        for change in (lambda: base.pwrite(b"x", 0), lambda: base.zero(0, 512)):
            with pytest.raises(UsageError, match="read-only"):
                change()
        base.flush()
