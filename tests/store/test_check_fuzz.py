"""Garbage for deltas and bases: refused in words when it is opened, named when it is checked; no traceback, no hang.

``HYPOTHESIS_PROFILE=long`` looks at more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import zlib
from pathlib import Path

import pytest
from checked import base_of, delta_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbdclone.errors import NBDCloneError
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.delta_file import HEADER_SLOTS, MAP_SLOTS, PAGE_SIZE, read_header
from nbdclone.store.fs import FileSystem
from nbdclone.store.live import HEAD, MAGIC
from nbdclone.store.pool import Pool


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Torn pages are reported, and here there are thousands."""
    caplog.set_level(logging.ERROR, "nbdclone")


# Garbage


@pytest.fixture(scope="module", name="sound")
def make_sound(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """A pool with a delta of 2 MiB, of which copies are made and spoilt."""
    root = tmp_path_factory.mktemp("sound")
    (root / "base.img").write_bytes(os.urandom(64 << 10))
    pool = Pool.open(root / "pool", create=True)
    pool.import_base(root / "base.img", "base")
    pool.create_clones("base", ["web1", "web2"])
    for name in ("web1", "web2"):
        with pool.open_clone(name) as clone:
            clone.pwrite(name.encode() * 3000, 700)
    return pool


# Each looks at a pool of its own, three times.
EXAMPLES = settings.default.max_examples // 2
INTERESTING = [0, 8, 16, 32, 40, 56, 72, 104, 112, 120, 122, 4092, *MAP_SLOTS, *HEADER_SLOTS, 1 << 20, (1 << 20) + 4096]
PLACES = st.one_of(st.sampled_from(INTERESTING), st.integers(0, 1 << 21))
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("bytes"), PLACES, st.binary(min_size=1, max_size=200)),
        st.tuples(st.just("truncate"), PLACES, st.just(b"")),
        st.tuples(st.just("grow"), st.integers(1 << 21, 1 << 42), st.just(b"")),
        st.tuples(st.just("splice"), PLACES, st.sampled_from([b"delta", b"image", b"base.json", b"other"])),
        st.tuples(st.just("reseal"), st.sampled_from(HEADER_SLOTS), st.just(b"")),
        st.tuples(st.just("reseal map"), st.sampled_from(MAP_SLOTS), st.just(b"")),
    ),
    min_size=1,
    max_size=6,
)


def spoil(path: Path, changes: list[tuple[str, int, bytes]], pool: Pool) -> None:
    others = {
        b"delta": path,
        b"image": base_of(pool, "base") / "image",
        b"base.json": base_of(pool, "base") / "base.json",
        b"other": delta_of(pool, "web2"),
    }
    for what, place, data in changes:
        with open(path, "r+b") as file:
            fd = file.fileno()
            if what == "bytes":
                os.pwrite(fd, data, place)
            elif what in ("truncate", "grow"):
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, place)
            elif what == "splice":
                with open(others[data], "rb") as other:
                    os.pwrite(fd, os.pread(other.fileno(), PAGE_SIZE, 0), place)
            elif what == "reseal":
                page = os.pread(fd, PAGE_SIZE, place).ljust(PAGE_SIZE, b"\0")
                os.pwrite(fd, zlib.crc32(page[:-4]).to_bytes(4, "big"), place + PAGE_SIZE - 4)
            else:
                page = os.pread(fd, PAGE_SIZE, place).ljust(PAGE_SIZE, b"\0")
                os.pwrite(fd, zlib.crc32(page[8:]).to_bytes(4, "big"), place + 4)


def look_at(pool: Pool) -> None:
    """Nothing but errors of ours; and what a check and a repair say fits what an open says."""
    for repair_too in (False, True):
        found = list(check_pool(pool.path, repair=repair_too, deep=True))
        assert all(str(finding).isprintable() for finding in found)
    again = list(check_pool(pool.path, repair=True))
    assert not any(finding.repaired for finding in again), "a second repair had something to do"
    pool.entries()
    opened = True
    try:
        with pool.open_clone("web1") as clone:
            clone.pread(min(clone.size, 64 << 10), 0)
    except NBDCloneError:
        opened = False
    if opened is False:
        assert not is_clean(again), "a check found nothing in what is refused"


