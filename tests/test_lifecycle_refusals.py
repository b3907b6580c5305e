"""What cannot be done to bases, clones and snapshots is refused in one line, and nothing in the pool is changed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdclone import cli
from nbdclone.control.client import run_verb
from nbdclone.errors import NBDCloneError
from nbdclone.store.check import check_pool
from nbdclone.store.pool import Pool
from nbdclone.store.receiving import Receiving

MIB = 1 << 20
COMMAND = (sys.executable, "-m", "nbdclone")


def digest(directory: Path) -> str:
    """Of all that is below: names, kinds, modes, link counts, contents."""
    found = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found.update(f"{path.relative_to(directory)} {status.st_mode:o} {status.st_nlink}\n".encode())
        if path.is_file():
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool that no test changes, ``pool``, and an empty one, ``other``; streams beside them.

    debian <- web1@one <- web1@two <- web1; web1@one <- web2 <- (web2@early) ; debian <- web3; flat: nothing beneath.
    """
    directory = tmp_path_factory.mktemp("refusals")
    rng = random.Random("refusals")
    pool = Pool.open(directory / "pool", create=True)
    for name, size in (("debian", MIB), ("newer", MIB), ("small", MIB // 2)):
        (directory / name).write_bytes(rng.randbytes(size))
        pool.import_base(directory / name)
    pool.create_clones("debian", ["web1", "web3", "flat"])
    for snapshot in ("one", "two"):
        write(pool, "web1", rng)
        pool.snapshot(f"web1@{snapshot}")
    pool.create_clones("web1@one", ["web2"])
    pool.snapshot("web2@early")
    for name in ("web1", "web2", "web3"):
        write(pool, name, rng)
    run_verb(pool, "flatten", {"name": "flat"})
    Pool.open(directory / "other", create=True).import_base(directory / "newer", "debian")
    for name, args in (("whole", ["web1@two"]), ("increment", ["--from", "one", "web1@two"])):
        command = [*COMMAND, "--pool", str(pool.path), "send", *args, "-o", str(directory / name)]
        subprocess.run(command, check=True, timeout=60)
    stream = (directory / "whole").read_bytes()
    (directory / "cut").write_bytes(stream[: len(stream) // 2])
    changed = bytearray(stream)
    changed[len(stream) // 2] ^= 1
    (directory / "tampered").write_bytes(changed)
    return directory


def write(pool: Pool, name: str, rng: random.Random) -> None:
    with pool.open_clone(name) as clone:
        clone.pwrite(rng.randbytes(50000), rng.randrange(MIB // 2))


@pytest.fixture(scope="module")
def before(place: Path) -> str:
    """The digest of it all, which stays."""
    return digest(place)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def nbdclone(monkeypatch: pytest.MonkeyPatch, pool: Path, *args: str) -> tuple[int, str, str]:
    """The command line in this process: exit status, stdout and stderr."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["nbdclone", "--pool", str(pool), *args])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1 if end.code else 0
    out.flush()
    return status, out.buffer.getvalue().decode(), err.getvalue()  # type: ignore[attr-defined]


# What is typed, and what the line says.
REFUSED = [
    # Names that are not there
    ("snapshot nobody@s", "no .*'nobody'"),
    ("rollback nobody@s", "no .*'nobody'"),
    ("rollback web1@never", "no .*'web1@never'"),
    ("reset nobody", "no .*'nobody'"),
    ("rename nobody other", "no .*'nobody'"),
    ("rename web1@never web1@other", "no .*'web1@never'"),
    ("resize nobody 4M", "no .*'nobody'"),
    ("rm nobody", "no .*'nobody'"),
    ("rm web3 nobody", "no .*'nobody'"),
    ("rm web1@never", "no .*'web1@never'"),
    ("promote nobody golden", "no .*'nobody'"),
    ("promote web1@never golden", "no .*'web1@never'"),
    ("flatten nobody", "no .*'nobody'"),
    ("compact nobody", "no .*'nobody'"),
    ("rebase nobody --onto newer", "no .*'nobody'"),
    ("rebase web3 --onto nobody", "no base 'nobody'"),
    ("clone nobody new", "no .*'nobody'"),
    ("clone web1@never new", "no .*'web1@never'"),
    ("send web1@never -o {out}", "no .*'web1@never'"),
    ("send --from never web1@two -o {out}", "no .*'web1@never'"),
    ("diff web1 nobody", "no .*'nobody'"),
    ("export nobody {out}", "no .*'nobody'"),
    ("du nobody", "no .*'nobody'"),
    ("keep nobody", "no .*'nobody'"),
    # Names that cannot be
    ("snapshot web1", "'web1' is no snapshot: write CLONE@NAME"),
    ("snapshot web1@a/b", "'a/b' cannot be a name"),
    ("snapshot web1@", "'' cannot be a name"),
    ("snapshot web1@one@two", "'one@two' cannot be a name"),
    ("rename web1 ../web1", r"'\.\./web1' cannot be a name"),
    ("rename web1@one web2@one", "'web1@one' is a snapshot of 'web1'"),
    ("rename web1 web1@new", "'web1' is no snapshot"),
    ("promote web1 a@b", "'a@b' cannot be a name"),
    ("clone debian a@b", "'a@b' cannot be a name"),
    # Names that are taken
    ("snapshot web1@one", "'web1@one' already"),
    ("rename web1 web3", "'web3'.* already|already.*'web3'"),
    ("rename web1 debian", "'debian'.* already|already.*'debian'"),
    ("rename web1@one web1@two", "'web1@two'.* already|already.*'web1@two'"),
    ("promote web1 newer", "'newer'.* already|already.*'newer'"),
    ("promote web1 web3", "'web3'.* already|already.*'web3'"),
    ("clone debian web1", "'web1'.* already|already.*'web1'"),
    ("clone web1@one web3 web4", "'web3'.* already|already.*'web3'"),
    ("receive {dir}/whole --name web3", "there is a clone 'web3'"),
    ("export web1 {dir}/debian", "/debian exists: --force replaces it"),
    ("send web1@one -o {dir}/debian", "/debian is there already"),
    # What others need
    ("rm debian", r"'debian' is needed by \d+ clone\(s\): web1, web2, web3"),
    ("rm debian web1 web3", r"'debian' is needed by 1 clone\(s\): web2"),
    ("rm web1", "'web1@one', needed by 1 clone.*: web2"),
    ("rm web1 web1@two", "'web1@one', needed by 1 clone.*: web2"),
    # Cycles, and what a clone cannot stand on
    ("rebase web3 --onto web3", "'web3' is no base"),
    ("rebase web1 --onto web2", "'web2' is no base"),
    ("rebase web1 --onto web1@one", "'web1@one' is no base"),
    ("rebase web1 --onto web2@early", "'web2@early' is no base"),
    ("rebase web3 --onto debian", "on base 'debian' already"),
    ("rebase web3 --onto small", "'small' has 524288 bytes, less than the 1048576"),
    ("rebase web3 --onto small --keep-changes --yes", "'small' has 524288 bytes, less than the 1048576"),
    ("rebase flat --onto newer", "'flat' stands on no base"),
    ("rebase web1@one --onto newer", "'web1@one' is a snapshot"),
    ("rebase debian --onto newer", "'debian' is a base"),
    # Snapshots that depend on each other: web2 stands on one of web1's
    ("rebase web1 --onto newer", "'web1' and 'web2' stand on the same snapshot"),
    ("rebase web2 --onto newer", "'web2' and 'web1' stand on the same snapshot"),
    # Bases and snapshots never change
    ("snapshot debian@s", "'debian' is a base"),
    ("snapshot web1@one@s", "'one@s' cannot be a name"),
    ("rollback debian@s", "'debian' is a base, and never changes"),
    ("reset debian", "'debian' is a base"),
    ("reset web1@one", "'web1@one' cannot be a name"),
    ("reset flat", "'flat' was not made from anything"),
    ("rollback web3@one", "no .*'web3@one'"),
    ("rollback web2@one", "no .*'web2@one'"),
    ("resize debian 4M", "'debian' is a base, and never changes"),
    ("resize web1@one 4M", "'web1@one' is a snapshot, and never changes"),
    ("flatten debian", "'debian' is a base"),
    ("flatten web1@one", "'web1@one' is a snapshot"),
    ("compact debian", "'debian' is a base"),
    ("compact web1@one", "'web1@one' is a snapshot"),
    ("clone web1 new", "'web1' is a clone: clones are made from bases and snapshots"),
    ("promote debian golden", "'debian' is a base already"),
    ("send web1 -o {out}", "'web1' is no snapshot"),
    ("send debian -o {out}", "'debian' is no snapshot"),
    ("send --from two web1@one -o {out}", "'web1@two' is not beneath 'web1@one'"),
    ("send --from web2@early web1@two -o {out}", "'web2@early' is not beneath 'web1@two'"),
    ("keep debian", "'debian' is not ephemeral"),
    ("diff web1 newer", "no layer in common"),
    # Sizes that make no sense
    ("resize web1 0", "a multiple of 512 from 4096 to .* not 0"),
    ("resize web1 5000", "a multiple of 512 from 4096 to .* not 5000"),
    ("resize web1 512K", "would lose its last 524288 bytes.*--force"),
    ("resize web1 1024T", "a multiple of 512 from 4096 to .* not"),
    ("clone debian new --size 512K", "at least its 1048576 bytes"),
    # Streams
    ("receive {dir}/cut --name new", "the stream was cut off"),
    ("receive {dir}/tampered --name new", "the stream was changed"),
    ("receive {dir}/debian --name new", "this is no stream"),
    ("receive {dir}/increment --name web3", "'web3' never stood on 'web1@one'"),
    ("receive {dir}/absent --name new", "/absent: No such file"),
]


@pytest.mark.parametrize(("typed", "said"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_it_is_refused_in_a_line_that_says_why_and_changes_nothing(
    place: Path, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, said: str
) -> None:
    args = typed.format(dir=place, out=tmp_path / "out").split(" ")
    status, out, err = nbdclone(monkeypatch, place / "pool", *args)
    assert (status, out) == (1, ""), err
    line = err.splitlines()[-1] if "--keep-changes" in typed else err.removesuffix("\n")  # that one warns first
    assert re.fullmatch("nbdclone: [^\n]*", line), err
    assert re.search(said, line), err
    assert digest(place) == before
    assert os.listdir(tmp_path) == []


def test_what_is_open_elsewhere_is_refused_to_all_that_would_change_it(
    place: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a program that is no server of this pool; here it is the same process."""
    pool = place / "pool"
    with Pool.open(pool).open_clone("web3"):
        for typed in (
            "snapshot web3@s", "reset web3", "rename web3 other", "resize web3 4M", "resize web3 512K --force",
            "rm web3", "flatten web3", "compact web3", "rebase web3 --onto newer",
            "rebase web3 --onto newer --keep-changes --yes", "promote web3 golden", "rm web1@one web3",
        ):  # fmt: skip
            status, out, err = nbdclone(monkeypatch, pool, *typed.split(" "))
            assert (status, out) == (1, ""), typed
            line = err.splitlines()[-1]
            assert re.fullmatch(rf"nbdclone: .*'web3' is in use by this process \({os.getpid()}\).*", line), (
                typed,
                err,
            )
    assert digest(place) == before


def test_a_stream_cut_or_changed_anywhere_makes_no_clone(place: Path, tmp_path: Path) -> None:
    """Some of the places; all of them, and forged hashes, are in the tests of the store."""
    rng = random.Random("stream")
    whole = (place / "increment").read_bytes()
    pool = make_copy(place, tmp_path)
    before = digest(pool / "bases") + digest(pool / "clones") + digest(pool / "layers")
    for _ in range(12):
        at = rng.randrange(len(whole))
        changed = whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :]
        for stream in (whole[:at], changed):
            file = tmp_path / "stream"
            file.write_bytes(stream)
            with pytest.raises(NBDCloneError):
                receive(pool, file, "new")
            assert digest(pool / "bases") + digest(pool / "clones") + digest(pool / "layers") == before


def make_copy(place: Path, tmp_path: Path) -> Path:
    """Another pool with the same base, clones and snapshots: received, as a copy of the files would not be."""
    pool = tmp_path / "copy"
    Pool.open(pool, create=True).import_base(place / "debian")
    receive(pool, place / "whole", "web1")
    return pool


def receive(pool: Path, stream: Path, name: str) -> None:
    with stream.open("rb") as source:
        receiving = Receiving(Pool.open(pool).places, source, name=name)
        for _ in receiving.run():
            pass


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("snapshot web1@new", "snapshot web1@new", "there is a snapshot 'web1@new' already|in use"),
        ("flatten web1", "flatten web1", "in use"),
        ("flatten web1", "rebase web1 --onto newer", "in use|on no base"),
        ("rebase web1 --onto newer", "rebase web1 --onto newer", "in use|on base 'newer' already"),
        ("rename web1 web4", "rename web1 web5", "no base or clone 'web1'|in use"),
        ("rename web1 web4", "rm web1", "no base or clone 'web1'|in use"),
        ("promote web1@two golden", "promote web1@two golden", "there is a base 'golden'"),
        ("rm web1@one", "rm web1@one", "no snapshot 'web1@one'"),
        ("rollback web1@two", "rm web1@two", "in use|no snapshot 'web1@two'"),
    ],
)
def test_of_two_verbs_at_once_each_is_done_or_refused_and_the_clone_reads_as_it_did(
    place: Path, tmp_path: Path, first: str, second: str, refused: str
) -> None:
    """Two processes without a server. All of them leave what web1 reads as it is."""
    pool = make_copy(place, tmp_path)
    Pool.open(pool).import_base(place / "newer")
    with Pool.open(pool).open_clone("web1") as clone:
        content = clone.pread(clone.size, 0)
    processes = [
        subprocess.Popen(
            [*COMMAND, "--pool", str(pool), *typed.split(" ")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for typed in (first, second)
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    statuses = [process.returncode for process in processes]
    assert 0 in statuses, said
    for status, line in zip(statuses, said, strict=True):
        assert (status, line) == (0, "") or (status == 1 and re.fullmatch("nbdclone: [^\n]*\n", line)), line
        assert status == 0 or re.search(refused, line), line
    assert [finding for finding in check_pool(pool) if finding.level == "wrong"] == []
    left = [info.name for info in Pool.open(pool).entries() if info.kind == "clone"]
    assert len(left) == (0 if "rm web1" in (first, second) and "web4" not in left else 1)
    for name in left:
        with Pool.open(pool).open_clone(name) as clone:
            assert clone.pread(clone.size, 0) == content
