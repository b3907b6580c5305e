"""Law 9: an operation on a pool that is interrupted anywhere, by a kill or a power cut, is done or not begun."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from powercut import stamp
from shadow import ShadowFileSystem

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import NBDCloneError
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import place_of
from nbdclone.store.finding import WRONG
from nbdclone.store.fs import FileSystem
from nbdclone.store.giving_back import GivingBack
from nbdclone.store.image import BaseRecord, fingerprint_of, read_manifest
from nbdclone.store.layer_manifest import forget_manifest
from nbdclone.store.pool import Pool
from nbdclone.store.renaming import rename
from nbdclone.store.resizing import resize

BASE = b"".join(stamp(1, sector) for sector in range(24))
WRITTEN = BASE[:4090] + b"written" + BASE[4097:]
AGAIN = WRITTEN[:8190] + b"again" + WRITTEN[8195:]
# Within a block that was written last, so that a part of it is cut off; and more than the base has.
SMALLER, LARGER = 8192 - 512, len(BASE) + 5 * 512
OTHER = b"".join(stamp(2, sector) for sector in range(40))
STATES_PER_STEP = int(os.environ.get("POOL_STATES_PER_STEP", "12"))
# Of those that tell a sync that is missing, one in ten or so shows it.
STATES_TO_NOTICE = 100


class Operation(NamedTuple):
    """``before`` and ``after`` are the names in the pool."""

    run: Callable[[Pool], object]
    before: frozenset[str]
    after: frozenset[str]
    contents: dict[str, tuple[bytes, ...]] | None = None  # where it is another: before (if it may be), and after
    then: Callable[[Pool], None] | None = None  # what is to be looked at as well
    checked: bool = False  # a deep check is to find nothing wrong afterwards


ALL = frozenset({"base", "web1", "web1@first", "web2"})


def import_other(pool: Pool) -> None:
    pool.import_base(pool.path.parent / "other.img", "other")


def create_one(pool: Pool) -> None:
    pool.create_clones("base", ["new"])


def create_two(pool: Pool) -> None:
    pool.create_clones("base", ["new", "newer"])


def create_filled(pool: Pool) -> None:
    pool.create_clones("base", ["filled"], fill=lambda clone: clone.pwrite(b"filled", 4090))


def remove_one(pool: Pool) -> None:
    pool.remove(["web2"])


def snapshot(pool: Pool) -> None:
    pool.snapshot("web1@second")


def first_snapshot(pool: Pool) -> None:
    pool.snapshot("web2@first")


def clone_snapshot(pool: Pool) -> None:
    pool.create_clones("web1@first", ["new"])


def remove_snapshot(pool: Pool) -> None:
    pool.remove(["web1@first"])


def run(pool: Pool, verb: str, **arguments: object) -> None:
    drive(find_verb(verb).begin(LocalTarget(pool), arguments))


def flatten(pool: Pool) -> None:
    run(pool, "flatten", name="web1")


def compact(pool: Pool) -> None:
    with pool.open_clone("web1") as clone:
        clone.pwrite(clone.pread(8192, 0), 0)
    run(pool, "compact", name="web1")


def merge(pool: Pool) -> None:
    """Each block is a step of its own, and its space is given back after it."""
    with mock.patch("nbdclone.store.copying.STEP", 4096), mock.patch("nbdclone.store.giving_back.STRETCH", 1):
        run(pool, "merge")


def merge_into_a_clone(pool: Pool) -> None:
    pool.remove(["web1@first"])
    merge(pool)


def merge_into_a_layer(pool: Pool) -> None:
    pool.snapshot("web1@second")
    pool.remove(["web1@first"])
    merge(pool)


def promote(pool: Pool) -> None:
    run(pool, "promote", name="web1@first", new="new")


def check_deeply(pool: Pool) -> None:
    """The manifest of a layer is made, and given up again before it gains a block."""
    fs, layer = pool.places.fs, pool.places.snapshot("web1@first").layer
    assert is_clean(list(check_pool(pool.path, deep=True, fs=fs)))
    forget_manifest(pool.places, layer)
    delta = Delta.open(pool.places.layer(layer), "layer", fs)
    fs.pwrite_all(delta.fd, BASE[8192:], place_of(2))
    delta.mark(0, 2, 2)
    delta.finish()
    delta.close()


def roll_back(pool: Pool) -> None:
    pool.rollback("web1@first")


def reset(pool: Pool) -> None:
    pool.reset("web1")


def rename_clone(pool: Pool) -> None:
    rename(pool.places, "web1", "new")


def rename_base(pool: Pool) -> None:
    rename(pool.places, "base", "new")


def rename_snapshot(pool: Pool) -> None:
    rename(pool.places, "web1@first", "web1@new")


def as_many(pool: Pool) -> None:
    """What was renamed has one of its names."""
    assert len(pool.names()) == len(ALL)


def enlarge(pool: Pool) -> None:
    resize(pool.places, "web1", LARGER)


def reduce(pool: Pool) -> None:
    resize(pool.places, "web1", SMALLER)


def grow_again(pool: Pool) -> None:
    """What was cut off does not come back."""
    if pool.info("web1").size == SMALLER:
        pool.snapshot("web1@then")
        resize(pool.places, "web1", len(BASE))
        with pool.open_clone("web1") as clone:
            zeros = clone.pread(clone.size, 0) == AGAIN[:SMALLER] + bytes(len(BASE) - SMALLER)
        assert zeros


def remove_all(pool: Pool) -> None:
    pool.remove(["base", "web1", "web2"])


OPERATIONS = {
    "import": Operation(import_other, ALL, ALL | {"other"}),
    "create": Operation(create_one, ALL, ALL | {"new"}),
    "create two": Operation(create_two, ALL, ALL | {"new", "newer"}),
    "create filled": Operation(create_filled, ALL, ALL | {"filled"}),
    "remove": Operation(remove_one, ALL, ALL - {"web2"}),
    "remove a base with its clones": Operation(remove_all, ALL, frozenset()),
    "snapshot": Operation(snapshot, ALL, ALL | {"web1@second"}),
    "first snapshot": Operation(first_snapshot, ALL, ALL | {"web2@first"}),
    "flatten": Operation(flatten, ALL, ALL),
    "compact": Operation(compact, ALL, ALL),
    "merge into a clone": Operation(merge_into_a_clone, ALL, ALL - {"web1@first"}),
    "merge into a layer": Operation(merge_into_a_layer, ALL, ALL - {"web1@first"} | {"web1@second"}),
    "promote": Operation(promote, ALL, ALL | {"new"}, {"new": (WRITTEN,)}),
    "deep check": Operation(check_deeply, ALL, ALL, checked=True),
    "clone of a snapshot": Operation(clone_snapshot, ALL, ALL | {"new"}, {"new": (WRITTEN,)}),
    "remove a snapshot": Operation(remove_snapshot, ALL, ALL - {"web1@first"}),
    "rollback": Operation(roll_back, ALL, ALL, {"web1": (AGAIN, WRITTEN)}),
    "reset": Operation(reset, ALL, ALL, {"web1": (AGAIN, BASE)}),
    "rename a clone": Operation(
        rename_clone,
        ALL,
        ALL - {"web1", "web1@first"} | {"new", "new@first"},
        {"new": (AGAIN,), "new@first": (WRITTEN,)},
        as_many,
    ),
    "rename a base": Operation(rename_base, ALL, ALL - {"base"} | {"new"}, then=as_many),
    "rename a snapshot": Operation(
        rename_snapshot, ALL, ALL - {"web1@first"} | {"web1@new"}, {"web1@new": (WRITTEN,)}, as_many
    ),
    "grow": Operation(enlarge, ALL, ALL, {"web1": (AGAIN, AGAIN + bytes(LARGER - len(BASE)))}),
    "shrink": Operation(reduce, ALL, ALL, {"web1": (AGAIN, AGAIN[:SMALLER])}, grow_again),
}


def make_root(root: Path) -> Path:
    """A directory with an image to import, and a pool with a base and two clones, one of which was written."""
    root.mkdir(exist_ok=True)
    (root / "base.img").write_bytes(BASE)
    (root / "other.img").write_bytes(OTHER)
    pool = Pool.open(root / "pool", create=True)
    pool.import_base(root / "base.img", "base")
    pool.create_clones("base", ["web1", "web2"])
    with pool.open_clone("web1") as clone:
        clone.pwrite(b"written", 4090)
    pool.snapshot("web1@first")
    with pool.open_clone("web1") as clone:
        clone.pwrite(b"again", 8190)
    return root


@pytest.fixture(scope="module", name="model")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("model") / "root")


def copy(model: Path, target: Path) -> Path:
    """A copy whose base is known to be right: the operations that follow do not have to look."""
    shutil.copytree(model, target)
    Pool.open(target / "pool").open_clone("base").close()
    return target


@pytest.fixture
def root(model: Path, tmp_path: Path) -> Path:
    return copy(model, tmp_path / "root")


CONTENTS = {
    "base": BASE,
    "other": OTHER,
    "web1": AGAIN,
    "web1@first": WRITTEN,
    "web1@second": AGAIN,
    "web2@first": BASE,
    "web2": BASE,
    "new": BASE,
    "newer": BASE,
    "filled": BASE[:4090] + b"filled" + BASE[4096:],
}


def require_whole(root: Path, operation: Operation, *, done: bool = False, go_on: bool = True) -> None:
    """The pool has the names that it may have, and each is whole; then it goes on, and clears what was left."""
    contents = operation.contents or {}
    pool = Pool.open(root / "pool")
    names = set(pool.names())
    assert operation.before & operation.after <= names <= operation.before | operation.after, names
    if done:
        assert names == operation.after
    assert not names or names <= {"other"} or names & {"base", "new"}, "clones without their base"
    for name in names:
        with pool.open_clone(name) as clone:
            expected = contents[name] if name in contents else (CONTENTS[name],)
            content = clone.pread(clone.size, 0)
            # Not ``assert content == ...``: in CI pytest draws the difference in full, which takes minutes.
            whole = content == expected[-1] if done else any(content == each for each in expected)
            assert whole, name
    for info in pool.entries():
        assert info.error is None
    if operation.checked:
        wrong = [str(finding) for finding in check_pool(pool.path, deep=True) if finding.level == WRONG]
        assert not wrong, wrong
    for name in os.listdir(pool.path / "bases"):
        directory = pool.path / "bases" / name
        record = BaseRecord.load(directory / "base.json")
        assert fingerprint_of(record.size, read_manifest(directory / "manifest", record.size)) == record.fingerprint
    if operation.then is not None:
        operation.then(pool)
    if go_on and "base" in names:
        pool.create_clones("base", ["next"])
        pool.remove(["next"])
        assert os.listdir(pool.path / ".tmp") == []


# Power cuts


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory where syncs cost nothing, if there is one."""
    parent = "/dev/shm" if os.path.ismount("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-", dir=parent) as path:
        yield Path(path)


