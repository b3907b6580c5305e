"""Raw export: the image is what the clone reads as, sparse, and there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdclone.errors import FileTooLarge, InUse, NotFound, StorageError, UsageError
from nbdclone.exchange.export import Exported, export_image, format_of
from nbdclone.store import exporting
from nbdclone.store.exporting import FICLONERANGE, stream_raw
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool

MIB = 1 << 20


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "disk.raw"


def nothing_is_left(target: Path) -> bool:
    return os.listdir(target.parent) == []


def export(pool: Pool, name: str, target: Path, **options: Any) -> Exported:
    return export_image(pool, name, target, **options)


CHANGES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 300), st.integers(1, 40), st.sampled_from([0, 0, 512, 4095, 100])),
    max_size=8,
)


def change(pool: Pool, name: str, changes: list[tuple[bool, int, int, int]], oracle: bytearray) -> None:
    rng = random.Random(len(changes))
    with pool.open_clone(name) as clone:
        for zero, block, count, shift in changes:
            offset = min(block * BLOCK_SIZE + shift, clone.size - 1)
            length = min(count * BLOCK_SIZE - shift, clone.size - offset)
            data = bytes(length) if zero else rng.randbytes(length)
            clone.zero(offset, length) if zero else clone.pwrite(data, offset)
            oracle[offset : offset + length] = data


@given(changes=CHANGES, more=st.sampled_from([0, 512, 4096 + 1536, 200_192]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_a_raw_image_is_byte_for_byte_what_the_clone_reads_as(
    pool: Pool, content: bytes, target: Path, changes: list[tuple[bool, int, int, int]], more: int
) -> None:
    oracle = bytearray(content + bytes(more))
    pool.create_clones("base", ["web"], size=len(oracle))
    try:
        change(pool, "web", changes, oracle)
        export(pool, "web", target, force=True)
        assert target.read_bytes() == oracle
        assert os.listdir(target.parent) == [target.name]
    finally:
        pool.remove(["web"])


def test_a_disk_of_several_segments_comes_out_right_around_their_borders(pool: Pool, target: Path) -> None:
    size = 2 * SEGMENT_SIZE + 3 * BLOCK_SIZE + 512
    pool.create_clones("base", ["web"], size=size)
    written = {SEGMENT_SIZE - 6000: b"a" * 12_000, 2 * SEGMENT_SIZE - 5: b"b" * 10, size - 700: b"c" * 700}
    with pool.open_clone("web") as clone:
        for offset, data in written.items():
            clone.pwrite(data, offset)
    done = export(pool, "web", target)
    with open(target, "rb") as file:
        for offset, data in written.items():
            file.seek(offset - 100 if offset + len(data) < size else offset)
            assert file.read(len(data) + 200).strip(b"\0") == data
    assert target.stat().st_size == done.size == size
    assert done.allocated <= MIB + 64 * 1024


def test_holes_and_blocks_of_zeros_are_holes(pool: Pool, tmp_path: Path, target: Path) -> None:
    with open(tmp_path / "zeros.img", "wb") as file:
        file.truncate(64 * MIB)
        os.pwrite(file.fileno(), b"x" * BLOCK_SIZE, 30 * MIB)
    pool.import_base(tmp_path / "zeros.img", "zeros")
    pool.create_clones("zeros", ["web"])
    with pool.open_clone("web") as clone:
        for block in range(256, 512):
            clone.pwrite(b"x" * BLOCK_SIZE, block * BLOCK_SIZE)
            for half in (0, BLOCK_SIZE // 2):  # zeros bit by bit: they take space in the delta
                clone.pwrite(bytes(BLOCK_SIZE // 2), block * BLOCK_SIZE + half)
        clone.pwrite(b"y" * BLOCK_SIZE, 40 * MIB)
    assert (pool.path / "clones" / "web" / "delta").stat().st_blocks * 512 > MIB
    export(pool, "web", target)
    assert target.stat().st_blocks * 512 <= 4 * BLOCK_SIZE


def test_a_base_can_be_exported_while_clones_of_it_are_open(pool: Pool, content: bytes, target: Path) -> None:
    pool.create_clones("base", ["web"])
    with pool.open_clone("web"):
        assert export(pool, "base", target) == Exported("base", str(target), "raw", MIB, MIB)
    assert target.read_bytes() == content


def test_extents_are_shared_where_the_file_system_can(
    pool: Pool, content: bytes, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that shares, as far as the caller can tell: whole blocks alone, by their places in the files."""
    shared: list[int] = []

    def ioctl(fd: int, request: int, argument: bytes) -> int:
        assert request == FICLONERANGE
        source, start, length, at = struct.unpack("=qQQQ", argument)
        assert not (start | length | at) % BLOCK_SIZE
        assert length
        os.pwrite(fd, os.pread(source, length, start), at)
        shared.append(length)
        return 0

    size = SEGMENT_SIZE + 5 * BLOCK_SIZE + 512
    pool.create_clones("base", ["web"], size=size)
    with pool.open_clone("web") as clone:
        clone.pwrite(b"own" * 5000, 8192)
        clone.pwrite(b"end" * 9000, size - 27_000)
        clone.zero(65536, 65536)
    export(pool, "web", target.with_name("copied"))
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(exporting, "_copy", lambda *_: pytest.fail("copied although it can be shared"))
    export(pool, "web", target)
    assert target.read_bytes() == target.with_name("copied").read_bytes()
    assert sum(shared) >= MIB - 65536


