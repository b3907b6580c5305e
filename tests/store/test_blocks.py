"""Flatten and compact: what a clone reads stays the same, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mutation import mutate

from nbdclone.control.local import LocalOpened, LocalTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import InUse, StorageError, UsageError
from nbdclone.store.catalog import CloneInfo
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import MAP_SLOTS, NO_PARENT, read_header
from nbdclone.store.delta_map import DeltaMap
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.live import LiveMap
from nbdclone.store.pool import Pool


def run(pool: Pool, verb: str, progress: Any = None, /, **arguments: Any) -> Any:
    return drive(find_verb(verb).begin(LocalTarget(pool), arguments), progress)


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


def info(pool: Pool, name: str) -> CloneInfo:
    found = pool.info(name)
    assert isinstance(found, CloneInfo)
    return found


@pytest.fixture(name="web1")
def make_web1(pool: Pool) -> Pool:
    """A clone of some layers, with trimmed blocks on several of them."""
    pool.create_clones("base", ["web1"], quota=64 << 20)
    rng = random.Random(1)
    for number in range(3):
        with pool.open_clone("web1") as disk:
            for _ in range(10):
                disk.pwrite(rng.randbytes(rng.choice([100, 4096, 9000])), rng.randrange(disk.size - 9000))
            disk.zero(rng.randrange(disk.size // 2), 5 * BLOCK_SIZE)
        if number < 2:
            pool.snapshot(f"web1@s{number}")
    return pool


class OpenTarget(LocalTarget):
    """A clone that is open already, with what else happens after each change of the verb."""

    def __init__(self, pool: Pool, clone: Clone, meanwhile: Callable[[], object] = lambda: None) -> None:
        super().__init__(pool)
        self._clone = clone
        self._meanwhile = meanwhile

    def opened(self, name: str) -> Any:
        target = self

        class Here(LocalOpened):
            def __enter__(self) -> Here:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def change(self, step: Any) -> Any:
                result = step()
                target._meanwhile()
                return result

            def change_here(self, step: Any) -> Any:
                while True:  # the turn that an export's queue would give
                    with contextlib.suppress(BlockingIOError):
                        return step()

        return Here(self._clone)


def run_on(target: LocalTarget, verb: str, **arguments: Any) -> Any:
    return drive(find_verb(verb).begin(target, arguments))


# Flatten


def test_a_flat_clone_reads_as_before_and_its_base_can_go(pool: Pool, content: bytes) -> None:
    pool.create_clones("base", ["web1"], quota=64 << 20)
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"mine", 4090)
    before = read(pool, "web1")
    said: list[tuple[int, int]] = []
    done = run(pool, "flatten", lambda *progress: said.append(progress), name="web1")
    assert done == {"name": "web1", "was_over": "base", "copied": done["copied"], "snapshots_over_it": []}
    assert said[-1] == (done["copied"], done["copied"])
    assert read(pool, "web1") == before
    found = info(pool, "web1")
    assert (found.parent, found.base, found.quota, found.error) == (None, None, 64 << 20, None)
    pool.remove(["base"])
    assert read(pool, "web1") == before
    assert run(pool, "flatten", name="web1")["copied"] == 0


def test_the_snapshots_of_a_flat_clone_stay_over_its_base_which_they_need(web1: Pool) -> None:
    before = {name: read(web1, name) for name in ("web1", "web1@s0", "web1@s1")}
    assert run(web1, "flatten", name="web1")["snapshots_over_it"] == ["web1@s0", "web1@s1"]
    assert {name: read(web1, name) for name in before} == before
    with pytest.raises(InUse, match="web1"):
        web1.remove(["base"])
    web1.rollback("web1@s1")
    assert read(web1, "web1") == before["web1@s1"]


def test_flatten_copies_no_holes(pool: Pool, tmp_path: Path) -> None:
    image = tmp_path / "sparse.img"
    with image.open("wb") as file:
        file.truncate(256 << 20)
        os.pwrite(file.fileno(), b"x" * 10000, 200 << 20)
    pool.import_base(image, "sparse")
    pool.create_clones("sparse", ["thin"])
    assert run(pool, "flatten", name="thin")["copied"] == 3 * BLOCK_SIZE
    assert info(pool, "thin").allocated < 1 << 20


def test_a_flatten_that_was_interrupted_left_everything_as_it_was_and_goes_on(web1: Pool) -> None:
    before = read(web1, "web1")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(web1, "flatten", stop, name="web1")
    assert read(web1, "web1") == before
    assert info(web1, "web1").parent == "web1@s1"
    run(web1, "flatten", name="web1")
    assert read(web1, "web1") == before


def test_flatten_beyond_the_quota_or_the_disk_says_so_and_does_nothing(
    web1: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    web1.set_quota("web1", 1 << 19)
    allocated = info(web1, "web1").allocated
    with pytest.raises(StorageError, match=r"'web1' may have 524288, of which .* nothing was done"):
        run(web1, "flatten", name="web1")
    assert info(web1, "web1").allocated == allocated
    monkeypatch.setattr("nbdclone.store.copying._require_quota", lambda *_: None)
    before = read(web1, "web1")
    with pytest.raises(StorageError, match="quota exceeded; nothing is lost"):
        run(web1, "flatten", name="web1")
    assert read(web1, "web1") == before
    assert info(web1, "web1").parent == "web1@s1"


@pytest.mark.parametrize("verb", ["flatten", "compact"])
@pytest.mark.parametrize(("name", "why"), [("base", "is a base"), ("web1@s0", "is a snapshot")])
def test_what_never_changes_is_refused(web1: Pool, verb: str, name: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        run(web1, verb, name=name)


def test_a_snapshot_in_the_midst_of_a_flatten_is_no_gap(web1: Pool) -> None:
    """What was copied up so far is in the snapshot's layer, and has to be copied up once more."""
    with web1.open_clone("web1") as disk:
        before = disk.pread(disk.size, 0)
        count = 0

        def meanwhile() -> None:
            nonlocal count
            count += 1
            if count == 1:
                from nbdclone.store.snapshots import take_snapshot

                take_snapshot(web1.places, disk, "between")

        run_on(OpenTarget(web1, disk, meanwhile), "flatten", name="web1")
        assert len(disk.layers) == 1
        assert disk.pread(disk.size, 0) == before
    assert read(web1, "web1") == read(web1, "web1@between") == before


