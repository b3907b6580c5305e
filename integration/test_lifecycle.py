"""Each verb of a clone's life, by the command line, while fio writes to that clone and verifies what it wrote.

Another fio does so with a sibling in the other worker. There is to be no error of either; what is compared afterwards
is the content of whatever the verb made. The latency of the requests beside each verb is told (`pytest -rP`), and
written as lines of JSON to the file that $LIFECYCLE_JSON names.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from integration.fioload import MIB, REGION, Load, fill, require_fio_blocks
from integration.lifecycle import run as run_campaign
from integration.lifecycle import small_steps
from integration.served import COMMAND, ENVIRONMENT, Served, make_pool, nbdclone, served, sha256_of_file
from integration.test_workers import worker_of
from nbdclone.client import Client
from nbdclone.errors import NBDCloneError

pytestmark = [pytest.mark.timeout(240), pytest.mark.alone]

SIZE = 256 * MIB
SNAPSHOTS = 20
# Of these so many are removed again, and their layers merged.
REMOVED = 12
# Before each verb: what the latency is without one.
QUIET_S = 0.6
PATIENCE_S = 60.0
CAMPAIGN_S = 10.0
# Of a layer that is merged, beside fio's region; and after how much of it space comes back.
MERGED = 32 * MIB
STRETCH = 2 * MIB
# The clone's own, where fio does not write: (offset, length).
OWN = ((40 * MIB + 512, 3 * MIB), (130 * MIB, 2 * MIB + 4096), (SIZE - MIB, MIB))


def make_images(directory: Path) -> tuple[Path, Path]:
    """A base with data and holes, and its update: the same but for some MiB, also where the clones have their own."""
    rng = random.Random("lifecycle")
    old, new = directory / "old.raw", directory / "new.raw"
    for path in (old, new):
        rng.seed(path.name == "no such name")
        with open(path, "wb") as file:
            file.truncate(SIZE)
            for offset in range(0, SIZE, 8 * MIB):
                file.seek(offset)
                file.write(rng.randbytes(2 * MIB))
    with open(new, "r+b") as file:
        for offset in (MIB, 41 * MIB, 64 * MIB, 131 * MIB, 200 * MIB):
            file.seek(offset)
            file.write(rng.randbytes(MIB))
    return old, new


def sha256_of_entry(pool: Path, name: str) -> str:
    """What an entry reads, as `nbdclone export NAME -` writes it."""
    command = [*COMMAND, "--pool", str(pool), "export", name, "-"]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        digest = hashlib.sha256()
        while data := process.stdout.read(MIB):
            digest.update(data)
    assert process.returncode == 0
    return digest.hexdigest()


class Story:
    """What is done to the clone `one`, of the base `old`, and what it has to read like."""

    def __init__(self, directory: Path, pool: Path, server: Served, loads: tuple[Load, Load]) -> None:
        self.directory, self.pool, self.server, self.loads = directory, pool, server, loads
        self.windows: dict[str, dict[str, list[tuple[float, float]]]] = {}
        self.digests: dict[str, str] = {}
        self.spare = random.Random(7).randbytes(64)

    def run(self, *args: str | Path) -> str:
        return nbdclone("--pool", self.pool, *args).stdout

    def run_json(self, *args: str | Path) -> Any:
        return json.loads(self.run(*args, "--json"))

    @contextmanager
    def beside(self, verb: str) -> Iterator[None]:
        """The time in which the verb is at work, after some in which nothing is."""
        quiet = time.time()
        time.sleep(QUIET_S)
        began = time.time()
        try:
            yield
            ended = time.time()
            for load in self.loads:
                load.require_running()
        except BaseException as error:
            error.add_note(f"at {verb}")
            raise
        self.windows[verb] = {"without": [(quiet, began)], "with": [(began, ended)]}

    def remember(self, name: str, same_as: str | None = None) -> None:
        """What this reads now, it has to read in the end; and what ``same_as`` reads."""
        found = sha256_of_entry(self.pool, name)
        assert same_as is None or found == self.digests[same_as], name
        self.digests[name] = found

    def unnamed_layers(self) -> list[str]:
        return [entry["name"] for entry in _flat(self.run_json("tree", "--all")) if "@" not in entry["name"]]

    # The verbs

    def snapshot(self) -> None:
        with self.beside(f"snapshot, {SNAPSHOTS} in a row"):
            for number in range(SNAPSHOTS):
                self.run("snapshot", f"one@s{number}")
        for name in ("one@s3", f"one@s{SNAPSHOTS - 1}"):
            self.remember(name)

    def nothing(self) -> None:
        """What a command costs that asks for nothing: Python is started, beside two servers and two clients."""
        with self.beside("ls, for comparison"):
            self.run("ls")

    def du(self) -> None:
        with self.beside("du"):
            found = self.run_json("du")
        entries = {entry["name"]: entry for entry in found["entries"]}
        assert {"old", "new", "one", "two", "one@s3"} <= entries.keys()
        assert not any(entry["error"] for entry in entries.values())
        assert entries["one@s3"]["size"] == SIZE

    def diff(self) -> None:
        last = f"one@s{SNAPSHOTS - 1}"
        with self.beside("diff"):
            extents = self.run_json("diff", "one@s3", last)["extents"]
        images = [self.directory / "a.raw", self.directory / "b.raw"]
        for name, image in zip(("one@s3", last), images, strict=True):
            self.run("export", name, image)
            require_fio_blocks(image)
        with open(images[1], "rb") as after, open(images[0], "r+b") as before:
            for extent in extents:
                after.seek(extent["offset"])
                before.seek(extent["offset"])
                before.write(after.read(extent["length"]))
        assert sum(extent["length"] for extent in extents) < 2 * REGION
        assert sha256_of_file(images[0]) == self.digests[last]

    def clone(self) -> None:
        with self.beside("clone of a snapshot"):
            self.run("clone", "one@s3", "four")
        self.remember("four", "one@s3")

    def export(self) -> None:
        image = self.directory / "exported.qcow2"
        with self.beside("export of a snapshot"):
            self.run("export", "one@s3", image)
        raw = self.directory / "exported.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", image, raw], check=True, timeout=60)
        assert sha256_of_file(raw) == self.digests["one@s3"]

    def promote(self) -> None:
        with self.beside("promote"):
            self.run("promote", "one", "golden")
        image = self.directory / "golden.raw"
        self.run("export", "golden", image)
        require_fio_blocks(image)
        require_own(image, self.directory / "old.raw", 0)
        self.remember("golden")

    def send(self) -> None:
        other = self.directory / "other"
        with self.beside("send | receive"):
            command = [*COMMAND, "--pool", str(self.pool), "send", "--with-base", "one@s3"]
            with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as sending:
                receiving = [*COMMAND, "--pool", str(other), "receive"]
                subprocess.run(receiving, env=ENVIRONMENT, stdin=sending.stdout, check=True, timeout=100)
            assert sending.returncode == 0
        assert sha256_of_entry(other, "one@s3") == self.digests["one@s3"]

    def rm(self) -> None:
        going = [f"one@s{number}" for number in range(4, 4 + REMOVED)]
        before = len(os.listdir(self.pool / "layers"))
        with self.beside(f"rm of {REMOVED} snapshots, and their merging"):
            self.run("rm", *going)
            deadline = time.monotonic() + PATIENCE_S
            while len(os.listdir(self.pool / "layers")) > before - REMOVED:
                assert time.monotonic() < deadline, "the layers are still there"
                time.sleep(0.1)

    def rebase(self) -> None:
        with self.beside("rebase --keep-content"):
            said = self.run("rebase", "one", "four", "two", "--onto", "new", "--keep-content")
        assert "MiB of what they have otherwise than 'new' is in a layer beneath them" in said
        assert {self.run_json("info", name)["base"] for name in ("one", "two", "four")} == {"new"}

    def compact(self) -> None:
        with self.beside("compact --online"):
            self.run("compact", "one", "--online")

    def resize(self) -> None:
        with self.beside("resize"):
            self.run("resize", "one", str(SIZE + 16 * MIB))

    def rollback(self) -> None:
        self.run("snapshot", "three@before")
        self.remember("three@before")
        self.windows |= asyncio.run(self._roll_back())
        self.remember("three", "three@before")

    async def _roll_back(self) -> dict[str, Any]:
        async with await Client.connect(self.server.uri("three")) as client:
            await client.pwrite(self.spare, 4096)
            with self.beside("rollback --disconnect of another"):
                await asyncio.to_thread(self.run, "rollback", "three@before", "--disconnect")
            with pytest.raises(NBDCloneError):
                await client.pread(64, 4096)
        return {}

    def flatten(self) -> None:
        with self.beside("flatten"):
            self.run("flatten", "one")
        assert self.run_json("info", "one")["parent"] is None

    def end(self) -> None:
        """Everything is what it was when it was made; what fio left of both clones is whole."""
        for load in self.loads:
            load.end()
        for name, digest in self.digests.items():
            assert sha256_of_entry(self.pool, name) == digest, name
        for name, larger in (("one", 16 * MIB), ("two", 0)):
            image = self.directory / f"{name}.raw"
            self.run("export", name, image, "--force")
            require_fio_blocks(image)
            require_own(image, self.directory / "old.raw", larger)

    def told(self) -> Iterator[dict[str, Any]]:
        """The latencies, of each verb and each clone."""
        quiet = [span for windows in self.windows.values() for span in windows["without"]]
        for load in self.loads:
            yield {"verb": "none, in all the pauses", "clone": load.name, "without": load.latency(quiet)}
        for verb, windows in self.windows.items():
            for load in self.loads:
                seconds = {f"{how}_s": round(sum(end - begin for begin, end in w), 2) for how, w in windows.items()}
                latency = {how: load.latency(spans) for how, spans in windows.items()}
                yield {"verb": verb, "clone": load.name, **seconds, **latency}


def _flat(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        yield entry
        yield from _flat(entry["children"])


def own_bytes() -> Iterator[tuple[int, bytes]]:
    """What both clones write where fio does not."""
    rng = random.Random("own")
    for offset, length in OWN:
        yield offset, rng.randbytes(length)


async def write_own(uri: str) -> None:
    async with await Client.connect(uri) as client:
        for offset, data in own_bytes():
            for at in range(0, len(data), MIB):
                await client.pwrite(data[at : at + MIB], offset + at)
        await client.flush()


def require_own(image: Path, base: Path, larger: int) -> None:
    """Behind fio's region the image is the base with the clone's own bytes, and zeros behind the base's end."""
    with open(base, "rb") as file:
        file.seek(REGION)
        wanted = bytearray(file.read())
    for offset, data in own_bytes():
        wanted[offset - REGION : offset - REGION + len(data)] = data
    with open(image, "rb") as file:
        file.seek(REGION)
        assert file.read() == wanted + bytes(larger)