def test_a_file_that_is_there_is_kept_unless_forced(pool: Pool, content: bytes, target: Path) -> None:
    target.write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"disk\.raw exists: --force replaces it"):
        export(pool, "base", target)
    assert target.read_bytes() == b"precious"
    export(pool, "base", target, force=True)
    assert target.read_bytes() == content


def test_a_file_that_came_meanwhile_is_kept(pool: Pool, target: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        export(pool, "base", target, progress=lambda *_: target.write_bytes(b"new"))
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == [target.name]


def test_while_it_is_written_there_is_nothing_under_its_name(pool: Pool, target: Path) -> None:
    seen: list[bool] = []
    export(pool, "base", target, progress=lambda *_: seen.append(target.exists()))
    assert seen
    assert not any(seen)


def test_it_is_durable_before_it_has_its_name(pool: Pool, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, rename = os.fsync, os.rename

    def sync(fd: int) -> None:
        steps.append("sync " + ("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"))
        fsync(fd)

    def give_name(source: Path, to: Path) -> None:
        steps.append("rename")
        rename(source, to)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", give_name)
    export(pool, "base", target)
    assert steps == ["sync file", "rename", "sync directory"]


@pytest.mark.parametrize(
    ("code", "kind", "pattern"),
    [
        (errno.ENOSPC, StorageError, r"no space left in .*out \(\d+ bytes free\); what there was of it is removed"),
        (errno.EDQUOT, StorageError, "no space left"),
        (errno.EFBIG, FileTooLarge, "an image of 1048576 bytes is larger than a file can be in"),
        (errno.EIO, OSError, "Input/output error"),
    ],
)
def test_a_disk_that_takes_no_more_is_told_in_a_line_and_nothing_is_left(
    pool: Pool, target: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception], pattern: str
) -> None:
    def refuse(self: FileSystem, fd: int, data: Any, offset: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileSystem, "pwrite_all", refuse)
    with pytest.raises(kind, match=pattern):
        export(pool, "base", target)
    assert nothing_is_left(target)


def test_what_interrupts_it_leaves_nothing(pool: Pool, target: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(pool, "base", target, progress=interrupt)
    assert nothing_is_left(target)
    pool.open_clone("base").close()


def test_a_clone_that_is_open_is_refused_and_said_by_whom(pool: Pool, target: Path) -> None:
    pool.create_clones("base", ["web"])
    with pool.open_clone("web"), pytest.raises(InUse, match=rf"clone 'web' is in use by .*\b{os.getpid()}\b"):
        export(pool, "web", target)
    assert nothing_is_left(target)


def test_places_where_no_image_can_be_are_refused(pool: Pool, target: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(pool.path / "bases")
    for path, pattern in {
        tmp_path / "no" / "where": "there is no directory",
        tmp_path / "out": "is there, and is no file",
        tmp_path / "fifo": "is there, and is no file",
        pool.path / "disk.raw": "is inside the pool",
        pool.path / "bases" / "base" / "image": "is inside the pool",
        tmp_path / "link" / "base" / "image": "is inside the pool",
    }.items():
        with pytest.raises(UsageError, match=pattern):
            export(pool, "base", path, force=True)
    with pytest.raises(NotFound):
        export(pool, "nosuch", target)
    assert nothing_is_left(target)


def test_a_link_to_a_file_stays_a_link(pool: Pool, content: bytes, target: Path, tmp_path: Path) -> None:
    target.write_bytes(b"old")
    (tmp_path / "link.raw").symlink_to(target)
    export(pool, "base", tmp_path / "link.raw", force=True)
    assert (tmp_path / "link.raw").is_symlink()
    assert target.read_bytes() == content


def test_progress_ends_with_all_of_it(pool: Pool, target: Path) -> None:
    pool.create_clones("base", ["web"], size=2 * MIB)
    told: list[tuple[int, int]] = []
    export(pool, "web", target, progress=lambda *now: told.append(now))
    assert told == sorted(told)
    assert told[-1] == (2 * MIB, 2 * MIB)


def test_a_stream_has_every_byte_also_through_a_pipe_that_takes_little(pool: Pool, content: bytes) -> None:
    pool.create_clones("base", ["web"], size=MIB + 70_144)
    received = bytearray()
    reading, writing = os.pipe()

    def receive() -> None:
        while piece := os.read(reading, 5000):
            received.extend(piece)

    thread = threading.Thread(target=receive)
    thread.start()
    with pool.open_clone("web") as clone:
        stream_raw(clone, writing)
    os.close(writing)
    thread.join()
    os.close(reading)
    assert received == content + bytes(70_144)


@pytest.mark.parametrize(
    ("file", "given_format", "link", "expected"),
    [
        ("a.raw", None, False, "raw"),
        ("a.img", None, False, "raw"),
        ("a", None, False, "raw"),
        ("a.QCOW2", None, False, "qcow2"),
        ("a.vhd", None, False, "vpc"),
        ("a.qcow2", "raw", False, "raw"),
        ("a.img", None, True, "qcow2"),
    ],
)
def test_the_format_is_the_one_that_was_asked_for_or_that_of_the_name(
    file: str, given_format: str | None, link: bool, expected: str
) -> None:
    assert format_of(Path(file), given_format, link=link) == expected


def test_a_format_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="'iso' is no format that is known here: raw, qcow2"):
        format_of(Path("a"), "iso", link=False)
    with pytest.raises(UsageError, match="only a qcow2 can be linked to a base, not a vmdk"):
        format_of(Path("a"), "vmdk", link=True)


@pytest.mark.parametrize("options", [{"image_format": "qcow2"}, {"link": True}])
def test_without_qemu_img_it_is_said_what_to_install_and_nothing_is_left(
    pool: Pool, target: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"qemu-img, which makes .*, is not installed \(Debian: apt install qemu"):
        export(pool, "base", target, **options)
    assert nothing_is_left(target)


def test_a_clone_that_is_filled_has_it_when_it_has_its_name(pool: Pool, content: bytes) -> None:
    def fill(clone: Any) -> None:
        assert pool.names() == ["base"]
        clone.pwrite(b"filled", 5000)

    [made] = pool.create_clones("base", ["web"], fill=fill)
    assert made.allocated > 0
    assert os.listdir(pool.path / "clones" / "web") == ["delta"]
    with pool.open_clone("web") as clone:
        assert clone.pread(MIB, 0) == content[:5000] + b"filled" + content[5006:]


def test_a_clone_that_cannot_be_filled_is_not_made(pool: Pool) -> None:
    def fail(clone: Any) -> None:
        clone.pwrite(b"half", 0)
        raise StorageError("no more")

    with pytest.raises(StorageError, match="no more"):
        pool.create_clones("base", ["one", "two"], fill=fail)
    assert pool.names() == ["base"]
    assert os.listdir(pool.path / ".tmp") == []
