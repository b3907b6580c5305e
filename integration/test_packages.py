"""A machine that lacks what a test needs is told so: the test is skipped, and in CI it fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from integration.guest.cache import cached
from integration.packages import NEEDED, require


@pytest.fixture(params=["", "true"], ids=["at home", "in CI"])
def given_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """How a test ends that cannot be run."""
    monkeypatch.setenv("CI", request.param)
    return pytest.fail.Exception if request.param else pytest.skip.Exception


def test_a_missing_package_ends_the_test_and_is_named(
    given_up: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NEEDED, "fictitious", ("no-such-program",))
    with pytest.raises(given_up, match="apt-get install fictitious"):
        require("fictitious")


def test_something_for_guests_that_cannot_be_made_ends_the_test_with_the_reason(
    given_up: type[BaseException], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def build(directory: Path) -> None:
        raise FileNotFoundError(f"no apt-get for {directory.name}")

    monkeypatch.setenv("NBDCLONE_TEST_CACHE", str(tmp_path))
    for _ in range(2):  # what a failed attempt leaves is not taken for the thing itself
        with pytest.raises(given_up, match="the kernel for guests cannot be made on this machine: no apt-get"):
            cached("kernel", ["recipe"], build)
