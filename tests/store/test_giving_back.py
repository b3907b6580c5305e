"""A merge gives the space of the layer back as it goes; and nobody reads what is gone from it."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_blocks import read, run
from test_merging import change, contents, make_web1
from transfer import sent

from nbdclone.control.local import LocalOpened, LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import InUse, NotFound
from nbdclone.store import locks, opening, promoting
from nbdclone.store.changes import changed_extents
from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.clone import Clone
from nbdclone.store.delta_file import NO_ORIGIN, change_header
from nbdclone.store.fs import FileSystem
from nbdclone.store.giving_back import GivingBack, count_up
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.layer_manifest import RECORD
from nbdclone.store.locks import take
from nbdclone.store.merging import find_merges
from nbdclone.store.places import GOING, Places, Snapshot
from nbdclone.store.pool import Pool
from nbdclone.store.receiving import Receiving
from nbdclone.store.sealed import Sealed
from nbdclone.store.sending import Sending
from nbdclone.store.snapshots import take_snapshot

__all__ = ["make_web1"]


def interrupted(pool: Pool, steps: int) -> list[int]:
    """Stop the merge in its midst; the bytes that the layer took, before each step."""
    (layer_id,) = [merge.layer for merge in find_merges(pool.places)]
    taken: list[int] = []

    def stop(done: int, total: int) -> None:
        taken.append(pool.places.layer(layer_id).stat().st_blocks * 512)
        if len(taken) == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pool, "merge", stop)
    return taken


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdclone.store.copying.STEP", BLOCK_SIZE)
    monkeypatch.setattr("nbdclone.store.copying.SPAN", BLOCK_SIZE)
    monkeypatch.setattr("nbdclone.store.giving_back.STRETCH", BLOCK_SIZE)


@pytest.fixture(params=["layer", "clone"])
def due(request: pytest.FixtureRequest, by_blocks: None, web1: Pool) -> Pool:
    """A layer is to be merged, into a layer or into a clone."""
    web1.remove(["web1@b"] if request.param == "layer" else ["web2", "web1@c"])
    return web1


def test_space_comes_back_while_a_merge_goes_on(due: Pool) -> None:
    before = contents(due)
    taken = interrupted(due, 6)
    assert taken == sorted(taken, reverse=True)
    assert taken[-1] <= taken[0] - 4 * BLOCK_SIZE
    assert contents(due) == before
    assert is_clean(list(check_pool(due.path, deep=True)))
    assert run(due, "merge")["merged"] == 1
    assert contents(due) == before


def test_nothing_is_given_back_of_a_layer_that_another_has_open(due: Pool) -> None:
    (merge,) = find_merges(due.places)
    before = contents(due)
    path = due.places.layer(merge.layer)
    with open(path, "rb") as other:  # a description of its own, as another process has
        take(other.fileno(), shared=True)
        locks.lock_look(other.fileno(), 0)
        taken = interrupted(due, 6)
        assert taken[-1] == taken[0]
        # Beneath a layer it is said before it is known whether all look anew.
        assert due.places.is_going(merge.layer) == (merge.clone is None)
        with pytest.raises(BlockingIOError), open(path, "rb+") as third:
            take(third.fileno())
    assert contents(due) == before


def test_nothing_is_given_back_of_a_layer_that_another_chain_here_reads(due: Pool) -> None:
    (merge,) = find_merges(due.places)
    with contextlib.closing(Sealed.open(due.places.layer(merge.layer), "it", due.places.fs)):
        taken = interrupted(due, 6)
    assert taken[-1] == taken[0]


def test_a_record_that_cannot_be_read_may_be_the_layers_name(due: Pool) -> None:
    (due.places.clones / "web1" / "snapshots" / "other").write_text("?")
    taken = interrupted(due, 6)
    assert taken[-1] == taken[0]


@pytest.mark.usefixtures("by_blocks")
def test_a_reset_in_the_midst_of_a_merge_goes_to_what_is_beneath(web1: Pool) -> None:
    beneath = read(web1, "web1@b")
    web1.create_clones("web1@c", ["web3"])
    change(web1, "web3", 3)
    web1.rollback("web1@b")
    web1.remove(["web2", "web1@c"])
    (merge,) = find_merges(web1.places)
    taken = interrupted(web1, 6)
    assert taken[-1] < taken[0]
    change_header(web1.places.delta("web3"), origin=merge.layer)  # a power cut brings back what was not synced
    web1.reset("web3")
    assert read(web1, "web3") == beneath


@pytest.mark.usefixtures("by_blocks")
def test_a_reset_of_the_clone_itself_in_the_midst_goes_to_what_is_beneath(web1: Pool) -> None:
    beneath = read(web1, "web1@b")
    web1.rollback("web1@b")
    web1.remove(["web1@c"])
    (merge,) = find_merges(web1.places)
    assert merge.clone == "web2"
    taken = interrupted(web1, 6)
    assert taken[-1] < taken[0]
    web1.reset("web2")
    assert read(web1, "web2") == beneath
    assert web1.places.layer(merge.layer) not in web1.places.layers.glob("*/delta")


@pytest.mark.usefixtures("by_blocks")
def test_a_stream_gives_no_name_to_a_layer_whose_space_is_given_back(web1: Pool) -> None:
    sink = io.BytesIO()
    with Sending(web1.places, "web1@b") as sending:
        drive(sending.run(sink))
    web1.remove(["web1@b"])
    assert interrupted(web1, 6)
    with pytest.raises(InUse, match="is being merged"):
        Receiving(web1.places, io.BytesIO(sink.getvalue()), name="copy")


@pytest.mark.usefixtures("by_blocks")
def test_a_stream_with_it_in_the_midst_gives_it_no_name_either(web1: Pool) -> None:
    sink = io.BytesIO()
    with Sending(web1.places, "web1@c") as sending:
        drive(sending.run(sink))
    web1.remove(["web1@b"])
    assert interrupted(web1, 6)
    expected = {f"copy@{name}": read(web1, f"web1@{name}") for name in "ac"} | {"copy": read(web1, "web1@c")}
    drive(Receiving(web1.places, io.BytesIO(sink.getvalue()), name="copy").run())
    assert {name: content for name, content in contents(web1).items() if name.startswith("copy")} == expected


def test_what_is_right_beneath_is_synced_before_a_clone_gives_up_what_it_has_too(
    web1: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge leaves zeros in it that a power cut would take back."""
    done: list[object] = []
    with web1.open_clone("web1") as disk:
        give_up, beneath = disk.delta.give_up, disk.layers[-2]
        disk.pwrite(disk.pread(BLOCK_SIZE, 0), 0)
        disk.copy_up(0, disk.size)
        monkeypatch.setattr(disk._fs, "sync", done.append, raising=False)
        monkeypatch.setattr(disk.delta, "give_up", lambda blocks: (done.append("given up"), give_up(blocks)))
        assert disk.drop([(0, disk.size // BLOCK_SIZE * BLOCK_SIZE)])
    assert done == [beneath.fd, "given up"]


def test_the_mark_and_what_it_rests_on_are_durable_before_the_first_hole(
    into_a_clone: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (merge,) = find_merges(into_a_clone.places)
    layer = into_a_clone.places.layer(merge.layer)
    done: list[Path | str] = []
    sync_directory, punch = FileSystem.sync_directory, FileSystem.punch

    def note_sync(self: FileSystem, path: Path) -> None:
        done.append("marked" if path == layer.parent and layer.with_name(GOING).exists() else path)
        sync_directory(self, path)

    def note_hole(self: FileSystem, fd: int, *arguments: int) -> None:
        if os.path.samestat(os.fstat(fd), layer.stat()):
            done.append("hole")
        punch(self, fd, *arguments)

    monkeypatch.setattr(FileSystem, "sync_directory", note_sync)
    monkeypatch.setattr(FileSystem, "punch", note_hole)
    assert interrupted(into_a_clone, 6)
    clones = into_a_clone.places.clones
    before = done[: done.index("hole")]
    assert {clones, clones / "web1" / "snapshots", "marked"} <= set(before)
    assert before[-1] == "marked"


# Beneath clones that are open


class Served(LocalTarget):
    """A target where clones are open, as a server has them."""

    def __init__(self, pool: Pool, *disks: Clone) -> None:
        super().__init__(pool)
        self.disks = {disk.name: disk for disk in disks}
        self.looked = 0

    @contextlib.contextmanager
    def if_open(self, name: str) -> Iterator[Any]:
        self.looked += 1
        yield LocalOpened(self.disks[name]) if name in self.disks else None


def merge_beneath(target: Served, steps: int) -> list[int]:
    """So many steps of the merge; the bytes that the layer took, before each."""
    (merge,) = find_merges(target.pool.places)
    work = find_verb("merge").begin(target, {})
    taken = []
    for _ in range(steps):
        taken.append(taken_by(target.pool, merge.layer))
        next(work)
    work.close()
    return taken


@contextlib.contextmanager
def reading(disks: Sequence[Clone], content: Sequence[bytes]) -> Iterator[None]:
    """Threads that read the disks meanwhile, and find this content."""
    stop, wrong = threading.Event(), []

    def read_on(disk: Clone, expected: bytes) -> None:
        rng = random.Random(disk.name)
        while not stop.is_set():
            at = rng.randrange(disk.size - 9000)
            if disk.pread(9000, at) != expected[at : at + 9000]:
                wrong.append((disk.name, at))

    readers = [threading.Thread(target=read_on, args=pair) for pair in zip(disks, content, strict=True)]
    for reader in readers:
        reader.start()
    try:
        yield
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert wrong == []


def test_space_comes_back_beneath_open_clones_that_look_anew(web1: Pool, by_blocks: None) -> None:
    before = contents(web1)
    web1.remove(["web1@a"])  # of the layers between the base and two clones
    with web1.open_clone("web1") as one, web1.open_clone("web2") as two:
        target = Served(web1, one, two)
        content = [disk.pread(disk.size, 0) for disk in (one, two)]
        with reading((one, two), content):
            taken = merge_beneath(target, 8)
            assert taken[-1] <= taken[0] - 4 * BLOCK_SIZE
            assert target.looked >= 2
            assert drive(find_verb("merge").begin(target, {}))["merged"] == 1
        assert [disk.pread(disk.size, 0) for disk in (one, two)] == content
    del before["web1@a"]
    assert contents(web1) == before
    assert is_clean(list(check_pool(web1.path, deep=True)))


@pytest.mark.parametrize("who", ["a clone", "a snapshot", "a reader"])
def test_nothing_is_given_back_beneath_who_does_not_look_anew(
    web1: Pool, by_blocks: None, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    monkeypatch.setattr("nbdclone.store.giving_back.READERS_PATIENCE_S", 0.02)
    web1.remove(["web1@a"])
    with contextlib.ExitStack() as opened:
        one = opened.enter_context(web1.open_clone("web1"))
        if who == "a clone":
            other = opened.enter_context(web1.open_clone("web2"))
        elif who == "a snapshot":
            other = opened.enter_context(web1.open_clone("web1@b"))
        else:
            other = one
            opened.enter_context(one.holding())
        target = Served(web1, one)
        content = other.pread(other.size, 0)
        taken = merge_beneath(target, 8)
        assert taken[-1] == taken[0]
        assert target.looked == 2, "once for each clone, and then no more in this pass"
        assert other.pread(other.size, 0) == content


def test_another_process_that_has_it_open_from_before_is_seen(
    web1: Pool, by_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbdclone.store.giving_back.READERS_PATIENCE_S", 0.02)
    web1.remove(["web1@a"])
    script = (
        "import sys; from nbdclone.store.pool import Pool; disk = Pool.open(sys.argv[1]).open_clone('web2');"
        "print(disk.size, flush=True); input(); print(disk.pread(disk.size, 0).hex())"
    )
    content = read(web1, "web2")
    with subprocess.Popen(
        [sys.executable, "-c", script, str(web1.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == len(content)
        with web1.open_clone("web1") as one:
            taken = merge_beneath(Served(web1, one), 8)
        assert taken[-1] == taken[0]
        assert bytes.fromhex(process.communicate("\n")[0]) == content


def test_a_look_has_the_number_of_its_time(web1: Pool) -> None:
    layer_id = web1.places.snapshot("web1@b").layer
    path = web1.places.layer(layer_id)
    path.with_name(GOING).touch()
    mine = Sealed.open(path, "it")
    early = Sealed.open(path, "it")
    number = count_up(web1.places, layer_id)
    assert number == 1
    late = Sealed.open(path, "it")
    assert not mine.is_alone_before(number)
    early.close()
    assert mine.is_alone_before(number)
    assert late.is_alone_before(number) is False, "mine is from before"
    assert not mine.is_alone_before(count_up(web1.places, layer_id))
    late.close()
    assert mine.is_alone()
    with open(path, "rb") as other:
        locks.lock_look(other.fileno(), 1)
        assert mine.is_alone_before(1)
        assert not mine.is_alone_before(2)
        locks.unlock_look(other.fileno(), 1)
        assert mine.is_alone_before(2)
    mine.close()


def test_another_process_that_looks_anew_is_seen_to(web1: Pool) -> None:
    layer_id = web1.places.snapshot("web1@b").layer
    path = web1.places.layer(layer_id)
    path.with_name(GOING).touch()
    script = (
        "import sys; from pathlib import Path; from nbdclone.store.sealed import Sealed; path = Path(sys.argv[1]);"
        "one = Sealed.open(path, 'it'); print(flush=True); input(); two = Sealed.open(path, 'it'); one.close();"
        "print(flush=True); input()"
    )
    with contextlib.closing(Sealed.open(path, "it")) as mine, subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        number = count_up(web1.places, layer_id)
        assert not mine.is_alone_before(number)
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        assert mine.is_alone_before(number)
        assert not mine.is_alone()
        process.communicate("\n")


def test_a_look_that_is_counted_up_meanwhile_is_taken_anew(web1: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer_id = web1.places.snapshot("web1@b").layer
    path = web1.places.layer(layer_id)
    path.with_name(GOING).touch()
    mine = Sealed.open(path, "it")
    number = count_up(web1.places, layer_id)
    lock_look = locks.lock_look
    numbers = []

    def slowly(fd: int, number: int) -> None:
        numbers.append(number)
        if len(numbers) == 1:
            count_up(web1.places, layer_id)
        lock_look(fd, number)

    monkeypatch.setattr(locks, "lock_look", slowly)
    other = Sealed.open(path, "it")
    assert numbers == [number, number + 1]
    assert mine.is_alone_before(number + 1)
    other.close()
    mine.close()


# Beside readers and changes


def taken_by(pool: Pool, layer_id: bytes) -> int:
    return pool.places.layer(layer_id).stat().st_blocks * 512


class Beside(LocalTarget):
    """``step`` is called with the clone before the first change_here of a merge: what was found is not punched yet."""

    def __init__(self, pool: Pool, step: Callable[[Clone], object]) -> None:
        super().__init__(pool)
        self.step = step
        self.called = 0

    @contextlib.contextmanager
    def opened(self, name: str) -> Iterator[Any]:
        target = self

        class Opened(LocalOpened):
            def change_here(self, step: Callable[[], Any]) -> Any:
                target.called += 1
                if target.called == 1:
                    target.step(self.clone)
                return step()

        with self.pool.open_clone(name) as clone:
            yield Opened(clone)


@pytest.fixture
def into_a_clone(by_blocks: None, web1: Pool) -> Pool:
    """A layer is to be merged into web1."""
    web1.remove(["web2", "web1@c"])
    return web1


def merged_beside(pool: Pool, step: Callable[[Clone], object], steps: int = 2) -> tuple[int, int]:
    """What the layer took before, and after so many steps of the merge; in the first one ``step`` comes between."""
    (merge,) = find_merges(pool.places)
    before = taken_by(pool, merge.layer)
    target = Beside(pool, step)
    work = find_verb("merge-into").begin(target, {"name": "web1", "layer": merge.layer.hex()})
    for _ in range(steps):
        next(work)
    after = taken_by(pool, merge.layer)
    assert target.called
    work.close()
    return before, after


def test_the_space_comes_back_if_nothing_comes_between(into_a_clone: Pool) -> None:
    before, after = merged_beside(into_a_clone, lambda clone: None)
    assert after < before


def test_who_began_to_read_before_is_waited_for(into_a_clone: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdclone.store.giving_back.READERS_PATIENCE_S", 0.02)
    readers = contextlib.ExitStack()
    content = read(into_a_clone, "web1")
    with readers:

        def begin_before(self: Clone, *arguments: int) -> Any:
            if not reading:
                reading.append(readers.enter_context(self.holding()))
            return settle(self, *arguments)

        reading: list[object] = []
        settle = Clone.settle_hidden
        monkeypatch.setattr(Clone, "settle_hidden", begin_before)
        (merge,) = find_merges(into_a_clone.places)
        before = taken_by(into_a_clone, merge.layer)
        work = find_verb("merge-into").begin(LocalTarget(into_a_clone), {"name": "web1", "layer": merge.layer.hex()})
        next(work)
        next(work)
        assert taken_by(into_a_clone, merge.layer) == before
        readers.close()
        next(work)  # now what was left comes, too
        assert taken_by(into_a_clone, merge.layer) <= before - 2 * BLOCK_SIZE
        work.close()
    assert read(into_a_clone, "web1") == content


def test_nothing_is_punched_that_was_dropped_meanwhile(into_a_clone: Pool) -> None:
    content = read(into_a_clone, "web1")

    def drop(clone: Clone) -> None:
        assert clone.drop([(0, clone.size // BLOCK_SIZE * BLOCK_SIZE)])

    before, after = merged_beside(into_a_clone, drop)
    assert after == before
    assert read(into_a_clone, "web1") == content


def test_nothing_is_punched_after_a_snapshot_came_between(into_a_clone: Pool) -> None:
    content = read(into_a_clone, "web1")
    before, after = merged_beside(into_a_clone, lambda clone: take_snapshot(into_a_clone.places, clone, "new"))
    assert after == before
    assert read(into_a_clone, "web1") == read(into_a_clone, "web1@new") == content


def test_nothing_is_punched_after_another_has_opened_the_layer(into_a_clone: Pool) -> None:
    (merge,) = find_merges(into_a_clone.places)
    with contextlib.ExitStack() as held:

        def open_it(clone: Clone) -> None:
            other = held.enter_context(open(into_a_clone.places.layer(merge.layer), "rb"))
            take(other.fileno(), shared=True)

        before, after = merged_beside(into_a_clone, open_it)
        assert after == before


def test_a_write_meanwhile_is_kept_and_the_space_beneath_comes_back(into_a_clone: Pool) -> None:
    content = bytearray(read(into_a_clone, "web1"))
    content[:5000] = b"w" * 5000
    before, after = merged_beside(into_a_clone, lambda clone: clone.pwrite(b"w" * 5000, 0))
    assert after < before
    assert read(into_a_clone, "web1") == content


def test_a_full_disk_stops_the_giving_back_and_not_the_merge(
    into_a_clone: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = read(into_a_clone, "web1")

    def refuse(self: GivingBack, *arguments: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GivingBack, "_punch", refuse)
    assert run(into_a_clone, "merge")["merged"] == 1
    assert read(into_a_clone, "web1") == content


@pytest.fixture
def small_disk(due: Pool, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Callable[[], int]]:
    """Let so many blocks be free from now on; what was the least since, is told."""

    def used() -> int:
        return sum(path.stat().st_blocks * 512 for path in due.path.rglob("*") if path.is_file())

    def make(blocks: int) -> Callable[[], int]:
        most, least = used() + blocks * BLOCK_SIZE, [blocks]

        def statvfs(path: Path) -> SimpleNamespace:
            least.append((most - used()) // BLOCK_SIZE)
            return SimpleNamespace(f_bavail=least[-1], f_frsize=BLOCK_SIZE)

        monkeypatch.setattr("nbdclone.store.copying.os", SimpleNamespace(statvfs=statvfs, fstat=os.fstat))
        return lambda: min(least)

    return make


def test_a_merge_goes_on_a_disk_that_has_no_room_for_all_of_it(
    due: Pool, small_disk: Callable[[int], Callable[[], int]]
) -> None:
    before = contents(due)
    least = small_disk(8)
    result = run(due, "merge")
    assert result["merged"] == 1, str(result["left"])
    assert least() >= 1, "clients are left as much as is copied at once"
    assert contents(due) == before
    assert is_clean(list(check_pool(due.path, deep=True)))


def test_a_merge_fills_no_disk_while_somebody_has_the_layer_open(
    due: Pool, small_disk: Callable[[int], Callable[[], int]]
) -> None:
    (merge,) = find_merges(due.places)
    before = contents(due)
    least, seen = small_disk(8), []
    with contextlib.closing(Sealed.open(due.places.layer(merge.layer), "it", due.places.fs)):
        for _ in range(4):  # as a server does, again and again
            (left,) = run(due, "merge")["left"]
            assert re.search(r"takes \d+ bytes, and \d+ are free: nothing is lost", left["why"])
            seen.append(least())
    assert seen[0] >= 2
    assert seen == [seen[0]] * 4, "what was copied has to come back before more is"
    assert contents(due) == before
    assert run(due, "merge")["merged"] == 1
    assert contents(due) == before


def test_a_merge_says_what_it_takes_where_there_is_no_room_at_all(
    due: Pool, small_disk: Callable[[int], Callable[[], int]]
) -> None:
    small_disk(1)
    (left,) = run(due, "merge")["left"]
    assert "are free: nothing is lost, and it can be done again" in left["why"]


def test_holes_that_are_copied_count_for_nothing(into_a_clone: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr("nbdclone.store.giving_back.STRETCH", 4 * BLOCK_SIZE)
    monkeypatch.setattr(GivingBack, "_give_back", lambda self, end: given.append(end))
    with into_a_clone.open_clone("web1") as disk:
        giving = GivingBack(into_a_clone.places, LocalOpened(disk), bytes(16), lambda: True)
        for step in range(1, 9):
            giving.copied(0 if step % 2 else BLOCK_SIZE, step)
    assert given == [8]


def test_a_clone_without_a_base_gives_back_too_and_has_nothing_to_be_reset_to(web1: Pool, by_blocks: None) -> None:
    run(web1, "flatten", name="web1")
    web1.snapshot("web1@d")
    change(web1, "web1", "d")
    web1.remove(["web2", "web1@a", "web1@b", "web1@c", "web1@d"])
    content = read(web1, "web1")
    taken = interrupted(web1, 6)
    assert taken[-1] < taken[0]
    assert web1.places.header(web1.places.delta("web1")).origin == NO_ORIGIN
    assert read(web1, "web1") == content


# Those who read layers otherwise than through the clone


@pytest.fixture
def half(by_blocks: None, web1: Pool) -> Pool:
    """The layer of b is half merged into that of c, and has holes."""
    web1.remove(["web1@b"])
    taken = interrupted(web1, 6)
    assert taken[-1] < taken[0]
    return web1


def going(pool: Pool) -> bytes:
    (layer_id,) = [layer_id for layer_id in pool.places.layer_ids() if pool.places.is_going(layer_id)]
    return layer_id


@pytest.mark.parametrize("merged", [False, True])
def test_it_is_sent_as_a_part_of_what_is_above_it(half: Pool, tmp_path: Path, merged: bool) -> None:
    """Under its own id it would be another layer in the other pool than in those that had it before."""
    expected = {name: read(half, name) for name in ("web1@a", "web1@c")}
    layer_id = going(half)
    if merged:
        run(half, "merge")
    stream = sent(half, "web1@c", with_base=True)
    other = Pool.open(tmp_path / "other", create=True)
    drive(Receiving(other.places, io.BytesIO(stream)).run())
    assert {name: read(other, name) for name in expected} == expected
    assert not other.places.layer(layer_id).exists()
    assert len(other.places.layer_ids()) == 2


def test_since_a_snapshot_beneath_it_it_is_sent_so_too(half: Pool, tmp_path: Path) -> None:
    other = Pool.open(tmp_path / "other", create=True)
    drive(Receiving(other.places, io.BytesIO(sent(half, "web1@a", with_base=True))).run())
    drive(Receiving(other.places, io.BytesIO(sent(half, "web1@c", since="web1@a"))).run())
    assert read(other, "web1@c") == read(half, "web1@c")


def test_what_changed_and_where_they_differ_is_told_as_before(web1: Pool, by_blocks: None) -> None:
    def told() -> list[Any]:
        with web1.open_clone("web1@a") as a, web1.open_clone("web1@c") as b:
            return [list(changed_extents(a, b, content=content)) for content in (True, False)]

    before = told()
    web1.remove(["web1@b"])
    taken = interrupted(web1, 6)
    assert taken[-1] < taken[0]
    assert told() == before


def test_what_tells_of_the_pool_takes_it_as_a_layer_without_a_name(half: Pool) -> None:
    layer_id = going(half)
    assert all(entry.error is None for entry in half.entries(unnamed=True))
    entries = {entry["name"]: entry for entry in run(half, "du", names=[])["entries"]}
    (layer,) = [entry for entry in entries.values() if entry["kind"] == "layer"]
    assert layer["id"] == layer_id.hex()
    assert 0 < layer["own"] <= taken_by(half, layer_id) + 3 * BLOCK_SIZE
    assert list(check_pool(half.path)) == []


def test_a_deep_check_writes_down_nothing_of_what_a_power_cut_may_bring_back(half: Pool) -> None:
    assert list(check_pool(half.path, deep=True)) == []
    records = {path.parent.name for path in half.places.layers.glob(f"*/{RECORD}")}
    assert records == {layer.hex() for layer in half.places.layer_ids()} - {going(half).hex()}


def test_its_clone_can_be_removed_with_it(into_a_clone: Pool) -> None:
    assert interrupted(into_a_clone, 6)
    into_a_clone.remove(["web1", "web1@a", "web1@b"])
    assert into_a_clone.places.layer_ids() == []


def test_a_check_finds_a_name_or_a_second_child_of_it(half: Pool) -> None:
    layer_id = going(half)
    record = half.places.clones / "web1" / "snapshots" / "back"
    record.write_bytes(Snapshot(layer_id, 0).dump())
    found = [finding for finding in check_pool(half.path) if finding.kind == "layer-going"]
    assert [(finding.name, is_clean([finding])) for finding in found] == [("web1@back", False)]
    record.unlink()
    change_header(half.places.delta("web2"), parent_id=layer_id)
    assert [finding.kind for finding in check_pool(half.path)] == ["layer-going"]


def test_a_snapshot_whose_name_goes_while_it_is_opened_is_not_read(
    web1: Pool, by_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_layer = opening.open_layer

    def remove_first(*arguments: Any) -> Sealed:
        monkeypatch.setattr(opening, "open_layer", open_layer)
        web1.remove(["web1@b"])
        assert interrupted(web1, 6)
        return open_layer(*arguments)

    monkeypatch.setattr(opening, "open_layer", remove_first)
    with pytest.raises(NotFound, match="web1@b"):
        web1.open_clone("web1@b")
    run(web1, "merge")
    assert going_of(web1.places) == []


def going_of(places: Places) -> list[bytes]:
    return [layer_id for layer_id in places.layer_ids() if places.is_going(layer_id)]


def test_what_a_stream_stands_on_is_looked_at_when_it_is_open(
    web1: Pool, by_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = io.BytesIO(sent(web1, "web1@b"))
    open_sealed = Sealed.open.__func__  # type: ignore[attr-defined]

    def remove_first(cls: Any, path: Path, *arguments: Any) -> Sealed:
        monkeypatch.setattr(Sealed, "open", classmethod(open_sealed))
        web1.remove(["web1@b"])
        assert interrupted(web1, 6)
        return Sealed.open(path, *arguments)

    monkeypatch.setattr(Sealed, "open", classmethod(remove_first))
    with pytest.raises(InUse, match="is being merged"):
        Receiving(web1.places, sink, name="copy")


def test_a_clone_is_promoted_whole_if_its_layer_goes_before_it_is_opened(
    web1: Pool, by_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(web1, "web1", "more")
    content = read(web1, "web1")
    open_top, tried = opening.open_top, []

    def merge_first(places: Places, layer_id: bytes, what: str) -> Sealed:
        if not tried:
            assert interrupted(web1, 6)
        tried.append(layer_id)
        return open_top(places, layer_id, what)

    monkeypatch.setattr(promoting, "open_top", merge_first)
    run(web1, "promote", name="web1", new="golden")
    assert len(tried) == 2
    assert read(web1, "golden") == read(web1, "web1") == content


def test_nobody_is_moved_onto_it(web1: Pool, by_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hoists was killed, and the layer goes into the first of the clones that stand on it."""
    names = ["one", "two", "three"]
    web1.create_clones("base", names)
    for name in names:
        with web1.open_clone(name) as disk:
            disk.pwrite(b"package" * 10000, 0)
    before = {name: read(web1, name) for name in names}
    is_going = Places.is_going
    based = {web1.places.header(web1.places.delta(name)).parent_id for name in names}
    monkeypatch.setattr(Places, "is_going", lambda self, layer_id: True)
    with pytest.raises(InUse, match="is being merged"):
        run(web1, "hoist", base="base", min_clones=3)
    monkeypatch.setattr(Places, "is_going", is_going)
    assert {web1.places.header(web1.places.delta(name)).parent_id for name in names} == based
    assert {name: read(web1, name) for name in names} == before


# Who else has it


def test_a_lock_of_another_or_a_file_system_of_others_means_that_it_is_not_alone(
    web1: Pool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = web1.places.layer(web1.places.snapshot("web1@b").layer)
    with contextlib.closing(Sealed.open(path, "it", web1.places.fs)) as layer:
        assert layer.is_alone()
        with contextlib.closing(Sealed.open(path, "it", web1.places.fs)):
            assert not layer.is_alone()
        with open(path, "rb") as other:
            take(other.fileno(), shared=True)
            assert not layer.is_alone()
        assert layer.is_alone()
        threads = tmp_path / "threads"
        threads.write_text("8\n")
        with monkeypatch.context() as patch:
            patch.setattr(locks, "_NFS_THREADS", threads)
            assert not layer.is_alone()
            threads.write_text("0\n")
            assert layer.is_alone()
        device = path.stat().st_dev
        line = f"36 35 {os.major(device)}:{os.minor(device)} / /srv rw - nfs4 server:/ rw,vers=4.2\n"
        mounts = tmp_path / "mountinfo"
        mounts.write_text(line)
        mount_of = locks.mount_of
        monkeypatch.setattr(locks, "mount_of", lambda device: mount_of(device, mounts))
        assert not layer.is_alone()
