"""A base under examination: image, manifest and record against one another and against what its clones say.

The three have the content's fingerprint in common: the record states it, the manifest hashes to it, the image can be
hashed to it, and so does every clone's header. What one of them lost the others have.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nbdclone.errors import InUse, NotFound, StorageError, UnsupportedFormat
from nbdclone.store.delta_file import Header
from nbdclone.store.finding import NOTE, WRONG, Finding, Range
from nbdclone.store.fs import FileSystem
from nbdclone.store.image import (
    HASH_SIZE,
    ZERO_CHUNK,
    BaseRecord,
    Identity,
    Progress,
    chunk_count,
    compare,
    fingerprint_of,
    hash_all,
    read_manifest,
    save,
    take_samples,
)
from nbdclone.store.layer import MAX_SIZE, MIN_SIZE, SECTOR_SIZE
from nbdclone.store.repair import KEPT, kept_name
from nbdclone.store.trace import TRACE_NAME

_REIMPORT = "put the image back: a base whose content has the same fingerprint serves its clones again"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the user asked for."""

    deep: bool = False
    repair: bool = False
    progress: Progress | None = None


class BaseExamination:
    """One look at base ``name``. ``clones`` are the headers of all clones of the pool that can be read, by name.

    ``others`` are the ids of the other bases. After :meth:`run`, ``record`` is what is known of the base (None: not
    enough), and ``changed`` the ranges of the image that are not what they were, as far as that was looked at.
    """

    def __init__(
        self,
        fs: FileSystem,
        directory: Path,
        clones: Mapping[str, Header],
        others: frozenset[bytes],
        changing: Callable[[], contextlib.AbstractContextManager[None]],
        wishes: Wishes,
    ) -> None:
        self.record: BaseRecord | None = None
        self.changed: list[Range] = []
        self._fs = fs
        self._name = directory.name
        self._image = directory / "image"
        self._manifest = directory / "manifest"
        self._json = directory / "base.json"
        self._clones = clones
        self._others = others
        self._changing = changing
        self._wishes = wishes

    def run(self) -> Iterator[Finding]:
        """Look, and with ``repair`` put right what has one right answer. Raises OSError."""
        problem = self._load_record()
        if problem and problem.kind in ("newer-format", "unreadable"):
            yield problem
            return
        try:
            fd = self._fs.open_file(self._image, os.O_RDONLY)
        except (FileNotFoundError, StorageError) as error:
            if problem:
                yield problem
            missing = isinstance(error, FileNotFoundError)
            what = "its image is missing" if missing else str(error)
            yield self._finding("image-missing" if missing else "unreadable", what, self._image, _REIMPORT)
            return
        try:
            if self._wishes.deep or self._wishes.repair:
                try:  # it is not removed while it is read
                    self._fs.lock(fd, self._image, f"base '{self._name}'", shared=True)
                except InUse as error:
                    yield self._finding("in-use", str(error), self._image, "check it again later", level=NOTE)
                    return
            yield from self._examine(fd, problem)
        except OSError as error:
            what = f"it cannot be examined: {os.strerror(error.errno or errno.EIO)}"
            todo = "see to the disk, or to who may read and write here"
            yield self._finding("unreadable", what, self._image.parent, todo)
        finally:
            self._fs.close(fd)

    def _finding(
        self, kind: str, what: str, path: Path, todo: str, *, level: str = WRONG, ranges: tuple[Range, ...] = ()
    ) -> Finding:
        return Finding(self._name, kind, what, str(path), todo, level, ranges)

    def _load_record(self) -> Finding | None:
        try:
            self.record = BaseRecord.load(self._json)
        except UnsupportedFormat as error:
            return self._finding("newer-format", str(error), self._json, "use that nbdclone")
        except NotFound:
            return self._finding("record-missing", "its base.json is missing", self._json, self._how_to_rebuild())
        except StorageError as error:
            if _is_replaceable(self._json) and not os.access(self._json, os.R_OK):
                return self._finding("unreadable", str(error), self._json, "see to who may read it")
            return self._finding("record-damaged", str(error), self._json, self._how_to_rebuild())
        return None

    def _how_to_rebuild(self) -> str:
        return "--repair makes it anew from the image and the headers of its clones, where they agree"

    # What is right?

    def _examine(self, fd: int, problem: Finding | None) -> Iterator[Finding]:
        status = self._fs.fstat(fd)
        size = status.st_size
        named, manifest_problem = self._fingerprint_of_manifest(size)
        if self.record and size != self.record.size and named == self.record.fingerprint:
            what = f"its base.json says {self.record.size} bytes, image and manifest have {size}"
            problem = self._finding("record-damaged", what, self._json, "--repair corrects it")
            self.record = replace(self.record, size=size)
        elif self.record and size != self.record.size:
            kind = "truncated" if size < self.record.size else "grown"
            what = f"its image was {kind}, from {self.record.size} to {size} bytes"
            gone = ((size, self.record.size - size),) if size < self.record.size else ()
            self.changed = list(gone)
            yield self._finding("image-size", what, self._image, self._how_to_restore(), ranges=gone)
            return
        if size % SECTOR_SIZE or not MIN_SIZE <= size <= MAX_SIZE:
            if problem:
                yield problem
            yield self._finding("image-size", f"its image has {size} bytes: no base has", self._image, _REIMPORT)
            return
        if self.record and not problem and not manifest_problem and named != self.record.fingerprint:
            manifest_problem = self._finding(
                "manifest-differs",
                f"its manifest and its base.json have different fingerprints ({named.hex()[:16]} and "
                f"{self.record.fingerprint.hex()[:16]})",
                self._manifest,
                "--repair hashes the image and makes the one anew that is wrong",
            )
        known = self.record is not None and self.record.is_known(fd, Identity.of(status))
        suspect = problem or manifest_problem or not known
        if self._wishes.deep or (self._wishes.repair and suspect):
            yield from self._examine_content(fd, size, problem, manifest_problem)
            return
        yield from (finding for finding in (problem, manifest_problem) if finding)
        if self.record and not known:
            yield self._not_known(Identity.of(status) == self.record.identity)

    def _not_known(self, same_identity: bool) -> Finding:
        if same_identity:
            what = "a sampled block of its image is not what it was: the content changed"
            return self._finding("samples", what, self._image, "--deep says which bytes differ")
        what = "its image was moved, copied or touched since it was last known to be right"
        todo = "the next open hashes it, and so do --deep and --repair"
        return self._finding("identity", what, self._image, todo, level=NOTE)

    def _how_to_restore(self) -> str:
        source = self.record.source if self.record else ""
        return f"put these bytes back from a backup or from {source or 'where it came from'}; its clones are refused"

    def _fingerprint_of_manifest(self, size: int) -> tuple[bytes, Finding | None]:
        """The fingerprint that the manifest gives; and what is wrong with the manifest by itself."""
        todo = "--repair makes it anew if the image still has its fingerprint"
        try:
            length = self._fs.stat(self._manifest).st_size
            if length != chunk_count(size) * HASH_SIZE:
                what = f"its manifest has {length} bytes, and should have {chunk_count(size) * HASH_SIZE}"
                return b"", self._finding("manifest-damaged", what, self._manifest, todo)
            return fingerprint_of(size, read_manifest(self._manifest, size)), None
        except FileNotFoundError:
            return b"", self._finding("manifest-missing", "its manifest is missing", self._manifest, todo)
        except StorageError as error:
            return b"", self._finding("manifest-damaged", str(error), self._manifest, todo)

    def _examine_content(
        self, fd: int, size: int, problem: Finding | None, manifest_problem: Finding | None
    ) -> Iterator[Finding]:
        usable = not manifest_problem or manifest_problem.kind == "manifest-differs"
        nothing = itertools.repeat(ZERO_CHUNK, chunk_count(size))
        manifest = read_manifest(self._manifest, size) if usable else nothing
        found, differing = compare(fd, size, manifest, self._wishes.progress, lenient=True)
        if self.record is None:
            assert problem is not None
            yield from self._examine_lost_record(fd, size, found, problem, manifest_problem)
            return
        if found == self.record.fingerprint:
            if manifest_problem:
                yield from self._renew_manifest(fd, size, manifest_problem)
            if problem:
                yield from self._renew_record(fd, self.record, problem)
            else:
                yield from self._renew_identity(fd)
        elif manifest_problem and usable and not differing and self._agree(found):
            # Image, manifest and all of the clones against the record.
            wrong = replace(manifest_problem, where=str(self._json))
            yield from self._renew_record(fd, replace(self.record, fingerprint=found), wrong)
        else:
            if manifest_problem:
                todo = "the image is not what it was either: what its bytes should be is known nowhere here"
                yield replace(manifest_problem, todo=todo)
            self.changed = differing if usable and not manifest_problem else [(0, size)]
            what = "the content of its image is not what was imported, or cannot be read" + (
                "" if usable and not manifest_problem else "; without a manifest it is not known which"
            )
            yield self._finding(
                "content-changed", what, self._image, self._how_to_restore(), ranges=tuple(self.changed)
            )

    def _examine_lost_record(
        self, fd: int, size: int, found: bytes, problem: Finding, manifest_problem: Finding | None
    ) -> Iterator[Finding]:
        """The record is gone. Clones that have the content's fingerprint say which id it had."""
        candidates = {
            (header.parent_id, header.parent_name == self._name)
            for header in self._clones.values()
            if header.fingerprint == found and header.parent_id not in self._others
        }
        named = {base_id for base_id, same_name in candidates if same_name}
        ids = named or {base_id for base_id, _ in candidates}
        if len(ids) != 1:
            reason = (
                "its clones disagree on its id"
                if ids
                else "no clone has the fingerprint of its image: it is not what it was, or has no clones"
            )
            todo = f"not repaired, for {reason}; 'nbdclone import {self._image} --name OTHER' makes a base of it"
            yield replace(problem, todo=todo)
            return
        identity = Identity.of(self._fs.fstat(fd))
        record = BaseRecord(ids.pop(), size, found, identity.mtime_ns, "", identity)
        if manifest_problem:
            yield from self._renew_manifest(fd, size, manifest_problem)
        yield from self._renew_record(fd, record, problem)

    def _agree(self, fingerprint: bytes) -> bool:
        """Is there no clone of this base that says otherwise?"""
        assert self.record is not None
        return all(
            header.fingerprint == fingerprint for header in self._clones.values() if header.parent_id == self.record.id
        )

    # Making anew

    def _renew_record(self, fd: int, record: BaseRecord, problem: Finding) -> Iterator[Finding]:
        """The new record in the old one's place, which is kept. The content has been hashed."""
        if not self._wishes.repair:
            yield problem
            return
        record = replace(record, identity=Identity.of(self._fs.fstat(fd)), samples=take_samples(fd, record.size))
        with self._changing():
            if not _is_replaceable(self._json):
                yield replace(problem, todo="what stands in its place is no file: move it away")
                return
            kept = self._keep(self._json)
            save(self._json, record.dump(), self._fs)
        self.record = record
        yield replace(problem, repaired=True, kept=kept)

    def _renew_identity(self, fd: int) -> Iterator[Finding]:
        assert self.record is not None
        status = self._fs.fstat(fd)
        if self.record.is_known(fd, Identity.of(status)):
            return
        same = Identity.of(status) == self.record.identity
        finding = self._not_known(same)
        if same:  # the content is right, so the samples are not
            finding = replace(finding, what="its samples are not those of its content, which is right", level=NOTE)
        finding = replace(finding, todo="its content is what it was: --repair and the next open record that")
        yield from self._renew_record(fd, self.record, finding)

    def _renew_manifest(self, fd: int, size: int, problem: Finding) -> Iterator[Finding]:
        """Hash the image, whose fingerprint is right, once more into a new manifest, and put that in place."""
        if not self._wishes.repair:
            yield problem
            return
        if not _is_replaceable(self._manifest):
            yield replace(problem, todo="what stands in its place is no file: move it away")
            return
        draft = self._manifest.with_name(f"manifest.{uuid.uuid4().hex}.new")
        try:
            self._write_manifest(draft, fd, size)
            with self._changing():
                kept = self._keep(self._manifest)
                self._fs.rename(draft, self._manifest)
                self._fs.sync_directory(self._manifest.parent)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(draft)
        yield replace(problem, repaired=True, kept=kept)

    def _write_manifest(self, draft: Path, fd: int, size: int) -> None:
        target = self._fs.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        try:
            self._fs.ftruncate(target, chunk_count(size) * HASH_SIZE)
            for chunk, digest in enumerate(hash_all(fd, size)):
                if digest != ZERO_CHUNK:
                    self._fs.pwrite_all(target, digest, chunk * HASH_SIZE)
            self._fs.sync(target)  # before the rename
        finally:
            self._fs.close(target)

    def _keep(self, path: Path) -> str | None:
        """A second name for the file that is about to be replaced: it costs nothing, and keeps all of it."""
        kept = kept_name(path, self._fs)
        try:
            self._fs.link(path, kept)
        except FileNotFoundError:
            return None
        self._fs.sync_directory(path.parent)
        return str(kept)


def _is_replaceable(path: Path) -> bool:
    """Is there a file, or nothing? A rename would replace a link, a FIFO as well: these are not ours."""
    return not path.is_symlink() and (path.is_file() or not path.exists())


def files_of_a_base(name: str) -> bool:
    """Does a file of that name belong into a base's directory?"""
    return name in ("image", "manifest", "base.json", TRACE_NAME) or KEPT in name
