"""Law 1: a base that is not what it was is noticed at its opening, and its clones are refused with the difference."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbdclone.errors import BaseChanged, NBDCloneError, StorageError
from nbdclone.store import image as image_module
from nbdclone.store.image import CHUNK_SIZE, SAMPLES, BaseRecord, Identity, Image, in_words
from nbdclone.store.pool import Pool

CHUNKS = 3
SIZE = CHUNKS * CHUNK_SIZE + 512


@pytest.fixture
def image(empty_pool: Pool, tmp_path: Path) -> Path:
    """The image of a base of three chunks and a bit, which has a clone; the second chunk is a hole."""
    source = tmp_path / "debian.img"
    with open(source, "wb") as file:
        file.truncate(SIZE)
        os.pwrite(file.fileno(), b"first", 0)
        os.pwrite(file.fileno(), b"third", 2 * CHUNK_SIZE)
        os.pwrite(file.fileno(), b"last", SIZE - 4)
    empty_pool.import_base(source)
    empty_pool.create_clones("debian", ["web1"])
    path = empty_pool.path / "bases" / "debian" / "image"
    path.chmod(0o644)
    empty_pool.open_clone("web1").close()
    time.sleep(0.02)  # longer than the file system's clock stands still
    return path


@pytest.fixture
def refusal(empty_pool: Pool) -> Callable[[], str]:
    """Why the clone is refused. The base alone is refused as well, and so is a new clone."""

    def refusal() -> str:
        with pytest.raises(BaseChanged, match="base 'debian'"):
            empty_pool.open_clone("debian")
        with pytest.raises(BaseChanged, match="base 'debian'"):
            empty_pool.create_clones("debian", ["web2"])
        with pytest.raises(BaseChanged) as caught:
            empty_pool.open_clone("web1")
        message = str(caught.value)
        assert "clone 'web1'" in message
        assert "'debian'" in message
        assert "\n" not in message
        return message

    return refusal


def write(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), content, offset)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (0, "bytes 0-4194303"),
        (CHUNK_SIZE - 1, "bytes 0-4194303"),
        (CHUNK_SIZE + 77, "bytes 4194304-8388607"),
        (SIZE - 1, "bytes 12582912-12583423"),
    ],
)
def test_one_changed_byte_is_noticed_and_its_place_named(
    image: Path, refusal: Callable[[], str], offset: int, expected: str
) -> None:
    write(image, offset, b"!")
    assert refusal().endswith(f"its content differs in {expected}")


def test_all_places_are_named_and_neighbours_as_one(image: Path, refusal: Callable[[], str]) -> None:
    for offset in (0, 2 * CHUNK_SIZE, SIZE - 1):
        write(image, offset, b"!")
    assert refusal().endswith("in bytes 0-4194303, 8388608-12583423")


def test_of_many_places_three_are_named_and_the_rest_counted() -> None:
    assert (
        in_words([(0, 512), (1024, 1), (4096, 4096), (9000, 1), (10000, 1)]) == "0-511, 1024-1024, 4096-8191 and 2 more"
    )


def test_an_edit_is_noticed_although_the_time_of_change_was_put_back(image: Path, refusal: Callable[[], str]) -> None:
    before = image.stat()
    write(image, 1, b"!")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert image.stat().st_mtime_ns == before.st_mtime_ns
    assert "differs in bytes 0-4194303" in refusal()


def test_zeros_where_data_was_are_noticed(image: Path, refusal: Callable[[], str]) -> None:
    write(image, 2 * CHUNK_SIZE, bytes(5))
    assert "differs in bytes 8388608-12582911" in refusal()


@pytest.mark.parametrize(("size", "kind"), [(SIZE - 512, "truncated"), (0, "truncated"), (SIZE + 512, "grown")])
def test_another_length_is_noticed_and_said(image: Path, refusal: Callable[[], str], size: int, kind: str) -> None:
    os.truncate(image, size)
    assert f"it was {kind}, from {SIZE} to {size} bytes" in refusal()


def test_another_file_in_its_place_is_noticed(image: Path, refusal: Callable[[], str]) -> None:
    other = image.with_name("other")
    other.write_bytes(b"other".ljust(SIZE, b"!"))
    other.rename(image)
    assert f"its content differs in bytes 0-{SIZE - 1}" in refusal()


def test_a_change_is_noticed_without_a_manifest_too(image: Path, refusal: Callable[[], str]) -> None:
    (image.parent / "manifest").unlink()
    write(image, 0, b"!")
    assert "its content differs" in refusal()


def test_a_missing_image_is_said(empty_pool: Pool, image: Path) -> None:
    image.unlink()
    with pytest.raises(
        BaseChanged, match=r"clone 'web1' is refused: base 'debian' is not there any more: .*image is mi"
    ):
        empty_pool.open_clone("web1")


def test_a_missing_base_is_said(empty_pool: Pool, image: Path) -> None:
    shutil.rmtree(image.parent)
    with pytest.raises(BaseChanged, match=r"clone 'web1': its base 'debian' \([0-9a-f]{32}\) is missing"):
        empty_pool.open_clone("web1")


def test_another_base_of_the_same_name_is_not_taken_for_it(empty_pool: Pool, image: Path, tmp_path: Path) -> None:
    shutil.rmtree(image.parent)
    empty_pool.import_base(tmp_path / "debian.img")
    with pytest.raises(BaseChanged, match=r"clone 'web1': its base 'debian' .* is missing"):
        empty_pool.open_clone("web1")


def test_a_base_with_the_right_id_and_another_fingerprint_is_refused(empty_pool: Pool, image: Path) -> None:
    """Imported anew, with the old id written into its record."""
    record = image.parent / "base.json"
    write(image, 0, b"!")
    fields = json.loads(record.read_text())
    status = image.stat()
    fields["identity"] |= {"mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
    fields["fingerprint"] = "ab" * 32
    del fields["samples"]
    record.write_text(json.dumps(fields))
    with pytest.raises(BaseChanged, match=r"clone 'web1' is refused.*fingerprint [0-9a-f]{16}, .*abababababababab"):
        empty_pool.open_clone("web1")


def test_a_base_whose_directory_was_renamed_is_found_by_its_id(empty_pool: Pool, image: Path) -> None:
    image.parent.rename(image.parent.with_name("debian-12"))
    with empty_pool.open_clone("web1") as clone:
        assert clone.pread(5, 0) == b"first"


def count_hashing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    hash_image = image_module.hash_image
    monkeypatch.setattr(
        image_module, "hash_image", lambda fd, *rest, **how: (calls.append(fd), hash_image(fd, *rest, **how))[1]
    )
    return calls


def test_a_copy_of_a_pool_is_hashed_once_and_then_taken_as_it_is(
    empty_pool: Pool, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_hashing(monkeypatch)
    shutil.copytree(empty_pool.path, tmp_path / "copy")
    copy = Pool.open(tmp_path / "copy")
    for _ in range(2):
        with copy.open_clone("web1") as clone:
            assert clone.pread(4, SIZE - 4) == b"last"
        assert len(calls) == 1
    copied = copy.path / "bases" / "debian" / "image"
    assert BaseRecord.load(copied.with_name("base.json")).identity.inode == copied.stat().st_ino


def test_an_untouched_base_is_not_hashed(empty_pool: Pool, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_hashing(monkeypatch)
    empty_pool.open_clone("web1").close()
    empty_pool.create_clones("debian", ["web2"])
    assert calls == []


def test_a_base_that_was_made_right_again_is_accepted(empty_pool: Pool, image: Path) -> None:
    write(image, 0, b"!")
    with pytest.raises(BaseChanged):
        empty_pool.open_clone("web1")
    write(image, 0, b"f")
    empty_pool.open_clone("web1").close()


def test_a_pool_that_cannot_be_written_does_not_refuse_its_bases(
    empty_pool: Pool, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    os.utime(image)
    monkeypatch.setattr(image_module, "save", refuse)
    empty_pool.open_clone("debian").close()


def test_one_bad_base_does_not_hurt_clones_of_others(empty_pool: Pool, image: Path, tmp_path: Path) -> None:
    empty_pool.import_base(tmp_path / "debian.img", "sound")
    empty_pool.create_clones("sound", ["web2"])
    (image.parent / "base.json").write_text("rubbish")
    empty_pool.open_clone("web2").close()
    with pytest.raises(NBDCloneError):
        empty_pool.open_clone("web1")


def test_a_base_that_shrinks_under_an_open_clone_is_an_error_and_not_zeros(empty_pool: Pool, image: Path) -> None:
    with empty_pool.open_clone("web1") as clone:
        image.chmod(0o644)
        os.truncate(image, 8192)
        with pytest.raises(OSError, match="layer 1 ends at byte"):
            clone.pread(4096, 1 << 20)
        with pytest.raises(OSError, match="layer 1 ends at byte"):
            clone.pwrite(b"part of a block", 1 << 20)


# Samples


def pretend_nothing_happened(path: Path) -> None:
    """Record the identity that the image has now: as if its bytes had changed beneath the file system."""
    record = BaseRecord.load(path.parent / "base.json")
    record = replace(record, identity=Identity.of(path.stat()))
    (path.parent / "base.json").write_bytes(record.dump())


@pytest.mark.parametrize("offset", [0, 2 * CHUNK_SIZE + 100, SIZE - 1])
def test_a_sampled_block_that_differs_is_noticed_although_the_file_system_saw_no_change(
    image: Path, refusal: Callable[[], str], offset: int
) -> None:
    write(image, offset, b"!")
    pretend_nothing_happened(image)
    assert "its content differs in bytes" in refusal()


def test_an_image_of_which_everything_differs_is_noticed_although_the_file_system_saw_no_change(
    image: Path, refusal: Callable[[], str]
) -> None:
    write(image, 0, os.urandom(SIZE))
    pretend_nothing_happened(image)
    assert f"its content differs in bytes 0-{SIZE - 1}" in refusal()


def test_the_samples_are_few_and_of_the_data_between_the_ends(image: Path) -> None:
    samples = BaseRecord.load(image.parent / "base.json").samples
    assert samples is not None
    assert 3 <= len(samples.offsets) <= SAMPLES
    assert {0, 2 * CHUNK_SIZE, SIZE - 512} <= set(samples.offsets)


def test_a_record_without_samples_is_valid_and_gets_them_when_the_content_is_hashed(image: Path) -> None:
    record = image.parent / "base.json"
    fields = json.loads(record.read_text())
    del fields["samples"]
    record.write_text(json.dumps(fields))
    Image.open("debian", image.parent).close()
    assert "samples" not in json.loads(record.read_text())
    os.utime(image)
    Image.open("debian", image.parent).close()
    assert json.loads(record.read_text())["samples"]["hash"]


@pytest.mark.parametrize(
    "samples", [[], 5, {"offsets": 5}, {"offsets": [0] * 100, "hash": ""}, {"offsets": [-1], "hash": ""}]
)
def test_samples_that_make_no_sense_are_damage(image: Path, samples: object) -> None:
    record = image.parent / "base.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"samples": samples}))
    with pytest.raises(StorageError, match=r"base\.json: damaged"):
        Image.open("debian", image.parent)


def test_what_stands_in_the_place_of_a_file_is_refused_in_words_and_not_waited_for(image: Path) -> None:
    for name in ("base.json", "image"):
        path = image.parent / name
        path.rename(image.parent / "kept")
        os.mkfifo(path)
        with pytest.raises(StorageError, match=rf"{name}: cannot be opened \(not a regular file\)"):
            Image.open("debian", image.parent)
        path.unlink()
        (image.parent / "kept").rename(path)
