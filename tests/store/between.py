"""A verb is done, whole, between two looks that another verb takes at the pool: at each of its looks in turn.

Whatever another process may do to a pool, it does between two system calls of this one. So: of two verbs the first is
run on a file system that counts what it is asked, and the second is run at one of these moments; then both are done, or
were refused with words that fit, every disk reads as one order of the two leaves it, and `check` finds nothing. What
the first does under the pool's lock is one moment: no other changes the pool meanwhile.

    python tests/store/between.py [--seconds 600] [--seed N]

does so with random verbs at random moments, and shows what they were refused with (`make between`).
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from between_verbs import (
    FIRST,
    NEVER_REFUSED,
    SECOND,
    VERBS,
    State,
    Verb,
    check,
    disks_of,
    list_all,
    make_pool,
    state_of,
)

from nbdclone.errors import NBDCloneError
from nbdclone.store import common_layer
from nbdclone.store.fs import FileSystem
from nbdclone.store.image import Image
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool

# Who waits for what the first verb holds, goes on when that does.
PATIENCE_S = 5.0

# What a look is: what tells what is on the disk, or changes it, by its name in ``os`` and, if it has one, that in
# FileSystem.
LOOKS = {
    "open": "open",
    "stat": "stat",
    "lstat": None,
    "listdir": None,
    "scandir": None,
    "rename": "rename",
    "link": "link",
    "mkdir": "mkdir",
    "unlink": "unlink",
    "rmdir": None,
    "preadv": "preadv",
    "pwrite": "pwrite",
    "ftruncate": "ftruncate",
    "fdatasync": "datasync",
    "fsync": "sync",
}


class Counting(FileSystem):
    """Calls ``other`` before the look number ``at`` that is taken within ``looking``."""

    def __init__(self, at: int, other: Callable[[], object]) -> None:
        self.count = 0
        self._at, self._other = at, other
        self._lock = threading.Lock()
        self._held = threading.local()

    def look(self) -> None:
        if getattr(self._held, "deep", 0):
            return
        with self._lock:
            number, self.count = self.count, self.count + 1
        if number == self._at:
            with self._away():
                self._other()

    @contextlib.contextmanager
    def _away(self) -> Iterator[None]:
        self._held.deep = getattr(self._held, "deep", 0) + 1
        try:
            yield
        finally:
            self._held.deep -= 1

    @contextlib.contextmanager
    def exclusively(self, path: str | Path) -> Iterator[None]:
        self.look()
        with self._away(), super().exclusively(path):
            yield

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Count what is asked of ``os``."""

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                self.look()
                return function(*arguments, **named)

            return call

        with contextlib.ExitStack() as held:
            for name, own in LOOKS.items():
                function = counted(getattr(os, name))
                held.enter_context(mock.patch.object(os, name, function))
                if own is not None:
                    setattr(self, own, function)
            yield