def cut_power_at_every_step(
    root: Path, memory: Path, operation: Operation, states_per_step: int, ignored: Set[int] = frozenset(), seed: int = 0
) -> int:
    """Run the operation; look at states that a power cut before each step, and after the last, may leave.

    A state that came up before is counted, and not looked at again. Where syncs are ``ignored``: not before the first
    of them, for up to there everything is as it is without.
    """
    rng = random.Random(seed)
    fs = ShadowFileSystem(root, ignored)
    numbers = itertools.count()
    seen: set[object] = set()

    def look(done: bool = False) -> None:
        if ignored and len(fs.syncs) <= min(ignored):
            return
        for _ in range(states_per_step):
            state = memory / str(next(numbers))
            left = fs.tree.crash(rng)
            if (summary := (done, left.summary())) in seen:
                continue  # it was looked at, and found whole
            seen.add(summary)
            state.mkdir()
            left.write_to(state)
            try:
                require_whole(state, operation, done=done, go_on=not ignored)
            except (AssertionError, NBDCloneError, OSError) as error:
                raise AssertionError(f"seed {seed}, state {state.name}, after {fs.syncs}: {error!r}") from error
            finally:
                shutil.rmtree(state)

    fs.on_step = look
    operation.run(Pool.open(root / "pool", fs=fs))
    look(done=True)
    return next(numbers)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_power_cut_at_any_step_leaves_each_name_whole_or_not_there(root: Path, memory: Path, name: str) -> None:
    seed = int(os.environ.get("POWERCUT_SEED", "0"))
    states = cut_power_at_every_step(root, memory, OPERATIONS[name], STATES_PER_STEP, seed=seed)
    print(f"states: {states}")  # pytest -rP shows it


