"""What the verbs of a campaign are asked for, and what each has to give: for lifecycle.py."""

from __future__ import annotations

import asyncio

from integration.lifemodel import CloneModel, Wrong
from integration.lifestate import Expect, Plan, State
from integration.served import nbdclone

MOST_CLONES = 6
MOST_SNAPSHOTS = 8
MOST_BASES = 4


class Plans(State):
    """One ``plan_...`` for each verb."""

    def plan_snapshot(self) -> Plan:
        clone = self.a_clone()
        if sum("@" in name for name in self.fixed) >= MOST_SNAPSHOTS:
            return None
        name = f"{clone}@{self.fresh('s')}"
        least = self.clones[clone].acknowledged()

        async def expect(done: bool) -> None:
            if done or await asyncio.to_thread(self.there, name):
                await self.frozen(name, clone, least)

        return ["snapshot", name], expect

    def plan_promote(self) -> Plan:
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

    def plan_clone(self) -> Plan:
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

    def plan_rm(self) -> Plan:
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

    def plan_rollback(self) -> Plan:
        if (snapshot := self.a_snapshot()) is None:
            return None
        return ["rollback", snapshot, "--disconnect"], self._went_back(snapshot.partition("@")[0], [snapshot])

    def plan_reset(self) -> Plan:
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

    def plan_flatten(self) -> Plan:
        return ["flatten", self.a_clone()], self.same

    def plan_compact(self) -> Plan:
        return ["compact", self.a_clone(), "--online"], self.same

    def plan_du(self) -> Plan:
        return ["du"], self.same

    def plan_rebase(self) -> Plan:
        clone = self.a_clone()
        base = self.listed()[clone]["base"]
        alike = [name for name, entry in self.listed().items() if entry["kind"] == "clone" and entry["base"] == base]
        names = alike if self.rng.random() < 0.7 and base else [clone]
        return ["rebase", *names, "--onto", self.a_base()], self.same

    def plan_resize(self) -> Plan:
        clone = self.a_clone()
        size = self.clones[clone].size + self.rng.randint(1, 8) * 4096

        async def expect(done: bool) -> None:
            found = (await asyncio.to_thread(self.listed))[clone]["size"]
            if found not in ((size,) if done else (size, self.clones[clone].size)):
                raise Wrong(f"{clone} has {found} bytes after resize {size}")
            self.clones[clone].size = found

        return ["resize", clone, str(size)], expect

    def plan_rename(self) -> Plan:
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

    def plan_diff(self) -> Plan:
        return ["diff", self.a_base(), self.rng.choice(sorted(self.fixed)), "--content"], self.same

    def plan_send(self) -> Plan:
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
