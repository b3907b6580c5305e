"""docs/lifecycle.md says what the command line does: its commands run, in their order, and none is missing."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nbdclone.cli  # noqa: F401 - registers the commands
from nbdclone.commands.common import app
from nbdclone.control.verbs import VERBS
from nbdclone.store.layer import MAX_LAYERS
from nbdclone.store.pool import Pool

PAGE = (Path(__file__).parents[1] / "docs" / "lifecycle.md").read_text()
[SCRIPT] = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
# Commands that are not about the life of a clone; each has a page of its own.
OTHERS = {"ls", "info", "check", "serve", "cert", "demo", "trace", "quota", "keep", "import"}


def commands() -> set[str]:
    return {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}


def test_the_table_has_every_command_of_a_clones_life_and_no_other() -> None:
    rows = [row.split(" | ")[1] for row in re.findall(r"^\| (?!-)(.*) \|$", PAGE, re.MULTILINE)[1:]]
    named = {verb for cell in rows for verb in re.findall(r"`([a-z]+)", cell)}
    assert named == commands() - OTHERS
    assert VERBS.keys() & commands() <= named | OTHERS


def test_every_command_of_the_table_is_explained() -> None:
    explained = set(re.findall(r"[a-z]+", " ".join(re.findall(r"^## (.*)$", PAGE, re.MULTILINE))))
    assert commands() - OTHERS <= explained
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE):
        if section.split("\n", 1)[0].split(" ")[0].rstrip(",") in VERBS.keys() - {"du"}:
            assert "*Interrupted*" in section, section
            assert "\n    " in section, "a picture"
    assert f"at most {MAX_LAYERS} layers" in PAGE.replace("\n", " ")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """All the commands, run as they stand: where, and what each printed."""
    directory = tmp_path_factory.mktemp("page")
    rng = random.Random("page")
    image = rng.randbytes(2 << 20)
    (directory / "debian.img").write_bytes(image)
    (directory / "debian2.img").write_bytes(image[: 1 << 20] + rng.randbytes(65536) + image[(1 << 20) + 65536 :])
    wrapper = directory / "bin" / "nbdclone"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} -W error -m nbdclone "$@"\n')
    wrapper.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "NBDCLONE_POOL": str(directory / "pool"),
    }
    said = {}
    for line in SCRIPT.splitlines():
        done = subprocess.run(
            ["sh", "-c", line], check=False, cwd=directory, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (line, done.stderr)
        said[line.removeprefix("nbdclone ")] = done.stdout
    return directory, said


def test_the_commands_of_the_page_run_one_after_the_other(ran: tuple[Path, dict[str, str]]) -> None:
    directory, said = ran
    used = {word for line in said for word in line.split() if word in commands()}
    assert commands() - OTHERS <= used
    assert said["check"].endswith("all is well\n")
    left = {info.name for info in Pool.open(directory / "pool").entries()}
    assert left == {"debian", "debian2", "web", "web1"}
    assert {info.name for info in Pool.open(directory / "elsewhere").entries()} == {"debian2", "web1", "web1@first"}


def test_what_was_done_to_the_clones_of_the_page_left_their_content(ran: tuple[Path, dict[str, str]]) -> None:
    directory, _ = ran
    image = (directory / "debian.img").read_bytes()
    assert (directory / "first.raw").read_bytes() == image
    with Pool.open(directory / "pool").open_clone("web1") as clone:
        assert clone.size == 64 << 20
        assert clone.pread(len(image), 0) == image  # on debian2, and not as it
        assert not any(clone.pread(1 << 20, clone.size - (1 << 20)))
