"""What people do with a block device, done in a guest with clones that the kernel's NBD client has attached.

One guest does it all, in the fixture: several processors write through several connections, file systems are made,
trimmed and filled by fio, a device is discarded. Where the space that a clone takes counts, the guest has it measured
here. The last thing that it asks for is the server's death, right after a flush.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.guest.initramfs import write_initramfs
from integration.guest.kernel import kernel
from integration.guest.qemu import NETWORK, Told, guest
from integration.guest.questions import answered
from integration.packages import program, require
from integration.served import Served, make_pool, nbdclone, save_export, served

pytestmark = pytest.mark.timeout(300)

CLONES = ("blocks", "discarded", "trimmed", "verified", "parallel")
MIB = 1 << 20
IMAGE_SIZE = 64 * MIB
CONNECTIONS = 4
STRIPE = 4 * MIB  # what each of the parallel writers writes
# Metadata of the file system and the delta's own pages come and go with what is written.
SLACK = MIB

RANDOM = random.Random("device")
FILES = {f"file-of-{size}": RANDOM.randbytes(size) for size in (1, 4096, 100_000, (2 << 20) + 17)}
STRIPES = [RANDOM.randbytes(STRIPE) for _ in range(CONNECTIONS)]

# Full paths where busybox has a lesser program of the same name.
SCRIPT = r"""
. /functions
processors() {  # 0 or 1: one processor alone, or all of them; an emulated machine is faster with one
    for i in 1 2 3; do echo "$1" > "/sys/devices/system/cpu/cpu$i/online"; done
}
verify="--name=verify --directory=/mnt --size=16m --rw=randwrite --bsrange=4k-64k --ioengine=libaio --direct=1
    --iodepth=16 --fsync=64 --randseed=7 --verify=crc32c --verify_fatal=1 --eta=never --output=/tmp/fio"

processors 0
attach base nbd0
echo "== read-only"
cat /sys/block/nbd0/ro
mount -t ext4 -o ro /dev/nbd0 /mnt
if touch /mnt/new; then echo made; else echo refused; fi
if /bin/dd if=/dev/zero of=/dev/nbd0 bs=4096 count=1 oflag=direct conv=notrunc; then echo written; else echo refused; fi
cd /mnt
echo "== read-only files"
sha256sum file-of-*
cd /
umount /mnt
detach nbd0

attach blocks nbd1 -b 4096
echo "== block size"
cat /sys/block/nbd1/queue/logical_block_size /sys/block/nbd1/queue/physical_block_size
/bin/mke2fs -F -q -t ext4 /dev/nbd1
mount -t ext4 /dev/nbd1 /mnt
cp /files/* /mnt
umount /mnt
detach nbd1
attach blocks nbd1 -b 4096
echo "== blocks fsck"
if /bin/e2fsck -fn /dev/nbd1; then echo whole; else echo damaged; fi
mount -t ext4 -o ro /dev/nbd1 /mnt
cd /mnt
echo "== blocks files"
sha256sum file-of-*
cd /
umount /mnt
detach nbd1

attach discarded nbd2
echo "== discard"
/bin/dd if=/dev/urandom of=/dev/nbd2 bs=1M count=16 oflag=direct conv=notrunc,fsync status=none
around() { /bin/dd if=/dev/nbd2 bs=1M count=4 status=none; /bin/dd if=/dev/nbd2 bs=1M skip=12 count=4 status=none; }
around | sha256sum
ask discarded
blkdiscard -o $((4 << 20)) -l $((8 << 20)) /dev/nbd2
sync /dev/nbd2
ask discarded
around | sha256sum
echo "== discarded range"
/bin/dd if=/dev/nbd2 bs=1M skip=4 count=8 iflag=direct status=none | sha256sum
echo "== discarded whole"
blkdiscard /dev/nbd2
sync /dev/nbd2
ask discarded
sha256sum < /dev/nbd2
detach nbd2

attach trimmed nbd3
mount -t ext4 /dev/nbd3 /mnt
fstrim /mnt  # what mke2fs left of the base's free space is not what is measured
sync
echo "== fstrim"
ask trimmed
for i in 1 2 3 4; do /bin/dd if=/dev/urandom of="/mnt/big-$i" bs=1M count=4 status=none; done
sync
ask trimmed
before=$(sha256sum < /mnt/big-4)
rm /mnt/big-1 /mnt/big-2 /mnt/big-3
sync
fstrim -v /mnt
sync
ask trimmed
umount /mnt
detach nbd3
attach trimmed nbd3
echo "== trimmed fsck"
if /bin/e2fsck -fn /dev/nbd3; then echo whole; else echo damaged; fi
mount -t ext4 -o ro /dev/nbd3 /mnt
echo "== trimmed files"
[ "$(sha256sum < /mnt/big-4)" = "$before" ] && echo same
cd /mnt
sha256sum file-of-*
cd /
umount /mnt
detach nbd3

attach verified nbd4
echo "== fio"
mount -t ext4 /dev/nbd4 /mnt
if fio $verify; then echo verified; else echo differs; cat /tmp/fio; fi
umount /mnt
detach nbd4
attach verified nbd4
mount -t ext4 /dev/nbd4 /mnt
echo "== fio again"
if fio $verify --verify_only; then echo verified; else echo differs; cat /tmp/fio; fi
umount /mnt
detach nbd4

processors 1
attach parallel nbd5 -C 4
echo "== queues"
cat /sys/block/nbd5/mq/*/cpu_list
netstat -tn | grep -c ":$port .*ESTABLISHED"
echo "== parallel"
writers=
for i in 0 1 2 3; do
    # Past the cache, so that it is this processor, and its connection, that sends it.
    taskset -c $i /bin/dd if=/stripes/$i of=/dev/nbd5 bs=64k seek=$((i * 64)) oflag=direct conv=notrunc status=none &
    writers="$writers $!"
