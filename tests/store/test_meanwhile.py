"""What goes, comes or is exchanged in a pool while somebody else is in the midst of looking at it, or of a verb."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import Arguments, Steps, drive, find_verb
from nbdclone.errors import InUse, NotFound
from nbdclone.store import common_layer
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.fs import FileSystem
from nbdclone.store.merging import find_merges, is_work
from nbdclone.store.pool import Pool
from nbdclone.store.renaming import rename
from nbdclone.store.snapshots import look_back


class Meanwhile(FileSystem):
    """Has something done right before a file is opened for the first time, or the one of that ``number``."""

    path: Path | None = None
    what: Callable[[], object] | None = None
    left = 0

    def before(self, path: Path, what: Callable[[], object], number: int = 1) -> None:
        self.path, self.what, self.left = path, what, number

    def open_file(self, path: str | Path, flags: int) -> int:
        if self.what is not None and Path(path) == self.path:
            self.left -= 1
            if not self.left:
                what, self.what = self.what, None
                what()
        return super().open_file(path, flags)


class Between(LocalTarget):
    """Has something done right before a verb runs another one for the first time."""

    def __init__(self, pool: Pool, verb: str, what: Callable[[], object]) -> None:
        super().__init__(pool)
        self.verb, self.what = verb, what
        self._first = threading.Lock()

    def run(self, verb: str, arguments: Arguments) -> Steps:
        if verb == self.verb and self._first.acquire(blocking=False):
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
    target = Between(pool, "move-clone", lambda: pool.remove(["web3"]))
    found = drive(find_verb("hoist").begin(target, {"base": "base"}))
    assert found["clones"] == ["web1", "web2"]


def alike(pool: Pool, *names: str) -> None:
    pool.create_clones("base", names, fill=lambda clone: clone.pwrite(b"alike" * 20_000, 0))


def test_a_clone_that_is_in_use_when_its_siblings_are_hoisted_is_left_out_and_named(pool: Pool) -> None:
    alike(pool, "web1", "web2", "web3")
    with pool.open_clone("web3"):
        found = drive(find_verb("hoist").begin(LocalTarget(pool), {"base": "base"}))
    assert found["clones"] == ["web1", "web2"]
    [left] = found["left_out"]
    assert (left["name"], left["why"][:21]) == ("web3", "clone 'web3' is in us")
    assert is_clean(list(check_pool(pool.path)))


def test_a_hoist_that_can_move_nobody_says_why(pool: Pool) -> None:
    alike(pool, "web1", "web2")
    with pool.open_clone("web1"), pool.open_clone("web2"), pytest.raises(InUse, match="clone 'web1' is in use"):
        drive(find_verb("hoist").begin(LocalTarget(pool), {"base": "base"}))


@pytest.mark.parametrize("opened", [1, 3])
def test_a_clone_that_is_removed_while_clones_are_looked_at_for_a_hoist_is_no_error(pool: Pool, opened: int) -> None:
    alike(pool, "web1", "web2", "web3")
    fs = Meanwhile()
    fs.before(delta_of(pool, "web3"), lambda: pool.remove(["web3"]), opened)
    found = drive(find_verb("hoist").begin(LocalTarget(Pool(pool.path, fs)), {"base": "base"}))
    assert fs.what is None
    assert found["clones"] == ["web1", "web2"]


def test_a_clone_that_is_removed_while_the_pool_is_measured_is_left_out(
    pool: Pool, looked: tuple[Pool, Meanwhile]
) -> None:
    seen, fs = looked
    fs.before(delta_of(pool, "web1"), lambda: pool.remove(["web1"]), 3)
    found = drive(find_verb("du").begin(LocalTarget(seen), {"names": []}))
    assert fs.what is None
    assert [entry["name"] for entry in found["entries"]] == ["base", "web2"]


def again(pool: Pool) -> None:
    pool.remove(["web2"])
    pool.create_clones("base", ["web2"])


@pytest.mark.parametrize("what", [lambda pool: pool.remove(["web2"]), lambda pool: pool.snapshot("web2@one"), again])
def test_a_clone_that_becomes_another_when_a_rebase_has_begun_is_not_taken_for_damaged(
    pool: Pool, content: bytes, what: Callable[[Pool], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common_layer, "WORTH", 4096)
    (pool.path.parent / "new.img").write_bytes(content[::-1])
    pool.import_base(pool.path.parent / "new.img", "new")
    alike(pool, "web1", "web2")
    before = read(pool, "web1")
    fs = Meanwhile()
    fs.before(delta_of(pool, "web2"), lambda: what(pool), 3)  # after it was asked what it stands on
    target = LocalTarget(Pool(pool.path, fs))
    with pytest.raises(InUse, match="'web2': what it stands on was changed meanwhile: ask again"):
        drive(find_verb("rebase").begin(target, {"names": ["web1", "web2"], "onto": "new"}))
    assert fs.what is None
    assert read(pool, "web1") == before
    assert is_clean(list(check_pool(pool.path)))


def test_a_rollback_to_a_snapshot_that_goes_meanwhile_says_so(pool: Pool, looked: tuple[Pool, Meanwhile]) -> None:
    seen, fs = looked
    pool.snapshot("web1@one")
    fs.before(pool.places.clones / "web1" / "snapshots" / "one", lambda: rename(pool.places, "web1", "web3"), 2)
    with pytest.raises(NotFound, match="there is no snapshot 'web1@one'"):
        look_back(seen.places, "web1", "one")
    assert fs.what is None


def test_a_clone_that_goes_as_soon_as_it_is_made_was_made(pool: Pool) -> None:
    fs = Meanwhile()
    fs.before(delta_of(pool, "web1"), lambda: pool.remove(["web1"]))
    made = Pool(pool.path, fs).create_clones("base", ["web1", "web2"])
    assert [info.name for info in made] == ["web2"]


def test_a_snapshot_into_which_the_one_beneath_is_merged_while_it_is_opened_reads_the_same(
    pool: Pool, content: bytes
) -> None:
    pool.create_clones("base", ["web1"])
    for name in ("web1@one", "web1@two"):
        with pool.open_clone("web1") as disk:
            disk.pwrite(name.encode(), len(content) - 9)
        pool.snapshot(name)
    expected = read(pool, "web1@two")
    beneath = pool.places.layer(pool.places.snapshot("web1@one").layer)

    def merge() -> None:
        pool.remove(["web1@one"])
        drive(find_verb("merge").begin(LocalTarget(pool), {}))

    fs = Meanwhile()
    fs.before(beneath, merge)
    assert read(Pool(pool.path, fs), "web1@two") == expected
    assert fs.what is None
    assert not beneath.exists()


def test_a_snapshot_that_is_removed_with_all_beneath_while_it_is_opened_is_said_to_be_gone(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    pool.snapshot("web1@one")
    pool.snapshot("web1@two")
    fs = Meanwhile()
    fs.before(pool.places.layer(pool.places.snapshot("web1@one").layer), lambda: pool.remove(["web1"]))
    with pytest.raises(NotFound, match="there is no snapshot 'web1@two'"):
        Pool(pool.path, fs).open_clone("web1@two")
    assert fs.what is None


def test_what_a_clone_has_behind_its_new_end_is_not_asked_of_one_that_has_gone(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    fs = Meanwhile()
    fs.before(delta_of(pool, "web1"), lambda: pool.remove(["web1"]), 2)
    with pytest.raises(NotFound, match="there is no base or clone 'web1'"):
        drive(find_verb("resize").begin(LocalTarget(Pool(pool.path, fs)), {"name": "web1", "size": 2 << 20}))
    assert fs.what is None


@pytest.mark.parametrize("opened", [1, 2, 3, 4])
def test_a_snapshot_that_goes_while_it_is_checked_is_missing_nowhere(pool: Pool, opened: int) -> None:
    pool.create_clones("base", ["web1"])
    pool.snapshot("web1@one")
    fs = Meanwhile()
    fs.before(pool.places.layer(pool.places.snapshot("web1@one").layer), lambda: pool.remove(["web1"]), opened)
    assert is_clean(list(check_pool(pool.path, ["web1"], deep=True, fs=fs)))
    assert fs.what is None
