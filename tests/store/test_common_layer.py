"""What several clones would each take over in a rebase is put once into a layer beneath them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from nbdclone.control.local import LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import InUse, UsageError
from nbdclone.store import common_layer, rebasing, standing
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.image import BaseRecord
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.merging import find_merges
from nbdclone.store.pool import Pool

BLOCKS = 256  # of each base
# The blocks in which 'old' has another content than 'new', and 'newer' another than 'new'.
UPDATED = range(10, 60)
UPDATED_AGAIN = range(50, 70)
NAMES = ["web1", "web2", "web3", "web4"]


def blocks(*parts: tuple[range, bytes], count: int = BLOCKS) -> bytes:
    content = bytearray(b"=" * BLOCK_SIZE * count)
    for where, what in parts:
        content[where.start * BLOCK_SIZE : where.stop * BLOCK_SIZE] = what * BLOCK_SIZE * len(where)
    return bytes(content)


OLD = blocks((UPDATED, b"o"), (range(20, 22), b"\0"))
NEW = blocks((UPDATED, b"n"))
NEWER = blocks((UPDATED, b"n"), (UPDATED_AGAIN, b"N"))


def import_image(pool: Pool, name: str, content: bytes) -> None:
    path = pool.path.parent / f"{name}.img"
    path.write_bytes(content)
    pool.import_base(path, name)


@pytest.fixture(name="herd")
def make_herd(empty_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Four clones of 'old', each of which has written a block of its own."""
    monkeypatch.setattr(common_layer, "WORTH", BLOCK_SIZE)
    for name, content in [("old", OLD), ("new", NEW), ("newer", NEWER)]:
        import_image(empty_pool, name, content)
    empty_pool.create_clones("old", NAMES)
    for number, name in enumerate(NAMES):
        write(empty_pool, name, name.encode() * 1024, 100 + number)
    return empty_pool


def write(pool: Pool, name: str, data: bytes, block: int) -> None:
    with pool.open_clone(name) as disk:
        disk.pwrite(data, block * BLOCK_SIZE)


def read(pool: Pool, *names: str) -> dict[str, bytes]:
    found = {}
    for name in names:
        with pool.open_clone(name) as disk:
            found[name] = disk.pread(disk.size, 0)
    return found


def run(pool: Pool, verb: str, **arguments: Any) -> dict[str, Any]:
    return drive(find_verb(verb).begin(LocalTarget(pool), arguments))


def rebase(pool: Pool, *names: str, onto: str = "new", **options: Any) -> dict[str, Any]:
    return run(pool, "rebase", names=list(names), onto=onto, **options)


def parents(pool: Pool, *names: str) -> set[bytes]:
    return {pool.places.header(pool.places.delta(name)).parent_id for name in names}


def base(pool: Pool, name: str) -> bytes:
    return BaseRecord.load(pool.places.bases / name / "base.json").id


def allocated(pool: Pool, name: str) -> int:
    return pool.places.delta(name).stat().st_blocks * 512


def require_clean(pool: Pool) -> None:
    assert is_clean(list(check_pool(pool.path, deep=True)))


def test_it_is_written_once_for_all_of_them_and_the_old_base_may_go(herd: Pool) -> None:
    before, sizes = read(herd, *NAMES), [allocated(herd, name) for name in NAMES]
    result = rebase(herd, *NAMES)
    assert [allocated(herd, name) for name in NAMES] == sizes
    assert [line["copied"] for line in result["clones"]] == [0] * 4
    (layer,) = herd.places.layer_ids()
    assert parents(herd, *NAMES) == {layer}
    taken = herd.places.layer(layer).stat().st_blocks * 512
    assert result["shared"] == taken
    assert taken < (len(UPDATED) - 2 + 8) * BLOCK_SIZE, "what were zeros takes no space"
    assert read(herd, *NAMES) == before
    herd.remove(["old"])
    assert read(herd, *NAMES) == before
    require_clean(herd)


def test_a_dry_run_says_so_and_changes_nothing(herd: Pool) -> None:
    files = {path: path.read_bytes() for path in herd.path.glob("*/*/*") if path.is_file()}
    result = rebase(herd, *NAMES, dry_run=True)
    assert result["shared"] == len(UPDATED) * BLOCK_SIZE
    assert [line["after"] for line in result["clones"]] == [line["before"] for line in result["clones"]]
    assert {path: path.read_bytes() for path in herd.path.glob("*/*/*") if path.is_file()} == files