# Syncs that nothing needs here, and why.
SPARE = {
    "promote": ["new/", "new/"],  # as of an import
    "import": ["other/", "other/"],  # by the saving of base.json, and of the whole directory: one is enough
    "remove": ["bases/"],  # where nothing went
    "remove a base with its clones": ["clones/"],  # at the end: it was synced before the base went
    # The flush of what was written before, and that of the new delta at its close: nothing was.
    "snapshot": ["delta", "delta"],
    # The same, and the directory "snapshots": until the commit it does not count, whose sync makes both durable.
    "first snapshot": ["delta", "web2/", "delta"],
    "remove a snapshot": ["clones/", "bases/"],  # where nothing went
    # That of layer.json: if it is lost, the next check makes it again. That of the manifest that went: it means nothing
    # without the other. Those of the map with the new block, and of its copy: nobody was told that it is there.
    "deep check": ["ID/", "ID/", "delta", "delta"],
}
# With all of them left out the defect must be noticed.
NEEDED_TOGETHER = {"import", "promote"}


# Of those that write to a delta, or change its size, each sync is told in test_atomic_syncs.py.
WRITING = {"create filled", "flatten", "compact", "merge into a clone", "merge into a layer", "grow", "shrink"}


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in WRITING])
def test_no_sync_of_an_operation_can_be_left_out(
    model: Path, memory: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who has a clone open is told beside the rest: it takes longer than all of that.
    monkeypatch.setattr("nbdclone.store.catalog.holders", dict)
    numbers = itertools.count()
    (memory / "states").mkdir()

    def is_noticed(ignored: Set[int]) -> bool:
        root = copy(model, memory / f"root{next(numbers)}")
        try:
            cut_power_at_every_step(root, memory / "states", OPERATIONS[name], STATES_TO_NOTICE, ignored)
        except AssertionError:
            return True
        return False

    fs = ShadowFileSystem(copy(model, memory / "root"))
    OPERATIONS[name].run(Pool.open(fs.root / "pool", fs=fs))
    spare = [number for number in range(len(fs.syncs)) if not is_noticed({number})]
    named = [re.sub(r"[0-9a-f]{32}", "ID", fs.syncs[number]) for number in spare]
    assert named == SPARE.get(name, [])
    if name in NEEDED_TOGETHER:
        assert is_noticed(set(spare))


# Kills


class DeadlyFileSystem(ShadowFileSystem):
    """The process dies before its n-th step, at once: nothing is tidied up."""

    def __init__(self, root: Path, last: int) -> None:
        super().__init__(root)
        steps = itertools.count()
        self.on_step = lambda: os._exit(42) if next(steps) == last else None


def run_and_die(root: Path, name: str, last: int) -> None:
    OPERATIONS[name].run(Pool.open(root / "pool", fs=DeadlyFileSystem(root, last)))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_kill_before_any_step_leaves_each_name_whole_or_not_there(model: Path, tmp_path: Path, name: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nbdclone.store.pool", "shadow"])
    for last in itertools.count():
        root = copy(model, tmp_path / str(last))
        process = context.Process(target=run_and_die, args=(root, name, last))
        process.start()
        process.join(60)
        assert process.exitcode in (0, 42)
        require_whole(root, OPERATIONS[name], done=process.exitcode == 0)
        if process.exitcode == 0:
            break
    assert last >= 2


# Errors


class FailingFileSystem(FileSystem):
    """The n-th rename fails."""

    def __init__(self, failing: int) -> None:
        self._left = failing

    def rename(self, source: Path, target: Path) -> None:  # type: ignore[override]
        self._left -= 1
        if self._left == 0:
            raise OSError(28, "No space left on device")
        os.rename(source, target)


@pytest.mark.parametrize("failing", [1, 2, 3])
@pytest.mark.parametrize("name", ["create two", "remove a base with its clones"])
def test_an_error_in_the_midst_of_several_names_undoes_them_all(root: Path, name: str, failing: int) -> None:
    operation = OPERATIONS[name]
    pool = Pool.open(root / "pool", fs=FailingFileSystem(failing))
    if name == "create two" and failing == 3:
        operation.run(pool)
        require_whole(root, operation, done=True)
        return
    with pytest.raises((NBDCloneError, OSError), match=r"(?i)no space left"):
        operation.run(pool)
    assert set(pool.names()) == operation.before
    require_whole(root, operation)


def test_a_new_pool_is_durable_up_to_the_directory_that_was_there_before(tmp_path: Path) -> None:
    synced: list[Path] = []

    class Watched(FileSystem):
        def sync_directory(self, path: Path) -> None:
            assert path.is_dir()
            synced.append(path)
            super().sync_directory(path)

    Pool.open(tmp_path / "srv" / "disks" / "pool", create=True, fs=Watched())
    assert {tmp_path, tmp_path / "srv", tmp_path / "srv" / "disks", tmp_path / "srv" / "disks" / "pool"} <= set(synced)


def test_it_is_noticed_if_space_is_given_back_before_the_map_is_durable(
    root: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    giving_back = 0
    give_back, settle = GivingBack._give_back, Delta.settle_all

    def count(self: GivingBack, end: int) -> None:
        nonlocal giving_back
        giving_back += 1
        try:
            give_back(self, end)
        finally:
            giving_back -= 1

    with monkeypatch.context() as patch:
        patch.setattr(GivingBack, "_give_back", count)
        patch.setattr(Delta, "settle_all", lambda self: None if giving_back else settle(self))
        patch.setattr(Delta, "settled", lambda self, segment: True)
        with pytest.raises(AssertionError, match="state"):
            cut_power_at_every_step(root, memory, OPERATIONS["merge into a clone"], STATES_TO_NOTICE)


UNSAFE = {
    "flatten": ("nbdclone.store.delta.Delta.settle_all", lambda self: None),
    "merge into a clone": ("nbdclone.store.delta.Delta.settle_all", lambda self: None),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_it_is_noticed_if_blocks_are_not_durable_before_the_parent_goes(
    root: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*UNSAFE[name])
        with pytest.raises(AssertionError, match="state"):
            cut_power_at_every_step(root, memory, OPERATIONS[name], STATES_TO_NOTICE)
