"""What came of a stream so far: a directory in ``.tmp`` that outlives who began it.

    POOL/.tmp/receive-ID/          ID: the stream's, in hex
        .lock                      held by whoever receives it
        state.json                 what it is, and how much of it is here, durably
        base/image                 the base's image, if it is sent and needed
        layers/ID/delta            the layers

It is kept for KEEP_S after the last that came, so that the stream can go on where it was cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from nbdclone.errors import InUse, NBDCloneError, StorageError
from nbdclone.store.delta_file import EMPTY_BITMAP
from nbdclone.store.image import save
from nbdclone.store.layer_writer import Filled
from nbdclone.store.locks import is_locked_directory, take
from nbdclone.store.places import RECEIVED, RECEIVED_STATE, STAGING_LOCK, Places
from nbdclone.store.stream_head import Head

FORMAT = 1
# A head of 254 layers with long names has 300 KiB, as JSON within JSON; and the map of a segment as hex.
MAX_STATE = 4 << 20


@dataclass(frozen=True, slots=True)
class State:
    """How much is here: all before ``section``, and of that as much as ``filled`` says; None: nothing of it."""

    head: Head
    section: int = 0
    filled: Filled | None = None

    @property
    def offset(self) -> int:
        return self.filled.offset if self.filled else 0

    def dump(self) -> bytes:
        offset, segment, bitmap = self.filled or (0, 0, b"")
        fields = {"format": FORMAT, "head": self.head.encode().decode(), "section": self.section}
        return json.dumps(fields | {"offset": offset, "segment": segment, "bitmap": bitmap.hex()}).encode()

    @classmethod
    def load(cls, path: Path) -> State:
        """Raises StorageError, OSError."""
        try:
            with open(path, "rb") as file:
                fields = json.loads(file.read(MAX_STATE))
            bitmap = bytes.fromhex(fields["bitmap"])
            filled = Filled(int(fields["offset"]), int(fields["segment"]), bitmap) if bitmap else None
            head, section = Head.decode(fields["head"].encode()), int(fields["section"])
            if fields["format"] != FORMAT or (filled and len(bitmap) != len(EMPTY_BITMAP)):
                raise ValueError("of another format")
            if not 0 <= section < len(head.sections) or (filled and filled.offset > head.sections[section]):
                raise ValueError("beyond its end")
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, NBDCloneError) as error:
            raise StorageError(f"{path}: not the state of a stream ({error})") from None
        return cls(head, section, filled)


class Draft:
    """Such a directory, ours: nobody else receives that stream while it is open."""

    def __init__(self, places: Places, head: Head, *, resume: bool) -> None:
        """Take what is there of the stream, if ``resume``, or begin anew.

        Raises InUse, OSError. What cannot be read is begun anew, too.
        """
        self.path = places.tmp / f"{RECEIVED}{head.stream_id.hex()}"
        self.state = State(head)
        self._places = places
        places.tmp.mkdir(exist_ok=True)
        with places.changing():
            places.clear_leftovers()
            if self.path.exists() and is_locked_directory(self.path, STAGING_LOCK):
                raise InUse(f"this stream of '{head.title}' is being received already ({self.path})")
            if resume and self.path.exists():
                with contextlib.suppress(StorageError, FileNotFoundError):
                    self.state = State.load(self.path / RECEIVED_STATE)
            if self.state.section == 0 and self.state.filled is None and self.path.exists():
                trash = places.tmp / uuid.uuid4().hex
                places.fs.rename(self.path, trash)
                places.fs.remove_tree(trash)
            if not self.path.exists():
                places.fs.mkdir(self.path)
            self._fd = os.open(self.path / STAGING_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            take(self._fd)

    def save(self, state: State) -> None:
        """Note how much is here: it is durable. A crash here leaves the note before, which is true, too."""
        for directory in (self.path / "layers", self.path / "base"):
            if directory.is_dir():
                self._places.fs.sync_directory(directory)
        save(self.path / RECEIVED_STATE, state.dump(), self._places.fs)
        self._places.fs.sync_directory(self._places.tmp)
        self.state = state

    def directory(self, *names: str) -> Path:
        """A directory in it, made if it is not there."""
        path = self.path
        for name in names:
            path = path / name
            if not path.is_dir():
                self._places.fs.mkdir(path)
        return path

    def close(self, *, keep: bool) -> None:
        """Let go of it; ``keep`` what it has."""
        os.close(self._fd)  # first: NFS does not remove what is open
        if not keep:
            with self._places.changing(), contextlib.suppress(FileNotFoundError):
                if not is_locked_directory(self.path, STAGING_LOCK):  # nobody came in between
                    self._places.fs.remove_tree(self.path)


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A stream that was cut off, and can go on. ``since``: when the last of it came (Unix, seconds)."""

    path: Path
    state: State
    since: float

    @property
    def done(self) -> int:
        """How far into its sections it came, in bytes of disk."""
        return sum(self.state.head.sections[: self.state.section]) + self.state.offset


def interrupted(places: Places) -> list[Interrupted]:
    """The streams that were cut off, the latest last."""
    found = []
    for path in places.tmp.glob(f"{RECEIVED}*") if places.tmp.is_dir() else ():
        with contextlib.suppress(NBDCloneError, OSError):
            if not is_locked_directory(path, STAGING_LOCK):
                found.append(
                    Interrupted(path, State.load(path / RECEIVED_STATE), os.stat(path / RECEIVED_STATE).st_mtime)
                )
    return sorted(found, key=lambda each: each.since)


def forget(places: Places) -> int:
    """Remove what came of streams that were cut off, but of those that are being received now. Returns how many."""
    count = 0
    with places.changing():
        for path in list(places.tmp.glob(f"{RECEIVED}*")) if places.tmp.is_dir() else ():
            if not is_locked_directory(path, STAGING_LOCK):
                places.fs.remove_tree(path)
                count += 1
    return count
