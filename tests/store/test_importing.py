"""Importing: what becomes a base is whole and sparse; what is truncated, damaged or no image is refused in words."""

from __future__ import annotations

import errno
import os
import random
import shutil
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from words import refusal

from nbdclone.errors import InvalidImage, NBDCloneError, NotFound, StorageError
from nbdclone.store.clone import Clone
from nbdclone.store.fs import FileSystem
from nbdclone.store.pool import Pool

Require = Callable[[bool, str], None]
MIB = 1 << 20


def bytes_of(pool: Pool, name: str) -> bytes:
    return (pool.path / "bases" / name / "image").read_bytes()


def refuse(pool: Pool, source: Path, pattern: str, kind: type[NBDCloneError] = InvalidImage, **options: Any) -> None:
    """The import is refused in one line that matches, and leaves nothing behind."""
    with pytest.raises(kind, match=pattern) as caught:
        pool.import_base(source, "refused", **options)
    assert "\n" not in str(caught.value)
    assert pool.names() == []
    assert os.listdir(pool.path / ".tmp") == []


# Raw images


def test_a_raw_image_is_copied_byte_for_byte_and_made_read_only(empty_pool: Pool, source: Path, content: bytes) -> None:
    info = empty_pool.import_base(source)
    assert (info.name, info.size, info.source, info.clones) == ("source", len(content), str(source), ())
    assert bytes_of(empty_pool, "source") == content
    assert (empty_pool.path / "bases" / "source" / "image").stat().st_mode & 0o777 == 0o444


def test_the_same_content_has_the_same_fingerprint_and_another_id(
    empty_pool: Pool, source: Path, content: bytes
) -> None:
    first, second = empty_pool.import_base(source, "first"), empty_pool.import_base(source, "second")
    assert first.fingerprint == second.fingerprint
    assert first.id != second.id
    source.write_bytes(content + bytes(512))
    assert empty_pool.import_base(source, "longer").fingerprint != first.fingerprint


