"""Locks: one writer of a file, on this machine and, where the file system is shared, on all of them.

Two advisory locks are taken on an open file, and both go when it is closed or its process dies:

- ``flock`` on the whole of it: /proc/locks tells who has it. Linux's NFS client takes it on the NFS server (as a record
  lock), so it keeps other machines away too, unless the mount says that locks are local: see :func:`require_locks`.
- a record lock on one byte. Who works beside an NFS server, in the directory that it exports, sees no flock of the
  clients: the server holds record locks for them.

A descriptor that a fork took along keeps both, for so long could that process write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import signal
import stat
import struct
import time
from pathlib import Path
from typing import NamedTuple

from nbdclone.errors import StorageError, UsageError

# Far from any data, and from the bytes with which qemu says what it does to an image.
_BYTE = 1 << 62
# The bytes behind it say which looks at a layer are still in use (see sealed.py).
_LOOKS = _BYTE + 1
# struct flock: type, whence, start, length, process.
_RECORD = struct.Struct("@hhqqi4x")
_CONFLICT = frozenset((errno.EAGAIN, errno.EACCES))
# The file system, or its server, gives no locks (NFS 3 without rpc.statd, Lustre without -o flock).
_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP))

# How long a lock is waited for that a killed process still holds: its threads end with their last sync.
DYING_S = 10.0
# And one that nobody has when it is looked who does: it was let go of meanwhile, or another machine has it.
LET_GO_S = 0.1
RETRY_S = 0.005

_NFS = frozenset(("nfs", "nfs4"))
_CLUSTER = frozenset(("ceph", "gfs2", "glusterfs", "gpfs", "lustre", "ocfs2"))
# What other machines may have mounted too, and of which the mount does not say whether it passes locks on: 9p and
# virtiofs leave it to the host's settings, SMB to the server's, FUSE to each program.
_UNKNOWN = frozenset(("9p", "afs", "cifs", "prl_fs", "smb3", "vboxsf", "virtiofs", "vmhgfs"))
# What a mount says if its locks keep nobody away but this machine's own processes.
_LOCAL = frozenset(("nolock", "local_lock=flock", "local_lock=all", "localflock", "localflocks", "nobrl"))


# How many threads serve NFS here.
_NFS_THREADS = Path("/proc/fs/nfsd/threads")


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo (man 5 proc)."""

    point: str
    kind: str
    options: frozenset[str]

    @property
    def is_shared(self) -> bool:
        """May other machines have it mounted too?"""
        return self.kind in _NFS | _CLUSTER | _UNKNOWN or self.kind.startswith("fuse.")

    @property
    def keeps_locks_local(self) -> str | None:
        """The option that says so."""
        return min(self.options & _LOCAL, key=len, default=None) if self.is_shared else None

    @property
    def locks_are_unknown(self) -> bool:
        """Does nothing here say whether its locks hold on other machines?"""
        return self.is_shared and self.kind not in _NFS | _CLUSTER


def take(fd: int, *, shared: bool = False, wait: bool = False) -> None:
    """Take both locks. Raises BlockingIOError if somebody else has one and ``wait`` is not set, OSError."""
    remote = _take_whole(fd, shared, 0 if wait else fcntl.LOCK_NB)
    writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    try:
        kind = fcntl.F_WRLCK if writable and not shared else fcntl.F_RDLCK
        fcntl.fcntl(fd, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, _RECORD.pack(kind, 0, _BYTE, 1, 0))
        if not shared and not writable:
            _require_no_reader(fd, remote)
    except OSError as error:
        if error.errno in _CONFLICT:
            fcntl.flock(fd, fcntl.LOCK_UN)  # or it would look as if we were the ones who have it
            raise BlockingIOError(errno.EAGAIN, "another machine has it") from None
        if error.errno not in _NO_LOCKS | {errno.EINVAL}:  # the flock is there
            raise


