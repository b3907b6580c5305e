"""Names, locks, listing and removal; and what one process is told about another."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from words import refusal

from nbdclone.errors import (
    BaseChanged,
    CorruptDelta,
    InUse,
    InvalidName,
    NameTaken,
    NotFound,
    StorageError,
    UnsupportedFormat,
    UsageError,
)
from nbdclone.store.catalog import BaseInfo, CloneInfo
from nbdclone.store.delta_file import HEADER_SLOTS, PAGE_SIZE
from nbdclone.store.fs import FileSystem
from nbdclone.store.image import BaseRecord, Image
from nbdclone.store.layer import MAX_SIZE
from nbdclone.store.pool import Pool

# The pool's directory


def test_a_directory_that_is_no_pool_is_not_found_and_not_changed(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"is not a pool: 'nbdclone --pool .* import FILE' makes one"):
        Pool.open(tmp_path / "pool")
    assert os.listdir(tmp_path) == []


def test_a_missing_pool_is_made_with_its_parents(tmp_path: Path) -> None:
    pool = Pool.open(tmp_path / "srv" / "pool", create=True)
    assert pool.names() == []
    assert Pool.open(pool.path).names() == []


def test_a_directory_with_something_in_it_is_not_made_a_pool(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match="not empty"):
        Pool.open(tmp_path, create=True)
    assert os.listdir(tmp_path) == ["photo.jpg"]


def test_a_file_is_not_made_a_pool(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(UsageError, match="is not a directory"):
        Pool.open(tmp_path / "file", create=True)


@pytest.mark.parametrize("there", [[], [".tmp"], [".tmp", "bases"], ["clones"], [".lock"]], ids=str)
def test_a_pool_whose_making_was_interrupted_is_made_complete(tmp_path: Path, there: list[str]) -> None:
    for name in there:
        (tmp_path / name).mkdir()
    assert Pool.open(tmp_path, create=True).names() == []


# Names

BAD_NAMES = [
    "", ".", "..", "../x", "../bases/base", "a/b", "/etc", "a\0b", ".hidden", "-rf", "_x", "a b", "a\n", "a\nb",
    "é", "\ud800", "a@b", "a+b", "x" * 101, "x" * 300,
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_is_none_is_refused_everywhere_in_one_line(pool: Pool, source: Path, name: str) -> None:
    before = sorted(path for path in pool.path.rglob("*"))
    for attempt, kind in (
        (lambda: pool.import_base(source, name), InvalidName),
        (lambda: pool.create_clones("base", ["fine", name]), InvalidName),
        (lambda: pool.create_clones(name, ["fine"]), NotFound),
        (lambda: pool.open_clone(name), NotFound),
        (lambda: pool.info(name), NotFound),
        (lambda: pool.remove([name]), NotFound),
    ):
        with pytest.raises(kind) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
        str(caught.value).encode()
    assert sorted(path for path in pool.path.rglob("*")) == before


@pytest.mark.parametrize("name", ["a", "7", "web-1", "debian_12.5", "A" * 100, "a..b"])
def test_a_good_name_serves_a_base_and_a_clone(empty_pool: Pool, source: Path, name: str) -> None:
    empty_pool.import_base(source, name)
    empty_pool.create_clones(name, ["clone"])
    assert empty_pool.names() == sorted([name, "clone"])


@given(name=st.text(max_size=120))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_as_a_name_is_taken_or_refused_in_words(pool: Pool, name: str) -> None:
    if refusal(lambda: pool.create_clones("base", [name])) is None:
        pool.open_clone(name).close()
        pool.remove([name])


def test_a_base_is_called_as_its_file_up_to_the_last_dot(empty_pool: Pool, source: Path) -> None:
    image = source.rename(source.with_name("debian-12.qcow2.img"))
    assert empty_pool.import_base(image).name == "debian-12.qcow2"
    with pytest.raises(InvalidName):
        empty_pool.import_base(image.rename(image.with_name(".img")))


@pytest.mark.parametrize("taken", ["base", "clone"])
def test_a_name_is_taken_by_a_base_or_a_clone_alike(pool: Pool, source: Path, taken: str) -> None:
    pool.create_clones("base", ["clone"])
    with pytest.raises(NameTaken, match=f"there is a {taken} '{taken}'"):
        pool.import_base(source, taken)
    with pytest.raises(NameTaken, match=f"there is a {taken} '{taken}'"):
        pool.create_clones("base", ["new", taken])
    assert pool.names() == ["base", "clone"]


def test_a_name_given_twice_is_refused(pool: Pool) -> None:
    with pytest.raises(UsageError, match="'b' is given twice"):
        pool.create_clones("base", ["a", "b", "b"])
    assert pool.names() == ["base"]


def test_one_name_wanted_by_many_at_once_is_given_to_one(pool: Pool) -> None:
    taken: list[object] = []

    def take() -> None:
        with contextlib.suppress(NameTaken):
            taken.extend(pool.create_clones("base", ["wanted"]))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1
    assert pool.names() == ["base", "wanted"]


# Making clones


def test_a_clone_of_a_clone_is_refused_with_the_reason(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    with pytest.raises(UsageError, match="'web1' is a clone: clones are made from bases"):
        pool.create_clones("web1", ["web2"])


@pytest.mark.parametrize("size", [0, -4096, (1 << 20) - 512, (1 << 20) + 1, MAX_SIZE + 512, 1 << 70])
def test_a_clone_of_an_impossible_size_is_refused(pool: Pool, size: int) -> None:
    with pytest.raises(UsageError):
        pool.create_clones("base", ["web1"], size=size)
    assert pool.names() == ["base"]


def test_a_clone_larger_than_its_base_reads_zeros_beyond_it(pool: Pool, content: bytes) -> None:
    pool.create_clones("base", ["large"], size=len(content) + 4096 + 512)
    with pool.open_clone("large") as clone:
        assert clone.size == len(content) + 4608
        assert clone.pread(clone.size, 0) == content + bytes(4608)


def test_clones_of_one_base_do_not_see_each_other(pool: Pool, content: bytes) -> None:
    pool.create_clones("base", ["web1", "web2"])
    with pool.open_clone("web1") as first, pool.open_clone("web2") as second, pool.open_clone("base") as base:
        first.pwrite(b"first", 10)
        second.pwrite(b"second", 10)
        assert first.pread(6, 10) == b"first" + content[15:16]
        assert second.pread(6, 10) == b"second"
        assert base.pread(len(content), 0) == content


# Removing


def test_a_base_with_clones_is_not_removed_and_they_are_named(pool: Pool) -> None:
    names = [f"web{number:02}" for number in range(12)]
    pool.create_clones("base", names)
    with pytest.raises(InUse, match=r"base 'base' is needed by 12 clone\(s\): web00, .*, web09 and 2 more"):
        pool.remove(["base"])
    with pytest.raises(InUse, match=r"base 'base' is needed by 1 clone\(s\): web03$"):
        pool.remove(["base", *(name for name in names if name != "web03")])
    assert pool.names() == ["base", *names]


@pytest.mark.parametrize(
    "order", [["base", "web1", "web2"], ["web2", "base", "web1"], ["web1", "web1", "web2", "base"]]
)
def test_a_base_goes_together_with_its_clones(pool: Pool, order: list[str]) -> None:
    pool.create_clones("base", ["web1", "web2"])
    pool.remove(order)
    assert pool.names() == []
    assert os.listdir(pool.path / ".tmp") == []


def test_several_are_removed_or_none(pool: Pool) -> None:
    pool.create_clones("base", ["web1", "web2"])
    with pytest.raises(NotFound, match="'nowhere'"):
        pool.remove(["web1", "nowhere", "web2"])
    with pool.open_clone("web2"), pytest.raises(InUse):
        pool.remove(["web1", "web2"])
    assert pool.names() == ["base", "web1", "web2"]
    pool.remove(["web1", "web2"])
    assert pool.names() == ["base"]


def test_what_is_damaged_can_be_removed(pool: Pool) -> None:
    pool.create_clones("base", ["web1", "web2"])
    (pool.path / "clones" / "web1" / "delta").unlink()
    os.truncate(pool.path / "clones" / "web2" / "delta", 100)
    (pool.path / "bases" / "base" / "base.json").write_text("{")
    pool.remove(["web1", "web2"])
    pool.remove(["base"])
    assert pool.names() == []


def test_a_base_that_is_removed_while_it_is_being_opened_is_not_cloned(pool: Pool) -> None:
    """The removal comes between the opening of the file and its lock: the lock is then one on a file without a name."""

    class Racing(FileSystem):
        raced = False

        def lock(self, fd: int, path: str | Path, what: str, *, shared: bool = False) -> None:
            if shared and not self.raced:
                self.raced = True
                pool.remove(["base"])
            super().lock(fd, path, what, shared=shared)

    with pytest.raises((BaseChanged, NotFound), match="base 'base'"):
        Pool.open(pool.path, fs=Racing()).create_clones("base", ["orphan"])
    assert pool.names() == []


def test_a_clone_that_is_removed_while_it_is_being_opened_is_not_found(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])

    class Racing(FileSystem):
        def lock(self, fd: int, path: str | Path, what: str, *, shared: bool = False) -> None:
            if not shared:
                pool.remove(["web1"])
            super().lock(fd, path, what, shared=shared)

    with pytest.raises(NotFound, match="web1"):
        Pool.open(pool.path, fs=Racing()).open_clone("web1")


def test_removing_a_clone_does_not_look_at_the_others(pool: Pool) -> None:
    pool.create_clones("base", ["web1", "web2", "web3"])
    opened: list[str] = []

    class Watched(FileSystem):
        def open(self, path: str | Path, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
            opened.append(str(path))
            return os.open(path, flags, mode)

    Pool.open(pool.path, fs=Watched()).remove(["web2"])
    assert not [path for path in opened if "web1" in path or "web3" in path]


# Listing


def test_listing_says_what_there_is(pool: Pool, source: Path, content: bytes) -> None:
    started = time.time()
    pool.create_clones("base", ["web1", "web2"], size=2 << 20)
    with pool.open_clone("web1") as clone:
        clone.pwrite(b"x" * 65536, 0)
    base, first, second = pool.entries()
    assert isinstance(base, BaseInfo)
    assert isinstance(first, CloneInfo)
    assert isinstance(second, CloneInfo)
    assert (base.name, base.size, base.clones, base.error) == ("base", len(content), ("web1", "web2"), None)
    assert base.source == str(source)
    assert (first.name, first.size, first.parent, first.error) == ("web1", 2 << 20, "base", None)
    assert len({base.id, first.id, second.id}) == 3
    assert abs(first.created - started) < 60
    assert second.allocated <= 16 << 10
    assert first.allocated >= second.allocated + 65536
    assert pool.info("web2") == second


def test_what_is_damaged_is_listed_with_what_is_wrong(pool: Pool, source: Path) -> None:
    pool.import_base(source, "broken")
    pool.create_clones("base", ["empty", "fine", "gone"])
    pool.create_clones("broken", ["orphan"])
    (pool.path / "bases" / "broken" / "base.json").write_bytes(b"\xff")
    os.truncate(pool.path / "clones" / "empty" / "delta", 0)
    shutil.rmtree(pool.path / "clones" / "gone")
    (pool.path / "clones" / "gone").mkdir()
    errors = {info.name: info.error for info in pool.entries()}
    assert set(errors) == {"base", "broken", "empty", "fine", "gone", "orphan"}
    assert errors["base"] is errors["fine"] is None
    assert "damaged" in (errors["broken"] or "")
    assert "not a delta" in (errors["empty"] or "")
    assert "No such file" in (errors["gone"] or "")
    assert "its base 'broken'" in (errors["orphan"] or "")


@pytest.mark.parametrize("name", [".tmp", ".DS_Store", "lost+found", "web1~", "#web1#", "with space"])
def test_what_cannot_be_a_name_is_not_listed(pool: Pool, name: str) -> None:
    for directory in ("bases", "clones"):
        (pool.path / directory / name).mkdir()
    assert pool.names() == ["base"]
    assert [info.name for info in pool.entries()] == ["base"]
    with pytest.raises(NotFound):
        pool.open_clone(name)


def test_a_thousand_clones_are_listed_in_less_than_a_second(pool: Pool) -> None:
    class Hasty(FileSystem):
        """Without syncs: it is the listing that is measured."""

        def sync(self, fd: int) -> None:  # type: ignore[override]
            pass

        def sync_directory(self, path: Path) -> None:
            pass

    Pool.open(pool.path, fs=Hasty()).create_clones("base", [f"web{number}" for number in range(1000)])
    started = time.perf_counter()
    entries = pool.entries()
    elapsed = time.perf_counter() - started
    assert len(entries) == 1001
    assert elapsed < 1


def test_a_clone_of_a_base_of_1_tib_is_made_at_once_and_takes_no_space(empty_pool: Pool, tmp_path: Path) -> None:
    large = tmp_path / "large.img"
    with open(large, "wb") as file:
        file.truncate(1 << 40)
        os.pwrite(file.fileno(), b"begin", 0)
        os.pwrite(file.fileno(), b"end", (1 << 40) - 3)
    started = time.perf_counter()
    empty_pool.import_base(large)
    assert time.perf_counter() - started < 10
    timings = []
    for number in range(3):
        started = time.perf_counter()
        empty_pool.create_clones("large", [f"clone{number}"])
        timings.append(time.perf_counter() - started)
    assert min(timings) < 0.1
    info = empty_pool.info("clone0")
    assert info.size == 1 << 40
    assert info.allocated < 64 << 10
    with empty_pool.open_clone("clone0") as clone:
        assert clone.pread(6, 0) == b"begin\0"
        assert clone.pread(4, (1 << 40) - 4) == b"\0end"


# Formats to come, and records that are none


def edit_record(pool: Pool, **changes: object) -> None:
    path = pool.path / "bases" / "base" / "base.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_base_of_a_newer_format_is_refused_as_that_by_each_who_opens_it(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    edit_record(pool, format=2)
    for name in ("base", "web1"):
        with pytest.raises(
            UnsupportedFormat, match=r"base\.json: made by a newer nbdclone \(format 2, this one knows 1"
        ):
            pool.open_clone(name)
    with pytest.raises(UnsupportedFormat):
        pool.create_clones("base", ["web2"])


def test_a_clone_whose_base_has_a_damaged_record_is_refused_with_clone_and_base(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    (pool.path / "bases" / "base" / "base.json").write_text('{"format": 1}')
    with pytest.raises(StorageError, match=r"clone 'web1'.*base 'base'.*base\.json: damaged"):
        pool.open_clone("web1")


def test_a_record_with_another_size_than_its_image_is_noticed(pool: Pool) -> None:
    edit_record(pool, size=4096)
    with pytest.raises(BaseChanged, match="base 'base'"):
        pool.open_clone("base")


record_fields = st.dictionaries(
    st.sampled_from(["format", "id", "size", "fingerprint", "created", "source", "identity"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
        max_leaves=4,
    ),
)


@given(
    raw=st.binary(max_size=200) | record_fields.map(lambda fields: json.dumps(fields).encode()), fields=record_fields
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_record_that_is_garbage_is_refused_in_words(pool: Pool, raw: bytes, fields: dict[str, object]) -> None:
    path = pool.path / "bases" / "base" / "base.json"
    good = (
        json.loads((pool.path / "good").read_text()) if (pool.path / "good").exists() else json.loads(path.read_text())
    )
    (pool.path / "good").write_text(json.dumps(good))
    for content in (raw, json.dumps(good | fields).encode()):
        path.write_bytes(content)
        refusal(lambda: BaseRecord.load(path))


def test_a_record_nested_without_end_is_refused_in_words(pool: Pool) -> None:
    path = pool.path / "bases" / "base" / "base.json"
    path.write_bytes(b"[" * 60_000)
    with pytest.raises(StorageError, match="damaged"):
        BaseRecord.load(path)


def test_a_damaged_delta_is_refused_with_its_path(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    os.truncate(pool.path / "clones" / "web1" / "delta", 0)
    with pytest.raises(CorruptDelta, match=r"clones/web1/delta: "):
        pool.open_clone("web1")


# Leftovers


def test_leftovers_of_the_dead_are_cleared_by_the_next_and_those_of_the_living_are_not(pool: Pool) -> None:
    leftover = pool.path / ".tmp" / "0123456789abcdef"
    leftover.mkdir()
    (leftover / "image").write_bytes(b"x" * 100)
    (leftover / "image").chmod(0o444)
    with pool.places.staging() as mine:
        assert not leftover.exists()
        pool.create_clones("base", ["web1"])
        assert mine.exists()
    assert os.listdir(pool.path / ".tmp") == []


def test_what_is_being_removed_is_left_to_the_one_who_does(pool: Pool) -> None:
    pool.create_clones("base", ["web1", "web2"])
    remove_tree = FileSystem.remove_tree
    seen: list[list[str]] = []

    class Watched(FileSystem):
        def remove_tree(self, path: Path, ignore_errors: bool = False) -> None:  # type: ignore[override]
            pool.create_clones("base", ["meanwhile"])
            seen.append(sorted(os.listdir(path)))
            pool.remove(["meanwhile"])
            remove_tree(path, ignore_errors=ignore_errors)

    Pool.open(pool.path, fs=Watched()).remove(["web1", "web2"])
    assert seen == [["delta"], ["delta"]]
    assert os.listdir(pool.path / ".tmp") == []


def test_a_removal_makes_no_file_and_no_directory(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    full = OSError(errno.ENOSPC, "no space left")

    class Full(FileSystem):
        def mkdir(self, path: Path) -> None:  # type: ignore[override]
            raise full

        def open(self, path: str | Path, flags: int, mode: int = 0o777) -> int:  # type: ignore[override]
            if flags & os.O_CREAT:
                raise full
            return os.open(path, flags, mode)

        def pwrite(self, fd: int, data: bytes, offset: int) -> int:  # type: ignore[override]
            raise full

    Pool.open(pool.path, fs=Full()).remove(["web1", "base"])
    assert pool.names() == []
    assert os.listdir(pool.path / ".tmp") == []


def test_a_pool_without_its_directory_for_drafts_goes_on(pool: Pool) -> None:
    (pool.path / ".tmp").rmdir()
    pool.create_clones("base", ["web1"])
    assert pool.names() == ["base", "web1"]


def test_two_who_renew_the_same_record_at_once_do_not_disturb_each_other(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a pool was copied each clone that is opened finds the base's new identity, and records it."""
    image = pool.path / "bases" / "base" / "image"
    copied = image.with_name("copied")
    shutil.copy(image, copied)
    copied.rename(image)

    class Overtaken(FileSystem):
        """Another opens the same base while this one is about to put its record in place."""

        nested = False

        def rename(self, source: Path, target: Path) -> None:  # type: ignore[override]
            if not self.nested:
                self.nested = True
                Image.open("base", image.parent).close()
            os.rename(source, target)

    Image.open("base", image.parent, Overtaken()).close()
    assert sorted(os.listdir(image.parent)) == ["base.json", "image", "manifest"]
    record = BaseRecord.load(image.parent / "base.json")
    assert record.identity.inode == image.stat().st_ino


