"""Images of other formats, which qemu-img makes and nbdclone imports."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from integration.clients.programs import run, uri
from integration.packages import require
from integration.served import Served, nbdclone

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk", "vdi", "vhdx"])
def test_an_image_of_another_format_is_imported_as_what_it_holds(
    server: Served, directory: Path, image: Path, image_format: str
) -> None:
    require("qemu-utils")
    source = directory / f"source.{image_format}"
    run("qemu-img", "convert", "-f", "raw", "-O", image_format, image, source)
    name = f"from-{image_format}"
    nbdclone("--pool", directory / "pool", "import", source, "--name", name)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri(server, name), image)


def test_a_qcow2_that_was_truncated_is_refused(directory: Path, server: Served, image: Path) -> None:
    require("qemu-utils")
    source = directory / "short.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, source)
    os.truncate(source, source.stat().st_size // 2)
    refused = nbdclone("--pool", directory / "pool", "import", source, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"nbdclone: {source} is damaged or truncated: ")
    assert refused.stderr.count("\n") == 1