def _take_whole(fd: int, shared: bool, flags: int) -> bool:
    """The flock. Was it shared where an exclusive one was asked for?"""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | flags)
    except OSError as error:
        if shared or error.errno != errno.EBADF:
            raise
        # NFS 4 gives an exclusive one only on what is open for writing, and an image never is. With a shared one no
        # writer comes; readers are looked for.
        fcntl.flock(fd, fcntl.LOCK_SH | flags)
        return True
    return False


def _require_no_reader(fd: int, remote: bool) -> None:
    """Raises BlockingIOError if anybody else has so much as a shared lock: of two who ask, both are refused."""
    if remote or _is_delegated(fd):
        # A client of an NFS 4 server that was told to keep the file to itself does not tell the server of its locks.
        # A change of the file's attributes calls that back, and waits until the client has told. (It costs the base a
        # look at its content when it is opened the next time.)
        os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode))
    found = _RECORD.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _RECORD.pack(fcntl.F_WRLCK, 0, _BYTE, 1, 0)))
    if found[0] != fcntl.F_UNLCK:
        raise BlockingIOError(errno.EAGAIN, "another machine has it")


def is_alone(fd: int) -> bool:
    """Has nobody else so much as a shared lock? A lock of our own stays as it is.

    False wherever other machines may have the file too: what they have read of others stays in their caches.
    """
    with contextlib.suppress(OSError):
        _require_no_reader(fd, remote=False)
        return is_of_this_machine(fd)
    return False


def is_of_this_machine(fd: int) -> bool:
    """Can no other machine have the file open, as far as can be told?"""
    mount = mount_of(os.fstat(fd).st_dev)
    return not (mount is not None and mount.is_shared) and not _serves_nfs()


def lock_look(fd: int, number: int) -> None:
    """Say that a look is in use. Where there are no such locks nothing depends on them. Raises OSError."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _RECORD.pack(fcntl.F_RDLCK, 0, _LOOKS + number, 1, 0))
    except OSError as error:
        if error.errno not in _NO_LOCKS | {errno.EINVAL}:
            raise


def unlock_look(fd: int, number: int) -> None:
    """Say that it is not any more."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _RECORD.pack(fcntl.F_UNLCK, 0, _LOOKS + number, 1, 0))


def nobody_looked(fd: int, number: int) -> bool:
    """Is no look before that one in use through another descriptor? False where that cannot be told."""
    with contextlib.suppress(OSError):
        asked = _RECORD.pack(fcntl.F_WRLCK, 0, _LOOKS, number, 0)
        found = _RECORD.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
        return found[0] == fcntl.F_UNLCK and is_of_this_machine(fd)
    return False


def _serves_nfs() -> bool:
    with contextlib.suppress(OSError, ValueError):
        return int(_NFS_THREADS.read_text(encoding="ascii")) > 0
    return False


def _is_delegated(fd: int) -> bool:
    """Was a client of the NFS server here told that it need not ask about this file?"""
    status = os.fstat(fd)
    return (status.st_dev, status.st_ino) in _lock_table(("DELEG", "LEASE"))


def take_after_the_dying(fd: int, *, shared: bool = False) -> None:
    """Take both locks, as ``take`` does; from a process that was killed, once its last system call has ended.

    Raises BlockingIOError, whose text says in words who has it, OSError.
    """
    began, ended = time.monotonic(), None
    while True:
        try:
            return take(fd, shared=shared)
        except BlockingIOError:
            status = os.fstat(fd)
            pid = holders().get((status.st_dev, status.st_ino))
            patience = 0.0
            if pid is not None and not _is_dying(pid):
                words = describe_process(pid)
            elif (ended := pid or ended) is not None:  # and from which another may have it, that goes on for a while
                patience, words = DYING_S, f"process {ended}, which is ending"
            else:
                patience, words = LET_GO_S, _holder_unseen(fd)
            if time.monotonic() - began >= patience:
                raise BlockingIOError(errno.EAGAIN, words) from None
        time.sleep(RETRY_S)


