"""Laws 2 and 5 with several threads: by chance with many, and between any two instructions with two."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator

import pytest
from interleave import interleaved
from mutation import mutate
from powercut import open_clone, simulated_disk, stamp
from simulated import SECTOR, SimulatedFileSystem

from nbdclone.store.clone import Clone
from nbdclone.store.fs import FileSystem
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool

LENGTH = 6 * BLOCK_SIZE
BASE = b"".join(stamp(0, number) for number in range(LENGTH // SECTOR))
NEW = b"n" * LENGTH

# A clone whose blocks 2 and 3 are its own, 3 a hole, and the others its base's, with one flush behind it.
Prepared = Callable[[], tuple[SimulatedFileSystem, Clone]]


@pytest.fixture
def prepared() -> Prepared:
    def prepare() -> tuple[SimulatedFileSystem, Clone]:
        fs = simulated_disk()
        clone = open_clone(fs)
        clone.pwrite(b"o" * BLOCK_SIZE, 2 * BLOCK_SIZE)
        clone.zero(3 * BLOCK_SIZE, BLOCK_SIZE)
        clone.flush()
        return fs, clone

    return prepare


OLD = BASE[: 2 * BLOCK_SIZE] + b"o" * BLOCK_SIZE + bytes(BLOCK_SIZE) + BASE[4 * BLOCK_SIZE :]


def moments() -> Iterator[int]:
    return itertools.count()


@pytest.mark.parametrize("written", [[0], [2], [3], [5], [0, 2, 3, 5]], ids=str)
def test_a_read_beside_a_write_sees_old_or_new_blocks_at_any_moment(prepared: Prepared, written: list[int]) -> None:
    read_beside_writes(prepared, written)


def read_beside_writes(prepared: Prepared, written: list[int]) -> None:
    for moment in moments():
        _, clone = prepared()
        seen = bytearray(LENGTH)

        def write(clone: Clone = clone) -> None:
            for block in written:
                clone.pwrite(NEW[:BLOCK_SIZE], block * BLOCK_SIZE)

        reached = interleaved(lambda: clone.read_into(memoryview(seen), 0), moment, write)  # noqa: B023
        for block in range(6):
            part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
            assert seen[part] in (OLD[part], NEW[part] if block in written else OLD[part]), (moment, block)
        if not reached:
            break
    assert moment > 50


def test_a_read_that_looks_at_the_map_while_it_changes_is_noticed(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = "bytes(self._owners_of(chain, segment, nowait)[first:last])"
    mutate(monkeypatch, Clone, "_runs", copied, "memoryview(self._owners_of(chain, segment, nowait))[first:last]")
    with pytest.raises(AssertionError):
        read_beside_writes(prepared, [0])


def test_two_unaligned_writes_in_one_block_both_survive_whenever_the_second_comes(prepared: Prepared) -> None:
    write_beside_write(prepared)


def test_writes_that_do_not_exclude_one_another_are_noticed(prepared: Prepared) -> None:
    def without_lock() -> tuple[SimulatedFileSystem, Clone]:
        fs, clone = prepared()
        clone._changing = threading.Semaphore(9)  # type: ignore[assignment]
        return fs, clone

    with pytest.raises(AssertionError):
        write_beside_write(without_lock)


def write_beside_write(prepared: Prepared) -> None:
    for block in (0, 2):
        for moment in moments():
            _, clone = prepared()
            start = block * BLOCK_SIZE
            reached = interleaved(
                lambda: clone.pwrite(b"A" * 700, start + 100),  # noqa: B023
                moment,
                lambda: clone.pwrite(b"B" * 700, start + 1000),  # noqa: B023
            )
            expected = bytearray(OLD[start : start + BLOCK_SIZE])
            expected[100:800] = b"A" * 700
            expected[1000:1700] = b"B" * 700
            assert clone.pread(BLOCK_SIZE, start) == expected, (block, moment)
            if not reached:
                break
        assert moment > 50


@pytest.mark.parametrize("block", [0, 2, 3])
@pytest.mark.parametrize("zero", [False, True], ids=["write", "zero"])
def test_a_flush_at_any_moment_of_a_change_does_not_make_the_next_flush_miss_it(
    prepared: Prepared, block: int, zero: bool
) -> None:
    def change(clone: Clone) -> None:
        if zero:
            clone.zero(block * BLOCK_SIZE, BLOCK_SIZE)
        else:
            clone.pwrite(NEW[:BLOCK_SIZE], block * BLOCK_SIZE)

    for moment in moments():
        fs, clone = prepared()
        reached = interleaved(lambda: change(clone), moment, clone.flush)  # noqa: B023
        expected = clone.pread(LENGTH, 0)
        assert expected != OLD or (zero and block == 3)
        clone.flush()
        assert read_after_power_cut(fs) == expected, moment
        if not reached:
            break
    assert moment > 50


@pytest.mark.parametrize("block", [0, 2])
def test_a_write_at_any_moment_of_a_flush_is_whole_or_not_there_after_a_power_cut(
    prepared: Prepared, block: int
) -> None:
    part = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
    for moment in moments():
        fs, clone = prepared()
        clone.pwrite(b"f" * BLOCK_SIZE, 5 * BLOCK_SIZE)
        reached = interleaved(
            clone.flush,
            moment,
            lambda: clone.pwrite(NEW[part], part.start),  # noqa: B023
        )
        found = read_after_power_cut(fs)
        assert found[5 * BLOCK_SIZE :] == b"f" * BLOCK_SIZE, moment
        assert found[part] in (OLD[part], NEW[part]), moment
        clone.flush()
        assert read_after_power_cut(fs)[part] == NEW[part], moment
        if not reached:
            break
    assert moment > 50


def read_after_power_cut(fs: SimulatedFileSystem) -> bytes:
    """The worst that can be: of what was not synced nothing is left."""
    return open_clone(fs.crash(_Nothing())).pread(LENGTH, 0)


class _Nothing(random.Random):
    def randrange(self, *arguments: int) -> int:  # type: ignore[override]
        return 0


def test_threads_that_write_pieces_of_the_same_blocks_lose_none(pool: Pool) -> None:
    """Each thread has every n-th piece of 300 bytes of 16 blocks for itself; reads see its pieces old or new."""
    threads, piece, size = 6, 300, 16 * BLOCK_SIZE
    pool.create_clones("base", ["shared"])
    with pool.open_clone("shared") as clone:
        base = clone.pread(size, 0)
        final: dict[int, bytes] = {}
        failures: list[BaseException] = []

        def work(me: int) -> None:
            rng = random.Random(me)
            mine = list(range(me * piece, size - piece, threads * piece))
            held = {offset: base[offset : offset + piece] for offset in mine}
            try:
                for _ in range(150):
                    offset = rng.choice(mine)
                    assert clone.pread(piece, offset) == held[offset]
                    held[offset] = bytes([rng.randrange(256)]) * piece
                    clone.pwrite(held[offset], offset)
                    if rng.random() < 0.1:
                        clone.flush()
            except BaseException as error:
                failures.append(error)
            final.update(held)

        workers = [threading.Thread(target=work, args=(me,)) for me in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures, failures[0]
    with pool.open_clone("shared") as clone:
        for offset, content in final.items():
            assert clone.pread(piece, offset) == content


class ColdFileSystem(FileSystem):
    """Reads that wait do so until they are let go; reads that must not wait are always answered EAGAIN."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.let_go = threading.Event()

    def preadv(self, fd, buffers, offset, flags=0):  # type: ignore[no-untyped-def, override]
        if flags & self.NOWAIT:
            raise BlockingIOError
        if self.slow and threading.current_thread() is not threading.main_thread():
            self.asked.set()
            self.let_go.wait(20)
        return FileSystem.preadv(fd, buffers, offset, flags)

    slow = False


