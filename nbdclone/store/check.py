"""What is wrong in a pool, by name; and, where there is one right answer, put right.

How often a delta is looked at, and under which lock: :mod:`nbdclone.store.check_looks`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nbdclone.errors import InUse, NBDCloneError, NotFound, StorageError
from nbdclone.store.check_base import BaseExamination, Wishes, files_of_a_base
from nbdclone.store.check_delta import Examination, linked_to
from nbdclone.store.check_layers import Beneath, Chains, ContentCheck, check_going, check_leftovers, check_snapshots
from nbdclone.store.check_looks import Looks
from nbdclone.store.delta_file import NO_PARENT, Header, read_header
from nbdclone.store.finding import NOTE, WRONG, Finding, Problem, Range, unreadable
from nbdclone.store.fs import FILE_SYSTEM, FileSystem
from nbdclone.store.image import BaseRecord, Progress, thaw_bases
from nbdclone.store.layer_manifest import MANIFEST, RECORD, WRITER
from nbdclone.store.live import FILE_NAME
from nbdclone.store.locks import holders, is_locked_directory
from nbdclone.store.marked import read_from
from nbdclone.store.names import is_name, split_name
from nbdclone.store.places import ENTRIES, EPHEMERAL, GOING, SNAPSHOTS, STAGING_LOCK, Places, is_kept
from nbdclone.store.repair import KEPT
from nbdclone.store.space import layer_needs


def check_pool(
    path: Path,
    names: Sequence[str] = (),
    *,
    deep: bool = False,
    repair: bool = False,
    progress: Progress | None = None,
    fs: FileSystem = FILE_SYSTEM,
) -> Iterator[Finding]:
    """Find what is wrong with what has those names, or with all and the pool itself; in order.

    What is beneath a clone is checked with it. ``deep`` reads the whole content of bases and layers; ``progress`` is
    called for each of them with bytes done and bytes in all. ``repair`` puts right what has one right answer, and keeps
    the bytes as they were. Raises NotFound if there is no base, clone or snapshot of a name, before anything is done.
    """
    return _Check(path, names, Wishes(deep, repair, progress), fs).run()


class _Check:
    def __init__(self, path: Path, names: Sequence[str], wishes: Wishes, fs: FileSystem) -> None:
        self._fs = fs
        self._path = path
        self._bases = path / "bases"
        self._clones = path / "clones"
        self._wishes = wishes
        self._places = Places(path, fs)
        self._base_names = sorted(filter(is_name, os.listdir(self._bases)))
        self._clone_names = sorted(filter(is_name, os.listdir(self._clones)))
        known = {*self._base_names, *self._clone_names}
        for name in names:
            if name not in known and (split_name(name)[1] is None or not self._is_snapshot(name)):
                raise NotFound(f"there is no base, clone or snapshot {name[:100]!r} in {path}")
        self._headers = self._read_headers()
        self._records = self._read_records()
        self._chains = Chains(self._places, self._clone_names)
        self._locks = holders()
        self._whole = not names
        self._wanted_clones = [name for name in self._clone_names if not names or name in names]
        self._choose(names)

    def _choose(self, names: Sequence[str]) -> None:
        """The layers and bases that are to be checked: all, or those of that name, and those beneath."""
        self._wanted_layers = self._chains.ids
        self._wanted_bases = self._base_names
        if not names:
            return
        layers: set[bytes] = set()
        headers = [header for name in self._wanted_clones if (header := self._headers.get(name))]
        for layer_id, name in self._chains.names.items():
            if name in names or split_name(name)[0] in names:
                layers.add(layer_id)
                headers += [header] if (header := self._chains.headers.get(layer_id)) else []
        beneath = [self._chains.beneath(header) for header in headers]
        layers.update(*(one.layers for one in beneath))
        parents = {one.lowest.parent_id for one in beneath}
        hints = {one.lowest.parent_name for one in beneath}
        self._wanted_layers = [layer_id for layer_id in self._chains.ids if layer_id in layers]
        self._wanted_bases = [
            name
            for name in self._base_names
            if name in names or (record.id in parents if (record := self._records.get(name)) else name in hints)
        ]

    def _is_snapshot(self, name: str) -> bool:
        with contextlib.suppress(NBDCloneError):
            self._places.snapshot(name)
            return True
        return False

    def run(self) -> Iterator[Finding]:
        if self._whole:
            yield from self._check_directories()
            yield from self._check_staging()
            yield from self._check_leftovers()
        for name in self._wanted_bases:
            yield from _while_it_is_there(self._bases / name, self._check_base(name))
        for layer_id in self._wanted_layers:
            yield from _while_it_is_there(self._places.layer(layer_id).parent, self._check_layer(layer_id))
        for name in self._wanted_clones:
            yield from _while_it_is_there(self._clones / name, self._check_clone(name))

    def _read_headers(self) -> dict[str, Header]:
        """Of all clones, for a base is what its clones say too."""
        headers = {}
        for name in self._clone_names:
            with contextlib.suppress(NBDCloneError, OSError):
                headers[name] = self._places.header(self._clones / name / "delta")
        return headers

    def _read_records(self) -> dict[str, BaseRecord]:
        records = {}
        for name in self._base_names:
            with contextlib.suppress(NBDCloneError, OSError):
                records[name] = BaseRecord.load(self._bases / name / "base.json")
        return records

    def _changing(self) -> contextlib.AbstractContextManager[None]:
        return self._fs.exclusively(self._path / ".lock")

    # The pool itself

    def _check_directories(self) -> Iterator[Finding]:
        yield from self._foreign("", self._path, lambda name: name in ENTRIES)
        yield from self._foreign("", self._bases, is_name)
        yield from self._foreign("", self._clones, is_name)
        if self._places.layers.is_dir():
            ids = {layer_id.hex() for layer_id in self._chains.ids}
            yield from self._foreign("", self._places.layers, lambda name: name in ids)
        for name in sorted({*self._base_names} & {*self._clone_names}):
            todo = "the clone is what the name means: rename one of the directories"
            yield Finding(name, "name-twice", "there is a base and a clone of that name", str(self._path), todo)
        by_id: dict[bytes, str] = {}
        for name, record in self._records.items():
            if (other := by_id.setdefault(record.id, name)) != name:
                same = self._records[other].fingerprint == record.fingerprint
                what = f"it has the id of base '{other}'" + ("" if same else ", and another content")
                todo = f"clones take the one that they know by name; remove {self._bases / name} if it is a copy"
                yield Finding(name, "id-twice", what, str(self._bases / name), todo, NOTE if same else WRONG)

    def _foreign(self, name: str, directory: Path, is_ours: Callable[[str], bool]) -> Iterator[Finding]:
        for entry in sorted(os.listdir(directory)):
            if not is_ours(entry):
                what = f"{entry!r} is not of nbdclone's making"
                yield Finding(name, "foreign", what, str(directory / entry), "nothing touches it", NOTE)

    def _no_directory(self, name: str, path: Path) -> Iterator[Finding]:
        if os.path.lexists(path):  # else it was renamed, or removed, just now
            yield Finding(name, "foreign", "it is no directory", str(path), "nothing touches it", NOTE)

    def _check_staging(self) -> Iterator[Finding]:
        """What operations left in ``.tmp`` that did not come to their end: what nobody holds a lock on."""
        tmp = self._path / ".tmp"
        if not tmp.is_dir():
            return
        try:
            with self._changing():  # between the making of a directory there and its lock nobody is seen
                for entry in sorted(os.listdir(tmp)):
                    if self._is_abandoned(tmp / entry):
                        if self._wishes.repair:
                            thaw_bases(self._fs, tmp / entry)
                            self._fs.remove_tree(tmp / entry)
                        what = "what an interrupted import, clone or rm left"
                        todo = "the next of them clears it, and so does --repair"
                        yield Finding("", "leftover", what, str(tmp / entry), todo, NOTE, repaired=self._wishes.repair)
        except OSError as error:
            what = f"it cannot be told what is left over here: {os.strerror(error.errno or 0)}"
            yield Finding("", "unreadable", what, str(tmp), "check it as the owner of the pool", NOTE)

    def _is_abandoned(self, path: Path) -> bool:
        if not path.is_dir() or path.is_symlink() or is_kept(path):
            return False
        return not is_locked_directory(path, STAGING_LOCK)

    def _check_leftovers(self) -> Iterator[Finding]:
        """What snapshots left, and layers that nobody needs."""
        if not self._chains.ids and not any((self._clones / name / SNAPSHOTS).is_dir() for name in self._clone_names):
            return
        try:
            with self._changing():
                found, cut_off = check_leftovers(self._places, self._clone_names, self._wishes.repair)
                found += check_going(self._places)
        except OSError as error:
            what = f"it cannot be told which layers are left over: {os.strerror(error.errno or 0)}"
            todo = "check it as the owner of the pool"
            found, cut_off = [Finding("", "unreadable", what, str(self._places.layers), todo, NOTE)], set()
        self._chains = Chains(self._places, self._clone_names)
        self._wanted_layers = [layer_id for layer_id in self._chains.ids if layer_id not in cut_off]
        yield from found

    # Bases

    def _check_base(self, name: str) -> Iterator[Finding]:
        directory = self._bases / name
        if not directory.is_dir():
            yield from self._no_directory(name, directory)
            return
        try:
            yield from self._foreign(name, directory, lambda file: files_of_a_base(file) or file.endswith(".new"))
            yield from self._check_drafts(name, directory, "image")
        except FileNotFoundError:
            return  # it was removed just now
        except OSError as error:
            yield unreadable(name, directory, error)
            return
        others = frozenset(record.id for other, record in self._records.items() if other != name)
        examination = BaseExamination(self._fs, directory, self._above_bases(), others, self._changing, self._wishes)
        yield from examination.run()
        if examination.record:
            self._records[name] = examination.record
            for clone, header in self._headers.items() if examination.changed else ():
                beneath = self._chains.beneath(header)
                if beneath.lowest.parent_id == examination.record.id:
                    yield self._hurt(clone, header, beneath, f"base '{name}'", 1, examination.changed)

    def _above_bases(self) -> dict[str, Header]:
        """The deltas whose parent is a base: what they say of it counts when its own record is lost."""
        layers = {self._chains.name(layer_id): header for layer_id, header in self._chains.headers.items() if header}
        return {
            name: header
            for name, header in (self._headers | layers).items()
            if header.parent_id != NO_PARENT and header.parent_id not in self._chains.headers
        }

    def _hurt(
        self, clone: str, header: Header, beneath: Beneath, whose: str, origin: int, changed: Sequence[Range]
    ) -> Finding:
        """What does a clone read of the changed bytes of what is beneath it? ``origin``: 1 is the base."""
        path = self._clones / clone / "delta"
        try:
            with contextlib.ExitStack() as opened:
                chain: list[tuple[int, Header]] = []
                for file in (*(self._places.layer(layer_id) for layer_id in reversed(beneath.layers)), path):
                    fd = self._fs.open_file(file, os.O_RDONLY)
                    opened.callback(self._fs.close, fd)
                    chain.append((fd, header if file is path else read_header(fd, str(file), self._fs)))
                count = read_from(self._fs, chain, origin, changed)
        except (OSError, StorageError) as error:
            return unreadable(clone, path, error)
        total = sum(length for _, length in changed)
        if count:
            what = f"it reads {count} of the {total} bytes of {whose} that changed"
            return Finding(clone, "hurt", what, str(path), "it is right again when they are")
        what = f"it is not hurt: it reads none of the {total} bytes of {whose} that changed"
        todo = "it is refused until the base is put right, and loses nothing" if origin == 1 else "nothing"
        return Finding(clone, "not-hurt", what, str(path), todo, NOTE)

    def _check_drafts(self, name: str, directory: Path, locked: str) -> Iterator[Finding]:
        """Drafts that were never put in place. They are cleared only while nobody has the base or clone open."""
        drafts = sorted(entry for entry in os.listdir(directory) if entry.endswith(".new"))
        if not drafts:
            return
        removed = False
        if self._wishes.repair:
            with contextlib.suppress(FileNotFoundError, StorageError, InUse):
                fd = self._fs.open_file(directory / locked, os.O_RDONLY)
                try:
                    self._fs.lock(fd, directory / locked, f"'{name}'")
                    for draft in drafts:
                        os.unlink(directory / draft)
                    self._fs.sync_directory(directory)
                    removed = True
                finally:
                    self._fs.close(fd)
        for draft in drafts:
            todo = "--repair clears it when nobody has it open"
            yield Finding(
                name, "leftover", "a draft that was never put in place", str(directory / draft), todo, NOTE,
                repaired=removed,
            )  # fmt: skip

    # Layers

    def _check_layer(self, layer_id: bytes) -> Iterator[Finding]:
        name, path = self._chains.name(layer_id), self._places.layer(layer_id)
        directory = path.parent
        try:
            known = {"delta", MANIFEST, RECORD, WRITER, FILE_NAME, GOING}
            yield from self._foreign(
                name, directory, lambda file: file in known or KEPT in file or file.endswith(".new")
            )
            yield from self._check_drafts(name, directory, "delta")
            yield from self._check_live(name, directory)
        except OSError as error:
            if directory.exists():  # else it was removed just now
                yield unreadable(name, directory, error)
            return
        if not path.exists() and directory.exists():
            todo = "put the file back from a backup"
            yield Finding(name, "delta-missing", "it has no delta", str(directory), todo)
            return
        yield from self._check_delta(name, path, f"layer {layer_id.hex()}", sealed=True)
        self._chains.look_again(layer_id)
        header = self._chains.headers.get(layer_id)
        if header is not None and header.id != layer_id:
            what = f"the delta in the place of layer {layer_id.hex()} has the id {header.id.hex()}"
            todo = "put the right one back from a backup; what is above it is refused"
            yield Finding(name, "layer-other", what, str(path), todo)
        elif header is not None and self._wishes.deep:
            yield from self._check_content(name, path, header)

    def _check_live(self, name: str, directory: Path) -> Iterator[Finding]:
        """A layer has no marks that no flush has written."""
        live = directory / FILE_NAME
        if live.exists():
            if self._wishes.repair:
                self._fs.unlink(live)
                self._fs.sync_directory(directory)
            what, todo = "it is a layer, and has a live map", "it means nothing, and --repair removes it"
            yield Finding(name, "not-sealed", what, str(live), todo, NOTE, repaired=self._wishes.repair)

    def _check_content(self, name: str, path: Path, header: Header) -> Iterator[Finding]:
        def hurt(layer_id: bytes, changed: Sequence[Range]) -> Iterator[Finding]:
            for clone, above in self._headers.items():
                beneath = self._chains.beneath(above)
                if layer_id in beneath.layers:
                    # Beneath the lowest delta is the base, 1, or nothing.
                    origin = len(beneath.layers) - beneath.layers.index(layer_id) + 1
                    yield self._hurt(clone, above, beneath, f"'{name}'", origin, changed)

        try:
            fd = self._fs.open_file(path, os.O_RDONLY)
        except (OSError, StorageError) as error:
            yield unreadable(name, path, error)
            return
        try:
            self._fs.lock(fd, path, name, shared=True)  # it is not removed while it is read
            yield from ContentCheck(self._places, self._wishes, hurt).run(fd, name, header)
        except InUse as error:
            yield Finding(name, "in-use", str(error), str(path), "check it again later", NOTE)
        finally:
            self._fs.close(fd)

    # Clones

    def _check_clone(self, name: str) -> Iterator[Finding]:
        directory = self._clones / name
        path = directory / "delta"
        if not directory.is_dir():
            yield from self._no_directory(name, directory)
            return
        try:
            known = {"delta", FILE_NAME, SNAPSHOTS, EPHEMERAL}
            yield from self._foreign(name, directory, lambda file: file in known or KEPT in file or file[-4:] == ".new")
            yield from self._check_drafts(name, directory, "delta")
        except FileNotFoundError:
            return  # it was removed just now
        except OSError as error:
            yield unreadable(name, path, error)
            return
        if not os.path.lexists(path) and directory.exists():
            yield Finding(
                name, "delta-missing", "it has no delta", str(directory), "put the file back, or 'nbdclone rm'"
            )
        else:
            yield from self._check_delta(name, path, f"clone '{name}'")
        header = self._headers.get(name)
        yield from check_snapshots(self._places, name, header.id if header else None)

    # Both

    def _check_delta(self, name: str, path: Path, words: str, *, sealed: bool = False) -> Iterator[Finding]:
        def examine(fd: int, in_use: bool) -> list[Problem]:
            return self._examine(fd, path, name, in_use=in_use, sealed=sealed)

        locks = {} if sealed else self._locks
        return Looks(self._fs, name, path, words, examine, locks, repairs=self._wishes.repair).run()

    def _examine(self, fd: int, path: Path, name: str, *, in_use: bool, sealed: bool) -> list[Problem]:
        examination = Examination(self._fs, fd, path, name, in_use=in_use, sealed=sealed)
        if examination.header is None:
            return examination.problems
        if not sealed:
            self._headers[name] = examination.header
        sound = not examination.problems
        return [*examination.problems, *self._examine_parent(fd, path, name, examination.header, sound)]

    def _examine_parent(self, fd: int, path: Path, name: str, header: Header, sound: bool) -> list[Problem]:
        """Is there all that is beneath, and a base of that id, with that fingerprint? If none: one of that content?"""
        problems = self._look_beneath(fd, path, name, header, sound)
        if problems:  # a snapshot, a merge or another base may have come since the check began
            self._chains.look_again_beneath(header)
            self._base_names = sorted(filter(is_name, os.listdir(self._bases)))
            self._records |= self._read_records()
            problems = self._look_beneath(fd, path, name, header, sound)
        if problems and header.id in self._chains.ids and self._is_left(header.id):
            return []  # told of as a leftover
        return problems

    def _is_left(self, layer_id: bytes) -> bool:
        """Is it a layer that nobody needs? It stays while somebody has it open; what was beneath it may be gone."""
        with contextlib.suppress(NBDCloneError, OSError):
            return layer_id not in layer_needs(self._places, strict=True)
        return False

    def _look_beneath(self, fd: int, path: Path, name: str, header: Header, sound: bool) -> list[Problem]:
        beneath = self._chains.beneath(header)
        if beneath.kind:
            todo = "it is refused, and loses nothing: put the layer back from a backup"
            return [Problem(Finding(name, beneath.kind, beneath.what, str(path), todo))]
        lowest = beneath.lowest
        if lowest.parent_id == NO_PARENT:
            return []
        its = f"through {self._chains.name(lowest.id)}, its" if beneath.layers else "its"
        parent = _find(self._records, lowest)
        what = f"{its} base '{lowest.parent_name}' ({lowest.parent_id.hex()})"
        if parent and self._records[parent].fingerprint == lowest.fingerprint:
            return []
        if parent:
            now, then = self._records[parent].fingerprint.hex()[:16], lowest.fingerprint.hex()[:16]
            what = f"{its} base '{parent}' has the fingerprint {now}, and had {then} when the clone was made"
            todo = "it is refused: put back the base that it was made from"
            return [Problem(Finding(name, "base-differs", what, str(path), todo))]
        same = [base for base, record in self._records.items() if record.fingerprint == lowest.fingerprint]
        if lowest.parent_name in self._base_names and lowest.parent_name not in self._records and not same:
            todo = "see to the base; until then the clone is refused, and loses nothing"
            return [Problem(Finding(name, "orphan", f"{what} cannot be read", str(path), todo))]
        if not same:
            todo = (
                "what it wrote is whole, and means nothing without its base: import the same image again, and --repair "
                "links them (docs/check.md says how to read what it wrote)"
            )
            return [Problem(Finding(name, "orphan", f"{what} is missing", str(path), todo))]
        base = same[0]
        todo = f"base '{base}' has the same content: --repair makes it the clone's base"
        finding = Finding(name, "orphan", f"{what} is missing", str(path), todo)
        if not sound or beneath.layers:  # the header is put right first; and the layer that is over the base
            return [Problem(finding)]
        return [Problem(finding, linked_to(self._fs, fd, self._records[base].id, base))]


def _while_it_is_there(directory: Path, findings: Iterator[Finding]) -> Iterator[Finding]:
    """What is found in a directory, until it is removed or renamed in the midst of it."""
    before = _status(directory)
    for finding in findings:
        now = _status(directory)
        if before is not None and (now is None or not os.path.samestat(before, now)):
            return
        yield finding


def _status(directory: Path) -> os.stat_result | None:
    with contextlib.suppress(OSError):
        return os.stat(directory)
    return None


def _find(records: Mapping[str, BaseRecord], header: Header) -> str | None:
    """The base of that id: of the name that the clone knows, else any."""
    fitting = [name for name, record in records.items() if record.id == header.parent_id]
    return header.parent_name if header.parent_name in fitting else next(iter(fitting), None)


def as_record(finding: Finding) -> dict[str, object]:
    """A finding for a program: ``ranges`` are offset and length."""
    return {
        "name": finding.name or None,
        "level": finding.level,
        "kind": finding.kind,
        "what": finding.what,
        "where": finding.where,
        "todo": finding.todo,
        "ranges": [{"offset": offset, "length": length} for offset, length in finding.ranges],
        "repaired": finding.repaired,
        "kept": finding.kept,
    }


def is_clean(findings: Sequence[Finding]) -> bool:
    """Is nothing wrong, or nothing any more?"""
    return all(finding.repaired or finding.level == NOTE for finding in findings)
