"""Snapshots: what was sealed stays as it was, whatever comes after, and whoever started from it."""

from __future__ import annotations

import functools
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nbdclone.errors import CloneFailed, InUse, InvalidName, NameTaken, NotFound, UsageError
from nbdclone.store.catalog import CloneInfo, SnapshotInfo
from nbdclone.store.clone import Clone
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.resizing import grow
from nbdclone.store.snapshots import take_snapshot


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


def write(pool: Pool, name: str, data: bytes, offset: int) -> None:
    with pool.open_clone(name) as disk:
        disk.pwrite(data, offset)


@pytest.fixture(name="web1")
def make_web1(pool: Pool) -> Pool:
    """A pool with a clone that was written, sealed as 'golden', and written again."""
    pool.create_clones("base", ["web1"])
    write(pool, "web1", b"golden", 4090)
    pool.snapshot("web1@golden")
    write(pool, "web1", b"later", 4090)
    return pool


def test_a_snapshot_stays_as_it_was(web1: Pool, content: bytes) -> None:
    assert read(web1, "web1@golden") == content[:4090] + b"golden" + content[4096:]
    assert read(web1, "web1") == content[:4090] + b"laterngolden"[:5] + b"n" + content[4096:]


def test_clones_start_from_a_snapshot_and_do_not_touch_it(web1: Pool, content: bytes) -> None:
    golden = read(web1, "web1@golden")
    web1.create_clones("web1@golden", ["web2", "web3"], size=2 << 20)
    assert read(web1, "web2") == golden + bytes(1 << 20)
    write(web1, "web2", b"mine", 0)
    assert read(web1, "web3") == golden + bytes(1 << 20)
    assert read(web1, "web1@golden") == golden
    assert read(web1, "base") == content


def test_a_snapshot_is_read_only(web1: Pool) -> None:
    with web1.open_clone("web1@golden") as disk:
        assert disk.read_only
        with pytest.raises(UsageError, match="read-only"):
            disk.pwrite(b"x", 0)


def test_a_random_life_with_snapshots_reads_as_the_model_does(pool: Pool, content: bytes) -> None:
    rng = random.Random(4)
    pool.create_clones("base", ["c0"])
    model = {"c0": bytearray(content)}
    sealed: dict[str, bytes] = {}
    for number in range(120):
        name = rng.choice(sorted(model))
        if (kind := rng.random()) < 0.25:
            pool.snapshot(f"{name}@s{number}")
            sealed[f"{name}@s{number}"] = bytes(model[name])
        elif kind < 0.35 and sealed:
            source = rng.choice(sorted(sealed))
            pool.create_clones(source, [f"c{number}"])
            model[f"c{number}"] = bytearray(sealed[source])
        elif kind < 0.45 and (own := [snapshot for snapshot in sealed if snapshot.startswith(f"{name}@")]):
            snapshot = rng.choice(own)
            pool.rollback(snapshot)
            model[name] = bytearray(sealed[snapshot])
        else:
            with pool.open_clone(name) as disk:
                offset, length = rng.randrange(len(content) - 9000), rng.randrange(1, 9000)
                if rng.random() < 0.3:
                    disk.zero(offset, length)
                    model[name][offset : offset + length] = bytes(length)
                else:
                    disk.pwrite(data := rng.randbytes(length), offset)
                    model[name][offset : offset + length] = data
    for name, expected in (*model.items(), *sealed.items()):
        assert read(pool, name) == expected, name
    assert sorted([*model, *sealed, "base"]) == pool.names()


