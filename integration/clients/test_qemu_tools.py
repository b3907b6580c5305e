"""qemu-img and qemu-io, the installed and a newer: images there and back, patterns, many requests in flight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from integration.clients.programs import KIB, MIB, SIZE, WAYS, Qemu, run_command, uri, write_image
from integration.served import Served, sha256_of_file

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("way", WAYS)
def test_qemu_img_reads_a_clone_and_writes_one(
    server: Served, qemu: Qemu, clone: str, directory: Path, way: str
) -> None:
    content = write_image(directory / "content.raw", seed=2)
    there = uri(server, clone, way)
    qemu.img("convert", "-n", "-f", "raw", "-O", "raw", content, there)
    qemu.img("compare", "-f", "raw", "-F", "raw", content, there)
    qemu.img("convert", "-f", "raw", "-O", "raw", there, directory / "back.raw")
    assert sha256_of_file(directory / "back.raw") == sha256_of_file(content)


def test_qemu_img_makes_a_clone_from_qcow2_and_qcow2_from_a_clone(
    server: Served, qemu: Qemu, clone: str, directory: Path
) -> None:
    content = write_image(directory / "content.raw", seed=3)
    qcow2 = directory / "content.qcow2"
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "-c", content, qcow2)
    qemu.img("convert", "-n", "-f", "qcow2", "-O", "raw", qcow2, uri(server, clone))
    qemu.img("compare", "-f", "raw", "-F", "qcow2", uri(server, clone), qcow2)
    qemu.img("convert", "-f", "raw", "-O", "qcow2", uri(server, clone), directory / "back.qcow2")
    qemu.img("compare", "-f", "qcow2", "-F", "raw", directory / "back.qcow2", content)


@pytest.mark.parametrize("way", WAYS)
def test_qemu_img_sees_a_raw_disk_of_the_right_size(server: Served, qemu: Qemu, way: str) -> None:
    for export in ("spare", "base"):
        told = json.loads(qemu.img("info", "--output=json", uri(server, export, way)).stdout)
        assert (told["format"], told["virtual-size"]) == ("raw", SIZE)


@pytest.mark.parametrize("way", WAYS)
def test_qemu_img_tells_where_two_clones_differ(server: Served, qemu: Qemu, clone: str, way: str) -> None:
    one, two = uri(server, "spare", way), uri(server, clone, way)
    same = qemu.img("compare", "-f", "raw", "-F", "raw", one, two)
    assert same.stdout == "Images are identical.\n"
    qemu.io(two, "write -P 7 20M 1")
    different = qemu.img("compare", "-f", "raw", "-F", "raw", one, two, check=False)
    assert different.returncode == 1
    assert f"offset {20 * MIB}" in different.stdout


@pytest.mark.parametrize("way", WAYS)
def test_qemu_img_maps_what_was_discarded_and_zeroed_as_zeros(server: Served, qemu: Qemu, clone: str, way: str) -> None:
    """integration/test_block_status.py has the whole map of a clone with holes."""
    there = uri(server, clone, way)
    qemu.io(there, "write -P 7 0 32M", "discard 4M 4M", "write -z -u 16M 1M", "write -z 24M 64k")
    told = json.loads(qemu.img("map", "--output=json", "-f", "raw", there).stdout)
    assert [(extent["start"], extent["length"]) for extent in told if extent["zero"]] == [
        (4 * MIB, 4 * MIB),
        (16 * MIB, MIB),
        (24 * MIB, 64 * KIB),
    ]


@pytest.mark.parametrize("depth", [16, 64])
@pytest.mark.parametrize("way", WAYS)
def test_qemu_img_bench_gets_an_answer_to_each_of_many_requests(
    server: Served, qemu: Qemu, clone: str, way: str, depth: int
) -> None:
    there = uri(server, clone, way)

    def bench(*options: str) -> None:
        qemu.img("bench", "-f", "raw", "-c", "256", "-d", str(depth), *options, there)

    bench()
    bench("-s", "64k")
    bench("-w", "--pattern=1")
    qemu.io(there, "read -P 1 0 1M")
    bench("-w", "--pattern=2", "--flush-interval=64")
    qemu.io(there, "read -P 2 0 1M")
    bench("-w", "--pattern=3", "--flush-interval=64", "--no-drain", "-t", "writethrough")
    qemu.io(there, "read -P 3 0 1M")
    bench("-w", "--pattern=4", "-s", "64k", "-o", "512")
    qemu.io(there, "read -P 3 0 512", "read -P 4 512 16M")
    bench("-s", "64k", "-o", "512")


@pytest.mark.parametrize("way", WAYS)
def test_qemu_io_finds_every_pattern_that_it_wrote(server: Served, qemu: Qemu, clone: str, way: str) -> None:
    there = uri(server, clone, way)
    qemu.io(
        there,
        "write -P 1 0 1M",
        "write -P 2 4096 4096",
        "write -P 3 512 512",  # within a block that was written
        "write -P 4 20481k 512",  # within one that was not
        "write -f -P 5 2M 64k",
        "write -z 3M 1M",
        "write -z -u 4M 1M",
        "write -P 6 5M 1M",
        "discard 5M 512k",
        "write -z -f 6291968 1024",
        "flush",
        "read -P 1 1536 2560",
    )
    qemu.io(
        there,
        "read -P 1 0 512",
        "read -P 3 512 512",
        "read -P 1 1024 3072",
        "read -P 2 4096 4096",
        "read -P 1 8192 1016k",
        "read -P 4 20481k 512",
        "read -P 5 2M 64k",
        "read -P 0 3M 2M",
        "read -P 0 5M 512k",
        "read -P 6 5632k 512k",
        "read -P 0 6291968 1024",
    )


def test_qemu_io_many_requests_in_flight(server: Served, qemu: Qemu, clone: str) -> None:
    writes = [f"aio_write -P {1 + number % 250} {number * 68}k 68k" for number in range(300)]
    reads = [f"aio_read -P {1 + number % 250} {number * 68}k 68k" for number in range(300)]
    qemu.io(uri(server, clone), *writes, "aio_flush", *reads, "aio_flush")


@pytest.mark.parametrize("way", WAYS)
def test_qemu_io_gathers_and_scatters(server: Served, qemu: Qemu, clone: str, way: str) -> None:
    there = uri(server, clone, way)
    qemu.io(
        there,
        "writev -P 1 0 4096 512 65536 1M",
        "writev -f -P 2 4M 512 512 512",
        "aio_write -f -P 3 8M 512 4096",
        "aio_write -z 12M 1M",
        "aio_write -z -u 13M 1M",
        "aio_flush",
        "readv -P 1 0 1M 65536 4096 512",
        "readv -P 2 4M 1024 512",
        "aio_read -P 3 8M 4096 512",
        "aio_read -P 0 12M 1M 1M",
        "aio_flush",
    )


def test_qemu_io_cannot_write_to_the_base(server: Served, qemu: Qemu) -> None:
    refused = run_command(
        [*qemu.command("qemu-io"), "-f", "raw", "-c", "write 0 512", uri(server, "base")], check=False
    )
    assert refused.returncode == 1
    assert "Permission denied" in refused.stderr
