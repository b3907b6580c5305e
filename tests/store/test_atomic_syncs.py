"""Each sync of the verbs that move blocks, or change a header: needed, or named here with the reason why not.

A sync is left out, and the power is cut before every step that follows. The disks are so large that the two copies of a
page of the map differ in several sectors: both can be torn, where no sync comes between them. A sync of a file in which
nothing waits for it is passed over.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import NamedTuple

import pytest
from powercut import stamp
from shadow import ShadowFileSystem
from simulated import Directory, File, Tree
from test_atomic import copy

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import NBDCloneError
from nbdclone.store.delta_file import MAP_SLOTS, NO_PARENT, PAGE_SIZE, decode_map_page
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.merging import find_merges
from nbdclone.store.pool import Pool
from nbdclone.store.resizing import resize

STATES_PER_STEP = int(os.environ.get("SYNC_STATES_PER_STEP", "20"))
# Up to the next sync, which covers the same: there it is seen, in one state of a hundred or so.
STATES_AFTER_IGNORED = 20 * STATES_PER_STEP
SECTORS = BLOCK_SIZE // 512
# Its bit stands in another sector of the page than those of the first blocks.
FAR = 4000
SIZE = (FAR + 3) * BLOCK_SIZE
# The blocks of the base, which is small, and ends long before that.
BASE = range(6)
NEAR = len(BASE) * BLOCK_SIZE
# What is looked at: the rest holds nothing.
WINDOWS = [(0, NEAR), (FAR * BLOCK_SIZE, 3 * BLOCK_SIZE)]
# In the last block of the disk; and in a block of which there are others behind it.
WITHIN, SMALLER, LARGER = SIZE - 1024, 2 * BLOCK_SIZE - 512, SIZE + 5 * 512


def block(kind: int, number: int) -> bytes:
    return b"".join(stamp(kind, number * SECTORS + sector) for sector in range(SECTORS))


def content(**owned: tuple[int, ...]) -> bytes:
    """The windows of a disk that has these blocks from one who wrote ``a``, ``b``, ..., and the base's else."""
    whole = {number: block(0, number) for number in BASE} | {FAR + number: bytes(BLOCK_SIZE) for number in range(3)}
    for kind, (_, blocks) in enumerate(sorted(owned.items()), start=1):
        whole |= {number: block(kind, number) for number in blocks}
    return b"".join(whole.values())


FIRST = content(a=(0, FAR), b=())
NOW = content(a=(0, FAR), b=(1, FAR + 2))


def write(pool: Pool, name: str, kind: int, *blocks: int) -> None:
    with pool.open_clone(name) as clone:
        for number in blocks:
            clone.pwrite(block(kind, number), number * BLOCK_SIZE)


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as clone:
        return b"".join(
            clone.pread(min(length, max(clone.size - at, 0)), min(at, clone.size)) for at, length in WINDOWS
        )


class Verb(NamedTuple):
    """``prepare`` is done before, durably; ``look`` is given the pool of a state, and whether the verb had ended."""

    run: Callable[[Pool], object]
    look: Callable[[Pool, bool], None]
    prepare: Callable[[Pool], object] = lambda pool: None
    rots: bool = False  # it reads the same if the newer of the two copies of a page rots besides


def run(pool: Pool, verb: str, **arguments: object) -> None:
    drive(find_verb(verb).begin(LocalTarget(pool), arguments))


def require(pool: Pool, name: str, *expected: bytes) -> None:
    found = read(pool, name)
    right = any(found == each for each in expected)
    assert right, name


def flattened(pool: Pool, done: bool) -> None:
    require(pool, "web1", NOW)
    require(pool, "web1@first", FIRST)
    header = pool.places.header(pool.places.delta("web1"))
    assert not done or header.parent_id == NO_PARENT


def merged(pool: Pool, done: bool) -> None:
    require(pool, "web1", NOW)
    if "web1@second" in pool.names():
        require(pool, "web1@second", NOW)
    # A layer that was removed may be back, for nobody needs it.
    assert not done or len(find_merges(pool.places)) == 0


def same(pool: Pool, done: bool) -> None:
    require(pool, "web1", NOW)
    require(pool, "web1@first", FIRST)


def write_what_is_alike(pool: Pool) -> None:
    """As it is beneath: in the base, and in the layer, near and far."""
    write(pool, "web1", 0, 2)
    write(pool, "web1", 1, 0, FAR)