def _is_dying(pid: int) -> bool:
    """Was that process killed, or is it half gone: one thread has ended, and another still waits for the disk?"""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            said = dict(line.split(":", 1) for line in file)
    except OSError:
        return pid > 0  # gone since
    pending = int(said["SigPnd"], 16) | int(said["ShdPnd"], 16)
    return said["State"].split()[0] in "ZX" or bool(pending >> signal.SIGKILL - 1 & 1)


def _holder_unseen(fd: int) -> str:
    """Who has the lock on this file, in words, if no process that /proc/locks tells of has it."""
    status = os.fstat(fd)
    mount = mount_of(status.st_dev)
    if mount is not None and mount.is_shared:
        return "a process on another machine, or in another container"
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return "a process on another machine, over NFS"  # nobody here has it, and the record lock was refused
    return "a process in another container"  # /proc/locks does not tell of those that are not seen from here


def holders() -> dict[tuple[int, int], int]:
    """Who holds a flock on which file: (device, inode) to process id."""
    return _lock_table(("FLOCK",))


def _lock_table(kinds: tuple[str, ...]) -> dict[tuple[int, int], int]:
    """What /proc/locks says of these kinds of locks (man 5 proc): (device, inode) to process id."""
    found: dict[tuple[int, int], int] = {}
    with contextlib.suppress(OSError), open("/proc/locks", encoding="ascii") as table:
        for line in table:
            fields = line.split()  # "1: FLOCK ADVISORY WRITE 4711 fe:00:131 0 EOF"; "->" marks one that waits
            if "->" not in fields and fields[1] in kinds and fields[5].count(":") == 2:  # not "<none>:0"
                major, minor, inode = fields[5].split(":")
                found[os.makedev(int(major, 16), int(minor, 16)), int(inode)] = int(fields[4])
    return found


def describe_process(pid: int) -> str:
    """A process in words, for a message: its number and its command line."""
    if pid <= 0:  # a process of another namespace: the kernel does not say which
        return "a process in another container"
    if pid == os.getpid():
        return f"this process ({pid})"
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = " ".join(file.read().replace(b"\0", b" ").decode(errors="replace").split())
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({words[:100]})" if words else f"process {pid}"


def mount_of(device: int, table: Path = Path("/proc/self/mountinfo")) -> Mount | None:
    """The mount of that device (``st_dev``); None if none says so: btrfs has devices of its own, and is not shared."""
    with contextlib.suppress(OSError), open(table, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            # "36 35 0:52 / /srv rw,relatime shared:1 - nfs4 server:/ rw,vers=4.2,local_lock=none"
            fields, _, described = line.partition(" - ")
            number, point, here = fields.split()[2], fields.split()[4], fields.split()[5]
            if number == f"{os.major(device)}:{os.minor(device)}":
                kind, *_, options = described.split()
                path = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), point)
                return Mount(path, kind, frozenset([*here.split(","), *options.split(",")]))
    return None


def require_locks(path: Path) -> None:
    """Raises UsageError if two machines could write what is below ``path`` at once, and neither would be told."""
    mount = mount_of(os.stat(path).st_dev)
    if mount is not None and (option := mount.keeps_locks_local):
        raise UsageError(
            f"{path} is on {mount.point} ({mount.kind}), mounted with {option}: its locks would not keep other "
            f"machines away; mount it without, or put the pool on another file system"
        )


def no_locks(error: OSError, path: str | Path) -> StorageError | None:
    """What to say if a lock failed because the file system gives none."""
    if error.errno not in _NO_LOCKS:
        return None
    reason = os.strerror(error.errno or 0)
    return StorageError(f"{path}: its file system gives no locks ({reason}); for NFS 3, rpc.statd has to run")


def is_locked_directory(path: Path, lock_file: str) -> bool:
    """Is this directory being made or removed by somebody who lives? ``lock_file``: what its maker has locked in it."""
    for name, flags in ((".", os.O_DIRECTORY | os.O_RDONLY), (lock_file, os.O_RDWR | os.O_NONBLOCK)):
        try:
            fd = os.open(path / name, flags | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            if name == ".":
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                take(fd)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
    return False
