"""One server for each file of tests: on TCP and on a Unix socket, with the clone "spare" that nobody writes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from integration import backports
from integration.clients.programs import INSTALLED_QEMU, Qemu, uri, write_image
from integration.packages import require
from integration.served import Served, make_pool, nbdclone, save_export, served, sha256_of_file


@pytest.fixture(scope="session")
def newer_qemu() -> Qemu:
    """From 8.2 on, with extended headers."""
    try:
        backports.newer_qemu("qemu-img")
    except backports.Unavailable as error:
        pytest.skip(str(error))
    return Qemu(backports.newer_qemu)


@pytest.fixture(params=["installed", "newer"], scope="module")
def qemu(request: pytest.FixtureRequest) -> Qemu:
    if request.param == "newer":
        newer: Qemu = request.getfixturevalue("newer_qemu")
        return newer
    require("qemu-utils")
    return INSTALLED_QEMU


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clients")


@pytest.fixture(scope="module")
def image(directory: Path) -> Path:
    return write_image(directory / "image.raw")


@pytest.fixture(scope="module")
def server(directory: Path, image: Path) -> Iterator[Served]:
    """At the end, nothing that was done to clones has changed the base, nor another clone."""
    require("libnbd-bin")
    pool = make_pool(directory / "pool", image, "spare")
    with served(pool, "--socket", directory / "nbd.sock", "--listen", "127.0.0.1:0") as server:
        yield server
        for untouched in ("base", "spare"):
            saved = save_export(uri(server, untouched), directory / "untouched.raw")
            assert sha256_of_file(saved) == sha256_of_file(image), f"{untouched} has changed"


@pytest.fixture(scope="module")
def clones(server: Served, directory: Path) -> Iterator[Iterator[str]]:
    """Fresh clones, made while the server runs."""
    yield from made_as_needed(directory / "pool", "clone", 12)


@pytest.fixture(scope="module")
def large_clones(server: Served, directory: Path) -> Iterator[Iterator[str]]:
    """Fresh clones of 10 GiB, of which all but the beginning is a hole."""
    yield from made_as_needed(directory / "pool", "large", 4, "--size", "10G")


@pytest.fixture
def clone(clones: Iterator[str]) -> str:
    return next(clones)


@pytest.fixture
def large(large_clones: Iterator[str]) -> str:
    return next(large_clones)


def made_as_needed(pool: Path, prefix: str, count: int, *options: str) -> Iterator[Iterator[str]]:
    """An iterator over fresh clones, which are made `count` at a time: each command takes a while to start."""
    made: list[str] = []

    def fresh() -> Iterator[str]:
        while True:
            names = [f"{prefix}{len(made) + number}" for number in range(count)]
            nbdclone("--pool", pool, "clone", "base", *names, *options)
            made.extend(names)
            yield from names

    yield fresh()
    if made:
        # What a program left open, it would be refused for: the server has to notice that its clients are gone.
        nbdclone("--pool", pool, "rm", *made)
