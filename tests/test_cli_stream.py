"""send, receive and diff as they are typed: through pipes and files, with one line for everything that goes wrong."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nbdclone.store.pool import Pool

COMMAND = (sys.executable, "-m", "nbdclone")
DEADLINE_S = 60
IMAGE = random.Random("commands").randbytes(1 << 20)


def run(pool: Path, *args: str | Path, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [*COMMAND, "--pool", str(pool), *map(str, args)]
    stdin: dict[str, Any] = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
    return subprocess.run(command, check=False, capture_output=True, timeout=DEADLINE_S, **stdin)


def done(pool: Path, *args: str | Path, data: bytes | None = None) -> bytes:
    """What it printed; it did what it was asked for, and complained of nothing."""
    completed = run(pool, *args, data=data)
    assert (completed.returncode, completed.stderr) == (0, b"")
    return completed.stdout


def refused(pool: Path, *args: str | Path, data: bytes | None = None) -> str:
    """The one line on stderr."""
    completed = run(pool, *args, data=data)
    assert completed.returncode == 1, completed
    assert completed.stdout == b""
    assert re.fullmatch(rb"nbdclone: .*\n", completed.stderr), completed.stderr
    return completed.stderr.decode()


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A pool with a clone that has two snapshots."""
    (tmp_path / "debian.img").write_bytes(IMAGE)
    pool = Pool.open(tmp_path / "here", create=True)
    pool.import_base(tmp_path / "debian.img")
    pool.create_clones("debian", ["web1"])
    for number, name in enumerate(["one", "two"]):
        write(pool, "web1", number * 65536, random.Random(number).randbytes(32768))
        pool.snapshot(f"web1@{name}")
    return pool.path


@pytest.fixture
def there(tmp_path: Path, here: Path) -> Path:
    pool = Pool.open(tmp_path / "there", create=True)
    pool.import_base(tmp_path / "debian.img", "trixie")
    return pool.path


def write(pool: Pool, name: str, offset: int, data: bytes) -> None:
    with pool.open_clone(name) as disk:
        disk.pwrite(data, offset)


def content(pool: Path, name: str) -> bytes:
    with Pool.open(pool).open_clone(name) as disk:
        return disk.pread(disk.size, 0)


def test_send_in_a_pipe_to_receive_moves_a_clone(here: Path, there: Path) -> None:
    sending = subprocess.Popen([*COMMAND, "--pool", here, "send", "web1@two"], stdout=subprocess.PIPE)
    receiving = subprocess.run(
        [*COMMAND, "--pool", there, "receive"],
        stdin=sending.stdout, capture_output=True, timeout=DEADLINE_S, check=True,
    )  # fmt: skip
    assert sending.stdout is not None
    sending.stdout.close()
    assert sending.wait(DEADLINE_S) == 0
    assert receiving.stdout == b"clone 'web1': with 'web1@one', 'web1@two'\n"
    assert content(there, "web1") == content(here, "web1")


def test_a_stream_in_a_file_goes_the_same_way(here: Path, there: Path, tmp_path: Path) -> None:
    path = tmp_path / "web1.stream"
    assert done(here, "send", "web1@one", "-o", path) == b""
    assert "is there already" in refused(here, "send", "web1@two", "-o", path)
    assert done(there, "receive", path, "--name", "web7") == b"clone 'web7': with 'web7@one'\n"
    increment = done(here, "send", "--from", "one", "web1@two")
    made = json.loads(done(there, "receive", "--json", "--name", "web7", data=increment))
    assert made == {"clone": "web7", "added": True, "snapshots": ["two"], "base": None}
    assert content(there, "web7") == content(here, "web1@two")


def test_a_pool_is_made_for_a_stream_with_its_base(here: Path, tmp_path: Path) -> None:
    stream = done(here, "send", "--with-base", "web1@two")
    new = tmp_path / "new"
    assert done(new, "receive", data=stream) == b"base 'debian'\nclone 'web1': with 'web1@one', 'web1@two'\n"
    assert content(new, "web1") == content(here, "web1")


