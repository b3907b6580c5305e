"""Promote: a base of what a clone or snapshot reads, while they go on, and nothing of it if it is cut off."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import NameTaken, UsageError
from nbdclone.store import promoting
from nbdclone.store.check import check_pool
from nbdclone.store.pool import Pool

MIB = 1 << 20


def steps(pool: Pool, verb: str, **arguments: Any) -> Any:
    return find_verb(verb).begin(LocalTarget(pool), arguments)


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


@pytest.fixture
def web1(tmp_path: Path) -> Pool:
    """A clone with a snapshot, and something of its own since."""
    rng = random.Random("promote")
    (tmp_path / "debian").write_bytes(rng.randbytes(3 * MIB))
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "debian")
    pool.create_clones("debian", ["web1"])
    for number in range(2):
        with pool.open_clone("web1") as clone:
            clone.pwrite(rng.randbytes(70000), number * 30000)
        if not number:
            pool.snapshot("web1@golden")
    return pool


@pytest.mark.parametrize("name", ["web1", "web1@golden"])
def test_a_base_of_it_reads_the_same_and_it_stays_as_it_is(web1: Pool, name: str) -> None:
    before = read(web1, name)
    names = [info.name for info in web1.entries()]
    made = drive(steps(web1, "promote", name=name, new="golden"))
    assert (made["kind"], made["size"]) == ("base", 3 * MIB)
    assert read(web1, "golden") == read(web1, name) == before
    assert sorted([*names, "golden"]) == sorted(info.name for info in web1.entries())
    drive(steps(web1, "merge"))
    assert len(list((web1.path / "layers").iterdir())) == 1
    assert read(web1, name) == before
    assert list(check_pool(web1.path, deep=True)) == []


def test_cut_off_after_any_step_there_is_no_base_and_no_name_that_nobody_gave(web1: Pool) -> None:
    before = read(web1, "web1")
    names = [info.name for info in web1.entries()]
    count = 0
    while True:
        work = steps(web1, "promote", name="web1", new="golden")
        for _ in range(count + 1):
            if next(work, None) is None:
                break
        else:
            work.close()
            assert [info.name for info in web1.entries()] == names
            assert read(web1, "web1") == before
            count += 1
            continue
        break
    assert count > 3
    assert read(web1, "golden") == before
    drive(steps(web1, "merge"))
    assert len(list((web1.path / "layers").iterdir())) == 1


def test_what_is_merged_before_it_is_opened_is_made_again(web1: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the background of a server, which sees a layer without a name."""
    before = read(web1, "web1")
    real, calls = promoting.open_top, 0

    def merged_first(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            drive(steps(web1, "merge"))
        return real(*args)

    monkeypatch.setattr(promoting, "open_top", merged_first)
    drive(steps(web1, "promote", name="web1", new="golden"))
    assert calls == 2
    assert read(web1, "golden") == before


def test_what_is_merged_while_it_is_read_is_read_to_its_end(web1: Pool) -> None:
    before = read(web1, "web1")
    work = steps(web1, "promote", name="web1", new="golden")
    for _ in range(3):
        next(work)
    drive(steps(web1, "merge"))
    with web1.open_clone("web1") as clone:
        clone.pwrite(b"later" * 1000, 0)
    drive(work)
    assert read(web1, "golden") == before
    drive(steps(web1, "merge"))  # nobody reads the layer any more
    assert list(check_pool(web1.path, deep=True)) == []


def test_names_that_are_taken_and_bases_are_refused_before_anything_is_made(web1: Pool) -> None:
    for name, new, error in (("web1", "debian", NameTaken), ("debian", "golden", UsageError)):
        with pytest.raises(error):
            drive(steps(web1, "promote", name=name, new=new))
    assert len(list((web1.path / "layers").iterdir())) == 1
