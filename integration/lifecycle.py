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
from collections.abc import Iterator
from pathlib import Path

from integration.lifefurther import Further
from integration.lifemodel import Wrong
from integration.served import COMMAND, ENVIRONMENT, nbdclone, served

MOST_VERBS = 6  # in a round
WRITTEN_TO = 3  # clones that have clients, in a round
LONGEST_TO_KILL_S = 1.2  # after a command was started; it takes half a second until it has asked the server
VERB_S = 120.0


class Campaign(Further):
    """Rounds of verbs and kills."""

    async def require_all(self) -> None:
        """Every name is there, and reads as it has to; clones' contents are known from here on."""
        found = self.listed()
        self.require_ephemeral(found)
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

    # Verbs

    async def verb(self, kill: str | None) -> None:
        """A verb, to its end; or ``kill`` the "server" or the "command" while it is at work."""
        names = [
            "snapshot", "snapshot", "snapshot", "rm", "rm", "clone", "rollback", "reset", "promote", "flatten",
            "rebase", "compact", "resize", "rename", "du", "diff", "send",
            "shrink", "keep_changes", "hoist", "backup", "backup", "backup", "keep",
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
        printed, said = await asyncio.wait_for(ending, VERB_S)
        text = said.decode()
        status = process.returncode
        self.history[-1] += f" -> {status} {text.strip()[-200:]}"
        if "Traceback" in text and not kill:
            raise Wrong(f"{' '.join(args)}: {text}")
        if status == 0:
            self.counts[name] += 1
            self.counts["layers of rebased clones"] += b"in a layer beneath them" in printed
        elif kill:
            self.counts[f"{name}, interrupted"] += 1
        else:
            # Before its one line, rebase --keep-changes warns.
            if status != 1 or len(text.strip().splitlines()) != 1 + (name == "keep_changes"):
                raise Wrong(f"{' '.join(args)}: status {status}: {text}")
            self.refusals[name] += 1
        if status == 0 or kill:
            await expect(status == 0)

    # Rounds

    async def round(self) -> None:
        with served(self.pool, "--workers", "2") as self._server:
            await self.require_all()
            for name in self.rng.sample(sorted(self.clones), min(WRITTEN_TO, len(self.clones))):
                self.connect(name)
            if self.rng.random() < 0.5:
                await self.ask_for_one()
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
        await self.require_backups()
        self.counts["rounds"] += 1


@contextlib.contextmanager
def small_steps(counted: Path, step: int, stretch: int) -> Iterator[None]:
    """Whatever is started meanwhile copies so many bytes at a time when it merges, and gives space back after so many;
    the file has a byte for each time that holes were made in a layer. Rebase makes a layer for a block.
    """
    values: dict[str, dict[str, float]] = {
        "nbdclone.store.copying": {"STEP": step, "SPAN": 4 * step},
        "nbdclone.store.giving_back": {"STRETCH": stretch, "HOLES_AT_ONCE": 2},
        "nbdclone.store.common_layer": {"WORTH": 4 << 10},
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