def test_what_is_wrong_is_one_line(here: Path, there: Path, tmp_path: Path) -> None:
    stream = done(here, "send", "web1@two")
    assert "there is no snapshot" in refused(here, "send", "web1@three")
    assert "is no snapshot: write CLONE@NAME" in refused(here, "send", "web1")
    assert "no stream of" in refused(there, "receive", data=b"something else, and long enough")
    assert "cut off" in refused(there, "receive", data=b"")
    assert "was changed" in refused(there, "receive", data=stream[:500] + b"\0" * 5 + stream[505:])
    assert "no stream was cut off here" in refused(there, "receive", "--token")
    assert "no token" in refused(here, "send", "--resume", "nonsense")
    assert str(tmp_path / "none") in refused(there, "receive", tmp_path / "none")
    for wrong in (["send"], ["send", "web1@two", "--resume", "x"], ["send", "--resume", "x", "--with-base"]):
        assert run(here, *wrong).returncode == 2


def test_a_stream_is_not_written_to_a_terminal_nor_read_from_one(here: Path) -> None:
    terminal, other = pty.openpty()
    for verb, what in ((["send", "web1@two"], "not written to a terminal"), (["receive"], "through a pipe")):
        completed = subprocess.run(
            [*COMMAND, "--pool", str(here), *verb],
            stdin=other, stdout=other, stderr=subprocess.PIPE, timeout=DEADLINE_S, check=False,
        )  # fmt: skip
        assert completed.returncode == 1
        assert what in completed.stderr.decode()
    os.close(terminal)
    os.close(other)


def test_a_stream_that_was_cut_off_goes_on_with_the_token(here: Path, there: Path) -> None:
    with Pool.open(here).open_clone("web1") as disk:
        disk.pwrite(random.Random(3).randbytes(IMAGE_PART), 0)
    Pool.open(here).snapshot("web1@large")
    stream = done(here, "send", "web1@large")
    assert "receive --token" in refused(there, "receive", data=stream[:-100])
    told = run(there, "receive", "--token")
    assert re.fullmatch(rb"'web1@large' came to .* go on with: nbdclone send --resume\n", told.stderr)
    token = told.stdout.decode().strip()
    assert [each["token"] for each in json.loads(done(there, "receive", "--token", "--json"))] == [token]
    rest = done(here, "send", "--resume", token)
    assert len(stream) - len(rest) > 60_000  # the other layers are there
    done(there, "receive", data=rest)
    assert content(there, "web1") == content(here, "web1")


IMAGE_PART = 1 << 19


def test_what_is_left_of_a_stream_can_be_forgotten(here: Path, there: Path) -> None:
    stream = done(here, "send", "web1@two")
    refused(there, "receive", data=stream[:-100])
    assert done(there, "receive", "--forget") == b"1 stream(s) that had been cut off: removed\n"
    assert os.listdir(there / ".tmp") == []
    assert "no stream was cut off here" in refused(there, "receive", "--token")


def test_a_receive_that_is_told_to_stop_keeps_what_came(here: Path, there: Path) -> None:
    stream = done(here, "send", "web1@two")
    receiving = subprocess.Popen([*COMMAND, "--pool", str(there), "receive"], stdin=subprocess.PIPE)
    assert receiving.stdin is not None
    receiving.stdin.write(stream[:-50])
    receiving.stdin.flush()
    draft = there / ".tmp"
    while not list(draft.glob("receive-*/layers/*/delta")):
        assert receiving.poll() is None
    time.sleep(0.5)  # until it has taken all that there is
    receiving.send_signal(signal.SIGTERM)
    assert receiving.wait(DEADLINE_S) == 128 + signal.SIGTERM
    receiving.stdin.close()
    assert [each["stream"] for each in json.loads(done(there, "receive", "--token", "--json"))] == ["web1@two"]


def test_diff_prints_extents(here: Path) -> None:
    assert done(here, "diff", "web1@one", "web1@two") == b"65536 32768 data\n"
    assert done(here, "diff", "debian", "web1") == b"0 32768 data\n65536 32768 data\n"
    assert done(here, "diff", "web1@two", "web1", "--content") == b""
    told = json.loads(done(here, "diff", "web1@one", "web1", "--json"))
    assert told == {
        "a": "web1@one", "b": "web1", "size": len(IMAGE), "changed": 32768,
        "extents": [{"offset": 65536, "length": 32768, "kind": "data"}],
    }  # fmt: skip
    assert done(here, "diff", "web1", "web1") == b""
    assert "there is no base or clone 'none'" in refused(here, "diff", "debian", "none")


def test_verbs_that_send_nothing_do_not_wait_for_what_sends() -> None:
    program = "import nbdclone.cli, sys; print({'zstandard', 'nbdclone.store.stream'} & set(sys.modules))"
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert completed.stdout == "set()\n"