STEPS = (
    Story.nothing, Story.snapshot, Story.du, Story.diff, Story.clone, Story.export, Story.promote, Story.send, Story.rm,
    Story.rebase, Story.compact, Story.resize, Story.rollback, Story.flatten, Story.end,
)  # fmt: skip


def test_no_verb_is_noticed_by_clients_that_verify_what_they_wrote(tmp_path: Path) -> None:
    old, new = make_images(tmp_path)
    pool = make_pool(tmp_path / "pool", old, "one", "two", "three", base="old")
    nbdclone("--pool", pool, "import", new, "--name", "new")
    with served(pool, "--workers", "2") as server:
        for name in ("one", "two"):
            asyncio.run(write_own(server.uri(name)))
            fill(server.uri(name))
        with Load(server.uri("one"), tmp_path, "one") as first, Load(server.uri("two"), tmp_path, "two") as second:
            assert worker_of(pool, "one") != worker_of(pool, "two")
            story = Story(tmp_path, pool, server, (first, second))
            for step in STEPS:
                step(story)
    assert nbdclone("--pool", pool, "check", "--deep").stdout == "all is well\n"
    lines = [json.dumps(line) for line in story.told()]
    print(*lines, sep="\n")
    if path := os.environ.get("LIFECYCLE_JSON"):
        Path(path).write_text("\n".join(lines) + "\n")


