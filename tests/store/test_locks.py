"""Law 7: one writer, and whoever else comes is told who it is. What NFS makes of it: integration/test_nfs.py."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

import nbdclone
from nbdclone.errors import BaseChanged, InUse, StorageError, UsageError
from nbdclone.store import locks
from nbdclone.store.catalog import CloneInfo
from nbdclone.store.fs import FileSystem
from nbdclone.store.locks import Mount, mount_of
from nbdclone.store.pool import Pool


@contextlib.contextmanager
def held_by_another_process(pool: Pool, name: str) -> Iterator[int]:
    """Another process has the clone open; its number."""
    context = multiprocessing.get_context("forkserver")
    opened, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(pool.path, name, opened, done))
    process.start()
    assert opened.wait(30)
    assert process.pid
    try:
        yield process.pid
    finally:
        done.set()
        process.join(30)
        assert process.exitcode == 0


def _hold(path: Path, name: str, opened: Event, done: Event) -> None:
    with Pool.open(path).open_clone(name):
        opened.set()
        done.wait(60)


def test_a_clone_that_is_open_is_not_opened_again_and_the_message_says_by_whom(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1"):
        with pytest.raises(InUse, match=rf"clone 'web1' is in use by this process \({os.getpid()}\)"):
            pool.open_clone("web1")
        assert pool.info("web1").in_use_by == f"this process ({os.getpid()})"  # type: ignore[union-attr]
    assert pool.info("web1").in_use_by is None  # type: ignore[union-attr]
    pool.open_clone("web1").close()


def test_a_clone_that_another_process_has_open_is_refused_and_the_process_named(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    with held_by_another_process(pool, "web1") as pid:
        for attempt in (lambda: pool.open_clone("web1"), lambda: pool.remove(["web1"])):
            with pytest.raises(InUse, match=rf"clone 'web1' is in use by process {pid} \(.*python"):
                attempt()
        info = pool.info("web1")
        assert isinstance(info, CloneInfo)
        assert info.in_use_by
        assert info.in_use_by.startswith(f"process {pid} ")
        with pytest.raises(InUse, match=rf"base 'base' is (in use by process {pid}|needed by)"):
            pool.remove(["base"])
    pool.open_clone("web1").close()


def test_a_base_is_open_in_many_places_at_once_and_then_not_removed(pool: Pool) -> None:
    with held_by_another_process(pool, "base"), pool.open_clone("base"), pytest.raises(InUse, match="base 'base'"):
        pool.remove(["base"])
    pool.remove(["base"])


def test_the_lock_of_a_killed_process_is_gone(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    context = multiprocessing.get_context("forkserver")
    opened, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(pool.path, "web1", opened, done))
    process.start()
    assert opened.wait(30)
    process.kill()
    process.join(30)
    pool.open_clone("web1").close()


# Its first thread ends, and the process is a zombie to whoever looks; another is still in a system call.
HALF_DEAD = """
import ctypes, os, sys, threading, time
from nbdclone.store.pool import Pool
clone = Pool.open(sys.argv[1]).open_clone("web1")
threading.Thread(target=lambda: (time.sleep(0.7), os._exit(0))).start()
print("opened", flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the number of the system call that ends a thread")
def test_a_clone_is_opened_when_the_last_thread_of_a_dead_process_has_let_go_of_it(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    environment = {**os.environ, "PYTHONPATH": str(Path(nbdclone.__file__).parents[1])}
    command = [sys.executable, "-c", HALF_DEAD, str(pool.path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"opened\n"
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            pass
        assert locks.holders()  # and it still has the clone
        pool.open_clone("web1").close()


def test_a_lock_that_was_let_go_of_when_it_was_looked_who_has_it_is_taken(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool.create_clones("base", ["web1"])
    first = pool.open_clone("web1")

    def close_first() -> dict[tuple[int, int], int]:
        first.close()
        return {}

    monkeypatch.setattr(locks, "holders", close_first)
    pool.open_clone("web1").close()


def test_a_pool_is_served_by_one_server(pool: Pool) -> None:
    with pool.served(), pytest.raises(InUse, match=f"in use by this process \\({os.getpid()}\\)"), pool.served():
        pass
    with pool.served():
        pass


def test_a_clone_that_could_not_be_opened_is_not_left_locked(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    image = pool.path / "bases" / "base" / "image"
    image.rename(image.with_name("away"))
    with pytest.raises(BaseChanged):
        pool.open_clone("web1")
    image.with_name("away").rename(image)
    pool.open_clone("web1").close()


def test_a_program_that_was_started_meanwhile_does_not_keep_the_lock(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1"):
        heir = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        pool.open_clone("web1").close()
        pool.remove(["web1", "base"])
    finally:
        heir.kill()
        heir.wait()


# Containers

HOLD = """import sys; from nbdclone.store.pool import Pool
with Pool.open(sys.argv[1]).open_clone('web1'): print('open', flush=True), input()
"""
ASK = """
import sys; from nbdclone.store.pool import Pool
try: Pool.open(sys.argv[1]).open_clone('web1')
except Exception as error: print(error)
"""
CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(nbdclone.__file__).parents[1])}


@pytest.fixture
def container() -> tuple[str, ...]:
    """What a command begins with to run among processes of its own."""
    if not shutil.which("unshare") or subprocess.run([*CONTAINER, "true"], capture_output=True, check=False).returncode:
        pytest.skip("only root can have processes of its own")
    return CONTAINER


def test_in_a_container_a_holder_outside_is_told_to_be_elsewhere(pool: Pool, container: tuple[str, ...]) -> None:
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1"):
        command = [*container, sys.executable, "-c", ASK, str(pool.path)]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=30)
    path = pool.path / "clones" / "web1" / "delta"
    assert done.stdout == f"clone 'web1' is in use by a process in another container ({path})\n"


def test_a_holder_in_a_container_is_named_by_its_number_outside(pool: Pool, container: tuple[str, ...]) -> None:
    pool.create_clones("base", ["web1"])
    command = [*container, sys.executable, "-c", HOLD, str(pool.path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(InUse, match=r"in use by process \d+ \(.*python.* -c import sys") as refused:
            pool.open_clone("web1")
        number = int(str(refused.value).split("process ")[1].split()[0])
        assert Path(f"/proc/{number}/cmdline").exists()
        holder.kill()  # and with it the container
        holder.wait()


# Other machines


@contextlib.contextmanager
def held_by_an_nfs_client(path: Path, kind: int) -> Iterator[None]:
    """What the NFS server holds in the exported directory when one of its clients has taken a flock."""
    with open(path, "rb" if kind == fcntl.F_RDLCK else "r+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, locks._RECORD.pack(kind, 0, 0, 0, 0))
        yield


def test_a_clone_that_a_client_of_the_nfs_server_has_open_is_refused(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    delta = pool.path / "clones" / "web1" / "delta"
    with held_by_an_nfs_client(delta, fcntl.F_WRLCK):
        for attempt in (lambda: pool.open_clone("web1"), lambda: pool.remove(["web1"])):
            with pytest.raises(InUse, match=r"^clone 'web1' is in use by a process on another machine, over NFS \("):
                attempt()
    pool.open_clone("web1").close()


def test_a_base_that_a_client_of_the_nfs_server_reads_is_opened_and_not_removed(pool: Pool) -> None:
    with held_by_an_nfs_client(pool.path / "bases" / "base" / "image", fcntl.F_RDLCK):
        pool.open_clone("base").close()
        with pytest.raises(InUse, match=r"^base 'base' is in use by a process on another machine, over NFS \("):
            pool.remove(["base"])
    pool.remove(["base"])


def test_an_open_waits_for_the_client_that_had_leave_to_keep_the_file_to_itself(pool: Pool) -> None:
    pool.create_clones("base", ["web1"])
    program = """
import fcntl, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
fd = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("mine", flush=True)
if signal.sigtimedwait([signal.SIGIO], 30):
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
"""
    delta = str(pool.path / "clones" / "web1" / "delta")
    with subprocess.Popen([sys.executable, "-c", program, delta], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"mine\n"
        pool.open_clone("web1").close()
        assert client.wait(30) == 0


@pytest.fixture
def on_nfs_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exclusive lock takes a file that is open for writing."""
    flock = fcntl.flock

    def strict(fd: int, how: int) -> None:
        read_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        if how & fcntl.LOCK_EX and read_only and not os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EBADF, "not open for writing")
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", strict)


@pytest.mark.usefixtures("on_nfs_4")
def test_where_only_a_writer_gets_an_exclusive_lock_bases_are_removed_when_nobody_reads_them(pool: Pool) -> None:
    with pool.open_clone("base"), pytest.raises(InUse, match=r"^base 'base' is in use by this process"):
        pool.remove(["base"])
    pool.create_clones("base", ["web1"])
    pool.remove(["web1", "base"])
    assert pool.names() == []


def test_a_file_system_without_locks_is_refused_in_words(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.create_clones("base", ["web1"])

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    attempts: list[Callable[[], object]] = [lambda: pool.open_clone("web1"), lambda: pool.remove(["web1"])]
    for attempt in attempts:
        with pytest.raises(StorageError, match=r"its file system gives no locks \(No locks available\); for NFS"):
            attempt()


def test_a_clone_of_a_base_that_went_meanwhile_is_not_made(pool: Pool) -> None:
    class Elsewhere(FileSystem):
        """Another machine, whose lock is not seen, removes the base while the clone is made."""

        def mkdir(self, path: Path) -> None:  # type: ignore[override]
            os.mkdir(path)
            if path.name == "web1":
                shutil.rmtree(pool.path / "bases" / "base")

    with pytest.raises(UsageError, match="'base' was removed just now"):
        Pool.open(pool.path, fs=Elsewhere()).create_clones("base", ["web1"])
    assert pool.names() == []


TABLE = """\
21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,nolock
22 21 0:40 / /srv/one\\040two rw,relatime shared:2 - nfs4 server:/ rw,vers=4.2,local_lock=none,addr=192.0.2.1
23 21 0:41 / /srv/v3 rw - nfs server:/e rw,vers=3,nolock,local_lock=all,addr=192.0.2.1
24 21 0:42 / /srv/flock rw - nfs server:/e rw,vers=3,local_lock=flock
25 21 0:43 / /srv/posix rw - nfs server:/e rw,vers=3,local_lock=posix
26 21 0:44 / /srv/gfs rw - gfs2 /dev/sdb rw,localflocks
27 21 0:45 / /srv/smb rw - cifs //server/e rw,nobrl
28 21 0:46 / /srv/ssh rw - fuse.sshfs server: rw,user_id=0
29 21 0:47 / /tmp rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("minor", "option", "unknown"),
    [
        (40, None, False),
        (41, "nolock", False),
        (42, "local_lock=flock", False),
        (43, None, False),
        (44, "localflocks", False),
        (45, "nobrl", True),
        (46, None, True),
        (47, None, False),
    ],
)
def test_a_mount_tells_whether_its_locks_are_local(
    tmp_path: Path, minor: int, option: str | None, unknown: bool
) -> None:
    (tmp_path / "mountinfo").write_text(TABLE)
    mount = mount_of(os.makedev(0, minor), tmp_path / "mountinfo")
    assert mount is not None
    assert (mount.keeps_locks_local, mount.locks_are_unknown) == (option, unknown)
    if minor == 40:
        assert mount.point == "/srv/one two"


def test_a_disk_of_this_machine_is_no_shared_mount_and_one_that_is_not_told_of_neither(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(TABLE)
    mount = mount_of(os.makedev(254, 0), tmp_path / "mountinfo")
    assert mount is not None
    assert mount.keeps_locks_local is None
    assert mount_of(os.makedev(0, 99), tmp_path / "mountinfo") is None
    assert mount_of(os.makedev(0, 40), tmp_path / "missing") is None


@pytest.mark.parametrize("create", [False, True])
def test_a_pool_on_a_mount_with_local_locks_is_refused_and_nothing_made(
    tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch, create: bool
) -> None:
    mount = Mount("/srv", "nfs", frozenset(("rw", "nolock", "local_lock=all")))
    monkeypatch.setattr(locks, "mount_of", lambda device: mount)
    path = tmp_path / "deep" / "new" if create else pool.path
    with pytest.raises(UsageError) as refused:
        Pool.open(path, create=create)
    assert str(refused.value) == (
        f"{tmp_path if create else path} is on /srv (nfs), mounted with nolock: its locks would not keep other "
        f"machines away; mount it without, or put the pool on another file system"
    )
    assert not (tmp_path / "deep").exists()


def test_a_server_warns_where_nothing_says_whether_locks_hold(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mount = Mount("/srv", "fuse.sshfs", frozenset(("rw",)))
    monkeypatch.setattr("nbdclone.store.pool.mount_of", lambda device: mount)
    with caplog.at_level(logging.WARNING, "nbdclone"), pool.served():
        assert caplog.messages == [
            f"pool {pool.path} is on /srv (fuse.sshfs): nothing says whether its locks keep other machines away; "
            f"use it from one alone"
        ]
