"""Disks of all sizes over bases of all sizes: what a disk had not when it was smaller never comes to light."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from powercut import stamp

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import UsageError
from nbdclone.store import common_layer
from nbdclone.store.catalog import CloneInfo
from nbdclone.store.check import check_pool
from nbdclone.store.finding import WRONG
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.resizing import resize

# Each larger than the one before, some within a block; and some that a clone can go to and fro between.
SIZES = [20_992, 32_768, 33_792, 49_152, 49_152, 33_792, 20_992, 20_992]
BASES = {f"base{number}": size for number, size in enumerate(SIZES)}
MOST = 60 * 1024
CLONES = 4


def padded(content: bytes, size: int) -> bytes:
    return content[:size].ljust(size, b"\0")


def run(pool: Pool, verb: str, **arguments: object) -> None:
    drive(find_verb(verb).begin(LocalTarget(pool), arguments))


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


@pytest.fixture(name="bases")
def make_bases(tmp_path: Path) -> Pool:
    pool = Pool.open(tmp_path / "pool", create=True)
    for number, (name, size) in enumerate(BASES.items()):
        path = tmp_path / f"{name}.img"
        # Each has some blocks of its own.
        own = random.Random(number).sample(range(MOST // BLOCK_SIZE), 4)
        sectors = range(size // 512)
        path.write_bytes(b"".join(stamp(number if sector // 8 in own else 99, sector) for sector in sectors))
        pool.import_base(path, name)
    return pool


class Life:
    """Random work on a pool, and what each name has to read as; ``origins``: as what a clone is after a reset."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self._pool = pool
        self._rng = random.Random(seed)
        self._numbers = iter(range(1000))
        self._bases = {name: read(pool, name) for name in BASES}
        self.clones: dict[str, bytes] = {}
        self.snapshots: dict[str, bytes] = {}
        self._origins: dict[str, str | bytes] = {}  # the name of a base, or a content

    def step(self) -> str:
        works = self._works()
        work = self._rng.choice(works if self.clones else [self._clone])
        work()
        return work.__name__

    def _works(self) -> list[Callable[[], None]]:
        works = [self._clone, self._resize, self._resize, self._write, self._snapshot, self._rebase, self._rebase]
        works += [self._reset, self._rollback, self._forget, self._flatten, self._hoist]
        return works

    def require(self, what: str) -> None:
        for name, content in (self.clones | self.snapshots).items():
            same = read(self._pool, name) == content
            assert same, (what, name)

    def _size(self) -> int:
        return 512 * self._rng.randrange(8, MOST // 512)

    def _some(self) -> str:
        return self._rng.choice(sorted(self.clones))

    def _clone(self) -> None:
        if len(self.clones) == CLONES:
            going = self._some()
            if any(name.startswith(f"{going}@") for name in self.snapshots):
                return
            self._pool.remove([going])
            del self.clones[going]
        source = self._rng.choice([*BASES, *self.snapshots, *self.snapshots])
        content = self._bases.get(source) or self.snapshots[source]
        name, size = f"web{next(self._numbers)}", self._rng.choice([len(content), self._size()])
        if size < len(content):
            with pytest.raises(UsageError, match="has at least its"):
                self._pool.create_clones(source, [name], size=size)
            return
        self._pool.create_clones(source, [name], size=size)
        self.clones[name] = padded(content, size)
        self._origins[name] = source if source in BASES else content

    def _resize(self) -> None:
        name, size = self._some(), self._size()
        resize(self._pool.places, name, size)
        self.clones[name] = padded(self.clones[name], size)

    def _write(self) -> None:
        name = self._some()
        content = bytearray(self.clones[name])
        at = self._rng.randrange(len(content))
        length = self._rng.randrange(min(len(content) - at, 9000) + 1)
        data = self._rng.choice([self._rng.randbytes(length), bytes(length)])
        with self._pool.open_clone(name) as disk:
            disk.pwrite(data, at)
        content[at : at + length] = data
        self.clones[name] = bytes(content)

    def _snapshot(self) -> None:
        name = self._some()
        snapshot = f"{name}@s{next(self._numbers)}"
        self._pool.snapshot(snapshot)
        self.snapshots[snapshot] = self.clones[name]

    def _onto(self, name: str) -> str | None:
        """The base of a clone."""
        info = self._pool.info(name)
        assert isinstance(info, CloneInfo)
        return info.base

    def _rebase(self) -> None:
        """Some onto a larger base, keeping the content; or, if there are no snapshots, the changes."""
        based = [name for name in self.clones if self._onto(name)]
        names = self._rng.sample(based, self._rng.randint(min(len(based), 2), len(based)))
        before = {name: self._onto(name) or "" for name in names}
        onto = self._rng.choice(list(BASES))
        keep_changes = not self.snapshots and self._rng.random() < 0.5
        fits = all(BASES[base] <= BASES[onto] for base in before.values())
        try:
            run(self._pool, "rebase", names=names, onto=onto, keep_changes=keep_changes)
        except UsageError as error:
            already = "already" in str(error) or not names
            refused = "name all of them" in str(error) and len(names) < len(based)
            if fits and not already and not refused:
                raise
            return
        assert fits
        for name in names:
            assert self._onto(name) == onto
            if self._origins[name] == before[name]:
                self._origins[name] = onto
            if keep_changes:
                self.clones[name] = read(self._pool, name)

    def _hoist(self) -> None:
        with contextlib.suppress(UsageError):  # there are no two
            run(self._pool, "hoist", base=self._rng.choice(list(BASES)), min_clones=2)

    def _reset(self) -> None:
        name = self._some()
        if (origin := self._origins[name]) and self._onto(name):
            content = self._bases[origin] if isinstance(origin, str) else origin
            self._pool.reset(name)
            self.clones[name] = padded(content, max(len(content), len(self.clones[name])))

    def _rollback(self) -> None:
        name = self._some()
        own = [snapshot for snapshot in self.snapshots if snapshot.startswith(f"{name}@")]
        if own and self._onto(name):
            snapshot = self._rng.choice(own)
            self._pool.rollback(snapshot)
            self.clones[name] = self.snapshots[snapshot]

    def _forget(self) -> None:
        """A snapshot that nobody was made from goes, and its layer is merged."""
        if self.snapshots:
            name = self._rng.choice(sorted(self.snapshots))
            if self.snapshots[name] not in self._origins.values():
                self._pool.remove([name])
                del self.snapshots[name]
                run(self._pool, "merge")

    def _flatten(self) -> None:
        name = self._some()
        if self._rng.random() < 0.2 and not any(each.startswith(f"{name}@") for each in self.snapshots):
            run(self._pool, "flatten", name=name)


class Herd(Life):
    """Clones of one base, with much alike, that go from base to base together and alone."""

    def _works(self) -> list[Callable[[], None]]:
        works = [self._rebase] * 6 + [self._update] * 2 + [self._clones, self._hoist, self._resize, self._reset]
        return works + ([self._snapshot, self._forget, self._rollback] if self._rng.random() < 0.4 else [self._merge])

    def _clone(self) -> None:
        self._clones()

    def _clones(self) -> None:
        if len(self.clones) < 8:
            base = self._rng.choice(list(BASES))
            names = [f"web{next(self._numbers)}" for _ in range(4)]
            self._pool.create_clones(base, names)
            self.clones |= dict.fromkeys(names, self._bases[base])
            self._origins |= dict.fromkeys(names, base)

    def _update(self) -> None:
        """Some are given the same at the same place."""
        data = bytes([self._rng.randrange(3)]) * BLOCK_SIZE * self._rng.randint(1, 3)
        at = BLOCK_SIZE * self._rng.randrange(MOST // BLOCK_SIZE)
        for name in self._rng.sample(sorted(self.clones), self._rng.randint(1, len(self.clones))):
            content = self.clones[name]
            with self._pool.open_clone(name) as disk:
                disk.pwrite(data[: max(len(content) - at, 0)], min(at, len(content)))
            self.clones[name] = (content[:at] + data + content[at + len(data) :])[: len(content)]

    def _merge(self) -> None:
        run(self._pool, "merge")


@pytest.mark.parametrize("kind", [Life, Herd])
@pytest.mark.parametrize("seed", range(int(os.environ.get("SIZES_SEEDS", "8"))))
def test_a_disk_of_any_size_over_bases_of_any_size_reads_as_the_model_does(
    bases: Pool, seed: int, kind: type[Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common_layer, "WORTH", BLOCK_SIZE)
    life = kind(bases, seed)
    done = []
    for _ in range(40):
        done.append(life.step())
        life.require(f"seed {seed}, after {done}")
    assert [finding for finding in check_pool(bases.path) if finding.level == WRONG] == []


def smaller_than_its_base(pool: Pool) -> bytes:
    """A snapshot web1@s of a disk that ends within a block of its base. Its content."""
    pool.create_clones("base0", ["web1"])
    run(pool, "rebase", names=["web1"], onto="base3", keep_changes=True)
    pool.snapshot("web1@s")
    content = read(pool, "web1@s")
    assert len(content) == BASES["base0"]
    return content


def test_a_clone_that_is_larger_than_its_snapshot_has_zeros_where_the_base_goes_on(bases: Pool) -> None:
    content = smaller_than_its_base(bases)
    bases.create_clones("web1@s", ["web2"], size=BASES["base3"])
    assert read(bases, "web2") == padded(content, BASES["base3"])
    resize(bases.places, "web2", MOST)
    assert read(bases, "web2") == padded(content, MOST)


def test_a_clone_that_is_reset_to_a_snapshot_has_zeros_where_the_base_goes_on(bases: Pool) -> None:
    content = smaller_than_its_base(bases)
    bases.create_clones("web1@s", ["web2"])
    resize(bases.places, "web2", MOST)
    assert read(bases, "web2") == padded(content, MOST)
    bases.reset("web2")
    assert read(bases, "web2") == padded(content, MOST)


@pytest.mark.parametrize("verb", ["flatten", "merge", "rebase", "promote"])
def test_a_disk_that_ends_within_a_block_of_its_base_never_shows_the_rest_of_it(bases: Pool, verb: str) -> None:
    content = smaller_than_its_base(bases)
    if verb == "flatten":
        run(bases, "flatten", name="web1")
    elif verb == "merge":
        bases.remove(["web1@s"])
        run(bases, "merge")
    elif verb == "rebase":
        path = bases.path.parent / "larger.img"
        path.write_bytes(bytes([7]) * MOST)
        bases.import_base(path, "larger")
        run(bases, "rebase", names=["web1"], onto="larger")
    else:
        run(bases, "promote", name="web1@s", new="new")
        bases.create_clones("new", ["web2"], size=MOST)
        assert read(bases, "web2") == padded(content, MOST)
    resize(bases.places, "web1", MOST)
    assert read(bases, "web1") == padded(content, MOST)
