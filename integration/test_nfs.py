"""A pool on NFS has one writer, on whatever machine: seen in a guest that exports a disk and mounts it several times.

To the NFS server two mounts without a common cache are like two machines (guest/nfs.py).
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

import pytest

from integration.guest.initramfs import write_initramfs
from integration.guest.kernel import kernel
from integration.guest.nfs import MODULES, SERVE, nfs_files
from integration.guest.python import python
from integration.guest.qemu import NETWORK, guest
from integration.packages import program, require
from integration.served import REPOSITORY

PROGRAM = REPOSITORY / "integration" / "guest" / "nfs_locks.py"
DISK_SIZE = 256 << 20
DEADLINE_S = 120

pytestmark = pytest.mark.timeout(DEADLINE_S + 120)

VERSIONS = ("4.2", "4.0", "3")
# NFS 4 knows no local locks, and takes no notice of who wants them. Mounts of 4.2 and 4.1 are two clients to the
# server, which would not call back what it delegated to one client when that one asks again.
SCRIPT = (
    SERVE
    + """
mounted /a42 4.2; mounted /b42 4.1 ,nolock
mounted /a40 4.0; mounted /b40 4.0 ,local_lock=flock
mounted /a3 3; mounted /b3 3
mounted /nolock 3 ,nolock
mounted /local 3 ,local_lock=flock
echo "== locks"
{command} /exported 4.2 /a42 /b42 4.0 /a40 /b40 3 /a3 /b3 --refused /nolock/pool --refused /local/pool
"""
)


@dataclass(frozen=True)
class Story:
    lines: list[str]

    def told(self, what: str) -> str:
        """What is told of it, if it is told once."""
        (found,) = [line for line in self.lines if line.startswith(f"{what}: ")]
        return found.removeprefix(f"{what}: ")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    require("busybox-static", "e2fsprogs", "nbd-client", "qemu-system-x86", "seabios")
    directory = tmp_path_factory.mktemp("nfs")
    linux = kernel()
    disk = directory / "disk"
    disk.touch()
    os.truncate(disk, DISK_SIZE)
    subprocess.run([program("mke2fs"), "-q", "-F", "-t", "ext4", disk], check=True, timeout=60)
    here = str(directory)
    runs = python(PROGRAM, here, "rehearsal", here, here, "--refused", directory / "other", path=REPOSITORY)
    script = SCRIPT.replace("{command}", runs.command)
    initramfs = write_initramfs(directory / "initramfs", linux, script, {**nfs_files(), **runs.files}, modules=MODULES)
    drive = ("-drive", f"file={disk},format=raw,if=virtio,cache=unsafe")
    with guest(*linux.boots(initramfs), "-m", "1024", *NETWORK, *drive, console=directory / "console.txt") as machine:
        return Story(machine.wait_until_done(DEADLINE_S).section("locks"))


FAR = "a process on another machine, or in another container"
OVER_NFS = "a process on another machine, over NFS"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("what", ["there", "rm there", "beside the server", "rm beside the server"])
def test_a_clone_that_another_machine_has_open_is_refused(story: Story, version: str, what: str) -> None:
    who = OVER_NFS if what.endswith("beside the server") else FAR
    assert story.told(f"{version} {what}").startswith(f"InUse: clone 'web1' is in use by {who} (/")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_machine_of_the_holder_names_the_process(story: Story, version: str) -> None:
    assert story.told(f"{version} here").startswith("InUse: clone 'web1' is in use by process HOLDER (/")
    assert story.told(f"{version} another clone there") == "done"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_clone_that_is_open_beside_the_server_is_refused_to_its_clients(story: Story, version: str) -> None:
    told = story.told(f"{version} held beside the server")
    assert told.startswith(f"InUse: clone 'web3' is in use by {FAR} (/")
    assert story.told(f"{version} released beside the server") == "done"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_lock_of_a_killed_process_is_gone_and_what_was_acknowledged_is_there(story: Story, version: str) -> None:
    assert story.told(f"{version} after a kill, here") == "as written"
    assert story.told(f"{version} then there") == "as written"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pool_has_one_server_on_all_machines(story: Story, version: str) -> None:
    for what, who in (("second server", FAR), ("third server", OVER_NFS)):
        told = story.told(f"{version} {what}")
        assert told.startswith("InUse: pool /")
        assert f" is in use by {who} (/" in told
    assert story.told(f"{version} next server") == "done"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_base_is_read_on_all_machines_and_not_removed_meanwhile(story: Story, version: str) -> None:
    assert story.told(f"{version} read there too") == "done"
    assert story.told(f"{version} rm base there").startswith(f"InUse: base 'base' is in use by {FAR} (/")
    assert story.told(f"{version} rm base beside the server").startswith(
        f"InUse: base 'base' is in use by {OVER_NFS} (/"
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_drafts_of_the_living_stay_whichever_machine_looks_and_those_of_the_dead_go(story: Story, version: str) -> None:
    assert story.told(f"{version} draft of the living") == "there"
    assert story.told(f"{version} drafts") == "1"
    assert story.told(f"{version} drafts after a kill") == "0"


@pytest.mark.parametrize("version", VERSIONS)
def test_trims_read_as_zeros_and_a_removal_leaves_nothing(story: Story, version: str) -> None:
    assert story.told(f"{version} trim") == "done"
    assert story.told(f"{version} trimmed") == "zeros"
    assert story.told(f"{version} rm") == "done"
    assert story.told(f"{version} left") == "[]"


@pytest.mark.parametrize(("where", "option"), [("/nolock", "nolock"), ("/local", "local_lock=flock")])
def test_a_pool_whose_locks_are_local_is_refused_and_not_made(story: Story, where: str, option: str) -> None:
    assert story.told(f"refused {where}/pool") == (
        f"UsageError: {where} is on {where} (nfs), mounted with {option}: its locks would not keep other machines "
        f"away; mount it without, or put the pool on another file system"
    )
    assert "'pool'" not in story.told(f"made in {where}")
