"""Power cuts of a clone with snapshots: writes, flushes, snapshots, more writes, cut before every step.

After each cut every sector of the clone is held against the ledger of law 4, and every sector of each snapshot against
what was acknowledged when it was taken, or was under way. ``POWERCUT_CAMPAIGNS=n`` runs more of them.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mutation import mutate
from powercut import LawBroken, Ledger, Turn, WouldWait, stamp
from shadow import ShadowFileSystem
from simulated import SECTOR

from nbdclone.errors import NBDCloneError
from nbdclone.store import snapshots
from nbdclone.store.check import check_pool
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.finding import WRONG
from nbdclone.store.pool import Pool
from nbdclone.store.snapshots import take_snapshot

SECTORS = 64
SIZE = SECTORS * SECTOR
CAMPAIGNS = int(os.environ.get("POWERCUT_CAMPAIGNS", "3"))
FIRST_SEED = int(os.environ.get("POWERCUT_SEED", "0"))


class SmallLedger(Ledger):
    """The same for a small disk; and what is acknowledged at a moment."""

    def __init__(self) -> None:
        super().__init__()
        self._versions = {sector: [(0, stamp(0, sector))] for sector in range(SECTORS)}

    def acknowledged(self) -> Callable[[int], list[bytes]]:
        """From now on: what a sector may hold that holds all that is acknowledged now, or anything later."""
        last: dict[int, int] = {}
        for sector, versions in self._versions.items():
            last[sector] = max(number for number, _ in versions if number in self._finished)
        return lambda sector: [content for number, content in self._versions[sector] if number >= last[sector]]


def read(clone: Clone) -> list[bytes]:
    data = clone.pread(SIZE, 0)
    return [data[at : at + SECTOR] for at in range(0, SIZE, SECTOR)]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory where syncs cost nothing, if there is one."""
    parent = "/dev/shm" if os.path.ismount("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-", dir=parent) as path:
        yield Path(path)


class Life:
    """A seeded life of a clone, through several openings."""

    def __init__(self, memory: Path, seed: int, states_per_step: int = 2) -> None:
        self.states = 0
        self._seed = seed
        self._rng = random.Random(seed)
        self._states_per_step = states_per_step
        self._memory = memory / f"life{seed}"
        root = self._memory / "root"
        root.mkdir(parents=True)
        (root / "base.img").write_bytes(b"".join(stamp(0, sector) for sector in range(SECTORS)))
        pool = Pool.open(root / "pool", create=True)
        pool.import_base(root / "base.img", "base")
        pool.create_clones("base", ["web1"])
        self._fs = ShadowFileSystem(root)
        self._pool = Pool.open(root / "pool", fs=self._fs)
        self._ledger = SmallLedger()
        self._taken: dict[str, list[bytes]] = {}
        self._taking: tuple[str, Callable[[int], list[bytes]]] | None = None
        self._nested = False
        self._clone: Clone
        self._seen: set[bytes] = set()
        self._numbers = itertools.count()

    def run(self, openings: int = 2, operations: int = 8) -> None:
        """Raises LawBroken, with the seed in its message."""
        try:
            for _ in range(openings):
                with self._pool.open_clone("web1") as self._clone:
                    self._clone._changing = Turn()  # type: ignore[assignment]
                    self._fs.on_step = self._at_step
                    for _ in range(operations):
                        self._operate()
                    finished = self._ledger.begin_flush()
                self._ledger.finish_flush(finished)
                self._fs.on_step = lambda: None
                self._examine()
        except (LawBroken, NBDCloneError) as error:
            raise LawBroken(f"seed {self._seed}, state {self.states}, after {self._fs.syncs[-12:]}: {error}") from error

    def _operate(self) -> None:
        chance = self._rng.random()
        if chance < 0.55:
            self._write()
        elif chance < 0.75:
            self._flush()
        else:
            self._snapshot()

    def _write(self) -> None:
        first = self._rng.randrange(SECTORS)
        count = min(self._rng.choice([1, 3, 8, 8, 16]), SECTORS - first)
        if self._rng.random() < 0.4:  # a whole block
            first, count = first // 8 * 8, 8
        number = self._ledger._number + 1
        zero = self._rng.random() < 0.2
        data = bytes(count * SECTOR) if zero else b"".join(stamp(number, first + at) for at in range(count))
        begun = self._ledger.begin(first * SECTOR, data)
        if zero:
            self._clone.zero(first * SECTOR, len(data))
        else:
            self._clone.pwrite(data, first * SECTOR)
        self._ledger.finish(begun)

    def _flush(self) -> None:
        finished = self._ledger.begin_flush()
        self._clone.flush()
        self._ledger.finish_flush(finished)

    def _snapshot(self) -> None:
        name = f"web1@s{next(self._numbers)}"
        finished = self._ledger.begin_flush()
        self._clone.delta._flushing = Turn()  # type: ignore[assignment]
        self._taking = name, self._ledger.acknowledged()
        take_snapshot(self._pool.places, self._clone, name.partition("@")[2])
        taking, self._taking = self._taking, None
        with Pool.open(self._pool.path).open_clone(name) as snapshot:
            self._taken[name] = read(snapshot)
        for sector, content in enumerate(self._taken[name]):
            if content not in taking[1](sector):
                raise LawBroken(f"sector {sector} of {name} is not what was acknowledged when it was taken")
        self._ledger.finish_flush(finished)

    def _at_step(self) -> None:
        self._examine()
        if self._taking and not self._nested and self._rng.random() < 0.1:
            self._nested = True
            try:
                self._write()
            except WouldWait:  # the ledger has it as a write that is under way
                pass
            finally:
                self._nested = False

    def _examine(self) -> None:
        for _ in range(self._states_per_step):
            self.states += 1
            left = self._fs.tree.crash(self._rng)
            if (summary := left.summary() + repr((len(self._taken), self._ledger._number)).encode()) in self._seen:
                continue
            self._seen.add(summary)
            state = self._memory / "state"
            state.mkdir()
            try:
                left.write_to(state)
                self._require_lawful(Pool.open(state / "pool"))
            finally:
                shutil.rmtree(state)

    def _require_lawful(self, pool: Pool) -> None:
        names = set(pool.names()) - {"base", "web1"}
        under_way = {self._taking[0]} if self._taking else set()
        if not set(self._taken) <= names <= set(self._taken) | under_way:
            raise LawBroken(f"there are the snapshots {sorted(names)}, and should be {sorted(self._taken)}")
        if self._rng.random() < 0.1:
            wrong = [str(finding) for finding in check_pool(pool.path) if finding.level == WRONG]
            if [line for line in wrong if "fails its checksum" not in line]:  # of a page that was torn
                raise LawBroken(f"a check finds {wrong}")
        for name in names:
            with pool.open_clone(name) as snapshot:
                for sector, content in enumerate(read(snapshot)):
                    if name in self._taken:
                        allowed = [self._taken[name][sector]]
                    else:
                        assert self._taking
                        allowed = self._taking[1](sector)
                    if content not in allowed:
                        raise LawBroken(f"sector {sector} of {name} holds what it may not: {content[:24].hex()}")
        with pool.open_clone("web1") as clone:
            for sector, content in enumerate(read(clone)):
                self._ledger.check(sector, content)


