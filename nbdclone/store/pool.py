"""A pool: a directory of bases and clones, and the operations that change which there are.

    POOL/bases/NAME/{image,manifest,base.json}
    POOL/clones/NAME/delta
    POOL/settings.toml   what a server of it obeys; written by people, and optional
    POOL/.lock       held for the moment in which a name appears or goes
    POOL/.server     held by the server of the pool for as long as it runs
    POOL/.tmp/       what is being made or removed; leftovers of the dead are cleared by the next who comes

There is no database: a name is a directory's name, and the files inside say the rest. Whatever appears, is made whole
and durable in ``.tmp`` first and renamed into place; whatever goes, is renamed out of its place first. A rename
is atomic, so a crash leaves each name there or not there, and nothing half.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdclone.errors import (
    BaseChanged,
    InUse,
    InvalidName,
    NameTaken,
    NBDCloneError,
    NotFound,
    StorageError,
    UsageError,
)
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import Header, change_header, read_header
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.image import BaseRecord, Identity, Image, Progress, thaw, thaw_bases
from nbdclone.store.importing import import_image
from nbdclone.store.layer import BLOCK_SIZE, MAX_SIZE, MIN_SIZE, SECTOR_SIZE
from nbdclone.store.locks import describe_process, holders, is_locked_directory, mount_of, require_locks, take

logger = logging.getLogger("nbdclone")

_SETTINGS = "settings.toml"
# Held, in a directory of ``.tmp``, by whoever makes something there.
STAGING_LOCK = ".lock"
# What is in a pool's directory.
ENTRIES = {"bases", "clones", _SETTINGS, ".lock", ".server", ".tmp"}
# Names are directory names and export names, are typed by people and pasted into URIs. '@' and '+' are kept free.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# What the header's field holds, less a bit for those who read it as a signed number.
MAX_QUOTA = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """A base. Sizes in bytes, ``created`` in Unix seconds, ``allocated`` as the file system counts it."""

    name: str
    id: str
    size: int
    allocated: int
    created: float
    fingerprint: str
    source: str
    clones: tuple[str, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CloneInfo:
    """A clone. ``allocated`` is what its delta takes on the disk, and ``quota`` what it may; ``in_use_by`` says who has
    it open, in words.
    """

    name: str
    id: str
    size: int
    allocated: int
    created: float
    parent: str
    quota: int | None = None
    in_use_by: str | None = None
    error: str | None = None


def is_name(text: str) -> bool:
    """Can a base or clone be called that?"""
    return _NAME.fullmatch(text) is not None


def validate_name(name: str) -> None:
    """Raises InvalidName that says what a name may be."""
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 40 else name[:40] + "..."
        raise InvalidName(
            f"{shown!r} cannot be a name: 1 to 100 letters, digits, '.', '-' and '_', the first a letter or digit"
        )


def _require_quota(quota: int | None) -> None:
    if quota is not None and not BLOCK_SIZE <= quota <= MAX_QUOTA:
        raise UsageError(f"a quota is from {BLOCK_SIZE} to {MAX_QUOTA} bytes, not {quota}")


class Pool:
    """A pool's directory. Holds no state: what it says is what the directory says now."""

    def __init__(self, path: Path, fs: FileSystem = FILE_SYSTEM) -> None:
        self.path = path
        self._fs = fs
        self._bases = path / "bases"
        self._clones = path / "clones"
        self._tmp = path / ".tmp"
        self.settings_path = path / _SETTINGS

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
        for directory in (pool._tmp, pool._bases, pool._clones):
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
        self._require_free([name])
        with self._no_space_left(f"import of {source}"), self._staging() as staging:
            draft = staging / name
            self._fs.mkdir(draft)
            import_image(source, draft, self._fs, force=force, immutable=immutable, progress=progress)
            self._fs.sync_directory(draft)
            with self._changing():
                self._require_free([name])
                # All of it is durable; a power cut leaves the base there or not there. Then the name is made so.
                self._fs.rename(draft, self._bases / name)
            self._fs.sync_directory(self._bases)
        return self._base_info(name, clones=())

    def create_clones(
        self,
        source: str,
        names: Sequence[str],
        *,
        size: int | None = None,
        quota: int | None = None,
        fill: Callable[[Clone], object] | None = None,
    ) -> list[CloneInfo]:
        """Make clones of a base, all of them or, if anything is wrong with one, none.

        ``size`` in bytes (default: the base's) may be larger than the base: the rest reads as zeros. ``quota`` is how
        many bytes each may take on the disk (default: no end of it). ``fill`` is given each clone, open, to write to
        it before it has its name. Costs the same whatever the size. Raises UsageError and its children, BaseChanged,
        FileTooLarge, and what ``fill`` raises.
        """
        for name in names:
            validate_name(name)
        if len(set(names)) < len(names):
            raise UsageError(f"the name {max(names, key=names.count)!r} is given twice")
        self._require_free(names)
        _require_quota(quota)
        with contextlib.closing(self._open_base(source)) as base:
            size = base.size if size is None else size
            if size < base.size:
                raise UsageError(f"a clone of '{source}' has at least its {base.size} bytes, not {size}")
            if size % SECTOR_SIZE or not MIN_SIZE <= size <= MAX_SIZE:
                raise UsageError(
                    f"a size is a multiple of {SECTOR_SIZE} from {MIN_SIZE} to {MAX_SIZE} bytes, not {size}"
                )
            with self._no_space_left("making clones"), self._staging() as staging:

                def make(name: str) -> None:
                    self._fs.mkdir(staging / name)
                    identity = (uuid.uuid4().bytes, base.record.id, base.record.fingerprint)
                    header = Header(*identity, size, time.time_ns(), source, quota=quota or 0)
                    delta = staging / name / "delta"
                    Delta.create(delta, header, self._fs)
                    if fill is not None:
                        opened = Delta.open(delta, f"clone '{name}'", self._fs)
                        with Clone(name, [self._open_base(source), opened], self._fs) as clone:
                            fill(clone)
                    self._fs.sync_directory(staging / name)

                self._fs.for_each(make, names)
                with self._changing():
                    self._require_free(names)
                    if not self._fs.still_there(base.directory / "image", self._fs.fstat(base.fd)):
                        raise NotFound(f"base '{source}' was removed just now")  # by another machine: see _hold
                    # Each is whole and durable already: a power cut in between leaves some of them, and no half one.
                    self._rename_all([(staging / name, self._clones / name) for name in names])
                self._fs.sync_directory(self._clones)
        return [self._clone_info(name, lambda _header: source, {}) for name in names]

    def set_quota(self, name: str, quota: int | None) -> CloneInfo:
        """Change how many bytes a clone may take on the disk; None: no end of it.

        What it has already, it keeps. Also for a clone that is open, by whichever process: it takes effect there before
        another 64 MiB are written, and at once if the clone is at its quota. Raises UsageError and its children,
        CorruptDelta, UnsupportedFormat.
        """
        _require_quota(quota)
        with self._changing():
            place = self._place(name)
            if place.parent == self._bases:
                raise UsageError(f"'{name}' is a base: only clones have a quota")
            change_header(place / "delta", self._fs, quota=quota or 0)
        info = self.info(name)
        assert isinstance(info, CloneInfo)
        return info

    def remove(self, names: Sequence[str]) -> None:
        """Remove clones and bases, all or none.

        Raises NotFound; InUse, naming the dependants of a base that are not removed along with it, or the process that
        has a clone open. Needs no space: on a full disk this is what makes some.
        """
        names = list(dict.fromkeys(names))
        self._tmp.mkdir(exist_ok=True)
        going: list[tuple[Path, Path]] = []
        with contextlib.ExitStack() as held:
            held.callback(self._discard, going)  # once more when it is closed: NFS does not remove what is open
            with self._changing():
                self._clear_leftovers()
                places = [self._place(name) for name in names]
                if any(place.parent == self._bases for place in places):
                    self._refuse_dependants(names)
                for name, place in zip(names, places, strict=True):
                    self._hold(name, place, held)
                for name, place in zip(names, places, strict=True):
                    thaw(self._fs, place / "image", name)
                # Clones before bases: a power cut in between leaves no clone without its base. Straight into ``.tmp``,
                # without a directory of our own: that would take a block, and the disk may have none.
                places.sort(key=lambda place: place.parent == self._bases)
                pairs = [(place, self._tmp / uuid.uuid4().hex) for place in places]
                self._rename_all(pairs)
                going += pairs
                held.callback(self._discard, going)
                # Before another machine takes it for what the dead have left: else a power cut may bring a name back
                # when half of its files are gone.
                self._fs.sync_directory(self._clones)
                self._fs.sync_directory(self._bases)

    def _discard(self, going: Sequence[tuple[Path, Path]]) -> None:
        for _, trash in going:
            if trash.exists():
                self._fs.remove_tree(trash, ignore_errors=True)

    # Looking

    def names(self) -> list[str]:
        """The names of all bases and clones, sorted: the exports of a server."""
        return sorted({*self._names_in(self._bases), *self._names_in(self._clones)})

    def entries(self) -> list[BaseInfo | CloneInfo]:
        """Every base and clone, sorted by name. One that is damaged is listed with its ``error``."""
        bases: dict[bytes, str] = {}
        base_names = self._names_in(self._bases)
        children: dict[str, list[str]] = {name: [] for name in base_names}
        for name in base_names:
            with contextlib.suppress(NBDCloneError):
                bases[BaseRecord.load(self._bases / name / "base.json").id] = name
        locks = holders()
        clones = [
            self._clone_info(name, lambda header: bases.get(header.parent_id), locks)
            for name in sorted(self._names_in(self._clones))
        ]
        for clone in clones:
            children.setdefault(clone.parent, []).append(clone.name)
        infos = [self._base_info(name, tuple(children[name])) for name in base_names]
        return sorted([*infos, *clones], key=lambda info: info.name)

    def info(self, name: str) -> BaseInfo | CloneInfo:
        """One base or clone. Raises NotFound. What depends on a base is known when all clones were looked at."""
        if self._place(name).parent == self._clones:
            return self._clone_info(name, self._known_base, holders())
        for entry in self.entries():
            if entry.name == name:
                return entry
        raise NotFound(f"'{name}' was removed just now")

    # Opening

    def require(self, name: str) -> None:
        """Raise NotFound unless there is a base or clone of that name."""
        self._place(name)

    def open_clone(self, name: str) -> Clone:
        """Open a clone for reading and writing, or a base for reading.

        Raises NotFound, InUse (who has it), BaseChanged (base, clone and difference), CorruptDelta, UnsupportedFormat.
        """
        if self._place(name).parent == self._bases:
            return Clone(name, [self._open_base(name)], self._fs)
        delta = Delta.open(self._clones / name / "delta", f"clone '{name}'", self._fs)
        try:
            base = self._open_parent(name, delta.header)
        except BaseException:
            delta.close()
            raise
        return Clone(name, [base, delta], self._fs)

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

    def _open_base(self, name: str) -> Image:
        place = self._place(name)
        if place.parent == self._clones:
            raise UsageError(f"'{name}' is a clone: clones are made from bases")
        return Image.open(name, place, self._fs)

    def _open_parent(self, clone: str, header: Header) -> Image:
        try:
            parent = self._find_base(header)
        except NBDCloneError as error:
            raise type(error)(f"clone '{clone}' is refused: its base '{header.parent_name}': {error}") from None
        if parent is None:
            raise BaseChanged(f"clone '{clone}': its base '{header.parent_name}' ({header.parent_id.hex()}) is missing")
        try:
            base = Image.open(parent, self._bases / parent, self._fs)
        except BaseChanged as error:
            raise BaseChanged(f"clone '{clone}' is refused: {error}") from None
        if base.record.fingerprint != header.fingerprint:
            base.close()
            raise BaseChanged(
                f"clone '{clone}' is refused: it was made when base '{parent}' had the fingerprint "
                f"{header.fingerprint.hex()[:16]}, and the base has {base.record.fingerprint.hex()[:16]} now"
            )
        return base

    def _find_base(self, header: Header) -> str | None:
        """The base of that id: under the name it had when the clone was made, else under any.

        Raises what is wrong with the base of that name, if it is no other.
        """
        problem: NBDCloneError | None = None
        for name in [header.parent_name, *self._names_in(self._bases)]:
            try:
                if _NAME.fullmatch(name) and BaseRecord.load(self._bases / name / "base.json").id == header.parent_id:
                    return name
            except NotFound:
                pass
            except NBDCloneError as error:
                problem = error if name == header.parent_name else problem
        if problem:
            raise problem
        return None

    def _known_base(self, header: Header) -> str | None:
        with contextlib.suppress(NBDCloneError):
            return self._find_base(header)
        return None

    # The parts of a change

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        with self._fs.exclusively(self.path / ".lock"):
            yield

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """A directory in ``.tmp`` of our own, locked while we live; what is still in it at the end, goes."""
        self._tmp.mkdir(exist_ok=True)
        path = self._tmp / uuid.uuid4().hex
        with self._changing():
            self._clear_leftovers()
            self._fs.mkdir(path)
            # A file: NFS gives no lock on a directory that another machine would see.
            fd = os.open(path / STAGING_LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            take(fd)
        try:
            yield path
        finally:
            os.close(fd)  # first: NFS does not remove what is open
            thaw_bases(self._fs, path)
            self._fs.remove_tree(path, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        """Remove what processes that died left in ``.tmp``: what nobody holds a lock on."""
        for name in os.listdir(self._tmp):
            path = self._tmp / name
            with contextlib.suppress(OSError):
                if not is_locked_directory(path, STAGING_LOCK):
                    thaw_bases(self._fs, path)
                    self._fs.remove_tree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _no_space_left(self, what: str) -> Iterator[None]:
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

    def _rename_all(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        """Rename (from, to), all or, if one fails, none. Bases that go, go last, when their clones durably went."""
        done: list[tuple[Path, Path]] = []
        try:
            for source, target in pairs:
                if source.parent == self._bases:
                    self._fs.sync_directory(self._clones)
                self._fs.rename(source, target)
                done.append((source, target))
        except BaseException:
            for source, target in reversed(done):
                with contextlib.suppress(OSError):
                    self._fs.rename(target, source)
            raise

    def _require_free(self, names: Sequence[str]) -> None:
        for name in names:
            for directory, kind in ((self._bases, "base"), (self._clones, "clone")):
                if (directory / name).exists():
                    raise NameTaken(f"there is a {kind} '{name}' in {self.path} already")

    def _refuse_dependants(self, names: Sequence[str]) -> None:
        removed = set(names)
        entries = self.entries()
        for info in entries:
            if isinstance(info, CloneInfo) and not info.id and info.name not in removed:
                raise InUse(
                    f"no base is removed while it cannot be told which one clone '{info.name}' needs: {info.error}"
                )
        for info in entries:
            if isinstance(info, BaseInfo) and info.name in removed:
                dependants = [clone for clone in info.clones if clone not in removed]
                if dependants:
                    shown = ", ".join(dependants[:10]) + (
                        f" and {len(dependants) - 10} more" if len(dependants) > 10 else ""
                    )
                    raise InUse(f"base '{info.name}' is needed by {len(dependants)} clone(s): {shown}")

    def _hold(self, name: str, place: Path, held: contextlib.ExitStack) -> None:
        """Lock what is about to be removed, so that nobody has it open and nobody opens it."""
        kind, file = ("base", "image") if place.parent == self._bases else ("clone", "delta")
        try:
            fd = self._fs.open_file(place / file, os.O_RDONLY)
        except FileNotFoundError:
            return  # a damaged one may be removed too
        except StorageError:
            if (place / file).is_file():  # it may be open elsewhere, and this user cannot see
                raise
            return
        held.callback(self._fs.close, fd)
        self._fs.lock(fd, place / file, f"{kind} '{name}'")
        directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        held.callback(os.close, directory)
        fcntl.flock(directory, fcntl.LOCK_EX)  # in ``.tmp`` it is ours, and not what the dead have left

    def _place(self, name: str) -> Path:
        """The directory of a base or clone. Raises NotFound."""
        if _NAME.fullmatch(name):
            for directory in (self._clones, self._bases):
                if (directory / name).is_dir():
                    return directory / name
        raise NotFound(f"there is no base or clone {name[:100]!r} in {self.path}")

    def _names_in(self, directory: Path) -> list[str]:
        return [name for name in os.listdir(directory) if _NAME.fullmatch(name)]

    def _base_info(self, name: str, clones: tuple[str, ...]) -> BaseInfo:
        place = self._bases / name
        try:
            record = BaseRecord.load(place / "base.json")
            status = os.stat(place / "image")
        except (NBDCloneError, OSError) as error:
            return BaseInfo(name, "", 0, 0, 0.0, "", "", clones, error=str(error))
        return BaseInfo(
            name,
            record.id.hex(),
            record.size,
            status.st_blocks * 512,
            record.created / 1e9,
            record.fingerprint.hex(),
            record.source,
            clones,
            None if Identity.of(status) == record.identity else "changed, moved or copied: verified when it is opened",
        )

    def _clone_info(
        self, name: str, parent_of: Callable[[Header], str | None], locks: dict[tuple[int, int], int]
    ) -> CloneInfo:
        path = f"{self._clones}/{name}/delta"  # a Path takes as long as the rest, for thousands of clones
        try:
            fd = self._fs.open_file(path, os.O_RDONLY)
            try:
                header = read_header(fd, path, self._fs)
                status = self._fs.fstat(fd)
            finally:
                self._fs.close(fd)
        except (NBDCloneError, OSError) as error:
            return CloneInfo(name, "", 0, 0, 0.0, "", error=str(error))
        parent = parent_of(header)
        holder = locks.get((status.st_dev, status.st_ino))
        missing = None if parent else f"its base '{header.parent_name}' ({header.parent_id.hex()}) is missing"
        return CloneInfo(
            name,
            header.id.hex(),
            header.size,
            status.st_blocks * 512,
            header.created / 1e9,
            parent or header.parent_name,
            header.quota or None,
            describe_process(holder) if holder is not None else None,
            missing,
        )
