"""Changing files to put them right: what is changed is kept first, and each step leaves no less than there was."""

from __future__ import annotations

import errno
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

from nbdclone.store.finding import Finding, Problem, Range
from nbdclone.store.fs import FileSystem, data_and_holes
from nbdclone.store.image import save
from nbdclone.store.layer import BLOCK_SIZE

# What stands in the name of a file that a repair left beside the one that it changed; a number follows.
KEPT = ".before-repair-"


def kept_name(path: Path, fs: FileSystem) -> Path:
    """Where the bytes of ``path`` are kept: the first number that is free."""
    for number in itertools.count(1):
        kept = path.with_name(f"{path.name}{KEPT}{number}")
        try:
            fs.stat(kept)
        except FileNotFoundError:
            return kept
    raise AssertionError("there is always another number")


def keep(path: Path, size: int, pieces: Sequence[tuple[int, bytes]], why: Sequence[str], fs: FileSystem) -> Path:
    """Write down, durably, the bytes that are about to be changed in ``path``. Returns the file that has them.

    It is a line of JSON (``file``, ``size``: the length that it had, ``pieces``: each one's offset and length there)
    and then the pieces, one after another.
    """
    about = {
        "format": 1,
        "file": path.name,
        "size": size,
        "time": time.time_ns(),
        "why": list(why),
        "pieces": [{"offset": offset, "length": len(piece)} for offset, piece in pieces],
    }
    kept = kept_name(path, fs)
    save(kept, json.dumps(about).encode() + b"\n" + b"".join(piece for _, piece in pieces), fs)
    return kept


def trailing_data(fs: FileSystem, fd: int, start: int, stop: int) -> list[Range]:
    """The (offset, length) of what is data, and no hole, in a part of the file."""
    found: list[Range] = []
    for hole, end in data_and_holes(fs, fd, start, stop, BLOCK_SIZE):
        if not hole:
            found.append((start, end - start))
        start = end
    return found


def repair(fs: FileSystem, fd: int, path: Path, problems: Sequence[Problem]) -> list[Finding]:
    """Put right what can be. The caller holds the lock of the delta. Raises OSError.

    A power cut anywhere in here: each patch goes to a slot whose page is not believed, or makes sectors right of which
    none was; the page that counts stays as it is until the other one is durable. So a check, and a repair, that comes
    after it finds the same or less.
    """
    chosen = [problem for problem in problems if problem.can_be_repaired]
    if not chosen:
        return []
    size = fs.fstat(fd).st_size
    pieces: dict[int, bytes] = {}
    for problem in chosen:
        for offset, new in problem.patches:
            pieces[offset] = _read_what_can_be(fs, fd, offset, len(new))
        if problem.length is not None:
            for offset, length in trailing_data(fs, fd, problem.length, size):
                pieces[offset] = _read_what_can_be(fs, fd, offset, length)
    kept = keep(path, size, sorted(pieces.items()), [problem.finding.what for problem in chosen], fs)
    # What a process that was killed left in the cache may be the newest page: durable before its twin is written over.
    fs.datasync(fd)
    for problem in chosen:
        for offset, new in problem.patches:
            fs.pwrite_all(fd, new, offset)
            fs.datasync(fd)
        if problem.length is not None:
            fs.ftruncate(fd, problem.length)
            fs.sync(fd)
    return [problem.done(kept) for problem in chosen]


def _read_what_can_be(fs: FileSystem, fd: int, offset: int, length: int) -> bytes:
    data = bytearray(length)
    try:
        count = fs.pread_all(fd, [data], offset, length)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        count = 0  # there is nothing that could be kept
    return bytes(data[:count])
