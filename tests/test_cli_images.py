"""Import and export on the command line: what they print, and what a user can get wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nbdclone.cli import app
from nbdclone.errors import NBDCloneError
from nbdclone.store.pool import Pool

IMAGE = random.Random("images").randbytes(1 << 20)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    (tmp_path / "debian.raw").write_bytes(IMAGE)
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "debian.raw")
    pool.create_clones("debian", ["web1"])
    return pool.path


def run(pool: Path, *args: str | Path) -> Result:
    return CliRunner().invoke(app, ["--pool", str(pool), *map(str, args)], env={"COLUMNS": "200"})


def test_export_says_what_it_made(pool: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.img"
    assert run(pool, "export", "web1", file).stdout == f"{file}: 'web1' as raw: 1 MiB, 1 MiB on disk\n"
    assert file.read_bytes() == IMAGE
    done = json.loads(run(pool, "export", "debian", file, "--force", "--json").stdout)
    assert done | {"allocated": 0} == {
        "name": "debian", "file": str(file), "format": "raw", "size": 1 << 20, "allocated": 0, "backing": None
    }  # fmt: skip


def test_export_to_standard_output_is_the_disk_and_nothing_else(pool: Path) -> None:
    command = [sys.executable, "-m", "nbdclone", "--pool", str(pool), "export", "web1", "-"]
    assert subprocess.run(command, capture_output=True, check=True, timeout=60).stdout == IMAGE


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("export", "web1", "-", "--format", "qcow2"), "only a raw image goes to standard output"),
        (("export", "web1", "-", "--link"), "only a raw image goes to standard output"),
        (("export", "web1", "x.qcow2", "--relative"), "it goes with --link"),
        (("import", "x.qcow2", "--with-base"), "it goes with --as-clone"),
        (("import", "x.qcow2", "--as-clone", "x", "--immutable"), "are for bases"),
        (("import", "x.qcow2", "--as-clone", "x", "--name", "y"), "give --with-base too"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(pool: Path, args: tuple[str, ...], said: str) -> None:
    done = run(pool, *args)
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("export", "nosuch", "x.raw"), "there is no base or clone 'nosuch'"),
        (("export", "web1", "x.raw", "--format", "iso"), "'iso' is no format that is known here"),
        (("import", "debian.raw", "--as-clone", "x"), "only a qcow2 overlay can become a clone"),
        (("import", "none.qcow2", "--as-clone", "x"), "none.qcow2: no such file"),
        (("import", "debian.raw", "--as-clone", "web1"), "'web1'"),
        (("import", "debian.raw", "--as-clone", "a/b"), "cannot be a name"),
    ],
)
def test_what_cannot_be_is_an_error_and_changes_nothing(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(pool, *args)
    assert isinstance(done.exception, NBDCloneError)
    assert said in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["debian.raw", "pool"]
    assert Pool.open(pool).names() == ["debian", "web1"]


def test_import_tells_what_it_made_as_json(pool: Path, tmp_path: Path) -> None:
    done = json.loads(run(pool, "import", tmp_path / "debian.raw", "--name", "again", "--json").stdout)
    assert (done["kind"], done["name"], done["size"]) == ("base", "again", 1 << 20)


def test_the_help_of_link_says_what_becomes_of_the_base(pool: Path) -> None:
    said = " ".join(run(pool, "export", "--help").stdout.split())
    assert "The base must not be changed or removed as long as there is the overlay" in said