def test_what_one_alone_lacks_it_takes_over_and_what_most_have_changed_is_no_part_of_it(herd: Pool) -> None:
    for name in NAMES[:3]:
        write(herd, name, NEW[12 * BLOCK_SIZE : 15 * BLOCK_SIZE], 12)  # as the new base has it
    for name in NAMES[:2]:
        write(herd, name, NEW[30 * BLOCK_SIZE : 31 * BLOCK_SIZE], 30)
    before = read(herd, *NAMES)
    result = rebase(herd, *NAMES)
    lines = result["clones"]
    assert [line["copied"] for line in lines] == [0, 0, BLOCK_SIZE, 4 * BLOCK_SIZE]
    assert [line["conflicts"] for line in lines] == [4 * BLOCK_SIZE] * 2 + [3 * BLOCK_SIZE, 0]
    assert [line["dropped"] for line in lines] == [4 * BLOCK_SIZE] * 2 + [3 * BLOCK_SIZE, 0]
    assert read(herd, *NAMES) == before
    require_clean(herd)


@pytest.mark.parametrize("worth", [True, False])
def test_it_is_made_if_it_saves_enough(herd: Pool, monkeypatch: pytest.MonkeyPatch, worth: bool) -> None:
    saved = (len(NAMES) - 1) * len(UPDATED) * BLOCK_SIZE
    monkeypatch.setattr(common_layer, "WORTH", saved if worth else saved + 1)
    rebase(herd, *NAMES)
    assert len(herd.places.layer_ids()) == worth
    assert rebase(herd, *NAMES, onto="newer")["shared"] == 0, "one layer, or less than that in each"


def test_one_of_them_goes_on_alone_and_the_layer_stays_for_the_others(herd: Pool) -> None:
    before = read(herd, *NAMES)
    rebase(herd, *NAMES)
    (line,) = rebase(herd, "web1", onto="newer")["clones"]
    assert line["copied"] == len(range(UPDATED.start, UPDATED_AGAIN.stop)) * BLOCK_SIZE
    assert parents(herd, "web1") == {base(herd, "newer")}
    assert len(herd.places.layer_ids()) == 1
    assert read(herd, *NAMES) == before
    for name in ("web2", "web3"):
        rebase(herd, name, onto="newer")
    run(herd, "merge")
    assert herd.places.layer_ids() == [], "it had one clone left, and became a part of that"
    assert parents(herd, "web4") == {base(herd, "new")}
    assert read(herd, *NAMES) == before
    require_clean(herd)


def test_some_of_them_go_on_together_with_a_layer_of_their_own(herd: Pool) -> None:
    before = read(herd, *NAMES)
    rebase(herd, *NAMES)
    assert rebase(herd, "web1", "web2", onto="newer")["shared"] > 0
    assert len(herd.places.layer_ids()) == 2
    assert read(herd, *NAMES) == before
    rebase(herd, "web3", "web4", onto="newer")
    herd.remove(["old", "new"])
    assert len(herd.places.layer_ids()) == 2, "that of the first two, and that of the others, which went along"
    assert read(herd, *NAMES) == before
    require_clean(herd)


def test_clones_with_snapshots_stand_on_it_too(herd: Pool) -> None:
    for name in NAMES[:2]:
        herd.snapshot(f"{name}@one")
        write(herd, name, b"later" * 100, 40)
        herd.snapshot(f"{name}@two")
    names = [*NAMES, "web1@one", "web2@two"]
    before = read(herd, *names)
    rebase(herd, *NAMES)
    assert read(herd, *names) == before
    herd.remove(["old"])
    rebase(herd, "web1", onto="newer")
    assert read(herd, *names) == before
    herd.rollback("web1@one")
    assert read(herd, "web1")["web1"] == before["web1@one"]
    require_clean(herd)


def test_more_than_can_stand_on_one_stand_on_several(herd: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common_layer, rebasing):
        monkeypatch.setattr(module, "MOST_MEMBERS", 3)
    herd.create_clones("old", ["web5", "web6", "web7"])
    names = [*NAMES, "web5", "web6", "web7"]
    before = read(herd, *names)
    rebase(herd, *names)
    assert len(herd.places.layer_ids()) == 2
    assert parents(herd, "web7") == {base(herd, "new")}
    assert read(herd, *names) == before


