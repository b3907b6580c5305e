"""Moving a delta from what it stands on to something else, while the disk reads the same.

What it takes: the delta takes over each block that it does not own and that the other has not alike, with the content
that it reads there now (``Clone.copy_up``); that is made durable; then its header names another parent. Until then the
blocks that it took over are what lies beneath as well, and afterwards everything else is: so at each moment the disk
reads as it did, and who is cut off begins again and finds the work that was done.

    web1   = what it changed                over old           copy up where old and new differ
    web1   = what it changed + difference   over old           header: parent = new
    web1   = what it changed + difference   over new           what it changed as the new did: dropped

The same is done to a layer that others read, in place: who has painted its map reads beneath what is in the layer now,
and that is the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbdclone.errors import InUse, StorageError, UsageError
from nbdclone.store.block_sets import NO_BLOCKS, blocks_in, both, owned_by, runs_of, without
from nbdclone.store.clone import COPY_SIZE, Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import NO_ORIGIN, NO_PARENT, Header, change_header
from nbdclone.store.layer import BITMAP_SIZE, BLOCK_SIZE, BLOCKS_PER_SEGMENT, Layer
from nbdclone.store.layer_manifest import adding_blocks
from nbdclone.store.opening import open_beneath
from nbdclone.store.places import Places
from nbdclone.store.snapshots import origin_of
from nbdclone.store.standing import chain_beneath, changed_meanwhile

if TYPE_CHECKING:
    from nbdclone.control.verbs import Opened, Steps, Target

# Runs of blocks that are copied in one step: of single blocks, some 10 ms.
RUNS_AT_ONCE = 128
# What is dropped in one step: it syncs some times, and clients' changes wait for that.
DROPPED_AT_ONCE = 4 << 20
# How long it is waited until a change ends that is under way, before it is tried again to exchange what lies beneath.
RETRY_S = 0.005
# A read takes as long as the disk does; who sends a clone, or compares it, reads for as long as that takes.
READERS_PATIENCE_S = 1.0
# A move in a file: magic, CRC-32 of the rest; the length of a head in JSON, the head, and for each segment its number
# (8 bytes) and its bitmap.
_MAGIC = b"NBDMOVE1"


@dataclass(frozen=True, slots=True)
class Move:
    """From which parent to which; ``overlap``: bytes of the new one that may be seen, None for all; ``bitmaps``: the
    blocks in which the two differ, for each segment that has some.

    The target is a base, ``base``, or a layer over it: whoever was made from one of ``origins`` was made from that base
    from now on.
    """

    source: bytes
    target: bytes
    base: bytes
    base_name: str
    fingerprint: bytes
    overlap: int | None
    bitmaps: Mapping[int, bytes] = field(repr=False)
    origins: tuple[bytes, ...] = ()

    def renewed(self, header: Header) -> Header:
        """The header of a delta after the move."""
        seen = [size for size in (header.overlap, self.overlap) if size is not None]
        origin = self.base if origin_of(header) in self.origins else origin_of(header)
        return replace(
            header,
            parent_id=self.target,
            parent_name=self.base_name,
            fingerprint=self.fingerprint,
            origin=NO_PARENT if origin == self.target else origin,
            overlap=min(seen, default=None),
        )

    def save(self, path: Path) -> None:
        """For another process. Lost with the machine, as whoever needs it."""
        head = {
            "source": self.source.hex(),
            "target": self.target.hex(),
            "base": self.base.hex(),
            "base_name": self.base_name,
            "fingerprint": self.fingerprint.hex(),
            "overlap": self.overlap,
            "origins": [origin.hex() for origin in self.origins],
        }
        encoded = json.dumps(head).encode()
        body = b"".join(
            [
                len(encoded).to_bytes(4, "big"),
                encoded,
                *(part for number, bitmap in self.bitmaps.items() for part in (number.to_bytes(8, "big"), bitmap)),
            ]
        )
        path.write_bytes(_MAGIC + zlib.crc32(body).to_bytes(4, "big") + body)

    @classmethod
    def load(cls, path: Path) -> Move:
        """Raises StorageError."""
        try:
            content = path.read_bytes()
            body = memoryview(content)[12:]
            if content[:8] != _MAGIC or zlib.crc32(body) != int.from_bytes(content[8:12], "big"):
                raise StorageError(f"{path}: not a move, or not all of it")
            start = 4 + int.from_bytes(body[:4], "big")
            head = json.loads(bytes(body[4:start]))
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: not a move ({error})") from None
        size = 8 + BITMAP_SIZE
        bitmaps = {
            int.from_bytes(body[at : at + 8], "big"): bytes(body[at + 8 : at + size])
            for at in range(start, len(body), size)
        }
        return cls(
            bytes.fromhex(head["source"]),
            bytes.fromhex(head["target"]),
            bytes.fromhex(head["base"]),
            head["base_name"],
            bytes.fromhex(head["fingerprint"]),
            head["overlap"],
            bitmaps,
            tuple(map(bytes.fromhex, head["origins"])),
        )


@dataclass(slots=True)
class Plan:
    """What a move takes: bytes that are to be copied, and bytes in which both differ and that the delta owns."""

    to_copy: int = 0
    conflicts: int = 0
    dropped: int = 0  # of these, those in which the delta and the new one are alike


def plan_move(move: Move, delta: Layer, header: Header) -> Plan:
    """How much it is, told from the maps. Waits for the disk."""
    plan = Plan()
    for segment in move.bitmaps:
        differing = blocks_in(move.bitmaps[segment])
        own = owned_by([delta], segment)
        plan.conflicts += both(differing, own).count(1)
        plan.to_copy += lacking(differing, own, header, segment).count(1)
    plan.conflicts *= BLOCK_SIZE
    plan.to_copy *= BLOCK_SIZE
    return plan


def lacking(differing: bytes, own: bytes, header: Header, segment: int) -> bytes:
    """The blocks in which the two differ, that the delta does not own, and that are seen through it."""
    end = header.size if header.overlap is None else min(header.size, header.overlap)
    count = min(max(-(-end // BLOCK_SIZE) - segment * BLOCKS_PER_SEGMENT, 0), BLOCKS_PER_SEGMENT)
    lacked = without(differing, own)
    return lacked[:count] + NO_BLOCKS[count:]


def copies(move: Move, clone: Clone) -> Iterator[list[tuple[int, int]]]:
    """The runs (offset, length) that the delta on top has to take over, as many at a time as one step may take."""
    delta = clone.delta
    for segment in sorted(move.bitmaps):
        lacked = lacking(blocks_in(move.bitmaps[segment]), owned_by([delta], segment), delta.header, segment)
        yield from _batches(runs_of(lacked, segment), COPY_SIZE)


def _batches(runs: Iterable[tuple[int, int]], most: int) -> Iterator[list[tuple[int, int]]]:
    """The runs, cut in pieces, as many at a time as one step may take: ``most`` bytes."""
    batch: list[tuple[int, int]] = []
    size = 0
    for offset, length in runs:
        for start in range(offset, offset + length, most):
            count = min(most, offset + length - start)
            if batch and (size + count > most or len(batch) == RUNS_AT_ONCE):
                yield batch
                batch, size = [], 0
            batch.append((start, count))
            size += count
    if batch:
        yield batch


def take_over(clone: Clone, runs: Sequence[tuple[int, int]]) -> int:
    """Make the delta own these blocks with the content that they have. How many bytes that was."""
    # Holes too: what lies beneath next may have data there.
    return sum(clone.copy_up(offset, length, holes=True) for offset, length in runs)


# A clone


def move_clone(target: Target, name: str, move: str, dry_run: bool = False) -> Steps:
    """Move a clone whose delta is directly over the source; ``move``: the file in ``.tmp`` that has the move.

    Returns what was done, or with ``dry_run`` what would be. Raises InUse if something else changed the clone's layers
    meanwhile, UsageError if its quota does not let it, StorageError.
    """
    places = target.pool.places
    wanted = Move.load(places.tmp / move)
    with target.opened(name) as opened:
        clone = opened.clone
        delta, seen = clone.delta, clone.restacked
        if delta.header.parent_id == wanted.target:
            return _report(name, "already", clone, Plan())
        _require_over(wanted, name, delta.header)
        plan = plan_move(wanted, delta, delta.header)
        yield 0, max(plan.to_copy, 1)
        if dry_run:
            return _report(name, "dry run", clone, plan)
        conflicts = list(_conflicts(wanted, delta))
        before = _allocated(clone)
        _require_room(name, delta.header, before, plan)
        with places.no_space_left(f"rebase of '{name}'"):
            taken = 0
            for runs in copies(wanted, clone):
                taken += opened.change(lambda runs=runs: take_over(clone, runs))  # type: ignore[misc]
                yield taken, max(plan.to_copy, taken)
            # Before the header: a power cut must not leave the new parent beneath a delta without what the old had.
            opened.flush()
        header = wanted.renewed(delta.header)
        layers = open_beneath(places, f"clone '{name}'", header)
        try:
            with places.changing():  # as all who change what a clone stands on
                opened.change(lambda: _commit(places, clone, seen, wanted))
        except BaseException:
            _close(layers)
            raise
        exchange_beneath(opened, places, layers)
        for segment, runs in conflicts:
            plan.dropped += _drop(opened, segment, runs)
            yield taken, max(plan.to_copy, taken)
        plan.to_copy = taken
        return _report(name, "done", clone, plan, before)


def _conflicts(move: Move, delta: Layer) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The runs that the delta owns and in which the two differ, by segment: there it may have what the new one has."""
    for segment in sorted(move.bitmaps):
        if runs := list(runs_of(both(blocks_in(move.bitmaps[segment]), owned_by([delta], segment)), segment)):
            yield segment, runs


