"""A guest in qemu writes on while its server is killed and started again: it sees no error, and loses nothing.

qemu is told to reconnect. One disk is written by several writers, who say on the console what they have synced; on the
other fio writes, syncs and verifies files. After each kill, before the next server starts, it is looked at what the
killed one has left: what was synced has to be there. After the last one another client reads it.

The disks have a write cache, so the guest flushes later than it writes: what the killed server had acknowledged and
not made durable is for the next server to have, and to make durable with the guest's next flush.
"""

from __future__ import annotations

import random
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from integration.guest.initramfs import write_initramfs
from integration.guest.kernel import kernel
from integration.guest.qemu import NETWORK, Told, guest
from integration.guest.questions import answered
from integration.packages import program, require
from integration.served import make_pool, save_export, served
from nbdclone.store.pool import Pool

pytestmark = pytest.mark.timeout(400)

SEED = 28
KILLS = 5
LONGEST_WORK_S = 0.5  # until the next kill, from when everybody has synced something since the last
ROUND_DEADLINE_S = 90.0
RECONNECT_DELAY_S = 60  # qemu tries after 1, 2, 4... seconds; a server that starts takes its time on a busy machine

SECTOR = 512
SLOT = 64 << 10
SLOTS = 8  # of each writer; version 11 is written to slot 3
WRITERS = 3
IMAGE_SIZE = 32 << 20

SCRIPT = rf"""
. /functions
mkdir /state
fail() {{  # WHO
    echo "the $1 has failed"
    dmesg | tail -n 20
    poweroff -f
}}
writer() {{  # NUMBER
    version=0
    until [ -e /state/stop ]; do
        version=$((version + 1))
        slot=$(($1 * {SLOTS} + version % {SLOTS}))
        yes "$(printf 'writer %d version %014d' "$1" $version)" | head -c {SLOT} > "/state/new$1"
        /bin/dd if="/state/new$1" of=/dev/vda bs=4k seek=$((slot * 16)) oflag=direct conv=notrunc,fsync status=none \
            && echo "synced $1 $version" \
            && /bin/dd if=/dev/vda of="/state/found$1" bs={SLOT} skip=$slot count=1 iflag=direct status=none \
            && cmp "/state/new$1" "/state/found$1" \
            || fail "writer $1"
    done
}}
verifier() {{
    until [ -e /state/stop ]; do
        fio --name=verify --directory=/mnt --size=2m --rw=randwrite --bs=4k --ioengine=libaio --iodepth=8 --direct=1 \
            --fsync=32 --verify=crc32c --verify_fatal=1 --eta=never --output=/state/fio \
            && echo "verified" \
            || fail "verifier"
    done
}}

mount -t ext4 /dev/vdb /mnt
echo "== work"
verifier & workers=$!
for i in $(seq 0 {WRITERS - 1}); do
    writer $i & workers="$workers $!"
done
ask until_over > /state/over
touch /state/stop
for worker in $workers; do wait $worker; done
umount /mnt
echo "== errors"
dmesg | grep -E 'error|blocked for more than|[Aa]bort|[Rr]emounting' || :
"""


@dataclass(frozen=True)
class Story:
    kills: list[Kill]
    told: Told
    """By the guest, which has ended before the last kill."""
    files: Path
    """What the last kill has left of the disk with the files."""


@dataclass(frozen=True)
class Kill:
    synced: dict[tuple[int, int], int]
    """What the guest had said by then: the newest version in each slot of each writer."""
    left: bytes = field(repr=False)
    """What was on the disk of the writers then."""

    def lost(self) -> list[str]:
        """The sectors that hold neither what was synced nor the next version, which may have been on its way."""
        wrong = []
        for (writer, slot), version in self.synced.items():
            start = (writer * SLOTS + slot) * SLOT
            possible = [content(writer, version), content(writer, version + SLOTS)]
            for offset in range(start, start + SLOT, SECTOR):
                if (found := self.left[offset : offset + SECTOR]) not in possible:
                    wrong.append(f"offset {offset}: not version {version} of writer {writer}, but {found[:32]!r}")
        return wrong


