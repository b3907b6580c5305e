"""Law 9 for rebase: cut off anywhere, each clone and snapshot reads as before, and the same again does the rest."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Set
from pathlib import Path

import pytest
from shadow import ShadowFileSystem
from test_atomic import BASE, WRITTEN, DeadlyFileSystem, copy, make_root

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import NBDCloneError, UsageError
from nbdclone.store import common_layer
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool

STATES_PER_STEP = int(os.environ.get("POOL_STATES_PER_STEP", "8"))
CONTENTS = {"base": BASE, "web1": WRITTEN[:8190] + b"again" + WRITTEN[8195:], "web1@first": WRITTEN, "web2": BASE}
# One whose delta is over the base, and one with a snapshot in between; both, of which block 2 comes into a layer.
CLONES = ["web2", "web1", "web1 web2"]


def rebase(pool: Pool, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common_layer, "WORTH", BLOCK_SIZE)
        drive(find_verb("rebase").begin(LocalTarget(pool), {"names": name.split(), "onto": "update"}))


@pytest.fixture(scope="module", name="model")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_root(tmp_path_factory.mktemp("model") / "root")
    # Blocks 0 and 2 differ; web1 has changed block 0, and then 1 and 2.
    (root / "update.img").write_bytes(b"u" * 4096 + BASE[4096:8192] + b"v" * 4096)
    Pool.open(root / "pool").import_base(root / "update.img", "update")
    return root


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory where syncs cost nothing, if there is one."""
    parent = "/dev/shm" if os.path.ismount("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-", dir=parent) as path:
        yield Path(path)


def require_right(root: Path, name: str, *, done: bool = False) -> None:
    """All reads as before, also when the rebase has been done again and the old base is gone."""
    pool = Pool.open(root / "pool")

    def look() -> None:
        for entry, content in CONTENTS.items():
            if entry in pool.names():
                with pool.open_clone(entry) as disk:
                    same = disk.pread(disk.size, 0) == content
                    assert same, entry

    look()
    try:
        rebase(pool, name)
    except UsageError as error:
        assert "already" in str(error)  # noqa: PT017
    else:
        assert not done
    for other in {"web1", "web2"} - set(name.split()):
        pool.remove([other])
    pool.remove(["base"])
    look()
    assert os.listdir(pool.path / ".tmp") == []


def cut_power_at_every_step(
    root: Path, memory: Path, name: str, states_per_step: int, ignored: Set[int] = frozenset(), seed: int = 0
) -> ShadowFileSystem:
    """Rebase; look at states that a power cut before each step, and after the last, may leave."""
    rng = random.Random(seed)
    fs = ShadowFileSystem(root, ignored)
    numbers = itertools.count()

    def look(done: bool = False) -> None:
        for _ in range(states_per_step):
            state = memory / str(next(numbers))
            state.mkdir()
            fs.tree.crash(rng).write_to(state)
            try:
                require_right(state, name, done=done)
            except (AssertionError, NBDCloneError, OSError) as error:
                raise AssertionError(f"seed {seed}, state {state.name}, after {fs.syncs}: {error!r}") from error
            finally:
                shutil.rmtree(state)

    fs.on_step = look
    rebase(Pool.open(root / "pool", fs=fs), name)
    look(done=True)
    print(f"{next(numbers)} states of a rebase of {name}")
    return fs


@pytest.mark.parametrize("name", CLONES)
def test_a_power_cut_at_any_step_leaves_what_reads_as_before(
    model: Path, tmp_path: Path, memory: Path, name: str
) -> None:
    seed = int(os.environ.get("POWERCUT_SEED", "0"))
    states = STATES_PER_STEP // len(name.split())  # as long for each
    cut_power_at_every_step(copy(model, tmp_path / "root"), memory, name, states, seed=seed)


def run_and_die(root: Path, name: str, last: int) -> None:
    rebase(Pool.open(root / "pool", fs=DeadlyFileSystem(root, last)), name)


@pytest.mark.parametrize("name", CLONES)
def test_a_kill_before_any_step_leaves_what_reads_as_before(model: Path, tmp_path: Path, name: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nbdclone.store.pool", "shadow"])
    for last in itertools.count(step=3):  # each of the steps that count is next to one that does not
        root = copy(model, tmp_path / str(last))
        process = context.Process(target=run_and_die, args=(root, name, last))
        process.start()
        process.join(60)
        assert process.exitcode in (0, 42)
        require_right(root, name, done=process.exitcode == 0)
        if process.exitcode == 0:
            break
    assert last >= 10
