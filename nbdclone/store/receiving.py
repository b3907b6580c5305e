"""``receive``: make of a stream what it is of.

All of it is made in a directory of ``.tmp`` (drafts.py) and synced there; only when the end of the stream was seen, and
was right, it gets its names: the base, the layers from the oldest, and last the clone, or the snapshots of the clone
that is there and then its new delta. A power cut in between leaves bases and layers that nothing needs yet, or
snapshots that the clone has not followed; the same stream, received again, takes them as they are.

**Snapshots before the delta.** A snapshot that is there and that its clone does not stand on yet does no harm: each
name appears in one rename, and its layer, with all beneath it, is durable and has its place by then; the clone reads
as it did, from the layer that it stands on. The same stream ends it, and so does the next increment (``fitting``: a
clone without changes may stand on any layer beneath), or a rollback to that snapshot. The other way round, the clone
would stand on layers without names for a moment, and those are merged into what is above them: the snapshot would be
lost, and with it what the next increment stands on.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nbdclone.errors import InvalidStream, StorageError, UsageError
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import EMPTY_BITMAP, NO_PARENT, Header, as_origin, change_header
from nbdclone.store.drafts import Draft, State
from nbdclone.store.fitting import fit, require_unchanged
from nbdclone.store.fs import FileSystem
from nbdclone.store.image import hash_image
from nbdclone.store.importing import record_base
from nbdclone.store.layer_writer import Filled, LayerWriter
from nbdclone.store.places import SNAPSHOTS, Places, Snapshot
from nbdclone.store.snapshots import clear_cut_off, successor
from nbdclone.store.stream import Run, Source, StreamReader

# After so much data what came is synced and noted: what a power cut may cost, of a stream that goes on.
SYNC_EVERY = 256 << 20


# Given the name of a clone.
Aside = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Received:
    """What was made: the clone, or what was added to it. ``base``: its name, if it was made too."""

    clone: str
    added: bool
    snapshots: tuple[str, ...]
    base: str | None


class _Contradiction(InvalidStream):
    """A whole stream that is not what it says: nothing of it is worth keeping."""


class _Writer(Protocol):
    def write(self, offset: int, data: memoryview) -> None: ...
    def zeros(self, offset: int, length: int) -> None: ...
    def sync(self) -> Filled: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class Receiving:
    """A stream that is about to be received. Its head has been read, and it fits; nothing was made yet.

    ``name`` is the clone's (default: as in the stream), ``base_name`` that of a base that is made. ``force``: a clone
    that has changed since is rolled back. ``resume``: what is here already of the stream is kept; so it is in any case
    if the stream does not begin at its beginning. ``aside`` keeps a clone that is added to closed, for the moment in
    which it is looked at and exchanged; it raises InUse if that cannot be.
    """

    def __init__(
        self,
        places: Places,
        source: Source,
        *,
        name: str | None = None,
        base_name: str | None = None,
        force: bool = False,
        resume: bool = False,
        aside: Aside = lambda _name: contextlib.nullcontext(),
    ) -> None:
        """Raises InvalidStream, UsageError and its children, StorageError, OSError."""
        self._places = places
        self._force = force
        self._aside = aside
        self._reader = StreamReader(source)
        self.head = head = self._reader.head
        self._plan = fit(places, head, name, base_name)
        try:
            if self._plan.adds:
                with self._aside(self._plan.clone):
                    require_unchanged(places, self._plan, force=force)
            self._draft = Draft(places, head, resume=resume or (head.section, head.offset) > (0, 0))
        except BaseException:
            self._plan.close()
            raise
        state = self._draft.state
        self._section, self._known = state.section, state.filled
        self._writer: _Writer | None = None
        self._since_sync = 0
        self._last: Filled | None = None
        complaint = None
        if (head.section, head.offset) > (state.section, state.offset):
            complaint = (
                f"the stream goes on from section {head.section}, byte {head.offset}; what is here ends at section "
                f"{state.section}, byte {state.offset}: see 'nbdclone receive --token'"
            )
        elif self._is_lacking():
            complaint = (
                "what this stream was to go on from has changed: 'nbdclone receive --forget', and send all of it"
            )
        if complaint:
            self._plan.close()
            self._draft.close(keep=(state.section, state.offset) > (0, 0))
            raise UsageError(complaint)

    def run(self) -> Iterator[tuple[int, int]]:
        """Receive it, and give it its names. Yields (bytes done, about how many there are).

        Raises what the constructor raises; what came whole is kept then, for another stream that goes on.
        """
        keep = True
        try:
            with self._places.no_space_left("receive"), self._telling():
                try:
                    for run in self._reader.runs():
                        self._take(run)
                        yield self._reader.totals.data, max(self.head.expected, self._reader.totals.data)
                    self._advance(len(self.head.sections))
                    self._commit()
                    keep = False
                except _Contradiction:
                    keep = False
                    raise
                except BaseException:
                    keep = self._keep()
                    raise
        finally:
            if self._writer:
                self._writer.close()
            self._plan.close()
            self._draft.close(keep=keep)

    @property
    def result(self) -> Received:
        """What ``run`` made."""
        plan = self._plan
        return Received(plan.clone, plan.adds, tuple(plan.snapshots), plan.new_base)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Say how a stream that was cut off can go on, if it can."""
        try:
            yield
        except _Contradiction:
            raise
        except UsageError as error:
            state = self._draft.state
            if (state.section, state.offset) == (0, 0):
                raise
            raise type(error)(f"{error}; what came is kept: 'nbdclone receive --token' says how to go on") from None

    def _is_lacking(self) -> bool:
        """Is something not here that was when the stream was cut off, so that it was not kept?"""
        first = 1 if self.head.with_base else 0
        last = self._section + (1 if self._known else 0)
        needed = [self._draft_of(number) for number in range(self._plan.here, last - first)]
        if first and last and self._plan.new_base is not None:
            needed.append(self._draft.path / "base" / "image")
        return not all(path.exists() for path in needed)

    # What comes

    def _take(self, run: Run) -> None:
        if run.section < self._section:
            return  # here already
        if run.section > self._section or not self._writer:
            self._advance(run.section)
        offset, length, data = run.offset, run.length, run.data
        begun = self._known.offset if self._known else 0
        if offset < begun:
            skipped = min(begun - offset, length)
            offset, length, data = offset + skipped, length - skipped, data[skipped:] if data is not None else None
        if not length:
            return
        assert self._writer
        if data is None:
            self._writer.zeros(offset, length)
            return
        self._writer.write(offset, data)
        self._since_sync += length
        if self._since_sync >= SYNC_EVERY:
            self._checkpoint()

    def _advance(self, section: int) -> None:
        """Finish the sections before that one, and begin it."""
        while True:
            if self._writer is None and self._section < len(self.head.sections):
                self._writer = self._begin(self._section)
            if self._section == section:
                return
            assert self._writer
            if self._section == len(self.head.sections) - 1:
                self._last = self._writer.sync()
            self._writer.finish()
            self._writer.close()
            self._writer, self._known = None, None
            self._section += 1

    def _begin(self, section: int) -> _Writer:
        """The writer of a section, which goes on where it was left."""
        head, plan, fs = self.head, self._plan, self._places.fs
        first = 1 if head.with_base else 0
        number = section - first
        if section < first:
            if plan.new_base is None:
                return _Nowhere(self._known)
            assert head.base
            return _ImageWriter(self._draft.directory("base") / "image", head.base.size, fs, self._known)
        if number < plan.here:
            return _Nowhere(self._known)
        path = self._draft.directory("layers", head.layers[number].id.hex()) / "delta"
        if self._known is None:
            with contextlib.suppress(FileNotFoundError):
                fs.unlink(path)  # begun, and not noted
        return LayerWriter(path, self._header(number), fs, self._known)

    def _header(self, number: int) -> Header:
        layer, plan = self.head.layers[number], self._plan
        parent, parent_name = plan.parent, plan.parent_name or layer.parent_name
        if number > plan.here:
            below = self.head.layers[number - 1]
            parent, parent_name = below.id, f"{plan.clone}@{below.snapshot}" if below.snapshot else layer.parent_name
        created = min(layer.created, time.time_ns())
        return Header(layer.id, parent, plan.fingerprint, layer.size, created, parent_name, overlap=layer.overlap)

    def _checkpoint(self) -> None:
        """Make durable, and note, what is here."""
        if self._section == len(self.head.sections):
            state = State(self.head, self._section - 1, self._last)
        else:
            state = State(self.head, self._section, self._writer.sync() if self._writer else self._known)
        self._draft.save(state)
        self._since_sync = 0

    def _keep(self) -> bool:
        """Keep what came whole, if that is worth anything."""
        with contextlib.suppress(OSError, StorageError):
            self._checkpoint()
        state = self._draft.state
        return (state.section, state.offset) > (0, 0)

    # What is made

    def _commit(self) -> None:
        """All of the stream is here, and it is right."""
        places, plan, fs = self._places, self._plan, self._places.fs
        if plan.new_base is not None:
            self._make_base(self._draft.path / "base")
        for number in range(plan.here, len(self.head.layers)):
            self._relink(number)
        own = None if plan.adds else self._make_clone()
        # Set aside first, as everywhere: who has the pool's lock waits for nobody who may need it.
        with self._aside(plan.clone) if plan.adds else contextlib.nullcontext(), places.changing():
            # Again: others have made and removed what they wanted, but for what the plan holds.
            fresh = fit(places, self.head, plan.clone, plan.new_base)
            fresh.close()
            if (fresh.adds, fresh.new_base, fresh.here, fresh.parent) != (
                plan.adds, plan.new_base, plan.here, plan.parent,
            ):  # fmt: skip
                raise UsageError("the pool was changed while the stream was received: 'nbdclone receive --token'")
            if own is not None and any(
                places.is_going(Snapshot.load(record, fs).layer) for record in (own / SNAPSHOTS).iterdir()
            ):
                raise UsageError("the pool was changed while the stream was received: 'nbdclone receive --token'")
            header = require_unchanged(places, plan, force=self._force) if plan.adds else None
            if plan.new_base is not None:
                fs.rename(self._draft.path / "base", places.bases / plan.new_base)
                fs.sync_directory(places.bases)
            self._place_layers()
            if own is not None:
                fs.rename(own, places.clones / plan.clone)
                fs.sync_directory(places.clones)
            elif header is not None:
                self._follow(header)

    def _make_base(self, directory: Path) -> None:
        """The base's record and manifest. Raises InvalidStream if the image is another than was said."""
        base, fs = self.head.base, self._places.fs
        assert base
        for leftover in ("manifest", "base.json"):
            with contextlib.suppress(FileNotFoundError):
                fs.unlink(directory / leftover)
        fd = fs.open(directory / "image", os.O_RDONLY | os.O_CLOEXEC)
        try:
            hashes = dict(hash_image(fd, base.size))
        finally:
            fs.close(fd)
        source = f"received with '{self.head.title}'"
        record = record_base(directory, base.size, hashes, source, fs, base_id=base.id, created=base.created)
        if record.fingerprint != base.fingerprint:
            raise _Contradiction(f"the image of base '{base.name}' in the stream is not what its fingerprint says")
        fs.sync_directory(directory)

    def _relink(self, number: int) -> None:
        """See that the layer stands on what the plan says: on a stream that went on, that may be another base's id."""
        path, header = self._draft_of(number), self._header(number)
        found = self._places.header(path)
        if (found.parent_id, found.fingerprint) != (header.parent_id, header.fingerprint):
            change_header(
                path, self._places.fs,
                parent_id=header.parent_id, parent_name=header.parent_name, fingerprint=header.fingerprint,
            )  # fmt: skip
        self._places.fs.sync_directory(path.parent)

    def _draft_of(self, number: int) -> Path:
        return self._draft.path / "layers" / self.head.layers[number].id.hex() / "delta"

    def _place_layers(self) -> None:
        places, fs = self._places, self._places.fs
        if not places.layers.is_dir():
            fs.mkdir(places.layers)
            fs.sync_directory(places.path)
        for number in range(self._plan.here, len(self.head.layers)):
            fs.rename(self._draft_of(number).parent, places.layer(self.head.layers[number].id).parent)
        fs.sync_directory(places.layers)

    def _make_clone(self) -> Path:
        """The clone as it will be: an empty delta over the last layer, and its snapshots."""
        plan, fs = self._plan, self._places.fs
        own = self._draft.path / "clone"
        if own.exists():
            fs.remove_tree(own)
        fs.mkdir(own)
        top, first = self.head.layers[-1], self._origin()
        header = Header(
            uuid.uuid4().bytes, top.id, plan.fingerprint, top.size, time.time_ns(), f"{plan.clone}@{top.snapshot}",
            origin=first,
        )  # fmt: skip
        Delta.create(own / "delta", header, fs)
        fs.mkdir(own / SNAPSHOTS)
        self._name_snapshots(own / SNAPSHOTS, {})
        fs.sync_directory(own)
        return own

    def _origin(self) -> bytes:
        """What the clone was made from: what the stream's first layer stands on."""
        if not self._plan.here:
            return as_origin(self._plan.parent)
        layer = self._places.layer(self.head.layers[0].id)
        return as_origin(self._places.header(layer).parent_id) if layer.exists() else NO_PARENT

    def _name_snapshots(self, directory: Path, known: dict[str, Snapshot]) -> None:
        fs = self._places.fs
        for layer in self.head.layers:
            if not layer.snapshot or layer.snapshot in known:
                continue
            here = self._places.layer(layer.id).exists() and not self._places.is_going(layer.id)
            if not here and not self._is_drafted(layer.id):
                continue  # it was merged into the next here, or was never wanted
            draft = self._draft.path / uuid.uuid4().hex
            fd = fs.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fs.pwrite_all(fd, Snapshot(layer.id, layer.created).dump(), 0)
                fs.sync(fd)
            finally:
                fs.close(fd)
            fs.rename(draft, directory / layer.snapshot)
        fs.sync_directory(directory)

    def _is_drafted(self, layer_id: bytes) -> bool:
        return any(layer.id == layer_id for layer in self.head.layers[self._plan.here :])

    def _follow(self, header: Header) -> None:
        """Let the clone that is here stand on the last layer."""
        places, plan, fs = self._places, self._plan, self._places.fs
        own = places.clones / plan.clone
        top = self.head.layers[-1]
        new = self._draft.path / "delta"
        with contextlib.suppress(FileNotFoundError):
            fs.unlink(new)
        named = f"{plan.clone}@{top.snapshot}"
        Delta.create(new, successor(header, top.id, named, size=top.size, fingerprint=plan.fingerprint), fs)
        delta = Delta.open(own / "delta", f"clone '{plan.clone}'", fs)
        try:
            if delta.header.id != header.id:
                raise UsageError(f"clone '{plan.clone}' was changed just now")
            if not (own / SNAPSHOTS).is_dir():
                fs.mkdir(own / SNAPSHOTS)
                fs.sync_directory(own)
            # A power cut from here on: the clone has some of the new snapshots, or all, and stands where it stood.
            self._name_snapshots(own / SNAPSHOTS, places.snapshots(plan.clone, header.id))
            clear_cut_off(places, plan.clone, header.id)
            fs.rename(new, own / "delta")
            fs.sync_directory(own)
            delta.discard()
        finally:
            delta.close()


