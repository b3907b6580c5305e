"""The pool of a campaign, what its disks have to read like, and the clients that write to them: for lifecycle.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from integration.lifemodel import SECTOR, SECTORS, SIZE, WINDOWS, WRITERS, CloneModel, Wrong, on_disk, place
from integration.served import COMMAND, ENVIRONMENT, Served, make_pool, nbdclone
from nbdclone.client import Client
from nbdclone.errors import NBDCloneError

WRITE_PAUSE_S = 0.002

# Given whether the verb was done, or killed: what is to be there afterwards.
Expect = Callable[[bool], Coroutine[Any, Any, None]]
# The words of a verb, and what it has to give; None: not now.
Plan = tuple[list[str], Expect] | None


class State:
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
            parts = []
            for offset, length in WINDOWS:
                inside = max(min(length, client.size - offset), 0)
                parts.append((await client.pread(inside, offset) if inside else b"").ljust(length, b"\0"))
            return b"".join(parts)

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
                    if on_disk(sector) + count * SECTOR > client.size:
                        await asyncio.sleep(WRITE_PAUSE_S)
                        continue  # it was made smaller
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

    # Choosing, and what comes of it

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
        return b"".join(done.stdout[offset : offset + length].ljust(length, b"\0") for offset, length in WINDOWS)

    def there(self, name: str) -> bool:
        return name in self.listed()
