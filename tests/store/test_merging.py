"""Removing a snapshot: its layer becomes a part of its only child, and nothing that is read changes."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_blocks import OpenTarget, read, run, run_on

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.store.delta_file import change_header
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.merging import find_merges
from nbdclone.store.pool import Pool


def change(pool: Pool, name: str, seed: object) -> None:
    rng = random.Random(str(seed))
    with pool.open_clone(name) as disk:
        for _ in range(12):
            disk.pwrite(rng.randbytes(rng.choice([100, 4096, 9000])), rng.randrange(disk.size - 9000))
        for _ in range(2):
            disk.zero(rng.randrange(disk.size // BLOCK_SIZE - 9) * BLOCK_SIZE, rng.randrange(1, 8) * BLOCK_SIZE)


@pytest.fixture(name="web1")
def make_web1(pool: Pool) -> Pool:
    """base <- a <- b <- c <- web1, and web2 over c."""
    pool.create_clones("base", ["web1"])
    for name in "abc":
        change(pool, "web1", name)
        pool.snapshot(f"web1@{name}")
    change(pool, "web1", "top")
    pool.create_clones("web1@c", ["web2"])
    change(pool, "web2", "web2")
    return pool


def contents(pool: Pool) -> dict[str, bytes]:
    return {name: read(pool, name) for name in pool.names()}


def layers(pool: Pool) -> int:
    return len(pool.places.layer_ids())


def depth(pool: Pool, name: str) -> int:
    with pool.open_clone(name) as disk:
        return len(disk.layers)


def test_a_layer_without_a_name_becomes_a_part_of_the_layer_above_it(web1: Pool) -> None:
    before = contents(web1)
    web1.remove(["web1@b"])
    assert layers(web1) == 3
    assert run(web1, "merge") == {"merged": 1, "left": [], "origins_lowered": []}
    assert layers(web1) == 2
    assert depth(web1, "web1") == 4
    del before["web1@b"]
    assert contents(web1) == before
    assert all(entry.error is None for entry in web1.entries())
    assert run(web1, "merge")["merged"] == 0


def test_a_layer_with_several_children_is_kept_until_one_is_left(web1: Pool) -> None:
    web1.remove(["web1@c"])
    before = contents(web1)
    assert find_merges(web1.places) == []
    web1.remove(["web2"])
    assert run(web1, "merge")["merged"] == 1
    del before["web2"]
    assert contents(web1) == before
    assert depth(web1, "web1") == 4


def test_all_layers_go_one_after_the_other(web1: Pool) -> None:
    before = {"base": read(web1, "base"), "web1": read(web1, "web1")}
    web1.remove(["web2", "web1@b", "web1@a", "web1@c"])
    assert run(web1, "merge")["merged"] == 3
    assert layers(web1) == 0
    assert depth(web1, "web1") == 2
    assert contents(web1) == before
    web1.reset("web1")
    assert read(web1, "web1") == before["base"]


def test_who_was_made_from_it_is_reset_to_what_was_beneath_it(web1: Pool) -> None:
    beneath = read(web1, "web1@b")
    web1.snapshot("web2@mine")
    change(web1, "web2", "again")
    web1.rollback("web1@b")
    web1.remove(["web1@c"])
    assert run(web1, "merge") == {"merged": 1, "left": [], "origins_lowered": ["web2"]}
    web1.reset("web2")
    assert read(web1, "web2") == beneath


@pytest.mark.parametrize("steps", [1, 2])
def test_a_merge_that_was_interrupted_is_found_and_finished(
    web1: Pool, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    before = contents(web1)
    monkeypatch.setattr("nbdclone.store.copying.STEP", BLOCK_SIZE)
    monkeypatch.setattr("nbdclone.store.copying.SPAN", BLOCK_SIZE)
    web1.remove(["web1@b"])
    del before["web1@b"]
    made = 0

    def stop(done: int, total: int) -> None:
        nonlocal made
        made += 1
        if made == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(web1, "merge", stop)
    assert contents(web1) == before
    assert layers(web1) == 3
    assert run(web1, "merge")["merged"] == 1
    assert contents(web1) == before
    assert layers(web1) == 2


def test_what_is_seen_of_a_parent_stays_what_it_was(web1: Pool) -> None:
    """Both the merged layer and the one above it see only a part of what is beneath them."""
    ids = [web1.places.snapshot(f"web1@{name}").layer for name in "bc"]
    for layer_id, overlap in zip(ids, (100 * BLOCK_SIZE, 150 * BLOCK_SIZE), strict=True):
        change_header(web1.places.layer(layer_id), overlap=overlap)
    before = contents(web1)
    web1.remove(["web1@b"])
    assert run(web1, "merge")["merged"] == 1
    assert web1.places.header(web1.places.layer(ids[1])).overlap == 100 * BLOCK_SIZE
    del before["web1@b"]
    assert contents(web1) == before


def test_a_clone_that_is_open_goes_on_while_what_is_beneath_it_is_merged(web1: Pool) -> None:
    with web1.open_clone("web2") as reader, web1.open_clone("web1") as disk:
        before = [reader.pread(reader.size // 2, 0), disk.pread(disk.size, 0)]
        web1.remove(["web1@b"])

        class Target(OpenTarget):
            def if_open(self, name: str) -> Any:
                return self.opened(name) if name == "web1" else LocalTarget.if_open(self, name)

        assert run_on(Target(web1, disk), "merge")["merged"] == 1
        assert len(disk.layers) == 4
        assert len(reader.layers) == 5, "it was not told, and reads on"
        assert layers(web1) == 3
        assert disk.pread(disk.size, 0) == before[1]
        assert reader.pread(reader.size // 2, 0) == before[0]
    assert run(web1, "merge")["merged"] == 0
    assert layers(web1) == 2


def test_a_layer_that_gains_blocks_has_no_quota_and_keeps_the_one_it_had(web1: Pool) -> None:
    path = web1.places.layer(web1.places.snapshot("web1@c").layer)
    change_header(path, quota=BLOCK_SIZE)
    web1.remove(["web1@b"])
    assert run(web1, "merge")["merged"] == 1
    assert web1.places.header(path).quota == BLOCK_SIZE


def test_a_merge_beyond_the_quota_is_left_and_told(web1: Pool) -> None:
    web1.remove(["web2"])
    web1.set_quota("web1", BLOCK_SIZE)
    before = contents(web1)
    web1.remove(["web1@c"])
    (left,) = run(web1, "merge")["left"]
    assert "nothing was done; raise its quota first" in left["why"]
    del before["web1@c"]
    assert contents(web1) == before
    web1.set_quota("web1", None)
    assert run(web1, "merge")["merged"] == 1
    assert contents(web1) == before


def test_two_do_not_merge_the_same_layer(web1: Pool) -> None:
    web1.remove(["web1@b"])
    steps = find_verb("merge").begin(LocalTarget(web1), {})
    next(steps)
    (left,) = run(web1, "merge")["left"]
    assert "in use by this process" in left["why"]
    drive(steps)
    assert layers(web1) == 2


def test_a_random_life_of_snapshots_and_removals_reads_as_before(pool: Pool) -> None:
    rng = random.Random(3)
    pool.create_clones("base", ["c0"])
    expected = {"c0": read(pool, "c0")}
    for number in range(60):
        clones = [name for name in expected if "@" not in name]
        snapshots = [name for name in expected if "@" in name]
        name, kind = rng.choice(clones), rng.random()
        if kind < 0.35:
            pool.snapshot(f"{name}@s{number}")
            change(pool, name, number)
            expected[f"{name}@s{number}"] = expected[name]
            expected[name] = read(pool, name)
        elif kind < 0.5 and snapshots:
            source = rng.choice(snapshots)
            pool.create_clones(source, [f"c{number}"])
            expected[f"c{number}"] = expected[source]
        elif kind < 0.6 and snapshots:
            source = rng.choice(snapshots)
            pool.rollback(source)
            expected[source.split("@")[0]] = expected[source]
        elif kind < 0.65:
            run(pool, "flatten", name=name)
        elif kind < 0.7:
            run(pool, "compact", name=name)
        elif snapshots:
            gone = rng.choice(snapshots)
            pool.remove([gone])
            del expected[gone]
            assert run(pool, "merge")["left"] == []
        for name in rng.sample(sorted(expected), min(4, len(expected))):
            assert read(pool, name) == expected[name], (number, name)
    assert {name: read(pool, name) for name in expected} == expected
    assert all(entry.error is None for entry in pool.entries())
