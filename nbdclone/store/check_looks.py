"""How a delta that may be in use is looked at, and put right.

A check takes no lock until something looks wrong: a sound clone that is served is not disturbed. What looks wrong is
looked at again under its lock; who cannot have the lock looks a few times, for the page may have been in flight, and
leaves the clone alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nbdclone.errors import InUse, StorageError
from nbdclone.store.finding import NOTE, Finding, Problem, unreadable
from nbdclone.store.fs import FileSystem
from nbdclone.store.locks import describe_process
from nbdclone.store.repair import repair

# A clone that is open elsewhere is looked at this often, this far apart: a page in flight is written in microseconds.
LOOKS = 4
PAUSE_S = 0.02
# After a repair one looks again, and what it laid open is repaired too: it takes three rounds at most.
MAX_ROUNDS = 4


class Looks:
    """The looks at the delta at ``path``, of clone or layer ``name``; ``words`` begin the messages of its lock.

    ``examine`` tells what is wrong with it, given its descriptor, and whether another process has it open. ``locks``
    are those that are known of, by device and inode: who holds each.
    """

    def __init__(
        self,
        fs: FileSystem,
        name: str,
        path: Path,
        words: str,
        examine: Callable[[int, bool], list[Problem]],
        locks: Mapping[tuple[int, int], int],
        *,
        repairs: bool,
    ) -> None:
        self._fs = fs
        self._name = name
        self._path = path
        self._words = words
        self._examine = examine
        self._locks = locks
        self._repairs = repairs

    def run(self) -> Iterator[Finding]:
        """Look, and put right what has one right answer if that is wished."""
        try:
            fd = self._fs.open_file(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return  # it was removed just now
        except (OSError, StorageError) as error:
            yield unreadable(self._name, self._path, error)
            return
        try:
            status = self._fs.fstat(fd)
            holder = self._locks.get((status.st_dev, status.st_ino))
            problems = self._examine(fd, holder is not None)
        except OSError as error:
            yield unreadable(self._name, self._path, error)
            return
        finally:
            self._fs.close(fd)
        if not problems:
            if holder is not None:
                yield self._in_use(f"it is open in {describe_process(holder)}", "what is flushed is all right")
            return
        yield from self._look_again()

    def _look_again(self) -> Iterator[Finding]:
        """Something is wrong, or seemed so: now under the lock, or several times."""
        repairs = self._repairs
        try:
            fd = self._fs.open_file(self._path, os.O_RDWR if repairs else os.O_RDONLY)
        except FileNotFoundError:
            return  # it was removed just now
        except (OSError, StorageError) as error:
            yield unreadable(self._name, self._path, error)  # or not writable: then at least it is told what is wrong
            if not repairs:
                return
            fd, repairs = self._fs.open_file(self._path, os.O_RDONLY), False
        try:
            self._fs.lock(fd, self._path, self._words, shared=not repairs)
            if not self._fs.still_there(self._path, self._fs.fstat(fd)):
                return
            yield from self._settle(fd, repairs)
        except InUse as error:
            yield self._in_use(str(error), "it is not repaired while it is open")
            yield from self._persistent(fd)
        except OSError as error:
            yield unreadable(self._name, self._path, error)
        finally:
            self._fs.close(fd)

    def _settle(self, fd: int, repairs: bool) -> Iterator[Finding]:
        """Under the lock: repair, and look again, until nothing is left that can be repaired."""
        for _ in range(MAX_ROUNDS):
            problems = self._examine(fd, False)
            if not repairs or not any(problem.can_be_repaired for problem in problems):
                break
            yield from repair(self._fs, fd, self._path, problems)
        yield from (problem.finding for problem in problems)

    def _persistent(self, fd: int) -> Iterator[Finding]:
        """What is there at every look at a clone that is being written."""
        seen = {problem.finding for problem in self._examine(fd, True)}
        for _ in range(LOOKS - 1):
            if not seen:
                return
            time.sleep(PAUSE_S)
            seen &= {problem.finding for problem in self._examine(fd, True)}
        yield from sorted(seen, key=lambda finding: (finding.kind, finding.where))

    def _in_use(self, what: str, todo: str) -> Finding:
        return Finding(self._name, "in-use", what, str(self._path), todo, NOTE)
