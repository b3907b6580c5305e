"""Damage to a base, and to what the pool is made of: found, named, and repaired from what is left where that agrees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checked import (
    SIZE,
    base_of,
    check,
    content,
    delta_of,
    edit_record,
    make_pool,
    patch,
    repair_and_require,
    told,
    wrong,
)

from nbdclone.errors import BaseChanged, NBDCloneError, NotFound
from nbdclone.store import image as image_module
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.check_base import BaseExamination
from nbdclone.store.check_looks import LOOKS
from nbdclone.store.delta_file import MAP_SLOTS
from nbdclone.store.finding import Finding
from nbdclone.store.fs import FileSystem
from nbdclone.store.image import CHUNK_SIZE, BaseRecord, Identity, take_samples
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool

LAST_CHUNK = SIZE // CHUNK_SIZE * CHUNK_SIZE


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    pool = make_pool(tmp_path)
    (base_of(pool) / "image").chmod(0o644)
    pool.open_clone("debian").close()  # chmod changed the ctime
    return pool


def record_of(pool: Pool) -> BaseRecord:
    return BaseRecord.load(base_of(pool) / "base.json")


def hide_the_change(pool: Pool) -> None:
    """As if the image had changed beneath the file system, and not where a sample is."""
    image = base_of(pool) / "image"

    def forget(fields: dict[str, Any]) -> None:
        fields["identity"] = {
            name: getattr(Identity.of(image.stat()), name) for name in ("size", "inode", "mtime_ns", "ctime_ns")
        }
        fields.pop("samples", None)

    edit_record(pool, forget)


# The record


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.unlink(),
        lambda record: record.write_text("{"),
        lambda record: record.write_bytes(b""),
        lambda record: record.write_bytes(os.urandom(5000)),
        lambda record: os.truncate(record, 1 << 40),
        lambda record: record.write_text("null"),
    ],
)
def test_a_lost_record_is_made_anew_from_image_and_clones(pool: Pool, damage: Callable[[Path], object]) -> None:
    expected, before, record = content(pool), record_of(pool), base_of(pool) / "base.json"
    damage(record)
    kind = "record-damaged" if record.exists() else "record-missing"
    found = check(pool)
    assert told(found) == [("debian", kind), ("web1", "orphan"), ("web2", "orphan")]
    assert "see to the base" in found[1].todo
    [finding] = repair_and_require(pool, [("debian", kind)])
    after = record_of(pool)
    assert (after.id, after.fingerprint, after.size, after.identity, after.samples) == (
        before.id,
        before.fingerprint,
        before.size,
        before.identity,
        before.samples,
    )
    assert content(pool) == expected
    assert (finding.kept is not None) == (kind == "record-damaged")


def test_a_lost_record_and_a_lost_manifest_are_both_made_anew(pool: Pool) -> None:
    expected, manifest = content(pool), (base_of(pool) / "manifest").read_bytes()
    for name in ("base.json", "manifest"):
        (base_of(pool) / name).unlink()
    repair_and_require(pool, [("debian", "manifest-missing"), ("debian", "record-missing")])
    assert content(pool) == expected
    assert (base_of(pool) / "manifest").read_bytes() == manifest


def test_a_lost_record_is_not_made_for_an_image_that_changed(pool: Pool) -> None:
    (base_of(pool) / "base.json").unlink()
    patch(base_of(pool) / "image", 5000, b"!")
    found = repair_and_require(pool, [], clean=False)
    assert wrong(found) == [("debian", "record-missing"), ("web1", "orphan"), ("web2", "orphan")]
    assert "no clone has the fingerprint of its image" in found[0].todo
    assert not (base_of(pool) / "base.json").exists()


def test_a_lost_record_is_not_made_where_clones_disagree(pool: Pool, tmp_path: Path) -> None:
    pool.import_base(tmp_path / "debian.img", "twin")
    pool.create_clones("twin", ["web3"])
    shutil.rmtree(base_of(pool, "twin"))
    base_of(pool).rename(base_of(pool, "renamed"))
    (base_of(pool, "renamed") / "base.json").unlink()
    found = repair_and_require(pool, [], clean=False)
    assert "its clones disagree on its id" in found[0].todo
    base_of(pool, "renamed").rename(base_of(pool, "twin"))  # of two ids, the one that knows it by this name
    assert told(check(pool, repair=True))[:1] == [("twin", "record-missing")]
    content(pool, "web3")


@pytest.mark.parametrize("without_clones", [False, True])
def test_a_record_with_another_fingerprint_is_corrected_if_all_others_agree(pool: Pool, without_clones: bool) -> None:
    before = record_of(pool)
    if without_clones:
        pool.remove(["web1", "web2"])
    edit_record(pool, lambda fields: fields.update(fingerprint="ab" * 32))
    differs = [] if without_clones else [("web1", "base-differs"), ("web2", "base-differs")]
    assert told(check(pool)) == [("debian", "manifest-differs"), *differs]
    repair_and_require(pool, [("debian", "manifest-differs")])
    assert record_of(pool) == before


def test_an_id_that_another_base_has_is_not_given_to_a_lost_record(pool: Pool, tmp_path: Path) -> None:
    pool.import_base(tmp_path / "debian.img", "twin")
    pool.create_clones("twin", ["web3"])
    base_of(pool).rename(base_of(pool, "renamed"))
    (base_of(pool, "renamed") / "base.json").unlink()
    assert told(check(pool, repair=True))[0] == ("renamed", "record-missing")
    assert content(pool) == content(pool)
    twin, renamed = (BaseRecord.load(base_of(pool, name) / "base.json") for name in ("twin", "renamed"))
    assert twin.id != renamed.id


def test_image_and_manifest_of_another_base_do_not_overrule_record_and_clones(pool: Pool, tmp_path: Path) -> None:
    patch(tmp_path / "debian.img", 5000, b"!")
    pool.import_base(tmp_path / "debian.img", "other")
    for file in ("image", "manifest"):
        (base_of(pool, "other") / file).rename(base_of(pool) / file)
    before = (base_of(pool) / "base.json").read_bytes()
    found = check(pool, "debian", repair=True)
    assert [kind for _, kind in wrong(found)] == ["manifest-differs", "content-changed", "hurt", "hurt"]
    assert (base_of(pool) / "base.json").read_bytes() == before


def test_a_record_with_another_size_is_corrected_if_all_others_agree(pool: Pool) -> None:
    before = record_of(pool)
    edit_record(pool, lambda fields: fields.update(size=SIZE + 512))
    assert told(check(pool)) == [("debian", "record-damaged")]
    repair_and_require(pool, [("debian", "record-damaged")])
    assert record_of(pool) == before


def test_a_record_with_another_id_orphans_its_clones_and_they_are_linked(pool: Pool) -> None:
    expected = content(pool)
    edit_record(pool, lambda fields: fields.update(id="cd" * 16))
    repair_and_require(pool, [("web1", "orphan"), ("web2", "orphan")])
    assert content(pool) == expected


def test_a_newer_record_is_left_alone(pool: Pool) -> None:
    edit_record(pool, lambda fields: fields.update(format=2))
    before = (base_of(pool) / "base.json").read_bytes()
    found = repair_and_require(pool, [], clean=False)
    assert wrong(found)[0] == ("debian", "newer-format")
    assert (base_of(pool) / "base.json").read_bytes() == before


@pytest.mark.parametrize("name", ["base.json", "manifest"])
def test_what_is_no_file_is_not_replaced(pool: Pool, name: str) -> None:
    (base_of(pool) / name).unlink()
    os.mkfifo(base_of(pool) / name)
    found = repair_and_require(pool, [], clean=False)
    assert wrong(found)[0][0] == "debian"
    assert "move it away" in found[0].todo
    assert (base_of(pool) / name).is_fifo()


# The manifest


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("manifest-missing", lambda manifest: manifest.unlink()),
        ("manifest-damaged", lambda manifest: os.truncate(manifest, 5)),
        ("manifest-damaged", lambda manifest: os.truncate(manifest, 1 << 40)),
        ("manifest-differs", lambda manifest: patch(manifest, 40, b"rot")),
    ],
)
def test_a_manifest_is_made_anew_while_the_image_has_its_fingerprint(
    pool: Pool, kind: str, damage: Callable[[Path], object]
) -> None:
    manifest = base_of(pool) / "manifest"
    manifest.chmod(0o644)
    before = manifest.read_bytes()
    damage(manifest)
    status = manifest.stat() if manifest.exists() else None
    assert told(check(pool)) == [("debian", kind)]
    [finding] = repair_and_require(pool, [("debian", kind)])
    assert manifest.read_bytes() == before
    kept = Path(finding.kept).stat() if finding.kept else None
    assert (kept and (kept.st_ino, kept.st_size)) == (status and (status.st_ino, status.st_size))


def test_a_manifest_is_not_made_for_an_image_that_changed(pool: Pool) -> None:
    (base_of(pool) / "manifest").unlink()
    patch(base_of(pool) / "image", 5000, b"!")
    found = repair_and_require(pool, [], clean=False)
    assert [kind for name, kind in wrong(found) if name == "debian"] == ["manifest-missing", "content-changed"]
    assert found[1].ranges == ((0, SIZE),)


# The image


def test_deep_names_the_bytes_that_changed_and_what_each_clone_reads_of_them(pool: Pool) -> None:
    pool.create_clones("debian", ["web3"], size=2 * SEGMENT_SIZE)
    with pool.open_clone("web1") as clone:
        clone.pwrite(b"x" * (SIZE - LAST_CHUNK), LAST_CHUNK)
    with pool.open_clone("web2") as clone:
        clone.zero(LAST_CHUNK, BLOCK_SIZE)
    own = 2 * BLOCK_SIZE  # that web2 has on both sides of the border of the segments
    patch(base_of(pool) / "image", SIZE - 1, b"!")
    hide_the_change(pool)
    assert check(pool) == [], "only --deep can see it"
    found = check(pool, deep=True)
    assert told(found) == [
        ("debian", "content-changed"),
        ("web1", "not-hurt"),
        ("web2", "hurt"),
        ("web3", "hurt"),
    ]
    total = SIZE - LAST_CHUNK
    assert found[0].ranges == ((LAST_CHUNK, total),)
    assert f"bytes {LAST_CHUNK}-{SIZE - 1} of the disk" in str(found[0])
    assert f"it reads {total - BLOCK_SIZE - own} of the {total} bytes" in found[2].what
    assert f"it reads {total} of the {total} bytes" in found[3].what
    assert "debian.img" in found[0].todo
    patch(base_of(pool) / "image", SIZE - 1, b"e")
    assert told(check(pool, deep=True)) == [("debian", "identity")]
    repair_and_require(pool, [("debian", "identity")])


def test_one_changed_bit_is_found_wherever_it_is(pool: Pool) -> None:
    image = base_of(pool) / "image"
    for offset in (0, CHUNK_SIZE - 1, CHUNK_SIZE, 5 * CHUNK_SIZE + 12345, SEGMENT_SIZE - 3, SIZE - 1):
        before = patch(image, offset, b"\x01")
        chunk = offset // CHUNK_SIZE * CHUNK_SIZE
        [finding] = [finding for finding in check(pool, "debian", deep=True) if finding.name == "debian"]
        assert finding.ranges == ((chunk, min(CHUNK_SIZE, SIZE - chunk)),)
        patch(image, offset, before)


def test_a_part_of_the_image_that_the_disk_cannot_read_is_named_as_one_that_differs(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BadSector(FileSystem):
        def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:  # type: ignore[override]
            if offset == 0 and len(buffers[0]) == CHUNK_SIZE:
                raise OSError(5, "Input/output error")
            return os.preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(image_module, "FILE_SYSTEM", BadSector())
    found = check(pool, deep=True)
    assert told(found) == [("debian", "content-changed"), ("web1", "hurt"), ("web2", "hurt")]
    assert found[0].ranges == ((0, CHUNK_SIZE),)


def test_an_image_that_was_touched_is_a_note_and_is_hashed_by_a_repair(pool: Pool) -> None:
    os.utime(base_of(pool) / "image")
    found = check(pool)
    assert told(found) == [("debian", "identity")]
    assert is_clean(found)
    repair_and_require(pool, [("debian", "identity")])


def test_a_sampled_block_that_differs_is_said_without_reading_the_rest(pool: Pool) -> None:
    patch(base_of(pool) / "image", 0, b"!")
    record = record_of(pool)
    identity = Identity.of((base_of(pool) / "image").stat())
    edit_record(pool, lambda fields: fields.update(identity={n: getattr(identity, n) for n in Identity.__slots__}))
    assert told(check(pool)) == [("debian", "samples")]
    assert record_of(pool).samples == record.samples


def test_samples_that_are_wrong_by_themselves_are_taken_again(pool: Pool) -> None:
    edit_record(pool, lambda fields: fields["samples"].update(hash="00" * 32))
    repair_and_require(pool, [("debian", "samples")])
    with open(base_of(pool) / "image", "rb") as image:
        assert record_of(pool).samples == take_samples(image.fileno(), SIZE)


@pytest.mark.parametrize(("size", "kind"), [(SIZE - 512, "truncated"), (4096, "truncated"), (SIZE + 512, "grown")])
def test_another_length_is_said_with_the_bytes_that_are_gone(pool: Pool, size: int, kind: str) -> None:
    os.truncate(base_of(pool) / "image", size)
    found = repair_and_require(pool, [], clean=False)
    assert (found[0].name, found[0].kind) == ("debian", "image-size")
    assert kind in found[0].what
    assert found[0].ranges == (((size, SIZE - size),) if size < SIZE else ())


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path), lambda path: None])
def test_an_image_that_is_no_file_is_named_and_not_waited_for(pool: Pool, make: Callable[[Path], None]) -> None:
    (base_of(pool) / "image").unlink()
    make(base_of(pool) / "image")
    found = repair_and_require(pool, [], clean=False)
    assert found[0].name == "debian"
    assert found[0].kind in ("image-missing", "unreadable")
    with pytest.raises(NBDCloneError):
        pool.open_clone("web1")


def test_deep_takes_no_memory_for_the_size_of_the_image(tmp_path: Path) -> None:
    """A sparse image of 64 GiB has 16,384 chunks; that each is looked at is seen by the calls of progress."""
    with open(tmp_path / "large.img", "wb") as file:
        file.truncate(64 << 30)
        for offset in range(0, 64 << 30, 1 << 30):
            os.pwrite(file.fileno(), b"data", offset)
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "large.img")
    calls: list[tuple[int, int]] = []
    tracemalloc.start()
    try:
        assert list(check_pool(pool.path, deep=True, progress=lambda done, total: calls.append((done, total)))) == []
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(calls) == 64
    assert peak < 3 * CHUNK_SIZE


# The pool


def test_leftovers_of_the_dead_are_cleared_and_those_of_the_living_stay(pool: Pool) -> None:
    left = pool.path / ".tmp" / "left"
    with pool.places.staging() as alive:
        (left / "base").mkdir(parents=True)
        (left / "base" / "image").write_bytes(b"half")
        found = check(pool)
        assert told(found) == [("", "leftover")]
        assert str(left) in str(found[0])
        assert is_clean(found)
        repair_and_require(pool, [("", "leftover")])
        assert os.listdir(pool.path / ".tmp") == [alive.name]


def test_drafts_are_cleared_while_nobody_has_it_open(pool: Pool) -> None:
    drafts = [base_of(pool) / "base.json.0123.new", delta_of(pool).with_name("delta.before-repair-1.0123.new")]
    for draft in drafts:
        draft.write_text("half")
    kinds = [("debian", "leftover"), ("web1", "leftover")]
    assert told(check(pool)) == kinds
    with pool.open_clone("web1"):
        assert [f.repaired for f in check(pool, repair=True) if f.kind == "leftover"] == [False, False]
    assert all(draft.exists() for draft in drafts)
    repair_and_require(pool, kinds)
    assert not any(draft.exists() for draft in drafts)


def test_foreign_files_are_named_and_not_touched(pool: Pool) -> None:
    foreign = [
        pool.path / "notes",
        pool.path / "bases" / "a b",
        base_of(pool) / "image.bak",
        delta_of(pool).parent / "x",
    ]
    for path in foreign:
        path.write_text("mine")
    (pool.path / "clones" / "file").write_text("mine")
    (pool.path / "bases" / "file2").write_text("mine")
    (pool.path / os.fsdecode(b"\xff\n\x1b[31m")).write_text("mine")
    found = repair_and_require(pool, [])
    assert {finding.kind for finding in found} == {"foreign"}
    assert len(found) == 7
    assert all(path.read_text() == "mine" for path in foreign)
    assert all(str(finding).isprintable() for finding in found)
    assert "file" in {entry.name for entry in pool.entries()}


def test_a_base_that_is_renamed_meanwhile_is_not_taken_for_a_broken_one(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    examine = BaseExamination.run

    def rename_first(self: BaseExamination) -> Iterator[Finding]:
        os.rename(base_of(pool), base_of(pool).with_name("other"))
        yield from examine(self)

    monkeypatch.setattr(BaseExamination, "run", rename_first)
    assert wrong(check(pool)) == []
    monkeypatch.undo()
    assert check(pool) == []


def test_a_name_of_both_kinds_and_an_id_of_two_bases_are_said(pool: Pool) -> None:
    shutil.copytree(base_of(pool), base_of(pool, "web1"))
    found = check(pool)
    assert ("web1", "name-twice") in wrong(found)
    assert ("web1", "id-twice") in told(found)


def test_names_choose_what_is_checked_and_a_clones_base_goes_with_it(pool: Pool, tmp_path: Path) -> None:
    pool.import_base(tmp_path / "debian.img", "other")
    for path in (base_of(pool, "other") / "image", base_of(pool) / "image"):
        os.utime(path)
    patch(delta_of(pool), 40, b"rot")
    patch(delta_of(pool, "web2"), 40, b"rot")
    (pool.path / "foreign").mkdir()
    assert told(check(pool, "web1")) == [("debian", "identity"), ("web1", "header-slot")]
    assert told(check(pool, "other")) == [("other", "identity")]
    with pytest.raises(NotFound, match="there is no base, clone or snapshot 'web9'"):
        check_pool(pool.path, ["web1", "web9"])


def test_a_clone_that_is_open_is_checked_and_not_repaired(pool: Pool) -> None:
    with pool.open_clone("web1") as clone:
        assert told(check(pool, repair=True)) == [("web1", "in-use")]
        clone.pwrite(b"x" * BLOCK_SIZE, 5 * BLOCK_SIZE)
        clone.flush()
        assert told(check(pool, repair=True)) == [("web1", "in-use")], "that its page stands once is no fault now"
        patch(delta_of(pool), 524288 + 40, b"rot")
        before = delta_of(pool).read_bytes()
        found = check(pool, repair=True)
        assert told(found) == [("web1", "in-use"), ("web1", "header-slot")]
        assert f"this process ({os.getpid()})" in str(found[0])
        assert delta_of(pool).read_bytes() == before
    repair_and_require(pool, [("web1", "header-slot")])


def test_a_check_of_a_sound_pool_takes_no_lock(pool: Pool) -> None:
    class Locked(FileSystem):
        def lock(self, fd: int, path: str | Path, what: str, *, shared: bool = False) -> None:
            raise AssertionError(f"{what} was locked")

    assert list(check_pool(pool.path, fs=Locked())) == []


def test_a_page_in_flight_of_a_clone_that_is_open_is_looked_at_again(pool: Pool) -> None:
    class Torn(FileSystem):
        """What is read of one map page is torn, for some looks."""

        left = LOOKS - 1

        def preadv(self, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:  # type: ignore[override]
            count = os.preadv(fd, buffers, offset, flags)
            if offset == MAP_SLOTS[0] and self.left:
                self.left -= 1
                buffers[0][100:104] = b"torn"
            return count

    with pool.open_clone("web1"):
        assert told(list(check_pool(pool.path, ["web1"], fs=Torn()))) == [("web1", "in-use")]


def test_a_clone_that_is_written_meanwhile_has_no_findings(pool: Pool) -> None:
    """Another process writes and flushes as fast as it can."""
    program = f"""
