"""The bases that promote makes: what they read, that they stand on nothing, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import InvalidName, NameTaken, NotFound, UsageError
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.pool import Pool


def promote(pool: Pool, name: str, new: str, progress: Callable[[int, int], None] | None = None) -> None:
    drive(find_verb("promote").begin(LocalTarget(pool), {"name": name, "new": new}), progress)


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


@pytest.fixture(name="web1")
def make_web1(pool: Pool) -> Pool:
    pool.create_clones("base", ["web1", "sibling"], size=3 << 20)
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"golden", 4090)
        disk.zero(8192, 65536)
    pool.snapshot("web1@golden")
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"later", 2 << 20)
    return pool


@pytest.mark.parametrize("name", ["web1", "web1@golden"])
def test_the_new_base_reads_as_what_it_was_made_of_and_nothing_else_changes(web1: Pool, name: str) -> None:
    before = {each: read(web1, each) for each in web1.names()}
    promote(web1, name, "new")
    assert {each: read(web1, each) for each in web1.names()} == before | {"new": before[name]}
    assert is_clean(list(check_pool(web1.path, deep=True)))
    web1.create_clones("new", ["web9"])
    assert read(web1, "web9") == before[name]
    web1.remove(["web1", "sibling", "base"])
    assert read(web1, "web9") == before[name]
    assert os.listdir(web1.path / "layers") == []


def test_holes_stay_holes(web1: Pool) -> None:
    promote(web1, "web1", "new")
    assert web1.info("new").allocated < 2 << 20


@pytest.mark.parametrize(
    ("name", "new", "error"),
    [
        ("web1", "web1", NameTaken),
        ("web1@golden", "base", NameTaken),
        ("web1", "a/b", InvalidName),
        ("web1", "web1@x", InvalidName),
        ("nothing", "new", NotFound),
        ("web1@nothing", "new", NotFound),
        ("base", "new", UsageError),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_made(web1: Pool, name: str, new: str, error: type[Exception]) -> None:
    before = web1.names()
    with pytest.raises(error):
        promote(web1, name, new)
    assert web1.names() == before
    assert os.listdir(web1.path / ".tmp") == []


@pytest.mark.parametrize("name", ["web1", "web1@golden"])
def test_one_that_is_interrupted_leaves_nothing(web1: Pool, name: str) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(done: int, total: int) -> None:
        if done * 2 > total:
            raise Interrupted

    before = web1.names()
    with pytest.raises(Interrupted):
        promote(web1, name, "new", interrupt)
    assert web1.names() == before
    assert os.listdir(web1.path / ".tmp") == []