@given(changes=CHANGES)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_spoilt_delta_is_opened_or_refused_in_words_and_checked(
    sound: Pool, changes: list[tuple[str, int, bytes]]
) -> None:
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-") as directory:
        pool = copy_of(sound, Path(directory))
        spoil(delta_of(pool), changes, pool)
        look_at(pool)


@given(changes=CHANGES, which=st.sampled_from(["base.json", "manifest", "image"]))
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_spoilt_base_is_opened_or_refused_in_words_and_checked(
    sound: Pool, changes: list[tuple[str, int, bytes]], which: str
) -> None:
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-") as directory:
        pool = copy_of(sound, Path(directory))
        path = base_of(pool, "base") / which
        path.chmod(0o644)
        if which != "image":  # of a few bytes: where something is
            changes = [
                (what, place % 700 if what in ("bytes", "splice") else place, data) for what, place, data in changes
            ]
        spoil(path, [change for change in changes if which != "image" or change[0] != "grow"], pool)
        look_at(pool)


@pytest.fixture(scope="module", name="layered")
def make_layered(sound: Pool, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """The same with a snapshot of web2, of which web1 is a clone now."""
    pool = copy_of(sound, tmp_path_factory.mktemp("layered"))
    pool.snapshot("web2@golden")
    pool.remove(["web1"])
    pool.create_clones("web2@golden", ["web1"])
    list(check_pool(pool.path, deep=True))
    return pool


@given(changes=CHANGES, which=st.sampled_from(["delta", "record", "manifest", "layer.json"]))
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_spoilt_layer_or_record_is_opened_or_refused_in_words_and_checked(
    layered: Pool, changes: list[tuple[str, int, bytes]], which: str
) -> None:
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-") as directory:
        pool = copy_of(layered, Path(directory))
        path = pool.places.layer(pool.places.snapshot("web2@golden").layer)
        if which == "record":
            path = pool.path / "clones" / "web2" / "snapshots" / "golden"
        elif which != "delta":
            path = path.with_name(which)
            path.chmod(0o644)
        if which != "delta":  # of a few bytes: where something is
            changes = [
                (what, place % 200 if what in ("bytes", "splice") else place, data)
                for what, place, data in changes
                if what != "grow"
            ]
        spoil(path, changes, pool)
        look_at(pool)


@given(garbage=st.binary(max_size=9000), pad=st.sampled_from([0, 1 << 21, 1 << 43]))
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_for_a_delta_is_refused_in_words_and_checked(sound: Pool, garbage: bytes, pad: int) -> None:
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-") as directory:
        pool = copy_of(sound, Path(directory))
        delta_of(pool).write_bytes(garbage)
        with contextlib.suppress(OSError):
            os.truncate(delta_of(pool), max(pad, len(garbage)))
        look_at(pool)
        assert not is_clean(list(check_pool(pool.path)))


MARKS = st.tuples(st.one_of(st.integers(4096, 8191), st.integers(0, 1 << 24)), st.binary(min_size=1, max_size=200))


@given(
    garbage=st.binary(max_size=200),
    marks=st.lists(MARKS, max_size=4),
    believed=st.booleans(),
    failed=st.booleans(),
    grown=st.integers(0, 1 << 24),
)
@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_for_what_a_killed_process_leaves_is_taken_as_marks_or_not_at_all(
    sound: Pool, garbage: bytes, marks: list[tuple[int, bytes]], believed: bool, failed: bool, grown: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-") as directory:
        pool = copy_of(sound, Path(directory))
        fs, delta = FileSystem(), delta_of(pool)
        live = delta.with_name("live")
        live.write_bytes(garbage)
        with open(live, "r+b") as target:
            for place, data in marks:
                os.pwrite(target.fileno(), data, place)
        if believed:  # as if this machine had written it just now, over the same inode
            with open(delta, "rb") as file, open(live, "r+b") as target:
                delta_id = read_header(file.fileno(), str(delta)).id
                fs.keep_in_memory(file.fileno())
                inode = os.fstat(target.fileno()).st_ino
                os.pwrite(target.fileno(), HEAD.pack(MAGIC, delta_id, failed, fs.boot_id(), inode), 0)
                os.ftruncate(target.fileno(), max(live.stat().st_size, grown))
        pool.open_clone("web1").close()  # it tells nothing that could refuse a clone
        look_at(pool)
        assert is_clean(list(check_pool(pool.path)))


def copy_of(pool: Pool, directory: Path) -> Pool:
    shutil.copytree(pool.path, directory / "pool")
    return Pool.open(directory / "pool")
