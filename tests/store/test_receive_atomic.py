"""A stream that is received while the power fails, or the process is killed: all of it is there, or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_atomic
from test_atomic import ALL, OTHER, WRITTEN, Operation, copy, cut_power_at_every_step, make_root
from transfer import receive, sent

from nbdclone.store import receiving
from nbdclone.store.check import check_pool
from nbdclone.store.finding import WRONG
from nbdclone.store.pool import Pool

# Receiving takes some 80 steps, and each state is looked at in some 20 ms.
STATES_PER_STEP = int(os.environ.get("RECEIVE_STATES_PER_STEP", "2"))
MORE = b"more" + WRITTEN[4:]
MOST = b"most" + WRITTEN[4:]
AWAY = OTHER[:-3] + b"end"


def receive_whole(pool: Pool) -> None:
    receive(pool, (pool.path.parent / "whole.stream").read_bytes())


def receive_with_base(pool: Pool) -> None:
    receive(pool, (pool.path.parent / "with_base.stream").read_bytes())


def receive_more(pool: Pool) -> None:
    receive(pool, (pool.path.parent / "more.stream").read_bytes(), name="web3")


# In the pool there is a clone 'web3' besides, which has received web1@first.
HERE = ALL | {"web3", "web3@first"}
CONTENTS = {"web3": (WRITTEN,), "web3@first": (WRITTEN,)}
OPERATIONS = {
    "receive": Operation(
        receive_whole,
        HERE,
        HERE | {"far", "far@first", "far@second"},
        CONTENTS | {"far": (WRITTEN,), "far@first": (test_atomic.BASE,), "far@second": (WRITTEN,)},
    ),
    "receive with the base": Operation(
        receive_with_base,
        HERE,
        HERE | {"other", "away", "away@first"},
        CONTENTS | {"away": (AWAY,), "away@first": (AWAY,)},
    ),
    "receive more": Operation(
        receive_more, HERE, HERE | {"web3@more"}, CONTENTS | {"web3@more": (MORE,)}
    ),
}  # fmt: skip


@pytest.fixture(scope="module", name="model")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As for the other operations, with streams of another pool beside it."""
    root = make_root(tmp_path_factory.mktemp("model") / "root")
    pool = Pool.open(root / "pool")
    away = Pool.open(root / "away", create=True)
    away.import_base(root / "base.img", "base")
    away.import_base(root / "other.img", "other")
    away.create_clones("base", ["far"])
    away.snapshot("far@first")
    write(away, "far", b"written", 4090)
    away.snapshot("far@second")
    away.create_clones("other", ["away"])
    write(away, "away", b"end", len(OTHER) - 3)
    away.snapshot("away@first")
    receive(away, sent(pool, "web1@first"))
    receive(pool, sent(pool, "web1@first"), name="web3")
    write(away, "web1", b"more", 0)
    away.snapshot("web1@more")
    (root / "whole.stream").write_bytes(sent(away, "far@second"))
    (root / "with_base.stream").write_bytes(sent(away, "away@first", with_base=True))
    (root / "more.stream").write_bytes(sent(away, "web1@more", since="first"))
    write(away, "web1", b"most", 0)
    away.snapshot("web1@most")
    (root / "most.stream").write_bytes(sent(away, "web1@most", since="more"))
    shutil.rmtree(root / "away")
    return root


def write(pool: Pool, name: str, data: bytes, offset: int) -> None:
    with pool.open_clone(name) as clone:
        clone.pwrite(data, offset)


@pytest.fixture
def root(model: Path, tmp_path: Path) -> Path:
    return copy(model, tmp_path / "root")


@pytest.fixture
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    parent = Path("/dev/shm") if os.path.ismount("/dev/shm") else tmp_path_factory.mktemp("states")
    path = parent / f"nbdclone-test-{os.getpid()}"
    path.mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def more_is_there_when_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """``web3`` has its old content until all is done, and then the new one; each of its snapshots has its own."""
    whole = test_atomic.require_whole

    def require_whole(root: Path, operation: Operation, *, done: bool = False, go_on: bool = True) -> None:
        if operation.run is receive_more:
            with Pool.open(root / "pool").open_clone("web3") as clone:
                found = clone.pread(clone.size, 0)
            right = found == MORE or (not done and found == WRITTEN)
            assert right, "web3"
            operation = operation._replace(contents={**(operation.contents or {}), "web3": (found,)})
        whole(root, operation, done=done, go_on=go_on)

    monkeypatch.setattr(test_atomic, "require_whole", require_whole)
    for operation in OPERATIONS.values():
        for name, content in (operation.contents or {}).items():
            monkeypatch.setitem(test_atomic.CONTENTS, name, content[-1])


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_power_cut_at_any_step_leaves_all_of_it_or_nothing(
    root: Path, memory: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "SYNC_EVERY", 4096)  # so that there are notes, too
    monkeypatch.setattr("nbdclone.store.places.KEEP_RECEIVED_S", -1)  # which would be kept, and are looked for
    seed = int(os.environ.get("POWERCUT_SEED", "0"))
    states = cut_power_at_every_step(root, memory, OPERATIONS[name], STATES_PER_STEP, seed=seed)
    print(f"states: {states}")  # pytest -rP shows it


def receive_again(pool: Pool) -> bytes:
    receive_more(pool)
    return MORE


def receive_the_next(pool: Pool) -> bytes:
    receive(pool, (pool.path.parent / "most.stream").read_bytes(), name="web3")
    return MOST


def roll_back(pool: Pool) -> bytes:
    pool.rollback("web3@more")
    return MORE


def remove_the_snapshot(pool: Pool) -> bytes:
    pool.remove(["web3@more"])
    assert len(pool.places.layer_ids()) == 1  # that of web1@first and web3@first
    return WRITTEN


@pytest.mark.parametrize("go_on", [receive_again, receive_the_next, roll_back, remove_the_snapshot])
def test_a_snapshot_that_a_power_cut_kept_its_clone_from_following_does_no_harm(
    root: Path, memory: Path, go_on: Callable[[Pool], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is whole, a check finds nothing, and whatever is done next is as if the clone had followed."""
    found = 0

    def behind(pool: Pool) -> None:
        nonlocal found
        if "web3@more" not in pool.names() or read(pool, "web3") == MORE:
            return
        found += 1
        wrong = [str(finding) for finding in check_pool(pool.path) if finding.level == WRONG]
        assert not wrong, wrong
        content = go_on(pool)
        right = read(pool, "web3") == content and read(pool, "web3@first") == WRITTEN
        assert right, go_on.__name__
        if go_on is not remove_the_snapshot:
            right = read(pool, "web3@more") == MORE
            assert right, "web3@more"

    operation = OPERATIONS["receive more"]._replace(then=behind)
    cut_power_at_every_step(root, memory, operation, 2)
    assert found


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)