def test_a_clone_that_is_written_meanwhile_goes_on_and_the_snapshot_holds_what_was_acknowledged(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1") as disk:
        stop, written = threading.Event(), [0]

        def work() -> None:
            while not stop.is_set():
                number = written[0] + 1
                disk.pwrite(number.to_bytes(8, "big") * 1024, number % 16 * 8192)
                written[0] = number

        writer = threading.Thread(target=work)
        writer.start()
        bounds = []
        for name in ("a", "b", "c", "d"):
            while written[0] < len(bounds) * 40 + 40:
                pass
            before = written[0]
            take_snapshot(pool.places, disk, name)
            bounds.append((name, before, written[0] + 1))
        stop.set()
        writer.join()
        for slot in range(16):
            newest = max(number for number in range(written[0] + 1) if number % 16 == slot)
            assert disk.pread(8, slot * 8192) == newest.to_bytes(8, "big")
    for name, before, after in bounds:
        found = read(pool, f"web1@{name}")
        numbers = [int.from_bytes(found[slot * 8192 : slot * 8192 + 8], "big") for slot in range(16)]
        assert before <= max(numbers) <= after
        for slot, number in enumerate(numbers):  # whole, and not older than what was acknowledged
            assert found[slot * 8192 : slot * 8192 + 8192] == number.to_bytes(8, "big") * 1024
            assert number > max(numbers) - 16


def test_a_reader_of_a_snapshot_and_a_clone_of_it_may_have_it_open_at_once(web1: Pool) -> None:
    web1.create_clones("web1@golden", ["web2"])
    with web1.open_clone("web1") as one, web1.open_clone("web2") as two, web1.open_clone("web1@golden") as golden:
        fds = {disk.layers[1].fd for disk in (one, two, golden)}
        assert len(fds) == 1
        take_snapshot(web1.places, one, "next")
        with web1.open_clone("web1@next") as following:
            assert following.pread(8192, 0) == one.pread(8192, 0)
        one.pwrite(b"x" * 8192, 0)
        assert two.pread(8192, 0) == golden.pread(8192, 0)
    with web1.open_clone("web1@golden"):
        pass


def test_a_snapshot_costs_the_same_whatever_was_written(pool: Pool) -> None:
    pool.create_clones("base", ["web1"], size=1 << 40)
    with pool.open_clone("web1") as disk:
        for segment in range(40):
            disk.pwrite(b"x" * BLOCK_SIZE, segment << 30)
        before = dict(disk._owners)
        take_snapshot(pool.places, disk, "s")
        assert disk._owners is disk._chain.owners
        assert all(disk._owners[segment] is owners for segment, owners in before.items())
        for segment in range(40):
            assert disk.pread(2, segment << 30) == b"xx"


def test_names_that_cannot_be_are_refused(web1: Pool) -> None:
    for name, error in (
        ("web1", InvalidName),
        ("web1@", InvalidName),
        ("web1@a@b", InvalidName),
        ("w/1@a", InvalidName),
    ):
        with pytest.raises(error):
            web1.snapshot(name)
    with pytest.raises(NameTaken, match="there is a snapshot 'web1@golden' already"):
        web1.snapshot("web1@golden")
    with pytest.raises(UsageError, match="'base' is a base"):
        web1.snapshot("base@x")
    with pytest.raises(NotFound):
        web1.snapshot("nothing@x")
    for name in ("web1@nothing", "nothing@golden", "base@x", "web1@../golden"):
        with pytest.raises(NotFound):
            web1.open_clone(name)
        with pytest.raises(NotFound):
            web1.require(name)
    assert web1.names() == ["base", "web1", "web1@golden"]
    with pytest.raises(UsageError, match="clones are made from bases and snapshots"):
        web1.create_clones("web1", ["x"])


def test_a_snapshot_that_fails_changes_nothing(web1: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename in turn; the clone goes on, and what it acknowledges then is kept."""
    for failing in range(1, 4):
        calls = iter(range(1, 9))

        def rename(source: Path, target: Path, calls: object = calls, failing: int = failing) -> None:
            if next(calls) == failing:  # type: ignore[call-overload]
                raise OSError(28, "No space left on device")
            os.rename(source, target)

        with web1.open_clone("web1") as disk:
            disk.pwrite(b"before", 10_000)
            with monkeypatch.context() as patch:
                patch.setattr(FileSystem, "rename", staticmethod(rename))
                with pytest.raises(Exception, match=r"[Nn]o space left"):
                    take_snapshot(web1.places, disk, "failed")
            disk.pwrite(b"after%d" % failing, 20_000)
            disk.flush()
        assert read(web1, "web1")[20_000:20_006] == b"after%d" % failing
        assert web1.names() == ["base", "web1", "web1@golden"]
        assert len(os.listdir(web1.path / "layers")) == 1
    web1.snapshot("web1@failed")


def test_if_the_commit_cannot_be_made_durable_nothing_more_is_promised(
    web1: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FileSystem.sync_directory
    state = {"armed": False}

    def rename(source: Path, target: Path) -> None:
        os.rename(source, target)
        state["armed"] = target.name == "delta"

    def sync_directory(self: FileSystem, path: Path) -> None:
        if state["armed"]:
            raise OSError(5, "Input/output error")
        real(self, path)

    with web1.open_clone("web1") as disk:
        with monkeypatch.context() as patch:
            patch.setattr(FileSystem, "rename", staticmethod(rename))
            patch.setattr(FileSystem, "sync_directory", sync_directory)
            take_snapshot(web1.places, disk, "s")
        with pytest.raises(CloneFailed):
            disk.pwrite(b"x", 0)
        disk._delta._failure = None  # type: ignore[union-attr]


def test_going_back_is_refused_while_somebody_has_the_clone(web1: Pool) -> None:
    with web1.open_clone("web1"):
        for attempt in (lambda: web1.rollback("web1@golden"), lambda: web1.reset("web1")):
            with pytest.raises(InUse, match="clone 'web1' is in use by this process"):
                attempt()
    assert read(web1, "web1")[4090:4095] == b"later"


def test_rollback_and_reset_go_back_and_keep_the_snapshots(web1: Pool, content: bytes) -> None:
    golden = read(web1, "web1@golden")
    web1.rollback("web1@golden")
    assert read(web1, "web1") == golden
    web1.reset("web1")
    assert read(web1, "web1") == content
    assert read(web1, "web1@golden") == golden
    web1.rollback("web1@golden")
    assert read(web1, "web1") == golden
    web1.create_clones("web1@golden", ["web2"])
    write(web1, "web2", b"x", 0)
    web1.snapshot("web2@x")
    web1.reset("web2")
    assert read(web1, "web2") == golden


@pytest.mark.parametrize("verb", [lambda pool: pool.rollback("web1@golden"), lambda pool: pool.reset("web1")])
def test_a_snapshot_that_was_cut_off_does_not_come_to_count_by_a_rollback(
    web1: Pool, verb: Callable[[Pool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its names, and its commit never came; the rollback gives the clone's delta another id."""

    class PowerCut(BaseException):
        pass

    def stack(self: Clone, *_: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patch, web1.open_clone("web1") as disk:
        patch.setattr(Clone, "stack", stack)
        patch.setattr("nbdclone.store.snapshots.clear_cut_off", lambda *_: None)
        with pytest.raises(PowerCut):
            take_snapshot(web1.places, disk, "half")
    assert (web1.path / "clones/web1/snapshots/half").exists()
    assert len(os.listdir(web1.path / "layers")) == 2
    assert web1.names() == ["base", "web1", "web1@golden"]
    verb(web1)
    assert web1.names() == ["base", "web1", "web1@golden"]
    assert not (web1.path / "clones/web1/snapshots/half").exists()
    assert len(os.listdir(web1.path / "layers")) == 1


def test_the_catalog_tells_parents_bases_and_snapshots(web1: Pool) -> None:
    web1.create_clones("web1@golden", ["web2"])
    web2, golden = web1.info("web2"), web1.info("web1@golden")
    assert isinstance(web2, CloneInfo)
    assert isinstance(golden, SnapshotInfo)
    assert (web2.parent, web2.base, web2.snapshots, web2.error) == ("web1@golden", "base", (), None)
    assert (golden.parent, golden.base) == ("base", "base")
    assert web1.info("web1").snapshots == ("golden",)  # type: ignore[union-attr]
    assert web1.info("base").clones == ("web1", "web2")  # type: ignore[union-attr]


def test_what_others_depend_on_is_not_removed_and_they_are_named(web1: Pool) -> None:
    web1.create_clones("web1@golden", ["web2", "web3"])
    with pytest.raises(InUse, match=r"'web1@golden', needed by 2 clone\(s\): web2, web3"):
        web1.remove(["web1"])
    with pytest.raises(InUse, match=r"base 'base' is needed by 3 clone\(s\): web1, web2, web3"):
        web1.remove(["base"])
    assert web1.names() == ["base", "web1", "web1@golden", "web2", "web3"]


def test_a_layer_stays_while_something_is_above_it_and_then_goes(web1: Pool) -> None:
    golden = read(web1, "web1@golden")
    web1.create_clones("web1@golden", ["web2"])
    web1.remove(["web1@golden"])
    assert web1.names() == ["base", "web1", "web2"]
    assert web1.info("web2").parent == "base"  # type: ignore[union-attr]
    web1.remove(["web1"])
    assert len(os.listdir(web1.path / "layers")) == 1
    assert read(web1, "web2") == golden
    web1.remove(["web2"])
    assert os.listdir(web1.path / "layers") == []
    assert os.listdir(web1.path / ".tmp") == []
    web1.remove(["base"])


def test_as_many_layers_as_there_may_be_and_no_more(pool: Pool, content: bytes) -> None:
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1") as disk:
        for number in range(253):
            disk.pwrite(b"%d" % number, number * 4096 % (1 << 20))
            take_snapshot(pool.places, disk, f"s{number}")
        with pytest.raises(UsageError, match="255 layers, as many as there may be"):
            take_snapshot(pool.places, disk, "more")
        now = disk.pread(1 << 20, 0)
    assert read(pool, "web1") == now
    assert read(pool, "web1@s252") == now
    assert read(pool, "web1@s0") == b"0" + content[1:]
    with pytest.raises(UsageError, match="255 layers"):
        pool.create_clones("web1@s252", ["web2"]) and pool.snapshot("web2@x")


def test_snapshots_sizes_and_quotas_of_one_clone_at_once_do_not_undo_each_other(pool: Pool) -> None:
    """Each prepares its file beside the others, and only one of them is the first."""
    pool.create_clones("base", ["web1"])
    failures: list[BaseException] = []
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"mine", 0)

        def attempt(work: Callable[[], object]) -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        def enlarge() -> None:
            for size in range(2, 10):
                with pool.places.changing():
                    grow(disk, size << 20)
                pool.set_quota("web1", size << 30)

        def seal(first: int) -> None:
            for number in range(first, first + 5):
                take_snapshot(pool.places, disk, f"s{number}")

        works = [enlarge, *(functools.partial(seal, first) for first in (0, 10, 20))]
        threads = [threading.Thread(target=attempt, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(disk.layers) == 2 + 15
        assert disk.size == 9 << 20
    info = pool.info("web1")
    assert isinstance(info, CloneInfo)
    assert (info.size, info.quota, len(info.snapshots)) == (9 << 20, 9 << 30, 15)
    assert all(read(pool, f"web1@{name}")[:4] == b"mine" for name in info.snapshots)


def test_a_clone_that_goes_back_while_it_is_opened_is_opened_as_it_is_then(
    web1: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, waiting = FileSystem.lock, [True]

    def lock(self: FileSystem, fd: int, path: str | Path, what: str, *, shared: bool = False) -> None:
        if waiting and waiting.pop():
            web1.rollback("web1@golden")
        real(self, fd, path, what, shared=shared)

    monkeypatch.setattr(FileSystem, "lock", lock)
    assert read(web1, "web1") == read(web1, "web1@golden")
