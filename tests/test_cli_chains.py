"""The verbs of what clones stand on, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from nbdclone.cli import app
from nbdclone.store.pool import Pool

BLOCK = 4096


@pytest.fixture(name="pool")
def make_pool(tmp_path: Path) -> Path:
    """Two clones of 'old' that have a block alike, and a base 'new' in which one block is another."""
    pool = Pool.open(tmp_path / "pool", create=True)
    for name, byte in (("old", b"o"), ("new", b"n")):
        (tmp_path / "image").write_bytes(b"x" * 40 * BLOCK + byte * BLOCK)
        pool.import_base(tmp_path / "image", name)
    pool.create_clones("old", ["web1", "web2"])
    for name in ("web1", "web2"):
        with pool.open_clone(name) as disk:
            disk.pwrite(b"alike" * 820 * 30, 0)
    return pool.path


def run(pool: Path, *arguments: str, status: int = 0) -> Result:
    result = CliRunner().invoke(app, ["--pool", str(pool), *arguments])
    assert result.exit_code == status, result.output
    return result


def test_rebase_says_for_each_clone_what_was_done(pool: Path) -> None:
    planned = run(pool, "rebase", "web1", "web2", "--onto", "new", "--dry-run").stdout.splitlines()
    assert planned[0].startswith("'web1': delta ")
    assert planned[0].endswith("; 4 KiB to copy, 0 B in conflict")
    done = run(pool, "rebase", "web1", "--onto", "new").stdout
    assert done.startswith("'web1' is on 'new' now: delta ")
    assert done.endswith("; 4 KiB copied, 0 B in conflict, 0 B dropped\n")
    again = run(pool, "rebase", "web1", "web2", "--onto", "new", "--keep-content").stdout.splitlines()
    assert again[0] == "'web1' is on 'new' already"


def test_rebase_says_what_went_into_a_layer(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdclone.store.common_layer.WORTH", BLOCK)
    planned = run(pool, "rebase", "web1", "web2", "--onto", "new", "--dry-run").stdout.splitlines()
    assert planned[2] == "4 KiB of what they have otherwise than 'new' would be in a layer beneath them"
    done = run(pool, "rebase", "web1", "web2", "--onto", "new").stdout.splitlines()
    assert done[2].endswith(" KiB of what they have otherwise than 'new' is in a layer beneath them")
    assert len(list(pool.glob("layers/*"))) == 1
    run(pool, "rebase", "web1", "--onto", "old")
    assert list(pool.glob("layers/*")) == [], "it became a part of web2"


def test_rebase_as_json(pool: Path) -> None:
    result = json.loads(run(pool, "rebase", "web1", "--onto", "new", "--json").stdout)
    assert (result["onto"], result["shared"]) == ("new", 0)
    (line,) = result["clones"]
    assert line.keys() == {"name", "state", "before", "after", "copied", "conflicts", "dropped"}
    assert (line["name"], line["state"], line["copied"]) == ("web1", "done", BLOCK)


def test_changes_are_kept_only_by_who_says_that_he_means_it(pool: Path) -> None:
    refused = run(pool, "rebase", "web1", "--onto", "new", "--keep-changes", status=2)
    assert "give --yes to say that you mean it" in refused.output
    with Pool.open(pool).open_clone("web1") as disk:
        assert disk.pread(1, 40 * BLOCK) == b"o"
    done = run(pool, "rebase", "web1", "--onto", "new", "--keep-changes", "--yes")
    assert "becomes what the new base has" in done.stderr
    assert done.stdout == "'web1' is on 'new' now, with its own blocks as they were\n"
    with Pool.open(pool).open_clone("web1") as disk:
        assert disk.pread(1, 40 * BLOCK) == b"n"


def test_the_two_ways_exclude_each_other(pool: Path) -> None:
    result = run(pool, "rebase", "web1", "--onto", "new", "--keep-changes", "--keep-content", status=2)
    assert "choose one" in result.output


def test_hoist_says_what_is_shared(pool: Path) -> None:
    planned = run(pool, "hoist", "old", "--dry-run").stdout
    assert "124 KiB would be shared by 2 clones of 'old'" in planned
    result = json.loads(run(pool, "hoist", "old", "--json").stdout)
    assert result["clones"] == ["web1", "web2"]
    assert result["after"] < result["before"]
    Pool.open(pool).create_clones("old", ["web3", "web4"])
    nothing = run(pool, "hoist", "old").stdout
    assert nothing == "the clones of 'old' have nothing alike that would be worth a layer\n"


def test_hoist_names_whom_it_left_out(pool: Path) -> None:
    made = Pool.open(pool)
    made.create_clones("old", ["web3"])
    with made.open_clone("web3") as disk:
        disk.pwrite(b"alike" * 820 * 30, 0)
        disk.flush()
        said = run(pool, "hoist", "old").stdout.splitlines()
    assert said[0].endswith(" after")
    assert said[1].startswith("'web3' stays as it was: clone 'web3' is in use by ")


def test_a_hoist_that_can_move_nobody_leaves_nothing(pool: Path) -> None:
    made = Pool.open(pool)
    with made.open_clone("web1"), made.open_clone("web2"):
        refused = run(pool, "hoist", "old", status=1).exception
    assert str(refused).startswith("clone 'web1' is in use by ")
    assert made.places.layer_ids() == []


@pytest.mark.parametrize("option", ["--dry-run", "--dedupe"])
def test_a_hoist_that_moves_nobody_anyway_merges_nothing_when_it_is_refused(pool: Path, option: str) -> None:
    made = Pool.open(pool)
    made.snapshot("web1@one")
    made.remove(["web1@one"])
    run(pool, "hoist", "nosuch", option, status=1)
    assert len(made.places.layer_ids()) == 1