def content(writer: int, version: int) -> bytes:
    """Of each sector of that version."""
    return b"writer %d version %014d\n" % (writer, version) * (SECTOR // 32)


def synced(console: str) -> dict[tuple[int, int], int]:
    newest: dict[tuple[int, int], int] = {}
    for writer, version in re.findall(r"^synced (\d+) (\d+)$", console, re.M):
        newest[int(writer), int(version) % SLOTS] = int(version)
    return newest


def everybody_goes_on(before: str) -> Callable[[str], bool]:
    """Whether each of the writers has synced and fio has verified something since `before` was all that was said."""

    def is_so(console: str) -> bool:
        since = console[len(before) :]
        return all(f"\nsynced {writer} " in since for writer in range(WRITERS)) and "\nverified" in since

    return is_so


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    require("busybox-static", "nbd-client", "e2fsprogs", "fio", "qemu-system-x86", "seabios", "libnbd-bin")
    linux = kernel()
    directory = tmp_path_factory.mktemp("restart")
    pool = make_pool(directory / "pool", make_image(directory), "raw", "files")
    rng = random.Random(SEED)
    over = threading.Event()
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory(prefix="nbdclone-") as sockets, ExitStack() as running:
        socket = Path(sockets, "socket")
        server = running.enter_context(served(pool, "--socket", socket))
        questions = running.enter_context(answered({"until_over": lambda: over.wait(ROUND_DEADLINE_S * KILLS)}))
        script = f"questions={questions}\n{SCRIPT}"
        initramfs = write_initramfs(directory / "initramfs", linux, script, programs=("fio",), modules=("virtio_blk",))
        options = (*linux.boots(initramfs), "-m", "1024", *NETWORK, *disk("raw", socket), *disk("files", socket))
        machine = running.enter_context(guest(*options, console=directory / "console.txt"))
        console = ""
        for _ in range(KILLS):
            machine.wait_until_said(everybody_goes_on(console), ROUND_DEADLINE_S)
            time.sleep(rng.random() * LONGEST_WORK_S)
            console = machine.said()
            server.kill()
            with Pool.open(pool).open_clone("raw") as clone:
                kills.append(Kill(synced(console), clone.pread(IMAGE_SIZE, 0)))
            server = running.enter_context(served(pool, "--socket", socket))
        machine.wait_until_said(everybody_goes_on(console), ROUND_DEADLINE_S)
        over.set()
        told = machine.wait_until_off(ROUND_DEADLINE_S)
        server.kill()
    with served(pool) as server:
        kills.append(Kill(synced(told.console), save_export(server.uri("raw"), directory / "raw").read_bytes()))
        return Story(kills, told, save_export(server.uri("files"), directory / "files"))


def make_image(directory: Path) -> Path:
    """A file system: the writers ignore it."""
    image = directory / "image.raw"
    with open(image, "wb") as file:
        file.truncate(IMAGE_SIZE)
    subprocess.run([program("mke2fs"), "-q", "-t", "ext4", "-J", "size=4", str(image)], check=True, timeout=60)
    return image


def disk(export: str, socket: Path) -> tuple[str, ...]:
    """The options of qemu for a disk, which is to wait for a server that is away."""
    nbd = f"driver=nbd,server.type=unix,server.path={socket},export={export},reconnect-delay={RECONNECT_DELAY_S}"
    return ("-blockdev", f"{nbd},node-name={export}", "-device", f"virtio-blk-pci,drive={export}")


def test_a_guest_sees_no_error_when_its_server_is_killed_and_started_again(story: Story) -> None:
    assert story.told.section("errors") == []


def test_a_guest_reads_what_it_wrote_while_its_server_is_killed_and_started_again(story: Story) -> None:
    said = story.told.section("work")
    strange = [line for line in said if not re.fullmatch(r"verified|synced \d+ \d+", line)]
    assert strange == []
    assert said.count("verified") > KILLS


def test_after_every_kill_what_the_guest_had_synced_is_there(story: Story) -> None:
    assert len(story.kills) == KILLS + 1
    assert all(kill.synced for kill in story.kills)
    assert [kill.lost() for kill in story.kills] == [[]] * len(story.kills)


def test_the_file_system_of_the_guest_is_whole_after_the_last_kill(story: Story) -> None:
    e2fsck = [program("e2fsck"), "-fn", str(story.files)]
    checked = subprocess.run(e2fsck, check=False, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stdout
