"""Power cuts under a clone: a workload on the simulated disk, and law 4 as a ledger that knows nothing of the store."""

from __future__ import annotations

import contextlib
import errno
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from simulated import SECTOR, ZEROS, File, SimulatedFileSystem

from nbdclone.errors import CloneFailed, NBDCloneError
from nbdclone.store.clone import Clone
from nbdclone.store.delta import Delta
from nbdclone.store.delta_file import Header
from nbdclone.store.image import BaseRecord, Identity, Image
from nbdclone.store.layer import BLOCK_SIZE, SEGMENT_SIZE

# The base ends within a block of the second segment, the clone within another.
BASE_SIZE = SEGMENT_SIZE + 3 * BLOCK_SIZE + 1536
SIZE = SEGMENT_SIZE + 6 * BLOCK_SIZE + 512
# The parts of the disk that are used: its begin, and from before the border of the segments to its end.
WINDOWS = ((0, 6 * BLOCK_SIZE), (SEGMENT_SIZE - 2 * BLOCK_SIZE, SIZE))
SECTORS = tuple(number for start, end in WINDOWS for number in range(start // SECTOR, end // SECTOR))

DELTA_PATH = Path("/delta")


class Stop(BaseException):
    """The process ends here: killed, or by a power cut."""


class LawBroken(AssertionError):
    """A sector holds what it may not."""


def stamp(number: int, sector: int) -> bytes:
    """512 bytes that no other write, no other sector and no hole has."""
    return (number.to_bytes(4, "big") + (sector + 1).to_bytes(4, "big")) * (SECTOR // 8)


class WouldWait(BaseException):
    """What came in the midst of something else would have to wait for its end."""


class Turn:
    """A lock for one thread that does one thing in the midst of another."""

    def __init__(self) -> None:
        self._taken = False

    def acquire(self, blocking: bool = True) -> bool:
        if self._taken and blocking:
            raise WouldWait
        self._taken, before = True, self._taken
        return not before

    def release(self) -> None:
        self._taken = False

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Ledger:
    """For each sector, what it may hold after a power cut: the last durable content, or that of any later write."""

    def __init__(self) -> None:
        ends = BASE_SIZE // SECTOR
        self._versions = {n: [(0, stamp(0, n) if n < ends else ZEROS)] for n in SECTORS}
        self._finished = {0}
        self._number = 0

    def begin(self, offset: int, data: bytes) -> int:
        """A write is sent. From now on its content may be there."""
        self._number += 1
        first = offset // SECTOR
        end = -(-(offset + len(data)) // SECTOR)
        whole = bytearray(b"".join(self.latest(number) for number in range(first, end)))
        lead = offset - first * SECTOR
        whole[lead : lead + len(data)] = data
        for at in range(0, len(whole), SECTOR):
            self._versions[first + at // SECTOR].append((self._number, bytes(whole[at : at + SECTOR])))
        return self._number

    def finish(self, number: int) -> None:
        """The write is acknowledged."""
        self._finished.add(number)

    def begin_flush(self) -> frozenset[int]:
        return frozenset(self._finished)

    def finish_flush(self, finished: frozenset[int]) -> None:
        """The flush is acknowledged: nothing older than what was acknowledged when it was sent may come back."""
        for versions in self._versions.values():
            last = max(index for index, (number, _) in enumerate(versions) if number in finished)
            del versions[:last]

    def latest(self, sector: int) -> bytes:
        return self._versions[sector][-1][1]

    def observe(self, contents: dict[int, bytes], *, durable: bool) -> None:
        """The sectors as they were found when nothing was under way: what one holds is its newest content."""
        self._number += 1
        self._finished.add(self._number)
        for sector, content in contents.items():
            self.check(sector, content)
            self._versions[sector].append((self._number, content))
            if durable:
                del self._versions[sector][:-1]

    def require_acknowledged(self, contents: dict[int, bytes]) -> None:
        """After the process was killed: what was acknowledged is there, and a write that was under way may be."""
        for sector, content in contents.items():
            versions = self._versions[sector]
            last = max(index for index, (number, _) in enumerate(versions) if number in self._finished)
            if content not in [version for _, version in versions[last:]]:
                raise LawBroken(f"sector {sector} holds {_shown(content)} after a kill: what was acknowledged is gone")

    def check(self, sector: int, content: bytes) -> None:
        versions = [version for _, version in self._versions[sector]]
        if content not in versions:
            raise LawBroken(f"sector {sector} holds {_shown(content)}, and may hold {[*map(_shown, versions)]}")


def _shown(content: bytes) -> str:
    number, sector = int.from_bytes(content[:4], "big"), int.from_bytes(content[4:8], "big")
    if content == ZEROS:
        return "zeros"
    return f"write {number}" if content == stamp(number, sector - 1) else content[:24].hex()


def read_sectors(clone: Clone) -> dict[int, bytes]:
    data = b"".join(clone.pread(end - start, start) for start, end in WINDOWS)
    return {sector: data[at * SECTOR : (at + 1) * SECTOR] for at, sector in enumerate(SECTORS)}


def base_file() -> File:
    contents = {number: stamp(0, number) for number in SECTORS if number < BASE_SIZE // SECTOR}
    return File(BASE_SIZE, contents, BASE_SIZE, contents)


def simulated_disk() -> SimulatedFileSystem:
    """A disk with a base and a delta over it, which has nothing yet."""
    fs = SimulatedFileSystem()
    fs.add_file("/base", base_file())
    Delta.create(DELTA_PATH, Header(b"I" * 16, b"P" * 16, bytes(32), SIZE, 0, "base"), fs)
    fs.tree.make_durable()
    return fs


def open_clone(fs: SimulatedFileSystem) -> Clone:
    record = BaseRecord(b"P" * 16, BASE_SIZE, bytes(32), 0, "", Identity(BASE_SIZE, 0, 0, 0))
    image = Image("base", Path("/"), record, fs.open("/base", 0), fs)
    return Clone("clone", [image, Delta.open(DELTA_PATH, "clone 'clone'", fs)], fs)


class Campaign:
    """One seeded life of a clone, through several openings, with a look at torn states at every step of it.

    ``synced``: of small writes, each soon followed by a flush, many to the same places. ``compacts``: many writes have
    what the base has, and now and then such blocks are dropped. ``flushes`` counts how many flushes relied on a record,
    how many changes had to wait for one, and how many drops there were.
    """

    _others = 2  # how many writes, at most, are acknowledged together with one

    def __init__(
        self,
        seed: int,
        *,
        states_per_step: int = 3,
        errors: bool = True,
        synced: bool = False,
        compacts: bool = False,
    ) -> None:
        self.seed = seed
        self.flushes: Counter[str] = Counter()
        self._synced = synced
        self._compacts = compacts
        self._places: list[tuple[int, int]] = []  # where was written, lately
        self._postponed: Callable[[], None] | None = None
        self.states = 0
        self._states_per_step = states_per_step
        self._errors = errors
        self._rng = random.Random(seed)
        self._ledger = Ledger()
        self._fs = simulated_disk()
        self._clone: Clone
        self._doing = ""  # "write" or "flush": what the client waits for
        self._nested = False
        self._deadly = False
        self._failed = False
        self._killed = False

    def run(self, openings: int = 4, operations: int = 12) -> None:
        """Raises LawBroken, with the seed in its message."""
        try:
            for _ in range(openings):
                self._live(operations)
        except (LawBroken, NBDCloneError) as error:
            raise LawBroken(f"seed {self.seed}, state {self.states}: {error}") from error

    # The life of one process

    def _live(self, operations: int) -> None:
        self._fs.on_step = self._at_step
        self._fs.rng = self._rng
        self._clone = open_clone(self._fs)
        self._prepare(self._clone)
        found = read_sectors(self._clone)
        if self._killed:
            self._ledger.require_acknowledged(found)
        self._ledger.observe(found, durable=False)
        self._spare_notes()
        end = self._rng.choice(["close", "kill", "kill", "power cut", "power cut"])
        try:
            for count in range(operations):
                self._deadly = end != "close" and count == operations - 1
                self._operate()
            if end == "close":
                self._close()
        except Stop:
            if self._failed and self._rng.random() < 0.5:  # otherwise it is killed before it can close anything
                self._fs.on_step = lambda what: self._examine()
                with contextlib.suppress(CloneFailed, OSError):
                    self._clone.close()
        # After a failed sync nobody knows what the disk has.
        self._killed = end == "kill" and not self._failed
        self._doing, self._nested, self._deadly, self._failed, self._postponed = "", False, False, False, None
        self._fs.die()
        if end == "power cut":
            self._fs = self._fs.crash(self._rng)
            self._ledger.observe(self._look(self._fs), durable=True)
            self._fs.die()

    def _spare_notes(self) -> None:
        """A note of a few bytes in the page cache meets no error of the disk, and no kill: what it is about is lost."""
        assert self._clone._delta is not None
        live = self._clone._delta._live

        def sparing(note: Callable[..., None]) -> Callable[..., None]:
            def spared(*args: Any) -> None:
                before = self._errors, self._nested, self._deadly
                self._errors, self._nested, self._deadly = False, True, False
                try:
                    note(*args)
                finally:
                    self._errors, self._nested, self._deadly = before

            return spared

        live.write = sparing(live.write)  # type: ignore[method-assign]
        live.covered = sparing(live.covered)  # type: ignore[method-assign]
        live.note_failure = sparing(live.note_failure)  # type: ignore[method-assign]

    def _prepare(self, clone: Clone) -> None:
        """Something else may happen in the midst of anything; and what is counted."""
        delta = clone._delta
        assert delta is not None
        clone._changing = Turn()  # type: ignore[assignment]
        delta._flushing = Turn()  # type: ignore[assignment]
        delta._young._limit = min(delta._young._limit, self._rng.choice([2, 5, 8]))
        witness, solidify = delta._journal.written, delta._solidify

        def witnessed() -> None:
            self.flushes["with one sync"] += 1
            witness()

        def solidified() -> None:
            self.flushes["for a change"] += 1
            solidify()

        delta._journal.written = witnessed  # type: ignore[method-assign]
        delta._solidify = solidified  # type: ignore[method-assign]

    def _close(self) -> None:
        finished = self._ledger.begin_flush()
        try:
            self._clone.close()
        except (OSError, CloneFailed):
            raise Stop from None
        self._ledger.finish_flush(finished)
        self._examine()

    def _operate(self) -> None:
        try:
            if self._compacts and self._rng.random() < 0.3:
                self._compact()
            elif self._rng.random() < (0.5 if self._synced else 0.3):
                self._flush()
            else:
                self._write()
            if self._postponed:
                self._postponed()
                self._postponed = None
        except (CloneFailed, OSError) as error:
            if isinstance(error, CloneFailed) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
                self._give_up()
            self._ledger.observe(read_sectors(self._clone), durable=False)
            self._postponed = None
        if self._rng.random() < 0.1:
            for sector, content in read_sectors(self._clone).items():
                if content != self._ledger.latest(sector):
                    raise LawBroken(f"sector {sector} is read as {_shown(content)}, not as it was written last")

    def _give_up(self) -> NoReturn:
        """An error that does not pass by itself: the clone is closed, and opened again."""
        self._failed = True
        raise Stop

    def _write(self) -> None:
        start, end = self._rng.choice(WINDOWS)
        if self._rng.random() < 0.5:
            offset = self._rng.randrange(start, end, SECTOR)
            length = self._rng.choice([1, 2, 7, 8, 8, 9, 16, 24]) * SECTOR
        else:
            offset = self._rng.randrange(start, end)
            length = self._rng.choice([1, 100, 512, 4096, 9000])
        length = min(length, end - offset)
        if self._synced:
            offset, length = self._place(offset, start, end)
        kind = self._rng.random()
        before, self._doing = self._doing, "write"
        try:
            if kind < 0.75:
                self._send(offset, self._data(offset, length), zero=False)
            else:
                self._send(offset, bytes(length), zero=kind < 0.95, allocate=kind < 0.82)
        finally:
            self._doing = before

    def _place(self, offset: int, start: int, end: int) -> tuple[int, int]:
        """Where a small write goes: to a block, to a part of one, or to where one went before."""
        if self._places and self._rng.random() < 0.4:
            offset, length = self._rng.choice(self._places[-4:])
            if self._rng.random() < 0.5:
                return offset, length
            return offset, self._rng.choice([1, min(100, length), length])
        if self._rng.random() < 0.7:
            offset -= (offset - start) % BLOCK_SIZE
        length = self._rng.choice([100, SECTOR, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE + SECTOR])
        self._places.append((offset, min(length, end - offset)))
        return self._places[-1]

    def _data(self, offset: int, length: int) -> bytes:
        number = self._ledger._number + 1
        if self._compacts and self._rng.random() < 0.5:
            number = 0
        first = offset // SECTOR
        end = -(-(offset + length) // SECTOR)
        return b"".join(stamp(number, sector) for sector in range(first, end))[offset % SECTOR :][:length]

    def _send(self, offset: int, data: bytes, *, zero: bool, allocate: bool = False) -> None:
        number = self._ledger.begin(offset, data)

        def send() -> None:
            if zero:
                self._clone.zero(offset, len(data), allocate=allocate)
            elif together:
                self._send_together(offset, data)
            else:
                self._clone.pwrite(data, offset)
            self._ledger.finish(number)

        together = self._rng.random() < 0.4
        try:
            send()
        except WouldWait:
            self._postponed = send

    def _send_together(self, offset: int, data: bytes) -> None:
        """As a server does it: some writes, one after the other, and then they are answered together."""
        written = []
        try:
            self._write_now(offset, data)
            for _ in range(0 if self._nested else self._rng.randint(0, self._others)):
                other = self._rng.randrange(*self._rng.choice(WINDOWS)) // SECTOR * SECTOR
                block = self._data(other, SECTOR)
                written.append(self._ledger.begin(other, block))
                self._write_now(other, block)
        except (OSError, CloneFailed):
            self._clone.note_marks()  # before an error is answered, too
            raise
        self._clone.note_marks()
        for number in written:
            self._ledger.finish(number)

    def _write_now(self, offset: int, data: bytes) -> None:
        try:
            self._clone.write_nowait(memoryview(data), offset)
        except BlockingIOError:
            self._clone.pwrite(data, offset)

    def _flush(self) -> None:
        before, self._doing = self._doing, "flush"
        try:
            finished = self._ledger.begin_flush()
            self._clone.flush()
            self._ledger.finish_flush(finished)
        finally:
            self._doing = before

    def _compact(self) -> None:
        """Drop what is the base's anyway, all or some of it, and give back the space. Nothing is written."""
        before, self._doing = self._doing, "compact"
        try:
            for start, end in WINDOWS:
                start, end = start // BLOCK_SIZE * BLOCK_SIZE, end // BLOCK_SIZE * BLOCK_SIZE
                same, _ = self._clone.alike(start, end - start)
                runs = [run for run in same if self._rng.random() < 0.8]
                if runs:
                    self.flushes["dropped"] += self._clone.drop(runs) > 0
            for segment in range(2):
                if self._rng.random() < 0.8:
                    self._clone.punch_dropped(segment)
        finally:
            self._doing = before

    # What happens in between

    def _at_step(self, what: str) -> None:
        self._examine()
        chance = self._rng.random()
        if self._deadly and chance < 0.4:
            raise Stop
        if self._errors and chance > 0.95 and what in ("write", "allocate"):
            raise OSError(errno.ENOSPC, "no space left")
        if self._errors and chance > 0.95 and what == "sync":
            raise OSError(errno.EIO, "the disk does not answer")
        if not self._nested and 0.5 < chance < 0.75:
            self._meanwhile()

    def _meanwhile(self) -> None:
        """While a flush runs, a write comes and is done; while a write runs, a flush."""
        other: Callable[[], None] | None = {"flush": self._write, "write": self._flush}.get(self._doing)
        if self._doing == "compact":
            other = self._rng.choice([self._write, self._flush])
        if other and not self._postponed:  # what comes after a change that waits, waits too
            self._nested = True
            try:
                other()
            except WouldWait:  # a flush that a change waits for
                pass
            except (OSError, CloneFailed):
                self._give_up()
            finally:
                self._nested = False
        if self._doing == "compact" and self._rng.random() > 0.8:
            self._require_latest()

    def _require_latest(self) -> None:
        before, self._fs.on_step = self._fs.on_step, lambda what: None
        for sector, content in read_sectors(self._clone).items():
            if content != self._ledger.latest(sector) and not self._postponed:
                raise LawBroken(f"sector {sector} is read as {_shown(content)}, not as it was written last")
        self._fs.on_step = before

    def _examine(self) -> None:
        for _ in range(self._states_per_step):
            self._look(self._fs.crash(self._rng))

    def _look(self, fs: SimulatedFileSystem) -> dict[int, bytes]:
        """Open the clone in a state that a power cut left, and hold every sector against the ledger."""
        self.states += 1
        found = read_sectors(open_clone(fs))
        for sector, content in found.items():
            self._ledger.check(sector, content)
        return found