def test_it_makes_no_chain_too_long(herd: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        herd.snapshot(f"web1@s{number}")
    before = read(herd, *NAMES)
    monkeypatch.setattr(rebasing, "MAX_LAYERS", 6)
    rebase(herd, "web1", "web2")  # a base and five deltas
    lowest = herd.places.header(herd.places.layer(herd.places.snapshot("web1@s0").layer))
    assert lowest.parent_id == base(herd, "new")
    monkeypatch.setattr(rebasing, "MAX_LAYERS", 7)
    rebase(herd, "web1", "web2", onto="newer")
    assert len(herd.places.layer_ids()) == 4 + 1
    assert read(herd, *NAMES) == before


def test_what_a_hoisted_layer_has_behind_the_end_of_the_base_is_still_seen(herd: Pool) -> None:
    import_image(herd, "larger", NEW + bytes([9]) * BLOCK_SIZE * 64)
    herd.create_clones("old", ["big1", "big2", "big3"], size=(BLOCKS + 64) * BLOCK_SIZE)
    names = ["big1", "big2", "big3"]
    for name in names:
        write(herd, name, b"alike" * BLOCK_SIZE, BLOCKS + 10)
    before = read(herd, *names)
    run(herd, "hoist", base="old", min_clones=2)
    assert len(parents(herd, *names)) == 1
    rebase(herd, "big1", "big2", onto="larger")
    assert len(herd.places.layer_ids()) == 2
    assert read(herd, *names) == before


def test_what_rebased_clones_have_alike_is_hoisted_over_their_layer(herd: Pool) -> None:
    rebase(herd, *NAMES)
    (lower,) = herd.places.layer_ids()
    for name in NAMES:
        write(herd, name, b"update" * BLOCK_SIZE, 200)
    before = read(herd, *NAMES)
    planned = run(herd, "hoist", base="new", dry_run=True)
    done = run(herd, "hoist", base="new")
    assert done["clones"] == planned["clones"] == NAMES
    assert done["before"] > done["after"]
    (upper,) = parents(herd, *NAMES)
    assert herd.places.header(herd.places.layer(upper)).parent_id == lower
    assert read(herd, *NAMES) == before
    assert run(herd, "merge")["merged"] == 1
    assert herd.places.layer_ids() == [upper], "two layers that all of them stand on are one"
    assert read(herd, *NAMES) == before
    require_clean(herd)
    herd.reset("web1")
    assert read(herd, "web1")["web1"] == NEW
    herd.remove(["old", "web1", "web2", "web3"])
    run(herd, "merge")
    assert herd.places.layer_ids() == []
    assert read(herd, "web4")["web4"] == before["web4"]


def test_clones_of_a_snapshot_are_hoisted_over_it(herd: Pool) -> None:
    herd.snapshot("web1@golden")
    names = ["shop1", "shop2", "shop3"]
    herd.create_clones("web1@golden", names)
    for name in names:
        write(herd, name, b"update" * BLOCK_SIZE, 200)
    before = read(herd, *names)
    assert run(herd, "hoist", base="old")["clones"] == names, "web1 has its own alone"
    assert read(herd, *names) == before
    golden = herd.places.snapshot("web1@golden").layer
    (upper,) = parents(herd, *names)
    assert herd.places.header(herd.places.layer(upper)).parent_id == golden
    herd.reset("shop1")
    assert read(herd, "shop1")["shop1"] == read(herd, "web1@golden")["web1@golden"]
    require_clean(herd)


def test_who_was_made_from_a_layer_that_stays_behind_is_made_from_the_new_base(herd: Pool) -> None:
    herd.snapshot("web1@gone")
    herd.create_clones("web1@gone", ["other1", "other2"])
    herd.remove(["web1@gone"])
    before = read(herd, "web1", "other1", "other2")
    rebase(herd, "other1")
    assert read(herd, "web1", "other1", "other2") == before
    herd.reset("other1")
    assert read(herd, "other1")["other1"] == NEW
    herd.remove(["web1", "other2"])
    run(herd, "merge")
    herd.remove(["web2", "web3", "web4", "old"])


def test_changes_are_kept_of_all_that_stand_on_a_layer_or_of_none(herd: Pool) -> None:
    rebase(herd, *NAMES)
    before = read(herd, *NAMES)
    with pytest.raises(InUse, match="others stand on the same layer, which goes along: name all of them"):
        rebase(herd, "web1", onto="newer", keep_changes=True)
    assert read(herd, *NAMES) == before
    rebase(herd, *NAMES, onto="newer", keep_changes=True)
    expected = bytearray(before["web1"])
    expected[60 * BLOCK_SIZE : 70 * BLOCK_SIZE] = b"N" * BLOCK_SIZE * 10
    assert read(herd, "web1")["web1"] == expected


def test_a_clone_that_is_larger_than_its_layer_sees_nothing_of_a_new_base_behind_that(herd: Pool) -> None:
    larger = [blocks(count=BLOCKS + 64), blocks((range(BLOCKS, BLOCKS + 64), b"!"), count=BLOCKS + 64)]
    for number, content in enumerate(larger):
        import_image(herd, f"larger{number}", content)
    herd.create_clones("old", ["big1", "big2"], size=(BLOCKS + 64) * BLOCK_SIZE)
    rebase(herd, "big1", "big2")
    assert len(parents(herd, "big1", "big2")) == 1
    rebase(herd, "big1", "big2", onto="larger0", keep_changes=True)
    before = read(herd, "big1", "big2")
    assert before["big1"][BLOCKS * BLOCK_SIZE :] == bytes(64 * BLOCK_SIZE)
    rebase(herd, "big1", "big2", onto="larger1")
    assert read(herd, "big1", "big2") == before


@pytest.mark.parametrize("verb", ["rebase", "hoist"])
def test_nobody_merges_it_into_the_first_while_the_others_are_not_on_it(
    herd: Pool, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebasing, "AT_ONCE", 1)
    for name in NAMES:
        write(herd, name, b"alike" * BLOCK_SIZE, 120)
    before = read(herd, *NAMES)

    class Target(LocalTarget):
        def run(self, verb: str, arguments: Any) -> Iterator[tuple[int, int]]:
            result = yield from super().run(verb, arguments)
            if verb == "move-clone":
                done.append(bool(find_merges(herd.places)))
                assert run(herd, "merge")["merged"] == 0
            return result

    done: list[bool] = []
    arguments: dict[str, Any] = {"names": NAMES, "onto": "new"} if verb == "rebase" else {"base": "old"}
    drive(find_verb(verb).begin(Target(herd), arguments))
    assert len(done) == 4
    assert done[0], "it had one clone"
    assert len(parents(herd, *NAMES)) == 1
    assert len(herd.places.layer_ids()) == 1
    assert read(herd, *NAMES) == before
    assert run(herd, "merge")["left"] == []


def test_interrupted_after_any_step_it_can_be_done_again(herd: Pool) -> None:
    herd.snapshot("web1@one")
    before = read(herd, *NAMES)
    for last in itertools.count():
        steps = find_verb("rebase").begin(LocalTarget(herd), {"names": NAMES, "onto": "new"})
        try:
            for _ in range(last):
                next(steps)
        except StopIteration:
            break
        except UsageError as error:
            assert "already" in str(error)  # noqa: PT017
            break
        steps.close()
        assert read(herd, *NAMES) == before
        assert not list(herd.places.tmp.iterdir())
        run(herd, "merge")
        assert read(herd, *NAMES) == before
    assert last > 2
    herd.remove(["old"])
    assert read(herd, *NAMES) == before
    require_clean(herd)


def test_what_stays_is_what_others_stand_on(herd: Pool) -> None:
    rebase(herd, *NAMES)
    herd.snapshot("web1@one")
    new = rebasing.open_base(herd.places, "newer")
    (moved,) = standing.find_moved(herd.places, ["web1"], new)
    assert moved.layer == herd.places.snapshot("web1@one").layer
    assert moved.left == [layer for layer in herd.places.layer_ids() if layer != moved.layer]
    assert moved.depth == 2
    herd.snapshot("web1@two")
    herd.rollback("web1@one")
    assert standing.find_moved(herd.places, ["web1"], new)[0].depth == 3, "a snapshot has the longer chain"
    moved_alone, other = standing.find_moved(herd.places, ["web2", "web3"], new)
    assert (moved_alone.layer, other.layer) == (None, None)
    (together,) = standing.find_moved(herd.places, NAMES, new)
    assert (together.layer, together.left) == (moved.left[0], [])
    new.close()