def _drop(opened: Opened, segment: int, runs: list[tuple[int, int]]) -> int:
    """Give back what of these runs is beneath as well by now. How many bytes."""
    clone, dropped = opened.clone, 0
    opened.flush()  # most of it before anybody has to wait
    for batch in _batches(runs, DROPPED_AT_ONCE):
        dropped += opened.change(lambda batch=batch: clone.drop(batch))  # type: ignore[misc]
    if dropped:
        opened.change_here(lambda: None)  # what the event loop read before this is over
        while not opened.change(lambda: clone.punch_dropped(segment)):
            time.sleep(RETRY_S)
    return dropped


def _require_over(move: Move, name: str, header: Header) -> None:
    if header.parent_id != move.source:
        raise changed_meanwhile([name])


def _require_room(name: str, header: Header, allocated: int, plan: Plan) -> None:
    if header.quota and allocated + plan.to_copy > header.quota:
        raise UsageError(
            f"'{name}' may take {header.quota} bytes, has {allocated}, and the move needs {plan.to_copy} more: "
            f"give it a larger quota first ('nbdclone quota {name} SIZE')"
        )


def _commit(places: Places, clone: Clone, seen: int, move: Move) -> None:
    """The header. To be called while nobody changes the clone. Raises InUse, and nothing was changed."""
    if clone.restacked != seen:  # by a snapshot, or blocks were dropped that had been taken over
        raise InUse(f"another verb changed what '{clone.name}' stands on meanwhile: ask again")
    delta = clone.delta
    path = places.delta(clone.name)
    if not places.fs.still_there(path, places.fs.fstat(delta.fd)):
        raise InUse(f"'{clone.name}' was removed or renamed meanwhile: ask again")
    _require_over(move, clone.name, delta.header)
    if places.is_going(move.target):  # a layer that was hoisted, and that whoever made it has let go of
        raise InUse(f"what '{clone.name}' was to stand on is being merged into another clone: ask again")
    # A power cut in here: the old header or the new one, and the delta fits both.
    delta.change_header(**changes_of(delta.header, move.renewed(delta.header)))


