"""Several processes, one server: with the clients that people use."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from integration.packages import program
from integration.served import Served, make_pool, nbdclone, served, sha256_of_file
from nbdclone.client import Client

pytestmark = [pytest.mark.timeout(240), pytest.mark.alone]

MIB = 1 << 20
SIZE = 64 * MIB
EIGHT = [f"web{number}" for number in range(1, 9)]
ROUNDS = 4
PAUSE_S = 2.5  # between two kills: for the third in two seconds, the next worker would come later
SECTOR = 512
PATIENCE_S = 20.0


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    path.write_bytes(random.Random("workers").randbytes(SIZE))
    return path


def holders(pool: Path) -> dict[str, int]:
    """The process that has each clone open, as `ls` tells it."""
    found = {}
    for entry in json.loads(nbdclone("--pool", pool, "ls", "--json").stdout):
        if holder := re.match(r"process (\d+) \(.*nbdclone\.server", entry.get("in_use_by") or ""):
            found[entry["name"]] = int(holder[1])
    return found


def worker_of(pool: Path, clone: str) -> int:
    """The process that has the clone, as soon as there is one."""
    deadline = time.monotonic() + PATIENCE_S
    while (pid := holders(pool).get(clone)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return pid


def fio(uri: str, seconds: int) -> subprocess.Popen[bytes]:
    """Random writes that are read back and compared."""
    command = [
        program("fio"), "--name=load", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=8",
        f"--size={SIZE}", "--time_based", f"--runtime={seconds}", "--verify=crc32c", "--verify_backlog=256",
        "--verify_fatal=1", "--verify_state_save=0", "--fsync=64",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def test_eight_clients_of_eight_clones_keep_both_workers_busy(tmp_path: Path, image: Path) -> None:
    pool = make_pool(tmp_path / "pool", image, *EIGHT)
    with served(pool, "--workers", "2") as server:
        running = [fio(server.uri(name), 3) for name in EIGHT]
        time.sleep(2)
        found = Counter(holders(pool).values())
        assert sorted(found) == sorted(server.workers)
        assert list(found.values()) == [4, 4]
        for process in running:
            said, _ = process.communicate(timeout=120)
            assert process.returncode == 0, said.decode()


def test_a_worker_that_is_killed_takes_its_clones_alone_and_nothing_that_was_flushed(
    tmp_path: Path, image: Path
) -> None:
    """One of two is killed again and again: the client of the other notices nothing, its own comes again."""
    pool = make_pool(tmp_path / "pool", image, "one", "two")
    done: Counter[str] = Counter()
    stop = asyncio.Event()

    async def write(server: Served) -> None:
        """Write, connecting again as often as it takes; whatever was acknowledged has to be there."""
        rng = random.Random(5)
        latest: dict[int, set[bytes]] = {}
        while not stop.is_set():
            try:
                async with await Client.connect(server.uri("one")) as client:
                    for sector, possible in latest.items():
                        data = await client.pread(SECTOR, sector * SECTOR)
                        assert data in possible, sector
                        latest[sector] = {data}
                    while not stop.is_set():
                        sector = rng.randrange(2000)
                        new = rng.randbytes(16) * (SECTOR // 16)
                        latest.setdefault(sector, set()).add(new)
                        await client.pwrite(new, sector * SECTOR)
                        latest[sector] = {new}
                        done["writes"] += 1
                        if rng.random() < 0.02:
                            await client.flush()
            except OSError:
                done["lost"] += 1
                await asyncio.sleep(0.01)

    async def kill(server: Served) -> None:
        for _ in range(ROUNDS):
            await asyncio.sleep(PAUSE_S)
            victim = await asyncio.to_thread(worker_of, pool, "one")
            os.kill(victim, signal.SIGKILL)
            done["kills"] += 1
        await asyncio.sleep(PAUSE_S)  # it comes again the last time as well
        stop.set()

    async def both(server: Served) -> None:
        await asyncio.gather(write(server), kill(server))

    with served(pool, "--workers", "2") as server:
        client = fio(server.uri("two"), 20)
        its_worker = worker_of(pool, "two")
        asyncio.run(both(server))
        assert holders(pool)["two"] == its_worker
        assert client.poll() is None, "it was at work all the time"
        os.killpg(client.pid, signal.SIGINT)  # fio ends as if its time was up
        said, _ = client.communicate(timeout=60)
        assert b"err= 0" in said, said.decode()
        assert server.stderr.read_text().count("was ended by SIGKILL; it had 'one'") == ROUNDS
    assert done["kills"] == ROUNDS
    assert done["lost"] >= ROUNDS
    assert done["writes"] > 100


@pytest.mark.parametrize("tls", [False, True])
def test_all_connections_of_nbdcopy_come_to_one_worker(tmp_path: Path, image: Path, tls: bool) -> None:
    pool = make_pool(tmp_path / "pool", image, "one", "two", "three")
    more: tuple[str | Path, ...] = ()
    suffix = ""
    if tls:
        nbdclone("cert", tmp_path / "tls", "--host", "localhost")
        more = ("--tls-certificates", tmp_path / "tls", "--tls", "on")  # fio's URIs cannot name certificates
        suffix = f"&tls-certificates={tmp_path / 'tls'}&tls-hostname=localhost"
    content = tmp_path / "content.raw"
    content.write_bytes(random.Random("content").randbytes(SIZE))
    with served(pool, "--workers", "2", *more) as server:
        # One export in each worker, so that the four connections do not all begin where they belong.
        one = server.uri("one").replace("nbd", "nbds" if tls else "nbd", 1) + suffix
        busy = [fio(server.uri(name), 20) for name in ("two", "three")]
        assert worker_of(pool, "two") != worker_of(pool, "three")
        command = [program("nbdcopy"), "--connections=4", "--flush"]
        subprocess.run([*command, str(content), one], check=True, timeout=100)
        subprocess.run([*command, one, str(tmp_path / "back.raw")], check=True, timeout=100)
        assert sha256_of_file(tmp_path / "back.raw") == sha256_of_file(content)
        for process in busy:
            os.killpg(process.pid, signal.SIGINT)
            said, _ = process.communicate(timeout=60)
            assert b"err= 0" in said, said.decode()
