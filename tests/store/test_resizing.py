"""Other sizes of a clone: what is cut off is gone, and what comes new reads as zeros, whatever was there before."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from nbdclone.errors import FileTooLarge, InUse, NotFound, UsageError
from nbdclone.store.check import check_pool
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import file_size
from nbdclone.store.fs import FileSystem
from nbdclone.store.image import Image
from nbdclone.store.layer import BLOCK_SIZE, MAX_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool
from nbdclone.store.resizing import grow, own_behind, resize
from nbdclone.store.snapshots import take_snapshot

MIB = 1 << 20


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


@pytest.fixture(name="web1")
def make_web1(pool: Pool) -> Pool:
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"mine" * 4096, MIB - 16384)
    return pool


@pytest.mark.parametrize("size", [MIB + 512, MIB + BLOCK_SIZE, 3 * MIB, SEGMENT_SIZE, SEGMENT_SIZE + 512, 1 << 40])
def test_a_larger_disk_has_what_it_had_and_zeros_behind_it(web1: Pool, size: int) -> None:
    before = read(web1, "web1")
    resize(web1.places, "web1", size)
    with web1.open_clone("web1") as disk:
        assert disk.size == size == web1.info("web1").size
        assert disk.pread(MIB, 0) == before
        assert disk.pread(min(size - MIB, MIB), MIB) == bytes(min(size - MIB, MIB))
        disk.pwrite(b"at the end", size - 10)
    with web1.open_clone("web1") as disk:
        assert disk.pread(10, size - 10) == b"at the end"
    assert os.stat(web1.places.delta("web1")).st_size == file_size(size)


def test_an_open_disk_grows_while_it_is_written_and_read(web1: Pool) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []
    with web1.open_clone("web1") as disk:

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                while not stop.is_set():
                    offset = rng.randrange(disk.size // BLOCK_SIZE // 2) * 2 * BLOCK_SIZE + seed * BLOCK_SIZE
                    disk.pwrite(bytes([seed + 1]) * BLOCK_SIZE, offset)
                    assert disk.pread(BLOCK_SIZE, offset) == bytes([seed + 1]) * BLOCK_SIZE
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for size in range(MIB + BLOCK_SIZE * 2, SEGMENT_SIZE + 9 * MIB, 9 * MIB):
            with web1.places.changing():
                grow(disk, size)
        stop.set()
        for thread in threads:
            thread.join()
        content = disk.pread(disk.size, 0)
    assert not failures
    assert read(web1, "web1") == content


def test_what_was_cut_off_does_not_come_back(web1: Pool, content: bytes) -> None:
    resize(web1.places, "web1", 5120)
    assert read(web1, "web1") == content[:5120]
    resize(web1.places, "web1", MIB)
    assert read(web1, "web1") == content[:5120] + bytes(MIB - 5120)
    resize(web1.places, "web1", 2 * MIB)
    assert read(web1, "web1") == content[:5120] + bytes(2 * MIB - 5120)


def test_a_disk_that_shrinks_gives_back_the_space(pool: Pool) -> None:
    pool.create_clones("base", ["web1"], size=2 * SEGMENT_SIZE)
    with pool.open_clone("web1") as disk:
        for offset in (0, SEGMENT_SIZE - MIB, SEGMENT_SIZE + MIB):
            disk.pwrite(os.urandom(MIB), offset)
    assert own_behind(pool.places, "web1", SEGMENT_SIZE - MIB // 2) == MIB + MIB // 2
    before = pool.info("web1").allocated
    resize(pool.places, "web1", SEGMENT_SIZE - MIB // 2)
    assert own_behind(pool.places, "web1", SEGMENT_SIZE - MIB // 2) == 0
    assert before - pool.info("web1").allocated >= MIB + MIB // 2
    assert os.stat(pool.places.delta("web1")).st_size == file_size(SEGMENT_SIZE - MIB // 2)
    assert [finding.kind for finding in check_pool(pool.path) if finding.level == "wrong"] == []
    resize(pool.places, "web1", SEGMENT_SIZE)
    assert own_behind(pool.places, "web1", SEGMENT_SIZE - MIB // 2) == 0


def test_snapshots_keep_their_size(web1: Pool, content: bytes) -> None:
    web1.snapshot("web1@large")
    large = read(web1, "web1@large")
    resize(web1.places, "web1", 4608)
    web1.snapshot("web1@small")
    resize(web1.places, "web1", 2 * MIB)
    assert read(web1, "web1@large") == large
    assert read(web1, "web1@small") == content[:4608]
    assert read(web1, "web1") == content[:4608] + bytes(2 * MIB - 4608)
    web1.create_clones("web1@small", ["web2"], size=MIB)
    assert read(web1, "web2") == content[:4608] + bytes(MIB - 4608)
    web1.rollback("web1@large")
    assert read(web1, "web1") == large
    web1.rollback("web1@small")
    assert read(web1, "web1") == content[:4608]
    web1.reset("web1")
    assert read(web1, "web1") == content


@pytest.mark.parametrize("seed", range(2))
def test_a_random_life_with_other_sizes_reads_as_the_model_does(pool: Pool, content: bytes, seed: int) -> None:
    rng = random.Random(seed)
    pool.create_clones("base", ["web1"])
    model = bytearray(content)
    sealed: dict[str, bytes] = {}
    for number in range(60):
        size = rng.choice([512 * rng.randrange(8, 4096), BLOCK_SIZE * rng.randrange(1, 512)])
        if (kind := rng.random()) < 0.3:
            if size > len(model) and rng.random() < 0.5:
                with pool.open_clone("web1") as disk:
                    disk.pwrite(model[:512], 0)
                    grow(disk, size)
                    assert disk.pread(size, 0) == model + bytes(size - len(model))
            else:
                resize(pool.places, "web1", size)
            model = model[:size] + bytes(max(size - len(model), 0))
        elif kind < 0.4:
            pool.snapshot(f"web1@s{number}")
            sealed[f"web1@s{number}"] = bytes(model)
        elif kind < 0.45 and sealed:
            name = rng.choice(sorted(sealed))
            pool.rollback(name)
            model = bytearray(sealed[name])
        else:
            with pool.open_clone("web1") as disk:
                offset = rng.randrange(len(model))
                length = rng.randrange(min(len(model) - offset, 20_000) + 1)
                if rng.random() < 0.3:
                    disk.zero(offset, length)
                    model[offset : offset + length] = bytes(length)
                else:
                    disk.pwrite(data := rng.randbytes(length), offset)
                    model[offset : offset + length] = data
        assert read(pool, "web1") == model, number
    for name, expected in sealed.items():
        assert read(pool, name) == expected


def test_a_base_that_is_larger_than_the_disk_does_not_show_when_it_grows(pool: Pool, content: bytes) -> None:
    """As after a rebase to a larger base: the disk ends within a block of it."""
    pool.create_clones("base", ["web1"])
    resize(pool.places, "web1", 5120)
    with pool.open_clone("web1") as disk:
        disk.copy_up(4096, 1024)
    path = pool.places.delta("web1")
    for layered in (False, True):
        delta = Delta.open(path, "clone")
        delta.header = header = type(delta.header)(
            **{name: getattr(delta.header, name) for name in delta.header.__slots__} | {"overlap": None}
        )
        for slot in (0, 512 << 10):
            FileSystem().pwrite_all(delta.fd, header.encode(), slot)
        base = Image.open("base", pool.path / "bases" / "base")
        with Clone("web1", [base, delta]) as disk:
            if layered:
                take_snapshot(pool.places, disk, "s")
            grow(disk, 20_480)
            assert disk.pread(20_480, 0) == content[:5120] + bytes(15_360)
        assert read(pool, "web1") == content[:5120] + bytes(15_360)
        resize(pool.places, "web1", 5120)


def test_sizes_that_cannot_be_are_refused_and_nothing_is_changed(web1: Pool) -> None:
    for size in (0, 512, 4095, 5000 + 1, MAX_SIZE + 512, -4096):
        with pytest.raises(UsageError, match="a size is a multiple of 512 from 4096 to"):
            resize(web1.places, "web1", size)
    for name, error in (("base", UsageError), ("nothing", NotFound), ("web1@x", UsageError)):
        with pytest.raises(error):
            resize(web1.places, name, 2 * MIB)
    with web1.open_clone("web1") as disk:
        with pytest.raises(UsageError, match="does not grow"):
            grow(disk, 4096)
        with pytest.raises(InUse, match="in use by this process"):
            resize(web1.places, "web1", 4096)
    assert web1.info("web1").size == MIB


def test_a_file_system_that_cannot_hold_it_says_so_and_the_disk_stays(
    web1: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ftruncate(fd: int, size: int) -> None:
        raise OSError(27, "File too large")

    before = read(web1, "web1")
    with web1.open_clone("web1") as disk:
        with monkeypatch.context() as patch:
            patch.setattr(FileSystem, "ftruncate", staticmethod(ftruncate))
            with pytest.raises(FileTooLarge):
                grow(disk, 2 * MIB)
        assert disk.size == MIB
        disk.pwrite(b"x", 0)
    assert read(web1, "web1")[1:] == before[1:]


def test_a_shrink_that_was_cut_off_after_its_commit_is_finished_by_the_next_who_comes(
    web1: Pool, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that is a snapshot, whose layer others would read from behind its end."""

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with web1.open_clone("web1") as disk:
        disk.pwrite(b"x" * 20_000, 0)
    with monkeypatch.context() as patch:
        patch.setattr("nbdclone.store.delta.cut_off", killed)
        with pytest.raises(Killed):
            resize(web1.places, "web1", 4608)
    assert os.stat(web1.places.delta("web1")).st_size > file_size(4608)
    web1.snapshot("web1@s")
    assert os.stat(web1.places.layer(web1.places.snapshot("web1@s").layer)).st_size == file_size(4608)
    resize(web1.places, "web1", MIB)
    assert read(web1, "web1") == b"x" * 4608 + bytes(MIB - 4608)


def test_a_damaged_map_behind_which_nobody_can_look_keeps_a_disk_from_changing_its_size(
    web1: Pool, tmp_path: Path
) -> None:
    with open(web1.places.delta("web1"), "r+b") as file:
        for slot in (64 << 10, 576 << 10):
            file.seek(slot + 100)
            file.write(b"rot")
    with pytest.raises(Exception, match="fail their checksum"):
        resize(web1.places, "web1", 8192)
    assert web1.info("web1").size == MIB
