"""Where everything is in a pool, and the parts that every change of it is made of.

    POOL/bases/NAME/{image,manifest,base.json}
    POOL/layers/ID/delta              a sealed delta; its id in hex
    POOL/layers/ID/going              it is merged, and its space is given back already
    POOL/clones/NAME/delta
    POOL/clones/NAME/snapshots/NAME   which layer that is, in JSON
    POOL/settings.toml   what a server of it obeys; written by people, and optional
    POOL/.lock       held for the moment in which a name appears or goes
    POOL/.server     held by the server of the pool for as long as it runs
    POOL/.control    the Unix socket on which it is told what to do; .control.new while it is made
    POOL/.tmp/       what is being made or removed; leftovers of the dead are cleared by the next who comes

There is no database: a name is a directory's name, and the files inside say the rest. Whatever appears, is made whole
and durable in ``.tmp`` first and renamed into place; whatever goes, is renamed out of its place first. A rename
is atomic, so a crash leaves each name there or not there, and nothing half.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nbdclone.errors import NameTaken, NBDCloneError, NotFound, StorageError
from nbdclone.store.delta_file import Header, read_header
from nbdclone.store.fs import FileSystem
from nbdclone.store.image import BaseRecord, thaw_bases
from nbdclone.store.locks import is_locked_directory, take
from nbdclone.store.names import is_name, split_name
from nbdclone.store.records import hex_bytes, load_record

SETTINGS = "settings.toml"
# The names of a clone's snapshots, in its directory; and how long it is to live, if it is not to stay.
SNAPSHOTS = "snapshots"
EPHEMERAL = "ephemeral"
# Beside a layer that is merged, and whose space is given back already: it is not to be read without what is above it.
GOING = "going"
# Held, in a directory of ``.tmp``, by whoever makes something there.
STAGING_LOCK = ".lock"
CONTROL_SOCKET = ".control"
NEW_CONTROL_SOCKET = ".control.new"
# How the directories in ``.tmp`` begin that keep what came of a stream, and for how long: time to notice, and to send
# the rest of it. ('nbdclone receive --forget' does not wait.)
RECEIVED = "receive-"
RECEIVED_STATE = "state.json"
KEEP_RECEIVED_S = 14 * 86400
# What is in a pool's directory.
ENTRIES = {"bases", "clones", "layers", SETTINGS, CONTROL_SOCKET, NEW_CONTROL_SOCKET, ".lock", ".server", ".tmp"}


class Snapshot(NamedTuple):
    """A sealed point of a clone's life: the layer's id, and when (Unix, ns)."""

    layer: bytes
    created: int

    def dump(self) -> bytes:
        return json.dumps({"layer": self.layer.hex(), "created": self.created}).encode() + b"\n"

    @classmethod
    def load(cls, path: Path, fs: FileSystem) -> Snapshot:
        """Raises NotFound, StorageError."""
        return load_record(
            path,
            fs,
            "not a snapshot's record",
            lambda read: cls(hex_bytes(16, read["layer"]), int(read["created"])),
        )


def is_kept(path: Path) -> bool:
    """Is this, in ``.tmp``, what came of a stream that may still go on?"""
    if not path.name.startswith(RECEIVED):
        return False
    try:
        return time.time() - os.stat(path / RECEIVED_STATE).st_mtime < KEEP_RECEIVED_S
    except FileNotFoundError:  # so little came that nothing was noted
        return False


class Places:
    """The directories of a pool. Holds no state: what it says is what they say now."""

    def __init__(self, path: Path, fs: FileSystem) -> None:
        self.path = path
        self.fs = fs
        self.bases = path / "bases"
        self.layers = path / "layers"
        self.clones = path / "clones"
        self.tmp = path / ".tmp"
        self.settings = path / SETTINGS

    # Names

    def place(self, name: str) -> Path:
        """The directory of a base or clone. Raises NotFound."""
        if is_name(name):
            for directory in (self.clones, self.bases):
                if (directory / name).is_dir():
                    return directory / name
        raise NotFound(f"there is no base or clone {name[:100]!r} in {self.path}")

    def names_in(self, directory: Path) -> list[str]:
        """The names of the bases, or of the clones."""
        return [name for name in os.listdir(directory) if is_name(name)]

    def require_free(self, names: Sequence[str]) -> None:
        """Raises NameTaken."""
        for name in names:
            for directory, kind in ((self.bases, "base"), (self.clones, "clone")):
                if (directory / name).exists():
                    raise NameTaken(f"there is a {kind} '{name}' in {self.path} already")

    # Deltas and what is beneath them

    def delta(self, clone: str) -> Path:
        return self.clones / clone / "delta"

    def layer(self, layer_id: bytes) -> Path:
        """Where the layer of that id has its file, if there is one."""
        return self.layers / layer_id.hex() / "delta"

    def is_going(self, layer_id: bytes) -> bool:
        """May the layer get no name any more, and nothing be put on it? See :mod:`nbdclone.store.giving_back`."""
        return self.layer(layer_id).with_name(GOING).exists()

    def layer_ids(self) -> list[bytes]:
        """Of all that are in the directory of layers, those too that do not count (see :meth:`snapshots`)."""
        try:
            names = os.listdir(self.layers)
        except FileNotFoundError:
            return []
        return [bytes.fromhex(name) for name in names if len(name) == 32 and not set(name) - set("0123456789abcdef")]

    def header(self, path: Path | str) -> Header:
        """The header of a delta. Raises NotFound, StorageError and its children, OSError."""
        with self.reading(path) as (_, header):
            return header

    @contextlib.contextmanager
    def reading(self, path: Path | str) -> Iterator[tuple[int, Header]]:
        """A delta's file to be read, open, and its header. Raises NotFound, StorageError and its children, OSError.

        Without a lock: another may take its place at the path, and whoever has it open may change it.
        """
        try:
            fd = self.fs.open_file(path, os.O_RDONLY)
        except FileNotFoundError:
            clone = Path(path).parent
            if clone.parent == self.clones:
                self.place(clone.name)  # as it is said of one that was never there
            raise NotFound(f"{path} is missing") from None
        try:
            yield fd, read_header(fd, str(path), self.fs)
        finally:
            self.fs.close(fd)

    def snapshots(self, clone: str, own_id: bytes | None = None, *, strict: bool = False) -> dict[str, Snapshot]:
        """The snapshots of a clone by name, oldest first. ``own_id``: of its delta, if that is known.

        One whose layer is still the clone's own delta was cut off before its commit, and does not count. One that
        cannot be read is left out; ``strict``: raises StorageError.
        """
        directory = self.clones / clone / SNAPSHOTS
        found: dict[str, Snapshot] = {}
        try:
            names = [name for name in os.listdir(directory) if is_name(name)]
        except (FileNotFoundError, NotADirectoryError):
            return found
        if names and own_id is None:
            with contextlib.suppress(NBDCloneError, OSError):
                own_id = self.header(self.delta(clone)).id
        for name in names:
            with contextlib.suppress(NotFound if strict else NBDCloneError):
                found[name] = Snapshot.load(directory / name, self.fs)
        counting = [item for item in found.items() if item[1].layer != own_id]
        return dict(sorted(counting, key=lambda item: (item[1].created, item[0])))

    def snapshot(self, name: str) -> Snapshot:
        """The snapshot ``clone@name``. Raises NotFound."""
        clone, snapshot = split_name(name)
        found = self.snapshots(clone).get(snapshot or "") if is_name(clone) else None
        if found is None:
            raise NotFound(f"there is no snapshot {name[:200]!r} in {self.path}")
        return found

    def find_base(self, base_id: bytes, once: str) -> str | None:
        """The base of that id: under the name that it had ``once``, when a clone was made for one, else under any.

        Raises what is wrong with the base of that name, if it is no other.
        """
        while True:
            names = self.names_in(self.bases)
            problem: NBDCloneError | None = None
            for name in [once, *names]:
                try:
                    if is_name(name) and BaseRecord.load(self.bases / name / "base.json").id == base_id:
                        return name
                except NotFound:
                    pass
                except NBDCloneError as error:
                    problem = error if name == once else problem
            if self.names_in(self.bases) == names:  # else one was renamed meanwhile
                break
        if problem:
            raise problem
        return None

    # The parts of a change

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Be the only one who makes a name appear or go: for a moment."""
        with self.fs.exclusively(self.path / ".lock"):
            yield

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A directory in ``.tmp`` of our own, locked while we live; what is still in it at the end, goes."""
        self.tmp.mkdir(exist_ok=True)
        path = self.tmp / uuid.uuid4().hex
        with self.changing():
            self.clear_leftovers()
            self.fs.mkdir(path)
            # A file: NFS gives no lock on a directory that another machine would see.
            fd = os.open(path / STAGING_LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            take(fd)
        try:
            yield path
        finally:
            os.close(fd)  # first: NFS does not remove what is open
            thaw_bases(self.fs, path)
            self.fs.remove_tree(path, ignore_errors=True)

    def clear_leftovers(self) -> None:
        """Remove what processes that died left in ``.tmp``: what nobody holds a lock on. To be called when changing."""
        for name in os.listdir(self.tmp):
            path = self.tmp / name
            with contextlib.suppress(OSError):
                if not is_kept(path) and not is_locked_directory(path, STAGING_LOCK):
                    thaw_bases(self.fs, path)
                    self.fs.remove_tree(path, ignore_errors=True)

    def rename_all(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        """Rename (from, to), all or, if one fails, none. Bases that go are last, when their clones durably went."""
        done: list[tuple[Path, Path]] = []
        try:
            for source, target in pairs:
                if source.parent == self.bases:
                    self.fs.sync_directory(self.clones)
                self.fs.rename(source, target)
                done.append((source, target))
        except BaseException:
            for source, target in reversed(done):
                with contextlib.suppress(OSError):
                    self.fs.rename(target, source)
            raise

    @contextlib.contextmanager
    def no_space_left(self, what: str) -> Iterator[None]:
        """Say a full disk in a line, with what is free."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            free = os.statvfs(self.path)
            raise StorageError(
                f"{what}: no space left in {self.path} ({free.f_bavail * free.f_frsize} bytes free); nothing was made"
            ) from None
