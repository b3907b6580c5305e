"""A pool: a directory of bases, layers and clones, and what can be done with them.

Where all of it is: :mod:`nbdclone.store.places`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nbdclone.errors import NotFound, UsageError
from nbdclone.store.catalog import BaseInfo, Catalog, CloneInfo, Info, SnapshotInfo
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import Header, change_header
from nbdclone.store.ephemeral import Mark
from nbdclone.store.fs import FILE_SYSTEM, FileSystem, write_durably
from nbdclone.store.image import Image, Progress
from nbdclone.store.importing import import_image
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.locks import mount_of, require_locks
from nbdclone.store.names import split_name, validate_name, validate_snapshot_name
from nbdclone.store.opening import open_beneath, open_disk
from nbdclone.store.places import ENTRIES, EPHEMERAL, Places
from nbdclone.store.removal import remove
from nbdclone.store.resizing import create_over, require_size
from nbdclone.store.sealed import Sealed
from nbdclone.store.since import snapshots_beneath
from nbdclone.store.snapshots import go_back, take_snapshot

logger = logging.getLogger("nbdclone")

# What the header's field holds, less a bit for those who read it as a signed number.
MAX_QUOTA = (1 << 63) - 1


def _require_quota(quota: int | None) -> None:
    if quota is not None and not BLOCK_SIZE <= quota <= MAX_QUOTA:
        raise UsageError(f"a quota is from {BLOCK_SIZE} to {MAX_QUOTA} bytes, not {quota}")


class Pool:
    """A pool's directory. Holds no state: what it says is what the directory says now."""

    def __init__(self, path: Path, fs: FileSystem = FILE_SYSTEM) -> None:
        self.path = path
        self.places = Places(path, fs)
        self._fs = fs
        self._bases = self.places.bases
        self._clones = self.places.clones
        self.settings_path = self.places.settings

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, create: bool = False, fs: FileSystem = FILE_SYSTEM) -> Pool:
        """Open the pool at ``path``; with ``create`` a missing or empty directory is made one.

        Raises NotFound, UsageError if the directory is something else, or on a mount whose locks do not hold, OSError.
        """
        pool = cls(Path(path), fs)
        require_locks(next(place for place in (pool.path, *pool.path.absolute().parents) if place.exists()))
        if pool._bases.is_dir() and pool._clones.is_dir():
            return pool
        if not create:
            raise NotFound(f"{path} is not a pool: 'nbdclone --pool {path} import FILE' makes one")
        if pool.path.exists() and not pool.path.is_dir():
            raise UsageError(f"{path} is not a directory")
        if pool.path.is_dir() and not set(os.listdir(path)) <= ENTRIES:
            raise UsageError(f"{path} is not a pool, and not empty: give a directory of its own")
        missing = [directory for directory in (pool.path, *pool.path.parents) if not directory.exists()]
        for directory in (pool.places.tmp, pool._bases, pool._clones):
            directory.mkdir(parents=True, exist_ok=True)
        for directory in (pool.path, *(directory.parent for directory in missing)):
            fs.sync_directory(directory)
        return pool

    # Making

    def import_base(
        self,
        source: str | os.PathLike[str],
        name: str | None = None,
        *,
        force: bool = False,
        immutable: bool = False,
        progress: Progress | None = None,
    ) -> BaseInfo:
        """Make a base from an image file or block device.

        ``name``: else the file's name up to its last dot. ``force``: although the image seems truncated. ``immutable``:
        with the file system's flag that forbids everybody to change or remove it, which takes root. ``progress`` is
        called with bytes done and bytes in all. Raises UsageError and its children, StorageError.
        """
        source = Path(source)
        name = source.stem if name is None else name
        validate_name(name)
        self.places.require_free([name])
        with self.places.no_space_left(f"import of {source}"), self.places.staging() as staging:
            draft = staging / name
            self._fs.mkdir(draft)
            import_image(source, draft, self._fs, force=force, immutable=immutable, progress=progress)
            self._fs.sync_directory(draft)
            with self.places.changing():
                self.places.require_free([name])
                # All of it is durable; a power cut leaves the base there or not there. Then the name is made so.
                self._fs.rename(draft, self._bases / name)
            self._fs.sync_directory(self._bases)
        info = self.info(name)
        assert isinstance(info, BaseInfo)
        return info

    def create_clones(
        self,
        source: str,
        names: Sequence[str],
        *,
        size: int | None = None,
        quota: int | None = None,
        fill: Callable[[Clone], object] | None = None,
        mark: Mark | None = None,
    ) -> list[CloneInfo]:
        """Make clones of a base, all of them or, if anything is wrong with one, none.

        ``size`` in bytes (default: the base's) may be larger than the base: the rest reads as zeros. ``quota`` is how
        many bytes each may take on the disk (default: no end of it). ``fill`` is given each clone, open, to write to
        it before it has its name. ``mark``: they are ephemeral. Costs the same whatever the size. Raises UsageError
        and its children, BaseChanged, FileTooLarge, and what ``fill`` raises.
        """
        for name in names:
            validate_name(name)
        if len(set(names)) < len(names):
            raise UsageError(f"the name {max(names, key=names.count)!r} is given twice")
        self.places.require_free(names)
        _require_quota(quota)
        with contextlib.closing(self._open_source(source)) as parent:
            size = parent.size if size is None else size
            if size < parent.size:
                raise UsageError(f"a clone of '{source}' has at least its {parent.size} bytes, not {size}")
            require_size(size)
            if isinstance(parent, Image):
                path, identity = parent.directory / "image", (parent.record.id, parent.record.fingerprint)
            else:
                path, identity = parent.path, (parent.header.id, parent.header.fingerprint)
            with self.places.no_space_left("making clones"), self.places.staging() as staging:

                def make(name: str) -> None:
                    header = Header(uuid.uuid4().bytes, *identity, size, time.time_ns(), source, quota=quota or 0)
                    self._make_clone(staging / name, header, fill, mark)

                self._fs.for_each(make, names)
                with self.places.changing():
                    self.places.require_free(names)
                    if split_name(source)[1] is not None:
                        self.places.snapshot(source)  # without a name, its layer may be about to go
                    if not self._fs.still_there(path, self._fs.fstat(parent.fd)):
                        # By another machine, whose locks we do not see.
                        raise NotFound(f"'{source}' was removed just now")
                    # Each is whole and durable already: a power cut in between leaves some of them, and no half one.
                    self.places.rename_all([(staging / name, self._clones / name) for name in names])
                self._fs.sync_directory(self._clones)
        catalog, made = Catalog(self.places), []
        for name in names:
            with contextlib.suppress(NotFound):  # somebody removed or renamed it just now
                made.append(catalog.info(name))
        return [info for info in made if isinstance(info, CloneInfo)]

    def _make_clone(
        self, draft: Path, header: Header, fill: Callable[[Clone], object] | None, mark: Mark | None
    ) -> None:
        """Fill the directory of a clone, which bears its name, and make all in it durable."""
        what = f"clone '{draft.name}'"
        self._fs.mkdir(draft)
        create_over(self.places, draft / "delta", header, what)
        if mark is not None:
            write_durably(draft / EPHEMERAL, mark.dump(), self._fs)
        if fill is not None:
            beneath = open_beneath(self.places, what, header)
            opened = Delta.open(draft / "delta", what, self._fs)
            with Clone(draft.name, [*beneath, opened], self._fs) as clone:
                fill(clone)
        self._fs.sync_directory(draft)

    def set_quota(self, name: str, quota: int | None) -> CloneInfo:
        """Change how many bytes a clone may take on the disk; None: no end of it.

        What it has already, it keeps. Also for a clone that is open, by whichever process: it takes effect there before
        another 64 MiB are written, and at once if the clone is at its quota. Raises UsageError and its children,
        CorruptDelta, UnsupportedFormat.
        """
        _require_quota(quota)
        with self.places.changing():
            place = self.places.place(name)
            if place.parent == self._bases:
                raise UsageError(f"'{name}' is a base: only clones have a quota")
            change_header(place / "delta", self._fs, quota=quota or 0)
        info = self.info(name)
        assert isinstance(info, CloneInfo)
        return info

    def remove(self, names: Sequence[str], still: Callable[[], bool] = lambda: True) -> None:
        """Remove clones, bases and snapshots, all or none.

        Raises NotFound; InUse, naming the dependants that are not removed along with it, or the process that has a
        clone open. Needs no space: on a full disk this is what makes some. ``still`` is asked when it is our turn: are
        they to go?
        """
        remove(self.places, names, still)

    # Snapshots

    def snapshot(self, name: str) -> SnapshotInfo:
        """Make the snapshot ``clone@name`` of a clone that nobody has open. Raises UsageError and its children."""
        clone, snapshot = validate_snapshot_name(name)
        if self.places.place(clone).parent == self._bases:
            raise UsageError(f"'{clone}' is a base, and never changes: clones are made of it as it is")
        with self.open_clone(clone) as disk:
            take_snapshot(self.places, disk, snapshot)
            info = self.info(name)
        assert isinstance(info, SnapshotInfo)
        return info

    def rollback(self, name: str) -> None:
        """Let a clone that nobody has open be as its snapshot ``clone@name`` is. Its later snapshots stay."""
        go_back(self.places, *validate_snapshot_name(name))

    def reset(self, name: str) -> None:
        """Let a clone that nobody has open be as what it was made from is. Its snapshots stay."""
        validate_name(name)
        go_back(self.places, name, None)

    # Looking

    def names(self) -> list[str]:
        """The names of all bases, clones and snapshots, sorted: the exports of a server."""
        return Catalog(self.places).names()

    def entries(self, *, unnamed: bool = False) -> list[Info]:
        """Every base, clone and snapshot, sorted by name. One that is damaged is listed with its ``error``.

        ``unnamed``: the layers too of which no snapshot is left, under their ids.
        """
        return Catalog(self.places, unnamed=unnamed).entries()

    def info(self, name: str) -> Info:
        """One of them. Raises NotFound. What depends on a base is known when all clones were looked at."""
        return Catalog(self.places).info(name)

    # Opening

    def require(self, name: str) -> None:
        """Raise NotFound unless there is a base, clone or snapshot of that name."""
        if split_name(name)[1] is not None:
            self.places.snapshot(name)
        else:
            self.places.place(name)

    def snapshots_beneath(self, name: str) -> dict[str, bytes]:
        """The snapshots since which it is known what was changed in an export: of each the layer's id, by its name.

        None if there is no such export. Raises StorageError, OSError.
        """
        return snapshots_beneath(self.places, name)

    def open_clone(self, name: str) -> Clone:
        """Open a clone for reading and writing, or a base or snapshot for reading.

        Raises NotFound, InUse (who has it), BaseChanged (base, clone and difference), CorruptDelta, UnsupportedFormat.
        """
        return open_disk(self.places, name)

    @contextlib.contextmanager
    def served(self) -> Iterator[int]:
        """Be the pool's server, for as long as the descriptor that this gives is open, in whichever process.

        Raises InUse that names the one there is.
        """
        mount = mount_of(os.stat(self.path).st_dev)
        if mount is not None and mount.locks_are_unknown:
            logger.warning(
                "pool %s is on %s (%s): nothing says whether its locks keep other machines away; use it from one alone",
                self.path, mount.point, mount.kind,
            )  # fmt: skip
        path = self.path / ".server"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._fs.lock(fd, path, f"pool {self.path}")
            yield fd
        finally:
            os.close(fd)

    def _open_source(self, name: str) -> Image | Sealed:
        """What clones are made from."""
        if split_name(name)[1] is not None:
            validate_snapshot_name(name)
            snapshot = self.places.snapshot(name)
            return Sealed.open(self.places.layer(snapshot.layer), f"snapshot '{name}'", self._fs)
        place = self.places.place(name)
        if place.parent == self._clones:
            raise UsageError(f"'{name}' is a clone: clones are made from bases and snapshots ('nbdclone snapshot')")
        return Image.open(name, place, self._fs)