def test_a_power_cut_with_snapshots_leaves_each_sector_of_each_as_it_may_be(memory: Path) -> None:
    states = 0
    for seed in range(FIRST_SEED, FIRST_SEED + CAMPAIGNS):
        life = Life(memory, seed)
        life.run()
        states += life.states
    print(f"states: {states}")  # pytest -rP shows it
    assert states > 100


def commit_without_settling(patch: pytest.MonkeyPatch) -> None:
    mutate(patch, Clone, "stack", "delta.settle_all()", "pass")


def layers_made_durable_after_the_commit(patch: pytest.MonkeyPatch) -> None:
    """The link, and the name of the snapshot: their directories are synced when the clone has its new delta already."""
    place = snapshots._place

    def late(places: Any, staging: Path, own: Path, layer_id: bytes, snapshot: str) -> None:
        sync = places.fs.sync_directory
        places.fs.sync_directory = lambda path: None
        try:
            place(places, staging, own, layer_id, snapshot)
        finally:
            del places.fs.sync_directory
        guard = Delta.guard

        def guarded(self: Delta, work: Callable[[], object]) -> None:
            guard(self, work)
            for directory in (places.path, places.layers, own / "snapshots"):
                sync(directory)
            patch.setattr(Delta, "guard", guard)

        patch.setattr(Delta, "guard", guarded)

    patch.setattr(snapshots, "_place", late)


def commit_not_synced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Delta, "guard", lambda self, work: None)


def new_delta_not_synced(patch: pytest.MonkeyPatch) -> None:
    create = Delta.create

    def unsynced(path: Path, header: Any, fs: Any) -> None:
        fs.datasync, fs.sync = (lambda fd: None), (lambda fd: None)
        try:
            create(path, header, fs)
        finally:
            del fs.datasync, fs.sync

    patch.setattr(Delta, "create", unsynced)


@pytest.mark.parametrize(
    "mutation",
    [commit_without_settling, layers_made_durable_after_the_commit, commit_not_synced, new_delta_not_synced],
    ids=lambda mutation: mutation.__name__.replace("_", " "),
)
def test_it_is_noticed_when(
    mutation: Callable[[pytest.MonkeyPatch], None], memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    with pytest.raises(LawBroken) as noticed:  # noqa: PT012
        for seed in range(30):
            Life(memory, seed, states_per_step=4).run()
    print(noticed.value)  # pytest -rP shows it
