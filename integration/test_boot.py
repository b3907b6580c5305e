"""Two clones of one Debian boot from the server, side by side, and lose nothing when it is killed.

The whole story is told once, by the fixture: both clones boot three times. The server is killed after they have gone
down the first time, and while they are up the second time. The tests are what has to be true of it. What a guest
does on a boot is in guest/witness.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.guest.debian_disk import ROOT_OFFSET, debian_disk
from integration.guest.qemu import Guest, Told, guest
from integration.packages import program, require
from integration.served import Served, make_pool, save_export, served, sha256_of_file

pytestmark = pytest.mark.timeout(600)

CLONES = ("web1", "web2")
DEADLINE_S = 180  # for a boot

Boots = dict[str, Told]  # what each clone has told


@dataclass(frozen=True)
class Story:
    directory: Path
    server: Served
    base_sha256: str  # before anything was done
    first: Boots
    second: Boots
    third: Boots


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    require("mmdebstrap", "syslinux", "syslinux-common", "mtools", "dosfstools", "e2fsprogs", "fdisk")
    require("qemu-system-x86", "seabios", "libnbd-bin")
    directory = tmp_path_factory.mktemp("boot")
    base_sha256 = sha256_of_file(debian_disk())
    pool = make_pool(directory / "pool", debian_disk(), *CLONES)
    with served(pool) as server:
        with machines(server, directory, "first") as running:
            first = {clone: machine.wait_until_off(DEADLINE_S) for clone, machine in running.items()}
        server.kill()
    with served(pool) as server, machines(server, directory, "second", ",family=stays-up") as running:
        second = {clone: machine.wait_until_done(DEADLINE_S) for clone, machine in running.items()}
        server.kill()  # what the guests have synced has to be there, though they are still running
    with served(pool) as server:
        with machines(server, directory, "third") as running:
            third = {clone: machine.wait_until_off(DEADLINE_S) for clone, machine in running.items()}
        yield Story(directory, server, base_sha256, first, second, third)


@contextmanager
def machines(server: Served, directory: Path, which: str, trait: str = "") -> Iterator[dict[str, Guest]]:
    """Boot every clone at the same time."""
    with ExitStack() as running:
        yield {
            clone: running.enter_context(
                guest(
                    *("-drive", f"file={server.uri(clone)},format=raw,if=virtio"),
                    *("-smbios", f"type=1,serial={clone}{trait}"),
                    console=directory / f"{clone}-{which}.txt",
                )
            )
            for clone in CLONES
        }


@pytest.mark.parametrize("clone", CLONES)
def test_a_clone_boots_to_a_system_that_has_its_root_on_the_export(story: Story, clone: str) -> None:
    for boot in (story.first[clone], story.second[clone], story.third[clone]):
        (root,) = boot.section("root")
        device, file_system, options = root.split()
        assert (device, file_system) == ("/dev/vda2", "ext4")
        assert "rw" in options.split(",")


@pytest.mark.parametrize("clone", CLONES)
def test_the_first_boot_of_a_clone_finds_nothing_that_another_clone_wrote(story: Story, clone: str) -> None:
    assert story.first[clone].section("found") == []


# What a boot leaves is the name of the clone and the identity of that one boot, which nothing else can know.


@pytest.mark.parametrize("clone", CLONES)
def test_a_clone_finds_its_own_file_and_no_other_after_the_server_was_killed(story: Story, clone: str) -> None:
    assert story.second[clone].section("found") == story.first[clone].section("boot")


@pytest.mark.parametrize("clone", CLONES)
def test_a_clone_finds_what_it_had_synced_when_the_server_was_killed_under_it(story: Story, clone: str) -> None:
    assert story.third[clone].section("found") == story.second[clone].section("boot")


@pytest.mark.parametrize("clone", CLONES)
def test_the_root_file_system_of_a_clone_is_whole_in_the_end(story: Story, clone: str) -> None:
    disk = save_export(story.server.uri(clone), story.directory / f"{clone}.raw")
    e2fsck = [program("e2fsck"), "-fn", f"{disk}?offset={ROOT_OFFSET}"]
    checked = subprocess.run(e2fsck, check=False, capture_output=True, text=True, timeout=120)
    disk.unlink()
    assert checked.returncode == 0, checked.stdout


def test_the_base_is_unchanged_by_the_boots_of_its_clones(story: Story) -> None:
    exported = save_export(story.server.uri("base"), story.directory / "base.raw")
    assert sha256_of_file(exported) == story.base_sha256
    assert sha256_of_file(debian_disk()) == story.base_sha256
    exported.unlink()
