"""Ephemeral clones: made when a client asks for one, and removed when their time is over, unless somebody keeps them.

Such a clone has a file in its directory that says how long it is to live. Without it, it is a clone like any other.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdclone.errors import NotFound, StorageError, UsageError
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.names import is_name
from nbdclone.store.places import EPHEMERAL, Places
from nbdclone.store.records import load_record

if TYPE_CHECKING:
    from nbdclone.control.verbs import Steps, Target


@dataclass(frozen=True, slots=True)
class Mark:
    """``template``: by what it was made. ``lifetime_s``: None for as long as somebody is connected. ``created``: Unix
    seconds.
    """

    template: str
    lifetime_s: float | None
    created: float

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def load(cls, path: Path, fs: FileSystem = FILE_SYSTEM) -> Mark:
        """Raises NotFound, StorageError."""

        def parse(read: dict[str, Any]) -> Mark:
            lifetime_s = read["lifetime_s"]
            lifetime_s = None if lifetime_s is None else float(lifetime_s)
            return cls(str(read["template"]), lifetime_s, float(read["created"]))

        return load_record(path, fs, "does not say how long the clone is to live", parse)


def new_mark(template: str, lifetime_s: float | None) -> Mark:
    return Mark(template, lifetime_s, time.time())


def marks(places: Places) -> Iterator[tuple[str, Mark]]:
    """The ephemeral clones of a pool. One whose mark cannot be read is left out, and so stays."""
    for name in places.names_in(places.clones):
        with contextlib.suppress(NotFound, StorageError, OSError):
            yield name, Mark.load(places.clones / name / EPHEMERAL, places.fs)


def is_ephemeral(places: Places, name: str) -> bool:
    return is_name(name) and (places.clones / name / EPHEMERAL).is_file()


def keep(target: Target, name: str) -> Steps:
    """Make an ephemeral clone stay. Raises NotFound, UsageError if it is none."""
    places = target.pool.places
    with places.changing():
        directory = places.place(name)
        try:
            places.fs.unlink(directory / EPHEMERAL)
        except FileNotFoundError:
            raise UsageError(f"'{name}' is not ephemeral: it stays as it is") from None
        places.fs.sync_directory(directory)
    yield 1, 1
    return {"kind": "clone", "name": name}
