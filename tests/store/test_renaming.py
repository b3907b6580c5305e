"""Other names: for bases, clones and snapshots; what stands on them does not notice."""

from __future__ import annotations

import os
import pkgutil
from pathlib import Path
from typing import Any

import pytest

from nbdclone.errors import InUse, InvalidName, NameTaken, NotFound, UsageError
from nbdclone.store.pool import Pool
from nbdclone.store.renaming import rename


def read(pool: Pool, name: str) -> bytes:
    with pool.open_clone(name) as disk:
        return disk.pread(disk.size, 0)


@pytest.fixture(name="web1")
def make_web1(pool: Pool) -> Pool:
    """A clone with a snapshot, and a clone of that."""
    pool.create_clones("base", ["web1"])
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"golden", 4090)
    pool.snapshot("web1@golden")
    pool.create_clones("web1@golden", ["web2"])
    with pool.open_clone("web1") as disk:
        disk.pwrite(b"later", 4090)
    return pool


def test_a_clone_goes_by_another_name_with_its_snapshots(web1: Pool) -> None:
    content, golden = read(web1, "web1"), read(web1, "web1@golden")
    rename(web1.places, "web1", "db1")
    assert web1.names() == ["base", "db1", "db1@golden", "web2"]
    assert (read(web1, "db1"), read(web1, "db1@golden"), read(web1, "web2")) == (content, golden, golden)
    assert web1.info("web2").parent == "db1@golden"  # type: ignore[union-attr]
    web1.snapshot("db1@next")
    web1.rollback("db1@golden")
    assert read(web1, "db1") == golden
    web1.create_clones("base", ["web1"])


def test_a_base_goes_by_another_name_and_its_clones_find_it(web1: Pool, content: bytes) -> None:
    mine = read(web1, "web1")
    with web1.open_clone("web2") as open_meanwhile:
        rename(web1.places, "base", "debian")
        assert open_meanwhile.pread(100, 100_000) == content[100_000:100_100]
    assert (read(web1, "debian"), read(web1, "web1")) == (content, mine)
    assert web1.info("web1").base == "debian"  # type: ignore[union-attr]
    web1.reset("web1")
    assert read(web1, "web1") == content
    with pytest.raises(InUse, match="base 'debian' is needed by"):
        web1.remove(["debian"])


@pytest.mark.parametrize("at", ["nbdclone.store.places.BaseRecord.load", "nbdclone.store.opening.Image.open"])
def test_a_base_that_is_renamed_while_its_clone_is_opened_is_found(
    web1: Pool, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    mine = read(web1, "web1")
    names = iter(["debian", "ubuntu", "fedora"])
    original = pkgutil.resolve_name(at)

    def rename_first(*arguments: Any) -> Any:
        if name := next(names, None):
            (base,) = web1.places.bases.iterdir()
            os.rename(base, web1.places.bases / name)
        return original(*arguments)

    monkeypatch.setattr(at, rename_first)
    assert read(web1, "web1") == mine


def test_another_base_that_takes_the_old_name_is_not_mistaken(web1: Pool, tmp_path: Path) -> None:
    mine = read(web1, "web1")
    rename(web1.places, "base", "debian")
    (tmp_path / "other.img").write_bytes(b"other678" * 640)
    web1.import_base(tmp_path / "other.img", "base")
    assert read(web1, "web1") == mine


def test_a_snapshot_goes_by_another_name(web1: Pool) -> None:
    golden = read(web1, "web1@golden")
    with web1.open_clone("web1"):  # it may be open
        rename(web1.places, "web1@golden", "web1@silver")
    assert web1.names() == ["base", "web1", "web1@silver", "web2"]
    assert read(web1, "web1@silver") == golden == read(web1, "web2")
    web1.rollback("web1@silver")
    assert read(web1, "web1") == golden


def test_a_name_that_a_snapshot_left_that_was_cut_off_is_free(web1: Pool) -> None:
    directory = web1.path / "clones/web1/snapshots"
    own_id = web1.places.header(web1.places.delta("web1")).id
    (directory / "half").write_text(f'{{"layer": "{own_id.hex()}", "created": 1}}')
    rename(web1.places, "web1@golden", "web1@half")
    assert web1.names() == ["base", "web1", "web1@half", "web2"]


@pytest.mark.parametrize(
    ("old", "new", "error", "said"),
    [
        ("web1", "web2", NameTaken, "there is a clone 'web2' in"),
        ("web1", "base", NameTaken, "there is a base 'base' in"),
        ("web1", "web1", NameTaken, "there is a clone 'web1' in"),
        ("web1", "../x", InvalidName, "cannot be a name"),
        ("web1", "web3@x", UsageError, "is no snapshot, and cannot be called"),
        ("web9", "web3", NotFound, "there is no base or clone 'web9'"),
        ("web1@golden", "web1@other", NameTaken, "there is a snapshot 'web1@other' already"),
        ("web1@golden", "web1@golden", NameTaken, "there is a snapshot 'web1@golden' already"),
        ("web1@golden", "web2@golden", UsageError, "is a snapshot of 'web1'"),
        ("web1@golden", "golden", InvalidName, "is no snapshot"),
        ("web1@golden", "web1@a/b", InvalidName, "cannot be a name"),
        ("web1@none", "web1@x", NotFound, "there is no snapshot 'web1@none'"),
    ],
)
def test_a_name_that_cannot_be_is_refused_and_nothing_is_changed(
    web1: Pool, old: str, new: str, error: type[Exception], said: str
) -> None:
    web1.snapshot("web1@other")
    before = web1.names()
    with pytest.raises(error, match=said):
        rename(web1.places, old, new)
    assert web1.names() == before


def test_a_clone_that_somebody_has_keeps_its_name(web1: Pool) -> None:
    with web1.open_clone("web1"), pytest.raises(InUse, match="clone 'web1' is in use by this process"):
        rename(web1.places, "web1", "db1")
    assert "web1" in web1.names()


def test_a_clone_whose_delta_is_missing_can_be_renamed(web1: Pool) -> None:
    (web1.path / "clones/web2/delta").unlink()
    rename(web1.places, "web2", "broken")
    assert "broken" in web1.names()