@pytest.mark.parametrize("damage", ["a newer format", "no header left"])
def test_no_base_is_removed_while_a_clone_may_need_it_that_cannot_be_read(pool: Pool, damage: str) -> None:
    pool.create_clones("base", ["unreadable"])
    with open(pool.path / "clones" / "unreadable" / "delta", "r+b") as delta:
        for slot in HEADER_SLOTS:
            page = bytearray(os.pread(delta.fileno(), PAGE_SIZE, slot))
            page[8:12] = (2).to_bytes(4)
            if damage == "a newer format":
                page[-4:] = zlib.crc32(page[:-4]).to_bytes(4)
            os.pwrite(delta.fileno(), page, slot)
    with pytest.raises(InUse, match="clone 'unreadable' needs"):
        pool.remove(["base"])
    assert "base" in pool.names()
    pool.remove(["base", "unreadable"])
    assert pool.names() == []


# How much is looked at


class Counting(FileSystem):
    """Says which files were opened."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def open_file(self, path: str | Path, flags: int) -> int:
        self.opened.append(str(path))
        return super().open_file(path, flags)


def test_about_one_clone_no_other_is_read(pool: Pool) -> None:
    pool.create_clones("base", [f"more{number}" for number in range(20)])
    fs = Counting()
    watched = Pool.open(pool.path, fs=fs)
    [entry] = [entry for entry in pool.entries() if entry.name == "more7"]
    assert watched.info("more7") == entry
    assert watched.set_quota("more7", 1 << 20).quota == 1 << 20
    assert set(fs.opened) == {str(pool.path / "clones" / "more7" / "delta")}


def test_about_one_clone_it_is_said_that_its_base_is_missing(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    shutil.rmtree(pool.path / "bases" / "base")
    info = pool.info("web1")
    assert [info] == [entry for entry in pool.entries() if entry.name == "web1"]
    assert info.error is not None
    assert "its base 'base'" in info.error


def test_clones_that_are_made_together_are_made_in_threads_and_an_error_is_the_first(pool: Pool) -> None:
    threads: set[int] = set()

    class Watched(FileSystem):
        def sync(self, fd: int) -> None:  # type: ignore[override]
            threads.add(threading.get_ident())
            time.sleep(0.002)
            os.fsync(fd)

    names = [f"new{number}" for number in range(30)]
    made = Pool.open(pool.path, fs=Watched()).create_clones("base", names)
    assert [info.name for info in made] == names
    assert len(threads) > 1
    assert threading.get_ident() not in threads

    class Broken(FileSystem):
        def sync(self, fd: int) -> None:  # type: ignore[override]
            raise OSError(errno.EIO, "broken")

    before = pool.names()
    with pytest.raises(OSError, match="broken"):
        Pool.open(pool.path, fs=Broken()).create_clones("base", [f"other{number}" for number in range(30)])
    assert pool.names() == before
    assert os.listdir(pool.path / ".tmp") == []


def test_clones_of_a_base_share_its_record(pool: Pool) -> None:
    pool.create_clones("base", ["web1", "web2"])
    with pool.open_clone("web1") as one, pool.open_clone("web2") as other:
        assert one.layers[0].record is other.layers[0].record  # type: ignore[union-attr]
