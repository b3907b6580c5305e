"""Law 9 for hoist: cut off anywhere, all reads as before, the same again goes on, and nothing is left for ever.

``hoist --dedupe`` is not among it. It writes to no file of the pool, but for a trial with two of its own in ``.tmp``,
and nothing that it finds out is kept: the kernel compares two ranges, and lets one have the extents of the other. Done
or not, each file holds the same bytes; so a power cut leaves what there was (tests/store/test_sharing.py).
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from powercut import stamp
from shadow import ShadowFileSystem
from test_atomic import DeadlyFileSystem, copy

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import NBDCloneError, UsageError
from nbdclone.store import rebasing
from nbdclone.store.check import check_pool
from nbdclone.store.finding import WRONG
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool

STATES_PER_STEP = int(os.environ.get("HOIST_STATES_PER_STEP", "2"))
SECTORS = BLOCK_SIZE // 512
BLOCKS = 6
SIZE = (BLOCKS + 1) * BLOCK_SIZE
# What each clone has of its own, by block: 1 is the package that they have alike; of it web3 lacks a part, for which it
# takes the base's over. web4 has a snapshot in between, and is none of those that are moved.
OWN = {
    "web1": {0: 1, 1: 1, 2: 1, 4: 11},
    "web2": {0: 1, 1: 1, 2: 1, 6: 12},
    "web3": {0: 1, 1: 1, 3: 13},
    "web4@first": {0: 1, 1: 1},
    "web4": {0: 1, 1: 1, 2: 1, 5: 14},
}
# What a check says of a page that was torn: it cannot tell that from one that rotted.
TORN = {"header-slot", "map-slot"}
MOVED = {"web1", "web2", "web3"}


def block(kind: int, number: int) -> bytes:
    return b"".join(stamp(kind, number * SECTORS + sector) for sector in range(SECTORS))


BASE = b"".join(block(0, number) for number in range(BLOCKS))


def content(own: dict[int, int]) -> bytes:
    base = {number: block(0, number) for number in range(BLOCKS)} | {BLOCKS: bytes(BLOCK_SIZE)}
    return b"".join((base | {number: block(kind, number) for number, kind in own.items()}).values())


CONTENTS = {name: content(own) for name, own in OWN.items()}


def hoist(pool: Pool) -> dict[str, Any]:
    result: dict[str, Any] = drive(find_verb("hoist").begin(LocalTarget(pool), {"base": "base"}))
    return result


@pytest.fixture(scope="module", name="model")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model") / "root"
    root.mkdir()
    (root / "base.img").write_bytes(BASE)
    pool = Pool.open(root / "pool", create=True)
    pool.import_base(root / "base.img", "base")
    names = [name for name in OWN if "@" not in name]
    pool.create_clones("base", names, size=SIZE)
    for name, own in OWN.items():
        clone, _, snapshot = name.partition("@")
        with pool.open_clone(clone) as disk:
            for number, kind in own.items():
                disk.pwrite(block(kind, number), number * BLOCK_SIZE)
        if snapshot:
            pool.snapshot(name)
    return root


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory where syncs cost nothing, if there is one."""
    parent = "/dev/shm" if os.path.ismount("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-", dir=parent) as path:
        yield Path(path)


@pytest.fixture(autouse=True)
def one_after_the_other(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What a seed gives must be the same each time. And pages that a power cut tore are reported."""
    monkeypatch.setattr(rebasing, "AT_ONCE", 1)
    caplog.set_level(logging.ERROR, "nbdclone")


def over_the_base(pool: Pool) -> set[str]:
    headers = {name: pool.places.header(pool.places.delta(name)) for name in MOVED}
    return {name for name, header in headers.items() if pool.places.find_base(header.parent_id, "base") == "base"}


def require_same(pool: Pool) -> None:
    assert set(pool.names()) == {"base", *CONTENTS}
    for name, content in CONTENTS.items():
        with pool.open_clone(name) as disk:
            same = disk.pread(disk.size, 0) == content
            assert same, name


def require_right(root: Path, *, done: bool = False) -> None:
    """All reads as before, also when it has been done again, the layers are merged, and all clones are gone."""
    pool = Pool.open(root / "pool")
    if done:
        assert not over_the_base(pool)
    require_same(pool)
    wrong = [finding for finding in check_pool(pool.path) if finding.level == WRONG]
    assert {finding.kind for finding in wrong} <= TORN, wrong
    left = over_the_base(pool)
    try:
        result = hoist(pool)
    except UsageError as error:
        assert "nothing is shared" in str(error)  # noqa: PT017
        assert len(left) < 2
    else:
        assert set(result["clones"]) == (left if len(left) > 1 else set())
    require_same(pool)
    # What a server does by itself: a layer of one clone becomes a part of that, one of none goes.
    drive(find_verb("merge").begin(LocalTarget(pool), {}))
    require_same(pool)
    standing = {pool.places.header(pool.places.delta(name)).parent_id for name in MOVED}
    [sealed] = {pool.places.snapshot("web4@first").layer}
    assert set(pool.places.layer_ids()) <= standing | {sealed}
    pool.remove([name for name in CONTENTS if "@" not in name])
    assert pool.places.layer_ids() == []
    pool.remove(["base"])
    assert os.listdir(pool.path / ".tmp") == []


def cut_power_at_every_step(root: Path, memory: Path, states_per_step: int, seed: int = 0) -> int:
    """Hoist; look at states that a power cut before each step, and after the last, may leave."""
    rng = random.Random(seed)
    fs = ShadowFileSystem(root)
    numbers = itertools.count()
    seen: set[object] = set()

    def look(done: bool = False) -> None:
        if (summary := (done, True, fs.tree.summary())) not in seen:  # what a kill leaves: all that was written
            seen.add(summary)
            require_right(copy(root, memory / str(next(numbers))), done=done)
        for _ in range(states_per_step):
            left = fs.tree.crash(rng)
            if (summary := (done, False, left.summary())) not in seen:
                seen.add(summary)
                state = memory / str(next(numbers))
                state.mkdir()
                left.write_to(state)
                try:
                    require_right(state, done=done)
                except (AssertionError, NBDCloneError, OSError) as error:
                    raise AssertionError(f"seed {seed}, state {state.name}, after {fs.syncs}: {error!r}") from error
                finally:
                    shutil.rmtree(state)

    fs.on_step = look
    hoist(Pool.open(root / "pool", fs=fs))
    look(done=True)
    return next(numbers)


def test_a_power_cut_at_any_step_leaves_what_reads_as_before(model: Path, tmp_path: Path, memory: Path) -> None:
    seed = int(os.environ.get("POWERCUT_SEED", "0"))
    states = cut_power_at_every_step(copy(model, tmp_path / "root"), memory, STATES_PER_STEP, seed=seed)
    print(f"states: {states}")  # pytest -rP shows it
    assert states > 50


def run_and_die(root: Path, last: int) -> None:
    rebasing.AT_ONCE = 1
    hoist(Pool.open(root / "pool", fs=DeadlyFileSystem(root, last)))


def test_a_kill_before_any_step_leaves_what_reads_as_before(model: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nbdclone.store.pool", "shadow"])
    for last in itertools.count(step=15):  # what is left before each step is looked at above
        root = copy(model, tmp_path / str(last))
        process = context.Process(target=run_and_die, args=(root, last))
        process.start()
        process.join(60)
        assert process.exitcode in (0, 42)
        require_right(root, done=process.exitcode == 0)
        if process.exitcode == 0:
            break
    assert last >= 20
