"""The command line's verbs for names, sizes and space: what they print, as text and as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nbdclone.cli import app
from nbdclone.errors import UsageError
from nbdclone.store.pool import Pool


@pytest.fixture(name="pool")
def make_pool(tmp_path: Path) -> Pool:
    (tmp_path / "debian.img").write_bytes(os.urandom(1 << 20))
    pool = Pool.open(tmp_path / "pool", create=True)
    pool.import_base(tmp_path / "debian.img", "debian")
    pool.create_clones("debian", ["web1"])
    return pool


def said(pool: Pool, *args: str) -> str:
    result = CliRunner().invoke(app, ["--pool", str(pool.path), *args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def told(pool: Pool, *args: str) -> Any:
    return json.loads(said(pool, *args, "--json"))


def test_a_life_as_text(pool: Pool) -> None:
    assert said(pool, "snapshot", "web1@a") == "snapshot 'web1@a': 16 KiB on disk\n"
    assert said(pool, "rollback", "web1@a", "--dry-run") == "clone 'web1' would be as 'web1@a': 0 B would be freed\n"
    assert said(pool, "reset", "web1") == (
        "clone 'web1' is as 'debian': 0 B is freed; later snapshots that stay: web1@a\n"
    )
    assert said(pool, "rename", "web1", "db1") == "'web1' is called 'db1' now\n"
    assert said(pool, "resize", "db1", "2M") == "clone 'db1': 2 MiB, had 1 MiB\n"
    with pytest.raises(UsageError, match="say --force"):
        said(pool, "resize", "db1", "1M")
    assert said(pool, "resize", "db1", "512K", "--force") == (
        "clone 'db1': 512 KiB, had 2 MiB; 1.5 MiB cut off, 0 B of it its own\n"
    )
    assert said(pool, "rm", "--dry-run", "db1").startswith("would free ")
    assert ", with 1 layer(s)" in said(pool, "rm", "--dry-run", "db1")
    assert said(pool, "rm", "db1") == ""


def test_the_same_as_json(pool: Pool) -> None:
    assert told(pool, "snapshot", "web1@a")["kind"] == "snapshot"
    report = told(pool, "rollback", "web1@a")
    assert (report["to"], report["later"], report["layers"], report["done"]) == ("web1@a", [], [], True)
    assert told(pool, "resize", "web1", "2M")["size"] == 2 << 20
    assert told(pool, "rename", "web1@a", "web1@b") == {"old": "web1@a", "new": "web1@b", "clients": []}
    assert told(pool, "rm", "web1", "--dry-run")["names"] == ["web1"]


def test_du_and_a_tree_with_layers_that_have_no_name(pool: Pool) -> None:
    said(pool, "snapshot", "web1@a")
    pool.remove(["web1@a"])
    (layer,) = os.listdir(pool.path / "layers")
    assert layer not in said(pool, "tree")
    assert said(pool, "tree", "--all").splitlines()[1].startswith(f"└── {layer}  1 MiB")
    lines = said(pool, "du").splitlines()
    assert lines[0].split() == ["NAME", "KIND", "SIZE", "OWN", "SHARED", "FREED", "STATE"]
    assert [line.split()[:2] for line in lines[1:-1]] == [["debian", "base"], ["web1", "clone"], [layer, "layer"]]
    assert lines[-1].startswith("on disk: ")
    found = told(pool, "du", "web1")
    assert [entry["shared"] for entry in found["entries"]] == [1 << 20]