def reduced(size: int) -> Callable[[Pool, bool], None]:
    """What was cut off does not come back, in whatever way the disk grows again."""

    def look(pool: Pool, done: bool) -> None:
        kept = NOW[:size] if size < NEAR else NOW[: len(NOW) - (SIZE - size)]
        require(pool, "web1", kept, *([] if done else [NOW]))
        if pool.info("web1").size == size:
            resize(pool.places, "web1", SIZE)
            require(pool, "web1", kept.ljust(len(NOW), b"\0"))

    return look


def enlarged(pool: Pool, done: bool) -> None:
    require(pool, "web1", NOW)
    assert pool.info("web1").size in ([LARGER] if done else [SIZE, LARGER])


def filled(pool: Pool, done: bool) -> None:
    if done or "new" in pool.names():
        require(pool, "new", content(a=(0, FAR)))


def fill(pool: Pool) -> None:
    def write_all(clone: object) -> None:
        for number in (0, FAR):
            clone.pwrite(block(1, number), number * BLOCK_SIZE)  # type: ignore[attr-defined]

    pool.create_clones("base", ["new"], size=SIZE, fill=write_all)


def quota_twice(pool: Pool) -> None:
    for quota in (1 << 30, 1 << 31):
        pool.set_quota("web1", quota)


def limited(pool: Pool, done: bool) -> None:
    require(pool, "web1", NOW)
    assert pool.info("web1").quota in ([1 << 31] if done else [None, 1 << 30, 1 << 31])  # type: ignore[union-attr]


def second_snapshot(pool: Pool) -> None:
    pool.snapshot("web1@second")
    pool.remove(["web1@first"])


VERBS = {
    "flatten": Verb(lambda pool: run(pool, "flatten", name="web1"), flattened, rots=True),
    "compact": Verb(lambda pool: run(pool, "compact", name="web1"), same, write_what_is_alike, rots=True),
    "merge into a clone": Verb(
        lambda pool: run(pool, "merge"), merged, lambda pool: pool.remove(["web1@first"]), rots=True
    ),
    "merge into a layer": Verb(lambda pool: run(pool, "merge"), merged, second_snapshot, rots=True),
    "shrink": Verb(lambda pool: resize(pool.places, "web1", SMALLER), reduced(SMALLER)),
    "shrink within a block": Verb(lambda pool: resize(pool.places, "web1", WITHIN), reduced(WITHIN)),
    "grow": Verb(lambda pool: resize(pool.places, "web1", LARGER), enlarged),
    "create filled": Verb(fill, filled),
    "quota twice": Verb(quota_twice, limited),
}

HEADER_TWICE = {"write_header: delta #2": "the first copy is durable; the next change of the header relies on both"}
LAST = "the file's length, which is too much: the next to open it would cut it off again"
# Syncs that nothing needs here, and why.
SPARE: dict[str, dict[str, str]] = {
    "flatten": HEADER_TWICE,
    "compact": {"_flush: delta #2": "the holes of what nobody reads: if they are lost, the next time makes them"},
    "merge into a clone": HEADER_TWICE,
    "merge into a layer": HEADER_TWICE,
    "shrink": {"resize: delta": "the length: it is longer than that of the smaller disk already"}
    | HEADER_TWICE
    | {
        "cut_off: delta #2": "the second copy of the map, which says nothing but what is behind the end",
        "cut_off: delta #3": LAST,
    },
    "shrink within a block": HEADER_TWICE | {"cut_off: delta #2": LAST},
    "grow": HEADER_TWICE,
    "create filled": {
        "create: delta": "nobody sees it before it has its name, and until then it is synced",
        "_flush: delta": "the same: of the syncs before the name one is enough, the last",
    },
    "quota twice": {"write_header: delta #4": HEADER_TWICE["write_header: delta #2"]},
}