import sys
from nbdclone import Pool
with Pool.open({str(pool.path)!r}).open_clone("web1") as clone:
    print("open", flush=True)
    number = 0
    while True:
        clone.pwrite(bytes([1 + number % 255]) * 4096, number % 30000 * 4096)
        clone.flush()
        number += 1
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "open\n"
        for _ in range(200):
            assert told(check(pool, "web1", repair=True)) == [("web1", "in-use")]
    finally:
        process.kill()
        process.communicate()
    assert is_clean(check(pool))


def test_a_lost_record_is_made_anew_while_clones_are_open(pool: Pool) -> None:
    with pool.open_clone("web1"):
        (base_of(pool) / "base.json").unlink()
        found = check(pool, repair=True)
        assert ("debian", "record-missing") in [(f.name, f.kind) for f in found if f.repaired]
    content(pool)


def test_files_that_may_not_be_read_are_named() -> None:
    """As another user, for root may read everything."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    program = """
import encodings.ascii, json, os, sys  # what this user may not read is imported before
from pathlib import Path
from nbdclone.store import image as image_module
from nbdclone.store.check import check_pool
from nbdclone.store.pool import Pool
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(json.dumps([(f.name, f.kind, str(f)) for f in check_pool(Path(sys.argv[1]), repair=True)]))
Pool.open(sys.argv[1]).entries()
"""
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-") as directory:
        Path(directory).chmod(0o755)
        pool = make_pool(Path(directory))
        pool.import_base(Path(directory) / "debian.img", "other")
        for path in (delta_of(pool), base_of(pool) / "image", base_of(pool, "other") / "base.json"):
            path.chmod(0o600)
        patch(delta_of(pool, "web2"), 40, b"rot")
        command = [sys.executable, "-c", program, str(pool.path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kinds = [(name, kind) for name, kind, _ in found]
    assert {("debian", "unreadable"), ("other", "unreadable"), ("web1", "unreadable")} <= set(kinds)
    assert ("web2", "header-slot") in kinds, "what may be read and not written is told and not repaired"
    assert all("Permission denied" in line for _, kind, line in found if kind == "unreadable")


def test_the_pool_of_a_damaged_base_refuses_in_words(pool: Pool) -> None:
    for damage in ("base.json", "image"):
        (base_of(pool) / damage).unlink()
        with pytest.raises((BaseChanged, NBDCloneError)):
            pool.open_clone("web1")