done
for writer in $writers; do wait "$writer"; done
taskset -c 0 sync /dev/nbd5  # all is written: what this sends is one flush, on one connection
ask kill
"""


@dataclass(frozen=True)
class Story:
    directory: Path
    server: Served
    """The one after that which was killed."""
    told: Told


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    require("busybox-static", "nbd-client", "e2fsprogs", "fio", "qemu-system-x86", "seabios", "libnbd-bin")
    linux = kernel()
    directory = tmp_path_factory.mktemp("device")
    pool = make_pool(directory / "pool", make_image(directory), *CLONES)

    def allocated(clone: str) -> int:
        return int(json.loads(nbdclone("--pool", pool, "info", clone, "--json").stdout)["allocated"])

    with served(pool, "--listen", "127.0.0.1:0") as server:

        def kill() -> str:
            server.kill()
            return "killed"

        answers = {"discarded": lambda: allocated("discarded"), "trimmed": lambda: allocated("trimmed"), "kill": kill}
        with answered(answers) as questions:
            files = {f"files/{name}": content for name, content in FILES.items()}
            files |= {f"stripes/{i}": content for i, content in enumerate(STRIPES)}
            script = f"port={server.port}\nquestions={questions}\n{SCRIPT}"
            initramfs = write_initramfs(directory / "initramfs", linux, script, files, programs=("fio",))
            machine = ("-m", "1024", "-smp", str(CONNECTIONS))  # fio is large
            with guest(*linux.boots(initramfs), *machine, *NETWORK, console=directory / "console.txt") as running:
                told = running.wait_until_off(200)
    with served(pool) as server:
        yield Story(directory, server, told)


def make_image(directory: Path) -> Path:
    """A base that is an ext4 file system with the files."""
    tree, image = directory / "tree", directory / "image.raw"
    tree.mkdir()
    for name, content in FILES.items():
        (tree / name).write_bytes(content)
    with open(image, "wb") as file:
        file.write(b"\xa5" * IMAGE_SIZE)  # free space that is not zeros: were it shown again, it would be seen
    options = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
    mke2fs = [program("mke2fs"), "-q", "-F", "-t", "ext4", "-J", "size=4", "-E", options, "-d", str(tree), str(image)]
    subprocess.run(mke2fs, check=True, timeout=60)
    return image


def digests(lines: list[str]) -> dict[str, str]:
    return {name: digest for digest, name in (line.split() for line in lines)}


def sha256_of_zeros(size: int) -> str:
    return hashlib.sha256(bytes(size)).hexdigest()


FILE_DIGESTS = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


def test_a_base_is_a_read_only_device_whose_file_system_can_be_mounted_and_not_written(story: Story) -> None:
    attached, *attempts = story.told.section("read-only")
    assert attached == "1"
    assert [line for line in attempts if line in ("made", "written", "refused")] == ["refused", "refused"]
    assert digests(story.told.section("read-only files")) == FILE_DIGESTS


def test_a_device_of_4096_byte_blocks_takes_a_file_system(story: Story) -> None:
    assert story.told.section("block size")[:2] == ["4096", "4096"]
    fsck = story.told.section("blocks fsck")
    assert fsck[-1] == "whole", fsck
    assert digests(story.told.section("blocks files")) == FILE_DIGESTS


def test_discarding_a_range_gives_its_space_back_and_leaves_its_neighbours(story: Story) -> None:
    neighbours, full, after_range, neighbours_after = story.told.section("discard")
    assert int(full) >= 16 * MIB
    assert 8 * MIB - SLACK <= int(full) - int(after_range) <= 8 * MIB + SLACK
    assert neighbours_after == neighbours


def test_a_discarded_range_reads_as_zeros_and_not_as_the_base(story: Story) -> None:
    assert story.told.section("discarded range") == [f"{sha256_of_zeros(8 * MIB)}  -"]


def test_discarding_the_whole_device_gives_all_its_space_back_and_it_reads_as_zeros(story: Story) -> None:
    allocated, digest = story.told.section("discarded whole")
    assert int(allocated) < SLACK
    assert digest == f"{sha256_of_zeros(IMAGE_SIZE)}  -"


def test_fstrim_gives_back_the_space_of_files_that_were_deleted(story: Story) -> None:
    empty, full, trimmed = (int(line) for line in story.told.section("fstrim") if line.isdigit())
    assert full - empty >= 16 * MIB
    assert 12 * MIB - SLACK <= full - trimmed <= 12 * MIB + SLACK


def test_a_trimmed_file_system_is_whole_and_keeps_its_files(story: Story) -> None:
    fsck = story.told.section("trimmed fsck")
    assert fsck[-1] == "whole", fsck
    same, *files = story.told.section("trimmed files")
    assert same == "same"
    assert digests(files) == FILE_DIGESTS


def test_fio_verifies_what_it_wrote_to_a_mounted_clone_also_after_attaching_it_again(story: Story) -> None:
    assert story.told.section("fio") == ["verified"]
    assert story.told.section("fio again") == ["verified"]


def test_each_processor_has_a_connection_of_its_own(story: Story) -> None:
    assert story.told.section("queues") == [*map(str, range(CONNECTIONS)), str(CONNECTIONS)]


def test_a_flush_on_one_connection_keeps_what_was_written_on_the_others_when_the_server_is_killed(story: Story) -> None:
    saved = save_export(story.server.uri("parallel"), story.directory / "parallel.raw").read_bytes()
    stripes = [saved[i * STRIPE : (i + 1) * STRIPE] == content for i, content in enumerate(STRIPES)]
    assert stripes == [True] * CONNECTIONS
