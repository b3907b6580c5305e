"""Guests whose disks come over TLS, both sides showing certificates that `nbdclone cert` has made.

In one, nbd-client attaches a clone: the kernel speaks to a process of nbd-client, and that speaks TLS with the server.
Another is booted by qemu, which speaks TLS itself, from a clone of a whole Debian.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.guest.debian_disk import ROOT_OFFSET, debian_disk
from integration.guest.initramfs import write_initramfs
from integration.guest.kernel import kernel
from integration.guest.qemu import NETWORK, Told, guest
from integration.guest.questions import answered
from integration.packages import program, require
from integration.served import make_pool, nbdclone, save_export, served

pytestmark = pytest.mark.timeout(300)

HOST = "server.example"
CLIENT = "guest"
MIB = 1 << 20
IMAGE_SIZE = 64 * MIB
DEADLINE_S = 150

FILES = {f"file-of-{size}": random.Random("tls").randbytes(size) for size in (1, 4096, 100_000, (3 << 20) + 17)}

# Full paths where busybox has a lesser program of the same name.
SCRIPT = rf"""
. /functions
tls="-certfile /tls/client-cert.pem -keyfile /tls/client-key.pem -cacertfile /tls/ca-cert.pem"

if attach web1 nbd0; then without=attached; else without=refused; fi
if attach web1 nbd0 $tls -tlshostname other.example; then other=attached; else other=refused; fi
echo  # nbd-client left the cursor in the middle of a line
echo "== attempts"
echo "$without $other"

attach web1 nbd0 $tls -tlshostname {HOST}
echo "== work"
/bin/mke2fs -q -t ext4 -E nodiscard /dev/nbd0  # a block that was discarded would need no flush to be found again
mount -t ext4 /dev/nbd0 /mnt
for file in /files/*; do /bin/dd if="$file" of="/mnt/${{file##*/}}" bs=64k conv=fsync status=none; done
/bin/dd if=/dev/urandom of=/mnt/large bs=1M count=16 conv=fsync status=none
written=$(sha256sum < /mnt/large)
umount /mnt
detach nbd0

attach web1 nbd0 $tls -tlshostname {HOST}
echo "== fsck"
if /bin/e2fsck -fn /dev/nbd0; then echo whole; else echo damaged; fi
mount -t ext4 /dev/nbd0 /mnt
cd /mnt
echo "== files"
sha256sum file-of-*
echo "== large"
if [ "$(sha256sum < large)" = "$written" ]; then echo same; else echo different; fi
echo "last words" | /bin/dd of=last conv=fsync status=none
echo "== errors"
dmesg | grep -E 'error|[Aa]bort' || :
echo "== kill"  # before the clone is closed, and flushed with that
ask kill
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    nbdclone("cert", directory, "--host", HOST, "--host", "127.0.0.1", "--client", CLIENT)
    return directory


@dataclass(frozen=True)
class Story:
    told: Told
    disk: Path
    """What the clone holds in the end, read by another client."""


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Story:
    """A guest that has attached a clone with nbd-client, and after its last sync asked for the death of the server."""
    require("busybox-static", "nbd-client", "e2fsprogs", "qemu-system-x86", "seabios", "libnbd-bin")
    linux = kernel()
    directory = tmp_path_factory.mktemp("attached")
    image = directory / "image.raw"
    image.write_bytes(b"\xa5" * IMAGE_SIZE)
    pool = make_pool(directory / "pool", image, "web1")
    files = {f"files/{name}": content for name, content in FILES.items()}
    files |= {f"tls/{path.name}": path.read_bytes() for path in (certificates / CLIENT).iterdir()}
    with served(pool, "--listen", "127.0.0.1:0", "--tls-certificates", certificates) as server:

        def kill() -> str:
            server.kill()
            return "killed"

        with answered({"kill": kill}) as questions:
            script = f"port={server.port}\nquestions={questions}\n{SCRIPT}"
            initramfs = write_initramfs(directory / "initramfs", linux, script, files)
            with guest(*linux.boots(initramfs), *NETWORK, console=directory / "console.txt") as machine:
                told = machine.wait_until_off(DEADLINE_S)
    with served(pool) as server:
        return Story(told, save_export(server.uri("web1"), directory / "disk"))


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[Story]:
    """A Debian that has booted from a clone, and is running still when the server is killed."""
    require("mmdebstrap", "syslinux", "syslinux-common", "mtools", "dosfstools", "e2fsprogs", "fdisk")
    require("qemu-system-x86", "seabios", "libnbd-bin")
    directory = tmp_path_factory.mktemp("booted")
    pool = make_pool(directory / "pool", debian_disk(), "web1")
    with served(pool, "--listen", "127.0.0.1:0", "--tls-certificates", certificates) as server:
        place = f"server.type=inet,server.host=127.0.0.1,server.port={server.port},export=web1"
        options = (
            *("-object", f"tls-creds-x509,id=tls,endpoint=client,dir={certificates / CLIENT}"),
            *("-blockdev", f"driver=nbd,{place},tls-creds=tls,tls-hostname={HOST},node-name=disk"),
            *("-device", "virtio-blk-pci,drive=disk", "-smbios", "type=1,serial=web1,family=stays-up"),
        )
        with guest(*options, console=directory / "console.txt") as machine:
            told = machine.wait_until_done(DEADLINE_S)
            server.kill()
    with served(pool) as server:
        disk = save_export(server.uri("web1"), directory / "disk")
    yield Story(told, disk)
    disk.unlink()


def debugfs(disk: str, request: str) -> str:
    """Look into a file system, whose journal may have to be replayed first: this does it."""
    subprocess.run([program("e2fsck"), "-fp", disk], check=False, capture_output=True, timeout=120)
    return subprocess.run(
        [program("debugfs"), "-R", request, disk],
        check=True,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
    ).stdout


def test_nbd_client_is_refused_without_tls_and_refuses_a_server_of_another_name(attached: Story) -> None:
    assert attached.told.section("attempts") == ["refused refused"]


def test_a_file_system_on_a_clone_is_whole_that_nbd_client_attached_over_tls(attached: Story) -> None:
    fsck = attached.told.section("fsck")
    assert fsck[-1] == "whole", fsck
    assert attached.told.section("large") == ["same"]
    seen = {name: digest for digest, name in (line.split() for line in attached.told.section("files"))}
    assert seen == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    assert attached.told.section("errors") == []


def test_what_a_guest_has_synced_over_tls_is_there_when_the_server_is_killed(attached: Story) -> None:
    assert debugfs(str(attached.disk), "cat /last") == "last words\n"


def test_a_guest_boots_from_a_clone_over_tls(booted: Story) -> None:
    (root,) = booted.told.section("root")
    assert root.split()[:2] == ["/dev/vda2", "ext4"]
    assert booted.told.section("found") == []


def test_what_a_booted_guest_has_synced_over_tls_is_there_when_the_server_is_killed(booted: Story) -> None:
    (boot,) = booted.told.section("boot")
    left = debugfs(f"{booted.disk}?offset={ROOT_OFFSET}", "cat /var/lib/witness/web1")
    assert f"web1 {left.strip()}" == boot
