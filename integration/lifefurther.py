"""Further verbs of a campaign, that take more than one command, or a model of their own: for lifecycle.py.

shrink, rebase --keep-changes, hoist; a backup: a snapshot is sent to another pool, whole or relative to the one before,
where its receiving may be killed, and goes on; and ephemeral clones, some of which are kept.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from integration.lifemodel import SECTOR, SECTORS, WINDOWS, CloneModel, Wrong, cut, on_disk
from integration.lifeplans import MOST_CLONES, Plans
from integration.lifestate import Plan
from integration.served import COMMAND, ENVIRONMENT, nbdclone
from nbdclone.client import Client
from nbdclone.errors import NBDCloneError

BLOCK = 4096
# After so many the pool of backups is begun anew.
MOST_BACKUPS = 8
# After a receive was started: it takes a third of a second until it has read anything.
LONGEST_TO_KILL_S = 0.8


class Further(Plans):
    """Further plans."""

    def __init__(self, directory: Path, seed: int, merges: bool = False) -> None:
        super().__init__(directory, seed, merges)
        self.other = directory / "backup"
        self.backups: dict[str, bytes] = {}
        """The snapshots in the other pool."""
        self._backed_up: dict[str, tuple[str, str]] = {}  # a clone: its name there, and its last snapshot
        self.ephemeral: dict[str, bytes] = {}

    def a_quiet_clone(self) -> str | None:
        """One that nobody writes to, and whose content is known."""
        found = [name for name, model in self.clones.items() if name not in self._writers and not any(model.begun())]
        return self.rng.choice(sorted(found)) if found else None

    def plan_shrink(self) -> Plan:
        if (clone := self.a_quiet_clone()) is None:
            return None
        model = self.clones[clone]
        lowest = WINDOWS[1][0] if self.rng.random() < 0.5 else sum(WINDOWS[1])
        size = max(model.size - self.rng.randint(1, 1000) * BLOCK, lowest + self.rng.randint(1, 60) * SECTOR)
        if size >= model.size:
            return None

        async def expect(done: bool) -> None:
            found = (await asyncio.to_thread(self.listed))[clone]["size"]
            if found not in ((size,) if done else (size, model.size)):
                raise Wrong(f"{clone} has {found} bytes after it was shrunk to {size}")
            if found == size:
                model.content, model.size = cut(model.content, size), size

        return ["resize", clone, str(size), "--force"], expect

    def plan_keep_changes(self) -> Plan:
        """What it owns stays, told by ``diff``; all else is the new base's."""
        clone, found, onto = self.a_quiet_clone(), self.listed(), self.a_base()
        if clone is None or (old := found[clone]["base"]) not in self.fixed or old == onto:
            return None
        if found[clone]["parent"] != old and self.rng.random() < 0.8:
            return None  # its snapshots are in the way
        told = nbdclone("--pool", self.pool, "diff", old, clone, "--json", check=False)
        if told.returncode:
            return None
        own = [(each["offset"], each["offset"] + each["length"]) for each in json.loads(told.stdout)["extents"]]
        model, wanted = self.clones[clone], bytearray(self.fixed[onto])
        for sector in range(SECTORS):
            if any(start <= on_disk(sector) < end for start, end in own):
                wanted[sector * SECTOR : (sector + 1) * SECTOR] = model.content[sector * SECTOR : (sector + 1) * SECTOR]
        content = cut(bytes(wanted), model.size)

        async def expect(done: bool) -> None:
            base = (await asyncio.to_thread(self.listed))[clone]["base"]
            if done and base != onto:
                raise Wrong(f"{clone} is on {base} after it was rebased onto {onto}")
            if base == onto:
                model.content, model.origin = content, self.fixed[onto]
                self.require_same(clone, await self.read_anyhow(clone), content)

        return ["rebase", clone, "--onto", onto, "--keep-changes", "--yes"], expect

    @staticmethod
    def require_same(name: str, now: bytes, wanted: bytes) -> None:
        if now != wanted:
            differing = [n for n in range(SECTORS) if now[n * SECTOR :][:SECTOR] != wanted[n * SECTOR :][:SECTOR]]
            raise Wrong(f"{name} reads otherwise in {len(differing)} sectors, the first {differing[:5]}")

    def plan_hoist(self) -> Plan:
        return ["hoist", self.a_base(), "--min-clones", "2"], self.same

    # Another pool

    def plan_backup(self) -> Plan:
        """Send to a file; then receive it in the other pool, which may be killed, and goes on then."""
        later = [name for name in sorted(self.fixed) if self._is_later(name)]
        snapshot = self.rng.choice(later) if later and self.rng.random() < 0.8 else self.a_snapshot()
        if snapshot is None:
            return None
        if len(self.backups) >= MOST_BACKUPS:
            shutil.rmtree(self.other)
            self.backups, self._backed_up = {}, {}
        clone, _, last = snapshot.partition("@")
        if clone in self._backed_up and not self._is_later(snapshot):
            return None
        there, since = self._backed_up.get(clone, (self.fresh("b"), ""))
        stream = self.directory / self.fresh("stream")
        how = ["--from", since] if since else ["--with-base"]

        async def expect(done: bool) -> None:
            try:
                if done and await self._receive(stream, there, whole=not since):
                    for name in self._names_there():
                        # What came along, from before: it is compared with what is here, as far as that has its name.
                        here = f"{clone}@{name.partition('@')[2]}"
                        if name.startswith(f"{there}@") and name not in self.backups and here in self.fixed:
                            self.backups[name] = self.fixed[here]
                    self._backed_up[clone] = there, last
                    self.counts["incremental receive" if since else "whole receive"] += 1
            finally:
                stream.unlink(missing_ok=True)

        return ["send", snapshot, *how, "-o", str(stream)], expect

    def _is_later(self, name: str) -> bool:
        """Is it a snapshot of a clone that has an earlier one in the other pool? Names are numbered."""
        clone, _, snapshot = name.partition("@")
        return bool(snapshot) and clone in self._backed_up and int(snapshot[1:]) > int(self._backed_up[clone][1][1:])

    async def _receive(self, stream: Path, there: str, *, whole: bool) -> bool:
        """Is it there in the end? One that was killed goes on from where it was, by a token, or with all of it."""
        options = ["--name", there, *(["--base-name", f"{there}-base"] if whole else ["--force"])]
        command = [*COMMAND, "--pool", str(self.other), "receive", str(stream), *options]
        process = await asyncio.create_subprocess_exec(
            *command, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        ending = asyncio.create_task(process.communicate())
        if killed := self.rng.random() < 0.5:
            await asyncio.wait([ending], timeout=self.rng.random() * LONGEST_TO_KILL_S)
            if killed := process.returncode is None:
                process.send_signal(self.rng.choice([signal.SIGKILL, signal.SIGINT]))  # who is told to, keeps what came
        _, said = await ending
        if killed and process.returncode:
            self.counts["receive, killed"] += 1
            status, said = await asyncio.to_thread(self._go_on, stream, options)
        else:
            status = process.returncode or 0
        self.history.append(f"receive {stream.name} as {there}: {status} {said.decode().strip()[-200:]}")
        if status == 0:
            return True
        # It was there already, when the first was killed after its last step.
        if killed and (b"already" in said or b"has what the stream is of" in said):
            return True
        if status != 1 or len(said.decode().strip().splitlines()) != 1:
            raise Wrong(f"receive: status {status}: {said.decode()}")
        self.refusals["backup"] += 1
        return False

    def _go_on(self, stream: Path, options: list[str]) -> tuple[int, bytes]:
        """Receive the rest, which the sender tells by a token; or all of it again, and keep what is there."""
        token = nbdclone("--pool", self.other, "receive", "--token", check=False)
        rest = stream.with_suffix(".rest")
        try:
            if token.returncode == 0 and self.rng.random() < 0.7:
                nbdclone("--pool", self.pool, "send", "--resume", token.stdout.strip(), "-o", rest)
                self.counts["receive, gone on with by a token"] += 1
                words: list[str | Path] = ["receive", rest, *options]
            else:
                words = ["receive", stream, "--resume", *options]
            done = nbdclone("--pool", self.other, *words, check=False)
            return done.returncode, done.stderr.encode()
        finally:
            rest.unlink(missing_ok=True)

    def _names_there(self) -> list[str]:
        found = nbdclone("--pool", self.other, "ls", "--json", check=False)
        return [entry["name"] for entry in json.loads(found.stdout)] if found.returncode == 0 else []

    async def require_backups(self) -> None:
        """The other pool has what was sent, and is sound."""
        if not self.backups:
            return
        name = self.rng.choice(sorted(self.backups))
        done = await asyncio.to_thread(nbdclone_bytes, self.other, name)
        now = b"".join(done[offset : offset + length].ljust(length, b"\0") for offset, length in WINDOWS)
        self.require_same(f"backup {name}", now, self.backups[name])
        self.counts["backups compared"] += 1
        said = await asyncio.to_thread(nbdclone, "--pool", self.other, "check", check=False)
        if said.returncode or not said.stdout.endswith("all is well\n"):
            raise Wrong(f"check of the backups: {said.stdout}{said.stderr}")

    # Ephemeral clones

    async def ask_for_one(self) -> None:
        """A client asks for one of a base, writes to it, reads that, and goes."""
        assert self._server is not None
        base = self.a_base()
        before = set(self.listed())
        wanted = bytearray(self.fixed[base])
        try:
            async with await Client.connect(self._server.uri(f"{base}+")) as client:
                made = {n for n, e in self.listed().items() if e["kind"] == "clone" and e["ephemeral"]} - before
                for _ in range(10):
                    sector = self.rng.randrange(SECTORS)
                    if on_disk(sector) + SECTOR <= client.size:
                        data = self.rng.randbytes(SECTOR)
                        await client.pwrite(data, on_disk(sector))
                        wanted[sector * SECTOR : (sector + 1) * SECTOR] = data
                await client.flush()
        except (NBDCloneError, OSError) as error:
            raise Wrong(f"an ephemeral clone of {base}: {error}") from error
        if len(made) != 1:
            raise Wrong(f"a client asked for {base}+, and there came {made}")
        self.ephemeral[made.pop()] = bytes(wanted)
        self.counts["ephemeral clones"] += 1

    def plan_keep(self) -> Plan:
        if not self.ephemeral or len(self.clones) >= MOST_CLONES:
            return None
        name = self.rng.choice(sorted(self.ephemeral))

        async def expect(done: bool) -> None:
            entry: dict[str, Any] | None = (await asyncio.to_thread(self.listed)).get(name)
            if done and entry is None:
                raise Wrong(f"{name} was kept, and is gone")
            if entry is not None and not entry["ephemeral"]:
                content = self.ephemeral.pop(name)
                origin = self.fixed.get(entry["base"], content)
                self.clones[name] = CloneModel(content, origin, entry["size"])
                self.require_same(name, await self.read_anyhow(name), content)

        return ["keep", name], expect

    def require_ephemeral(self, found: dict[str, dict[str, Any]]) -> None:
        """Those that are there are not told of as clones; those that went are forgotten."""
        there = [name for name, entry in found.items() if entry["kind"] == "clone" and entry["ephemeral"]]
        for name in there:
            if (error := found.pop(name)["error"]) or name not in self.ephemeral:
                raise Wrong(f"{name}, ephemeral: {error or 'nobody asked for it'}")
        for name in set(self.ephemeral) - set(there):
            del self.ephemeral[name]


def nbdclone_bytes(pool: Path, name: str) -> bytes:
    """What an entry reads."""
    done = subprocess.run(
        [*COMMAND, "--pool", str(pool), "export", name, "-"], env=ENVIRONMENT, check=True, capture_output=True
    )
    return done.stdout
