"""Clones that move between pools: what qemu-io and fio wrote through a server here is what clients read there."""

from __future__ import annotations

import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from integration.packages import program, require
from integration.served import COMMAND, ENVIRONMENT, nbdclone, save_export, served, sha256_of_file

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
SIZE = 136 * MIB  # two segments
DEADLINE_S = 60


def make_image(path: Path) -> Path:
    with open(path, "wb") as file:
        file.truncate(SIZE)
        for offset in (0, 100 * MIB, 130 * MIB):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(2 * MIB))
    return path


def write_as_clients(uri: str, seed: int) -> None:
    """What fio and qemu-io make of a disk: random writes, verified; patterns, zeros and trims."""
    fio = [
        program("fio"), "--name=write", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bsrange=512-64k",
        "--blockalign=512", "--size=8m", f"--offset={122 + seed}m", "--io_size=4m", f"--randseed={seed}",
        "--verify=crc32c", "--verify_state_save=0", "--iodepth=8", "--minimal",
    ]  # fmt: skip
    subprocess.run(fio, check=True, capture_output=True, timeout=DEADLINE_S)
    commands = [
        f"write -P {seed + 1} {seed}M 300k", f"write -z {seed + 3}M 512k", f"discard {100 + seed}M 1M",
        f"write -P {seed + 9} 126M 2M", "flush",
    ]  # fmt: skip
    options = [word for command in commands for word in ("-c", command)]
    subprocess.run(
        [program("qemu-io"), "-f", "raw", "-d", "unmap", uri, *options], check=True, capture_output=True,
        timeout=DEADLINE_S,
    )  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool with a clone that clients wrote to before each of its snapshots: one, two, three."""
    require("fio", "qemu-utils", "libnbd-bin")
    directory = tmp_path_factory.mktemp("here")
    pool = directory / "pool"
    nbdclone("--pool", pool, "import", make_image(directory / "debian.img"))
    nbdclone("--pool", pool, "clone", "debian", "web1")
    for seed, name in enumerate(["one", "two", "three"]):
        with served(pool) as server:
            write_as_clients(server.uri("web1"), seed)
        nbdclone("--pool", pool, "snapshot", f"web1@{name}")
    return pool


@pytest.fixture(scope="module")
def contents(here: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The hash of all that clients read of each export here."""
    return read_by_clients(here, tmp_path_factory.mktemp("contents"))


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A pool with the same image as a base."""
    nbdclone("--pool", tmp_path / "there", "import", make_image(tmp_path / "same.img"))
    return tmp_path / "there"


def read_by_clients(pool: Path, directory: Path) -> dict[str, str]:
    names = [entry["name"] for entry in json.loads(nbdclone("--pool", pool, "ls", "--json").stdout)]
    with served(pool) as server:
        copies = {name: save_export(server.uri(name), directory / name) for name in names if name.startswith("web1")}
    found = {name: sha256_of_file(copy) for name, copy in copies.items()}
    for copy in copies.values():
        copy.unlink()
    return found


def through_a_pipe(
    here: Path, there: Path, send: str, receive: str = "", between: str = "cat"
) -> subprocess.CompletedProcess[str]:
    """nbdclone send ... | between | nbdclone receive ... by a shell."""
    me = shlex.join(COMMAND)
    line = f"{me} --pool {here} send {send} | {between} | {me} --pool {there} receive {receive}"
    return subprocess.run(
        ["sh", "-c", line], env=ENVIRONMENT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


def listed(pool: Path) -> str:
    return nbdclone("--pool", pool, "ls", "--json").stdout


def test_a_chain_arrives_as_clients_wrote_it(here: Path, there: Path, contents: dict[str, str], tmp_path: Path) -> None:
    moved = through_a_pipe(here, there, "web1@three")
    assert moved.returncode == 0, moved.stderr
    assert len(set(contents.values())) == 3
    assert contents["web1"] == contents["web1@three"]
    assert read_by_clients(there, tmp_path) == contents


def test_increments_arrive_one_after_the_other_with_the_base_before_them(
    here: Path, contents: dict[str, str], tmp_path: Path
) -> None:
    there = tmp_path / "new"
    for send in ("--with-base web1@one", "--from one web1@two", "--from two web1@three"):
        moved = through_a_pipe(here, there, send)
        assert moved.returncode == 0, moved.stderr
    assert read_by_clients(there, tmp_path) == contents
    deep = nbdclone("--pool", there, "check", "--deep", "debian", check=False)
    assert deep.returncode == 0, deep.stdout


def test_streams_that_were_cut_or_tampered_with_leave_the_pool_alone(
    here: Path, there: Path, contents: dict[str, str], tmp_path: Path
) -> None:
    before = listed(there)
    flip = f"{sys.executable} -c " + shlex.quote(
        "import sys; data = bytearray(sys.stdin.buffer.read()); data[len(data) // 2] ^= 1;sys.stdout.buffer.write(data)"
    )
    for between, complaint in (
        ("head -c 5000000", "cut off"),
        ("head -c -1", "cut off"),
        (flip, "was changed"),
        ("tail -c +5000", "no stream"),
    ):
        moved = through_a_pipe(here, there, "web1@three", between=between)
        assert moved.returncode == 1
        assert complaint in moved.stderr
        assert "Traceback" not in moved.stderr
        assert listed(there) == before
    assert through_a_pipe(here, there, "web1@three").returncode == 0
    assert read_by_clients(there, tmp_path) == contents


def test_a_stream_that_was_cut_off_goes_on_until_it_is_there(
    here: Path, there: Path, contents: dict[str, str], tmp_path: Path
) -> None:
    cut = through_a_pipe(here, there, "web1@three", between="head -c 6000000")
    assert cut.returncode == 1
    for _ in range(20):
        token = nbdclone("--pool", there, "receive", "--token").stdout.strip()
        moved = through_a_pipe(here, there, f"--resume {token}", between="head -c 6000000")
        if moved.returncode == 0:
            break
    assert moved.returncode == 0, moved.stderr
    assert read_by_clients(there, tmp_path) == contents
    assert not list((there / ".tmp").iterdir())


def test_a_diff_tells_no_less_than_what_clients_see_changed(here: Path, tmp_path: Path) -> None:
    told = json.loads(nbdclone("--pool", here, "diff", "web1@one", "web1@two", "--json").stdout)
    with served(here) as server:
        before = save_export(server.uri("web1@one"), tmp_path / "before")
        after = save_export(server.uri("web1@two"), tmp_path / "after")
    with open(before, "r+b") as old, open(after, "rb") as new:
        for extent in told["extents"]:
            old.seek(extent["offset"])
            new.seek(extent["offset"])
            data = new.read(extent["length"])
            assert extent["kind"] == "data" or not any(data)
            old.write(data)
    assert sha256_of_file(before) == sha256_of_file(after)
    assert told["changed"] < SIZE // 4
