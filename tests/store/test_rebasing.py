"""Rebase: clones go to another base, and read what they read before; or with what they changed alone."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdclone.control.local import LocalOpened, LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import InUse, NBDCloneError, NotFound, StorageError, UsageError
from nbdclone.store import block_sets, difference
from nbdclone.store.catalog import CloneInfo
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.clone import Clone
from nbdclone.store.image import CHUNK_SIZE, Image
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.moving import Move, growing
from nbdclone.store.pool import Pool
from nbdclone.store.snapshots import take_snapshot

BASE_SIZE = 1 << 20  # of the base that the fixtures make


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


def write(pool: Pool, name: str, data: bytes, offset: int) -> None:
    with pool.open_clone(name) as disk:
        disk.pwrite(data, offset)


def rebase(pool: Pool, *names: str, onto: str = "new", **options: Any) -> dict[str, dict[str, Any]]:
    """The reports by name."""
    arguments = {"names": list(names), "onto": onto, **options}
    result = drive(find_verb("rebase").begin(LocalTarget(pool), arguments))
    assert [line["name"] for line in result["clones"]] == list(dict.fromkeys(names))
    return {line["name"]: line for line in result["clones"]}


def parent(pool: Pool, name: str) -> str | None:
    info = pool.info(name)
    assert isinstance(info, CloneInfo)
    return info.base


def update_of(content: bytes) -> bytes:
    """Of blocks 3, 4, 5, 40 and the last another content; 8 has become zeros; and it is larger."""
    new = bytearray(content)
    for block in (3, 4, 5, 40, BASE_SIZE // BLOCK_SIZE - 1):
        new[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = bytes([block]) * BLOCK_SIZE
    new[8 * BLOCK_SIZE : 9 * BLOCK_SIZE] = bytes(BLOCK_SIZE)
    return bytes(new) + b"behind the end" * 1024


DIFFERENT = 6 * BLOCK_SIZE


def import_image(pool: Pool, name: str, content: bytes) -> None:
    path = pool.path.parent / f"{name}.img"
    path.write_bytes(content + bytes(-len(content) % 512))
    pool.import_base(path, name)


@pytest.fixture(name="bases")
def make_bases(pool: Pool, content: bytes) -> Pool:
    """A pool with 'base' and an update of it, 'new', and two clones of 'base': web1 was written, web2 was not."""
    import_image(pool, "new", update_of(content))
    pool.create_clones("base", ["web1", "web2"])
    write(pool, "web1", b"mine" * 1024, 4 * BLOCK_SIZE)
    write(pool, "web1", b"also mine", 100 * BLOCK_SIZE + 17)
    return pool


def test_what_a_clone_reads_stays_the_same_and_the_old_base_may_go(bases: Pool) -> None:
    before = {name: read(bases, name) for name in ("web1", "web2")}
    reports = rebase(bases, "web1", "web2")
    assert {name: read(bases, name) for name in before} == before
    assert (reports["web1"]["state"], reports["web2"]["state"]) == ("done", "done")
    assert (reports["web1"]["copied"], reports["web1"]["conflicts"]) == (DIFFERENT - BLOCK_SIZE, BLOCK_SIZE)
    assert (reports["web2"]["copied"], reports["web2"]["conflicts"]) == (DIFFERENT, 0)
    assert parent(bases, "web1") == parent(bases, "web2") == "new"
    bases.remove(["base"])
    assert {name: read(bases, name) for name in before} == before


def test_blocks_that_neither_changed_are_read_from_the_new_base(bases: Pool) -> None:
    rebase(bases, "web2")
    with bases.open_clone("web2") as disk:
        assert disk.reads_base(0, 3 * BLOCK_SIZE)
        assert not disk.reads_base(3 * BLOCK_SIZE, 3 * BLOCK_SIZE)
        assert disk.reads_base(6 * BLOCK_SIZE, 2 * BLOCK_SIZE)


def test_a_larger_clone_does_not_see_what_the_new_base_has_behind_the_end_of_the_old(
    pool: Pool, content: bytes
) -> None:
    import_image(pool, "new", update_of(content))
    pool.create_clones("base", ["web1"], size=4 << 20)
    rebase(pool, "web1")
    assert read(pool, "web1") == content + bytes((4 << 20) - len(content))
    import_image(pool, "newer", update_of(content) + b"more" * 4096)
    rebase(pool, "web1", onto="newer")
    assert read(pool, "web1") == content + bytes((4 << 20) - len(content))


def test_a_base_that_ends_within_a_block_is_compared_with_zeros_behind_it(pool: Pool) -> None:
    import_image(pool, "odd", b"o" * (3 * BLOCK_SIZE + 512))
    import_image(pool, "even", b"o" * (4 * BLOCK_SIZE))
    pool.create_clones("odd", ["web1"], size=5 * BLOCK_SIZE)
    assert rebase(pool, "web1", onto="even")["web1"]["copied"] == BLOCK_SIZE
    assert read(pool, "web1") == b"o" * (3 * BLOCK_SIZE + 512) + bytes(2 * BLOCK_SIZE - 512)


def test_holes_of_the_old_base_that_are_data_in_the_new_one_stay_zeros(pool: Pool) -> None:
    import_image(pool, "empty", bytes(1 << 20))
    import_image(pool, "full", b"f" * (1 << 20))
    pool.create_clones("empty", ["web1"])
    report = rebase(pool, "web1", onto="full")["web1"]
    assert read(pool, "web1") == bytes(1 << 20)
    assert report["after"] - report["before"] <= 1 << 16, "zeros take no space"


def test_what_a_clone_was_made_from_is_the_new_base_from_now_on(bases: Pool, content: bytes) -> None:
    bases.snapshot("web1@golden")  # its delta says since then what it was made from
    rebase(bases, "web1")
    bases.remove(["web2", "base"])
    bases.reset("web1")
    assert read(bases, "web1")[:BASE_SIZE] == update_of(content)[:BASE_SIZE]


def test_a_clone_that_went_back_to_a_snapshot_on_the_old_base_can_be_reset_to_the_new_one(
    bases: Pool, content: bytes
) -> None:
    bases.snapshot("web1@golden")
    golden = read(bases, "web1")
    bases.reset("web1")
    rebase(bases, "web1")
    bases.rollback("web1@golden")
    assert read(bases, "web1") == golden
    bases.reset("web1")
    assert read(bases, "web1")[:BASE_SIZE] == update_of(content)[:BASE_SIZE]


def test_clones_of_several_bases_go_together(bases: Pool, content: bytes) -> None:
    import_image(bases, "other", b"x" * BLOCK_SIZE + content[BLOCK_SIZE:])
    bases.create_clones("other", ["web3"])
    before = {name: read(bases, name) for name in ("web1", "web3")}
    reports = rebase(bases, "web3", "web1")
    assert reports["web3"]["copied"] == DIFFERENT + BLOCK_SIZE
    assert {name: read(bases, name) for name in before} == before


def test_what_a_clone_changed_as_the_new_base_did_is_given_back(bases: Pool, content: bytes) -> None:
    update = update_of(content)
    write(bases, "web2", update[2 * BLOCK_SIZE : 9 * BLOCK_SIZE], 2 * BLOCK_SIZE)
    before = read(bases, "web2")
    report = rebase(bases, "web2")["web2"]
    assert (report["conflicts"], report["dropped"]) == (4 * BLOCK_SIZE, 3 * BLOCK_SIZE)
    # The fourth is a hole in the delta, and stays one.
    assert report["after"] == report["before"] + report["copied"] - report["dropped"]
    assert read(bases, "web2") == before


def test_those_that_are_there_already_are_passed_over(bases: Pool) -> None:
    rebase(bases, "web1")
    reports = rebase(bases, "web1", "web2")
    assert (reports["web1"]["state"], reports["web2"]["state"]) == ("already", "done")


@pytest.mark.parametrize("keep_changes", [False, True])
def test_a_dry_run_says_what_it_takes_and_changes_nothing(bases: Pool, keep_changes: bool) -> None:
    if not keep_changes:
        bases.snapshot("web2@golden")
    files = {path: path.read_bytes() for path in bases.path.glob("*/*/delta")}
    reports = rebase(bases, "web1", "web2", dry_run=True, keep_changes=keep_changes)
    assert {path: path.read_bytes() for path in bases.path.glob("*/*/delta")} == files
    assert reports["web1"]["state"] == reports["web2"]["state"] == "dry run"
    assert reports["web1"]["conflicts"] == BLOCK_SIZE
    assert reports["web1"]["copied"] == (0 if keep_changes else DIFFERENT - BLOCK_SIZE)
    assert reports["web1"]["after"] - reports["web1"]["before"] == reports["web1"]["copied"]


# With snapshots


def test_a_clone_with_snapshots_goes_along_with_them(bases: Pool) -> None:
    bases.snapshot("web1@one")
    write(bases, "web1", b"later", 5 * BLOCK_SIZE)
    bases.snapshot("web1@two")
    write(bases, "web1", b"latest", 40 * BLOCK_SIZE)
    bases.create_clones("web1@one", ["web3"])
    names = ("web1", "web1@one", "web1@two", "web3")
    before = {name: read(bases, name) for name in names}
    reports = rebase(bases, "web1", "web3", "web2")
    assert reports["web1"]["layer"] == reports["web3"]["layer"]
    assert reports["web1"]["copied"] == DIFFERENT - BLOCK_SIZE
    assert {name: read(bases, name) for name in names} == before
    bases.remove(["base"])
    assert {name: read(bases, name) for name in names} == before
    fingerprint = bases.places.header(bases.places.delta("web2")).fingerprint
    for path in bases.path.glob("*/*/delta"):
        assert bases.places.header(path).fingerprint == fingerprint


@pytest.mark.parametrize("way", ["a clone of it", "a clone that went back", "a snapshot of a clone of it"])
@pytest.mark.parametrize("options", [{}, {"keep_changes": True}, {"dry_run": True}], ids=str)
def test_it_is_refused_while_others_stand_on_the_same_snapshot(bases: Pool, way: str, options: dict[str, bool]) -> None:
    bases.snapshot("web1@golden")
    bases.create_clones("web1@golden", ["web3"])
    if way != "a clone of it":
        bases.snapshot("web3@mine")
    if way == "a clone that went back":
        bases.rollback("web3@mine")
    files = {path: path.read_bytes() for path in bases.path.glob("*/*/delta")}
    with pytest.raises(InUse, match=r"'web1' and 'web3' stand on the same snapshot.*name all of them"):
        rebase(bases, "web1", "web2", **options)
    assert {path: path.read_bytes() for path in bases.path.glob("*/*/delta")} == files


def test_a_snapshot_that_is_being_read_goes_on_while_its_layer_is_moved(bases: Pool) -> None:
    bases.snapshot("web1@golden")
    before = read(bases, "web1@golden")
    with bases.open_clone("web1@golden") as snapshot:
        half = snapshot.pread(BASE_SIZE // 2, 0)
        rebase(bases, "web1")
        assert half + snapshot.pread(BASE_SIZE // 2, BASE_SIZE // 2) == before
        # Who comes now, in the same process, stands on the new base: the layer's file is open already.
        bases.create_clones("web1@golden", ["web4"])
        assert read(bases, "web4") == before
        assert read(bases, "web1") == before
        with bases.open_clone("web4") as disk:
            assert isinstance(disk.layers[0], Image)
            assert disk.layers[0].name == "new"
        assert snapshot.pread(BASE_SIZE, 0) == before


def test_a_deep_check_finds_nothing_wrong_with_a_layer_that_was_moved(bases: Pool) -> None:
    bases.snapshot("web1@golden")
    for _ in range(2):  # the first writes down what the layer hashes to
        assert is_clean(list(check_pool(bases.path, deep=True)))
    rebase(bases, "web1")
    for _ in range(2):
        assert is_clean(list(check_pool(bases.path, deep=True)))


def test_a_layer_is_given_blocks_by_one_at_a_time(bases: Pool) -> None:
    bases.snapshot("web1@golden")
    layer = bases.places.snapshot("web1@golden").layer
    with growing(bases.places, layer), pytest.raises(InUse, match=f"layer {layer.hex()} is in use"):
        rebase(bases, "web1")
    rebase(bases, "web1")


# Keeping the changes


def test_the_blocks_that_a_clone_changed_stay_and_the_others_are_the_new_bases(bases: Pool, content: bytes) -> None:
    rebase(bases, "web1", keep_changes=True)
    expected = bytearray(update_of(content)[:BASE_SIZE])
    expected[4 * BLOCK_SIZE : 5 * BLOCK_SIZE] = b"mine" * 1024
    expected[100 * BLOCK_SIZE + 17 : 100 * BLOCK_SIZE + 26] = b"also mine"
    assert read(bases, "web1") == expected


def test_changes_are_not_kept_where_a_snapshot_would_change(bases: Pool) -> None:
    bases.snapshot("web2@golden")
    before = {name: read(bases, name) for name in ("web1", "web2", "web2@golden")}
    with pytest.raises(UsageError, match="snapshot 'web2@golden' would change with it"):
        rebase(bases, "web1", "web2", keep_changes=True)
    assert {name: read(bases, name) for name in before} == before


@pytest.mark.parametrize("opened", ["web1", "web2"])
def test_changes_are_not_kept_while_somebody_has_a_clone_open(bases: Pool, opened: str) -> None:
    before = {name: read(bases, name) for name in ("web1", "web2")}
    with bases.open_clone(opened), pytest.raises(InUse, match=r"is in use by"):
        rebase(bases, "web1", "web2", keep_changes=True)
    assert {name: read(bases, name) for name in before} == before
    assert parent(bases, "web1") == parent(bases, "web2") == "base"


# What is refused


@pytest.mark.parametrize("keep_changes", [False, True])
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("names", "onto", "error", "message"),
    [
        (["web1"], "base", UsageError, "'web1': on base 'base' already"),
        (["web1"], "small", UsageError, "base 'small' has 4096 bytes, less than the 1048576 of 'base'"),
        (["web1"], "web2", UsageError, "'web2' is no base: 'nbdclone promote web2 NEWBASE' makes one of it"),
        (["web1"], "web1", UsageError, "'web1' is no base: 'nbdclone promote"),
        (["web1"], "web2@golden", UsageError, "'web2@golden' is no base: 'nbdclone promote web2@golden NEWBASE'"),
        (["web1"], "/srv/pool/base", UsageError, "no base of this pool"),
        (["web1"], "nothing", NotFound, "there is no base 'nothing'"),
        (["web1", "nothing"], "new", NotFound, "there is no base or clone 'nothing'"),
        (["web1", "base"], "new", UsageError, "'base' is a base"),
        (["web2@golden"], "new", UsageError, "'web2@golden' is a snapshot"),
        ([], "new", UsageError, "no clone is named"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changed(
    bases: Pool, names: list[str], onto: str, error: type[Exception], message: str, keep_changes: bool, dry_run: bool
) -> None:
    import_image(bases, "small", b"s" * BLOCK_SIZE)
    bases.snapshot("web2@golden")
    files = {path: path.read_bytes() for path in bases.path.glob("*/*/delta")}
    with pytest.raises(error) as caught:
        rebase(bases, *names, onto=onto, keep_changes=keep_changes, dry_run=dry_run)
    assert message in str(caught.value)
    assert {path: path.read_bytes() for path in bases.path.glob("*/*/delta")} == files


def test_a_clone_whose_quota_is_too_small_is_refused_before_anything_is_copied(bases: Pool) -> None:
    allocated = bases.places.delta("web2").stat().st_blocks * 512
    bases.set_quota("web2", allocated + DIFFERENT - BLOCK_SIZE)
    with pytest.raises(UsageError, match=f"the move needs {DIFFERENT} more: give it a larger quota"):
        rebase(bases, "web2")
    assert parent(bases, "web2") == "base"
    bases.set_quota("web2", None)
    rebase(bases, "web2")


def test_a_snapshot_that_comes_in_the_midst_lets_it_end_with_nothing_changed(bases: Pool) -> None:
    before = read(bases, "web1")

    class Opened(LocalOpened):
        def flush(self) -> None:
            super().flush()
            take_snapshot(bases.places, self.clone, "golden")

    with bases.open_clone("web1") as disk:
        with pytest.raises(InUse, match="another verb changed what 'web1' stands on meanwhile: ask again"):
            drive(find_verb("rebase").begin(Shared(bases, disk, Opened(disk)), {"names": ["web1"], "onto": "new"}))
        assert disk.pread(BASE_SIZE, 0) == before
    assert read(bases, "web1") == read(bases, "web1@golden") == before
    rebase(bases, "web1")
    assert read(bases, "web1") == before


def test_blocks_that_were_taken_over_and_dropped_again_in_the_midst_end_it_with_nothing_changed(bases: Pool) -> None:
    before = read(bases, "web1")

    class Opened(LocalOpened):
        def flush(self) -> None:
            super().flush()
            assert self.clone.drop([(0, BASE_SIZE)]) == DIFFERENT - BLOCK_SIZE

    with bases.open_clone("web1") as disk:
        with pytest.raises(InUse, match="another verb changed what 'web1' stands on meanwhile"):
            drive(find_verb("rebase").begin(Shared(bases, disk, Opened(disk)), {"names": ["web1"], "onto": "new"}))
        assert disk.pread(BASE_SIZE, 0) == before
    rebase(bases, "web1")
    assert read(bases, "web1") == before


def test_nothing_is_dropped_between_the_new_header_and_the_new_chain(bases: Pool) -> None:
    before = read(bases, "web1")

    class Opened(LocalOpened):
        def change_here(self, step: Any) -> Any:
            assert self.clone.drop([(0, BASE_SIZE)]) == 0  # over the old base they are alike, over the new one not
            return super().change_here(step)

    with bases.open_clone("web1") as disk:
        drive(find_verb("rebase").begin(Shared(bases, disk, Opened(disk)), {"names": ["web1"], "onto": "new"}))
        assert disk.pread(BASE_SIZE, 0) == before
    assert read(bases, "web1") == before


# While it is in use, and interrupted


class Shared(LocalTarget):
    """A target where a clone is open already."""

    def __init__(self, pool: Pool, disk: Clone, opened: LocalOpened | None = None) -> None:
        super().__init__(pool)
        self._disk = disk
        self._opened = opened or LocalOpened(disk)

    @contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        assert name == self._disk.name
        yield self._opened


@pytest.mark.parametrize("snapshots", [False, True])
def test_a_clone_that_is_written_meanwhile_has_every_write_and_nothing_of_the_new_base(
    bases: Pool, content: bytes, snapshots: bool
) -> None:
    if snapshots:
        bases.snapshot("web2@golden")
    expected = bytearray(content)
    with bases.open_clone("web2") as disk:
        stop, wrong = threading.Event(), []

        def work() -> None:
            rng = random.Random(3)
            while not stop.is_set():
                offset, length = rng.randrange(BASE_SIZE - 9000), rng.randrange(1, 9000)
                data = rng.randbytes(length)
                disk.pwrite(data, offset)
                expected[offset : offset + length] = data
                at = rng.randrange(BASE_SIZE - 9000)
                if disk.pread(9000, at) != expected[at : at + 9000]:
                    wrong.append(at)

        writer = threading.Thread(target=work)
        writer.start()
        drive(find_verb("rebase").begin(Shared(bases, disk), {"names": ["web2"], "onto": "new"}))
        bases.remove(["web1", "base"])
        import_image(bases, "newer", content[::-1] + bytes(1 << 20))
        drive(find_verb("rebase").begin(Shared(bases, disk), {"names": ["web2"], "onto": "newer"}))
        stop.set()
        writer.join()
        assert not wrong
        assert disk.pread(BASE_SIZE, 0) == expected
        assert isinstance(disk.layers[0], Image)
        assert disk.layers[0].name == "newer"
    assert read(bases, "web2") == expected


@pytest.mark.parametrize(("verb", "arguments"), [("rebase", {"names": ["web2"], "onto": "new"}), ("flatten", {})])
def test_it_ends_when_those_have_ended_who_read_through_the_old_base(
    bases: Pool, verb: str, arguments: dict[str, Any]
) -> None:
    bases.remove(["web1"])
    with bases.open_clone("web2") as disk, contextlib.ExitStack() as reading:
        reading.enter_context(disk.holding())
        end = threading.Timer(0.2, reading.close)
        end.start()
        drive(find_verb(verb).begin(Shared(bases, disk), arguments or {"name": "web2"}))
        bases.remove(["base"])
        end.join()


@pytest.mark.parametrize("names", [["web1", "web2"], ["web1"]])
def test_interrupted_after_any_step_it_can_be_done_again(bases: Pool, names: list[str]) -> None:
    bases.snapshot("web2@golden")
    before = {name: read(bases, name) for name in ("web1", "web2", "web2@golden")}
    for last in itertools.count():
        steps = find_verb("rebase").begin(LocalTarget(bases), {"names": names, "onto": "new"})
        try:
            for _ in range(last):
                next(steps)
        except StopIteration:
            break
        except UsageError as error:
            assert "already" in str(error)  # noqa: PT017
            break
        steps.close()
        assert {name: read(bases, name) for name in before} == before
        assert not list(bases.places.tmp.iterdir())
    assert {name: read(bases, name) for name in before} == before
    bases.remove(["base"] if len(names) == 2 else ["base", "web2"])
    assert read(bases, "web1") == before["web1"]


def test_what_was_cut_off_after_its_layer_was_moved_is_done_by_the_next(bases: Pool) -> None:
    bases.snapshot("web1@golden")
    bases.create_clones("web1@golden", ["web3"])
    before = {name: read(bases, name) for name in ("web1", "web3")}

    class Broken(LocalTarget):
        def run(self, verb: str, arguments: Any) -> Any:
            if verb == "renew-clone":
                raise KeyboardInterrupt
            return super().run(verb, arguments)

    with pytest.raises(KeyboardInterrupt):
        drive(find_verb("rebase").begin(Broken(bases), {"names": ["web1", "web3"], "onto": "new"}))
    assert {name: read(bases, name) for name in before} == before
    rebase(bases, "web1", "web3")
    headers = [bases.places.header(bases.places.delta(name)) for name in before]
    new = bases.places.header(bases.places.layer(bases.places.snapshot("web1@golden").layer))
    assert [header.fingerprint for header in headers] == [new.fingerprint] * 2
    assert headers[0].origin == new.parent_id, "web1 was made from the base"
    assert headers[1].parent_id == new.id, "web3 was made from the snapshot"
    assert headers[1].origin == bytes(16)
    with pytest.raises(UsageError, match="already"):
        rebase(bases, "web1", "web3")


# The difference


def images(pool: Pool, old: bytes, new: bytes) -> tuple[Image, Image]:
    import_image(pool, "old", old)
    import_image(pool, "new", new)
    return tuple(Image.open(name, pool.places.bases / name) for name in ("old", "new"))  # type: ignore[return-value]


@pytest.mark.parametrize("manifests", [True, False])
def test_the_difference_of_two_bases_is_that_of_their_blocks(empty_pool: Pool, manifests: bool) -> None:
    rng = random.Random(5)
    size = 3 * CHUNK_SIZE + 5 * BLOCK_SIZE
    old = bytearray(rng.randbytes(CHUNK_SIZE) + bytes(CHUNK_SIZE) + rng.randbytes(size - 2 * CHUNK_SIZE))
    new = bytearray(old) + rng.randbytes(CHUNK_SIZE)
    blocks = {0, 17, 1023, 1024, 1500, 3071, 3076}
    for block in blocks:
        new[block * BLOCK_SIZE + 100] ^= 1
    one, other = images(empty_pool, bytes(old), bytes(new))
    if not manifests:
        (one.directory / "manifest").write_bytes(b"rotten" * 20)
    bitmaps = drive(difference.compare_bases(one, other))
    found = {
        (offset + at) // BLOCK_SIZE
        for segment, bitmap in bitmaps.items()
        for offset, length in block_sets.runs_of(block_sets.blocks_in(bitmap), segment)
        for at in range(0, length, BLOCK_SIZE)
    }
    assert found == blocks
    one.close()
    other.close()


def test_chunks_with_the_same_hash_are_not_read(empty_pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(6).randbytes(4 * CHUNK_SIZE)
    changed = content[: 2 * CHUNK_SIZE] + b"x" + content[2 * CHUNK_SIZE + 1 :]
    one, other = images(empty_pool, content, changed)
    assert list(difference.compare_bases(one, other)) == [(CHUNK_SIZE, CHUNK_SIZE)]
    one.close()
    other.close()


def test_a_bitmap_and_the_blocks_in_it_are_the_same() -> None:
    rng = random.Random(7)
    bitmap = rng.randbytes(4064)
    blocks = block_sets.blocks_in(bitmap)
    assert block_sets.to_bitmap(blocks) == bitmap
    assert set(blocks) == {0, 1}
    assert sum(length for _, length in block_sets.runs_of(blocks, 2)) == blocks.count(1) * BLOCK_SIZE
    assert next(block_sets.runs_of(block_sets.ALL_BLOCKS, 2)) == (2 * SEGMENT_SIZE, SEGMENT_SIZE)


def test_a_move_is_the_same_in_a_file_and_a_damaged_one_is_not_believed(tmp_path: Path) -> None:
    bitmaps = {7: b"\1" * 4064, 9: b"\2" * 4064}
    move = Move(b"s" * 16, b"t" * 16, b"b" * 16, "new", b"f" * 32, 4096, bitmaps, (b"s" * 16, b"u" * 16))
    move.save(tmp_path / "move")
    assert Move.load(tmp_path / "move") == move
    content = bytearray((tmp_path / "move").read_bytes())
    for at in (0, 9, 20, len(content) - 1):
        content[at] ^= 1
        (tmp_path / "move").write_bytes(content)
        with pytest.raises(StorageError):
            Move.load(tmp_path / "move")
        content[at] ^= 1
    (tmp_path / "move").write_bytes(content[:100])
    with pytest.raises(NBDCloneError):
        Move.load(tmp_path / "move")
