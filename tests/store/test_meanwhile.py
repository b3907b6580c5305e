"""What goes, comes or is exchanged in a pool while somebody else is in the midst of looking at it, or of a verb."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import Arguments, Steps, drive, find_verb
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.fs import FileSystem
from nbdclone.store.merging import find_merges, is_work
from nbdclone.store.pool import Pool


class Meanwhile(FileSystem):
    """Has something done right before a file is opened for the first time."""

    path: Path | None = None
    what: Callable[[], object] | None = None

    def before(self, path: Path, what: Callable[[], object]) -> None:
        self.path, self.what = path, what

    def open_file(self, path: str | Path, flags: int) -> int:
        if self.what is not None and Path(path) == self.path:
            what, self.what = self.what, None
            what()
        return super().open_file(path, flags)


class Between(LocalTarget):
    """Has something done right before a verb runs another one."""

    def __init__(self, pool: Pool, verb: str, what: Callable[[], object]) -> None:
        super().__init__(pool)
        self.verb, self.what = verb, what

    def run(self, verb: str, arguments: Arguments) -> Steps:
        if verb == self.verb:
            self.what()
        return super().run(verb, arguments)


@pytest.fixture(name="looked")
def make_looked(pool: Pool) -> tuple[Pool, Meanwhile]:
    """The pool with web1 and web2, as somebody sees it whose file system does something meanwhile."""
    pool.create_clones("base", ["web1", "web2"])
    fs = Meanwhile()
    return Pool(pool.path, fs), fs


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


def delta_of(pool: Pool, name: str) -> Path:
    return pool.places.delta(name)


def test_a_draft_that_somebody_else_has_cleared_is_no_error(pool: Pool) -> None:
    with pool.places.staging() as mine:
        shutil.rmtree(mine)


def test_a_clone_that_is_removed_while_the_pool_is_listed_is_left_out(
    pool: Pool, looked: tuple[Pool, Meanwhile]
) -> None:
    seen, fs = looked
    fs.before(delta_of(pool, "web1"), lambda: pool.remove(["web1"]))
    assert [(entry.name, entry.error) for entry in seen.entries()] == [("base", None), ("web2", None)]


def test_a_layer_that_is_merged_while_the_pool_is_listed_is_missing_nowhere(
    pool: Pool, looked: tuple[Pool, Meanwhile]
) -> None:
    seen, fs = looked
    pool.snapshot("web1@one")
    layer = pool.places.layer(pool.places.snapshot("web1@one").layer)
    pool.remove(["web1@one"])
    fs.before(layer, lambda: drive(find_verb("merge").begin(LocalTarget(pool), {})))
    info = seen.info("web1")
    assert fs.what is None
    assert (info.error, not layer.exists()) == (None, True)


def test_what_is_damaged_is_listed_as_that_all_the_same(pool: Pool, looked: tuple[Pool, Meanwhile]) -> None:
    delta_of(pool, "web1").unlink()
    [web1] = [entry for entry in looked[0].entries() if entry.error]
    assert web1.name == "web1"


def test_a_snapshot_that_is_made_while_the_pool_is_checked_is_missing_nowhere(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    findings = check_pool(pool.path, ["web1"])  # has looked what there is
    pool.snapshot("web1@one")
    assert is_clean(list(findings))


def test_a_base_that_comes_while_the_pool_is_checked_is_missing_nowhere(pool: Pool, content: bytes) -> None:
    pool.create_clones("base", ["web1"])
    findings = check_pool(pool.path, ["web1"])
    (pool.path.parent / "new.img").write_bytes(content[::-1])
    pool.import_base(pool.path.parent / "new.img", "new")
    drive(find_verb("rebase").begin(LocalTarget(pool), {"names": ["web1"], "onto": "new"}))
    assert is_clean(list(findings))


def test_a_clone_that_is_removed_while_merges_are_looked_for_is_left_out(
    pool: Pool, looked: tuple[Pool, Meanwhile]
) -> None:
    seen, fs = looked
    pool.snapshot("web2@one")
    fs.before(delta_of(pool, "web1"), lambda: pool.remove(["web1"]))
    assert not is_work(seen.places)
    assert find_merges(seen.places) == []


@pytest.mark.parametrize("verb", ["reset", "flatten"])
def test_a_clone_that_leaves_a_snapshot_while_that_goes_to_another_base_stays_readable(
    pool: Pool, content: bytes, verb: str
) -> None:
    pool.create_clones("base", ["web1"])
    pool.snapshot("web1@one")
    (pool.path.parent / "new.img").write_bytes(content[::-1])
    pool.import_base(pool.path.parent / "new.img", "new")

    def leave() -> None:
        drive(find_verb(verb).begin(LocalTarget(pool), {"name": "web1"}))

    target = Between(pool, "renew-clone", leave)
    drive(find_verb("rebase").begin(target, {"names": ["web1"], "onto": "new"}))
    assert read(pool, "web1") == read(pool, "web1@one") == content
    assert pool.info("web1@one").error is None
    assert is_clean(list(check_pool(pool.path)))


def test_a_layer_whose_base_has_just_gone_with_all_above_it_is_not_listed(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    pool.snapshot("web1@one")
    for place in (pool.places.clones / "web1", pool.places.bases / "base"):  # as a removal does it, the layers last
        shutil.rmtree(place)
    assert len(pool.places.layer_ids()) == 1
    assert pool.entries(unnamed=True) == []


def test_a_clone_that_is_removed_while_its_siblings_are_hoisted_is_no_error(pool: Pool) -> None:
    pool.create_clones("base", ["web1", "web2", "web3"], fill=lambda clone: clone.pwrite(b"alike" * 20_000, 0))
    with pool.open_clone("web3") as disk:
        disk.pwrite(b"other" * 20_000, 0)  # is looked at, and does not move
    target = Between(pool, "move-clone", lambda: "web3" in pool.names() and pool.remove(["web3"]))
    found = drive(find_verb("hoist").begin(target, {"base": "base"}))
    assert found["clones"] == ["web1", "web2"]