def changes_of(old: Header, new: Header) -> dict[str, Any]:
    """What of a header says what is beneath, as far as it is another."""
    names = ("parent_id", "parent_name", "fingerprint", "origin", "overlap")
    return {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}


def write_header(path: Path, places: Places, old: Header, new: Header) -> None:
    """Make of the header of that file what it stands on in ``new``, durably. To be called when changing."""
    if changes := changes_of(old, new):
        change_header(path, places.fs, **changes)


def exchange_beneath(opened: Opened, places: Places, layers: Sequence[Layer] | None = None) -> None:
    """Let an open clone read through what its header names by now. ``layers``: these, opened already."""
    clone = opened.clone
    while True:
        header = clone.delta.header
        if layers is None:
            layers = open_beneath(places, f"clone '{clone.name}'", header)
        chain, expected = layers, (header.id, header.parent_id)

        def exchange(chain: Sequence[Layer] = chain, expected: tuple[bytes, bytes] = expected) -> bool:
            now = clone.delta.header
            if (now.id, now.parent_id) != expected:  # a snapshot came in between
                return False
            clone.relayer(chain)
            return True

        try:
            done = opened.change_here(exchange)
        except BlockingIOError:
            done = False
        except BaseException:
            _close(chain)
            raise
        if done:
            break
        _close(chain)
        layers = None
        time.sleep(RETRY_S)
    wait_for_readers(clone)


