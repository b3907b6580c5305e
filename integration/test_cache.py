"""What the tests keep between runs is made once, and again when it no longer works."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.guest.cache import cached


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NBDCLONE_TEST_CACHE", str(tmp_path))
    return tmp_path


def build(directory: Path) -> None:
    (directory / "file").touch()


def works(directory: Path) -> bool:
    return (directory / "file").exists()


def test_what_is_cached_is_not_made_again_until_its_recipe_changes() -> None:
    first = cached("thing", ["recipe"], build, works)
    (first / "mark").touch()
    assert cached("thing", ["recipe"], build, works) == first
    assert (first / "mark").exists()
    assert not (cached("thing", ["another"], build, works) / "mark").exists()


def test_what_no_longer_works_is_made_again() -> None:
    first = cached("thing", ["recipe"], build, works)
    (first / "file").unlink()
    assert (cached("thing", ["recipe"], build, works) / "file").exists()


def test_what_could_not_be_made_is_tried_again(own_cache: Path) -> None:
    def fail(directory: Path) -> None:
        build(directory)
        raise OSError("no network")

    with pytest.raises((pytest.skip.Exception, pytest.fail.Exception), match="no network"):
        cached("thing", ["recipe"], fail, works)
    assert works(cached("thing", ["recipe"], build, works))
    assert not list(own_cache.glob("*unfinished*"))
