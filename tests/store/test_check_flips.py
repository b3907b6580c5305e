"""Every bit of a delta's metadata, and of a base's record and manifest, flipped: noticed or harmless, and repaired.

``make flips`` (``FLIP_ALL=1 pytest -rP tests/store/test_check_flips.py``) flips every bit; the usual run those where
something is written and a sample of the padding.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from checked import PAGES, base_of, content, make_pool, patch
from powercut import DELTA_PATH, open_clone, read_sectors
from simulated import Directory, SimulatedFileSystem
from test_rot import closed_cleanly, flipped

from nbdclone.errors import CorruptDelta, NBDCloneError
from nbdclone.store.check import check_pool
from nbdclone.store.check_delta import Examination
from nbdclone.store.delta_file import HEADER_SLOTS, MAP_SLOTS, PAGE_SIZE
from nbdclone.store.finding import WRONG
from nbdclone.store.repair import repair


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Torn pages are reported, and here there are thousands."""
    caplog.set_level(logging.ERROR, "nbdclone")


def examine(fs: SimulatedFileSystem) -> Examination:
    return Examination(fs, fs.open(DELTA_PATH, os.O_RDWR), DELTA_PATH, "web1")


def kinds(fs: SimulatedFileSystem) -> list[str]:
    return [problem.finding.kind for problem in examine(fs).problems]


def repair_all(fs: SimulatedFileSystem) -> None:
    for _ in range(4):
        problems = examine(fs).problems
        if not any(problem.can_be_repaired for problem in problems):
            break
        repair(fs, fs.open(DELTA_PATH, os.O_RDWR), DELTA_PATH, problems)


# Every bit


def bits_of(page: bytes, rest: int) -> list[int]:
    """Those where something is written, one in ``rest`` of the others; all with FLIP_ALL."""
    step = 1 if os.environ.get("FLIP_ALL") else rest
    return sorted({bit for bit in range(PAGE_SIZE * 8) if page[bit // 8]} | set(range(0, PAGE_SIZE * 8, step)))


@pytest.mark.timeout(3600)
def test_every_flipped_bit_is_named_and_repaired_to_the_byte() -> None:
    fs, expected, delta = closed_cleanly()
    flips = 0
    for name, place in PAGES.items():
        page = delta.read(place, PAGE_SIZE)
        for bit in bits_of(page, 397):
            delta.write(place, flipped(page, bit))
            [problem] = examine(fs).problems
            assert problem.finding.kind == ("header-slot" if "header" in name else "map-slot"), (name, bit)
            assert f"slot {name[-1]}" in problem.finding.what
            repair(fs, fs.open(DELTA_PATH, os.O_RDWR), DELTA_PATH, [problem])
            assert delta.read(place, PAGE_SIZE) == page, (name, bit)
            delta.pending.clear()
            fs.tree.root = Directory({"base": fs.tree.find("/base"), "delta": delta})  # without what was kept
            flips += 1
        fs.die()
    assert read_sectors(open_clone(fs)) == expected
    print(f"flips: {flips}")  # pytest -rP shows it
    assert flips > 1_500


@pytest.mark.timeout(3600)
def test_a_flipped_bit_without_a_twin_is_refused_and_named_as_lost() -> None:
    """The other slot is damaged in each of its sectors: no page can be put together."""
    fs, _, delta = closed_cleanly()
    flips = 0
    for slots, kind in ((HEADER_SLOTS, "header-lost"), (MAP_SLOTS, "map-lost")):
        page = delta.read(slots[0], PAGE_SIZE)
        delta.write(slots[1], bytes(byte ^ 0x55 for byte in page))
        fs.die()
        for bit in bits_of(page, 397):
            delta.write(slots[0], flipped(page, bit))
            assert kinds(fs)[0] == kind, bit
            with pytest.raises(CorruptDelta):
                open_clone(fs).pread(1, 0)
            assert not any(problem.can_be_repaired for problem in examine(fs).problems)
            fs.die()
            delta.pending.clear()
            flips += 1
        delta.write(slots[0], page)
        delta.write(slots[1], page)
    print(f"flips: {flips}")  # pytest -rP shows it


def test_a_flipped_bit_of_the_record_or_the_manifest_never_shows_other_data(tmp_path: Path) -> None:
    """Each bit of both files: the clone reads the same, or is refused; a check with repair makes it readable again."""
    pool = make_pool(tmp_path, "web1")
    expected = content(pool)
    flips = refused = 0
    for name in ("base.json", "manifest"):
        path = base_of(pool) / name
        whole = path.read_bytes()
        step = 1 if os.environ.get("FLIP_ALL") else 23
        for bit in range(0, len(whole) * 8, step):
            path.unlink()
            path.write_bytes(flipped(whole, bit))
            try:
                assert content(pool) == expected, (name, bit)
            except NBDCloneError:
                refused += 1
                found = list(check_pool(pool.path))
                assert any(finding.level == WRONG for finding in found), (name, bit)
            flips += 1
        path.unlink()
        path.write_bytes(whole)
    print(f"flips: {flips}, refused: {refused}")  # pytest -rP shows it
    assert 0 < refused < flips


def bits_in_use(whole: bytes, rest: int) -> list[int]:
    """One in eleven of where something is written, all with FLIP_ALL; and one in ``rest`` of the others.

    A look at the whole pool takes some 10 ms. Every bit of the pages is flipped above.
    """
    step = 1 if os.environ.get("FLIP_ALL") else 11
    written = [bit for bit in range(len(whole) * 8) if whole[bit // 8] and bit % step == 0]
    return [*written, *range(0, len(whole) * 8, rest)]


@pytest.mark.timeout(3600)
def test_a_flipped_bit_of_a_layer_or_a_snapshots_record_never_shows_other_data(tmp_path: Path) -> None:
    """Each bit of the record, and of the layer's pages: all read the same, or are refused, and a check finds it."""
    pool = make_pool(tmp_path, "web1")
    pool.snapshot("web1@golden")
    with pool.open_clone("web1") as clone:
        clone.pwrite(b"own" * 3000, 60_000)
    expected = {name: content(pool, name) for name in ("web1", "web1@golden")}
    layer = pool.places.layer(pool.places.snapshot("web1@golden").layer)
    record = pool.path / "clones" / "web1" / "snapshots" / "golden"
    flips = refused = 0
    for path, places in ((record, [0]), (layer, list(PAGES.values()))):
        for place in places:
            with open(path, "rb") as file:
                whole = os.pread(file.fileno(), PAGE_SIZE, place)
            for bit in bits_in_use(whole, 1009):
                patch(path, place, flipped(whole, bit))
                found = list(check_pool(pool.path))
                if path == layer:
                    assert [finding.name for finding in found] == ["web1@golden"], (place, bit)
                for name, right in expected.items():
                    try:
                        assert content(pool, name) == right, (name, place, bit)
                    except NBDCloneError:
                        assert path == record, (name, place, bit)
                        assert any(finding.level == WRONG for finding in found), (name, bit)
                        refused += 1
                flips += 1
            patch(path, place, whole)
    assert list(check_pool(pool.path)) == []
    print(f"flips: {flips}, refused: {refused}")  # pytest -rP shows it
    assert 0 < refused < flips