# Compact


def write_again(pool: Pool, name: str, share: float = 1.0) -> None:
    """Write blocks with what they have: they become the delta's."""
    with pool.open_clone(name) as disk:
        for offset in range(0, disk.size - BLOCK_SIZE, BLOCK_SIZE):
            if random.Random(offset).random() < share:
                disk.pwrite(disk.pread(BLOCK_SIZE, offset), offset)


def test_blocks_that_equal_what_lies_beneath_are_dropped(web1: Pool) -> None:
    before, small = read(web1, "web1"), info(web1, "web1").allocated
    write_again(web1, "web1")
    grown = info(web1, "web1").allocated
    done = run(web1, "compact", name="web1")
    assert read(web1, "web1") == before
    assert (done["before"], done["after"]) == (grown, info(web1, "web1").allocated)
    assert done["after"] <= small + BLOCK_SIZE < grown
    assert run(web1, "compact", name="web1")["dropped"] == 0


def test_zeros_become_holes_and_stay_zeros(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1") as disk:
        disk.zero(0, 64 * BLOCK_SIZE, allocate=True)
        os.pwrite(disk.delta.fd, b"\0", 1 << 20)  # data, and zeros, as far as the file system knows
        os.pwrite(disk.delta.fd, bytes(64 * BLOCK_SIZE), 1 << 20)
    done = run(pool, "compact", name="web1")
    assert done["zeros"] == 64 * BLOCK_SIZE
    assert done["before"] - done["after"] >= 60 * BLOCK_SIZE
    assert not any(read(pool, "web1")[: 64 * BLOCK_SIZE])


def test_a_flat_clone_is_compacted_to_its_data(pool: Pool, content: bytes) -> None:
    pool.create_clones("base", ["web1"])
    run(pool, "flatten", name="web1")
    run(pool, "compact", name="web1")
    assert read(pool, "web1") == content


def test_a_dropped_block_is_written_again_and_kept(web1: Pool) -> None:
    write_again(web1, "web1", 0.5)
    with web1.open_clone("web1") as disk:
        run_on(OpenTarget(web1, disk), "compact", name="web1")
        expected = bytearray(disk.pread(disk.size, 0))
        for offset in range(10, disk.size - 100, 7 * BLOCK_SIZE):
            disk.pwrite(b"again", offset)
            expected[offset : offset + 5] = b"again"
        assert disk.pread(disk.size, 0) == expected
    assert read(web1, "web1") == expected


def test_a_compact_that_was_interrupted_is_finished_by_the_next(web1: Pool) -> None:
    """Blocks were dropped, and their space was not given back yet."""
    before, small = read(web1, "web1"), info(web1, "web1").allocated
    write_again(web1, "web1")
    with web1.open_clone("web1") as disk:
        assert disk.drop([(0, disk.size & ~4095)]) > 0
    assert read(web1, "web1") == before
    assert info(web1, "web1").allocated > 2 * small
    run(web1, "compact", name="web1")
    assert read(web1, "web1") == before
    assert info(web1, "web1").allocated <= small + BLOCK_SIZE


def killed_after_a_compact(pool: Pool) -> bytes:
    """Blocks are marked beside the delta, dropped, punched; then the process is killed. What the next one reads."""
    disk = pool.open_clone("web1")
    for offset in range(0, 64 * BLOCK_SIZE, BLOCK_SIZE):
        disk.pwrite(disk.pread(BLOCK_SIZE, offset), offset)
    run_on(OpenTarget(pool, disk), "compact", name="web1")
    delta = disk.delta
    delta._live.close()
    os.close(delta.fd)  # no flush, no removal of the marks
    for layer in disk.layers[:-1]:
        layer.close()
    return read(pool, "web1")


def test_a_kill_brings_no_dropped_block_back(web1: Pool) -> None:
    before = read(web1, "web1")
    assert killed_after_a_compact(web1) == before


def test_it_is_noticed_if_marks_bring_dropped_blocks_back(web1: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(web1, "web1")
    mutate(monkeypatch, Delta, "give_up", "            self._live.clear()\n", "")
    mutate(monkeypatch, LiveMap, "covered", "with self._lock,", "return\n        with self._lock,")
    assert killed_after_a_compact(web1) != before


@pytest.mark.parametrize("slot", MAP_SLOTS, ids=["the first slot", "the second slot"])
def test_a_page_of_the_map_that_rots_after_a_compact_brings_nothing_back(web1: Pool, slot: int) -> None:
    before = read(web1, "web1")
    write_again(web1, "web1")
    with web1.open_clone("web1") as disk:
        assert disk.drop([(0, disk.size & ~4095)]) > 0
        assert disk.punch_dropped(0)
        path = disk.delta.path
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes())  # as a power cut right now would leave it, at the worst
    os.replace(copy, path)
    with path.open("r+b") as file:
        file.seek(slot)
        file.write(b"rotten")
    assert read(web1, "web1") == before


def test_it_is_noticed_if_only_one_slot_of_the_map_was_written(web1: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, Clone, "drop", "                delta.settle_all()\n", "")
    mutate(monkeypatch, Delta, "settled", "return not", "return True or not")
    before = read(web1, "web1")
    write_again(web1, "web1")
    disk = web1.open_clone("web1")
    assert disk.drop([(0, disk.size & ~4095)]) > 0
    assert disk.punch_dropped(0)
    content = disk.delta.path.read_bytes()
    disk.close()
    wrong = 0
    for slot in MAP_SLOTS:
        web1.places.delta("web1").write_bytes(content[:slot] + b"rotten" + content[slot + 6 :])
        wrong += read(web1, "web1") != before
    assert wrong == 1


def fail_to_drop(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, bytes]:
    """The disk is full when the map is written that lost bits; a block is written, and the process is killed."""
    write = DeltaMap.write

    def full(self: DeltaMap, noted: Any) -> None:
        write(self, noted)
        if noted:
            raise OSError(errno.ENOSPC, "no space left")

    disk = pool.open_clone("web1")
    same = disk.pread(64 * BLOCK_SIZE, 0)
    for offset in range(0, len(same), BLOCK_SIZE):
        disk.pwrite(same[offset : offset + BLOCK_SIZE], offset)
    disk.flush()
    disk.delta.settle_all()
    with monkeypatch.context() as patch:
        patch.setattr(DeltaMap, "write", full)
        with pytest.raises(OSError, match="no space left"):
            disk.drop([(0, len(same))])
    disk.pwrite(b"acknowledged", 0)
    disk.delta._live.close()
    os.close(disk.delta.fd)
    for layer in disk.layers[:-1]:
        layer.close()
    return read(pool, "web1")[:12], b"acknowledged"


def test_a_drop_that_fails_is_taken_back(web1: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = fail_to_drop(web1, monkeypatch)
    assert found == expected


def test_it_is_noticed_if_a_drop_that_fails_is_not_taken_back(web1: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, Delta, "give_up", "self._take_back(noted)", "pass")
    found, expected = fail_to_drop(web1, monkeypatch)
    assert found != expected


def test_space_is_not_given_back_while_somebody_reads_it(web1: Pool) -> None:
    write_again(web1, "web1")
    with web1.open_clone("web1") as disk:
        with disk.holding():
            assert disk.drop([(0, disk.size & ~4095)]) > 0
            assert not disk.punch_dropped(0)
            with disk.holding():
                pass
        assert disk.punch_dropped(0)


@pytest.mark.parametrize("verb", ["flatten", "compact"])
def test_clients_go_on_meanwhile(web1: Pool, verb: str) -> None:
    write_again(web1, "web1", 0.7)
    with web1.open_clone("web1") as disk:
        model, stop = bytearray(disk.pread(disk.size, 0)), threading.Event()
        wrong: list[int] = []
        half = disk.size // 2 // BLOCK_SIZE * BLOCK_SIZE

        def write() -> None:
            rng = random.Random(5)
            while not stop.is_set():
                offset, data = rng.randrange(half), rng.randbytes(rng.choice([100, 4096, 8192]))
                if rng.random() < 0.3:  # what is beneath: it may be dropped just now
                    data = bytes(model[offset : offset + len(data)])
                disk.pwrite(data, offset)
                model[offset : offset + len(data)] = data
                if rng.random() < 0.1:
                    disk.flush()

        def look() -> None:
            rng = random.Random(6)
            while not stop.is_set():
                offset = half + 8192 + rng.randrange(half - 20000)
                if disk.pread(9000, offset) != model[offset : offset + 9000]:
                    wrong.append(offset)

        threads = [threading.Thread(target=work) for work in (write, look, look)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(3):
                run_on(OpenTarget(web1, disk), verb, name="web1")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not wrong
        assert disk.pread(disk.size, 0) == model
    assert read(web1, "web1") == model


def test_a_header_that_was_changed_is_the_deltas_own(web1: Pool) -> None:
    with web1.open_clone("web1") as disk:
        web1.set_quota("web1", 32 << 20)
        disk.delta.change_header(parent_name="other")
        assert (disk.delta.header.parent_name, disk.delta.header.quota) == ("other", 32 << 20)
        assert read_header(disk.delta.fd, "delta") == disk.delta.header
        assert disk.delta.header.parent_id != NO_PARENT


def test_a_flattened_clone_is_not_reset_to_a_snapshot_of_its_own(web1: Pool) -> None:
    """The first snapshot after it is its parent then, and what it was made from is nothing all the same."""
    content = read(web1, "web1")
    web1.snapshot("web1@before")
    run(web1, "flatten", name="web1")
    web1.snapshot("web1@after")
    with web1.open_clone("web1") as clone:
        clone.pwrite(b"new" * 100, 0)
    now = read(web1, "web1")
    for _ in range(2):
        with pytest.raises(UsageError, match="'web1' was not made from anything that is still there"):
            run(web1, "reset", name="web1")
        assert read(web1, "web1") == now
        run(web1, "rollback", name="web1@before")  # nor when it stands on its base again
        now = content
