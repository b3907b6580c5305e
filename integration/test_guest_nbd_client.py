"""The Linux kernel's own NBD client, set up with nbd-client, uses clones as block devices.

One guest does all the work, in the fixture: it makes a file system on one clone, writes sectors of another, reads both
back through new connections, and tries to write to the base. The tests look at what it saw and at what is left in
the pool.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from integration.guest.initramfs import write_initramfs
from integration.guest.kernel import kernel
from integration.guest.qemu import NETWORK, Told, guest
from integration.packages import require
from integration.served import Served, make_pool, save_export, served, sha256_of_file

pytestmark = pytest.mark.timeout(300)

SECTOR_SIZE = 512
BLOCK_SIZE = 4096
IMAGE_SIZE = 64 << 20

RANDOM = random.Random("guest")
FILES = {f"file-of-{size}": RANDOM.randbytes(size) for size in (1, 511, 4096, 100_000, (3 << 20) + 17)}
# What the guest writes to the sibling, by sector: whole blocks, single sectors within a block, the last one of all.
SECTORS = {
    sector: RANDOM.randbytes(count * SECTOR_SIZE)
    for sector, count in ((0, 8), (801, 1), (803, 2), (9_999, 333), (IMAGE_SIZE // SECTOR_SIZE - 1, 1))
}

# Full paths where busybox has a lesser program of the same name.
SCRIPT = r"""
. /functions

echo "== list"
/bin/nbd-client -l 10.0.2.2 "$port"

attach web1 nbd0 -C 4
attach web2 nbd1 -C 4
echo "== discard"
cat /sys/block/nbd0/queue/discard_max_bytes
echo "== work"
/bin/mke2fs -q -t ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt
mkdir /mnt/many
cp /files/* /mnt
for i in $(seq 60); do echo "this is file $i" > "/mnt/many/$i"; done
sync
for patch in /sectors/*; do
    # One request for each sector: past the cache, which would read the block around it and write that.
    /bin/dd if="$patch" of=/dev/nbd1 bs=512 seek="${patch##*/}" oflag=direct conv=notrunc status=none
done
rm /mnt/many/1?
fstrim /mnt
umount /mnt
detach nbd0
detach nbd1

attach web1 nbd0 -C 4
echo "== fsck"
if /bin/e2fsck -fn /dev/nbd0; then echo whole; else echo damaged; fi
mount -t ext4 -o ro /dev/nbd0 /mnt
cd /mnt
echo "== files"
sha256sum file-of-*
echo "== many"
cat many/*
cd /
umount /mnt
detach nbd0

attach web2 nbd1 -C 4
echo "== sibling"
sha256sum /dev/nbd1
detach nbd1

attach base nbd2 -C 4
echo "== read-only"
cat /sys/block/nbd2/ro
if dd if=/dev/zero of=/dev/nbd2 bs=4096 count=1 conv=notrunc,fsync; then echo written; else echo refused; fi
detach nbd2
"""


@dataclass(frozen=True)
class Story:
    directory: Path
    image: bytes = field(repr=False)  # the base, as it was imported
    server: Served
    told: Told


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    require("busybox-static", "nbd-client", "e2fsprogs", "qemu-system-x86", "seabios", "libnbd-bin")
    linux = kernel()
    directory = tmp_path_factory.mktemp("nbd-client")
    image = b"".join(map(base_block, range(IMAGE_SIZE // BLOCK_SIZE)))
    (directory / "image.raw").write_bytes(image)
    pool = make_pool(directory / "pool", directory / "image.raw", "web1", "web2")
    with served(pool, "--listen", "127.0.0.1:0") as server:
        files = {f"files/{name}": content for name, content in FILES.items()}
        files |= {f"sectors/{sector}": content for sector, content in SECTORS.items()}
        script = f"port={server.port}\n{SCRIPT}"
        initramfs = write_initramfs(directory / "initramfs", linux, script, files)
        with guest(*linux.boots(initramfs), *NETWORK, console=directory / "console.txt") as machine:
            told = machine.wait_until_off(150)
        yield Story(directory, image, server, told)


def base_block(block: int) -> bytes:
    """Every block has its own content, and none is zeros: a misplaced one is noticed, and a missing one."""
    return (block + 1).to_bytes(8) * (BLOCK_SIZE // 8)


def differing_blocks(expected: bytes, actual: bytes) -> list[int]:
    """The numbers of the blocks that are not as expected: a failure that says where."""
    assert len(actual) == len(expected)
    return [
        offset // BLOCK_SIZE
        for offset in range(0, len(expected), BLOCK_SIZE)
        if expected[offset : offset + BLOCK_SIZE] != actual[offset : offset + BLOCK_SIZE]
    ]


def sibling(image: bytes) -> bytes:
    """What web2 has to hold: the base with the sectors that the guest wrote, and nothing of what web1 got."""
    content = bytearray(image)
    for sector, written in SECTORS.items():
        content[sector * SECTOR_SIZE : sector * SECTOR_SIZE + len(written)] = written
    return bytes(content)


def test_nbd_client_lists_the_base_and_the_clones(story: Story) -> None:
    assert {"base", "web1", "web2"} <= set(story.told.section("list"))


def test_a_file_system_on_a_clone_has_no_errors_after_detaching(story: Story) -> None:
    fsck = story.told.section("fsck")
    assert fsck[-1] == "whole", fsck


def test_files_on_a_clone_are_read_back_after_attaching_it_again(story: Story) -> None:
    seen = {name: digest for digest, name in (line.split() for line in story.told.section("files"))}
    assert seen == {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


def test_files_that_were_removed_are_gone_and_their_neighbours_are_not(story: Story) -> None:
    kept = {f"this is file {i}" for i in range(1, 61) if not 10 <= i <= 19}
    assert set(story.told.section("many")) == kept


def test_what_mkfs_discarded_does_not_show_the_base_again(story: Story) -> None:
    assert int(story.told.section("discard")[0]) > 0
    saved = save_export(story.server.uri("web1"), story.directory / "web1.raw").read_bytes()
    blocks = range(IMAGE_SIZE // BLOCK_SIZE)
    shown = [n for n in blocks if saved[n * BLOCK_SIZE : (n + 1) * BLOCK_SIZE] == base_block(n)]
    assert shown == []


def test_the_sibling_holds_what_was_written_to_it_and_nothing_else(story: Story) -> None:
    expected = sibling(story.image)
    saved = save_export(story.server.uri("web2"), story.directory / "web2.raw")
    assert differing_blocks(expected, saved.read_bytes()) == []
    assert story.told.section("sibling") == [f"{hashlib.sha256(expected).hexdigest()}  /dev/nbd1"]


def test_the_kernel_sees_the_base_as_read_only_and_cannot_write_to_it(story: Story) -> None:
    attached, *attempt = story.told.section("read-only")
    assert attached == "1"
    assert attempt[-1] == "refused"


def test_the_base_is_unchanged_by_the_work_on_its_clones(story: Story) -> None:
    before = hashlib.sha256(story.image).hexdigest()
    exported = save_export(story.server.uri("base"), story.directory / "base.raw")
    assert sha256_of_file(exported) == before
    assert sha256_of_file(story.directory / "image.raw") == before
