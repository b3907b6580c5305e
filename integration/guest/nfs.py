"""An NFS server in a guest, and its client: Debian's programs for both, unpacked in the cache. Nothing is installed.

The guest exports a disk of its own and mounts what it exports. With `nosharecache` each mount has a cache, inodes and
locks of its own, so that to the server two of them are like two machines.
"""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

from integration.guest.cache import cached
from integration.guest.initramfs import libraries

# The programs, and of what they need that which a small Debian may not have.
PACKAGES = (
    *("nfs-common", "nfs-kernel-server", "rpcbind"),
    *("libcap2", "libcom-err2", "libgssapi-krb5-2", "libk5crypto3", "libkeyutils1", "libkrb5-3", "libkrb5support0"),
    *("libnsl2", "libtirpc3", "libwrap0"),
)
PROGRAMS = (
    *("sbin/mount.nfs", "sbin/rpc.statd", "sbin/rpcbind"),
    *("usr/sbin/exportfs", "usr/sbin/rpc.mountd", "usr/sbin/rpc.nfsd"),
)
MODULES = ("nfsd", "nfsv3", "nfsv4", "virtio_blk")
TIMEOUT_S = 120

# What these programs read. Without the second name of its port rpcbind does not listen.
CONFIGURATION = {
    "etc/netconfig": (
        "udp tpi_clts v inet udp - -\ntcp tpi_cots_ord v inet tcp - -\nlocal tpi_cots_ord - loopback - - -\n"
    ),
    "etc/protocols": "tcp 6 TCP\nudp 17 UDP\n",
    "etc/services": "sunrpc 111/tcp portmapper\nsunrpc 111/udp portmapper\nnfs 2049/tcp\n",
    "etc/passwd": "root:x:0:0::/:/bin/sh\nstatd:x:0:0::/:/bin/sh\n_rpc:x:0:0::/:/bin/sh\n",
    "etc/group": "root:x:0:\n",
    "etc/hosts": "127.0.0.1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
    "etc/exports": "",
    "var/lib/nfs/etab": "",
    "var/lib/nfs/rmtab": "",
}

# For a guest's script. Locks are given at once: nobody held one before this boot.
SERVE = """
with_nfs() { LD_LIBRARY_PATH=/nfs "$@"; }
mkdir -p /exported /var/lib/nfs/sm /var/lib/nfs/sm.bak /var/lib/nfs/v4recovery /run/rpcbind /run/sendsigs.omit.d
ln -s /run /var/run
mount -t ext4 /dev/vda /exported
mount -t nfsd nfsd /proc/fs/nfsd
echo 1 > /proc/sys/fs/nfs/nlm_grace_period
echo 10 > /proc/fs/nfsd/nfsv4gracetime
hostname guest
with_nfs /nfs/rpcbind -w
with_nfs /nfs/rpc.statd --no-notify
with_nfs /nfs/exportfs -i -o rw,no_root_squash,sync,no_subtree_check,fsid=0 127.0.0.1:/exported
with_nfs /nfs/rpc.mountd
with_nfs /nfs/rpc.nfsd 4
echo Y > /proc/fs/nfsd/v4_end_grace
mounted() {  # PLACE VERSION OPTIONS: as one machine would
    mkdir -p "$1"
    with_nfs /nfs/mount.nfs "127.0.0.1:$([ "$2" = 3 ] && echo /exported || echo /)" "$1" -o "vers=$2,nosharecache$3"
}
"""


@cache
def nfs_files() -> dict[str, bytes]:
    """For the initramfs: the programs with their libraries in /nfs, and what they read."""
    tree = cached("nfs", [Path(__file__).read_text()], _fetch)
    triplet = f"{platform.machine()}-linux-gnu"
    search = f"{tree}/usr/lib/{triplet}:{tree}/lib/{triplet}"
    files = {name: text.encode() for name, text in CONFIGURATION.items()}
    for name in PROGRAMS:
        files[f"nfs/{Path(name).name}"] = (tree / name).read_bytes()
        for library in libraries(tree / name, search):
            files[f"nfs/{library.name}"] = library.read_bytes()
    return files


def _fetch(directory: Path) -> None:
    command = ["apt-get", "download", "--quiet=2", *PACKAGES]
    if _run(*command, cwd=directory, check=False).returncode:
        if os.geteuid() == 0:  # a fresh container has no package lists yet
            _run("apt-get", "--quiet=2", "update")
        _run(*command, cwd=directory)
    for archive in directory.glob("*.deb"):
        _run("dpkg-deb", "-x", str(archive), str(directory))
        archive.unlink()


def _run(*command: str, cwd: Path | None = None, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, check=check, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S
    )