def taken(layer: Path) -> int:
    """What the layer takes on the disk; nothing, if it is gone."""
    try:
        return layer.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def merged_data() -> list[bytes]:
    """By the MiB."""
    rng = random.Random("merged")
    return [rng.randbytes(MIB) for _ in range(MERGED // MIB)]


async def write_merged(uri: str) -> None:
    async with await Client.connect(uri) as client:
        for number, data in enumerate(merged_data()):
            await client.pwrite(data, REGION + number * MIB)
        await client.flush()


async def watch(uri: str, layer: Path, until: Callable[[int], bool]) -> list[int]:
    """What the layer takes, until that is so: each time that it is another number. Its data is read all the while."""
    deadline, found, data = time.monotonic() + PATIENCE_S, [taken(layer)], merged_data()
    rng = random.Random(1)
    async with await Client.connect(uri) as client:
        while not until(found[-1]):
            assert time.monotonic() < deadline, found
            number = rng.randrange(len(data))
            assert await client.pread(MIB, REGION + number * MIB) == data[number], number
            if (now := taken(layer)) != found[-1]:
                found.append(now)
        for number, each in enumerate(data):
            assert await client.pread(MIB, REGION + number * MIB) == each, number
    return found


@pytest.mark.parametrize("newer", [False, True], ids=["into the clone", "into a newer snapshot"])
def test_the_space_of_a_layer_comes_back_while_it_is_merged_under_writers_and_kills(
    tmp_path: Path, newer: bool
) -> None:
    image = tmp_path / "image.raw"
    with open(image, "wb") as file:
        file.truncate(REGION + MERGED)
    with small_steps(tmp_path / "counted", STRETCH // 8, STRETCH):
        pool = make_pool(tmp_path / "pool", image, "one")
        with served(pool, "--workers", "2") as server:
            uri = server.uri("one")
            asyncio.run(write_merged(uri))
            fill(uri)
            nbdclone("--pool", pool, "snapshot", "one@old")
            (layer,) = pool.glob("layers/*/delta")
            whole = taken(layer)
            assert whole > REGION + MERGED
            read = "one"
            if newer:  # which two clones are over, and both are open
                read = "two"
                nbdclone("--pool", pool, "snapshot", "one@newer")
                nbdclone("--pool", pool, "clone", "one@newer", "two")
            with Load(uri, tmp_path, "one") as load:
                nbdclone("--pool", pool, "rm", "one@old")
                asyncio.run(watch(server.uri(read), layer, lambda now: now < whole - 2 * STRETCH))
                assert layer.with_name("going").exists()
                load.require_running()
                server.kill()
        assert 0 < taken(layer) < whole - 2 * STRETCH
        with served(pool, "--workers", "2") as server:
            uri = server.uri("one")
            with Load(uri, tmp_path, "again") as load:
                found = asyncio.run(watch(server.uri(read), layer, lambda now: not now))
                assert len(found) > 4, "nothing came back before the end"
                assert found == sorted(found, reverse=True)
                load.wait_for_enough()
                load.end()
        exported = tmp_path / "exported.raw"
        nbdclone("--pool", pool, "export", "one", exported)
        require_fio_blocks(exported)
        assert nbdclone("--pool", pool, "check", "--deep").stdout == "all is well\n"


def test_a_short_campaign_of_random_verbs_and_kills_finds_nothing(tmp_path: Path) -> None:
    """`make lifecycle` is a longer one."""
    campaign = asyncio.run(run_campaign(tmp_path, 1, CAMPAIGN_S))
    print(json.dumps({"done": campaign.counts, "refused": campaign.refusals}))
    assert campaign.counts["compared"] >= 5  # one round at the least, however slow the machine
