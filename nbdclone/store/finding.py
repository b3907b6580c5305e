"""What a check says."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from nbdclone.store.image import in_words

WRONG = "wrong"
NOTE = "note"

Range = tuple[int, int]  # offset, length

# What a finding can be: docs/check.md says what each means, and what a repair does.
KINDS = frozenset(
    (
        "header-slot",
        "header-slots",
        "header-lost",
        "header-slots-disagree",
        "header-older",
        "newer-format",
        "map-slot",
        "map-slots",
        "map-lost",
        "map-slots-disagree",
        "map-first-torn",
        "not-closed",
        "records",
        "unmarked-data",
        "marked-beyond",
        "too-short",
        "truncated",
        "too-long",
        "delta-missing",
        "orphan",
        "layer-missing",
        "layer-other",
        "layer-going",
        "cycle",
        "not-sealed",
        "snapshot-damaged",
        "snapshot-lost",
        "base-differs",
        "record-missing",
        "record-damaged",
        "manifest-missing",
        "manifest-damaged",
        "manifest-differs",
        "image-missing",
        "image-size",
        "samples",
        "identity",
        "content-changed",
        "hurt",
        "not-hurt",
        "unreadable",
        "in-use",
        "leftover",
        "foreign",
        "name-twice",
        "id-twice",
    )
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found. ``name`` is a base's, clone's or snapshot's, "layer ID" for a layer that
    is no snapshot, empty for the pool itself.

    ``kind`` is for programs, and stays. ``level``: WRONG, or NOTE for what does no harm. ``ranges`` are bytes of the
    disk, (offset, length). ``kept`` is the file that has the bytes as they were before the repair.
    """

    name: str
    kind: str
    what: str
    where: str
    todo: str
    level: str = WRONG
    ranges: tuple[Range, ...] = ()
    repaired: bool = False
    kept: str | None = None

    def __post_init__(self) -> None:
        assert self.kind in KINDS

    def __str__(self) -> str:
        """One line: name, what, where, what to do."""
        bytes_named = f", bytes {in_words(self.ranges)} of the disk" if self.ranges else ""
        state = "repaired" if self.repaired else self.level
        kept = f" (as it was: {self.kept})" if self.kept else ""
        todo = "" if self.repaired else f": {self.todo}"
        line = f"{self.name or 'the pool'}: {state}: {self.what}{bytes_named} ({self.where}){todo}{kept}"
        # Names of files, and what a header says, are anybody's.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


@dataclass(frozen=True, slots=True)
class Problem:
    """A finding, and what would put it right.

    ``patches`` are (offset in the file, its new bytes), each durable before the next is written. ``length`` is the
    file's right length. Neither: there is no one right answer.
    """

    finding: Finding
    patches: tuple[tuple[int, bytes], ...] = ()
    length: int | None = None

    @property
    def can_be_repaired(self) -> bool:
        return bool(self.patches) or self.length is not None

    def done(self, kept: Path | None) -> Finding:
        return replace(self.finding, repaired=True, kept=str(kept) if kept else None)


def unreadable(name: str, path: Path, error: Exception) -> Finding:
    """What cannot be looked at."""
    reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
    what = f"it cannot be examined: {reason}"
    return Finding(name, "unreadable", what, str(path), "see to the disk, or to who may read and write here")
