"""nbdcopy: images there and back over several connections, complete, and as sparse as they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.clients.programs import INSTALLED_QEMU, MIB, SIZE, WAYS, run, uri, write_image
from integration.packages import require
from integration.served import Served, make_pool, save_export, served, sha256_of_file

pytestmark = pytest.mark.timeout(120)

CONNECTIONS = "--connections=4"
BLOCK = 4096


@pytest.fixture(scope="module")
def content(directory: Path) -> Path:
    """What is copied: not what the clones begin with, and with holes elsewhere."""
    return write_image(directory / "content.raw", seed=1)


def bytes_of_data(path: Path) -> int:
    """In blocks that are not all zeros."""
    data = path.read_bytes()
    return sum(BLOCK for start in range(0, len(data), BLOCK) if any(data[start : start + BLOCK]))


def bytes_allocated(there: str) -> int:
    """As base:allocation tells."""
    totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", there).stdout)
    return sum(int(each["size"]) for each in totals if each["type"] == 0)


def check_content(server: Served, export: str, content: Path, directory: Path) -> None:
    saved = save_export(uri(server, export), directory / "saved.raw")
    assert sha256_of_file(saved) == sha256_of_file(content)


@pytest.mark.parametrize("way", WAYS)
def test_a_sparse_file_goes_to_a_clone_and_comes_back_as_sparse(
    server: Served, clone: str, directory: Path, content: Path, way: str
) -> None:
    there, back = uri(server, clone, way), directory / "back.raw"
    data = bytes_of_data(content)
    assert data < 0.6 * SIZE
    run("nbdcopy", CONNECTIONS, "--flush", content, there)
    assert bytes_allocated(there) == data
    back.unlink(missing_ok=True)
    run("nbdcopy", CONNECTIONS, "--flush", "--destination-is-zero", there, back)
    assert sha256_of_file(back) == sha256_of_file(content)
    assert data <= back.stat().st_blocks * 512 < data + MIB


@pytest.mark.parametrize(("there_way", "back_way"), [("unix", "unix"), ("unix", "tcp"), ("tcp", "unix")])
def test_a_clone_goes_to_another_clone(
    server: Served, clones: Iterator[str], directory: Path, content: Path, there_way: str, back_way: str
) -> None:
    require("qemu-utils")
    clone, other = next(clones), next(clones)
    source, destination = uri(server, clone, there_way), uri(server, other, back_way)
    run("nbdcopy", content, source)
    INSTALLED_QEMU.io(source, "write -P 7 5M 3M", "discard 20M 2M")
    INSTALLED_QEMU.io(destination, "write -P 9 0 32M")  # none of which may be left
    run("nbdcopy", CONNECTIONS, "--flush", source, destination)
    assert bytes_allocated(destination) == bytes_allocated(source)
    check_content(server, other, save_export(source, directory / "source.raw"), directory)


@pytest.mark.parametrize(
    "options",
    [
        ("--synchronous",),
        ("--allocated",),
        ("--no-extents", "--sparse=0"),
        ("--synchronous", "--allocated", "--sparse=0"),
        ("--threads=2", "--requests=128", "--request-size=65536", "--queue-size=8388608"),
        ("--request-size=33554432",),
    ],
    ids=" ".join,
)
def test_however_an_image_is_copied_the_clone_holds_it(
    server: Served, clone: str, directory: Path, content: Path, options: tuple[str, ...]
) -> None:
    there = uri(server, clone)
    run("nbdcopy", CONNECTIONS, "--flush", *options, content, there)
    check_content(server, clone, content, directory)
    run("nbdcopy", CONNECTIONS, *options, there, directory / "back.raw")
    assert sha256_of_file(directory / "back.raw") == sha256_of_file(content)


def test_a_destination_that_is_zero_is_told_no_zeros(
    server: Served, clone: str, directory: Path, content: Path
) -> None:
    require("qemu-utils")
    there = uri(server, clone)
    INSTALLED_QEMU.io(there, "discard 0 32M")
    run("nbdcopy", CONNECTIONS, "--flush", "--destination-is-zero", content, there)
    check_content(server, clone, content, directory)
    assert bytes_allocated(there) == bytes_of_data(content)


def test_what_was_copied_and_flushed_is_there_when_the_server_is_killed(directory: Path, content: Path) -> None:
    pool = make_pool(directory / "killed", content, "web1")
    changed = write_image(directory / "changed.raw", seed=2)
    with served(pool) as server:
        run("nbdcopy", CONNECTIONS, "--flush", changed, server.uri("web1"))
        server.kill()
    with served(pool) as server:
        assert sha256_of_file(save_export(server.uri("web1"), directory / "after.raw")) == sha256_of_file(changed)


def test_nbdcopy_is_refused_a_base(server: Served, content: Path) -> None:
    refused = run("nbdcopy", content, uri(server, "base"), check=False)
    assert refused.returncode == 1
    assert "read only" in refused.stderr or "read-only" in refused.stderr