def wait_for_readers(clone: Clone) -> None:
    """Until nobody reads through what was exchanged any more: whoever asked for that may want the base removed."""
    deadline = time.monotonic() + READERS_PATIENCE_S
    while not clone.has_let_go() and time.monotonic() < deadline:
        time.sleep(RETRY_S)


def _close(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.close()


def _allocated(clone: Clone) -> int:
    return os.fstat(clone.delta.fd).st_blocks * 512


def _report(name: str, state: str, clone: Clone, plan: Plan, before: int | None = None) -> dict[str, Any]:
    now = _allocated(clone)
    return {
        "name": name,
        "state": state,
        "before": now if before is None else before,
        "after": now + (plan.to_copy if state == "dry run" else 0),
        "copied": plan.to_copy,
        "conflicts": plan.conflicts,
        "dropped": plan.dropped,
    }


def renew_clone(target: Target, name: str, origins: list[str] | None, successor: str, fingerprint: str) -> Steps:
    """After the layer at the bottom of a clone was moved to the base ``successor`` (ids in hex): let its header say so,
    and let it read through the new chain. ``origins``: as in a :class:`Move`; None if they are not known.
    """
    places = target.pool.places
    yield 0, 1
    made_of = None if origins is None else tuple(map(bytes.fromhex, origins))
    with target.opened(name) as opened:

        def renew() -> None:
            delta = opened.clone.delta
            after = _renewed_above(places, delta.header, made_of, bytes.fromhex(successor), bytes.fromhex(fingerprint))
            if changes := changes_of(delta.header, after):
                delta.change_header(**changes)

        with places.changing():
            opened.change(renew)
        exchange_beneath(opened, places)
    return {"name": name}


def renew_above(
    places: Places, path: Path, origins: Sequence[bytes] | None, successor: bytes, fingerprint: bytes
) -> None:
    """Let the header of a delta say that the base at the bottom is another. To be called when changing.

    ``origins``: as in a :class:`Move`; None if they are not known: any that is no layer.
    """
    header = places.header(path)
    write_header(path, places, header, _renewed_above(places, header, origins, successor, fingerprint))


def _renewed_above(
    places: Places, header: Header, origins: Sequence[bytes] | None, successor: bytes, fingerprint: bytes
) -> Header:
    if chain_beneath(places, header).lowest.parent_id != successor:
        return header  # it is not above what was moved any more: it was reset, or cut free, in between
    made_of_base = header.origin not in (NO_PARENT, NO_ORIGIN) and not places.layer(header.origin).exists()
    was = made_of_base if origins is None else header.origin in origins
    return replace(header, origin=successor if was else header.origin, fingerprint=fingerprint)


# A layer


@contextlib.contextmanager
def growing(places: Places, layer_id: bytes) -> Iterator[Clone]:
    """A sealed layer with what is beneath it, as a disk whose own blocks may become more (``Clone.copy_up``).

    Nothing else may be done to it: others read it. Raises InUse if somebody does so already, StorageError.
    """
    fs, path = places.fs, places.layer(layer_id)
    what = f"layer {layer_id.hex()}"
    with adding_blocks(places, layer_id):
        delta = Delta.open(path, what, fs, shared=True)
        try:
            layers = open_beneath(places, what, delta.header)
        except BaseException:
            delta.close()
            raise
        with Clone(what, [*layers, delta], fs) as clone:
            yield clone


def move_layer(places: Places, layer_id: bytes, move: Move) -> Generator[tuple[int, int], None, Plan]:
    """Move a layer whose parent is the source, in place. What is above it is to be renewed afterwards."""
    path = places.layer(layer_id)
    with growing(places, layer_id) as clone:
        delta = clone.delta
        if delta.header.parent_id == move.target:
            return Plan()
        _require_over(move, clone.name, delta.header)
        plan = plan_move(move, delta, delta.header)
        yield 0, max(plan.to_copy, 1)
        with places.no_space_left(f"rebase of {clone.name}"):
            taken = 0
            for runs in copies(move, clone):
                taken += take_over(clone, runs)
                yield taken, max(plan.to_copy, taken)
            # The map alone says what a layer holds: readers know no records.
            delta.settle_all()
        with places.changing():
            header = places.header(path)
            _require_over(move, clone.name, header)
            write_header(path, places, header, move.renewed(header))
        plan.to_copy = taken
        return plan