def test_a_nowait_write_does_not_wait_for_a_write_that_waits_for_the_disk(pool: Pool) -> None:
    pool.create_clones("base", ["cold"])
    fs = ColdFileSystem()
    with Pool.open(pool.path, fs=fs).open_clone("cold") as clone:
        clone.pread(BLOCK_SIZE, 0)  # the map is loaded
        fs.slow = True
        waiting = threading.Thread(target=clone.pwrite, args=(b"part", 100))
        waiting.start()
        assert fs.asked.wait(20)
        threading.Timer(10, fs.let_go.set).start()  # lest the test hang where this is broken
        with pytest.raises(BlockingIOError):
            clone.write_nowait(memoryview(bytes(BLOCK_SIZE)), BLOCK_SIZE)
        assert not fs.let_go.is_set(), "it waited"
        fs.let_go.set()
        waiting.join()


@pytest.mark.parametrize("operation", ["read", "write"])
def test_two_threads_that_touch_a_segment_for_the_first_time_agree_on_its_map(pool: Pool, operation: str) -> None:
    """Both put the segment's map together at once; a write of one is not lost with its map."""
    for attempt in range(30):
        name = f"{operation}-{attempt}"
        pool.create_clones("base", [name])
        with pool.open_clone(name) as clone:
            barrier = threading.Barrier(2)

            def other(clone: Clone = clone, barrier: threading.Barrier = barrier) -> None:
                barrier.wait()
                if operation == "read":
                    clone.pread(BLOCK_SIZE, BLOCK_SIZE)
                else:
                    clone.pwrite(b"other", BLOCK_SIZE)

            thread = threading.Thread(target=other)
            thread.start()
            barrier.wait()
            clone.pwrite(b"mine", 0)
            thread.join()
            assert clone.pread(4, 0) == b"mine"
            if operation == "write":
                assert clone.pread(5, BLOCK_SIZE) == b"other"