@pytest.mark.parametrize("size", [4096, 4096 + 512, 4 * MIB - 512, 4 * MIB, 4 * MIB + 512, 9 * MIB + 1536])
def test_any_number_of_sectors_from_one_block_up_can_be_imported(empty_pool: Pool, tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    (tmp_path / "odd.img").write_bytes(content)
    empty_pool.import_base(tmp_path / "odd.img")
    assert bytes_of(empty_pool, "odd") == content


def test_an_import_is_sparse_and_no_larger_than_its_source(empty_pool: Pool, tmp_path: Path) -> None:
    source = tmp_path / "sparse.img"
    with open(source, "wb") as file:
        file.truncate(256 * MIB)
        for offset in (0, 5 * MIB, 100 * MIB + 4096, 256 * MIB - 4096):
            os.pwrite(file.fileno(), b"x" * 4096, offset)
        os.pwrite(file.fileno(), bytes(MIB), 50 * MIB)  # zeros that take space in the source
    os.sync()
    info = empty_pool.import_base(source)
    assert info.allocated <= source.stat().st_blocks * 512 - MIB + 8192
    subprocess.run(["cmp", source, empty_pool.path / "bases" / "sparse" / "image"], check=True)


def test_progress_ends_with_all_of_it(empty_pool: Pool, source: Path) -> None:
    told: list[tuple[int, int]] = []
    empty_pool.import_base(source, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (MIB, MIB)
    assert told == sorted(told)


@pytest.mark.parametrize(
    ("size", "pattern"),
    [
        (0, "source.img is empty"),
        (1, "1 bytes, which is no whole number of 512-byte sectors"),
        (MIB + 1, "no whole number of 512-byte sectors.*truncate -s %512"),
        (512, "512 bytes; a base has 4096 to"),
    ],
)
def test_an_image_of_an_impossible_size_is_refused(empty_pool: Pool, source: Path, size: int, pattern: str) -> None:
    os.truncate(source, size)
    refuse(empty_pool, source, pattern)


def test_a_file_that_is_not_there_is_not_found(empty_pool: Pool, tmp_path: Path) -> None:
    refuse(empty_pool, tmp_path / "nowhere.img", "nowhere.img: no such file", NotFound)


def test_a_directory_is_refused(empty_pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    refuse(empty_pool, tmp_path / "directory", "neither a file nor a block device")


@pytest.mark.timeout(20)
def test_a_fifo_is_refused_and_not_waited_for(empty_pool: Pool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refuse(empty_pool, tmp_path / "fifo", "neither a file nor a block device")


def test_a_character_device_is_refused(empty_pool: Pool) -> None:
    refuse(empty_pool, Path("/dev/zero"), "neither a file nor a block device")


def test_an_image_that_is_written_meanwhile_is_refused(empty_pool: Pool, source: Path) -> None:
    def disturb(done: int, total: int) -> None:
        time.sleep(0.02)
        with open(source, "r+b") as file:
            file.write(b"!")

    refuse(empty_pool, source, "was changed while it was imported", progress=disturb)


def test_an_image_that_shrinks_meanwhile_is_refused(empty_pool: Pool, source: Path) -> None:
    class Shrinking(FileSystem):
        def ftruncate(self, fd: int, length: int) -> None:  # type: ignore[override]
            os.truncate(source, 8192)
            os.ftruncate(fd, length)

    refuse(Pool.open(empty_pool.path, fs=Shrinking()), source, "shrank")


# Truncated images: what their own structures say


def ext4(path: Path, require: Require) -> None:
    require(shutil.which("mkfs.ext4") is not None, "mkfs.ext4 is missing")
    with open(path, "wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", path], check=True)


def mbr(path: Path, require: Require) -> None:
    image = bytearray(16 * MIB)
    image[446:462] = struct.pack("<B3xB3xII", 0x80, 0x83, 2048, 16 * MIB // 512 - 2048)
    image[510:512] = b"\x55\xaa"
    path.write_bytes(image)


def gpt(path: Path, require: Require) -> None:
    image = bytearray(16 * MIB)
    last = 16 * MIB // 512 - 1
    header = bytearray(struct.pack("<8sIII4xQQ", b"EFI PART", 0x10000, 92, 0, 1, last).ljust(92, b"\0"))
    struct.pack_into("<I", header, 16, zlib.crc32(header))
    image[512:604] = header
    image[446:462] = struct.pack("<B3xB3xII", 0, 0xEE, 1, last)
    image[510:512] = b"\x55\xaa"
    path.write_bytes(image)


TABLES = {"ext file system": ext4, "partition table": mbr, "GUID partition table": gpt}


@pytest.mark.parametrize("what", TABLES)
def test_an_image_that_ends_before_its_own_structures_is_refused_unless_forced(
    empty_pool: Pool, tmp_path: Path, what: str, require: Require
) -> None:
    image = tmp_path / "disk.img"
    TABLES[what](image, require)
    empty_pool.import_base(image, "whole")
    empty_pool.remove(["whole"])
    os.truncate(image, 15 * MIB)
    refuse(empty_pool, image, rf"truncated: it has {15 * MIB} bytes, and its {what} reaches to {16 * MIB} \(--force")
    assert empty_pool.import_base(image, "forced", force=True).size == 15 * MIB


@given(head=st.binary(max_size=200), at=st.sampled_from([0, 446, 500, 512, 1024, 1080, 4096]), signed=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_begin_of_an_image_is_taken_or_refused_in_words(
    empty_pool: Pool, tmp_path: Path, head: bytes, at: int, signed: bool
) -> None:
    image = bytearray(8192)
    image[at : at + len(head)] = head
    if signed:
        image[510:512] = b"\x55\xaa"
    (tmp_path / "any.img").write_bytes(image)
    if refusal(lambda: empty_pool.import_base(tmp_path / "any.img", "any")) is None:
        empty_pool.remove(["any"])


# Other formats


@pytest.fixture
def qemu_img(require: Require) -> Callable[..., None]:
    require(shutil.which("qemu-img") is not None, "qemu-img is missing")

    def run(*arguments: str | Path) -> None:
        subprocess.run(["qemu-img", *arguments], check=True, capture_output=True)

    return run


FORMATS = {
    "qcow2": (),
    "qcow2 compressed": ("-c",),
    "qcow2 of small clusters": ("-o", "cluster_size=512"),
    "vmdk": (),
    "vmdk streamOptimized": ("-o", "subformat=streamOptimized"),
    "vmdk twoGbMaxExtentFlat": ("-o", "subformat=twoGbMaxExtentFlat"),
    "vhdx": (),
    "vdi": (),
    "vpc": ("-o", "force_size=on"),
    "vpc fixed": ("-o", "force_size=on,subformat=fixed"),
}
DISK = 3 * MIB


@pytest.fixture(scope="module")
def disk() -> bytes:
    """Data in all of it but the second MiB: no format has its end for free."""
    rng = random.Random(3)
    return rng.randbytes(MIB) + bytes(MIB) + rng.randbytes(MIB)


@pytest.fixture
def converted(tmp_path: Path, disk: bytes, qemu_img: Callable[..., None]) -> Callable[[str], Path]:
    def convert(kind: str) -> Path:
        (tmp_path / "raw").write_bytes(disk)
        target = tmp_path / "image"
        qemu_img("convert", "-f", "raw", *FORMATS[kind], "-O", kind.split()[0], tmp_path / "raw", target)
        return target

    return convert


@pytest.mark.parametrize("kind", FORMATS)
def test_an_image_of_another_format_becomes_a_raw_base(
    empty_pool: Pool, converted: Callable[[str], Path], disk: bytes, kind: str
) -> None:
    told: list[tuple[int, int]] = []
    info = empty_pool.import_base(converted(kind), "disk", progress=lambda done, total: told.append((done, total)))
    assert info.size == DISK
    assert bytes_of(empty_pool, "disk") == disk
    assert info.allocated <= 2 * MIB + (64 << 10)
    assert told == sorted(told)
    with empty_pool.open_clone("disk") as base:
        assert base.pread(DISK, 0) == disk


def cuts(length: int) -> list[int]:
    return [1, 512, 4096, 20_000, 40_000, 70_000, length // 3, length // 2, length - 1000, length - 512, length - 4]


# Without its end, a VHD of fixed size is a raw image like any other.
@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "Flat" not in kind and "fixed" not in kind])
def test_a_truncated_image_never_becomes_a_base_with_zeros_in_place_of_its_data(
    empty_pool: Pool, converted: Callable[[str], Path], disk: bytes, kind: str
) -> None:
    whole = converted(kind).read_bytes()
    refused = 0
    for cut in cuts(len(whole)):
        image = empty_pool.path.parent / "cut"
        image.write_bytes(whole[: len(whole) - cut])
        if refusal(partial(empty_pool.import_base, image, "cut")):
            refused += 1
            continue
        assert bytes_of(empty_pool, "cut") == disk, f"{cut} bytes cut off"
        empty_pool.remove(["cut"])
    assert refused >= 5
    assert empty_pool.names() == []


def test_a_truncated_image_says_how_much_is_missing_and_can_be_forced(
    empty_pool: Pool, converted: Callable[[str], Path]
) -> None:
    image = converted("qcow2")
    length = image.stat().st_size
    os.truncate(image, length - 40_000)
    refuse(empty_pool, image, rf"truncated: it has {length - 40_000} bytes, and its data reaches to {length} \(--force")
    assert empty_pool.import_base(image, "forced", force=True).size == DISK


def test_a_truncated_image_is_noticed_also_if_it_was_copied_with_holes(
    empty_pool: Pool, converted: Callable[[str], Path]
) -> None:
    image = converted("qcow2")
    length = image.stat().st_size
    copied = image.with_name("copied")
    subprocess.run(["cp", "--sparse=always", image, copied], check=True)
    os.truncate(copied, length - 40_000)
    refuse(
        empty_pool, copied, rf"truncated: it has {length - 40_000} bytes, and its data reaches to {length} \(--force"
    )


def test_a_truncated_image_below_another_is_noticed(
    empty_pool: Pool, converted: Callable[[str], Path], qemu_img: Callable[..., None], tmp_path: Path, disk: bytes
) -> None:
    lower = converted("qcow2")
    upper = tmp_path / "upper.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", lower, "-F", "qcow2", upper)
    empty_pool.import_base(upper, "whole")
    assert bytes_of(empty_pool, "whole") == disk
    empty_pool.remove(["whole"])
    os.truncate(lower, lower.stat().st_size - 40_000)
    refuse(empty_pool, upper, rf"{lower} is truncated")


@pytest.mark.parametrize("offset", [4, 24, 40, 48, 65_536, 131_072, 196_608, 262_144])
def test_a_qcow2_whose_metadata_rots_is_refused_or_read_right(
    empty_pool: Pool, converted: Callable[[str], Path], disk: bytes, offset: int
) -> None:
    image = converted("qcow2")
    with open(image, "r+b") as file:
        os.pwrite(file.fileno(), b"\x7f" * 6, offset)
    if refusal(lambda: empty_pool.import_base(image, "rotten")) is None:
        assert bytes_of(empty_pool, "rotten") == disk


def test_garbage_with_a_known_signature_is_refused(empty_pool: Pool, tmp_path: Path, require: Require) -> None:
    require(shutil.which("qemu-img") is not None, "qemu-img is missing")
    for magic in (b"QFI\xfb", b"KDMV", b"vhdxfile", b"conectix", b"# Disk DescriptorFile", b"COWD"):
        (tmp_path / "garbage").write_bytes(magic.ljust(1 << 16, b"\x5a"))
        refuse(empty_pool, tmp_path / "garbage", "garbage")


def test_without_qemu_img_the_message_says_what_to_install(
    empty_pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image.qcow2").write_bytes(b"QFI\xfb".ljust(4096, b"\0"))
    monkeypatch.setenv("PATH", "")
    refuse(empty_pool, tmp_path / "image.qcow2", r"is a qcow2 image, and qemu-img, .* not installed .*qemu-utils")


def test_a_name_that_qemu_would_take_for_a_protocol_is_a_file(
    empty_pool: Pool, converted: Callable[[str], Path], disk: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    converted("qcow2").rename(tmp_path / "nbd:image")
    monkeypatch.chdir(tmp_path)
    empty_pool.import_base("nbd:image", "disk")
    assert bytes_of(empty_pool, "disk") == disk


# Full disks


@pytest.mark.parametrize("step", ["ftruncate", "pwrite", "sync", "mkdir", "rename", "sync_directory"])
def test_a_full_disk_ends_an_import_without_a_trace(empty_pool: Pool, source: Path, step: str) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    full = type("Full", (FileSystem,), {step: staticmethod(fail)})()
    refuse(
        Pool.open(empty_pool.path, fs=full),
        source,
        r"import of .*source.img: no space left in .*pool \(\d+ bytes free\); nothing was made",
        StorageError,
    )
    empty_pool.import_base(source)


@pytest.fixture
def small_disk(tmp_path: Path, require: Require) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "nbdclone-test", mount]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_disk_that_is_really_full_ends_an_import_without_a_trace(
    small_disk: Path, tmp_path: Path, kind: str, qemu_img: Callable[..., None]
) -> None:
    (tmp_path / "large.img").write_bytes(random.Random(1).randbytes(8 * MIB))
    qemu_img("convert", "-f", "raw", "-O", kind, tmp_path / "large.img", tmp_path / "large")
    pool = Pool.open(small_disk / "pool", create=True)
    refuse(pool, tmp_path / "large", r"(?i)no space left", StorageError)
    (tmp_path / "fits.img").write_bytes(random.Random(1).randbytes(MIB))
    assert pool.import_base(tmp_path / "fits.img").size == MIB


def fill(clone: Clone) -> int:
    """Write until there is no more space; how many bytes were written."""
    for offset in range(0, clone.size, 4096):
        try:
            clone.pwrite(b"g" * 4096, offset)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return offset
    raise AssertionError("the disk is not small")


def test_a_full_disk_hurts_the_clone_that_needs_space_and_no_other(small_disk: Path, tmp_path: Path) -> None:
    """Law 8, on a file system that is really full: reads, rewrites, flushes and other clones go on."""
    (tmp_path / "base.img").write_bytes(b"base" * 1024)
    pool = Pool.open(small_disk / "pool", create=True)
    pool.import_base(tmp_path / "base.img", "base")
    pool.create_clones("base", ["greedy", "modest"], size=16 * MIB)
    with pool.open_clone("greedy") as greedy, pool.open_clone("modest") as modest:
        modest.pwrite(b"m" * 8192, 0)
        written = fill(greedy)
        assert MIB < written < 4 * MIB
        assert greedy.pread(written, 0) == b"g" * written
        greedy.pwrite(b"again", 0)
        greedy.flush()
        modest.pwrite(b"M" * 8192, 0)
        modest.flush()
        assert modest.pread(8192, 0) == b"M" * 8192
        with pytest.raises(StorageError, match="making clones: no space left"):
            pool.create_clones("base", [f"more{number}" for number in range(50)], size=16 * MIB)
        assert pool.names() == ["base", "greedy", "modest"]
        greedy.zero(0, written)
        greedy.pwrite(b"h" * 4096, written)
        greedy.flush()
    with pool.open_clone("greedy") as greedy:
        assert greedy.pread(4096, written) == b"h" * 4096
        assert greedy.pread(written, 0) == bytes(written)
