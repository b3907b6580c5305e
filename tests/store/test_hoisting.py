"""Hoisting: what many clones have alike is kept once, and each reads what it read before."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import NotFound, UsageError
from nbdclone.store import hoisting
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool

NAMES = ["web1", "web2", "web3", "web4"]
PACKAGE = random.Random(1).randbytes(60 * BLOCK_SIZE)


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


def hoist(pool: Pool, base: str = "base", **options: Any) -> dict[str, Any]:
    result: dict[str, Any] = drive(find_verb("hoist").begin(LocalTarget(pool), {"base": base, **options}))
    return result


def allocated(pool: Pool) -> int:
    return sum(path.stat().st_blocks * 512 for path in pool.path.glob("*/*/delta"))


@pytest.fixture(name="alike")
def make_alike(pool: Pool) -> Pool:
    """Four clones: three have the same package, one of them with another block in it, and each something of its own."""
    pool.create_clones("base", NAMES, size=2 << 20)
    for number, name in enumerate(NAMES):
        with pool.open_clone(name) as disk:
            if name != "web4":
                disk.pwrite(PACKAGE, 10 * BLOCK_SIZE)
            disk.pwrite(name.encode() * 1024, (100 + number) * BLOCK_SIZE)
            disk.pwrite(f"{name} behind the base".encode() * 300, 300 * BLOCK_SIZE)
    with pool.open_clone("web3") as disk:
        disk.pwrite(b"other", 12 * BLOCK_SIZE)
        disk.zero(14 * BLOCK_SIZE, BLOCK_SIZE)
    return pool


def test_what_clones_have_alike_is_there_once_and_all_read_as_before(alike: Pool) -> None:
    before = {name: read(alike, name) for name in NAMES}
    space = allocated(alike)
    result = hoist(alike)
    assert result["clones"] == ["web1", "web2", "web3"]
    assert (result["before"], result["after"]) == (space, allocated(alike))
    assert space - result["after"] > (3 - 1) * len(PACKAGE) - (1 << 16)
    assert {name: read(alike, name) for name in NAMES} == before
    assert [alike.info(name).error for name in NAMES] == [None] * 4
    assert {getattr(alike.info(name), "base", None) for name in NAMES} == {"base"}


def test_what_is_alike_behind_the_end_of_the_base_is_there_once_too(pool: Pool) -> None:
    sizes = {"web1": 4 << 20, "web2": (2 << 20) + 3 * 512, "web3": 3 << 20}  # of web2 the last block is a part of one
    for name, size in sizes.items():
        pool.create_clones("base", [name], size=size)
        with pool.open_clone(name) as disk:
            disk.pwrite(PACKAGE, 400 * BLOCK_SIZE)
            if name != "web2":
                disk.pwrite(PACKAGE, 500 * BLOCK_SIZE)  # web2 ends within it
            else:
                disk.pwrite(PACKAGE[: size - 500 * BLOCK_SIZE], 500 * BLOCK_SIZE)
    before, space = {name: read(pool, name) for name in sizes}, allocated(pool)
    result = hoist(pool, min_clones=2)
    assert result["clones"] == ["web1", "web2", "web3"]
    assert result["layer"] >= 2 * len(PACKAGE)
    assert space - allocated(pool) > len(PACKAGE) * 2
    assert {name: read(pool, name) for name in sizes} == before
    drive(find_verb("resize").begin(LocalTarget(pool), {"name": "web2", "size": 4 << 20}))
    assert read(pool, "web2") == before["web2"] + bytes((4 << 20) - sizes["web2"])  # nothing of the layer's
    assert is_clean(list(check_pool(pool.path, deep=True)))


def test_a_dry_run_says_it_and_changes_nothing(alike: Pool) -> None:
    files = {path: path.read_bytes() for path in alike.path.glob("*/*/delta")}
    said = hoist(alike, dry_run=True)
    assert {path: path.read_bytes() for path in alike.path.glob("*/*/delta")} == files
    done = hoist(alike)
    assert said["clones"] == done["clones"]
    assert abs(said["after"] - done["after"]) < 1 << 16


def test_clones_that_were_hoisted_are_reset_to_the_base_and_removed_as_ever(alike: Pool, content: bytes) -> None:
    hoist(alike)
    alike.reset("web1")
    assert read(alike, "web1") == content + bytes(1 << 20)
    alike.remove(["web2", "web3"])
    assert not list(alike.path.glob("layers/*/delta"))
    assert hoist(alike)["clones"] == []


def test_what_too_few_have_alike_stays_where_it_is(alike: Pool) -> None:
    files = {path: path.read_bytes() for path in alike.path.glob("*/*/delta")}
    assert hoist(alike, min_clones=4)["clones"] == []
    assert {path: path.read_bytes() for path in alike.path.glob("*/*/delta")} == files


def test_many_clones_are_looked_at_in_narrow_windows(alike: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = hoist(alike, dry_run=True)
    monkeypatch.setattr(hoisting, "MAX_HASHES", 4)
    assert hoist(alike, dry_run=True) == wide


def test_interrupted_after_any_step_it_can_be_done_again(alike: Pool) -> None:
    before = {name: read(alike, name) for name in NAMES}
    for last in itertools.count(step=2):
        steps = find_verb("hoist").begin(LocalTarget(alike), {"base": "base"})
        try:
            for _ in range(last):
                next(steps)
        except StopIteration:
            break
        except UsageError as error:  # all but one are on a layer
            assert "nothing is shared" in str(error)  # noqa: PT017
            break
        steps.close()
        assert {name: read(alike, name) for name in NAMES} == before
    alike.create_clones("base", ["next"])
    alike.remove(["next"])  # and with it layers that nobody stands on
    assert {name: read(alike, name) for name in NAMES} == before


@pytest.mark.parametrize(
    ("base", "options", "error", "message"),
    [
        ("web1", {}, UsageError, "'web1' is no base"),
        ("nothing", {}, NotFound, "there is no base 'nothing'"),
        ("base", {"min_clones": 1}, UsageError, "2 or more"),
    ],
)
def test_what_cannot_be_is_refused(
    alike: Pool, base: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        hoist(alike, base, **options)
    assert message in str(caught.value)


def test_a_base_with_one_clone_shares_nothing(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    with pytest.raises(UsageError, match="nothing is shared"):
        hoist(pool)
