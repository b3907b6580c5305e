"""A guest with too little memory swaps to a clone, and finds its data again.

Under memory pressure the kernel must be able to write to the clone without first getting memory for that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from integration.guest.initramfs import write_initramfs
from integration.guest.kernel import kernel
from integration.guest.qemu import NETWORK, Told, guest
from integration.packages import require
from integration.served import make_pool, nbdclone, served

pytestmark = pytest.mark.timeout(300)

MIB = 1 << 20
MEMORY = 128 * MIB
FILES = 10
FILE_SIZE = 8 * MIB
PAGE = 4096
LEAST_SWAPPED = 24 * MIB  # of the 80 MiB of files; it was 43

# The files stand in memory, as tmpfs has them, or else in the swap. Their digests are those of what was written, made
# on the way to them.
SCRIPT = rf"""
. /functions
mkdir /memory
mount -t tmpfs -o size={2 * FILES * FILE_SIZE} tmpfs /memory
check() {{  # FILE...
    for file; do
        if [ "$(md5sum < "$file")" = "$(cat "/tmp/${{file##*/}}")" ]; then echo same; else echo "$file differs"; fi
    done
}}
swapped_out() {{ sed -n 's/^pswpout //p' /proc/vmstat; }}

attach swap nbd0 -swap
mkswap /dev/nbd0
swapon /dev/nbd0
for i in $(seq {FILES}); do
    /bin/dd if=/dev/urandom bs=1M count={FILE_SIZE // MIB} status=none | tee "/memory/$i" | md5sum > "/tmp/$i"
done
echo "== swapped"
swapped_out
awk '/nbd0/ {{ print $4 }}' /proc/swaps
echo "== read back"
check /memory/*
echo "== after swapoff"
cd /memory
ls | tail -n +5 | xargs rm  # the rest has to fit into the memory
swapoff /dev/nbd0
grep -c nbd0 /proc/swaps || :
check /memory/*
dmesg | grep -E 'I/O error|allocation failure' || :
cd /
detach nbd0
"""


@dataclass(frozen=True)
class Story:
    told: Told
    allocated: int  # by the clone in the end


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    require("busybox-static", "nbd-client", "e2fsprogs", "qemu-system-x86", "seabios")
    linux = kernel()
    directory = tmp_path_factory.mktemp("swap")
    image = directory / "image.raw"
    image.write_bytes(b"\xa5" * (2 * FILES * FILE_SIZE))
    pool = make_pool(directory / "pool", image, "swap")
    with served(pool, "--listen", "127.0.0.1:0") as server:
        initramfs = write_initramfs(directory / "initramfs", linux, f"port={server.port}\n{SCRIPT}")
        machine = (*linux.boots(initramfs), "-m", str(MEMORY // MIB), *NETWORK)
        with guest(*machine, console=directory / "console.txt") as running:
            told = running.wait_until_off(200)
    allocated = json.loads(nbdclone("--pool", pool, "info", "swap", "--json").stdout)["allocated"]
    return Story(told, allocated)


def test_a_guest_with_too_little_memory_swaps_to_a_clone(story: Story) -> None:
    pages, kibibytes = map(int, story.told.section("swapped"))
    assert pages * PAGE >= LEAST_SWAPPED
    assert kibibytes * 1024 >= LEAST_SWAPPED
    assert story.allocated >= kibibytes * 1024


def test_what_was_swapped_out_is_read_back(story: Story) -> None:
    assert story.told.section("read back") == ["same"] * FILES


def test_what_was_in_the_swap_is_in_memory_when_it_is_taken_away(story: Story) -> None:
    assert story.told.section("after swapoff") == ["0", *["same"] * 4]