class Other:
    """A process that does verbs when it is told to."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, end = context.Pipe()
        self._process = context.Process(target=_do_what_is_told, args=(end,), daemon=True)
        self._process.start()
        end.close()

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()

    def begin(self, pool: Pool, verb: str) -> None:
        """Have it done; return when it is, or when it seems to wait for somebody."""
        self._pipe.send((pool.path, verb))
        self._pipe.poll(PATIENCE_S)

    def end(self) -> str | None:
        """What it was refused with. Raises AssertionError if something else was raised."""
        done, answer = self._pipe.recv()
        if not done:
            raise AssertionError(answer)
        found: str | None = answer
        return found


def _do_what_is_told(pipe: Any) -> None:
    with small_layers_are_worth_it(), contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            path, verb = pipe.recv()
            try:
                pipe.send((True, attempt(lambda: VERBS[verb].run(Pool(path)))))  # noqa: B023
            except Exception:
                pipe.send((False, traceback.format_exc()))


def look_count(pool: Pool, verb: str) -> int:
    """How many looks a verb takes at this pool, to which it is done."""
    fs = Counting(-1, lambda: None)
    with fs.looking():
        VERBS[verb].run(Pool(pool.path, fs))
    return fs.count


def is_fit(refusal: str) -> bool:
    """Is that what a person can be told of a pool in which nothing is wrong? Nobody knows the files by their paths."""
    kind, _, message = refusal.partition(": ")
    return kind in ("UsageError", "InUse", "NotFound", "NameTaken") and "/delta is missing" not in message


def attempt(act: Callable[[], object]) -> str | None:
    """What it was refused with; None: it was done. Any other exception passes."""
    try:
        act()
    except NBDCloneError as error:
        return f"{type(error).__name__}: {error}"
    return None


def run(pool: Pool, before: State, first: str, second: str, at: int, other: Other) -> tuple[str | None, str | None]:
    """Do the first verb, and the second before its look number ``at``: what each was refused with.

    Raises AssertionError if what is left then is nothing that the two can have left.
    """
    fs = Counting(at, lambda: other.begin(pool, second))
    failures: list[str | None] = []
    try:
        with fs.looking():
            failures.append(attempt(lambda: VERBS[first].run(Pool(pool.path, fs))))
    finally:
        if fs.count <= at:
            other.begin(pool, second)
        failures.append(other.end())
    for verb, failure in zip((first, second), failures, strict=True):
        if failure is not None and not is_fit(failure):
            raise AssertionError(f"{verb}: {failure}")
    if failures[0] is not None and first in NEVER_REFUSED:
        raise AssertionError(f"{first}: {failures[0]}")
    done = [VERBS[verb] for verb, failure in zip((first, second), failures, strict=True) if failure is None]
    check(pool)
    list_all(pool)
    now = disks_of(pool)
    allowed = [after for order in (done, done[::-1]) if (after := _after(before, order)) is not None]
    if now not in allowed:
        wanted = allowed[0]
        names = sorted(now.keys() ^ wanted.keys()) or sorted(name for name in now if now[name] != wanted[name])
        raise AssertionError(f"{names} otherwise than either order leaves it")
    return failures[0], failures[1]


def _after(state: State, order: Sequence[Verb]) -> dict[str, bytes] | None:
    """None: this order cannot be."""
    try:
        for verb in order:
            state = verb.then(state)
    except KeyError:
        return None
    return state.disks


@contextlib.contextmanager
def copy_of(pool: Pool, directory: Path) -> Iterator[Pool]:
    """Another pool that is the same, for a while."""
    shutil.copytree(pool.path, directory)
    copy = Pool(directory)
    for name in copy.places.names_in(copy.places.bases):
        Image.open(name, copy.places.bases / name).close()  # it is known by where it stands: look at all of it once
    try:
        yield copy
    finally:
        shutil.rmtree(directory)


def small_layers_are_worth_it() -> Any:
    """So that a rebase makes one here."""
    return mock.patch.object(common_layer, "WORTH", BLOCK_SIZE)


@dataclass(frozen=True)
class Moment:
    """The second verb before that look of the first."""

    first: str
    second: str
    at: int


class Campaign:
    """A pool that is made once, and copied for each moment."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pool = make_pool(directory)
        self._before = state_of(self._pool)
        self._counts: dict[str, int] = {}

    def moments(self, rng: random.Random) -> Iterator[Moment]:
        """Random ones, without end: each pair of verbs as often as another."""
        pairs = [(first, second) for first in FIRST for second in SECOND]
        while True:
            for first, second in rng.sample(pairs, len(pairs)):
                if first not in self._counts:
                    with copy_of(self._pool, self._directory / "copy") as pool:
                        self._counts[first] = look_count(pool, first)
                yield Moment(first, second, rng.randrange(self._counts[first]))

    def look_at(self, moment: Moment, other: Other) -> tuple[str | None, str | None]:
        """Raises AssertionError, which names the moment."""
        with copy_of(self._pool, self._directory / "copy") as pool:
            try:
                return run(pool, self._before, moment.first, moment.second, moment.at, other)
            except Exception as error:
                error.add_note(repr(moment))
                raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    deadline = time.monotonic() + given.seconds
    refused: Counter[str] = Counter()
    done = failed = 0
    with tempfile.TemporaryDirectory() as directory, small_layers_are_worth_it(), Other() as other:
        campaign = Campaign(Path(directory))
        for moment in campaign.moments(random.Random(given.seed)):
            try:
                for verb, refusal in zip((moment.first, moment.second), campaign.look_at(moment, other), strict=True):
                    if refusal is not None:
                        plain = re.sub("[0-9a-f]{32}|process [0-9]+ [(][^)]*[)]", "...", refusal)
                        refused[f"{verb}: {plain.replace(directory, '')}"] += 1
            except Exception:
                failed += 1
                traceback.print_exc()
            done += 1
            if time.monotonic() > deadline:
                break
    for refusal, count in sorted(refused.items()):
        print(f"{count:6} {refusal}")
    print(f"{done} moments, {failed} of them wrong; {sum(refused.values())} refusals, of {len(refused)} kinds")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