@pytest.fixture(scope="module", name="model")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model") / "root"
    root.mkdir()
    (root / "base.img").write_bytes(b"".join(block(0, number) for number in BASE))
    pool = Pool.open(root / "pool", create=True)
    pool.import_base(root / "base.img", "base")
    (root / "base.img").unlink()
    pool.create_clones("base", ["web1"], size=SIZE)
    write(pool, "web1", 1, 0, FAR)
    pool.snapshot("web1@first")
    write(pool, "web1", 2, 1, FAR + 2)
    return root


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory where syncs cost nothing, if there is one."""
    parent = "/dev/shm" if os.path.ismount("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="nbdclone-test-", dir=parent) as path:
        yield Path(path)


class TellingFileSystem(ShadowFileSystem):
    """Says of each sync who makes it, and of what; and whether anything was there to be synced."""

    def __init__(self, root: Path, ignored: Set[int] = frozenset()) -> None:
        super().__init__(root, ignored)
        self.told: list[str] = []
        self.idle: set[int] = set()

    def _sync(self, name: str) -> bool:
        frame = sys._getframe(1)
        while frame.f_code.co_name in ("datasync", "sync", "sync_directory", "_sync", "<lambda>"):
            assert frame.f_back
            frame = frame.f_back
        label = f"{frame.f_code.co_name}: {re.sub('[0-9a-f]{32}', 'ID', name)}"
        count = sum(told.partition(" #")[0] == label for told in self.told) + 1
        self.told.append(f"{label} #{count}" if count > 1 else label)
        return super()._sync(name)

    def datasync(self, fd: int) -> None:  # type: ignore[override]
        if not self._files[fd][1].pending:
            self.idle.add(len(self.told))
        super().datasync(fd)

    sync = datasync  # type: ignore[assignment]


def rot_a_copy(tree: Tree, rng: random.Random) -> None:
    """Of one delta, let the newer of the two copies of its first page rot, if both are whole; now and then of none."""
    found = [node for name in ("clones", "layers") for node in _deltas(tree.directory("pool").entries[name])]
    if not found or rng.random() < 0.2:
        return
    delta = rng.choice(sorted(found, key=lambda node: node.inode))
    pages = [delta.read(slot, PAGE_SIZE) for slot in MAP_SLOTS]
    read = [decode_map_page(page, 0, page[24:32]) for page in pages]
    if read[0] and read[1]:
        delta.write(MAP_SLOTS[read[1] > read[0]] + PAGE_SIZE // 2, b"rot")


def _deltas(directory: File | Directory) -> Iterator[File]:
    assert isinstance(directory, Directory)
    for child in directory.entries.values():
        assert isinstance(child, Directory)
        if isinstance(delta := child.entries.get("delta"), File):
            yield delta


def cut_power(root: Path, states: Path, verb: Verb, ignored: Set[int] = frozenset()) -> TellingFileSystem:
    """Do it, and look at states that a power cut before each step, and after the last, may leave.

    Where syncs are ``ignored``: not before the first of them, for up to there everything is as it is without.
    """
    rng = random.Random(int(os.environ.get("POWERCUT_SEED", "0")))
    fs = TellingFileSystem(root, ignored)
    seen: set[object] = set()

    def look(done: bool = False) -> None:
        if ignored and len(fs.syncs) <= min(ignored):
            return
        for _ in range(STATES_AFTER_IGNORED if len(fs.syncs) - 1 in ignored else STATES_PER_STEP):
            left = fs.tree.crash(rng)
            if verb.rots:
                rot_a_copy(left, rng)
            if (summary := (done, left.summary())) in seen:
                continue
            seen.add(summary)
            state = states / "state"
            state.mkdir()
            try:
                left.write_to(state)
                verb.look(Pool.open(state / "pool"), done)
            except (AssertionError, NBDCloneError, OSError) as error:
                raise AssertionError(f"after {fs.told}: {error!r}") from error
            finally:
                shutil.rmtree(state)

    fs.on_step = look
    verb.run(Pool.open(root / "pool", fs=fs))
    look(done=True)
    return fs


@pytest.mark.parametrize("name", VERBS)
def test_each_sync_is_needed_or_named_as_spare(
    model: Path, memory: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Who has a clone open is told beside the rest: it takes longer than all of that.
    monkeypatch.setattr("nbdclone.store.catalog.holders", dict)
    caplog.set_level(logging.ERROR, "nbdclone")  # of each page that was torn
    verb = VERBS[name]
    prepared = copy(model, memory / "prepared")
    verb.prepare(Pool.open(prepared / "pool"))
    (memory / "states").mkdir()
    numbers = itertools.count()

    def is_noticed(ignored: Set[int]) -> bool:
        root = copy(prepared, memory / f"root{next(numbers)}")
        try:
            cut_power(root, memory / "states", verb, ignored)
        except AssertionError as error:
            print(sorted(ignored), error)  # pytest -rP shows it
            return True
        finally:
            shutil.rmtree(root)
        return False

    fs = cut_power(copy(prepared, memory / "root"), memory / "states", verb)
    spare = [number for number in range(len(fs.syncs)) if number not in fs.idle and not is_noticed({number})]
    assert [fs.told[number] for number in spare] == list(SPARE[name])
    # Not one instead of the other: all of them at once.
    assert not is_noticed(set(spare))
