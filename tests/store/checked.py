"""A pool to be damaged and checked: a base and clones of two segments, and what they read as."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbdclone.store.check import check_pool, is_clean
from nbdclone.store.delta_file import HEADER_SLOTS, MAP_SLOTS, PAGE_SIZE, SEGMENT_SPAN
from nbdclone.store.finding import WRONG, Finding
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE
from nbdclone.store.pool import Pool

SIZE = SEGMENT_SIZE + 10 * BLOCK_SIZE
# What is used of the disk: its begin, and from before the border of the segments to its end.
WINDOWS = ((0, 10 * BLOCK_SIZE), (SEGMENT_SIZE - 4 * BLOCK_SIZE, 14 * BLOCK_SIZE))
# Where the header and the map pages of both segments stand, by what a test calls them.
PAGES = {
    "header A": HEADER_SLOTS[0],
    "header B": HEADER_SLOTS[1],
    "map 0 A": MAP_SLOTS[0],
    "map 0 B": MAP_SLOTS[1],
    "map 1 A": SEGMENT_SPAN + MAP_SLOTS[0],
    "map 1 B": SEGMENT_SPAN + MAP_SLOTS[1],
}


def make_pool(root: Path, *clones: str) -> Pool:
    """A pool with a base 'debian' and clones that have blocks of their own in both segments, all closed."""
    source = root / "debian.img"
    with open(source, "wb") as file:
        file.truncate(SIZE)
        for offset, length in WINDOWS:
            os.pwrite(file.fileno(), b"base" * (length // 4), offset)
    pool = Pool.open(root / "pool", create=True)
    pool.import_base(source)
    pool.create_clones("debian", clones or ["web1", "web2"])
    for name in clones or ["web1", "web2"]:
        write_to(pool, name)
    return pool


def write_to(pool: Pool, name: str) -> None:
    with pool.open_clone(name) as clone:
        clone.pwrite(name.encode() * 2000, 100)
        clone.flush()
        clone.pwrite(name.encode() * 2000, SEGMENT_SIZE - 4000)


def delta_of(pool: Pool, name: str = "web1") -> Path:
    return pool.path / "clones" / name / "delta"


def base_of(pool: Pool, name: str = "debian") -> Path:
    return pool.path / "bases" / name


def content(pool: Pool, name: str = "web1") -> list[bytes]:
    with pool.open_clone(name) as clone:
        return [clone.pread(length, offset) for offset, length in WINDOWS]


def patch(path: Path, offset: int, new: bytes) -> bytes:
    """Write over a part of a file; what was there."""
    with open(path, "r+b") as file:
        before = os.pread(file.fileno(), len(new), offset)
        os.pwrite(file.fileno(), new, offset)
    return before


def page(path: Path, offset: int) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), PAGE_SIZE, offset).ljust(PAGE_SIZE, b"\0")


def edit_record(pool: Pool, change: Callable[[dict[str, Any]], object]) -> None:
    record = base_of(pool) / "base.json"
    fields = json.loads(record.read_text())
    change(fields)
    record.write_text(json.dumps(fields))


def check(pool: Pool, *names: str, **wishes: Any) -> list[Finding]:
    found = list(check_pool(pool.path, names, **wishes))
    for finding in found:
        line = str(finding)
        assert "\n" not in line
        assert finding.name in line
        assert finding.what.split("\n")[0][:20] in line
    return found


def told(found: list[Finding]) -> list[tuple[str, str]]:
    """Who and what, of all findings."""
    return [(finding.name, finding.kind) for finding in found]


def wrong(found: list[Finding]) -> list[tuple[str, str]]:
    """Who and what is wrong and was not repaired."""
    return [(finding.name, finding.kind) for finding in found if finding.level == WRONG and not finding.repaired]


def put_back(kept: Path) -> None:
    """Undo a repair of a delta by what it kept, as docs/check.md says."""
    with open(kept, "rb") as file:
        about = json.loads(file.readline())
        with open(kept.with_name(about["file"]), "r+b") as target:
            for piece in about["pieces"]:
                os.pwrite(target.fileno(), file.read(piece["length"]), piece["offset"])
            target.truncate(about["size"])


def repair_and_require(pool: Pool, expected: list[tuple[str, str]], *, clean: bool = True) -> list[Finding]:
    """Repair: just these are repaired. A second check is clean, and a second repair has nothing to do."""
    found = check(pool, repair=True)
    assert [(finding.name, finding.kind) for finding in found if finding.repaired] == expected
    again = check(pool, repair=True)
    assert not any(finding.repaired for finding in again)
    if clean:
        assert is_clean(found)
        assert is_clean(again)
        assert not wrong(check(pool))
    return found
