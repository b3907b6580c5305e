"""Layers and snapshots under examination: the chains of a pool, the records of its snapshots, what nobody needs."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nbdclone.errors import CorruptDelta, NBDCloneError, NotFound, StorageError, UnsupportedFormat
from nbdclone.store.check_base import Wishes
from nbdclone.store.delta_file import NO_PARENT, Header
from nbdclone.store.finding import NOTE, WRONG, Finding, Range
from nbdclone.store.image import HASH_SIZE, UNREADABLE, chunk_count, fingerprint_of, read_manifest
from nbdclone.store.layer import MAX_LAYERS
from nbdclone.store.layer_manifest import (
    MANIFEST,
    RECORD,
    WRITER,
    LayerRecord,
    differing_chunks,
    hash_layer,
    record_manifest,
    spread,
    write_manifest,
)
from nbdclone.store.locks import take
from nbdclone.store.merging import look
from nbdclone.store.names import is_name
from nbdclone.store.places import GOING, SNAPSHOTS, Places, Snapshot
from nbdclone.store.removal import collect, needed_layers
from nbdclone.store.snapshots import clear_cut_off


@dataclass(frozen=True, slots=True)
class Beneath:
    """What is beneath a delta: the ids of the layers, from the top downwards, and the header of the lowest delta.

    ``kind`` and ``what``: why it is not known any further, as a finding; empty where it is.
    """

    layers: tuple[bytes, ...]
    lowest: Header
    kind: str = ""
    what: str = ""


class Chains:
    """The layers of a pool, as their headers say now. ``headers`` has None for one that cannot be read."""

    def __init__(self, places: Places, clones: Sequence[str]) -> None:
        self._places = places
        self.ids = sorted(places.layer_ids())
        self.headers: dict[bytes, Header | None] = {}
        self.names: dict[bytes, str] = {}  # of those that are snapshots
        for layer_id in self.ids:
            self.look_again(layer_id)
        for clone in clones if self.ids else ():
            for name, snapshot in places.snapshots(clone).items():
                self.names[snapshot.layer] = f"{clone}@{name}"

    def look_again(self, layer_id: bytes) -> Header | None:
        """Its header now; without one, that it is not there, or cannot be read."""
        self.headers.pop(layer_id, None)
        if self._places.layer(layer_id).parent.is_dir():
            self.headers[layer_id] = None
            with contextlib.suppress(NBDCloneError, OSError):
                self.headers[layer_id] = self._places.header(self._places.layer(layer_id))
        return self.headers.get(layer_id)

    def look_again_beneath(self, header: Header) -> None:
        """What is beneath a delta may be something else than it was when the check began."""
        for _ in range(MAX_LAYERS):
            if (below := self.look_again(header.parent_id)) is None:
                return
            header = below

    def name(self, layer_id: bytes) -> str:
        """What findings call it: the name of the snapshot, or the id."""
        return self.names.get(layer_id, f"layer {layer_id.hex()}")

    def beneath(self, header: Header) -> Beneath:
        """Follow the parents down to the base, or to where there is none."""
        found: list[bytes] = []
        while header.parent_id != NO_PARENT:
            parent = header.parent_id
            if parent in found or parent == header.id or len(found) >= MAX_LAYERS - 1:
                what = f"{self.name(parent)} is beneath itself, or there are more than {MAX_LAYERS} layers"
                return Beneath(tuple(found), header, "cycle", what)
            below = self.headers.get(parent)
            if below is None:
                if parent not in self.headers and "@" not in header.parent_name:
                    break  # a base's, then
                at_hand = self._places.layer(parent).exists()
                what = f"layer {parent.hex()} ('{header.parent_name}') {'cannot be read' if at_hand else 'is missing'}"
                return Beneath(tuple(found), header, "layer-missing", what)
            if below.id != parent:
                what = f"what stands in the place of layer {parent.hex()} has the id {below.id.hex()}"
                return Beneath(tuple(found), header, "layer-missing", what)
            found.append(parent)
            header = below
        return Beneath(tuple(found), header)


# Snapshots


def check_snapshots(places: Places, clone: str, own_id: bytes | None) -> Iterator[Finding]:
    """The records of a clone's snapshots; those that were cut off are :func:`check_leftovers`'s."""
    directory = places.clones / clone / SNAPSHOTS
    if not directory.exists():
        return
    try:
        entries = sorted(os.listdir(directory))
    except OSError as error:
        what = f"its snapshots cannot be read: {os.strerror(error.errno or 0)}"
        yield Finding(clone, "unreadable", what, str(directory), "see to the disk, or to who may read and write here")
        return
    for entry in entries:
        path, name = directory / entry, f"{clone}@{entry}"
        if not is_name(entry):
            what = f"{entry!r} is not of nbdclone's making"
            yield Finding(clone, "foreign", what, str(path), "nothing touches it", NOTE)
            continue
        try:
            snapshot = Snapshot.load(path, places.fs)
        except NotFound:
            continue  # it was removed just now
        except (StorageError, OSError) as error:
            todo = "put the file back from a backup, or remove it; until then no layer is removed"
            yield Finding(name, "snapshot-damaged", str(error), str(path), todo)
            continue
        if snapshot.layer != own_id and not places.layer(snapshot.layer).exists() and path.exists():
            what = f"its layer {snapshot.layer.hex()} is missing"
            todo = f"put the layer back from a backup, or 'nbdclone rm {name}'"
            yield Finding(name, "snapshot-lost", what, str(path), todo)


# What nobody needs


def check_leftovers(places: Places, clones: Sequence[str], repair: bool) -> tuple[list[Finding], set[bytes]]:
    """What snapshots left that were cut off before their commit, and layers that nothing is above and no name is for.

    Also returns the ids of the former: these are no layers. To be called when changing: what a snapshot that is under
    way has made is no leftover. Raises OSError.
    """
    found: list[Finding] = []
    cut_off: set[bytes] = set()
    above: dict[bytes, set[str]] = {}
    with contextlib.suppress(StorageError):
        above = needed_layers(places, clones)
    for clone in clones:
        own_id = None
        with contextlib.suppress(NBDCloneError, OSError):
            own_id = places.header(places.delta(clone)).id
        if own_id is None or not (left := _cut_off(places, clone, own_id)):
            continue
        if own_id in above:
            what = f"it has the id of a layer that '{min(above[own_id])}' needs: it was copied from a clone by hand"
            todo = "it cannot have snapshots: make a snapshot of the one, and clones of that, instead of copies"
            found.append(Finding(clone, "id-twice", what, str(places.delta(clone)), todo))
            continue
        cut_off.add(own_id)
        repaired = False
        todo = "it does not count; the next snapshot of the clone clears it, and so does --repair"
        if repair:
            try:
                clear_cut_off(places, clone, own_id)
                repaired = True
            except StorageError as error:
                todo = str(error)
        what = "what a snapshot left that was cut off before its commit"
        found += [Finding(clone, "leftover", what, str(path), todo, NOTE, repaired=repaired) for path in left]
    with contextlib.suppress(StorageError):  # one that cannot be read may need any of them, and is told of elsewhere
        needed = needed_layers(places, clones, strict=True)
        gone: set[Path] = set()
        unneeded = [layer_id for layer_id in places.layer_ids() if layer_id not in needed and layer_id not in cut_off]
        if repair and unneeded:
            gone = _collect(places)
        for layer_id in unneeded:
            path = places.layer(layer_id).parent
            what = f"layer {layer_id.hex()}: no snapshot is called it, and nothing is above it"
            todo = "the next rm clears it, and so does --repair, when nobody has it open"
            found.append(Finding("", "leftover", what, str(path), todo, NOTE, repaired=path in gone))
    return found, cut_off


def check_going(places: Places) -> list[Finding]:
    """Layers whose space is given back, and that more stand on than the one that has what they had.

    To be called when changing. Nothing, where a header cannot be read: that is told of elsewhere. Raises OSError.
    """
    found: list[Finding] = []
    with contextlib.suppress(NBDCloneError):
        above = look(places)
        for layer_id in filter(places.is_going, places.layer_ids()):
            names = above.named.get(layer_id, [])
            children = [clone or f"layer {child.hex()}" for child, clone in above.children.get(layer_id, [])]
            if names or len(children) > 1:
                what = (
                    f"layer {layer_id.hex()} was merged into what is above it, and may have lost blocks by that; but "
                    f"there are {', '.join([*names, *children])}"
                )
                todo = "put the layer back from a backup, and remove the file; at most one of these reads what it did"
                mark = places.layer(layer_id).with_name(GOING)
                found.append(Finding(names[0] if names else "", "layer-going", what, str(mark), todo))
    return found


def _cut_off(places: Places, clone: str, own_id: bytes) -> list[Path]:
    directory = places.clones / clone / SNAPSHOTS
    left = [places.layer(own_id).parent] if places.layer(own_id).parent.exists() else []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in sorted(os.listdir(directory)):
            with contextlib.suppress(NBDCloneError, OSError):
                if Snapshot.load(directory / entry, places.fs).layer == own_id:
                    left.append(directory / entry)
    return left


def _collect(places: Places) -> set[Path]:
    """Remove what nobody needs; which directories went."""
    going: list[tuple[Path, Path]] = []
    with contextlib.ExitStack() as held:

        def discard() -> None:
            for _, trash in going:
                places.fs.remove_tree(trash, ignore_errors=True)

        held.callback(discard)
        collect(places, held, going)
    return {path for path, _ in going}


# The content of a layer


@contextlib.contextmanager
def _nobody_adds(directory: Path) -> Iterator[None]:
    """Keep everybody from adding blocks to the layer. Raises BlockingIOError if somebody does, OSError."""
    fd = os.open(directory / WRITER, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        take(fd)
        yield
    finally:
        os.close(fd)


class ContentCheck:
    """The content of a layer against its manifest, which is made if there is none yet."""

    def __init__(self, places: Places, wishes: Wishes, hurt: Callable[[bytes, list[Range]], Iterator[Finding]]) -> None:
        self._places = places
        self._wishes = wishes
        self._hurt = hurt

    def run(self, fd: int, name: str, header: Header) -> Iterator[Finding]:
        """``fd``: the layer's delta, locked so that it is not removed. What is wrong with its map is told elsewhere."""
        path = self._places.layer(header.id)
        try:
            with _nobody_adds(path.parent):
                yield from self._run(fd, path, name, header)
        except BlockingIOError:
            what = "blocks are being added to it: its content was not looked at"
            yield Finding(name, "in-use", what, str(path.parent / WRITER), "check it again later", NOTE)
        except OSError as error:
            what = f"its content was not looked at: {os.strerror(error.errno or 0)}"
            todo = "check it as the owner of the pool, or see to the disk"
            level = NOTE if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else WRONG
            yield Finding(name, "unreadable", what, str(path.parent), todo, level)

    def _run(self, fd: int, path: Path, name: str, header: Header) -> Iterator[Finding]:
        fs, directory = self._places.fs, path.parent
        try:
            hashes = hash_layer(fs, fd, path, header, self._wishes.progress)
        except CorruptDelta:
            return
        found = fingerprint_of(header.size, spread(hashes, chunk_count(header.size)))
        try:
            record = LayerRecord.load(directory / RECORD, fs)
            problem = None
            if (record.id, record.size) != (header.id, header.size):
                problem = Finding(
                    name, "record-damaged", "its layer.json is another layer's", str(directory / RECORD), ""
                )
        except NotFound:
            if not any(digest == UNREADABLE for _, digest in hashes):
                # Of one whose space is given back, nobody knows what a power cut brings back.
                if not self._places.is_going(header.id):
                    record_manifest(fs, directory, header, hashes)
                return
            yield self._changed(name, path, [], "some of it cannot be read")
            return
        except UnsupportedFormat as error:
            yield Finding(name, "newer-format", str(error), str(directory / RECORD), "use that nbdclone")
            return
        except StorageError as error:
            problem = Finding(name, "record-damaged", str(error), str(directory / RECORD), "")
        manifest, manifest_problem = self._manifest(name, directory, header)
        if problem is None and found == record.fingerprint:
            if manifest != found:
                yield from self._renew_manifest(
                    manifest_problem or _differs(name, directory), directory, header, hashes
                )
            return
        if manifest == found:  # content and manifest agree
            what = problem.what if problem else "its layer.json has another fingerprint than content and manifest"
            if self._wishes.repair:
                record_manifest(fs, directory, header, hashes)
            todo = "content and manifest agree, and --repair writes it anew"
            where = str(directory / RECORD)
            yield Finding(name, "record-damaged", what, where, todo, repaired=self._wishes.repair)
            return
        if problem or manifest_problem or manifest != record.fingerprint:
            for one in (problem, manifest_problem):
                if one:
                    todo = "what its content should be is known nowhere here"
                    yield Finding(name, one.kind, one.what, one.where, todo)
            changed: list[Range] = [(0, header.size)]
        else:
            changed = differing_chunks(directory / MANIFEST, header.size, hashes)
        yield self._changed(name, path, changed, "its content is not what it was, or cannot be read")
        yield from self._hurt(header.id, changed)

    def _changed(self, name: str, path: Path, ranges: list[Range], what: str) -> Finding:
        todo = "put the file back from a backup; what is above it reads these bytes as they are"
        return Finding(name, "content-changed", what, str(path), todo, ranges=tuple(ranges))

    def _manifest(self, name: str, directory: Path, header: Header) -> tuple[bytes, Finding | None]:
        """The fingerprint that the manifest gives; and what is wrong with it by itself."""
        path = directory / MANIFEST
        todo = "--repair makes it anew if the layer still has its fingerprint"
        try:
            length = self._places.fs.stat(path).st_size
            right = chunk_count(header.size) * HASH_SIZE
            if length != right:
                what = f"its manifest has {length} bytes, and should have {right}"
                return b"", Finding(name, "manifest-damaged", what, str(path), todo)
            return fingerprint_of(header.size, read_manifest(path, header.size)), None
        except FileNotFoundError:
            return b"", Finding(name, "manifest-missing", "its manifest is missing", str(path), todo)
        except StorageError as error:
            return b"", Finding(name, "manifest-damaged", str(error), str(path), todo)

    def _renew_manifest(
        self, problem: Finding, directory: Path, header: Header, hashes: list[tuple[int, bytes]]
    ) -> Iterator[Finding]:
        if self._wishes.repair:
            write_manifest(self._places.fs, directory, header, hashes)
        yield Finding(
            problem.name, problem.kind, problem.what, problem.where, problem.todo, repaired=self._wishes.repair
        )


def _differs(name: str, directory: Path) -> Finding:
    what = "its manifest and its layer.json have different fingerprints"
    todo = "its content has the one of layer.json, and --repair makes the manifest anew"
    return Finding(name, "manifest-differs", what, str(directory / MANIFEST), todo)