class _ImageWriter:
    """The image of a base, from one end to the other. What is not written is a hole."""

    def __init__(self, path: Path, size: int, fs: FileSystem, known: Filled | None) -> None:
        self._fs = fs
        self._offset = known.offset if known else 0
        self._fd = fs.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fs.ftruncate(self._fd, self._offset)  # what was written behind what was noted comes again
            fs.ftruncate(self._fd, size)
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, data: memoryview) -> None:
        self._fs.pwrite_all(self._fd, data, offset)
        self._offset = offset + len(data)

    def zeros(self, offset: int, length: int) -> None:
        self._offset = offset + length

    def sync(self) -> Filled:
        self._fs.sync(self._fd)
        return Filled(self._offset, 0, EMPTY_BITMAP)

    def finish(self) -> None:
        self._fs.fchmod(self._fd, 0o444)
        self._fs.sync(self._fd)

    def close(self) -> None:
        self._fs.close(self._fd)


class _Nowhere:
    """For what is here already."""

    def __init__(self, known: Filled | None) -> None:
        self._offset = known.offset if known else 0

    def write(self, offset: int, data: memoryview) -> None:
        self._offset = offset + len(data)

    def zeros(self, offset: int, length: int) -> None:
        self._offset = offset + length

    def sync(self) -> Filled:
        return Filled(self._offset, 0, EMPTY_BITMAP)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass
