"""Random verbs in random order under writing clients, and the server killed in the midst of them.

`make lifecycle`, or `python -m integration.lifecycle --seed 1 --seconds 600`. One round: a server with two workers is
started, and all that the pool has is read and compared with the model (lifemodel.py): every name is there, every base
and snapshot is to the byte what it was, every clone has what was acknowledged. Then clients write to some clones, the
command line runs some verbs on any of them, and the server is stopped, or killed between two verbs or in the midst of
one; or the command is. Merges give space back every few KiB (smallsteps/), so that they are cut off between any two
steps of that, too. In the end of it `nbdclone check` has to find nothing. Some verbs run without a server, and are
killed as well. Whatever is wrong ends the campaign, with the seed, and leaves the pool where it is.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from integration.lifemodel import SECTOR, SECTORS, SIZE, WINDOWS, WRITERS, CloneModel, Wrong, on_disk, place
from integration.served import COMMAND, ENVIRONMENT, Served, make_pool, nbdclone, served
from nbdclone.client import Client
from nbdclone.errors import NBDCloneError

MOST_VERBS = 6  # in a round
MOST_CLONES = 6
MOST_SNAPSHOTS = 8
MOST_BASES = 4
WRITTEN_TO = 3  # clones that have clients, in a round
WRITE_PAUSE_S = 0.002
LONGEST_TO_KILL_S = 1.2  # after a command was started; it takes half a second until it has asked the server
VERB_S = 120.0
MIB = 1 << 20

Expect = Callable[[bool], Coroutine[Any, Any, None]]


class Campaign:
    def __init__(self, directory: Path, seed: int, merges: bool = False) -> None:
        self.directory, self.seed, self.merges = directory, seed, merges
        self.rng = random.Random(seed)
        self.pool = directory / "pool"
        self.fixed: dict[str, bytes] = {}
        """Bases and snapshots: what they read."""
        self.clones: dict[str, CloneModel] = {}
        self.counts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.history: list[str] = []
        self._number = 10
        self._server: Served | None = None
        self._writers: dict[str, list[asyncio.Task[None]]] = {}

    def fresh(self, kind: str) -> str:
        self._number += 1
        return f"{kind}{self._number}"

    # The pool at the start

    def make(self) -> None:
        images = []
        content = self.rng.randbytes(SECTORS * SECTOR)
        for number in range(2):
            if number:  # the update: some of it is otherwise
                changed = bytearray(content)
                for _ in range(20):
                    sector = self.rng.randrange(SECTORS - 16)
                    changed[sector * SECTOR : (sector + 16) * SECTOR] = self.rng.randbytes(16 * SECTOR)
                content = bytes(changed)
            images.append(self.directory / f"image{number}")
            with open(images[-1], "wb") as file:
                file.truncate(SIZE)
                for window, (offset, length) in enumerate(WINDOWS):
                    file.seek(offset)
                    file.write(content[window * length : (window + 1) * length])
            self.fixed[f"base{number}"] = content
        make_pool(self.pool, images[0], "c1", "c2", "c3", base="base0")
        nbdclone("--pool", self.pool, "import", images[1], "--name", "base1")
        for name in ("c1", "c2", "c3"):
            self.clones[name] = CloneModel(self.fixed["base0"], self.fixed["base0"], SIZE)

    # Reading, and comparing

    def listed(self) -> dict[str, dict[str, Any]]:
        def flat(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [each for entry in entries for each in (entry, *flat(entry["children"]))]

        entries = json.loads(nbdclone("--pool", self.pool, "tree", "--json").stdout)
        return {entry["name"]: entry for entry in flat(entries)}

    async def read(self, name: str) -> bytes:
        assert self._server is not None
        async with await Client.connect(self._server.uri(name)) as client:
            return b"".join([await client.pread(length, offset) for offset, length in WINDOWS])

    async def require_all(self) -> None:
        """Every name is there, and reads as it has to; clones' contents are known from here on."""
        found = self.listed()
        if found.keys() != self.fixed.keys() | self.clones.keys():
            raise Wrong(f"names: {sorted(found.keys() ^ (self.fixed.keys() | self.clones.keys()))}")
        for name, entry in found.items():
            if entry["error"]:
                raise Wrong(f"{name}: {entry['error']}")
        for name, content in self.fixed.items():
            if await self.read(name) != content:
                raise Wrong(f"{name} is not what it was")
            self.counts["compared"] += 1
        for name, model in self.clones.items():
            now = await self.read(name)
            try:
                model.require(now, model.acknowledged(), model.begun())
            except Wrong as error:
                raise Wrong(f"{name}: {error}") from None
            if found[name]["size"] != model.size:
                raise Wrong(f"{name} has {found[name]['size']} bytes, not {model.size}")
            model.known(now)
            self.counts["compared"] += 1

    # Clients

    async def write(self, name: str, model: CloneModel, writer: int, seed: int) -> None:
        """Write, zero and trim until the connection goes."""
        rng = random.Random(seed)
        journal = model.journals[writer]
        assert self._server is not None
        with contextlib.suppress(NBDCloneError, OSError):
            async with await Client.connect(self._server.uri(name)) as client:
                while True:
                    sector, count = place(rng, writer)
                    chance = rng.random()
                    data = bytes(count * SECTOR) if chance < 0.2 else rng.randbytes(8) * (count * SECTOR // 8)
                    journal.begin(sector, data)
                    if chance < 0.1:
                        await client.trim(len(data), on_disk(sector))
                    elif chance < 0.2:
                        await client.zero(len(data), on_disk(sector))
                    else:
                        await client.pwrite(data, on_disk(sector), fua=chance > 0.97)
                    journal.acknowledge()
                    self.counts["writes"] += 1
                    if rng.random() < 0.02:
                        await client.flush()
                    await asyncio.sleep(rng.random() * WRITE_PAUSE_S)

    def connect(self, name: str) -> None:
        model = self.clones[name]
        self._writers[name] = [
            asyncio.create_task(self.write(name, model, writer, self.rng.getrandbits(32))) for writer in range(WRITERS)
        ]

    async def disconnected(self, name: str) -> None:
        """Its clients are gone, or are told to go."""
        for task in self._writers.pop(name, ()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    # Verbs

    async def verb(self, kill: str | None) -> None:
        """A verb, to its end; or ``kill`` the "server" or the "command" while it is at work."""
        names = [
            "snapshot", "snapshot", "snapshot", "rm", "rm", "clone", "rollback", "reset", "promote", "flatten",
            "rebase", "compact", "resize", "rename", "du", "diff", "send",
        ]  # fmt: skip
        if self.merges and self.rng.random() < 0.8:
            names = ["snapshot", "rm"]
        name = self.rng.choice(names)
        plan = getattr(self, f"plan_{name}")()
        if plan is None:
            return
        args, expect = plan
        self.history.append(
            f"{'with' if self._server else 'without'} a server: {' '.join(args)}"
            f"{f' (the {kill} is killed)' * bool(kill)}"
        )
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "--pool", str(self.pool), *args, env=ENVIRONMENT, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        ending = asyncio.create_task(process.communicate())
        if kill:
            await asyncio.sleep(self.rng.random() * LONGEST_TO_KILL_S)
            if kill == "server":
                assert self._server is not None
                await asyncio.to_thread(self._server.kill)
            elif process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(self.rng.choice([signal.SIGKILL, signal.SIGINT]))
        _, said = await asyncio.wait_for(ending, VERB_S)
        text = said.decode()
        status = process.returncode
        self.history[-1] += f" -> {status} {text.strip()[-200:]}"
        if "Traceback" in text and not kill:
            raise Wrong(f"{' '.join(args)}: {text}")
        if status == 0:
            self.counts[name] += 1
        elif kill:
            self.counts[f"{name}, interrupted"] += 1
        else:
            if status != 1 or len(text.strip().splitlines()) != 1:
                raise Wrong(f"{' '.join(args)}: status {status}: {text}")
            self.refusals[name] += 1
        if status == 0 or kill:
            await expect(status == 0)

    def a_clone(self) -> str:
        return self.rng.choice(sorted(self.clones))

    def a_snapshot(self) -> str | None:
        found = sorted(name for name in self.fixed if "@" in name)
        return self.rng.choice(found) if found else None

    def a_base(self) -> str:
        return self.rng.choice(sorted(name for name in self.fixed if "@" not in name))

    async def frozen(self, name: str, clone: str, least: list[int]) -> None:
        """A snapshot or base of a clone that is written to: what it reads can be that, and stays."""
        model = self.clones[clone]
        most = model.begun()
        now = await self.read_anyhow(name)
        try:
            model.require(now, least, most)
        except Wrong as error:
            raise Wrong(f"{name}, made of {clone}: {error}") from None
        self.fixed[name] = now

    async def read_anyhow(self, name: str) -> bytes:
        """Read an entry, whether there is a server or not."""
        if self._server is not None and not self._server.was_killed:
            return await self.read(name)
        done = await asyncio.to_thread(
            subprocess.run, [*COMMAND, "--pool", str(self.pool), "export", name, "-"], env=ENVIRONMENT,
            check=True, capture_output=True,
        )  # fmt: skip
        return b"".join(done.stdout[offset : offset + length] for offset, length in WINDOWS)

    def there(self, name: str) -> bool:
        return name in self.listed()

    def plan_snapshot(self) -> tuple[list[str], Expect] | None:
        clone = self.a_clone()
        if sum("@" in name for name in self.fixed) >= MOST_SNAPSHOTS:
            return None
        name = f"{clone}@{self.fresh('s')}"
        least = self.clones[clone].acknowledged()

        async def expect(done: bool) -> None:
            if done or await asyncio.to_thread(self.there, name):
                await self.frozen(name, clone, least)

        return ["snapshot", name], expect

    def plan_promote(self) -> tuple[list[str], Expect] | None:
        if sum("@" not in name for name in self.fixed) >= MOST_BASES:
            return None
        snapshot = self.a_snapshot() if self.rng.random() < 0.5 else None
        source = snapshot or self.a_clone()
        new = self.fresh("base")
        least = self.clones[source].acknowledged() if snapshot is None else []

        async def expect(done: bool) -> None:
            if not done and not await asyncio.to_thread(self.there, new):
                return
            if snapshot is None:
                await self.frozen(new, source, least)
            else:
                self.fixed[new] = self.fixed[snapshot]

        return ["promote", source, new], expect

    def plan_clone(self) -> tuple[list[str], Expect] | None:
        if len(self.clones) >= MOST_CLONES:
            return None
        source = self.a_snapshot() or self.a_base()
        name = self.fresh("c")

        async def expect(done: bool) -> None:
            entry = (await asyncio.to_thread(self.listed)).get(name)
            if done or entry:
                assert entry is not None
                self.clones[name] = CloneModel(self.fixed[source], self.fixed[source], entry["size"])

        return ["clone", source, name], expect

    def plan_rm(self) -> tuple[list[str], Expect] | None:
        snapshot = self.a_snapshot()
        if self.merges and snapshot and self.rng.random() < 0.7:  # the clone's newest: its layer goes into the clone
            clone = snapshot.partition("@")[0]
            snapshot = max(
                (name for name in self.fixed if name.startswith(f"{clone}@")), key=lambda name: int(name.split("@s")[1])
            )
        names = (
            [snapshot]
            if snapshot and (self.merges or self.rng.random() < 0.8)
            else [self.rng.choice([self.a_clone(), self.a_base()])]
        )
        if names[0] in self.clones and len(self.clones) <= 2:
            return None
        if names[0] in self.clones and self.rng.random() < 0.5:
            names += [name for name in self.fixed if name.startswith(f"{names[0]}@")]

        async def expect(done: bool) -> None:
            found = await asyncio.to_thread(self.listed)
            gone = [name for name in names if name not in found]
            if done and len(gone) < len(names):
                raise Wrong(f"rm {names}: {set(names) - set(gone)} is still there")
            for name in gone:
                await self.disconnected(name)
                self.clones.pop(name, None)
                self.fixed.pop(name, None)
                for snapshot in [each for each in self.fixed if each.startswith(f"{name}@")]:
                    del self.fixed[snapshot]

        return ["rm", *names], expect

    def plan_rollback(self) -> tuple[list[str], Expect] | None:
        if (snapshot := self.a_snapshot()) is None:
            return None
        return ["rollback", snapshot, "--disconnect"], self._went_back(snapshot.partition("@")[0], [snapshot])

    def plan_reset(self) -> tuple[list[str], Expect] | None:
        clone = self.a_clone()
        return ["reset", clone, "--disconnect"], self._went_back(clone, [])

    def _went_back(self, clone: str, to: list[str]) -> Expect:
        async def expect(done: bool) -> None:
            await self.disconnected(clone)
            model = self.clones[clone]
            now = await self.read_anyhow(clone)
            # A reset goes to what it was made from, or to the base that it was moved to.
            bases = [content for name, content in self.fixed.items() if "@" not in name]
            if now in ([self.fixed[name] for name in to] or [model.origin, *bases]):
                model.known(now)
            elif done:
                raise Wrong(f"{clone} did not go back to {to or 'what it was made from'}")
            else:
                model.require(now, model.acknowledged(), model.begun())
                model.known(now)
            model.size = (await asyncio.to_thread(self.listed))[clone]["size"]

        return expect

    async def same(self, done: bool) -> None:
        """Nothing reads otherwise than before; that is looked at at the start of each round."""

    def plan_flatten(self) -> tuple[list[str], Expect]:
        return ["flatten", self.a_clone()], self.same

    def plan_compact(self) -> tuple[list[str], Expect]:
        return ["compact", self.a_clone(), "--online"], self.same

    def plan_du(self) -> tuple[list[str], Expect]:
        return ["du"], self.same

    def plan_rebase(self) -> tuple[list[str], Expect]:
        clone = self.a_clone()
        base = self.listed()[clone]["base"]
        alike = [name for name, entry in self.listed().items() if entry["kind"] == "clone" and entry["base"] == base]
        names = alike if self.rng.random() < 0.7 and base else [clone]
        return ["rebase", *names, "--onto", self.a_base()], self.same

    def plan_resize(self) -> tuple[list[str], Expect]:
        clone = self.a_clone()
        size = self.clones[clone].size + self.rng.randint(1, 8) * 4096

        async def expect(done: bool) -> None:
            found = (await asyncio.to_thread(self.listed))[clone]["size"]
            if found not in ((size,) if done else (size, self.clones[clone].size)):
                raise Wrong(f"{clone} has {found} bytes after resize {size}")
            self.clones[clone].size = found

        return ["resize", clone, str(size)], expect

    def plan_rename(self) -> tuple[list[str], Expect]:
        old = self.rng.choice([*self.clones, *self.fixed])
        clone, _, _ = old.partition("@")
        new = f"{clone}@{self.fresh('s')}" if "@" in old else self.fresh("c" if old in self.clones else "base")

        async def expect(done: bool) -> None:
            found = await asyncio.to_thread(self.listed)
            if new not in found:
                if done:
                    raise Wrong(f"rename: there is no {new}")
                return
            await self.disconnected(old)
            if old in self.clones:
                self.clones[new] = self.clones.pop(old)
                for name in [each for each in self.fixed if each.startswith(f"{old}@")]:
                    self.fixed[f"{new}@{name.partition('@')[2]}"] = self.fixed.pop(name)
            else:
                self.fixed[new] = self.fixed.pop(old)

        return ["rename", old, new, "--disconnect"], expect

    def plan_diff(self) -> tuple[list[str], Expect]:
        return ["diff", self.a_base(), self.rng.choice(sorted(self.fixed)), "--content"], self.same

    def plan_send(self) -> tuple[list[str], Expect] | None:
        """Through a file, and back into the pool by another name: the command's status is that of both."""
        if (snapshot := self.a_snapshot()) is None or len(self.clones) >= MOST_CLONES:
            return None
        stream, name = self.directory / self.fresh("stream"), self.fresh("c")

        async def expect(done: bool) -> None:
            if not done:
                stream.unlink(missing_ok=True)
                return
            received = await asyncio.to_thread(
                nbdclone, "--pool", self.pool, "receive", stream, "--name", name, check=False
            )
            stream.unlink()
            text = received.stderr.strip()
            self.history.append(f"receive {snapshot} as {name}: {received.returncode} {text}")
            if received.returncode:
                if (self._server is not None and self._server.was_killed) or len(text.splitlines()) == 1:
                    self.refusals["receive"] += 1
                    return
                raise Wrong(f"receive: {text}")
            self.counts["receive"] += 1
            found = await asyncio.to_thread(self.listed)
            content = self.fixed[snapshot]
            self.clones[name] = CloneModel(content, content, found[name]["size"])
            for each in found[name]["snapshots"]:
                full = each if "@" in each else f"{name}@{each}"
                self.fixed[full] = await self.read_anyhow(full)
            last = f"{name}@{snapshot.partition('@')[2]}"
            if self.fixed[last] != content:
                raise Wrong(f"{last} was received otherwise than {snapshot}")
            # What lies beneath has its name in the stream only where it had one: its origin is not told here.
            self.clones[name].origin = content

        return ["send", snapshot, "-o", str(stream)], expect

    # Rounds

    async def round(self) -> None:
        with served(self.pool, "--workers", "2") as self._server:
            await self.require_all()
            for name in self.rng.sample(sorted(self.clones), min(WRITTEN_TO, len(self.clones))):
                self.connect(name)
            for _ in range(self.rng.randint(1, MOST_VERBS) * (3 if self.merges else 1)):
                await self.verb("command" if self.rng.random() < 0.15 else None)
                if self.rng.random() < 0.5:
                    await asyncio.sleep(self.rng.random() * 0.3)
            end = self.rng.random()
            if end < 0.5:
                await self.verb("server")
            if end < 0.7:
                await asyncio.to_thread(self._server.kill)
                self.counts["servers killed"] += 1
            else:
                for name in list(self._writers):
                    await self.disconnected(name)
            for name in list(self._writers):
                await self.disconnected(name)
        self._server = None
        if self.rng.random() < 0.4:
            for _ in range(self.rng.randint(1, 3)):
                await self.verb("command" if self.rng.random() < 0.5 else None)
        said = await asyncio.to_thread(nbdclone, "--pool", self.pool, "check", check=False)
        if said.returncode or not said.stdout.endswith("all is well\n"):
            raise Wrong(f"check: {said.stdout}{said.stderr}")
        self.counts["rounds"] += 1


@contextlib.contextmanager
def small_steps(counted: Path, step: int, stretch: int) -> Iterator[None]:
    """Whatever is started meanwhile copies so many bytes at a time when it merges, and gives space back after so many;
    the file has a byte for each time that holes were made in a layer.
    """
    values: dict[str, dict[str, float]] = {
        "nbdclone.store.copying": {"STEP": step, "SPAN": 4 * step},
        "nbdclone.store.giving_back": {"STRETCH": stretch, "HOLES_AT_ONCE": 2},
        "nbdclone.server.merger": {"LOOK_S": 0.1},
    }
    counted.touch()
    before = dict(ENVIRONMENT)
    ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).with_name("smallsteps")), before["PYTHONPATH"]])
    ENVIRONMENT["SMALL_STEPS"] = json.dumps(values)
    ENVIRONMENT["SMALL_STEPS_COUNTED"] = str(counted)
    try:
        yield
    finally:
        ENVIRONMENT.clear()
        ENVIRONMENT.update(before)


async def run(directory: Path, seed: int, seconds: float, merges: bool = False) -> Campaign:
    counted = directory / "counted"
    with small_steps(counted, 4 << 10, 4 << 10):
        campaign = await _run(directory, seed, seconds, merges)
    campaign.counts["given back, steps"] = counted.stat().st_size
    return campaign


async def _run(directory: Path, seed: int, seconds: float, merges: bool) -> Campaign:
    campaign = Campaign(directory, seed, merges)
    campaign.make()
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            campaign.history.append(f"round {campaign.counts['rounds']}")
            await campaign.round()
    except BaseException:
        print(*campaign.history[-60:], sep="\n", file=sys.stderr)
        print(f"seed {seed}, after {dict(campaign.counts)}; the pool is {campaign.pool}", file=sys.stderr)
        raise
    return campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--merges", action="store_true", help="mostly snapshots that are made and removed")
    given = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="nbdclone-lifecycle-"))
    campaign = asyncio.run(run(directory, given.seed, given.seconds, given.merges))
    subprocess.run(["rm", "-rf", str(directory)], check=True)
    print(json.dumps({"seed": given.seed, "done": campaign.counts, "refused": campaign.refusals}))


if __name__ == "__main__":
    main()
