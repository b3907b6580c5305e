"""Two verbs at the same time on the same clone, under clients that write and verify: every pair of verbs.

`python -m integration.pairs --seed 1 --seconds 600`, or `make pairs`. Each pair has a family of its own, in the pool of
one server with two workers: a base, a clone with a snapshot, and a clone of that snapshot. Both verbs are begun at once
(with --seconds: with a small delay between them, again and again). Either both are done, or one is refused with an
error that a user can read; then every disk of the family has to have a content that the two can have left, the names
have to be those that were asked for, `check` finds nothing, and all of it can be removed.

A disk's content is known by its level: that of the base, of the snapshot, of what was received, or of the clone, which
is written to all the time; and by the base that it reads where the two bases differ (pairmodel.py).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration.pairmodel import LARGER, SIZE, SMALLER, Disks, Writer, Wrong, make_bases, written
from integration.served import Served, served
from nbdclone.client import Client
from nbdclone.control.client import Control, set_aside
from nbdclone.control.job import ServedTarget
from nbdclone.control.verbs import drive, find_verb
from nbdclone.errors import ConnectionFailed, Interrupted, InUse, NBDCloneError
from nbdclone.store.check import check_pool
from nbdclone.store.ephemeral import new_mark
from nbdclone.store.finding import WRONG
from nbdclone.store.pool import Pool
from nbdclone.store.receiving import Receiving
from nbdclone.store.sending import Sending

FAMILIES_AT_ONCE = 4
# A verb that takes longer hangs.
VERB_S = 60.0
# How long what a verb left open may take to be closed.
RELEASE_S = 20.0
LONGEST_DELAY_S = 0.05


@dataclass(frozen=True)
class Verb:
    """``arguments`` of a family's name and of the verb's number in the pair. ``quiet``: works only while nobody is
    connected; ``bare``: on a clone without a snapshot, and then its sibling is one of the base, too.
    """

    verb: str
    arguments: Callable[[str, int], Mapping[str, Any]]
    quiet: bool = False
    bare: bool = False
    changes: bool = True
    disconnects: bool = False


def _both(family: str) -> list[str]:
    return [f"{family}-c", f"{family}-d"]


VERBS: dict[str, Verb] = {
    "snapshot": Verb("snapshot", lambda f, n: {"name": f"{f}-c@x{n}"}),
    "rollback": Verb("rollback", lambda f, n: {"name": f"{f}-c@s", "disconnect": True}, disconnects=True),
    "reset": Verb("reset", lambda f, n: {"name": f"{f}-c", "disconnect": True}, disconnects=True),
    "flatten": Verb("flatten", lambda f, n: {"name": f"{f}-c"}),
    "compact": Verb("compact", lambda f, n: {"name": f"{f}-c", "online": True}),
    "rebase": Verb("rebase", lambda f, n: {"names": _both(f), "onto": "new"}),
    "rebase-keep": Verb(
        "rebase", lambda f, n: {"names": [f"{f}-c"], "onto": "new", "keep_changes": True}, quiet=True, bare=True
    ),
    "promote": Verb("promote", lambda f, n: {"name": f"{f}-c", "new": f"{f}-p{n}"}),
    "promote-snapshot": Verb("promote", lambda f, n: {"name": f"{f}-c@s", "new": f"{f}-p{n}"}, changes=False),
    "resize": Verb("resize", lambda f, n: {"name": f"{f}-c", "size": LARGER + 4096 * n}),
    "shrink": Verb("resize", lambda f, n: {"name": f"{f}-c", "size": SMALLER, "force": True}, quiet=True),
    "rename": Verb(
        "rename", lambda f, n: {"old": f"{f}-c", "new": f"{f}-n{n}", "disconnect": True}, disconnects=True
    ),
    "rename-snapshot": Verb("rename", lambda f, n: {"old": f"{f}-c@s", "new": f"{f}-c@t{n}"}),
    "rename-base": Verb("rename", lambda f, n: {"old": f"{f}-b", "new": f"{f}-a{n}"}),
    "rm": Verb("rm", lambda f, n: {"names": [f"{f}-c"]}, quiet=True, bare=True),
    "rm-snapshot": Verb("rm", lambda f, n: {"names": [f"{f}-c@s"]}),
    "rm-sibling": Verb("rm", lambda f, n: {"names": [f"{f}-d"]}, quiet=True),
    "hoist": Verb("hoist", lambda f, n: {"base": f"{f}-b"}, bare=True),
    "merge": Verb("merge", lambda f, n: {}),
    "clone": Verb("clone", lambda f, n: {"source": f"{f}-c@s", "names": [f"{f}-e{n}"]}),
    "clone-base": Verb("clone", lambda f, n: {"source": f"{f}-b", "names": [f"{f}-e{n}"]}),
    "receive": Verb("receive", lambda f, n: {"name": f"{f}-c"}, quiet=True),
    "quota": Verb("quota", lambda f, n: {"name": f"{f}-c", "quota": (n + 1) << 30}),
    "keep": Verb("keep", lambda f, n: {"name": f"{f}-c"}),
    "send": Verb("send", lambda f, n: {"name": f"{f}-c@s"}, changes=False),
    "diff": Verb("diff", lambda f, n: {"a": f"{f}-b", "b": f"{f}-c", "content": n == 0}, changes=False),
    "diff-sibling": Verb("diff", lambda f, n: {"a": f"{f}-c", "b": f"{f}-d", "content": n == 1}, changes=False),
    "list": Verb("list", lambda f, n: {}, changes=False),
    "du": Verb("du", lambda f, n: {"names": [f"{f}-c", f"{f}-b"]}, changes=False),
    "check": Verb("check", lambda f, n: {"names": [f"{f}-c"]}, changes=False),
}  # fmt: skip

PAIRS = [
    (one, other)
    for one, other in itertools.product(VERBS, repeat=2)
    if VERBS[one].changes or VERBS[other].changes
]  # fmt: skip


class Pairs:
    """The pool and its server, and what came of the pairs."""

    def __init__(self, directory: Path, seed: int, *, apart: bool) -> None:
        """``apart``: verbs that a server runs in a process of their own are; else here, as it is done there."""
        self.directory, self.seed, self.apart = directory, seed, apart
        self.rng = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._numbers = itertools.count(1)
        make_bases(directory)
        self.pool = Pool.open(directory / "pool", create=True)
        self.pool.import_base(directory / "new.raw", "new")
        self.server: Served | None = None

    async def run(self, pairs: list[tuple[str, str]], longest_delay_s: float = 0.0) -> None:
        gate = asyncio.Semaphore(FAMILIES_AT_ONCE)

        async def one(names: tuple[str, str]) -> None:
            async with gate:
                family = f"f{next(self._numbers)}"
                delay = self.rng.random() * longest_delay_s
                try:
                    async with asyncio.timeout(3 * VERB_S):
                        await Pair(self, family, names, random.Random(f"{self.seed} {names}")).run(delay)
                except Exception as error:
                    error.add_note(f"{' and '.join(names)}, {delay:.3f} s between them; family {family}")
                    failures.append(error)

        failures: list[Exception] = []
        with served(self.pool.path, "--workers", "2") as self.server:
            await asyncio.gather(*map(one, pairs))
            if failures:
                raise ExceptionGroup(f"{len(failures)} of {len(pairs)} pairs, seed {self.seed}", failures)
        findings = [finding for finding in check_pool(self.pool.path) if finding.level == WRONG]
        if findings:
            raise Wrong(f"check: {findings[0]}")

    def do(self, verb: str, arguments: Mapping[str, Any], stream: bytes) -> Any:
        """Do a verb, in a thread, as the command line has it done."""
        pool, places = self.pool, self.pool.places
        if verb == "clone":
            return Control(pool.path).call("POST", "/clones", dict(arguments))
        if verb == "list":
            if wrong := [entry for entry in pool.entries(unnamed=True) if entry.error]:
                raise Wrong(f"listed: {wrong[0]}")
            return None
        if verb == "check":
            if wrong := [each for each in check_pool(pool.path, **arguments) if each.level == WRONG]:
                raise Wrong(f"check: {wrong[0]}")
            return None
        if verb == "send":
            with Sending(places, arguments["name"]) as sending:
                return list(sending.run(io.BytesIO()))
        if verb == "receive":

            def aside(clone: str) -> contextlib.AbstractContextManager[None]:
                return set_aside(pool, clone, disconnect=False)

            return list(Receiving(places, io.BytesIO(stream), force=True, aside=aside, **arguments).run())
        if self.apart or find_verb(verb).place == "worker":
            return drive(Control(pool.path).run(verb, arguments))
        return drive(find_verb(verb).begin(ServedTarget(pool), arguments))


class Pair:
    """One pair of verbs, with its family."""

    def __init__(self, all_of_it: Pairs, family: str, names: tuple[str, str], rng: random.Random) -> None:
        self.all, self.family, self.names, self.rng = all_of_it, family, names, rng
        self.pool = all_of_it.pool
        self.verbs = [VERBS[name] for name in names]
        self.quiet = any(verb.quiet for verb in self.verbs)
        self.bare = any(verb.bare for verb in self.verbs)
        self.below = "B" if self.bare else "S"  # of the sibling
        self.disks = Disks(rng)
        self.stream = b""
        self.writers: dict[str, Writer] = {}
        self.succeeded: set[int] = set()

    def uri(self, name: str) -> str:
        assert self.all.server is not None
        return self.all.server.uri(name)

    def make(self) -> None:
        """The family: a base, the clone, its snapshot, a clone of that."""
        f, pool = self.family, self.pool
        pool.import_base(self.all.directory / "old.raw", f"{f}-b")
        mark = new_mark("none", 1e6) if "keep" in self.names else None
        pool.create_clones(f"{f}-b", [f"{f}-c"], fill=lambda clone: written(clone, self.disks.own["S"]), mark=mark)
        if not self.bare:
            pool.snapshot(f"{f}-c@s")
        pool.create_clones(f"{f}-b" if self.bare else f"{f}-c@s", [f"{f}-d"])
        if "hoist" in self.names:  # something that it can share, with somebody else
            pool.create_clones(f"{f}-b", [f"{f}-h"], fill=lambda clone: written(clone, self.disks.own["S"]))
        if "receive" in self.names and not self.bare:
            # Of a snapshot that the clone had, and has no more.
            with pool.open_clone(f"{f}-c") as clone:
                written(clone, self.disks.own["T"])
            pool.snapshot(f"{f}-c@r")
            stream = io.BytesIO()
            with Sending(pool.places, f"{f}-c@r", since="s") as sending:
                list(sending.run(stream))
            self.stream = stream.getvalue()
            pool.rollback(f"{f}-c@s")
            pool.remove([f"{f}-c@r"])
        with pool.open_clone(f"{f}-c") as clone:
            written(clone, self.disks.own["Q"])

    async def run(self, delay_s: float) -> None:
        await asyncio.to_thread(self.make)
        f = self.family
        async with contextlib.AsyncExitStack() as held:
            for name, level in ((f"{f}-c", "Q"), (f"{f}-d", self.below)):
                writer = Writer(self.disks.content("old", level), random.Random(self.rng.random()))
                self.writers[name] = writer
                client = await held.enter_async_context(await Client.connect(self.uri(name)))
                await writer.some(client, 3)
                if self.quiet:
                    await client.close()
                    continue
                task = asyncio.create_task(writer.run(client))
                held.push_async_callback(_end, task)
            if self.quiet:
                await self.released()
            self.least = self.writers[f"{f}-c"].acknowledged
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self.verb(0, 0.0))
                tasks.create_task(self.verb(1, delay_s))
            await asyncio.sleep(0.005)
        for name, writer in self.writers.items():
            if writer.lost and not (name == f"{f}-c" and any(verb.disconnects for verb in self.verbs)):
                raise Wrong(f"the client of {name} noticed: {writer.lost}")
        await self.compare()
        await asyncio.to_thread(self.remove)

    async def released(self) -> None:
        """The server has closed what the first clients had."""
        deadline = time.monotonic() + RELEASE_S
        while any(
            export["name"].startswith(f"{self.family}-")
            for export in await asyncio.to_thread(Control(self.pool.path).exports)
        ):
            if time.monotonic() > deadline:
                raise Wrong("an export stays open")
            await asyncio.sleep(0.01)

    async def verb(self, number: int, delay_s: float) -> None:
        await asyncio.sleep(delay_s)
        name, verb = self.names[number], self.verbs[number]
        arguments = verb.arguments(self.family, number)
        try:
            await asyncio.wait_for(asyncio.to_thread(self.all.do, verb.verb, arguments, self.stream), VERB_S)
        except Wrong:
            raise
        except (ConnectionFailed, Interrupted) as error:
            raise Wrong(f"{name}: {type(error).__name__}: {error}") from error
        except NBDCloneError as error:
            if "a defect of nbdclone" in str(error) or "\n" in str(error):
                raise Wrong(f"{name}: {error}") from error
            self.all.refused[f"{name}: {_plain(str(error), self.family)}"] += 1
        else:
            self.succeeded.add(number)
            self.all.done[name] += 1

    # Afterwards

    async def compare(self) -> None:
        """The names are right, and so is each disk."""
        f = self.family
        done = {self.names[number] for number in self.succeeded}
        entries = {e.name: e for e in await asyncio.to_thread(self.pool.entries) if e.name.startswith(f"{f}-")}
        wanted = self.wanted(done)
        if {"rename", "receive"} <= done and f"{f}-c" in entries:  # renamed first, and then a clone was made of it
            wanted = self.wanted(done - {"receive"}) | {
                name: [("old", level, None, 0, 0)] for name, level in ((f"{f}-c", "T"), (f"{f}-c@r", "T"))
            }
        if entries.keys() != wanted.keys():
            raise Wrong(f"{sorted(done)} done: names {sorted(entries.keys() ^ wanted.keys())}")
        for name, allowed in wanted.items():
            if entries[name].error:
                raise Wrong(f"{name}: {entries[name].error}")
            async with await Client.connect(self.uri(name)) as client:
                size = client.size
                now = await client.pread(size, 0)
            if not any(self.disks.explains(now, *each) for each in allowed):
                shown = self.disks.nearest(now, *allowed[0][:2])
                raise Wrong(f"{sorted(done)} done: {name} has another content than {allowed[0][:2]}: {shown}")
            if name.partition("@")[0] == self.clone and "@" not in name:
                sizes = self.sizes(done)
                if size not in sizes:
                    raise Wrong(f"{sorted(done)} done: {name} has {size} bytes, not {sizes}")
        findings = await asyncio.to_thread(lambda: list(check_pool(self.pool.path, sorted(entries))))
        if findings := [finding for finding in findings if finding.level == WRONG]:
            raise Wrong(f"{sorted(done)} done: check: {findings[0]}")

    def wanted(self, done: set[str]) -> dict[str, list[tuple[Any, ...]]]:
        """The names that there are to be, and of each the (base, level, writer, least, most) that it may have."""
        f = self.family
        names = {VERBS[self.names[number]].verb + str(number) for number in self.succeeded}
        numbers = {self.names[number]: number for number in self.succeeded}
        self.clone = f"{f}-n{numbers['rename']}" if "rename" in done else f"{f}-c"
        writer = self.writers[f"{f}-c"]
        now = ("Q", writer, writer.acknowledged, writer.begun)
        then = ("Q", writer, self.least, writer.begun)
        back = [
            (level, None, 0, 0) for name, level in (("rollback", "S"), ("reset", "B"), ("receive", "T")) if name in done
        ]
        new = ["new"] if "rebase-keep" in done else ["old"]
        either = ["old", *(["new"] if done & {"rebase-keep", "rebase"} else [])]
        found: dict[str, list[tuple[Any, ...]]] = {}
        base = f"{f}-a{numbers['rename-base']}" if "rename-base" in done else f"{f}-b"
        found[base] = [("old", "B", None, 0, 0)]
        if "rm" not in done:
            found[self.clone] = (
                [(b, *each) for each in back for b in either] if back else [(b, *now) for b in new]
            )  # fmt: skip
            if not self.bare and "rm-snapshot" not in done:
                name = f"t{numbers['rename-snapshot']}" if "rename-snapshot" in done else "s"
                found[f"{self.clone}@{name}"] = [("old", "S", None, 0, 0)]
            if "receive" in done:
                found[f"{self.clone}@r"] = [("old", "T", None, 0, 0)]
        for number in (0, 1):
            sealed = [(b, *each) for each in (then, *back) for b in either]
            if f"snapshot{number}" in names and "rm" not in done:
                found[f"{self.clone}@x{number}"] = sealed
            if f"promote{number}" in names:
                whole = self.names[number] == "promote"
                found[f"{f}-p{number}"] = sealed if whole else [("old", "S", None, 0, 0)]
            if f"clone{number}" in names:
                found[f"{f}-e{number}"] = [("old", "S" if self.names[number] == "clone" else "B", None, 0, 0)]
        if "rm-sibling" not in done:
            sibling = self.writers[f"{f}-d"]
            found[f"{f}-d"] = [("old", self.below, sibling, sibling.acknowledged, sibling.begun)]
        if "hoist" in self.names:
            found[f"{f}-h"] = [("old", "S", None, 0, 0)]
        return found

    def sizes(self, done: set[str]) -> set[int]:
        """What the clone may have."""
        asked = {
            self.verbs[number].arguments(self.family, number)["size"]
            for number in self.succeeded
            if self.names[number] in ("resize", "shrink")
        }
        return asked | ({SIZE} if not asked or done & {"rollback", "reset", "receive"} else set())

    def remove(self) -> None:
        """All of it can be removed, when the server has closed it, and merged what is to be merged."""
        deadline = time.monotonic() + RELEASE_S
        while True:
            try:
                names = [name for name in self.pool.names() if name.startswith(f"{self.family}-")]
                return self.pool.remove([name for name in names if "@" not in name])
            except InUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _plain(message: str, family: str) -> str:
    """Without what is another in each pair."""
    return message.replace(f"{family}-", "")[:120]


async def repeat(directory: Path, seed: int, seconds: float) -> Pairs:
    """All pairs, in random order, with random delays, as often as there is time for."""
    pairs = Pairs(directory, seed, apart=True)
    deadline = time.monotonic() + seconds
    for batch in _batches(pairs.rng):
        await pairs.run(batch, LONGEST_DELAY_S * pairs.rng.random() ** 2 * 10)
        if time.monotonic() > deadline:
            return pairs
    raise AssertionError


def _batches(rng: random.Random) -> Iterator[list[tuple[str, str]]]:
    while True:
        order = rng.sample(PAIRS, len(PAIRS))
        yield from (order[first : first + 50] for first in range(0, len(order), 50))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--seconds", type=float, default=600)
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="nbdclone-pairs-"))
    print(f"seed {given.seed} in {directory}", flush=True)
    pairs = asyncio.run(repeat(directory, given.seed, given.seconds))
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    print(json.dumps({"seed": given.seed, "done": pairs.done, "refused": pairs.refused}, indent=1))


if __name__ == "__main__":
    main()
