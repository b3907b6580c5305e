"""Runs in a guest: pools on NFS, used by what seem to be two machines, and by the one that exports them.

    nfs_locks.py EXPORTED VERSION MACHINE OTHER [VERSION MACHINE OTHER]... [--refused DIRECTORY]...

EXPORTED is the directory that the NFS server exports, MACHINE and OTHER are two mounts of it by that version of NFS.
What happens is written to stderr, a line each.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from nbdclone.errors import NBDCloneError
from nbdclone.store.layer import BLOCK_SIZE
from nbdclone.store.pool import Pool

CONTENT = os.urandom(BLOCK_SIZE)


def tell(what: str, said: object) -> None:
    print(f"{what}: {said}", file=sys.stderr, flush=True)


def attempt(what: str, work: Callable[[], object]) -> None:
    """Do it, and tell what came of it."""
    try:
        tell(what, work() or "done")
    except (NBDCloneError, OSError) as error:
        tell(what, f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def elsewhere(work: contextlib.AbstractContextManager[object]) -> Iterator[int]:
    """Another process is within this, until it is killed at the end of the block."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with work:
                os.write(theirs, b".")
                signal.pause()
        finally:
            os._exit(1)
    os.close(theirs)
    assert os.read(ours, 1) == b"."
    os.close(ours)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextlib.contextmanager
def writing(pool: Pool, name: str) -> Iterator[None]:
    with pool.open_clone(name) as clone:
        clone.pwrite(CONTENT, 0)  # and no flush
        yield


@contextlib.contextmanager
def reading(pool: Pool, name: str) -> Iterator[None]:
    with pool.open_clone(name):
        yield


def open_and_close(pool: Pool, name: str) -> None:
    pool.open_clone(name).close()


def serve(pool: Pool) -> None:
    with pool.served():
        pass


def read(pool: Pool, name: str) -> str:
    with pool.open_clone(name) as clone:
        found = clone.pread(BLOCK_SIZE, 0)
        return "as written" if found == CONTENT else "zeros" if not any(found) else "as the base"


def trim(pool: Pool, name: str) -> None:
    with pool.open_clone(name) as clone:
        clone.zero(0, clone.size)


def story(version: str, exported: Path, machine: Path, other: Path) -> None:
    name = f"pool-{version}"
    here = Pool.open(machine / name, create=True)
    there, beside = Pool.open(other / name), Pool.open(exported / name)
    (machine / "image").write_bytes(b"base" * BLOCK_SIZE)
    here.import_base(machine / "image", "base")
    here.create_clones("base", ["web1", "web2", "web3"])
    with elsewhere(writing(here, "web1")) as holder:
        attempt(f"{version} here", lambda: without_number(holder, lambda: open_and_close(here, "web1")))
        attempt(f"{version} there", lambda: open_and_close(there, "web1"))
        attempt(f"{version} beside the server", lambda: open_and_close(beside, "web1"))
        attempt(f"{version} rm there", lambda: there.remove(["web1"]))
        attempt(f"{version} rm beside the server", lambda: beside.remove(["web1"]))
        attempt(f"{version} another clone there", lambda: open_and_close(there, "web2"))
    attempt(f"{version} after a kill, here", lambda: read(here, "web1"))
    attempt(f"{version} then there", lambda: read(there, "web1"))
    with elsewhere(writing(beside, "web3")):
        attempt(f"{version} held beside the server", lambda: open_and_close(here, "web3"))
    attempt(f"{version} released beside the server", lambda: open_and_close(here, "web3"))
    with elsewhere(here.served()):
        attempt(f"{version} second server", lambda: serve(there))
        attempt(f"{version} third server", lambda: serve(beside))
    attempt(f"{version} next server", lambda: serve(there))
    with here.places.staging() as staging:
        there.create_clones("base", ["web4"])
        beside.create_clones("base", ["web5"])
        tell(f"{version} draft of the living", "there" if staging.exists() else "gone")
    with elsewhere(here.places.staging()):
        tell(f"{version} drafts", len(os.listdir(there.path / ".tmp")))
    there.create_clones("base", ["web6"])
    tell(f"{version} drafts after a kill", len(os.listdir(there.path / ".tmp")))
    attempt(f"{version} trim", lambda: trim(there, "web2"))
    attempt(f"{version} trimmed", lambda: read(here, "web2"))
    with elsewhere(reading(here, "base")):
        attempt(f"{version} read there too", lambda: open_and_close(there, "base"))
        attempt(f"{version} rm base there", lambda: there.remove(there.names()))
        attempt(f"{version} rm base beside the server", lambda: beside.remove(beside.names()))
    attempt(f"{version} rm", lambda: there.remove(there.names()))
    tell(f"{version} left", sorted(os.listdir(here.path / ".tmp")) + here.names())


def without_number(holder: int, work: Callable[[], None]) -> None:
    """Do it; a message has a word for the number of the holder, which differs each time."""
    try:
        work()
    except NBDCloneError as error:
        raise type(error)(str(error).replace(str(holder), "HOLDER")) from None


def main(exported: str, *words: str) -> None:
    left = list(words)
    while left:
        if left[0] == "--refused":
            attempt(f"refused {left[1]}", lambda: Pool.open(left[1], create=True))
            tell(f"made in {Path(left[1]).parent}", sorted(os.listdir(Path(left[1]).parent)))
            del left[:2]
        else:
            story(left[0], Path(exported), Path(left[1]), Path(left[2]))
            del left[:3]


if __name__ == "__main__":
    main(*sys.argv[1:])
