"""Power cuts on a real file system: what was flushed is there, and every other sector is old or new.

A guest runs the server, its clients and the pool, on an ext4 whose disk is logged by qemu: every write and every flush
that reaches it. From the log the disk is put together as it may be after a power cut at any place: all that the disk
had flushed, and any part of what it was sent since. e2fsck replays the journal, and the clone is opened and compared
with what had been acknowledged by then: the guest has left marks in the log that say so (guest/power_writer.py).

The store's order is tested more thoroughly on a simulated disk, in the tests of the store. This is about what they
take for granted: what a file system makes of it.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from integration.guest.initramfs import write_initramfs
from integration.guest.kernel import kernel
from integration.guest.power_writer import (
    BASE_SIZE,
    DISK_SIZE,
    HISTORY,
    MARK,
    MARKS,
    SECTOR,
    SECTORS,
    WINDOWS,
    content,
    data,
)
from integration.guest.python import python
from integration.guest.qemu import NETWORK, guest
from integration.packages import program, require
from integration.served import REPOSITORY
from integration.write_log import FLUSH, Cuts, Entry, read_log
from nbdclone.store.fs import FileSystem
from nbdclone.store.pool import Pool

ACKNOWLEDGEMENTS = int(os.environ.get("POWER_ACKNOWLEDGEMENTS", "60"))
CUTS = int(os.environ.get("POWER_CUTS", "60"))
SEED = int(os.environ.get("POWER_SEED", "31"))
FILE_SYSTEM_BLOCKS = os.environ.get("POWER_FILE_SYSTEM_BLOCKS", "4096").split()  # bytes: what mke2fs -b takes
WITHIN_A_FLUSH = 25  # entries of the log: about as many come between a flush's request and its mark
BOOT_S = 60  # at most, on a busy machine
SECONDS_FOR_ONE = 5  # acknowledgement, or cut

pytestmark = pytest.mark.timeout(BOOT_S + SECONDS_FOR_ONE * (ACKNOWLEDGEMENTS + CUTS))

# ext4 takes for granted that this is written whole: torn, it fails its checksum, and the journal is not even found.
SUPER_BLOCK = range(1024, 2048)

PROGRAM = REPOSITORY / "integration" / "guest" / "power_writer.py"

# The kernel writes by itself what is 0.1 s old, and ext4 its journal every second: so the cuts come in between, too.
SCRIPT = """
echo 10 > /proc/sys/vm/dirty_writeback_centisecs
echo 10 > /proc/sys/vm/dirty_expire_centisecs
mkdir /disk
mount -t ext4 -o data=ordered,barrier=1,commit=1 /dev/vda /disk
grep /disk /proc/mounts
cat /sys/block/vda/queue/write_cache
{command} /disk/pool /image /dev/vda {acknowledgements} {seed}
"""


class Unsynced(FileSystem):
    """For a pool that is looked at and thrown away."""

    datasync = staticmethod(lambda fd: None)
    sync = staticmethod(lambda fd: None)


class Ledger:
    """What each sector of the clone may hold: what was durable last, or any later write."""

    def __init__(self, history: list[str]) -> None:
        self._contents = [
            [content(sector, 1) if sector < BASE_SIZE // SECTOR else bytes(SECTOR)] for sector in range(SECTORS)
        ]
        self._durable = [0] * SECTORS  # from this one of the contents on
        # For each mark: what is durable where the log has it, (sector, which of its contents).
        self._proven: dict[int, dict[int, int]] = {}
        self._read(history)

    def _read(self, history: list[str]) -> None:
        sent: dict[int, dict[int, int]] = {}
        acknowledged: dict[int, int] = {}
        before_flush: dict[int, dict[int, int]] = {}
        for line, (what, *words) in enumerate(text.split() for text in history):
            numbers = [*map(int, words)]
            if what in ("write", "zero"):
                version, position, length = numbers
                sent[line] = self._send(position, data(version, position, length) if what == "write" else bytes(length))
            elif what == "flush":
                before_flush[line] = dict(acknowledged)
            elif what == "flushed":
                self._proven[numbers[1]] = before_flush[numbers[0]]
            else:
                acknowledged |= sent[numbers[0]]
                if what == "durable":
                    self._proven[numbers[1]] = sent[numbers[0]]

    def _send(self, position: int, new: bytes) -> dict[int, int]:
        touched = range(position // SECTOR, -(-(position + len(new)) // SECTOR))
        whole = bytearray(b"".join(self._contents[sector][-1] for sector in touched))
        lead = position % SECTOR
        whole[lead : lead + len(new)] = new
        for at, sector in enumerate(touched):
            self._contents[sector].append(bytes(whole[at * SECTOR : (at + 1) * SECTOR]))
        return {sector: len(self._contents[sector]) - 1 for sector in touched}

    def prove(self, mark: int) -> None:
        """The cut is after this mark."""
        for sector, index in self._proven[mark].items():
            self._durable[sector] = max(self._durable[sector], index)

    def wrong_sectors(self, found: bytes) -> list[str]:
        wrong = []
        for sector, contents in enumerate(self._contents):
            here = found[sector * SECTOR : (sector + 1) * SECTOR]
            first = self._durable[sector]
            if here not in contents[first:]:
                what = "is older than what was durable" if here in contents[:first] else "was never written there"
                wrong.append(f"sector {sector}: {here[:16].hex()} {what}")
        return wrong


@dataclass(frozen=True)
class Story:
    before: bytes
    """The disk, before the guest was there."""
    entries: list[Entry]
    marks: list[tuple[int, int]]
    """(index of the entry, number of the mark), in the order of the log."""
    history: list[str]


@pytest.fixture(scope="module", params=FILE_SYSTEM_BLOCKS)
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Story:
    require("busybox-static", "e2fsprogs", "nbd-client", "qemu-system-x86", "seabios")
    directory = tmp_path_factory.mktemp("power")
    linux = kernel()
    disk, log, image, rehearsed = (directory / name for name in ("disk", "log", "image", "rehearsed"))
    image.write_bytes(b"".join(content(sector, 1) for sector in range(BASE_SIZE // SECTOR)))
    for file in (disk, rehearsed, log):
        file.touch()
    os.truncate(disk, DISK_SIZE)
    run("mke2fs", "-q", "-t", "ext4", "-b", request.param, "-J", "size=4", disk, f"{MARKS // 1024}k")
    before = disk.read_bytes()
    writer = python(PROGRAM, directory / "pool", image, rehearsed, "6", str(SEED), path=REPOSITORY)
    script = SCRIPT.format(command=writer.command, acknowledgements=ACKNOWLEDGEMENTS, seed=SEED)
    files = {**writer.files, "image": image.read_bytes()}
    initramfs = write_initramfs(directory / "initramfs", linux, script, files, modules=("virtio_blk",))
    logged = (
        f"driver=blklogwrites,node-name=disk,file.driver=file,file.filename={disk},file.cache.no-flush=on,"
        f"log.driver=file,log.filename={log},log.cache.no-flush=on"
    )
    options = (
        *linux.boots(initramfs),
        "-m",
        "1024",
        *NETWORK,
        "-blockdev",
        logged,
        "-device",
        "virtio-blk-pci,drive=disk",
    )
    with guest(*options, console=directory / "console.txt") as machine:
        machine.wait_until_off(BOOT_S + SECONDS_FOR_ONE * ACKNOWLEDGEMENTS)
    entries = read_log(log)
    marks = [(at, int.from_bytes(entry.data[len(MARK) :][:4])) for at, entry in enumerate(entries) if is_mark(entry)]
    end = next(at for at, entry in enumerate(entries) if entry.offset >= HISTORY)
    history = disk.read_bytes()[HISTORY:].rstrip(b"\0").decode().splitlines()
    return Story(before, entries[:end], marks, history)


def is_mark(entry: Entry) -> bool:
    return MARKS <= entry.offset < HISTORY and entry.data.startswith(MARK)


def run(*command: str | Path, fine: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run([program(str(command[0])), *command[1:]], check=False, capture_output=True, timeout=60)
    assert done.returncode in fine, (done.stdout + done.stderr).decode(errors="replace")


def choose(story: Story, rng: random.Random) -> list[tuple[int, float]]:
    """Where to cut, and which part of what was not flushed is kept. None before the first mark: there is no clone yet.

    Right after a mark, mostly with nothing that was not flushed: an acknowledgement that came too early shows there.
    A little before one, so within a flush: there the order in it shows. And anywhere.
    """
    first = story.marks[0][0] + 1
    chosen = []
    for _ in range(CUTS):
        mark, _ = rng.choice(story.marks)
        where = rng.random()
        if where < 0.3:
            chosen.append((mark + 1, rng.choice([0, 0, 0, 0.5])))
        elif where < 0.7:
            chosen.append((max(mark - rng.randrange(WITHIN_A_FLUSH), first), rng.choice([0.1, 0.5, 0.5, 0.9])))
        else:
            chosen.append((rng.randrange(first, len(story.entries) + 1), rng.choice([0.1, 0.5, 0.9, 1])))
    return sorted(chosen)


def recovered(disk: bytearray, directory: Path) -> bytes:
    """What the clone holds after the file system has been put right."""
    torn, found = directory / "torn", directory / "found"
    torn.write_bytes(disk[:MARKS])
    found.mkdir()
    run("e2fsck", "-fy", torn, fine=(0, 1))
    run("debugfs", "-R", f"rdump /pool {found}", torn)
    pool = Pool.open(found / "pool", fs=Unsynced())
    with pool.open_clone("clone") as clone:  # the base too is compared with its fingerprint: it is another file now
        return b"".join(clone.pread(length, offset) for offset, length in WINDOWS)


def test_after_a_power_cut_what_was_flushed_is_there_and_the_rest_is_old_or_new(story: Story, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    cuts = Cuts(story.before, story.entries, SUPER_BLOCK)
    ledger = Ledger(story.history)
    marks = list(story.marks)
    for number, (at, kept) in enumerate(choose(story, rng)):
        while marks and marks[0][0] < at:
            ledger.prove(marks.pop(0)[1])
        directory = tmp_path / str(number)
        directory.mkdir()
        wrong = ledger.wrong_sectors(recovered(cuts.after(at, rng, kept), directory))
        assert not wrong, f"cut {number}, after entry {at}, {kept} kept: {wrong[:5]} and {len(wrong)} in all"
        shutil.rmtree(directory)
    flushes = sum(bool(entry.flags & FLUSH) for entry in story.entries)
    print(f"{CUTS} cuts in {len(story.entries)} writes and {flushes} flushes of the disk")
    requests = Counter(line.split()[0] for line in story.history)
    print(f"{len(story.marks)} acknowledgements under {requests['write']} writes, {requests['zero']} trims and zeroes")


def test_a_disk_that_ignores_flushes_is_noticed(story: Story, tmp_path: Path) -> None:
    made, last = story.marks[0][0], story.marks[-1][0]
    ignored = [replace(entry, flags=0) if at > made else entry for at, entry in enumerate(story.entries)]
    ledger = Ledger(story.history)
    for _, mark in story.marks:
        ledger.prove(mark)
    disk = Cuts(story.before, ignored, SUPER_BLOCK).after(last + 1, random.Random(SEED), 0)
    assert ledger.wrong_sectors(recovered(disk, tmp_path))
